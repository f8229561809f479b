r"""Action-dependent baselines for policies that factorise (wu2018variance).

Many policies choose the parts of an action independently of each other: every joint gets its own Gaussian. The gradient then is a sum over
the parts, and each part may have a baseline of its own. That baseline must not look at its own part, but it may look at all the others: by
independence they say nothing about the choice that is being judged. So the luck of the other 99 joints need not disturb the credit of this
one.

Equations: with $\pi(a|s) = \prod_i \pi_i(a_i|s)$ and $a_{-i}$ the action without its part $i$,

$$ \nabla_\theta J = \mathbb E\Big[\sum_i \nabla_\theta \log \pi_i(a_i|s)\, \big(Q(s, a) - b_i(s, a_{-i})\big)\Big] , $$

unbiased for every $b_i$ that does not depend on $a_i$. The baseline of least variance is

$$ b_i^\star(s, a_{-i}) = \frac{\mathbb E_{a_i}\big[\lVert \nabla_\theta \log \pi_i \rVert^2\, Q(s, a)\big]}{\mathbb E_{a_i}\big[\lVert \nabla_\theta \log \pi_i \rVert^2\big]} . $$

In practice one evaluation of a learned $Q$ is cheaper: $b_i = Q(s, (\bar a_i, a_{-i}))$ with the policy's mean $\bar a_i$ in place of the
sampled part ("mean"), or an average over $n$ draws $\alpha_j \sim \pi_i$, $b_i = \frac1n \sum_j Q(s, (\alpha_j, a_{-i}))$ ("mc"). Where
the return is estimated by an advantage with a state baseline, $\hat A + V(s)$ takes the place of $Q(s, a)$.

Deviations from the paper:

1. Only diagonal Gaussians have the "mc" mode. The paper also sketches baselines for correlated and for discrete policies.
2. `FactorizedHooks` puts the baselines into PPO, whose ratio is clipped for each part of the action by itself.

Later work: Tucker et al. (2018) split the variance of a policy gradient into the parts due to states, actions and the future, and show
that on common benchmarks the part that any action-dependent baseline could remove is small beside the rest, even with a perfect $Q$. Where
the action has many independent parts and the reward follows soon, as in advertising or in multi-agent systems, the
idea is standard: the counterfactual baseline of Foerster et al. (2018) is its "expectation" form for discrete actions.

Example:
    import torch
    from dlatlas.rl.factorized_baseline import factorized_baseline, factorized_surrogate

    def reward(obs, a):  # fifty parts of the action, the best one is zero
        return -a.square().sum(1)

    for name in ("mean reward", "factorised"):
        mean = torch.nn.Parameter(torch.ones(50))
        optimizer = torch.optim.SGD([mean], lr=0.01, maximize=True)
        for step in range(100):
            a = (mean + torch.randn(10, 50)).detach()
            r, obs, policy = reward(None, a), torch.zeros(10, 1), mean.expand(10, 50)
            b = r.mean().expand(10, 50)
            if name == "factorised":  # the method: each part is judged by what the others did
                b = factorized_baseline(reward, obs, a, policy.detach())
            logp = torch.distributions.Normal(policy, 1.0).log_prob(a)
            optimizer.zero_grad()
            factorized_surrogate(logp, r, b).backward()
            optimizer.step()
        print(f"{name}: distance from the best action after 100 steps {mean.norm().item():.2f}")
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from dlatlas.rl.kit.nets import mlp
from dlatlas.rl.kit.pg import Hooks, ppo_loss
from dlatlas.train import fit

__all__ = ["FactorizedHooks", "factorized_baseline", "factorized_surrogate", "optimal_baseline"]


def factorized_baseline(
    q_fn: Callable[[Tensor, Tensor], Tensor],
    obs: Tensor,
    actions: Tensor,
    mean: Tensor,
    std: Tensor | None = None,
    mode: str = "mean",
    n: int = 10,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""The baselines $b_i(s, a_{-i})$ of all parts of the action, by putting the mean or draws from the policy in the place of part $i$.

    Args:
        q_fn: action value, from states ``[N, s]`` and actions ``[N, m]`` to ``[N]``.
        obs: states ``[B, s]``.
        actions: sampled actions ``[B, m]``.
        mean: the policy's means ``[B, m]``.
        std: its standard deviations, ``[m]`` or ``[B, m]``; needed by ``mode="mc"``. A symmetric ``[m, m]`` counts as a covariance also if $B = m$.
        mode: ``"mean"`` or ``"mc"``.
        n: draws of each part in ``"mc"``.
        generator: source of the draws.

    Returns:
        ``[B, m]``, without gradient.

    Raises:
        ValueError: shapes that do not fit, an empty batch, an unknown mode, `n` below 1, ``"mc"`` without `std`, or a covariance matrix as
            `std`: the parts of a correlated policy are not independent.
    """
    if obs.dim() != 2 or actions.dim() != 2 or len(obs) != len(actions) or mean.shape != actions.shape or actions.numel() == 0:
        shapes = [tuple(x.shape) for x in (obs, actions, mean)]
        raise ValueError(f"expected obs [B, s], actions [B, m] and mean [B, m] with B >= 1, got {shapes}")
    B, m = actions.shape
    if mode not in ("mean", "mc") or n < 1:
        raise ValueError(f"mode must be 'mean' or 'mc' and n at least 1, got {mode!r} and {n}")
    if std is None and mode == "mc":
        raise ValueError("mode 'mc' needs the policy's standard deviations std")
    if std is not None:
        if std.shape not in ((m,), (B, m)):
            raise ValueError(
                f"std must have shape ({m},) or ({B}, {m}), got {tuple(std.shape)}; "
                "a policy with a full covariance does not factorise, and the baseline would be biased"
            )
        if not bool((std > 0).all()):
            raise ValueError(f"std must be positive (a full covariance matrix does not factorise), smallest is {float(std.min()):g}")
        if std.shape == (m, m) and m > 1 and torch.equal(std, std.T) and not bool((std == std[0, 0]).all()):
            # With as many samples as parts the shape does not tell; different widths that are symmetric by accident do not occur.
            raise ValueError(
                f"std must be standard deviations, got a symmetric matrix ({m}, {m}): a policy with a full covariance does not factorise"
            )
    with torch.no_grad():
        if mode == "mean":
            places = mean.unsqueeze(0)  # [1, B, m]
        else:
            noise = torch.randn(n, B, m, generator=generator, dtype=mean.dtype, device=mean.device)
            places = mean + std * noise  # [n, B, m]
        k = len(places)
        own = torch.eye(m, dtype=torch.bool, device=actions.device)
        # Row i of a block is the sampled action with only its part i replaced.
        changed = torch.where(own, places.unsqueeze(2), actions.unsqueeze(1))  # [k, B, m, m]
        states = obs.unsqueeze(1).expand(k, B, m, obs.shape[1])
        q = q_fn(states.reshape(k * B * m, -1), changed.reshape(k * B * m, m))
        if q.shape != (k * B * m,):
            raise ValueError(f"q_fn must return {k * B * m} values for as many states, got shape {tuple(q.shape)}")
        return q.reshape(k, B, m).mean(0)


def optimal_baseline(grad_logp_i: Tensor, q: Tensor) -> Tensor:
    r"""Baseline of least variance from draws of one part, $\sum_j \lVert g_j\rVert^2 Q_j / \sum_j \lVert g_j\rVert^2$.

    Args:
        grad_logp_i: gradients of the log-probability of part $i$, ``[n, B, p]``, for `n` draws of it with the other parts fixed.
        q: action values of these draws, ``[n, B]``.

    Returns:
        ``[B]``; where all gradients vanish, the mean of `q`.

    Raises:
        ValueError: shapes that do not fit, or no draws.
    """
    if grad_logp_i.dim() != 3 or q.shape != grad_logp_i.shape[:2] or q.numel() == 0:
        raise ValueError(f"expected gradients [n, B, p] and values [n, B], got {tuple(grad_logp_i.shape)} and {tuple(q.shape)}")
    weight = grad_logp_i.square().sum(2)  # [n, B]
    total = weight.sum(0)
    weight = torch.where(total > 0, weight, torch.ones_like(weight))
    return (weight * q).sum(0) / weight.sum(0)


def factorized_surrogate(logp_i: Tensor, returns: Tensor, baselines: Tensor) -> Tensor:
    r"""Scalar to maximise whose gradient is the estimator, $\frac1B\sum_b\sum_i \log\pi_i(a_{bi}|s_b)\,(R_b - b_{bi})$.

    Args:
        logp_i: log-probability of each part, ``[B, m]``, differentiable in the policy.
        returns: ``[B]``, a constant here.
        baselines: ``[B, m]``, constants here.

    Raises:
        ValueError: shapes that do not fit, or an empty batch.
    """
    if logp_i.dim() != 2 or baselines.shape != logp_i.shape or returns.shape != logp_i.shape[:1] or logp_i.numel() == 0:
        shapes = [tuple(x.shape) for x in (logp_i, returns, baselines)]
        raise ValueError(f"expected logp_i [B, m], returns [B] and baselines [B, m] with B >= 1, got {shapes}")
    return (logp_i * (returns.unsqueeze(1) - baselines).detach()).sum(1).mean()


class FactorizedHooks(Hooks):
    r"""PPO with a baseline for each part of the action, for ``ppo(..., hooks=FactorizedHooks(...))`` and Gaussian policies.

    A network learns the advantage as a function of state and action, always on the samples of earlier segments. Part $i$ is judged by
    $\hat A - \hat A_w(s, (\bar a_i, a_{-i}))$ with its own clipped ratio $\pi_i / \pi_{i,\text{old}}$.

    Args:
        obs_dim: size of a state.
        act_dim: size of an action.
        hidden: widths of the network.
        steps: steps of Adam on each segment.
        lr: its learning rate.
    """

    def __init__(self, obs_dim: int, act_dim: int, *, hidden: Sequence[int] = (32, 32), steps: int = 20, lr: float = 3e-3):
        self.net, self.steps, self.fitted = mlp((obs_dim + act_dim, *hidden, 1), nn.Tanh, out_scale=0.1), steps, False
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=lr, fused=True)

    def value(self, obs: Tensor, actions: Tensor) -> Tensor:
        """The learned advantage ``[N]``."""
        return self.net(torch.cat((obs, actions), 1)).squeeze(1)

    def after_rollout(self, policy: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        with torch.no_grad():
            dist = policy.distribution(batch["obs"]).base_dist
        obs, actions, adv = batch["obs"], batch["actions"], batch["adv"]
        b = factorized_baseline(self.value, obs, actions, dist.mean) if self.fitted else torch.zeros_like(actions)

        def step(i: int) -> Tensor:
            loss = (self.value(obs, actions) - adv).square().mean()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            return loss.detach()

        fit(step, self.steps)
        self.fitted = True
        return {**batch, "adv": adv.unsqueeze(1) - b, "logp_i": dist.log_prob(actions)}

    def policy_loss(
        self, policy: nn.Module, batch: dict[str, Tensor], dist: torch.distributions.Distribution, clip: float | None
    ) -> Tensor:
        logp_i = dist.base_dist.log_prob(batch["actions"])  # [N, m]
        if clip is None:
            return -(logp_i * batch["adv"]).sum(1).mean()
        # The loss is a mean over samples and parts; the estimator sums over parts.
        return logp_i.shape[1] * ppo_loss((logp_i - batch["logp_i"]).exp(), batch["adv"], clip)
