r"""Checkable global optimality of deep linear nets (yun2018global).

Training stopped, the gradient is zero: is this the best the network can do, or only a saddle where another step might help?
For linear nets of any depth the answer can be read off the weights with two linear-algebra tests. Multiply all the layers: the
product must have the largest rank that the narrowest layer allows. If that layer is a real bottleneck, then what comes after it
must in addition span the right subspace, the one of the leading singular vectors of the fitted targets.

Equations: columns are samples, $X$ is $d_x \times n$, $Y$ is $d_y \times n$, and $W_1, \dots, W_{H+1}$ are the layers from the input on,

$$ L = \tfrac12 \| R X - Y \|_F^2, \qquad R = W_{H+1} \cdots W_1, \qquad k = \text{smallest width, input and output included} . $$

Let $Y X^\top (X X^\top)^{-1} X$ have left singular vectors $u_1, u_2, \dots$ and singular values $s_1 > s_2 > \dots$. A critical point is a
global minimum if and only if $\operatorname{rank} R = k$ and, in case $k < \min(d_x, d_y)$,

$$ \operatorname{col}(W_{H+1} \cdots W_{p+1}) = \operatorname{span}(u_1, \dots, u_k) $$

at a hidden layer $p$ of width $k$. Every other critical point is a saddle. The smallest value over all maps of rank at most $k$ is

$$ \tfrac12 \Big( \| Y \|_F^2 - \sum_{j \le k} s_j^2 \Big) . $$

Deviations from the paper:

1. Only the theorems on linear nets. For non-linear nets the paper works in function space and gets sufficient conditions only.
2. The paper's points are exactly critical. Here the gradient of each layer is compared with the size of the factors that it is made of, and
   ranks and subspaces with the relative tolerance $\sqrt{\text{tol}}$, because a relative gradient of size tol leaves errors of that order over
   the smallest gap of the singular values.
3. Of the distinctness of the singular values only what decides the test is demanded: that $s_k > s_{k+1}$ at a bottleneck.

Later work: Laurent and von Brecht (2018) prove that all local minima of deep linear nets are global for every convex differentiable
loss if no hidden layer is a bottleneck. Trager, Kohn and Bruna (2020) separate the critical points of the function from those
that only the parametrisation makes. Yun, Sra and Jadbabaie (2019) show the limit of the result: almost any
non-linearity brings spurious minima back.

Example:
    import torch
    from dlatlas.theory.global_check import check_global, global_value

    x = torch.randn(4, 50, dtype=torch.float64)
    y = torch.randn(3, 4, dtype=torch.float64) @ x + 0.1 * torch.randn(3, 50, dtype=torch.float64)
    regression = y @ x.T @ torch.linalg.inv(x @ x.T)
    left, values, right = torch.linalg.svd(regression @ torch.linalg.cholesky(x @ x.T), full_matrices=False)
    for kept in ([0, 1], [0, 2]):  # the two largest singular directions, or the wrong two
        first = left[:, kept].T @ regression
        print(kept, check_global([first, left[:, kept]], x, y))  # a net with two hidden units
    print("least loss of rank 2:", round(global_value(x, y, k=2), 4))
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["check_global", "global_value", "is_critical"]

_RTOL = 1e-9


def is_critical(Ws: Sequence[Tensor], X: Tensor, Y: Tensor, tol: float = 1e-8) -> bool:
    r"""Whether the gradient of $\tfrac12 \| W_{H+1} \cdots W_1 X - Y \|_F^2$ vanishes.

    The gradient in layer $j$ is $B^\top (R X - Y) X^\top A^\top$ with $A$ the product of the layers before and $B$ that of the layers after it. It
    counts as zero if its norm is at most $\text{tol} \cdot \|B\|_F \|Y X^\top\|_F \|A\|_F$. Both sides change by the same factor when the inputs, the
    targets or two layers against one another are rescaled, so the units of the data do not matter.

    Args:
        Ws: the layers from the input on, `Ws[j]` of shape `[d_{j+1}, d_j]`.
        X: inputs `[dx, n]`, a column for each sample.
        Y: targets `[dy, n]`.
        tol: relative tolerance.

    Raises:
        ValueError: fewer than two layers, shapes that do not fit, or a singular $X X^\top$.
    """
    Ws, X, Y = _checked(Ws, X, Y)
    before = [torch.eye(len(X), dtype=X.dtype, device=X.device)]  # before[j] = W_j ... W_1
    for W in Ws:
        before.append(W @ before[-1])
    slope = (before[-1] @ X - Y) @ X.T  # [dy, dx], gradient with respect to R
    after, scale = torch.eye(len(Y), dtype=X.dtype, device=X.device), (Y @ X.T).norm()
    for W, first in zip(reversed(Ws), reversed(before[:-1])):
        if (after.T @ slope @ first.T).norm() > tol * after.norm() * scale * first.norm():
            return False
        after = after @ W
    return True


def check_global(Ws: Sequence[Tensor], X: Tensor, Y: Tensor, tol: float = 1e-8) -> str:
    r"""Decide what a critical point is: 'global' or 'saddle'; 'not critical' for any other point.

    Args:
        Ws: the layers from the input on, `Ws[j]` of shape `[d_{j+1}, d_j]`.
        X: inputs `[dx, n]`.
        Y: targets `[dy, n]`.
        tol: relative tolerance of the gradient, see `is_critical`; ranks and subspaces are compared with its square root.

    Raises:
        ValueError: as `is_critical`, or an assumption of the theorem fails: $Y X^\top$ of full rank, $s_k > s_{k+1}$.
    """
    Ws, X, Y = _checked(Ws, X, Y)
    U, s = _fitted(X, Y)
    k = min([len(X), *map(len, Ws)])
    if s[-1] <= _RTOL * torch.linalg.matrix_norm(Y, 2):
        raise ValueError(f"the theorem assumes Y X^T of full rank {len(s)}; the smallest singular value is {float(s[-1]):.2g}")
    if k < len(s) and s[k - 1] - s[k] <= _RTOL * s[0]:
        raise ValueError(f"the theorem assumes distinct singular values; number {k} and {k + 1} are both {float(s[k]):.6g}")
    if not is_critical(Ws, X, Y, tol):
        return "not critical"
    R = torch.linalg.multi_dot([*reversed(Ws)])
    # At a critical point R X keeps some of the singular values s_j and has zeros elsewhere: s[-1] is the scale of a zero.
    if int((torch.linalg.svdvals(R @ X) > tol**0.5 * s[-1]).sum()) < k:
        return "saddle"
    if k == len(s):
        return "global"
    p = next(j for j, W in enumerate(Ws) if len(W) == k)
    tail = torch.linalg.multi_dot([*reversed(Ws[p + 1 :])]) if p + 2 < len(Ws) else Ws[-1]  # [dy, k]
    Q, _ = torch.linalg.qr(tail)
    sine = torch.linalg.matrix_norm(Q - U[:, :k] @ (U[:, :k].T @ Q), 2)  # of the largest principal angle
    return "global" if sine <= tol**0.5 else "saddle"


def global_value(X: Tensor, Y: Tensor, k: int) -> float:
    r"""Smallest $\tfrac12 \| M X - Y \|_F^2$ over the matrices $M$ of rank at most `k`.

    Args:
        X: inputs `[dx, n]`.
        Y: targets `[dy, n]`.
        k: largest rank, at least 1.

    Raises:
        ValueError: `k` below 1, shapes that do not fit, or a singular $X X^\top$.
    """
    if k < 1:
        raise ValueError(f"the rank must be at least 1, got k={k}")
    X, Y = _data(X, Y)
    return float(0.5 * (Y.square().sum() - _fitted(X, Y)[1][:k].square().sum()))


def _fitted(X: Tensor, Y: Tensor) -> tuple[Tensor, Tensor]:
    """Left singular vectors and singular values of ``Y X^T (X X^T)^{-1} X``, min(dx, dy) of them."""
    _, _, V = torch.linalg.svd(X, full_matrices=False)
    U, s, _ = torch.linalg.svd(Y @ V.T, full_matrices=False)
    return U, s


def _data(X: Tensor, Y: Tensor) -> tuple[Tensor, Tensor]:
    if X.dim() != 2 or Y.dim() != 2 or X.shape[1] != Y.shape[1]:
        raise ValueError(f"expected X [dx, n] and Y [dy, n] with a column for each sample, got {tuple(X.shape)} and {tuple(Y.shape)}")
    X, Y = X.double(), Y.double()
    if not (torch.isfinite(X).all() and torch.isfinite(Y).all()):
        raise ValueError("X and Y must be finite, got NaN or infinite entries")
    if X.shape[1] < X.shape[0] or torch.linalg.matrix_rank(X, rtol=_RTOL) < len(X):
        raise ValueError(f"the theorem assumes an invertible X X^T, but X {tuple(X.shape)} has not rank {len(X)}")
    return X, Y


def _checked(Ws: Sequence[Tensor], X: Tensor, Y: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
    X, Y = _data(X, Y)
    if len(Ws) < 2:
        raise ValueError(f"expected at least 2 layers, got {len(Ws)}")
    shapes = [tuple(W.shape) for W in Ws]
    fits = all(W.dim() == 2 for W in Ws) and all(a[0] == b[1] for a, b in itertools.pairwise(shapes))
    if not fits or shapes[0][1] != len(X) or shapes[-1][0] != len(Y):
        raise ValueError(f"expected layers that lead from {len(X)} inputs to {len(Y)} outputs, got shapes {shapes}")
    return [W.detach().double() for W in Ws], X, Y
