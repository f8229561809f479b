r"""Uniform convergence of gradients and stationary points (zhou2018empirical).

Training minimises the empirical risk of n samples; what one wants is the population risk. For linear nets whose layers have bounded
norm, the two gradients differ by a multiple of $1/\sqrt n$ at all weights at once, and the factor is explicit in depth, width, sparsity
and norm. A consequence: every non-degenerate stationary point of the population has exactly one empirical stationary point beside it, of
the same kind and at a distance of that order. What is known of the ideal landscape therefore holds for the one that training sees.

Equations:

$$\sup_{W} |\nabla \hat J_n(W) - \nabla J(W)| \lesssim r^{2l} \sqrt{\frac{l \sqrt{\max_i d_i}\; s \log(d / l)}{n}}$$

for $l$ layers of norm at most $r$, $d_i$ units in layer $i$, $d$ weights in all and $s$ of them not zero. With $y = B^* x + e$,
$E\,xx^T = \Sigma$ and $P = W_l \cdots W_1$ the population risk is

$$J(W) = \tfrac12 E|P x - y|^2 = \tfrac12 \mathrm{tr}\big((P - B^*)\, \Sigma\, (P - B^*)^T\big) + \tfrac12 \mathrm{tr}\, \mathrm{Cov}(e).$$

Both gradients have the same form,

$$\nabla_{W_i} = (W_l \cdots W_{i+1})^T\, (P S_{xx} - S_{yx})\, (W_{i-1} \cdots W_1)^T,$$

with the second moments $S_{xx}, S_{yx}$ of the samples or those of the population, $\Sigma$ and $B^* \Sigma$.

Deviations from the paper:

1. Only the linear nets; the paper proves the same for sigmoid nets.
2. The supremum runs over the weights that are given, which makes it a lower bound of the true one.
3. The factor in front of the rate is left out: the theorem's is far above what is measured, so only the exponents can be tested.
4. Stationary points of linear nets come in continuous families and are degenerate. They are compared through their products $P$, which
   are isolated where the eigenvalues of the problem are distinct.

Later work: one-to-one correspondence for general non-convex M-estimation had been proved before, by Mei, Bai and Montanari (preprint of
2016, published in 2018). Nagarajan and Kolter (2019) showed that uniform convergence over norm balls cannot explain how well over-parameterised nets generalise.

Example:
    import torch
    from dlatlas.theory.empirical_landscape import sup_gradient_gap

    true_map = torch.randn(3, 5, dtype=torch.float64)
    nets = [[torch.randn(4, 5, dtype=torch.float64) / 5, torch.randn(3, 4, dtype=torch.float64) / 5] for _ in range(50)]
    for n in (100, 400, 1600):
        x = torch.randn(n, 5, dtype=torch.float64)
        y = x @ true_map.T + 0.1 * torch.randn(n, 3, dtype=torch.float64)
        gap = sup_gradient_gap(nets, x, y, Sigma=torch.eye(5, dtype=torch.float64), B_star=true_map)
        print(f"{n} samples: the gradients of 50 nets differ from the population's by at most {gap:.3f}")
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

__all__ = ["gradient_rate", "linear_gradient", "match_stationary", "population_risk_linear", "sup_gradient_gap"]


def gradient_rate(r: float, depth: int, max_width: int, nonzeros: int, dim: int, n: int) -> float:
    r"""The rate $r^{2l} \sqrt{l \sqrt{\max_i d_i}\, s \log(d/l) / n}$ without its constant.

    Args:
        r: bound on the norm of each layer.
        depth: number of layers $l$.
        max_width: largest number of units in a layer, $\max_i d_i$.
        nonzeros: number of weights that are not zero, $s$.
        dim: number of weights, $d > l$.
        n: number of samples.

    Raises:
        ValueError: ``n < 1``, ``r <= 0``, ``depth < 1``, ``dim <= depth`` (the logarithm must be positive), or counts below 1.
    """
    if not r > 0 or depth < 1 or n < 1:
        raise ValueError(f"expected r > 0, depth >= 1 and n >= 1, got r={r}, depth={depth}, n={n}")
    if dim <= depth or max_width < 1 or not 1 <= nonzeros <= dim:
        raise ValueError(f"expected dim > depth, max_width >= 1, 1 <= nonzeros <= dim; got {dim}, {max_width}, {nonzeros} at depth {depth}")
    return r ** (2 * depth) * math.sqrt(depth * math.sqrt(max_width) * nonzeros * math.log(dim / depth) / n)


def population_risk_linear(Ws: Sequence[Tensor], Sigma: Tensor, B_star: Tensor, noise_var: float | Tensor) -> Tensor:
    r"""Population risk $\frac12 E|W_l \cdots W_1 x - y|^2$ of a linear net for $y = B^* x + e$, a scalar.

    Args:
        Ws: weights, $W_1$ ``(d_1, d_0)`` first.
        Sigma: second moment of the inputs ``(d_0, d_0)``.
        B_star: true map ``(d_l, d_0)``.
        noise_var: variance of each output's noise, as one number, as ``(d_l,)`` or as a covariance ``(d_l, d_l)``.

    Raises:
        ValueError: shapes that do not fit.
    """
    _check(Ws, Sigma, B_star)
    noise = torch.as_tensor(noise_var, dtype=B_star.dtype, device=B_star.device)
    if noise.dim() and noise.shape not in {B_star.shape[:1], (len(B_star), len(B_star))}:
        raise ValueError(f"noise_var must be a number, ({len(B_star)},) or ({len(B_star)}, {len(B_star)}), got {tuple(noise.shape)}")
    total = len(B_star) * noise if noise.dim() == 0 else noise.sum() if noise.dim() == 1 else noise.trace()
    gap = _product(Ws) - B_star
    return ((gap @ Sigma * gap).sum() + total) / 2


def linear_gradient(Ws: Sequence[Tensor], Sxx: Tensor, Syx: Tensor) -> Tensor:
    r"""Gradient of $\frac12 E|W_l \cdots W_1 x - y|^2$ in all weights as one vector ``(d,)``, from the second moments.

    Args:
        Ws: weights, first layer first.
        Sxx: $E\,xx^T$ ``(d_0, d_0)``.
        Syx: $E\,yx^T$ ``(d_l, d_0)``.
    """
    _check(Ws, Sxx, Syx)
    return _gradient(Ws, Sxx, Syx)


def sup_gradient_gap(Ws_list: Sequence[Sequence[Tensor]], X: Tensor, Y: Tensor, Sigma: Tensor, B_star: Tensor) -> float:
    r"""Largest distance between empirical and population gradient over the listed weights, $\max_W |\nabla \hat J_n(W) - \nabla J(W)|$.

    Args:
        Ws_list: several nets' weights, each as in :func:`population_risk_linear`.
        X: samples ``(n, d_0)``.
        Y: targets ``(n, d_l)``.
        Sigma: second moment of the inputs' distribution ``(d_0, d_0)``.
        B_star: true map ``(d_l, d_0)``.

    Raises:
        ValueError: no weights, no samples, or shapes that do not fit.
    """
    if len(Ws_list) == 0:
        raise ValueError("the list of weights is empty")
    if X.dim() != 2 or Y.dim() != 2 or len(X) != len(Y) or len(X) < 1 or (Y.shape[1], X.shape[1]) != tuple(B_star.shape):
        raise ValueError(
            f"expected X (n, d_0), Y (n, d_l), B_star (d_l, d_0); got {tuple(X.shape)}, {tuple(Y.shape)}, {tuple(B_star.shape)}"
        )
    Sxx, Syx = X.T @ X / len(X), Y.T @ X / len(X)
    groups: dict[tuple, list[Sequence[Tensor]]] = {}
    for Ws in Ws_list:
        _check(Ws, Sigma, B_star)
        groups.setdefault(tuple(W.shape for W in Ws), []).append(Ws)
    # The gradient is linear in the moments: the difference of the gradients is the gradient of the differences.
    stacked = [[torch.stack(layer) for layer in zip(*group)] for group in groups.values()]
    return max(float(_gradient(Ws, Sxx - Sigma, Syx - B_star @ Sigma).norm(dim=-1).max()) for Ws in stacked)


def match_stationary(emp: Tensor, pop: Tensor) -> Tensor:
    """Distances within the one-to-one matching of two sets of points whose sum of distances is smallest ``(k,)``.

    Args:
        emp: points ``(k, P)``; entry i of the result belongs to row i.
        pop: as many points ``(k, P)``.

    Raises:
        ValueError: sets of different size or dimension, or empty ones.
    """
    if emp.dim() != 2 or emp.shape != pop.shape or len(emp) < 1:
        raise ValueError(f"expected two sets of points (k, P) with k >= 1, got {tuple(emp.shape)} and {tuple(pop.shape)}")
    distance = torch.cdist(emp, pop, compute_mode="donot_use_mm_for_euclid_dist")
    rows, cols = linear_sum_assignment(distance.detach().cpu().numpy())
    return distance[torch.as_tensor(rows), torch.as_tensor(cols)]  # rows are 0..k-1


def _gradient(Ws: Sequence[Tensor], Sxx: Tensor, Syx: Tensor) -> Tensor:
    """The gradient ``(..., d)`` for layers ``(..., d_i, d_{i-1})``."""
    before = [torch.eye(len(Sxx), dtype=Sxx.dtype, device=Sxx.device)]
    for W in Ws:
        before.append(W @ before[-1])  # before[i] = W_i ... W_1
    signal = before[-1] @ Sxx - Syx  # (..., d_l, d_0), dJ/dP
    parts = []
    for i in reversed(range(len(Ws))):
        parts.append((signal @ before[i].transpose(-1, -2)).flatten(-2))  # (..., d_i d_{i-1})
        signal = Ws[i].transpose(-1, -2) @ signal
    return torch.cat(parts[::-1], -1)


def _product(Ws: Sequence[Tensor]) -> Tensor:
    product = Ws[0]
    for W in Ws[1:]:
        product = W @ product
    return product


def _check(Ws: Sequence[Tensor], Sigma: Tensor, B_star: Tensor) -> None:
    if len(Ws) < 1 or any(W.dim() != 2 for W in Ws):
        raise ValueError("expected at least one weight matrix")
    widths = [Ws[0].shape[1], *(W.shape[0] for W in Ws)]
    fits = all(W.shape[1] == width for W, width in zip(Ws, widths))
    if not fits or Sigma.shape != (widths[0], widths[0]) or B_star.shape != (widths[-1], widths[0]):
        shapes = [tuple(W.shape) for W in Ws]
        raise ValueError(f"weights {shapes}, second moment {tuple(Sigma.shape)} and map {tuple(B_star.shape)} do not fit together")
