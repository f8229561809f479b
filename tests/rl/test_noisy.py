"""Noisy layers against F.linear, NumPy and the moments of the noise; the agent's three independent samples."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dlatlas.rl.envs.toy import Chain
from dlatlas.rl.noisy import NoisyDQN, NoisyLinear


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def weights(layer):
    """The noisy weight and bias that the layer must behave like, formed in full."""
    a, b = (e.numpy() for e in layer.noise)
    eps_w = np.outer(b, a) if layer.factorised else a
    w = layer.weight_mu.detach().numpy() + layer.weight_sigma.detach().numpy() * eps_w
    return w, layer.bias_mu.detach().numpy() + layer.bias_sigma.detach().numpy() * b


@pytest.mark.parametrize("factorised", [True, False])
def test_output_is_that_of_the_weights_formed_in_full(factorised):
    layer = NoisyLinear(5, 3, factorised=factorised, sigma0=2.0, dtype=torch.float64)
    with torch.no_grad():
        layer.weight_sigma.uniform_(-1, 1)
    x = torch.randn(2, 7, 5, dtype=torch.float64)
    for seed in range(3):
        layer.reset_noise(generator(seed))
        w, b = weights(layer)
        np.testing.assert_allclose(layer(x).detach().numpy(), x.numpy() @ w.T + b, rtol=1e-12)


@pytest.mark.parametrize("factorised", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_evaluation_is_a_linear_layer(factorised, bias):
    layer = NoisyLinear(4, 6, bias, factorised=factorised).eval()
    x = torch.randn(9, 4)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight_mu, layer.bias_mu), rtol=0, atol=0)
    assert (layer.bias_sigma is None) == (not bias)
    assert not torch.equal(layer.train()(x), layer.eval()(x))


@pytest.mark.parametrize(("factorised", "variance"), [(True, 2 / math.pi), (False, 1.0)])
def test_variance_of_the_noise_and_of_its_factors(factorised, variance):
    layer = NoisyLinear(2, 2, factorised=factorised, dtype=torch.float64)
    with torch.no_grad():
        for p in layer.parameters():
            p.zero_()
        layer.weight_sigma.fill_(1.0)
        layer.bias_sigma.fill_(1.0)
    n, g = 200_000, generator()
    layer.reset_noise(g, rows=n)
    e1 = layer(torch.tensor([1.0, 0.0], dtype=torch.float64).expand(n, 2)).detach()
    layer.reset_noise(generator(), rows=n)  # the same noise again
    e2 = layer(torch.tensor([0.0, 1.0], dtype=torch.float64).expand(n, 2)).detach()
    layer.reset_noise(generator(), rows=n)
    b = layer(torch.zeros(n, 2, dtype=torch.float64)).detach()
    w = torch.stack([e1 - b, e2 - b], 2).reshape(n, 4)  # eps_w, row by row
    torch.testing.assert_close(w.var(0), torch.full((4,), variance, dtype=torch.float64), rtol=0.02, atol=0)
    torch.testing.assert_close(w.mean(0), torch.zeros(4, dtype=torch.float64), rtol=0, atol=0.01)
    assert w.T.corrcoef().fill_diagonal_(0).abs().max() < 0.01  # uncorrelated in either form ...
    magnitudes = w.abs().T.corrcoef()  # ... but factorised entries of one row share a number
    assert (magnitudes[0, 1] > 0.1) == factorised
    # E f(e)^2 = E|e| = sqrt(2/pi) for the factorised bias
    torch.testing.assert_close(b.var(0), torch.full((2,), math.sqrt(2 / math.pi) if factorised else 1.0).double(), rtol=0.02, atol=0)


def test_initial_values():
    factorised, independent = NoisyLinear(100, 80, sigma0=0.4), NoisyLinear(100, 80, factorised=False)
    assert 0.099 < factorised.weight_mu.abs().max() <= 0.1
    assert torch.all(factorised.weight_sigma == 0.04) and torch.all(factorised.bias_sigma == 0.04)
    assert 0.171 < independent.weight_mu.abs().max() <= math.sqrt(0.03)
    assert torch.all(independent.weight_sigma == 0.017)


@pytest.mark.parametrize("factorised", [True, False])
def test_gradient_of_sigma_is_upstream_times_noise_times_input(factorised):
    layer = NoisyLinear(3, 2, factorised=factorised, dtype=torch.float64)
    x, up = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64)
    y = layer(x)
    first, second = layer.noise
    layer.reset_noise()  # new noise between forward and backward must not leak into the gradient
    y.backward(up)
    eps = torch.outer(second, first) if factorised else first
    torch.testing.assert_close(layer.weight_sigma.grad, up.T @ x * eps)
    torch.testing.assert_close(layer.bias_sigma.grad, up.sum(0) * second)
    torch.testing.assert_close(layer.weight_mu.grad, up.T @ x)


@pytest.mark.parametrize("factorised", [True, False])
def test_the_same_generator_gives_the_same_noise_and_rows_have_their_own(factorised):
    layer = NoisyLinear(3, 2, factorised=factorised)
    x = torch.randn(1, 3).expand(5, 3)
    layer.reset_noise(generator(1))
    first = layer(x)
    assert torch.equal(first[0].expand(5, 2), first)
    layer.reset_noise(generator(1))
    assert torch.equal(layer(x), first)
    layer.reset_noise(generator(2))
    assert not torch.equal(layer(x), first)
    layer.reset_noise(rows=5)
    assert len(layer(x).detach().unique(dim=0)) == 5


def test_state_dict_holds_the_parameters_only():
    layer = NoisyLinear(3, 2)
    assert set(layer.state_dict()) == {"weight_mu", "weight_sigma", "bias_mu", "bias_sigma"}
    assert NoisyLinear(3, 2, sigma0=0.1).load_state_dict(layer.state_dict())
    assert layer.double()(torch.randn(4, 3, dtype=torch.float64)).dtype == torch.float64


@pytest.mark.parametrize("bad", [{"in_features": 0}, {"out_features": 0}, {"sigma0": -0.1}, {"sigma0": math.nan}])
def test_bad_arguments(bad):
    with pytest.raises(ValueError, match="sigma0 >= 0"):
        NoisyLinear(**{"in_features": 2, "out_features": 2, **bad})


def batch(n=6, obs=4, actions=3):
    g = generator(5)
    return {
        "obs": torch.randn(n, obs, generator=g),
        "next_obs": torch.randn(n, obs, generator=g),
        "actions": torch.randint(actions, (n,), generator=g),
        "returns": torch.randn(n, generator=g),
        "discounts": 0.9 * (torch.rand(n, generator=g) < 0.7),
    }


def test_td_errors_use_three_samples_of_noise():
    agent = NoisyDQN(4, 3, hidden=(8,), sigma0=3.0)
    data, seen = batch(), []
    for layer in (*agent.layers, *agent._target_layers):
        layer.register_forward_hook(lambda layer, args, out: seen.append(layer.noise))
    agent.generator.manual_seed(3)
    delta = agent.td_errors(data)
    target, choice, value = seen[0:2], seen[2:4], seen[4:6]
    flat = [torch.cat([e for pair in sample for e in pair]) for sample in (target, choice, value)]
    assert torch.stack(flat).corrcoef().fill_diagonal_(0).abs().max() < 0.9 and len(torch.stack(flat).unique(dim=0)) == 3

    def q(net, noise, x):
        for layer, sample in zip((m for m in net.modules() if isinstance(m, NoisyLinear)), noise):
            layer.noise = sample
        return net(x)

    best = q(agent.online, choice, data["next_obs"]).argmax(1)
    after = q(agent.target, target, data["next_obs"])[torch.arange(6), best]
    now = q(agent.online, value, data["obs"])[torch.arange(6), data["actions"]]
    torch.testing.assert_close(delta, now - data["returns"] - data["discounts"] * after)
    assert delta.requires_grad


def test_actions_of_the_means_are_deterministic_and_others_differ_between_copies():
    agent = NoisyDQN(4, 3, sigma0=3.0)
    obs = np.ones((64, 4), dtype=np.float32)
    assert len(set(agent.act(obs, deterministic=True))) == 1
    assert len(set(agent.act(obs))) > 1
    assert agent.online.training


def test_zero_noise_is_never_learned_and_leaves_a_greedy_agent():
    agent = NoisyDQN(5, 2, hidden=(8,), sigma0=0.0, zero_head=True, batch_size=8, warmup=8)
    history = agent.fit(Chain(5).batch(2), 200)
    assert agent.updates > 50 and agent.noise_level() == 0
    assert max(history["return"]) < 0.1  # equal values: always the first action, left


def test_training_finds_the_end_of_a_short_chain_and_changes_the_noise():
    agent = NoisyDQN(5, 2, hidden=(16,), zero_head=True, batch_size=32, warmup=64, target_period=20, lr=3e-3)
    before = agent.noise_level()
    agent.fit(Chain(5).batch(8), 8 * 14 * 20)
    assert agent.noise_level() != before
    x = torch.from_numpy(np.tri(5, dtype=np.float32)[1:])
    assert agent.act(x, deterministic=True).tolist() == [1, 1, 1, 1]


def test_it_is_a_module_of_any_network():
    net = nn.Sequential(NoisyLinear(3, 8), nn.ReLU(), NoisyLinear(8, 1))
    assert sum(p.numel() for p in net.parameters()) == 2 * (3 * 8 + 8 + 8 + 1)


def test_every_decision_draws_afresh_and_leaves_no_noise_behind():
    agent = NoisyDQN(4, 3, sigma0=3.0)
    obs = np.ones((8, 4), dtype=np.float32)
    assert len({tuple(agent.act(obs).tolist()) for _ in range(10)}) > 5
    before = agent.q_values(torch.ones(64, 4))
    assert before.shape == (64, 3)
    agent.act(obs)
    assert torch.equal(agent.q_values(torch.ones(64, 4)), before)
