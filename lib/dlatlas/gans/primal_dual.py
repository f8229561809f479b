r"""GAN training as a primal-dual method for a convex program (chen2018primaldual).

Read the game over all functions at once and it is a convex program in the discriminator's values, one constraint for each point of the data
space. The generator's density turns out to be the multiplier of these constraints. The textbook step for a multiplier, a small step along the
constraint's violation, tells how the model's *mass* should move: up wherever the discriminator says "real" with more than one half. A generator that is
stuck on one mode gets no gradient there, because moving its samples a little changes nothing; moving mass can cross a gap.

Equations: maximise $\sum_i p_i^{data} \log D_i$ over $D_i \in (0, 1)$ subject to $\log(1 - D_i) \ge \log \tfrac12$. With multipliers $p_i \ge 0$ the
Lagrangian

$$ \sum_i p_i^{data} \log D_i + \sum_i p_i \Big( \log(1 - D_i) - \log \tfrac12 \Big) $$

is the GAN's value with the model $p$. Best response and dual step:

$$ D_i = \frac{p_i^{data}}{p_i^{data} + p_i}, \qquad p_i \leftarrow p_i - \alpha \log\big( 2 (1 - D_i) \big), $$

followed by clipping at 0 and scaling to sum 1. For networks the model density at data points $x_i$ is estimated with a Gaussian kernel on the generated
samples, and its squared distance from the moved density is added to the generator's loss:

$$ \hat p(x_i) = \mathrm{mean}_j\, \mathcal N(x_i;\, G(z_j), \sigma^2 I), \qquad
\mathrm{mean}_i \Big( \hat p(x_i) - \big[ \hat p(x_i) - \alpha \log( 2 (1 - D(x_i)) ) \big] \Big)^2 \ \text{with the bracket held fixed.} $$

Deviations from the paper:

1. The mass is clipped at 0 and scaled to 1 after each step in the discrete case, so that it stays a density; the paper has the bare dual step.
2. The added term is a mean of squares with a weight; the paper's scaling of the term is not given in one place.

Later work: the kernel estimate limits the method to low dimensions, and it has not been taken up for images. That moving mass (a Wasserstein-Fisher-Rao
flow, with birth and death of particles) escapes where moving samples cannot was proved for wide networks by Rotskoff et al. (2019).

Example:
    import torch
    from torch import nn
    from dlatlas.gans.primal_dual import primal_dual_g_loss

    data = 0.3 * torch.randn(64, 1) + 3 * torch.tensor([-1.0, 1.0]).repeat(32)[:, None]
    density = lambda samples, at: (-(at - samples.T).square() / 2).exp().mean(1)
    for weight in (0.0, 300.0):
        G = nn.Sequential(nn.Linear(1, 64), nn.ReLU(), nn.Linear(64, 1))
        with torch.no_grad():
            G[2].bias.fill_(-3.0)  # all samples start in one of the two clusters
        optimizer = torch.optim.Adam(G.parameters(), 3e-3)
        for _ in range(300):
            fake = G(torch.randn(64, 1))
            still = fake.detach()  # D is the best discriminator of the samples as they stand
            D = lambda at: density(data, at) / (density(data, at) + density(still, at))
            loss = -D(fake).log().mean()
            loss = loss + primal_dual_g_loss(fake, data, D(data), 0.1, 2.0, weight)  # the method
            optimizer.zero_grad(), loss.backward(), optimizer.step()
        share = (G(torch.randn(2000, 1)) > 0).float().mean()
        print(f"weight {weight:.0f}: {share:.0%} of the samples are in the other cluster")
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["primal_dual_discrete", "primal_dual_g_loss", "target_density"]

_EDGE = 1e-6  # discriminator values are kept this far from 0 and 1: the logarithm of 0 would move infinite mass


def primal_dual_discrete(p_data: Tensor, steps: int, lr: float = 0.05, p_init: Tensor | None = None) -> tuple[Tensor, Tensor]:
    r"""The dual ascent on a finite space with the best response of the discriminator.

    Args:
        p_data: ``[n]``, not negative, sum 1.
        steps: number of dual steps.
        lr: $\alpha$.
        p_init: the model's start ``[n]``; None: uniform.

    Returns:
        The model ``[n]`` and the best response to it ``[n]`` (one half where neither has mass).

    Raises:
        ValueError: something is no density, `lr` is not positive or `steps` negative.
    """
    _check_density(p_data, "p_data")
    p = torch.full_like(p_data, 1 / len(p_data)) if p_init is None else p_init
    _check_density(p, "p_init")
    if p.shape != p_data.shape or steps < 0:
        raise ValueError(f"expected one length and steps >= 0, got {tuple(p_data.shape)}, {tuple(p.shape)} and {steps}")
    for _ in range(steps):
        p = target_density(p, _best_response(p_data, p), lr)
    return p, _best_response(p_data, p)


def target_density(p_model: Tensor, d: Tensor, alpha: float) -> Tensor:
    r"""The model's mass after one dual step, $p - \alpha \log(2 (1 - D))$, clipped at 0 and scaled to sum 1; ``[n]``.

    Args:
        p_model: ``[n]``.
        d: the discriminator's probabilities ``[n]``.
        alpha: step.

    Raises:
        ValueError: shapes differ, `alpha` is not positive, or nothing is left.
    """
    if p_model.shape != d.shape or not alpha > 0:
        raise ValueError(f"expected one shape and alpha > 0, got {tuple(p_model.shape)}, {tuple(d.shape)} and {alpha}")
    moved = (p_model - alpha * _violation(d)).clamp_min(0)
    total = moved.sum()
    if not total > 0:
        raise ValueError(f"alpha = {alpha} takes all mass away")
    return moved / total


def primal_dual_g_loss(fake: Tensor, points: Tensor, d_points: Tensor, alpha: float, sigma: float, weight: float = 1.0) -> Tensor:
    r"""The term that is added to the generator's usual loss, a scalar.

    Args:
        fake: generated samples ``[m, k]``, with graph.
        points: data points ``[n, k]``.
        d_points: the discriminator's probabilities at these ``[n]`` or ``[n, 1]``.
        alpha: step of the density.
        sigma: width of the kernel.
        weight: of the term.

    Raises:
        ValueError: shapes that do not fit, or `alpha` or `sigma` not positive.
    """
    d = d_points.detach().reshape(-1)
    if fake.dim() != 2 or points.dim() != 2 or fake.shape[1] != points.shape[1] or len(d) != len(points):
        shapes = [tuple(t.shape) for t in (fake, points, d_points)]
        raise ValueError(f"expected fake [m, k], points [n, k] and d_points [n], got {shapes}")
    if not (alpha > 0 and sigma > 0):
        raise ValueError(f"alpha and sigma must be positive, got {alpha} and {sigma}")
    square = (points.detach()[:, None] - fake).square().sum(2)  # [n, m]
    density = (-square / (2 * sigma**2)).exp().mean(1) / (2 * math.pi * sigma**2) ** (points.shape[1] / 2)
    target = (density - alpha * _violation(d)).detach()
    return weight * (density - target).square().mean()


def _violation(d: Tensor) -> Tensor:
    return torch.log(2 * (1 - d.clamp(_EDGE, 1 - _EDGE)))


def _best_response(p_data: Tensor, p: Tensor) -> Tensor:
    total = p_data + p
    return torch.where(total > 0, p_data / total.clamp_min(torch.finfo(p.dtype).tiny), torch.full_like(p, 0.5))


def _check_density(p: Tensor, name: str) -> None:
    if p.dim() != 1 or len(p) == 0 or bool((p < 0).any()) or not abs(float(p.sum()) - 1) <= 1e-5:
        raise ValueError(f"{name} must be a vector of numbers >= 0 with sum 1, got shape {tuple(p.shape)} and sum {float(p.sum()):g}")
