"""Two-dimensional data whose modes can be counted, and the one definition of counting them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["grid", "grid_centres", "modes_covered", "ring", "ring_centres", "two_lines"]


def ring_centres(modes: int = 8, radius: float = 2.0) -> Tensor:
    """Centres ``[modes, 2]`` of :func:`ring`."""
    if modes < 1 or not radius > 0:
        raise ValueError(f"expected modes >= 1 and radius > 0, got {modes} and {radius}")
    angle = 2 * math.pi * torch.arange(modes) / modes
    return radius * torch.stack([angle.cos(), angle.sin()], 1)


def ring(n: int, modes: int = 8, radius: float = 2.0, std: float = 0.02, generator: torch.Generator | None = None) -> Tensor:
    """`n` points ``[n, 2]`` of equal Gaussians whose centres stand evenly on a circle."""
    return _around(ring_centres(modes, radius), n, std, generator)


def grid_centres(side: int = 5, spacing: float = 2.0) -> Tensor:
    """Centres ``[side * side, 2]`` of :func:`grid`, with their mean at 0."""
    if side < 1 or not spacing > 0:
        raise ValueError(f"expected side >= 1 and spacing > 0, got {side} and {spacing}")
    place = spacing * (torch.arange(side) - (side - 1) / 2)
    return torch.cartesian_prod(place, place).view(-1, 2)


def grid(n: int, side: int = 5, spacing: float = 2.0, std: float = 0.05, generator: torch.Generator | None = None) -> Tensor:
    """`n` points ``[n, 2]`` of equal Gaussians on a square grid."""
    return _around(grid_centres(side, spacing), n, std, generator)


def two_lines(n: int, gap: float = 1.0, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Real points ``(0, y)`` and model points ``(gap, y)``, each ``[n, 2]``, with `y` uniform in [0, 1]: parallel lines that never meet."""
    if n < 1:
        raise ValueError(f"expected at least one point, got {n}")
    y = torch.rand(2, n, generator=generator)
    return torch.stack([torch.zeros(n), y[0]], 1), torch.stack([torch.full((n,), float(gap)), y[1]], 1)


def modes_covered(samples: Tensor, centres: Tensor, std: float, k: float = 3.0, min_share: float = 0.2) -> tuple[int, float]:
    """How many modes have samples, and how many samples have a mode.

    A sample is of high quality when it lies within ``k * std`` of its nearest centre. A mode is covered when it has at least
    ``min_share / len(centres)`` of *all* samples as high-quality ones.

    Args:
        samples: ``[n, d]``.
        centres: ``[modes, d]``.
        std: standard deviation of a mode.
        k: radius in standard deviations.
        min_share: part of a mode's fair share that it needs to count.

    Returns:
        Number of covered modes, and the share of high-quality samples.

    Raises:
        ValueError: shapes that do not fit, or numbers that are not positive.
    """
    if samples.dim() != 2 or centres.dim() != 2 or samples.shape[1] != centres.shape[1] or 0 in (len(samples), len(centres)):
        raise ValueError(f"expected samples [n, d] and centres [modes, d], got {tuple(samples.shape)} and {tuple(centres.shape)}")
    if not (std > 0 and k > 0 and min_share > 0):
        raise ValueError(f"std, k and min_share must be positive, got {std}, {k}, {min_share}")
    distance, nearest = torch.cdist(samples.detach().to(centres), centres).min(1)
    good = distance <= k * std
    owned = nearest[good].bincount(minlength=len(centres))
    return int((owned >= min_share / len(centres) * len(samples)).sum()), float(good.double().mean())


def _around(centres: Tensor, n: int, std: float, generator: torch.Generator | None) -> Tensor:
    if n < 1 or not std >= 0:
        raise ValueError(f"expected n >= 1 and std >= 0, got {n} and {std}")
    mode = torch.randint(len(centres), (n,), generator=generator)
    return centres[mode] + std * torch.randn(n, 2, generator=generator)
