"""The speed ratio on a clock that the test moves."""

import gc
import time

import pytest
import torch

from dlatlas.compression.kit import timing


@pytest.fixture
def clock(monkeypatch):
    now = [0]
    monkeypatch.setattr(timing, "_clock", lambda threads: lambda: now[0])
    return now


def test_medians_of_calls_that_take_turns(clock):
    order, slow_times, fast_times = [], iter([99, 99, 10, 10, 90]), iter([99, 99, 2, 5, 4])

    def slow():
        order.append("slow")
        clock[0] += next(slow_times) * 10**6

    def fast():
        order.append("fast")
        clock[0] += next(fast_times) * 10**6

    out = timing.speed_ratio(slow, fast, repeats=3, warmup=2)
    assert order == ["slow", "fast"] * 5
    # Ratios of neighbours: 5, 2, 22.5; their quartiles are 3.5 and 13.75.
    assert out == pytest.approx({"ratio": 2.5, "slow_ms": 10, "fast_ms": 4, "iqr": 13.75 - 3.5})


def test_the_order_is_not_mixed_up_on_the_real_clock():
    x = torch.randn(400, 400)
    out = timing.speed_ratio(lambda: x @ x @ x @ x, lambda: x[:4] @ x, repeats=9)
    assert out["ratio"] > 3


def test_threads_and_the_collector_are_restored_also_after_an_error():
    seen = []

    def fails():
        seen.append(torch.get_num_threads())
        if len(seen) > 2:
            raise RuntimeError("stop")

    torch.set_num_threads(1)
    try:
        torch.set_num_threads(2)
        with pytest.raises(RuntimeError, match="stop"):
            timing.speed_ratio(fails, lambda: seen.append(gc.isenabled()), warmup=0)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert seen[0] == 1
    assert seen[1] is False
    assert gc.isenabled()


def test_one_thread_is_charged_for_its_own_work_only():
    out = timing.speed_ratio(lambda: time.sleep(0.02), lambda: sum(range(1000)), repeats=3)
    assert out["slow_ms"] < 5
    out = timing.speed_ratio(lambda: time.sleep(0.02), lambda: sum(range(1000)), repeats=3, threads=2)
    assert out["slow_ms"] > 15


@pytest.mark.parametrize("kwargs", [{"repeats": 0}, {"threads": 0}, {"warmup": -1}])
def test_bad_input(kwargs):
    with pytest.raises(ValueError, match="got"):
        timing.speed_ratio(int, int, **kwargs)
