"""The race against a loop by hand; its bookkeeping against cases with known answers."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from dlatlas.theory.kit.bench import Contender, Scores, Task, bench, rate_grid, run_once, usable_range

G = torch.Generator().manual_seed(0)
CENTRES = 3 * torch.randn(3, 5, generator=G)
Y = torch.randint(0, 3, (90,), generator=G)
X = CENTRES[Y] + torch.randn(90, 5, generator=G)
TASK = Task(X[:60], Y[:60], X[60:], Y[60:], hidden=(8,), batch=16, epochs=2)
SGD = Contender("SGD", lambda p, lr: torch.optim.SGD(p, lr=lr), [0.01, 0.1])


def by_hand(lr, seed, batches):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))
    order = torch.Generator().manual_seed(seed)
    for sizes, rate in batches:
        for batch in torch.randperm(60, generator=order).split(sizes):
            grads = torch.autograd.grad(cross_entropy(model(X[batch]), Y[batch]), list(model.parameters()))
            with torch.no_grad():
                for p, g in zip(model.parameters(), grads):
                    p -= (lr if rate is None else rate) * g
    with torch.no_grad():
        return float((model(X[60:]).argmax(1) != Y[60:]).float().mean()), float(cross_entropy(model(X[:60]), Y[:60]))


def test_a_run_is_plain_training():
    out = run_once(SGD, 0.1, TASK, seed=3)
    error, loss = by_hand(0.1, 3, [(16, None)] * 2)
    assert out.error == pytest.approx(error)
    assert out.loss == pytest.approx(loss, rel=1e-5)
    assert out.updates == 8 and out.ms > 0


def test_a_schedule_sets_rate_and_batch_size():
    class Halve:
        def __init__(self, lr, batch):
            self.lr, self.batch = lr, batch

        def at(self, epoch):
            return self.lr / 2**epoch, self.batch * 2**epoch

    out = run_once(Contender("halve", SGD.optimizer, [0.1], schedule=Halve), 0.1, TASK, seed=3)
    error, loss = by_hand(0.1, 3, [(16, 0.1), (32, 0.05)])
    assert out.error == pytest.approx(error)
    assert out.loss == pytest.approx(loss, rel=1e-5)
    assert out.updates == 4 + 2


def test_without_a_schedule_an_optimizer_may_move_its_own_rate():
    class Growing(torch.optim.SGD):
        def step(self, closure=None):
            super().step()
            self.param_groups[0]["lr"] *= 2

    kept = []

    def make(p, lr):
        kept.append(Growing(p, lr=lr))
        return kept[-1]

    run_once(Contender("growing", make, [1e-3]), 1e-3, TASK, seed=0)
    assert kept[0].param_groups[0]["lr"] == pytest.approx(1e-3 * 2**8)


def test_layers_of_another_class_start_from_the_same_weights_and_finalize_is_called():
    built, ended = [], []

    class Mine(nn.Linear):
        def __init__(self, n_in, n_out):
            super().__init__(n_in, n_out)
            built.append(self)

    class Ending(torch.optim.SGD):
        def finalize(self):
            ended.append(True)

    a = run_once(SGD, 0.1, TASK, seed=1)
    b = run_once(Contender("mine", lambda p, lr: Ending(p, lr=lr), [0.1], linear=Mine), 0.1, TASK, seed=1)
    assert (a.error, a.loss) == (b.error, b.loss)
    assert len(built) == 2 and ended == [True]


def test_a_diverged_run_counts_as_guessing():
    out = run_once(SGD, 1e30, TASK, seed=0)
    assert out.error == pytest.approx(2 / 3)
    assert out.loss == math.inf


def test_all_pairs_are_run_and_the_global_generator_is_left_alone():
    torch.manual_seed(5)
    scores = bench([SGD, Contender("Adam", lambda p, lr: torch.optim.Adam(p, lr=lr), [1e-3, 1e-2, 1e30])], TASK, [0, 1])
    expected = torch.Generator().manual_seed(5)
    assert torch.equal(torch.rand(3), torch.rand(3, generator=expected))
    assert scores["SGD"].error.shape == (2, 2)
    assert scores["Adam"].loss.shape == (3, 2)
    for i, lr in enumerate(SGD.rates):
        for j in (0, 1):
            assert scores["SGD"].loss[i, j] == pytest.approx(run_once(SGD, lr, TASK, j).loss)
    assert np.isfinite(scores["Adam"].ms).all()
    with pytest.raises(ValueError, match="contenders"):
        bench([], TASK, [0])


def test_the_row_reports_the_rate_that_validation_chose():
    error = np.array([[0.3, 0.5], [0.2, 0.3], [0.1, 0.6]])
    loss = np.array([[1.0, 1.2], [0.5, 0.7], [0.1, 0.2]])
    row = Scores(np.array([1.0, 3.0, 9.0]), error, loss, np.array([[1.0, 2.0], [3.0, 4.0], [9.0, 5.0]]), 7).row("x")
    assert row["best rate"] == 3.0
    assert row["validation error, %"] == pytest.approx([20.0, 30.0])
    assert row["training loss"] == [0.5, 0.7]
    assert row["ms per step"] == 3.5
    assert (row["method"], row["steps"]) == ("x", 7)


def test_usable_range():
    # Best 1 at rate 10; 1.1 is crossed a tenth of the way up on the left and half-way on the right.
    assert usable_range([1, 10, 100], [2.0, 1.0, 1.2]) == pytest.approx(10 ** (0.1 + 0.5))
    assert usable_range([1, 10, 100], [1.05, 1.0, 1.09]) == pytest.approx(100)  # all usable: the whole grid
    assert usable_range([1, 10, 100], [1.05, 1.0, math.inf]) == pytest.approx(10)
    assert usable_range([1, 10, 100], [1.0, math.nan, 1.0]) == pytest.approx(1)  # only the interval around the best counts
    assert usable_range([1, 10, 100], [1.4, 1.0, 1.4], within=0.4) == pytest.approx(100)


def test_grid_and_bad_input():
    assert rate_grid(0.01, 3) == pytest.approx([0.01, 0.03, 0.09])
    for call in (
        lambda: rate_grid(0.0),
        lambda: rate_grid(0.1, 0),
        lambda: rate_grid(0.1, ratio=1.0),
        lambda: usable_range([1, 2], [1.0]),
        lambda: usable_range([2, 1], [1.0, 1.0]),
        lambda: usable_range([1, 2], [math.inf, math.nan]),
    ):
        with pytest.raises(ValueError):
            call()
