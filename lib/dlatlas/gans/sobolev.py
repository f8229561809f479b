r"""Sobolev GAN (mroueh2018sobolev).

The Wasserstein critic may be at most 1 steep *everywhere*. The Sobolev critic may be steep somewhere if it is flat elsewhere: its mean squared
slope over a measure $\mu$ is at most 1. What such a critic can gain is a distance between cumulative distribution functions, weighted by $1 / \mu$, and
in more than one dimension between *conditional* ones, coordinate by coordinate given the others. With
$\mu$ the average of real and generated data, the constraint is an average over samples and needs no points in between.

Equations:

$$ S_\mu(P, Q) = \sup_f \big\{ E_P f - E_Q f : E_\mu \lVert \nabla f \rVert^2 \le 1,\; f = 0 \text{ on the boundary} \big\}, $$

and on the line

$$ S_\mu(P, Q) = \sqrt{\int \frac{(F_P - F_Q)^2}{\mu}\, dx}, \qquad f'(x) = \frac{F_Q(x) - F_P(x)}{\mu(x)\, S_\mu} . $$

A network is trained with $\mu = (P + Q) / 2$ and the augmented Lagrangian

$$ \Omega(f) = \tfrac12 E_P \lVert \nabla f \rVert^2 + \tfrac12 E_Q \lVert \nabla f \rVert^2, \qquad
   \max_f\; E_P f - E_Q f + \lambda (1 - \Omega) - \tfrac{\rho}{2} (1 - \Omega)^2, \qquad \lambda \leftarrow \lambda - \rho (1 - \Omega) . $$

Deviations from the paper:

1. The condition on the boundary is not imposed on a network; it only fixes the constant that cancels in $E_P f - E_Q f$.
2. No convolutional and recurrent critics for text; the loss takes any critic.

Later work: Mroueh, Sercu and Raj (2019) let samples flow along the gradient of the witness without a generator (Sobolev descent), and Mroueh and
Rigotti (2020) add growth and decay of mass. Among GANs the average constraint stayed rare beside pointwise penalties.

Example:
    import torch
    from torch import nn
    from dlatlas.gans.sobolev import SobolevLoss, sobolev_ipm_1d

    P, Q = (torch.distributions.Normal(mean, 1.0) for mean in (0.5, -0.5))
    hidden = [nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh()]
    critic = nn.Sequential(*hidden, nn.Linear(32, 1))
    optimizer = torch.optim.Adam(critic.parameters(), 2e-3, betas=(0.5, 0.9))
    method = SobolevLoss(rho=0.1)  # the method: a multiplier for the mean squared slope
    for step in range(401):
        real, fake = P.sample((512, 1)), Q.sample((512, 1))
        loss, omega = method.critic_loss(critic, real, fake)
        optimizer.zero_grad(), loss.backward(), optimizer.step()
        method.update(omega)
        if step % 100 == 0:
            gain = critic(real).mean() - critic(fake).mean()
            print(f"step {step}: mean squared slope {omega:.2f}, difference of means {gain:.2f}")
    x = torch.linspace(-8, 8, 2001).double()
    mu = (P.log_prob(x).exp() + Q.log_prob(x).exp()) / 2
    print(f"closed form: 1.00 and {sobolev_ipm_1d(P.cdf(x), Q.cdf(x), mu, 16 / 2000):.2f}")
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from dlatlas.gans.kit.gradients import input_gradients

__all__ = ["SobolevLoss", "sobolev_constraint", "sobolev_ipm_1d"]

Critic = Callable[[Tensor], Tensor]


def sobolev_ipm_1d(cdf_p: Tensor, cdf_q: Tensor, mu: Tensor, dx: float) -> float:
    r"""The distance $\sqrt{\int (F_P - F_Q)^2 / \mu\; dx}$ by a sum over an even grid.

    Args:
        cdf_p: $F_P$ on the grid ``[n]``.
        cdf_q: $F_Q$ ``[n]``.
        mu: density of $\mu$ ``[n]``.
        dx: step of the grid.

    Raises:
        ValueError: shapes that differ, `dx` not positive, or a density that is not positive where the two functions differ: there the
            distance is infinite, and no small constant would make it a number that means something.
    """
    if cdf_p.dim() != 1 or cdf_p.shape != cdf_q.shape or cdf_p.shape != mu.shape:
        raise ValueError(f"expected three tensors [n], got {tuple(cdf_p.shape)}, {tuple(cdf_q.shape)}, {tuple(mu.shape)}")
    if not dx > 0:
        raise ValueError(f"dx must be positive, got {dx}")
    differ = cdf_p != cdf_q
    bad = differ & ~(mu > 0)
    if bad.any():
        raise ValueError(
            f"mu must be positive wherever the distribution functions differ, got {float(mu[bad][0])} at {int(bad.sum())} points"
        )
    return float(((cdf_p - cdf_q)[differ].double().square() / mu[differ].double()).sum().mul(dx).sqrt())


def sobolev_constraint(critic: Critic, real: Tensor, fake: Tensor) -> Tensor:
    r"""Mean squared slope $\Omega = \tfrac12 E_P \lVert \nabla f \rVert^2 + \tfrac12 E_Q \lVert \nabla f \rVert^2$, with its graph.

    Args:
        critic: ``[B, ...]`` to ``[B]`` or ``[B, 1]``, each sample by itself.
        real: ``[N, ...]``.
        fake: ``[M, ...]``.

    Raises:
        ValueError: not one score a sample.
    """
    return sum(input_gradients(critic, x).flatten(1).square().sum(1).mean() for x in (real, fake)) / 2


class SobolevLoss:
    r"""The augmented Lagrangian with its multiplier.

    Call :meth:`critic_loss`, step the critic, then :meth:`update` with the returned $\Omega$. The generator minimises $-E\, f(G(z))$.

    Args:
        rho: $\rho$, weight of the quadratic term and step of the multiplier. The size of $\Omega - 1$ times $\rho$ is what $\lambda$ moves in an update.
        lam: $\lambda$ at the start; afterwards the attribute `lam`.

    Raises:
        ValueError: `rho` is not positive.
    """

    def __init__(self, rho: float = 1e-4, lam: float = 0.0):
        if not rho > 0:
            raise ValueError(f"rho must be positive, got {rho}")
        self.rho, self.lam = rho, lam

    def critic_loss(self, critic: Critic, real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
        r"""Minus the augmented Lagrangian, and $\Omega$ without its graph."""
        seen = []  # the scores of the real and the generated samples, read on the way: a second pass would cost as much as the first
        omega = sobolev_constraint(lambda x: seen.append(critic(x)) or seen[-1], real, fake)
        gain = seen[0].mean() - seen[1].mean()
        return -(gain + self.lam * (1 - omega) - self.rho / 2 * (1 - omega).square()), omega.detach()

    def update(self, omega: Tensor | float) -> None:
        r"""$\lambda \leftarrow \lambda - \rho (1 - \Omega)$: the multiplier grows while the critic is too steep and falls while it is not."""
        self.lam -= self.rho * (1 - float(omega))
