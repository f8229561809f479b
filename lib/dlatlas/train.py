"""The one training loop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm


class History(Mapping[str, np.ndarray]):
    """What a training run reported: ``history["loss"]`` is an array over ``history.steps``."""

    def __init__(self) -> None:
        self._values: dict[str, list[float]] = {}
        self._steps: list[int] = []
        self.seconds = 0.0

    def record(self, step: int, values: Mapping[str, float]) -> None:
        """Append one row; every row must report the same names."""
        if self._steps and values.keys() != self._values.keys():
            raise ValueError(f"step {step} reported {sorted(values)}, earlier steps {sorted(self._values)}")
        self._steps.append(step)
        for name, value in values.items():
            self._values.setdefault(name, []).append(value)

    @property
    def steps(self) -> np.ndarray:
        """The recorded steps, counted from 0."""
        return np.asarray(self._steps)

    def final(self, k: int = 10, of: str = "loss") -> float:
        """Mean of the last `k` recorded values."""
        return float(np.mean(self[of][-k:]))

    def __getitem__(self, name: str) -> np.ndarray:
        return np.asarray(self._values[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        last = ", ".join(f"{name} {values[-1]:.4g}" for name, values in self._values.items() if values)
        return f"History({len(self._steps)} records in {self.seconds:.1f} s: {last})"


def fit(step: Callable[[int], Tensor | float | Mapping], steps: int, *, every: int = 1, name: str | None = None) -> History:
    """Call ``step(0) ... step(steps - 1)`` and keep what it reports.

    Args:
        step: does one update and returns the loss, or a dict of named numbers, as floats or 0-d tensors.
        steps: number of calls.
        every: record each `every`-th call and the last; numbers of the other calls are not read, so a GPU is not stalled.
        name: label of the progress bar, which is silent when ``TQDM_DISABLE=1`` (as in the built book).

    Raises:
        FloatingPointError: a recorded number is NaN or infinite; the message names the step.
    """
    if steps < 1 or every < 1:
        raise ValueError(f"steps and every must be at least 1, got steps={steps}, every={every}")
    history, start = History(), time.perf_counter()
    bar = tqdm(range(steps), desc=name, leave=False)
    for i in bar:
        out = step(i)
        if i % every and i != steps - 1:
            continue
        named = out if isinstance(out, Mapping) else {"loss": out}
        values = {k: v.item() if isinstance(v, Tensor) else float(v) for k, v in named.items()}
        for key, value in values.items():
            if not math.isfinite(value):
                raise FloatingPointError(f"{key} became {value} at step {i}{f' of {name}' if name else ''}")
        history.record(i, values)
        bar.set_postfix(values, refresh=False)
    history.seconds = time.perf_counter() - start
    return history


def minibatches(n: int, size: int, generator: torch.Generator | None = None, drop_last: bool = True) -> Iterator[Tensor]:
    """Endless iterator of index tensors ``[size]`` over ``0..n-1``, reshuffled every epoch.

    With ``drop_last=False`` the last batch of an epoch may be shorter.
    """
    if not 1 <= size <= n:
        raise ValueError(f"batch size must be between 1 and the number of examples {n}, got {size}")

    def endless() -> Iterator[Tensor]:
        while True:
            order = torch.randperm(n, generator=generator)
            yield from (b for b in order.split(size) if len(b) == size or not drop_last)

    return endless()
