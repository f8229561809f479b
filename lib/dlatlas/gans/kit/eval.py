"""Scores of generated digits, on the features of a classifier of real ones.

The scores of the literature use a network trained on ImageNet. Here the features come from a small classifier of MNIST digits, so the numbers
compare rows of this book with each other and nothing else: they are called "Fréchet distance on digit features", never FID.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, cross_entropy

from dlatlas import data
from dlatlas.kit.nets import SmallCNN, small_cnn
from dlatlas.train import fit, minibatches

__all__ = ["digit_features", "digit_probs", "frechet", "nn_memorisation", "small_digits"]


def small_digits(train: int | None = None, test: int | None = None, seed: int = 0) -> data.ImageSplit:
    """MNIST as 8 x 8 images ``[N, 1, 8, 8]`` in [-1, 1]: the inner 24 x 24 pixels, averaged three by three."""
    x, y, x_test, y_test = data.images("mnist", train, test, seed=seed)
    return data.ImageSplit(_shrink(x), y, _shrink(x_test), y_test)


def _shrink(x: Tensor) -> Tensor:
    return 2 * avg_pool2d(x[..., 2:-2, 2:-2], 3) - 1


def digit_features(x: Tensor, seed: int = 0) -> Tensor:
    """Last hidden layer ``[B, 64]`` of a classifier of digits, for images ``[B, 1, 8, 8]`` or ``[B, 1, 28, 28]`` in [-1, 1].

    The classifier of each size is trained at the first call (a few seconds) and kept.

    Args:
        x: images.
        seed: of the classifier.

    Raises:
        ValueError: other shapes.
        DataError: MNIST is not in the cache and no source answered.
    """
    return _apply(x, seed, lambda net, part: net.features(part))


def digit_probs(x: Tensor, seed: int = 0) -> Tensor:
    """Probabilities ``[B, 10]`` of the ten digits, by the classifier of :func:`digit_features`."""
    return _apply(x, seed, lambda net, part: net(part).softmax(-1))


@torch.no_grad()
def _apply(x: Tensor, seed: int, read) -> Tensor:
    if x.dim() != 4 or x.shape[1] != 1 or x.shape[2:] not in ((8, 8), (28, 28)):
        raise ValueError(f"expected images [B, 1, 8, 8] or [B, 1, 28, 28], got {tuple(x.shape)}")
    net = _classifier(x.shape[-1], seed).to(x.device)
    return torch.cat([read(net, part) for part in x.detach().float().split(1024)])


@functools.lru_cache(maxsize=8)
def _classifier(side: int, seed: int) -> SmallCNN:
    split = small_digits(10_000, 1) if side == 8 else data.images("mnist", 10_000, 1)
    x = split.x if side == 8 else 2 * split.x - 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = small_cnn(width=16, size=side)
    optimizer = torch.optim.Adam(net.parameters(), 2e-3)
    batches = minibatches(len(x), 128, torch.Generator().manual_seed(seed))

    def step(_: int) -> Tensor:
        index = next(batches)
        loss = cross_entropy(net(x[index]), split.y[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    with torch.enable_grad():
        fit(step, 300, every=50)
    return net.eval().requires_grad_(False)


def frechet(fx: Tensor, fy: Tensor) -> float:
    r"""Fréchet distance of two Gaussians with the samples' moments, $|m_1 - m_2|^2 + \mathrm{tr}(C_1 + C_2 - 2 (C_1 C_2)^{1/2})$.

    It is biased upwards for few samples. The square root is taken of the symmetric $C_1^{1/2} C_2 C_1^{1/2}$, whose trace is the same.

    Args:
        fx: features ``[n, d]``.
        fy: features ``[m, d]``.

    Raises:
        ValueError: shapes that do not fit, or fewer than two rows.
    """
    if fx.dim() != 2 or fy.dim() != 2 or fx.shape[1] != fy.shape[1] or min(len(fx), len(fy)) < 2:
        raise ValueError(f"expected features [n, d] and [m, d] with n, m >= 2, got {tuple(fx.shape)} and {tuple(fy.shape)}")
    x, y = fx.detach().double(), fy.detach().double()
    c1, c2 = (torch.cov(f.T).view(f.shape[1], f.shape[1]) for f in (x, y))
    values, axes = torch.linalg.eigh(c1)
    root = (axes * values.clamp_min(0).sqrt()) @ axes.T
    cross = torch.linalg.eigvalsh(root @ c2 @ root).clamp_min(0).sqrt().sum()
    return float((x.mean(0) - y.mean(0)).square().sum() + c1.trace() + c2.trace() - 2 * cross)


def nn_memorisation(samples: Tensor, train: Tensor) -> float:
    """Share of samples that lie closer to their nearest training image than nearly all training images lie to theirs.

    The threshold is the 1 % quantile of the distances between each training image and its nearest other one.

    Args:
        samples: ``[n, ...]``.
        train: ``[m, ...]``, at least two.

    Raises:
        ValueError: shapes that do not fit, or fewer than two training images.
    """
    if samples.shape[1:] != train.shape[1:] or len(train) < 2 or len(samples) < 1:
        raise ValueError(
            f"expected samples and at least two training images of one shape, got {tuple(samples.shape)}, {tuple(train.shape)}"
        )
    s, t = samples.detach().flatten(1).double(), train.detach().flatten(1).double()
    between = torch.cdist(t, t).fill_diagonal_(torch.inf).amin(1)
    return float((torch.cdist(s, t).amin(1) < between.quantile(0.01)).double().mean())
