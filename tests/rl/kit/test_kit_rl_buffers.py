"""Memories against lists, cumulative sums and loops."""

import numpy as np
import pytest
import torch

from dlatlas.rl.kit.buffers import NStepAccumulator, ReplayBuffer, SumTree


def rows(start, n):
    x = np.arange(start, start + n)
    return {"obs": np.stack([x, -x], 1).astype(np.float32), "actions": x.astype(np.int64)}


SPECS = {"obs": ((2,), np.float32), "actions": ((), torch.int64)}


def test_the_ring_keeps_the_newest_rows():
    buffer, kept, at = ReplayBuffer(7, SPECS), [], 0
    for n in (3, 2, 4, 1, 6, 7, 5):
        slots = buffer.add(**rows(at, n))
        assert torch.equal(buffer.take(slots)["actions"], torch.arange(at, at + n))
        kept, at = [*kept, *range(at, at + n)][-7:], at + n
        assert len(buffer) == len(kept)
        assert sorted(buffer.storage["actions"][: len(buffer)].tolist()) == kept
    assert torch.equal(buffer.storage["obs"][:, 0], buffer.storage["actions"].float())
    slots = buffer.add(**rows(100, 20))  # more rows than the ring holds
    assert sorted(buffer.storage["actions"].tolist()) == list(range(113, 120)) and len(slots) == 7
    assert torch.equal(buffer.take(slots)["actions"], torch.arange(113, 120))


def test_samples_are_uniform_and_rows_stay_together():
    buffer = ReplayBuffer(10, SPECS)
    buffer.add(**rows(0, 5))
    batch = buffer.sample(20_000, torch.Generator().manual_seed(1))
    assert batch["obs"].dtype == torch.float32 and batch["actions"].dtype == torch.int64
    assert torch.equal(batch["obs"], torch.stack([batch["actions"], -batch["actions"]], 1).float())
    counts = torch.bincount(batch["actions"], minlength=5)
    assert len(counts) == 5 and ((counts - 4000) ** 2 / 4000).sum() < 18.5  # chi-square with 4 degrees of freedom, 0.1%
    assert torch.equal(
        buffer.sample(9, torch.Generator().manual_seed(3))["actions"], buffer.sample(9, torch.Generator().manual_seed(3))["actions"]
    )


def test_bad_rows():
    buffer = ReplayBuffer(4, SPECS)
    with pytest.raises(ValueError, match="empty"):
        buffer.sample(2)
    with pytest.raises(ValueError, match="arrays"):
        buffer.add(obs=np.zeros((1, 2)))
    with pytest.raises(ValueError, match="actions must have shape"):
        buffer.add(obs=np.zeros((2, 2)), actions=np.zeros(3))
    with pytest.raises(ValueError, match="obs must have shape"):
        buffer.add(obs=np.zeros((2, 3)), actions=np.zeros(2))
    with pytest.raises(ValueError, match="capacity"):
        ReplayBuffer(0, SPECS)
    buffer.add(**rows(0, 2))
    with pytest.raises(ValueError, match="idx"):
        buffer.take(np.array([2]))


@pytest.mark.parametrize("capacity", [1, 2, 5, 8, 37])
def test_the_tree_finds_what_a_cumulative_sum_finds(capacity):
    rng = np.random.default_rng(capacity)
    tree, p = SumTree(capacity), np.zeros(capacity)
    for _ in range(20):
        idx = rng.integers(capacity, size=rng.integers(1, 9))
        values = rng.random(len(idx)) * (rng.random(len(idx)) < 0.7)
        tree.set(idx, values)
        for i, v in zip(idx, values):
            p[i] = v
        np.testing.assert_array_equal(tree[np.arange(capacity)], p)
        assert tree.total() == pytest.approx(p.sum(), abs=1e-12)
        if p.sum() > 0:
            mass = rng.random(50) * tree.total()
            np.testing.assert_array_equal(tree.find(mass), np.searchsorted(np.cumsum(p), mass, side="right"))


def test_no_mass_ends_in_an_empty_slot():
    tree = SumTree(6)
    tree.set(np.arange(6), np.array([0.0, 0.1, 0.2, 0.0, 0.7, 0.0]))
    assert tree.find(np.array([0.0, tree.total(), np.nextafter(tree.total(), 0)])).tolist() == [1, 4, 4]
    rng = np.random.default_rng(0)
    tree = SumTree(1000)
    p = 10.0 ** rng.uniform(-12, 6, 1000) * (rng.random(1000) < 0.5)
    tree.set(np.arange(1000), p)
    edges = np.minimum(np.concatenate([np.cumsum(p), np.nextafter(np.cumsum(p), 0)]), tree.total())
    assert (p[tree.find(edges)] > 0).all()


def test_the_sums_do_not_drift():
    rng = np.random.default_rng(0)
    tree = SumTree(64)
    for _ in range(3000):
        tree.set(rng.integers(64, size=8), 10.0 ** rng.uniform(-8, 8, 8))
    tree.set(np.arange(64), 1.0)
    assert tree.total() == 64.0  # exactly: a running difference would keep rounding errors of size 1e-8


def test_draws_follow_the_numbers():
    p = np.array([1.0, 0.0, 3.0, 6.0, 0.5])
    tree = SumTree(5)
    tree.set(np.arange(5), p)
    g = torch.Generator().manual_seed(0)
    counts = np.bincount(np.concatenate([tree.sample(7, g) for _ in range(3000)]), minlength=5)
    expected = p / p.sum() * counts.sum()
    assert counts[1] == 0
    assert ((counts - expected)[p > 0] ** 2 / expected[p > 0]).sum() < 16.3  # chi-square with 3 degrees of freedom, 0.1%
    mass = torch.rand(4, generator=g) * 10
    assert isinstance(tree.find(mass), torch.Tensor) and tree.find(mass).dtype == torch.int64


def test_bad_numbers():
    tree = SumTree(4)
    with pytest.raises(ValueError, match="zero"):
        tree.find(np.array([0.0]))
    for bad in (-1.0, np.nan, np.inf):
        with pytest.raises(ValueError, match="p must be finite"):
            tree.set(np.array([0]), np.array([bad]))
    with pytest.raises(ValueError, match="shape"):
        tree.set(np.array([0, 1]), np.array([1.0]))
    for bad in (np.array([4]), np.array([-1]), np.array([0.5])):
        with pytest.raises(ValueError, match="idx"):
            tree.set(bad, 1.0)
    tree.set(torch.tensor([1]), torch.tensor([2.0]))
    for bad in (-0.1, 2.1, np.nan):
        with pytest.raises(ValueError, match="mass"):
            tree.find(np.array([bad]))


@pytest.mark.parametrize("n", [1, 2, 5])
def test_nstep_transitions_against_a_loop(n):
    """Three environments with random ends; some steps are resets and no transitions."""
    rng, gamma, steps, count = np.random.default_rng(n), 0.9, 60, 3
    r = rng.normal(size=(steps, count))
    done, cut = rng.random((steps, count)) < 0.1, rng.random((steps, count)) < 0.1
    valid = np.ones((steps, count), dtype=bool)
    valid[1:, 2] = ~(done | cut)[:-1, 2]  # environment 2 resets in the step after an end
    for t in range(1, steps):
        if not valid[t, 2]:
            done[t, 2] = cut[t, 2] = False
            if t + 1 < steps:
                valid[t + 1, 2] = True
    obs = np.arange(steps * count).reshape(steps, count, 1)
    nxt = obs + 1000
    accumulator, got = NStepAccumulator(n, gamma), []
    for t in range(steps):
        out = accumulator.push(obs[t], obs[t, :, 0] * 2, r[t], nxt[t], done[t], truncated=cut[t], valid=valid[t])
        got += list(
            zip(out["obs"][:, 0].tolist(), out["actions"].tolist(), out["returns"], out["discounts"], out["next_obs"][:, 0].tolist())
        )
    expected = []
    for b in range(count):
        for t in range(steps):
            if not valid[t, b]:
                continue
            total = 0.0
            for k in range(n):
                if t + k == steps:
                    break  # the window is still open when the stream stops
                total += gamma**k * r[t + k, b]
                if done[t + k, b] or cut[t + k, b] or k == n - 1:
                    expected.append((obs[t, b, 0], obs[t, b, 0] * 2, total, gamma ** (k + 1) * (not done[t + k, b]), nxt[t + k, b, 0]))
                    break
    assert len(got) == len(expected)
    np.testing.assert_allclose(np.array(sorted(got)), np.array(sorted(expected)), rtol=1e-12)


def test_bad_steps():
    for n, gamma in ((0, 0.9), (1, 1.5)):
        with pytest.raises(ValueError):
            NStepAccumulator(n, gamma)
    accumulator = NStepAccumulator(2, 0.9)
    with pytest.raises(ValueError, match="r must have 2 rows"):
        accumulator.push(np.zeros((2, 1)), np.zeros(2), np.zeros(3), np.zeros((2, 1)), np.zeros(2))
    accumulator.push(np.zeros((2, 1)), np.zeros(2), np.zeros(2), np.zeros((2, 1)), np.zeros(2))
    with pytest.raises(ValueError, match="obs must keep its shape"):
        accumulator.push(np.zeros((3, 1)), np.zeros(3), np.zeros(3), np.zeros((3, 1)), np.zeros(3))
