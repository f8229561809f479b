"""Games of the Atari 2600 as deep Q-networks see them, from the Arcade Learning Environment with its own ROMs.

Frames are grey, 84 x 84, the maximum of two, four of them stacked; every action is repeated four times, and rewards are clipped to [-1, 1] (Mnih
et al., 2015). The preprocessing is that of `ale_py` itself, in C++, over many games at once.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv, VectorWrapper

__all__ = ["Atari"]


class Atari:
    """A game, to be given wherever environments are made: ``agent.fit(Atari("pong"), ...)``, ``evaluate(agent, Atari("pong"), 8)``.

    Args:
        game: name of the ROM, for example "pong", "breakout" or "space_invaders".
        options: those of `ale_py.vector_env.AtariVectorEnv`, for example ``episodic_life=True`` or ``frameskip=1``.

    Raises:
        ImportError: `ale_py` is not installed.
    """

    def __init__(self, game: str = "pong", **options: Any):
        self.game, self.options = game, options

    def batched(self, n: int) -> VectorEnv:
        """`n` copies, stepped by one thread; observations ``(n, 4, 84, 84)`` of bytes."""
        try:
            from ale_py.vector_env import AtariVectorEnv
        except ImportError:
            raise ImportError('Atari games need the package ale-py: pip install "dlatlas[atari]"') from None
        return _SeedsAsArray(AtariVectorEnv(self.game, num_envs=n, autoreset_mode=AutoresetMode.SAME_STEP, num_threads=1, **self.options))


class _SeedsAsArray(VectorWrapper):
    """Takes a list of seeds, as every other vector environment does."""

    def reset(self, *, seed: int | list[int] | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        return self.env.reset(seed=np.asarray(seed) if isinstance(seed, list) else seed, options=options)
