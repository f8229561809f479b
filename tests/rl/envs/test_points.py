"""The point environments against their equations, and walls that nothing crosses."""

import numpy as np
import pytest

from dlatlas.rl.envs.points import FOUR_ROOMS, ONE_WALL, BatchedMultiGoal, BatchedPointNav, MultiGoal, PointNav


def test_pointnav_without_walls_follows_its_equation():
    env, rng = PointNav(damping=0.3, gain=(2.0, 0.5)), np.random.default_rng(0)
    stops = 0
    for seed in range(5):
        obs, info = env.reset(seed=seed)
        p, v, g = obs[:2].astype(float), obs[2:4].astype(float), obs[4:].astype(float)
        p, g = env.core.state[0, :2].copy(), env.core.goal[0].copy()
        assert not v.any() and info["distance"] == pytest.approx(np.hypot(*(p - g)))
        push = rng.uniform(-1, 1, size=2)
        for t in range(50):
            a = np.clip(push + 0.3 * rng.normal(size=2), -1, 1)
            for i, k in enumerate((2.0, 0.5)):
                v[i] = min(max(v[i] + 0.1 * (k * a[i] - 0.3 * v[i]), -2), 2)
                p[i] += 0.1 * v[i]
                if abs(p[i]) > 1:
                    p[i], v[i], stops = np.sign(p[i]), 0.0, stops + 1
            obs, reward, terminated, truncated, info = env.step(a)
            np.testing.assert_allclose(obs, [*p, *v, *g], atol=1e-6)
            assert reward == pytest.approx(-np.hypot(*(p - g))) == pytest.approx(-info["distance"])
            assert not terminated and truncated == (t == 49)
    assert stops > 10


def test_sparse_reward_and_hidden_goal():
    env = PointNav(goal=(0.5, 0.5), start=(0.5, 0.42), reward="sparse", goal_in_obs=False)
    obs, _ = env.reset(seed=0)
    assert obs.shape == (4,)
    np.testing.assert_allclose(obs, [0.5, 0.42, 0, 0], rtol=1e-6)
    assert env.step(np.zeros(2))[1] == 1.0
    rewards = [env.step(np.array([0.0, -1.0]))[1] for _ in range(10)]
    assert rewards[0] == 1.0 and rewards[-1] == 0.0 and sorted(rewards, reverse=True) == rewards


def test_starts_and_goals_come_from_their_regions_and_never_from_a_wall():
    vec = BatchedPointNav(3000, goal=(0.0, -1.0, 0.3, 0.0), start=(-1.0, 0.5, 0.0, 1.0), walls=ONE_WALL)
    vec.reset(seed=0)
    p, g = vec.state[:, :2], vec.goal
    assert p[:, 0].min() < -0.95 and -0.05 < p[:, 0].max() <= 0 and p[:, 1].min() >= 0.5
    assert g[:, 0].min() >= 0.05 and g[:, 0].max() <= 0.3 and g[:, 1].max() <= 0
    vec = BatchedPointNav(3000, walls=FOUR_ROOMS)
    vec.reset(seed=0)
    for points in (vec.state[:, :2], vec.goal):
        for x0, y0, x1, y1 in FOUR_ROOMS:
            assert not ((x0 < points) & (points < x1))[:, 0][((y0 < points) & (points < y1))[:, 1]].any()


@pytest.mark.parametrize("gain", [1.0, 30.0])
def test_nothing_passes_a_wall_from_side_to_side(gain):
    vec = BatchedPointNav(300, walls=[(-0.01, -1, 0.01, 1)], gain=gain, damping=0.0, steps=1000)
    vec.reset(seed=0)
    side, rng, touched = np.sign(vec.state[:, 0]), np.random.default_rng(0), 0
    for _ in range(120):
        vec.step(rng.uniform(-1, 1, size=(300, 2)) * 0.3 - 0.7 * side[:, None] * [1, 0])
        assert (np.sign(vec.state[:, 0]) == side).all() and (np.abs(vec.state[:, 0]) >= 0.01).all()
        touched += (np.abs(vec.state[:, 0]) == 0.01).sum()
    assert touched > 1000


def test_motion_of_many_points_never_cuts_a_wall():
    """Each step is an L: along x at the old y, then along y at the new x. Neither leg may meet the inside of a wall."""
    vec, rng = BatchedPointNav(200, walls=FOUR_ROOMS, gain=8.0, steps=1000), np.random.default_rng(0)
    vec.reset(seed=0)
    start = vec.state[:, :2].copy()
    for _ in range(150):
        before = vec.state[:, :2].copy()
        vec.step(rng.uniform(-1, 1, size=(200, 2)))
        after = vec.state[:, :2]
        for x0, y0, x1, y1 in FOUR_ROOMS:
            low, high = np.minimum(before, after), np.maximum(before, after)
            first = (y0 < before[:, 1]) & (before[:, 1] < y1) & (low[:, 0] < x1) & (high[:, 0] > x0)
            second = (x0 < after[:, 0]) & (after[:, 0] < x1) & (low[:, 1] < y1) & (high[:, 1] > y0)
            assert not first.any() and not second.any()
    assert (np.sign(start) != np.sign(after)).any(axis=1).mean() > 0.2  # and yet the doors are open


def test_one_wall_has_a_passage_at_the_top():
    def drive(y):
        env = PointNav(goal=(0.8, y), start=(-0.8, y), walls=ONE_WALL)
        env.reset(seed=0)
        for _ in range(40):
            obs, *_ = env.step(np.array([1.0, 0.0]))
        return obs[0], obs[2]

    x, speed = drive(0.0)
    assert (x, speed) == (pytest.approx(-0.05), 0.0)
    assert drive(0.7)[0] == pytest.approx(1.0)


def test_multigoal_follows_its_equation():
    goals = [(1, 0), (0, 1), (-1, 0), (0, -1)]
    env, rng, reached = MultiGoal(), np.random.default_rng(0), set()
    for seed in range(60):
        env.reset(seed=seed)
        p, push = env.core.state[0].copy(), rng.uniform(-1, 1, size=2)
        assert np.abs(p).max() < 0.12
        for t in range(30):
            a = np.clip(push + 0.2 * rng.normal(size=2), -1, 1)
            p = np.clip(p + 0.2 * a, -1.5, 1.5)
            squared = [(p[0] - x) ** 2 + (p[1] - y) ** 2 for x, y in goals]
            there = min(squared) < 0.04
            obs, reward, terminated, truncated, info = env.step(a)
            np.testing.assert_allclose(obs, p, atol=1e-6)
            assert reward == pytest.approx(10 * there - min(squared) - 0.1 * (a @ a))
            assert terminated == there and info["goal"] == (squared.index(min(squared)) if there else -1)
            assert truncated == (t == 29 and not there)
            if terminated:
                reached.add(int(info["goal"]))
                break
    assert reached == {0, 1, 2, 3}


def test_multigoal_looks_the_same_after_a_quarter_turn():
    turn = np.array([[0.0, -1.0], [1.0, 0.0]])
    rng = np.random.default_rng(0)
    start, actions = rng.normal(size=(50, 2)) * 0.5, rng.uniform(-1, 1, size=(50, 2))
    one, two = BatchedMultiGoal(50), BatchedMultiGoal(50)
    one.reset(seed=0, options={"state": start})
    two.reset(seed=0, options={"state": start @ turn.T})
    a, b = one.transition(actions), two.transition(actions @ turn.T)
    np.testing.assert_allclose(a[0] @ turn.T, b[0], atol=1e-6)
    np.testing.assert_allclose(a[1], b[1])
    np.testing.assert_array_equal(np.where(a[4]["goal"] < 0, -1, (a[4]["goal"] + 1) % 4), b[4]["goal"])
    assert a[2].any()


def test_bad_input():
    for make, name in (
        (lambda: PointNav(reward="shaped"), "reward"),
        (lambda: PointNav(walls=[(0, 0, 0, 1)]), "walls"),
        (lambda: PointNav(goal=(2.0, 0.0)), "goal"),
        (lambda: PointNav(start=(0.5, 0.5, 0.1, 0.6)), "start"),
        (lambda: PointNav(start=(0.0, 0.0), walls=ONE_WALL), "inside a wall"),
        (lambda: MultiGoal(spread=0.5), "spread"),
    ):
        with pytest.raises(ValueError, match=name):
            make()
