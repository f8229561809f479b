r"""Distributional adversarial networks: judge a sample as a set (li2018distributional).

A usual discriminator looks at one example at a time, and so it cannot notice that all of them are the same. Here the discriminator gets a whole
set, averages features of its members, and classifies the average. An example's gradient then depends on what the others do: a set with too
many samples of one kind is told so. One variant asks whether a set is real, the other compares two sets and asks whether they
come from the same distribution.

Equations: for a set $X = \{x_1, \dots, x_n\}$, features $\phi$ and a small network $\psi$,

$$ \eta(X) = \frac1n \sum_i \phi(x_i), \qquad M_S(X) = \sigma(\psi(\eta(X))), \qquad M_{2S}(X, Y) = \sigma(\psi(|\eta(X) - \eta(Y)|)) , $$

with the absolute value taken element by element. With real sets $X, X'$ and model sets $Y, Y'$ the discriminators minimise

$$ L_S = - \log M_S(X) - \log(1 - M_S(Y)), $$

$$ L_{2S} = - \tfrac12 \big[ \log M_{2S}(X, X') + \log M_{2S}(Y, Y') \big] - \tfrac12 \big[ \log(1 - M_{2S}(X, Y)) + \log(1 - M_{2S}(X', Y')) \big] . $$

The generator minimises $- \log M_S(Y)$ or $- \log M_{2S}(X, Y)$, in addition to the loss of a discriminator of single examples.

Deviations from the paper:

1. The discriminators return logits; the sigmoid is in the losses.
2. The pairs of different kind are $(X, Y)$ and $(X', Y')$, two of the four that one could form.
3. The paper's second use, domain adaptation, is not here.

Later work: Zaheer et al. (2017) had shown that a sum of features followed by a network represents every function of a set. PacGAN (Lin et al., 2018) hands
the discriminator a few examples side by side and proves that this punishes lost modes. Minibatch discrimination (Salimans et al., 2016) and the
standard deviation over the mini-batch (Karras et al., 2018) are lighter forms of the idea; the last one is still part of StyleGAN.

Example:
    import torch
    from torch import nn
    from dlatlas.gans.distributional import DeepMeanEncoder, SampleDiscriminator
    from dlatlas.gans.distributional import dan_g_loss, dan_s_loss

    def sets(shares):  # of 32 points each; this share of them is around -1, the others around 1
        side = torch.where(torch.rand(len(shares), 32, 1) < shares[:, None, None], -1.0, 1.0)
        return side + 0.3 * torch.randn_like(side)

    features = nn.Sequential(nn.Linear(1, 32), nn.LeakyReLU(0.2), nn.Linear(32, 32))
    of_sets = SampleDiscriminator(DeepMeanEncoder(features), k=32)  # the method
    of_points = nn.Sequential(nn.Linear(1, 32), nn.LeakyReLU(0.2), nn.Linear(32, 1))
    optimizer = torch.optim.Adam([*of_sets.parameters(), *of_points.parameters()], 3e-3)
    for _ in range(300):
        real = sets(torch.full((16,), 0.5))
        fake = sets(torch.randint(2, (16,)).float())  # each batch is on one side only
        losses = [dan_s_loss(disc, real, fake) for disc in (of_points, of_sets)]
        optimizer.zero_grad(), sum(losses).backward(), optimizer.step()
    print(f"loss of a judge of points {losses[0]:.3f}, of sets {losses[1]:.3f} (chance: 1.386)")
    for share in (0.9, 0.1):
        fake = sets(torch.tensor([share])).requires_grad_()
        (slope,) = torch.autograd.grad(dan_g_loss(of_sets, fake), fake)
        print(f"{share:.0%} on the left: the set pushes its points by {-slope.mean():+.2f}")
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from dlatlas.gans.kit.nets import mlp

__all__ = ["DeepMeanEncoder", "SampleDiscriminator", "TwoSampleDiscriminator", "dan_2s_loss", "dan_g_loss", "dan_s_loss"]


class DeepMeanEncoder(nn.Module):
    r"""Mean of the features of a set, $\eta(X) = \frac1n \sum_i \phi(x_i)$.

    The order of the members does not matter, nor does their number: train and use it with sets of one size.

    Args:
        phi: examples ``[N, d]`` to features ``[N, k]``.
    """

    def __init__(self, phi: nn.Module):
        super().__init__()
        self.phi = phi

    def forward(self, x: Tensor) -> Tensor:
        """Mean features ``[k]`` of a set ``[n, d]``, or ``[b, k]`` of sets ``[b, n, d]``.

        Raises:
            ValueError: another number of axes, or an empty set.
        """
        if x.dim() not in (2, 3) or 0 in x.shape[:-1]:
            raise ValueError(f"expected a set [n, d] or sets [b, n, d] with at least one member, got {tuple(x.shape)}")
        features = self.phi(x.flatten(0, -2))  # [b * n, k]
        return features.unflatten(0, x.shape[:-1]).mean(-2)


class SampleDiscriminator(nn.Module):
    r"""DAN-S: the logit $\psi(\eta(X))$ of a set being real.

    Args:
        encoder: $\eta$, sets to features of size `k`.
        k: size of the features.
        hidden: units of the hidden layer of $\psi$.
    """

    def __init__(self, encoder: nn.Module, k: int, hidden: int = 64):
        super().__init__()
        self.encoder, self.psi = encoder, mlp([k, hidden, 1])

    def forward(self, x: Tensor) -> Tensor:
        """Logit ``[]`` of a set ``[n, d]``, or logits ``[b]`` of sets ``[b, n, d]``."""
        return self.psi(self.encoder(x)).squeeze(-1)


class TwoSampleDiscriminator(nn.Module):
    r"""DAN-2S: the logit $\psi(|\eta(X) - \eta(Y)|)$ of two sets coming from one distribution; the order of the two does not matter.

    Args:
        encoder: $\eta$, sets to features of size `k`.
        k: size of the features.
        hidden: units of the hidden layer of $\psi$.
    """

    def __init__(self, encoder: nn.Module, k: int, hidden: int = 64):
        super().__init__()
        self.encoder, self.psi = encoder, mlp([k, hidden, 1])

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Logit ``[]`` of two sets ``[n, d]``, or logits ``[b]`` of pairs of sets ``[b, n, d]``.

        Raises:
            ValueError: one set against many.
        """
        if x.dim() != y.dim() or (x.dim() == 3 and len(x) != len(y)):
            raise ValueError(f"expected two sets or equally many of both, got {tuple(x.shape)} and {tuple(y.shape)}")
        return self.psi((self.encoder(x) - self.encoder(y)).abs()).squeeze(-1)


def dan_s_loss(disc: nn.Module, real: Tensor, fake: Tensor) -> Tensor:
    r"""$-\log M_S(X) - \log(1 - M_S(Y))$, the mean over sets if there are several.

    Args:
        disc: a :class:`SampleDiscriminator`.
        real: a set ``[n, d]`` or sets ``[b, n, d]``.
        fake: likewise.
    """
    return softplus(-disc(real)).mean() + softplus(disc(fake)).mean()


def dan_2s_loss(disc: nn.Module, real: Tensor, real2: Tensor, fake: Tensor, fake2: Tensor) -> Tensor:
    r"""Pairs of one kind against pairs of different kinds, each half of the loss being a mean of two terms.

    Args:
        disc: a :class:`TwoSampleDiscriminator`.
        real: a set ``[n, d]`` or sets ``[b, n, d]``.
        real2: independent of `real`.
        fake: likewise, from the model.
        fake2: independent of `fake`.
    """
    same = torch.stack([softplus(-disc(real, real2)), softplus(-disc(fake, fake2))])
    different = torch.stack([softplus(disc(real, fake)), softplus(disc(real2, fake2))])
    return same.mean() + different.mean()


def dan_g_loss(disc: nn.Module, fake: Tensor, real: Tensor | None = None) -> Tensor:
    r"""The generator's part: $-\log M_S(Y)$, or $-\log M_{2S}(X, Y)$ where a real set is given.

    Args:
        disc: a :class:`SampleDiscriminator`, or a :class:`TwoSampleDiscriminator` where `real` is given.
        fake: a set ``[n, d]`` or sets ``[b, n, d]`` with the generator's graph.
        real: None, or a real set to be compared with.
    """
    return softplus(-(disc(fake) if real is None else disc(real, fake))).mean()
