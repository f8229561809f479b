r"""Grid worlds of planes, thousands of copies a batch: gathering packs (HealthGrid) and pushing boxes (PushBox).

Observations are stacks of planes (C, H, W) of 0 and 1, ready for a convolution. The four actions are down, left, up, right.
"""

import numpy as np
from gymnasium import spaces

from dlatlas.rl.envs import BatchedEnv, SingleEnv

__all__ = ["BatchedHealthGrid", "BatchedPushBox", "HealthGrid", "PushBox"]


class BatchedHealthGrid(BatchedEnv):
    """Copies of a field on which an agent gathers packs; a gathered pack appears again in a random empty cell.

    Observation: planes (2, size, size) of the agent and of the packs. A pack is worth 1 with probability `sparsity` and 0
    otherwise; nobody can see which. What it is worth is paid `delay` steps later, at the latest in the last step of the episode; so the
    sum of rewards always is the number of real packs gathered, and a delay of `steps` or more pays all at the end ("terminal-only").
    Episodes are truncated after `steps` steps: the clock is not seen, so the end is no state of the problem.

    Args:
        num_envs: number of copies.
        size: side of the field.
        packs: packs that lie on it at any time.
        sparsity: probability that a pack is real.
        delay: steps from a pack to its reward.
        steps: length of an episode.
    """

    def __init__(self, num_envs: int, size: int = 7, packs: int = 4, *, sparsity: float = 1.0, delay: int = 0, steps: int = 60):
        if not 1 <= packs <= size * size - 2:
            raise ValueError(f"packs must lie in 1..{size * size - 2} on a {size}x{size} field, got {packs}")
        if not 0 <= sparsity <= 1 or delay < 0:
            raise ValueError(f"sparsity must lie in [0, 1] and delay must not be negative, got {sparsity} and {delay}")
        super().__init__(num_envs, spaces.Box(0.0, 1.0, (2, size, size)), spaces.Discrete(4), steps)
        self.size, self.n_packs, self.sparsity, self.delay = size, packs, sparsity, delay
        cells = np.arange(size * size).reshape(size, size)
        around = np.pad(cells, 1, mode="edge")  # the border stops a move
        self._next = np.stack([around[2:, 1:-1], around[1:-1, :-2], around[:-2, 1:-1], around[1:-1, 2:]], axis=-1).reshape(-1, 4)
        self.agent = np.zeros(num_envs, dtype=np.int64)
        self.packs = np.zeros((num_envs, size * size), dtype=bool)
        self.due = np.zeros((num_envs, steps))  # reward by the step in which it is paid

    def _begin(self, which):
        places = self.np_random.random((len(which), self.size**2)).argsort(axis=1)[:, : 1 + self.n_packs]  # distinct cells
        self.agent[which] = places[:, 0]
        self.packs[which] = False
        self.packs[which[:, None], places[:, 1:]] = True
        self.due[which] = 0.0

    def _advance(self, actions):
        self.agent = self._next[self.agent, actions]
        found = np.flatnonzero(self.packs[self.copies, self.agent])
        if len(found):
            here = self.agent[found]
            chance = self.np_random.random((len(found), self.size**2 + 1))
            taken = self.packs[found]
            self.packs[found, here] = False
            empty = np.where(taken, -1.0, chance[:, 1:])  # the agent stands where the gathered pack lay: that cell is taken too
            self.packs[found, empty.argmax(axis=1)] = True
            payday = np.minimum(self.t[found] + self.delay, self.max_steps - 1)
            self.due[found, payday] += chance[:, 0] < self.sparsity
        return self.due[self.copies, self.t], np.zeros(self.num_envs, dtype=bool)

    def _observe(self):
        planes = np.zeros((self.num_envs, 2, self.size**2), dtype=np.float32)
        planes[self.copies, 0, self.agent] = 1.0
        planes[:, 1] = self.packs
        return planes.reshape(self.num_envs, 2, self.size, self.size)


class BatchedPushBox(BatchedEnv):
    """Copies of the box-pushing puzzle of Farquhar et al. (2018).

    Observation: planes (5, size, size) of agent, goals, boxes, obstacles, and time left, (steps - t)/steps everywhere. At the start all
    things lie on distinct cells inside the border. A step costs 0.01. Leaving the board costs 1 and ends the episode. Walking into a
    box pushes it one cell: off the board it is lost (-0.1); against another box nothing moves (-0.1); onto a goal it vanishes
    (+1, the goal stays); onto an obstacle it moves (-0.2). Standing on an obstacle after a move costs 0.2. The time is seen, so its end
    is a terminal state. The episode also ends when the boxes left are no more than the boxes counted on the border, where nobody
    can push them inside again. The count is that of the authors' program: one more for each push that ends on the border, also for
    a box that slides along it, and one less for each box lost.

    Args:
        num_envs: number of copies.
        size: side of the board.
        boxes: boxes at the start.
        goals: goals.
        obstacles: obstacles, which boxes and agent may cross at a price.
        steps: length of an episode.
    """

    def __init__(self, num_envs: int, size: int = 8, boxes: int = 12, goals: int = 5, obstacles: int = 6, steps: int = 75):
        if min(boxes, goals) < 1 or obstacles < 0 or 1 + boxes + goals + obstacles > max(size - 2, 0) ** 2:
            raise ValueError(f"agent, {boxes} boxes, {goals} goals and {obstacles} obstacles do not fit into the inside of {size}x{size}")
        super().__init__(num_envs, spaces.Box(0.0, 1.0, (5, size, size)), spaces.Discrete(4), steps)
        self.size, self.counts = size, (goals, boxes, obstacles)
        width = size + 4  # two cells of margin: agent and pushed box never index outside
        board = np.full((width, width), False)
        board[2:-2, 2:-2] = True
        inside = np.full((width, width), False)
        inside[3:-3, 3:-3] = True
        self._outside, self._border = ~board.ravel(), (board & ~inside).ravel()
        self._board, self._inside = np.flatnonzero(board), np.flatnonzero(inside)
        self._moves = np.array([width, -1, -width, 1])
        self.agent = np.zeros(num_envs, dtype=np.int64)
        self.things = np.zeros((num_envs, 3, width * width), dtype=bool)  # goals, boxes, obstacles
        self.boxes_left, self.edge_boxes = np.zeros((2, num_envs), dtype=np.int64)

    def _begin(self, which):
        places = self._inside[self.np_random.random((len(which), len(self._inside))).argsort(axis=1)]
        self.agent[which] = places[:, 0]
        self.things[which] = False
        first = 1
        for plane, count in enumerate(self.counts):
            self.things[which[:, None], plane, places[:, first : first + count]] = True
            first += count
        self.boxes_left[which], self.edge_boxes[which] = self.counts[1], 0

    def _advance(self, actions):
        n, (goals, boxes, obstacles) = self.copies, self.things.transpose(1, 0, 2)  # views (n, cells)
        move = self._moves[actions]
        step = self.agent + move
        push = step + move
        off = self._outside[step]
        hit = boxes[n, step]
        lost = hit & self._outside[push]
        blocked = hit & boxes[n, push]
        scored = hit & ~blocked & goals[n, push]
        crossed = hit & ~blocked & obstacles[n, push]
        slides = hit & ~(lost | blocked | scored)
        walks = ~(off | blocked)
        gone = np.flatnonzero(hit & ~blocked)
        boxes[gone, step[gone]] = False
        kept = np.flatnonzero(slides)
        boxes[kept, push[kept]] = True
        self.agent = np.where(walks, step, self.agent)
        self.boxes_left -= lost | scored
        self.edge_boxes += (slides & self._border[push]).astype(np.int64) - lost
        on_obstacle = walks & obstacles[n, step]
        rewards = scored - 0.01 - off - 0.1 * (lost | blocked) - 0.2 * crossed - 0.2 * on_obstacle
        return rewards, off | (self.boxes_left <= self.edge_boxes) | (self.t + 1 >= self.max_steps)

    def _observe(self):
        planes = np.zeros((self.num_envs, 5, self.things.shape[-1]), dtype=np.float32)
        planes[self.copies, 0, self.agent] = 1.0
        planes[:, 1:4] = self.things
        planes[:, 4] = ((self.max_steps - self.t) / self.max_steps)[:, None]
        width = self.size + 4
        return planes.reshape(self.num_envs, 5, width, width)[:, :, 2:-2, 2:-2].copy()


class HealthGrid(SingleEnv):
    """One field of packs; arguments of `BatchedHealthGrid`."""

    batched = BatchedHealthGrid


class PushBox(SingleEnv):
    """One box-pushing puzzle; arguments of `BatchedPushBox`."""

    batched = BatchedPushBox
