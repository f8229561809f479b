"""Profiles, seeds and devices."""

import random

import numpy as np
import pytest
import torch

from dlatlas.run import Run


def draws():
    return random.random(), float(np.random.rand()), float(torch.rand(()))  # noqa: NPY002 - the state that Run seeds


def test_a_run_seeds_every_generator():
    Run("quick", 3)
    first = draws()
    run = Run("quick", 3)
    assert draws() == first
    run.reseed()
    assert draws() == first
    Run("quick", 4)
    assert all(a != b for a, b in zip(draws(), first))


def test_pick_follows_the_profile():
    assert Run("quick", 0).pick(quick=1, full=2) == 1
    assert Run("full", 0).pick(quick=1, full=2) == 2


def test_seeds_of_different_runs_do_not_meet():
    assert len({s for seed in range(5) for s in Run("quick", seed).seeds(100)}) == 500
    assert Run("quick", 2).seeds(3) == Run("full", 2).seeds(3)
    with pytest.raises(ValueError, match="between 1 and 1000"):
        Run("quick", 0).seeds(0)


def test_generators_are_repeatable_and_independent():
    run = Run("quick", 1)
    a, again, b = (torch.rand(1000, generator=run.generator(k)) for k in (0, 0, 1))
    assert torch.equal(a, again)
    assert abs(float(torch.corrcoef(torch.stack([a, b]))[0, 1])) < 0.15


def test_quick_runs_stay_on_the_cpu():
    assert Run("quick", 0).device.type == "cpu"
    assert Run("full", 0).device.type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize(("profile", "seed"), [("fast", 0), ("quick", -1), ("quick", 1.0), ("quick", True), ("quick", 2**31)])
def test_bad_input(profile, seed):
    with pytest.raises(ValueError, match=r"profile|seed"):
        Run(profile, seed)
