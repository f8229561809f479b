r"""WRPN (mishra2018wrpn): fewer bits a number, more numbers.

The plainest grid there is: weights are clipped to [-1, 1], activations to [0, 1], and both are rounded to evenly spaced values. What this
costs in accuracy is bought back with width: a network with twice the filters does four times the multiplications, but a multiplication
of two 4-bit numbers is far cheaper than one of two floats. Activations are the point. In training with large batches they, not the
weights, fill the memory, and a wide layer of 4-bit activations is still smaller than a narrow one of floats.

Equations: with $k$ bits,

$$ w_q = \frac{\mathrm{round}\big((2^{k-1} - 1)\, \mathrm{clip}(w, -1, 1)\big)}{2^{k-1} - 1}, \qquad
   a_q = \frac{\mathrm{round}\big((2^k - 1)\, \mathrm{clip}(a, 0, 1)\big)}{2^k - 1}. $$

The gradient of the rounding is replaced by 1 (straight through); that of the clipping is exact: 1 inside the range and 0 outside. The cost of
a layer is its number of multiplications times the bits of both factors, and grows with the square of the widening.

Deviations from the paper:

1. The grid has no scale: two bits round all weights of a freshly initialised network to zero, and the clipping cuts off a third of
   the activations that batch normalisation lets through. :func:`fill_range` brings both to the range before training.
2. The paper gives the cost of the whole network at one precision; :func:`cost` also gives the sum with both ends in full precision.
3. Activations are quantised where they enter a layer, not where they leave one, which is the same up to pooling in between.

Later work: fixed clipping ranges were soon replaced by learned ones: PACT (Choi et al., 2018) trains the upper end of the activations' range
and LSQ (Esser et al., 2020) the step of every quantiser, both by gradient descent. With them 4 bits need no extra width on ImageNet.

Example:
    import torch
    from torch import nn
    from dlatlas.compression.wrpn import cost, fill_range, widened, wrpn

    def network(width=16):
        inner = [nn.Linear(width, width), nn.BatchNorm1d(width), nn.ReLU()]
        first = [nn.Linear(64, width), nn.BatchNorm1d(width), nn.ReLU()]
        return nn.Sequential(*first, *inner, nn.Linear(width, 10))

    centres = torch.randn(10, 64)
    y = torch.arange(3000) % 10
    x = centres[y] + 2.5 * torch.randn(3000, 64)
    for factor, bits in ((1, 32), (1, 2), (3, 2)):
        net = widened(network, factor)
        if bits < 32:
            wrpn(fill_range(net), bits, bits)  # inner layers: weights and activations of 2 bits
        optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
        for step in range(150):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x[:1000]), y[:1000]).backward()
            optimizer.step()
        right = (net.eval()(x[1000:]).argmax(1) == y[1000:]).double().mean()
        price = cost(net, (64,), bits, bits)["bit_ops_inner"]
        print(f"width x {factor}, {bits} bits: accuracy {right:.3f}, {price} bit operations inside")
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from dlatlas.compression.kit.qat import layers_of, quantize_aware
from dlatlas.compression.kit.ste import ste_round

__all__ = ["cost", "fill_range", "quantize_activation", "quantize_weight", "widened", "wrpn"]


def quantize_weight(w: Tensor, bits: int) -> Tensor:
    r"""Nearest of the $2^k - 1$ values $0, \pm 1/n, \dots, \pm 1$ with $n = 2^{k-1} - 1$; gradient $1\{|w| \le 1\}$.

    Args:
        w: any shape.
        bits: $k$; the sign needs one.

    Raises:
        ValueError: fewer than 2 bits.
    """
    if bits < 2:
        raise ValueError(f"weights have a sign and need at least 2 bits, got {bits}")
    steps = 2 ** (bits - 1) - 1
    return ste_round(steps * w.clamp(-1, 1)) / steps


def quantize_activation(a: Tensor, bits: int) -> Tensor:
    r"""Nearest of the $2^k$ values $0, 1/n, \dots, 1$ with $n = 2^k - 1$; gradient $1\{0 \le a \le 1\}$.

    Args:
        a: any shape.
        bits: $k$.

    Raises:
        ValueError: fewer than 1 bit.
    """
    if bits < 1:
        raise ValueError(f"activations need at least 1 bit, got {bits}")
    steps = 2**bits - 1
    return ste_round(steps * a.clamp(0, 1)) / steps


def wrpn(model: nn.Module, bits_w: int, bits_a: int) -> nn.Module:
    """Let all layers but the first and the last compute with quantised weights and inputs; changes the model and returns it.

    Args:
        bits_w: bits of the weights.
        bits_a: bits of the activations.

    Raises:
        ValueError: too few bits, or the network has no inner layer or is quantised already.
    """
    for check, bits in ((quantize_weight, bits_w), (quantize_activation, bits_a)):
        check(torch.zeros(()), bits)
    return quantize_aware(model, partial(quantize_weight, bits=bits_w), partial(quantize_activation, bits=bits_a))


@torch.no_grad()
def fill_range(model: nn.Module, sigmas: float = 2.0) -> nn.Module:
    """Bring weights and activations to the size of the grid before :func:`wrpn`; changes the model and returns it.

    The weights and biases of each inner layer are divided by the largest weight, so that the weights reach from -1 to 1, and the scales and
    offsets of batch normalisation by `sigmas`, so that in a fresh network activations of up to that many standard deviations lie in the
    range. Where batch normalisation follows each layer but the last, only the size of the output changes.

    Raises:
        ValueError: `sigmas` is not positive.
    """
    if not sigmas > 0:
        raise ValueError(f"sigmas must be positive, got {sigmas}")
    for layer in list(layers_of(model).values())[1:-1]:
        largest = layer.weight.abs().max()
        if largest > 0:
            layer.weight /= largest
            if layer.bias is not None:
                layer.bias /= largest
    for layer in model.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.affine:
            layer.weight /= sigmas
            layer.bias /= sigmas
    return model


def widened(factory: Callable[..., nn.Module], factor: float = 2.0) -> nn.Module:
    """The network of a factory with `factor` times the filters.

    Args:
        factory: takes ``width``. Its default width is multiplied, as in ``widened(partial(lenet, width=0.25), 2)``; a factory without a
            default gets the factor itself.

    Raises:
        ValueError: `factor` is not positive.
    """
    if not factor > 0:
        raise ValueError(f"factor must be positive, got {factor}")
    width = inspect.signature(factory).parameters.get("width")
    if width is None or width.default is inspect.Parameter.empty:
        return factory(factor)
    default = width.default
    return factory(width=round(factor * default) if isinstance(default, int) else factor * default)


@torch.no_grad()
def cost(model: nn.Module, input_shape: Sequence[int], bits_w: int, bits_a: int) -> dict[str, int]:
    """What one forward pass of one example costs in the Linear and Conv2d layers.

    Args:
        input_shape: of one example, without the batch.
        bits_w: bits of the weights.
        bits_a: bits of the activations.

    Returns:
        ``macs``, the multiplications; ``bit_ops = macs * bits_w * bits_a``; ``bit_ops_inner``, the same without the first and the last layer;
        ``bit_ops_fp32_ends``, with these two at 32 x 32 bits; ``activation_bits``, the bits of all inputs of layers but the network's own.
    """
    found: list[tuple[int, int]] = []  # (multiplications, numbers that enter) in the order of execution

    def count(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        found.append((output[0].numel() * layer.weight[0].numel(), inputs[0][0].numel()))

    hooks = [layer.register_forward_hook(count) for layer in layers_of(model).values()]
    was_training = model.training
    try:
        like = next(model.parameters())
        model.eval()(torch.zeros(1, *input_shape, dtype=like.dtype, device=like.device))
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    macs = [m for m, _ in found]
    ends = macs[0] + (macs[-1] if len(macs) > 1 else 0)
    return {
        "macs": sum(macs),
        "bit_ops": sum(macs) * bits_w * bits_a,
        "bit_ops_inner": (sum(macs) - ends) * bits_w * bits_a,
        "bit_ops_fp32_ends": (sum(macs) - ends) * bits_w * bits_a + ends * 32 * 32,
        "activation_bits": bits_a * sum(n for _, n in found[1:]),
    }
