"""All parameters of a module as one vector."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector


def flat_params(module: nn.Module) -> Tensor:
    """Copy of all parameters as one detached vector ``[P]``, in the order of ``module.parameters()``."""
    return parameters_to_vector(module.parameters()).detach().clone()


@torch.no_grad()
def set_flat_params(module: nn.Module, vector: Tensor) -> None:
    """Write a vector ``[P]`` back into the parameters, in place and outside the graph."""
    params = list(module.parameters())
    total = sum(p.numel() for p in params)
    if vector.shape != (total,):
        raise ValueError(f"the module has {total} parameters, got a vector of shape {tuple(vector.shape)}")
    # Not `vector_to_parameters`: that rebinds `.data`, so parameters would share memory with `vector`.
    for p, piece in zip(params, vector.split([p.numel() for p in params])):
        p.copy_(piece.view_as(p))


def flat_grad(loss: Tensor, params: Iterable[Tensor], create_graph: bool = False) -> Tensor:
    """Gradient of a scalar loss with respect to `params` as one vector ``[P]``; zeros for parameters not in the graph."""
    params = list(params)
    if loss.numel() != 1:
        raise ValueError(f"the loss must be a scalar, got shape {tuple(loss.shape)}")
    grads = torch.autograd.grad(loss, params, create_graph=create_graph, allow_unused=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).reshape(-1) for p, g in zip(params, grads)])
