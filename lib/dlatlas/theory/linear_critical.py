r"""Analytic critical points of linear nets (zhou2018critical).

A network without non-linearities computes one matrix, but as a function of its two weight matrices the squared loss is not
convex. It can still be solved completely: a point where the gradient vanishes is, up to an invertible change of the hidden
coordinates, a choice of some eigenvectors of one matrix built from the data. So all critical points can be listed, with
their loss values, and exactly one choice is a minimum. A layer of rectifiers that are on for every sample computes the same
thing as a linear layer, which carries the minimum over to a network for which it is no longer the best one.

Equations: columns are samples, $X$ is $d_0 \times n$, $Y$ is $d_2 \times n$, and $X^+$ is the pseudo-inverse,

$$ L(A_2, A_1) = \tfrac12 \| A_2 A_1 X - Y \|_F^2, \qquad
   \Sigma = Y X^+ X Y^\top = U \operatorname{diag}(\lambda_1 > \lambda_2 > \dots) U^\top . $$

For a set $J$ of at most $d_1$ indices of positive eigenvalues, $U_J$ the columns of $U$ named by $J$ and $C$ an invertible
$d_1 \times d_1$ matrix, a critical point and its value are

$$ A_2 = [U_J, 0]\, C, \qquad A_1 = C^{-1} \begin{bmatrix} U_J^\top Y X^+ \\ 0 \end{bmatrix}, \qquad
   L = \tfrac12 \Big( \operatorname{tr} Y Y^\top - \sum_{j \in J} \lambda_j \Big) . $$

The global minimum takes the $\min(d_1, \operatorname{rank} \Sigma)$ largest eigenvalues; every other set gives a saddle.

Deviations from the paper:

1. The complete form has free blocks that the loss does not see (what $A_1$ does off the range of $X$, and where $A_2$ has a
   null space). The constructor sets them to zero, so it returns one representative for each $J$ and $C$.
2. The paper allows repeated eigenvalues, where any orthonormal basis of an eigenspace may be used. Here a set that takes
   only a part of an eigenspace is refused, because the indices do not say which part.
3. The rectifier example is our own: four points on a line instead of the paper's.

Later work: Yun, Sra and Jadbabaie (2019) show that such minima exist for almost every data set and for many activations.
Laurent and von Brecht (2018) extend the statement for linear nets to every convex differentiable loss, as long as no hidden
layer is narrower than both the input and the output. Trager, Kohn and Bruna (2020) explain it geometrically, and
Achour, Malgouyres and Gerchinovitz (2024) sort the saddles of deep linear nets by whether second derivatives show the way down.

Example:
    import torch
    from dlatlas.theory.linear_critical import all_values, shallow_critical

    x, y = torch.randn(5, 100, dtype=torch.float64), torch.randn(3, 100, dtype=torch.float64)
    for kept, value in all_values(x, y, d1=2).items():  # every loss at which a net with two hidden units can rest
        second, first = shallow_critical(x, y, d1=2, indices=kept)
        first, second = first.requires_grad_(), second.requires_grad_()
        loss = 0.5 * (second @ first @ x - y).square().sum()
        slope = sum(g.norm().item() for g in torch.autograd.grad(loss, [first, second]))
        print(f"eigenvalues {kept}: loss {value:.3f}, gradient {slope:.0e}")
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["all_values", "critical_value", "relu_spurious_example", "shallow_critical"]

_RTOL = 1e-10


def shallow_critical(X: Tensor, Y: Tensor, d1: int, indices: Sequence[int], C: Tensor | None = None) -> tuple[Tensor, Tensor]:
    r"""Critical point $(A_2, A_1)$ of $\tfrac12 \| A_2 A_1 X - Y \|_F^2$ that belongs to a set of eigenvalues.

    Args:
        X: inputs `[d0, n]`, a column for each sample.
        Y: targets `[d2, n]`.
        d1: number of hidden units.
        indices: which eigenvalues of $\Sigma$, counted from 0 at the largest; at most `d1` different ones.
        C: invertible `[d1, d1]` change of the hidden coordinates; the identity if None.

    Returns:
        `A2` `[d2, d1]` and `A1` `[d1, d0]`, float64.

    Raises:
        ValueError: more than `d1` indices, a duplicate, an index beyond the rank of $\Sigma$, a singular `C`, or a set that
            takes only a part of a repeated eigenvalue (the theorem needs distinct ones to name the point by indices).
    """
    U, eigenvalues = _spectrum(X, Y)
    J = _checked(indices, len(eigenvalues))
    if d1 < 1 or len(J) > d1:
        raise ValueError(f"a net with {d1} hidden units has critical points for at most {d1} indices, got {len(J)}: {J}")
    rest = [j for j in range(len(eigenvalues)) if j not in J]
    for i, j in itertools.product(J, rest):
        if abs(eigenvalues[i] - eigenvalues[j]) <= _RTOL * eigenvalues[0]:
            raise ValueError(f"the assumption of distinct eigenvalues of Sigma fails: {i} and {j} are equal and the set {J} takes one")
    C = torch.eye(d1, dtype=torch.float64, device=X.device) if C is None else C.double()
    if C.shape != (d1, d1) or not torch.isfinite(C).all() or torch.linalg.cond(C) > 1 / _RTOL:
        raise ValueError(f"C must be an invertible {d1} x {d1} matrix, got shape {tuple(C.shape)} or a singular one")
    fitted = U[:, J].T @ Y.double() @ torch.linalg.pinv(X.double())  # [p, d0]
    A2 = U.new_zeros(len(Y), d1)
    A1 = U.new_zeros(d1, len(X))
    # A set smaller than the hidden layer leaves idle units: zero columns, not fewer columns.
    A2[:, : len(J)] = U[:, J]
    A1[: len(J)] = fitted
    return A2 @ C, torch.linalg.solve(C, A1)


def critical_value(X: Tensor, Y: Tensor, indices: Sequence[int]) -> float:
    r"""Loss $\tfrac12 (\operatorname{tr} Y Y^\top - \sum_{j \in J} \lambda_j)$ at the critical points of a set of eigenvalues.

    Args:
        X: inputs `[d0, n]`.
        Y: targets `[d2, n]`.
        indices: which eigenvalues of $\Sigma$, counted from 0 at the largest.

    Raises:
        ValueError: a duplicate, or an index beyond the rank of $\Sigma$.
    """
    _, eigenvalues = _spectrum(X, Y)
    return _value(Y, eigenvalues, _checked(indices, len(eigenvalues)))


def all_values(X: Tensor, Y: Tensor, d1: int) -> dict[tuple[int, ...], float]:
    r"""Loss values of all critical points of a net with `d1` hidden units, one for each set of at most `d1` eigenvalues.

    With repeated eigenvalues the values stay right, but sets of equal value then belong to one connected family.

    Args:
        X: inputs `[d0, n]`.
        Y: targets `[d2, n]`.
        d1: number of hidden units.
    """
    if d1 < 1:
        raise ValueError(f"a net needs at least one hidden unit, got d1={d1}")
    _, eigenvalues = _spectrum(X, Y)
    rank = len(eigenvalues)
    sets = itertools.chain.from_iterable(itertools.combinations(range(rank), p) for p in range(min(d1, rank) + 1))
    return {J: _value(Y, eigenvalues, J) for J in sets}


def relu_spurious_example() -> dict[str, Tensor | float]:
    r"""A rectifier net $W_2 \operatorname{relu}(W_1 X)$ with two units that sits in a local minimum which is not global.

    Four points of the line (second row of `X`: the constant 1), targets $\tfrac12 + |x|$. Both units are on for all
    samples, so near (`W1`, `W2`) the net is linear and the point is the least-squares solution: no small step helps. Yet
    $\operatorname{relu}(\tfrac12 - x) + \operatorname{relu}(\tfrac12 + x)$ fits all four points.

    Returns:
        `X` `[2, 4]`, `Y` `[1, 4]`, `W1` `[2, 2]`, `W2` `[1, 2]`, the `loss` $\tfrac12 \| W_2 \operatorname{relu}(W_1 X) - Y \|^2$
        there, and the smaller `global_loss` of the better weights.
    """
    x = torch.tensor([-2.0, -1.0, 1.0, 2.0], dtype=torch.float64)
    X = torch.stack([x, torch.ones_like(x)])
    Y = (0.5 + x.abs())[None]
    W1, W2 = X.new_tensor([[0.0, 1.0], [0.0, 1.0]]), X.new_tensor([[1.0, 1.0]])
    better = X.new_tensor([[-1.0, 0.5], [1.0, 0.5]])

    def loss(first: Tensor) -> float:
        return float(0.5 * (W2 @ torch.relu(first @ X) - Y).square().sum())

    return {"X": X, "Y": Y, "W1": W1, "W2": W2, "loss": loss(W1), "global_loss": loss(better)}


def _spectrum(X: Tensor, Y: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvectors ``[d2, rank]`` and positive eigenvalues ``[rank]`` of Sigma, largest first."""
    if X.dim() != 2 or Y.dim() != 2 or X.shape[1] != Y.shape[1] or X.shape[1] == 0:
        raise ValueError(f"expected X [d0, n] and Y [d2, n] with a column for each sample, got {tuple(X.shape)} and {tuple(Y.shape)}")
    if not (torch.isfinite(X).all() and torch.isfinite(Y).all()):
        raise ValueError("X and Y must be finite, got NaN or infinite entries")
    X, Y = X.double(), Y.double()
    _, s, V = torch.linalg.svd(X, full_matrices=False)
    V = V[s > _RTOL * s[0]]  # orthonormal rows: X^+ X = V^T V
    # Singular values of Y V^T, not eigenvalues of Y V^T V Y^T: squaring would lose half of the digits.
    U, s, _ = torch.linalg.svd(Y @ V.T, full_matrices=False)
    rank = int((s > _RTOL * torch.linalg.matrix_norm(Y, 2)).sum())
    return U[:, :rank], s[:rank].square()


def _checked(indices: Sequence[int], rank: int) -> list[int]:
    J = [int(j) for j in indices]
    if len(set(J)) < len(J):
        raise ValueError(f"indices must be different, got {J}")
    if any(not 0 <= j < rank for j in J):
        raise ValueError(f"Sigma has rank {rank}: indices must lie between 0 and {rank - 1}, got {J}")
    return J


def _value(Y: Tensor, eigenvalues: Tensor, J: Sequence[int]) -> float:
    return float(0.5 * (Y.double().square().sum() - eigenvalues[list(J)].sum()))
