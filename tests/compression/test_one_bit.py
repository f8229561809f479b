"""One bit a weight against plain layers that hold the effective weights; export against the bits themselves."""

from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import conv2d

from dlatlas.compression.one_bit import (
    Export,
    OneBitConv2d,
    OneBitLinear,
    export_bits,
    load_bits,
    one_bit_resnet,
    one_bit_weight,
    sgd_warm_restarts,
)


def test_effective_weights_have_two_values_given_by_the_fan_in():
    w = torch.randn(6, 5, 3, 3)
    w[0, 0, 0, 0] = 0
    q = one_bit_weight(w)
    size = np.sqrt(2 / 45)
    np.testing.assert_allclose(q, size * np.where(w.numpy() >= 0, 1, -1), rtol=1e-6)
    assert q[0, 0, 0, 0] > 0 and len(q.unique()) == 2
    assert torch.equal(one_bit_weight(17 * w), q)
    np.testing.assert_allclose(one_bit_weight(w, "mean").abs(), float(w.abs().mean()) * np.ones(w.shape), rtol=1e-6)
    np.testing.assert_allclose(one_bit_weight(torch.ones(3, 8)), 0.5 * np.ones((3, 8)))


@pytest.mark.parametrize("kind", ["conv", "grouped", "linear"])
def test_gradient_of_the_latent_weight_is_that_of_a_plain_layer(kind):
    torch.manual_seed(0)
    x = torch.randn(3, 4, 6, 6, dtype=torch.float64)
    layer = {
        "conv": partial(OneBitConv2d, 4, 5, 3, padding=1, stride=2),
        "grouped": partial(OneBitConv2d, 4, 6, 3, groups=2),
        "linear": partial(OneBitLinear, 6, 5),
    }[kind]().double()
    assert layer.bias is None
    plain = one_bit_weight(layer.weight).detach().requires_grad_()
    if kind == "linear":
        expected = x @ plain.T
    else:
        expected = conv2d(x, plain, None, layer.stride, layer.padding, 1, layer.groups)
    torch.testing.assert_close(layer(x), expected)
    layer(x).pow(2).sum().backward()
    expected.pow(2).sum().backward()
    torch.testing.assert_close(layer.weight.grad, plain.grad)


def test_layers_take_what_torchs_layers_take():
    assert OneBitConv2d(2, 3, 3, 1, 1, 1, 1, True).bias is not None
    assert OneBitLinear(2, 3, True).bias is not None
    torch.manual_seed(0)
    assert OneBitConv2d(50, 40, 3).weight.detach().std() == pytest.approx((2 / 450) ** 0.5, rel=0.05)


def test_export_packs_signs_and_loading_gives_the_same_logits():
    torch.manual_seed(0)
    net = one_bit_resnet(8, 3)
    x = torch.randn(5, 1, 9, 9)
    for _ in range(3):
        net(x)  # statistics of their own
    out = export_bits(net)
    layer = net[1]
    bits, shape, scale = out["1"]
    assert bits.dtype == torch.uint8 and bits.numel() == -(-27 // 8) and shape == (3, 1, 3, 3)
    signs = [(int(bits[i // 8]) >> (7 - i % 8)) & 1 for i in range(27)]
    assert [2 * s - 1 for s in signs] == layer.weight.detach().flatten().sign().tolist()
    assert scale == pytest.approx(np.sqrt(2 / 9))
    other = one_bit_resnet(8, 3)
    load_bits(other, out)
    assert torch.equal(other.eval()(x), net.eval()(x))
    plain = one_bit_resnet(8, 3)
    load_bits(plain, dict(out))
    assert torch.equal(plain[1].weight.sign(), layer.weight.sign())


def test_size_of_a_file_counts_everything():
    net = nn.Sequential(OneBitLinear(10, 7, True), nn.BatchNorm1d(7, affine=False), nn.Linear(7, 2))
    out = export_bits(net)
    assert isinstance(out, Export) and list(out) == ["0"]
    assert out.bits == 8 * 9 + 32 + 32 * (7 + 7 + 7 + 14 + 2) + 64  # and the 64-bit counter of the normalisation


def test_network_is_the_papers_form():
    net = one_bit_resnet(14, 4, n_classes=3, in_ch=2)
    assert sum(isinstance(m, OneBitConv2d) for m in net.modules()) == 14
    assert not [p for m in net.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()]
    assert net(torch.randn(4, 2, 13, 13)).shape == (4, 3)
    exact = one_bit_resnet(8, 4, conv=partial(nn.Conv2d, bias=False))
    assert not [m for m in exact.modules() if isinstance(m, OneBitConv2d)]


def test_restarts_are_where_the_paper_has_them():
    weight = nn.Parameter(torch.zeros(1))
    optimizer, schedule = sgd_warm_restarts([weight], steps_per_epoch=5)
    rates = []
    for _ in range(5 * 31):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    jumps = [i / 5 for i in range(1, len(rates)) if rates[i] > rates[i - 1]]
    assert jumps == [2, 6, 14, 30]
    assert rates[0] == pytest.approx(0.1) and rates[10] == pytest.approx(0.1) and min(rates) < 3e-3


def test_it_trains():
    torch.manual_seed(0)
    y = torch.randint(2, (128,))
    x = torch.randn(128, 1, 6, 6) + (2.0 * y - 1).view(-1, 1, 1, 1)
    net = one_bit_resnet(8, 4, n_classes=2)
    optimizer, schedule = sgd_warm_restarts(net.parameters(), 20)
    for _ in range(40):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
        schedule.step()
    assert (net(x).argmax(1) == y).float().mean() > 0.85


@pytest.mark.parametrize(
    "call",
    [
        lambda: one_bit_weight(torch.ones(3)),
        lambda: one_bit_weight(torch.ones(3, 3), "max"),
        lambda: one_bit_resnet(9, 4),
        lambda: one_bit_resnet(8, 0),
        lambda: load_bits(one_bit_resnet(8, 3), export_bits(one_bit_resnet(8, 4))),
        lambda: export_bits(nn.Sequential(nn.Linear(2, 2))),
    ],
)
def test_bad_input_is_refused(call):
    with pytest.raises(ValueError, match=r"got|no OneBit"):
        call()
