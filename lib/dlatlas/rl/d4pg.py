r"""D4PG: distributed distributional deterministic policy gradients (barthmaron2018distributed).

DDPG learns the mean return of a state and an action and moves its policy uphill on it. D4PG keeps the policy and changes the critic: it predicts the whole distribution of the return, as
probabilities of fixed atoms, and learns it from n steps of real rewards followed by the target critic's own distribution. The policy still climbs the mean.

Equations: with atoms $z_1 < \dots < z_K$, n-step reward sum $R$, discount $d = \gamma^n (1 - \mathrm{done})$, target networks $Z'$ and $\pi'$ and the projection $\Phi$ of a distribution onto the atoms,

$$ Y = R + d\, Z'\big(s_n, \pi'(s_n)\big), \qquad L(w) = \mathrm{mean}_i\; w_i\, \mathrm{CE}\big(\Phi Y_i,\, Z_w(s_i, a_i)\big), $$

$$ \nabla_\theta J = E\Big[\nabla_\theta \pi_\theta(s)\; \nabla_a E[Z_w(s, a)]\big|_{a = \pi_\theta(s)}\Big] . $$

Actors add noise $0.3\, N(0, 1)$ to actions in $[-1, 1]$; target networks are copies made every so many updates. With prioritised replay the priority of a transition is its cross-entropy and $w_i$ are
importance weights; without it $w_i = 1$.

Deviations from the paper:

1. Acting and learning alternate in one process unless `workers` is given; then the copies of the environment are actors, spread over so many processes, which deliver chunks of
   transitions and read the policy's parameters from shared memory. The learner takes a fixed number of updates for every step of all actors; the paper's runs freely.
2. Adam with 0.001 for both networks and batches of 256 by default; the paper has 0.0001 and layers of 400 and 300 units.
3. Priorities have exponents (`alpha`, `beta`) as in prioritised replay; the paper divides by the full probability.

Later work: the distribution itself stays useful where the loss is a cross-entropy: Farebrother et al. (2024) find that even plain values are learned better as a classification over atoms. Lyle et al. (2019) prove
that in tabular and linear settings learning distributions changes nothing that matters for control; what is gained comes with the network. For continuous control TD3 (Fujimoto et al., 2018) and SAC answer the same weakness of DDPG, its overestimated values, with
a minimum of two critics, and TQC (Kuznetsov et al., 2020) joins both: it drops the upper quantiles of a distributional critic.

Example:
    import torch
    from dlatlas.rl.d4pg import D4PG
    from dlatlas.rl.envs.control import BatchedPendulum

    atoms = torch.linspace(-1200, 0, 51)
    agent = D4PG(3, 1, -2.0, 2.0, atoms, hidden=(32, 32), batch_size=64, warmup=400)
    history = agent.fit(BatchedPendulum(8), steps=8 * 350)
    for update, loss in zip(history["update"], history["critic_loss"]):
        print(f"after {update} updates the cross-entropy is {loss:.2f}")
    hanging, upright = torch.tensor([[-1.0, 0, 0], [1.0, 0, 0]])
    for name, obs in (("hanging", hanging), ("upright", upright)):
        mean, spread = agent.return_moments(obs[None], torch.zeros(1, 1))
        print(f"{name}: predicted return {mean.item():.0f} +- {spread.item():.0f}")
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from dlatlas.rl.kit.actor_critic import DDPG
from dlatlas.rl.kit.actors import fit_from_actors, frozen_copy
from dlatlas.rl.kit.returns import categorical_projection
from dlatlas.rl.kit.rollout import Source

__all__ = ["D4PG", "d4pg_actor_loss", "d4pg_critic_loss"]

CLIPPED = 0.05  # share of a batch's target mass outside the atoms that is worth a warning


def d4pg_critic_loss(
    logits: Tensor, target_probs: Tensor, returns: Tensor, discounts: Tensor, support: Tensor, weights: Tensor | None = None
) -> Tensor:
    r"""Weighted mean cross-entropy between the projected target $\Phi(R + d Z')$ and the prediction; the target has no gradient.

    Args:
        logits: of the predicted distribution of $(s, a)$, ``(B, K)``.
        target_probs: the target critic's distribution at $(s_n, \pi'(s_n))$, ``(B, K)``.
        returns: n-step reward sums $R$, ``(B,)``.
        discounts: $\gamma^n (1 - \mathrm{done})$, ``(B,)``.
        support: the atoms, an increasing uniform grid ``(K,)``.
        weights: importance weights ``(B,)``, default all 1.

    Raises:
        ValueError: shapes that do not fit, an empty batch or a grid that is not uniform.
    """
    losses, _ = _losses(logits, target_probs, returns, discounts, support)
    if weights is None:
        return losses.mean()
    if weights.shape != losses.shape:
        raise ValueError(f"weights must be {tuple(losses.shape)}, got {tuple(weights.shape)}")
    return (weights.detach() * losses).mean()


def d4pg_actor_loss(
    actor: Callable[[Tensor], Tensor], critic_logits_fn: Callable[[Tensor, Tensor], Tensor], obs: Tensor, support: Tensor
) -> Tensor:
    r"""$-\mathrm{mean}_s\, E[Z(s, \pi(s))]$; its gradient is that of the deterministic policy gradient.

    Args:
        actor: ``obs (B, ...) -> actions (B, d)``.
        critic_logits_fn: ``(obs, actions) -> logits (B, K)``.
        obs: ``(B, ...)``.
        support: the atoms ``(K,)``.

    Raises:
        ValueError: an empty batch or logits that do not fit the support.
    """
    if not len(obs):
        raise ValueError("obs is empty")
    logits = critic_logits_fn(obs, actor(obs))
    if logits.shape != (len(obs), *support.shape):
        raise ValueError(f"critic_logits_fn must give {(len(obs), *support.shape)}, got {tuple(logits.shape)}")
    return -(logits.softmax(-1) @ support).mean()


class D4PG(DDPG):
    r"""A deterministic policy with a categorical critic over n-step returns.

    Args:
        obs_dim: width of flat observations.
        act_dim: number of action dimensions.
        low, high: bounds of the actions.
        support: atoms of the return, an increasing uniform grid ``(K,)``, in units of the rewards times `reward_scale`.
        n_step: real rewards before the bootstrap.
        prioritised: draw transitions by their cross-entropy.
        noise: standard deviation of the exploration noise, in units of half the box.
        target_period: updates between two copies into the targets; None for Polyak averaging with `tau`.
        workers: processes over which the actors (the `n_envs` of :meth:`fit`) are spread; 0 plays the very same transitions in this process, as long
            as the parameters are the same; None, the default, alternates steps of all copies with updates.
        chunk, refresh: with workers, steps of an actor between two deliveries and between two looks at the learner's parameters.
        kwargs: those of `DDPG`.

    Raises:
        ValueError: a support that is not an increasing uniform grid; a negative number of workers, or more workers than actors.

    `update` warns once if more than 5 per cent of a batch's target mass lies outside the atoms.
    """

    def __init__(
        self,
        obs_dim: int,
        act_dim: int,
        low,
        high,
        support: Tensor,
        n_step: int = 5,
        prioritised: bool = False,
        *,
        noise: float = 0.3,
        target_period: int | None = 100,
        workers: int | None = None,
        chunk: int = 50,
        refresh: int = 400,
        **kwargs,
    ):
        if (workers or 0) < 0 or chunk < 1 or refresh < 1:
            raise ValueError(f"workers must not be negative, chunk and refresh be positive, got {workers}, {chunk} and {refresh}")
        support = torch.as_tensor(support, dtype=torch.float32)
        categorical_projection(torch.zeros(1), torch.ones(1), support)  # raises what is wrong with the grid
        self._atoms = len(support)
        super().__init__(
            obs_dim, act_dim, low, high, noise=noise, n_step=n_step, prioritised=prioritised, target_period=target_period, **kwargs
        )
        self.support = support.to(self.device)
        self._warned = False
        self.workers, self.chunk, self.refresh = workers, chunk, refresh

    def fit(self, env: Source, steps: int, seed: int = 0, *, n_envs: int = 1, callback: Callable | None = None) -> dict[str, list]:
        """As in `ReplayAgent`. With `workers` the `n_envs` copies are actors, the callback comes after every delivery, and the history also has the
        "actor" of every episode and the number of processes "alive" at every delivery."""
        if self.workers is None:
            return super().fit(env, steps, seed, n_envs=n_envs, callback=callback)
        blind = math.ceil(max(0, self.warmup - self.transitions) / n_envs)
        policy = _NoisyActor(frozen_copy(self.actor), self.low, self.high, self.noise, blind)
        spread = dict(count=n_envs, workers=self.workers, chunk=self.chunk, refresh=self.refresh)
        return fit_from_actors(self, policy, self.actor, env, steps, seed, callback=callback, **spread)

    def critic_net(self, out: int | None = None) -> nn.Sequential:
        """A ReLU perceptron from observation and unit action to the logits of the atoms."""
        return super().critic_net(self._atoms if out is None else out)

    @torch.no_grad()
    def return_moments(self, obs: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation ``(B,)`` of the predicted return of actions ``(B, act_dim)`` of the box."""
        p = self._logits(self.critic, self.tensor(obs), self.unscale(self.tensor(actions))).softmax(-1)
        mean = p @ self.support
        return mean, (p @ self.support.square() - mean.square()).clamp_min(0).sqrt()

    def update(self, batch: dict[str, Tensor]) -> dict[str, float]:
        """One step of Adam for the critic and one for the actor; reports "critic_loss", "actor_loss", "clipped" (share of the target mass outside the atoms)."""
        with torch.no_grad():
            after = self._logits(self.target_critic, batch["next_obs"], torch.tanh(self.target_actor(batch["next_obs"])))
        logits = self._logits(self.critic, batch["obs"], self.unscale(batch["actions"]))
        losses, clipped = _losses(logits, after.softmax(-1), batch["returns"], batch["discounts"], self.support)
        loss = (batch["weights"] * losses).mean() if "weights" in batch else losses.mean()
        self.critic_optimizer.zero_grad()
        loss.backward()
        self.critic_optimizer.step()
        actor_loss = d4pg_actor_loss(
            lambda obs: torch.tanh(self.actor(obs)), lambda obs, unit: self._logits(self.critic, obs, unit), batch["obs"], self.support
        )
        parameters = list(self.actor.parameters())
        for p, g in zip(parameters, torch.autograd.grad(actor_loss, parameters)):
            p.grad = g
        self.actor_optimizer.step()
        self.track()
        if clipped > CLIPPED and not self._warned:
            self._warned = True
            low, high = self.support[0].item(), self.support[-1].item()
            warnings.warn(f"{clipped:.0%} of the target mass lies outside the atoms {low:g}..{high:g}: widen the support", stacklevel=2)
        report = {"critic_loss": loss.item(), "actor_loss": actor_loss.item(), "clipped": clipped}
        if "weights" in batch:
            report["priorities"] = losses.detach()
        return report

    @staticmethod
    def _logits(critic: nn.Module, obs: Tensor, unit: Tensor) -> Tensor:
        return critic(torch.cat((obs, unit), 1))  # (B, K)


class _NoisyActor:
    """The policy of an actor: the learner's, with Gaussian noise; uniform in the box in the first `blind` steps."""

    def __init__(self, network: nn.Module, low: np.ndarray, high: np.ndarray, noise: float, blind: int):
        self.network, self.low, self.high, self.noise, self.blind = network, low, high, noise, blind

    def draw(self, rng: np.random.Generator, steps: int) -> np.ndarray:
        return np.concatenate([rng.standard_normal((steps, len(self.low))), rng.uniform(self.low, self.high, (steps, len(self.low)))], 1)

    def act(self, obs: np.ndarray, draws: np.ndarray, names: Sequence[int], step: int) -> np.ndarray:
        normal, uniform = np.split(draws, 2, 1)
        if step < self.blind:
            return uniform.astype(np.float32)
        unit = torch.tanh(self.network(torch.as_tensor(obs, dtype=torch.float32))).numpy()
        unit = np.clip(unit + self.noise * normal, -1, 1)
        return ((self.high + self.low) / 2 + (self.high - self.low) / 2 * unit).astype(np.float32)

    def priorities(self, rows: dict[str, Tensor]) -> None:
        return None  # the largest so far, as everywhere


def _losses(logits: Tensor, target_probs: Tensor, returns: Tensor, discounts: Tensor, support: Tensor) -> tuple[Tensor, float]:
    """Cross-entropies ``(B,)`` and the share of the target mass that lay outside the support."""
    if logits.dim() != 2 or logits.numel() == 0 or logits.shape != target_probs.shape or logits.shape[1:] != support.shape:
        shapes = [tuple(x.shape) for x in (logits, target_probs, support)]
        raise ValueError(f"logits and target_probs must both be (B, K) and support (K,), got {shapes}")
    for name, x in (("returns", returns), ("discounts", discounts)):
        if x.shape != logits.shape[:1]:
            raise ValueError(f"{name} must be {tuple(logits.shape[:1])}, got {tuple(x.shape)}")
    with torch.no_grad():
        atoms = returns[:, None] + discounts[:, None] * support  # (B, K)
        target = categorical_projection(atoms, target_probs, support)
        edge = 1e-3 * (support[1] - support[0])  # an atom on the border may round to just outside
        outside = (target_probs * ((atoms < support[0] - edge) | (atoms > support[-1] + edge))).sum() / len(atoms)
    return -(target * logits.log_softmax(-1)).sum(-1), float(outside)
