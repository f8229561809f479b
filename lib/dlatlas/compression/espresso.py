r"""Espresso: bit-packed inference of binary networks (pedersoli2018espresso).

A network whose weights and activations are signs needs one bit for each, and 64 products of signs are one exclusive-or of two machine words and
one count of bits. This module turns a trained network of signs into packed layers that compute the same integers. Nothing is approximated: what
looks like an exception (pixels that are no signs, zero padding, batch normalisation) is rewritten so that it fits.

Equations, for sign vectors $a$ and $b$ of length $n$ packed into words:

$$a \cdot b = n - 2\, \mathrm{popcount}(\mathrm{pack}(a) \oplus \mathrm{pack}(b))$$

The first layer sees bytes $x = \sum_{p=0}^{7} 2^p x_p$ with bits $x_p$. With $s_p = 2 x_p - 1$, every plane is a product of signs:

$$x \cdot w = \sum_p 2^p\, x_p \cdot w = \frac{1}{2} \Big( \sum_p 2^p\, s_p \cdot w + 255 \sum_i w_i \Big)$$

A convolution unrolls its windows; channels come last and fill whole words, so that a window is copied word by word. A zero of the padding is not
a sign: it is packed as $-1$, and the sum of the kernel's entries that fall outside is added again, a number for each filter and position.

Batch normalisation followed by a sign is a threshold of the integer $z$,

$$\mathrm{sign}\Big( \gamma\, \frac{z - \mu}{\sigma} + \beta \Big) = \mathrm{sign}(z - \lceil \tau \rceil), \qquad
\tau = \mu - \beta \sigma / \gamma, \qquad \gamma > 0,$$

with $\mathrm{sign}(0) = 1$; for $\gamma < 0$ it is $-\mathrm{sign}(z - \lfloor \tau \rfloor - 1)$, and for $\gamma = 0$ the constant sign of $\beta$.

Deviations from the paper:

1. One thread of a CPU; the paper's library aims at GPUs first and has a CPU version as well.
2. The first layer's planes are counted as signs, with the kernel that is there already, instead of as bits under the masks of the positive and
   of the negative weights. The integer is the same.
3. The first convolution unrolls bytes before it takes planes: with one input channel, packed channels would leave 63 of 64 bits empty.

Later work: the Larq Compute Engine (Bannink et al., 2021) made binary convolutions 8 to 18 times as fast as floating-point ones of the same size on
a phone. That is the kind of factor to expect against a tuned baseline; larger ones compare with slow code. 8-bit integers, which processors learned
to multiply since, became the common choice for inference. One-bit weights came back with language models (BitNet, Wang et al., 2023), with 8-bit
activations.

Example:
    import torch
    from torch import nn
    from dlatlas.compression.espresso import compile_bdnn
    from dlatlas.compression.kit.qat import quantize_aware
    from dlatlas.compression.kit.ste import ste_sign
    from dlatlas.kit.nets import mlp

    y = torch.arange(3000) % 10
    x = torch.randint(256, (10, 256))[y] + 100 * torch.randn(3000, 256)
    x = x.clamp(0, 255).round()  # bytes
    layers = mlp([256, 256, 256, 10], ste_sign, norm="batch", bias=False)
    net = quantize_aware(nn.Sequential(*layers, nn.BatchNorm1d(10)), weight=ste_sign, skip=())
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    for step in range(60):
        i = torch.randint(2000, (100,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x[i]), y[i]).backward()
        optimizer.step()
    net = net.double().eval()
    packed = compile_bdnn(net)  # weights and activations in machine words
    logits, wanted = packed(x[2000:].to(torch.uint8)), net(x[2000:].double())
    print(f"accuracy: {(logits.argmax(1) == y[2000:]).double().mean():.3f}")
    print(f"largest difference of the logits: {(logits - wanted).abs().max():g}")
    print(f"weights: {32 * 256 * (256 + 256 + 10) / packed.weight_bits():.0f} times smaller")
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, pad, unfold

from dlatlas.compression.kit import kernels
from dlatlas.compression.kit.ste import ste_sign
from dlatlas.kit.nets import Lambda

__all__ = ["PackedConv2d", "PackedLinear", "PackedNet", "bitplane_linear", "compile_bdnn"]


class PackedLinear(nn.Module):
    """Linear layer of packed signs.

    Args:
        words: weights ``[N, W]``, uint64; bits that belong to no input are 0.
        n: number of inputs.
        bias: ``[N]`` or None.
    """

    def __init__(self, words: Tensor, n: int, bias: Tensor | None = None):
        super().__init__()
        self.n = n
        self.register_buffer("words", words)
        self.register_buffer("bias", None if bias is None else bias.detach().float().clone())

    @classmethod
    def from_dense(cls, weight: Tensor, bias: Tensor | None = None) -> PackedLinear:
        """The signs of `weight` ``[N, n]``, +1 where it is at least 0."""
        if weight.dim() != 2 or (bias is not None and bias.shape != weight.shape[:1]):
            raise ValueError(
                f"expected weights [N, n] and bias [N] or None, got {tuple(weight.shape)} and {bias if bias is None else tuple(bias.shape)}"
            )
        return cls(_pack(weight), weight.shape[1], bias)

    def integers(self, words: Tensor) -> Tensor:
        """Products ``[B, N]``, int32, with packed inputs ``[B, W]``."""
        return kernels.xnor_gemm(words, self.words, self.n)

    def forward(self, x: Tensor) -> Tensor:
        """Signs ``[B, n]`` (+1 where above 0), or words ``[B, W]``, to ``[B, N]``, float32."""
        if x.dtype != torch.uint64:
            return kernels.sign_linear(x, self.words, self.bias)
        out = self.integers(x).float()
        return out if self.bias is None else out + self.bias


class PackedConv2d(nn.Module):
    """Convolution of packed signs with zero padding.

    Args:
        words: filters ``[O, kh, kw, W]``, uint64, channels packed.
        channels: number of input channels.
        stride: the same in both directions.
        padding: zeros on each side.
    """

    def __init__(self, words: Tensor, channels: int, stride: int = 1, padding: int = 0):
        super().__init__()
        if stride < 1 or padding < 0:
            raise ValueError(f"expected stride >= 1 and padding >= 0, got {stride} and {padding}")
        self.channels, self.stride, self.padding = channels, stride, padding
        self.register_buffer("words", words)
        self.corrections: dict[tuple[int, int], Tensor] = {}  # by the size of the picture

    @classmethod
    def from_dense(cls, weight: Tensor, stride: int = 1, padding: int = 0) -> PackedConv2d:
        """The signs of `weight` ``[O, C, kh, kw]``, +1 where it is at least 0."""
        if weight.dim() != 4:
            raise ValueError(f"expected filters [O, C, kh, kw], got {tuple(weight.shape)}")
        return cls(_pack(weight.permute(0, 2, 3, 1)), weight.shape[1], stride, padding)

    def integers(self, words: Tensor) -> Tensor:
        """``[B, oh, ow, O]``, int32, from packed channels ``[B, H, W, words]``."""
        O, kh, kw, _ = self.words.shape
        B, H, W, _ = words.shape
        p, s = self.padding, self.stride
        padded = pad(words.view(torch.int64), (0, 0, p, p, p, p))  # bits 0: signs -1
        windows = padded.unfold(1, kh, s).unfold(2, kw, s)  # [B, oh, ow, words, kh, kw]
        rows = windows.permute(0, 1, 2, 4, 5, 3).reshape(-1, self.words[0].numel()).view(torch.uint64)
        z = kernels.xnor_gemm(rows, self.words.view(O, -1), self.channels * kh * kw).view(B, *windows.shape[1:3], O)
        return z + self._outside(H, W) if p else z

    def _outside(self, H: int, W: int) -> Tensor:
        """Sum of the filter's entries that lie on the padding ``[oh, ow, O]``, int32."""
        if (H, W) not in self.corrections:
            weight = kernels.unpack_bits(self.words, self.channels).sum(3)[:, None]  # [O, 1, kh, kw]
            inside = conv2d(torch.ones(1, 1, H, W), weight, stride=self.stride, padding=self.padding)[0]
            self.corrections[H, W] = (weight.sum((1, 2, 3))[:, None, None] - inside).permute(1, 2, 0).round().int()
        return self.corrections[H, W]

    def forward(self, x: Tensor) -> Tensor:
        """Signs ``[B, C, H, W]`` (+1 where above 0) to ``[B, O, oh, ow]``, float32."""
        if x.dim() != 4 or x.shape[1] != self.channels:
            raise ValueError(f"expected [B, {self.channels}, H, W], got {tuple(x.shape)}")
        return self.integers(kernels.pack_bits(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2).float()


def bitplane_linear(x_uint8: Tensor, weight_sign: Tensor) -> Tensor:
    r"""Product of bytes with signs, bit plane by bit plane: $\sum_p 2^p\, x_p \cdot w$.

    Args:
        x_uint8: ``[B, n]``, uint8.
        weight_sign: ``[N, n]`` in {-1, +1}.

    Returns:
        ``[B, N]``, int32.

    Raises:
        ValueError: other shapes, types or weights.
    """
    if x_uint8.dtype != torch.uint8 or x_uint8.dim() != 2 or weight_sign.dim() != 2 or x_uint8.shape[1] != weight_sign.shape[1]:
        raise ValueError(
            f"expected bytes [B, n] and signs [N, n], got {x_uint8.dtype} {tuple(x_uint8.shape)} and {tuple(weight_sign.shape)}"
        )
    if not (weight_sign.abs() == 1).all():
        raise ValueError(f"weights must be -1 or +1, got values from {weight_sign.min():g} to {weight_sign.max():g}")
    return _bitplanes(x_uint8, _pack(weight_sign))


def _bitplanes(x: Tensor, words: Tensor) -> Tensor:
    B, n = x.shape
    planes = kernels.pack_planes(x).view(8 * B, -1)
    products = kernels.xnor_gemm(planes, words, n).view(8, B, -1)  # s_p . w
    ones = kernels.pack_bits(torch.ones(1, n))
    total = 255 * kernels.xnor_gemm(ones, words, n)  # [1, N]
    weights = 2 ** torch.arange(8, dtype=torch.int32).view(8, 1, 1)
    return ((products * weights).sum(0, dtype=torch.int32) + total) // 2  # the sum is even


class PackedNet(nn.Module):
    """A network of packed layers, made by :func:`compile_bdnn`.

    Args:
        steps: layers in their order.
        bytes_in: whether the input is bytes; else it is signs.
    """

    def __init__(self, steps: list[nn.Module], bytes_in: bool):
        super().__init__()
        self.steps, self.bytes_in = nn.ModuleList(steps), bytes_in

    def forward(self, x: Tensor) -> Tensor:
        """Bytes or signs ``[B, n]`` or ``[B, C, H, W]`` to logits ``[B, K]``."""
        if self.bytes_in != (x.dtype == torch.uint8):
            raise ValueError(f"the network was compiled for {'bytes (uint8)' if self.bytes_in else 'signs'}, got {x.dtype}")
        if not self.bytes_in:
            x = kernels.pack_bits(x.permute(0, 2, 3, 1) if x.dim() == 4 else x)
        for step in self.steps:
            x = step.integers(x) if hasattr(step, "integers") else step(x)
        return x

    def weight_bits(self) -> int:
        """Bits of the packed weights."""
        return sum(64 * buffer.numel() for name, buffer in self.named_buffers() if name.endswith(".words"))


@torch.no_grad()
def compile_bdnn(model: nn.Sequential, bytes_in: bool = True) -> PackedNet:
    """Pack a trained network of signs; the result computes the same integers and takes the same decisions.

    The network is a sequence, nested or not, of Linear and Conv2d layers whose weights are -1 or +1, each but the last followed by an optional
    MaxPool2d, an optional batch normalisation and a sign. The last may be followed by batch normalisation. Flatten may stand before a Linear.
    Normalisation is taken in evaluation mode. A sign is known by one form only: the module that ``mlp(sizes, ste_sign)`` makes,
    ``dlatlas.kit.nets.Lambda`` around :func:`~dlatlas.compression.kit.ste.ste_sign` or a `functools.partial` of it. Of any other module nobody
    can tell that it is a sign, nor which sign it gives to zero; put the wrapper in its place after training.

    Args:
        model: as told.
        bytes_in: the network is given bytes 0 to 255 (as floats in training, as uint8 when packed); False: signs.

    Raises:
        ValueError: something else is in the network, or a weight is not a sign.
    """
    steps: list[nn.Module] = []
    holds, channels, norm, bias = "input", None, None, None
    for layer in _flat(model):
        if isinstance(layer, nn.Linear | nn.Conv2d) and holds in ("input", "signs"):
            steps.append(_packed(layer, channels, bytes_in and holds == "input"))
            holds, bias, dtype = "integers", layer.bias, layer.weight.dtype
            channels = layer.out_channels if isinstance(layer, nn.Conv2d) else None
        elif isinstance(layer, nn.Flatten) and holds in ("input", "signs"):
            steps.append(layer)
        elif isinstance(layer, nn.MaxPool2d) and holds == "integers" and norm is None:
            steps.append(_Pool(layer))
        elif isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d) and holds == "integers" and norm is None:
            norm = layer
        elif isinstance(layer, Lambda) and getattr(layer.function, "func", layer.function) is ste_sign and holds == "integers":
            steps.append(_Threshold(norm, bias, steps))
            holds, norm, bias = "signs", None, None
        else:
            raise ValueError(
                f"cannot pack {layer} where the network holds {holds}{' after a normalisation' if norm else ''}; expected Linear, Conv2d, "
                "MaxPool2d, batch normalisation, Flatten, and as signs only dlatlas.kit.nets.Lambda(ste_sign), in the order of the docstring"
            )
    if holds != "integers":
        raise ValueError(f"the network must end in a linear layer, with or without batch normalisation; it ends in {holds}")
    return PackedNet([*steps, _Logits(norm, bias, dtype)], bytes_in)


def _packed(layer: nn.Linear | nn.Conv2d, channels: int | None, bytes_in: bool) -> nn.Module:
    weight = layer.weight.detach()
    if not (weight.abs() == 1).all():
        raise ValueError(f"the weights of {layer} must be -1 or +1, got values from {weight.min():g} to {weight.max():g}")
    if isinstance(layer, nn.Conv2d):
        (s, t), p = layer.stride, layer.padding
        if s != t or isinstance(p, str) or p[0] != p[1] or layer.groups > 1 or layer.dilation != (1, 1) or layer.padding_mode != "zeros":
            raise ValueError(f"expected one stride, one padding with zeros, no groups and no dilation, got {layer}")
        return _FirstConv2d(weight, s, p[0]) if bytes_in else PackedConv2d.from_dense(weight, s, p[0])
    if bytes_in:
        return _FirstLinear(weight)
    if channels is None:
        return PackedLinear.from_dense(weight)
    # Behind a convolution: channels by pixels in the dense network, pixels by channels in the packed one.
    return PackedLinear(_pack(weight.unflatten(1, (channels, -1)).mT).flatten(1), weight.shape[1])


class _FirstLinear(nn.Module):
    def __init__(self, weight: Tensor):
        super().__init__()
        self.register_buffer("words", _pack(weight))

    def integers(self, x: Tensor) -> Tensor:
        return _bitplanes(x, self.words)


class _FirstConv2d(nn.Module):
    def __init__(self, weight: Tensor, stride: int, padding: int):
        super().__init__()
        self.kernel, self.stride, self.padding = weight.shape[2:], stride, padding
        self.register_buffer("words", _pack(weight.flatten(1)))

    def integers(self, x: Tensor) -> Tensor:
        height, width = ((side + 2 * self.padding - k) // self.stride + 1 for side, k in zip(x.shape[2:], self.kernel))
        windows = unfold(x.float(), self.kernel, padding=self.padding, stride=self.stride)  # [B, C kh kw, oh ow]; floats hold bytes exactly
        rows = windows.mT.reshape(-1, windows.shape[1]).to(torch.uint8)
        return _bitplanes(rows, self.words).view(len(x), height, width, -1)


class _Pool(nn.Module):
    def __init__(self, pool: nn.MaxPool2d):
        super().__init__()
        self.pool = pool

    def forward(self, z: Tensor) -> Tensor:
        return self.pool(z.permute(0, 3, 1, 2).float()).permute(0, 2, 3, 1).int()  # integers below 2^24


class _Threshold(nn.Module):
    """Batch normalisation and sign of integers: a comparison for each channel, turned round where the scale is negative."""

    def __init__(self, norm: nn.Module | None, bias: Tensor | None, before: list[nn.Module]):
        super().__init__()
        gamma, beta, tau = _fold(norm, bias, next(len(step.words) for step in reversed(before) if hasattr(step, "words")))
        limit = 2**31 - 1
        reached = torch.where(gamma > 0, tau.ceil(), tau.floor() + 1)
        reached = torch.where(gamma == 0, torch.where(beta >= 0, -limit, limit), reached)  # always or never
        self.register_buffer("threshold", reached.clamp(-limit, limit).int())
        self.register_buffer("turned", kernels.pack_bits((gamma < 0).float()))

    def forward(self, z: Tensor) -> Tensor:
        reached = kernels.pack_reached(z.reshape(-1, z.shape[-1]), self.threshold)
        return (reached.view(torch.int64) ^ self.turned.view(torch.int64)).view(torch.uint64).view(*z.shape[:-1], -1)


def _fold(norm: nn.Module | None, bias: Tensor | None, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Scale, offset and threshold of each channel, float64."""
    shift = torch.zeros(n, dtype=torch.float64) if bias is None else bias.double()
    gamma, beta = torch.ones_like(shift), torch.zeros_like(shift)
    if norm is None:
        return gamma, beta, -shift
    if norm.affine:
        gamma, beta = norm.weight.double(), norm.bias.double()
    return gamma, beta, norm.running_mean.double() - shift - beta * (norm.running_var.double() + norm.eps).sqrt() / gamma


class _Logits(nn.Module):
    """The integers as floats of the dense network's type, with its last normalisation."""

    def __init__(self, norm: nn.Module | None, bias: Tensor | None, dtype: torch.dtype):
        super().__init__()
        self.norm = None if norm is None else copy.deepcopy(norm).eval().requires_grad_(False)
        self.register_buffer("bias", torch.zeros((), dtype=dtype) if bias is None else bias.detach().clone())

    def forward(self, z: Tensor) -> Tensor:
        out = z.to(self.bias.dtype) + self.bias
        return out if self.norm is None else self.norm(out)


def _flat(model: nn.Module) -> Iterator[nn.Module]:
    for layer in model:
        if isinstance(layer, nn.Sequential):
            yield from _flat(layer)
        elif not isinstance(layer, nn.Identity | nn.Dropout):
            yield layer


def _pack(weight: Tensor) -> Tensor:
    return kernels.pack_bits(torch.where(weight >= 0, 1.0, -1.0))
