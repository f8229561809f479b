r"""A GAN that is small enough for theorems: two Gaussians and two intervals (li2018limitations).

The data are an equal mixture of two Gaussians on the line, the generator is another one whose two means are its parameters, and the
discriminator says "real" on two intervals. That is just rich enough to show modes being lost, and just small enough to compute the best
discriminator at every moment. With the best one the means find the data from almost everywhere. With one that only takes gradient steps, as every GAN in
practice does, they often do not: its intervals get stuck where the densities tell them nothing, and the generator follows.

Equations: $G_\mu = \tfrac12 \mathcal N(\mu_1, 1) + \tfrac12 \mathcal N(\mu_2, 1)$ with density $p$ and distribution function $F$; $p^*$ and $F^*$ the same for the
data's $\mu^*$; $D = 1$ on $[l_1, r_1] \cup [l_2, r_2]$. The payoff is

$$ L(\mu, l, r) = E_{\mu^*} D + E_\mu (1 - D) = 1 + \sum_{i=1}^2 \big[ (F^* - F)(r_i) - (F^* - F)(l_i) \big], $$

which the discriminator maximises and the generator minimises. The best discriminator is 1 where $p^* > p$: times $e^{x^2/2}$ the difference is a sum of four
exponentials with two signs, which changes sign at most three times, so two intervals suffice and $L = 1 + \mathrm{TV}(G_{\mu^*}, G_\mu)$. The derivatives are

$$ \frac{\partial L}{\partial r_i} = p^*(r_i) - p(r_i), \qquad \frac{\partial L}{\partial l_i} = p(l_i) - p^*(l_i), \qquad
\frac{\partial L}{\partial \mu_j} = \frac12 \sum_i \big[ \varphi(r_i - \mu_j) - \varphi(l_i - \mu_j) \big] . $$

Deviations from the paper:

1. Intervals overlap as they like under gradient steps: the payoff counts an overlap twice, and $l \le r$ is not enforced.
2. Sign changes of $p^* - p$ are looked for between 401 grid points; two that lie closer than one twentieth of a unit may be missed together.

Later work: the analysis of Mescheder et al. (2018) finds the same failure of simultaneous gradient steps near an equilibrium on an even smaller
example, and which penalties cure it. In practice several discriminator steps a generator step, which bring it nearer to the best one, are
common for Wasserstein critics only.

Example:
    import torch
    from dlatlas.gans.gan_dynamics import optimal_intervals, payoff, simulate

    data_means = torch.tensor([-2.0, 2.0])
    starts = 8 * torch.rand(50, 2) - 4  # of 50 generators
    ways = {
        "the best discriminator": dict(dynamics="optimal"),
        "1 gradient step of it a turn": dict(dynamics="first_order", d_steps=1),
        "10 gradient steps of it a turn": dict(dynamics="first_order", d_steps=10),
    }
    for name, way in ways.items():
        end = simulate(starts, data_means, steps=400, lr=0.3, **way)[-1]  # the paper's small GAN
        # total variation distance from the data
        distance = payoff(end, data_means, *optimal_intervals(end, data_means)) - 1
        print(f"against {name}: {(distance < 0.05).sum()} of 50 generators find the data")
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

__all__ = ["optimal_intervals", "payoff", "simulate"]

_GRID = 401


def payoff(mu: Tensor, mu_star: Tensor, left: Tensor, right: Tensor) -> Tensor:
    r"""$L(\mu, l, r)$; every argument ``[..., 2]``, the result ``[...]``.

    Args:
        mu: the generator's means.
        mu_star: the data's means.
        left: left ends of the two intervals.
        right: right ends.

    Raises:
        ValueError: a last axis that is not 2.
    """
    _check(mu=mu, mu_star=mu_star, left=left, right=right)

    def difference(x: Tensor) -> Tensor:
        return _mixture_cdf(x, mu_star) - _mixture_cdf(x, mu)

    return 1 + (difference(right) - difference(left)).sum(-1)


@torch.no_grad()
def optimal_intervals(mu: Tensor, mu_star: Tensor, lo: float = -10.0, hi: float = 10.0) -> tuple[Tensor, Tensor]:
    r"""Where $p^* > p$ within ``[lo, hi]``, as left and right ends ``[..., 2]`` in ascending order; a missing interval has equal ends, at `hi`.

    Args:
        mu: the generator's means ``[..., 2]``.
        mu_star: the data's means ``[2]`` or ``[..., 2]``.
        lo: left end of the search.
        hi: right end; beyond both ends the discriminator says "fake".

    Raises:
        ValueError: a last axis that is not 2, or ``lo >= hi``.
    """
    _check(mu=mu, mu_star=mu_star)
    if not lo < hi:
        raise ValueError(f"expected lo < hi, got {lo} and {hi}")
    mu, mu_star = torch.broadcast_tensors(mu.double(), mu_star.double())
    x = torch.linspace(lo, hi, _GRID, dtype=torch.float64, device=mu.device)
    more = _excess(x, mu, mu_star) > 0  # [..., grid]
    # At most three places where the sign turns. Twelve bisections and a secant step find the root there; an unused slot stays at hi.
    turns = more[..., 1:] != more[..., :-1]
    rank = turns.cumsum(-1) * turns  # 1, 2, 3 at the turns
    here = rank[..., None, :] == torch.arange(1, 4, device=x.device)[:, None]  # [..., 3, grid - 1]
    place = here.int().argmax(-1)  # [..., 3]
    a, b, rising = x[place], x[place + 1], ~more.gather(-1, place)
    for _ in range(12):
        middle = (a + b) / 2
        to_left = (_excess(middle, mu, mu_star) > 0) == rising  # the root is left of the middle
        a, b = torch.where(to_left, a, middle), torch.where(to_left, middle, b)
    at_a, at_b = _excess(a, mu, mu_star), _excess(b, mu, mu_star)
    share = (at_a / torch.where(at_a == at_b, 1.0, at_a - at_b)).clamp(0, 1)
    first, second, third = torch.where(here.any(-1), a + share * (b - a), hi).unbind(-1)
    top, bottom = torch.full_like(first, hi), torch.full_like(first, lo)
    starts_inside = more[..., 0]
    left = torch.where(starts_inside[..., None], torch.stack([bottom, second], -1), torch.stack([first, third], -1))
    right = torch.where(starts_inside[..., None], torch.stack([first, third], -1), torch.stack([second, top], -1))
    return left, right


@torch.no_grad()
def simulate(
    mu0: Tensor,
    mu_star: Tensor,
    steps: int = 2000,
    lr: float = 0.1,
    dynamics: Literal["optimal", "first_order"] = "optimal",
    d_steps: int = 1,
    d0: tuple[Tensor, Tensor] | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Path of the generator's means; many starts at once.

    Args:
        mu0: starts ``[..., 2]``.
        mu_star: the data's means ``[2]``.
        steps: steps of the generator.
        lr: step of both players.
        dynamics: "optimal": the generator descends against the best discriminator, held fixed for the step; "first_order": the ends of the
            intervals take `d_steps` gradient steps first.
        d_steps: the discriminator's steps for each of the generator.
        d0: start of the intervals, left and right ends ``[..., 2]`` each; None: four sorted uniform numbers in [-4, 4], drawn for each start.
        generator: of that draw.

    Returns:
        ``[steps + 1, ..., 2]``, float64, start included.

    Raises:
        ValueError: unknown dynamics, `lr` not positive, counts below 1, or a last axis that is not 2.
    """
    _check(mu0=mu0, mu_star=mu_star)
    if dynamics not in ("optimal", "first_order"):
        raise ValueError(f"dynamics must be 'optimal' or 'first_order', got {dynamics!r}")
    if not lr > 0 or steps < 1 or d_steps < 1:
        raise ValueError(f"expected lr > 0, steps >= 1 and d_steps >= 1, got {lr}, {steps}, {d_steps}")
    mu, mu_star = mu0.double(), mu_star.double()
    if d0 is None:
        ends = (8 * torch.rand(*mu.shape[:-1], 4, generator=generator, dtype=torch.float64) - 4).sort(-1).values.to(mu.device)
        left, right = ends[..., 0::2], ends[..., 1::2]
    else:
        left, right = (end.double().expand(mu.shape) for end in d0)
    path = [mu]
    for _ in range(steps):
        if dynamics == "optimal":
            left, right = optimal_intervals(mu, mu_star)
        else:
            for _ in range(d_steps):
                left, right = left - lr * _excess(left, mu, mu_star), right + lr * _excess(right, mu, mu_star)
        pull = _density(right[..., None], mu[..., None, :]) - _density(left[..., None], mu[..., None, :])  # [..., interval, mean]
        mu = mu - lr * pull.sum(-2) / 2
        path.append(mu)
    return torch.stack(path)


def _excess(x: Tensor, mu: Tensor, mu_star: Tensor) -> Tensor:
    """Density of the data minus density of the generator at points ``[..., k]``, each row with its own means."""
    return (_density(x[..., None], mu_star[..., None, :]) - _density(x[..., None], mu[..., None, :])).mean(-1)


def _density(x: Tensor, mean: Tensor) -> Tensor:
    return torch.exp(-0.5 * (x - mean) ** 2) / math.sqrt(2 * math.pi)


def _mixture_cdf(x: Tensor, mu: Tensor) -> Tensor:
    return torch.special.ndtr(x[..., None] - mu[..., None, :]).mean(-1)


def _check(**tensors: Tensor) -> None:
    for name, t in tensors.items():
        if t.dim() < 1 or t.shape[-1] != 2:
            raise ValueError(f"{name} must be [..., 2], got {tuple(t.shape)}")
