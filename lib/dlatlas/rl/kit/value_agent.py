"""The deep Q-network that the value-learning papers start from, and the measures of exploration experiments."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import gymnasium
import numpy as np
import torch
from torch import Tensor, nn

from dlatlas.rl.kit.agent import Agent, ReplayAgent
from dlatlas.rl.kit.nets import mlp
from dlatlas.rl.kit.rollout import Source

__all__ = ["DQN", "greedy_episodes", "solved_after"]


class DQN(ReplayAgent):
    r"""Double Q-learning with a network, replay and an epsilon-greedy policy.

    $$\delta = R + d\, Q_{\bar\theta}\big(s', \arg\max_a Q_\theta(s', a)\big) - Q_\theta(s, a), \qquad L = \text{mean}_i\, w_i \tfrac12 \delta_i^2,$$

    with R, d and $s'$ the n-step return, discount and successor of the memory.

    Args:
        obs_dim: width of flat observations; ignored with `network`.
        n_actions: number of actions.
        network: ``(B, ...) -> (B, n_actions)``; default a ReLU perceptron.
        hidden, layer_norm: of the default network.
        zero_head: start the last linear layer at zero, so that all values are equal at first.
        lr: Adam's learning rate.
        double: the online network chooses the next action; otherwise the target network does.
        epsilon: (start, end, transitions of the linear decay from start to end).
        target_period: updates between two copies into the target network.
        kwargs: those of `ReplayAgent`.
    """

    def __init__(
        self,
        obs_dim: int,
        n_actions: int,
        *,
        network: nn.Module | None = None,
        hidden: Sequence[int] = (64, 64),
        layer_norm: bool = False,
        zero_head: bool = False,
        lr: float = 1e-3,
        double: bool = True,
        epsilon: tuple[float, float, int] = (1.0, 0.05, 10_000),
        target_period: int = 200,
        **kwargs,
    ):
        super().__init__(**kwargs)
        start, end, decay = epsilon
        if not (0 <= start <= 1 and 0 <= end <= 1 and decay >= 0):
            raise ValueError(f"epsilon must be (start, end, decay_steps) with rates in [0, 1], got {epsilon}")
        if int(target_period) != target_period or target_period < 1:
            raise ValueError(f"target_period must be a positive integer, got {target_period}")
        # The width that observations must have, or None where a network of the user's reads them.
        self.width = obs_dim if network is None else None
        if network is None:
            network = nn.Sequential(nn.Flatten(), *mlp((obs_dim, *hidden, n_actions), nn.ReLU, layer_norm))
        if zero_head:
            head = [layer for layer in network.modules() if isinstance(layer, nn.Linear)][-1]
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)
        self.n_actions, self.double, self.schedule, self.target_period = n_actions, double, epsilon, target_period
        self.online = network.to(self.device)
        self.target = self.make_target(self.online)
        self.optimizer = torch.optim.Adam(self.online.parameters(), lr=lr, fused=True)

    def check_spaces(self, observations: gymnasium.Space, actions: gymnasium.Space) -> None:
        """`n_actions` discrete actions, and `obs_dim` numbers in an observation unless the network is the user's own."""
        super().check_spaces(observations, actions)
        if self.width is not None and math.prod(observations.shape) != self.width:
            raise ValueError(f"the agent expects observations of {self.width} numbers, the environment has shape {observations.shape}")
        if not isinstance(actions, gymnasium.spaces.Discrete) or actions.n != self.n_actions:
            raise ValueError(f"the agent expects {self.n_actions} discrete actions, the environment has {actions}")

    @property
    def epsilon(self) -> float:
        """The current rate of random actions."""
        start, end, decay = self.schedule
        return end if self.transitions >= decay else start + (end - start) * self.transitions / decay

    def q_values(self, obs: Tensor) -> Tensor:
        """Values ``(B, n_actions)`` by which the agent acts."""
        return self.online(obs)

    @torch.no_grad()
    def act(self, obs: np.ndarray | Tensor, deterministic: bool = False) -> np.ndarray:
        """The best actions ``(B,)``, ties to the lowest; unless `deterministic`, a random one with probability epsilon."""
        actions = self.q_values(self.tensor(obs)).argmax(-1).cpu().numpy()
        if not deterministic:
            random = self.rng.random(len(actions)) < self.epsilon
            actions = np.where(random, self.rng.integers(self.n_actions, size=len(actions)), actions)
        return actions

    def td_errors(self, batch: dict[str, Tensor]) -> Tensor:
        """Value minus target ``(B,)``; the gradient flows through the value only."""
        q = self.online(batch["obs"]).gather(1, batch["actions"][:, None]).squeeze(1)
        with torch.no_grad():
            after = self.target(batch["next_obs"])
            best = (self.online(batch["next_obs"]) if self.double else after).argmax(1, keepdim=True)
            goal = batch["returns"] + batch["discounts"] * after.gather(1, best).squeeze(1)
        return q - goal

    def update(self, batch: dict[str, Tensor]) -> dict[str, float]:
        """One step of Adam on the weighted squared error; reports "loss", and the priorities where the memory asks for them."""
        delta = self.td_errors(batch)
        loss = 0.5 * delta * delta
        loss = (loss * batch["weights"]).mean() if "weights" in batch else loss.mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.track_targets(period=self.target_period)
        report = {"loss": loss.item()}
        if "weights" in batch:
            report["priorities"] = delta.detach().abs()
        return report


def greedy_episodes(agent: Agent, env_fn: Source, episodes: int, seed: int = 0) -> np.ndarray:
    """Undiscounted returns ``(episodes,)`` of the agent's deterministic policy."""
    from dlatlas.rl.kit.evaluate import evaluate

    return evaluate(agent, env_fn, episodes, seed)["returns"]


def solved_after(
    history: Mapping[str, Sequence[float]], threshold: float, *, window: int = 20, key: str = "return", at: str = "step"
) -> int | None:
    """When `window` entries of ``history[key]`` in a row first were at least `threshold`.

    Args:
        history: what `fit` returned, or any two equally long lists.
        threshold: the value to reach.
        window: how many in a row.
        key: name of the values.
        at: name of the list that is read at the last entry of the run; "episode" counts entries from 1.

    Returns:
        That number, or None.
    """
    if window < 1:
        raise ValueError(f"window must be at least 1, got {window}")
    values = np.asarray(history[key], dtype=float)
    if len(values) < window:
        return None
    good = np.convolve(values >= threshold, np.ones(window, dtype=int), "valid") == window
    if not good.any():
        return None
    last = int(good.argmax()) + window - 1
    return last + 1 if at == "episode" else int(history[at][last])
