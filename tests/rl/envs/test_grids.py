"""HealthGrid and PushBox against their rules, told again with sets and loops."""

from collections import Counter

import numpy as np
import pytest

from dlatlas.rl.envs.grids import BatchedHealthGrid, BatchedPushBox, HealthGrid, PushBox

MOVES = [(1, 0), (0, -1), (-1, 0), (0, 1)]
SMALL = {"size": 6, "boxes": 3, "goals": 2, "obstacles": 2, "steps": 30}


class PlainPush:
    """One puzzle with sets of cells, started from the observation of the environment under test."""

    def __init__(self, planes, steps):
        self.size, self.steps, self.t = planes.shape[1], steps, 0
        agents, self.goals, self.boxes, self.obstacles = ({tuple(map(int, c)) for c in np.argwhere(p)} for p in planes[:4])
        (self.agent,) = agents
        self.left, self.edge = len(self.boxes), 0
        self.events = Counter()

    def on_board(self, cell):
        return all(0 <= x < self.size for x in cell)

    def step(self, action):
        row, column = MOVES[action]
        step = (self.agent[0] + row, self.agent[1] + column)
        push = (step[0] + row, step[1] + column)
        reward, done, event, moved = -0.01, False, "walk", True
        if not self.on_board(step):
            reward, done, event, moved = reward - 1, True, "off", False
        elif step in self.boxes:
            if push in self.boxes:
                reward, event, moved = reward - 0.1, "blocked", False
            else:
                self.boxes.remove(step)
                if not self.on_board(push):
                    reward, event = reward - 0.1, "lost"
                    self.left, self.edge = self.left - 1, self.edge - 1
                elif push in self.obstacles:
                    reward, event = reward - 0.2, "onto obstacle"
                    self.boxes.add(push)
                elif push in self.goals:
                    reward, event = reward + 1, "goal"
                    self.left -= 1
                else:
                    event = "push"
                    self.boxes.add(push)
                    if 0 in push or self.size - 1 in push:
                        self.edge, event = self.edge + 1, "onto the border"
        if moved:
            self.agent = step
            if step in self.obstacles:
                reward, event = reward - 0.2, event + " standing on an obstacle"
        self.t += 1
        self.events[event] += 1
        return reward, done or self.left <= self.edge or self.t >= self.steps

    def planes(self):
        out = np.zeros((5, self.size, self.size), dtype=np.float32)
        for plane, cells in enumerate(({self.agent}, self.goals, self.boxes, self.obstacles)):
            for cell in cells:
                out[plane][cell] = 1
        out[4] = (self.steps - self.t) / self.steps
        return out


@pytest.mark.parametrize("kwargs", [{}, SMALL, {"size": 5, "boxes": 2, "goals": 3, "obstacles": 1, "steps": 60}])
def test_pushbox_equals_the_rules_told_again(kwargs):
    n = 24
    vec = BatchedPushBox(n, **kwargs)
    obs, _ = vec.reset(seed=1)
    plain = [PlainPush(planes, vec.max_steps) for planes in obs]
    rng, events, ends = np.random.default_rng(0), Counter(), Counter()
    for _ in range(400):
        actions = rng.integers(4, size=n)
        for i, puzzle in enumerate(plain):  # stay on the board nine times of ten, so that episodes get long
            while rng.random() < 0.9 and not puzzle.on_board(tuple(np.add(puzzle.agent, MOVES[actions[i]]))):
                actions[i] = rng.integers(4)
        obs, rewards, terminated, truncated, info = vec.step(actions)
        assert not truncated.any()
        for i, puzzle in enumerate(plain):
            reward, done = puzzle.step(actions[i])
            assert rewards[i] == pytest.approx(reward, abs=1e-12) and terminated[i] == done
            np.testing.assert_allclose(info["final_obs"][i] if done else obs[i], puzzle.planes(), atol=1e-6)
            if done:
                events += puzzle.events
                ends["time" if puzzle.t == vec.max_steps else "boxes" if puzzle.left <= puzzle.edge else "off"] += 1
                plain[i] = PlainPush(obs[i], vec.max_steps)
    wanted = {"off", "blocked", "lost", "goal", "push", "onto the border", "onto obstacle", "walk standing on an obstacle"}
    assert wanted <= set(events) | ({"blocked"} if vec.counts[1] < 3 else set()), events
    assert ends["off"] and ends["boxes"] + ends["time"], ends


def test_pushbox_starts():
    vec = BatchedPushBox(200)
    obs, _ = vec.reset(seed=0)
    assert obs.shape == (200, 5, 8, 8) and obs.dtype == np.float32
    assert (obs[:, :4].sum(axis=(2, 3)) == [1, 5, 12, 6]).all()
    assert obs[:, :4].sum(axis=1).max() == 1  # distinct cells
    border = np.ones((8, 8), dtype=bool)
    border[1:-1, 1:-1] = False
    assert not obs[:, :4, border].any() and (obs[:, 4] == 1).all()
    frequency = obs[:, 0].mean(axis=0)[1:-1, 1:-1]
    assert frequency.max() < 0.11  # 36 cells, 1/36 each


def board(env, agent, boxes, goals=((1, 1),), obstacles=()):
    """Lay out a puzzle by hand."""
    core, width = env.core, env.core.size + 4
    env.reset(seed=0)
    at = lambda cell: (cell[0] + 2) * width + cell[1] + 2  # noqa: E731
    core.agent[0] = at(agent)
    core.things[:] = False
    for plane, cells in enumerate((goals, boxes, obstacles)):
        core.things[0, plane, [at(c) for c in cells]] = True
    core.boxes_left[0], core.edge_boxes[0] = len(boxes), 0


def test_pushbox_border_count_of_the_authors():
    env = PushBox(size=6, boxes=1, goals=1, obstacles=0)
    board(env, (2, 3), [(2, 4)])
    assert env.step(3)[1:3] == (-0.01, True)  # the only box is on the border: nothing is left to do
    board(env, (2, 3), [(2, 4), (4, 4), (3, 3)])
    assert env.step(3)[1:3] == (-0.01, False)
    env.step(2), env.step(3)  # up, right: now above the box (2, 5)
    assert env.step(0)[2] is False  # slides along the border: counted again, 3 boxes left, 2 counted
    assert env.step(0)[2] is True  # and again: 3 counted although two boxes are inside


def test_pushbox_a_goal_stays_and_gives_again():
    env = PushBox(size=6, boxes=1, goals=1, obstacles=0)
    board(env, (3, 1), [(3, 2), (2, 3), (4, 4)], goals=[(3, 3)])
    obs, reward, done, *_ = env.step(3)
    assert reward == pytest.approx(0.99) and not done and obs[1, 3, 3] == 1 and obs[2].sum() == 2
    board(env, (3, 1), [(3, 2)], goals=[(3, 3)])
    assert env.step(3)[2] is True


@pytest.mark.parametrize(("delay", "sparsity"), [(0, 1.0), (8, 1.0), (60, 1.0), (5, 0.25)])
def test_healthgrid_follows_its_rules(delay, sparsity):
    n, steps = 16, 60
    vec = BatchedHealthGrid(n, delay=delay, sparsity=sparsity, steps=steps)
    obs, _ = vec.reset(seed=2)
    rng, total, gathered, paid = np.random.default_rng(0), 0, 0, 0.0
    for _ in range(3):
        ledger = np.zeros((n, steps))
        rewards_seen = np.zeros((n, steps))
        for t in range(steps):
            agents = [tuple(np.argwhere(planes[0])[0]) for planes in obs]
            before = obs
            actions = rng.integers(4, size=n)
            obs, rewards, terminated, truncated, info = vec.step(actions)
            last = list(info["final_obs"]) if t == steps - 1 else list(obs)
            assert not terminated.any() and (truncated == (t == steps - 1)).all()
            rewards_seen[:, t] = rewards
            for i in range(n):
                row, column = np.clip(np.add(agents[i], MOVES[actions[i]]), 0, 6)
                assert last[i][0].sum() == 1 and last[i][0, row, column] == 1 and last[i][1].sum() == 4
                gone, new = before[i][1] > last[i][1], before[i][1] < last[i][1]
                if before[i][1, row, column]:
                    assert gone.sum() == new.sum() == 1 and gone[row, column]
                    ledger[i, min(t + delay, steps - 1)] += 1
                else:
                    assert not gone.any() and not new.any()
        if sparsity == 1:
            np.testing.assert_array_equal(rewards_seen, ledger)
        assert (rewards_seen <= ledger).all()
        gathered, paid, total = gathered + ledger.sum(), paid + rewards_seen.sum(), total + n
        if delay >= steps:
            assert not rewards_seen[:, :-1].any()
    assert gathered > 2 * total
    if sparsity < 1:
        assert abs(paid / gathered - sparsity) < 4 * np.sqrt(sparsity * (1 - sparsity) / gathered)


def test_healthgrid_packs_appear_anywhere_but_on_something():
    size, n = 3, 9000
    vec = BatchedHealthGrid(n, size=size, packs=2)
    vec.reset(seed=0)
    vec.agent[:], vec.packs[:] = 0, False
    vec.packs[:, [1, 5]] = True
    obs, rewards, *_ = vec.step(np.full(n, 3))  # to the right, onto cell 1
    assert (rewards == 1).all()
    counts = obs[:, 1].reshape(n, 9).sum(axis=0)
    assert counts[1] == 0 and counts[5] == n  # not under the agent; the other pack lies still
    others = counts[[0, 2, 3, 4, 6, 7, 8]]
    assert ((others - n / 7) ** 2 / (n / 7)).sum() < 22.5  # chi-square with 6 degrees of freedom, 0.1 %


def test_bad_input():
    for make, name in (
        (lambda: HealthGrid(packs=48), "packs"),
        (lambda: HealthGrid(sparsity=1.5), "sparsity"),
        (lambda: HealthGrid(delay=-1), "delay"),
        (lambda: PushBox(size=6), "do not fit"),
        (lambda: PushBox(boxes=0), "do not fit"),
    ):
        with pytest.raises(ValueError, match=name):
            make()
