"""Students of the landscape chapter: their losses, and optimisers that run many random starts at once.

Weights are batches ``[..., units, d]``: a leading axis holds the random starts, so that a hundred runs cost one loop. For ReLU students of
a ReLU teacher with standard Gaussian inputs the expectation is taken exactly (no samples), as the theorems do.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dlatlas.kit.flat import flat_params, set_flat_params

__all__ = [
    "Outcome",
    "Stops",
    "Student",
    "lbfgs_many",
    "least_eigenvalue",
    "levenberg_marquardt",
    "linear_net_loss",
    "linear_student",
    "orthonormal_rows",
    "relu_cross",
    "relu_population_grad",
    "relu_population_hessian",
    "relu_population_loss",
    "relu_pull",
    "relu_student",
    "split_layers",
    "wide_student",
]


def orthonormal_rows(m: int, d: int, generator: torch.Generator | None = None) -> Tensor:
    """A random teacher ``[m, d]`` in float64 whose rows are orthonormal; ``m <= d``."""
    if not 1 <= m <= d:
        raise ValueError(f"{m} orthonormal rows of length {d} do not exist")
    return torch.linalg.qr(torch.randn(d, m, dtype=torch.float64, generator=generator)).Q.T.contiguous()


def relu_cross(U: Tensor, V: Tensor) -> Tensor:
    r"""All kernels $K(u_i, v_j) = E[\mathrm{relu}(u_i x)\, \mathrm{relu}(v_j x)]$ of two batches of rows.

    $K(u, v) = |u||v| (\sin t + (\pi - t) \cos t) / (2\pi)$ with $t$ the angle between $u$ and $v$.

    Args:
        U: rows ``[..., k, d]``.
        V: rows ``[..., m, d]``; leading axes broadcast.
    """
    _, nu, _, nv, t = _angles(U, V)
    return nu * nv.transpose(-1, -2) * (t.sin() + (math.pi - t) * t.cos()) / (2 * math.pi)  # [..., k, m]


def relu_pull(U: Tensor, V: Tensor) -> Tensor:
    r"""Gradient of $\sum_j K(u_i, v_j)$ with respect to $u_i$, the $v_j$ held fixed ``[..., k, d]``.

    $\sum_j [\, |v_j| \sin t_{ij}\; u_i / |u_i| + (\pi - t_{ij})\, v_j ] / (2\pi)$. Written out because the derivative of the arc cosine
    is infinite where two rows are parallel; this form is right there as well.
    """
    u, _, _, nv, t = _angles(U, V)
    along = (t.sin() * nv.transpose(-1, -2)).sum(-1, keepdim=True)  # [..., k, 1]
    return (along * u + (math.pi - t) @ V) / (2 * math.pi)


def relu_population_loss(W: Tensor, V: Tensor) -> Tensor:
    r"""$\frac12 E(\sum_i \mathrm{relu}(w_i x) - \sum_j \mathrm{relu}(v_j x))^2$ for $x \sim N(0, I)$ ``[...]``.

    Args:
        W: student ``[..., k, d]``.
        V: teacher ``[..., m, d]``; the number of units may differ.
    """
    total = relu_cross(W, W).sum((-1, -2)) - 2 * relu_cross(W, V).sum((-1, -2)) + relu_cross(V, V).sum((-1, -2))
    return total.clamp(min=0) / 2  # rounding can make an exact fit slightly negative


def relu_population_grad(W: Tensor, V: Tensor) -> Tensor:
    """Gradient of :func:`relu_population_loss` with respect to `W` ``[..., k, d]``."""
    # The pair (i, i) counts half in the loss, but both of its places move: relu_pull gives u / 2, which is its whole gradient.
    return relu_pull(W, W) - relu_pull(W, V)


def relu_population_hessian(W: Tensor, V: Tensor) -> Tensor:
    r"""Hessian of :func:`relu_population_loss` with respect to all entries of `W`, row by row ``[..., k d, k d]``.

    With $n$ the unit vector from $u$ towards $v$ in the plane of both, and $m$ that from $v$ towards $u$,
    $\partial^2_{uu} K = |v| \sin t\, (I - \hat u \hat u^T + n n^T) / (2\pi |u|)$ and
    $\partial^2_{uv} K = ((\pi - t) I + \hat u n^T + \hat v m^T) / (2\pi)$. The loss is twice continuously differentiable wherever no row
    of `W` is zero, also where rows coincide.
    """
    *batch, k, d = W.shape
    eye = torch.eye(d, dtype=W.dtype, device=W.device)
    diagonal = _second(W, W) - _second(W, V) + eye / 2  # [..., k, d, d]; K(u, u) = |u|^2 / 2 gives the last term
    H = _mixed(W)  # [..., k, k, d, d]
    index = torch.arange(k, device=W.device)
    H[..., index, index, :, :] = diagonal
    return H.transpose(-3, -2).reshape(*batch, k * d, k * d)


def split_layers(flat: Tensor, sizes: list[int]) -> list[Tensor]:
    """Weights ``[..., sizes[i+1], sizes[i]]`` of a net without biases from vectors ``[..., P]``, first layer first.

    Raises:
        ValueError: the length of the vectors is not that of the layers.
    """
    shapes = [(o, i) for i, o in itertools.pairwise(sizes)]
    counts = [o * i for o, i in shapes]
    if flat.shape[-1] != sum(counts):
        raise ValueError(f"layers {sizes} have {sum(counts)} weights, got vectors of length {flat.shape[-1]}")
    return [part.unflatten(-1, shape) for part, shape in zip(flat.split(counts, -1), shapes)]


def linear_net_loss(flat: Tensor, sizes: list[int], Sxx: Tensor, Syx: Tensor, Syy: Tensor) -> Tensor:
    r"""$\frac12 E|W_l \cdots W_1 x - y|^2$ of linear nets from second moments alone ``[...]``.

    Args:
        flat: all weights ``[..., P]``, see :func:`split_layers`.
        sizes: widths from input to output.
        Sxx: $E[xx^T]$ ``[d_in, d_in]``.
        Syx: $E[yx^T]$ ``[d_out, d_in]``.
        Syy: $E[yy^T]$ ``[d_out, d_out]``.
    """
    layers = split_layers(flat, sizes)
    product = layers[0]
    for W in layers[1:]:
        product = W @ product  # [..., d_out, d_in] in the end
    fit = ((product @ Sxx) * product).sum((-1, -2))
    return (fit - 2 * (product * Syx).sum((-1, -2)) + Syy.trace()) / 2


class Stops(NamedTuple):
    """Where the runs ended: points ``[S, P]``, losses ``[S]``, norms of the gradients ``[S]`` and the number of steps taken."""

    x: Tensor
    loss: Tensor
    grad_norm: Tensor
    steps: int


def lbfgs_many(
    loss: Callable[[Tensor], Tensor],
    x0: Tensor,
    *,
    grad: Callable[[Tensor], Tensor] | None = None,
    steps: int = 500,
    memory: int = 20,
    tol: float = 1e-6,
) -> Stops:
    """Limited-memory BFGS from many starts at once; every start has its own history, step length and stopping time.

    The line search is the bisection of Lewis and Overton, which needs no second derivatives and works across the kinks of ReLU as well.
    The loss of every run falls monotonically, up to rounding: a run that ends in a bad minimum was led there by descent. A run stops when its gradient
    norm is below `tol` or when a step lowers neither the loss nor the norm of the gradient.

    Args:
        loss: maps points ``[S, P]`` to losses ``[S]``, each depending on its own row only, for any number of rows.
        x0: starts ``[S, P]``, not modified.
        grad: gradients ``[S, P]`` of the rows' losses; without it they come from autograd.
        steps: largest number of steps of each run.
        memory: number of stored pairs.
        tol: gradient norm at which a run stops.

    Raises:
        ValueError: `x0` is no matrix, or `loss` or `grad` do not give one row a row.
    """
    if x0.dim() != 2 or steps < 1 or memory < 1:
        raise ValueError(f"expected starts [S, P], steps >= 1 and memory >= 1; got {tuple(x0.shape)}, {steps}, {memory}")
    grad = grad or (lambda x: _autograd(loss, x))
    out = x0.detach().clone()
    x, value, g = out.clone(), loss(out).detach(), grad(out)
    if value.shape != (len(x),) or g.shape != x.shape:
        raise ValueError(f"loss and grad must give [S] and [S, P], got {tuple(value.shape)} and {tuple(g.shape)} for {tuple(x.shape)}")
    pairs: list[tuple[Tensor, Tensor, Tensor]] = []
    run = torch.arange(len(x), device=x.device)  # which start each row belongs to
    taken, moved = 0, torch.ones_like(value, dtype=torch.bool)
    while True:
        out[run] = x
        keep = (g.norm(dim=1) > tol) & moved
        if taken == steps or not bool(keep.any()):
            break
        if not bool(keep.all()):
            x, value, g, run = x[keep], value[keep], g[keep], run[keep]
            pairs = [tuple(part[keep] for part in pair) for pair in pairs]
        taken += 1
        direction = _two_loop(g, pairs)
        if not pairs:
            direction /= g.norm(dim=1, keepdim=True).clamp(min=1.0)
        new_x, new_value, new_g = _line_search(loss, grad, x, value, g, direction)
        moved = (new_value < value) | (new_g.norm(dim=1) < g.norm(dim=1))
        step, change = new_x - x, new_g - g
        curvature = (step * change).sum(1)
        usable = curvature > 1e-12 * step.norm(dim=1) * change.norm(dim=1)
        # A pair of weight zero leaves the direction of its run as it is.
        pairs = [*pairs, (step, change, torch.where(usable, 1 / torch.where(usable, curvature, 1.0), 0.0))][-memory:]
        x, value, g = new_x, new_value, new_g
    return Stops(out, loss(out).detach(), grad(out).norm(dim=1), taken)


def levenberg_marquardt(net: nn.Module, X: Tensor, Y: Tensor, *, steps: int = 100, tol: float = 1e-9) -> tuple[float, float]:
    r"""Damped Gauss-Newton for $\frac{1}{2n} \sum_i |f(x_i) - y_i|^2$; writes the weights found into `net`.

    Wide layers make the loss so ill-conditioned that first-order methods stay far from any critical point. Solving in the space of the
    n m residuals costs little when these are fewer than the weights.

    Args:
        net: module without batch normalisation that maps ``[n, ...]`` to ``[n, m]``.
        X: samples.
        Y: targets ``[n, m]``.
        steps: largest number of steps.
        tol: norm of the gradient at which to stop.

    Returns:
        The loss and the norm of its gradient at the end.
    """
    names, shapes = zip(*((name, p.shape) for name, p in net.named_parameters()))
    counts = [shape.numel() for shape in shapes]

    def output(vector: Tensor, x: Tensor) -> Tensor:
        named = {name: part.view(shape) for name, part, shape in zip(names, vector.split(counts), shapes)}
        return torch.func.functional_call(net, named, (x,))

    jacobian = torch.func.vmap(torch.func.jacrev(lambda vector, x: output(vector, x[None])[0]), (None, 0))
    theta, damping, growth = flat_params(net), 0.0, 2.0
    with torch.no_grad():
        residual = (output(theta, X) - Y).flatten()  # [n m]
    for left in range(steps, -1, -1):
        J = jacobian(theta, X).flatten(0, 1)  # [n m, P]
        gradient = J.T @ residual / len(X)
        if left == 0 or gradient.norm() <= tol:
            break
        K, eye = J @ J.T, torch.eye(len(residual), dtype=J.dtype, device=J.device)
        scale = float(K.diagonal().max())
        damping = damping or 0.1 * scale  # long first steps would drive the units into saturation
        for _ in range(60):
            weights = torch.linalg.solve(K + damping * eye, residual)  # [n m]; the step is -J^T weights
            with torch.no_grad():
                new = (output(theta - J.T @ weights, X) - Y).flatten()
            # The model promises a fall of |r|^2 - |r - K w|^2; the ratio of what comes to what was promised steers the damping (Nielsen).
            gain = float((residual @ residual - new @ new) / (residual @ residual - (residual - K @ weights).square().sum()))
            if gain > 0:
                theta, residual, growth = theta - J.T @ weights, new, 2.0
                damping = max(damping * max(1 / 3, 1 - (2 * gain - 1) ** 3), 1e-16 * scale)
                break
            damping, growth = damping * growth, 2 * growth
        else:
            break
    set_flat_params(net, theta)
    return float(residual @ residual) / (2 * len(X)), float(gradient.norm())


def least_eigenvalue(loss: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Smallest eigenvalue of the Hessian of `loss` (see :func:`lbfgs_many`) at each row of `x` ``[S]``."""
    if len(x) == 0:
        return x.new_zeros(0)
    hessian = torch.func.jacrev(torch.func.jacrev(lambda row: loss(row[None])[0]))
    H = torch.func.vmap(hessian)(x.detach())  # [S, P, P]
    return torch.linalg.eigvalsh(H)[:, 0]


class Outcome(NamedTuple):
    """How the runs of a student ended.

    ``reached`` is the share of runs at the global value, ``gaps`` ``[S]`` the distances of the losses from it, ``grad_norm`` the largest
    gradient norm at a stop, and ``least`` the smallest Hessian eigenvalue at each of the other stops.
    """

    reached: float
    gaps: Tensor
    grad_norm: float
    least: Tensor


class Student(NamedTuple):
    """A training problem with a known global value: loss of points ``[S, P]``, starts, and derivatives where they have a closed form.

    `warm_up` plain gradient steps of length 0.1 come before L-BFGS.
    """

    loss: Callable[[Tensor], Tensor]
    starts: Tensor
    target: float
    grad: Callable[[Tensor], Tensor] | None = None
    hessian: Callable[[Tensor], Tensor] | None = None
    warm_up: int = 0

    def train(self, *, steps: int = 600, tol: float = 1e-6, grad_tol: float = 1e-6) -> Outcome:
        """Descend from all starts; a run has reached the global value when its loss is within `tol` of it.

        `grad_tol` is the gradient norm at which a run stops. On a plateau where the loss falls with the fourth power of the way, the gradient
        is below any ordinary tolerance long before the loss has fallen: take it near rounding there, and many steps.
        """
        x, grad = self.starts, self.grad or (lambda x: _autograd(self.loss, x))
        for _ in range(self.warm_up):
            x = x - 0.1 * grad(x)
        stops = lbfgs_many(self.loss, x, grad=grad, steps=steps, tol=grad_tol)
        gaps = stops.loss - self.target
        other = stops.x[gaps > tol]
        if self.hessian is None or len(other) == 0:
            least = least_eigenvalue(self.loss, other)
        else:
            least = torch.linalg.eigvalsh(self.hessian(other))[:, 0]
        return Outcome(float((gaps <= tol).double().mean()), gaps, float(stops.grad_norm.max()), least)


def linear_student(X: Tensor, Y: Tensor, sizes: list[int], target: float, starts: int, generator: torch.Generator | None = None) -> Student:
    r"""Linear net of widths `sizes` on samples ``X [n, d_in]``, ``Y [n, d_out]``, loss $\frac{1}{2n} \sum_i |P x_i - y_i|^2$.

    `target` is its global value. Starts have entries of variance 1 / fan-in. Descent begins with plain gradient steps, which keep
    $W_{i+1}^T W_{i+1} - W_i W_i^T$ almost constant and with it the layers bounded. The big steps of L-BFGS do not: from about one start in
    a hundred it would run off to infinity, where one layer grows without end, another dies, and the gradient need not vanish.
    """
    moments = X.T @ X / len(X), Y.T @ X / len(X), Y.T @ Y / len(X)
    blocks = [_draw((starts, i * o), X, generator) / math.sqrt(i) for i, o in itertools.pairwise(sizes)]
    return Student(lambda flat: linear_net_loss(flat, sizes, *moments), torch.cat(blocks, 1), target, warm_up=1000)


def relu_student(V: Tensor, units: int, starts: int, generator: torch.Generator | None = None) -> Student:
    """Student with `units` ReLU units, at least as many as the teacher ``V [m, d]``, under the population loss; its global value is 0."""
    if units < len(V):
        raise ValueError(f"the global value is known to be 0 only for students with at least {len(V)} units, got {units}")
    d = V.shape[1]

    def rows(flat: Tensor) -> Tensor:
        return flat.unflatten(-1, (units, d))

    W0 = _draw((starts, units * d), V, generator) / math.sqrt(d)
    return Student(
        lambda flat: relu_population_loss(rows(flat), V),
        W0,
        0.0,
        lambda flat: relu_population_grad(rows(flat), V).flatten(-2),
        lambda flat: relu_population_hessian(rows(flat), V),
    )


def wide_student(X: Tensor, y: Tensor, units: int, starts: int, generator: torch.Generator | None = None) -> Student:
    r"""$f(x) = \sum_i \pm \mathrm{relu}(w_i x) / \sqrt{\mathrm{units}}$ on samples ``X [n, d]``, ``y [n]``; loss $\frac{1}{2n} \sum e^2$.

    Its global value is taken to be 0, which wants more weights than samples.
    """
    if units * X.shape[1] < len(X):
        raise ValueError(f"{units} units of {X.shape[1]} weights cannot fit {len(X)} arbitrary labels")
    signs = torch.ones(units, dtype=X.dtype, device=X.device)
    signs[1::2] = -1
    signs /= math.sqrt(units)

    def error(flat: Tensor) -> tuple[Tensor, Tensor]:
        inputs = flat.unflatten(-1, (units, -1)) @ X.T  # [S, units, n]
        return torch.einsum("u,...un->...n", signs, inputs.relu()) - y, inputs

    def grad(flat: Tensor) -> Tensor:
        e, inputs = error(flat)
        return ((inputs > 0) * e[..., None, :] * signs[:, None] @ X / len(X)).flatten(-2)

    W0 = _draw((starts, units * X.shape[1]), X, generator)
    return Student(lambda flat: error(flat)[0].square().mean(-1) / 2, W0, 0.0, grad)


def _draw(shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard normal numbers of the dtype and on the device of `like`, drawn where the generator lives: the same on every device."""
    source = generator.device if generator is not None else "cpu"
    return torch.randn(*shape, dtype=like.dtype, generator=generator, device=source).to(like.device)


def _angles(U: Tensor, V: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Unit rows and norms of both, and all angles ``[..., k, m]``."""
    nu, nv = U.norm(dim=-1, keepdim=True), V.norm(dim=-1, keepdim=True)
    u, v = U / nu, V / nv
    # atan2 of |u - v| and |u + v| keeps the digits that acos loses at angles near 0 and pi.
    exact = "donot_use_mm_for_euclid_dist"
    t = 2 * torch.atan2(torch.cdist(u, v, compute_mode=exact), torch.cdist(u, -v, compute_mode=exact))
    return u, nu, v, nv, t


def _towards(a: Tensor, b: Tensor, t: Tensor) -> Tensor:
    """Unit vector from `a` towards `b` along the sphere ``[..., k, m, d]``; zero where the direction is not defined."""
    n = b - t.cos()[..., None] * a
    size = n.norm(dim=-1, keepdim=True)
    return torch.where(size > 1e-12, n / size.clamp(min=1e-12), torch.zeros_like(n))


def _second(U: Tensor, V: Tensor) -> Tensor:
    """Sum over j of the second derivative of K(u_i, v_j) in u_i ``[..., k, d, d]``."""
    u, nu, v, nv, t = _angles(U, V)
    n = _towards(u[..., :, None, :], v[..., None, :, :], t)  # [..., k, m, d]
    weight = t.sin() * nv.transpose(-1, -2) / (2 * math.pi * nu)  # [..., k, m]
    eye = torch.eye(U.shape[-1], dtype=U.dtype, device=U.device)
    flat = weight.sum(-1)[..., None, None] * (eye - u[..., :, None] * u[..., None, :])
    return flat + torch.einsum("...km,...kmd,...kme->...kde", weight, n, n)


def _mixed(W: Tensor) -> Tensor:
    """Mixed derivatives of K(w_i, w_j) in w_i and w_j ``[..., k, k, d, d]``."""
    u, _, _, _, t = _angles(W, W)
    a, b = u[..., :, None, :], u[..., None, :, :]  # [..., k, k, d] when broadcast
    n, m = _towards(a, b, t), _towards(b, a, t)
    eye = torch.eye(W.shape[-1], dtype=W.dtype, device=W.device)
    return ((math.pi - t)[..., None, None] * eye + a[..., :, None] * n[..., None, :] + b[..., :, None] * m[..., None, :]) / (2 * math.pi)


def _autograd(loss: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        (grad,) = torch.autograd.grad(loss(x).sum(), x)
    return grad


def _line_search(
    loss: Callable[[Tensor], Tensor], grad: Callable[[Tensor], Tensor], x: Tensor, value: Tensor, g: Tensor, direction: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Points along the directions that satisfy the weak Wolfe conditions, with their losses and gradients."""
    slope = (direction * g).sum(1)
    new_x, new_value, new_g = x.clone(), value.clone(), g.clone()
    low, high, length = torch.zeros_like(value), torch.full_like(value, math.inf), torch.ones_like(value)
    waiting = torch.arange(len(x), device=x.device)
    for _ in range(40):
        trial = x[waiting] + length[waiting, None] * direction[waiting]
        trial_value, trial_g = loss(trial).detach(), grad(trial)
        # The last term keeps a search from failing where the gain drowns in the rounding of the loss.
        far = ~(trial_value <= value[waiting] + 1e-4 * length[waiting] * slope[waiting] + 4e-16 * value[waiting].abs())
        short = ~far & ((trial_g * direction[waiting]).sum(1) < 0.9 * slope[waiting])
        better = waiting[~far]
        new_x[better], new_value[better], new_g[better] = trial[~far], trial_value[~far], trial_g[~far]
        high[waiting[far]], low[waiting[short]] = length[waiting[far]], length[waiting[short]]
        waiting = waiting[far | short]
        if len(waiting) == 0:
            break
        length[waiting] = torch.where(high[waiting].isinf(), 2 * length[waiting], (low[waiting] + high[waiting]) / 2)
    return new_x, new_value, new_g


def _two_loop(grad: Tensor, pairs: list[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """The L-BFGS direction ``-H grad`` of every run."""
    q, weights = grad.clone(), []
    for step, change, rho in reversed(pairs):
        weights.append(rho * (step * q).sum(1))
        q -= weights[-1][:, None] * change
    if pairs:
        step, change, rho = pairs[-1]
        q *= torch.where(rho > 0, 1 / (rho.clamp(min=1e-300) * (change**2).sum(1).clamp(min=1e-300)), 1.0)[:, None]
    for (step, change, rho), weight in zip(pairs, reversed(weights)):
        q += (weight - rho * (change * q).sum(1))[:, None] * step
    return -q
