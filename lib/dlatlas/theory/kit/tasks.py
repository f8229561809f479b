"""Data that several theory chapters share: small real sets, label noise, and two synthetic tasks that theorems ask for."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from scipy.special import eval_legendre
from torch import Tensor

from dlatlas import data

__all__ = ["corrupt_labels", "digits_binary", "fmnist_subset", "separable_blobs", "tishby_task"]


def separable_blobs(n: int, d: int, margin: float, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    r"""Two Gaussian clouds that a hyperplane through the origin separates: points ``[n, d]``, labels ``[n]`` in {-1, +1}, float64.

    Every point has $y\, u \cdot x \ge$ `margin` for one random unit vector $u$, so the max-margin separator has at least this margin; across $u$
    the clouds are standard normal. The classes have equal sizes (the positive one has the extra point of an odd `n`).
    """
    if n < 2 or d < 1 or not 0 < margin < math.inf:
        raise ValueError(f"expected n >= 2, d >= 1 and margin > 0, got n={n}, d={d}, margin={margin}")
    u = torch.randn(d, dtype=torch.float64, generator=generator)
    u = u / u.norm()
    x = torch.randn(n, d, dtype=torch.float64, generator=generator)
    y = torch.ones(n, dtype=torch.float64)
    y[torch.randperm(n, generator=generator)[: n // 2]] = -1
    along = y * (margin + (x @ u).abs())  # [n]
    return x - torch.outer(x @ u, u) + torch.outer(along, u), y


def digits_binary(positive: Sequence[int] = (0, 1), negative: Sequence[int] | None = None) -> data.ImageSplit:
    """scikit-learn's digits as a two-class problem: images ``[N, 64]`` in [0, 1] and labels in {-1, +1}, float64, training and test part.

    Args:
        positive: digits with label +1.
        negative: digits with label -1; None: all others.
    """
    rest = [c for c in range(10) if c not in positive] if negative is None else list(negative)
    if not positive or not rest or set(positive) & set(rest):
        raise ValueError(f"positive and negative digits must be different, at least one each; got {list(positive)} and {rest}")
    split = data.images("digits", flat=True, classes=[*positive, *rest])
    signs = (torch.where(torch.isin(y, torch.tensor(list(positive))), 1.0, -1.0).double() for y in (split.y, split.y_test))
    y, y_test = signs
    return data.ImageSplit(split.x.double(), y, split.x_test.double(), y_test)


def fmnist_subset(n: int, classes: Sequence[int], generator: torch.Generator | None = None, flat: bool = True) -> tuple[Tensor, Tensor]:
    """`n` random training images of Fashion-MNIST with labels in `classes`: ``[n, 784]`` (or ``[n, 1, 28, 28]``) and ``[n]``.

    The labels are positions in `classes`: ``classes=(1, 9)`` gives 0 for trousers and 1 for ankle boots.
    """
    split = data.images("fashion-mnist", flat=flat, classes=classes)
    if not 1 <= n <= len(split.y):
        raise ValueError(f"Fashion-MNIST has {len(split.y)} training images of the classes {list(classes)}; asked for {n}")
    index = torch.randperm(len(split.y), generator=generator)[:n]
    place = torch.empty(10, dtype=torch.int64)
    place[torch.tensor(list(classes))] = torch.arange(len(classes))
    return split.x[index], place[split.y[index]]


def corrupt_labels(y: Tensor, fraction: float, n_classes: int, generator: torch.Generator | None = None) -> Tensor:
    """Copy of the labels ``[N]`` with a random `fraction` of them drawn anew, uniformly from ``0 .. n_classes - 1``.

    The new label may be the old one, so that ``fraction=1`` carries no information about `y` at all.
    """
    if not 0 <= fraction <= 1 or n_classes < 2:
        raise ValueError(f"expected a fraction in [0, 1] and at least 2 classes, got {fraction} and {n_classes}")
    if y.dim() != 1 or y.is_floating_point() or (len(y) and not (int(y.min()) >= 0 and int(y.max()) < n_classes)):
        raise ValueError(f"expected integer labels [N] in 0..{n_classes - 1}, got {y.dtype} of shape {tuple(y.shape)}")
    count = round(fraction * len(y))
    chosen = torch.randperm(len(y), generator=generator)[:count].to(y.device)
    noisy = y.clone()
    noisy[chosen] = torch.randint(n_classes, (count,), generator=generator).to(y)
    return noisy


def tishby_task(generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    r"""All 4096 patterns of 12 bits ``[4096, 12]`` in {0, 1}, float32, and a balanced rule on them ``[4096]``, int64.

    In the manner of Shwartz-Ziv and Tishby (2017): the bits are 12 random points on the sphere, and the rule thresholds at its median the
    energy $\sum_{\ell} a_\ell \sum_{ij} x_i x_j P_\ell(p_i \cdot p_j)$ of the pattern's spherical harmonics of degree $\ell \le 4$, with random $a_\ell$.
    The rule therefore does not change when the sphere is rotated.
    """
    bits = (torch.arange(4096)[:, None] >> torch.arange(12)) & 1  # [4096, 12]
    points = torch.randn(12, 3, dtype=torch.float64, generator=generator)
    points = points / points.norm(dim=1, keepdim=True)
    weights = torch.randn(5, dtype=torch.float64, generator=generator)
    cosines = (points @ points.T).clamp(-1, 1)
    kernel = sum(float(a) * torch.from_numpy(eval_legendre(degree, cosines.numpy())) for degree, a in enumerate(weights))
    x = bits.to(torch.float64)
    energy = ((x @ kernel) * x).sum(1)  # [4096]
    y = torch.zeros(4096, dtype=torch.int64)
    y[energy.argsort(stable=True)[2048:]] = 1
    return bits.to(torch.float32), y
