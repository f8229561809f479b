r"""Adaptive parameter noise (plappert2018parameter).

An epsilon-greedy agent decides anew at every step whether to be random, so it shivers about its policy and never carries a deviation
through. Noise on the *weights* of the policy, drawn once an episode, gives another policy that is consistent: in the same state it does
the same thing. How much noise that is in terms of behaviour depends on the network and changes while it learns, so its size is steered by
what it does to the actions.

Equations: at the start of an episode

$$ \tilde\theta = \theta + \mathcal N(0, \sigma^2 I) , $$

and now and then, with the distance $d$ between the actions of $\theta$ and of a perturbed copy on a batch of replayed states,

$$ \sigma \leftarrow \begin{cases} \sigma\, c & d \le \delta \\ \sigma / c & d > \delta . \end{cases} $$

For continuous actions $d = \sqrt{\mathrm{mean}\,(\pi(s) - \tilde\pi(s))^2}$ and $\delta$ is the standard deviation of the action noise
that it replaces. For values, with $\pi = \mathrm{softmax}(Q)$, $d$ is the mean of $D_{KL}(\pi \,\|\, \tilde\pi)$ and $\delta = -\log(1 -
\epsilon + \epsilon / |A|)$, which is that of a greedy and an epsilon-greedy policy. The softmax has no temperature: the same $\delta$
allows less noise when rewards are ten times larger.

Deviations from the paper:

1. No second head that imitates the greedy policy: the paper adds it to DQN on Atari; here the noise goes into the Q-network itself.
2. Copies of the environment that run in parallel have a perturbation each.

Later work: Noisy networks (Fortunato et al., 2018, the same year) learn the size of the noise by gradient descent. Hollenstein et al.
(2022) find for continuous control that the type and scale of the action noise matter and that the best choice depends on the task. Randomised
value functions (Osband et al., 2019) give the deep exploration on chains a theory: noise that stands for uncertainty.

Example:
    import torch
    from torch import nn
    from dlatlas.rl.parameter_noise import ParameterNoise, action_distance

    policy = nn.Sequential(nn.Linear(3, 64), nn.LayerNorm(64), nn.ReLU(), nn.Linear(64, 1), nn.Tanh())
    noise = ParameterNoise(policy, sigma=0.5, delta=0.2, factor=1.05)  # delta: how different the actions may be
    states = torch.randn(256, 3)
    for episode in range(91):
        explorer = noise.perturb()  # one copy for a whole episode
        with torch.no_grad():
            distance = action_distance(policy(states), explorer(states))
        if episode % 30 == 0:
            print(f"episode {episode}: sigma {noise.sigma:.3f}, actions differ by {distance:.3f}")
        noise.adapt(distance)
"""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dlatlas.rl.kit.value_agent import DQN

__all__ = ["DQNParamNoise", "ParameterNoise", "action_distance", "policy_kl"]

_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)


class ParameterNoise:
    r"""Perturbed copies of a policy, $\tilde\theta = \theta + \mathcal N(0, \sigma^2 I)$, with a $\sigma$ that follows a distance.

    Args:
        policy: any module; it is never changed.
        sigma: standard deviation to start with.
        delta: the distance between the policy and its copy that is aimed at.
        factor: $c$, by which `sigma` grows or shrinks.

    Raises:
        ValueError: `sigma` or `delta` not positive or `factor` not above 1.
    """

    def __init__(self, policy: nn.Module, sigma: float = 0.1, delta: float = 0.1, factor: float = 1.01):
        if not (0 < sigma < math.inf and delta > 0 and 1 < factor < math.inf):
            raise ValueError(f"sigma and delta must be positive and factor above 1, got {sigma}, {delta} and {factor}")
        self.policy, self.sigma, self.delta, self.factor = policy, float(sigma), float(delta), float(factor)

    @torch.no_grad()
    def perturb(self, generator: torch.Generator | None = None) -> nn.Module:
        """A deep copy with noise on every parameter but those of normalisation layers, which set the scale of the rest."""
        noisy = copy.deepcopy(self.policy)
        calm = _norm_parameters(noisy)
        for name, p in noisy.named_parameters():
            if name not in calm:
                p.add_(_normal(p, p.shape, generator), alpha=self.sigma)
        return noisy

    def adapt(self, distance: float) -> float:
        """More noise if the distance is at most `delta`, less if it is above; returns the new `sigma`."""
        if not distance >= 0:
            raise ValueError(f"distance must be a number that is not negative, got {distance}")
        self.sigma *= self.factor if distance <= self.delta else 1 / self.factor
        return self.sigma


def action_distance(a: Tensor, b: Tensor) -> float:
    r"""Root mean square difference of two batches of actions, $\sqrt{\mathrm{mean}\,(a - b)^2}$.

    Args:
        a, b: actions ``[B, dim]``.

    Raises:
        ValueError: shapes that differ or nothing in them.
    """
    if a.shape != b.shape or a.numel() == 0:
        raise ValueError(f"a and b must be actions of one shape [B, dim], got {tuple(a.shape)} and {tuple(b.shape)}")
    return float((a - b).detach().square().mean().sqrt())


def policy_kl(q: Tensor, q_noisy: Tensor) -> float:
    r"""Mean of $D_{KL}(\mathrm{softmax}\,q \,\|\, \mathrm{softmax}\,\tilde q)$ over the batch.

    Args:
        q, q_noisy: action values ``[B, A]`` of the policy and of its perturbed copy.

    Raises:
        ValueError: shapes that differ or are not ``[B, A]``.
    """
    if q.dim() != 2 or q.shape != q_noisy.shape or q.numel() == 0:
        raise ValueError(f"q and q_noisy must both be [B, A], got {tuple(q.shape)} and {tuple(q_noisy.shape)}")
    log_p, log_r = q.detach().log_softmax(1), q_noisy.detach().log_softmax(1)
    # Rounding can leave a tiny negative number where the two agree.
    return max(0.0, float((log_p.exp() * (log_p - log_r)).sum(1).mean()))


def _norm_parameters(module: nn.Module) -> set[str]:
    """Names of the parameters of normalisation layers."""
    return {
        f"{at}.{name}".lstrip(".")
        for at, layer in module.named_modules()
        if isinstance(layer, _NORMS)
        for name, _ in layer.named_parameters()
    }


def _normal(like: Tensor, shape: torch.Size | tuple[int, ...], generator: torch.Generator | None) -> Tensor:
    device = generator.device if generator is not None else like.device
    return torch.randn(shape, generator=generator, device=device, dtype=like.dtype).to(like.device)


class DQNParamNoise(DQN):
    r"""DQN that explores with one perturbed network an episode and takes no random actions.

    The target of the adaptation is the divergence of an epsilon-greedy policy, $\delta = -\log(1 - \epsilon + \epsilon/|A|)$, with the
    schedule `epsilon` of `DQN`.

    Args:
        obs_dim, n_actions: as in `DQN`.
        sigma, factor: of :class:`ParameterNoise`.
        adapt_every: updates between two adaptations.
        layer_norm: normalise hidden layers, so that noise means the same in every layer.
        epsilon: (start, end, transitions of the linear decay) of the equivalent rate; it must stay positive.
        kwargs: those of `DQN`.

    Raises:
        ValueError: see `ParameterNoise`; a rate that reaches 0, or `adapt_every` below 1.
    """

    def __init__(
        self,
        obs_dim: int,
        n_actions: int,
        *,
        sigma: float = 0.1,
        factor: float = 1.01,
        adapt_every: int = 5,
        layer_norm: bool = True,
        epsilon: tuple[float, float, int] = (0.1, 0.1, 0),
        **kwargs: Any,
    ):
        super().__init__(obs_dim, n_actions, layer_norm=layer_norm, epsilon=epsilon, **kwargs)
        if min(epsilon[:2]) <= 0 or adapt_every < 1:
            raise ValueError(f"the rates of epsilon must be positive and adapt_every at least 1, got {epsilon} and {adapt_every}")
        self.noise, self.adapt_every = ParameterNoise(self.online, sigma, self.delta, factor), adapt_every
        self._noisy: list[nn.Module] = []  # one perturbed network for every copy of the environment

    @property
    def delta(self) -> float:
        """The divergence aimed at: that of the equivalent epsilon-greedy policy."""
        return -math.log(1 - self.epsilon + self.epsilon / self.n_actions)

    def begin_episodes(self, mask: np.ndarray) -> None:
        """New perturbations for the copies that begin an episode."""
        if len(self._noisy) != len(mask):
            self._noisy = [self.noise.perturb(self.generator) for _ in mask]
            return
        for i in np.flatnonzero(mask):
            self._noisy[i] = self.noise.perturb(self.generator)

    @torch.no_grad()
    def act(self, obs: np.ndarray | Tensor, deterministic: bool = False) -> np.ndarray:
        """The best actions ``(B,)``: of the network itself, or of the perturbed network of every copy.

        Observations that are not one for each copy of the latest `begin_episodes` get a perturbed network each for this call alone.
        """
        obs = self.tensor(obs)
        if deterministic:
            return self.online(obs).argmax(1).cpu().numpy()
        nets = self._noisy if len(self._noisy) == len(obs) else [self.noise.perturb(self.generator) for _ in obs]
        return torch.cat([net(row[None]) for net, row in zip(nets, obs)]).argmax(1).cpu().numpy()

    def update(self, batch: dict[str, Tensor]) -> dict[str, float]:
        """A step of Q-learning, and at every `adapt_every`-th a step of sigma; reports "loss" and "sigma"."""
        report = super().update(batch)
        if self.updates % self.adapt_every == 0:
            with torch.no_grad():
                distance = policy_kl(self.online(batch["obs"]), self.noise.perturb(self.generator)(batch["obs"]))
            self.noise.delta = self.delta
            self.noise.adapt(distance)
        return report | {"sigma": self.noise.sigma}
