"""E-values against a plain recursion, visit counts, and the shares that the deterministic rule has to keep."""

import itertools
import math

import numpy as np
import pytest
import torch

from dlatlas.rl.e_values import DoraDQN, DoraQ, EValues, lll_action
from dlatlas.rl.envs.toy import BatchedBridge, BatchedTabular


def test_the_table_follows_the_recursion_in_plain_numbers():
    rng, alpha, gamma = np.random.default_rng(0), 0.2, 0.7
    table, E = EValues(4, 3, alpha, gamma), np.ones((4, 3))
    for _ in range(300):
        s, a, s2, a2, done = *(int(rng.integers(n)) for n in (4, 3, 4, 3)), bool(rng.random() < 0.1)
        E[s, a] = (1 - alpha) * E[s, a] + alpha * gamma * E[s2, a2] * (not done)
        table.update(s, a, s2, a2, done)
    np.testing.assert_allclose(table.E.numpy(), E, rtol=1e-12)
    np.testing.assert_allclose(table.counters().numpy(), np.log(E) / np.log(1 - alpha), rtol=1e-9)
    assert table.E.shape == (4, 3) and (table.E > 0).all() and (table.E <= 1).all()


def test_without_looking_ahead_the_counters_count_visits_even_many_of_them():
    table, visits = EValues(5, 2, alpha=0.1, gamma_e=0.0), np.zeros((5, 2))
    rng = np.random.default_rng(1)
    for _ in range(500):
        s, a = rng.integers(5), rng.integers(2)
        visits[s, a] += 1
        table.update(int(s), int(a), int(rng.integers(5)), int(rng.integers(2)), bool(rng.random() < 0.2))
    np.testing.assert_allclose(table.counters().numpy(), visits, rtol=1e-12)
    many = EValues(1, 1, alpha=0.5, gamma_e=0.0)
    for _ in range(4000):  # 0.5 ** 4000 is zero in float64
        many.update(0, 0, 0, 0)
    assert many.counters().item() == pytest.approx(4000)


def test_a_cycle_of_three_states_solves_its_linear_recursion():
    alpha, gamma, turns = 0.1, 0.9, 40
    table = EValues(3, 1, alpha, gamma)
    for t in range(3 * turns):
        table.update(t % 3, 0, (t + 1) % 3, 0)
    # One turn as three rows of a matrix, one after the other.
    M = np.eye(3)
    for s in range(3):
        row = np.eye(3)
        row[s] = (1 - alpha) * np.eye(3)[s] + alpha * gamma * np.eye(3)[(s + 1) % 3]
        M = row @ M
    np.testing.assert_allclose(table.E[:, 0].numpy(), np.linalg.matrix_power(M, turns) @ np.ones(3), rtol=1e-12)


def test_news_downstream_keeps_a_counter_low():
    """Both actions of state 0 are tried equally often; one leads to a place full of untried actions, the other ends the episode."""
    table = EValues(2, 2, 0.1, 0.9)
    for _ in range(20):
        table.update(0, 0, 1, 0)
        table.update(0, 1, 0, 0, done=True)
    assert table.counters()[0, 1] == pytest.approx(20) and table.counters()[0, 0] < 2


def test_e_values_never_rise_above_their_largest():
    table, rng, last = EValues(4, 2, 0.3, 0.95), np.random.default_rng(2), 1.0
    for _ in range(2000):
        s, a, s2, a2 = (int(rng.integers(n)) for n in (4, 2, 4, 2))
        table.update(s, a, s2, a2)
        assert table.E.max() <= last
        last = float(table.E.max())
    assert last < 1


def test_a_batch_is_as_many_single_updates_of_the_same_moment():
    one, many = EValues(6, 2, 0.1, 0.9), EValues(6, 2, 0.1, 0.9)
    s, a, s2, a2 = torch.tensor([0, 1, 2]), torch.tensor([0, 1, 0]), torch.tensor([3, 4, 5]), torch.tensor([1, 1, 0])
    done = torch.tensor([False, True, False])
    for _ in range(4):
        many.update(s, a, s2, a2, done)
        for row in zip(s, a, s2, a2, done):
            one.update(*row)
    torch.testing.assert_close(one.E, many.E)
    with pytest.raises(ValueError, match="twice"):
        many.update(torch.tensor([0, 0]), torch.tensor([1, 1]), s2[:2], a2[:2])


def test_the_deterministic_rule_visits_in_proportion_to_the_softmax():
    q, beta, alpha = torch.tensor([0.3, 1.0, -0.5, 0.0]), 1.5, 0.1
    table = EValues(1, 4, alpha, gamma_e=0.0)
    for _ in range(3000):
        # the counters are handed over as E-values of a small base, which do not underflow here
        a = lll_action(q, (1 - 1e-3) ** table.counters()[0], 1e-3, beta)
        table.update(0, a, 0, 0)
    np.testing.assert_allclose(table.counters()[0].numpy() / 3000, torch.softmax(beta * q, 0).numpy(), atol=2e-3)


def test_the_rule_in_plain_numbers_untried_actions_first_and_ties_to_the_lowest_index():
    q, C, beta = [0.2, 0.5, 0.4], [3.0, 9.0, 5.0], 2.0
    scores = [beta * v - math.log(c) for v, c in zip(q, C)]
    assert lll_action(torch.tensor(q), 0.9 ** torch.tensor(C, dtype=torch.float64), 0.1, beta) == int(np.argmax(scores))
    assert lll_action(torch.tensor([100.0, 0.0, -100.0]), torch.tensor([0.5, 1.0, 0.5]), 0.1) == 1
    assert lll_action(torch.tensor([-9.0, 3.0, 4.0]), torch.tensor([0.5, 1.0, 1.0]), 0.1) == 1
    assert lll_action(torch.zeros(3), torch.full((3,), 0.3), 0.1) == 0
    assert lll_action(torch.zeros(3), torch.tensor([0.0, 0.1, 0.0]), 0.1) == 1  # C = infinity is visited enough


@pytest.mark.parametrize("bad", [dict(alpha=0.0), dict(alpha=1.0), dict(gamma_e=1.0), dict(gamma_e=-0.1)])
def test_rates_outside_their_range(bad):
    with pytest.raises(ValueError, match="alpha must be"):
        EValues(2, 2, **bad)


def test_other_bad_input():
    with pytest.raises(ValueError, match="positive"):
        EValues(0, 2)
    with pytest.raises(ValueError, match=r"must both be \[A\]"):
        lll_action(torch.zeros(3), torch.ones(2), 0.1)
    with pytest.raises(ValueError, match="alpha"):
        lll_action(torch.zeros(2), torch.ones(2), 1.0)
    with pytest.raises(ValueError, match=r"in \[0, 1\]"):
        lll_action(torch.zeros(2), torch.tensor([0.5, 1.5]), 0.1)


def test_one_step_of_two_learners_in_plain_numbers():
    agent = DoraQ(3, 2, copies=2, gamma=0.5, alpha=0.2, gamma_e=0.9, alpha_e=0.1)
    agent.q[:] = torch.arange(12.0).view(6, 2)
    batch = dict(obs=[0, 2], actions=[1, 0], rewards=[1.0, 2.0], next_obs=[2, 1], next_actions=[0, 1], dones=[False, True])
    agent.update({name: np.array(x) for name, x in batch.items()})
    q = np.arange(12.0).reshape(6, 2)
    q[0, 1] += 0.2 * (1 + 0.5 * 5 - 1)  # the first learner: state 2 has the values 4 and 5
    q[5, 0] += 0.2 * (2 - 10)  # the second learner: an end
    np.testing.assert_allclose(agent.q.numpy(), q)
    E = np.ones((6, 2))
    E[0, 1], E[5, 0] = 0.9 + 0.1 * 0.9, 0.9
    np.testing.assert_allclose(agent.e_values.E.numpy(), E)


def test_the_stream_of_sarsa_is_the_one_that_was_played():
    agent, batches = DoraQ(19, 4, copies=6, rule="epsilon", epsilon=0.9), []
    update = agent.update
    agent.update = lambda batch: batches.append(batch) or update(batch)
    history = agent.fit(BatchedBridge(6, k=5), 6 * 300, seed=3)
    for now, after in itertools.pairwise(batches):
        on = now["next_obs"] == after["obs"]
        same = now["next_actions"] == after["actions"]
        going = ~now["dones"] & on
        assert same[going & (after["obs"] != 1)].all()
    assert len(batches) == 300
    ends = sum(int(b["dones"].sum()) for b in batches)
    assert 0 < ends <= len(history["return"]) == len(history["copy"]) == len(history["step"])
    again = DoraQ(19, 4, copies=6, rule="epsilon", epsilon=0.9)
    assert again.fit(BatchedBridge(6, k=5), 6 * 300, seed=3) == history
    with pytest.raises(ValueError, match="6 copies"):
        again.fit(BatchedBridge(3, k=5), 10)


def test_rules_of_the_tabular_agent():
    q = torch.tensor([[0.1, 0.5, 0.4]], dtype=torch.float64)

    def counts(**kwargs):
        agent = DoraQ(1, 3, copies=4000, beta=3.0, **kwargs)
        agent.q[:] = q
        agent.e_values.update(
            torch.arange(4000).repeat(3),
            torch.arange(3).repeat_interleave(4000),
            torch.zeros(12000, dtype=torch.long),
            torch.zeros(12000, dtype=torch.long),
            True,
        )
        return agent, np.bincount(agent.act(np.zeros(4000, dtype=int)), minlength=3) / 4000

    np.testing.assert_allclose(counts(rule="softmax")[1], torch.softmax(3 * q[0], 0), atol=0.03)
    np.testing.assert_allclose(counts(rule="epsilon", epsilon=0.3)[1], [0.1, 0.8, 0.1], atol=0.03)
    agent, share = counts(rule="lll")
    assert share[lll_action(q[0], agent.e_values.E[0], 0.1, 3.0)] == 1
    agent.q[:] = 0
    np.testing.assert_allclose(np.bincount(agent.act(np.zeros(4000, dtype=int)), minlength=3) / 4000, 1 / 3, atol=0.03)  # ties at random
    assert (counts(rule="epsilon", epsilon=1.0)[0].act(np.zeros(4000, dtype=int), deterministic=True) == 1).all()


def test_e_values_cross_the_bridge_before_counters():
    def crossings(gamma_e):
        agent = DoraQ(28, 4, copies=10, gamma_e=gamma_e)
        return sum(agent.fit(BatchedBridge(10, k=8), 10_000, seed=0)["return"])

    assert crossings(0.9) > 3 * crossings(0.0)


def test_the_network_learns_e_values_from_the_actions_taken():
    agent = DoraDQN(19, 4, hidden=(32,), e_bias=4.0, gamma_e=0.9, warmup=10**9, e_lr=0.5)
    states = torch.eye(19)
    start = agent.e_values(states)
    assert start.shape == (19, 4) and (start > 0.95).all() and (start < 1).all()
    body = agent.online.body[1].weight.detach().clone()
    seen, learn = [], agent._learn_e
    agent._learn_e = lambda batch, a2, done, keep: seen.append((batch, a2, done, keep)) or learn(batch, a2, done, keep)
    torch.manual_seed(0)
    agent.fit(BatchedBridge(8, k=5, obs="one-hot"), 8 * 200, seed=0)
    e = agent.e_values(states).detach()
    assert (e < start).float().mean() > 0.9
    # The rule evens out E: a fall, after which nothing comes, needs fewer tries for it than the way to the news.
    rows, taken = (torch.cat([batch[name] for batch, *_ in seen]) for name in ("obs", "actions"))
    at_the_edge = taken[rows[:, 0:15:3].sum(1) > 0]
    assert (at_the_edge == 1).sum() < 0.7 * (at_the_edge == 0).sum()
    for (now, a2, done, keep), (after, *_) in itertools.pairwise(seen):
        assert torch.equal(a2[keep & ~done], after["actions"][keep & ~done])
        assert torch.equal(now["next_obs"][keep & ~done], after["obs"][keep & ~done])
    assert len(seen) == 199 and any(done.any() for _, _, done, _ in seen)
    assert not torch.equal(agent.online.body[1].weight, body)  # the heads share it


def test_one_step_of_the_e_head():
    agent = DoraDQN(3, 2, hidden=(4,), e_lr=0.5, gamma_e=0.5)
    obs, a, a2 = torch.eye(3)[:2], torch.tensor([0, 1]), torch.tensor([1, 0])
    batch = dict(obs=obs, actions=a, next_obs=torch.eye(3)[1:])
    e = agent.e_values(obs).gather(1, a[:, None])[:, 0]
    ahead = agent.e_values(batch["next_obs"]).detach()[[0, 1], [1, 0]]
    goal = torch.stack([0.5 * ahead[0], torch.tensor(0.0)])
    loss = -(goal * e.log() + (1 - goal) * (1 - e).log()).mean()
    wanted = agent.online.e_head.bias - 0.5 * torch.autograd.grad(loss, agent.online.e_head.bias)[0]
    agent._learn_e(batch, a2, torch.tensor([False, True]), torch.tensor([True, True]))
    torch.testing.assert_close(agent.online.e_head.bias, wanted)
    before = agent.online.e_head.bias.clone()
    agent._learn_e(batch, a2, torch.tensor([False, True]), torch.tensor([False, False]))
    torch.testing.assert_close(agent.online.e_head.bias, before)


def test_bad_agents():
    for make in (lambda: DoraQ(2, 2, rule="greedy"), lambda: DoraQ(2, 2, copies=0), lambda: DoraQ(2, 2, alpha=0.0), lambda: DoraQ(2, 2, gamma_e=1.0),
                 lambda: DoraDQN(2, 2, gamma_e=1.0), lambda: DoraDQN(2, 2, e_lr=0.0), lambda: DoraDQN(2, 2, n_step=3)):  # fmt: skip
        with pytest.raises(ValueError):
            make()


class Cut(BatchedTabular):
    """Six states in a ring, cut after three steps: the next episode starts at 0 again."""

    def __init__(self, n):
        P = np.zeros((6, 4, 6))
        P[np.arange(6), :, (np.arange(6) + 1) % 6] = 1
        super().__init__(n, P, np.zeros((6, 4)), obs="index", steps=3)


def test_after_a_cut_the_next_action_is_one_for_the_state_that_was_reached():
    """Greedy with values that name the state: action s % 4 in state s. The next episode begins in 0, the cut one stopped in 3."""
    agent, batches = DoraQ(6, 4, copies=2, rule="epsilon", epsilon=0.0, alpha=1e-9), []
    agent.q[torch.arange(12), torch.arange(12) % 6 % 4] = 1.0
    update = agent.update
    agent.update = lambda batch: batches.append(batch) or update(batch)
    agent.fit(Cut(2), 2 * 9, seed=0)
    cuts = [b for b in batches if b["next_obs"][0] == 3]
    assert len(cuts) == 3 and all(b["next_actions"].tolist() == [3, 3] for b in cuts)
    assert all((b["next_actions"] == b["next_obs"] % 4).all() for b in batches)


def test_ends_may_be_numbers_and_indices_must_lie_in_the_table():
    tables = [EValues(3, 2) for _ in range(3)]
    for table, done in zip(tables, (True, 1.0, 1)):
        table.update(0, 0, 1, 1, done)
        table.update(torch.tensor([1, 2]), torch.tensor([0, 1]), torch.tensor([2, 0]), torch.tensor([0, 0]), torch.tensor([1.0, 0.0]))
        assert torch.equal(table.E, tables[0].E)
    assert tables[0].E[0, 0] == pytest.approx(0.9) and tables[0].E[2, 1] == pytest.approx(0.9 + 0.1 * 0.9 * 0.9)
    for bad in ((-1, 0, 0, 0), (3, 0, 0, 0), (0, 2, 0, 0), (0, 0, -1, 0), (0, 0, 0, 5), (0.5, 0, 0, 0)):
        with pytest.raises(ValueError, match="must hold integers"):
            tables[0].update(*bad)
    batch = dict(obs=[0], actions=[1], rewards=[1.0], next_obs=[1], next_actions=[0])
    agents = [DoraQ(2, 2), DoraQ(2, 2)]
    for agent, done in zip(agents, ([True], [1.0])):
        agent.update(batch | {"dones": done})
    assert torch.equal(agents[0].q, agents[1].q) and torch.equal(agents[0].e_values.E, agents[1].e_values.E)


def test_the_rule_after_ten_thousand_visits():
    table, q = EValues(1, 3, 0.1, 0.0), torch.tensor([0.0, 0.0, 0.1])
    table._log[0] = torch.tensor([9000.0, 8000.0, 10000.0], dtype=torch.float64) * math.log(0.9)
    assert (table.E == 0).all()
    assert table.choose(0, q, beta=1.0) == 1 and table.choose(0, q, beta=5.0) == 2
    assert EValues(2, 3).choose(1, torch.zeros(3)) == 0
    with pytest.raises(ValueError, match="underflowed"):
        lll_action(q, table.E[0], 0.1)
    for bad in ((1, q), (-1, q), (0, q[:2])):
        with pytest.raises(ValueError, match="s must be"):
            table.choose(*bad)


def test_greedy_actions_break_ties_to_the_lowest_index():
    agent = DoraQ(2, 4, copies=50)
    assert (agent.act(np.zeros(50, dtype=int), deterministic=True) == 0).all()
    agent.q[:, 1] = agent.q[:, 3] = 1.0
    assert (agent.act(np.ones(50, dtype=int), deterministic=True) == 1).all()
