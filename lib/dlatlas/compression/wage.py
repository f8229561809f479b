r"""WAGE: training and inference with integers (wu2018wage).

Weights, activations, gradients and errors are all integers of few bits, in training as in use: 2 bits for the weights that multiply, 8 for
activations, 8 for the gradients (and so for the stored weights that they are taken from), 8 for the errors that run backward. There is no float
to fall back on, hence no batch normalisation, no bias and no momentum. What makes this possible is that errors and gradients are only
needed up to a factor: each is divided by the power of two nearest its largest magnitude, which brings it to the range of the integers, and
what is lost below one unit is rounded at random, so that it is kept on average.

Equations: with $\sigma(k) = 2^{1-k}$ the unit of $k$ bits,

$$ Q(x, k) = \mathrm{clip}\big(\sigma\, \mathrm{round}(x / \sigma),\, -1 + \sigma,\, 1 - \sigma\big), \qquad \mathrm{Shift}(x) = 2^{\mathrm{round}(\log_2 x)}. $$

Stored weights $W$ have $k_G$ bits and start uniform in $[-L, L]$, $L = \max(\sqrt{6/n}, L_{min})$, $L_{min} = 1.5\, \sigma(k_W)$, for $n$ inputs. Forward,

$$ W_q = Q(W, k_W), \qquad a_q = Q(\mathrm{relu}(a\, W_q) / \alpha, k_A), \qquad \alpha = \max(\mathrm{Shift}(L_{min} / \sqrt{6/n}), 1). $$

Backward, the error $e$ that enters a layer becomes $e_q = Q(e / \mathrm{Shift}(\max |e|), k_E)$ before the masks of clipping and rectifier; its products with
$W_q$ and with $a$ are the next error and the gradient $g$. The update is

$$ g_s = \eta\, g / \mathrm{Shift}(\max |g|), \qquad \Delta W = \sigma(k_G)\, \mathrm{sign}(g_s) \big(\lfloor |g_s| \rfloor + \mathrm{Bernoulli}(|g_s| - \lfloor |g_s| \rfloor)\big), $$

and $W$ becomes $W - \Delta W$ clipped to $\pm(1 - \sigma(k_G))$, with a learning rate $\eta$ that is a power of two.

Deviations from the paper:

1. The paper simulates integers by floats on a grid. Here weights, saved activations and errors are int8 tensors, products are int32 (their
   largest possible sum is checked), divisions by powers of two are shifts, and the random rounding is an integer addition and a shift.
2. Automatic differentiation hands on floats only, so between two layers numbers travel in float32. It holds integers below $2^{24}$ exactly,
   which with 2-bit weights is every sum of up to 132 thousand products.
3. A layer does multiplication, pooling, rectifier and rounding in one; pooling precedes the rectifier, which is the same for the maximum.
4. The last layer returns its int32 sums as floats, and the loss on top of it is computed in floats.
5. Integers are outside of automatic differentiation. A backward pass, `torch.autograd.grad` for the input included, therefore writes the
   gradients of the weights into their ``.grad`` by itself. ``requires_grad_(False)`` on a weight, a layer or the model switches that off.

Later work: WAGEUBN (Yang et al., 2020) brought batch normalisation and momentum to 8-bit integers and scaled the scheme to ImageNet. NITI (Wang et
al., 2022) trains with int8 and shared exponents and without a float at the loss. Random rounding is now standard wherever updates are smaller than a unit.

Example:
    import torch
    from torch import nn
    from dlatlas.compression.wage import WAGE, WAGELinear

    x = torch.rand(3000, 30)
    y = (x[:, :15].sum(1) > x[:, 15:].sum(1)).long()
    net = nn.Sequential(WAGELinear(30, 64), WAGELinear(64, 64), WAGELinear(64, 2, activation=False))
    optimizer = WAGE(net.parameters(), lr=8)  # updates are integers, rounded at random
    for step in range(301):
        i = torch.randint(2000, (64,))
        loss = nn.functional.cross_entropy(net(x[i]), y[i])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step in (100, 200):
            optimizer.param_groups[0]["lr"] /= 4
        if step % 100 == 0:
            right = (net(x[2000:]).argmax(1) == y[2000:]).double().mean()
            print(f"step {step}: accuracy {right:.3f}")
    weight = net[1].weight
    print(weight.dtype, "stored,", net[1].quantized_weight().unique().tolist(), "multiply")
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn.modules.utils import _pair

from dlatlas.compression.dfp import integer_matmul, shift_right, sum_windows, windows

__all__ = ["WAGE", "WAGEConv2d", "WAGELinear", "quantize", "quantize_gradient", "shift"]


def quantize(x: Tensor, bits: int) -> Tensor:
    r"""$\mathrm{clip}(\sigma\, \mathrm{round}(x/\sigma), -1 + \sigma, 1 - \sigma)$ with $\sigma = 2^{1-k}$; ties go to the even multiple.

    Args:
        x: floats of any shape.
        bits: $k$.

    Raises:
        ValueError: fewer than 2 bits.
    """
    _check_bits(bits)
    unit = 2.0 ** (1 - bits)
    return ((x / unit).round() * unit).clamp(-1 + unit, 1 - unit)


def shift(x: Tensor) -> Tensor:
    r"""The power of two $2^{\mathrm{round}(\log_2 x)}$ nearest to each number on a logarithmic scale; 0 for 0.

    Args:
        x: floats, not negative.

    Raises:
        ValueError: a negative number.
    """
    if bool((x < 0).any()):
        raise ValueError(f"expected numbers that are not negative, got {float(x.min())}")
    mantissa, exponent = torch.frexp(x)  # mantissa in [1/2, 1)
    return torch.where(x > 0, torch.ldexp(torch.ones_like(x), exponent - (mantissa < math.sqrt(0.5)).int()), 0.0)


def quantize_gradient(g: Tensor, lr: float, bits: int = 8, generator: torch.Generator | None = None, *, stochastic: bool = True) -> Tensor:
    r"""The update $\Delta W$: multiples of $\sigma(k_G)$ whose mean is $\sigma(k_G)\, \eta\, g / \mathrm{Shift}(\max|g|)$.

    Args:
        g: gradient, floats of any shape; zeros give zeros.
        lr: $\eta$, a power of two.
        bits: $k_G$.
        generator: of the random rounding; None: torch's global one.
        stochastic: False rounds to the nearest multiple instead, for comparison.

    Raises:
        ValueError: fewer than 2 bits, a rate that is not a power of two, or a gradient that is not finite.
    """
    _check_bits(bits)
    _log2(lr)
    largest = g.abs().max() if g.numel() else torch.zeros(())
    if not bool(largest.isfinite()):
        raise ValueError(f"expected a finite gradient, got a largest magnitude of {float(largest)}")
    if largest == 0:
        return torch.zeros_like(g)
    scaled = (lr * g / shift(largest)).abs()
    noise = torch.rand(g.shape, generator=generator, dtype=g.dtype, device=g.device) if stochastic else 0.5
    return 2.0 ** (1 - bits) * g.sign() * (scaled + noise).floor()


class WAGE(torch.optim.Optimizer):
    """The update rule; for the int8 weights of the layers below and, on the same grid, for weights that are floats.

    Args:
        params: weights.
        lr: power of two; 1 moves the weight with the largest gradient by about one unit.
        bits_g: bits of stored weights.
        stochastic: False rounds updates to the nearest unit instead of at random.
        generator: of the random rounding; None: torch's global one.

    Raises:
        ValueError: fewer than 2 bits, more than 8 for int8 weights, or a rate that is not a power of two.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float = 1,
        bits_g: int = 8,
        *,
        stochastic: bool = True,
        generator: torch.Generator | None = None,
    ):
        _check_bits(bits_g)
        _log2(lr)
        self.generator = generator
        super().__init__(params, {"lr": lr, "bits_g": bits_g, "stochastic": stochastic})

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> Any:
        """One update of every weight that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            lr, bits, stochastic = group["lr"], group["bits_g"], group["stochastic"]
            top = 2 ** (bits - 1) - 1
            for p in group["params"]:
                if p.grad is None:
                    continue
                if p.is_floating_point():
                    unit = 2.0 ** (1 - bits)
                    p.sub_(quantize_gradient(p.grad, lr, bits, self.generator, stochastic=stochastic)).clamp_(-top * unit, top * unit)
                else:
                    _check_bits(bits, 8)
                    moved = p.to(torch.int64) - _update_units(p.grad, lr, stochastic, self.generator)
                    p.copy_(moved.clamp_(-top, top))
        return loss


class IntegerWeight(nn.Parameter):
    """Parameter of integers; ``.grad`` may hold wider integers, which a plain parameter refuses.

    ``requires_grad`` says whether a layer's backward pass leaves a gradient here; torch itself never does for integers.
    """

    def __new__(cls, data: Tensor, requires_grad: bool = True) -> IntegerWeight:
        weight = torch.Tensor._make_subclass(cls, data, False)  # automatic differentiation ends here: the layer sets `grad`
        weight._wide, weight._wanted = None, bool(requires_grad)
        return weight

    def __reduce_ex__(self, protocol: int) -> tuple:
        return IntegerWeight, (self.data, self._wanted)  # a plain parameter's way would give a plain parameter back

    @property
    def requires_grad(self) -> bool:
        return self._wanted

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        self._wanted = bool(value)

    def requires_grad_(self, requires_grad: bool = True) -> IntegerWeight:
        self._wanted = bool(requires_grad)
        return self

    @property
    def grad(self) -> Tensor | None:
        return self._wide

    @grad.setter
    def grad(self, value: Tensor | None) -> None:
        self._wide = value


class _WAGELayer(nn.Module):
    """What both layers share; a layer adds the layout of its three products."""

    def __init__(self, shape: tuple[int, ...], bits: tuple[int, int, int, int], activation: bool, pool: int):
        super().__init__()
        for k in bits:
            _check_bits(k, 8)
        if bits[0] > bits[3]:
            raise ValueError(f"weights that multiply need no more bits than stored ones, got bits_w={bits[0]} and bits_g={bits[3]}")
        if pool < 1:
            raise ValueError(f"pool must be at least 1, got {pool}")
        self.bits_w, self.bits_a, self.bits_e, self.bits_g = bits
        self.activation, self.pool = activation, pool
        least, usual = 1.5 * 2.0 ** (1 - self.bits_w), math.sqrt(6 / math.prod(shape[1:]))
        start = torch.empty(shape).uniform_(-1, 1) * max(usual, least)
        self.log2_alpha = max(round(math.log2(least / usual)), 0)
        self.weight = IntegerWeight(_to_int8(start, self.bits_g))

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != self.weight.dim() or x.shape[1] != self.weight.shape[1]:
            sizes = ", ".join(["batch", str(self.weight.shape[1]), "H", "W"][: self.weight.dim()])
            raise ValueError(f"expected inputs [{sizes}], got {tuple(x.shape)}")
        # The second argument makes the function part of the graph where `x` is data: the weight itself cannot, it is no float.
        return _Products.apply(x, x.new_zeros((), requires_grad=self.weight.requires_grad and torch.is_grad_enabled()), self)

    def quantized_weight(self) -> Tensor:
        """$W_q$ in units of $\\sigma(k_W)$, int8."""
        top = 2 ** (self.bits_w - 1) - 1
        return shift_right(self.weight.to(torch.int32), self.bits_g - self.bits_w).clamp_(-top, top).to(torch.int8)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, bits {self.bits_w}-{self.bits_a}-{self.bits_g}-{self.bits_e}, activation={self.activation}"


class WAGELinear(_WAGELayer):
    """Linear layer of integers, ``[batch, in] -> [batch, out]``, with rectifier and rounding, without bias.

    Args:
        in_features: number of inputs, in [-1, 1]; they are rounded to `bits_a`.
        out_features: number of outputs.
        bits_w: bits of the weights that multiply.
        bits_a: bits of inputs and outputs.
        bits_e: bits of errors.
        bits_g: bits of the stored weights.
        activation: False for the last layer, which returns its sums.

    Raises:
        ValueError: bits outside 2..8, inputs of another shape, or sums that could overflow 32 bits.
    """

    def __init__(
        self, in_features: int, out_features: int, bits_w: int = 2, bits_a: int = 8, bits_e: int = 8, *, bits_g: int = 8, activation=True
    ):
        super().__init__((out_features, in_features), (bits_w, bits_a, bits_e, bits_g), activation, pool=1)

    def _output(self, x: Tensor, w: Tensor) -> Tensor:
        return _product(x, w.mT)

    def _input_error(self, e: Tensor, w: Tensor, shape: torch.Size) -> Tensor:
        return _product(e, w)

    def _gradient(self, e: Tensor, x: Tensor) -> Tensor:
        return _product(e.mT, x)


class WAGEConv2d(_WAGELayer):
    """Convolution of integers, ``[batch, in, H, W] -> [batch, out, OH, OW]``, with pooling, rectifier and rounding, without bias.

    Args:
        in_channels: of inputs in [-1, 1]; they are rounded to `bits_a`.
        out_channels: number of filters.
        kernel_size: side of the window, or both sides.
        stride: of the windows.
        padding: with zeros.
        bits_w: bits of the weights that multiply.
        bits_a: bits of inputs and outputs.
        bits_e: bits of errors.
        bits_g: bits of the stored weights.
        activation: False for the last layer, which returns its sums.
        pool: side of the squares whose maximum is kept.

    Raises:
        ValueError: bits outside 2..8, inputs of another shape, or sums that could overflow 32 bits.
    """

    def __init__(
        self,
        in_channels,
        out_channels,
        kernel_size,
        stride=1,
        padding=0,
        bits_w=2,
        bits_a=8,
        bits_e=8,
        *,
        bits_g=8,
        activation=True,
        pool=1,
    ):
        self.kernel_size, self.stride, self.padding = _pair(kernel_size), _pair(stride), _pair(padding)
        super().__init__((out_channels, in_channels, *self.kernel_size), (bits_w, bits_a, bits_e, bits_g), activation, pool)

    def _output(self, x: Tensor, w: Tensor) -> Tensor:
        cols = windows(x, self.kernel_size, self.stride, self.padding)  # [B, C kh kw, OH, OW]
        return _product(w.flatten(1), cols.flatten(2)).unflatten(2, cols.shape[2:])

    def _input_error(self, e: Tensor, w: Tensor, shape: torch.Size) -> Tensor:
        cols = _product(w.flatten(1).mT, e.flatten(2)).unflatten(2, e.shape[2:])  # [B, C kh kw, OH, OW]
        _check_sum(w[0].numel() * w.shape[0], 127 * 2 ** (self.bits_w - 1))
        return sum_windows(cols, shape, self.kernel_size, self.stride, self.padding)

    def _gradient(self, e: Tensor, x: Tensor) -> Tensor:
        cols = windows(x, self.kernel_size, self.stride, self.padding).flatten(2)
        _check_sum(cols.shape[0] * cols.shape[2], 127 * 127)
        each = _product(e.flatten(2), cols.mT)  # [B, O, C kh kw]
        return each.sum(0, dtype=torch.int32).view(self.weight.shape)


class _Products(Function):
    """A layer's three products of integers, with pooling, rectifier, clipping and rounding."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor, layer: WAGELinear | WAGEConv2d) -> Tensor:
        a, w = _to_int8(x, layer.bits_a), layer.quantized_weight()
        acc = layer._output(a, w)  # int32, in units of sigma(k_A) sigma(k_W)
        ctx.layer, ctx.full = layer, acc.shape
        where = acc.new_empty(0, dtype=torch.uint8)
        if layer.pool > 1:
            acc, where = _pool(acc, layer.pool)
        if not layer.activation:
            ctx.save_for_backward(a, w, where, acc.new_empty(0, dtype=torch.bool))
            return acc.to(x.dtype) * 2.0 ** (2 - layer.bits_a - layer.bits_w - layer.log2_alpha)
        right, top = layer.log2_alpha + layer.bits_w - 1, 2 ** (layer.bits_a - 1) - 1
        ctx.save_for_backward(a, w, where, (acc > 0) & (acc <= top << right))
        return shift_right(acc, right).clamp_(0, top).to(x.dtype) * 2.0 ** (1 - layer.bits_a)

    @staticmethod
    def backward(ctx: Any, error: Tensor) -> tuple[Tensor | None, None, None]:
        a, w, where, mask = ctx.saved_tensors
        layer = ctx.layer
        e = _normalized(error, layer.bits_e, layer.bits_w)
        if layer.activation:
            e = e * mask
        if layer.pool > 1:
            e = _unpool(e, where, ctx.full, layer.pool)
        if layer.weight.requires_grad:
            g = layer._gradient(e, a)
            layer.weight.grad = g if layer.weight.grad is None else layer.weight.grad.to(torch.int64) + g
        if not ctx.needs_input_grad[0]:
            return None, None, None
        acc = layer._input_error(e, w, a.shape)  # int32, in units of sigma(k_E) sigma(k_W)
        return acc.to(error.dtype) * 2.0 ** (2 - layer.bits_e - layer.bits_w), None, None


def _to_int8(x: Tensor, bits: int) -> Tensor:
    """:func:`quantize` in units; exact for what already is on the grid."""
    top = 2 ** (bits - 1) - 1
    return (x.detach() * 2.0 ** (bits - 1)).round_().clamp_(-top, top).to(torch.int8)


def _normalized(error: Tensor, bits_e: int, bits_w: int) -> Tensor:
    """The error as int8 with its largest magnitude near one: by a shift if it comes from another layer, by a division if from the loss."""
    top = 2 ** (bits_e - 1) - 1
    wide = error * 2.0 ** (bits_e + bits_w - 2)  # undoes the units in which a layer hands on its error
    acc = wide.to(torch.int32)
    largest = float(error.abs().max()) if error.numel() else 0.0
    if not math.isfinite(largest):
        raise ValueError(f"expected finite errors, got a largest magnitude of {largest}: the training has diverged")
    if largest == 0:
        return torch.zeros_like(error, dtype=torch.int8)
    if torch.equal(acc.to(wide.dtype), wide):
        right = _round_log2(int(acc.abs().max())) - (bits_e - 1)
        acc = shift_right(acc, right) if right > 0 else acc << -right
        return acc.clamp_(-top, top).to(torch.int8)
    return _to_int8(error / shift(error.abs().max()), bits_e)


def _update_units(g: Tensor, lr: float, stochastic: bool, generator: torch.Generator | None) -> Tensor:
    """:func:`quantize_gradient` for a gradient of integers, in units: add a random number below the divisor, then shift."""
    size = g.to(torch.int64).abs()
    largest = int(size.max()) if size.numel() else 0
    if largest == 0:
        return torch.zeros_like(size)
    right = _round_log2(largest) - _log2(lr)
    if right <= 0:
        return g.sign() * (size << -right)
    noise = torch.randint(1 << right, g.shape, generator=generator, device=g.device) if stochastic else 1 << (right - 1)
    return g.sign() * ((size + noise) >> right)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` of int8 in int32."""
    _check_sum(a.shape[-1], 127 * 127)
    return integer_matmul(a, b)


def _check_sum(terms: int, largest: int) -> None:
    if terms * largest >= 2**31:
        raise ValueError(f"a sum of {terms} products of magnitude {largest} may overflow 32 bits; expected smaller layers or batches")


def _pool(acc: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Maximum over squares, and which entry it is, 0 to side^2 - 1."""
    rows, cols = acc.shape[2] // side, acc.shape[3] // side
    squares = acc[:, :, : rows * side, : cols * side].unflatten(3, (cols, side)).unflatten(2, (rows, side))
    best, where = squares.transpose(3, 4).flatten(4).max(-1)
    return best, where.to(torch.uint8)


def _unpool(e: Tensor, where: Tensor, shape: torch.Size, side: int) -> Tensor:
    """Each error goes to the entry that was the maximum."""
    out = e.new_zeros(shape)
    rows, cols = e.shape[2] * side, e.shape[3] * side
    for k in range(side * side):
        out[:, :, k // side : rows : side, k % side : cols : side] = e * (where == k)
    return out


def _round_log2(n: int) -> int:
    """``round(log2(n))`` of a positive integer, exactly: is ``n^2`` beyond ``2^(2 floor + 1)``?"""
    floor = n.bit_length() - 1
    return floor + (n * n > 1 << (2 * floor + 1))


def _log2(lr: float) -> int:
    mantissa, exponent = math.frexp(lr)
    if mantissa != 0.5:
        raise ValueError(f"the learning rate must be a power of two, got {lr}")
    return exponent - 1


def _check_bits(bits: int, most: int | None = None) -> None:
    if bits < 2 or (most is not None and bits > most):
        raise ValueError(f"bits must be at least 2{f' and at most {most}' if most else ''}, got {bits}")
