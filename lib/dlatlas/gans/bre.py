r"""Binarized representation entropy (cao2018bre).

A critic of rectifiers is linear between the kinks of its units; the signs of the pre-activations name the linear piece that a point lies in. If all
samples share a few sign patterns, the critic is one flat piece over much of the space, and the generator gets the same direction everywhere. The
regulariser asks for patterns of high joint entropy: each unit should be on for half of the samples, and two samples should agree in about
half of the units.

Equations: the pre-activations $h$ of a layer with $d$ units, for $B$ samples, become soft signs

$$ a = \frac{h}{|h| + \epsilon\, \operatorname{mean} |h|}, $$

the mean over the whole batch and without gradient. With $a_{bk}$ the sign of unit $k$ on sample $b$,

$$ \text{ME} = \frac1d \sum_k \Big( \frac1B \sum_b a_{bk} \Big)^2, \qquad
   \text{AC} = \frac{1}{B^2} \sum_{b \ne c} \max\Big(0, \Big| \frac1d \sum_k a_{bk} a_{ck} \Big| - \frac{s}{\sqrt d} \Big) . $$

Independent fair signs have correlations of size $1 / \sqrt d$ by chance, which the threshold leaves alone. Both terms are averaged over layers and
added to the critic's loss, on a mix of real, generated and interpolated samples.

Deviations from the paper:

1. The correlations are averaged over all $B^2$ pairs, the diagonal counted as zero, as in the authors' program, not over $B (B - 1)$.
2. Where all pre-activations are zero the soft signs are zero.

Later work: Hanin and Rolnick (2019) measure that trained rectifier networks have about as many linear regions as at the start of training, and
far fewer than would be possible. The large comparison of critics' regularisers by Kurach et al. (2019) did not include this one.

Example:
    import torch
    from torch import nn
    from torch.nn.functional import softplus
    from dlatlas.gans.bre import bre

    def hidden(critic, x):  # the pre-activations of both hidden layers
        first = critic[0](x)
        return first, critic[2](first.relu())

    for weight in (0.0, 1.0):
        layers = [nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 1)]
        critic = nn.Sequential(*layers)
        optimizer = torch.optim.Adam(critic.parameters(), 1e-3)
        for _ in range(300):
            real, fake = 0.3 * torch.randn(64, 2) + 1, 0.3 * torch.randn(64, 2) - 1
            loss = softplus(-critic(real)).mean() + softplus(critic(fake)).mean()
            loss = loss + weight * bre(hidden(critic, torch.cat([real, fake])))  # the method
            optimizer.zero_grad(), loss.backward(), optimizer.step()
        signs = torch.cat([h > 0 for h in hidden(critic, torch.cat([real, fake]))], 1)
        pieces = len(signs.unique(dim=0))
        print(f"weight {weight:.0f}: the 128 samples lie on {pieces} linear pieces")
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["binarize", "bre", "correlation_term", "marginal_term"]


def binarize(h: Tensor, eps: float = 1e-3) -> Tensor:
    r"""Soft signs $h / (|h| + \epsilon\, \operatorname{mean} |h|)$ in (-1, 1); multiplying all of `h` by a positive number changes nothing.

    Args:
        h: pre-activations ``[B, ...]``. Outputs of a rectifier will not do, they are never negative.
        eps: $\epsilon$; smaller is closer to the sign and has smaller gradients.

    Raises:
        ValueError: `eps` is not positive.
    """
    if not eps > 0:
        raise ValueError(f"eps must be positive, got {eps}")
    scale = eps * h.detach().abs().mean()
    return h / (h.abs() + torch.where(scale > 0, scale, torch.ones_like(scale)))


def marginal_term(h: Tensor, eps: float = 1e-3) -> Tensor:
    """ME: the mean over units of the squared mean sign, 0 when each unit is on for half of the samples.

    Args:
        h: pre-activations ``[B, ...]``.
        eps: of :func:`binarize`.

    Raises:
        ValueError: fewer than two samples.
    """
    return _codes(h, eps).mean(0).square().mean()


def correlation_term(h: Tensor, eps: float = 1e-3, s: float = 3.0) -> Tensor:
    """AC: how much the sign patterns of two samples agree or disagree beyond chance, on average over all pairs.

    Args:
        h: pre-activations ``[B, ...]``.
        eps: of :func:`binarize`.
        s: how many standard deviations of a chance correlation are free.

    Raises:
        ValueError: fewer than two samples, or `s` below 1.
    """
    if not s >= 1:
        raise ValueError(f"s must be at least 1, got {s}")
    a = _codes(h, eps)  # [B, d]
    B, d = a.shape
    excess = ((a @ a.T / d).abs() - s / math.sqrt(d)).relu()  # [B, B]
    return (excess.sum() - excess.diagonal().sum()) / B**2


def bre(hs: Sequence[Tensor], eps: float = 1e-3, s: float = 3.0) -> Tensor:
    """The regulariser: ME plus AC, each averaged over the given layers.

    Args:
        hs: pre-activations ``[B, ...]`` of one or more layers.
        eps: of :func:`binarize`.
        s: of :func:`correlation_term`.

    Raises:
        ValueError: no layer, fewer than two samples, or `s` below 1.
    """
    if len(hs) == 0:
        raise ValueError("expected the pre-activations of at least one layer, got none")
    return torch.stack([marginal_term(h, eps) + correlation_term(h, eps, s) for h in hs]).mean()


def _codes(h: Tensor, eps: float) -> Tensor:
    if h.dim() < 2 or len(h) < 2:
        raise ValueError(f"expected pre-activations [B, ...] of at least two samples, got {tuple(h.shape)}")
    return binarize(h, eps).flatten(1)  # [B, d]
