r"""Maximum a posteriori policy optimisation (abdolmaleki2018maximum).

Ask first how the policy *should* look, and only then train the network. In each state draw a few actions from the present policy and weigh
them by $e^{Q/\eta}$: this is the best distribution that stays within a given divergence $\epsilon$ of the present one, and the temperature
$\eta$ that belongs to $\epsilon$ is the minimum of a convex function of one number (the E-step). Then fit the network to the weighted
actions by maximum likelihood, again within bounds (the M-step). No gradient of $Q$ in the actions is needed. The bounds on the mean and
on the width are separate: the mean may move while the width, which is the exploration, shrinks slowly.

Equations: with actions $a_{ij} \sim \pi_{\text{old}}(\cdot|s_i)$, $j = 1 \dots N$,

$$ q_{ij} = \frac{e^{Q_{ij}/\eta}}{\sum_j e^{Q_{ij}/\eta}}, \qquad \eta = \arg\min_{\eta > 0}\; \eta\,\epsilon + \eta\, \frac1S \sum_i \log \frac1N \sum_j e^{Q_{ij}/\eta} , $$

$$ \max_\theta \sum_{ij} q_{ij} \log \pi_\theta(a_{ij}|s_i) \quad \text{subject to} \quad \mathbb E\, C_\mu \le \epsilon_\mu, \quad \mathbb E\, C_\sigma \le \epsilon_\sigma , $$

where $\mathrm{KL}(\pi_{\text{old}} \Vert \pi)$ of a diagonal Gaussian is split into what it would be if only the mean, or only the width,
had changed:

$$ C_\mu = \frac12 \sum_d \frac{(\mu - \mu_{\text{old}})^2}{\sigma_{\text{old}}^2}, \qquad C_\sigma = \frac12 \sum_d \Big[\frac{\sigma_{\text{old}}^2}{\sigma^2} - 1 + \log\frac{\sigma^2}{\sigma_{\text{old}}^2}\Big] . $$

Deviations from the paper:

1. The critic is trained on one-step (or n-step) returns with a target network and actions of the target policy; the paper uses Retrace.
2. The policy's actions are clipped to their range where they meet the environment and the critic; likelihoods are those before clipping.
3. The temperature is solved for in each batch by bisection instead of following its gradient over batches; the multipliers of the M-step
   follow their gradients as in the paper.
4. The likelihood of the M-step is split as the constraint is: the new mean is judged with the old width and the new width with the old
   mean.

Later work: Abdolmaleki et al. (2018, "Relative entropy regularized policy iteration") is a cleaned-up version with the same split; V-MPO
(Song et al. 2020) carries the idea to on-policy data and discrete actions, and the Acme library made MPO a standard baseline for control.
Advantage-weighted regression (Peng et al. 2019) and AWAC (Nair et al. 2020) keep the weights $e^{A/\eta}$ but put them on the actions of
the data, which suits offline learning.

Example:
    import torch
    from dlatlas.rl.mpo import gaussian_m_step, mpo_weights, solve_temperature

    def value(a):  # anything that can be evaluated; no gradient is asked for
        return -(a[..., 0] - 2).abs() - (a[..., 1] + 1).square().ceil()

    mean, std = torch.zeros(1, 2), torch.ones(1, 2)  # a Gaussian policy in one state
    for i in range(61):
        a = mean + std * torch.randn(1, 30, 2)
        q = value(a)
        if i % 20 == 0:
            at = ", ".join(f"{x:.2f}" for x in mean[0].tolist())
            print(f"round {i}: mean ({at}), widths around {std.mean():.2f}, value {q.mean():.2f}")
        weights = mpo_weights(q, solve_temperature(q, epsilon=0.2))  # the E-step
        mean, std = gaussian_m_step(a, weights, mean, std, epsilon_mean=0.1, epsilon_std=0.02)
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from dlatlas.rl.kit.actor_critic import ActorCriticAgent
from dlatlas.rl.kit.rollout import Source, as_vector

__all__ = ["MPO", "decoupled_kl", "gaussian_m_step", "mpo_weights", "solve_temperature", "temperature_dual"]


def temperature_dual(q: Tensor, eta: Tensor, epsilon: float) -> Tensor:
    r"""Dual of the E-step, $g(\eta) = \eta\epsilon + \eta\, \frac1S \sum_i \log \frac1N \sum_j e^{Q_{ij}/\eta}$.

    To be minimised over $\eta > 0$. It is convex, and $g(\eta) - \eta \epsilon$ is never below the mean of `q`.

    Args:
        q: action values ``[S, N]`` of `N` sampled actions in each of `S` states.
        eta: temperature, a scalar tensor.
        epsilon: bound on the divergence, not negative.

    Raises:
        ValueError: `q` is not a matrix or empty, `eta` is not one positive number, or `epsilon` is negative.
    """
    eta = _check_q(q, eta)
    if not epsilon >= 0:
        raise ValueError(f"epsilon must not be negative, got {epsilon}")
    return eta * epsilon + eta * (torch.logsumexp(q / eta, 1) - math.log(q.shape[1])).mean()


def mpo_weights(q: Tensor, eta: Tensor) -> Tensor:
    r"""Weights of the sampled actions, $q_{ij} \propto e^{Q_{ij}/\eta}$; each row sums to one.

    Args:
        q: action values ``[S, N]``.
        eta: temperature, a scalar tensor.

    Raises:
        ValueError: `q` is not a matrix or empty, or `eta` is not one positive number.
    """
    return torch.softmax(q / _check_q(q, eta), 1)


def solve_temperature(q: Tensor, epsilon: float, *, lowest: float = 1e-4, iterations: int = 40) -> Tensor:
    r"""The minimum $\eta^\star$ of `temperature_dual`, where the mean divergence of the weights from uniform is `epsilon`.

    The divergence falls as the temperature rises, so bisection on $\log\eta$ finds it. If `epsilon` is larger than any weighting of `N`
    draws can reach (for example above $\log N$), the constraint is idle and the answer is `lowest`.

    Args:
        q: action values ``[S, N]``.
        epsilon: bound on the divergence, positive.
        lowest: smallest temperature.
        iterations: halvings of the interval.

    Raises:
        ValueError: `q` is not a matrix or empty, or `epsilon` or `lowest` is not positive.
    """
    if not epsilon > 0 or not lowest > 0:
        raise ValueError(f"epsilon and lowest must be positive, got {epsilon} and {lowest}")
    _check_q(q, torch.ones(()))
    q = q.detach()
    q = q - q.amax(1, keepdim=True)
    # At this temperature the exponents are small enough for the divergence, about Var(Q) / 2 eta^2, to be below epsilon.
    spread = float(q.abs().max())
    lo = torch.full((), math.log(lowest), dtype=q.dtype, device=q.device)
    hi = torch.full_like(lo, math.log(max(2 * lowest, 2 * spread / min(1.0, math.sqrt(epsilon)))))
    for _ in range(iterations):
        middle = (lo + hi) / 2
        too_sharp = _divergence(q, middle.exp()) > epsilon
        lo, hi = torch.where(too_sharp, middle, lo), torch.where(too_sharp, hi, middle)
    return ((lo + hi) / 2).exp()


def decoupled_kl(mean_old: Tensor, std_old: Tensor, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
    r"""The two parts of $\mathrm{KL}(\mathcal N_{\text{old}} \Vert \mathcal N)$: with the old width, and with the old mean.

    $C_\mu = \frac12\sum_d (\mu-\mu_{\text{old}})^2/\sigma_{\text{old}}^2$ and
    $C_\sigma = \frac12\sum_d [\sigma_{\text{old}}^2/\sigma^2 - 1 + \log(\sigma^2/\sigma_{\text{old}}^2)]$.

    Args:
        mean_old: ``[B, d]``.
        std_old: ``[B, d]``, positive.
        mean: ``[B, d]``.
        std: ``[B, d]``, positive.

    Returns:
        ``kl_mean [B]`` and ``kl_std [B]``.

    Raises:
        ValueError: shapes that differ, or a standard deviation that is not positive.
    """
    shapes = [tuple(x.shape) for x in (mean_old, std_old, mean, std)]
    if len(set(shapes)) != 1 or mean.dim() != 2 or mean.numel() == 0:
        raise ValueError(f"means and standard deviations must all have one shape [B, d], got {shapes}")
    if not bool(((std > 0) & (std_old > 0)).all()):
        raise ValueError(f"standard deviations must be positive, smallest are {float(std_old.min()):g} and {float(std.min()):g}")
    kl_mean = 0.5 * ((mean - mean_old) / std_old).square().sum(1)
    ratio = (std_old / std).square()
    return kl_mean, 0.5 * (ratio - 1 - ratio.log()).sum(1)


def gaussian_m_step(
    actions: Tensor, weights: Tensor, mean_old: Tensor, std_old: Tensor, epsilon_mean: float, epsilon_std: float
) -> tuple[Tensor, Tensor]:
    r"""The M-step in closed form for one free Gaussian in each state: the step that the network's M-step approximates.

    With multipliers $\alpha$ and $\beta$ the optimum is $\mu = \frac{\bar a + \alpha \mu_{\text{old}}}{1 + \alpha}$ and
    $\sigma^2 = \frac{v + \beta\sigma_{\text{old}}^2}{1 + \beta}$, where $\bar a$ and $v$ are the weighted mean of the actions and of
    $(a - \mu_{\text{old}})^2$; each multiplier is the smallest one that meets its bound.

    Args:
        actions: ``[S, N, d]``.
        weights: ``[S, N]``, rows sum to one.
        mean_old: ``[S, d]``.
        std_old: ``[S, d]``.
        epsilon_mean: bound on the mean's part of the divergence in each state; ``inf`` removes it.
        epsilon_std: bound on the width's part; ``inf`` removes it.

    Returns:
        ``mean [S, d]`` and ``std [S, d]``.

    Raises:
        ValueError: shapes that do not fit, or bounds that are not positive.
    """
    if actions.dim() != 3 or weights.shape != actions.shape[:2] or mean_old.shape != actions[:, 0].shape or std_old.shape != mean_old.shape:
        shapes = [tuple(x.shape) for x in (actions, weights, mean_old, std_old)]
        raise ValueError(f"expected actions [S, N, d], weights [S, N], mean_old and std_old [S, d], got {shapes}")
    if not epsilon_mean > 0 or not epsilon_std > 0:
        raise ValueError(f"bounds must be positive, got {epsilon_mean} and {epsilon_std}")
    w = weights.unsqueeze(2)
    pull = (w * actions).sum(1) - mean_old  # [S, d]
    length = decoupled_kl(mean_old, std_old, mean_old + pull, std_old)[0].clamp_min(1e-30)
    mean = mean_old + pull * (epsilon_mean / length).sqrt().clamp_max(1.0).unsqueeze(1)
    v = (w * (actions - mean_old.unsqueeze(1)).square()).sum(1).clamp_min(1e-30)
    # Bisection on the share of the old variance: 0 takes the fitted one, 1 keeps the old one.
    lo, hi = torch.zeros_like(v[:, :1]), torch.ones_like(v[:, :1])
    for _ in range(50):
        share = (lo + hi) / 2
        std = (share * std_old.square() + (1 - share) * v).sqrt()
        far = (decoupled_kl(mean_old, std_old, mean_old, std)[1] > epsilon_std).unsqueeze(1)
        lo, hi = torch.where(far, share, lo), torch.where(far, hi, share)
    return mean, (hi * std_old.square() + (1 - hi) * v).sqrt()


class MPO(ActorCriticAgent):
    r"""Off-policy agent: one critic step and one M-step in each update, from `n_actions` draws of the target policy in each next state.

    The policy is a diagonal Gaussian over unit actions with the mean inside of [-1, 1] and a width that depends on the state. Its draws in
    the successors of a batch
    serve twice: their mean value is the critic's target $R + d\,\frac1N\sum_j \bar Q(s', a_j)$, and they are the sample of the E-step.

    Args:
        obs_dim: width of flat observations.
        act_dim: number of action dimensions.
        epsilon: bound of the E-step.
        epsilon_mean: bound on the mean's part of the divergence in the M-step.
        epsilon_std: bound on the width's part.
        n_actions: draws $N$ in each state.
        low, high: bounds of the actions; None takes them from the first environment.
        std: width of the policy at the start, in unit actions.
        dual_lr: step of Adam on the multipliers of the M-step.
        kwargs: those of `ActorCriticAgent`.

    Raises:
        ValueError: a bound that is not positive, `n_actions` below 2, or only one of `low` and `high`.
    """

    def __init__(
        self,
        obs_dim: int,
        act_dim: int,
        epsilon: float = 0.1,
        epsilon_mean: float = 0.01,
        epsilon_std: float = 1e-4,
        n_actions: int = 20,
        *,
        low: float | Sequence[float] | np.ndarray | None = None,
        high: float | Sequence[float] | np.ndarray | None = None,
        std: float = 0.5,
        dual_lr: float = 0.02,
        **kwargs,
    ):
        if (low is None) != (high is None):
            raise ValueError(f"give both low and high or neither, got low={low} and high={high}")
        super().__init__(obs_dim, act_dim, -1.0 if low is None else low, 1.0 if high is None else high, **kwargs)
        for name, value in (("epsilon", epsilon), ("epsilon_mean", epsilon_mean), ("epsilon_std", epsilon_std), ("std", std)):
            if not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")
        if n_actions < 2:
            raise ValueError(f"n_actions must be at least 2, got {n_actions}")
        self.epsilon, self.epsilon_mean, self.epsilon_std, self.n_actions = epsilon, epsilon_mean, epsilon_std, n_actions
        self._bounds_known, self._start = low is not None, math.log(math.expm1(std))
        self.actor, self.critic = self.actor_net(2 * act_dim, out_scale=0.01), self.critic_net()
        self.target_actor, self.target_critic = self.make_target(self.actor), self.make_target(self.critic)
        self.actor_optimizer, self.critic_optimizer = self.optimise(self.actor), self.optimise(self.critic)
        self.multipliers = nn.Parameter(torch.zeros(2, device=self.device))  # of the mean and of the width, before softplus
        self.dual_optimizer = torch.optim.Adam([self.multipliers], lr=dual_lr)

    def fit(self, env: Source, steps: int, seed: int = 0, **kwargs) -> dict[str, list]:
        """As in `ReplayAgent`; an agent that was made without bounds takes those of this environment's actions."""
        env = as_vector(env, kwargs.pop("n_envs", 1))
        if not self._bounds_known:
            space = env.single_action_space
            self.low, self.high = (np.broadcast_to(x, (self.act_dim,)).astype(np.float32) for x in (space.low, space.high))
            self._middle, self._half = self.tensor((self.high + self.low) / 2), self.tensor((self.high - self.low) / 2)
            self._bounds_known = True
        return super().fit(env, steps, seed, **kwargs)

    def policy(self, net: nn.Module, obs: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation ``(B, act_dim)`` of the Gaussian over unit actions."""
        mean, width = net(obs).chunk(2, 1)
        return torch.tanh(mean), softplus(width + self._start) + 1e-4

    @torch.no_grad()
    def act(self, obs: np.ndarray | Tensor, deterministic: bool = False) -> np.ndarray:
        """Draws from the policy, clipped to the box; `deterministic` gives its mean."""
        unit, std = self.policy(self.actor, self.tensor(obs))
        if not deterministic:
            unit = (unit + std * torch.randn(unit.shape, generator=self.generator).to(self.device)).clamp(-1, 1)
        return self.scale(unit).cpu().numpy()

    def update(self, batch: dict[str, Tensor]) -> dict[str, float]:
        """A critic step, an E-step and an M-step; reports "critic_loss", "eta", "kl_mean", "kl_std" and "std"."""
        states, B, N = batch["next_obs"], len(batch["next_obs"]), self.n_actions
        with torch.no_grad():
            mean_old, std_old = self.policy(self.target_actor, states)
            noise = torch.randn(B, N, self.act_dim, generator=self.generator).to(self.device)
            actions = mean_old.unsqueeze(1) + std_old.unsqueeze(1) * noise  # [B, N, d]
            pairs = torch.cat((states.unsqueeze(1).expand(B, N, -1), actions.clamp(-1, 1)), 2)
            q = self.target_critic(pairs).squeeze(2)  # [B, N]
            goal = batch["returns"] + batch["discounts"] * q.mean(1)
            eta = solve_temperature(q, self.epsilon, iterations=12)
            weights = mpo_weights(q, eta)
        delta = self.critic(torch.cat((batch["obs"], self.unscale(batch["actions"])), 1)).squeeze(1) - goal
        loss = 0.5 * delta * delta
        loss = (loss * batch["weights"]).mean() if "weights" in batch else loss.mean()
        self.critic_optimizer.zero_grad()
        loss.backward()
        self.critic_optimizer.step()

        mean, std = self.policy(self.actor, states)
        kl_mean, kl_std = (kl.mean() for kl in decoupled_kl(mean_old, std_old, mean, std))
        fit_mean = (actions - mean.unsqueeze(1)) / std_old.unsqueeze(1)
        fit_std = (actions - mean_old.unsqueeze(1)) / std.unsqueeze(1)
        # Minus the log-likelihood of the mean (with the old width) and of the width (with the old mean).
        misfit = 0.5 * (fit_mean.square() + fit_std.square()).sum(2) + std.log().sum(1, keepdim=True)  # [B, N]
        strength = softplus(self.multipliers).detach()
        actor_loss = (weights * misfit).sum(1).mean() + strength[0] * kl_mean + strength[1] * kl_std
        self.actor_optimizer.zero_grad()
        actor_loss.backward()
        self.actor_optimizer.step()
        room = torch.stack((self.epsilon_mean - kl_mean.detach(), self.epsilon_std - kl_std.detach()))
        # A multiplier grows while its constraint is violated; relative room, so that both constraints are felt alike.
        room = room / torch.tensor([self.epsilon_mean, self.epsilon_std], device=self.device)
        self.dual_optimizer.zero_grad()
        (softplus(self.multipliers) * room).sum().backward()
        self.dual_optimizer.step()
        self.track()
        report = {
            "critic_loss": loss.item(),
            "eta": eta.item(),
            "kl_mean": kl_mean.item(),
            "kl_std": kl_std.item(),
            "std": std.mean().item(),
        }
        if "weights" in batch:
            report["priorities"] = delta.detach().abs()
        return report


def _divergence(q: Tensor, eta: Tensor) -> Tensor:
    """Mean over states of KL(weights || uniform)."""
    log_w = torch.log_softmax(q / eta, 1)
    return (log_w.exp() * log_w).sum(1).mean() + math.log(q.shape[1])


def _check_q(q: Tensor, eta: Tensor) -> Tensor:
    if q.dim() != 2 or q.numel() == 0:
        raise ValueError(f"q must have shape [S, N] with at least one entry, got {tuple(q.shape)}")
    eta = torch.as_tensor(eta, dtype=q.dtype, device=q.device)
    if eta.numel() != 1 or not float(eta.detach()) > 0:
        raise ValueError(f"eta must be one positive number, got {eta.detach().tolist()}")
    return eta.reshape(())
