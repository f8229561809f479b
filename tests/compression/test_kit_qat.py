"""Quantisation-aware training against the same network computed by hand; storage against sums by hand."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import linear

from dlatlas.compression.kit.nets import lenet, mlp
from dlatlas.compression.kit.qat import choose_layers, filled, freeze_quantized, layers_of, plain_layer, quantize_aware, quantized_bits
from dlatlas.compression.kit.ste import ste_replace, ste_round, ste_sign


def ternary(w):
    return ste_replace(w, 0.5 * w.sign() * (w.abs() > 0.2))


def coarse(a):
    return ste_round(4 * a) / 4


class Grid(nn.Module):
    def __init__(self):
        super().__init__()
        self.step = nn.Parameter(torch.tensor(0.25))

    def forward(self, w):
        return self.step * ste_round(w / self.step)


def test_inner_layers_compute_with_quantised_weights_and_inputs():
    net = mlp([6, 5, 4, 3])
    plain = copy.deepcopy(net)
    assert quantize_aware(net, ternary, coarse) is net
    x = torch.randn(8, 6)
    h = torch.relu(plain[0](x))
    h = torch.relu(linear(coarse(h), ternary(plain[2].weight), plain[2].bias))
    torch.testing.assert_close(net(x), plain[4](h))
    assert torch.equal(net[2].parametrizations.weight.original, plain[2].weight)
    assert net[2].weight.unique().tolist() == [-0.5, 0, 0.5]


def test_the_latent_weight_gets_the_straight_gradient():
    net = quantize_aware(mlp([6, 5, 4, 3]), ternary)
    x = torch.randn(8, 6)
    weight = net[2].weight.detach().requires_grad_()
    net[4](torch.relu(linear(torch.relu(net[0](x)), weight, net[2].bias))).pow(2).sum().backward()
    net.zero_grad()
    net(x).pow(2).sum().backward()
    torch.testing.assert_close(net[2].parametrizations.weight.original.grad, weight.grad)


def test_names_and_places_to_skip():
    net = lenet()
    assert list(layers_of(net)) == ["conv1", "conv2", "fc1", "fc2", "fc3"]
    quantize_aware(net, ternary, skip=("first", "fc2"))
    assert [hasattr(layer, "parametrizations") for layer in layers_of(net).values()] == [False, True, True, False, True]
    quantize_aware(copy.deepcopy(lenet()), ternary, skip=())


def test_a_frozen_network_computes_the_same_without_latent_weights():
    net = quantize_aware(lenet(), ternary, coarse)
    x = torch.randn(3, 1, 28, 28)
    before, bits = net(x), quantized_bits(net)
    for frozen in (freeze_quantized(copy.deepcopy(net)), freeze_quantized(net)):  # the copy first: the original must survive it
        torch.testing.assert_close(frozen(x), before)
        assert not any("parametrizations" in name for name in frozen.state_dict())
        assert quantized_bits(frozen) == bits


def test_only_own_parametrisations_are_frozen():
    net = mlp([2, 2, 2, 2])
    nn.utils.parametrizations.spectral_norm(net[0])
    freeze_quantized(quantize_aware(net, ternary))
    assert hasattr(net[0], "parametrizations")
    assert not hasattr(net[2], "parametrizations")


def test_a_quantiser_with_parameters_is_one_for_each_layer_and_trains():
    shared = Grid()
    net = quantize_aware(mlp([4, 4, 4, 4, 2]), shared, Grid())
    names = [name for name, _ in net.named_parameters() if name.endswith("step")]
    assert len(names) == 4
    net(torch.randn(3, 4)).sum().backward()
    steps = [p for name, p in net.named_parameters() if name.endswith("step")]
    assert all(p.grad is not None and p is not shared.step for p in steps)


def test_bits_by_hand():
    net = mlp([10, 8, 7], bias=True)  # no inner layer: all raw
    assert quantized_bits(net) == 32 * (80 + 8 + 56 + 7)
    with torch.no_grad():
        net[0].weight.copy_(0.3 * ste_sign(net[0].weight))
    assert quantized_bits(net) == (80 + 32) + 32 * (8 + 56 + 7)  # one bit a weight and one scale
    with torch.no_grad():
        net[0].weight[0, 0] = 0.0
    assert quantized_bits(net) == (160 + 32) + 32 * (8 + 56 + 7)  # ternary: two bits and one scale
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([1.0, 2.0, 3.0, 5.0, 8.0]).repeat(16).view(8, 10))
    assert quantized_bits(net) == (3 * 80 + 5 * 32) + 32 * (8 + 56 + 7)  # not symmetric: five values


def test_a_codebook_a_row_is_found():
    layer = nn.Linear(512, 6, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.rand(6, 1) * ste_sign(layer.weight))
    assert quantized_bits(layer) == 6 * (512 + 32)


def test_normalisation_counts_tied_weights_count_once_and_counters_do_not():
    assert quantized_bits(nn.BatchNorm1d(5)) == 32 * 20
    net = nn.Module()
    net.embedding, net.decoder = nn.Embedding(9, 4), nn.Linear(4, 9)
    net.decoder.weight = net.embedding.weight
    assert quantized_bits(net) == 32 * (36 + 9)
    assert quantized_bits(nn.Linear(4, 3).double()) == 64 * 15


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: quantize_aware(lenet()), "neither"),
        (lambda: quantize_aware(lenet(), ternary, skip=("fc9",)), "fc9"),
        (lambda: quantize_aware(mlp([2, 3, 2]), ternary), "none is left"),
        (lambda: quantize_aware(nn.ReLU(), ternary), "none is left"),
        (lambda: quantize_aware(quantize_aware(lenet(), ternary), coarse), "already"),
        (lambda: quantize_aware(quantize_aware(lenet(), None, coarse), ternary), "already"),
    ],
)
def test_bad_input(call, match):
    with pytest.raises(ValueError, match=match):
        call()


def test_a_plain_layer_has_the_form_of_its_subclass():
    class Special(nn.Conv2d):
        pass

    layer = Special(4, 6, (3, 1), stride=2, padding=(1, 0), dilation=1, groups=2, bias=False, padding_mode="circular")
    plain = filled(plain_layer(layer), layer.weight, layer.bias)
    x = torch.randn(2, 4, 7, 7)
    assert type(plain) is nn.Conv2d and torch.equal(plain(x), layer(x)) and plain.weight is not layer.weight
    double = nn.Linear(3, 2).double()
    copied = filled(plain_layer(double), double.weight, double.bias)
    assert copied.weight.dtype == torch.float64 and torch.equal(copied.weight, double.weight) and torch.equal(copied.bias, double.bias)


def test_layers_are_chosen_by_place_or_name():
    net = mlp([2, 3, 4, 2])
    assert (
        list(choose_layers(net)) == ["2"]
        and list(choose_layers(net, ())) == ["0", "2", "4"]
        and list(choose_layers(net, "2")) == ["0", "4"]
    )
    with pytest.raises(ValueError, match="none is left"):
        choose_layers(mlp([2, 3, 2]))
    with pytest.raises(ValueError, match="must hold"):
        choose_layers(net, ("middle",))
