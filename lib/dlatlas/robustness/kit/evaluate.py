"""Accuracy under attack, by attack and under the strongest one of all."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from dlatlas.kit.metrics import accuracy
from dlatlas.robustness.pgd import attacking

__all__ = ["accuracy", "robust_accuracy"]


def robust_accuracy(
    model: nn.Module, x: Tensor, y: Tensor, attacks: Mapping[str, Callable[..., Tensor]], eps: float, *, draws: int = 1
) -> dict[str, float]:
    """Accuracy under each attack, and under the one that is worst for each sample.

    Args:
        model: the network that counts, whatever the attacks looked at.
        x: inputs in [0, 1].
        y: true labels.
        attacks: by name, called as ``attack(model, x, y, eps)``.
        eps: radius of the ball in the maximum norm; what an attack returns is checked against it.
        draws: passes over each attacked input, for networks that draw random numbers; a sample then counts by its share of right answers.

    Returns:
        Accuracies by name, and "worst", the mean over samples of the smallest share of right answers.

    Raises:
        ValueError: no attacks, one of the name "worst", or an attack that left the ball or the box.
    """
    if not attacks or "worst" in attacks or draws < 1:
        raise ValueError(f"expected attacks by name, none called 'worst', and draws >= 1; got {sorted(attacks)} and {draws}")
    shares = {}
    for name, attack in attacks.items():
        points = attack(model, x, y, eps)
        far, low, high = float((points - x).abs().max()), float(points.min()), float(points.max())
        if far > eps + 1e-5 or low < 0 or high > 1:
            raise ValueError(f"attack {name!r} left the ball or the box: distance {far:.4g} of {eps}, values from {low:.4g} to {high:.4g}")
        shares[name] = right(model, points, y, draws)
    worst = torch.stack(list(shares.values())).amin(0)
    return {name: float(share.mean()) for name, share in shares.items()} | {"worst": float(worst.mean())}


def right(model: nn.Module, x: Tensor, y: Tensor, draws: int = 1, batch: int = 1024) -> Tensor:
    """Share of right answers for each sample ``[N]`` over `draws` passes in evaluation mode."""
    with attacking(model), torch.no_grad():
        hits = [sum((model(xb).argmax(1) == yb).float() for _ in range(draws)) for xb, yb in zip(x.split(batch), y.split(batch))]
    return torch.cat(hits) / draws
