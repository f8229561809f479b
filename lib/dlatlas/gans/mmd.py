r"""MMD GAN and the kernel inception distance (binkowski2018demystifying).

Two samples can be compared without training anything: a kernel says how alike two points are, and the maximum mean discrepancy asks whether
points of one sample are more like each other than like points of the other. A GAN may learn the features on which the kernel acts. The paper
sorts out what is unbiased there: the gradient for a fixed critic is, a critic learned from samples makes it biased, as it does
for Wasserstein GANs. Because the kernel compares so well, the critic may be small. The same statistic, with a polynomial kernel on the
features of a classifier, is a score of samples, KID, whose expectation does not depend on the number of samples.

Equations: with $n$ real points $x_i$ and $m$ model points $y_j$,

$$ \widehat{\mathrm{MMD}}{}^2 = \frac{1}{n (n - 1)} \sum_{i \neq j} k(x_i, x_j) + \frac{1}{m (m - 1)} \sum_{i \neq j} k(y_i, y_j)
   - \frac{2}{n m} \sum_{i, j} k(x_i, y_j) $$

is unbiased; with the diagonals and $n^2$, $m^2$ it is a squared distance, never negative and biased upwards. The kernels are

$$ k_{rq} = \sum_\alpha \Big(1 + \frac{|x - y|^2}{2 \alpha}\Big)^{-\alpha}, \quad k_{rbf} = \sum_\sigma e^{-|x - y|^2 / (2 \sigma^2)}, \quad
   k_{poly} = \Big(\frac{x^\top y}{d} + 1\Big)^3, \quad k_{dist} = \tfrac12 (|x| + |y| - |x - y|) . $$

With $k_{dist}$ the statistic is half the energy distance $2 E|X - Y| - E|X - X'| - E|Y - Y'|$. The critic $\phi$ of an MMD GAN maximises the
statistic of $\phi(x)$ and $\phi(y)$ under a penalty on the witness $f(t) = \frac1n \sum_i k(\phi(x_i), \phi(t)) - \frac1m \sum_j k(\phi(y_j), \phi(t))$,

$$ L_D = - \widehat{\mathrm{MMD}}{}^2 + \lambda\, E_t (|\nabla_t f(t)| - 1)^2, \qquad L_G = \widehat{\mathrm{MMD}}{}^2, $$

at points $t$ between real and model points.

Deviations from the paper:

1. The score runs on whatever features it is given; the paper's are those of the Inception network.
2. Only the gradient penalty is there, no penalty on the size of the critic's activations.

Later work: Arbel et al. (2018) bound the witness's gradient in closed form instead of penalising it at samples. KID became a standard companion of FID,
above all for small data sets (Karras et al., 2020, with few training images). Chong and Forsyth (2020) show that FID's bias even depends on the generator,
and extrapolate it to infinitely many samples. Jayasumana et al. (2024) replace both by MMD with a Gaussian kernel on CLIP features.

Example:
    import torch
    from torch import nn
    from dlatlas.gans.mmd import mmd2, mmd_critic_loss, rq_kernel

    sample = lambda n: 2 * torch.randint(2, (n, 2)) - 1 + 0.1 * torch.randn(n, 2)  # four modes
    G = nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
    critic = nn.Sequential(nn.Linear(2, 64), nn.LeakyReLU(0.1), nn.Linear(64, 8))  # 8 features
    adam = lambda net: torch.optim.Adam(net.parameters(), 1e-3, betas=(0.5, 0.9))
    opt_g, opt_d = adam(G), adam(critic)
    for step in range(241):
        if step % 80 == 0:
            with torch.no_grad():
                distance = mmd2(sample(500), G(torch.randn(500, 4)), rq_kernel)
            print(f"step {step}: MMD^2 of real and generated points {distance:.3f}")
        loss = mmd_critic_loss(critic, sample(32), G(torch.randn(32, 4)).detach())  # the method
        opt_d.zero_grad(), loss.backward(), opt_d.step()
        loss = mmd2(critic(sample(32)), critic(G(torch.randn(32, 4))), rq_kernel)
        opt_g.zero_grad(), loss.backward(), opt_g.step()
    print(f"MMD^2 of two real samples: {mmd2(sample(500), sample(500), rq_kernel):.3f}")
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dlatlas.gans.kit.gradients import gradient_norms, interpolates
from dlatlas.kit.kernels import rbf, sq_dists

__all__ = ["distance_kernel", "kid", "mmd2", "mmd_critic_loss", "poly_kernel", "rbf_kernel", "rq_kernel"]

Kernel = Callable[[Tensor, Tensor], Tensor]


def rq_kernel(x: Tensor, y: Tensor, alphas: Sequence[float] = (0.2, 0.5, 1.0, 2.0, 5.0)) -> Tensor:
    r"""Sum of rational quadratic kernels, $\sum_\alpha (1 + |x_i - y_j|^2 / (2 \alpha))^{-\alpha}$, ``[n, m]``.

    Its tail is heavy: points that are far from all others still feel where they are.

    Args:
        x: points ``[n, d]``.
        y: points ``[m, d]``.
        alphas: positive exponents.

    Raises:
        ValueError: no exponents, one that is not positive, or shapes that do not fit.
    """
    _check_scales("alphas", alphas)
    sq = sq_dists(x, y)
    a = torch.tensor(alphas, dtype=sq.dtype, device=sq.device)[:, None, None]
    # exp and log have cheaper derivatives than a power, and all exponents go through them together: [k, n, m]
    return torch.exp(-a * torch.log1p(sq / (2 * a))).sum(0)


def rbf_kernel(x: Tensor, y: Tensor, sigmas: Sequence[float] = (2, 5, 10, 20, 40, 80)) -> Tensor:
    r"""Sum of Gaussian kernels, $\sum_\sigma \exp(-|x_i - y_j|^2 / (2 \sigma^2))$, ``[n, m]``.

    Args:
        x: points ``[n, d]``.
        y: points ``[m, d]``.
        sigmas: positive bandwidths.

    Raises:
        ValueError: no bandwidths, one that is not positive, or shapes that do not fit.
    """
    _check_scales("sigmas", sigmas)
    return sum(rbf(x, y, s) for s in sigmas)


def poly_kernel(x: Tensor, y: Tensor) -> Tensor:
    r"""Cubic kernel $(x_i^\top y_j / d + 1)^3$ of KID, ``[n, m]``: it compares means, covariances and third moments.

    Args:
        x: points ``[n, d]``.
        y: points ``[m, d]``.

    Raises:
        ValueError: shapes that do not fit.
    """
    _check_pair(x, y)
    return torch.addmm(x.new_ones(()), x, y.T, alpha=1 / x.shape[1]) ** 3


def distance_kernel(x: Tensor, y: Tensor) -> Tensor:
    r"""Kernel of the energy distance, $\frac12 (|x_i| + |y_j| - |x_i - y_j|)$, ``[n, m]``.

    The derivative of a length is taken as 0 where the length is 0.

    Args:
        x: points ``[n, d]``.
        y: points ``[m, d]``.

    Raises:
        ValueError: shapes that do not fit.
    """
    _check_pair(x, y)
    # Differences one by one: near 0 the root would magnify the rounding of |x|^2 + |y|^2 - 2 x.y.
    between = _length(x[:, None] - y[None])  # [n, m]
    return (_length(x)[:, None] + _length(y)[None] - between) / 2


def mmd2(x: Tensor, y: Tensor, kernel: Kernel, unbiased: bool = True) -> Tensor:
    r"""Squared maximum mean discrepancy of two samples, a scalar.

    The unbiased estimate leaves out the pairs of a point with itself. Its mean is the true value, so it is negative about half of the time
    when the two distributions are equal.

    Args:
        x: points ``[n, d]``.
        y: points ``[m, d]``.
        kernel: two sets of points to the matrix of their kernel values.
        unbiased: whether the diagonals are left out.

    Raises:
        ValueError: no rows, or fewer than two for the unbiased estimate; shapes that do not fit.
    """
    _check_pair(x, y)
    least = 2 if unbiased else 1
    if min(len(x), len(y)) < least:
        raise ValueError(f"expected at least {least} rows in both samples, got {len(x)} and {len(y)}")
    return _within(kernel(x, x), unbiased) + _within(kernel(y, y), unbiased) - 2 * kernel(x, y).mean()


def kid(
    fx: Tensor, fy: Tensor, n_subsets: int = 10, subset_size: int = 1000, generator: torch.Generator | None = None
) -> tuple[float, float]:
    """Kernel inception distance: unbiased MMD^2 with the cubic kernel, averaged over random subsets.

    Args:
        fx: features ``[n, d]``.
        fy: features ``[m, d]``.
        n_subsets: number of subsets.
        subset_size: rows of a subset, drawn without replacement from each side.
        generator: of the draws, on the CPU.

    Returns:
        Mean and standard deviation over the subsets. The subsets overlap, so the deviation is a hint at the error and not its size.

    Raises:
        ValueError: fewer than one subset, or a subset size below 2 or above the size of a sample.
    """
    _check_pair(fx, fy)
    if n_subsets < 1 or not 2 <= subset_size <= min(len(fx), len(fy)):
        raise ValueError(
            f"expected n_subsets >= 1 and 2 <= subset_size <= {min(len(fx), len(fy))} (the smaller sample), got {n_subsets} and {subset_size}"
        )
    fx, fy = fx.detach().double(), fy.detach().double()

    def some(f: Tensor) -> Tensor:
        return f[torch.randperm(len(f), generator=generator)[:subset_size].to(f.device)]

    values = torch.stack([mmd2(some(fx), some(fy), poly_kernel) for _ in range(n_subsets)])
    return float(values.mean()), float(values.std(unbiased=False))


def mmd_critic_loss(
    critic: Callable[[Tensor], Tensor],
    real: Tensor,
    fake: Tensor,
    kernel: Kernel = rq_kernel,
    *,
    gp_weight: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""What the critic of an MMD GAN minimises, $-\widehat{\mathrm{MMD}}{}^2(\phi(x), \phi(y)) + \lambda E_t (|\nabla f(t)| - 1)^2$.

    The generator minimises ``mmd2(critic(real), critic(fake), kernel)``.

    Args:
        critic: $\phi$, samples ``[B, ...]`` to features ``[B, k]``.
        real: samples ``[B, ...]``.
        fake: as many samples.
        kernel: on the features.
        gp_weight: weight $\lambda$ of the penalty.
        generator: of the interpolation.

    Raises:
        ValueError: a negative weight, shapes that differ, fewer than two rows.
    """
    if not gp_weight >= 0:
        raise ValueError(f"gp_weight must not be negative, got {gp_weight}")
    if real.shape[1:] != fake.shape[1:]:
        raise ValueError(f"expected samples of one shape, got {tuple(real.shape)} and {tuple(fake.shape)}")
    features = torch.cat([critic(real), critic(fake)])  # apart: layers with batch statistics must not mix the samples
    n, m = len(real), len(fake)
    if min(n, m) < 2:
        raise ValueError(f"expected at least 2 rows in both samples, got {n} and {m}")
    k = kernel(features, features)  # all pairs at once: for a mini-batch one call costs less than the three of mmd2
    loss = 2 * k[:n, n:].mean() - _within(k[:n, :n], True) - _within(k[n:, n:], True)
    if gp_weight == 0:
        return loss

    def witness(t: Tensor) -> Tensor:
        to_real, to_fake = kernel(features, critic(t)).split([n, m])  # [B, B] each
        return to_real.mean(0) - to_fake.mean(0)  # [B]

    steep = gradient_norms(witness, interpolates(real, fake, generator))
    return loss + gp_weight * (steep - 1).square().mean()


def _within(k: Tensor, unbiased: bool) -> Tensor:
    n = len(k)
    return (k.sum() - k.diagonal().sum()) / (n * (n - 1)) if unbiased else k.mean()


def _length(v: Tensor) -> Tensor:
    sq = v.square().sum(-1)
    # The root of a 1 in the place of a 0 keeps the derivative there finite, and the product makes it 0.
    return torch.where(sq > 0, sq, 1).sqrt() * (sq > 0)


def _check_pair(x: Tensor, y: Tensor) -> None:
    if x.dim() != 2 or y.dim() != 2 or x.shape[1] != y.shape[1]:
        raise ValueError(f"expected [n, d] and [m, d], got {tuple(x.shape)} and {tuple(y.shape)}")


def _check_scales(name: str, scales: Sequence[float]) -> None:
    if len(scales) == 0 or not all(s > 0 for s in scales):
        raise ValueError(f"{name} must be positive numbers, at least one, got {tuple(scales)}")
