r"""The non-saturating GAN with gradient penalties (fedus2018many).

The textbook says that a GAN descends a divergence: given the best discriminator, the generator's loss is the Jensen-Shannon divergence, which is
flat when data and model lie on different sets, so nothing could be learned there. In practice the generator does learn. The loss that is used is not the
one of the theorem, and a trained discriminator is not the best one: it is smooth, and its slope points towards the data even
where the divergence has none. Penalties on that slope, invented for Wasserstein GANs, help the ordinary GAN as much.

Equations, with logits $r$ on real and $f$ on fake examples and $\mathrm{softplus}(t) = \log(1 + e^t)$:

$$ L_D = \mathrm{mean}\,\mathrm{softplus}(-r) + \mathrm{mean}\,\mathrm{softplus}(f), $$

$$ L_G^{minimax} = -\mathrm{mean}\,\mathrm{softplus}(f), \qquad L_G^{nonsaturating} = \mathrm{mean}\,\mathrm{softplus}(-f), $$

$$ R = \mathrm{mean}\, \big( |\nabla_{\hat x} D(\hat x)| - 1 \big)^2, \qquad
\hat x_{gp} = t\, x + (1 - t)\, G(z), \qquad \hat x_{dragan} = x + \tfrac12 \mathrm{std}(x)\, t\, u, $$

with one $t$ an example and one $u$ a feature, uniform in $[0, 1]$. Between two finite sets of points with weights $p$ and $q$,
$\mathrm{JS} = \frac12 \mathrm{KL}(p \| m) + \frac12 \mathrm{KL}(q \| m)$ with $m = (p + q) / 2$: it is $\log 2$ as soon as they share no point.

Deviations from the paper:

1. The penalty is taken of the discriminator's logit, not of its probability.
2. For DRAGAN the factor $t$ of an example multiplies all its features, as in the algorithm's published form.

Later work: Mescheder et al. (2018) show that a penalty on the slope at the data, towards 0 instead of 1, makes the game converge near the equilibrium; this
"R1" penalty on the non-saturating loss is what the StyleGAN family uses. Lucic et al. (2018) compare losses and penalties with equal budgets for
tuning and find none that is consistently better than this one.

Example:
    import torch
    from torch import nn
    from dlatlas.gans.many_paths import d_loss, g_loss, gradient_penalty

    for kind, weight in (("minimax", 0.0), ("nonsaturating", 0.0), ("minimax", 1.0)):
        shift = torch.zeros(2, requires_grad=True)  # the generator; the data are at (2, 2)
        D = nn.Sequential(nn.Linear(2, 64), nn.LeakyReLU(0.2), nn.Linear(64, 1))
        opt_g = torch.optim.SGD([shift], 0.2)
        opt_d = torch.optim.Adam(D.parameters(), 1e-2, betas=(0.5, 0.9))
        for _ in range(60):
            for _ in range(10):  # D is far ahead of G
                real, fake = 0.3 * torch.randn(64, 2) + 2, 0.3 * torch.randn(64, 2) + shift
                loss = d_loss(D(real), D(fake.detach()))
                if weight:  # the method: a penalty on the slope of D, or ...
                    loss = loss + weight * gradient_penalty(D, real, kind="dragan")
                opt_d.zero_grad(), loss.backward(), opt_d.step()
            loss = g_loss(D(fake), kind)  # ... a loss that does not saturate
            opt_g.zero_grad(), loss.backward(), opt_g.step()
        print(f"{kind} loss, penalty {weight:.0f}: G ends {(shift - 2).norm():.2f} from the data")
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import softplus

from dlatlas.gans.kit.gradients import gradient_norms, interpolates

__all__ = ["d_loss", "g_loss", "gradient_penalty", "js_divergence_points"]


def d_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """The discriminator's cross-entropy: the mean over real plus the mean over fake examples.

    Args:
        real_logits: any shape.
        fake_logits: any shape.
    """
    return softplus(-real_logits).mean() + softplus(fake_logits).mean()


def g_loss(fake_logits: Tensor, kind: str = "nonsaturating") -> Tensor:
    """The generator's loss; "minimax" is minus the discriminator's, "nonsaturating" swaps the label instead.

    The slope in a logit is ``-sigmoid(f)`` for "minimax", which dies where the discriminator is sure, and ``sigmoid(f) - 1`` for the other.

    Args:
        fake_logits: any shape.
        kind: "minimax" or "nonsaturating".

    Raises:
        ValueError: unknown kind.
    """
    if kind not in ("minimax", "nonsaturating"):
        raise ValueError(f"kind must be 'minimax' or 'nonsaturating', got {kind!r}")
    return -softplus(fake_logits).mean() if kind == "minimax" else softplus(-fake_logits).mean()


def gradient_penalty(
    D: Callable[[Tensor], Tensor], real: Tensor, fake: Tensor | None = None, kind: str = "gp", generator: torch.Generator | None = None
) -> Tensor:
    r"""$\mathrm{mean}\,(|\nabla D(\hat x)| - 1)^2$, a scalar without weight (the paper's is 10).

    Args:
        D: ``[B, ...]`` to logits ``[B]`` or ``[B, 1]``, each of its own example only.
        real: ``[B, ...]``.
        fake: ``[B, ...]``; needed for "gp".
        kind: "gp": between real and fake; "dragan": around the real examples.
        generator: of the draws, on the CPU.

    Raises:
        ValueError: unknown kind, or "gp" without fakes or with another number of them.
    """
    if kind == "gp":
        if fake is None:
            raise ValueError("kind 'gp' looks between real and fake examples; fake is missing")
        x = interpolates(real, fake, generator)
    elif kind == "dragan":
        real = real.detach()
        t, u = (torch.rand(shape, generator=generator, dtype=real.dtype).to(real.device) for shape in ((len(real),), real.shape))
        x = real + 0.5 * real.std() * t.view(-1, *[1] * (real.dim() - 1)) * u
    else:
        raise ValueError(f"kind must be 'gp' or 'dragan', got {kind!r}")
    return (gradient_norms(D, x) - 1).square().mean()


def js_divergence_points(real: Tensor, model: Tensor) -> float:
    r"""Jensen-Shannon divergence in nats of the uniform distributions on two finite sets of points ``[n, d]`` and ``[m, d]``.

    Points that occur several times count several times. Points are the same if they are equal to the last bit.

    Raises:
        ValueError: shapes that do not fit, or no points.
    """
    if real.dim() != 2 or model.dim() != 2 or real.shape[1] != model.shape[1] or 0 in (len(real), len(model)):
        raise ValueError(f"expected points [n, d] and [m, d], got {tuple(real.shape)} and {tuple(model.shape)}")
    points, place = torch.cat([real, model]).detach().unique(dim=0, return_inverse=True)
    p, q = (place_of.bincount(minlength=len(points)).double() / len(place_of) for place_of in place.split([len(real), len(model)]))
    m = (p + q) / 2
    js = (torch.special.xlogy(p, p / m) + torch.special.xlogy(q, q / m)).sum() / 2
    return min(max(float(js), 0.0), math.log(2))
