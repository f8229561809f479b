r"""AMSGrad and AdamNC (reddi2018amsgrad).

Adam divides each coordinate's step by a running average of its recent squared gradients. That average forgets: a large and
rare gradient, the one that carries the information, is divided by its own size at once, and by the time the many small
gradients of the other sign arrive it is forgotten and they are divided by little. On a convex problem with one variable this
drives Adam to the worst point of the interval. AMSGrad never forgets the largest average seen so far, AdamNC averages over the
whole past.

Equations:

$$m_t = \beta_1 m_{t-1} + (1 - \beta_1) g_t, \qquad v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2$$

AMSGrad, with the maximum taken in each coordinate:

$$\hat v_t = \max(\hat v_{t-1}, v_t), \qquad x_{t+1} = x_t - \alpha \, \frac{m_t}{\sqrt{\hat v_t} + \epsilon}$$

AdamNC, in which $\beta_{2,t} = 1 - 1/t$ makes $v_t$ a plain mean and $\beta_{1,t} = \beta_1 \lambda^{t-1}$ lets the momentum fade:

$$v_t = \frac{1}{t} \sum_{i \le t} g_i^2, \qquad x_{t+1} = x_t - \frac{\alpha}{\sqrt{t}} \, \frac{m_t}{\sqrt{v_t} + \epsilon}$$

The problem on which Adam fails has $x \in [-1, 1]$ and losses $f_t(x) = g_t x$ with $g_t = C$ if $t \bmod 3 = 1$ and
$g_t = -1$ otherwise.

Deviations from the paper:

1. The paper's analysis lets the step fall like $1/\sqrt{t}$ and $\beta_1$ decay; AMSGrad here keeps both constant, as the
   paper's experiments with networks do. Use a scheduler for the former.
2. $\epsilon$ is added outside the root; the paper's algorithms have none.
3. `bias_correction=True` is not in the paper. It is what `torch.optim.Adam(amsgrad=True)` computes.
4. $t$ counts the steps in which a parameter had a gradient.

Later work: a comparison of fifteen optimizers with equal tuning budgets (Schmidt, Schneider and Hennig, 2021) found no
consistent advantage of AMSGrad over Adam on networks. Zhang et al. (2022) proved that unmodified Adam converges to a
neighbourhood of stationary points if $\beta_2$ is chosen large enough after the problem is given: the counterexample needs a
problem that is chosen after $\beta_2$.

Example:
    import torch
    from torch import nn
    from dlatlas.theory.amsgrad import AMSGrad

    x = torch.randn(256, 10)
    y = x.square().sum(1, keepdim=True)
    model = nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 1))
    optimizer = AMSGrad(model.parameters(), lr=1e-2)  # in the place of torch.optim.Adam
    for step in range(301):
        loss = nn.functional.mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 0:
            print(f"step {step}: loss {loss:.3f}")
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

__all__ = ["AMSGrad", "AdamNC", "reddi_problem"]


class AMSGrad(Optimizer):
    r"""Adam whose second-moment estimate never decreases: $x \leftarrow x - \alpha\, m / (\sqrt{\max_{s \le t} v_s} + \epsilon)$.

    Args:
        params: parameters or parameter groups.
        lr: step size $\alpha$.
        betas: $(\beta_1, \beta_2)$, both in [0, 1).
        eps: $\epsilon$, outside the root.
        bias_correction: divide $m_t$ by $1 - \beta_1^t$ and the maximum by $1 - \beta_2^t$, as torch's Adam does.

    Raises:
        ValueError: a beta outside [0, 1), or a negative `lr` or `eps`.
    """

    def __init__(
        self, params: Any, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, bias_correction: bool = False
    ):
        _check(lr, betas, eps)
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "eps": eps, "bias_correction": bias_correction})

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """One update of every parameter that has a gradient; returns the closure's loss."""
        loss = _evaluate(closure)
        for group in self.param_groups:
            b1, b2 = group["betas"]
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                if not state:
                    state.update(step=0, m=torch.zeros_like(p), v=torch.zeros_like(p), vhat=torch.zeros_like(p))
                state["step"] += 1
                state["m"].lerp_(p.grad, 1 - b1)
                state["v"].mul_(b2).addcmul_(p.grad, p.grad, value=1 - b2)
                torch.maximum(state["vhat"], state["v"], out=state["vhat"])
                c1, c2 = (1 - b1 ** state["step"], 1 - b2 ** state["step"]) if group["bias_correction"] else (1.0, 1.0)
                p.addcdiv_(state["m"], (state["vhat"] / c2).sqrt_().add_(group["eps"]), value=-group["lr"] / c1)
        return loss


class AdamNC(Optimizer):
    r"""Adam with $\beta_{2,t} = 1 - 1/t$, so that $v_t$ is the mean of all squared gradients, and steps $\alpha / \sqrt{t}$.

    Args:
        params: parameters or parameter groups.
        lr: $\alpha$, the size of the first step.
        beta1: momentum $\beta_1$ in the first step, in [0, 1).
        beta1_decay: $\lambda$ in $\beta_{1,t} = \beta_1 \lambda^{t-1}$, in (0, 1].
        eps: $\epsilon$, outside the root.

    Raises:
        ValueError: `beta1` outside [0, 1), `beta1_decay` outside (0, 1], or a negative `lr` or `eps`.
    """

    def __init__(self, params: Any, lr: float = 1e-3, beta1: float = 0.9, beta1_decay: float = 1 - 1e-8, eps: float = 1e-8):
        _check(lr, (beta1, 0.0), eps)
        if not 0 < beta1_decay <= 1:
            raise ValueError(f"beta1_decay must be in (0, 1], got {beta1_decay}")
        super().__init__(params, {"lr": lr, "beta1": beta1, "beta1_decay": beta1_decay, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """One update of every parameter that has a gradient; returns the closure's loss."""
        loss = _evaluate(closure)
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                if not state:
                    state.update(step=0, m=torch.zeros_like(p), v=torch.zeros_like(p))
                state["step"] += 1
                t = state["step"]
                state["m"].lerp_(p.grad, 1 - group["beta1"] * group["beta1_decay"] ** (t - 1))
                state["v"].lerp_(p.grad.square(), 1 / t)  # the running mean
                p.addcdiv_(state["m"], state["v"].sqrt().add_(group["eps"]), value=-group["lr"] / math.sqrt(t))
        return loss


def reddi_problem(
    method: str, C: float = 3.0, steps: int = 3000, alpha: float = 0.5, beta2: float | None = None, x0: float = 1.0
) -> Tensor:
    r"""Projected iterates on the online problem $f_t(x) = g_t x$, $x \in [-1, 1]$, with $g = C, -1, -1, C, -1, -1, \dots$

    One period adds up to $(C - 2) x$, so $x = -1$ is the best fixed point. Every method has $\beta_1 = 0$, $\epsilon = 0$ and steps
    $\alpha / \sqrt{t}$; after each step $x$ is clipped to $[-1, 1]$.

    Args:
        method: "adam", "amsgrad" or "adamnc".
        C: the rare large gradient, above 2.
        steps: number of updates.
        alpha: size of the first step.
        beta2: of Adam and AMSGrad; None means the paper's $1 / (1 + C^2)$. AdamNC has its own.
        x0: where to start, in [-1, 1].

    Returns:
        Iterates ``(steps + 1,)`` in float64, `x0` first.

    Raises:
        ValueError: unknown method, ``C <= 2``, `beta2` outside [0, 1), or steps, alpha or x0 that make no sense.
    """
    if method not in ("adam", "amsgrad", "adamnc"):
        raise ValueError(f"method must be 'adam', 'amsgrad' or 'adamnc', got {method!r}")
    if not C > 2 or not math.isfinite(C):
        raise ValueError(f"C must be above 2, otherwise x = -1 is not the best point; got {C}")
    beta2 = 1 / (1 + C * C) if beta2 is None else beta2
    _check(alpha, (0.0, beta2), 0.0)
    if steps < 1 or not -1 <= x0 <= 1:
        raise ValueError(f"steps must be at least 1 and x0 in [-1, 1], got steps={steps}, x0={x0}")
    x, v, vhat, path = float(x0), 0.0, 0.0, [float(x0)]
    for t in range(1, steps + 1):
        g = C if t % 3 == 1 else -1.0
        forget = 1 - 1 / t if method == "adamnc" else beta2
        v = forget * v + (1 - forget) * g * g
        vhat = max(vhat, v) if method == "amsgrad" else v
        x = min(1.0, max(-1.0, x - alpha / math.sqrt(t) * g / math.sqrt(vhat)))
        path.append(x)
    return torch.tensor(path, dtype=torch.float64)


def _check(lr: float, betas: tuple[float, float], eps: float) -> None:
    if not lr >= 0 or not eps >= 0:
        raise ValueError(f"the learning rate and eps must not be negative, got lr={lr}, eps={eps}")
    if len(betas) != 2 or not all(0 <= b < 1 for b in betas):
        raise ValueError(f"betas must be in [0, 1), got {betas}")


def _evaluate(closure: Callable[[], Tensor] | None) -> Tensor | None:
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()
