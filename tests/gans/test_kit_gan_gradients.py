"""Gradients with respect to the input, sample by sample."""

import pytest
import torch
from torch import nn

from dlatlas.gans.kit.gradients import gradient_norms, input_gradients, interpolates
from dlatlas.kit.nets import mlp

X = torch.randn(5, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_each_sample_by_itself():
    net = mlp([6, 7, 1], "tanh").double()

    def critic(x):
        return net(x.flatten(1))

    ours = input_gradients(critic, X)
    for b in range(5):
        theirs = torch.autograd.functional.jacobian(lambda x: critic(x[None]).squeeze(), X[b])
        torch.testing.assert_close(ours[b].detach(), theirs)
    torch.testing.assert_close(gradient_norms(critic, X), ours.flatten(1).norm(dim=1))


def test_graph_on_request_and_none_to_the_samples():
    a = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    x = X.clone().requires_grad_()
    gradient_norms(lambda x: a * x.sum((1, 2)), x).sum().backward()
    assert a.grad.item() == pytest.approx(5 * 6**0.5) and x.grad is None
    assert not input_gradients(lambda x: a * x.sum((1, 2)), X, create_graph=False).requires_grad
    with torch.no_grad():
        assert (input_gradients(lambda x: a * x.sum((1, 2)), X, create_graph=False) == 2).all()


def test_flat_critics():
    bias = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    for critic in (lambda x: torch.ones(len(x)), lambda x: bias.expand(len(x)), lambda x: 0 * x.sum((1, 2))):
        assert (input_gradients(critic, X) == 0).all()
        torch.testing.assert_close(gradient_norms(critic, X).detach(), torch.full((5,), 1e-6, dtype=torch.float64))


def test_bad_input():
    with pytest.raises(ValueError, match="one score for each of 5"):
        input_gradients(lambda x: x.flatten(1), X)
    with pytest.raises(ValueError, match="one score"):
        gradient_norms(lambda x: x.sum(), X)


def test_the_norm_can_be_trained():
    critic = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 1)).double()
    x = torch.randn(3, 2, dtype=torch.float64)
    params = tuple(critic.parameters())[:3]

    def norms(*values):
        return gradient_norms(lambda z: torch.func.functional_call(critic, dict(zip(("0.weight", "0.bias", "2.weight"), values)), z), x)

    assert torch.autograd.gradcheck(norms, params)


def test_a_flat_critic_has_a_finite_derivative():
    w = torch.zeros(2, requires_grad=True)
    gradient_norms(lambda z: z @ w, torch.randn(4, 2)).sum().backward()
    assert torch.isfinite(w.grad).all()


def test_interpolates_lie_on_the_segment_of_their_own_pair():
    real, fake = torch.randn(50, 2, 3), torch.randn(50, 2, 3, requires_grad=True)
    x = interpolates(real, fake, torch.Generator().manual_seed(0))
    t = ((x - fake) / (real - fake)).flatten(1)
    assert (t - t[:, :1]).abs().max() < 1e-3 and t.min() >= 0 and t.max() <= 1 and t[:, 0].std() > 0.2
    assert not x.requires_grad and torch.equal(x, interpolates(real, fake, torch.Generator().manual_seed(0)))
    with pytest.raises(ValueError, match="equal shapes"):
        interpolates(real, fake[:4])
