r"""WGAN-LP, the one-sided gradient penalty (petzka2018regularization).

A Wasserstein critic should be steep, but never steeper than 1. The usual gradient penalty pulls the length of its gradient towards 1 from both
sides, at points between random real and generated samples. The optimal critic has slope 1 on the line between a real and a generated point if
optimal transport *couples* these two; a random pair is not coupled, and on its line slopes below 1 are right. Pushing them up to 1 fights
against the very objective. So only what is above 1 is penalised.

Equations: at points $\hat x$,

$$ \text{LP} = E \max(0, \lVert \nabla D(\hat x) \rVert - 1)^2, \qquad \text{GP} = E\, (\lVert \nabla D(\hat x) \rVert - 1)^2, $$

the norm over all features of one sample, with $\hat x = t\, x + (1 - t)\, y$ for a real $x$, a generated $y$ and one $t \sim U(0, 1)$ a pair
("interpolate"), or with the samples of both sets, moved by uniform noise times the spread of their set ("perturb"). The critic minimises

$$ L_D = E\, D(y) - E\, D(x) + \lambda\, \text{LP} . $$

Deviations from the paper:

1. The norm is $\sqrt{\sum g_i^2 + 10^{-12}}$, so that a flat critic has a finite gradient.
2. One default weight, $\lambda = 5$; the paper varies it from experiment to experiment.

Later work: in the large comparison of Lucic et al. (2018) no loss or penalty was best on all data once each was tuned, and Mescheder et al.
(2018) show an example where neither penalty at slope 1 converges while a penalty towards slope 0 at the data does. Stanczuk et al. (2021) find
that critics trained in practice estimate the Wasserstein distance badly, and that better estimates do not give better pictures.

Example:
    import torch
    from torch import nn
    from dlatlas.gans.lipschitz_penalty import lipschitz_penalty

    fake = 0.5 * torch.randn(128, 2)
    real = fake + torch.tensor([1.5, 2.0])  # so the Wasserstein distance is 2.5
    ways = {"no": (0, True), "two-sided": (100, False), "one-sided": (100, True)}
    for name, (weight, one_sided) in ways.items():
        hidden = [nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU()]
        critic, estimates = nn.Sequential(*hidden, nn.Linear(64, 1)), []
        optimizer = torch.optim.Adam(critic.parameters(), 1e-3, betas=(0.5, 0.9))
        for step in range(201):
            gain = critic(real).mean() - critic(fake).mean()
            other = real[torch.randperm(128)]
            loss = weight * lipschitz_penalty(critic, other, fake, one_sided) - gain  # the method
            optimizer.zero_grad(), loss.backward(), optimizer.step()
            if step % 50 == 0:
                estimates.append(round(gain.item(), 2))
        print(f"{name} penalty, estimated distance every 50 steps: {estimates}")
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dlatlas.gans.kit.gradients import gradient_norms, interpolates

__all__ = ["lipschitz_penalty", "wgan_lp_loss"]

Critic = Callable[[Tensor], Tensor]


def lipschitz_penalty(
    critic: Critic,
    real: Tensor,
    fake: Tensor,
    one_sided: bool = True,
    sampling: str = "interpolate",
    noise: float = 0.5,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Mean squared excess of the critic's slope over 1, without a weight.

    Args:
        critic: ``[B, ...]`` to ``[B]`` or ``[B, 1]``, each sample by itself (no batch normalisation).
        real: ``[B, ...]``.
        fake: ``[B, ...]``; for "perturb" the numbers may differ.
        one_sided: True punishes only slopes above 1 (LP), False also those below (GP).
        sampling: "interpolate" or "perturb".
        noise: of "perturb", in standard deviations of the set.
        generator: of the random places, on the CPU.

    Raises:
        ValueError: sets that do not fit, an unknown `sampling` or negative `noise`.
    """
    if real.shape[1:] != fake.shape[1:] or not len(real) or not len(fake):
        raise ValueError(f"expected samples of one shape, got {tuple(real.shape)} and {tuple(fake.shape)}")
    real, fake = real.detach(), fake.detach()
    if sampling == "interpolate":
        if len(real) != len(fake):
            raise ValueError(f"interpolation pairs real with fake samples, got shapes {tuple(real.shape)} and {tuple(fake.shape)}")
        x = interpolates(real, fake, generator)
    elif sampling == "perturb":
        if not noise >= 0:
            raise ValueError(f"noise must not be negative, got {noise}")
        x = torch.cat([_moved(s, noise, generator) for s in (real, fake)])
    else:
        raise ValueError(f"unknown sampling {sampling!r}; expected 'interpolate' or 'perturb'")
    excess = gradient_norms(critic, x) - 1  # [B]
    return (excess.relu() if one_sided else excess).square().mean()


def wgan_lp_loss(
    critic: Critic, real: Tensor, fake: Tensor, weight: float = 5.0, one_sided: bool = True, generator: torch.Generator | None = None
) -> Tensor:
    r"""The critic's loss $E\, D(y) - E\, D(x) + \lambda\, \text{LP}$ on interpolates; the generator's is $-E\, D(G(z))$.

    Args:
        critic: as in :func:`lipschitz_penalty`.
        real: ``[B, ...]``.
        fake: ``[B, ...]``.
        weight: $\lambda$.
        one_sided: False for the two-sided penalty of WGAN-GP.
        generator: of the random places.

    Raises:
        ValueError: a negative weight, or sets that do not fit.
    """
    if not weight >= 0:
        raise ValueError(f"weight must not be negative, got {weight}")
    return critic(fake).mean() - critic(real).mean() + weight * lipschitz_penalty(critic, real, fake, one_sided, generator=generator)


def _moved(samples: Tensor, noise: float, generator: torch.Generator | None) -> Tensor:
    """Samples plus uniform noise in units of the standard deviation of all their numbers."""
    u = torch.rand(samples.shape, generator=generator, dtype=samples.dtype).to(samples.device)
    return samples + noise * samples.std(correction=0) * u
