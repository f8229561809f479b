r"""The environments of the reinforcement-learning chapters.

Each one is written once, over a whole batch of copies in NumPy (`BatchedChain`, `BatchedPushBox`, ...); the `gymnasium.Env` of the
same name (`Chain`, `PushBox`, ...) is a batch of one. Importing this package registers them as `dlatlas/<Name>-v0`, so
`gymnasium.make("dlatlas/Chain-v0", n=20)` and `gymnasium.make_vec("dlatlas/Chain-v0", num_envs=64, n=20)` work as usual.

The batched classes reset a copy in the very step that ends its episode (`AutoresetMode.SAME_STEP`): the returned observation is already
the first one of the next episode, and the last one of the old episode is in `info["final_obs"][i]` where `info["_final_obs"][i]`. No step
is spent on a reset, so every step of every copy is a transition to learn from.
"""

import inspect

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

__all__ = ["BatchedEnv", "SingleEnv"]


class BatchedEnv(VectorEnv):
    """Copies of one environment, stepped together; the base of all batched environments.

    A subclass draws start states in `_begin(which)`, moves all copies in `_advance(actions)`, and shows them in `_observe()`.
    `reset` takes two options: `reset_mask` (n,) bool restarts only some copies, and `state` (n, ...) overwrites the drawn attribute
    `state` where the environment keeps one.

    Args:
        num_envs: number of copies n.
        observation_space: space of one copy.
        action_space: space of one copy, `Discrete` or `Box`.
        max_steps: an episode is truncated after so many steps; None: never.
    """

    metadata = {"autoreset_mode": AutoresetMode.SAME_STEP, "render_modes": []}  # noqa: RUF012

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        cls.batched = cls  # so that a maker of vector environments may be given either class

    def __init__(self, num_envs: int, observation_space: gymnasium.Space, action_space: gymnasium.Space, max_steps: int | None = None):
        if num_envs < 1:
            raise ValueError(f"num_envs must be at least 1, got {num_envs}")
        if max_steps is not None and max_steps < 1:
            raise ValueError(f"max_steps must be at least 1 or None, got {max_steps}")
        self.num_envs, self.max_steps = num_envs, max_steps
        self.single_observation_space, self.single_action_space = observation_space, action_space
        self.observation_space, self.action_space = batch_space(observation_space, num_envs), batch_space(action_space, num_envs)
        self.copies = np.arange(num_envs)
        self.t = None  # (n,) steps since the start of each copy's episode

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        """Start all copies (or those of `options["reset_mask"]`) anew; one seed rules the whole batch."""
        super().reset(seed=seed)
        options = dict(options or {})
        mask = options.pop("reset_mask", None)
        if mask is None:
            which, self.t = self.copies, np.zeros(self.num_envs, dtype=np.int64)
        elif self.t is None or np.shape(mask) != (self.num_envs,) or np.asarray(mask).dtype != bool or not np.any(mask):
            raise ValueError(f"reset_mask must be bool of shape ({self.num_envs},) with a True, after a first full reset, got {mask!r}")
        else:
            which = np.flatnonzero(mask)
        self._restart(which)
        if "state" in options:
            state, drawn = np.asarray(options["state"]), getattr(self, "state", None)
            if drawn is None or state.shape != drawn.shape:
                raise ValueError(f"state must have shape {None if drawn is None else drawn.shape}, got {state.shape}")
            self.state[which] = state[which]
        return self._observe(), self._masked(self._info(), np.ones(self.num_envs, dtype=bool))

    def step(self, actions):
        """One step of every copy; copies that end are restarted at once (see the module's docstring)."""
        obs, rewards, terminated, truncated, info = self.transition(actions)
        everyone, ended = np.ones(self.num_envs, dtype=bool), terminated | truncated
        if not ended.any():
            return obs, rewards, terminated, truncated, self._masked(info, everyone)
        which = np.flatnonzero(ended)
        final_obs = np.full(self.num_envs, None, dtype=object)
        for i in which:
            final_obs[i] = obs[i].copy()
        self._restart(which)
        obs[which] = self._observe()[which]
        out = self._masked(self._info(), everyone)
        out |= {"final_obs": final_obs, "_final_obs": ended, "final_info": self._masked(info, ended), "_final_info": ended.copy()}
        return obs, rewards, terminated, truncated, out

    def transition(self, actions):
        """One step of every copy without any restart: (obs, rewards, terminated, truncated, info), each with one row a copy."""
        if self.t is None:
            raise gymnasium.error.ResetNeeded("call reset before the first step")
        rewards, terminated = self._advance(self._checked(actions))
        self.t += 1
        late = self.t >= self.max_steps if self.max_steps is not None else np.zeros(self.num_envs, dtype=bool)
        return self._observe(), rewards, terminated, late & ~terminated, self._info()

    # --- what a subclass supplies ---------------------------------------------------------------------------------------

    def _begin(self, which: np.ndarray) -> None:
        """Draw start states of the copies with these indices from `self.np_random`."""
        raise NotImplementedError

    def _advance(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Move all copies: rewards (n,) float64 and terminated (n,) bool; `self.t` still counts the steps before this one."""
        raise NotImplementedError

    def _observe(self) -> np.ndarray:
        """A fresh array of observations (n, ...)."""
        raise NotImplementedError

    def _info(self) -> dict[str, np.ndarray]:
        """Fresh arrays (n,) to report beside the observations."""
        return {}

    # --- helpers --------------------------------------------------------------------------------------------------------

    def _restart(self, which: np.ndarray) -> None:
        self.t[which] = 0
        self._begin(which)

    def _masked(self, info: dict[str, np.ndarray], mask: np.ndarray) -> dict[str, np.ndarray]:
        return info | {f"_{key}": mask.copy() for key in info}

    def _checked(self, actions) -> np.ndarray:
        actions, space = np.asarray(actions), self.single_action_space
        shape = (self.num_envs, *space.shape)
        if isinstance(space, gymnasium.spaces.Discrete):
            if actions.shape != shape or actions.dtype.kind not in "iu" or actions.min() < 0 or actions.max() >= space.n:
                raise ValueError(f"actions must be integers of shape {shape} in 0..{space.n - 1}, got {actions!r}")
            return actions
        if actions.shape != shape or not np.isfinite(actions).all():
            raise ValueError(f"actions must be finite of shape {shape}, got {actions!r}")
        return np.clip(actions, space.low, space.high)


class SingleEnv(gymnasium.Env):
    """A batch of one as a plain `gymnasium.Env`; takes the arguments of its class attribute `batched`, without `num_envs`."""

    metadata = {"render_modes": []}  # noqa: RUF012
    batched: type[BatchedEnv]

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        parameters = list(inspect.signature(cls.batched).parameters.values())
        cls.__signature__ = inspect.Signature(parameters[1:])

    def __init__(self, *args, **kwargs):
        self._arguments = args, kwargs
        self.core = self.batched(1, *args, **kwargs)
        self.observation_space, self.action_space = self.core.single_observation_space, self.core.single_action_space

    def batch(self, num_envs: int) -> BatchedEnv:
        """Copies of this environment, with the same arguments, stepped together."""
        args, kwargs = self._arguments
        return self.batched(num_envs, *args, **kwargs)

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        """Start an episode; `options["state"]` sets its first state where the environment keeps an attribute `state`."""
        super().reset(seed=seed)
        self.core.np_random = self.np_random
        options = {key: np.asarray(value)[None] for key, value in (options or {}).items()}
        obs, info = self.core.reset(options=options)
        return obs[0], _first(info)

    def step(self, action):
        """One step: (obs, reward, terminated, truncated, info)."""
        obs, rewards, terminated, truncated, info = self.core.transition(np.asarray(action)[None])
        return obs[0], float(rewards[0]), bool(terminated[0]), bool(truncated[0]), _first(info)


def _first(info: dict[str, np.ndarray]) -> dict:
    return {key: value[0] for key, value in info.items() if not key.startswith("_")}


_ENVS = {
    "Chain": ("toy", "Chain", {}),
    "BlindCliffwalk": ("toy", "BlindCliffwalk", {}),
    "Bridge": ("toy", "Bridge", {}),
    "SlipperyGrid": ("toy", "SlipperyGrid", {}),
    "BatchedPendulum": ("control", "Pendulum", {}),
    "HealthGrid": ("grids", "HealthGrid", {}),
    "PushBox": ("grids", "PushBox", {}),
    "PushBoxSmall": ("grids", "PushBox", {"size": 6, "boxes": 3, "goals": 2, "obstacles": 2, "steps": 30}),
    "PointNav": ("points", "PointNav", {}),
    "MultiGoal": ("points", "MultiGoal", {}),
}

for _name, (_file, _class, _kwargs) in _ENVS.items():
    if f"dlatlas/{_name}-v0" not in gymnasium.registry:
        gymnasium.register(
            f"dlatlas/{_name}-v0",
            entry_point=f"dlatlas.rl.envs.{_file}:{_class}",
            vector_entry_point=f"dlatlas.rl.envs.{_file}:Batched{_class}",
            kwargs=_kwargs,
        )
