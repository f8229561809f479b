r"""CT-GAN, a consistency term for Wasserstein critics (wei2018ctgan).

The gradient penalty looks at points between real and generated samples. Early in training these are far from the real data, so nothing holds the
critic back where it matters most, and with few images it learns them by heart. The consistency term is about the real data
themselves: with dropout in the critic, the same image is judged twice by two random subnetworks, and the two judgements must
agree. Two passes with different masks stand for two neighbouring points of the data's manifold.

Equations: let $D(x')$ and $D(x'')$ be the scores of two stochastic passes of a real $x$, and $D_{-}(\cdot)$ the second-to-last layer. Then

$$ \text{CT} = E \max\Big(0,\; (D(x') - D(x''))^2 + 0.1\, \operatorname{mean}_k\, (D_{-}(x')_k - D_{-}(x'')_k)^2 - M' \Big), $$

$$ L_D = E\, D(G(z)) - E\, D(x) + \lambda_1\, E\, (\lVert \nabla D(\hat x) \rVert - 1)^2 + \lambda_2\, \text{CT}, \qquad L_G = - E\, D(G(z)), $$

with $\lambda_1 = 10$, $\lambda_2 = 2$ and $\hat x$ on the lines between real and generated samples.

Deviations from the paper:

1. The distances are squared, as in the authors' programs; the text only says "a distance".
2. The margin $M'$ is taken from the term before the weight $\lambda_2$, as in the text; for the default margin 0 it makes no difference.
3. No semi-supervised classifier.

Later work: consistency between two *augmented* copies of an image (Zhang et al., 2020) took the place of consistency between dropout masks, and
for few images augmenting everything that the critic sees (Zhao et al., 2020; Karras et al., 2020) became the usual remedy.

Example:
    import torch
    from torch import nn
    from dlatlas.gans.consistency import consistency_term, ct_critic_loss

    class Critic(nn.Module):
        def __init__(self):
            super().__init__()
            hidden = [[nn.Linear(k, 128), nn.LeakyReLU(), nn.Dropout(0.5)] for k in (16, 128)]
            self.body, self.head = nn.Sequential(*hidden[0], *hidden[1]), nn.Linear(128, 1)

        def forward(self, x):
            features = self.body(x)
            return self.head(features), features

    real, new = torch.randn(2, 64, 16)  # few samples, and as many that the critic never sees
    for weight in (0.0, 2.0):
        critic = Critic()
        optimizer = torch.optim.Adam(critic.parameters(), 1e-3)
        for _ in range(150):
            fake = 1.2 * torch.randn(64, 16)
            loss, _ = ct_critic_loss(critic, real, fake, ct_weight=weight)  # the method
            optimizer.zero_grad(), loss.backward(), optimizer.step()
        apart = consistency_term(critic, real).item()
        gap = (critic.eval()(real)[0].mean() - critic(new)[0].mean()).item()
        print(f"weight {weight:.0f}: passes differ by {apart:.2f}, seen and new samples by {gap:.2f}")
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dlatlas.gans.lipschitz_penalty import lipschitz_penalty

__all__ = ["consistency_term", "ct_critic_loss"]

Critic = Callable[[Tensor], tuple[Tensor, Tensor]]


def consistency_term(critic: Critic, x: Tensor, margin: float = 0.0, feature_weight: float = 0.1) -> Tensor:
    r"""How much two stochastic passes of the same samples disagree, $E \max(0, \Delta^2 + 0.1\, \operatorname{mean}_k \delta_k^2 - M')$.

    A critic without dropout, or in evaluation mode, agrees with itself and gets 0.

    Args:
        critic: ``[B, ...]`` to scores ``[B]`` or ``[B, 1]`` and features ``[B, k]``.
        x: real samples ``[B, ...]``.
        margin: $M'$, disagreement that costs nothing.
        feature_weight: of the features beside the score.

    Raises:
        ValueError: a negative margin or weight, or a critic that does not return a pair of such shapes.
    """
    _check(margin=margin, feature_weight=feature_weight)
    return _disagreement(_judge(critic, x), _judge(critic, x), margin, feature_weight)


def ct_critic_loss(
    critic: Critic,
    real: Tensor,
    fake: Tensor,
    gp_weight: float = 10.0,
    ct_weight: float = 2.0,
    margin: float = 0.0,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, dict[str, float]]:
    r"""The critic's loss and its parts.

    Args:
        critic: as in :func:`consistency_term`, each sample by itself (no batch normalisation).
        real: ``[B, ...]``.
        fake: ``[B, ...]``.
        gp_weight: $\lambda_1$.
        ct_weight: $\lambda_2$.
        margin: $M'$.
        generator: of the interpolation; dropout uses the global one.

    Returns:
        The loss, and the floats "wasserstein" ($E\, D(G(z)) - E\, D(x)$), "gp" and "ct", so that the loss is
        ``wasserstein + gp_weight * gp + ct_weight * ct``. A "ct" of exactly 0 says that the critic has no dropout or is in evaluation mode.

    Raises:
        ValueError: a negative margin or weight, or a critic that does not return a pair.
    """
    _check(gp_weight=gp_weight, ct_weight=ct_weight, margin=margin)
    first, second = _judge(critic, real), _judge(critic, real)
    wasserstein = _judge(critic, fake)[0].mean() - first[0].mean()
    gp = lipschitz_penalty(lambda x: critic(x)[0], real, fake, one_sided=False, generator=generator)
    ct = _disagreement(first, second, margin, 0.1)
    loss = wasserstein + gp_weight * gp + ct_weight * ct
    return loss, {"wasserstein": wasserstein.item(), "gp": gp.item(), "ct": ct.item()}


def _judge(critic: Critic, x: Tensor) -> tuple[Tensor, Tensor]:
    out = critic(x)
    if not isinstance(out, tuple | list) or len(out) != 2:
        raise ValueError(f"the critic must return (scores, features), got {type(out).__name__}")
    score, features = out
    if score.numel() != len(x) or features.dim() != 2 or len(features) != len(x):
        raise ValueError(
            f"expected scores [{len(x)}] or [{len(x)}, 1] and features [{len(x)}, k], got {tuple(score.shape)}, {tuple(features.shape)}"
        )
    return score.reshape(-1), features


def _disagreement(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor], margin: float, feature_weight: float) -> Tensor:
    each = (a[0] - b[0]).square() + feature_weight * (a[1] - b[1]).square().mean(1)  # [B]
    return (each - margin).relu().mean()


def _check(**numbers: float) -> None:
    for name, value in numbers.items():
        if not value >= 0:
            raise ValueError(f"{name} must not be negative, got {value}")
