r"""SGD as out-of-equilibrium dynamics (chaudhari2018limitcycles).

The noise of SGD is the scatter of the gradients of single examples. It is far from white: along most directions of weight space there is
almost none. Where the noise does not match the curvature, SGD settles into a cloud whose shape is not given by the
loss, as if it descended another function $\Phi$; and within the cloud the weights do not jitter aimlessly but circulate, like a
leaf in a whirlpool. Only for round noise is $\Phi$ the loss itself, and then nothing circulates.

Equations:

$$dx = -\nabla f\, dt + \sqrt{2\, T\, D}\; dW, \qquad T = \frac{\eta}{2 B}, \qquad D = \frac1N \sum_{i} g_i g_i^\top - \bar g \bar g^\top$$

$f$ is the loss, $\eta$ the learning rate, $B$ the batch size (one SGD step is the time $dt = \eta$), $g_i$ the gradient of example $i$ with mean
$\bar g$, $W$ Brownian motion. The cloud has a density $\rho \propto e^{-\Phi/T}$, and the force splits into a part that shapes the cloud and a
part $j$ that only stirs it:

$$\nabla f = D\, \nabla \Phi - j, \qquad \nabla \cdot (j \rho) = 0.$$

Near a minimum $\nabla f = A x$ and everything is a matrix. The covariance $\Sigma$ of the cloud solves
$A \Sigma + \Sigma A^\top = 2 T D$; the potential is $\Phi = \frac12 x^\top U x$ with $U = T\, \Sigma^{-1}$, which does not depend on $T$; and
$A = (D + Q)\, U$ with $Q = -Q^\top$. The current is $j(x) = -Q U x$. For symmetric $A$ it vanishes exactly when $A D = D A$, and $\Phi = f$ only when $D = I$. Each plane
$(a, b)$ turns with the mean angular momentum $\langle x_a \dot x_b - x_b \dot x_a \rangle = 2\, T\, Q_{ab}$.

Deviations from the paper:

1. $D$ is taken at fixed weights; where it changes over the cloud, a term $T\, \nabla \cdot D$ joins the force.
2. The matrix case is worked out in full; the paper's conclusions for deep nets rest on it and on measured spectra.
3. A singular $D$ gives a singular $\Sigma$ when noise cannot reach a direction; then $U$ does not exist and an error says so.

Later work: Yaida (2018) derives stationary relations of SGD for finite steps; Zhu et al. (2019) find that the anisotropy of the noise helps to leave
sharp minima; Kunin et al. (2021) solve the linear case with momentum and see its oscillations in large nets. Kühn and Rosenow (2023) show that drawing
without replacement alone makes increments anti-correlated over an epoch, another source of periodic motion.

Example:
    import torch
    from dlatlas.theory.sgd_limit_cycles import effective_rank, gradient_covariance, ou_potential, probability_current

    x, y, w = torch.randn(500, 6, dtype=torch.float64), torch.randn(500, dtype=torch.float64), torch.zeros(6, dtype=torch.float64)
    x[:, 3:] *= 0.05  # directions that hardly show in the gradients
    D = gradient_covariance((x @ w - y)[:, None] * x)  # from the per-example gradients of your own model
    A = x.T @ x / 500  # and the Hessian there
    print("rank of the noise:", effective_rank(D), "of 6")
    potential, rotation = ou_potential(A, D)
    print(f"what SGD descends differs from the loss by {(potential / potential.norm() - A / A.norm()).norm():.2f}")
    point = torch.ones(6, dtype=torch.float64)
    print(f"probability circulates there with speed {probability_current(A, D, temp=1e-3, x=point).norm():.3f}")
"""

from __future__ import annotations

import math

import torch
from scipy.linalg import solve_continuous_lyapunov
from torch import Tensor

__all__ = ["effective_rank", "gradient_covariance", "ou_potential", "ou_stationary", "probability_current"]


def gradient_covariance(grads: Tensor) -> Tensor:
    r"""Covariance $D = \frac1N \sum_i g_i g_i^\top - \bar g \bar g^\top$ ``[P, P]`` of per-example gradients ``[N, P]``.

    Its rank is at most $N - 1$: to see a rank below $P$ as a property of the noise, use more examples than parameters.
    """
    if grads.dim() != 2 or len(grads) == 0 or not bool(grads.isfinite().all()):
        raise ValueError(f"expected finite gradients [N, P] with N >= 1, got shape {tuple(grads.shape)}")
    centred = grads - grads.mean(0)  # before the product: the difference of two large matrices would lose digits
    return centred.T @ centred / len(grads)


def effective_rank(D: Tensor, share: float = 0.99) -> int:
    """Smallest k such that the k largest eigenvalues of `D` ``[P, P]`` sum to at least `share` of its trace; 0 for the zero matrix.

    Raises:
        ValueError: `D` is not symmetric positive semi-definite, or `share` is not in (0, 1].
    """
    if not 0 < share <= 1:
        raise ValueError(f"share must be in (0, 1], got {share}")
    _check_psd(D)
    values = torch.linalg.eigvalsh(D).clamp_min(0).flip(0)
    total = values.cumsum(0)
    if total[-1] == 0:
        return 0
    # Rounding must not ask for one direction more when the share is met exactly.
    return int((total < share * total[-1] * (1 - 1e-12)).sum()) + 1


def ou_stationary(A: Tensor, D: Tensor, temp: float) -> Tensor:
    r"""Stationary covariance $\Sigma$ ``[P, P]`` of $dx = -A x\, dt + \sqrt{2\, T D}\, dW$, from $A \Sigma + \Sigma A^\top = 2\, T D$.

    Args:
        A: drift matrix ``[P, P]``, symmetric for a loss but not necessarily.
        D: noise covariance ``[P, P]``.
        temp: temperature $T$, for SGD half the learning rate divided by the batch size.

    Raises:
        ValueError: some eigenvalue of `A` has no positive real part, `D` is not positive semi-definite, or ``temp <= 0``.
    """
    _check_system(A, D, temp)
    rhs = 2 * temp * D
    sigma = solve_continuous_lyapunov(A.detach().cpu().to(torch.float64).numpy(), rhs.detach().cpu().to(torch.float64).numpy())
    sigma = torch.from_numpy(sigma).to(D)
    return (sigma + sigma.T) / 2


def ou_potential(A: Tensor, D: Tensor) -> tuple[Tensor, Tensor]:
    r"""The potential that SGD descends and the rotation that it adds: `U` and `Q`, both ``[P, P]``.

    $\Phi(x) = \frac12 x^\top U x$ and $A = (D + Q)\, U$ with $Q = -Q^\top$; for $D = I$ and symmetric $A$: $U = A$, $Q = 0$.

    Raises:
        ValueError: as :func:`ou_stationary`, or the noise does not reach some direction, so that no density exists.
    """
    sigma = ou_stationary(A, D, 1.0)
    values = torch.linalg.eigvalsh(sigma)
    if float(values[0]) <= 1e-12 * float(values[-1]) or float(values[-1]) == 0:
        raise ValueError(
            "D is singular and the noise does not reach every direction: the stationary density and its potential do not exist"
        )
    U = torch.linalg.inv(sigma)
    Q = A @ sigma - D
    return (U + U.T) / 2, (Q - Q.T) / 2


def probability_current(A: Tensor, D: Tensor, temp: float, x: Tensor) -> Tensor:
    r"""Velocity $j(x)/\rho(x) = -A x + T D \Sigma^{-1} x$ with which probability circulates at `x`; 0 in equilibrium.

    Args:
        A, D, temp: as for :func:`ou_stationary`.
        x: a point ``[P]`` or points ``[n, P]``; the result has its shape.
    """
    _check_system(A, D, temp)
    if x.dim() not in (1, 2) or x.shape[-1] != len(A):
        raise ValueError(f"expected x [{len(A)}] or [n, {len(A)}], got {tuple(x.shape)}")
    U, Q = ou_potential(A, D)
    return -x @ (Q @ U).T  # -A + D U = -Q U, without the cancellation; T has dropped out


def _check_system(A: Tensor, D: Tensor, temp: float) -> None:
    if A.dim() != 2 or A.shape[0] != A.shape[1] or D.shape != A.shape:
        raise ValueError(f"expected square matrices A and D of one size, got {tuple(A.shape)} and {tuple(D.shape)}")
    if not 0 < temp < math.inf:
        raise ValueError(f"temp must be positive and finite, got {temp}")
    if not bool(A.isfinite().all()):
        raise ValueError("A has entries that are not finite")
    slowest = float(torch.linalg.eigvals(A).real.min())
    if slowest <= 0:
        raise ValueError(
            f"A is not stable: every eigenvalue needs a positive real part for a stationary density to exist, got {slowest:.6g}"
        )
    _check_psd(D)


def _check_psd(D: Tensor) -> None:
    if D.dim() != 2 or D.shape[0] != D.shape[1] or D.shape[0] == 0 or not bool(D.isfinite().all()):
        raise ValueError(f"expected a finite square matrix D, got shape {tuple(D.shape)}")
    scale = float(D.abs().max())
    tolerance = 1e4 * torch.finfo(D.dtype).eps * scale
    if float((D - D.T).abs().max()) > tolerance:
        raise ValueError("D is not symmetric, so it is no covariance")
    if (smallest := float(torch.linalg.eigvalsh(D)[0])) < -tolerance * len(D):
        raise ValueError(f"D is not positive semi-definite: its smallest eigenvalue is {smallest:.6g}")
