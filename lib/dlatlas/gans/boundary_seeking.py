r"""Boundary-seeking GAN: importance weights from the discriminator (hjelm2018boundary).

A generator of letters or of black-and-white pixels has no derivative with respect to its samples, so a discriminator's gradient cannot reach it. But the
discriminator knows more than a gradient: where it is optimal, its logit is the logarithm of the ratio of data to model. Weighted with this ratio, the generator's own
samples stand for samples of the data, and the generator can be fitted to them by maximum likelihood. At the optimum
every sample lies on the decision boundary, whence the name; for continuous samples one can ask for that directly.

Equations: let $F$ be the logit, $w = e^F = D / (1 - D)$, and $x_{1b}, \dots, x_{Mb}$ samples of the generator $g(\cdot \mid z_b)$ for the noise vector $z_b$, $b = 1, \dots, B$. Then

$$ \tilde w_{mb} = \frac{w_{mb}}{\sum_{m'} w_{m'b}}, \qquad L_G = - \frac1B \sum_b \sum_m \tilde w_{mb} \log g(x_{mb} \mid z_b) , $$

whose gradient tends to that of $KL(p_{data} \,\|\, g)$ as $M$ grows. The second form, REINFORCE, takes the logit as a reward with the mean as baseline,

$$ L_G = - \frac{1}{M B} \sum_{m, b} (F_{mb} - \bar F) \log g(x_{mb} \mid z_b) , $$

and follows $KL(g \,\|\, p_{data})$ instead. For continuous samples $L_G = \frac12 E (\log D - \log(1 - D))^2 = \frac12 E F^2$. No gradient runs through the weights.

Deviations from the paper:

1. The discriminator's $f$-divergence is that of Jensen and Shannon only, so that the ratio is the exponential of the logit.
2. The baseline of REINFORCE is the mean of the batch's logits, which costs a factor $1 - 1/(MB)$ in the mean of the gradient.

Later work: at the same time Che et al. (2017, MaliGAN) arrived at the same weights. De Masson d'Autume et al. (2019) train a language GAN from scratch with REINFORCE, large
batches and dense rewards. Caccia et al. (2020) show that text GANs of that time are no better than maximum likelihood
once quality and diversity are both measured. The Gumbel-softmax of Jang et al. (2017) and Maddison et al. (2017) is the other common way around the missing derivative.

Example:
    import torch
    from torch import nn
    from torch.nn.functional import one_hot, softplus
    from dlatlas.gans.boundary_seeking import discrete_g_loss

    letters, shares = "etaoin", torch.tensor([0.3, 0.22, 0.18, 0.15, 0.1, 0.05])
    theta = torch.zeros(6, requires_grad=True)  # the generator: its samples have no derivative
    D = nn.Linear(6, 1)
    opt_g, opt_d = torch.optim.Adam([theta], 0.02), torch.optim.Adam(D.parameters(), 0.05)
    for _ in range(500):
        log_g = theta.log_softmax(0)
        real, fake = (torch.multinomial(p, 128, True) for p in (shares, log_g.exp().detach()))
        logits = D(one_hot(fake, 6).float())  # [128, 1]
        loss = softplus(-D(one_hot(real, 6).float())).mean() + softplus(logits).mean()
        opt_d.zero_grad(), loss.backward(), opt_d.step()
        loss = discrete_g_loss(log_g[fake][:, None], logits)  # the method: logits become weights
        opt_g.zero_grad(), loss.backward(), opt_g.step()
    for letter, p, q in zip(letters, shares, theta.softmax(0)):
        print(f"{letter}: data {p:.2f}, generator {q:.2f} (at the start 0.17)")
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

__all__ = ["continuous_g_loss", "discrete_g_loss", "normalized_weights"]


def normalized_weights(logits: Tensor) -> Tensor:
    r"""Importance weights $\tilde w_{mb} = e^{F_{mb}} / \sum_{m'} e^{F_{m'b}}$ ``[M, B]``, without gradient.

    Args:
        logits: the discriminator's logits $F$ ``[M, B]`` at M samples for each of B noise vectors.

    Raises:
        ValueError: not a matrix.
    """
    if logits.dim() != 2 or 0 in logits.shape:
        raise ValueError(f"expected logits [M, B], got {tuple(logits.shape)}")
    return logits.detach().softmax(0)


def discrete_g_loss(log_prob: Tensor, logits: Tensor, kind: Literal["importance", "reinforce"] = "importance") -> Tensor:
    r"""The generator's loss for samples without derivative.

    Args:
        log_prob: $\log g(x_{mb} \mid z_b)$ ``[M, B]`` with the generator's graph.
        logits: the discriminator's logits at the same samples ``[M, B]``; no gradient runs through them.
        kind: "importance", $-\frac1B \sum_b \sum_m \tilde w_{mb} \log g$, or "reinforce", $-\frac{1}{MB} \sum (F - \bar F) \log g$.

    Raises:
        ValueError: shapes that differ, fewer than two samples a noise vector for "importance" (a single weight is always 1), or an
            unknown kind.
    """
    if log_prob.dim() != 2 or log_prob.shape != logits.shape or 0 in logits.shape:
        raise ValueError(f"expected log_prob and logits of one shape [M, B], got {tuple(log_prob.shape)} and {tuple(logits.shape)}")
    if kind == "importance":
        if len(logits) < 2:
            raise ValueError(f"importance weights need M >= 2 samples for each noise vector, got M={len(logits)}")
        return -(normalized_weights(logits) * log_prob).sum(0).mean()
    if kind == "reinforce":
        reward = logits.detach()
        return -((reward - reward.mean()) * log_prob).mean()
    raise ValueError(f"kind must be 'importance' or 'reinforce', got {kind!r}")


def continuous_g_loss(logits: Tensor) -> Tensor:
    r"""Distance from the decision boundary, $\frac12 E F^2$, for samples that have a derivative.

    It pulls from both sides: samples that the discriminator takes for *too* real ($F > 0$) are drawn back as well.

    Args:
        logits: the discriminator's logits at generated samples ``[B]`` or ``[B, 1]``, with their graph.

    Raises:
        ValueError: an empty batch.
    """
    if logits.numel() == 0:
        raise ValueError(f"expected logits [B] with B >= 1, got {tuple(logits.shape)}")
    return logits.square().mean() / 2
