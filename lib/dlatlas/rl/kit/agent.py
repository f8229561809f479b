"""The interface of an agent and the one off-policy loop: methods override only what is new."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import gymnasium
import numpy as np
import torch
from gymnasium.vector import VectorEnv
from torch import Tensor, nn

from dlatlas.rl.kit.buffers import NStepAccumulator, ReplayBuffer, SumTree
from dlatlas.rl.kit.rollout import Source, as_vector, to_action_space

__all__ = ["Agent", "ReplayAgent", "as_vector", "copy_", "polyak_"]

EVERY = 100  # updates between two records of the losses


class Agent:
    """What every agent can do: act, learn from a batch, and train in an environment.

    Args:
        device: where its networks and batches lie.
    """

    def __init__(self, *, device: str | torch.device = "cpu"):
        self.device = torch.device(device)
        self.generator = torch.Generator().manual_seed(0)
        self.rng = np.random.default_rng(0)

    def act(self, obs: np.ndarray | Tensor, deterministic: bool = False) -> np.ndarray:
        """Actions ``(B, ...)`` for observations ``(B, ...)``."""
        raise NotImplementedError

    def update(self, batch: dict[str, Tensor]) -> dict[str, float]:
        """Learn from a batch and report named numbers."""
        raise NotImplementedError

    def fit(self, env: Source, steps: int, seed: int = 0) -> dict[str, list]:
        """Train for `steps` transitions, counted over all copies of the environment, and return the history."""
        raise NotImplementedError

    def tensor(self, x: np.ndarray | Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """`x` as a tensor on the agent's device."""
        return torch.as_tensor(x, dtype=dtype, device=self.device)


class ReplayAgent(Agent):
    r"""An agent that learns from a memory of transitions.

    A subclass gives `act` and `update`; it may override `explore`, `begin_episodes`, `initial_priorities` and `check_spaces`. The batch of `update` holds tensors:
    obs ``(B, ...)``, actions, returns ``(B,)`` $\sum_{k<m}\gamma^k r_{t+k}$ (times `reward_scale`), discounts ``(B,)`` $\gamma^m (1 - \text{terminated})$ and
    next_obs; with `prioritised` also weights ``(B,)`` and idx ``(B,)``. The one-step target is ``returns + discounts * V(next_obs)``. A truncated
    episode is no end: its next_obs is the final observation and its discount stays $\gamma^m$.

    Args:
        gamma: discount.
        batch_size: transitions a batch.
        capacity: transitions in the memory.
        warmup: transitions before the first update.
        updates_per_step: updates after every step of the whole vector environment; may be a fraction.
        n_step: length of the transitions.
        prioritised: draw transitions in proportion to (priority)^alpha and weight them by (size * probability)^-beta, largest weight 1.
        alpha, beta: the two exponents.
        reward_scale: factor on the rewards that go into the memory; the history reports unscaled returns.
        device: where networks and batches lie; the memory stays with the processor.

    Attributes:
        transitions, updates: how many were made so far, over all calls of `fit`.
        buffer: the `ReplayBuffer` (None before the first `fit`); tree: the `SumTree` of a prioritised agent.
        generator, rng: torch's and NumPy's source of randomness, seeded by `fit`.
    """

    def __init__(
        self,
        *,
        gamma: float = 0.99,
        batch_size: int = 256,
        capacity: int = 100_000,
        warmup: int = 1_000,
        updates_per_step: float = 1,
        n_step: int = 1,
        prioritised: bool = False,
        alpha: float = 0.6,
        beta: float = 0.4,
        reward_scale: float = 1.0,
        device: str | torch.device = "cpu",
    ):
        super().__init__(device=device)
        if not 0 <= gamma <= 1:
            raise ValueError(f"gamma must lie in [0, 1], got {gamma}")
        for name, value in (("batch_size", batch_size), ("capacity", capacity), ("n_step", n_step)):
            if int(value) != value or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value}")
        for name, value in (("warmup", warmup), ("updates_per_step", updates_per_step), ("alpha", alpha), ("beta", beta)):
            if not value >= 0:
                raise ValueError(f"{name} must not be negative, got {value}")
        self.gamma, self.batch_size, self.capacity, self.warmup = gamma, batch_size, capacity, warmup
        self.updates_per_step, self.n_step, self.prioritised = updates_per_step, n_step, prioritised
        self.alpha, self.beta, self.reward_scale = alpha, beta, reward_scale
        self.transitions, self.updates = 0, 0
        self.buffer: ReplayBuffer | None = None
        self.tree = SumTree(capacity) if prioritised else None
        self._top = 1.0  # the largest priority so far
        self._targets: list[tuple[list[Tensor], list[Tensor]]] = []
        self._tracked = 0

    def explore(self, obs: np.ndarray) -> np.ndarray:
        """Actions while training, default: ``act(obs)``."""
        return self.act(obs)

    def begin_episodes(self, mask: np.ndarray) -> None:
        """Called at the start and whenever copies of the environment begin a new episode; mask ``(B,)`` says which."""

    def initial_priorities(self, transitions: dict[str, Tensor]) -> np.ndarray | Tensor | None:
        """Priorities ``(M,)`` of new transitions; None, the default, means the largest priority so far."""
        return None

    def fit(
        self,
        env: Source,
        steps: int,
        seed: int = 0,
        *,
        n_envs: int = 1,
        callback: Callable[[ReplayAgent, dict[str, list]], bool | None] | None = None,
    ) -> dict[str, list]:
        """Act, remember and learn for `steps` transitions, counted over all copies. A second call goes on with the same memory.

        All randomness comes from `seed`; torch's global generator is seeded inside and left as it was.

        Args:
            env: an environment, a vector environment, an id, a class or a function that makes one.
            steps: transitions.
            seed: seed of the environment, the actions and the batches.
            n_envs: number of copies, where copies can be made.
            callback: called after every step of the vector environment with the agent and the history; True ends the training.

        Returns:
            A row for every finished episode: "step" (transitions so far), "return" (undiscounted, unscaled), "length"; and for every hundredth update
            "update" (updates so far) and what `update` reported.
        """
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        vec = as_vector(env, n_envs)
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(seed)
            self.generator.manual_seed(seed)
            self.rng = np.random.default_rng(seed)
            return self._loop(vec, steps, seed, callback)

    def _loop(self, vec: VectorEnv, steps: int, seed: int, callback: Callable | None) -> dict[str, list]:
        history: dict[str, list] = {"step": [], "return": [], "length": []}
        accumulator = NStepAccumulator(self.n_step, self.gamma)
        self._make_buffer(vec)
        space, count = vec.single_action_space, vec.num_envs
        running, length = np.zeros(count), np.zeros(count, dtype=int)
        obs, _ = vec.reset(seed=seed)
        self.begin_episodes(np.ones(count, dtype=bool))
        owed, done_steps = 0.0, 0
        while done_steps < steps:
            actions = to_action_space(self.explore(obs), space)
            new, rewards, terminated, truncated, info = vec.step(actions)
            valid = info["valid"]
            self._remember(
                accumulator.push(obs, actions, rewards * self.reward_scale, info["final_obs"], terminated, truncated=truncated, valid=valid)
            )
            made = int(valid.sum())
            self.transitions += made
            done_steps += made
            running += np.where(valid, rewards, 0.0)
            length += valid
            ended = info["_final_obs"]
            if ended.any():
                history["step"] += [self.transitions] * int(ended.sum())
                history["return"] += running[ended].tolist()
                history["length"] += length[ended].tolist()
                running[ended], length[ended] = 0.0, 0
                self.begin_episodes(ended)
            obs = new
            if self.transitions >= self.warmup and len(self.buffer):
                owed += self.updates_per_step
                while owed >= 1:
                    owed -= 1
                    self._learn(history)
            if callback is not None and callback(self, history):
                break
        return history

    def check_spaces(self, observations: gymnasium.Space, actions: gymnasium.Space) -> None:
        """Raise `ValueError` where the agent was made for other observations or actions than one environment has."""
        if not isinstance(observations, gymnasium.spaces.Box):
            raise ValueError(f"the observations must be a Box, got {observations}; wrap the environment (one-hot or flat observations)")
        if not isinstance(actions, gymnasium.spaces.Box | gymnasium.spaces.Discrete):
            raise ValueError(f"the actions must be Discrete or a Box, got {actions}")

    def _make_buffer(self, vec: VectorEnv) -> None:
        obs, action = vec.single_observation_space, vec.single_action_space
        self.check_spaces(obs, action)
        obs_dtype = np.uint8 if obs.dtype == np.uint8 else np.float32
        action_dtype = np.float32 if isinstance(action, gymnasium.spaces.Box) else np.int64
        specs = {
            "obs": (obs.shape, obs_dtype),
            "actions": (action.shape, action_dtype),
            "returns": ((), np.float32),
            "discounts": ((), np.float32),
            "next_obs": (obs.shape, obs_dtype),
        }
        if self.buffer is None:
            self.buffer = ReplayBuffer(self.capacity, specs)
        elif self.buffer.storage["obs"].shape[1:] != obs.shape or self.buffer.storage["actions"].shape[1:] != action.shape:
            raise ValueError(f"the memory holds another environment's transitions; this one has observations {obs} and actions {action}")

    def _remember(self, transitions: dict[str, np.ndarray]) -> None:
        if not len(transitions["returns"]):
            return
        slots = self.buffer.add(**transitions)
        if self.prioritised:
            p = self.initial_priorities({name: torch.as_tensor(x) for name, x in transitions.items()})
            if p is None:
                self.tree.set(slots, self._top**self.alpha)
            else:
                self._prioritise(slots, torch.as_tensor(p)[-len(slots) :])

    def _learn(self, history: dict[str, list]) -> None:
        batch = self.sample()
        report = dict(self.update(batch))
        priorities = report.pop("priorities", None)
        if self.prioritised and priorities is not None:
            self._prioritise(batch["idx"], priorities)
        self.updates += 1
        if self.updates % EVERY == 0:
            history.setdefault("update", []).append(self.updates)
            for name, value in report.items():
                history.setdefault(name, []).append(float(value))

    def sample(self, n: int | None = None) -> dict[str, Tensor]:
        """A batch of `n` transitions (default `batch_size`) from the memory, as `update` gets it."""
        n = self.batch_size if n is None else n
        if self.buffer is None or not len(self.buffer):
            raise ValueError("cannot sample from an empty memory")
        if self.prioritised:
            idx = self.tree.sample(n, self.generator)
            batch = self.buffer.take(idx)
            p = self.tree[idx] / self.tree.total()
            weights = (len(self.buffer) * p) ** -self.beta
            batch["weights"], batch["idx"] = torch.from_numpy(weights / weights.max()).float(), torch.from_numpy(idx)
        else:
            batch = self.buffer.sample(n, self.generator)
        for name in ("obs", "next_obs"):
            batch[name] = batch[name].float()
        return batch if self.device.type == "cpu" else {name: x.to(self.device) for name, x in batch.items()}

    def _prioritise(self, slots: Tensor, priorities: Tensor) -> None:
        p = priorities.detach().cpu().numpy().astype(np.float64)
        self._top = max(self._top, float(p.max()))
        # A priority of exactly zero would bury a transition for ever.
        self.tree.set(slots, np.maximum(p, 1e-6) ** self.alpha)

    def make_target(self, online: nn.Module) -> nn.Module:
        """A frozen copy of a network which `track_targets` keeps up with it."""
        target = copy.deepcopy(online).requires_grad_(False)
        self._targets.append((list(target.parameters()), list(online.parameters())))
        return target

    def track_targets(self, *, tau: float | None = None, period: int | None = None) -> None:
        """Move every target: by Polyak averaging with `tau`, or by a copy at every `period`-th call."""
        if (tau is None) == (period is None):
            raise ValueError(f"give either tau or period, got tau={tau} and period={period}")
        self._tracked += 1
        for target, online in self._targets:
            if tau is not None:
                polyak_(target, online, tau)
            elif self._tracked % period == 0:
                copy_(target, online)


@torch.no_grad()
def polyak_(target: nn.Module | Sequence[Tensor], online: nn.Module | Sequence[Tensor], tau: float) -> None:
    r"""$\bar\theta \leftarrow (1-\tau) \bar\theta + \tau\theta$, in place, for two networks or two lists of tensors; buffers stay."""
    if not 0 <= tau <= 1:
        raise ValueError(f"tau must lie in [0, 1], got {tau}")
    torch._foreach_lerp_(_parameters(target), _parameters(online), tau)


@torch.no_grad()
def copy_(target: nn.Module | Sequence[Tensor], online: nn.Module | Sequence[Tensor]) -> None:
    """Copy the parameters of one network into another, in place."""
    torch._foreach_copy_(_parameters(target), _parameters(online))


def _parameters(x: nn.Module | Sequence[Tensor]) -> list[Tensor]:
    return list(x.parameters()) if isinstance(x, nn.Module) else list(x)
