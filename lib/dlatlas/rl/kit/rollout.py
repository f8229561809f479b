"""Many copies of an environment under one convention, and segments of experience collected from them.

The convention is that of gymnasium's vector environments with ``AutoresetMode.SAME_STEP``: the observation after the end of an episode is the
first one of the next, and the true last observation is ``info["final_obs"]``. :func:`as_vector` brings every environment into it.
"""

from __future__ import annotations

from collections.abc import Callable

import gymnasium
import numpy as np
import torch
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv, VectorWrapper
from torch import Tensor

from dlatlas.rl.kit.nets import draw

__all__ = ["SameStep", "as_vector", "collect", "make_vec", "to_action_space", "true_next"]

Source = gymnasium.Env | VectorEnv | str | type | Callable[[], gymnasium.Env | VectorEnv]


class SameStep(VectorWrapper):
    """A vector environment in the one convention, whatever its own autoreset mode.

    ``step`` returns ``(obs, rewards, terminations, truncations, info)``. In `info`, ``final_obs`` ``(B, ...)`` is an array of the true successors
    of *every* copy, ``_final_obs`` ``(B,)`` says which copies ended, and ``valid`` ``(B,)`` says which copies made a transition. `valid` is false
    only in the step after the end of an episode of an environment that resets in the next step and cannot be reset in part: that step is the
    reset, and no transition.

    ``last_obs`` is the latest observation, or None before the first reset; ``running_returns`` ``(B,)`` are the rewards that :func:`collect` has seen
    of the unfinished episodes.
    """

    def __init__(self, env: VectorEnv):
        super().__init__(env)
        mode = (env.metadata or {}).get("autoreset_mode")
        if mode not in tuple(AutoresetMode):
            raise ValueError(f"the vector environment must declare metadata['autoreset_mode'], one of {list(AutoresetMode)}; got {mode!r}")
        self._mode = mode
        self._partial = mode == AutoresetMode.DISABLED or isinstance(env.unwrapped, SyncVectorEnv | AsyncVectorEnv)
        self.metadata = {**env.metadata, "autoreset_mode": AutoresetMode.SAME_STEP}
        self.last_obs: np.ndarray | None = None
        self._ended = np.zeros(env.num_envs, dtype=bool)
        self.running_returns = np.zeros(env.num_envs)

    def reset(self, *, seed: int | list[int | None] | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        self.last_obs, info = self.env.reset(seed=seed, options=options)
        begun = slice(None) if not options or options.get("reset_mask") is None else options["reset_mask"]
        self._ended[begun], self.running_returns[begun] = False, 0.0
        return self.last_obs, info

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict]:
        if self.last_obs is None:
            raise ValueError("reset the environments before the first step")
        obs, rewards, terminations, truncations, info = self.env.step(actions)
        ended = terminations | truncations
        valid, final = np.ones(self.num_envs, dtype=bool), obs
        if self._mode == AutoresetMode.SAME_STEP:
            if ended.any():
                if "final_obs" not in info:
                    raise ValueError("an environment with SAME_STEP autoreset must give info['final_obs'] when an episode ends")
                final = np.array(obs)
                for i in np.flatnonzero(ended):
                    final[i] = info["final_obs"][i]
        elif self._partial:
            if ended.any():
                final = np.array(obs)
                obs, reset_info = self.env.reset(options={"reset_mask": ended.copy()})
                obs = np.where(ended.reshape(-1, *[1] * (final.ndim - 1)), obs, final)
                info = {**info, "reset_info": reset_info}
        else:
            valid = ~self._ended
            self._ended = ended.copy()
        self.last_obs = obs
        return obs, rewards, terminations, truncations, {**info, "final_obs": final, "_final_obs": ended, "valid": valid}


def true_next(obs: np.ndarray, info: dict) -> np.ndarray:
    """The true successors ``(B, ...)`` of a step: `obs`, and where an episode ended the final observation."""
    if "final_obs" not in info:
        return obs
    out = np.array(obs)
    for i in np.flatnonzero(info.get("_final_obs", np.ones(len(obs), dtype=bool))):
        out[i] = info["final_obs"][i]
    return out


def make_vec(env_cls: str | type | Callable[..., gymnasium.Env | VectorEnv], n: int, **kw) -> SameStep:
    """`n` copies of an environment in the one convention.

    Args:
        env_cls: an id of the registry ("CartPole-v1"), a class of environments or a function that makes one. A class with an attribute `batched`
            (a vector environment in NumPy that takes the number of copies first) or a vector environment's class is used as it is, and so is an
            environment with a method `batch(n)` that makes such copies of itself; everything else is stepped in a `SyncVectorEnv`.
        n: number of copies.
        kw: arguments of the environment.
    """
    if int(n) != n or n < 1:
        raise ValueError(f"n must be a positive integer, got {n}")
    if isinstance(env_cls, str):
        entry = gymnasium.spec(env_cls)
        point = entry.entry_point
        point = gymnasium.envs.registration.load_env_creator(point) if isinstance(point, str) else point
        if getattr(point, "batched", None) is not None:
            return make_vec(point, n, **{**entry.kwargs, **kw})
        return _sync([lambda: gymnasium.make(env_cls, **kw)] * n)
    batched = env_cls if isinstance(env_cls, type) and issubclass(env_cls, VectorEnv) else getattr(env_cls, "batched", None)
    if batched is not None:
        vec = batched(n, **kw)
        return vec if isinstance(vec, SameStep) else SameStep(vec)
    if not callable(env_cls):
        raise ValueError(f"env_cls must be an id, a class or a function that makes an environment, got {env_cls!r}")
    first = env_cls(**kw)
    if isinstance(first, VectorEnv):
        return first if isinstance(first, SameStep) else SameStep(first)
    if _batches(first):
        return SameStep(first.batch(n))
    return _sync([lambda: first] + [lambda: env_cls(**kw)] * (n - 1))


def _batches(env: gymnasium.Env) -> bool:
    # A wrapper passes attributes through, but the copies would be without it.
    return not isinstance(env, gymnasium.Wrapper) and callable(getattr(env, "batch", None))


def as_vector(env: Source, n: int = 1) -> SameStep:
    """What a user has, in the one convention: a gymnasium environment, a vector environment, an id, a class or a function that makes one.

    `n` is the number of copies where copies can be made: of an id, a class, a function or an instance with a method `batch(n)`. Any other instance is
    used as it is.
    """
    if isinstance(env, SameStep):
        return env
    if isinstance(env, VectorEnv):
        return SameStep(env)
    if isinstance(env, gymnasium.Env):
        if _batches(env):
            return SameStep(env.batch(n))
        if n != 1:
            raise ValueError(f"one environment cannot become {n} copies; give a function that makes one")
        return _sync([lambda: env])
    return make_vec(env, n)


def to_action_space(actions: np.ndarray, space: gymnasium.Space) -> np.ndarray:
    """Actions as the space wants them: continuous ones clipped to their bounds and in its precision, discrete ones as integers."""
    if isinstance(space, gymnasium.spaces.Box):
        return np.clip(actions, space.low, space.high).astype(space.dtype, copy=False)
    return np.asarray(actions).astype(space.dtype, copy=False)


@torch.no_grad()
def collect(policy: Callable, vec: VectorEnv, T: int, generator: torch.Generator | None = None) -> dict[str, Tensor]:
    """Play T steps of all copies and keep everything that an on-policy method needs.

    With a normalised environment (:func:`make_vec`, :func:`as_vector`) the next call goes on where this one stopped; any other one is reset first.

    Args:
        policy: ``policy(obs (B, ...))`` gives a distribution over actions, or a pair of one and values ``(B,)``; see `ActorCritic`. Continuous
            actions are clipped to the action space on their way into the environment, the batch holds them as drawn.
        vec: the vector environment.
        T: number of steps.
        generator: source of the actions' randomness.

    Returns:
        obs ``(T, B, ...)``, next_obs (true successors, also at the end of an episode), actions, rewards ``(T, B)``, dones (1 where terminated),
        truncations (1 where a limit cut the episode), logp, values ``(T + 1, B)``, next_values ``(T, B)`` of the true successors (they differ from
        ``values[1:]`` where an episode was truncated), valid ``(T, B)`` bool, and ``episode_returns`` of the episodes that ended, as far as they
        were seen by successive calls. Where `valid` is false (see `SameStep`) the step is no transition: dones is 1 there, and losses should skip it.
    """
    if int(T) != T or T < 1:
        raise ValueError(f"T must be a positive integer, got {T}")
    vec = as_vector(vec)
    if vec.last_obs is None:
        vec.reset(seed=None if generator is None else int(torch.randint(2**31 - 1, (1,), generator=generator)))
    count, space = vec.num_envs, vec.single_action_space
    parameter = next(policy.parameters(), None) if isinstance(policy, torch.nn.Module) else None
    dtype, device = (torch.float32, torch.device("cpu")) if parameter is None else (parameter.dtype, parameter.device)
    running, episode_returns = vec.running_returns, []

    def tensor(x: np.ndarray) -> Tensor:
        return torch.as_tensor(x, dtype=dtype, device=device)

    def ask(obs: Tensor):
        out = policy(obs)
        return out if isinstance(out, tuple) else (out, torch.zeros(count, dtype=dtype, device=device))

    rows = {
        name: [] for name in ("obs", "next_obs", "actions", "rewards", "dones", "truncations", "logp", "values", "next_values", "valid")
    }
    obs = tensor(vec.last_obs)
    dist, value = ask(obs)
    for _ in range(T):
        actions = draw(dist, generator)
        new, rewards, terminated, truncated, info = vec.step(to_action_space(actions.cpu().numpy(), space))
        valid, ended = info["valid"], terminated | truncated
        successor = tensor(info["final_obs"])
        row = {"obs": obs, "actions": actions, "logp": dist.log_prob(actions), "values": value, "next_obs": successor}
        obs = tensor(new)
        dist, value = ask(obs)
        next_value = value
        if truncated.any():
            next_value = torch.where(torch.as_tensor(truncated, device=device), ask(successor)[1], value)
        row |= {
            "rewards": tensor(rewards),
            "dones": tensor(terminated | ~valid),
            "truncations": tensor(truncated),
            "next_values": next_value,
        }
        for name, x in row.items():
            rows[name].append(x)
        rows["valid"].append(torch.as_tensor(valid, device=device))
        running += np.where(valid, rewards, 0.0)
        episode_returns += running[ended].tolist()
        running[ended] = 0.0
    rows["values"].append(value)
    batch = {name: torch.stack(x) for name, x in rows.items()}
    return batch | {"episode_returns": torch.tensor(episode_returns, dtype=dtype)}


def _sync(makers: list[Callable[[], gymnasium.Env]]) -> SameStep:
    return SameStep(SyncVectorEnv(makers, autoreset_mode=AutoresetMode.SAME_STEP))
