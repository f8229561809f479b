"""What off-policy agents with continuous actions share, and DDPG, the baseline that their papers compare with."""

from __future__ import annotations

from collections.abc import Sequence

import gymnasium
import numpy as np
import torch
from torch import Tensor, nn

from dlatlas.rl.kit.agent import ReplayAgent, copy_, polyak_
from dlatlas.rl.kit.nets import mlp

__all__ = ["DDPG", "ActorCriticAgent", "copy_", "polyak_"]


class ActorCriticAgent(ReplayAgent):
    """Base of off-policy agents whose actions lie in a box.

    Networks work with unit actions in [-1, 1]; the memory and the environment see those of the box (`scale`, `unscale`). Before `warmup`
    transitions the agent acts uniformly at random in the box.

    Args:
        obs_dim: width of flat observations.
        act_dim: number of action dimensions.
        low, high: bounds of the actions, numbers or ``(act_dim,)``.
        hidden: widths of the hidden layers.
        lr: Adam's learning rate.
        tau: Polyak rate of the targets, or
        target_period: updates between two copies into the targets (then `tau` is not used).
        reward_scale: factor on the rewards in the memory.
        kwargs: those of `ReplayAgent`.
    """

    def __init__(
        self,
        obs_dim: int,
        act_dim: int,
        low: float | Sequence[float] | np.ndarray,
        high: float | Sequence[float] | np.ndarray,
        *,
        hidden: Sequence[int] = (64, 64),
        lr: float = 1e-3,
        tau: float = 0.005,
        target_period: int | None = None,
        reward_scale: float = 1.0,
        **kwargs,
    ):
        super().__init__(reward_scale=reward_scale, **kwargs)
        self.low, self.high = (np.broadcast_to(np.asarray(x, dtype=np.float32), (act_dim,)).copy() for x in (low, high))
        if not (np.isfinite(self.low).all() and np.isfinite(self.high).all() and (self.low < self.high).all()):
            raise ValueError(f"low must lie below high and both must be finite, got low={low} and high={high}")
        if not 0 <= tau <= 1:
            raise ValueError(f"tau must lie in [0, 1], got {tau}")
        if target_period is not None and target_period < 1:
            raise ValueError(f"target_period must be a positive integer, got {target_period}")
        self.obs_dim, self.act_dim, self.hidden, self.lr = obs_dim, act_dim, tuple(hidden), lr
        self.tau, self.target_period = tau, target_period
        self._middle, self._half = self.tensor((self.high + self.low) / 2), self.tensor((self.high - self.low) / 2)

    def check_spaces(self, observations: gymnasium.Space, actions: gymnasium.Space) -> None:
        """Flat observations of width `obs_dim`, and a box of `act_dim` actions that holds the agent's."""
        super().check_spaces(observations, actions)
        if observations.shape != (self.obs_dim,):
            raise ValueError(f"the agent expects observations of shape {(self.obs_dim,)}, the environment has {observations.shape}")
        if not isinstance(actions, gymnasium.spaces.Box) or actions.shape != (self.act_dim,):
            raise ValueError(f"the agent expects a Box of {self.act_dim} actions, the environment has {actions}")
        if (self.low < actions.low - 1e-6).any() or (self.high > actions.high + 1e-6).any():
            raise ValueError(f"the agent's actions lie in [{self.low}, {self.high}], the environment takes [{actions.low}, {actions.high}]")

    def scale(self, unit: Tensor) -> Tensor:
        """From [-1, 1] to [low, high]."""
        return self._middle + self._half * unit

    def unscale(self, actions: Tensor) -> Tensor:
        """From [low, high] to [-1, 1]."""
        return (actions - self._middle) / self._half

    def optimise(self, *modules: nn.Module, lr: float | None = None) -> torch.optim.Adam:
        """Adam over the parameters of the modules, at the agent's learning rate."""
        return torch.optim.Adam([p for m in modules for p in m.parameters()], lr=self.lr if lr is None else lr, fused=True)

    def critic_net(self, out: int = 1) -> nn.Sequential:
        """A ReLU perceptron from observation and unit action ``(B, obs_dim + act_dim)`` to ``(B, out)``."""
        return mlp((self.obs_dim + self.act_dim, *self.hidden, out), nn.ReLU).to(self.device)

    def actor_net(self, out: int | None = None, out_scale: float = 0.1) -> nn.Sequential:
        """A ReLU perceptron from observation ``(B, obs_dim)`` to ``(B, out)``, default `act_dim`."""
        return mlp((self.obs_dim, *self.hidden, self.act_dim if out is None else out), nn.ReLU, out_scale=out_scale).to(self.device)

    def track(self) -> None:
        """Move all targets by `tau`, or copy them at every `target_period`-th call."""
        if self.target_period is None:
            self.track_targets(tau=self.tau)
        else:
            self.track_targets(period=self.target_period)

    def explore(self, obs: np.ndarray) -> np.ndarray:
        if self.transitions < self.warmup:
            return self.rng.uniform(self.low, self.high, (len(obs), self.act_dim)).astype(np.float32)
        return self.act(obs)


class DDPG(ActorCriticAgent):
    r"""Deep deterministic policy gradients with n-step returns.

    $$\delta = R + d\, Q'(s', \pi'(s')) - Q(s, a), \qquad L_Q = \text{mean}_i\, w_i \tfrac12 \delta_i^2, \qquad L_\pi = -\text{mean}\, Q(s, \pi(s)).$$

    It explores with Gaussian noise.

    Args:
        noise: standard deviation of the exploration noise, in units of half the width of the box.
        args, kwargs: those of `ActorCriticAgent`.
    """

    def __init__(self, obs_dim: int, act_dim: int, low, high, *, noise: float = 0.1, **kwargs):
        super().__init__(obs_dim, act_dim, low, high, **kwargs)
        if not noise >= 0:
            raise ValueError(f"noise must not be negative, got {noise}")
        self.noise = noise
        self.actor, self.critic = self.actor_net(), self.critic_net()
        self.target_actor, self.target_critic = self.make_target(self.actor), self.make_target(self.critic)
        self.actor_optimizer, self.critic_optimizer = self.optimise(self.actor), self.optimise(self.critic)

    @torch.no_grad()
    def act(self, obs: np.ndarray | Tensor, deterministic: bool = False) -> np.ndarray:
        """The policy's actions ``(B, act_dim)`` in the box; unless `deterministic` with noise."""
        unit = torch.tanh(self.actor(self.tensor(obs)))
        if not deterministic:
            unit = (unit + self.noise * torch.randn(unit.shape, generator=self.generator).to(self.device)).clamp(-1, 1)
        return self.scale(unit).cpu().numpy()

    def td_errors(self, batch: dict[str, Tensor]) -> Tensor:
        """Value minus target ``(B,)``; the gradient flows through the value only."""
        q = self.critic(torch.cat((batch["obs"], self.unscale(batch["actions"])), 1)).squeeze(1)
        with torch.no_grad():
            after = torch.cat((batch["next_obs"], torch.tanh(self.target_actor(batch["next_obs"]))), 1)
            goal = batch["returns"] + batch["discounts"] * self.target_critic(after).squeeze(1)
        return q - goal

    def update(self, batch: dict[str, Tensor]) -> dict[str, float]:
        """One step of Adam for the critic and one for the actor; reports "critic_loss" and "actor_loss", and priorities if asked for."""
        delta = self.td_errors(batch)
        loss = 0.5 * delta * delta
        loss = (loss * batch["weights"]).mean() if "weights" in batch else loss.mean()
        self.critic_optimizer.zero_grad()
        loss.backward()
        self.critic_optimizer.step()
        actor_loss = -self.critic(torch.cat((batch["obs"], torch.tanh(self.actor(batch["obs"]))), 1)).mean()
        self.actor_optimizer.zero_grad()
        # The critic's own gradient is not needed, so it is not computed.
        for p, g in zip(self.actor.parameters(), torch.autograd.grad(actor_loss, list(self.actor.parameters()))):
            p.grad = g
        self.actor_optimizer.step()
        self.track()
        report = {"critic_loss": loss.item(), "actor_loss": actor_loss.item()}
        if "weights" in batch:
            report["priorities"] = delta.detach().abs()
        return report
