"""Interpolates lie on their segments; gradient norms are those of every single example."""

import pytest
import torch
from torch import nn

from dlatlas.gans.kit.penalty import gradient_norms, interpolates


def test_interpolates_lie_on_the_segment_of_their_own_pair():
    real, fake = torch.randn(50, 2, 3), torch.randn(50, 2, 3, requires_grad=True)
    x = interpolates(real, fake, torch.Generator().manual_seed(0))
    t = ((x - fake) / (real - fake)).flatten(1)
    assert (t - t[:, :1]).abs().max() < 1e-3 and t.min() >= 0 and t.max() <= 1 and t[:, 0].std() > 0.2
    assert not x.requires_grad and torch.equal(x, interpolates(real, fake, torch.Generator().manual_seed(0)))
    with pytest.raises(ValueError, match="equal shapes"):
        interpolates(real, fake[:4])


def test_norms_of_single_examples_over_all_features():
    critic = nn.Sequential(nn.Flatten(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1)).double()
    x = torch.randn(7, 2, 3, dtype=torch.float64)
    expected = [torch.autograd.functional.jacobian(lambda z: critic(z[None]).sum(), row).norm() for row in x]
    torch.testing.assert_close(gradient_norms(critic, x), torch.stack(expected))


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
