r"""Two-unit ReLU teacher-student landscape (wu2018twohidden).

A student with two ReLU units learns from a teacher with two ReLU units, and inputs are standard Gaussian. Then the expected squared loss
has a closed form, and so have its gradient and its Hessian. When the teacher's rows are orthonormal and the student's rows stay on the
unit sphere, every local minimum is global: descent from a random start finds the teacher, up to the order of the units.

Equations:

$$f(x) = \mathrm{relu}(w_1^T x) + \mathrm{relu}(w_2^T x), \qquad L(W) = \tfrac12\, E_{x \sim N(0, I)} (f(x) - f^*(x))^2$$

$$L(W) = \tfrac12 \sum_{i,j} \big[K(w_i, w_j) - 2 K(w_i, w^*_j) + K(w^*_i, w^*_j)\big], \qquad
K(u, v) = \frac{|u||v|}{2\pi} \big(\sin t + (\pi - t) \cos t\big)$$

$$\frac{\partial K(u, v)}{\partial u} = \frac{1}{2\pi} \Big[|v| \sin t\; \frac{u}{|u|} + (\pi - t)\, v\Big]$$

where $t$ is the angle between $u$ and $v$. A step on the spheres moves along the part of the gradient that is tangent to them and
normalises the rows again:

$$w_i \leftarrow \frac{w_i - \eta\, (I - \hat w_i \hat w_i^T)\, \nabla_i L}{|w_i - \eta\, (I - \hat w_i \hat w_i^T)\, \nabla_i L|}.$$

The Hessian on the spheres is $P H P - \mathrm{diag}(\hat w_i^T \nabla_i L / |w_i|)\, P$ with $P$ the projector onto the tangent space: the
second term is the curvature of the sphere itself.

Deviations from the paper:

1. The theorem is an existence proof about the landscape; here its objects are functions and the landscape is searched numerically.
2. `population_loss`, `population_grad` and `classify_stationary` also take teachers that are not orthonormal and students off the unit
   sphere, because the chapter looks at what happens outside the theorem. `sphere_descent` insists on unit rows.
3. All functions take batches `(..., 2, d)` of students as well, so that many random starts cost one call.

Later work: Safran and Shamir (2018) proved with a computer that the same loss, without constraint, has bad local minima as soon as student
and teacher have 6 or more units; Arjevani and Field (2020 to 2022) described families of these minima by their symmetry. Safran, Yehudai
and Shamir (2021) showed that one unit more than the teacher turns some of these minima into saddles.

Example:
    import torch
    from dlatlas.theory.two_relu import classify_stationary, population_loss, sphere_descent

    teacher = torch.eye(2, 4, dtype=torch.float64)
    for start in torch.nn.functional.normalize(torch.randn(4, 2, 4, dtype=torch.float64), dim=2):
        end = sphere_descent(start, teacher, lr=0.2, steps=1500)
        print(f"loss {population_loss(start, teacher):.3f} -> {population_loss(end, teacher):.1e}: {classify_stationary(end, teacher, tol=1e-6)}")
"""

from __future__ import annotations

import torch
from torch import Tensor

from dlatlas.theory.kit.students import relu_population_grad, relu_population_hessian, relu_population_loss, relu_pull

__all__ = [
    "classify_stationary",
    "newton_stationary",
    "population_grad",
    "population_loss",
    "sphere_descent",
    "tangent_grad",
    "tangent_hessian",
]


def population_loss(W: Tensor, W_star: Tensor) -> Tensor:
    r"""Expected loss $\frac12 E(f - f^*)^2$ in closed form, a scalar (one value a student for a batch).

    Args:
        W: student ``(2, d)`` or ``(..., 2, d)``.
        W_star: teacher ``(2, d)``.

    Raises:
        ValueError: another shape, or a row that is zero (there the loss has a kink).
    """
    _check(W, W_star)
    return relu_population_loss(W, W_star)


def population_grad(W: Tensor, W_star: Tensor) -> Tensor:
    r"""Gradient of :func:`population_loss` in `W`, ``(2, d)``; finite also where rows are parallel.

    Args:
        W: student ``(2, d)`` or ``(..., 2, d)``.
        W_star: teacher ``(2, d)``.

    Raises:
        ValueError: as :func:`population_loss`.
    """
    _check(W, W_star)
    # Attraction to the teacher's rows, repulsion from one another; relu_pull is the sum of dK/du above.
    return relu_pull(W, W) - relu_pull(W, W_star)


def tangent_grad(W: Tensor, W_star: Tensor) -> Tensor:
    """The part of :func:`population_grad` tangent to the spheres through the rows of `W`, ``(2, d)``."""
    grad, unit = population_grad(W, W_star), W / W.norm(dim=-1, keepdim=True)
    return grad - (grad * unit).sum(-1, keepdim=True) * unit


def tangent_hessian(W: Tensor, W_star: Tensor) -> Tensor:
    """Hessian on the spheres through the rows of `W`, in an orthonormal basis of the tangent space ``(2(d-1), 2(d-1))``."""
    _check(W, W_star)
    norms = W.norm(dim=-1, keepdim=True)
    basis = _tangent_basis(W)
    zero = torch.zeros_like(basis[..., 0, :, :])
    top, bottom = torch.cat([basis[..., 0, :, :], zero], -1), torch.cat([zero, basis[..., 1, :, :]], -1)
    B = torch.cat([top, bottom], -2)  # [..., 2(d-1), 2d]
    radial = (relu_population_grad(W, W_star) * W / norms**2).sum(-1)  # [..., 2]
    sphere = radial.repeat_interleave(W.shape[-1] - 1, -1)
    return B @ relu_population_hessian(W, W_star) @ B.transpose(-1, -2) - torch.diag_embed(sphere)


def newton_stationary(W0: Tensor, W_star: Tensor, steps: int = 60) -> Tensor:
    """Newton's method for ``tangent_grad = 0`` on the unit spheres: unlike descent it goes to saddles and maxima as well ``(2, d)``.

    Steps are cut to length 0.3 and ignore directions of curvature below 1e-4 of the largest, along which families of saddles extend.

    Args:
        W0: start ``(2, d)`` or ``(..., 2, d)``; rows are normalised.
        W_star: teacher ``(2, d)``.
        steps: number of Newton steps.

    Raises:
        ValueError: as :func:`population_loss`, or ``steps < 0``.
    """
    _check(W0, W_star)
    if steps < 0:
        raise ValueError(f"steps must not be negative, got {steps}")
    W = W0 / W0.norm(dim=-1, keepdim=True)
    for _ in range(steps):
        basis = _tangent_basis(W)  # [..., 2, d-1, d]
        g = (basis @ tangent_grad(W, W_star)[..., None]).flatten(-3)  # [..., 2(d-1)]
        move = -(torch.linalg.pinv(tangent_hessian(W, W_star), rtol=1e-4, hermitian=True) @ g[..., None])[..., 0]
        move = move / (move.norm(dim=-1, keepdim=True) / 0.3).clamp(min=1.0)
        W = W + (move.unflatten(-1, (2, -1)).unsqueeze(-2) @ basis).squeeze(-2)
        W = W / W.norm(dim=-1, keepdim=True)
    return W


def sphere_descent(W0: Tensor, W_star: Tensor, lr: float, steps: int) -> Tensor:
    r"""Riemannian gradient descent on the product of the two unit spheres; the last iterate ``(2, d)``.

    Args:
        W0: start ``(2, d)`` or ``(..., 2, d)`` with unit rows; not modified.
        W_star: teacher ``(2, d)``.
        lr: step size $\eta$.
        steps: number of steps.

    Raises:
        ValueError: as :func:`population_loss`; also rows of `W0` that are not unit vectors, ``lr <= 0`` or ``steps < 0``.
    """
    _check(W0, W_star)
    if not torch.allclose(W0.norm(dim=-1), torch.ones_like(W0[..., 0]), atol=1e-6):
        raise ValueError(f"the theorem restricts the student to unit rows, got norms {W0.norm(dim=-1).flatten()[:4].tolist()}")
    if lr <= 0 or steps < 0:
        raise ValueError(f"expected lr > 0 and steps >= 0, got lr={lr}, steps={steps}")
    W = W0.clone()
    for _ in range(steps):
        W = W - lr * tangent_grad(W, W_star)
        W = W / W.norm(dim=-1, keepdim=True)
    return W


def classify_stationary(W: Tensor, W_star: Tensor, tol: float) -> str:
    """What kind of point `W` is on the spheres through its rows: 'global', 'saddle', 'spurious' or 'not stationary'.

    'spurious' means: the loss is above zero, the tangent gradient vanishes and no direction of the tangent space has negative curvature.

    Args:
        W: student ``(2, d)``.
        W_star: teacher ``(2, d)``.
        tol: a loss below it counts as zero, a tangent gradient norm above it as not stationary, an eigenvalue below ``-tol`` as negative.

    Raises:
        ValueError: as :func:`population_loss`; also a batch of students, or ``tol <= 0``.
    """
    if W.dim() != 2 or tol <= 0:
        raise ValueError(f"expected one student (2, d) and tol > 0, got shape {tuple(W.shape)} and tol={tol}")
    if float(tangent_grad(W, W_star).norm()) > tol:
        return "not stationary"
    if float(population_loss(W, W_star)) < tol:
        return "global"
    return "saddle" if float(torch.linalg.eigvalsh(tangent_hessian(W, W_star))[0]) < -tol else "spurious"


def _tangent_basis(W: Tensor) -> Tensor:
    """Orthonormal rows orthogonal to each row of `W` ``(..., 2, d-1, d)``."""
    return torch.linalg.svd(W.unsqueeze(-2)).Vh[..., 1:, :]


def _check(W: Tensor, W_star: Tensor) -> None:
    if W.dim() < 2 or W.shape[-2] != 2 or W_star.shape != W.shape[-2:] or W.shape[-1] < 2:
        raise ValueError(f"expected student (2, d) and teacher (2, d) with d >= 2, got {tuple(W.shape)} and {tuple(W_star.shape)}")
    if not (bool(torch.isfinite(W).all()) and bool(torch.isfinite(W_star).all())):
        raise ValueError("the rows must be finite")
    if bool((W.norm(dim=-1) == 0).any()) or bool((W_star.norm(dim=-1) == 0).any()):
        raise ValueError("a row is zero: the angle to it is not defined and the loss has a kink there")
