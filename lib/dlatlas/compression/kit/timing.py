"""How many times faster one function is than another, on a machine that others use as well."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable

import numpy as np
import torch

__all__ = ["speed_ratio"]


def speed_ratio(
    slow: Callable[[], object], fast: Callable[[], object], repeats: int = 15, warmup: int = 3, threads: int = 1
) -> dict[str, float]:
    """Ratio of the median times of two functions that are called in turn: slow, fast, slow, fast, ...

    Taking turns makes a change of clock rate or of load meet both. It also means that neither finds the cache as it left it, which
    is how a layer of a network meets its weights. On one thread it is the processor's time that counts, in which a call is not charged
    for the moments when the system ran another program; on several threads it is the time that passed.

    Args:
        slow: called without arguments.
        fast: called without arguments.
        repeats: timed calls of each.
        warmup: calls of each before.
        threads: torch threads for both; the former number is restored.

    Returns:
        ``ratio``, the medians ``slow_ms`` and ``fast_ms`` and ``iqr``, the interquartile range of the ratios of neighbouring calls.

    Raises:
        ValueError: repeats or threads below 1, or a negative warmup.
    """
    if repeats < 1 or threads < 1 or warmup < 0:
        raise ValueError(f"repeats and threads must be at least 1 and warmup at least 0, got {repeats}, {threads}, {warmup}")
    before, collecting = torch.get_num_threads(), gc.isenabled()
    times, clock = np.empty((repeats, 2)), _clock(threads)
    try:
        torch.set_num_threads(threads)
        for _ in range(warmup):
            slow()
            fast()
        gc.disable()  # a collection would fall on one of the two
        for pair in times:
            for k, function in enumerate((slow, fast)):
                start = clock()
                function()
                pair[k] = clock() - start
    finally:
        torch.set_num_threads(before)
        if collecting:
            gc.enable()
    slow_ms, fast_ms = np.median(times, 0) / 1e6
    low, high = np.quantile(times[:, 0] / times[:, 1], [0.25, 0.75])
    return {"ratio": float(slow_ms / fast_ms), "slow_ms": float(slow_ms), "fast_ms": float(fast_ms), "iqr": float(high - low)}


def _clock(threads: int) -> Callable[[], int]:
    """Nanoseconds of this thread's processor time where that is measured finely enough and all there is, else of real time."""
    if threads == 1 and time.get_clock_info("thread_time").resolution < 1e-6:
        return time.thread_time_ns
    return time.perf_counter_ns
