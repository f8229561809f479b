"""Straight-through estimators: functions that round in the forward pass and let the gradient pass in the backward one.

One definition for the whole part, so that the value at zero, the value at ties and the clipping range are the same everywhere. The forward
value is exactly the rounded one: the usual ``x + (q - x).detach()`` can miss it by a rounding error, and then a ternary weight has more
than three values.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

__all__ = ["ste_replace", "ste_round", "ste_sign"]


def ste_round(x: Tensor) -> Tensor:
    """Nearest integer, ties to the even one; the gradient passes unchanged."""
    return _Replace.apply(x, x.round())


def ste_sign(x: Tensor, clip: float | None = 1.0) -> Tensor:
    r"""$+1$ where $x \ge 0$, else $-1$; the gradient passes where $|x| \le$ `clip`.

    Zero has a sign here, because a bit has only two values. ``clip=None`` lets the gradient pass everywhere.

    Raises:
        ValueError: `clip` is not positive.
    """
    if clip is None:
        return _Replace.apply(x, _signs(x))
    if not clip > 0:
        raise ValueError(f"clip must be positive or None, got {clip}")
    return _ClippedSign.apply(x, clip)


def ste_replace(x: Tensor, q: Tensor) -> Tensor:
    """The value of `q` with the gradient of `x`; `q` itself gets no gradient.

    Raises:
        ValueError: shapes differ.
    """
    if x.shape != q.shape:
        raise ValueError(f"x and q must have one shape, got {tuple(x.shape)} and {tuple(q.shape)}")
    return _Replace.apply(x, q.to(x.dtype))


def _signs(x: Tensor) -> Tensor:
    return torch.where(x >= 0, 1.0, -1.0).to(x.dtype)


class _Replace(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, q: Tensor) -> Tensor:
        return q.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _ClippedSign(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, clip: float) -> Tensor:
        return _signs(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
        x, clip = inputs
        ctx.save_for_backward(x.abs() <= clip)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (inside,) = ctx.saved_tensors
        return grad * inside, None
