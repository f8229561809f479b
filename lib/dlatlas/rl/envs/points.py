r"""A point in the plane: navigation with inertia and walls (PointNav), and four goals of equal worth (MultiGoal)."""

import numpy as np
from gymnasium import spaces

from dlatlas.rl.envs import BatchedEnv, SingleEnv

__all__ = ["FOUR_ROOMS", "ONE_WALL", "BatchedMultiGoal", "BatchedPointNav", "MultiGoal", "PointNav"]

MAX_SPEED = 2.0
# Rectangles (x0, y0, x1, y1). The wall stands on the lower edge and leaves a passage at the top.
ONE_WALL = ((-0.05, -1.0, 0.05, 0.4),)
FOUR_ROOMS = (
    (-0.05, -1.0, 0.05, -0.65), (-0.05, -0.35, 0.05, 0.35), (-0.05, 0.65, 0.05, 1.0),
    (-1.0, -0.05, -0.65, 0.05), (-0.35, -0.05, 0.35, 0.05), (0.65, -0.05, 1.0, 0.05),
)  # fmt: skip


class BatchedPointNav(BatchedEnv):
    r"""Copies of a point mass in the box $[-1, 1]^2$ that is to reach a goal.

    $$
    v' = v + \Delta t\,(k\,a - c\,v),\qquad p' = p + \Delta t\,v',\qquad \Delta t = 0.1,
    $$

    with acceleration $a \in [-1, 1]^2$, gain $k$, damping $c$, and speed at most 2 along each axis. The box and the walls stop the motion
    along the axis that hits them (first x, then y), however fast it is, and set that speed to 0. The attribute `state` (n, 4) holds (p, v),
    `goal` (n, 2) the goals; `info["distance"]` is $\lVert p - g\rVert$.

    Args:
        num_envs: number of copies.
        goal: (x, y), or a rectangle (x0, y0, x1, y1) to draw it from; default the whole box.
        start: the same for the start, at rest.
        walls: rectangles (x0, y0, x1, y1), for instance `ONE_WALL` or `FOUR_ROOMS`; starts and goals are never
            drawn inside one. Walls that are to close a corner have to overlap.
        reward: "dense", minus the distance after the step, or "sparse", 1 where it is below 0.1.
        goal_in_obs: observe (p, v, g) instead of (p, v).
        damping: c.
        gain: k, a number or one for each axis.
        steps: an episode is truncated after so many steps.
    """

    def __init__(
        self,
        num_envs: int,
        goal=None,
        start=None,
        walls=(),
        reward: str = "dense",
        *,
        goal_in_obs: bool = True,
        damping: float = 0.2,
        gain=1.0,
        steps: int = 50,
    ):
        if reward not in {"dense", "sparse"}:
            raise ValueError(f"reward must be 'dense' or 'sparse', got {reward!r}")
        self.walls = np.array(walls, dtype=np.float64).reshape(-1, 4)
        if len(self.walls) != len(walls) or (self.walls[:, :2] >= self.walls[:, 2:]).any():
            raise ValueError(f"walls must be rectangles (x0, y0, x1, y1) with x0 < x1 and y0 < y1, got {walls!r}")
        self._blocks = np.where(np.abs(self.walls) >= 1, 2 * self.walls, self.walls)  # no slit between a wall and the box
        self.goals, self.starts = (self._region(name, where) for name, where in (("goal", goal), ("start", start)))
        self.reward, self.goal_in_obs, self.damping, self.gain = reward, goal_in_obs, damping, np.asarray(gain, dtype=np.float64)
        high = np.array([1.0, 1.0, MAX_SPEED, MAX_SPEED] + [1.0, 1.0] * goal_in_obs, dtype=np.float32)
        super().__init__(num_envs, spaces.Box(-high, high), spaces.Box(-1.0, 1.0, (2,)), steps)
        self.state, self.goal = np.zeros((num_envs, 4)), np.zeros((num_envs, 2))

    def _begin(self, which):
        self.state[which] = 0.0
        self.state[which, :2] = self._draw(self.starts, len(which))
        self.goal[which] = self._draw(self.goals, len(which))

    def _advance(self, actions):
        speed = self.state[:, 2:] + 0.1 * (self.gain * actions - self.damping * self.state[:, 2:])
        speed = np.clip(speed, -MAX_SPEED, MAX_SPEED)
        position = self.state[:, :2].copy()
        for axis in (0, 1):
            aim = position[:, axis] + 0.1 * speed[:, axis]
            reached = self._stopped(position, aim, axis)
            speed[:, axis][reached != aim] = 0.0
            position[:, axis] = reached
        self.state = np.concatenate([position, speed], axis=1)  # (n, 4)
        distance = self._distance()
        rewards = -distance if self.reward == "dense" else (distance < 0.1).astype(np.float64)
        return rewards, np.zeros(self.num_envs, dtype=bool)

    def _observe(self):
        return np.concatenate([self.state, self.goal] if self.goal_in_obs else [self.state], axis=1).astype(np.float32)

    def _info(self):
        return {"distance": self._distance()}

    def _distance(self) -> np.ndarray:
        return np.hypot(*(self.state[:, :2] - self.goal).T)

    def _stopped(self, position: np.ndarray, aim: np.ndarray, axis: int) -> np.ndarray:
        """Where a straight motion along one axis towards `aim` (n,) ends: at the first wall in its way, or at the box."""
        here, across = position[:, axis, None], position[:, 1 - axis, None]  # (n, 1) against walls (w,)
        near, far = self._blocks[:, axis], self._blocks[:, axis + 2]
        beside = (self._blocks[:, 1 - axis] < across) & (across < self._blocks[:, 3 - axis])  # (n, w)
        ceiling = np.where(beside & (here <= near), near, 1.0).min(axis=1, initial=1.0)
        floor = np.where(beside & (here >= far), far, -1.0).max(axis=1, initial=-1.0)
        return np.clip(aim, floor, ceiling)

    def _region(self, name: str, where) -> np.ndarray:
        where = np.array((-1.0, -1.0, 1.0, 1.0) if where is None else where, dtype=np.float64)
        region = np.tile(where, 2) if where.shape == (2,) else where
        if region.shape != (4,) or np.abs(region).max() > 1 or (region[:2] > region[2:]).any():
            raise ValueError(f"{name} must be (x, y) or (x0, y0, x1, y1) inside [-1, 1]^2, got {where!r}")
        if any((wall[:2] < region[:2]).all() and (region[2:] < wall[2:]).all() for wall in self._blocks):
            raise ValueError(f"{name} {where!r} lies inside a wall")
        return region

    def _draw(self, region: np.ndarray, count: int) -> np.ndarray:
        points = self.np_random.uniform(region[:2], region[2:], size=(count, 2))
        while (bad := np.flatnonzero(self._walled(points))).size:
            points[bad] = self.np_random.uniform(region[:2], region[2:], size=(bad.size, 2))
        return points

    def _walled(self, points: np.ndarray) -> np.ndarray:
        corners = points[:, None]  # (n, 1, 2) against (w, 2)
        return ((self._blocks[:, :2] < corners) & (corners < self._blocks[:, 2:])).all(axis=2).any(axis=1)


class BatchedMultiGoal(BatchedEnv):
    r"""Copies of a point that starts near the origin between four goals of equal worth, at distance 1 to the east, north, west and south.

    The action $a \in [-1, 1]^2$ is a velocity, $p' = p + 0.2\,a$, kept in $[-1.5, 1.5]^2$; the reward is $-\min_i\lVert p' - g_i\rVert^2 -
    0.1\lVert a\rVert^2$, plus 10 on coming within 0.2 of a goal, which ends the episode. By symmetry all four ways are best: a
    deterministic policy has to choose one, a policy of maximum entropy keeps them all. The attribute `state` (n, 2) holds p; `info["goal"]`
    is the index of the goal reached or -1.

    Args:
        num_envs: number of copies.
        spread: standard deviation of the start around the origin.
        steps: an episode is truncated after so many steps.
    """

    GOALS = np.array([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])

    def __init__(self, num_envs: int, spread: float = 0.02, steps: int = 30):
        if not 0 <= spread <= 0.1:
            raise ValueError(f"spread must lie in [0, 0.1], got {spread}")
        super().__init__(num_envs, spaces.Box(-1.5, 1.5, (2,)), spaces.Box(-1.0, 1.0, (2,)), steps)
        self.spread = spread
        self.state = np.zeros((num_envs, 2))

    def _begin(self, which):
        self.state[which] = self.spread * self.np_random.standard_normal((len(which), 2))

    def _advance(self, actions):
        self.state = np.clip(self.state + 0.2 * actions, -1.5, 1.5)
        nearest = self._distances().min(axis=1)
        arrived = nearest < 0.2
        return 10.0 * arrived - nearest**2 - 0.1 * (actions.astype(np.float64) ** 2).sum(axis=1), arrived

    def _observe(self):
        return self.state.astype(np.float32)

    def _info(self):
        distances = self._distances()
        return {"goal": np.where(distances.min(axis=1) < 0.2, distances.argmin(axis=1), -1)}

    def _distances(self) -> np.ndarray:
        return np.linalg.norm(self.state[:, None] - self.GOALS, axis=2)  # (n, 4)


class PointNav(SingleEnv):
    """One point mass; arguments of `BatchedPointNav`."""

    batched = BatchedPointNav


class MultiGoal(SingleEnv):
    """One point between four goals; arguments of `BatchedMultiGoal`."""

    batched = BatchedMultiGoal
