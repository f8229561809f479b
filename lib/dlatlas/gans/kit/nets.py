"""One generator and one critic for every comparison, so that a difference between two rows comes from the loss and not from the network."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from dlatlas.kit import nets as shared

__all__ = ["DigitCritic", "DigitGenerator", "conv28_critic", "conv28_generator", "mlp"]


def mlp(
    sizes: Sequence[int],
    act: str | type[nn.Module] | Callable[[Tensor], Tensor] = "leaky_relu",
    final: str | type[nn.Module] | Callable[[Tensor], Tensor] | None = None,
    norm: str | None = None,
) -> nn.Sequential:
    """:func:`dlatlas.kit.nets.mlp` with the activation that adversarial networks use."""
    return shared.mlp(sizes, act, final=final, norm=norm)


class DigitGenerator(nn.Module):
    """Noise ``[B, z_dim]`` to images ``[B, *out]`` in [-1, 1]: three linear layers.

    Args:
        z_dim: size of the noise.
        out: shape of an image.
        width: hidden units.
        n_classes: None, or the number of labels that :meth:`forward` takes beside the noise.

    Raises:
        ValueError: a size below 1.
    """

    def __init__(self, z_dim: int = 32, out: Sequence[int] = (1, 8, 8), width: int = 128, n_classes: int | None = None):
        super().__init__()
        if min(z_dim, width, *out) < 1 or (n_classes is not None and n_classes < 1):
            raise ValueError(f"sizes must be at least 1, got z_dim={z_dim}, out={tuple(out)}, width={width}, n_classes={n_classes}")
        self.z_dim, self.out, self.n_classes = z_dim, tuple(out), n_classes
        self.net = mlp([z_dim + (n_classes or 0), width, width, math.prod(out)], final="tanh", norm="batch")

    def forward(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        """Images for noise ``[B, z_dim]`` and, if there are classes, labels ``[B]``.

        Raises:
            ValueError: labels are missing or not expected.
        """
        if (y is None) != (self.n_classes is None):
            raise ValueError(f"the generator has {self.n_classes or 'no'} classes and got {'no' if y is None else ''} labels")
        if y is not None:
            z = torch.cat([z, nn.functional.one_hot(y, self.n_classes).to(z)], 1)  # [B, z_dim + n_classes]
        return self.net(z).view(-1, *self.out)


class DigitCritic(nn.Module):
    """Images ``[B, *shape]`` to scores ``[B, out]``: three linear layers, no normalisation, no sigmoid.

    Args:
        shape: of an image.
        width: hidden units.
        out: scores an image.
        features: whether :meth:`forward` also returns the last hidden layer ``[B, width]``.

    Raises:
        ValueError: a size below 1.
    """

    def __init__(self, shape: Sequence[int] = (1, 8, 8), width: int = 128, out: int = 1, features: bool = False):
        super().__init__()
        if min(width, out, *shape) < 1:
            raise ValueError(f"sizes must be at least 1, got shape={tuple(shape)}, width={width}, out={out}")
        self.features = features
        self.body = nn.Sequential(nn.Flatten(), *mlp([math.prod(shape), width, width], final="leaky_relu"))
        self.head = nn.Linear(width, out)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        h = self.body(x)  # [B, width]
        return (self.head(h), h) if self.features else self.head(h)


def conv28_generator(z_dim: int, ch: int = 32) -> nn.Sequential:
    """Convolutional generator ``[B, z_dim] -> [B, 1, 28, 28]`` in [-1, 1], in the form of DCGAN (Radford et al., 2016)."""
    return nn.Sequential(
        nn.Linear(z_dim, 4 * ch * 7 * 7),
        nn.Unflatten(1, (4 * ch, 7, 7)),
        nn.BatchNorm2d(4 * ch),
        nn.ReLU(),
        nn.ConvTranspose2d(4 * ch, 2 * ch, 4, stride=2, padding=1),  # [B, 2 ch, 14, 14]
        nn.BatchNorm2d(2 * ch),
        nn.ReLU(),
        nn.ConvTranspose2d(2 * ch, ch, 4, stride=2, padding=1),  # [B, ch, 28, 28]
        nn.BatchNorm2d(ch),
        nn.ReLU(),
        nn.Conv2d(ch, 1, 3, padding=1),
        nn.Tanh(),
    )


def conv28_critic(ch: int = 32) -> nn.Sequential:
    """Convolutional critic ``[B, 1, 28, 28] -> [B, 1]`` without normalisation, so that each example has a gradient of its own."""
    return nn.Sequential(
        nn.Conv2d(1, ch, 3, padding=1),
        nn.LeakyReLU(0.1),
        nn.Conv2d(ch, 2 * ch, 4, stride=2, padding=1),  # [B, 2 ch, 14, 14]
        nn.LeakyReLU(0.1),
        nn.Conv2d(2 * ch, 4 * ch, 4, stride=2, padding=1),  # [B, 4 ch, 7, 7]
        nn.LeakyReLU(0.1),
        nn.Flatten(),
        nn.Linear(4 * ch * 7 * 7, 1),
    )
