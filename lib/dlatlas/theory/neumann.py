r"""Neumann optimiser (krishnan2018neumann).

A Newton step needs the inverse of the Hessian. The geometric (Neumann) series gives that inverse by repeated multiplication,
and a gradient taken at a shifted point is a Hessian-vector product for free. Spread over successive mini-batches, the inner
loop that solves for the Newton step becomes an optimiser with one gradient a step, momentum that is reset from time to time,
and two small regularisers that keep the implicit quadratic model well behaved.

Equations:

For a positive definite $A$ and $0 < \eta < 2 / \lambda_{max}(A)$,

$$ A^{-1} b = \eta \sum_{k \ge 0} (I - \eta A)^k b , \qquad m_{k+1} = m_k - \eta (A m_k - b) , \quad m_0 = 0 . $$

With $A = \nabla^2 f(w)$ and $b = -\nabla f(w)$ the bracket is $\nabla f(w) + \nabla^2 f(w) m \approx \nabla f(w + m)$. Damping the
iterate by $\mu$ (which makes an indefinite Hessian positive definite) and moving the weights along gives the idealised form

$$ m_t = \mu m_{t-1} - \eta \nabla f(w_{t-1} + \mu m_{t-1}) , \qquad w_t = w_{t-1} + m_t . $$

The optimiser stores the shifted point $\theta = w + \mu m$. Let $u$ be a moving average of $\theta$ and $r = \|\theta - u\|$:

$$ d = \nabla f(\theta) + \left( \alpha r^2 - \beta / r^2 \right) \frac{\theta - u}{r} , \qquad m \leftarrow \mu m - \eta d , $$

$$ \theta \leftarrow \theta + \mu m - \eta d , \qquad u \leftarrow \theta + \gamma (u - \theta) . $$

At a reset $m \leftarrow -\eta \nabla f(\theta)$ and $\theta$ stays. The coefficient rises after each reset: $k$ steps after
it, $\mu_k = 1 - 1/(1 + k)$ clipped to the interval `momentum`.

Deviations from the paper:

1. The paper states that $\mu$ goes from 0.5 to 0.9 in the form $1 - 1/(1 + t)$ and restarts at resets, but not the time scale;
   here $t$ is the number of steps since the reset, so that 0.9 is reached after nine steps.
2. The paper multiplies its $\beta = 10^{-5}$ by the number of weights. Here `beta` is what stands in the equation: pass the
   product for the paper's setting.
3. The paper counts resets in epochs (10, then doubling) and starts with 5 epochs of plain SGD; here both are steps.
4. The step is constant; a decaying one comes from any `torch.optim.lr_scheduler`.

Later work: Without regularisers and between resets the method is Nesterov's momentum, as the equations show, so its gains
come from the reset schedule, the regularisers and tuning. The authors report that it failed on a sequence-to-sequence speech
model. It is not part of the common libraries. A benchmark of fifteen optimisers with tuned steps (Schmidt et al. 2021, "Descending
through a crowded valley") found none that wins across tasks.

Example:
    import torch
    from torch import nn
    from dlatlas.theory.neumann import Neumann, neumann_solve

    A = torch.diag(torch.linspace(0.1, 1.0, 10))
    for terms in (10, 100):
        print(f"{terms} terms: residual {(A @ neumann_solve(lambda m: A @ m, torch.ones(10), lr=1.0, steps=terms) - 1).norm():.1e}")
    x = torch.randn(512, 20)
    y = torch.tanh(x @ torch.randn(20, 1))
    model = nn.Sequential(nn.Linear(20, 32), nn.Tanh(), nn.Linear(32, 1))
    optimizer = Neumann(model.parameters(), lr=0.05)
    for step in range(300):
        loss = nn.functional.mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    optimizer.finalize()  # before the weights are used
    print(f"loss {nn.functional.mse_loss(model(x), y).item():.4f}")
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim import Optimizer

__all__ = ["Neumann", "neumann_solve"]


def neumann_solve(matvec: Callable[[Tensor], Tensor], b: Tensor, lr: float, steps: int) -> Tensor:
    r"""Approximate $A^{-1} b$ by `steps` terms of the Neumann series.

    $m_0 = 0$, $m_{k+1} = m_k - \eta (A m_k - b)$; the error is $(I - \eta A)^k A^{-1} b$.

    Args:
        matvec: the product with a positive definite matrix, $A m$, for `m` of the shape of `b`.
        b: right-hand side, any shape.
        lr: $\eta$, below $2 / \lambda_{max}(A)$ for convergence.
        steps: number of products.

    Raises:
        ValueError: lr <= 0 or steps < 0.
    """
    if not lr > 0 or steps < 0:
        raise ValueError(f"lr must be > 0 and steps >= 0, got lr={lr}, steps={steps}")
    m = torch.zeros_like(b)
    for _ in range(steps):
        m = m - lr * (matvec(m) - b)
    return m


class Neumann(Optimizer):
    r"""Neumann optimiser: momentum read as a running solution of the Newton system.

    While it trains, the parameters hold the shifted point $w + \mu m$; call `finalize` before the weights are used.

    Args:
        params: parameters or parameter groups; norms, counters and resets are per group.
        lr: step $\eta$.
        alpha: weight $\alpha$ of the cubic regulariser, which pulls towards the moving average.
        beta: weight $\beta$ of the repulsive regulariser, which pushes away from it; the paper uses 1e-5 times the number of weights.
        gamma: decay $\gamma$ of the moving average, in [0, 1).
        momentum: first and last value of $\mu$ between two resets.
        reset_every: steps from the first reset (the first step after the warm-up) to the next.
        warmup: number of plain SGD steps at the start.
        double_resets: double the interval after each reset.

    Raises:
        ValueError: gamma not in [0, 1), reset_every < 1, momentum pair not 0 <= a <= b < 1, negative lr, alpha, beta or warmup.
    """

    def __init__(
        self,
        params,
        lr: float,
        alpha: float = 1e-7,
        beta: float = 1e-5,
        gamma: float = 0.99,
        momentum: tuple[float, float] = (0.5, 0.9),
        reset_every: int = 1000,
        warmup: int = 0,
        double_resets: bool = True,
    ):
        if not 0 <= gamma < 1:
            raise ValueError(f"gamma must be in [0, 1), got {gamma}")
        if reset_every < 1:
            raise ValueError(f"reset_every must be at least 1, got {reset_every}")
        if len(momentum) != 2 or not 0 <= momentum[0] <= momentum[1] < 1:
            raise ValueError(f"momentum must be a pair 0 <= first <= last < 1, got {momentum}")
        if not (lr >= 0 and alpha >= 0 and beta >= 0 and warmup >= 0):
            raise ValueError(f"lr, alpha, beta and warmup must be >= 0, got lr={lr}, alpha={alpha}, beta={beta}, warmup={warmup}")
        defaults = {
            "lr": lr,
            "alpha": alpha,
            "beta": beta,
            "gamma": gamma,
            "momentum": tuple(momentum),
            "warmup": warmup,
            "double_resets": double_resets,
        }
        # Counters live in the groups, so that a state_dict carries them; to_reset = 0 means that the next step resets.
        counters = {"reset_every": reset_every, "interval": None, "steps": 0, "since_reset": 0, "to_reset": 0, "mu": 0.0}
        super().__init__(params, defaults | counters)

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """One update from one gradient; returns the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            for p in params:
                if p not in self.state:
                    self.state[p].update(m=torch.zeros_like(p), u=p.detach().clone())
            group["steps"] += 1
            if group["steps"] <= group["warmup"]:
                for p in params:
                    p.sub_(p.grad, alpha=group["lr"])
                    self.state[p]["u"].copy_(p)  # the moving average starts where the warm-up ends
            elif group["to_reset"] == 0:
                self._reset(group, params)
            else:
                self._update(group, params)
        return loss

    def _reset(self, group: dict, params: list[Tensor]) -> None:
        if group["interval"] is None:  # the first reset: a group may have brought its own `reset_every`
            group["interval"] = group["reset_every"]
        for p in params:
            torch.mul(p.grad, -group["lr"], out=self.state[p]["m"])
        group["to_reset"] = group["interval"] - 1
        if group["double_resets"]:
            group["interval"] *= 2
        group["since_reset"], group["mu"] = 0, group["momentum"][0]

    def _update(self, group: dict, params: list[Tensor]) -> None:
        lr, (first, last) = group["lr"], group["momentum"]
        group["to_reset"] -= 1
        group["since_reset"] += 1
        mu = group["mu"] = min(max(1 - 1 / (1 + group["since_reset"]), first), last)
        away = [p - self.state[p]["u"] for p in params]
        r = float(torch.stack([a.norm() for a in away]).norm())
        # With weights on their moving average the direction is undefined: no regulariser.
        pull = (group["alpha"] * r**2 - group["beta"] / r**2) / r if r > 0 else 0.0
        for p, a in zip(params, away):
            state = self.state[p]
            d = p.grad.add(a, alpha=pull)
            state["m"].mul_(mu).sub_(d, alpha=lr)
            p.add_(state["m"], alpha=mu).sub_(d, alpha=lr)
            state["u"].lerp_(p, 1 - group["gamma"])

    @torch.no_grad()
    def finalize(self) -> None:
        r"""Turn the stored point into the weights, $w = \theta - \mu m$, and empty $m$, so that a second call changes nothing."""
        for group in self.param_groups:
            for p in group["params"]:
                if p in self.state:
                    p.sub_(self.state[p]["m"], alpha=group["mu"])
                    self.state[p]["m"].zero_()
