r"""Training for one bit a weight (mcdonnell2018onebit).

A weight is +1 or -1 times a constant, and the constant is not learned: it is the standard deviation that the layer's weights have when
they are drawn. So the network that is deployed computes with numbers of the size that a good initialisation has, in every layer and at every time of
the training, and what is learned is signs. Batch normalisation carries no learned scale or offset either, the last layer is a convolution with
normalisation like the others, and the learning rate restarts: with that a wide residual network loses little.

Equations: with $F$ the fan-in of the layer, input channels times kernel height times kernel width,

$$ \hat W = \sqrt{2 / F}\; \mathrm{sign}(W), \qquad \frac{\partial L}{\partial W} := \frac{\partial L}{\partial \hat W}, $$

$\mathrm{sign}(0) = +1$. The exact weights $W$ are kept in training only, are not clipped and not scaled. The rate goes down a half-cosine
from 0.1 to 0.0001 and jumps back after 2 epochs, then after 4 more, 8 more, ...: at epochs 2, 6, 14, 30, 62.

Deviations from the paper:

1. Stages of residual blocks as in the paper (normalisation and rectifier before each convolution, average pooling in the shortcut, new
   channels of zeros), but any small depth and width; no augmentation of the images.
2. `scale="mean"` gives the scale of XNOR-Net (Rastegari et al., 2016), the mean magnitude of the layer, for comparison.

Later work: McDonnell et al. (2019) also removed batch normalisation from such networks. Helwegen et al. (2019) argue that $W$ is no weight at all
but the inertia of a sign, and train it by an optimizer made for flipping. BitNet (Wang et al., 2023) trains language models with signs and one
scale a matrix; its successor with three values (Ma et al., 2024) has the accuracy of full precision from some three billion weights on.

Example:
    import torch
    from torch import nn
    from dlatlas.compression.one_bit import export_bits, load_bits, one_bit_resnet, sgd_warm_restarts

    shapes = torch.randn(10, 1, 8, 8)
    y = torch.arange(1200) % 10
    x = shapes[y] + 1.5 * torch.randn(1200, 1, 8, 8)
    net = one_bit_resnet(8, width=8)  # its OneBitConv2d layers compute with the signs of weights
    optimizer, schedule = sgd_warm_restarts(net.parameters(), steps_per_epoch=12)
    for step in range(72):
        i = torch.randint(600, (50,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x[i]), y[i]).backward()
        optimizer.step()
        schedule.step()
    file, deployed = export_bits(net), one_bit_resnet(8, width=8)
    load_bits(deployed, file)
    for name, model in {"trained": net, "from the file": deployed}.items():
        right = (model.eval()(x[600:]).argmax(1) == y[600:]).double().mean()
        print(f"{name}: accuracy {right:.3f}")
    floats = 32 * sum(p.numel() for p in net.parameters())
    print(f"the file is {floats / file.bits:.1f} times smaller than weights in floats")
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, linear, pad
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts

from dlatlas.compression.kit.ste import ste_replace

__all__ = ["Export", "OneBitConv2d", "OneBitLinear", "export_bits", "load_bits", "one_bit_resnet", "one_bit_weight", "sgd_warm_restarts"]


def one_bit_weight(w: Tensor, scale: str = "constant") -> Tensor:
    r"""$\sqrt{2/F}\, \mathrm{sign}(w)$ with the gradient passed on unchanged.

    Args:
        w: ``[out, in]`` or ``[out, in, kh, kw]``.
        scale: "constant", or "mean": the mean of ``|w|`` in place of the constant.

    Raises:
        ValueError: `w` has less than two axes, or an unknown scale.
    """
    if w.dim() < 2 or scale not in ("constant", "mean"):
        raise ValueError(f"expected weights [out, in, ...] and the scale 'constant' or 'mean', got {tuple(w.shape)} and {scale!r}")
    size = math.sqrt(2 / w[0].numel()) if scale == "constant" else w.detach().abs().mean()
    return ste_replace(w, torch.where(w.detach() >= 0, 1.0, -1.0).to(w.dtype) * size)


class OneBitConv2d(nn.Conv2d):
    """`Conv2d` that computes with one bit a weight; no bias by default.

    Args:
        scale: "constant" or "mean", see :func:`one_bit_weight`.
    """

    def __init__(
        self, in_channels, out_channels, kernel_size, stride=1, padding=0, dilation=1, groups=1, bias=False, *, scale="constant", **kwargs
    ):
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, **kwargs)
        nn.init.kaiming_normal_(self.weight)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, one_bit_weight(self.weight, self.scale), self.bias)


class OneBitLinear(nn.Linear):
    """`Linear` that computes with one bit a weight; no bias by default."""

    def __init__(self, in_features: int, out_features: int, bias: bool = False, *, scale: str = "constant", **kwargs: Any):
        super().__init__(in_features, out_features, bias, **kwargs)
        nn.init.kaiming_normal_(self.weight)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, one_bit_weight(self.weight, self.scale), self.bias)


class Export(dict):
    """A network as a file holds it: ``name -> (signs, shape, scale)`` for each layer of one bit, and `rest`, all other tensors by name.

    `signs` is a uint8 vector of ``ceil(n / 8)`` bytes, first weight in the highest bit, 1 for plus.
    """

    def __init__(self, layers: dict[str, tuple[Tensor, tuple[int, ...], float]], rest: dict[str, Tensor]):
        super().__init__(layers)
        self.rest = rest

    @property
    def bits(self) -> int:
        """Size of all of it; a scale takes one float."""
        packed = sum(8 * signs.numel() + 32 for signs, _, _ in self.values())
        return packed + sum(8 * t.element_size() * t.numel() for t in self.rest.values())


@torch.no_grad()
def export_bits(model: nn.Module) -> Export:
    """Signs, shape and scale of each layer of one bit by name; what else the network needs is in ``.rest``.

    Raises:
        ValueError: the network has no such layer.
    """
    layers, rest = {}, {name: t.detach().clone() for name, t in model.state_dict().items()}
    for name, layer in _one_bit_layers(model).items():
        bits = np.packbits(layer.weight.detach().cpu().numpy().ravel() >= 0)
        scale = float(one_bit_weight(layer.weight, layer.scale).flatten()[0].abs())
        layers[name] = torch.from_numpy(bits), tuple(layer.weight.shape), scale
        del rest[f"{name}.weight" if name else "weight"]
    return Export(layers, rest)


@torch.no_grad()
def load_bits(model: nn.Module, d: Export | dict) -> None:
    """Fill a network of the same form with what :func:`export_bits` gave; in place.

    The exact weights become the deployed ones, so that training can go on from there. From a plain dict only the signs are read.

    Raises:
        ValueError: the layers or shapes differ.
    """
    layers = _one_bit_layers(model)
    if {name: tuple(layer.weight.shape) for name, layer in layers.items()} != {name: tuple(shape) for name, (_, shape, _) in d.items()}:
        raise ValueError(f"expected the layers {sorted(layers)} with their shapes, got {sorted(d)}")
    for name, (bits, shape, scale) in d.items():
        signs = np.unpackbits(bits.cpu().numpy(), count=math.prod(shape)).reshape(shape)
        weight = layers[name].weight
        weight.copy_(torch.where(torch.from_numpy(signs).to(weight.device) > 0, scale, -scale))
    if isinstance(d, Export):
        model.load_state_dict(d.rest, strict=False)


def one_bit_resnet(
    depth: int, width: int, *, n_classes: int = 10, in_ch: int = 1, conv: Callable[..., nn.Conv2d] = OneBitConv2d
) -> nn.Sequential:
    """Residual network ``[batch, in_ch, H, W] -> [batch, n_classes]`` of the paper's form, each weight of one bit.

    Args:
        depth: 6n + 2 layers: one convolution, three stages of n blocks with two each, one 1x1 convolution.
        width: channels of the first stage; the others have twice and four times as many.
        conv: class of the convolutions; ``functools.partial(torch.nn.Conv2d, bias=False)`` gives the same network in full precision.

    Raises:
        ValueError: `depth` is not 8, 14, 20, ..., or a size is below 1.
    """
    if depth < 8 or (depth - 2) % 6 or min(width, n_classes, in_ch) < 1:
        raise ValueError(f"expected a depth of 6n + 2 with n >= 1 and positive sizes, got depth {depth}, {width}, {n_classes}, {in_ch}")
    layers: list[nn.Module] = [_norm(in_ch), conv(in_ch, width, 3, padding=1)]
    n_in = width
    for n_out in (width, 2 * width, 4 * width):
        for _ in range((depth - 2) // 6):
            layers.append(_Block(n_in, n_out, conv))
            n_in = n_out
    head = [_norm(n_in), nn.ReLU(), conv(n_in, n_classes, 1), _norm(n_classes), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, *head)


def sgd_warm_restarts(
    params: Any, steps_per_epoch: int, *, lr: float = 0.1, lr_min: float = 1e-4, weight_decay: float = 5e-4
) -> tuple[SGD, CosineAnnealingWarmRestarts]:
    """The paper's optimizer and its schedule, to be stepped after each update: restarts at epochs 2, 6, 14, 30, 62."""
    optimizer = SGD(params, lr, momentum=0.9, weight_decay=weight_decay)
    return optimizer, CosineAnnealingWarmRestarts(optimizer, 2 * steps_per_epoch, T_mult=2, eta_min=lr_min)


class _Block(nn.Module):
    def __init__(self, n_in: int, n_out: int, conv: Callable[..., nn.Conv2d]):
        super().__init__()
        self.stride = 1 if n_in == n_out else 2
        self.norm1, self.conv1 = _norm(n_in), conv(n_in, n_out, 3, stride=self.stride, padding=1)
        self.norm2, self.conv2 = _norm(n_out), conv(n_out, n_out, 3, padding=1)
        self.new = n_out - n_in

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(self.norm2(self.conv1(self.norm1(x).relu())).relu())
        if self.stride > 1:
            x = pad(avg_pool2d(x, 3, stride=2, padding=1), (0, 0, 0, 0, 0, self.new))
        return x + y


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, affine=False)


def _one_bit_layers(model: nn.Module) -> dict[str, OneBitConv2d | OneBitLinear]:
    layers = {name: m for name, m in model.named_modules() if isinstance(m, OneBitConv2d | OneBitLinear)}
    if not layers:
        raise ValueError(f"the network has no OneBitConv2d or OneBitLinear: {type(model).__name__}")
    return layers
