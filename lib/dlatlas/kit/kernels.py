"""Kernels on pairs of samples: ``x [n, d]``, ``y [m, d]`` -> ``[n, m]``. float64 in, float64 out."""

from __future__ import annotations

import torch
from torch import Tensor


def sq_dists(x: Tensor, y: Tensor) -> Tensor:
    """Squared Euclidean distances ``|x_i - y_j|^2``, clamped at 0 against rounding."""
    if x.dim() != 2 or y.dim() != 2 or x.shape[1] != y.shape[1]:
        raise ValueError(f"expected [n, d] and [m, d], got {tuple(x.shape)} and {tuple(y.shape)}")
    return (x.pow(2).sum(1)[:, None] + y.pow(2).sum(1)[None] - 2 * x @ y.T).clamp_min(0)


def rbf(x: Tensor, y: Tensor, bandwidth: float | Tensor = 1.0) -> Tensor:
    """Gaussian kernel ``exp(-|x - y|^2 / (2 bandwidth^2))``."""
    if not bool(torch.as_tensor(bandwidth > 0).all()):
        raise ValueError(f"bandwidth must be positive, got {bandwidth}")
    return torch.exp(-sq_dists(x, y) / (2 * bandwidth**2))


def imq(x: Tensor, y: Tensor, c: float = 1.0) -> Tensor:
    """Inverse multiquadric kernel ``c / (c + |x - y|^2)``."""
    if c <= 0:
        raise ValueError(f"c must be positive, got {c}")
    return c / (c + sq_dists(x, y))


def median_bandwidth(x: Tensor) -> float:
    """Median of the pairwise distances of different rows: the usual first guess for a bandwidth."""
    if x.dim() != 2 or x.shape[0] < 2:
        raise ValueError(f"expected at least two rows [n, d], got {tuple(x.shape)}")
    return float(torch.pdist(x).median())
