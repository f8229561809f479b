import math

import numpy as np
import pytest
import torch

from dlatlas.theory.lsh_sgd import SimHashSampler, collision_prob, lgd_gradient


def gen(k=0):
    return torch.Generator().manual_seed(k)


def test_collision_probability_by_hand():
    e1, e2 = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 3.0])
    assert float(collision_prob(e1, 5 * e1)) == pytest.approx(1)
    assert float(collision_prob(e1, -e1)) == pytest.approx(0)
    assert float(collision_prob(e1, e2)) == pytest.approx(0.5)
    assert float(collision_prob(e1, e1 + e2 / 3)) == pytest.approx(0.75)
    small = 1e-6  # acos would return 1 here
    u, v = torch.tensor([1.0, 0.0], dtype=torch.float64), torch.tensor([math.cos(small), math.sin(small)], dtype=torch.float64)
    assert 1 - float(collision_prob(u, v)) == pytest.approx(small / math.pi, rel=1e-6)
    assert collision_prob(torch.randn(7, 1, 3), torch.randn(5, 3)).shape == (7, 5)


def test_collision_rate_over_random_hyperplanes():
    pairs = torch.randn(6, 2, 4, dtype=torch.float64)
    planes = torch.randn(20_000, 4, dtype=torch.float64, generator=gen())
    agree = ((planes @ pairs[:, 0].T > 0) == (planes @ pairs[:, 1].T > 0)).double().mean(0)
    assert float((agree - collision_prob(pairs[:, 0], pairs[:, 1])).abs().max()) < 4 * 0.5 / math.sqrt(20_000)


def law(sampler, query, n_entries):
    """Exact law of the drawn entry given the tables, from the hyperplanes alone: uniform over the tables whose bucket is not empty."""
    planes, V, q = sampler.planes.numpy(), sampler.entries.numpy(), query.numpy()
    P, filled = np.zeros(n_entries), 0
    for table in planes:
        same = [j for j in range(n_entries) if all((r @ V[j] > 0) == (r @ q > 0) for r in table)]
        if same:
            filled += 1
            P[same] += 1 / len(same)
    return P / filled


@pytest.mark.parametrize("signed", [True, False])
def test_draws_follow_the_exact_law_of_the_tables(signed):
    V, query = torch.randn(4, 3, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    for k in range(3):
        sampler = SimHashSampler(V, bits=1, tables=2, signed=signed, generator=gen(k))
        P = law(sampler, query, sampler.n_entries)
        P = P[:4] + P[4:] if signed else P
        counts = np.bincount([sampler.sample(query)[0] for _ in range(1500)], minlength=4) / 1500
        assert np.abs(counts - P).max() < 4 * 0.5 / math.sqrt(1500)


def test_buckets_hold_the_entries_with_the_query_s_code():
    V, query = torch.randn(50, 5), torch.randn(5)
    sampler = SimHashSampler(V, bits=3, tables=4, generator=gen())
    entries = torch.cat([V, -V])
    for table, bucket in zip(sampler.planes, sampler.buckets(query)):
        same = ((entries @ table.T > 0) == (table @ query > 0)).all(1)
        assert sorted(bucket.tolist()) == same.nonzero()[:, 0].tolist()
        assert not {j % 50 for j in bucket.tolist() if j < 50} & {j % 50 for j in bucket.tolist() if j >= 50}


def test_reported_probability_is_the_published_formula():
    V, query = torch.randn(6, 3, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    entries = torch.cat([V, -V])
    sampler = SimHashSampler(V, bits=4, tables=50, generator=gen())
    sizes = {len(b) for b in sampler.buckets(query)} - {0}
    seen = set()
    for _ in range(200):
        index, p, tries = sampler.sample(query)
        seen.add(tries)
        hits = [float(collision_prob(entries[j], query)) ** 4 for j in (index, index + 6)]
        possible = [h * (1 - h) ** (tries - 1) / size for h in hits for size in sizes]
        assert min(abs(p - x) for x in possible) < 1e-12
    assert len(seen) > 1


def test_folded_probability_counts_both_signs():
    V, query = torch.randn(6, 3, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    sampler = SimHashSampler(V, bits=3, tables=50, generator=gen())
    sizes = {len(b) for b in sampler.buckets(query)} - {0}
    for _ in range(50):
        index, p, tries = sampler.sample(query, fold=True)
        c = float(collision_prob(V[index], query))
        h = c**3 + (1 - c) ** 3
        assert min(abs(p - h * (1 - h) ** (tries - 1) / size) for size in sizes) < 1e-12


def test_equal_angles_give_the_uniform_law():
    V = torch.tensor([[1.0, 2.0]]).repeat(5, 1)  # identical rows, all in the query's bucket
    sampler = SimHashSampler(V, bits=2, tables=3, signed=False, generator=gen())
    _index, p, tries = sampler.sample(torch.tensor([2.0, 4.0]))
    assert p == pytest.approx(1 / 5)
    assert tries == 1
    assert {sampler.sample(torch.tensor([2.0, 4.0]))[0] for _ in range(100)} == set(range(5))


def regression(n=30, d=2):
    X = torch.randn(n, d, dtype=torch.float64, generator=gen(5))
    X = X / X.norm(dim=1, keepdim=True)
    y = torch.randn(n, dtype=torch.float64, generator=gen(6))
    theta = torch.randn(d, dtype=torch.float64, generator=gen(7))
    return X, y, theta, 2 * X.T @ (X @ theta - y) / n


@pytest.mark.parametrize("fold", [True, False])
def test_estimate_is_unbiased_over_tables_where_no_bucket_is_empty(fold):
    X, y, theta, full = regression()
    estimates = []
    for k in range(4000):
        # One bit: the bucket of a query holds one of the two copies of every sample, so it is never empty.
        sampler = SimHashSampler(torch.cat([X, y[:, None]], 1), bits=1, tables=1, generator=gen(k))
        estimates.append(lgd_gradient(sampler, X, y, theta, fold=fold))
    estimates = torch.stack(estimates)
    error = estimates.mean(0) - full
    assert float((error.abs() / (estimates.std(0) / math.sqrt(4000))).max()) < 4
    # and an estimator that is off by a factor of two would be noticed
    assert float(((error + full).abs() / (estimates.std(0) / math.sqrt(4000))).max()) > 8


def test_one_estimate_by_hand():
    X, y, theta, _ = regression()
    V = torch.cat([X, y[:, None]], 1)
    index, p, _ = SimHashSampler(V, bits=3, tables=10, generator=gen(1)).sample(
        torch.cat([theta, torch.tensor([-1.0], dtype=torch.float64)])
    )
    leaf = theta.clone().requires_grad_()
    (gradient,) = torch.autograd.grad((leaf @ X[index] - y[index]) ** 2, leaf)
    torch.testing.assert_close(lgd_gradient(SimHashSampler(V, bits=3, tables=10, generator=gen(1)), X, y, theta), gradient / (60 * p))


def test_empty_buckets_bias_the_published_weight():
    """One stored vector: the bucket is empty with probability 1 - c, so the mean of 1/p is the number of tables, not 1."""
    v, query = torch.tensor([[1.0, 0.2]]), torch.tensor([0.3, 1.0])
    weights = []
    for k in range(6000):
        try:
            weights.append(1 / SimHashSampler(v, bits=1, tables=3, signed=False, generator=gen(k)).sample(query)[1])
        except RuntimeError:
            weights.append(0.0)
    assert np.mean(weights) == pytest.approx(3, rel=0.05)


def test_sampling_prefers_large_gradients():
    X, y, theta, _ = regression(300, 5)
    norms = 2 * (X @ theta - y).abs()
    sampler = SimHashSampler(torch.cat([X, y[:, None]], 1), bits=5, tables=100, generator=gen())
    query = torch.cat([theta, torch.tensor([-1.0], dtype=torch.float64)])
    drawn = [float(norms[sampler.sample(query)[0]]) for _ in range(1000)]
    assert np.mean(drawn) > 1.1 * float(norms.mean())


def test_generator_repeats_everything():
    V, query = torch.randn(20, 3), torch.randn(3)
    runs = [[sampler.sample(query) for _ in range(10)] for sampler in (SimHashSampler(V, generator=gen(3)) for _ in range(2))]
    assert runs[0] == runs[1]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"bits": 0}, "bits"),
        ({"bits": 63}, "bits"),
        ({"tables": 0}, "tables"),
        ({"V": torch.ones(3)}, "N, d"),
        ({"V": torch.ones(0, 3)}, "N, d"),
        ({"V": torch.zeros(2, 3)}, "different from zero"),
        ({"V": torch.full((2, 3), torch.nan)}, "finite"),
    ],
)
def test_bad_tables(kwargs, message):
    with pytest.raises(ValueError, match=message):
        SimHashSampler(**({"V": torch.ones(2, 3)} | kwargs))


def test_bad_queries():
    sampler = SimHashSampler(torch.eye(3), bits=2, tables=5, generator=gen())
    with pytest.raises(ValueError, match="different from zero"):
        sampler.sample(torch.zeros(3))
    with pytest.raises(ValueError, match="shape"):
        sampler.sample(torch.ones(2))
    with pytest.raises(ValueError, match="one length"):
        collision_prob(torch.ones(2), torch.ones(3))
    with pytest.raises(ValueError, match="N = 3"):
        lgd_gradient(sampler, torch.ones(4, 2), torch.ones(4), torch.ones(2))
    with pytest.raises(ValueError, match="both signs"):
        SimHashSampler(torch.eye(3), signed=False).sample(torch.ones(3), fold=True)
    far = SimHashSampler(torch.tensor([[1.0, 0.0]]), bits=20, tables=2, signed=False, generator=gen())
    with pytest.raises(RuntimeError, match="empty in all 2 tables"):
        far.sample(torch.tensor([-1.0, 0.0]))
