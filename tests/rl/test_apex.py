"""Ape-X: targets against a loop, the memory against frequencies and a plain list, and actors that are real processes and die."""

import multiprocessing
import os
import signal

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from dlatlas.rl.apex import ApexDQN, SharedReplay, actor_epsilons, nstep_double_q_target
from dlatlas.rl.kit.value_agent import DQN


def test_epsilons_of_the_actors():
    np.testing.assert_allclose(actor_epsilons(8).numpy(), [0.4 ** (1 + 7 * i / 7) for i in range(8)], rtol=1e-6)
    np.testing.assert_allclose(actor_epsilons(3, 0.5, 2.0).numpy(), [0.5, 0.25, 0.125], rtol=1e-6)
    assert actor_epsilons(1).tolist() == pytest.approx([0.4])
    for bad in (dict(n=0), dict(n=2, base=0.0), dict(n=2, base=1.5), dict(n=2, alpha=-1.0)):
        with pytest.raises(ValueError, match="n must be"):
            actor_epsilons(**bad)


def test_target_against_a_walk_through_episodes_with_ends():
    rng, B, n, A, gamma = np.random.default_rng(0), 200, 4, 3, 0.9
    r, done = rng.normal(size=(B, n)), rng.random((B, n)) < 0.15
    q, q_bar = rng.normal(size=(B, A)), rng.normal(size=(B, A))
    got = nstep_double_q_target(*map(torch.tensor, (r, gamma * ~done, q, q_bar)))
    for b in range(B):
        total, factor = 0.0, 1.0
        for k in range(n):
            total += factor * r[b, k]
            factor *= gamma
            if done[b, k]:
                break
        else:
            total += factor * q_bar[b, max(range(A), key=lambda a: q[b, a])]
        assert got[b].item() == pytest.approx(total, abs=1e-12)


def test_target_carries_no_gradient_and_no_value_after_an_end():
    q = torch.randn(2, 3, requires_grad=True)
    r, d = torch.ones(2, 2), torch.tensor([[0.9, 0.9], [0.9, 0.0]])
    out = nstep_double_q_target(r, d, q, q.detach().clone().fill_(torch.inf))
    assert not out.requires_grad and out[1] == pytest.approx(1.9) and out[0] == torch.inf
    with pytest.raises(ValueError, match=r"\(B, n\)"):
        nstep_double_q_target(r, d[:, :1], q, q)
    with pytest.raises(ValueError, match=r"\(B, A\)"):
        nstep_double_q_target(r, d, q[:1], q)


def filled(n=50, **kwargs):
    memory, p = SharedReplay(n, **kwargs), torch.rand(n, generator=torch.Generator().manual_seed(1)) * 3
    memory.add({"x": torch.arange(n)}, p)
    return memory, p.double().numpy()


@pytest.mark.parametrize("alpha", [0.0, 0.6, 1.0])
def test_frequencies_follow_the_priorities_and_weights_correct_them(alpha):
    memory, p = filled(alpha=alpha, beta=0.7)
    batch, idx, w = memory.sample(20_000, torch.Generator().manual_seed(0))
    share = p**alpha / (p**alpha).sum()
    assert stats.chisquare(np.bincount(batch["x"], minlength=50), 20_000 * share).pvalue > 1e-3
    assert torch.equal(batch["x"], idx)
    plain = (50 * share[idx.numpy()]) ** -0.7
    np.testing.assert_allclose(w.numpy(), plain / plain.max(), rtol=1e-5)


def test_full_correction_makes_the_mean_unbiased():
    memory, _ = filled(alpha=1.0, beta=1.0)
    _, idx, w = memory.sample(200_000, torch.Generator().manual_seed(0))
    value = torch.arange(50.0) ** 2
    assert float((w * value[idx]).sum() / w.sum()) == pytest.approx(float(value.mean()), rel=0.03)


def test_update_then_sample():
    memory, _ = filled()
    memory.update(torch.arange(50), torch.zeros(50))
    memory.update(torch.tensor([7, 3]), torch.tensor([1.0, 3.0]))
    _, idx, _ = memory.sample(4000, torch.Generator().manual_seed(0))
    assert set(idx.tolist()) == {3, 7}
    assert (idx == 3).float().mean().item() == pytest.approx(3**0.6 / (1 + 3**0.6), abs=0.03)
    memory.update([3, 7], [0.0, 0.0])  # nothing left: every transition has the same chance
    _, idx, w = memory.sample(2000, torch.Generator().manual_seed(0))
    assert len(set(idx.tolist())) == 50 and (w == 1).all()


def test_against_a_list_first_in_first_out_with_room_beyond_the_capacity():
    rng, memory, plain = np.random.default_rng(0), SharedReplay(20, alpha=1.0), []
    for step in range(200):
        if rng.random() < 0.7:
            x, p = rng.normal(size=(int(rng.integers(1, 12)), 2)), None
            p = rng.random(len(x))
            numbers = memory.add({"x": x}, p)
            plain += [[i, *row, q] for i, row, q in zip(numbers.tolist(), x, p)]
        if rng.random() < 0.5 and plain:
            pick, p = rng.choice(len(plain), size=min(3, len(plain)), replace=False), rng.random(3)
            memory.update([plain[i][0] for i in pick], p[: len(pick)])
            for i, q in zip(pick, p):
                plain[i][-1] = q
        if rng.random() < 0.4:
            assert memory.trim() == max(0, len(plain) - 20)
            plain = plain[-20:]
        assert len(memory) == len(plain)
        if plain:
            batch, idx, _ = memory.sample(50, torch.Generator().manual_seed(step))
            rows = {row[0]: row for row in plain}
            for x, i in zip(batch["x"].tolist(), idx.tolist()):
                assert x == rows[i][1:3]
            assert memory._tree.total() == pytest.approx(sum(row[-1] for row in plain), rel=1e-12)
    assert step == 199 and numbers.max() > 400


def test_a_late_priority_does_not_fall_on_the_successor_in_the_same_slot():
    memory = SharedReplay(4, alpha=1.0)
    memory.add({"x": torch.arange(4)}, torch.ones(4))
    _, idx, _ = memory.sample(64, torch.Generator().manual_seed(0))
    memory.trim()
    for k in range(1, 3):  # the ring goes round twice
        memory.add({"x": 10 * k + torch.arange(4)}, torch.ones(4))
        memory.trim()
    memory.update(idx, torch.full((64,), 1000.0))
    assert memory._tree.total() == pytest.approx(4) and len(memory) == 4
    batch, idx, _ = memory.sample(64, torch.Generator().manual_seed(0))
    assert set(batch["x"].tolist()) == {20, 21, 22, 23} and set(idx.tolist()) == {8, 9, 10, 11}


def test_bad_input_to_the_memory():
    memory = SharedReplay(4)
    with pytest.raises(ValueError, match="empty"):
        memory.sample(1)
    for p in ([-1.0], [float("nan")], [float("inf")]):
        with pytest.raises(ValueError, match="finite"):
            memory.add({"x": [1.0]}, p)
    for rows, p in (({"x": [1.0, 2.0]}, [1.0]), ({"x": [1.0], "y": [1, 2]}, [1.0]), ({}, [1.0])):
        with pytest.raises(ValueError, match="rows"):
            memory.add(rows, p)
    memory.add({"x": [1.0]}, [1.0])
    with pytest.raises(ValueError, match="holds"):
        memory.add({"z": [1.0]}, [1.0])
    with pytest.raises(ValueError, match=r"\(n,\)"):
        memory.update([0], [1.0, 2.0])
    with pytest.raises(ValueError, match="numbers"):
        memory.update([1], [1.0])
    with pytest.raises(ValueError, match="finite"):
        memory.update([0], [-1.0])
    with pytest.raises(ValueError, match="at least 1"):
        memory.sample(0)
    for bad in (dict(capacity=0), dict(capacity=3, alpha=-1.0), dict(capacity=3, beta=-0.1)):
        with pytest.raises(ValueError, match="capacity must be"):
            SharedReplay(**bad)


SMALL = dict(hidden=(16,), chunk=20, refresh=40, batch_size=32, target_period=50)


def rows(agent):
    return {name: x[: len(agent.memory)] for name, x in agent.memory._rows.items()}


def play(seed=0, steps=400, **kwargs):
    torch.manual_seed(seed)
    agent = ApexDQN("CartPole-v1", **{**SMALL, "n_actors": 2, "warmup": 10**9, **kwargs})
    return agent, agent.fit(steps=steps, seed=seed)


def test_a_process_makes_the_very_transitions_of_the_single_process():
    here, there = play(), play(workers=1)
    assert len(here[0].memory) == len(there[0].memory) >= 390
    for name, x in rows(here[0]).items():
        assert torch.equal(x, rows(there[0])[name]), name
    for key in ("step", "return", "actor"):
        assert here[1][key] == there[1][key]
    assert not torch.equal(rows(here[0])["obs"], rows(play(seed=1)[0])["obs"])
    assert all(p.exitcode == 0 for p in there[0].processes)


def test_an_actor_does_the_same_in_any_group():
    """Two actors in one process or in two: each episode of each actor has the same return."""
    together, apart = play()[1], play(workers=2, steps=800)[1]
    for actor in (0, 1):
        returns = [[r for r, who in zip(h["return"], h["actor"]) if who == actor] for h in (together, apart)]
        n = min(map(len, returns))
        assert n >= 3 and returns[0][:n] == returns[1][:n]


def test_a_killed_actor_does_not_stop_the_learner():
    torch.manual_seed(0)
    agent = ApexDQN("CartPole-v1", 2, workers=2, warmup=100, capacity=300, **SMALL)

    def kill(agent, history):
        if len(history["alive"]) == 6:
            os.kill(agent.processes[0].pid, signal.SIGKILL)

    history = agent.fit(steps=1500, seed=0, callback=kill)
    assert history["alive"][5] == 2 and history["alive"][-1] == 1 and set(history["actor"]) == {0, 1}
    assert agent.transitions >= 1500 and agent.updates >= 600 and len(agent.memory) == 300
    batch, idx, w = agent.memory.sample(500)
    assert all(torch.isfinite(x).all() for x in batch.values()) and ((w > 0) & (w <= 1)).all()
    assert idx.min() >= agent.transitions - 300 and idx.max() < agent.transitions
    numbers = torch.arange(agent.transitions - 300, agent.transitions).numpy() % agent.memory._room
    assert agent.memory._tree.total() == pytest.approx(agent.memory._tree[numbers].sum(), rel=1e-12)
    assert [p.exitcode for p in agent.processes] == [-signal.SIGKILL, 0]
    assert not set(agent.processes) & set(multiprocessing.active_children())


def test_processes_end_when_nobody_is_left_when_one_fails_and_when_the_learner_does():
    agent = ApexDQN("CartPole-v1", 1, workers=1, warmup=10**9, **SMALL)
    with pytest.raises(RuntimeError, match="died"):
        agent.fit(steps=10**6, callback=lambda agent, history: agent.processes[0].kill())
    broken = ApexDQN("CartPole-v1", 1, workers=1, network=nn.Linear(5, 2), **SMALL)  # CartPole has four numbers
    with pytest.raises(RuntimeError, match="an actor failed: RuntimeError"):
        broken.fit(steps=100)

    def fail(agent, history):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        agent.fit(steps=100, callback=fail)
    assert not any(p.is_alive() for p in agent.processes + broken.processes) and agent.processes[0].exitcode == 0


def test_processes_see_what_the_learner_has_learned():
    """A huge step at the first update makes every value favour one action: the nearly greedy actor has to follow."""
    torch.manual_seed(0)
    agent = ApexDQN("CartPole-v1", 1, workers=1, base=1e-9, warmup=10**9, **SMALL)

    def favour(agent, history):
        if len(history["alive"]) == 2:
            with torch.no_grad():
                agent.online[-1].weight.zero_()
                agent.online[-1].bias.copy_(torch.tensor([1e3, 0.0]))
            agent.updates += 1

    agent.fit(steps=1000, seed=0, callback=favour)
    assert (rows(agent)["actions"][-200:] == 0).all() and (rows(agent)["actions"][:40] == 1).any()


def test_first_priorities_are_the_actors_own_errors():
    agent, _ = play(priority_floor=0.01)
    r = rows(agent)
    with torch.no_grad():
        q, after = agent.online(r["obs"]), agent.online(r["next_obs"])
    delta = r["returns"] + r["discounts"] * after.max(1).values - q.gather(1, r["actions"][:, None])[:, 0]
    wanted = (delta.abs().double() + 0.01) ** 0.6
    np.testing.assert_allclose(agent.memory._tree[np.arange(len(wanted))], wanted.numpy(), rtol=1e-4)


def test_every_actor_is_as_random_as_its_epsilon():
    torch.manual_seed(0)
    agent = ApexDQN("CartPole-v1", 3, n_step=1, base=0.6, alpha_epsilon=2.0, warmup=10**9, **SMALL)
    agent.fit(steps=6000, seed=0)
    r = rows(agent)
    with torch.no_grad():
        greedy = agent.online(r["obs"]).argmax(1)
    odd = (r["actions"] != greedy).float()[: len(greedy) // 3 * 3].view(-1, 3).mean(0)
    np.testing.assert_allclose(odd.numpy(), 0.5 * np.array([0.6, 0.6**2, 0.6**3]), atol=0.03)


def test_errors_are_those_of_the_plain_network_and_learning_repeats_itself():
    agent, history = play(warmup=100, steps=1000)
    again, same = play(warmup=100, steps=1000)
    assert history == same and agent.updates == again.updates > 300
    for a, b in zip(agent.online.parameters(), again.online.parameters()):
        assert torch.equal(a, b)
    batch, *_ = agent.memory.sample(50)
    torch.testing.assert_close(agent.td_errors(batch), DQN.td_errors(agent, batch))


def test_bad_agents():
    for bad in (dict(n_actors=0), dict(workers=9), dict(chunk=0), dict(refresh=0), dict(priority_floor=-1.0)):
        with pytest.raises(ValueError, match="at least 1"):
            ApexDQN("CartPole-v1", **bad)


def test_nothing_after_an_end_counts_not_even_an_infinite_reward():
    r = torch.tensor([[1.0, torch.inf], [1.0, torch.nan]])
    out = nstep_double_q_target(r, torch.tensor([[0.0, 0.9]]).expand(2, 2), torch.ones(2, 2), torch.ones(2, 2))
    assert out.tolist() == [1.0, 1.0]


def test_rows_that_do_not_fit_are_refused_and_leave_the_memory_alone():
    memory = SharedReplay(10)
    memory.add({"r": torch.tensor([1, 2]), "o": torch.zeros(2, 4)}, [1.0, 1.0])
    for r, o in (([0.7, 0.9], torch.zeros(2, 4)), ([3, 4], torch.ones(2, 1)), ([3, 4], torch.ones(2, 3)), ([3, 4], torch.ones(2))):
        with pytest.raises(ValueError, match="must have rows of shape"):
            memory.add({"r": torch.tensor(r), "o": o}, [1.0, 1.0])
    assert len(memory) == 2
    memory.add({"r": torch.tensor([3]), "o": torch.ones(1, 4, dtype=torch.float64)}, [1.0])  # more digits than needed are fine
    assert memory._rows["r"][:3].tolist() == [1, 2, 3] and memory._rows["o"][2].tolist() == [1.0] * 4


@pytest.mark.parametrize("workers", [0, 1])
def test_scaled_rewards_reach_the_memory_and_the_first_priorities(workers):
    plain, small = play(), play(reward_scale=0.125, workers=workers)
    torch.testing.assert_close(rows(small[0])["returns"], 0.125 * rows(plain[0])["returns"])
    assert small[1]["return"] == plain[1]["return"] and not np.allclose(*(a.memory._tree[np.arange(100)] for a in (small[0], plain[0])))


def test_what_cannot_be_changed_is_refused():
    for bad in ({"double": False}, {"prioritised": True}, {"prioritised": False}, {"epsilon": (1.0, 0.1, 10)}):
        with pytest.raises(ValueError, match="Ape-X always"):
            ApexDQN("CartPole-v1", **bad)
