r"""Local openness of matrix multiplication (nouiehed2018openness).

A loss of two matrices that depends only on their product can have local minima which the product does not have: places where
the factors are stuck although the product could move on. It cannot happen where multiplication is locally open, that is, where
every product near the present one has factors near the present ones. Whether that is so is a question of three ranks.

Equations: $M(W_1, W_2) = W_1 W_2$ with $W_1$ of size $m \times k$ and $W_2$ of size $k \times n$; $r_1$, $r_2$ and $r_{12}$ are the
ranks of $W_1$, $W_2$ and $W_1 W_2$. The range of $M$ is the set of all matrices of rank at most $k$. $M$ is locally open at
$(W_1, W_2)$ if and only if

$$ r_2 - r_{12} \le k - m \quad\text{or}\quad r_1 - r_{12} \le k - n \qquad (k \ge \min(m, n)), $$

$$ r_1 = r_2 = r_{12} \qquad (k < \min(m, n)) . $$

The first inequality says that some $\tilde W_1$ with $\tilde W_1 W_2 = 0$ makes $W_1 + \tilde W_1$ of full row rank, so that a small
multiple of it can be added without changing the product and lets $W_2$ reach every product nearby; the second is its mirror image.

The numerical test solves $V_1 V_2 = Z$ for $Z$ at distance $\varepsilon$ from $W_1 W_2$ and looks for the solution nearest to
$(W_1, W_2)$. Where $M$ is open its distance goes to 0, often only like $\sqrt\varepsilon$; where it is not, some $Z$ keep it away.

Deviations from the paper:

1. The paper states the conditions by the existence of $\tilde W_1$ and $\tilde W_2$; the inequalities of ranks are an equivalent form.
2. The symmetric product $W W^\top$ and the non-linear pyramidal nets of the paper are not implemented.
3. The numerical test is ours. It finds factors, so its distance is an upper bound of the smallest one. Its normal equations run
   out of digits for products closer than about $10^{-7}$.

Later work: Trager, Kohn and Bruna (2020) describe the same effect by the differential of the parametrisation and separate "pure" critical
points, which the function has, from "spurious" ones. Levin, Kileel and Boumal (2024) study for which lifts, matrix
factorisations among them, local minima and points of second order map to such points of the original problem.

Example:
    import torch
    from dlatlas.theory.local_openness import is_locally_open, openness_ratio

    wide = torch.randn(3, 4, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    dead = torch.zeros(3, 2, dtype=torch.float64), torch.zeros(2, 3, dtype=torch.float64)
    dead[0][0, 0] = 1.0  # a hidden unit that leads nowhere
    for name, (first, second) in {"random factors": wide, "dead unit": dead}.items():
        ratios = [openness_ratio(first, second, eps, trials=5) for eps in (1e-2, 1e-4)]
        print(f"{name}: open {is_locally_open(first, second)}, distance of factors / root of distance of products {ratios[0]:.2f}, {ratios[1]:.2f}")
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["is_locally_open", "nearest_factors", "openness_ratio"]


def is_locally_open(W1: Tensor, W2: Tensor, rtol: float = 1e-9) -> bool:
    r"""Whether matrix multiplication is locally open at $(W_1, W_2)$, relative to its range.

    Args:
        W1: left factor `[m, k]`.
        W2: right factor `[k, n]`.
        rtol: singular values below `rtol` times the largest count as zero; for the product, times the norms of both factors.

    Raises:
        ValueError: shapes that do not multiply, or non-finite entries.
    """
    W1, W2 = _factors(W1, W2)
    (m, k), n = W1.shape, W2.shape[1]
    r1, r2 = (int(torch.linalg.matrix_rank(W, rtol=rtol)) for W in (W1, W2))
    # The product of rounded factors is rounding noise where the exact one is zero: its own largest value is no scale.
    scale = float(torch.linalg.matrix_norm(W1, 2) * torch.linalg.matrix_norm(W2, 2))
    r12 = int((torch.linalg.svdvals(W1 @ W2) > rtol * scale).sum())
    if k >= min(m, n):
        return r2 - r12 <= k - m or r1 - r12 <= k - n
    return r1 == r2 == r12


def nearest_factors(W1: Tensor, W2: Tensor, Z: Tensor, iters: int = 500) -> tuple[Tensor, Tensor, float, float]:
    r"""Factors $V_1 V_2 = Z$ as near to $(W_1, W_2)$ as a local search from several starts finds them.

    Args:
        W1: left factor `[m, k]`.
        W2: right factor `[k, n]`.
        Z: the wanted product `[m, n]`, of rank at most `k`.
        iters: most iterations; they stop when nothing moves any more.

    Returns:
        `V1`, `V2`, the residual $\|V_1 V_2 - Z\|_F$ and the distance $\sqrt{\|V_1 - W_1\|_F^2 + \|V_2 - W_2\|_F^2}$.

    Raises:
        ValueError: shapes that do not fit, non-finite entries, or `iters` below 1.
    """
    W1, W2 = _factors(W1, W2)
    if Z.shape != (len(W1), W2.shape[1]) or not torch.isfinite(Z).all():
        raise ValueError(f"expected a finite product Z {(len(W1), W2.shape[1])}, got shape {tuple(Z.shape)}")
    if iters < 1:
        raise ValueError(f"at least one iteration is needed, got iters={iters}")
    V1, V2, residual, distance = _search(W1, W2, Z.double()[None], starts=24, iters=iters)
    return V1[0], V2[0], float(residual), float(distance)


def openness_ratio(W1: Tensor, W2: Tensor, eps: float, trials: int, generator: torch.Generator | None = None) -> float:
    r"""Largest distance of nearest factors over random products at distance `eps`, divided by $\sqrt{\text{eps}}$.

    The products are drawn from the range of the multiplication: where `k` is small they are projected to rank `k`.

    Args:
        W1: left factor `[m, k]`.
        W2: right factor `[k, n]`.
        eps: Frobenius distance of the products from $W_1 W_2$.
        trials: number of products.
        generator: source of the directions.

    Raises:
        ValueError: shapes that do not multiply, `eps` not positive or `trials` below 1.
    """
    W1, W2 = _factors(W1, W2)
    if not eps > 0 or not math.isfinite(eps) or trials < 1:
        raise ValueError(f"expected eps > 0 and trials >= 1, got eps={eps}, trials={trials}")
    Z = _products(W1 @ W2, W1.shape[1], eps, trials, generator)

    def distances(products: Tensor, starts: int, iters: int) -> Tensor:
        *_, residual, distance = _search(W1, W2, products, starts=starts, iters=iters)
        return torch.where(residual <= 1e-6 * eps + 1e-13, distance, math.inf)  # no factors found: as far as can be

    distance = distances(Z, 3, 30)
    # Only the worst direction counts, so only that one is searched again, thoroughly, until it stays the worst.
    while True:
        worst = distance.argmax()
        refined = torch.minimum(distance[worst], distances(Z[worst, None], 24, 60)[0])
        lowered, distance[worst] = refined < 0.999 * distance[worst], refined
        if not lowered:
            break
    return float(distance[worst]) / math.sqrt(eps)


def _search(W1: Tensor, W2: Tensor, Z: Tensor, *, starts: int, iters: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Best of several local searches for each product of a batch ``Z [b, m, n]``."""
    # Where a factor is singular the constraint has no gradient: starts a little aside, by the natural distance sqrt(eps) and
    # more. Drawn from a generator of their own, so that the same call gives the same answer.
    fixed = torch.Generator().manual_seed(0)
    (m, k), n = W1.shape, W2.shape[1]
    gap = (Z - W1 @ W2).flatten(1).norm(dim=1)  # [b]
    aside = gap.clamp(min=1e-300).sqrt()[None, :, None, None] * torch.logspace(0, 1.5, starts).to(Z)[:, None, None, None]
    V1 = W1 + aside * torch.randn(starts, len(Z), m, k, dtype=Z.dtype, generator=fixed).to(Z)
    V2 = W2 + aside * torch.randn(starts, len(Z), k, n, dtype=Z.dtype, generator=fixed).to(Z)
    U, s, Vh = torch.linalg.svd(Z, full_matrices=False)
    split = torch.zeros(len(Z), min(m, n), k, dtype=Z.dtype, device=Z.device)
    split.diagonal(dim1=1, dim2=2).copy_(s[:, : min(m, n, k)].sqrt())
    L, R = U @ split, split.mT @ Vh  # exact factors, however far away ...
    a, _, b = torch.linalg.svd(L.mT @ W1 + R @ W2.mT)
    V1 = torch.cat([V1, (L @ a @ b)[None]])  # ... turned towards (W1, W2)
    V2 = torch.cat([V2, ((a @ b).mT @ R)[None]])
    for i in range(iters):
        pull = 0.5 if i < 2 * iters // 3 else 0.0  # the last third only restores the product
        D1, D2 = pull * (W1 - V1), pull * (W2 - V2)
        E1, E2 = _shortest(V1, V2, Z - V1 @ V2 - D1 @ V2 - V1 @ D2)
        V1, V2 = V1 + D1 + E1, V2 + D2 + E2
        if i % 10 == 9 and max(float((D1 + E1).abs().max()), float((D2 + E2).abs().max())) < 1e-14:
            break
    residual = (V1 @ V2 - Z).flatten(2).norm(dim=2)  # [starts + 1, b]
    distance = ((V1 - W1).flatten(2).square().sum(2) + (V2 - W2).flatten(2).square().sum(2)).sqrt()
    solved = residual <= 1e-6 * gap + 1e-13
    # Among solutions the nearest; where there is none, the smallest residual.
    score = torch.where(solved, distance, 1e6 * (1 + residual)).nan_to_num(nan=math.inf)
    best, each = score.argmin(0), torch.arange(len(Z), device=Z.device)
    return V1[best, each], V2[best, each], residual[best, each], distance[best, each]


def _shortest(V1: Tensor, V2: Tensor, R: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest ``(E1, E2)`` with ``E1 V2 + V1 E2 = R``: normal equations ``(V1 V1^T) L + L (V2^T V2) = R``."""
    m, n = R.shape[-2:]
    A, B = V1 @ V1.mT, V2.mT @ V2
    one_m, one_n = (torch.eye(d, dtype=R.dtype, device=R.device) for d in (m, n))
    K = torch.einsum("...ij,kl->...ikjl", A, one_n) + torch.einsum("ij,...kl->...ikjl", one_m, B)
    K = K.reshape(*R.shape[:-2], m * n, m * n)
    damping = 1e-14 * K.diagonal(dim1=-2, dim2=-1).sum(-1) + 1e-300
    K = K + damping[..., None, None] * torch.eye(m * n, dtype=R.dtype, device=R.device)
    L = torch.linalg.solve_ex(K, R.reshape(*R.shape[:-2], m * n, 1))[0].reshape(R.shape)
    return L @ V2.mT, V1.mT @ L


def _products(Z0: Tensor, k: int, eps: float, trials: int, generator: torch.Generator | None) -> Tensor:
    """Matrices ``[trials, m, n]`` of rank at most `k` at distance `eps` from `Z0`."""
    D = torch.randn(trials, *Z0.shape, dtype=Z0.dtype, generator=generator).to(Z0)
    D = eps * D / D.flatten(1).norm(dim=1)[:, None, None]
    if k >= min(Z0.shape):
        return Z0 + D
    Z, stretch = Z0 + D, Z0.new_ones(trials, 1, 1)
    for _ in range(12):  # truncation shortens the step: stretch it before, until it has the right length afterwards
        U, s, Vh = torch.linalg.svd(Z0 + stretch * D, full_matrices=False)
        Z = U[..., :k] * s[:, None, :k] @ Vh[:, :k]
        stretch = stretch * eps / (Z - Z0).flatten(1).norm(dim=1)[:, None, None]
    return Z


def _factors(W1: Tensor, W2: Tensor) -> tuple[Tensor, Tensor]:
    if W1.dim() != 2 or W2.dim() != 2 or W1.shape[1] != W2.shape[0] or 0 in (*W1.shape, *W2.shape):
        raise ValueError(f"expected factors W1 [m, k] and W2 [k, n], got {tuple(W1.shape)} and {tuple(W2.shape)}")
    if not (torch.isfinite(W1).all() and torch.isfinite(W2).all()):
        raise ValueError("the factors must be finite, got NaN or infinite entries")
    return W1.detach().double(), W2.detach().double()
