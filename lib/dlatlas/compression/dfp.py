r"""Dynamic fixed point (das2018dfp).

A tensor of 16-bit integers with one exponent for all of them: what a tensor's numbers have in common, their magnitude, is stored once, and
the arithmetic of a layer becomes that of integers. All three products of a layer, forward pass, gradient of the input and gradient of the
weights, multiply 16-bit integers and accumulate in 32-bit ones. Weights are kept in 32-bit floats too, because an update is much smaller than
the weight, and what is not a product (bias, normalisation, optimizer) stays in floats. No hyper-parameter changes.

Equations: with $P$ bits, exponent $E_s$ and integers $i$,

$$ E_s = \lfloor \log_2 \max |x| \rfloor - (P - 2), \qquad i = \mathrm{round}(x\, 2^{-E_s}), \qquad x \approx i\, 2^{E_s}, \qquad |i| \le 2^{P-1} - 1. $$

Products multiply integers and add exponents, $i_{ab} = i_a i_b$ and $E_{ab} = E_a + E_b$. For a sum the operand with the smaller exponent is shifted right
by the difference. A wide result comes back to $P$ bits by a shift that leaves $P - 1$ bits of the largest magnitude,

$$ R = \max(0, \mathrm{bits}(\max |i_{ab}|) - (P - 1)), \qquad i = \mathrm{round}(i_{ab}\, 2^{-R}), \qquad E = E_{ab} + R. $$

The product of two 16-bit integers has up to 30 bits, so already three of them overflow 32. Sums are therefore split into chains; each chain is summed in
integers, and the sums of chains are added in 32-bit floats.

Deviations from the paper:

1. The paper's processor sums pairs of products in 32 bits and shifts operands by one bit to make room. We split one operand into a high and
   a low byte, $i = 256 h + l$, and sum two chains of 24-bit products, which is exact and cannot overflow in chains of up to 511. With few bits, or
   small numbers, one product is enough; the bound is computed from the data at each call.
2. Where rounding the largest number would give $2^{P-1}$, the exponent grows by one, so that the error is never more than half a unit.
3. Between the layers stand 32-bit floats, because automatic differentiation hands on nothing else. Each layer turns its input, its weight
   and the gradient into integers before any product, and keeps only these integers for the backward pass.

Later work: one exponent a tensor ties small numbers to the largest one; Flexpoint (Koster et al., 2017) did the same with predicted
exponents. With one exponent for each block of 16 or 32 numbers, as in the microscaling formats (Rouhani et al., 2023), far fewer bits suffice.
In practice training went to bfloat16, which has no shared exponent to manage.

Example:
    import torch
    from torch import nn
    from dlatlas.compression.dfp import convert

    x = torch.randn(2000, 20)
    y = x[:, :1] * x[:, 1:2]
    for bits in (None, 16, 4):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 1))
        if bits:
            convert(net, bits)  # all products, backward too, are of integers with one exponent
        optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
        for step in range(200):
            i = torch.randint(2000, (100,))
            optimizer.zero_grad()
            (net(x[i]) - y[i]).square().mean().backward()
            optimizer.step()
        error = (net(x) - y).square().mean()
        print(f"{f'{bits}-bit integers' if bits else 'floats'}: error {error:.3f}")
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import Function

__all__ = ["DFP", "DFPConv2d", "DFPLinear", "convert", "dfp", "dfp_add", "dfp_matmul", "downconvert"]

INT32 = 2**31 - 1


class DFP(NamedTuple):
    """Integers with a shared exponent: ``data`` is an int16 tensor, ``exponent`` an int, the numbers are ``data * 2**exponent``."""

    data: Tensor
    exponent: int

    def dequantize(self) -> Tensor:
        """The numbers as float32."""
        return _times_power(self.data.float(), self.exponent)

    def with_data(self, data: Tensor) -> DFP:
        """Other integers, or the same in another order, with this exponent."""
        return DFP(data, self.exponent)


def dfp(x: Tensor, bits: int = 16) -> DFP:
    r"""Nearest numbers $i\, 2^{E_s}$ with $|i| \le 2^{P-1} - 1$; the exponent of zeros is 0.

    Args:
        x: floats of any shape.
        bits: $P$, 2 to 16; the integers are stored as int16 in any case.

    Raises:
        ValueError: `bits` outside 2..16, or numbers that are not finite.
    """
    _check_bits(bits)
    largest = float(x.detach().abs().max()) if x.numel() else 0.0
    if not math.isfinite(largest):
        raise ValueError(f"expected finite numbers, got a largest magnitude of {largest}")
    if largest == 0:
        return DFP(torch.zeros(x.shape, dtype=torch.int16, device=x.device), 0)
    exponent = math.frexp(largest)[1] - 1 - (bits - 2)  # frexp's mantissa is in [1/2, 1)
    if round(math.ldexp(largest, -exponent)) >= 2 ** (bits - 1):
        exponent += 1
    return DFP(_times_power(x.detach(), -exponent).round_().to(torch.int16), exponent)


def dfp_matmul(a: DFP | Tensor, b: DFP | Tensor, chain: int = 256) -> Tensor:
    r"""$a b$ with products and chains of sums in 32-bit integers, and the sums of chains added in float32.

    Args:
        a: ``[..., M, K]``; floats are converted to 16 bits first.
        b: ``[..., K, N]``, likewise.
        chain: numbers summed in integers, 1 to 511.

    Returns:
        float32 ``[..., M, N]``.

    Raises:
        ValueError: `chain` outside 1..511, or the inner sizes differ.
    """
    a, b = (t if isinstance(t, DFP) else dfp(t) for t in (a, b))
    if not 1 <= chain <= 511:
        raise ValueError(f"chain must be between 1 and 511, got {chain}")
    if min(a.data.dim(), b.data.dim()) < 2 or a.data.shape[-1] != b.data.shape[-2]:
        raise ValueError(f"expected [..., M, K] and [..., K, N], got {tuple(a.data.shape)} and {tuple(b.data.shape)}")
    left, right = a.data.int(), b.data.int()
    longest = max(1, min(chain, left.shape[-1]))
    fits = _largest(left) * _largest(right) * longest <= INT32
    high = None if fits else (left + 128) >> 8  # -128..128
    low = left if fits else left - 256 * high  # -128..127; 128 * 2^15 * 511 < 2^31
    total = _chained(low, right, chain)
    if high is not None:
        total.add_(_chained(high, right, chain), alpha=256)
    return _times_power(total, a.exponent + b.exponent)


def dfp_add(a: DFP, b: DFP) -> DFP:
    """Sum in 16 bits: the operand with the smaller exponent is shifted right first.

    Raises:
        ValueError: the shapes cannot be broadcast.
    """
    if a.exponent < b.exponent:
        a, b = b, a
    try:
        total = a.data.int() + shift_right(b.data.int(), min(a.exponent - b.exponent, 31))
    except RuntimeError:
        raise ValueError(f"expected shapes that can be added, got {tuple(a.data.shape)} and {tuple(b.data.shape)}") from None
    return downconvert(total, a.exponent)


def downconvert(acc: Tensor, exponent: int, bits: int = 16) -> DFP:
    r"""Bring wide integers back to $P$ bits by one shift for all of them.

    Args:
        acc: integers, int32 for example, of any shape.
        exponent: of `acc`.
        bits: $P$.

    Raises:
        ValueError: `bits` outside 2..16, or `acc` holds floats.
    """
    _check_bits(bits)
    if acc.is_floating_point():
        raise ValueError(f"expected integers, got {acc.dtype}")
    acc = acc.to(torch.int64)  # the magnitude of the smallest int32 is not an int32
    largest = _largest(acc)
    right = max(0, largest.bit_length() - (bits - 1))
    if right and (largest + (1 << (right - 1))) >> right >= 2 ** (bits - 1):
        right += 1
    return DFP(shift_right(acc, right).to(torch.int16), exponent + right)


class _Products(Function):
    """A layer's three products, all of them of integers; `layer` says how to lay out windows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, layer: DFPLinear | DFPConv2d) -> Tensor:
        x, w = dfp(x, layer.bits), dfp(weight, layer.bits)
        ctx.save_for_backward(x.data, w.data)
        ctx.exponents, ctx.layer = (x.exponent, w.exponent), layer
        return layer._output(x, w)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, w = (DFP(data, e) for data, e in zip(ctx.saved_tensors, ctx.exponents))
        g = dfp(grad, ctx.layer.bits)
        grad_x = ctx.layer._input_gradient(g, w, x.data.shape) if ctx.needs_input_grad[0] else None
        grad_w = ctx.layer._weight_gradient(g, x) if ctx.needs_input_grad[1] else None
        return grad_x, grad_w, None


class DFPLinear(nn.Linear):
    """`Linear` whose three products are of integers with shared exponents; the weight that the optimizer sees is float32.

    Takes ``[..., in_features]`` as `Linear` does, a single vector included.

    Args:
        bits: of weight, input and gradient, 2 to 16.
        chain: as in :func:`dfp_matmul`.

    Raises:
        ValueError: `bits` outside 2..16, or inputs of another size.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True, *, bits: int = 16, chain: int = 256, **kwargs: Any):
        _check_bits(bits)
        super().__init__(in_features, out_features, bias, **kwargs)
        self.bits, self.chain = bits, chain

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 0 or x.shape[-1] != self.in_features:
            raise ValueError(f"expected inputs [..., {self.in_features}], got {tuple(x.shape)}")
        out = _Products.apply(x.reshape(-1, self.in_features), self.weight, self).view(*x.shape[:-1], self.out_features)
        return out if self.bias is None else out + self.bias

    def _output(self, x: DFP, w: DFP) -> Tensor:
        return dfp_matmul(x, w.with_data(w.data.mT), self.chain)

    def _input_gradient(self, g: DFP, w: DFP, shape: torch.Size) -> Tensor:
        return dfp_matmul(g, w, self.chain)

    def _weight_gradient(self, g: DFP, x: DFP) -> Tensor:
        return dfp_matmul(g.with_data(g.data.mT), x, self.chain)


class DFPConv2d(nn.Conv2d):
    """`Conv2d` whose three products are of integers with shared exponents; without groups and dilation.

    Takes ``[batch, in_channels, H, W]``, or a single image ``[in_channels, H, W]`` as `Conv2d` does.

    Args:
        bits: of weight, input and gradient, 2 to 16.
        chain: as in :func:`dfp_matmul`.

    Raises:
        ValueError: `bits` outside 2..16, or inputs of another shape.
    """

    def __init__(
        self, in_channels, out_channels, kernel_size, stride=1, padding=0, bias=True, *, bits: int = 16, chain: int = 256, **kwargs
    ):
        _check_bits(bits)
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, bias=bias, **kwargs)
        if self.groups > 1 or self.dilation != (1, 1) or isinstance(self.padding, str) or self.padding_mode != "zeros":
            raise ValueError(f"expected no groups or dilation and a number of zeros as padding, got {self}")
        self.bits, self.chain = bits, chain

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() not in (3, 4) or x.shape[-3] != self.in_channels:
            raise ValueError(f"expected inputs [batch, {self.in_channels}, H, W] or [{self.in_channels}, H, W], got {tuple(x.shape)}")
        out = _Products.apply(x if x.dim() == 4 else x[None], self.weight, self)
        out = out if x.dim() == 4 else out[0]
        return out if self.bias is None else out + self.bias[:, None, None]

    def _output(self, x: DFP, w: DFP) -> Tensor:
        cols = windows(x.data, self.kernel_size, self.stride, self.padding)  # [B, C kh kw, OH, OW]
        out = dfp_matmul(w.with_data(w.data.flatten(1)), x.with_data(cols.flatten(2)), self.chain)  # [B, O, OH OW]
        return out.unflatten(2, cols.shape[2:])

    def _input_gradient(self, g: DFP, w: DFP, shape: torch.Size) -> Tensor:
        cols = dfp_matmul(w.with_data(w.data.flatten(1).mT), g.with_data(g.data.flatten(2)), self.chain)  # [B, C kh kw, OH OW]
        return sum_windows(cols.unflatten(2, g.data.shape[2:]), shape, self.kernel_size, self.stride, self.padding)

    def _weight_gradient(self, g: DFP, x: DFP) -> Tensor:
        cols = windows(x.data, self.kernel_size, self.stride, self.padding).flatten(2)  # [B, C kh kw, OH OW]
        # Each image ends a chain: the sum over the batch is one of floats.
        each = dfp_matmul(g.with_data(g.data.flatten(2)), x.with_data(cols.mT), self.chain)  # [B, O, C kh kw]
        return each.sum(0).view_as(self.weight)


def convert(model: nn.Module, bits: int = 16) -> nn.Module:
    """Replace every `Linear` and `Conv2d` by its integer twin with the same parameters, in place; returns the model.

    A layer that is used in several places has one twin. If `model` itself is such a layer, its twin is returned.

    Args:
        model: plain layers, without groups or dilation.
        bits: of weights, inputs and gradients, 2 to 16.

    Raises:
        ValueError: as of the layers.
    """
    twins: dict[int, nn.Module] = {}

    def twin_of(layer: nn.Module) -> nn.Module:
        if id(layer) in twins:
            return twins[id(layer)]
        if isinstance(layer, nn.Linear):
            twin = DFPLinear(layer.in_features, layer.out_features, layer.bias is not None, bits=bits)
        else:
            if layer.groups > 1 or layer.dilation != (1, 1) or layer.padding_mode != "zeros":
                raise ValueError(f"expected no groups or dilation and zeros as padding, got {layer}")
            sizes = (layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding)
            twin = DFPConv2d(*sizes, layer.bias is not None, bits=bits)
        twin.weight, twin.bias = layer.weight, layer.bias
        twins[id(layer)] = twin.train(layer.training)
        return twin

    if type(model) in (nn.Linear, nn.Conv2d):
        return twin_of(model)
    for parent in list(model.modules()):
        for name, layer in list(parent._modules.items()):
            if type(layer) in (nn.Linear, nn.Conv2d):
                setattr(parent, name, twin_of(layer))
    return model


def windows(x: Tensor, kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int]) -> Tensor:
    """Windows of ``[B, C, H, W]`` as ``[B, C * kh * kw, OH, OW]``: `torch.nn.functional.unfold`, but for integers."""
    x = nn.functional.pad(x, (padding[1], padding[1], padding[0], padding[0])) if any(padding) else x
    x = x.unfold(2, kernel[0], stride[0]).unfold(3, kernel[1], stride[1])  # [B, C, OH, OW, kh, kw]
    return x.permute(0, 1, 4, 5, 2, 3).flatten(1, 3)


def sum_windows(cols: Tensor, shape: torch.Size, kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int]) -> Tensor:
    """The transposed map of :func:`windows`, ``[B, C * kh * kw, OH, OW] -> [B, C, H, W]``, for integers and floats."""
    (kh, kw), (sh, sw), (ph, pw) = kernel, stride, padding
    cols = cols.unflatten(1, (shape[1], kh, kw))
    out = cols.new_zeros(shape[0], shape[1], shape[2] + 2 * ph, shape[3] + 2 * pw)
    oh, ow = cols.shape[-2:]
    for i in range(kh):
        for j in range(kw):
            out[:, :, i : i + sh * (oh - 1) + 1 : sh, j : j + sw * (ow - 1) + 1 : sw] += cols[:, :, i, j]
    return out[:, :, ph : ph + shape[2], pw : pw + shape[3]]


def integer_matmul(a: Tensor, b: Tensor, doubles: bool | None = None) -> Tensor:
    """int32 ``a @ b``; whether the sums fit is the caller's business.

    CUDA has no matrix product of 32-bit integers. There the product is one of doubles, which is exact as all sums are far below 2^53.

    Args:
        doubles: which of the two ways; None: that of the device.
    """
    if a.is_cuda if doubles is None else doubles:
        return (a.double() @ b.double()).to(torch.int32)
    return a.to(torch.int32) @ b.to(torch.int32)


def shift_right(i: Tensor, bits: int) -> Tensor:
    """Integers divided by ``2**bits``, rounded to the nearest, ties to the even one."""
    if bits == 0:
        return i
    # Adding one less than half, and one more if the result would be odd, rounds ties to even; >> rounds down on both sides of zero.
    return (i + ((1 << (bits - 1)) - 1) + ((i >> bits) & 1)) >> bits


def _chained(a: Tensor, b: Tensor, chain: int) -> Tensor:
    """int32 ``a @ b`` in chains, whose sums are added in float32."""
    parts = [integer_matmul(a[..., k : k + chain], b[..., k : k + chain, :]).float() for k in range(0, a.shape[-1], chain)]
    if not parts:
        return torch.zeros(*torch.broadcast_shapes(a.shape[:-2], b.shape[:-2]), a.shape[-2], b.shape[-1], device=a.device)
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)


def _largest(i: Tensor) -> int:
    if i.numel() == 0:
        return 0
    low, high = torch.aminmax(i)
    return max(int(high), -int(low))


def _times_power(x: Tensor, exponent: int) -> Tensor:
    """``x * 2**exponent``, also where the power is no float32."""
    if -126 <= exponent <= 127:
        return x * 2.0**exponent
    half = exponent // 2  # the exponents of floats and their products stay far inside the range of float64
    return (x.double() * 2.0**half * 2.0 ** (exponent - half)).to(x.dtype)


def _check_bits(bits: int) -> None:
    if not 2 <= bits <= 16:
        raise ValueError(f"bits must be between 2 and 16, got {bits}")
