r"""Khatri-Rao rank condition for differentiable local minima (soudry2018exponentially).

Within one activation region a one-hidden-layer net with piecewise linear units is linear in its first-layer weights, so a vanishing
gradient is a linear system for the residuals. Its matrix, the Khatri-Rao product of slopes and inputs, has $d_0 d_1$ rows and $n$
columns. When its columns are linearly independent the residuals must vanish: a differentiable local minimum in that region fits all
samples. Bad minima need regions where the rank is too small, and for leaky units those become exponentially rare once $d_0 d_1$ exceeds
$n$ by a logarithmic factor, far fewer units than one a sample. True rectifiers, $\rho = 0$, also need that every sample switches some unit on.

Equations:

$$f(x) = \sum_{j=1}^{d_1} s_j\, \phi(w_j^T x), \qquad \phi(u) = \max(u, \rho u), \quad s_j = \pm 1$$

$$\mathrm{MSE} = \frac1n \sum_i e_i^2, \quad e_i = y_i - f(x_i), \qquad
\frac{\partial\, \mathrm{MSE}}{\partial W} = 0 \iff (A \circ X)\, e = 0$$

$$A_{ji} = \phi'(w_j^T x_i) \in \{1, \rho\}, \qquad (A \circ X)_{:, i} = a_i \otimes x_i \in R^{d_0 d_1}$$

$$\mathrm{rank}(A \circ X) = n \implies e = 0.$$

Deviations from the paper:

1. The size of the output weights is absorbed into the rows of $W$, as in the paper's analysis; their signs $s_j$ alternate and are fixed.
   A sign multiplies whole rows of $A \circ X$ and leaves its rank as it is.
2. The paper bounds volumes of regions in the limit of many samples. What is computed here is the rank in one given region, and the
   share of random regions where it is full.
3. Training uses Adam with a cosine schedule and no bias.

Later work: Du, Zhai, Poczos and Singh (2019) and Allen-Zhu, Li and Song (2019) proved that gradient descent itself reaches zero loss
when the net is much wider still; Safran and Shamir (2018) and Yun, Sra and Jadbabaie (2019) constructed the bad local minima that
remain.

Example:
    import torch
    from dlatlas.theory.vanishing_minima import residual_is_forced_zero

    samples = torch.randn(40, 10, dtype=torch.float64)
    for units in (2, 4, 6, 8, 10):
        certain = [
            residual_is_forced_zero(torch.randn(units, 10, dtype=torch.float64), samples, rho=0.1) for _ in range(50)
        ]
        print(f"{units} units, {units * 10} weights, 40 samples: a flat point has zero loss in {sum(certain)} of 50 regions")
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dlatlas.train import fit, minibatches

__all__ = ["khatri_rao", "residual_is_forced_zero", "slope_matrix", "train_mse_binary"]


def slope_matrix(W: Tensor, X: Tensor, rho: float = 0.0) -> Tensor:
    r"""Slopes $A_{ji} = \phi'(w_j^T x_i)$ of all units at all samples ``(d1, n)``; 1 where the unit is active, else `rho`.

    Args:
        W: first-layer weights ``(d1, d0)``.
        X: samples ``(n, d0)``.
        rho: slope of an inactive unit, below 1 (1 would be a linear net).

    Raises:
        ValueError: shapes that do not fit, no sample, values that are not finite, or ``rho >= 1``.
    """
    _check(W, X, rho)
    return _slopes(W @ X.T, rho)  # (d1, n)


def khatri_rao(A: Tensor, X: Tensor) -> Tensor:
    r"""Column-wise Kronecker product ``(d0 d1, n)``: column $i$ is $a_i \otimes x_i$.

    Args:
        A: slopes ``(d1, n)``.
        X: samples ``(n, d0)``.

    Raises:
        ValueError: shapes that do not fit, or no sample.
    """
    if A.dim() != 2 or X.dim() != 2 or A.shape[1] != len(X) or len(X) < 1:
        raise ValueError(f"expected A (d1, n) and X (n, d0) with n >= 1, got {tuple(A.shape)} and {tuple(X.shape)}")
    return torch.einsum("jn,nk->jkn", A, X).flatten(0, 1)  # (d1 d0, n)


def residual_is_forced_zero(W: Tensor, X: Tensor, rho: float, rtol: float = 1e-9) -> bool:
    """Whether a vanishing gradient in the region of `W` forces all residuals to zero: ``rank(A o X) == n``.

    Args:
        W: first-layer weights ``(d1, d0)``.
        X: samples ``(n, d0)``; use float64, a rank in single precision means little.
        rho: slope of an inactive unit.
        rtol: singular values below ``rtol`` times the largest count as zero.

    Raises:
        ValueError: as :func:`slope_matrix`; also a unit whose input is exactly 0 at some sample: the theorem is about differentiable
            points, and the loss has a kink there.
    """
    A = slope_matrix(W, X, rho)
    if bool((W @ X.T == 0).any()):
        raise ValueError("the theorem assumes a differentiable point: a unit has input exactly 0 at some sample")
    if A.shape[0] * X.shape[1] < len(X):
        return False  # fewer equations than residuals
    sigma = torch.linalg.svdvals(khatri_rao(A, X))
    return int((sigma > rtol * sigma[0]).sum()) == len(X)


def train_mse_binary(
    X: Tensor,
    y: Tensor,
    d1: int,
    rho: float,
    epochs: int,
    generator: torch.Generator | None = None,
    *,
    lr: float = 3e-3,
    batch: int = 100,
    return_weights: bool = False,
) -> dict[str, float] | tuple[dict[str, float], Tensor]:
    """Train the net of the theorem on two classes by Adam on the squared error.

    Args:
        X: samples ``(n, d0)``.
        y: labels ``(n,)`` with two different values, such as -1 and 1; they are the regression targets.
        d1: number of hidden units.
        rho: slope of an inactive unit.
        epochs: passes over the samples.
        generator: of the initial weights and of the order of the samples.
        lr: step size at the start; it falls to 0 along a cosine.
        batch: samples a step.
        return_weights: give the trained first-layer weights ``(d1, d0)`` as well.

    Returns:
        Over all samples: ``mse``; ``class_error``, the share on the wrong side of the middle between the two labels; ``grad_norm``,
        the norm of the gradient of the MSE in `W`.

    Raises:
        ValueError: as :func:`slope_matrix`; also labels that are not of two values, or ``d1, epochs, batch < 1``.
    """
    _check(X[:1], X, rho)
    values = y.unique().to(X.device)
    if y.shape != X.shape[:1] or len(values) != 2:
        raise ValueError(f"expected labels ({len(X)},) with two different values, got shape {tuple(y.shape)} with {len(values)} values")
    if d1 < 1 or epochs < 1 or batch < 1:
        raise ValueError(f"d1, epochs and batch must be at least 1, got {d1}, {epochs} and {batch}")
    n, d0 = X.shape
    y = y.to(X)
    source = generator.device if generator is not None else "cpu"  # drawn where the generator lives: the same start on every device
    W = torch.randn(d1, d0, generator=generator, dtype=X.dtype, device=source).to(X.device) / math.sqrt(d0)
    signs = torch.ones(d1, dtype=X.dtype, device=X.device)
    signs[1::2] = -1

    def residual_and_grad(x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        inputs = x @ W.T  # (b, d1)
        slopes = _slopes(inputs, rho)
        e = target - (inputs * slopes) @ signs
        return e, -2 / len(x) * (e[:, None] * slopes * signs).T @ x  # -(2/n) (A o X) e, never forming A o X

    optimizer = torch.optim.Adam([W], lr=lr)
    batches = minibatches(n, min(batch, n), generator, drop_last=False)
    steps = epochs * math.ceil(n / min(batch, n))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    def step(_: int) -> float:
        index = next(batches).to(X.device)
        e, W.grad = residual_and_grad(X[index], y[index])
        optimizer.step()
        schedule.step()
        return e.square().mean()

    fit(step, steps, every=steps, name=f"{d1} units")
    e, grad = residual_and_grad(X, y)
    upper = y > values.double().mean()
    wrong = (y - e > values.double().mean()) != upper
    result = {"mse": float(e.square().mean()), "class_error": float(wrong.double().mean()), "grad_norm": float(grad.norm())}
    return (result, W) if return_weights else result


def _slopes(inputs: Tensor, rho: float) -> Tensor:
    # Not where(inputs > 0, 1.0, rho): from two Python numbers torch makes float32, and rho would lose half of its digits.
    return torch.where(inputs > 0, torch.ones_like(inputs), torch.full_like(inputs, rho))


def _check(W: Tensor, X: Tensor, rho: float) -> None:
    if W.dim() != 2 or X.dim() != 2 or W.shape[1] != X.shape[1] or len(X) < 1 or len(W) < 1:
        raise ValueError(f"expected W (d1, d0) and X (n, d0) with d1, n >= 1, got {tuple(W.shape)} and {tuple(X.shape)}")
    if not rho < 1:
        raise ValueError(f"the theorem needs a slope rho < 1 (rho = 1 is a linear net, where the rank is at most d0), got {rho}")
    if not (bool(torch.isfinite(W).all()) and bool(torch.isfinite(X).all())):
        raise ValueError("weights and samples must be finite")
