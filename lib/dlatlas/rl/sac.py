r"""Soft actor-critic with a value network (haarnoja2018soft).

Entropy becomes part of the reward: the agent is paid for being undecided wherever that costs little. The best policy is then a soft maximum of
the action values, so that exploration, several solutions at once and a target for off-policy learning come out of one objective. The actor is a
Gaussian squashed by a tanh, trained through the sampled action itself.

Equations: with an action $a = \tanh u$, $u \sim \mathcal N(\mu(s), \sigma(s)^2)$ drawn now, and a lagged copy $\bar V$ of the value network,

$$ J_V = \tfrac12 \bigl( V(s) - [\min(Q_1, Q_2)(s, a) - \alpha \log \pi(a|s)] \bigr)^2 , \qquad
   J_Q = \tfrac12 \bigl( Q(s, a) - [r + \gamma (1 - \mathrm{done}) \bar V(s')] \bigr)^2 , $$

$$ J_\pi = \mathbb{E} \bigl[ \alpha \log \pi(f(\epsilon, s) | s) - \min(Q_1, Q_2)(s, f(\epsilon, s)) \bigr] , \qquad
   \log \pi(a|s) = \log \mathcal N(u; \mu, \sigma^2) - \sum_i \log (1 - \tanh^2 u_i) . $$

Deviations from the paper:

1. The temperature is an argument of its own; the paper sets it to 1 and scales the rewards, which has the same best policies.
2. Value, critics and actor take their step on the same batch from the same old networks, with one fresh action for value and actor.
3. Fused Adam; two critics and a value network share one optimizer, which changes nothing for networks that share no parameter.

Later work: Haarnoja et al. (2018, "Soft Actor-Critic Algorithms and Applications") drop the value network, let the critics bootstrap from their own
lagged copies and choose the temperature by a dual gradient step towards a target entropy; most libraries mean that version by SAC. An earlier
workshop version has one critic. Fujimoto et al. (2018, TD3) show that the smaller of two critics, noisy targets and delayed actor steps make
a deterministic actor nearly as stable. Christodoulou (2019) carries the method over to discrete actions.

Example:
    import torch
    from dlatlas.rl.envs.points import BatchedMultiGoal
    from dlatlas.rl.kit.evaluate import evaluate
    from dlatlas.rl.sac import SAC

    agent = SAC(obs_dim=2, act_dim=2, low=-1.0, high=1.0, hidden=(64, 64), lr=3e-3, tau=0.02, batch_size=64, warmup=500)
    for steps in (1000, 6000):  # "Pendulum-v1" or any gymnasium environment with a Box of actions will do
        agent.fit(BatchedMultiGoal(16), steps, seed=steps)
        print(f"after {agent.transitions} steps: return {evaluate(agent, BatchedMultiGoal(50), 50, deterministic=False)['mean']:.1f}")
    print("four actions in one state:", *(f"({x:.1f}, {y:.1f})" for x, y in agent.act(torch.zeros(4, 2))))
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dlatlas.rl.kit.actor_critic import ActorCriticAgent
from dlatlas.rl.kit.nets import mlp

__all__ = ["SAC", "sac_actor_loss", "soft_q_target", "soft_value_target", "tanh_normal_log_prob"]

LOG_STD = (-20.0, 2.0)


def soft_value_target(q1: Tensor, q2: Tensor, logp: Tensor, alpha: float = 1.0) -> Tensor:
    r"""What the value network should say, $\min(Q_1, Q_2) - \alpha \log \pi$, without gradient.

    Args:
        q1: first critic at an action drawn from the present policy ``[batch]``.
        q2: second critic there ``[batch]``.
        logp: its log-density ``[batch]``.
        alpha: price of the entropy, not negative.

    Raises:
        ValueError: shapes that differ, an empty batch or a negative `alpha`.
    """
    _check(alpha, q1=q1, q2=q2, logp=logp)
    return (torch.minimum(q1, q2) - alpha * logp).detach()


def soft_q_target(rewards: Tensor, dones: Tensor, v_next: Tensor, gamma: float) -> Tensor:
    r"""What the critics should say, $r + \gamma (1 - \mathrm{done}) \bar V(s')$, without gradient.

    Args:
        rewards: rewards ``[batch]``.
        dones: 1 (or true) where the episode *terminated*; a time limit is none ``[batch]``.
        v_next: lagged value of the next state ``[batch]``.
        gamma: discount in [0, 1].

    Raises:
        ValueError: shapes that differ, an empty batch or `gamma` outside [0, 1].
    """
    _check(0.0, rewards=rewards, dones=dones, v_next=v_next)
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma must lie in [0, 1], got {gamma}")
    return (rewards + gamma * (1 - dones.to(rewards.dtype)) * v_next).detach()


def sac_actor_loss(logp: Tensor, q: Tensor, alpha: float = 1.0) -> Tensor:
    r"""Mean of $\alpha \log \pi(a|s) - Q(s, a)$ at reparameterised actions; both arguments carry gradient to the policy.

    Args:
        logp: log-densities ``[batch]``.
        q: critic at the same actions ``[batch]``.
        alpha: price of the entropy, not negative.

    Raises:
        ValueError: shapes that differ, an empty batch or a negative `alpha`.
    """
    _check(alpha, logp=logp, q=q)
    return (alpha * logp - q).mean()


def tanh_normal_log_prob(mean: Tensor, log_std: Tensor, u: Tensor) -> Tensor:
    r"""Log-density of $a = \tanh u$ where $u$ is Gaussian, summed over the action's dimensions.

    The correction is computed as $\log(1 - \tanh^2 u) = 2 (\log 2 - u - \mathrm{softplus}(-2u))$, which stays finite where $\tanh u$ rounds to 1.

    Args:
        mean: $\mu$ ``[batch, d]``.
        log_std: $\log \sigma$ ``[batch, d]``.
        u: the Gaussian's sample *before* the tanh ``[batch, d]``.

    Returns:
        ``[batch]``.

    Raises:
        ValueError: arguments that are not three equal shapes ``[batch, d]``.
    """
    if u.dim() != 2 or not u.numel() or mean.shape != u.shape or log_std.shape != u.shape:
        shapes = [tuple(t.shape) for t in (mean, log_std, u)]
        raise ValueError(f"mean, log_std and u must share a non-empty shape [batch, d], got {shapes}")
    normal = -0.5 * ((u - mean) * torch.exp(-log_std)).square() - log_std - 0.5 * math.log(2 * math.pi)  # [batch, d]
    squash = 2 * (math.log(2) - u - F.softplus(-2 * u))
    return (normal - squash).sum(-1)


class SAC(ActorCriticAgent):
    r"""The agent: a squashed Gaussian actor, two critics, a value network and its lagged copy.

    The actor's density is that of the unit action; an interval $[low, high]$ of another width would only shift all values by a constant.

    Args:
        obs_dim: width of flat observations.
        act_dim: number of action dimensions.
        low: lower bounds of the actions, a number or ``(act_dim,)``.
        high: upper bounds.
        reward_scale: factor on the rewards, the paper's way to set the temperature.
        alpha: price of the entropy; 1 in the paper. ``reward_scale=c, alpha=1`` and ``reward_scale=1, alpha=1/c`` have the same best policies.
        tau: Polyak rate of the lagged value network.
        lr: Adam's learning rate, the same for all networks.
        hidden: widths of the hidden layers.
        kwargs: those of :class:`dlatlas.rl.kit.actor_critic.ActorCriticAgent`.

    Raises:
        ValueError: a negative `alpha`, or ``n_step`` other than 1 (the entropies in between would be lost).
    """

    def __init__(
        self,
        obs_dim: int,
        act_dim: int,
        low: float | Sequence[float] | np.ndarray,
        high: float | Sequence[float] | np.ndarray,
        *,
        reward_scale: float = 1.0,
        alpha: float = 1.0,
        tau: float = 0.005,
        lr: float = 3e-4,
        hidden: Sequence[int] = (256, 256),
        **kwargs: Any,
    ):
        super().__init__(obs_dim, act_dim, low, high, reward_scale=reward_scale, tau=tau, lr=lr, hidden=hidden, **kwargs)
        if not alpha >= 0 or self.n_step != 1:
            raise ValueError(f"expected alpha >= 0 and n_step = 1, got {alpha} and {self.n_step}")
        self.temperature = alpha
        self.actor = self.actor_net(2 * act_dim)
        self.critic1, self.critic2 = self.critic_net(), self.critic_net()
        self.value = mlp((obs_dim, *hidden, 1), nn.ReLU).to(self.device)
        self.target_value = self.make_target(self.value)
        self.actor_optimizer = self.optimise(self.actor)
        self.critic_optimizer = self.optimise(self.critic1, self.critic2, self.value)

    def policy(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log standard deviation ``[batch, act_dim]`` of the action before the tanh."""
        mean, log_std = self.actor(obs).chunk(2, -1)
        return mean, log_std.clamp(*LOG_STD)

    @torch.no_grad()
    def act(self, obs: np.ndarray | Tensor, deterministic: bool = False) -> np.ndarray:
        """Actions ``[batch, act_dim]`` in the box: samples, or the squashed mean."""
        u, log_std = self.policy(self.tensor(obs))
        if not deterministic:
            u = u + log_std.exp() * torch.randn(u.shape, generator=self.generator).to(self.device)
        return self.scale(torch.tanh(u)).cpu().numpy()

    def update(self, batch: dict[str, Tensor]) -> dict[str, float]:
        """One step of Adam for value, critics and actor, all on the same batch and the same fresh action."""
        obs = batch["obs"]
        mean, log_std = self.policy(obs)
        u = mean + log_std.exp() * torch.randn(mean.shape, generator=self.generator).to(self.device)  # [batch, act_dim]
        logp = tanh_normal_log_prob(mean, log_std, u)
        fresh, taken = (torch.cat((obs, a), 1) for a in (torch.tanh(u), self.unscale(batch["actions"])))
        q1, q2 = self.critic1(fresh).squeeze(1), self.critic2(fresh).squeeze(1)
        actor_loss = sac_actor_loss(logp, torch.minimum(q1, q2), self.temperature)
        actor_grads = torch.autograd.grad(actor_loss, list(self.actor.parameters()))

        value_error = self.value(obs).squeeze(1) - soft_value_target(q1, q2, logp, self.temperature)
        # A discount is the probability of going on, so that one minus it plays the part of "done".
        with torch.no_grad():
            v_next = self.target_value(batch["next_obs"]).squeeze(1)
        target = soft_q_target(batch["returns"], 1 - batch["discounts"], v_next, 1.0)
        errors = [value_error, *(critic(taken).squeeze(1) - target for critic in (self.critic1, self.critic2))]
        critic_loss = sum(0.5 * e.square().mean() for e in errors)
        self.critic_optimizer.zero_grad()
        critic_loss.backward()
        self.critic_optimizer.step()
        for p, g in zip(self.actor.parameters(), actor_grads):
            p.grad = g
        self.actor_optimizer.step()
        self.track()
        return {"critic_loss": critic_loss.item(), "actor_loss": actor_loss.item(), "entropy": -logp.mean().item()}


def _check(alpha: float, **tensors: Tensor) -> None:
    shapes = {name: tuple(t.shape) for name, t in tensors.items()}
    if len(set(shapes.values())) != 1 or any(t.dim() != 1 or not t.numel() for t in tensors.values()):
        raise ValueError(f"expected vectors of one non-empty shape [batch], got {shapes}")
    if not alpha >= 0:
        raise ValueError(f"alpha must not be negative, got {alpha}")
