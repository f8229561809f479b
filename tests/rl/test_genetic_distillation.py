"""Crossover in state space: switches on separated clouds, children of equal and of different parents, selection by hand."""

import copy
import itertools

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import nn
from torch.distributions import kl_divergence

from dlatlas.rl import genetic_distillation
from dlatlas.rl.envs.points import PointNav
from dlatlas.rl.genetic_distillation import GPO, _advantage, _Shared, _visit, crossover, select, train_switch, weight_crossover
from dlatlas.rl.kit.nets import ActorCritic, GaussianPolicy
from dlatlas.rl.kit.rollout import as_vector


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def env():
    return PointNav(goal=(0.0, 0.0), goal_in_obs=False, steps=10)


def policy(seed, log_std=-1.0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return GaussianPolicy(4, 2, hidden=(16, 16), log_std=log_std, out_scale=1.0)


class Right(nn.Module):
    """Parent y where x > 0."""

    def forward(self, states):
        return (states[:, 0] > 0).float()


class Everywhere(nn.Module):
    """Parent y in all states."""

    def forward(self, states):
        return torch.ones(len(states))


def test_the_switch_separates_two_clouds_as_well_as_the_peer():
    x, y = torch.randn(300, 2, generator=gen()) - 2, torch.randn(300, 2, generator=gen(1)) + 2
    switch = train_switch(x, y)
    fresh = torch.cat((torch.randn(500, 2, generator=gen(2)) - 2, torch.randn(500, 2, generator=gen(3)) + 2))
    labels = torch.arange(1000) >= 500
    p = switch(fresh)
    assert p.shape == (1000,) and p.min() > 0 and p.max() < 1
    peer = LogisticRegression().fit(torch.cat((x, y)).numpy(), np.arange(600) >= 300).score(fresh.numpy(), labels.numpy())
    accuracy = ((p > 0.5) == labels).float().mean().item()
    assert accuracy >= 0.95 and accuracy >= peer - 0.01


def test_weights_of_the_switch_are_the_odds():
    """On one and the same cloud nothing but the weights tells the parents apart: the probability is their share."""
    x = torch.randn(200, 2, generator=gen())
    switch = train_switch(x, x, weights_x=torch.full((200,), 3.0), weights_y=torch.full((200,), 1.0), steps=600)
    torch.testing.assert_close(switch(x), torch.full((200,), 0.25), atol=0.05, rtol=0)
    ignored = train_switch(x - 3, torch.cat((x + 3, x - 3)), weights_y=torch.cat((torch.ones(200), torch.zeros(200))))
    assert (ignored(x - 3) < 0.5).all()


def test_the_switch_depends_on_its_seed_only():
    x, y = torch.randn(50, 2, generator=gen()), torch.randn(50, 2, generator=gen(1))
    before = torch.get_rng_state()
    assert torch.equal(train_switch(x, y, seed=3)(x), train_switch(x, y, seed=3)(x))
    assert not torch.equal(train_switch(x, y, seed=3)(x), train_switch(x, y, seed=4)(x))
    assert torch.equal(before, torch.get_rng_state())


def test_equal_parents_have_an_equal_child():
    parent = policy(0)
    child = crossover(parent, copy.deepcopy(parent), env, policy(1), dagger_rounds=1, samples=600)
    states, _ = _visit(child, as_vector(env, 20), 400, gen(5))
    with torch.no_grad():
        assert kl_divergence(parent(states), child(states)).mean() < 1e-2
        assert kl_divergence(parent(states), policy(1)(states)).mean() > 0.1


def test_a_child_does_what_the_parent_at_home_does():
    x, y = policy(0), policy(2)
    child = crossover(x, y, env, policy(1), switch=Right(), dagger_rounds=1, samples=800, steps=400)
    states, _ = _visit(child, as_vector(env, 20), 400, gen(5))
    states = states[states[:, 0].abs() > 0.2]
    right = states[:, 0] > 0
    with torch.no_grad():
        near = torch.where(right, kl_divergence(y(states), child(states)), kl_divergence(x(states), child(states)))
        far = torch.where(right, kl_divergence(x(states), child(states)), kl_divergence(y(states), child(states)))
    assert near.mean() < 0.15 and far.mean() > 5 * near.mean()


def pushing(*push, log_std=-1.5):
    parent = GaussianPolicy(4, 2, hidden=(16, 16), log_std=log_std)
    with torch.no_grad():
        parent.net[-1].bias.copy_(torch.tensor(push))
    return parent


def sloped():
    """The goal is on the right: who pushes right has all the episodes above the average."""
    return PointNav(goal=(0.9, 0.0), start=(-0.1, -0.1, 0.1, 0.1), goal_in_obs=False, steps=20)


@pytest.mark.parametrize("swap", [False, True])
def test_a_dominated_parent_teaches_nothing(swap):
    torch.manual_seed(0)
    right, left = pushing(1.0, 0.0), pushing(-1.0, 0.0)
    child = crossover(*((left, right) if swap else (right, left)), sloped, policy(1), dagger_rounds=1, samples=400, steps=200)
    states = torch.cat([_visit(p, as_vector(sloped, 20), 400, gen(5))[0] for p in (right, left)])
    with torch.no_grad():
        assert kl_divergence(right(states), child(states)).mean() < 0.1 < 5 < kl_divergence(left(states), child(states)).mean()


def test_generations_survive_a_dominated_parent():
    torch.manual_seed(0)
    gpo = GPO(sloped, 3, steps=20, episodes=5, dagger_rounds=0, samples=200, distill_steps=100, lr=(1e-6, 1e-6), ppo_kwargs={"horizon": 20})
    for member, push in zip(gpo.members, (-1.0, 1.0, -1.0)):
        with torch.no_grad():
            member.actor.net[-1].bias[0] = push
            member.actor.log_std.fill_(-1.5)
    history = gpo.fit(2)
    # Two of the three pairs contain the one that pushes right, and their children push right.
    assert sorted(history["fitness"][1])[1] == pytest.approx(max(history["fitness"][0]), rel=0.1)


def test_every_round_adds_the_states_of_the_child(monkeypatch):
    seen, teacher = [], genetic_distillation._teacher
    monkeypatch.setattr(genetic_distillation, "_teacher", lambda x, y, switch, states: seen.append(states) or teacher(x, y, switch, states))
    right, left = pushing(1.0, 0.0), pushing(-1.0, 0.0)
    crossover(left, right, sloped, pushing(0.0, 0.0), Everywhere(), dagger_rounds=2, samples=400, steps=150)
    assert [len(s) for s in seen] == [800, 1200, 1600]
    assert torch.equal(seen[2][:1200], seen[1]) and torch.equal(seen[1][:800], seen[0])
    # The child follows the one that pushes right: its last steps are where that parent's are.
    ends = [block.view(20, 20, 4)[-1, :, 0].mean() for block in seen[2].split(400)]
    assert ends[0] < 0 < ends[1] and (ends[2] - ends[1]).abs() < 0.1 and (ends[3] - ends[1]).abs() < 0.1


def test_only_the_returns_tell_where_a_parent_is_at_home(monkeypatch):
    """Both parents visit the same states; x earns more on the left and y on the right."""
    x, y, states = policy(0), policy(2), torch.randn(800, 4, generator=gen(7))
    side = states[:, 0].sign()
    visits = {id(x): (states, -side), id(y): (states, side)}
    monkeypatch.setattr(genetic_distillation, "_visit", lambda p, vec, samples, generator: visits[id(p)])
    child = crossover(x, y, env, policy(1), dagger_rounds=0, steps=400)
    clear = states[states[:, 0].abs() > 0.3]
    right = clear[:, 0] > 0
    with torch.no_grad():
        to_x, to_y = kl_divergence(x(clear), child(clear)), kl_divergence(y(clear), child(clear))
    near, far = torch.where(right, to_y, to_x), torch.where(right, to_x, to_y)
    assert near.mean() < 0.15 and far.mean() > 5 * near.mean()


def test_the_divergence_is_that_of_the_teacher_from_the_child():
    """A child that cannot move its mean covers the teacher, sigma^2 = sigma_H^2 + distance^2; the other direction would copy sigma_H."""
    parent, child = pushing(0.5, 0.0, log_std=-1.0), pushing(0.0, 0.0, log_std=-0.3)
    child.net.requires_grad_(False)
    crossover(parent, parent, env, child, lambda states: torch.zeros(len(states)), dagger_rounds=0, samples=400, steps=400, lr=2e-2)
    with torch.no_grad():
        states, _ = _visit(parent, as_vector(env, 20), 400, gen(5))
        wanted = (parent(states).stddev.square() + (parent(states).mean - child(states).mean).square()).mean(0).sqrt()
    torch.testing.assert_close(child.log_std.detach().exp(), wanted, rtol=0.05, atol=0)
    assert wanted[0] > 1.5 * float(np.exp(-1.0))


def test_a_child_inherits_the_critic_of_the_fitter_parent():
    gpo = GPO(env, 3, episodes=2, dagger_rounds=0, samples=40, distill_steps=2, seed=1)
    parents = copy.deepcopy(gpo.members)
    gpo._breed([1.0, 5.0, 3.0])  # best pairs: (1, 2), (0, 1), (0, 2)
    for child, fitter in zip(gpo.members, (1, 1, 2)):
        for p, q in zip(child.critic.parameters(), parents[fitter].critic.parameters()):
            assert torch.equal(p, q)
        assert not torch.equal(child.actor.net[-1].weight, parents[fitter].actor.net[-1].weight)


def test_parents_and_states_of_whole_episodes():
    parents = [policy(0), policy(2)]
    before = copy.deepcopy([p.state_dict() for p in parents])
    first, again = (crossover(*parents, env, policy(1), samples=100, steps=20, seed=4) for _ in range(2))
    for a, b in zip(first.parameters(), again.parameters()):
        assert torch.equal(a, b)
    for p, state in zip(parents, before):
        assert all(torch.equal(v, state[k]) for k, v in p.state_dict().items())
    states, returns = _visit(parents[0], as_vector(env, 20), 500, gen())  # 25 steps of 20 copies: two whole episodes, half of one
    assert states.shape == (400, 4) and returns.shape == (400,)
    assert len(returns.unique()) == 40 and returns.max() < 0


def test_returns_are_those_of_the_episode_of_the_state():
    states, returns = _visit(policy(0), as_vector(env, 20), 200, gen())
    played = as_vector(env, 20)
    played.reset(seed=int(torch.randint(2**31 - 1, (), generator=gen())))
    np.testing.assert_allclose(states[:20].numpy(), played.last_obs)
    # The reward is minus the distance after the step: nine of an episode's ten can be read off the states that follow.
    per_copy = states[:, :2].norm(dim=1).view(10, 20)[1:].sum(0)
    rest = -returns.view(10, 20)[0] - per_copy
    assert (rest > 0).all() and (rest < 1.5).all()


def test_episodes_count_as_far_as_they_are_above_average():
    returns = torch.tensor([0.0, 1.0, 4.0, 7.0])
    torch.testing.assert_close(_advantage(returns), torch.tensor([0.0, 0.0, 4 / 5, 16 / 5]))
    torch.testing.assert_close(_advantage(returns), _advantage(10 * returns - 7))
    torch.testing.assert_close(_advantage(torch.ones(4)), torch.ones(4))


def test_crossover_of_parameters_takes_each_from_one_parent():
    x, y = policy(0), policy(2, log_std=0.5)
    child = weight_crossover(x, y, gen())
    taken = [torch.cat([f(a, b, c).flatten() for a, b, c in zip(x.parameters(), y.parameters(), child.parameters())]) for f in
             (lambda a, b, c: a == c, lambda a, b, c: b == c)]  # fmt: skip
    assert (taken[0] | taken[1]).all() and 0.4 < taken[0].float().mean() < 0.7
    assert not torch.equal(x.log_std, y.log_std)


def test_selection_by_hand():
    f = [1.0, 4.0, 3.0, -2.0]
    assert select(f, 1) == [(1, 2)]
    assert select(torch.tensor(f), 3) == [(1, 2), (0, 1), (0, 2)]
    assert sorted(select(f, 6)) == list(itertools.combinations(range(4), 2))
    kl = torch.zeros(4, 4)
    kl[0, 3], kl[3, 0] = 1.0, 8.0
    assert select(f, 1, "diversity", kl) == [(0, 3)] and select(f, 1, "performance", kl) == [(1, 2)]


def test_shared_rows_are_those_of_near_policies():
    torch.manual_seed(0)
    ours = ActorCritic(4, act_dim=2)
    obs = torch.randn(30, 4)

    def rows(member):
        dist = member.distribution(obs)
        actions = dist.sample()
        return {"obs": obs, "actions": actions, "logp": dist.log_prob(actions).detach(), "adv": torch.randn(30)}

    near, far = copy.deepcopy(ours), copy.deepcopy(ours)
    with torch.no_grad():
        far.actor.net[-1].bias += 3
    hook = _Shared([rows(near), rows(far)], 0.05)
    own = rows(ours)
    got = hook.after_rollout(ours, own)
    assert len(got["adv"]) == 60 and torch.equal(got["logp"][30:], hook.pool[0]["logp"]) and hook.last is own


@pytest.mark.parametrize("rule", ["performance", "diversity"])
def test_generations(rule):
    def run():
        gpo = GPO(
            env, 3, steps=160, rule=rule, episodes=5, dagger_rounds=1, samples=100, distill_steps=20, seed=1, ppo_kwargs={"horizon": 20}
        )
        return gpo, gpo.fit(2)

    gpo, history = run()
    assert history["step"] == [480, 960] and len(gpo.members) == 3
    assert history["best"] == [max(f) for f in history["fitness"]]
    assert history == run()[1]


def test_bad_input():
    x = torch.ones(3, 2)
    wide = GaussianPolicy(4, 2, hidden=(8, 8))
    for call in (lambda: train_switch(x, torch.ones(3, 1)), lambda: train_switch(x, x[:0]), lambda: train_switch(x, x, weights_x=torch.ones(2)),
                 lambda: train_switch(x, x, weights_y=torch.zeros(3)), lambda: crossover(wide, wide, env, wide, samples=0),
                 lambda: crossover(wide, wide, env, wide, dagger_rounds=-1), lambda: weight_crossover(wide, policy(0)),
                 lambda: select([1.0, 2.0], 2), lambda: select([1.0, 2.0], 1, "best"), lambda: select([1.0, 2.0], 1, "diversity"),
                 lambda: select([1.0, 2.0], 1, "diversity", torch.zeros(3, 3)), lambda: GPO(env, 2), lambda: GPO(env, 3, lr=(1e-3, 1e-4))):  # fmt: skip
        with pytest.raises(ValueError, match="got"):
            call()
