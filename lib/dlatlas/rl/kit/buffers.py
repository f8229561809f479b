"""Memories of transitions: a ring, a sum tree for priorities and the accumulator of n-step transitions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

__all__ = ["NStepAccumulator", "ReplayBuffer", "SumTree"]

Array = np.ndarray | Tensor


class ReplayBuffer:
    """A preallocated ring of transitions; the newest overwrite the oldest.

    Args:
        capacity: number of rows.
        specs: ``{name: (shape of one row, dtype)}``; the dtype is one of torch's or one of NumPy's.
        device: where the rows lie and where batches come out.
    """

    def __init__(self, capacity: int, specs: Mapping[str, tuple[Sequence[int], object]], *, device: str | torch.device = "cpu"):
        if int(capacity) != capacity or capacity < 1:
            raise ValueError(f"capacity must be a positive integer, got {capacity}")
        if not specs:
            raise ValueError("specs must name at least one array")
        self.capacity, self.device = int(capacity), torch.device(device)
        self.storage = {
            name: torch.zeros((self.capacity, *shape), dtype=_torch_dtype(dtype), device=self.device)
            for name, (shape, dtype) in specs.items()
        }
        self._next, self._size = 0, 0

    def __len__(self) -> int:
        return self._size

    def add(self, **arrays: Array) -> Tensor:
        """Append B rows ``(B, ...)`` of every array and return the slots ``(B,)`` that they took.

        Of a batch larger than the capacity only the last rows stay.

        Raises:
            ValueError: a name is missing or unknown, the numbers of rows differ or a row has another shape.
        """
        if arrays.keys() != self.storage.keys():
            raise ValueError(f"add expects the arrays {sorted(self.storage)}, got {sorted(arrays)}")
        rows = {name: torch.as_tensor(x) for name, x in arrays.items()}
        count = {name: x.shape[0] if x.ndim else -1 for name, x in rows.items()}
        n = next(iter(count.values()))
        for name, x in rows.items():
            if count[name] != n or x.shape[1:] != self.storage[name].shape[1:]:
                raise ValueError(f"{name} must have shape {(n, *self.storage[name].shape[1:])}, got {tuple(x.shape)}")
        if n > self.capacity:
            rows, n = {name: x[-self.capacity :] for name, x in rows.items()}, self.capacity
        slots = (self._next + torch.arange(n)) % self.capacity
        first = min(n, self.capacity - self._next)
        for name, x in rows.items():  # two plain copies are several times cheaper than one scatter
            self.storage[name][self._next : self._next + first] = x[:first].to(self.device)
            if first < n:
                self.storage[name][: n - first] = x[first:].to(self.device)
        self._next, self._size = (self._next + n) % self.capacity, min(self._size + n, self.capacity)
        return slots

    def sample(self, n: int, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """`n` rows ``{name: (n, ...)}``, uniformly and with replacement."""
        if n < 1:
            raise ValueError(f"n must be at least 1, got {n}")
        if not self._size:
            raise ValueError("cannot sample from an empty memory")
        return self._rows(torch.randint(self._size, (n,), generator=generator))

    def take(self, idx: Array) -> dict[str, Tensor]:
        """The rows of the slots `idx` ``(n,)``."""
        idx = torch.as_tensor(idx, dtype=torch.long)
        if idx.numel() and (idx.min() < 0 or idx.max() >= self._size):
            raise ValueError(f"idx must lie in 0..{self._size - 1}, got {int(idx.min())}..{int(idx.max())}")
        return self._rows(idx)

    def _rows(self, idx: Tensor) -> dict[str, Tensor]:
        idx = idx.to(self.device)
        return {name: x.index_select(0, idx) for name, x in self.storage.items()}


class SumTree:
    r"""A binary tree of partial sums over `capacity` non-negative numbers: draw a slot in proportion to its number in $O(\log n)$.

    Sums are float64 and every changed parent is recomputed from its two children, so no rounding error adds up over time.
    """

    def __init__(self, capacity: int):
        if int(capacity) != capacity or capacity < 1:
            raise ValueError(f"capacity must be a positive integer, got {capacity}")
        self.capacity = int(capacity)
        self._leaves = 1 << (self.capacity - 1).bit_length()  # the next power of two
        self._sums = np.zeros(2 * self._leaves)  # node i has the children 2i and 2i+1, the root is 1

    def __len__(self) -> int:
        return self.capacity

    def __getitem__(self, idx: Array) -> np.ndarray:
        return self._sums[self._slots(idx) + self._leaves]

    def set(self, idx: Array, p: Array | float) -> None:
        """Give the slots `idx` ``(n,)`` the numbers `p` ``(n,)`` or one number; of a slot named twice the last counts.

        Raises:
            ValueError: a number is negative or not finite, a slot is outside the tree or the lengths differ.
        """
        idx, p = self._slots(idx), np.asarray(p.detach().cpu().numpy() if isinstance(p, Tensor) else p, dtype=np.float64)
        if p.shape not in ((), idx.shape):
            raise ValueError(f"p must be one number or have the shape of idx {idx.shape}, got {p.shape}")
        if not np.isfinite(p).all() or (p < 0).any():
            raise ValueError(f"p must be finite and not negative, got {p}")
        node = idx + self._leaves
        self._sums[node] = p
        for _ in range(self._leaves.bit_length() - 1):
            node = node >> 1
            self._sums[node] = self._sums[2 * node] + self._sums[2 * node + 1]

    def total(self) -> float:
        """Sum of all numbers."""
        return float(self._sums[1])

    def find(self, mass: Array) -> Array:
        """The slot whose interval of the running sum holds each of `mass` ``(n,)``, with ``0 <= mass <= total()``.

        A slot of number zero is never returned, not even for a mass equal to the total. Tensors give a tensor.
        """
        m = np.array(mass.detach().cpu().numpy() if isinstance(mass, Tensor) else mass, dtype=np.float64)
        if not self._sums[1] > 0:
            raise ValueError("cannot find a slot: all numbers are zero")
        # A single-precision product of a uniform number and the total may round to just above it.
        if not ((m >= 0) & (m <= self._sums[1] * (1 + 1e-6))).all():
            raise ValueError(f"mass must lie in 0..{self._sums[1]}, got {m}")
        node = np.ones(m.shape, dtype=np.int64)
        for _ in range(self._leaves.bit_length() - 1):
            node = 2 * node
            left = self._sums[node]
            # Rounding may leave more mass than the left side holds although the right side is empty.
            right = (m >= left) & (self._sums[node + 1] > 0)
            m -= np.where(right, left, 0.0)
            node += right
        node -= self._leaves
        return torch.from_numpy(node) if isinstance(mass, Tensor) else node

    def sample(self, n: int, generator: torch.Generator | None = None) -> np.ndarray:
        """`n` slots in proportion to their numbers, one from each of `n` equal parts of the total (stratified)."""
        u = torch.rand(n, dtype=torch.float64, generator=generator).numpy()
        return self.find(np.minimum((np.arange(n) + u) / n, 1.0) * self._sums[1])

    def _slots(self, idx: Array) -> np.ndarray:
        idx = np.asarray(idx.cpu().numpy() if isinstance(idx, Tensor) else idx)
        if idx.size and (not np.issubdtype(idx.dtype, np.integer) or idx.min() < 0 or idx.max() >= self.capacity):
            raise ValueError(f"idx must be integers in 0..{self.capacity - 1}, got {idx}")
        return idx.astype(np.int64)


class NStepAccumulator:
    r"""Turns the steps of N parallel environments into n-step transitions.

    $$R = \sum_{k<m} \gamma^k r_{t+k}, \qquad d = \gamma^m (1 - \text{done}_{t+m-1}),$$

    with $m = n$ inside an episode and less for the last steps of one. A truncated episode is cut as well, but keeps its discount.
    """

    def __init__(self, n: int, gamma: float):
        if int(n) != n or n < 1:
            raise ValueError(f"n must be a positive integer, got {n}")
        if not 0 <= gamma <= 1:
            raise ValueError(f"gamma must lie in [0, 1], got {gamma}")
        self.n, self.gamma = int(n), float(gamma)
        self.powers = self.gamma ** np.arange(self.n + 1)
        self.clear()

    def clear(self) -> None:
        """Forget the open transitions."""
        self._obs, self._time = None, 0

    def push(
        self,
        obs: np.ndarray,
        a: np.ndarray,
        r: np.ndarray,
        next_obs: np.ndarray,
        done: np.ndarray,
        *,
        truncated: np.ndarray | None = None,
        valid: np.ndarray | None = None,
    ) -> dict[str, np.ndarray]:
        """One step of every environment in, the transitions that it completed out.

        Args:
            obs, a, r, next_obs: ``(N, ...)``; `next_obs` of a last step is the final observation, not the one after the reset.
            done: ``(N,)``, true where the step ended the episode by termination.
            truncated: ``(N,)``, true where a limit cut the episode.
            valid: ``(N,)``, false where the step was only a reset and no transition.

        Returns:
            obs, actions, returns, discounts, next_obs with M rows, oldest starts first; M may be 0.
        """
        obs, a, next_obs = np.asarray(obs), np.asarray(a), np.asarray(next_obs)
        r, done = np.asarray(r, dtype=np.float64), np.asarray(done).astype(bool)
        count = len(obs)
        cut = done if truncated is None else done | np.asarray(truncated).astype(bool)
        for name, x in (("a", a), ("r", r), ("next_obs", next_obs), ("done", done), ("truncated", cut)):
            if x.shape[:1] != (count,):
                raise ValueError(f"{name} must have {count} rows as obs has, got shape {x.shape}")
        alive = np.ones(count, dtype=bool) if valid is None else np.asarray(valid).astype(bool)
        if self.n == 1:
            out = {"obs": obs, "actions": a, "returns": r, "discounts": self.gamma * ~done, "next_obs": next_obs}
            return out if alive.all() else {name: x[alive] for name, x in out.items()}
        if self._obs is None:
            self._obs = np.zeros((self.n, *obs.shape), obs.dtype)
            self._actions = np.zeros((self.n, *a.shape), a.dtype)
            self._returns = np.zeros((self.n, count))
            self._age = np.zeros((self.n, count), dtype=np.int64)
            self._open = np.zeros((self.n, count), dtype=bool)
        if obs.shape != self._obs.shape[1:]:
            raise ValueError(f"obs must keep its shape {self._obs.shape[1:]}, got {obs.shape}")
        now = self._time % self.n
        self._time += 1
        self._obs[now], self._actions[now], self._returns[now], self._age[now], self._open[now] = obs, a, 0.0, 0, alive
        self._returns += self._open * self.powers[self._age] * r  # an age below n: the full ones have left
        self._age += self._open
        ready = self._open & ((self._age == self.n) | cut)
        order = (now + 1 + np.arange(self.n)) % self.n  # oldest start first
        slot, env = np.nonzero(ready[order])
        slot = order[slot]
        self._open &= ~ready
        return {
            "obs": self._obs[slot, env],
            "actions": self._actions[slot, env],
            "returns": self._returns[slot, env],
            "discounts": self.powers[self._age[slot, env]] * ~done[env],
            "next_obs": next_obs[env],
        }


def _torch_dtype(dtype: object) -> torch.dtype:
    return dtype if isinstance(dtype, torch.dtype) else torch.from_numpy(np.zeros(0, dtype=dtype)).dtype
