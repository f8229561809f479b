r"""Trust-PCL, a trust region learned off-policy (nachum2018trust).

A trust-region method rewards a policy for staying near its own past. If nearness is a relative entropy inside the reward, the optimal policy
and the optimal value satisfy one equation along *every* path, whoever walked it: the value lost between the ends of the path is the reward
collected minus the price of the log-ratios. So the equation can be fitted to old paths from a replay buffer, without importance weights, and
the size of the step is set by the price $\lambda$ of the relative entropy.

Equations: the objective is $\mathbb{E} \sum_t \gamma^t [r_t - \tau \log \pi - \lambda (\log \pi - \log \tilde\pi)]$ with a lagged copy $\tilde\pi$ of the policy. The
consistency error of a path of $d$ steps is

$$ C = -V(s_0) + \gamma^d V(s_d) + \sum_{i=0}^{d-1} \gamma^i \bigl[ r_i - (\tau + \lambda) \log \pi(a_i|s_i) + \lambda \log \tilde\pi(a_i|s_i) \bigr] , $$

and the loss is the mean of $\tfrac12 C^2$ over replayed paths. After a terminal state $V = 0$. With episode returns $R_1, \dots, R_N$ and weights
$w_n \propto e^{R_n / \lambda}$, the price is the solution of

$$ \mathrm{KL}(w \,\|\, \text{uniform}) = \sum_n w_n \log (N w_n) = \epsilon , $$

where $\epsilon$ is a divergence a step times the mean length of an episode.

Deviations from the paper:

1. The policy is a Gaussian squashed by a tanh, so that actions stay in their box. The log-probability of a replayed action needs the inverse of
   the tanh: it is exact up to rounding for $|u|$ below about 5; beyond $1 - 10^{-6}$ (an action at the edge of the box, $|u| > 7.25$) the inverse is
   taken at that point, for policy and prior alike.
2. Paths are drawn uniformly from the memory; the paper prefers recent episodes.
3. The value network has its own learning rate. The clip of the policy's gradient is ours.
4. The returns that set the price are mean rewards times the discounted length of an episode, because a discount may look ahead much less far
   than an episode lasts; the price stays within given bounds.

In an environment with random transitions the equation holds on average over next states only, and squaring it for single paths leaves a bias.

Later work: Haarnoja et al. (2017, 2018) reach the entropy-regularised optimum through one-step soft Bellman errors with lagged targets, easier to tune
than squared errors of whole paths. Dai et al. (2018, SBEED) remove the bias of random transitions by a dual function. MPO (Abdolmaleki et al.,
2018) chooses the price of the divergence by a dual step on the critic's values instead of past returns.

Example:
    import torch
    from dlatlas.rl.trust_pcl import lambda_for_kl, trust_pcl_loss

    # One state, three actions with rewards 0, 1, 2; paths of two steps that a uniform policy walked.
    rewards, prior = torch.tensor([0.0, 1.0, 2.0]), torch.full((3,), 1 / 3).log()
    actions = torch.randint(3, (2, 500))
    logits, value = torch.zeros(3, requires_grad=True), torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.Adam([logits, value], lr=0.05)
    for step in range(600):
        logp = logits.log_softmax(0)[actions]  # [steps of a path, paths]
        loss = trust_pcl_loss(value.expand(500), value.expand(500), rewards[actions], logp, prior[actions], gamma=0.9, tau=0.1, lam=0.9)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print("learned", [round(p, 3) for p in logits.softmax(0).tolist()])
    print("exact  ", [round(p, 3) for p in ((rewards + 0.9 * prior) / 1.0).softmax(0).tolist()])
    print("price for a divergence of 0.1 on these returns:", round(lambda_for_kl(torch.tensor([1.0, 2.0, 5.0, 9.0]), 0.1), 2))
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from scipy.optimize import brentq
from scipy.special import logsumexp
from torch import Tensor, nn

from dlatlas.rl.kit.actor_critic import ActorCriticAgent
from dlatlas.rl.kit.agent import ReplayAgent
from dlatlas.rl.kit.nets import GaussianPolicy, SquashedGaussian, mlp
from dlatlas.rl.kit.rollout import Source

__all__ = ["TrustPCL", "lambda_for_kl", "path_consistency", "trust_pcl_loss"]


def path_consistency(
    v_first: Tensor, v_last: Tensor, rewards: Tensor, logp: Tensor, logp_prior: Tensor, gamma: float, tau: float, lam: float
) -> Tensor:
    r"""The error $C$ by which paths of $d$ steps miss the consistency of the optimal value and policy.

    $C = -V_0 + \gamma^d V_d + \sum_i \gamma^i [r_i - (\tau + \lambda) \log \pi_i + \lambda \log \tilde\pi_i]$.

    Args:
        v_first: value of the first state ``[batch]``.
        v_last: value of the state after the last step ``[batch]``, 0 where it is terminal.
        rewards: rewards ``[d, batch]``.
        logp: log-probabilities of the actions under the policy ``[d, batch]``.
        logp_prior: the same under the lagged policy ``[d, batch]``.
        gamma: discount in [0, 1].
        tau: price of the entropy, not negative.
        lam: price of the relative entropy, not negative.

    Raises:
        ValueError: shapes that do not fit, an empty batch, `gamma` outside [0, 1], or a negative price.
    """
    if rewards.dim() != 2 or not rewards.numel() or logp.shape != rewards.shape or logp_prior.shape != rewards.shape:
        shapes = [tuple(t.shape) for t in (rewards, logp, logp_prior)]
        raise ValueError(f"rewards, logp and logp_prior must share a non-empty shape [d, batch], got {shapes}")
    if v_first.shape != rewards.shape[1:] or v_last.shape != rewards.shape[1:]:
        shapes = [tuple(t.shape) for t in (v_first, v_last)]
        raise ValueError(f"v_first and v_last must have shape {tuple(rewards.shape[1:])}, got {shapes}")
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma must lie in [0, 1], got {gamma}")
    if not (tau >= 0 and lam >= 0):
        raise ValueError(f"tau and lam must not be negative, got {tau} and {lam}")
    d = len(rewards)
    discount = gamma ** torch.arange(d, dtype=rewards.dtype, device=rewards.device)  # [d]
    soft = rewards - (tau + lam) * logp + lam * logp_prior  # [d, batch]
    return discount @ soft + gamma**d * v_last - v_first


def trust_pcl_loss(
    v_first: Tensor, v_last: Tensor, rewards: Tensor, logp: Tensor, logp_prior: Tensor, gamma: float, tau: float, lam: float
) -> Tensor:
    r"""Mean of $\tfrac12 C^2$; gradients flow to the policy and to the values at *both* ends, the lagged policy gets none.

    Args:
        v_first: as in :func:`path_consistency`, like all that follow.
        v_last: see there.
        rewards: see there.
        logp: see there.
        logp_prior: see there; detached.
        gamma: see there.
        tau: see there.
        lam: see there.
    """
    return path_consistency(v_first, v_last, rewards, logp, logp_prior.detach(), gamma, tau, lam).square().mean() / 2


def lambda_for_kl(returns: Tensor | np.ndarray, epsilon: float, lo: float = 1e-6, hi: float = 1e6) -> float:
    r"""The price at which reweighting episodes by $w_n \propto e^{R_n/\lambda}$ costs a divergence of $\epsilon$ from uniform weights.

    The divergence falls as $\lambda$ grows and cannot exceed $\log N$ (fewer where the best return is shared), so that `lo` is the answer to
    a divergence out of reach, and `hi` to one below that of `hi`.

    Args:
        returns: episode returns ``[n]``.
        epsilon: divergence, not negative.
        lo: smallest price.
        hi: largest price.

    Raises:
        ValueError: no returns, returns that are not finite, a negative `epsilon`, or not ``0 < lo < hi``.
    """
    r = np.asarray(returns, dtype=np.float64)
    if r.ndim != 1 or not r.size or not np.isfinite(r).all():
        raise ValueError(f"returns must be a non-empty vector of finite numbers, got shape {r.shape}")
    if not epsilon >= 0 or not 0 < lo < hi:
        raise ValueError(f"expected epsilon >= 0 and 0 < lo < hi, got {epsilon}, {lo} and {hi}")

    def excess(log_lam: float) -> float:
        log_w = r / math.exp(log_lam)
        log_w = log_w - logsumexp(log_w)
        return float(np.exp(log_w) @ (log_w + math.log(r.size))) - epsilon

    low, high = math.log(lo), math.log(hi)
    if excess(low) <= 0:
        return float(lo)
    if excess(high) >= 0:
        return float(hi)
    return math.exp(brentq(excess, low, high, xtol=1e-10))


class TrustPCL(ActorCriticAgent):
    r"""The agent: a squashed Gaussian policy, a value network, and a lagged copy of the policy as the prior.

    Paths are read from the ordinary memory: two of its rows follow each other where the next observation of one is the observation of the other.
    A path ends early at the end of an episode; then the value stands in for what would have followed, or zero after a terminal state.

    Args:
        obs_dim: width of flat observations.
        act_dim: number of action dimensions.
        low: lower bounds of the actions, a number or ``(act_dim,)``.
        high: upper bounds.
        d: length of the paths.
        tau: price of the entropy.
        epsilon: divergence a step that sets the price of the relative entropy after every episode; None keeps `lam`.
        lam: that price at the start.
        lam_bounds: smallest and largest price that `epsilon` may choose.
        window: number of last episodes whose returns choose the price.
        lag: Polyak factor of the prior.
        log_std: initial log standard deviation of the action before the tanh, one parameter a dimension for all states.
        value_lr: learning rate of the value network, default `lr`. A value that lags behind the rewards makes every action look bad, and the
            policy leaves them all.
        max_grad_norm: clip of the norm of the policy's gradient.
        batch_size: paths a batch.
        kwargs: those of :class:`dlatlas.rl.kit.actor_critic.ActorCriticAgent`.

    Raises:
        ValueError: a number out of range.
    """

    def __init__(
        self,
        obs_dim: int,
        act_dim: int,
        low: float | Sequence[float] | np.ndarray = -1.0,
        high: float | Sequence[float] | np.ndarray = 1.0,
        *,
        d: int = 10,
        tau: float = 0.0,
        epsilon: float | None = 0.01,
        lam: float = 1.0,
        lam_bounds: tuple[float, float] = (1e-2, 1e3),
        window: int = 100,
        lag: float = 0.99,
        log_std: float = -0.5,
        value_lr: float | None = None,
        max_grad_norm: float = 10.0,
        batch_size: int = 64,
        **kwargs: Any,
    ):
        if kwargs.get("n_step", 1) != 1 or kwargs.get("prioritised"):
            raise ValueError("paths are made of single, uniformly drawn transitions: n_step must be 1 and prioritised False")
        super().__init__(obs_dim, act_dim, low, high, batch_size=batch_size, tau=1 - lag, **kwargs)
        if d < 1 or window < 1 or not (tau >= 0 and lam >= 0 and (epsilon is None or epsilon >= 0) and self.gamma > 0 and 0 <= lag <= 1):
            raise ValueError(
                f"expected d, window >= 1, tau, lam, epsilon >= 0, gamma > 0 and lag in [0, 1], "
                f"got {d}, {window}, {tau}, {lam}, {epsilon}, {self.gamma} and {lag}"
            )
        self.d, self.entropy_price, self.epsilon, self.lam, self.lam_bounds = d, tau, epsilon, lam, lam_bounds
        self.max_grad_norm, self.copies = max_grad_norm, 1
        self.policy = GaussianPolicy(obs_dim, act_dim, hidden=self.hidden, log_std=log_std).to(self.device)
        self.prior = self.make_target(self.policy)
        self.value = mlp((obs_dim, *self.hidden, 1)).to(self.device)
        self.optimizers = (self.optimise(self.policy), self.optimise(self.value, lr=value_lr))
        self.episodes: deque[tuple[float, int]] = deque(maxlen=window)

    @torch.no_grad()
    def act(self, obs: np.ndarray | Tensor, deterministic: bool = False) -> np.ndarray:
        """Actions ``[batch, act_dim]`` in the box: samples, or the squashed mean."""
        dist = _squashed(self.policy, self.tensor(obs))
        unit = dist.mode if deterministic else dist.rsample(generator=self.generator)
        return self.scale(unit).cpu().numpy()

    def explore(self, obs: np.ndarray) -> np.ndarray:
        self.copies = len(obs)  # so far apart lie two steps of one copy in the memory
        return self.act(obs)

    def fit(
        self,
        env: Source,
        steps: int,
        seed: int = 0,
        *,
        n_envs: int = 1,
        callback: Callable[[ReplayAgent, dict[str, list]], bool | None] | None = None,
    ) -> dict[str, list]:
        """As :meth:`ReplayAgent.fit`; after every episode the price of the relative entropy is set anew."""
        seen = 0

        def watch(agent: ReplayAgent, history: dict[str, list]) -> bool | None:
            nonlocal seen
            if len(history["return"]) > seen:
                self.episodes.extend(zip(history["return"][seen:], history["length"][seen:]))
                seen = len(history["return"])
                self._set_price()
            return None if callback is None else callback(agent, history)

        return super().fit(env, steps, seed, n_envs=n_envs, callback=watch)

    def sample(self, n: int | None = None) -> dict[str, Tensor]:
        """Paths: obs ``[d, n, obs]``, actions, rewards ``[d, n]`` and alive (0 behind the end), last_obs ``[n, obs]`` and last_discount ``[n]``.

        The discount is that of the last value as :func:`path_consistency` wants it: 0 if terminal, else $\\gamma^{m - d}$ for a path of $m$ steps.
        """
        n = self.batch_size if n is None else n
        size = 0 if self.buffer is None else len(self.buffer)
        if not size:
            raise ValueError("cannot sample from an empty memory")
        start = torch.randint(size, (n,), generator=self.generator)
        slots = (start + self.copies * torch.arange(self.d).unsqueeze(1)) % self.buffer.capacity  # [d, n]
        rows = {name: x.view(self.d, n, *x.shape[1:]) for name, x in self.buffer.take(slots.clamp_max(size - 1).flatten()).items()}
        obs, after = rows["obs"].float(), rows["next_obs"].float()
        follows = (after[:-1] == obs[1:]).flatten(2).all(-1) & (rows["discounts"][:-1] > 0) & (slots[1:] < size)  # [d - 1, n]
        alive = torch.cat((torch.ones(1, n), follows.float().cumprod(0)))
        length = alive.sum(0).long()
        last, every = length - 1, torch.arange(n)
        batch = {
            "obs": obs,
            "actions": rows["actions"],
            "rewards": rows["returns"] * alive,
            "alive": alive,
            "last_obs": after[last, every],
            "last_discount": (rows["discounts"][last, every] > 0) * self.gamma ** (length - self.d).float(),
        }
        return {name: x.to(self.device) for name, x in batch.items()}

    def update(self, batch: dict[str, Tensor]) -> dict[str, float]:
        """One step of Adam on the consistency of a batch of paths, for policy and value together."""
        obs, unit, alive = batch["obs"], self.unscale(batch["actions"]), batch["alive"]
        logp = _squashed(self.policy, obs).log_prob(unit) * alive  # [d, n]
        with torch.no_grad():
            logp_prior = _squashed(self.prior, obs).log_prob(unit) * alive
        v_first, v_last = self.value(obs[0]).squeeze(-1), self.value(batch["last_obs"]).squeeze(-1) * batch["last_discount"]
        loss = trust_pcl_loss(v_first, v_last, batch["rewards"], logp, logp_prior, self.gamma, self.entropy_price, self.lam)
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.policy.parameters(), self.max_grad_norm)
        for optimizer in self.optimizers:
            optimizer.step()
        self.track()
        return {"loss": loss.item(), "lam": self.lam, "log_ratio": (logp.detach() - logp_prior).sum().item() / alive.sum().item()}

    def _set_price(self) -> None:
        if self.epsilon is not None:
            returns, lengths = np.array(self.episodes).T
            length = lengths.mean()
            horizon = length if self.gamma == 1 else (1 - self.gamma**length) / (1 - self.gamma)
            # Mean reward times the discounted number of steps: the returns that the price competes with, in the memory's unit.
            discounted = self.reward_scale * returns / lengths * horizon
            self.lam = lambda_for_kl(discounted, self.epsilon * length, *self.lam_bounds)


def _squashed(policy: GaussianPolicy, obs: Tensor) -> SquashedGaussian:
    normal = policy(obs).base_dist
    return SquashedGaussian(normal.loc, normal.scale.log())
