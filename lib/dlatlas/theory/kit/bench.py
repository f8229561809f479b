"""A fair race of optimizers: the same networks, batches and number of learning rates for everyone.

A contender is a way to build an optimizer from parameters and a learning rate, with a grid of rates. Every pair of rate and seed is
trained; runs with the same seed start from the same weights and see the same shuffles, so that differences between contenders are paired.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

from dlatlas.kit.metrics import error_rate
from dlatlas.train import fit

__all__ = ["Contender", "Outcome", "Scores", "Task", "bench", "rate_grid", "run_once", "usable_range"]


class Schedule(Protocol):
    """Learning rate and batch size as functions of the epoch."""

    def at(self, epoch: int) -> tuple[float, int]:
        """(learning rate, batch size) in an epoch, counted from 0."""


@dataclass(frozen=True)
class Task:
    """Classification of vectors ``[n, d]`` by a ReLU network; validation data choose the rate."""

    x: Tensor
    y: Tensor
    x_val: Tensor
    y_val: Tensor
    hidden: Sequence[int] = (64, 64)
    batch: int = 64
    epochs: int = 3


@dataclass(frozen=True)
class Contender:
    """A method in the race.

    Args:
        name: as it stands in tables.
        optimizer: ``optimizer(parameters, lr)``. One with a ``finalize()`` is finalized before the network is judged.
        rates: learning rates to try.
        linear: class of the network's linear layers; ``linear(n_in, n_out)``.
        schedule: ``schedule(lr, batch)`` gives a :class:`Schedule` that sets rate and batch size; None leaves both alone.
    """

    name: str
    optimizer: Callable[[list[nn.Parameter], float], Optimizer]
    rates: Sequence[float]
    linear: Callable[[int, int], nn.Module] = nn.Linear
    schedule: Callable[[float, int], Schedule] | None = None


class Outcome(NamedTuple):
    """Of one run: validation error and training loss at the end, milliseconds per update, number of updates.

    On a CPU the milliseconds are processor time, so that other programs on the machine do not count.
    """

    error: float
    loss: float
    ms: float
    updates: int


@dataclass(frozen=True)
class Scores:
    """All runs of a contender: arrays ``[rates, seeds]``."""

    rates: np.ndarray
    error: np.ndarray
    loss: np.ndarray
    ms: np.ndarray
    updates: int

    @property
    def best(self) -> int:
        """Position of the rate with the lowest mean validation error."""
        return int(self.error.mean(1).argmin())

    @property
    def usable(self) -> float:
        """:func:`usable_range` of the mean training losses."""
        return usable_range(self.rates, self.loss.mean(1))

    def row(self, method: str) -> dict[str, Any]:
        """A row for :func:`dlatlas.plot.table`; lists hold one value a seed, at the best rate."""
        return {
            "method": method,
            "best rate": float(self.rates[self.best]),
            "validation error, %": (100 * self.error[self.best]).tolist(),
            "training loss": self.loss[self.best].tolist(),
            "usable rates, max/min": self.usable,
            "ms per step": float(np.median(self.ms)),
            "steps": self.updates,
        }


def rate_grid(first: float, n: int = 5, ratio: float = 3.0) -> list[float]:
    """``n`` learning rates, each `ratio` times the one before."""
    if n < 1 or not first > 0 or not ratio > 1:
        raise ValueError(f"n must be at least 1, first positive and ratio above 1; got n={n}, first={first}, ratio={ratio}")
    return [first * ratio**k for k in range(n)]


def usable_range(learning_rates: Sequence[float], losses: Sequence[float], within: float = 0.1) -> float:
    """How far the learning rate may be off: largest over smallest rate whose loss is at most ``(1 + within)`` times the lowest.

    The interval around the best rate ends where the loss, interpolated over the logarithm of the rate, crosses that bound;
    it cannot reach beyond the grid, so a result that includes an end of the grid is a lower bound.

    Raises:
        ValueError: rates that are not ascending and positive, another number of losses, or no finite loss.
    """
    r, v = np.asarray(learning_rates, float), np.asarray(losses, float)
    if r.ndim != 1 or r.shape != v.shape or len(r) == 0 or r[0] <= 0 or (np.diff(r) <= 0).any():
        raise ValueError(f"expected ascending positive rates and as many losses, got {learning_rates} and {losses}")
    v = np.where(np.isfinite(v), v, np.inf)
    best = int(v.argmin())
    if not math.isfinite(v[best]):
        raise ValueError(f"no loss is finite: {losses}")
    bound, logs = v[best] * (1 + within), np.log(r)

    def edge(step: int) -> float:
        i = best
        while 0 <= i + step < len(v) and v[i + step] <= bound:
            i += step
        if not 0 <= i + step < len(v) or math.isinf(v[i + step]):
            return float(logs[i])
        share = (bound - v[i]) / (v[i + step] - v[i])
        return float(logs[i] + share * (logs[i + step] - logs[i]))

    return math.exp(edge(1) - edge(-1))


def run_once(contender: Contender, lr: float, task: Task, seed: int) -> Outcome:
    """Train one network and judge it; a run that leaves the finite numbers counts as guessing with infinite loss."""
    classes = int(task.y.max()) + 1
    order = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _network([task.x.shape[1], *task.hidden, classes], contender.linear).to(task.x.device)
    optimizer = contender.optimizer(list(model.parameters()), lr)
    schedule = contender.schedule(lr, task.batch) if contender.schedule else None
    plan = []
    for epoch in range(task.epochs):
        rate, size = schedule.at(epoch) if schedule else (None, task.batch)
        shuffled = torch.randperm(len(task.x), generator=order).to(task.x.device)
        plan += [(rate, batch) for batch in shuffled.split(size)]

    def step(i: int) -> Tensor:
        rate, batch = plan[i]
        if rate is not None:
            for group in optimizer.param_groups:
                group["lr"] = rate
        optimizer.zero_grad()
        loss = cross_entropy(model(task.x[batch]), task.y[batch])
        loss.backward()
        optimizer.step()
        return loss.detach()

    clock = time.perf_counter if task.x.is_cuda else time.process_time
    begin = clock()
    try:
        fit(step, len(plan), every=20, name=contender.name)
    except FloatingPointError:
        return Outcome(1 - 1 / classes, math.inf, math.nan, len(plan))
    ms = 1000 * (clock() - begin) / len(plan)
    if hasattr(optimizer, "finalize"):
        optimizer.finalize()
    with torch.no_grad():
        loss = float(cross_entropy(model(task.x), task.y))
    if not math.isfinite(loss):
        return Outcome(1 - 1 / classes, math.inf, math.nan, len(plan))
    return Outcome(error_rate(model, task.x_val, task.y_val), loss, ms, len(plan))


def bench(contenders: Sequence[Contender], task: Task, seeds: Sequence[int]) -> dict[str, Scores]:
    """Train every contender at each of its rates with every seed."""
    if not contenders or not seeds:
        raise ValueError(f"expected contenders and seeds, got {len(contenders)} and {len(seeds)}")
    scores = {}
    for contender in contenders:
        runs = [[run_once(contender, lr, task, seed) for seed in seeds] for lr in contender.rates]
        error, loss, ms, updates = np.moveaxis(np.array(runs, float), 2, 0)
        # A diverged run was not timed to its end.
        ms = np.where(np.isnan(ms), np.nanmedian(ms) if np.isfinite(ms).any() else np.nan, ms)
        scores[contender.name] = Scores(np.asarray(contender.rates, float), error, loss, ms, int(updates[0, 0]))
    return scores


def _network(sizes: Sequence[int], linear: Callable[[int, int], nn.Module]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for n_in, n_out in itertools.pairwise(sizes):
        layers += [linear(n_in, n_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])
