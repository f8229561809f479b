r"""Hermite tensor objective G (ge2018landscape).

Gaussian inputs turn the squared loss of a network with one hidden layer of rectifiers into a sum of tensor distances, one for each
degree of the Hermite expansion: it tries to decompose tensors of all degrees at once and has spurious minima. The fourth degree
alone is enough to find the weights, and a tensor with orthogonal components has an objective without bad minima. That objective is
$G$: it contracts the fourth-order tensor with pairs of weight vectors and is an expectation over the data, so it can be trained.

Equations: $y = \sum_i a_i \operatorname{relu}(b_i^\star \cdot x)$, $x \sim N(0, I)$, $a_i > 0$, orthonormal rows $b_i^\star$, and with
$\mathrm{He}_k$ the $k$-th Hermite polynomial $\hat\sigma_k = E[\operatorname{relu}(z) \mathrm{He}_k(z)] / \sqrt{k!}$ for $z \sim N(0, 1)$.
Half of the fourth Hermite tensor in the directions $v, v, w, w$ and a twenty-fourth of it in $v, v, v, v$ are

$$ \varphi(v, w, x) = \tfrac12 |v|^2 |w|^2 + (v \cdot w)^2 - \tfrac12 |w|^2 (v \cdot x)^2 - \tfrac12 |v|^2 (w \cdot x)^2
   - 2 (v \cdot w)(v \cdot x)(w \cdot x) + \tfrac12 (v \cdot x)^2 (w \cdot x)^2, $$

$$ \varphi(v, x) = \tfrac18 |v|^4 - \tfrac14 |v|^2 (v \cdot x)^2 + \tfrac1{24} (v \cdot x)^4, $$

with the expectations

$$ E[y\, \varphi(v, w, x)] = \sqrt6\, \hat\sigma_4 \sum_i a_i (b_i^\star \cdot v)^2 (b_i^\star \cdot w)^2, \qquad
   E[y\, \varphi(v, x)] = \tfrac{\hat\sigma_4}{\sqrt{24}} \sum_i a_i (b_i^\star \cdot v)^4 . $$

With $s$ the sign of $\hat\sigma_4$ (for rectifiers $-1$), the objective over the rows $b_j$ of $B$ is

$$ G(B) = s\, E\Big[ y \sum_{j \ne k} \varphi(b_j, b_k, x) \Big] - \mu s\, E\Big[ y \sum_j \varphi(b_j, x) \Big]
   + \lambda \sum_j (|b_j|^2 - 1)^2 . $$

Deviations from the paper:

1. The constants of the two sums are those of the contractions above; the paper may distribute them differently, which rescales $\mu$.
2. Rows need not have unit norm: $b$ counts as $|b|$ times its direction, as the homogeneity of the rectifier demands.
3. The whitening step for a teacher that is not orthogonal is not implemented; `check_teacher` refuses such a teacher.
4. $G$ is even in every row and has no output weights of its own: its minima are the directions of the teacher's rows up to sign, with lengths
   that depend on $a_i$. `recovery_error` therefore compares directions up to order and sign. The signs and $a$ are left to a second step, a
   linear regression on the rectified responses, which is not part of this module.

Later work: Safran and Shamir (2018) prove by computer that the plain squared loss has spurious minima from six hidden units on when
student and teacher have equally many, and find that a few more units make them rare. Ge et al. (2019) treat inputs with any
symmetric distribution, Awasthi, Tang and Vijayaraghavan (2021) networks with biases.

Example:
    import torch
    from dlatlas.theory.landscape_design import population_G, population_squared_loss, recovery_error

    teacher = torch.linalg.qr(torch.randn(20, 20, dtype=torch.float64)).Q  # 20 hidden units
    ones = torch.ones(20, dtype=torch.float64)
    start = torch.randn(20, 20, dtype=torch.float64) / 20**0.5
    losses = {
        "squared loss": lambda rows: population_squared_loss(rows, teacher, ones),
        "designed loss": lambda rows: population_G(rows, teacher, ones, mu=1 / 30, lam=1.0),  # no bad minima
    }
    for name, loss in losses.items():
        rows = start.clone().requires_grad_()
        optimizer = torch.optim.LBFGS([rows], max_iter=500, line_search_fn="strong_wolfe")

        def closure():
            optimizer.zero_grad()
            value = loss(rows)
            value.backward()
            return value

        optimizer.step(closure)
        print(f"{name}: largest error of a unit's direction {recovery_error(rows.detach(), teacher):.4f}")
"""

from __future__ import annotations

import math

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

__all__ = [
    "check_teacher",
    "empirical_G",
    "phi_pair",
    "phi_single",
    "population_G",
    "population_squared_loss",
    "recovery_error",
    "relu_hermite",
]


def relu_hermite(k: int) -> float:
    r"""Hermite coefficient $\hat\sigma_k = E[\operatorname{relu}(z) \mathrm{He}_k(z)] / \sqrt{k!}$ of the rectifier.

    Args:
        k: degree, at least 0.

    Raises:
        ValueError: a negative degree.
    """
    if isinstance(k, bool) or not isinstance(k, int) or k < 0:
        raise ValueError(f"the degree must be a non-negative integer, got {k!r}")
    if k % 2:
        return 0.5 if k == 1 else 0.0
    # Two derivatives of relu leave a delta: E[relu He_k] = He_{k-2}(0) / sqrt(2 pi), and He_{2j}(0) = (-1)^j (2j-1)!!.
    j = k // 2 - 1
    value = 1.0 if k == 0 else (-1) ** j * math.prod(range(1, 2 * j, 2))
    return value / math.sqrt(2 * math.pi * math.factorial(k))


def phi_pair(v: Tensor, w: Tensor, X: Tensor) -> Tensor:
    r"""Half the fourth Hermite tensor of each sample in the directions $v, v, w, w$.

    Args:
        v: direction `[d]`.
        w: direction `[d]`.
        X: inputs `[n, d]`; the result is `[n]`.
    """
    _directions(X, v, w)
    p, q = X @ v, X @ w  # [n]
    vv, ww, vw = v @ v, w @ w, v @ w
    return 0.5 * vv * ww + vw**2 - 0.5 * ww * p**2 - 0.5 * vv * q**2 - 2 * vw * p * q + 0.5 * p**2 * q**2


def phi_single(v: Tensor, X: Tensor) -> Tensor:
    r"""A twenty-fourth of the fourth Hermite tensor of each sample in the direction $v$.

    Args:
        v: direction `[d]`.
        X: inputs `[n, d]`; the result is `[n]`.
    """
    _directions(X, v)
    p, vv = X @ v, v @ v
    return vv**2 / 8 - vv * p**2 / 4 + p**4 / 24


def population_G(B: Tensor, B_star: Tensor, a: Tensor, mu: float, lam: float) -> Tensor:
    r"""$G(B)$ in expectation over $x \sim N(0, I)$, by the tensor formula.

    Args:
        B: rows to be learned `[m, d]`; the result is differentiable in them.
        B_star: rows of the teacher `[m, d]`, none of them zero.
        a: output weights of the teacher `[m]`.
        mu: weight of the single terms, not negative.
        lam: weight of the norms, not negative.

    Raises:
        ValueError: shapes that do not fit, a zero row of the teacher, or a negative `mu` or `lam`.
    """
    _weights(mu, lam)
    _teacher(B, B_star, a)
    norms = B_star.norm(dim=1)
    squares = (B @ (B_star / norms[:, None]).T) ** 2  # [m, m], (b*_i . b_j)^2 at [j, i]
    pairs = (a * norms * (squares.sum(0) ** 2 - (squares**2).sum(0))).sum()  # all pairs less the equal ones
    single = (a * norms * squares**2).sum()
    strength = abs(relu_hermite(4))
    return strength * (math.sqrt(6) * pairs - mu / math.sqrt(24) * single) + lam * _norm_penalty(B)


def empirical_G(B: Tensor, X: Tensor, y: Tensor, mu: float, lam: float) -> Tensor:
    r"""$G(B)$ as a mean over samples; differentiable in `B`.

    Args:
        B: rows to be learned `[m, d]`.
        X: inputs `[n, d]`, drawn from $N(0, I)$.
        y: outputs of the teacher `[n]`.
        mu: weight of the single terms, not negative.
        lam: weight of the norms, not negative.

    Raises:
        ValueError: shapes that do not fit, or a negative `mu` or `lam`.
    """
    _weights(mu, lam)
    if B.dim() != 2 or X.dim() != 2 or B.shape[1] != X.shape[1] or y.shape != X.shape[:1] or len(X) == 0:
        raise ValueError(f"expected B [m, d], X [n, d] and y [n], got {tuple(B.shape)}, {tuple(X.shape)} and {tuple(y.shape)}")
    P = X @ B.T  # [n, m]
    gram, square = B @ B.T, P**2
    norms = gram.diagonal()  # |b_j|^2
    # Sums over all (j, k) at once; the terms with j = k are 12 single ones, as the tensor is the same.
    everything = (
        0.5 * norms.sum() ** 2
        + (gram**2).sum()
        - norms.sum() * square.sum(1)
        - 2 * torch.einsum("nj,jk,nk->n", P, gram, P)
        + 0.5 * square.sum(1) ** 2
    )
    single = (norms**2 / 8 - norms * square / 4 + square**2 / 24).sum(1)  # [n]
    sign = math.copysign(1, relu_hermite(4))
    return sign * (y * (everything - (12 + mu) * single)).mean() + lam * _norm_penalty(B)


def population_squared_loss(B: Tensor, B_star: Tensor, a: Tensor) -> Tensor:
    r"""Plain loss $E (\sum_i a_i \operatorname{relu}(b_i \cdot x) - y)^2$ for $x \sim N(0, I)$, from the kernel of the rectifier.

    Args:
        B: rows of the student `[m, d]`; the result is twice differentiable in them.
        B_star: rows of the teacher `[m, d]`.
        a: output weights of both `[m]`.

    Raises:
        ValueError: shapes that do not fit, or a zero row of the teacher.
    """
    _teacher(B, B_star, a)
    return a @ (_kernel(B, B) - 2 * _kernel(B, B_star) + _kernel(B_star, B_star)) @ a


def check_teacher(B_star: Tensor, a: Tensor, mu: float, lam: float) -> None:
    r"""Refuse what the theorem on the minima of $G$ does not cover.

    Args:
        B_star: rows of the teacher `[m, d]`.
        a: output weights of the teacher `[m]`.
        mu: weight of the single terms.
        lam: weight of the norms.

    Raises:
        ValueError: rows that are not orthonormal, an output weight that is not positive, or so small a `lam` that $G$ is
            unbounded below, which is up to $\mu |\hat\sigma_4| \max a / \sqrt{24}$.
    """
    _teacher(B_star, B_star, a)
    gap = float((B_star @ B_star.T - torch.eye(len(B_star)).to(B_star)).abs().max())
    if gap > 1e-6:
        raise ValueError(f"the theorem assumes a teacher with orthonormal rows; their Gram matrix is off by {gap:.2g}")
    if (a <= 0).any():
        raise ValueError(f"the theorem assumes positive output weights, got {float(a.min())}")
    if lam <= (least := mu * abs(relu_hermite(4)) * float(a.max()) / math.sqrt(24)):
        raise ValueError(f"the theorem assumes a large lam; up to {least:.2g} G is unbounded below, got {lam}")


def recovery_error(B: Tensor, B_star: Tensor) -> float:
    r"""Largest entry by which the directions of the rows differ from the teacher's, at the best order and signs.

    Args:
        B: found rows `[m, d]`, of any length.
        B_star: rows of the teacher `[m, d]`.

    Raises:
        ValueError: shapes that differ, or a zero row.
    """
    if B.shape != B_star.shape or B.dim() != 2 or (B.norm(dim=1) == 0).any() or (B_star.norm(dim=1) == 0).any():
        raise ValueError(f"expected two matrices [m, d] without zero rows, got {tuple(B.shape)} and {tuple(B_star.shape)}")
    found, true = (M.detach() / M.detach().norm(dim=1, keepdim=True) for M in (B, B_star))
    cosines = found @ true.T
    rows, columns = linear_sum_assignment(-cosines.abs().cpu().numpy())
    signs = cosines[rows, columns].sign()
    return float((signs[:, None] * found[rows] - true[columns]).abs().max())


class _Arc(torch.autograd.Function):
    """``sqrt(1 - c^2) + (pi - acos c) c``: its derivative pi - acos c is finite at c = 1, where that of acos is not."""

    @staticmethod
    def forward(ctx, c: Tensor) -> Tensor:
        ctx.save_for_backward(c)
        c = c.clamp(-1, 1)
        return (1 - c**2).sqrt() + (math.pi - c.acos()) * c

    @staticmethod
    def backward(ctx, upstream: Tensor) -> Tensor:
        return upstream * _ArcSlope.apply(*ctx.saved_tensors)


class _ArcSlope(torch.autograd.Function):
    """``pi - acos c``. Its derivative 1 / sqrt(1 - c^2) is infinite where rows are parallel, and each row is parallel to itself.

    There it always meets the square of a derivative of c, which vanishes faster: the product tends to 0, so 0 stands for it.
    """

    @staticmethod
    def forward(ctx, c: Tensor) -> Tensor:
        ctx.save_for_backward(c)
        return math.pi - c.clamp(-1, 1).acos()

    @staticmethod
    def backward(ctx, upstream: Tensor) -> Tensor:
        (c,) = ctx.saved_tensors
        inside = 1 - c**2
        return upstream * torch.where(inside > 0, inside.clamp(min=torch.finfo(c.dtype).tiny).rsqrt(), 0.0)


def _kernel(U: Tensor, V: Tensor) -> Tensor:
    """``E[relu(u.x) relu(v.x)]`` for all pairs of rows ``[m, m']``."""
    norms = U.norm(dim=1)[:, None] * V.norm(dim=1)
    return norms * _Arc.apply(U @ V.T / norms.clamp(min=1e-300)) / (2 * math.pi)


def _norm_penalty(B: Tensor) -> Tensor:
    return ((B.square().sum(1) - 1) ** 2).sum()


def _weights(mu: float, lam: float) -> None:
    if not (mu >= 0 and lam >= 0):
        raise ValueError(f"mu and lam must not be negative, got mu={mu}, lam={lam}")


def _directions(X: Tensor, *vectors: Tensor) -> None:
    if X.dim() != 2 or any(v.shape != X.shape[1:] for v in vectors):
        raise ValueError(f"expected X [n, d] and directions [d], got {tuple(X.shape)} and {[tuple(v.shape) for v in vectors]}")


def _teacher(B: Tensor, B_star: Tensor, a: Tensor) -> None:
    if B.dim() != 2 or B.shape != B_star.shape or a.shape != B.shape[:1]:
        raise ValueError(f"expected B and B_star [m, d] and a [m], got {tuple(B.shape)}, {tuple(B_star.shape)} and {tuple(a.shape)}")
    if (B_star.norm(dim=1) == 0).any():
        raise ValueError("a unit of the teacher with zero weights has no direction")
