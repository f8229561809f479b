r"""Gradient descent converges to the max-margin direction (soudry2018implicit).

When a straight line separates two classes, infinitely many separate them, and the logistic loss has no minimum: it falls for ever while
the weights grow. Nothing in the loss prefers one separator, yet gradient descent does: its direction turns towards the one with
the largest margin, because late in training only the points nearest to the boundary still have a gradient. The turn happens on
a logarithmic clock, long after the training error has reached zero.

Equations:

$$L(w) = \sum_i \ell(y_i\, w \cdot x_i), \quad \ell(u) = \ln(1 + e^{-u}) \text{ or } e^{-u}, \qquad w(t+1) = w(t) - \eta \nabla L(w(t)), \quad \eta < \frac{2}{\beta}$$

$$w(t) = \hat w \ln t + \rho(t), \qquad \hat w = \arg\min |w|^2 \ \text{ subject to }\ y_i\, w \cdot x_i \ge 1$$

$x_i$ are the data, $y_i = \pm 1$ their labels, $\eta$ the step, $\beta = \sigma_{\max}(X)^2 \max \ell''$ the smoothness of $L$, and $\hat w$ the hard-margin support
vector machine, whose margin is $1/|\hat w|$. The residual $\rho(t)$ stays bounded (for almost all separable data), so

$$\Big| \frac{w}{|w|} - \frac{\hat w}{|\hat w|} \Big| = O\Big(\frac{1}{\ln t}\Big), \qquad \frac{1}{|\hat w|} - \min_i \frac{y_i\, w \cdot x_i}{|w|} = O\Big(\frac{1}{\ln t}\Big), \qquad L(w(t)) = O\Big(\frac1t\Big).$$

The dual variables $\alpha_i \ge 0$ of the machine, $\hat w = \sum_i \alpha_i y_i x_i$, are what the gradients become: $\eta\, t\, e^{-y_i w(t) \cdot x_i} \to \alpha_i$ on the support vectors.

Deviations from the paper:

1. Two classes, no intercept: append a column of ones to `X` for one, which then counts in the margin.
2. The exponential loss has no global smoothness bound; $\beta$ is taken with $\ell''(0) = 1$, its value at the start $w = 0$.
3. The machine is solved exactly as a least-distance problem by non-negative least squares (Lawson and Hanson), which also proves separability.

Later work: Ji and Telgarsky (2019) treat data that are not separable; Nacson et al. (2019) reach the direction much faster with growing steps, and also
with stochastic gradients. Lyu and Li (2020) extend the statement to homogeneous networks, where the limit is a stationary point of a margin problem. Other
geometries have other limits: coordinate descent, sign descent and Adam lead to other norms than the Euclidean one. Wu et al. (2023) keep the
conclusion for logistic regression at steps above $2/\beta$, where the loss no longer falls monotonically.

Example:
    import torch
    from dlatlas.theory.max_margin_bias import direction_gap, gd_path, hard_margin_svm

    y = torch.tensor([1.0, -1.0]).repeat(50)
    x = torch.randn(100, 2) * 0.5 + y[:, None] * torch.tensor([2.0, 1.0])
    svm = hard_margin_svm(x, y)
    steps = (10, 100, 1000, 10_000)
    for step, w in zip(steps, gd_path(x, y, record=steps)):  # logistic regression by gradient descent, nothing else
        print(f"after {step} steps: length {w.norm():.2f}, distance to the max-margin direction {direction_gap(w, svm):.3f}")
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from scipy.optimize import nnls
from scipy.special import expit
from torch import Tensor

__all__ = ["direction_gap", "gd_path", "hard_margin_svm", "svm_duals"]


def hard_margin_svm(X: Tensor, y: Tensor) -> Tensor:
    r"""The separator of largest margin through the origin: $\arg\min |w|^2$ subject to $y_i\, w \cdot x_i \ge 1$; float64 ``[d]``.

    Its margin is $1/|\hat w|$: the empty street between the classes is twice as wide.

    Args:
        X: data ``[n, d]``.
        y: labels ``[n]`` in {-1, +1}.

    Raises:
        ValueError: the data are not linearly separable through the origin, or labels or shapes are wrong.
    """
    Z = _signed(X, y)
    return torch.from_numpy(Z.T @ _duals(Z)).to(X.device)


def svm_duals(X: Tensor, y: Tensor) -> Tensor:
    r"""Dual variables $\alpha \ge 0$ of :func:`hard_margin_svm`, float64 ``[n]``: $\hat w = \sum_i \alpha_i y_i x_i$, positive on support vectors only."""
    return torch.from_numpy(_duals(_signed(X, y))).to(X.device)


def gd_path(
    X: Tensor, y: Tensor, loss: str = "logistic", lr: float | None = None, record: Sequence[int] = (10, 100, 1000, 10_000)
) -> Tensor:
    r"""Weights of full-batch gradient descent on $\sum_i \ell(y_i\, w \cdot x_i)$ from $w = 0$, after each of `record` steps.

    Args:
        X: data ``[n, d]``; the work is done in float64.
        y: labels ``[n]`` in {-1, +1}.
        loss: "logistic", $\ln(1 + e^{-u})$, or "exp", $e^{-u}$.
        lr: the step $\eta$; None takes $1/\beta$.
        record: numbers of steps, increasing.

    Returns:
        float64 ``[len(record), d]``.

    Raises:
        ValueError: the data are not separable, labels are not +-1, `record` is not increasing, or $\eta \ge 2/\beta$.
    """
    if loss not in ("logistic", "exp"):
        raise ValueError(f"loss must be 'logistic' or 'exp', got {loss!r}")
    record = [int(t) for t in record]
    if not record or record[0] < 0 or any(b <= a for a, b in pairwise(record)):
        raise ValueError(f"record must be increasing numbers of steps, got {record}")
    Z = _signed(X, y)
    _duals(Z)  # raises where the data are not separable
    beta = np.linalg.norm(Z, 2) ** 2 * (0.25 if loss == "logistic" else 1.0)
    lr = 1 / beta if lr is None else lr
    if not 0 < lr < 2 / beta:
        raise ValueError(f"the theorem assumes a step in (0, 2/beta), here (0, {2 / beta:.6g}), got {lr}")
    # NumPy, not torch: a step on data of this size takes microseconds, less than the overhead of one torch call.
    slope = expit if loss == "logistic" else np.exp
    w, ZT, path, t = np.zeros(Z.shape[1]), np.ascontiguousarray(Z.T), [], 0
    for until in record:
        for _ in range(until - t):
            w = w + lr * (ZT @ slope(-(Z @ w)))  # -l'(u) = 1/(1 + e^u) or e^-u
        t = until
        path.append(w)
    if not np.isfinite(path[-1]).all():
        raise ValueError(f"gradient descent diverged with step {lr:.6g}: take a smaller one")
    return torch.from_numpy(np.stack(path)).to(X.device)


def direction_gap(w: Tensor, w_hat: Tensor) -> float:
    r"""Distance of two directions, $\big| w/|w| - \hat w/|\hat w| \big|$: 0 for the same, 2 for opposite ones."""
    if w.dim() != 1 or w.shape != w_hat.shape:
        raise ValueError(f"expected two vectors of one length, got {tuple(w.shape)} and {tuple(w_hat.shape)}")
    lengths = float(w.norm()), float(w_hat.norm())
    if not (0 < lengths[0] < math.inf and 0 < lengths[1] < math.inf):
        raise ValueError(f"a direction needs a vector that is finite and not zero, got lengths {lengths}")
    return float((w / lengths[0] - w_hat / lengths[1]).norm())


def _signed(X: Tensor, y: Tensor) -> np.ndarray:
    """Rows ``y_i x_i``: the constraints are then the same for both classes."""
    if X.dim() != 2 or y.shape != X.shape[:1] or len(X) == 0:
        raise ValueError(f"expected X [n, d] and y [n], got {tuple(X.shape)} and {tuple(y.shape)}")
    if not bool((y.abs() == 1).all()):
        raise ValueError(f"labels must be -1 or +1, got values {sorted(set(y.tolist()))[:5]}")
    if not bool(X.isfinite().all()):
        raise ValueError("X has entries that are not finite")
    return (X.detach().to(torch.float64) * y.to(torch.float64)[:, None]).cpu().numpy()


def _duals(Z: np.ndarray) -> np.ndarray:
    """Least distance as non-negative least squares: min |E u - f| over u >= 0 with E = (Z^T; 1), f = (0; 1)."""
    scale = np.linalg.norm(Z, axis=1).max()
    if scale == 0:
        raise ValueError("the data are not linearly separable through the origin: all rows of X are zero")
    E = np.vstack([Z.T / scale, np.ones(len(Z))])
    u, distance = nnls(E, np.eye(len(E))[-1], maxiter=30 * E.shape[1])
    # The smallest residual is 1/sqrt(1 + |scaled w|^2); it is zero when 0 lies in the convex hull of the rows.
    if distance < 1e-7:
        raise ValueError("the data are not linearly separable through the origin, which the theorem assumes: the SVM is infeasible")
    return u / (distance * scale) ** 2
