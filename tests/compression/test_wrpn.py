"""WRPN's grid against a plain transcription, its gradients against the clip mask, its cost against sums by hand."""

from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from dlatlas.compression.kit.nets import lenet, mlp, small_resnet
from dlatlas.compression.wrpn import cost, fill_range, quantize_activation, quantize_weight, widened, wrpn

LINE = torch.linspace(-1.7, 1.7, 1361, dtype=torch.float64)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_values_are_those_of_the_equations(bits):
    a = LINE.numpy()
    n = 2**bits - 1
    np.testing.assert_allclose(quantize_activation(LINE, bits), np.round(n * np.clip(a, 0, 1)) / n)
    if bits > 1:
        n = 2 ** (bits - 1) - 1
        np.testing.assert_allclose(quantize_weight(LINE, bits), np.round(n * np.clip(a, -1, 1)) / n)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_grids_have_all_their_values_and_rounding_twice_changes_nothing(bits):
    w, a = quantize_weight(LINE, bits), quantize_activation(LINE, bits)
    assert len(w.unique()) == 2**bits - 1 and len(a.unique()) == 2**bits
    assert torch.equal(quantize_weight(w, bits), w) and torch.equal(quantize_activation(a, bits), a)
    assert torch.equal(quantize_weight(-LINE, bits), -w)  # ties are rounded the same way on both sides


def test_many_bits_are_clipping_alone():
    assert (quantize_weight(LINE, 16) - LINE.clamp(-1, 1)).abs().max() < 1e-4
    assert (quantize_activation(LINE, 16) - LINE.clamp(0, 1)).abs().max() < 1e-4


@pytest.mark.parametrize(("function", "low"), [(quantize_weight, -1), (quantize_activation, 0)])
def test_gradient_is_one_inside_the_range_and_zero_outside(function, low):
    x = torch.tensor([low - 0.5, low - 1e-6, low + 1e-6, 0.3, 0.5, 1 - 1e-6, 1 + 1e-6, 2.0], dtype=torch.float64, requires_grad=True)
    up = torch.arange(1.0, 9.0, dtype=torch.float64)
    function(x, 3).backward(up)
    inside = torch.tensor([0, 0, 1, 1, 1, 1, 0, 0], dtype=torch.float64)
    assert torch.equal(x.grad, up * inside)


def test_only_inner_layers_are_quantised():
    torch.manual_seed(0)
    net = mlp([6, 5, 4, 3])
    first, inner, last = net[0], net[2], net[4]
    weight = inner.weight.detach().clone()
    assert wrpn(net, 3, 2) is net
    x = torch.randn(7, 6)
    h = torch.relu(first(x))
    h = torch.relu(nn.functional.linear(quantize_activation(h, 2), quantize_weight(weight, 3), inner.bias))
    torch.testing.assert_close(net(x), last(h))
    assert torch.equal(inner.parametrizations.weight.original, weight)


def test_fill_range_fills_and_only_scales_the_output():
    torch.manual_seed(0)
    net = lenet(0.5, norm=True)
    for norm in net.norms:
        nn.init.normal_(norm.weight, 1, 0.1)
        nn.init.normal_(norm.bias, 0, 0.1)
    x = torch.randn(64, 1, 28, 28)
    before = net(x) - net.fc3.bias
    fill_range(net, sigmas=4)
    assert [float(layer.weight.detach().abs().max()) for layer in (net.conv2, net.fc1, net.fc2)] == pytest.approx([1, 1, 1])
    torch.testing.assert_close(4 * (net(x) - net.fc3.bias), before, rtol=2e-2, atol=5e-3)


def test_without_filling_two_bits_leave_nothing():
    torch.manual_seed(0)
    assert wrpn(lenet(0.5), 2, 2).fc1.weight.abs().sum() == 0
    assert (wrpn(fill_range(lenet(0.5)), 2, 2).fc1.weight != 0).float().mean() > 0.3


def test_widening_multiplies_every_width():
    assert widened(partial(lenet, width=0.5), 3).fc1.weight.shape == lenet(1.5).fc1.weight.shape
    assert widened(lenet).conv2.weight.shape == (32, 12, 5, 5)
    assert widened(partial(small_resnet, width=4), 2).conv.weight.shape[0] == 8
    assert widened(lambda w: nn.Linear(int(w), 1), 5).in_features == 5


def test_cost_counts_multiplications():
    macs = [6 * 25 * 24 * 24, 16 * 6 * 25 * 8 * 8, 256 * 120, 120 * 84, 84 * 10]
    inputs = 6 * 12 * 12 + 256 + 120 + 84
    found = cost(lenet(), (1, 28, 28), 4, 2)
    assert found == {
        "macs": sum(macs),
        "bit_ops": sum(macs) * 8,
        "bit_ops_inner": sum(macs[1:-1]) * 8,
        "bit_ops_fp32_ends": sum(macs[1:-1]) * 8 + (macs[0] + macs[-1]) * 1024,
        "activation_bits": inputs * 2,
    }
    assert cost(wrpn(lenet(), 4, 4), (1, 28, 28), 4, 2) == found
    net = lenet(norm=True).train()
    cost(net, (1, 28, 28), 4, 4)
    assert net.training and not net.conv1._forward_hooks and net.norms[0].num_batches_tracked == 0
    narrow, wide = (cost(mlp([8, n, n, n, 8]), (8,), 4, 4)["bit_ops_inner"] for n in (16, 32))
    assert wide == 4 * narrow


@pytest.mark.parametrize(
    "call",
    [
        lambda: quantize_weight(LINE, 1),
        lambda: quantize_activation(LINE, 0),
        lambda: wrpn(lenet(), 1, 4),
        lambda: wrpn(lenet(), 2, 0),
        lambda: widened(lenet, 0),
        lambda: fill_range(lenet(), 0),
    ],
)
def test_bad_input_is_refused(call):
    with pytest.raises(ValueError, match="got"):
        call()
