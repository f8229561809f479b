r"""Fraternal dropout (zolna2018fraternal).

A network with dropout is a crowd of networks with shared weights; at test time one without dropout stands in for them all. The more its
members disagree, the worse that approximation. Fraternal dropout makes them agree: each example passes twice, with two independent masks, both passes are
trained on the target, and the squared difference of their outputs before the softmax costs a little.

Equations:

With logits $p(m)$ under the mask $m$ and two masks $m, m'$ a step,

$$ \ell = \tfrac12 \left( \operatorname{CE}(p(m)) + \operatorname{CE}(p(m')) \right) + \kappa \operatorname{mean}((p(m) - p(m'))^2) , $$

a mean over steps and units; the gradient flows through both passes. What the penalty measures is a variance, and twice the smallest mean square
distance to any fixed output:

$$ E \lVert p(m) - p(m') \rVert^2 = 2 \operatorname{tr} \operatorname{Cov} p(m) \le 2 E \lVert p(m) - p(E m) \rVert^2 . $$

The right-hand side, up to the factor, is the penalty of expectation-linear dropout, which compares with the network without dropout. The paper
states the bound with the factor 4; 2 is tight, as for a linear network $E p(m) = p(E m)$.

Deviations from the paper:

1. The loss takes the logits of the two passes; the paper's application is an AWD-LSTM, where a pass is a window of text.
2. `expectation_linear_penalty` is here to compare, with the network in evaluation mode as the expected mask.

Later work: R-Drop (Liang et al. 2021) keeps the two passes and compares the two distributions by a symmetric Kullback-Leibler divergence, with
larger gains, on transformers. Consistency between two perturbed passes is also the core of semi-supervised learning (the Pi-model of Laine and
Aila 2017, which stops the gradient of one branch) and of self-supervised learning with two views of an image.

Example:
    import torch
    from torch import nn
    from dlatlas.nlp.fraternal import fraternal_loss, fraternal_penalty

    x, centres = torch.randn(1100, 20), 1.2 * torch.randn(5, 20)
    y = (x @ centres.T + 2 * torch.randn(1100, 5)).argmax(1)
    for kappa in (0.0, 0.1):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(20, 128), nn.ReLU(), nn.Dropout(0.5), nn.Linear(128, 5))
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        for step in range(300):
            # the method: two passes with two masks, and what it costs that they differ
            loss = fraternal_loss(model(x[:100]), model(x[:100]), y[:100], kappa=kappa)
            optimizer.zero_grad()
            loss["total"].backward()
            optimizer.step()
        with torch.no_grad():
            apart = fraternal_penalty(model, x[100:], 10)
            test = nn.functional.cross_entropy(model.eval()(x[100:]), y[100:])
        print(f"kappa {kappa}: two masks are {apart:.2f} apart, test loss {test:.3f}")
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

__all__ = ["expectation_linear_penalty", "fraternal_loss", "fraternal_penalty"]


def fraternal_loss(
    logits_a: Tensor, logits_b: Tensor, targets: Tensor, kappa: float = 0.1, mask: Tensor | None = None
) -> dict[str, Tensor]:
    r"""$\frac12 (\operatorname{CE}_a + \operatorname{CE}_b) + \kappa \operatorname{mean}((p_a - p_b)^2)$.

    Args:
        logits_a: of one pass ``[..., V]``, such as ``[B, T, V]``.
        logits_b: of another with an independent mask.
        targets: classes ``[...]``, int64.
        kappa: weight of the penalty, not negative.
        mask: ``[...]`` bool, True for what counts; None: all.

    Returns:
        scalars `total`, `ce` (mean of the two) and `penalty` (without `kappa`).

    Raises:
        ValueError: shapes that do not match, a negative kappa, or a mask without a single True.
    """
    if logits_a.shape != logits_b.shape or logits_a.dim() < 2 or targets.shape != logits_a.shape[:-1]:
        raise ValueError(
            f"expected twice logits [..., V] and targets [...], got {tuple(logits_a.shape)}, {tuple(logits_b.shape)} and {tuple(targets.shape)}"
        )
    if not kappa >= 0:
        raise ValueError(f"kappa must not be negative, got {kappa}")
    if mask is not None:
        if mask.shape != targets.shape or mask.dtype != torch.bool or not mask.any():
            raise ValueError(f"expected a bool mask {tuple(targets.shape)} with a True, got {mask.dtype} {tuple(mask.shape)}")
        logits_a, logits_b, targets = logits_a[mask], logits_b[mask], targets[mask]
    a, b, y = logits_a.flatten(0, -2), logits_b.flatten(0, -2), targets.flatten()
    ce = (cross_entropy(a, y) + cross_entropy(b, y)) / 2
    penalty = (a - b).square().mean()
    return {"total": ce + kappa * penalty, "ce": ce, "penalty": penalty}


def fraternal_penalty(model: nn.Module, x: Tensor, n_samples: int) -> Tensor:
    r"""$E \lVert p(m) - p(m') \rVert^2$, mean over inputs, summed over units, from `n_samples` independent pairs of masks.

    Args:
        model: has dropout; it is run in training mode, and its mode is put back.
        x: inputs ``[N, ...]``; the output is ``[N, ..., V]``.
        n_samples: pairs of passes.

    Raises:
        ValueError: n_samples < 1.
    """
    return _mean_square(model, x, n_samples, lambda: _run(model, x, training=True))


def expectation_linear_penalty(model: nn.Module, x: Tensor, n_samples: int) -> Tensor:
    r"""$E \lVert p(m) - p(E m) \rVert^2$, mean over inputs, summed over units; the expected mask is the model in evaluation mode.

    Args:
        model: has dropout; its mode is put back.
        x: inputs ``[N, ...]``; the output is ``[N, ..., V]``.
        n_samples: passes with a mask.

    Raises:
        ValueError: n_samples < 1.
    """
    expected = _run(model, x, training=False)
    return _mean_square(model, x, n_samples, lambda: expected)


def _mean_square(model: nn.Module, x: Tensor, n_samples: int, other) -> Tensor:
    if n_samples < 1:
        raise ValueError(f"n_samples must be at least 1, got {n_samples}")
    return torch.stack([(_run(model, x, training=True) - other()).square().sum(-1).mean() for _ in range(n_samples)]).mean()


def _run(model: nn.Module, x: Tensor, training: bool) -> Tensor:
    modes = {module: module.training for module in model.modules()}
    try:
        return model.train(training)(x)
    finally:
        for module, mode in modes.items():
            module.training = mode
