"""One object that says how big, how random and where an experiment runs."""

from __future__ import annotations

import os
import random
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import torch

T = TypeVar("T")
PROFILES = ("quick", "full")


@dataclass(frozen=True)
class Run:
    """Profile, seed and device of an experiment; creating it seeds torch, NumPy and :mod:`random`.

    >>> run = Run("quick", seed=0)
    >>> steps = run.pick(quick=300, full=30_000)
    >>> model = build().to(run.device)
    """

    profile: str = "quick"
    seed: int = 0
    device: torch.device = field(init=False)

    def __post_init__(self) -> None:
        if self.profile not in PROFILES:
            raise ValueError(f"unknown profile {self.profile!r}; expected 'quick' or 'full'")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 2**31:
            raise ValueError(f"seed must be an integer in [0, 2^31), got {self.seed!r}")
        # Only the full profile uses a GPU: quick figures must be the same on every reader's machine.
        on_gpu = self.profile == "full" and torch.cuda.is_available()
        object.__setattr__(self, "device", torch.device("cuda" if on_gpu else "cpu"))
        if threads := os.environ.get("OMP_NUM_THREADS"):
            torch.set_num_threads(int(threads))
        self.reseed()

    def reseed(self) -> None:
        """Seed every global generator again, so that the cells that follow do not depend on those before."""
        random.seed(self.seed)
        np.random.seed(self.seed)  # noqa: NPY002 - scikit-learn and gymnasium still read the global state
        torch.manual_seed(self.seed)

    def pick(self, quick: T, full: T) -> T:
        """The value that belongs to the current profile."""
        return quick if self.profile == "quick" else full

    def seeds(self, n: int) -> list[int]:
        """`n` different seeds for repeated runs, derived from ``self.seed``; different runs share none (for n <= 1000)."""
        if not 1 <= n <= 1000:
            raise ValueError(f"n must be between 1 and 1000, got {n}")
        return [(1000 * self.seed + i) % 2**31 for i in range(n)]

    def generator(self, k: int = 0) -> torch.Generator:
        """The k-th independent CPU generator of this run."""
        state = np.random.SeedSequence([self.seed, k]).generate_state(1, np.uint64)[0]
        return torch.Generator().manual_seed(int(state) & (2**63 - 1))
