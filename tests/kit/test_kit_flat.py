"""All parameters as one vector."""

import pytest
import torch
from torch import nn

from dlatlas.kit.flat import flat_grad, flat_params, set_flat_params


def net():
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()


def test_round_trip_keeps_identity_and_shares_no_memory():
    model = net()
    ids, vector = [id(p) for p in model.parameters()], flat_params(model)
    assert vector.shape == (21,) and not vector.requires_grad
    set_flat_params(model, vector * 2)
    torch.testing.assert_close(flat_params(model), vector * 2)
    assert ids == [id(p) for p in model.parameters()]
    before = flat_params(model)
    vector.zero_()
    before.mul_(0)
    assert flat_params(model).abs().sum() > 0


def test_gradient_is_the_concatenation_of_backward():
    model, x = net(), torch.randn(5, 3, dtype=torch.float64)
    grad = flat_grad(model(x).pow(2).mean(), model.parameters())
    model(x).pow(2).mean().backward()
    torch.testing.assert_close(grad, torch.cat([p.grad.reshape(-1) for p in model.parameters()]))


def test_second_derivatives_and_unused_parameters():
    x, unused = torch.tensor([2.0, 3.0], requires_grad=True), torch.ones(2, requires_grad=True)
    grad = flat_grad((x**3).sum(), [x, unused], create_graph=True)
    torch.testing.assert_close(grad, torch.tensor([12.0, 27.0, 0.0, 0.0]))
    torch.testing.assert_close(flat_grad(grad.sum(), [x]), torch.tensor([12.0, 18.0]))


def test_bad_input():
    with pytest.raises(ValueError, match="21 parameters"):
        set_flat_params(net(), torch.zeros(20))
    with pytest.raises(ValueError, match="scalar"):
        flat_grad(torch.ones(2, requires_grad=True) * 2, [])
