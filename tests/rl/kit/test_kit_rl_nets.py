"""Networks and distributions against torch's own."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributions import Categorical, Independent, Normal, TanhTransform, TransformedDistribution

from dlatlas.kit import nets as shared
from dlatlas.rl.kit.nets import ActorCritic, CategoricalPolicy, ConvTrunk, GaussianPolicy, SquashedGaussian, draw, mlp, mode, orthogonal_


def test_mlp_is_the_shared_one_with_a_scaled_head():
    torch.manual_seed(3)
    net = mlp((3, 8, 2), nn.ReLU, layer_norm=True, out_scale=0.5)
    torch.manual_seed(3)
    plain = shared.mlp((3, 8, 2), nn.ReLU, norm="layer")
    x = torch.randn(5, 3)
    torch.testing.assert_close(net(x), 0.5 * plain(x))
    assert [type(layer) for layer in net] == [nn.Linear, nn.LayerNorm, nn.ReLU, nn.Linear]
    assert not mlp((3, 8, 2), out_scale=0.0)(x).any()
    assert isinstance(mlp((3, 4, 1))[1], nn.Tanh)


def test_orthogonal_layers():
    net = orthogonal_(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Conv2d(2, 3, 2)), 0.3)
    for layer in (net[0], net[2]):
        w = layer.weight.flatten(1)
        torch.testing.assert_close(w @ w.T, 0.09 * torch.eye(len(w)))
        assert not layer.bias.any()


def test_squashed_density_against_torch():
    mean, log_std = torch.randn(6, 3, dtype=torch.float64), 0.5 * torch.randn(6, 3, dtype=torch.float64)
    ours = SquashedGaussian(mean, log_std)
    peer = Independent(TransformedDistribution(Normal(mean, log_std.exp()), TanhTransform()), 1)
    a = peer.sample()
    torch.testing.assert_close(ours.log_prob(a), peer.log_prob(a))
    assert ours.batch_shape == (6,) and ours.event_shape == (3,)
    sample, logp = ours.rsample_with_log_prob((11,))
    torch.testing.assert_close(logp, peer.log_prob(sample), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours.mode, torch.tanh(mean))


def test_squashed_density_integrates_to_one_and_survives_the_border():
    a = torch.linspace(-1, 1, 200_003, dtype=torch.float64)[1:-1, None]
    dist = SquashedGaussian(torch.tensor([0.4], dtype=torch.float64), torch.tensor([-0.3], dtype=torch.float64))
    assert torch.trapezoid(dist.log_prob(a).exp(), a[:, 0]).item() == pytest.approx(1, abs=1e-4)
    far = SquashedGaussian(torch.tensor([20.0]), torch.tensor([0.0]))
    sample, logp = far.rsample_with_log_prob()
    assert torch.isfinite(logp) and sample.abs() <= 1
    assert torch.isfinite(far.log_prob(torch.tensor([1.0]))) and torch.isfinite(far.log_prob(torch.tensor([-1.0])))
    assert SquashedGaussian(torch.zeros(1), torch.tensor([99.0])).scale.item() == pytest.approx(math.exp(2))


def test_squashed_samples_carry_gradients_and_take_a_generator():
    mean, log_std = torch.zeros(4, 2, requires_grad=True), torch.zeros(2, requires_grad=True)
    a = SquashedGaussian(mean, log_std).rsample(generator=torch.Generator().manual_seed(1))
    again = SquashedGaussian(mean, log_std).rsample(generator=torch.Generator().manual_seed(1))
    assert torch.equal(a, again)
    a.sum().backward()
    torch.testing.assert_close(mean.grad, 1 - a.detach() ** 2)
    assert log_std.grad.abs().min() > 0


def test_draws_follow_their_distribution():
    g = torch.Generator().manual_seed(0)
    logits = torch.tensor([[0.0, 1.0, -1.0], [2.0, 0.0, 0.0]]).repeat_interleave(20_000, 0)
    a = draw(Categorical(logits=logits), g).view(2, -1)
    for k in range(2):
        share = torch.bincount(a[k], minlength=3) / 20_000
        torch.testing.assert_close(share, logits[20_000 * k].softmax(-1), rtol=0, atol=0.015)
    normal = Independent(Normal(torch.full((50_000, 1), 2.0), torch.full((50_000, 1), 0.5)), 1)
    x = draw(normal, g)
    assert x.mean().item() == pytest.approx(2, abs=0.01) and x.std().item() == pytest.approx(0.5, abs=0.01)
    assert torch.equal(draw(normal, torch.Generator().manual_seed(2)), draw(normal, torch.Generator().manual_seed(2)))
    assert mode(Categorical(logits=logits))[[0, -1]].tolist() == [1, 0] and torch.equal(mode(normal), normal.mean)
    with pytest.raises(ValueError, match="Beta"):
        draw(torch.distributions.Beta(1.0, 1.0), g)


def test_policies():
    obs = torch.randn(7, 4)
    dist = CategoricalPolicy(4, 3)(obs)
    assert dist.probs.shape == (7, 3) and dist.probs.sub(1 / 3).abs().max() < 0.02  # starts close to uniform
    gauss = GaussianPolicy(4, 2, log_std=-1.0)
    dist = gauss(obs)
    assert dist.log_prob(dist.sample()).shape == (7,)
    torch.testing.assert_close(dist.stddev, torch.full((7, 2), math.exp(-1)))
    assert dist.mean.abs().max() < 0.1
    for net in (ActorCritic(4, 3), ActorCritic(4, n_actions=3), ActorCritic(4, act_dim=2)):
        dist, value = net(obs)
        assert value.shape == (7,) and dist.log_prob(dist.sample()).shape == (7,)
        torch.testing.assert_close(net.value(obs), value)
    best = net.act(obs.numpy(), deterministic=True)
    assert isinstance(best, np.ndarray) and best.shape == (7, 2)
    np.testing.assert_allclose(best, net(obs)[0].mean.detach(), rtol=1e-6)
    assert not np.allclose(net.act(obs.numpy()), best)
    for bad in ({}, {"n_actions": 2, "act_dim": 2}):
        with pytest.raises(ValueError, match="either"):
            ActorCritic(4, **bad)


def test_conv_trunk():
    out = ConvTrunk(5, 8, 6, 10)(torch.randn(3, 5, 8, 6))
    assert out.shape == (3, 10) and (out >= 0).all()
    with pytest.raises(ValueError):
        ConvTrunk(0, 8, 8, 1)
