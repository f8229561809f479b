"""Atari games in the house's convention, the network that reads them, and Ape-X on them with processes."""

import builtins

import numpy as np
import pytest
import torch

from dlatlas.rl.apex import ApexDQN
from dlatlas.rl.envs.atari import Atari
from dlatlas.rl.kit.evaluate import evaluate
from dlatlas.rl.kit.nets import NatureNet
from dlatlas.rl.kit.rollout import as_vector


def test_copies_end_in_the_step_that_ends_their_episode():
    vec = as_vector(Atari("pong", max_num_frames_per_episode=120, noop_max=0), 3)
    obs, _ = vec.reset(seed=0)
    assert obs.shape == (3, 4, 84, 84) and obs.dtype == np.uint8 and vec.single_action_space.n == 6
    ends = []
    for step in range(90):
        obs, rewards, terminated, truncated, info = vec.step(np.zeros(3, dtype=np.int64))
        assert info["valid"].all() and np.abs(rewards).max() <= 1 and not terminated.any()
        if truncated.any():
            ends.append(step)
            assert (info["final_obs"][truncated] != obs[truncated]).any()  # the last frames of one episode, the first ones of the next
    assert len(ends) >= 2


def test_the_network_scales_bytes_and_its_advantages_have_no_mean():
    torch.manual_seed(0)
    net, frames = NatureNet(6), torch.randint(0, 256, (5, 4, 84, 84), dtype=torch.uint8)
    assert net(frames).shape == (5, 6)
    z = net.trunk(frames.double().div(255).float())
    torch.testing.assert_close(net(frames).mean(1, keepdim=True), net.value(z))
    a = net.advantage(z)
    torch.testing.assert_close(net(frames) - net.value(z), a - a.mean(1, keepdim=True))
    plain = NatureNet(3, frames=1, dueling=False)
    assert plain(torch.zeros(2, 1, 84, 84)).shape == (2, 3) and not any("value" in name for name, _ in plain.named_parameters())
    # 4 x 32 x 64 + 32, 32 x 64 x 16 + 64, 64 x 64 x 9 + 64, and heads of 512 units on 7 x 7 x 64
    assert sum(p.numel() for p in net.trunk.parameters()) == 8224 + 32832 + 36928
    with pytest.raises(ValueError, match="n_actions"):
        NatureNet(0)


@pytest.mark.parametrize("workers", [0, 2])
def test_ape_x_plays_pong(workers):
    torch.manual_seed(0)
    agent = ApexDQN(
        Atari("pong"),
        2,
        3,
        workers=workers,
        network=NatureNet(6),
        chunk=10,
        refresh=10,
        warmup=40,
        batch_size=4,
        target_period=5,
        capacity=200,
    )
    agent.fit(steps=60, seed=0)
    assert agent.transitions >= 60 and agent.updates >= 5
    held = agent.memory._rows
    assert held["obs"].dtype == torch.uint8 and held["obs"].shape[1:] == (4, 84, 84)
    # The newer three frames of a state are the older ones of the state that follows in the game; three steps later one frame is left.
    assert torch.equal(held["obs"][0, 3], held["next_obs"][0, 0])
    score = evaluate(agent, Atari("pong", max_num_frames_per_episode=80), 2, seed=1)
    assert score["lengths"].max() <= 21 and abs(score["mean"]) <= 1


def test_without_the_package_the_remedy_is_named(monkeypatch):
    real = builtins.__import__
    monkeypatch.setattr(
        builtins, "__import__", lambda name, *a, **k: (_ for _ in ()).throw(ImportError(name)) if "ale_py" in name else real(name, *a, **k)
    )
    with pytest.raises(ImportError, match=r'pip install "dlatlas\[atari\]"'):
        as_vector(Atari("pong"), 1)
