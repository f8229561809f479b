r"""Optimistic mirror descent and optimistic Adam (daskalakis2018optimism).

When two players descend against each other, plain gradient steps circle around the equilibrium and drift outwards: each player reacts to
where the other one *was*. An optimistic player guesses the next gradient, namely that it will be like the last one, and steps as if it
had already seen it. That guess is a small brake on the rotation, and the last iterate arrives instead of circling.

Equations: with the gradient $g_t$ of a player's own loss and $g_{-1} = 0$,

$$ \theta_{t+1} = \theta_t - 2 \eta\, g_t + \eta\, g_{t-1} . $$

Optimistic Adam does the same with Adam's direction $u_t = \hat m_t / (\sqrt{\hat v_t} + \epsilon)$, bias-corrected moments:

$$ \theta_{t+1} = \theta_t - 2 \eta\, u_t + \eta\, u_{t-1} . $$

On $\min_x \max_y x^\top y$ both players together follow a linear map. Its characteristic equation for one coordinate is
$\lambda^2 - \lambda = \pm i \eta (2 \lambda - 1)$, and the largest root is below 1 in size for $0 < \eta < 1/\sqrt 3$.

Deviations from the paper:

1. Mirror descent with the squared norm only, that is, optimistic gradient descent; the paper's theorem is about this case.

Later work: Gidel et al. (2019) place the step among the methods of extrapolation ("extrapolation from the past": extragradient with one gradient a
step instead of two). Mokhtari et al. (2020) show that both approximate the proximal point method, and prove linear rates. With noisy gradients
the guess is as noisy as the gradient; Mishchenko et al. (2020) show that extragradient then wants the same sample at both places. Daskalakis
and Panageas (2018) find that in general games the method may also stop at points that are no local equilibria.

Example:
    import torch
    from dlatlas.gans.optimistic import OMD

    data = torch.randn(2000, 2) + torch.tensor([3.0, -1.0])
    for make in (torch.optim.SGD, OMD):
        shift = torch.zeros(2, requires_grad=True)  # the generator: noise + shift
        critic = torch.nn.Linear(2, 1, bias=False)
        opt_g, opt_d = make([shift], lr=0.1), make(critic.parameters(), lr=0.1)  # the method
        for _ in range(1000):
            real = data[torch.randint(len(data), (256,))]
            fake = torch.randn(256, 2) + shift
            opt_g.zero_grad(), opt_d.zero_grad()
            loss = critic(real).mean() - critic(fake).mean()  # small for G, large for D
            loss.backward()
            critic.weight.grad.neg_()
            opt_g.step(), opt_d.step()
        error = (shift - data.mean(0)).norm().item()
        print(f"{make.__name__}: the generator's mean ends {error:.2f} from that of the data")
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

__all__ = ["OMD", "OptimisticAdam", "bilinear_omd"]


class _Optimistic(Optimizer):
    """Steps along twice the direction minus the last direction; subclasses say what the direction is."""

    def _direction(self, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        """A new tensor, or the gradient itself."""
        return g

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """One update of every parameter that has a gradient; returns the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                u = self._direction(p.grad, state, group)
                p.add_(u, alpha=-2 * group["lr"])
                if "last" in state:
                    p.add_(state["last"], alpha=group["lr"])
                    state["last"].copy_(u)
                else:
                    state["last"] = u.clone()
        return loss


class OMD(_Optimistic):
    r"""Optimistic gradient descent, $\theta \leftarrow \theta - 2\eta g_t + \eta g_{t-1}$.

    A player who maximises hands over the gradient of minus its payoff. A parameter without a gradient rests and keeps its last one.

    Args:
        params: parameters or parameter groups.
        lr: step $\eta$.

    Raises:
        ValueError: `lr` is not positive.
    """

    def __init__(self, params: Any, lr: float):
        _check_lr(lr)
        super().__init__(params, {"lr": lr})


class OptimisticAdam(_Optimistic):
    r"""Adam with the optimistic step: the *update direction* of the step before is taken back once, not the gradient.

    Args:
        params: parameters or parameter groups.
        lr: step $\eta$.
        betas: $(\beta_1, \beta_2)$ of the moments, both in [0, 1).
        eps: $\epsilon$, added to the root.

    Raises:
        ValueError: `lr` is not positive, `eps` negative or a beta outside [0, 1).
    """

    def __init__(self, params: Any, lr: float = 1e-4, betas: tuple[float, float] = (0.5, 0.9), eps: float = 1e-8):
        _check_lr(lr)
        if len(betas) != 2 or not all(0 <= b < 1 for b in betas) or not eps >= 0:
            raise ValueError(f"betas must be two numbers in [0, 1) and eps >= 0, got {betas} and {eps}")
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "eps": eps})

    def _direction(self, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        b1, b2 = group["betas"]
        if "step" not in state:
            state.update(step=0, m=torch.zeros_like(g), v=torch.zeros_like(g))
        state["step"] += 1
        state["m"].lerp_(g, 1 - b1)
        state["v"].mul_(b2).addcmul_(g, g, value=1 - b2)
        root = (state["v"] / (1 - b2 ** state["step"])).sqrt_().add_(group["eps"])
        return (state["m"] / (1 - b1 ** state["step"])).div_(root)


def bilinear_omd(A: Tensor, x0: Tensor, y0: Tensor, lr: float, steps: int) -> tuple[Tensor, Tensor]:
    r"""Both players' paths on $\min_x \max_y x^\top A y$, moving at the same time.

    Args:
        A: payoff ``[n, m]``.
        x0: start of the minimiser ``[n]``.
        y0: start of the maximiser ``[m]``.
        lr: step of both.
        steps: number of steps.

    Returns:
        ``xs [steps + 1, n]`` and ``ys [steps + 1, m]``, starts included.

    Raises:
        ValueError: shapes that do not fit, `lr` not positive or `steps` negative.
    """
    _check_lr(lr)
    if A.dim() != 2 or x0.shape != A.shape[:1] or y0.shape != A.shape[1:] or steps < 0:
        shapes = [tuple(t.shape) for t in (A, x0, y0)]
        raise ValueError(f"expected A [n, m], x0 [n], y0 [m] and steps >= 0, got {shapes} and {steps}")
    xs, ys = [x0], [y0]
    last_x, last_y = torch.zeros_like(x0), torch.zeros_like(y0)
    for _ in range(steps):
        g_x, g_y = A @ ys[-1], A.T @ xs[-1]
        xs.append(xs[-1] - 2 * lr * g_x + lr * last_x)
        ys.append(ys[-1] + 2 * lr * g_y - lr * last_y)
        last_x, last_y = g_x, g_y
    return torch.stack(xs), torch.stack(ys)


def _check_lr(lr: float) -> None:
    if not lr > 0:
        raise ValueError(f"lr must be positive, got {lr}")
