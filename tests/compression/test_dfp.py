"""Shared exponents against sums of Python's unbounded integers, layers against torch's own in double precision."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import conv2d, fold, unfold

from dlatlas.compression.dfp import (
    DFP,
    DFPConv2d,
    DFPLinear,
    convert,
    dfp,
    dfp_add,
    dfp_matmul,
    downconvert,
    integer_matmul,
    shift_right,
    sum_windows,
    windows,
)


@pytest.mark.parametrize("bits", [2, 3, 4, 8, 16])
@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 3e30])
def test_error_is_at_most_half_a_unit_and_the_largest_number_uses_the_range(bits, scale):
    x = torch.randn(500, generator=torch.Generator().manual_seed(bits)) * scale
    got = dfp(x, bits)
    unit = 2.0**got.exponent
    assert got.data.dtype == torch.int16
    assert (got.data.double() * unit - x.double()).abs().max() <= unit / 2
    top = int(got.data.abs().max())
    assert 2 ** (bits - 2) <= top <= 2 ** (bits - 1) - 1
    torch.testing.assert_close(got.dequantize().double(), got.data.double() * unit, rtol=0, atol=0)


def test_exponent_is_that_of_the_equation():
    for largest in (1.0, 1.5, 0.7, 100.0, 3e-5):
        x = torch.tensor([largest, -largest / 3, 0.0])
        exponent = int(np.floor(np.log2(largest))) - 14
        got = dfp(x)
        assert got.exponent == exponent
        np.testing.assert_array_equal(got.data, np.round(x.double().numpy() * 2.0**-exponent))


def test_powers_of_two_are_exact_and_zeros_have_exponent_zero():
    powers = 2.0 ** torch.arange(-7, 7)
    assert torch.equal(dfp(powers).dequantize(), powers)
    assert dfp(torch.zeros(3)).exponent == 0 and not dfp(torch.zeros(3)).data.any()
    assert dfp(torch.zeros(0, 3)).data.shape == (0, 3)


def test_exponent_grows_where_rounding_would_leave_the_range():
    got = dfp(torch.tensor([1.99999, -1.0]), 4)  # 7.99996 quarters are not 8 quarters in four bits
    assert got.data.tolist() == [4, -2] and got.exponent == -1


def integers(rows, cols, seed, top=32767):
    return torch.randint(-top, top + 1, (rows, cols), generator=torch.Generator().manual_seed(seed), dtype=torch.int32).to(torch.int16)


@pytest.mark.parametrize("chain", [1, 7, 256, 511])
def test_products_are_those_of_unbounded_integers(chain):
    a, b = integers(3, 700, 0), integers(700, 4, 1)
    exact = a.numpy().astype(object) @ b.numpy().astype(object)
    size = np.abs(a.numpy().astype(object)) @ np.abs(b.numpy().astype(object))
    got = dfp_matmul(DFP(a, -3), DFP(b, 5), chain).double().numpy()
    # What float32 rounds when it adds the chains is all that is lost.
    error = np.abs(got / 4 - exact.astype(float)) / size.astype(float)
    assert error.max() < 700 / chain * 2.0**-23 + 2.0**-22


def test_one_chain_is_the_exact_sum_rounded_to_float32():
    a, b = integers(5, 300, 2, 1023), integers(300, 6, 3, 1023)
    exact = torch.from_numpy((a.numpy().astype(object) @ b.numpy().astype(object)).astype(np.int64))
    assert torch.equal(dfp_matmul(DFP(a, 0), DFP(b, 0), 300), exact.float())


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("chain", [1, 256, 511])
def test_worst_case_does_not_overflow(chain, sign):
    full = torch.full((1, 4096), 32767, dtype=torch.int16)
    got = dfp_matmul(DFP(full, 0), DFP(sign * full.mT, 0), chain)
    assert abs(float(got) / (sign * 4096 * 32767**2) - 1) < 1e-5


@pytest.mark.parametrize("left", [127, 128, -128, 32640, 32767, -32767, -32768])
def test_bytes_of_the_worst_operand_do_not_overflow(left):
    a = torch.full((1, 511), left, dtype=torch.int16)
    b = torch.full((511, 1), -32768, dtype=torch.int16)
    assert abs(float(dfp_matmul(DFP(a, 0), DFP(b, 0), 511)) / (511 * left * -32768) - 1) < 1e-6


def test_sum_shifts_the_smaller_exponent():
    a, b = DFP(torch.tensor([1000, -7], dtype=torch.int16), 4), DFP(torch.tensor([8, 40], dtype=torch.int16), 1)
    assert dfp_add(a, b).dequantize().tolist() == dfp_add(b, a).dequantize().tolist() == [16 * 1001, 16 * -2]
    full = DFP(torch.tensor([32767], dtype=torch.int16), 0)
    assert dfp_add(full, full).dequantize().item() == 65534
    assert dfp_add(full, DFP(full.data, -200)).dequantize().item() == 32767


@pytest.mark.parametrize("bits", [2, 5, 16])
def test_downconversion_keeps_the_upper_bits(bits):
    for top in (1, 127, 2**15 - 1, 2**15, 65535, 2**30 + 12345, 2**31 - 1):
        acc = torch.tensor([top, -top // 3, 0, 1], dtype=torch.int32)
        got = downconvert(acc, -9, bits)
        shift = got.exponent + 9
        assert shift >= 0 and got.data.abs().max() <= 2 ** (bits - 1) - 1
        assert shift == 0 or got.data.abs().max() >= 2 ** (bits - 2)  # one shift less would not fit, or would only by luck of rounding
        assert all(abs(int(i) * 2**shift - int(a)) <= 2**shift / 2 for i, a in zip(got.data, acc))
    lowest = downconvert(torch.tensor([-(2**31)], dtype=torch.int32), 0)
    assert lowest.dequantize().item() == -(2.0**31)


def test_shift_rounds_as_numpy_does():
    i = torch.arange(-300, 301)
    for bits in range(7):
        np.testing.assert_array_equal(shift_right(i, bits), np.round(i.numpy() / 2**bits))


@pytest.mark.parametrize(("kernel", "stride", "padding"), [((3, 3), (1, 1), (0, 0)), ((2, 3), (2, 1), (1, 0)), ((3, 2), (2, 3), (1, 2))])
def test_windows_and_their_sums_are_unfold_and_fold(kernel, stride, padding):
    x = torch.randn(2, 3, 7, 8)
    cols = windows(x, kernel, stride, padding)
    assert torch.equal(cols.flatten(2), unfold(x, kernel, stride=stride, padding=padding))
    back = sum_windows(cols, x.shape, kernel, stride, padding)
    torch.testing.assert_close(back, fold(cols.flatten(2), (7, 8), kernel, stride=stride, padding=padding))


def reference(function, *tensors):
    """Output and gradients of a float64 function of the rounded numbers, for a rounded gradient from above."""
    x, w, g = (dfp(t).dequantize().double() for t in tensors)
    x.requires_grad_(), w.requires_grad_()
    out = function(x, w)
    return out, *torch.autograd.grad(out, (x, w), g)


@pytest.mark.parametrize(("stride", "padding"), [(1, 0), (2, 1), ((1, 2), (0, 2))])
def test_convolution_has_the_three_products_of_the_rounded_numbers(stride, padding):
    torch.manual_seed(0)
    layer = DFPConv2d(3, 4, 3, stride, padding, bias=False)
    x = torch.randn(2, 3, 9, 8, requires_grad=True)
    out = layer(x)
    g = 1e-6 * torch.randn_like(out)
    got = (out, *torch.autograd.grad(out, (x, layer.weight), g))
    want = reference(lambda x, w: conv2d(x, w, stride=stride, padding=padding), x, layer.weight, g)
    for a, b in zip(got, want):
        assert (a - b).abs().max() < 1e-5 * b.abs().max()


def test_linear_layer_has_the_three_products_of_the_rounded_numbers():
    torch.manual_seed(0)
    layer = DFPLinear(600, 7)
    x = torch.randn(2, 5, 600, requires_grad=True)
    out = layer(x)
    g = torch.randn_like(out)
    got = (out - layer.bias, *torch.autograd.grad(out, (x, layer.weight), g))
    want = reference(lambda x, w: x @ w.mT, x, layer.weight, g)
    for a, b in zip(got, want):
        assert (a - b).abs().max() < 1e-5 * b.abs().max()


@pytest.mark.parametrize(("make", "shape"), [(lambda: DFPLinear(6, 4), (6,)), (lambda: DFPConv2d(2, 3, 3, 2, 1), (2, 7, 6))])
def test_one_input_without_a_batch_axis_is_a_batch_of_one(make, shape):
    layer, alone = make(), torch.randn(shape, requires_grad=True)
    batch = alone.detach()[None].requires_grad_()
    out, outs = layer(alone), layer(batch)
    assert torch.equal(out, outs[0]) and outs.shape == (1, *out.shape)
    g = torch.randn_like(out)
    for a, b in zip(
        torch.autograd.grad(out, (alone, *layer.parameters()), g), torch.autograd.grad(outs, (batch, *layer.parameters()), g[None])
    ):
        torch.testing.assert_close(a, b.view_as(a))
    peer = nn.Linear(6, 4) if isinstance(layer, DFPLinear) else nn.Conv2d(2, 3, 3, 2, 1)
    peer.load_state_dict(layer.state_dict())
    torch.testing.assert_close(out, peer(alone), rtol=1e-3, atol=1e-3)


def test_no_examples_are_no_error():
    assert DFPLinear(6, 4)(torch.zeros(2, 0, 6)).shape == (2, 0, 4)


def test_what_is_kept_for_the_backward_pass_is_int16():
    layer = DFPLinear(5, 3)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(torch.randn(4, 5))
    assert [t.dtype for t in kept] == [torch.int16] * 2


def test_few_bits_are_coarser():
    torch.manual_seed(0)
    x, errors = torch.randn(8, 50), []
    layer = nn.Linear(50, 20)
    for bits in (4, 8, 12, 16):
        twin = DFPLinear(50, 20, bits=bits)
        twin.load_state_dict(layer.state_dict())
        errors.append(float((twin(x) - layer(x)).detach().norm()))
    assert all(a > 8 * b for a, b in pairwise(errors))


def test_conversion_keeps_parameters_and_replaces_nested_layers():
    net = nn.Sequential(nn.Conv2d(1, 2, 3, 2, 1), nn.Sequential(nn.Flatten(), nn.Linear(18, 4, bias=False)))
    weights = list(net.parameters())
    x = torch.randn(3, 1, 5, 5)
    before = net(x)
    assert convert(net, 12) is net
    assert isinstance(net[0], DFPConv2d) and isinstance(net[1][1], DFPLinear) and net[0].bits == net[1][1].bits == 12
    assert all(a is b for a, b in zip(weights, net.parameters()))
    torch.testing.assert_close(net(x), before, atol=0.02, rtol=0.02)


@pytest.mark.parametrize(
    "bad",
    [
        lambda: dfp(torch.ones(2), 1),
        lambda: dfp(torch.ones(2), 17),
        lambda: dfp(torch.tensor([1.0, float("nan")])),
        lambda: dfp(torch.tensor([1.0, -float("inf")])),
        lambda: dfp_matmul(torch.ones(2, 3), torch.ones(2, 3)),
        lambda: dfp_matmul(torch.ones(3), torch.ones(3)),
        lambda: dfp_matmul(torch.ones(2, 3), torch.ones(3, 2), 0),
        lambda: dfp_matmul(torch.ones(2, 3), torch.ones(3, 2), 512),
        lambda: dfp_add(dfp(torch.ones(2)), dfp(torch.ones(3))),
        lambda: downconvert(torch.ones(2), 0),
        lambda: downconvert(torch.ones(2, dtype=torch.int32), 0, 1),
        lambda: DFPLinear(2, 2, bits=1),
        lambda: DFPConv2d(2, 2, 1, bits=17),
        lambda: DFPConv2d(2, 2, 1, groups=2),
        lambda: DFPConv2d(2, 2, 3, padding="same"),
        lambda: convert(nn.Sequential(nn.Conv2d(2, 2, 1, groups=2))),
        lambda: DFPLinear(6, 4)(torch.ones(5)),
        lambda: DFPLinear(6, 4)(torch.ones(())),
        lambda: DFPConv2d(2, 3, 3)(torch.ones(7, 6)),
        lambda: DFPConv2d(2, 3, 3)(torch.ones(1, 1, 2, 7, 6)),
        lambda: DFPConv2d(2, 3, 3)(torch.ones(4, 3, 7, 6)),
    ],
)
def test_bad_input(bad):
    with pytest.raises(ValueError, match="got"):
        bad()


@pytest.mark.parametrize("doubles", [None, True])
def test_both_ways_to_multiply_are_exact_up_to_the_last_integer(doubles):
    a, b = integers(4, 511, 4, 127), integers(511, 3, 5)
    exact = a.numpy().astype(np.int64) @ b.numpy().astype(np.int64)
    assert np.array_equal(integer_matmul(a, b, doubles), exact)
    most = integer_matmul(torch.full((1, 511), -128), torch.full((511, 1), -32768), doubles)
    assert most.dtype == torch.int32 and most.item() == 511 * 2**22 > 2**30


def test_conversion_of_a_layer_of_shared_layers_and_of_modes():
    layer = nn.Linear(3, 3)
    assert isinstance(convert(layer), DFPLinear) and convert(layer).weight is layer.weight
    net = convert(nn.Sequential(layer, nn.Tanh(), layer).eval())
    assert net[0] is net[2] and isinstance(net[0], DFPLinear) and not net[0].training
