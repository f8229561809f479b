"""Quantisation-aware training of any network: a weight quantiser is a function from tensor to tensor, and so is one of activations."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

__all__ = ["choose_layers", "conv_arguments", "filled", "freeze_quantized", "layers_of", "plain_layer", "quantize_aware", "quantized_bits"]

LAYERS = (nn.Linear, nn.Conv2d)


class _Quantizer(nn.Module):
    """A quantiser as a part of one layer."""

    def __init__(self, function: Callable[[Tensor], Tensor]):
        super().__init__()
        # A quantiser with parameters of its own, a learned grid for example: every layer trains its own copy.
        self.function = copy.deepcopy(function) if isinstance(function, nn.Module) else function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    """The Linear and Conv2d layers of a network by name, in the order in which they were registered."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, LAYERS)}


def choose_layers(model: nn.Module, skip: Sequence[str] = ("first", "last")) -> dict[str, nn.Module]:
    """The layers of :func:`layers_of` without some.

    Args:
        skip: layers that are left out: "first", "last" (in the order of registration) or names of layers.

    Raises:
        ValueError: `skip` names no layer or leaves none.
    """
    layers = layers_of(model)
    names = list(layers)
    skip = [skip] if isinstance(skip, str) else list(skip)
    if unknown := set(skip) - {"first", "last", *names}:
        raise ValueError(f"skip must hold 'first', 'last' or names of layers ({', '.join(names)}); got {sorted(unknown)}")
    kept = {{"first": names[0], "last": names[-1]}.get(name, name) for name in skip} if names else set()
    chosen = {name: layer for name, layer in layers.items() if name not in kept}
    if not chosen:
        raise ValueError(f"the network has {len(names)} Linear and Conv2d layers and none is left when {skip} are skipped")
    return chosen


def conv_arguments(layer: nn.Conv2d) -> tuple:
    """The positional arguments that make a convolution of the same form."""
    return (
        layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding,
        layer.dilation, layer.groups, layer.bias is not None, layer.padding_mode,
    )  # fmt: skip


def plain_layer(layer: nn.Linear | nn.Conv2d) -> nn.Linear | nn.Conv2d:
    """A fresh `Linear` or `Conv2d` of the same form as a layer of a subclass."""
    if isinstance(layer, nn.Conv2d):
        return nn.Conv2d(*conv_arguments(layer))
    return nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)


@torch.no_grad()
def filled(layer: nn.Module, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """The layer with a copy of the given weight and bias, in their type and on their device."""
    layer.to(weight).weight.copy_(weight)
    if bias is not None:
        layer.bias.copy_(bias)
    return layer


def quantize_aware(
    model: nn.Module,
    weight: Callable[[Tensor], Tensor] | None = None,
    activation: Callable[[Tensor], Tensor] | None = None,
    skip: Sequence[str] = ("first", "last"),
) -> nn.Module:
    """Let the Linear and Conv2d layers of `model` compute with quantised weights and inputs; changes the model and returns it.

    The full-precision weight stays, as ``layer.parametrizations.weight.original``, and is what the optimizer updates; ``layer.weight`` is
    the quantised one, computed anew at every forward pass. Activations are quantised where they enter one of the layers.

    Args:
        weight: quantiser of weights with a straight-through gradient; None leaves them. A module is copied for each layer.
        activation: the same for the inputs of the layers.
        skip: layers that keep full precision: "first", "last" (in the order of registration) or names of layers.

    Raises:
        ValueError: neither quantiser is given, `skip` names no layer or leaves none, or the network is quantised already.
    """
    if weight is None and activation is None:
        raise ValueError("expected a quantiser of weights or of activations, got neither")
    chosen = choose_layers(model, skip)
    for name, layer in chosen.items():
        if parametrize.is_parametrized(layer, "weight") or hasattr(layer, "quantized_input"):
            raise ValueError(f"layer {name!r} is quantised already")
    for layer in chosen.values():
        if weight is not None:
            parametrize.register_parametrization(layer, "weight", _Quantizer(weight))
        if activation is not None:
            layer.quantized_input = _Quantizer(activation)  # a child, so that its parameters are the layer's
            layer.register_forward_pre_hook(_quantize_input)
    return model


def _quantize_input(layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return layer.quantized_input(inputs[0]), *inputs[1:]


def freeze_quantized(model: nn.Module) -> nn.Module:
    """Replace every weight that :func:`quantize_aware` wrapped by its quantised value; activations stay quantised. Changes the model."""
    for layer in layers_of(model).values():
        if parametrize.is_parametrized(layer, "weight") and isinstance(layer.parametrizations.weight[0], _Quantizer):
            # A deep copy shares its class with the original, and removal deletes the class's property: give this layer a class of its own.
            layer.__class__ = type(type(layer).__name__, type(layer).__bases__, dict(vars(type(layer))))
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
    return model


@torch.no_grad()
def quantized_bits(model: nn.Module) -> int:
    """Bits that the network's file needs, frozen or not, as measured on the values that it computes with.

    Each weight of a Linear or Conv2d layer takes the shortest of three forms: raw; a codebook for the layer and an index for each entry;
    a codebook for each output unit and an index for each entry. An index into K values takes ceil(log2 K) bits, a codebook one float a
    value, and a symmetric codebook one float for each positive magnitude (so a layer of -s, 0, s costs two bits a weight and one float).
    Everything else (biases, normalisation with its running statistics) is stored raw.
    """
    layers = layers_of(model)
    total = sum(_weight_bits(layer.weight.detach()) for layer in layers.values())
    counted = {id(layer.weight) for layer in layers.values()}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        # Latent weights and the quantisers' own parameters stay at home.
        training_only = re.search(r"(^|\.)(parametrizations|quantized_input)\.", name)
        if not training_only and id(tensor) not in counted and tensor.is_floating_point():
            total += 8 * tensor.element_size() * tensor.numel()
    return total


def _weight_bits(weight: Tensor) -> int:
    float_bits = 8 * weight.element_size()
    raw = float_bits * weight.numel()
    rows = weight.flatten(1)
    by_layer = _codebook_bits(rows.reshape(-1), float_bits)
    by_unit = sum(_codebook_bits(row, float_bits) for row in rows)
    return min(raw, by_layer, by_unit)


def _codebook_bits(values: Tensor, float_bits: int) -> int:
    codes = values.unique()
    symmetric = torch.equal(codes, -codes.flip(0))
    floats = int((codes > 0).sum()) if symmetric else len(codes)
    return values.numel() * math.ceil(math.log2(len(codes))) + float_bits * floats
