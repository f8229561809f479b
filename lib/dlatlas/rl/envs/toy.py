r"""Small Markov decision processes whose exact values are known: chain, blind cliffwalk, bridge, slippery grid.

Each problem is a pair of tables, transition probabilities $P(s' \mid s, a)$ of shape (S, A, S) and rewards $R(s, a)$ of shape (S, A), made
by `chain_mdp`, `blind_cliffwalk_mdp`, `bridge_mdp` and `slippery_grid`. The environments sample from the very same tables, so what an
agent learns can be held against the exact solution. Episodes that end lead to an absorbing state without reward, the last state of the
table (the chain has none; the far end of the bridge has three of its own). Rewards are functions of state and action alone: tables and
samples agree in distribution, not only in the mean.
"""

import numpy as np
from gymnasium import spaces

from dlatlas.rl.envs import BatchedEnv, SingleEnv

__all__ = [
    "BatchedBlindCliffwalk", "BatchedBridge", "BatchedChain", "BatchedSlipperyGrid", "BatchedTabular", "BlindCliffwalk", "Bridge", "Chain",
    "SlipperyGrid", "Tabular", "blind_cliffwalk_mdp", "bridge_mdp", "chain_mdp", "slippery_grid",
]  # fmt: skip

MOVES = ((1, 0), (0, -1), (-1, 0), (0, 1))  # (row, column) steps: down, left, up, right


# --- tables ----------------------------------------------------------------------------------------------------------------


def chain_mdp(n: int = 20) -> tuple[np.ndarray, np.ndarray]:
    """Chain of n states; action 0 goes left, 1 right, both stop at the ends.

    Arriving in state 0 (or staying there) pays 0.001, arriving in state n-1 (or staying there) pays 1. From state 1, going right
    for n+9 steps collects 12; drifting left collects 0.001 a step.

    Args:
        n: number of states, at least 3.

    Returns:
        P (n, 2, n) and R (n, 2).
    """
    _at_least("n", n, 3)
    P, R = np.zeros((n, 2, n)), np.zeros((n, 2))
    for s in range(n):
        for a, to in enumerate((max(s - 1, 0), min(s + 1, n - 1))):
            P[s, a, to] = 1.0
            R[s, a] = {0: 0.001, n - 1: 1.0}.get(to, 0.0)
    return P, R


def blind_cliffwalk_mdp(n: int = 10, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Blind cliffwalk: of two actions in each of n states one goes on, the other ends the episode; only the last step pays.

    Which action is right is a coin flip for each state (`seed`); `R[n - 1]` and `P` tell. With random actions one in 2^n episodes
    reaches the reward of 1.

    Args:
        n: number of states on the cliff.
        seed: of the coin flips.

    Returns:
        P (n+1, 2, n+1) and R (n+1, 2); state n is the absorbing end.
    """
    _at_least("n", n, 1)
    right = np.random.default_rng(seed).integers(2, size=n)
    P, R = np.zeros((n + 1, 2, n + 1)), np.zeros((n + 1, 2))
    P[:, :, n] = 1.0
    for s in range(n):
        P[s, right[s]] = np.eye(n + 1)[s + 1]  # from n - 1 the right action leads to the end as well, but pays
    R[n - 1, right[n - 1]] = 1.0
    return P, R


def bridge_mdp(k: int = 15) -> tuple[np.ndarray, np.ndarray]:
    """Bridge of length k and width 3: state (x, y) has the index 3x + y, the start is (0, 1).

    Actions: 0 forward (x+1), 1 down (y-1), 2 up (y+1), 3 back (x-1, stops at 0). Leaving y in 0..2 ends the episode with nothing, reaching
    x = k ends it with 1.

    Args:
        k: length of the bridge.

    Returns:
        P (3(k+1)+1, 4, 3(k+1)+1) and R (3(k+1)+1, 4). The three states at x = k are absorbing, like the last one (fallen).
    """
    _at_least("k", k, 1)
    fallen = 3 * (k + 1)
    P, R = np.zeros((fallen + 1, 4, fallen + 1)), np.zeros((fallen + 1, 4))
    for x in range(k):
        for y in range(3):
            for a, (dx, dy) in enumerate(((1, 0), (0, -1), (0, 1), (-1, 0))):
                to = 3 * max(x + dx, 0) + y + dy if 0 <= y + dy <= 2 else fallen
                P[3 * x + y, a, to] = 1.0
                R[3 * x + y, a] = float(x + dx == k)
    for s in range(3 * k, fallen + 1):
        P[s, :, s] = 1.0
    return P, R


def slippery_grid(
    size: int = 5,
    slip: float = 0.2,
    goal: tuple[int, int] | None = None,
    pits: tuple[tuple[int, int], ...] | None = None,
    goal_reward: float = 1.0,
    pit_reward: float = -1.0,
) -> tuple[np.ndarray, np.ndarray]:
    """Grid on which a move goes astray: with probability `slip` it turns to one of the two sides (half each).

    The cell (row, column) has the index size*row + column. Actions: down, left, up, right; the border stops a move. Goal and pits pay when
    they are left: whatever the action, the episode then ends. So the reward depends on state and action alone.

    Args:
        size: side of the grid.
        slip: probability in [0, 1] of a sideways move.
        goal: default the corner (size-1, size-1), opposite to the start (0, 0).
        pits: default the centre and (size-2, 1); `()` for none.
        goal_reward: paid on leaving the goal.
        pit_reward: paid on leaving a pit.

    Returns:
        P (size^2+1, 4, size^2+1) and R (size^2+1, 4); the last state is the absorbing end.
    """
    _at_least("size", size, 2)
    if not 0 <= slip <= 1:
        raise ValueError(f"slip must lie in [0, 1], got {slip}")
    goal = goal or (size - 1, size - 1)
    if pits is None:
        pits = tuple(cell for cell in dict.fromkeys([(size // 2, size // 2), (size - 2, 1)]) if cell not in {(0, 0), goal})
    if goal in pits or not all(0 <= i < size for cell in (goal, *pits) for i in cell):
        raise ValueError(f"goal and pits must be different cells of a {size}x{size} grid, got goal {goal} and pits {pits}")
    end = size * size
    P, R = np.zeros((end + 1, 4, end + 1)), np.zeros((end + 1, 4))
    for row, column in np.ndindex(size, size):
        s = size * row + column
        if (row, column) == goal or (row, column) in pits:
            P[s, :, end] = 1.0
            R[s] = goal_reward if (row, column) == goal else pit_reward
            continue
        for a in range(4):
            for turn, probability in ((0, 1 - slip), (1, slip / 2), (3, slip / 2)):  # two turns are next to a in the ring of moves
                down, right = MOVES[(a + turn) % 4]
                to = size * min(max(row + down, 0), size - 1) + min(max(column + right, 0), size - 1)
                P[s, a, to] += probability
    P[end, :, end] = 1.0
    return P, R


# --- environments ----------------------------------------------------------------------------------------------------------


class BatchedTabular(BatchedEnv):
    """Copies of any finite Markov decision process, sampled from its tables; the attribute `state` (n,) holds the indices.

    Args:
        num_envs: number of copies.
        P: transition probabilities (S, A, S).
        R: rewards (S, A).
        start: index of the start state, or probabilities (S,).
        terminal: indices of the states that end an episode on arrival.
        obs: "index" (a `Discrete` space), "one-hot", "thermometer" (1 for all indices up to the state), or features (S, F).
        steps: an episode is truncated after so many steps; None: never.
    """

    def __init__(self, num_envs: int, P, R, *, start=0, terminal=(), obs="one-hot", steps: int | None = None):
        P, R = np.asarray(P, dtype=np.float64), np.asarray(R, dtype=np.float64)
        if P.ndim != 3 or P.shape[0] != P.shape[2] or R.shape != P.shape[:2]:
            raise ValueError(f"P must have shape (S, A, S) and R (S, A), got {P.shape} and {R.shape}")
        if (P < 0).any() or not np.allclose(P.sum(axis=2), 1):
            raise ValueError("P must hold probabilities: no negative entry, rows over the last axis that sum to 1")
        states = P.shape[0]
        self.start = np.eye(states)[start] if np.ndim(start) == 0 else np.asarray(start, dtype=np.float64)
        if self.start.shape != (states,) or (self.start < 0).any() or not np.isclose(self.start.sum(), 1):
            raise ValueError(f"start must be an index or probabilities of shape ({states},), got {start!r}")
        if isinstance(obs, str):
            if obs not in {"index", "one-hot", "thermometer"}:
                raise ValueError(f"obs must be 'index', 'one-hot', 'thermometer' or features (S, F), got {obs!r}")
            self.features = {"index": None, "one-hot": np.eye(states), "thermometer": np.tri(states)}[obs]
        else:
            self.features = np.asarray(obs)
        if self.features is None:
            space = spaces.Discrete(states)
        else:
            self.features = self.features.astype(np.float32)
            if self.features.ndim != 2 or len(self.features) != states:
                raise ValueError(f"obs must hold features of shape ({states}, F), got {self.features.shape}")
            space = spaces.Box(float(self.features.min()), float(self.features.max()), self.features.shape[1:])
        super().__init__(num_envs, space, spaces.Discrete(P.shape[1]), steps)
        self.P, self.R = P, R
        self.terminal = np.isin(np.arange(states), terminal)
        self.state = np.zeros(num_envs, dtype=np.int64)
        self._ladder, self._start_ladder = (_cumulative(p) for p in (P, self.start))

    def _begin(self, which):
        self.state[which] = (self.np_random.random((len(which), 1)) >= self._start_ladder).sum(axis=1)

    def _advance(self, actions):
        rewards = self.R[self.state, actions]
        rungs = self._ladder[self.state, actions]  # (n, S)
        self.state = (self.np_random.random((self.num_envs, 1)) >= rungs).sum(axis=1)
        return rewards, self.terminal[self.state]

    def _observe(self):
        return self.state.copy() if self.features is None else self.features[self.state]


class BatchedChain(BatchedTabular):
    """Copies of the chain of `chain_mdp`: start in state 1, thermometer observation (n,), truncated after n+9 steps.

    Args:
        num_envs: number of copies.
        n: length of the chain.
        obs: see `BatchedTabular`.
    """

    def __init__(self, num_envs: int, n: int = 20, obs="thermometer"):
        super().__init__(num_envs, *chain_mdp(n), start=1, obs=obs, steps=n + 9)


class BatchedBlindCliffwalk(BatchedTabular):
    """Copies of the cliff of `blind_cliffwalk_mdp`: start in state 0, one-hot observation (n,), all zero at the end.

    Args:
        num_envs: number of copies.
        n: number of states.
        flips: seed of the coin flips that choose the right actions.
        obs: see `BatchedTabular`; default one-hot without the end.
    """

    def __init__(self, num_envs: int, n: int = 10, flips: int = 0, obs=None):
        P, R = blind_cliffwalk_mdp(n, flips)
        super().__init__(num_envs, P, R, terminal=[n], obs=np.eye(n + 1)[:, :n] if obs is None else obs)


class BatchedBridge(BatchedTabular):
    """Copies of the bridge of `bridge_mdp`: start at (0, 1), observation is the state's index, truncated after 4k steps.

    Args:
        num_envs: number of copies.
        k: length of the bridge.
        obs: see `BatchedTabular`.
    """

    def __init__(self, num_envs: int, k: int = 15, obs="index"):
        super().__init__(num_envs, *bridge_mdp(k), start=1, terminal=range(3 * k, 3 * k + 4), obs=obs, steps=4 * k)


class BatchedSlipperyGrid(BatchedTabular):
    """Copies of `slippery_grid`: start in the corner (0, 0), one-hot observation (size^2,), all zero at the end.

    Args:
        num_envs: number of copies.
        size: side of the grid.
        slip: probability of a sideways move.
        obs: see `BatchedTabular`; default one-hot without the end.
        steps: an episode is truncated after so many steps; None: never.
        options: the other arguments of `slippery_grid`.
    """

    def __init__(self, num_envs: int, size: int = 5, slip: float = 0.2, obs=None, steps: int | None = 100, **options):
        P, R = slippery_grid(size, slip, **options)
        end = size * size
        super().__init__(num_envs, P, R, terminal=[end], obs=np.eye(end + 1)[:, :end] if obs is None else obs, steps=steps)


class Tabular(SingleEnv):
    """One finite Markov decision process, sampled from its tables (arguments of `BatchedTabular`)."""

    batched = BatchedTabular


class Chain(SingleEnv):
    """One chain: exploration that needs n-2 steps to the right in a row, while the left end lures with 0.001 a step."""

    batched = BatchedChain


class BlindCliffwalk(SingleEnv):
    """One blind cliffwalk: 2^n random episodes for one reward."""

    batched = BatchedBlindCliffwalk


class Bridge(SingleEnv):
    """One bridge: two of four actions lead nearer to the edge."""

    batched = BatchedBridge


class SlipperyGrid(SingleEnv):
    """One slippery grid: stochastic moves, a goal and pits."""

    batched = BatchedSlipperyGrid


def _cumulative(p: np.ndarray) -> np.ndarray:
    ladder = p.cumsum(axis=-1)
    return ladder / ladder[..., -1:]  # the last rung is exactly 1, above every draw of [0, 1)


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
