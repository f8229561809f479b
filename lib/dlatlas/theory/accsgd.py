r"""AccSGD, accelerated stochastic gradient descent (kidambi2018insufficiency).

Momentum accelerates gradient descent when gradients are exact. When each gradient comes from one sample, there are
least-squares problems on which the heavy ball needs as many steps as plain SGD, however well it is tuned. AccSGD keeps two
sequences instead: a short step on the weights and a long, slowly averaged step in a buffer, and mixes the two. On the same
problems it needs about the square root of the steps.

Equations: with short step $\gamma$, gradient $g$, long step $L = \gamma \kappa / c$, averaging weight $\beta = c^2 \xi / \kappa$,
mixing weight $\zeta = c / (c + \beta)$ and a buffer that starts at the weights,

$$\text{buf} \leftarrow (1 - \beta)\,\text{buf} + \beta\,(w - L g), \qquad w \leftarrow \zeta\,(w - \gamma g) + (1 - \zeta)\,\text{buf}$$

The test problem is $x = \sigma_i e_i$ for a coordinate $i$ that is drawn with probability $p$, $y = \langle w^*, x \rangle$. The
error $e$ of one coordinate then sees the gradient $b \sigma^2 e$ with $b \sim \text{Bernoulli}(p)$, every method is a random
linear recursion $z' = (A_0 + b A_1) z$ on two numbers, and the second moments of $z$ follow exactly the matrix

$$M = (1 - p)\, A_0 \otimes A_0 + p\, (A_0 + A_1) \otimes (A_0 + A_1)$$

Its spectral radius $\rho$ is the factor by which the mean squared error falls in a step; $1/(1 - \rho)$ is about the number of
steps that divide it by $e$.

Deviations from the paper:

1. The paper's analysis has four free parameters; like its experiments, we use the short step, $\kappa$, $\xi$ and a constant $c$.
2. Convergence is computed, not simulated. `best_rate` searches a grid, so it is an upper bound on the best possible rate.

Later work: Ma and Yarats (2019) show that AccSGD is a special case of quasi-hyperbolic momentum. Liu and Belkin (2020) correct
Nesterov's momentum by one further term and prove acceleration for models that fit all samples. Gupta, Siegel and Wojtowytsch
(2024) prove that Nesterov's momentum does accelerate under noise whose variance is proportional to the squared gradient, while
the factor of proportion stays below 1, and give a variant for any factor.

Example:
    import torch
    from torch import nn
    from dlatlas.theory.accsgd import AccSGD

    x = torch.randn(512, 20) * torch.logspace(0, -1.5, 20)  # some directions are rarely seen
    y = x @ torch.randn(20, 1)
    model = nn.Linear(20, 1)
    optimizer = AccSGD(model.parameters(), lr=0.2, kappa=100.0, xi=10.0)  # in the place of torch.optim.SGD
    for step in range(601):
        batch = torch.randint(512, (32,))
        loss = nn.functional.mse_loss(model(x[batch]), y[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 200 == 0:
            print(f"step {step}: loss {nn.functional.mse_loss(model(x), y).item():.5f}")
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

__all__ = ["AccSGD", "accsgd_radius", "best_rate", "hb_radius"]


class AccSGD(Optimizer):
    r"""Accelerated SGD with a short step on the weights and a long step in a buffer.

    $\text{buf} \leftarrow (1-\beta)\,\text{buf} + \beta (w - \gamma\kappa g/c)$, then
    $w \leftarrow \zeta (w - \gamma g) + (1-\zeta)\,\text{buf}$ with $\beta = c^2\xi/\kappa$ and $\zeta = c/(c+\beta)$. The buffer
    starts as a copy of the weights.

    Args:
        params: parameters or parameter groups.
        lr: the short step $\gamma$.
        kappa: long over short step $\kappa$, at least 1. Not the condition number of the Hessian, though of its order.
        xi: statistical advantage $\xi$, sensibly between 1 and $\sqrt\kappa$.
        small_const: $c$ in (0, 1].
        weight_decay: adds this multiple of the parameter to its gradient.

    Raises:
        ValueError: a parameter out of its range, or a negative `lr` or `weight_decay`.
    """

    def __init__(
        self, params: Any, lr: float, kappa: float = 1000.0, xi: float = 10.0, small_const: float = 0.7, weight_decay: float = 0.0
    ):
        _check(lr, kappa, xi, small_const)
        if not weight_decay >= 0:
            raise ValueError(f"weight_decay must not be negative, got {weight_decay}")
        super().__init__(params, {"lr": lr, "kappa": kappa, "xi": xi, "small_const": small_const, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """One update of every parameter that has a gradient; returns the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            beta, long_step, zeta = _constants(group["lr"], group["kappa"], group["xi"], group["small_const"])
            for w in (p for p in group["params"] if p.grad is not None):
                g = w.grad.add(w, alpha=group["weight_decay"]) if group["weight_decay"] else w.grad
                state = self.state[w]
                if "buffer" not in state:
                    state["buffer"] = w.clone()  # not zeros: the first mixture would pull the weights to the origin
                state["buffer"].lerp_(w.sub(g, alpha=long_step), beta)
                w.sub_(g, alpha=group["lr"]).lerp_(state["buffer"], 1 - zeta)
        return loss


def hb_radius(lr: float, momentum: float, sigma: float, p: float = 0.5, nesterov: bool = False) -> float:
    r"""Factor per step by which the mean squared error of one coordinate falls under the heavy ball or Nesterov's momentum.

    Heavy ball: $e' = (1 + m - \gamma b \sigma^2) e - m e_{\text{prev}}$. Nesterov:
    $e' = (1 - \gamma b \sigma^2)(e + m (e - e_{\text{prev}}))$.

    Args:
        lr: step $\gamma$.
        momentum: $m$; 0 is plain SGD with factor $1 - 2 p \gamma \sigma^2 + p \gamma^2 \sigma^4$.
        sigma: length $\sigma$ of the coordinate's sample, which is shown with probability `p`.
        p: that probability.
        nesterov: take the gradient at the look-ahead point.

    Raises:
        ValueError: `p` outside (0, 1], or a negative `lr`, `momentum` or `sigma`.
    """
    _check(lr, sigma=sigma, p=p)
    if not momentum >= 0:
        raise ValueError(f"momentum must not be negative, got {momentum}")
    return float(_momentum_radii(np.float64(lr), np.float64(momentum), sigma, p, nesterov))


def accsgd_radius(lr: float, kappa: float, xi: float, sigma: float, p: float = 0.5, small_const: float = 0.7) -> float:
    r"""Factor per step by which the mean squared error of one coordinate falls under :class:`AccSGD`.

    Args:
        lr, kappa, xi, small_const: as in :class:`AccSGD`.
        sigma: length $\sigma$ of the coordinate's sample.
        p: probability that a sample shows the coordinate.

    Raises:
        ValueError: a parameter out of its range.
    """
    _check(lr, kappa, xi, small_const, sigma, p)
    return float(_accsgd_radii(np.float64(lr), np.float64(kappa), np.float64(xi), sigma, p, small_const))


def best_rate(method: str, sigma2: float, grid: int = 40, *, p: float = 0.5) -> float:
    r"""Best rate of a method over a grid of its parameters on the problem with $\sigma_1 = 1$ and $\sigma_2$ = `sigma2`.

    The slower of the two coordinates counts: $\min_{\text{parameters}} \max_i \rho(\sigma_i)$. Steps are `grid` values between
    0.001 and 2, momenta `grid` values between 0 and 0.998, both spaced geometrically (in $1 - m$); AccSGD takes ``grid // 4`` (at
    least 4) steps in [0.1, 1.6], and `grid` values each of $\kappa$ in [1, 10000] and of $\xi$ in [0.5, 200].

    Args:
        method: "sgd", "hb" (heavy ball), "nag" (Nesterov) or "accsgd".
        sigma2: length of the second coordinate's sample; the condition number is ``1 / sigma2**2``.
        grid: values per parameter.
        p: probability of each coordinate. Below 1/2 there are more directions than the two extreme ones that are followed.

    Raises:
        ValueError: unknown method, ``grid < 2``, `sigma2` not positive or `p` outside (0, 1].
    """
    if grid < 2 or not sigma2 > 0:
        raise ValueError(f"grid must be at least 2 and sigma2 positive, got grid={grid}, sigma2={sigma2}")
    _check(0.0, sigma=sigma2, p=p)
    if method in ("sgd", "hb", "nag"):
        momenta = 1 - np.geomspace(1, 2e-3, 1 if method == "sgd" else grid)
        mesh = np.meshgrid(np.geomspace(1e-3, 2, grid), momenta)
        rates = [_momentum_radii(*mesh, s, p, method == "nag") for s in (1.0, sigma2)]
    elif method == "accsgd":
        mesh = np.meshgrid(np.linspace(0.1, 1.6, max(4, grid // 4)), np.geomspace(1, 1e4, grid), np.geomspace(0.5, 200, grid))
        rates = [_accsgd_radii(*mesh, s, p, 0.7) for s in (1.0, sigma2)]
    else:
        raise ValueError(f"method must be 'sgd', 'hb', 'nag' or 'accsgd', got {method!r}")
    return float(np.maximum(*rates).min())


def _constants(lr: Any, kappa: Any, xi: Any, small_const: float) -> tuple[Any, Any, Any]:
    beta = small_const**2 * xi / kappa
    return beta, lr * kappa / small_const, small_const / (small_const + beta)


def _momentum_radii(lr: np.ndarray, m: np.ndarray, sigma: float, p: float, nesterov: bool) -> np.ndarray:
    h, zero, one = lr * sigma**2, 0 * lr, 1 + 0 * lr
    # State (e, e_prev).
    changed = [(1 - h) * (1 + m), -(1 - h) * m] if nesterov else [1 + m - h, -m]
    return _radii(_matrix([[1 + m, -m], [one, zero]]), _matrix([changed, [one, zero]]), p)


def _accsgd_radii(lr: np.ndarray, kappa: np.ndarray, xi: np.ndarray, sigma: float, p: float, small_const: float) -> np.ndarray:
    beta, long_step, zeta = _constants(lr, kappa, xi, small_const)

    def update(curvature: float) -> np.ndarray:
        # State (e, buffer's error); the new weights use the new buffer.
        pull = beta * (1 - long_step * curvature)
        return _matrix([[zeta * (1 - lr * curvature) + (1 - zeta) * pull, (1 - zeta) * (1 - beta)], [pull, 1 - beta]])

    return _radii(update(0.0), update(sigma**2), p)


def _matrix(rows: list[list[Any]]) -> np.ndarray:
    return np.stack([np.stack(np.broadcast_arrays(*row), -1) for row in rows], -2)


def _radii(unseen: np.ndarray, seen: np.ndarray, p: float) -> np.ndarray:
    """Spectral radii of ``(1 - p) A (x) A + p B (x) B`` on the symmetric matrices, where the largest eigenvalue lies."""
    return np.abs(np.linalg.eigvals((1 - p) * _symmetric_square(unseen) + p * _symmetric_square(seen))).max(-1)


def _symmetric_square(A: np.ndarray) -> np.ndarray:
    """What ``z' = A z`` does to ``(z1 z1, z1 z2, z2 z2)``: ``[..., 2, 2] -> [..., 3, 3]``."""
    a, b, c, d = A[..., 0, 0], A[..., 0, 1], A[..., 1, 0], A[..., 1, 1]
    return _matrix([[a * a, 2 * a * b, b * b], [a * c, a * d + b * c, b * d], [c * c, 2 * c * d, d * d]])


def _check(lr: float, kappa: float = 1, xi: float = 1, small_const: float = 1, sigma: float = 0, p: float = 1) -> None:
    if not lr >= 0 or not sigma >= 0:
        raise ValueError(f"lr and sigma must not be negative, got lr={lr}, sigma={sigma}")
    if not kappa >= 1 or not xi > 0:
        raise ValueError(f"kappa must be at least 1 and xi positive, got kappa={kappa}, xi={xi}")
    if not 0 < small_const <= 1 or not 0 < p <= 1:
        raise ValueError(f"small_const and p must be in (0, 1], got small_const={small_const}, p={p}")
