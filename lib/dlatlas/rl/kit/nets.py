"""Networks and distributions of agents: policies, actor-critics, the squashed Gaussian and a convolutional trunk."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution, Independent, Normal, constraints
from torch.nn.functional import softplus

from dlatlas.kit import nets

__all__ = [
    "ActorCritic",
    "CategoricalPolicy",
    "ConvTrunk",
    "GaussianPolicy",
    "NatureNet",
    "SquashedGaussian",
    "draw",
    "mlp",
    "mode",
    "orthogonal_",
]

Activation = str | type[nn.Module] | Callable[[Tensor], Tensor]
LOG_STD = (-20.0, 2.0)


def mlp(sizes: Sequence[int], act: Activation = nn.Tanh, layer_norm: bool = False, out_scale: float = 1.0) -> nn.Sequential:
    """The library's multilayer perceptron ``(B, sizes[0]) -> (B, sizes[-1])`` with its output layer scaled.

    Args:
        sizes: widths of input, hidden layers and output.
        act: activation after every hidden layer.
        layer_norm: normalise every hidden layer before its activation.
        out_scale: factor on the initial output layer, weights and bias; 0 makes the network start at zero everywhere.
    """
    net = nets.mlp(sizes, act, norm="layer" if layer_norm else None)
    if out_scale != 1.0:
        with torch.no_grad():
            net[-1].weight.mul_(out_scale)
            net[-1].bias.mul_(out_scale)
    return net


@torch.no_grad()
def orthogonal_(module: nn.Module, gain: float = math.sqrt(2)) -> nn.Module:
    """Orthogonal weights of the given gain and zero biases for every linear and convolutional layer of `module`, in place."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
            nn.init.orthogonal_(layer.weight, gain)
            if layer.bias is not None:
                layer.bias.zero_()
    return module


class SquashedGaussian(Distribution):
    r"""The law of $a = \tanh(u)$, $u \sim N(\text{mean}, \text{std}^2)$, independent over the last axis.

    $$\log p(a) = \log N(u; \text{mean}, \text{std}) - \sum_i \log(1 - \tanh^2 u_i), \qquad \log(1-\tanh^2 u) = 2(\log 2 - u - \text{softplus}(-2u)).$$

    Args:
        mean: ``(..., d)``.
        log_std: broadcastable to `mean`; clamped to [-20, 2].
    """

    arg_constraints = {}  # noqa: RUF012 - the base class's own form
    support = constraints.independent(constraints.interval(-1.0, 1.0), 1)
    has_rsample = True

    def __init__(self, mean: Tensor, log_std: Tensor):
        self.loc, log_std = torch.broadcast_tensors(mean, log_std)
        self.log_std = log_std.clamp(*LOG_STD)
        super().__init__(self.loc.shape[:-1], self.loc.shape[-1:], validate_args=False)

    @property
    def scale(self) -> Tensor:
        return self.log_std.exp()

    @property
    def mode(self) -> Tensor:
        """The squashed mean: where a deterministic policy acts."""
        return torch.tanh(self.loc)

    def rsample(self, sample_shape: Sequence[int] = (), generator: torch.Generator | None = None) -> Tensor:
        """A reparameterised sample ``(*sample_shape, ..., d)`` in (-1, 1)."""
        return torch.tanh(self._u(sample_shape, generator))

    def rsample_with_log_prob(self, sample_shape: Sequence[int] = (), generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """A sample and its log-density, without the detour over the inverse of tanh."""
        u = self._u(sample_shape, generator)
        return torch.tanh(u), self._log_prob_u(u)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density ``(...)`` of actions ``(..., d)``; the inverse of tanh is taken at no more than $1 - 10^{-6}$."""
        return self._log_prob_u(torch.atanh(value.clamp(-1 + 1e-6, 1 - 1e-6)))

    def _u(self, sample_shape: Sequence[int], generator: torch.Generator | None) -> Tensor:
        return self.loc + self.scale * _noise((*sample_shape, *self.loc.shape), self.loc, generator)

    def _log_prob_u(self, u: Tensor) -> Tensor:
        gauss = -0.5 * ((u - self.loc) / self.scale) ** 2 - self.log_std - 0.5 * math.log(2 * math.pi)
        return (gauss - 2 * (math.log(2) - u - softplus(-2 * u))).sum(-1)


def draw(dist: Distribution, generator: torch.Generator | None = None) -> Tensor:
    """A sample without gradient; unlike ``dist.sample()`` it can take its randomness from a generator."""
    with torch.no_grad():
        if isinstance(dist, SquashedGaussian):
            return dist.rsample(generator=generator)
        if isinstance(dist, Categorical):
            flat = dist.probs.reshape(-1, dist.probs.shape[-1])
            where = flat.device if generator is None else generator.device
            return torch.multinomial(flat.to(where), 1, generator=generator).reshape(dist.batch_shape).to(flat.device)
        normal = dist.base_dist if isinstance(dist, Independent) else dist
        if isinstance(normal, Normal):
            return normal.loc + normal.scale * _noise(normal.loc.shape, normal.loc, generator)
        if generator is None:
            return dist.sample()
    raise ValueError(f"cannot draw from {type(dist).__name__} with a generator; expected Categorical, Normal or SquashedGaussian")


def mode(dist: Distribution) -> Tensor:
    """The most probable action: the largest probability, the mean of a Gaussian or its squashed mean."""
    return dist.probs.argmax(-1) if isinstance(dist, Categorical) else dist.mode


class Policy(nn.Module):
    """A network whose forward gives a distribution over actions, or a pair of one and the values ``(B,)``."""

    def distribution(self, obs: Tensor) -> Distribution:
        """The distribution over actions at `obs` ``(B, ...)``."""
        out = self(obs)
        return out[0] if isinstance(out, tuple) else out

    @torch.no_grad()
    def act(self, obs: np.ndarray | Tensor, deterministic: bool = False, generator: torch.Generator | None = None) -> np.ndarray:
        """Actions ``(B, ...)`` for observations ``(B, ...)``: samples, or the most probable ones."""
        like = next(self.parameters())
        dist = self.distribution(torch.as_tensor(obs, dtype=like.dtype, device=like.device))
        return (mode(dist) if deterministic else draw(dist, generator)).cpu().numpy()


class CategoricalPolicy(Policy):
    """A policy over `n_actions` discrete actions: ``forward(obs (B, obs_dim)) -> Categorical``."""

    def __init__(
        self, obs_dim: int, n_actions: int, *, hidden: Sequence[int] = (64, 64), act: Activation = nn.Tanh, out_scale: float = 0.01
    ):
        super().__init__()
        self.net = _actor(obs_dim, n_actions, hidden, act, out_scale)

    def forward(self, obs: Tensor) -> Categorical:
        return Categorical(logits=self.net(obs), validate_args=False)


class GaussianPolicy(Policy):
    """A diagonal Gaussian policy with a standard deviation that does not depend on the state: ``forward(obs (B, obs_dim)) -> Independent(Normal)``."""

    def __init__(
        self,
        obs_dim: int,
        act_dim: int,
        *,
        hidden: Sequence[int] = (64, 64),
        act: Activation = nn.Tanh,
        log_std: float = 0.0,
        out_scale: float = 0.01,
    ):
        super().__init__()
        self.net = _actor(obs_dim, act_dim, hidden, act, out_scale)
        self.log_std = nn.Parameter(torch.full((act_dim,), float(log_std)))

    def forward(self, obs: Tensor) -> Independent:
        mean = self.net(obs)  # (B, act_dim)
        std = self.log_std.clamp(*LOG_STD).exp().expand_as(mean)
        return Independent(Normal(mean, std, validate_args=False), 1, validate_args=False)


class ActorCritic(Policy):
    """A policy and a value network side by side: ``forward(obs (B, obs_dim)) -> (distribution, values (B,))``.

    Give either `n_actions` (discrete) or `act_dim` (continuous).
    """

    def __init__(
        self,
        obs_dim: int,
        n_actions: int | None = None,
        act_dim: int | None = None,
        *,
        hidden: Sequence[int] = (64, 64),
        act: Activation = nn.Tanh,
        log_std: float = 0.0,
    ):
        super().__init__()
        if (n_actions is None) == (act_dim is None):
            raise ValueError(f"give either n_actions or act_dim, got n_actions={n_actions} and act_dim={act_dim}")
        self.actor = (
            GaussianPolicy(obs_dim, act_dim, hidden=hidden, act=act, log_std=log_std)
            if n_actions is None
            else CategoricalPolicy(obs_dim, n_actions, hidden=hidden, act=act)
        )
        self.critic = _actor(obs_dim, 1, hidden, act, 1.0)

    def forward(self, obs: Tensor) -> tuple[Distribution, Tensor]:
        return self.actor(obs), self.value(obs)

    def distribution(self, obs: Tensor) -> Distribution:
        return self.actor(obs)

    def value(self, obs: Tensor) -> Tensor:
        """Values ``(B,)``."""
        return self.critic(obs).squeeze(-1)


class ConvTrunk(nn.Module):
    """Two 3x3 convolutions (16 and 32 channels) and one hidden layer: ``(B, c, h, w) -> (B, out)``, all with ReLU."""

    def __init__(self, c: int, h: int, w: int, out: int):
        super().__init__()
        if min(c, h, w, out) < 1:
            raise ValueError(f"c, h, w and out must be positive, got {c}, {h}, {w}, {out}")
        self.net = nn.Sequential(
            nn.Conv2d(c, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32 * h * w, out),
            nn.ReLU(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class NatureNet(nn.Module):
    """The convolutional network of the deep Q-network (Mnih et al., 2015): stacked frames of bytes ``(B, frames, 84, 84)`` to values ``(B, n_actions)``.

    With `dueling` the value of the state and the advantages of the actions have heads of their own (Wang et al., 2016), $Q = V + A - \\bar A$.
    """

    def __init__(self, n_actions: int, frames: int = 4, dueling: bool = True):
        super().__init__()
        if min(n_actions, frames) < 1:
            raise ValueError(f"n_actions and frames must be positive, got {n_actions} and {frames}")
        convolutions = [(frames, 32, 8, 4), (32, 64, 4, 2), (64, 64, 3, 1)]
        self.trunk = nn.Sequential(*(layer for c in convolutions for layer in (nn.Conv2d(*c), nn.ReLU())), nn.Flatten())
        self.advantage = nn.Sequential(nn.Linear(64 * 7 * 7, 512), nn.ReLU(), nn.Linear(512, n_actions))
        self.value = nn.Sequential(nn.Linear(64 * 7 * 7, 512), nn.ReLU(), nn.Linear(512, 1)) if dueling else None

    def forward(self, frames: Tensor) -> Tensor:
        z = self.trunk(frames / 255)  # [B, 3136]
        a = self.advantage(z)
        return a if self.value is None else self.value(z) + a - a.mean(1, keepdim=True)


def _noise(shape: Sequence[int], like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard normal numbers like a tensor, drawn where the generator lives: agents keep theirs with the processor."""
    where = like.device if generator is None else generator.device
    return torch.randn(tuple(shape), generator=generator, dtype=like.dtype, device=where).to(like.device)


def _actor(obs_dim: int, out: int, hidden: Sequence[int], act: Activation, out_scale: float) -> nn.Sequential:
    net = orthogonal_(mlp((obs_dim, *hidden, out), act))
    orthogonal_(net[-1], out_scale)
    return net
