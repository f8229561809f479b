r"""The noisy quadratic and its greedy and long-horizon learning rates (wu2018shorthorizon).

Tuning a learning rate by looking only a few steps ahead favours rates that are too small: a small step removes the noise that
sits in the sharp directions at once, while the gain of a large step in the flat directions comes later. On a quadratic whose
minimum jitters at random, the mean and the variance of every coordinate follow an exact recursion, so that the best next step
(greedy) and the best whole schedule can be compared without sampling.

Equations: $L(\theta) = \frac12 \sum_i h_i (\theta_i - c_i)^2$ with $c_i \sim N(0, \sigma_i^2)$ drawn anew at each step
$\theta' = \theta - \alpha h (\theta - c)$. In each coordinate, for mean $\mu$ and variance $s$,

$$\mu' = (1 - \alpha h)\, \mu, \qquad s' = (1 - \alpha h)^2 s + \alpha^2 h^2 \sigma^2, \qquad
\mathbb{E} L = \tfrac12 \sum_i h_i (\mu_i^2 + s_i + \sigma_i^2)$$

The rate that minimises the loss after one step is

$$\alpha_{\text{greedy}} = \frac{\sum_i h_i^2 (\mu_i^2 + s_i)}{\sum_i h_i^3 (\mu_i^2 + s_i + \sigma_i^2)}$$

With momentum $m$, $v' = m v - \alpha h (\theta - c)$ and $\theta' = \theta + v'$, mean and covariance of the pair
$(\theta, v)$ follow in the same way.

Deviations from the paper:

1. The minimum's own mean is 0; a constant shift changes nothing.
2. `optimal_schedule` optimises the rates only. The paper optimises momentum as well.

Later work: Metz et al. (2019) meet the same bias when they train learned optimizers by short unrolls. Vicol, Metz and
Sohl-Dickstein (2021) remove it with an unbiased estimator that carries perturbations across truncations. Zhang et al. (2019) use
the noisy quadratic to predict how batch size, momentum and preconditioning interact.

Example:
    import torch
    from dlatlas.theory.short_horizon import NoisyQuadratic, optimal_schedule

    h = torch.logspace(-2, 0, 50, dtype=torch.float64)  # curvatures
    problem = NoisyQuadratic(h, torch.ones_like(h))
    mean, variance = torch.zeros_like(h), 1 / h
    best = optimal_schedule(problem, mean, variance, horizon=100, iters=150)
    m, v, greedy = mean, variance, []
    for _ in range(100):
        greedy.append(problem.greedy_lr(m, v))  # the rate that is best for the very next step
        m, v = problem.step(m, v, greedy[-1])
    for name, rates in {"greedy": torch.tensor(greedy, dtype=torch.float64), "planned": best}.items():
        losses = problem.rollout(mean, variance, rates)
        print(f"{name}: mean rate {rates.mean():.2f}, loss after 10 steps {losses[10]:.1f}, after 100 {losses[100]:.1f}")
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["NoisyQuadratic", "optimal_schedule"]


class NoisyQuadratic:
    r"""A quadratic with curvatures $h$ whose minimum is drawn from $N(0, \sigma^2)$ at every step; exact moments of SGD on it.

    Args:
        h: curvatures ``(d,)``, positive.
        sigma: standard deviations ``(d,)`` of the minimum, not negative.

    Raises:
        ValueError: ``h <= 0``, ``sigma < 0``, values that are not finite, or shapes that are not ``(d,)``.
    """

    def __init__(self, h: Tensor, sigma: Tensor):
        if h.dim() != 1 or h.shape != sigma.shape or len(h) == 0:
            raise ValueError(f"h and sigma must have one shape (d,), got {tuple(h.shape)} and {tuple(sigma.shape)}")
        if not (bool(torch.isfinite(h).all() and torch.isfinite(sigma).all()) and float(h.min()) > 0 and float(sigma.min()) >= 0):
            raise ValueError(
                f"h must be positive, sigma not negative and both finite, got h >= {float(h.min())}, sigma >= {float(sigma.min())}"
            )
        self.h, self.sigma = h, sigma

    def step(self, mu: Tensor, var: Tensor, lr: float | Tensor, momentum: float | None = None) -> tuple[Tensor, Tensor]:
        r"""Mean and variance after one step.

        Args:
            mu: means ``(d,)``; with momentum also ``(d, 2)`` of the pairs $(\theta, v)$, and ``(d,)`` means a velocity of 0.
            var: variances ``(d,)``, or covariances ``(d, 2, 2)`` of the pairs.
            lr: rate $\alpha$, not negative.
            momentum: $m$; None or 0 is plain SGD.

        Returns:
            New mean and variance; pairs and their covariances if momentum is used or pairs were given.

        Raises:
            ValueError: negative `lr` or `momentum`, or shapes that do not fit.
        """
        self._check(mu, var)
        if not float(torch.as_tensor(lr).detach()) >= 0 or not (momentum or 0.0) >= 0:
            raise ValueError(f"lr and momentum must not be negative, got lr={float(lr)}, momentum={momentum}")
        if not momentum and mu.dim() == 1:
            keep = 1 - lr * self.h
            return keep * mu, keep**2 * var + (lr * self.h * self.sigma) ** 2
        if mu.dim() == 1:
            mu = torch.stack([mu, torch.zeros_like(mu)], -1)  # (d, 2)
            var = torch.stack([torch.stack([var, 0 * var], -1), torch.zeros_like(mu)], -2)  # (d, 2, 2)
        pull, m = -lr * self.h, torch.full_like(self.h, momentum or 0.0)
        A = torch.stack([torch.stack([1 + pull, m], -1), torch.stack([pull, m], -1)], -2)  # (d, 2, 2)
        noise = (pull * self.sigma) ** 2
        # The same draw of the minimum enters position and velocity.
        return (A @ mu[..., None])[..., 0], A @ var @ A.mT + noise[:, None, None]

    def loss(self, mu: Tensor, var: Tensor) -> Tensor:
        r"""Expected loss $\frac12 \sum_i h_i (\mu_i^2 + s_i + \sigma_i^2)$ as a scalar tensor."""
        self._check(mu, var)
        if mu.dim() == 2:
            mu, var = mu[:, 0], var[:, 0, 0]
        return 0.5 * (self.h * (mu**2 + var + self.sigma**2)).sum()

    def rollout(self, mu0: Tensor, var0: Tensor, lrs: Tensor) -> Tensor:
        """Expected losses ``(T + 1,)`` along a schedule `lrs` ``(T,)``, the start included; differentiable in `lrs`."""
        if lrs.dim() != 1:
            raise ValueError(f"lrs must have shape (T,), got {tuple(lrs.shape)}")
        losses = [self.loss(mu0, var0)]
        for lr in lrs:
            mu0, var0 = self.step(mu0, var0, lr)
            losses.append(self.loss(mu0, var0))
        return torch.stack(losses)

    def greedy_lr(self, mu: Tensor, var: Tensor) -> float:
        r"""The rate that minimises the expected loss after one plain SGD step from mean and variance ``(d,)``."""
        self._check(mu, var)
        if mu.dim() != 1:
            raise ValueError(f"the greedy rate is defined for plain SGD: mu must be (d,), got {tuple(mu.shape)}")
        moment = mu**2 + var
        top, bottom = (self.h**2 * moment).sum(), (self.h**3 * (moment + self.sigma**2)).sum()
        return float(top / bottom) if float(bottom) > 0 else 0.0

    def _check(self, mu: Tensor, var: Tensor) -> None:
        d = len(self.h)
        if (mu.shape, var.shape) not in (((d,), (d,)), ((d, 2), (d, 2, 2))):
            raise ValueError(
                f"expected mean and variance ({d},), or ({d}, 2) and ({d}, 2, 2); got {tuple(mu.shape)} and {tuple(var.shape)}"
            )


def optimal_schedule(problem: NoisyQuadratic, mu0: Tensor, var0: Tensor, horizon: int, iters: int = 300) -> Tensor:
    r"""The schedule ``(horizon,)`` that minimises the expected loss after `horizon` steps of plain SGD.

    Adam on the logarithms of the rates, from the constant schedule $1 / (2 \max h)$; rates stay below $1.95 / \max h$, since
    beyond $2 / \max h$ the sharpest coordinate diverges. The best schedule that was met is returned.

    Args:
        problem: the quadratic.
        mu0: means ``(d,)`` at the start.
        var0: variances ``(d,)`` at the start.
        horizon: number of steps.
        iters: updates of the schedule.

    Raises:
        ValueError: `horizon` or `iters` below 1, or shapes that do not fit.
    """
    if horizon < 1 or iters < 1:
        raise ValueError(f"horizon and iters must be at least 1, got {horizon} and {iters}")
    problem._check(mu0, var0)
    if mu0.dim() != 1:
        raise ValueError(f"schedules are optimised for plain SGD: mu0 must be (d,), got {tuple(mu0.shape)}")
    sharpest = float(problem.h.max())
    ceiling = math.log(1.95 / sharpest)
    logs = torch.full((horizon,), math.log(0.5 / sharpest), dtype=problem.h.dtype, requires_grad=True)
    optimizer = torch.optim.Adam([logs], lr=0.05)
    best, lowest = logs.detach().exp(), math.inf
    for _ in range(iters):
        optimizer.zero_grad()
        loss = _final_loss(problem, mu0, var0, logs.exp())
        if loss.item() < lowest:
            best, lowest = logs.detach().exp(), loss.item()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            logs.clamp_(max=ceiling)
    return best


def _final_loss(problem: NoisyQuadratic, mu0: Tensor, var0: Tensor, lrs: Tensor) -> Tensor:
    r"""Last entry of ``rollout`` in closed form, without a loop over time.

    $E \theta_T^2 = \Pi_1 E \theta_0^2 + \sum_t \alpha_t^2 h^2 \sigma^2 \Pi_{t+1}$ with $\Pi_t = \prod_{s \ge t} (1 - \alpha_s h)^2$.
    """
    keep = (1 - lrs[:, None] * problem.h) ** 2  # (T, d)
    tail = keep.flip(0).cumprod(0).flip(0)  # (T, d), product from t to the end
    after = torch.cat([tail[1:], torch.ones_like(tail[:1])])
    moment = tail[0] * (mu0**2 + var0) + ((lrs[:, None] * problem.h * problem.sigma) ** 2 * after).sum(0)  # (d,)
    return 0.5 * (problem.h * (moment + problem.sigma**2)).sum()
