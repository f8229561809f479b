r"""Bayesian evidence and the noise scale of SGD (smith2018bayesian).

A model can memorise random labels whatever its size, so training accuracy says nothing. The Bayesian evidence does: it is the
probability that the model gives to the training labels *before* it has seen them, averaged over all weights that the prior allows.
It has a simple approximation, fit minus a price for every direction in which the weights had to be placed precisely, and so it
prefers broad minima without depending on how the weights are scaled. SGD's noise is what moves weights towards broad
minima, and the paper measures that noise with one number: the step size times the number of updates in an epoch.

Equations:

$$C(w) = \mathrm{NLL}(w) + \tfrac{\lambda}{2} |w|^2, \qquad \ln p(\text{labels}) \approx -C(w_0) - \frac12 \sum_{i=1}^{P} \ln \frac{h_i + \lambda}{\lambda}$$

NLL is the *sum* of $-\ln p(y_j \mid x_j, w)$, $w_0$ the minimum of $C$, $h_i$ the eigenvalues of the Hessian of the NLL alone at $w_0$ (Laplace's
approximation: the posterior is replaced by a Gaussian at its top). The null model that gives every label the probability
$1 / \text{classes}$ has $\ln p = -n \ln(\text{classes})$; a model whose log ratio to it is negative should not be trusted.

$$g = \eta \Big(\frac{N}{B} - 1\Big) \approx \frac{\eta N}{B}, \qquad B_{\text{opt}} = \frac{\eta N}{g_{\text{opt}} + \eta}$$

$\eta$ is the learning rate, $N$ the number of training examples, $B$ the batch size. If one noise scale $g_{\text{opt}}$ is best for a
task, the best batch size is proportional to $\eta$ and to $N$.

Deviations from the paper:

1. Two classes, one weight vector and no intercept in :func:`fit_laplace_logistic`.
2. Plain SGD; with momentum $m$ the paper's scale is $\eta N / (B (1 - m))$.

Later work: Smith et al. (2018) trade a decaying step for a growing batch; McCandlish et al. (2018) measure a noise scale from gradients to predict
the largest useful batch. Shallue et al. (2019) find no loss of test accuracy with large batches once every
hyper-parameter is tuned anew, and Geiping et al. (2022) recover it without noise by explicit regularisation. Lotfi et al. (2022) show that the evidence
can rank trained networks wrongly: it answers how likely the labels were under the prior, not how well the model predicts.

Example:
    import torch
    from dlatlas.theory.bayes_evidence import fit_laplace_logistic, log_ratio_to_null, optimal_batch

    x = torch.randn(200, 5, dtype=torch.float64)
    for name, y in {"real labels": (x[:, 0] > 0).long(), "coin flips": torch.randint(2, (200,))}.items():
        fit = fit_laplace_logistic(x, y, lam=1.0)
        evidence = log_ratio_to_null(fit["nll"], float(fit["w"] @ fit["w"]), fit["eigs"], 1.0, n=200, n_classes=2)
        print(f"{name}: log evidence above guessing {evidence:.1f}")  # below 0: do not trust the fit
    print("batch for a noise scale of 5 at learning rate 0.1:", round(optimal_batch(lr=0.1, n=60_000, g_opt=5.0)))
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["fit_laplace_logistic", "log_evidence", "log_ratio_to_null", "optimal_batch", "sgd_noise_scale"]


def sgd_noise_scale(lr: float, n: int, batch: int) -> float:
    r"""Noise scale $g = \eta (N/B - 1)$ of SGD; 0 for the full batch.

    Raises:
        ValueError: a batch size that is not in (0, n], or a learning rate that is not positive.
    """
    if not 0 < batch <= n:
        raise ValueError(f"batch must be in (0, n], got batch={batch} and n={n}")
    _check_lr(lr)
    return lr * (n / batch - 1)


def optimal_batch(lr: float, n: int, g_opt: float) -> float:
    r"""Batch size whose noise scale is `g_opt`: $B = \eta N / (g_{\text{opt}} + \eta)$, not rounded.

    Raises:
        ValueError: `lr` or `n` is not positive, or `g_opt` is negative.
    """
    _check_lr(lr)
    if n < 1 or not 0 <= g_opt < math.inf:
        raise ValueError(f"expected n >= 1 and a finite g_opt >= 0, got n={n} and g_opt={g_opt}")
    return lr * n / (g_opt + lr)


def log_evidence(nll: float, w_norm2: float, hess_eigs: Tensor, lam: float) -> float:
    r"""Laplace's approximation of the log evidence: $-\mathrm{NLL} - \frac{\lambda}{2} |w|^2 - \frac12 \sum_i \ln \frac{h_i + \lambda}{\lambda}$.

    Args:
        nll: negative log-likelihood at the minimum, summed over the examples, in nats.
        w_norm2: squared length of the weights there.
        hess_eigs: eigenvalues ``[P]`` of the Hessian of the summed NLL, without the prior; directions left out count as 0.
        lam: precision of the Gaussian prior on the weights.

    Raises:
        ValueError: `lam` is not positive, or an eigenvalue is not above ``-lam``: then the point is no minimum of $C$.
    """
    _check_lam(lam)
    hess_eigs = torch.as_tensor(hess_eigs, dtype=torch.float64)
    if hess_eigs.dim() != 1 or not bool(hess_eigs.isfinite().all()):
        raise ValueError(f"hess_eigs must be a vector of finite numbers, got shape {tuple(hess_eigs.shape)}")
    if not (math.isfinite(nll) and 0 <= w_norm2 < math.inf):
        raise ValueError(f"nll and w_norm2 must be finite and w_norm2 not negative, got {nll} and {w_norm2}")
    if len(hess_eigs) and float(hess_eigs.min()) <= -lam:
        raise ValueError(f"Laplace's approximation needs a minimum: every eigenvalue above -lam={-lam}, got {float(hess_eigs.min()):.6g}")
    occam = 0.5 * float(torch.log1p(hess_eigs / lam).sum())
    return -(float(nll) + 0.5 * lam * float(w_norm2) + occam)


def log_ratio_to_null(nll: float, w_norm2: float, hess_eigs: Tensor, lam: float, n: int, n_classes: int) -> float:
    """Log evidence minus that of the null model, which gives each of `n` labels the probability ``1 / n_classes``."""
    if n < 1 or n_classes < 2:
        raise ValueError(f"expected n >= 1 and n_classes >= 2, got n={n} and n_classes={n_classes}")
    return log_evidence(nll, w_norm2, hess_eigs, lam) + n * math.log(n_classes)


@torch.no_grad()
def fit_laplace_logistic(X: Tensor, y: Tensor, lam: float) -> dict[str, Tensor | float]:
    r"""Minimise $\sum_j \ln(1 + e^{-y_j w \cdot x_j}) + \frac{\lambda}{2} |w|^2$ by Newton's method and return what the evidence needs.

    Args:
        X: inputs ``[n, d]``.
        y: labels ``[n]``, either {-1, +1} or {0, 1}.
        lam: precision of the prior.

    Returns:
        ``w`` ``[d]`` (float64), ``nll`` (summed, a float) and ``eigs`` ``[d]``, ascending, of the Hessian of the NLL alone.

    Raises:
        ValueError: wrong shapes, labels or `lam`, or inputs that are not finite.
    """
    _check_lam(lam)
    if X.dim() != 2 or y.shape != X.shape[:1] or len(X) == 0:
        raise ValueError(f"expected X [n, d] and y [n], got {tuple(X.shape)} and {tuple(y.shape)}")
    X, y = X.to(torch.float64), y.to(torch.float64)
    if not bool(X.isfinite().all()):
        raise ValueError("X has entries that are not finite")
    if not (bool((y.abs() == 1).all()) or bool(((y == 0) | (y == 1)).all())):
        raise ValueError(f"labels must be -1 and +1, or 0 and 1, got values {sorted(set(y.tolist()))[:5]}")
    Z = X * torch.where(y > 0, 1.0, -1.0)[:, None]  # [n, d]: one sign fewer to get wrong
    w = X.new_zeros(X.shape[1])
    for _ in range(200):
        p = torch.sigmoid(-(Z @ w))  # probability of the wrong label, [n]
        gradient = lam * w - Z.T @ p
        step = torch.linalg.solve(_hessian(Z, p) + lam * torch.eye(len(w), dtype=w.dtype, device=w.device), gradient)
        decrement = float(gradient @ step)
        if decrement < 1e-20 * max(1.0, _objective(Z, w, lam)):
            break
        # Damping: far from the minimum the full step can overshoot, because the loss is flat there.
        size, value = 1.0, _objective(Z, w, lam)
        while _objective(Z, w - size * step, lam) > value - 1e-4 * size * decrement and size > 1e-10:
            size /= 2
        if size <= 1e-10:
            break  # no decrease left in float64
        w = w - size * step
    p = torch.sigmoid(-(Z @ w))
    return {"w": w, "nll": float(-torch.nn.functional.logsigmoid(Z @ w).sum()), "eigs": torch.linalg.eigvalsh(_hessian(Z, p))}


def _hessian(Z: Tensor, p: Tensor) -> Tensor:
    return (Z * (p * (1 - p))[:, None]).T @ Z  # [d, d]


def _objective(Z: Tensor, w: Tensor, lam: float) -> float:
    return float(-torch.nn.functional.logsigmoid(Z @ w).sum() + 0.5 * lam * w @ w)


def _check_lam(lam: float) -> None:
    if not 0 < lam < math.inf:
        raise ValueError(f"lam must be positive and finite, got {lam}")


def _check_lr(lr: float) -> None:
    if not 0 < lr < math.inf:
        raise ValueError(f"lr must be positive and finite, got {lr}")
