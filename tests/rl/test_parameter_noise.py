"""Noise of the right size in the right places, distances against torch.distributions, and a sigma that settles."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributions import Categorical, kl_divergence

from dlatlas.rl.envs.toy import BatchedChain
from dlatlas.rl.parameter_noise import DQNParamNoise, ParameterNoise, action_distance, policy_kl


def test_the_noise_has_its_size_in_every_tensor_and_spares_normalisation():
    net = nn.Sequential(
        nn.Linear(80, 90), nn.LayerNorm(90), nn.ReLU(), nn.Sequential(nn.Linear(90, 100), nn.BatchNorm1d(100)), nn.Linear(100, 70)
    )
    before = copy.deepcopy(net.state_dict())
    noisy = ParameterNoise(net, sigma=0.3).perturb(torch.Generator().manual_seed(0))
    for name, p in noisy.named_parameters():
        change = p - before[name]
        if name.startswith(("1.", "3.1.")):
            assert not change.any()
        else:
            assert change.std().item() == pytest.approx(0.3, rel=4 / math.sqrt(2 * p.numel()))
            assert abs(change.mean().item()) < 4 * 0.3 / math.sqrt(p.numel())
    for name, p in net.state_dict().items():
        assert torch.equal(p, before[name])
    assert all(p is not q for p, q in zip(net.parameters(), noisy.parameters()))


def test_a_bare_layer_and_a_generator():
    layer = nn.Linear(3, 2)
    noise = ParameterNoise(layer)
    one, same, other = (noise.perturb(torch.Generator().manual_seed(k)) for k in (0, 0, 1))
    assert torch.equal(one.weight, same.weight) and not torch.equal(one.weight, other.weight) and not torch.equal(one.bias, layer.bias)
    norm = nn.LayerNorm(4)
    assert torch.equal(ParameterNoise(norm).perturb().weight, norm.weight)


def test_distances():
    q, r = torch.randn(40, 5, dtype=torch.float64), torch.randn(40, 5, dtype=torch.float64)
    assert policy_kl(q, r) == pytest.approx(kl_divergence(Categorical(logits=q), Categorical(logits=r)).mean().item(), rel=1e-10)
    assert policy_kl(q, q + 7) == pytest.approx(0, abs=1e-12) and policy_kl(1e3 * q, r) < math.inf
    assert policy_kl(q, r) != pytest.approx(policy_kl(r, q), rel=1e-3)
    a, b = np.random.default_rng(0).normal(size=(2, 30, 3))
    assert action_distance(torch.tensor(a), torch.tensor(b)) == pytest.approx(np.sqrt(((a - b) ** 2).mean()))


def test_sigma_follows_the_distance():
    noise = ParameterNoise(nn.Linear(1, 1), sigma=0.5, delta=0.2, factor=1.1)
    assert noise.adapt(0.2) == pytest.approx(0.55) and noise.adapt(0.1) == pytest.approx(0.605)
    assert noise.adapt(0.21) == pytest.approx(0.55) == noise.sigma


def test_sigma_settles_where_the_distance_is_delta():
    """A linear policy without bias: E d^2 = sigma^2 mean |x|^2, so that sigma has to reach delta / rms(|x|)."""
    g = torch.Generator().manual_seed(0)
    policy, x = nn.Linear(10, 4, bias=False), torch.randn(500, 10, generator=g)
    noise = ParameterNoise(policy, sigma=1.0, delta=0.2, factor=1.02)
    trace = [noise.adapt(action_distance(policy(x), noise.perturb(g)(x))) for _ in range(600)]
    assert np.mean(trace[300:]) == pytest.approx(0.2 / float(x.square().sum(1).mean().sqrt()), rel=0.05)


def test_bad_input():
    for bad in (dict(sigma=0.0), dict(sigma=-1.0), dict(delta=0.0), dict(factor=1.0), dict(factor=0.9), dict(sigma=math.nan)):
        with pytest.raises(ValueError, match="must be positive"):
            ParameterNoise(nn.Linear(1, 1), **bad)
    with pytest.raises(ValueError, match="distance"):
        ParameterNoise(nn.Linear(1, 1)).adapt(math.nan)
    with pytest.raises(ValueError, match="one shape"):
        action_distance(torch.zeros(2, 1), torch.zeros(2))
    for q, r in ((torch.zeros(2, 3), torch.zeros(2, 1)), (torch.zeros(3), torch.zeros(3))):
        with pytest.raises(ValueError, match=r"\[B, A\]"):
            policy_kl(q, r)


def agent(**kwargs):
    torch.manual_seed(0)
    return DQNParamNoise(6, 2, **{**dict(hidden=(16,), warmup=40, batch_size=16, sigma=0.5), **kwargs})


def test_a_perturbed_network_lasts_an_episode_and_belongs_to_one_copy():
    a = agent()
    a.begin_episodes(np.ones(3, dtype=bool))
    before = [copy.deepcopy(net.state_dict()) for net in a._noisy]
    a.begin_episodes(np.array([False, True, False]))
    same = [all(torch.equal(p, q) for p, q in zip(net.state_dict().values(), old.values())) for net, old in zip(a._noisy, before)]
    assert same == [True, False, True]
    assert not torch.equal(a._noisy[0][1].weight, a._noisy[2][1].weight)
    assert torch.equal(a._noisy[0][2].weight, a.online[2].weight) and isinstance(a.online[2], nn.LayerNorm)
    obs = torch.randn(3, 6)
    with torch.no_grad():
        wanted = [int(net(row[None]).argmax()) for net, row in zip(a._noisy, obs)]
    assert a.act(obs).tolist() == wanted == a.act(obs).tolist()
    assert a.act(obs, deterministic=True).tolist() == a.online(obs).argmax(1).tolist()


def test_the_same_state_gets_the_same_action_all_through_an_episode():
    a, seen = agent(warmup=10**9), []
    explore = a.explore
    a.explore = lambda obs: (seen.append((obs.copy(), explore(obs))), seen[-1][1])[1]
    a.fit(BatchedChain(4, n=6), 4 * 15 * 4, seed=0)
    obs, actions = np.stack([o for o, _ in seen]), np.stack([x for _, x in seen])
    changed = 0
    for copy_ in range(4):
        rules = []
        for episode in range(4):
            rule = {}
            for t in range(15 * episode, 15 * episode + 15):
                key = obs[t, copy_].tobytes()
                assert rule.setdefault(key, actions[t, copy_]) == actions[t, copy_]
            rules.append(rule)
        changed += rules[0] != rules[1]
    assert changed > 0


def test_the_threshold_is_that_of_the_epsilon_greedy_policy():
    a = agent(epsilon=(0.5, 0.1, 100))
    p = torch.tensor([1 - 0.5 + 0.25, 0.25])
    assert a.delta == pytest.approx(float(kl_divergence(Categorical(torch.tensor([1.0, 0.0])), Categorical(p))))
    a.transitions = 100
    assert a.delta == pytest.approx(-math.log(0.95))


def test_sigma_moves_while_learning_until_the_divergence_is_right():
    a = agent(sigma=3.0, factor=1.05, adapt_every=1, epsilon=(0.3, 0.3, 0))
    history = a.fit(BatchedChain(4, n=6), 2000, seed=0)
    assert a.noise.sigma < 2.0 and "sigma" in history
    batch = a.sample(64)["obs"]
    with torch.no_grad():
        d = np.mean([policy_kl(a.online(batch), a.noise.perturb()(batch)) for _ in range(300)])
    assert 0.3 * a.delta < d < 3 * a.delta
    again = agent(sigma=3.0, factor=1.05, adapt_every=1, epsilon=(0.3, 0.3, 0))
    assert again.fit(BatchedChain(4, n=6), 2000, seed=0) == history


def test_bad_agents():
    for bad in (dict(sigma=0.0), dict(factor=1.0), dict(epsilon=(0.1, 0.0, 10)), dict(adapt_every=0)):
        with pytest.raises(ValueError, match="must be positive"):
            agent(**bad)


def test_other_numbers_of_rows_get_perturbations_of_their_own():
    a = agent(sigma=3.0)
    a.begin_episodes(np.ones(8, dtype=bool))
    kept = list(a._noisy)
    assert len({int(a.act(np.ones((1, 6)))[0]) for _ in range(40)}) == 2 and len(set(a.act(np.ones((100, 6))))) == 2
    assert a._noisy == kept  # the episodes go on with theirs


def test_an_update_sets_the_annealed_threshold_and_compares_the_policy_with_its_copy():
    """The direction of the divergence, its threshold at the moment and the factor, against the definition."""
    a = agent(sigma=2.0, factor=1.5, adapt_every=2, epsilon=(0.9, 0.1, 100), warmup=10**9)
    a.fit(BatchedChain(4, n=6), 200, seed=0)
    a.transitions, batch = 100, a.sample(64)
    p = torch.tensor([1 - 0.1 + 0.05, 0.05])
    threshold = float(kl_divergence(Categorical(torch.tensor([1.0, 0.0])), Categorical(p)))
    seen, adapt = [], a.noise.adapt
    a.noise.adapt = lambda d: seen.append((d, a.noise.delta)) or adapt(d)
    a.updates = 1
    a.update(batch)
    assert not seen
    with torch.no_grad():  # very unlike policies: the two directions of the divergence are far apart
        a.online[-1].weight.mul_(4)
    a.updates, state = 2, a.generator.get_state()
    report, before = a.update(batch), 2.0
    (distance, delta) = seen[0]
    a.generator.set_state(state)
    a.noise.sigma = before
    with torch.no_grad():
        q, noisy = a.online(batch["obs"]), a.noise.perturb(a.generator)(batch["obs"])
    right, wrong = (kl_divergence(Categorical(logits=x), Categorical(logits=y)).mean().item() for x, y in ((q, noisy), (noisy, q)))
    assert distance == pytest.approx(right, rel=1e-4) and abs(right - wrong) > 0.01 * right
    assert delta == pytest.approx(threshold, rel=1e-5)
    assert report["sigma"] == pytest.approx(before * 1.5 if right <= threshold else before / 1.5)
