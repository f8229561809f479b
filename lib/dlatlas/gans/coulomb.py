r"""Coulomb GAN: samples as charges in a potential field (unterthiner2018coulomb).

Let real samples attract and generated ones repel each other, like charges of opposite sign. The force on a generated sample then points to where
data is missing, and vanishes everywhere only if both kinds of charge cancel, that is, if model and data are equal. A crowd of samples at one mode pushes itself
apart, which is the cure for lost modes. The discriminator is no classifier here: it learns the potential by regression, and the
generator climbs it.

Equations: the kernel of Plummer, the potential, the two losses and the energy of the field,

$$ k(a, b) = \big(|a - b|^2 + \epsilon^2\big)^{-d / 2}, \qquad \Phi(a) = \frac1n \sum_i k(a, x_i) - \frac1m \sum_j k(a, y_j), $$

$$ L_D = \tfrac12\, E_a (D(a) - \Phi(a))^2, \qquad L_G = - \tfrac12\, E_z D(G(z)), \qquad F = \tfrac12 \int \rho\, \Phi, \quad \rho = p_{data} - p_{model}, $$

with real points $x_i$, model points $y_j$, and anchors $a$ that are both kinds of points plus noise $N(0, \epsilon^2)$. On samples, $2 F$ is the biased
estimate of the squared maximum mean discrepancy with this kernel. A model point that follows $\nabla \Phi$ lowers $F$, since
$\partial F / \partial y_j = - \nabla \Phi(y_j) / m$.

Deviations from the paper:

1. $d$ is a free parameter. The paper takes $d = 3$, and its theory wants $d \le m - 2$ for data of dimension $m$, which no $d \geq 1$ satisfies on a plane.
2. Images are compared as flat vectors of pixels.

Later work: the theorem is about samples that move freely; a generator network cannot move its samples one by one, and Unterthiner et al. say so themselves. The flow
of free particles along an MMD was analysed by Arbel et al. (2019), who show that it can stop early for smooth kernels, and add noise to the
place where the force is read, which is what the noise on the anchors does. Hertrich et al. (2024) build generative models
from particle flows of the energy distance, whose kernel has no bandwidth.

Example:
    import torch
    from torch import nn
    from dlatlas.gans.coulomb import coulomb_d_loss, coulomb_g_loss, field_energy, make_anchors

    sample = lambda n: 2 * torch.randint(2, (n, 2)) - 1 + 0.1 * torch.randn(n, 2)  # four modes
    hidden = lambda n: [nn.Linear(n, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU()]
    G, D = nn.Sequential(*hidden(4), nn.Linear(64, 2)), nn.Sequential(*hidden(2), nn.Linear(64, 1))
    opt_g = torch.optim.Adam(G.parameters(), 1e-3, betas=(0.5, 0.9))
    opt_d = torch.optim.Adam(D.parameters(), 2e-3, betas=(0.5, 0.9))
    for step in range(401):
        real, fake = sample(128), G(torch.randn(128, 4))
        if step % 100 == 0:
            quadrants = ((fake > 0).long() @ torch.tensor([1, 2])).bincount(minlength=4).tolist()
            energy = field_energy(real, fake, dim=1, eps=0.3)
            print(f"step {step}: energy {energy:.3f}, samples in each quadrant {quadrants}")
        anchors = make_anchors(real, fake, eps=0.3)
        # the method: D learns the potential of all charges, G climbs it
        loss = coulomb_d_loss(D, anchors, real, fake.detach(), dim=1, eps=0.3)
        opt_d.zero_grad(), loss.backward(), opt_d.step()
        loss = coulomb_g_loss(D, fake)
        opt_g.zero_grad(), loss.backward(), opt_g.step()
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dlatlas.kit.kernels import sq_dists

__all__ = ["coulomb_d_loss", "coulomb_g_loss", "field_energy", "make_anchors", "plummer_kernel", "potential"]


def plummer_kernel(a: Tensor, b: Tensor, dim: float = 3, eps: float = 1.0) -> Tensor:
    r"""Potential of unit charges, $(|a_i - b_j|^2 + \epsilon^2)^{-d/2}$, ``[n, k]``.

    Args:
        a: points ``[n, m]``; further axes are flattened.
        b: points ``[k, m]``.
        dim: $d$, how fast the potential falls: the larger, the shorter its reach.
        eps: $\epsilon$, the distance below which charges are smeared out, in units of the data.

    Raises:
        ValueError: `eps` is not positive, `dim` below 1, or shapes that do not fit.
    """
    if not eps > 0 or not dim >= 1:
        raise ValueError(f"expected eps > 0 and dim >= 1, got eps={eps} and dim={dim}")
    if a.dim() < 2 or b.dim() < 2:
        raise ValueError(f"expected points [n, m] and [k, m], got {tuple(a.shape)} and {tuple(b.shape)}")
    inverse = _InverseDistance.apply(a.flatten(1), b.flatten(1), eps)
    return inverse if dim == 1 else inverse**dim


def potential(a: Tensor, real: Tensor, fake: Tensor, dim: float = 3, eps: float = 1.0) -> Tensor:
    r"""$\Phi(a) = \frac1n \sum_i k(a, x_i) - \frac1m \sum_j k(a, y_j)$ ``[n]``, high where data is missing from the model.

    A point of `a` that is also among the model points feels itself, which shifts $\Phi$ by $\epsilon^{-d} / m$ and pushes nowhere.

    Args:
        a: where to read the potential ``[n, m]``.
        real: attracting points.
        fake: repelling points.
        dim: of the kernel.
        eps: of the kernel.

    Raises:
        ValueError: no points of a kind, and what :func:`plummer_kernel` raises.
    """
    if 0 in (len(real), len(fake)):
        raise ValueError(f"expected at least one point of each kind, got {len(real)} real and {len(fake)} model points")
    return plummer_kernel(a, real, dim, eps).mean(1) - plummer_kernel(a, fake, dim, eps).mean(1)


def field_energy(real: Tensor, fake: Tensor, dim: float = 3, eps: float = 1.0) -> Tensor:
    r"""$F = \frac12 \big( E_x \Phi(x) - E_y \Phi(y) \big)$ on samples, a scalar that is 0 only if the two sets are equal.

    Args:
        real: ``[n, m]``.
        fake: ``[k, m]``.
        dim: of the kernel.
        eps: of the kernel.

    Raises:
        ValueError: as :func:`potential`.
    """
    if 0 in (len(real), len(fake)):
        raise ValueError(f"expected at least one point of each kind, got {len(real)} real and {len(fake)} model points")
    rr, rf, ff = (plummer_kernel(a, b, dim, eps).mean() for a, b in ((real, real), (real, fake), (fake, fake)))
    return (rr - 2 * rf + ff) / 2


def make_anchors(real: Tensor, fake: Tensor, eps: float, generator: torch.Generator | None = None) -> Tensor:
    r"""Both kinds of points plus noise $N(0, \epsilon^2)$: where the discriminator learns the potential, ``[n + k, m]``.

    Args:
        real: ``[n, m]``.
        fake: ``[k, m]``.
        eps: standard deviation of the noise.
        generator: of the noise, on the CPU.

    Raises:
        ValueError: `eps` is not positive, or points of different dimension.
    """
    if not eps > 0:
        raise ValueError(f"eps must be positive, got {eps}")
    if real.shape[1:] != fake.shape[1:]:
        raise ValueError(f"points need equal shapes, got {tuple(real.shape)} and {tuple(fake.shape)}")
    points = torch.cat([real.detach(), fake.detach()])
    return points + eps * torch.randn(points.shape, generator=generator, dtype=points.dtype).to(points.device)


def coulomb_d_loss(D: Callable[[Tensor], Tensor], anchors: Tensor, real: Tensor, fake: Tensor, dim: float = 3, eps: float = 1.0) -> Tensor:
    r"""Regression of the potential, $\frac12 E_a (D(a) - \Phi(a))^2$; the target carries no gradient.

    Args:
        D: points to one value each, ``[n]`` or ``[n, 1]``.
        anchors: where to compare, from :func:`make_anchors`.
        real: attracting points.
        fake: repelling points.
        dim: of the kernel.
        eps: of the kernel.

    Raises:
        ValueError: D does not give one value a point, and what :func:`potential` raises.
    """
    with torch.no_grad():
        target = potential(anchors, real, fake, dim, eps)
    out = D(anchors)
    if out.numel() != len(target):
        raise ValueError(f"expected one value for each of the {len(target)} anchors, got shape {tuple(out.shape)}")
    return (out.reshape(-1) - target).square().mean() / 2


def coulomb_g_loss(D: Callable[[Tensor], Tensor], fake: Tensor) -> Tensor:
    r"""The generator climbs the learned potential: $-\frac12 E\, D(y)$.

    Args:
        D: the learned potential.
        fake: model points, with the graph of the generator.
    """
    return -D(fake).mean() / 2


class _InverseDistance(torch.autograd.Function):
    r"""$k_{ij} = (|a_i - b_j|^2 + \epsilon^2)^{-1/2}$ with its derivative $-k_{ij}^3 (a_i - b_j)$ by hand.

    Automatic differentiation fills several times as many matrices ``[n, k]``, and large ones cost more to allocate than to compute.
    """

    @staticmethod
    def forward(ctx, a: Tensor, b: Tensor, eps: float) -> Tensor:
        k = sq_dists(a, b).add_(eps**2).rsqrt_()
        ctx.save_for_backward(a, b, k)
        return k

    @staticmethod
    def backward(ctx, grad: Tensor):
        a, b, k = ctx.saved_tensors
        w = k**3 * grad
        to_a = w @ b - w.sum(1)[:, None] * a if ctx.needs_input_grad[0] else None
        to_b = w.T @ a - w.sum(0)[:, None] * b if ctx.needs_input_grad[1] else None
        return to_a, to_b, None
