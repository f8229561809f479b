"""The batched pendulum against gymnasium's own."""

import gymnasium
import numpy as np

from dlatlas.rl.envs.control import BatchedPendulum, Pendulum


def test_pendulum_equals_gymnasiums_for_the_same_seed():
    ours, theirs = Pendulum(), gymnasium.make("Pendulum-v1")
    theirs.action_space.seed(0)
    for seed in range(3):
        a, b = ours.reset(seed=seed)[0], theirs.reset(seed=seed)[0]
        for t in range(200):
            np.testing.assert_allclose(a, b, atol=1e-6)
            action = theirs.action_space.sample() * 1.5  # also beyond the limits
            a, reward, terminated, truncated, _ = ours.step(action)
            b, other, term, trunc, _ = theirs.step(action)
            assert abs(reward - other) < 1e-6 and (terminated, truncated) == (term, trunc) == (False, t == 199)
    assert ours.observation_space == theirs.observation_space and ours.action_space == theirs.action_space


def test_batch_equals_gymnasiums_over_two_episodes():
    vec = BatchedPendulum(4)
    vec.reset(seed=5)
    theirs = [gymnasium.make("Pendulum-v1") for _ in range(4)]
    rng = np.random.default_rng(0)
    for _ in range(2):
        for i, env in enumerate(theirs):
            env.reset(seed=0)
            env.unwrapped.state = vec.state[i].copy()
        for _ in range(200):
            actions = rng.uniform(-2, 2, size=(4, 1)).astype(np.float32)
            obs, rewards, terminated, truncated, info = vec.step(actions)
            for i, env in enumerate(theirs):
                other, reward, _, trunc, _ = env.step(actions[i])
                np.testing.assert_allclose(info["final_obs"][i] if trunc else obs[i], other, atol=1e-6)
                assert abs(rewards[i] - reward) < 1e-6 and truncated[i] == trunc and not terminated[i]
        assert truncated.all() and (vec.t == 0).all()


def test_starts_fill_gymnasiums_range():
    vec = BatchedPendulum(4000)
    vec.reset(seed=0)
    angle, speed = vec.state.T
    assert np.abs(angle).max() <= np.pi and np.abs(angle).max() > 3.1 and abs(angle.mean()) < 0.1
    assert np.abs(speed).max() <= 1 and np.abs(speed).max() > 0.99
