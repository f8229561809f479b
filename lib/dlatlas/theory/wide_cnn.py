r"""Full-rank features at a wide convolutional layer (nguyen2018losssurface).

If some layer of a convolutional net has at least as many units as there are training samples, then for almost all weights below it the
samples' features at that layer are linearly independent. A dense layer on top can then fit any labels, and a vanishing gradient of that
dense layer leaves no room for an error signal: almost every critical point whose later weight matrices have full rank is a global
minimum with zero loss.

Equations:

$$F_k = \begin{pmatrix} f_k(x_1)^T \\ \vdots \\ f_k(x_n)^T \end{pmatrix} \in R^{n \times n_k}, \qquad
n_k \ge n \implies \mathrm{rank}(F_k) = n \text{ for almost all weights}$$

$$\frac{\partial L}{\partial W_{k+1}} = F_k^T \Delta_{k+1} = 0, \quad \mathrm{rank}(F_k) = n \implies \Delta_{k+1} = 0$$

where $n_k$ counts the units of layer $k$ over all channels and positions and row $i$ of $\Delta_{k+1} \in R^{n \times n_{k+1}}$ is the
derivative of the loss with respect to the inputs of layer $k+1$ at sample $i$. When the later weight matrices have full column rank and
the activation's derivative is never 0, $\Delta_{k+1} = 0$ means that the outputs' errors are 0. With a small gradient instead of none,

$$|\Delta_{k+1}| \le |F_k^T \Delta_{k+1}| / \sigma_{\min}(F_k).$$

Deviations from the paper:

1. Ranks are numerical: singular values below `rtol` times the largest count as zero. The theorem says nothing about how large the
   smallest one is; `feature_spectrum` shows it.
2. The layer after the wide one is dense, the paper's stronger case.

Later work: Nguyen (2019) showed that the sublevel sets of such nets are connected; Nguyen and Mondelli (2020) proved convergence of
gradient descent with one wide layer followed by a pyramid. Results on very wide nets (Jacot and others, 2018, and what followed) need far
more units than samples, but say how fast descent is, which the rank alone does not.

Example:
    import torch
    from torch import nn
    from dlatlas.theory.wide_cnn import feature_matrix, feature_rank, zero_loss_head

    images, labels = torch.rand(100, 1, 12, 12, dtype=torch.float64), torch.randint(10, (100,))
    targets = nn.functional.one_hot(labels, 10).double()
    for filters in (1, 4):
        net = nn.Sequential(nn.Conv2d(1, filters, 3, stride=2), nn.Softplus(), nn.Flatten()).double()
        features = feature_matrix(net, images, layer=2)
        *_, left = zero_loss_head(features, targets)
        print(f"{features.shape[1]} features of 100 images: rank {feature_rank(net, images, layer=2)}, what no head can fit {left:.1e}")
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["critical_point_is_global", "feature_matrix", "feature_rank", "feature_spectrum", "zero_loss_head"]


def feature_matrix(net: nn.Sequential, X: Tensor, layer: int) -> Tensor:
    """Outputs of module `layer` of the net, flattened ``(n, units)``; detached.

    Args:
        net: modules in order.
        X: samples, first axis n.
        layer: index of a module of `net`, counted from 0.

    Raises:
        ValueError: no such module, or no sample.
    """
    if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < len(net):
        raise ValueError(f"layer must be between 0 and {len(net) - 1}, got {layer!r}")
    if X.dim() < 2 or len(X) < 1:
        raise ValueError(f"expected at least one sample (n, ...), got {tuple(X.shape)}")
    with torch.no_grad():
        return net[: layer + 1](X).flatten(1)  # (n, units)


def feature_spectrum(net: nn.Sequential, X: Tensor, layer: int) -> Tensor:
    """Singular values of :func:`feature_matrix` in double precision, largest first ``(min(n, units),)``."""
    return torch.linalg.svdvals(feature_matrix(net, X, layer).double())


def feature_rank(net: nn.Sequential, X: Tensor, layer: int, rtol: float = 1e-7) -> int:
    """Numerical rank of :func:`feature_matrix`: singular values above `rtol` times the largest.

    Args:
        net: modules in order; in float64, or features that differ little look dependent.
        X: samples, first axis n.
        layer: index of a module of `net`, counted from 0.
        rtol: relative tolerance.

    Raises:
        ValueError: as :func:`feature_matrix`, or features that are not finite.
    """
    return _rank(feature_matrix(net, X, layer), rtol)


def zero_loss_head(F: Tensor, Y: Tensor, *, exact: bool = False) -> tuple[Tensor, Tensor, float]:
    r"""The dense layer that fits the targets best, $\min_{W, b} |F W^T + 1 b^T - Y|_F$; of all best ones the smallest.

    With linearly independent rows of `F` the residual is 0 for any `Y`.

    Args:
        F: features ``(n, u)``.
        Y: targets ``(n, m)``.
        exact: insist on the theorem's assumption ``n <= u``.

    Returns:
        Weights ``(m, u)``, bias ``(m,)`` and the Frobenius norm of what remains.

    Raises:
        ValueError: shapes that do not fit, or more samples than units with ``exact=True``.
    """
    if F.dim() != 2 or Y.dim() != 2 or len(F) != len(Y) or len(F) < 1:
        raise ValueError(f"expected features (n, u) and targets (n, m), got {tuple(F.shape)} and {tuple(Y.shape)}")
    if exact and F.shape[0] > F.shape[1]:
        raise ValueError(f"an exact fit of any targets needs a layer with n <= units, got n={F.shape[0]} samples and {F.shape[1]} units")
    A = torch.cat([F, torch.ones_like(F[:, :1])], 1)  # (n, u + 1)
    solution = torch.linalg.lstsq(A, Y.to(A.dtype), driver="gelsd").solution if not A.is_cuda else torch.linalg.pinv(A) @ Y.to(A.dtype)
    residual = float((A @ solution - Y).norm())
    return solution[:-1].T.contiguous(), solution[-1].clone(), residual


def critical_point_is_global(F: Tensor, delta_next: Tensor, tol: float) -> bool:
    r"""The theorem as a certificate: features of full row rank and a vanishing gradient $F^T \Delta$ force $\Delta = 0$.

    With a small gradient instead of none the error signal is at most $|F^T \Delta| / \sigma_{\min}(F)$, and the squared loss
    $\tfrac12 |\Delta|^2$ of a dense output layer at most half the square of that. True says that this bound is at most `tol`. False says that
    nothing is certified: this is no critical point of the next layer's weights, or the features are dependent, or so nearly dependent that
    a large error would leave as small a gradient.

    Args:
        F: features of the wide layer ``(n, u)``.
        delta_next: derivative of the loss with respect to the next layer's inputs ``(n, units_next)``.
        tol: largest norm of $\Delta$ that counts as zero.

    Raises:
        ValueError: shapes that do not fit, ``tol <= 0``, or features that are not finite.
    """
    if F.dim() != 2 or delta_next.dim() != 2 or len(F) != len(delta_next) or not tol > 0:
        raise ValueError(f"expected F (n, u), delta (n, v) and tol > 0; got {tuple(F.shape)}, {tuple(delta_next.shape)} and {tol}")
    F, delta_next = F.double(), delta_next.double()
    sigma = _spectrum(F)
    if len(sigma) < len(F) or int((sigma > 1e-7 * sigma[0]).sum()) < len(F):
        return False
    return float((F.T @ delta_next).norm()) <= tol * float(sigma[-1])


def _spectrum(F: Tensor) -> Tensor:
    if not bool(torch.isfinite(F).all()):
        raise ValueError("the features are not finite")
    return torch.linalg.svdvals(F.double())


def _rank(F: Tensor, rtol: float) -> int:
    sigma = _spectrum(F)
    return int((sigma > rtol * sigma[0]).sum())  # 0 for the zero matrix
