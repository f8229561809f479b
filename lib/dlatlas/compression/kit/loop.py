"""Epochs: batches that can be gone through again and again, and the training loops over them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import OneCycleLR

from dlatlas.train import History, fit, minibatches

__all__ = ["Batches", "adam_one_cycle", "fit_classifier", "fit_epochs"]


class Batches:
    """One epoch of batches at each pass, in a new order: batches ``(x[i], y[i], ...)`` of equal size; a last shorter one is left out.

    Two objects with one seed give the same batches in the same order, which pairs the runs that are to be compared.

    Args:
        tensors: of one length N.
        size: examples a batch.
        seed: of the orders.

    Raises:
        ValueError: no tensors, different lengths, or a size outside 1..N.
    """

    def __init__(self, *tensors: Tensor, size: int = 64, seed: int = 0):
        lengths = {len(t) for t in tensors}
        if len(lengths) != 1 or not 1 <= size <= min(lengths):
            raise ValueError(f"expected tensors of one length N and a size in 1..N, got lengths {sorted(lengths)} and size {size}")
        self.tensors, self.count = tensors, lengths.pop() // size
        self._order = minibatches(len(tensors[0]), size, torch.Generator().manual_seed(seed))

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        for _ in range(self.count):
            index = next(self._order)
            yield tuple(t[index] for t in self.tensors)


def fit_epochs(step: Callable[..., Tensor], batches: Iterable, epochs: int, name: str | None = None) -> History:
    """Call ``step(*batch)`` on every batch, `epochs` times over, and keep the losses that it returns.

    Args:
        step: does one update and returns the loss.
        batches: passed through once an epoch: a DataLoader, :class:`Batches` or a list. An iterator is kept as a list first.

    Raises:
        ValueError: no batch or no epoch.
    """
    # Also what cannot say its length is counted by a list.
    batches = batches if hasattr(batches, "__len__") and iter(batches) is not batches else list(batches)
    if epochs < 1 or len(batches) < 1:
        raise ValueError(f"expected at least one epoch of at least one batch, got {epochs} of {len(batches)}")
    stream = (batch for _ in range(epochs) for batch in batches)
    return fit(lambda _: step(*next(stream)), epochs * len(batches), name=name)


def fit_classifier(model: nn.Module, batches: Iterable, epochs: int, lr: float = 1e-2) -> History:
    """Train all parameters on the cross-entropy by Adam, whose rate rises to `lr` in the first third and then falls to nearly nothing.

    Args:
        batches: of inputs and labels, see :func:`fit_epochs`.
    """
    optimizer, schedule = adam_one_cycle(model.parameters(), lr, epochs * len(batches))
    model.train()

    def step(x: Tensor, y: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        schedule.step()
        return loss.detach()

    return fit_epochs(step, batches, epochs)


def adam_one_cycle(params: Iterable[Tensor], lr: float, steps: int) -> tuple[torch.optim.Adam, OneCycleLR]:
    """Adam and its schedule of :func:`fit_classifier`; call the schedule's ``step`` after the optimizer's."""
    optimizer = torch.optim.Adam(params, lr, fused=True)
    return optimizer, OneCycleLR(optimizer, lr, total_steps=max(steps, 2))
