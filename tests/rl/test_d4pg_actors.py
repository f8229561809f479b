"""D4PG with its actors in processes: the same transitions as in one process, an actor that is killed, and a learner that learns."""

import multiprocessing
import os
import signal

import numpy as np
import pytest
import torch

from dlatlas.rl.d4pg import D4PG
from dlatlas.rl.kit.actors import ActorPool

ATOMS = torch.linspace(-1200.0, 0.0, 51)


def agent(workers, **kwargs):
    torch.manual_seed(0)
    return D4PG(3, 1, -2.0, 2.0, ATOMS, workers=workers, hidden=(32, 32), **{"chunk": 20, "refresh": 20, "batch_size": 64, **kwargs})


def memory(learner):
    return {name: x[: len(learner.buffer)].clone() for name, x in learner.buffer.storage.items()}


@pytest.mark.parametrize("warmup", [0, 10**9])
def test_a_process_makes_the_very_transitions_of_the_single_process(warmup):
    here, there = (agent(workers, warmup=warmup, updates_per_step=0) for workers in (0, 1))
    histories = [learner.fit("Pendulum-v1", 900, 3, n_envs=2) for learner in (here, there)]
    assert len(here.buffer) == len(there.buffer) >= 880
    for name, x in memory(here).items():
        assert torch.equal(x, memory(there)[name]), name
    for key in ("step", "return", "length", "actor"):
        assert histories[0][key] == histories[1][key]
    assert set(histories[0]["actor"]) == {0, 1} and set(histories[0]["length"]) == {200}
    other = agent(0, warmup=warmup, updates_per_step=0)
    other.fit("Pendulum-v1", 900, 4, n_envs=2)
    assert not torch.equal(memory(here)["obs"], memory(other)["obs"])


def test_transitions_are_those_of_the_environment_with_noise_on_the_policys_actions():
    learner = agent(0, warmup=0, updates_per_step=0, noise=0.1, n_step=1)
    learner.fit("Pendulum-v1", 400, 0, n_envs=1)
    rows = memory(learner)
    mean = torch.from_numpy(learner.act(rows["obs"], deterministic=True))
    noise = (rows["actions"] - mean) / 2
    assert 0.08 < noise.std() < 0.12 and noise.mean().abs() < 0.02
    cos, sin, speed = rows["obs"].T
    angle = torch.atan2(sin, cos)
    cost = angle**2 + 0.1 * speed**2 + 0.001 * rows["actions"][:, 0] ** 2
    torch.testing.assert_close(rows["returns"], -cost, rtol=1e-4, atol=1e-4)
    assert torch.equal(rows["discounts"], torch.full((len(rows["obs"]),), 0.99))  # Pendulum only truncates


def test_a_killed_actor_does_not_stop_the_learner():
    learner = agent(2, warmup=100, capacity=300, prioritised=True)

    def kill(learner, history):
        if len(history["alive"]) == 6:
            os.kill(learner.processes[0].pid, signal.SIGKILL)

    history = learner.fit("Pendulum-v1", 2000, 0, n_envs=2, callback=kill)
    assert history["alive"][5] == 2 and history["alive"][-1] == 1 and set(history["actor"]) <= {0, 1}
    assert learner.transitions >= 2000 and learner.updates >= 900 and len(learner.buffer) == 300
    assert all(torch.isfinite(x).all() for x in learner.sample(500).values())
    assert learner.tree.total() == pytest.approx(learner.tree[np.arange(300)].sum(), rel=1e-9)
    assert [p.exitcode for p in learner.processes] == [-signal.SIGKILL, 0]
    assert not set(learner.processes) & set(multiprocessing.active_children())


def test_actors_follow_the_learner():
    """The learner's policy is replaced by full force to one side: the actors have to push so, too."""
    learner = agent(1, warmup=0, updates_per_step=0, noise=0.01)

    def force(learner, history):
        if len(history["alive"]) == 2:
            with torch.no_grad():
                learner.actor[-1].weight.zero_()
                learner.actor[-1].bias.fill_(5.0)

    learner.fit("Pendulum-v1", 1500, 0, callback=force)
    assert (memory(learner)["actions"][-200:] > 1.9).all() and not (memory(learner)["actions"][:40] > 1.9).all()


def test_it_learns_from_actors_as_it_does_without():
    learner = agent(0, warmup=200, target_period=20, lr=2e-3, gamma=0.95, reward_scale=1.0)
    history = learner.fit("Pendulum-v1", 3000, 0, n_envs=4)
    assert history["critic_loss"][-1] < 0.75 * history["critic_loss"][0] and history["update"][-1] >= 600
    before = sum(p.square().sum() for p in agent(0).actor.parameters())
    assert not torch.isclose(sum(p.square().sum() for p in learner.actor.parameters()), before)


def test_what_goes_wrong_is_said():
    for change in ({"workers": -1}, {"workers": 1, "chunk": 0}, {"workers": 1, "refresh": 0}):
        with pytest.raises(ValueError, match="workers"):
            D4PG(3, 1, -2.0, 2.0, ATOMS, **change)
    with pytest.raises(ValueError, match="1 actors and 2 workers"):
        agent(2).fit("Pendulum-v1", 100)
    with pytest.raises(ValueError, match="observations of shape"):
        agent(1).fit("MountainCarContinuous-v0", 100)
    with pytest.raises(ValueError, match="steps"):
        agent(1).fit("Pendulum-v1", 0)
    with pytest.raises(ValueError, match="at least one actor"):
        ActorPool(None, torch.nn.Linear(1, 1), "Pendulum-v1", 0, workers=0, seed=0)
    with pytest.raises(RuntimeError, match="died"):
        agent(1, warmup=10**9).fit("Pendulum-v1", 10**6, callback=lambda learner, history: learner.processes[0].kill())
