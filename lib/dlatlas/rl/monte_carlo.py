r"""Q_MC: finite-horizon Monte Carlo control (amiranashvili2018td).

Temporal-difference learning regresses a value on rewards plus its own guess about the rest; Monte Carlo regresses it on rewards that were
really received. The first has less variance and a bias that is as good as the guess; the second has no bias. Its variance grows with the
length of the sum, but a sum over a short horizon may be all that control needs.

Equations: with rewards $r_t$, both sums stopped after the first end of an episode,

$$ R_t^{(h)} = \sum_{i=0}^{h-1} r_{t+i}, \qquad Y_t = \sum_{i=0}^{n-1} \gamma^i r_{t+i} + \gamma^n \max_a Q(s_{t+n}, a) . $$

$Q_{MC}$ regresses $Q(s_t, a_t)$ on $R_t^{(h)}$ and n-step Q-learning on $Y_t$, by the mean square; both act epsilon-greedily on the
argmax. A horizon of at least the length of an episode gives ordinary Monte Carlo control.

Deviations from the paper:

1. Parallel environments stepped together instead of asynchronous workers.
2. The network is the caller's; the default is a plain perceptron without the paper's split into a value of the state and one of the
   action.

Later work: Monte Carlo targets with many horizons and learned goals had won a competition before (Dosovitskiy and Koltun, 2017). De Asis
et al. (2020) bootstrap within a fixed horizon, value h on value h-1, and prove that this cannot diverge as TD can. Hernandez-Garcia and
Sutton (2019) find intermediate n best for n-step DQN.

Example:
    import torch
    from dlatlas.rl.monte_carlo import finite_horizon_returns, nstep_q_targets

    rewards, dones = torch.zeros(6, 1), torch.zeros(6, 1)  # six steps of one environment
    rewards[3], dones[4] = 1.0, 1.0
    for horizon in (1, 2, 4):
        returns, complete = finite_horizon_returns(rewards, dones, horizon)
        print(f"next {horizon} rewards:", returns[:, 0].tolist(), "usable", complete[:, 0].int().tolist())
    guess = torch.full((6, 1), 10.0)  # what the network thinks of the next states
    print("bootstrapped after two:", [round(y, 2) for y in nstep_q_targets(rewards, dones, guess, gamma=0.9, n=2)[:, 0].tolist()])
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import Categorical

from dlatlas.rl.kit.agent import Agent
from dlatlas.rl.kit.nets import mlp
from dlatlas.rl.kit.returns import nstep
from dlatlas.rl.kit.rollout import Source, as_vector, collect

__all__ = ["QMC", "NStepQ", "finite_horizon_returns", "nstep_q_targets"]


def finite_horizon_returns(rewards: Tensor, dones: Tensor, horizon: int, *, truncations: Tensor | None = None) -> tuple[Tensor, Tensor]:
    r"""Sums of the next `horizon` rewards, $R_t = \sum_{i<h} r_{t+i}$, stopped after the first done.

    Args:
        rewards: ``[T, B]``.
        dones: ``[T, B]``, 1 where step t ended the episode.
        horizon: number of rewards $h \ge 1$.
        truncations: ``[T, B]``, 1 where a limit cut the episode after step t: a window that goes beyond is not complete.

    Returns:
        ``returns [T, B]`` and ``valid [T, B]`` (bool): whether the window lies inside the segment or was closed by a done. The
        entries that are not valid hold the incomplete sum; they are no targets.

    Raises:
        ValueError: shapes that differ or are not ``[T, B]``, or a horizon below 1.
    """
    if rewards.dim() != 2 or rewards.shape != dones.shape or rewards.numel() == 0:
        raise ValueError(f"rewards and dones must both be [T, B], got {tuple(rewards.shape)} and {tuple(dones.shape)}")
    if horizon < 1:
        raise ValueError(f"horizon must be at least 1, got {horizon}")
    T = len(rewards)
    now = torch.arange(T, device=rewards.device)[:, None]
    end = _next(dones, now)  # [T, B]
    cut = torch.full_like(end, T) if truncations is None else _next(truncations, now)
    wanted = torch.minimum(end, now + horizon - 1)
    last = torch.minimum(wanted, cut).clamp(max=T - 1)
    sums = rewards.double().cumsum(0)  # differences of long sums lose digits in float32
    total = sums.gather(0, last) - sums + rewards.double()
    return total.to(rewards.dtype), last == wanted


def _next(events: Tensor, now: Tensor) -> Tensor:
    """Index of the first event at or after every step; T where there is none."""
    return torch.where(events.bool(), now, len(events)).flip(0).cummin(0).values.flip(0)


def nstep_q_targets(
    rewards: Tensor, dones: Tensor, next_max_q: Tensor, gamma: float, n: int, *, truncations: Tensor | None = None
) -> Tensor:
    r"""Targets of n-step Q-learning, $\sum_{i<n} \gamma^i r_{t+i} + \gamma^n \max_a Q(s_{t+n}, a)$, cut by a done.

    Args:
        rewards: ``[T, B]``.
        dones: ``[T, B]``, 1 where step t ended the episode by termination.
        next_max_q: ``[T, B]``; entry t is $\max_a Q$ of the state *after* step t.
        gamma: discount in [0, 1].
        n: number of rewards; shorter at the end of the segment, which then bootstraps from its last state.
        truncations: ``[T, B]``, 1 where a limit cut the episode: the sum ends there and bootstraps from the state that it reached.

    Raises:
        ValueError: shapes that differ, `gamma` outside [0, 1] or `n` below 1.
    """
    return nstep(rewards, dones, next_max_q, gamma, n, truncations=truncations)


class _SegmentQ(Agent):
    """Epsilon-greedy regression of action values on targets computed from segments of parallel play; subclasses give the targets.

    Args:
        obs_dim: width of flattened observations; ignored with `network`.
        n_actions: number of actions.
        network: ``(B, ...) -> (B, n_actions)``; default a ReLU perceptron with the layers `hidden`.
        lr: Adam's learning rate.
        segment: steps of every copy between two rounds of learning.
        epochs: passes over the new targets in a round.
        batch_size: transitions a minibatch.
        epsilon: (start, end, transitions of the linear decay).
        device: where the network lies.
    """

    def __init__(
        self,
        obs_dim: int,
        n_actions: int,
        *,
        network: nn.Module | None = None,
        hidden: Sequence[int] = (64, 64),
        lr: float = 1e-3,
        segment: int = 20,
        epochs: int = 2,
        batch_size: int = 256,
        epsilon: tuple[float, float, int] = (1.0, 0.1, 20_000),
        device: str | torch.device = "cpu",
    ):
        super().__init__(device=device)
        if segment < 1 or epochs < 1 or batch_size < 1:
            raise ValueError(f"segment, epochs and batch_size must be positive, got {segment}, {epochs} and {batch_size}")
        if not (0 <= epsilon[0] <= 1 and 0 <= epsilon[1] <= 1 and epsilon[2] >= 0):
            raise ValueError(f"epsilon must be (start, end, decay_steps) with rates in [0, 1], got {epsilon}")
        network = nn.Sequential(nn.Flatten(), *mlp((obs_dim, *hidden, n_actions), nn.ReLU)) if network is None else network
        self.online, self.n_actions, self.schedule = network.to(self.device), n_actions, epsilon
        self.segment, self.epochs, self.batch_size = segment, epochs, batch_size
        self.optimizer = torch.optim.Adam(self.online.parameters(), lr=lr, fused=True)
        self.transitions = 0

    @property
    def epsilon(self) -> float:
        """The current rate of random actions."""
        start, end, decay = self.schedule
        return end if self.transitions >= decay else start + (end - start) * self.transitions / decay

    def policy(self, obs: Tensor) -> tuple[Categorical, Tensor]:
        r"""The epsilon-greedy distribution and $\max_a Q$, both for observations ``(B, ...)``."""
        q = self.online(obs)
        probs = torch.full_like(q, self.epsilon / self.n_actions)
        probs.scatter_add_(1, q.argmax(1, keepdim=True), torch.full_like(q[:, :1], 1 - self.epsilon))
        return Categorical(probs=probs, validate_args=False), q.amax(1)

    @torch.no_grad()
    def act(self, obs: np.ndarray | Tensor, deterministic: bool = False) -> np.ndarray:
        """The best actions ``(B,)``; unless `deterministic`, a random one with probability epsilon."""
        best = self.online(self.tensor(obs)).argmax(1).cpu().numpy()
        random = self.rng.random(len(best)) < (0.0 if deterministic else self.epsilon)
        return np.where(random, self.rng.integers(self.n_actions, size=len(best)), best)

    def targets(self, segment: dict[str, Tensor]) -> dict[str, Tensor]:
        """From a segment of the kit's `collect`: obs ``(M, ...)``, actions ``(M,)`` and targets ``(M,)`` to learn from."""
        raise NotImplementedError

    def update(self, batch: dict[str, Tensor]) -> dict[str, float]:
        """One step of Adam on the mean square of Q(obs, actions) - targets."""
        q = self.online(batch["obs"]).gather(1, batch["actions"][:, None])[:, 0]
        loss = (q - batch["targets"]).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return {"loss": loss.item()}

    def fit(self, env: Source, steps: int, seed: int = 0, *, n_envs: int = 16) -> dict[str, list]:
        """Play and learn for `steps` transitions over all copies.

        Returns:
            "step" and "return" of every finished episode (steps are those at the end of its segment), "update" and "loss" of every round.
        """
        vec = as_vector(env, n_envs)
        vec.reset(seed=seed)
        self.generator.manual_seed(seed)
        self.rng = np.random.default_rng(seed)
        history: dict[str, list] = {"step": [], "return": [], "update": [], "loss": []}
        stop, updates = self.transitions + steps, 0
        while self.transitions < stop:
            segment = collect(self.policy, vec, self.segment, self.generator)
            self.transitions += int(segment["valid"].sum())
            history["return"] += segment["episode_returns"].tolist()
            history["step"] += [self.transitions] * len(segment["episode_returns"])
            batch, losses = self.targets(segment), []
            for _ in range(self.epochs if len(batch["targets"]) else 0):
                order = torch.randperm(len(batch["targets"]), generator=self.generator).split(self.batch_size)
                losses += [self.update({name: x[rows] for name, x in batch.items()})["loss"] for rows in order]
            if losses:
                updates += len(losses)
                history["update"].append(updates)
                history["loss"].append(float(np.mean(losses)))
        return history


class QMC(_SegmentQ):
    """Monte Carlo control with a finite horizon: Q is regressed on the undiscounted sum of the next `horizon` rewards.

    Windows go across the borders of segments; a transition is learned from when its window is complete.
    Where every step pays the same, all windows have the same sum but those that contain an end: then there is little to learn from.

    Args:
        obs_dim, n_actions: as in the base.
        horizon: rewards in a sum; at least the length of an episode gives ordinary Monte Carlo.
        limit_is_end: a time limit closes the sum like the end of an episode. Otherwise windows that a limit cuts are not learned from.
        kwargs: see the base.

    Raises:
        ValueError: a horizon below 1.
    """

    def __init__(self, obs_dim: int, n_actions: int, horizon: int = 32, *, limit_is_end: bool = False, **kwargs):
        super().__init__(obs_dim, n_actions, **kwargs)
        if horizon < 1:
            raise ValueError(f"horizon must be at least 1, got {horizon}")
        self.horizon, self.limit_is_end = horizon, limit_is_end
        self._open: dict[str, Tensor] = {}

    def fit(self, env: Source, steps: int, seed: int = 0, *, n_envs: int = 16) -> dict[str, list]:
        self._open = {}  # the environment starts anew
        return super().fit(env, steps, seed, n_envs=n_envs)

    def targets(self, segment: dict[str, Tensor]) -> dict[str, Tensor]:
        new = {name: segment[name] for name in ("obs", "actions", "rewards", "dones", "truncations")} | {"learned": ~segment["valid"]}
        rows = {name: torch.cat([self._open[name], x]) if self._open else x for name, x in new.items()}  # [T, B, ...]
        ends, cuts = rows["dones"].bool(), rows["truncations"].bool()
        if self.limit_is_end:
            ends, cuts = ends | cuts, torch.zeros_like(cuts)
        returns, valid = finite_horizon_returns(rows["rewards"], ends, self.horizon, truncations=cuts)
        ready = valid & ~rows["learned"]
        rows["learned"] = rows["learned"] | valid
        self._open = {name: x[max(0, len(x) - self.horizon + 1) :] for name, x in rows.items()} if self.horizon > 1 else {}
        return {"obs": rows["obs"][ready], "actions": rows["actions"][ready], "targets": returns[ready]}


class NStepQ(_SegmentQ):
    r"""n-step Q-learning on segments of parallel play, the temporal-difference twin of `QMC`.

    The bootstrap is $\max_a Q$ of the network that played the segment, so it stands still while the segment is learned.

    Args:
        obs_dim, n_actions: as in the base.
        n: rewards before the bootstrap.
        gamma: discount.
        kwargs: see the base.

    Raises:
        ValueError: `n` below 1 or `gamma` outside [0, 1].
    """

    def __init__(self, obs_dim: int, n_actions: int, n: int = 20, gamma: float = 0.99, **kwargs):
        super().__init__(obs_dim, n_actions, **kwargs)
        if n < 1 or not 0 <= gamma <= 1:
            raise ValueError(f"n must be at least 1 and gamma in [0, 1], got {n} and {gamma}")
        self.n, self.gamma = n, gamma

    def targets(self, segment: dict[str, Tensor]) -> dict[str, Tensor]:
        goal = nstep_q_targets(
            segment["rewards"], segment["dones"], segment["next_values"], self.gamma, self.n, truncations=segment["truncations"]
        )
        keep = segment["valid"]
        return {"obs": segment["obs"][keep], "actions": segment["actions"][keep], "targets": goal[keep]}
