"""Shared networks."""

import pytest
import torch
from torch import nn

from dlatlas.kit.nets import activation, mlp, small_cnn


def test_an_mlp_is_the_composition_of_its_layers():
    net = mlp([3, 5, 4, 2], "tanh", final="sigmoid").double()
    x = torch.randn(7, 3, dtype=torch.float64)
    linears = [layer for layer in net if isinstance(layer, nn.Linear)]
    h = x
    for layer in linears[:-1]:
        h = torch.tanh(h @ layer.weight.T + layer.bias)
    expected = torch.sigmoid(h @ linears[-1].weight.T + linears[-1].bias)
    torch.testing.assert_close(net(x), expected)


def test_a_two_size_mlp_is_linear_and_bias_can_be_left_out():
    net = mlp([3, 2], bias=False)
    assert [tuple(p.shape) for p in net.parameters()] == [(2, 3)]


def test_residual_layers_add_their_input_where_widths_agree():
    net = mlp([2, 3, 3, 1], "linear", residual=True)
    for p in net.parameters():
        nn.init.zeros_(p)
    nn.init.ones_(net[0].weight)
    nn.init.ones_(net[-1].weight)
    assert net(torch.ones(1, 2)).item() == 6  # the zero residual block passes [2, 2, 2] on


def test_norms_and_custom_activations():
    assert any(isinstance(m, nn.BatchNorm1d) for m in mlp([2, 3, 1], norm="batch"))
    assert any(isinstance(m, nn.LayerNorm) for m in mlp([2, 3, 1], norm="layer"))
    assert torch.equal(activation(torch.sin)(torch.ones(1)), torch.sin(torch.ones(1)))
    assert isinstance(activation(nn.ReLU), nn.ReLU)


@pytest.mark.parametrize(
    "call",
    [
        lambda: mlp([3]),
        lambda: mlp([3, 0, 1]),
        lambda: mlp([3, 2, 1], norm="weight"),
        lambda: mlp([3, 2, 1], "swiglu"),
        lambda: activation(3),
        lambda: small_cnn(width=0),
        lambda: small_cnn(pool="median"),
    ],
)
def test_bad_input(call):
    with pytest.raises(ValueError, match=r"got|unknown"):
        call()


@pytest.mark.parametrize(("size", "pool"), [(28, "max"), (8, "avg"), (16, nn.AvgPool2d(3, 2))])
def test_the_cnn_ends_in_its_head(size, pool):
    net = small_cnn(in_ch=3, n_classes=4, width=2, size=size, pool=pool)
    x = torch.randn(5, 3, size, size)
    assert net.features(x).shape == (5, 8)
    torch.testing.assert_close(net(x), net.head(net.features(x)))
