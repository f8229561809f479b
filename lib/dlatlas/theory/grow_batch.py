r"""Batch-size schedules (smith2018growbatch).

Near a minimum, stochastic gradient descent behaves like gradient flow with noise, and one number sets the size of that
noise: the step divided by the batch size. Dividing the step at a milestone and multiplying the batch at the same milestone
therefore anneal the noise alike; the second needs far fewer parameter updates, because every later epoch has fewer batches.

Equations:

With step $\epsilon$, momentum $m$, batch size $B$ and $N$ training examples, the noise scale is

$$ g = \frac{\epsilon}{1 - m} \left( \frac{N}{B} - 1 \right) \approx \frac{\epsilon N}{B (1 - m)} . $$

After $k$ milestones with factor $f$ the two schedules are

$$ \text{decay:} \quad (\epsilon f^{-k}, \; B) \qquad\qquad \text{grow:} \quad (\epsilon, \; B f^{k}) , $$

both with $\epsilon / B$ divided by $f^k$. Where $B f^k$ would exceed the largest batch $B_{max}$ that the hardware holds, the
growing schedule stays at $B_{max}$ and uses the step $\epsilon B_{max} / (B f^k)$, which keeps the ratio.

Deviations from the paper:

1. $B f^k$ is rounded once, from the exact product, so that rounding errors do not pile up over the milestones. The ratio
   is exact before that rounding.
2. The paper also raises step and batch together at the start, and the momentum towards 1 with $B \propto 1/(1 - m)$. Here
   these are choices of `lr` and `batch`; the schedules themselves do not touch the momentum.

Later work: The equivalence needs $B \ll N$ and a step well below the stability limit. Shallue et al. (2019, "Measuring the
effects of data parallelism") found that the batch up to which larger batches save steps in proportion differs by orders of
magnitude between workloads, and that no simple scaling rule holds for all. McCandlish et al. (2018, "An empirical model of
large-batch training") predict that batch from the gradient's own noise and find that it grows during training, which
supports growing batches. Large language models are now commonly trained with batch sizes that are raised during training.

Example:
    from dlatlas.theory.grow_batch import DecayLR, GrowBatch, noise_scale

    grow = GrowBatch(lr=0.1, batch=128, milestones=[60, 120, 160], factor=5, max_batch=5120)
    decay = DecayLR(lr=0.1, batch=128, milestones=[60, 120, 160], factor=5)
    for epoch in (0, 60, 120, 160):
        (lr, batch), (slow, small) = grow.at(epoch), decay.at(epoch)
        scales = [noise_scale(lr, 50_000, batch), noise_scale(slow, 50_000, small)]
        print(f"epoch {epoch}: batch {batch}, step {lr:g}; or {small}, {slow:g}. Noise scales {scales[0]:.2f}, {scales[1]:.2f}")
    print("updates in 200 epochs:", grow.updates(50_000, 200), "or", decay.updates(50_000, 200))
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

__all__ = ["DecayLR", "GrowBatch", "noise_scale"]


def noise_scale(lr: float, n: int, batch: int, momentum: float = 0.0) -> float:
    r"""Noise scale of SGD, $\epsilon (N/B - 1) / (1 - m)$; 0 for full batches.

    Args:
        lr: step $\epsilon$.
        n: number of training examples $N$.
        batch: batch size $B$, at most `n`.
        momentum: heavy-ball coefficient $m$ in [0, 1).

    Raises:
        ValueError: batch outside 1..n, negative lr, momentum outside [0, 1).
    """
    if not 1 <= batch <= n:
        raise ValueError(f"batch must be between 1 and the number of examples {n}, got {batch}")
    if not lr >= 0 or not 0 <= momentum < 1:
        raise ValueError(f"lr must be >= 0 and momentum in [0, 1), got lr={lr}, momentum={momentum}")
    return lr * (n / batch - 1) / (1 - momentum)


class _Schedule(ABC):
    """Step and batch size as functions of the epoch; subclasses say what a milestone does."""

    def __init__(self, lr: float, batch: int, milestones: Sequence[int], factor: float, max_batch: int | None = None):
        milestones = list(milestones)
        if batch != int(batch) or batch < 1:
            raise ValueError(f"batch must be a positive integer, got {batch}")
        if not 0 < lr < math.inf:
            raise ValueError(f"lr must be positive, got {lr}")
        if not 1 < factor < math.inf:
            raise ValueError(f"factor must be greater than 1, got {factor}")
        if milestones != sorted(set(milestones)) or any(m < 0 for m in milestones):
            raise ValueError(f"milestones must be different epochs >= 0 in ascending order, got {milestones}")
        if max_batch is not None and max_batch < batch:
            raise ValueError(f"max_batch must be at least the initial batch {batch}, got {max_batch}")
        self.lr, self.batch, self.milestones, self.factor, self.max_batch = float(lr), int(batch), milestones, float(factor), max_batch

    def at(self, epoch: int) -> tuple[float, int]:
        """(step, batch size) in an epoch, counted from 0."""
        if epoch < 0:
            raise ValueError(f"epochs count from 0, got {epoch}")
        return self._after(self.factor ** sum(epoch >= m for m in self.milestones))

    @abstractmethod
    def _after(self, drop: float) -> tuple[float, int]:
        """(step, batch size) once the ratio of the two has fallen by `drop`."""

    def updates(self, n: int, epochs: int) -> int:
        """Number of parameter updates in `epochs` epochs over `n` examples; the last batch of an epoch may be smaller."""
        if n < 1 or epochs < 0:
            raise ValueError(f"n must be >= 1 and epochs >= 0, got n={n}, epochs={epochs}")
        return sum(math.ceil(n / self.at(e)[1]) for e in range(epochs))

    def batches(
        self, n: int, epochs: int, optimizer: torch.optim.Optimizer | None = None, generator: torch.Generator | None = None
    ) -> Iterator[Tensor]:
        """Index tensors of all updates of a training run, reshuffled every epoch; sets the optimizer's step on the way.

        Args:
            n: number of examples.
            epochs: number of passes over them.
            optimizer: every parameter group gets the epoch's step; None: the caller reads ``at(epoch)``.
            generator: CPU generator of the shuffles.
        """
        for epoch in range(epochs):
            lr, batch = self.at(epoch)
            for group in optimizer.param_groups if optimizer is not None else ():
                group["lr"] = lr
            yield from torch.randperm(n, generator=generator).split(batch)  # [batch], the last one of an epoch is shorter


class GrowBatch(_Schedule):
    r"""Multiply the batch size at every milestone and leave the step alone, until the batch reaches its limit.

    $(\epsilon, B f^k)$ after $k$ milestones; $(\epsilon B_{max} / (B f^k), B_{max})$ where $B f^k > B_{max}$.

    Args:
        lr: step $\epsilon$.
        batch: initial batch size $B$.
        milestones: ascending epochs; milestone m counts from epoch m on, epochs count from 0.
        factor: $f > 1$.
        max_batch: largest batch size $B_{max}$, at least `batch`; None: no limit.

    Raises:
        ValueError: batch < 1, factor <= 1, unsorted or negative milestones, max_batch < batch, lr <= 0.
    """

    def _after(self, drop: float) -> tuple[float, int]:
        batch = self.batch * drop
        if self.max_batch is not None and batch > self.max_batch:
            return self.lr * self.max_batch / batch, self.max_batch
        return self.lr, round(batch)


class DecayLR(_Schedule):
    r"""Divide the step at every milestone and leave the batch size alone: $(\epsilon f^{-k}, B)$ after $k$ milestones.

    Arguments and errors are those of `GrowBatch`; `max_batch` has no effect.
    """

    def _after(self, drop: float) -> tuple[float, int]:
        return self.lr / drop, self.batch
