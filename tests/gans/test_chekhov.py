"""Hedge against linear programming and known games; the queue and the losses by hand."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from torch import nn
from torch.nn.functional import logsigmoid

from dlatlas.gans.chekhov import SnapshotQueue, chekhov_d_loss, chekhov_g_loss, ftrl_zero_sum


def value(A):
    """Value of the game for the minimising row player, by linear programming."""
    n, m = A.shape
    found = linprog([0] * n + [1], A_ub=np.hstack([A.T, -np.ones((m, 1))]), b_ub=np.zeros(m),
                    A_eq=[[1] * n + [0]], b_eq=[1], bounds=[(0, None)] * n + [(None, None)])  # fmt: skip
    return found.fun


def test_a_random_game_is_bracketed_and_solved():
    A = torch.rand(20, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x, y, gap = ftrl_zero_sum(A, 4000, eta0=2.0)
    for p in (x, y):
        assert p.min() >= 0 and p.sum() == pytest.approx(1)
    assert float((A @ y).min()) <= value(A.numpy()) <= float((A.T @ x).max())
    assert 0 <= gap <= 3 * math.sqrt(math.log(20) / 4000)
    assert ftrl_zero_sum(A, 100, eta0=2.0)[2] > 3 * gap


def test_hedge_in_numpy():
    A = np.random.default_rng(0).normal(size=(3, 4))
    xs, ys, L, S = [], [], np.zeros(3), np.zeros(4)
    for t in range(1, 8):
        x, y = np.exp(-0.7 / np.sqrt(t) * L), np.exp(0.7 / np.sqrt(t) * S)
        xs.append(x / x.sum())
        ys.append(y / y.sum())
        L, S = L + A @ ys[-1], S + A.T @ xs[-1]
    x, y, gap = ftrl_zero_sum(torch.tensor(A), 7, eta0=0.7)
    np.testing.assert_allclose(x, np.mean(xs, 0))
    np.testing.assert_allclose(y, np.mean(ys, 0))
    assert gap == pytest.approx((A.T @ np.mean(xs, 0)).max() - (A @ np.mean(ys, 0)).min())


def test_rock_paper_scissors_and_a_dominated_row():
    rps = torch.tensor([[0.0, 1, -1], [-1, 0, 1], [1, -1, 0]])
    x, y, gap = ftrl_zero_sum(rps, 2000)
    assert torch.allclose(x, torch.full((3,), 1 / 3), atol=0.03) and torch.allclose(y, torch.full((3,), 1 / 3), atol=0.03) and gap < 0.1
    # A dearer first row does not change x, which makes the columns equal; y must make up for it: rps y + (1/2, 0, 0) is constant.
    x, y, _ = ftrl_zero_sum(rps + torch.tensor([[0.5], [0.0], [0.0]]), 20_000)
    assert torch.allclose(x, torch.full((3,), 1 / 3), atol=0.03)
    assert torch.allclose(y, torch.tensor([1 / 3, 1 / 6, 1 / 2]), atol=0.03)
    assert ftrl_zero_sum(torch.tensor([[0.0, 1], [1, 2]]), 2000)[0][1] < 0.05  # row 1 is dominated by row 0


def test_the_average_converges_where_the_last_iterate_moves_on():
    pennies = torch.tensor([[1.0, -1], [-1, 1]]) + torch.tensor([[0.3, 0.0], [0.0, 0.0]])
    last = [ftrl_zero_sum(pennies, T)[0] * T - ftrl_zero_sum(pennies, T - 1)[0] * (T - 1) for T in range(100, 130)]
    assert torch.stack(last)[:, 0].std() > 0.02
    assert ftrl_zero_sum(pennies, 3000)[2] < 0.05


def test_the_queue_keeps_frozen_copies_of_the_newest():
    net, queue = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Dropout()), SnapshotQueue(capacity=2, every=3)
    kept = []
    for step in range(10):
        with torch.no_grad():
            net[0].weight.fill_(step)
        kept.append(queue.offer(net, step))
        assert len(queue) <= 2
    assert kept == [step % 3 == 0 for step in range(10)]
    assert [int(copy[0].weight) for copy in queue] == [6, 9]
    assert all(not copy.training and not copy[0].weight.requires_grad for copy in queue) and net.training


def test_the_present_player_may_hold_the_newest_place():
    net, queue, seen = nn.Linear(1, 1, bias=False), SnapshotQueue(capacity=3, every=4, keep_current=True), {}
    for step in range(1, 14):
        with torch.no_grad():
            net.weight.fill_(step)
        assert queue.offer(net, step) == (step % 4 == 0)
        seen[step] = [int(copy.weight) for copy in queue]
    assert seen[3] == []  # nothing before the first step that is due
    assert seen[4] == [4] and seen[5] == [5] and seen[7] == [7]
    assert seen[8] == [7, 8] and seen[10] == [7, 10] and seen[12] == [7, 11, 12] and seen[13] == [7, 11, 13]


def test_the_newest_place_follows_buffers_too_and_shares_nothing_with_the_player():
    net, queue = nn.BatchNorm1d(2), SnapshotQueue(capacity=2, every=10, keep_current=True)
    queue.offer(net, 0)
    net(torch.randn(8, 2, generator=torch.Generator().manual_seed(0)) + 3)
    queue.offer(net, 1)
    (kept,) = queue
    torch.testing.assert_close(kept.running_mean, net.running_mean)
    before = kept.running_mean.clone()
    net(torch.full((8, 2), 9.0))
    assert torch.equal(kept.running_mean, before) and not torch.equal(net.running_mean, before)
    assert not kept.training and not kept.weight.requires_grad


def three(make, values):
    queue = SnapshotQueue(capacity=3, every=1)
    for step, value in enumerate(values):
        module = make()
        with torch.no_grad():
            module.weight.fill_(value)
        queue.offer(module, step)
    return queue


def linear():
    return nn.Linear(1, 1, bias=False)


def test_losses_by_hand():
    past, z, real = three(linear, [1.0, 2.0, 3.0]), torch.tensor([[0.5], [-1.0]]), torch.tensor([[2.0], [1.0]])
    D = linear()
    with torch.no_grad():
        D.weight.fill_(0.7)
    expected = -logsigmoid(0.7 * real).mean() - torch.stack([logsigmoid(-0.7 * k * z).mean() for k in (1, 2, 3)]).mean()
    torch.testing.assert_close(chekhov_d_loss(D, past, real, z), expected)
    torch.testing.assert_close(chekhov_d_loss(D, past, real, z, reg=0.5, t=4), expected + 0.25 * 0.49)
    expected = -torch.stack([logsigmoid(k * 0.7 * z).mean() for k in (1, 2, 3)]).mean()
    torch.testing.assert_close(chekhov_g_loss(D, past, z), expected)
    torch.testing.assert_close(chekhov_g_loss(D, past, z, reg=0.5, t=4), expected + 0.25 * 0.49)


def test_only_the_player_of_the_loss_gets_a_gradient():
    past, player = three(linear, [1.0]), linear()
    chekhov_d_loss(player, past, torch.ones(2, 1), torch.ones(2, 1)).backward()
    chekhov_g_loss(player, past, torch.ones(2, 1)).backward()
    assert player.weight.grad is not None and all(m.weight.grad is None for m in past)


def test_bad_input():
    with pytest.raises(ValueError, match="empty"):
        chekhov_g_loss(linear(), SnapshotQueue(), torch.ones(1, 1))
    with pytest.raises(ValueError, match="empty"):
        chekhov_d_loss(linear(), SnapshotQueue(), torch.ones(1, 1), torch.ones(1, 1))
    with pytest.raises(ValueError, match="reg >= 0"):
        chekhov_g_loss(linear(), three(linear, [1.0]), torch.ones(1, 1), t=0)
    for kwargs in ({"capacity": 0}, {"every": 0}):
        with pytest.raises(ValueError, match="at least 1"):
            SnapshotQueue(**kwargs)
    for args in ((torch.ones(3), 5), (torch.ones(2, 2), 0), (torch.ones(2, 2), 5, 0.0)):
        with pytest.raises(ValueError, match="expected a matrix"):
            ftrl_zero_sum(*args)
