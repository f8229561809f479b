"""The two steps that gradient penalties share: where to look, and how steep the critic is there."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["gradient_norms", "interpolates"]


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


def gradient_norms(critic: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    r"""$|\nabla_x f(x_b)|$ over all features of an example ``[B]``, with the graph kept, so that it can be a part of a loss.

    The score of an example must not depend on the others, which excludes batch normalisation. A tiny constant under the root keeps the
    derivative finite where the gradient is 0.

    Args:
        critic: ``[B, ...]`` to scores ``[B]`` or ``[B, 1]``.
        x: points ``[B, ...]``.
    """
    x = x.detach().requires_grad_()
    (g,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
    return (g.flatten(1).square().sum(1) + 1e-12).sqrt()
