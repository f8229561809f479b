"""How steep a critic is, and where one looks: gradients with respect to the input, one for each sample, as the penalties need them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["gradient_norms", "input_gradients", "interpolates"]


def input_gradients(critic: Callable[[Tensor], Tensor], x: Tensor, create_graph: bool = True) -> Tensor:
    """Gradient ``[B, ...]`` of each sample's score with respect to that sample; zeros where the critic does not look at its input.

    The critic must score each sample by itself: with batch normalisation the scores of the others would leak in.

    Args:
        critic: ``[B, ...]`` to ``[B]`` or ``[B, 1]``.
        x: the points; where they came from is forgotten.
        create_graph: whether the result can be differentiated again, which a penalty needs and a picture does not.

    Raises:
        ValueError: not one score a sample.
    """
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        scores = critic(x)
        if scores.numel() != len(x):
            raise ValueError(f"expected one score for each of {len(x)} samples, got shape {tuple(scores.shape)}")
        if not scores.requires_grad:
            return torch.zeros_like(x, requires_grad=False)
        (gradient,) = torch.autograd.grad(scores.sum(), x, create_graph=create_graph, allow_unused=True)
    return torch.zeros_like(x, requires_grad=False) if gradient is None else gradient


def gradient_norms(critic: Callable[[Tensor], Tensor], x: Tensor, create_graph: bool = True) -> Tensor:
    """Length ``[B]`` of each sample's gradient over all its features, ``sqrt(sum of squares + 1e-12)``.

    The tiny constant keeps the derivative of the root finite where the gradient is zero.
    """
    return (input_gradients(critic, x, create_graph).flatten(1).square().sum(1) + 1e-12).sqrt()


def interpolates(real: Tensor, fake: Tensor, generator: torch.Generator | None = None) -> Tensor:
    r"""$t x + (1 - t) y$ for pairs of a real $x$ and a fake $y$, one uniform $t$ in [0, 1] a pair; without graph.

    Args:
        real: ``[B, ...]``.
        fake: ``[B, ...]``.
        generator: of the draws, on the CPU.

    Raises:
        ValueError: shapes differ.
    """
    if real.shape != fake.shape:
        raise ValueError(f"pairs need equal shapes, got {tuple(real.shape)} and {tuple(fake.shape)}")
    t = torch.rand(len(real), generator=generator, dtype=real.dtype).to(real.device).view(-1, *[1] * (real.dim() - 1))
    return t * real.detach() + (1 - t) * fake.detach()
