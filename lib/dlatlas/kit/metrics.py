"""Scores of classifiers and detectors."""

from __future__ import annotations

import torch
from torch import Tensor, nn


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor, batch: int = 1024) -> float:
    """Share of correct arg-max predictions, in evaluation mode; the model's mode is restored."""
    if len(x) != len(y) or len(x) == 0:
        raise ValueError(f"expected as many labels as inputs and at least one, got {len(x)} inputs and {len(y)} labels")
    was_training = model.training
    model.eval()
    try:
        right = sum(int((model(xb).argmax(-1) == yb).sum()) for xb, yb in zip(x.split(batch), y.split(batch)))
    finally:
        model.train(was_training)
    return right / len(x)


def error_rate(model: nn.Module, x: Tensor, y: Tensor, batch: int = 1024) -> float:
    """``1 - accuracy``."""
    return 1.0 - accuracy(model, x, y, batch)


def auroc(negative: Tensor, positive: Tensor) -> float:
    """Area under the ROC curve: chance that a positive example scores higher than a negative one (ties count half)."""
    from sklearn.metrics import roc_auc_score  # here, because it costs more than a second that most chapters need not spend

    if negative.numel() == 0 or positive.numel() == 0:
        raise ValueError("both groups need at least one score")
    scores = torch.cat([negative.reshape(-1), positive.reshape(-1)]).detach().cpu()
    labels = torch.cat([torch.zeros(negative.numel()), torch.ones(positive.numel())])
    return float(roc_auc_score(labels.numpy(), scores.numpy()))
