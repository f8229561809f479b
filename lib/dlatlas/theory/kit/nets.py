"""The network of the theory chapters, and all its parameters as one vector."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from dlatlas.kit import nets
from dlatlas.kit.flat import flat_grad, flat_params, set_flat_params

__all__ = ["flat_grad", "flat_params", "mlp", "set_flat_params"]


def mlp(
    sizes: Sequence[int],
    activation: str | Callable[[Tensor], Tensor] = "relu",
    bias: bool = True,
    residual: bool = False,
    batchnorm: bool = False,
) -> nn.Sequential:
    """:func:`dlatlas.kit.nets.mlp` with the arguments of the theory chapters; `activation` is "relu", "tanh", "linear" or a function."""
    return nets.mlp(sizes, activation, bias=bias, residual=residual, norm="batch" if batchnorm else None)
