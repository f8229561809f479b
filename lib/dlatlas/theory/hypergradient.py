r"""Hypergradient descent: SGD-HD, SGDN-HD and Adam-HD (baydin2018hypergradient).

The learning rate is itself a parameter of the loss after the next step, and its derivative costs one inner product: the
gradient now times the direction of the step before. If the two agree, the last step was too short and the rate grows; if they
oppose each other, it overshot and the rate falls. One extra copy of the parameters is all the memory that it takes.

Equations: write any method as $\theta_t = \theta_{t-1} - \alpha_t u_t$ with a direction $u_t$. With $g_t = \nabla f(\theta_{t-1})$,

$$\frac{\partial f(\theta_{t-1})}{\partial \alpha_{t-1}} = -\, g_t^\top u_{t-1}, \qquad
\alpha_t = \alpha_{t-1} + \beta \, g_t^\top u_{t-1}, \qquad u_0 = 0$$

SGD has $u_t = g_t$; momentum has $v_t = \mu v_{t-1} + g_t$ and $u_t = v_t$, or $u_t = g_t + \mu v_t$ with Nesterov's
look-ahead; Adam has $u_t = \hat m_t / (\sqrt{\hat v_t} + \epsilon)$ with bias-corrected moments. The product sums over all
parameters of a group.

Deviations from the paper:

1. Plain heavy-ball momentum is offered as well; the paper has SGD, Nesterov's momentum and Adam.
2. Each parameter group has a rate of its own; the paper has one rate for all.
3. Only the additive rule is here, not the multiplicative variant that the paper mentions.

Nothing keeps $\alpha$ positive or finite. With a large $\beta$ or on a rough loss it can turn negative or explode; it is not
clipped, so look at `group['lr']`.

Later work: Chandra et al. (2022) let the rate of the rate be learnt as well, and find that a taller stack of such rules depends
less on its first guess. The rule looks one step ahead only, so it inherits the short-horizon bias that Wu et al. (2018)
describe: with noisy gradients it tends to choose rates that are too small.

Example:
    import torch
    from torch import nn
    from dlatlas.theory.hypergradient import SGDHD

    x = torch.randn(512, 20)
    y = torch.tanh(x @ torch.randn(20, 1))
    model = nn.Sequential(nn.Linear(20, 32), nn.Tanh(), nn.Linear(32, 1))
    optimizer = SGDHD(model.parameters(), lr=1e-4, hypergrad_lr=1e-2)  # starts far too slow
    for step in range(401):
        loss = nn.functional.mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 0:
            print(f"step {step}: learning rate {optimizer.param_groups[0]['lr']:.4f}, loss {loss:.4f}")
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

__all__ = ["SGDHD", "AdamHD"]


class _Hypergradient(Optimizer, ABC):
    """Moves each group's rate by the last direction times the new gradient, then steps along the new direction."""

    @abstractmethod
    def _direction(self, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        """The next step of one parameter, before the rate; keeps its moments in `state`."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """One update of every group's learning rate and of every parameter that has a gradient; returns the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            active = [p for p in group["params"] if p.grad is not None]
            decay = group.get("weight_decay", 0.0)
            gradients = [p.grad.add(p, alpha=decay) if decay else p.grad for p in active]
            # The whole inner product comes before any change: one rate for all parameters of the group.
            agreement = sum(float((g * self.state[p]["u"]).sum()) for p, g in zip(active, gradients) if "u" in self.state[p])
            group["lr"] = float(group["lr"] + group["hypergrad_lr"] * agreement)
            for p in self.state.keys() & set(group["params"]):
                self.state[p].pop("u", None)  # a parameter that rests in this step has no direction
            for p, g in zip(active, gradients):
                self.state[p]["u"] = self._direction(g, self.state[p], group)
                p.add_(self.state[p]["u"], alpha=-group["lr"])
        return loss


class SGDHD(_Hypergradient):
    r"""SGD, with or without momentum, that adapts its own rate by $\alpha \leftarrow \alpha + \beta\, g_t^\top u_{t-1}$.

    Args:
        params: parameters or parameter groups.
        lr: the first learning rate; the current one is ``param_groups[i]['lr']``, a float.
        hypergrad_lr: $\beta$, the learning rate of the learning rate.
        momentum: $\mu$ in $v_t = \mu v_{t-1} + g_t$.
        nesterov: step along $g_t + \mu v_t$ in place of $v_t$.
        weight_decay: adds this multiple of the parameter to its gradient.

    Raises:
        ValueError: a negative number, or Nesterov's rule without momentum.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        hypergrad_lr: float = 1e-3,
        momentum: float = 0.0,
        nesterov: bool = False,
        weight_decay: float = 0.0,
    ):
        _not_negative(lr=lr, hypergrad_lr=hypergrad_lr, momentum=momentum, weight_decay=weight_decay)
        if nesterov and momentum == 0:
            raise ValueError("nesterov=True needs a positive momentum, got momentum=0")
        super().__init__(
            params,
            {"lr": float(lr), "hypergrad_lr": hypergrad_lr, "momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay},
        )

    def _direction(self, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        mu = group["momentum"]
        if mu == 0:
            return g.clone()  # the next backward pass may write into the same memory
        state["v"] = state["v"].mul_(mu).add_(g) if "v" in state else g.clone()
        return g.add(state["v"], alpha=mu) if group["nesterov"] else state["v"]


class AdamHD(_Hypergradient):
    r"""Adam that adapts its own rate by $\alpha \leftarrow \alpha + \beta\, g_t^\top u_{t-1}$.

    Args:
        params: parameters or parameter groups.
        lr: the first learning rate; the current one is ``param_groups[i]['lr']``, a float.
        hypergrad_lr: $\beta$, the learning rate of the learning rate. The inner product grows with the model, so no value suits all.
        betas: Adam's $(\beta_1, \beta_2)$, both in [0, 1).
        eps: Adam's $\epsilon$.

    Raises:
        ValueError: a negative number, or a beta outside [0, 1).
    """

    def __init__(
        self, params: Any, lr: float = 1e-3, hypergrad_lr: float = 1e-8, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8
    ):
        _not_negative(lr=lr, hypergrad_lr=hypergrad_lr, eps=eps)
        if len(betas) != 2 or not all(0 <= b < 1 for b in betas):
            raise ValueError(f"betas must be in [0, 1), got {betas}")
        super().__init__(params, {"lr": float(lr), "hypergrad_lr": hypergrad_lr, "betas": tuple(betas), "eps": eps})

    def _direction(self, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        b1, b2 = group["betas"]
        if "step" not in state:
            state.update(step=0, m=torch.zeros_like(g), v=torch.zeros_like(g))
        state["step"] += 1
        state["m"].lerp_(g, 1 - b1)
        state["v"].mul_(b2).addcmul_(g, g, value=1 - b2)
        root = (state["v"] / (1 - b2 ** state["step"])).sqrt_().add_(group["eps"])
        return (state["m"] / (1 - b1 ** state["step"])).div_(root)


def _not_negative(**values: float) -> None:
    for name, value in values.items():
        if not value >= 0:
            raise ValueError(f"{name} must not be negative, got {value}")
