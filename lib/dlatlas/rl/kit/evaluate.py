"""Scores of an agent, and what several runs say together."""

from __future__ import annotations

import numpy as np
from gymnasium.vector import VectorEnv
from numpy.typing import ArrayLike
from scipy.stats import trim_mean

from dlatlas.rl.kit.rollout import Source, as_vector, to_action_space

__all__ = ["aggregate", "evaluate"]

COPIES = 32


def evaluate(
    agent, env_fn: Source, episodes: int, seed: int = 0, deterministic: bool = True, *, longest: int = 30_000
) -> dict[str, float | np.ndarray]:
    """Play whole episodes and report their undiscounted returns.

    Every copy of the environment plays one episode a round, so that short episodes are not favoured.

    Args:
        agent: whatever has ``act(obs (B, ...), deterministic) -> actions (B, ...)``.
        env_fn: an id, a class or a function that makes an environment; an environment or a vector environment works as well.
        episodes: how many.
        seed: seed of the environments.
        deterministic: the agent acts without exploration.
        longest: steps that an episode may take.

    Returns:
        "mean" and "std" (of the sample, ddof 0) of the returns, the "returns" and the "lengths" ``(episodes,)``.

    Raises:
        ValueError: spaces that do not fit the agent, or an episode that does not end (a deterministic policy may go round in circles for ever).
    """
    if int(episodes) != episodes or episodes < 1:
        raise ValueError(f"episodes must be a positive integer, got {episodes}")
    single = not isinstance(env_fn, VectorEnv) and hasattr(env_fn, "step") and not isinstance(env_fn, type)
    vec = as_vector(env_fn, 1 if single else min(episodes, COPIES))
    count, space = vec.num_envs, vec.single_action_space
    if hasattr(agent, "check_spaces"):
        agent.check_spaces(vec.single_observation_space, space)
    returns, lengths = [], []
    for start in range(0, episodes, count):
        obs, _ = vec.reset(seed=seed + start)
        playing = np.arange(count) < episodes - start
        total, length = np.zeros(count), np.zeros(count, dtype=int)
        while playing.any():
            obs, rewards, _, _, info = vec.step(to_action_space(agent.act(obs, deterministic=deterministic), space))
            total[playing] += rewards[playing]
            length[playing] += 1
            playing &= ~info["_final_obs"]
            if (length[playing] >= longest).any():
                raise ValueError(
                    f"an episode has not ended after {longest:,} steps; give the environment a time limit: gymnasium.make(..., max_episode_steps=...)"
                )
        kept = min(count, episodes - start)
        returns.append(total[:kept])
        lengths.append(length[:kept])
    returns, lengths = np.concatenate(returns), np.concatenate(lengths)
    return {"mean": float(returns.mean()), "std": float(returns.std()), "returns": returns, "lengths": lengths}


def aggregate(runs: ArrayLike, *, level: float = 0.95, reps: int = 2000, seed: int = 0) -> dict[str, float | tuple[float, float]]:
    """Robust summaries of several runs with bootstrap intervals (Agarwal et al., 2021).

    The interquartile mean is the mean of the middle half of all scores. The intervals are percentiles over resampled runs; with several tasks
    the runs of every task are resampled separately (stratified).

    Args:
        runs: final scores ``(runs,)`` of one task or ``(runs, tasks)`` of several (comparable, for example normalised).
        level: coverage of the intervals.
        reps: resamples.
        seed: seed of the resamples.

    Returns:
        "iqm", "median" (over tasks, of the mean over runs; with one task over its runs), "mean", "iqr" (the quartiles of all scores) and the intervals
        "iqm_ci", "median_ci", "mean_ci" as pairs.
    """
    scores = np.asarray(runs, dtype=np.float64)
    if scores.ndim not in (1, 2) or not scores.size:
        raise ValueError(f"runs must have shape (runs,) or (runs, tasks), got {scores.shape}")
    if not np.isfinite(scores).all():
        raise ValueError("runs must be finite")
    if not 0 < level < 1 or reps < 1:
        raise ValueError(f"level must lie in (0, 1) and reps be positive, got level={level} and reps={reps}")
    scores = scores.reshape(len(scores), -1)  # (runs, tasks)
    n, tasks = scores.shape
    draws = np.random.default_rng(seed).integers(n, size=(reps, n, tasks))
    resampled = np.take_along_axis(scores[None], draws, axis=1)  # (reps, runs, tasks)
    edge = (100 * (1 - level) / 2, 100 * (1 + level) / 2)

    def median(x: np.ndarray) -> np.ndarray:
        return np.median(x[..., 0], axis=-1) if tasks == 1 else np.median(x.mean(-2), axis=-1)

    measures = {
        "iqm": lambda x: trim_mean(x.reshape(*x.shape[:-2], -1), 0.25, axis=-1),
        "median": median,
        "mean": lambda x: x.mean((-2, -1)),
    }
    out: dict[str, float | tuple[float, float]] = {name: float(measure(scores)) for name, measure in measures.items()}
    out["iqr"] = tuple(np.percentile(scores, (25, 75)).tolist())
    for name, measure in measures.items():
        out[f"{name}_ci"] = tuple(np.percentile(measure(resampled), edge).tolist())
    return out
