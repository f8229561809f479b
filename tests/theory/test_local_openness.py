"""Openness against the paper's own existence statement, closed-form distances and brute force."""

import math

import pytest
import torch
from scipy.linalg import null_space
from scipy.optimize import minimize

from dlatlas.theory.local_openness import _products, is_locally_open, nearest_factors, openness_ratio

CASES = [
    (m, n, k, r1, r2, r12)
    for m in range(1, 4)
    for n in range(1, 4)
    for k in range(1, 4)
    for r1 in range(min(m, k) + 1)
    for r2 in range(min(k, n) + 1)
    for r12 in range(max(0, r1 + r2 - k), min(r1, r2) + 1)
]


def T(rows):
    return torch.tensor(rows, dtype=torch.float64)


def factors(m, n, k, r1, r2, r12, seed=0):
    """Random factors with exactly these ranks: coordinates that overlap in r12 places, turned by orthogonal matrices."""
    g = torch.Generator().manual_seed(seed)
    A, Q, B = (torch.linalg.qr(torch.randn(d, d, dtype=torch.float64, generator=g))[0] for d in (m, k, n))
    E1, E2 = torch.zeros(m, k, dtype=torch.float64), torch.zeros(k, n, dtype=torch.float64)
    for i in range(r1):
        E1[i, i] = 0.5 + i
    for j, i in enumerate([*range(r12), *range(r1, r1 + r2 - r12)]):
        E2[i, j] = 1.5 - 0.4 * j
    return A @ E1 @ Q, Q.T @ E2 @ B


def completed_rank(W1, W2, seed=0):
    """Largest rank of W1 + W~ over W~ with W~ W2 = 0: a random choice attains it almost surely."""
    N = torch.from_numpy(null_space(W2.T.numpy(), rcond=1e-9))  # columns v with v^T W2 = 0
    mix = torch.randn(len(W1), N.shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return int(torch.linalg.matrix_rank(W1 + mix @ N.T, rtol=1e-9))


def test_ranks_against_the_existence_statement():
    for case in CASES:
        m, n, k, *_ = case
        W1, W2 = factors(*case)
        left, right = completed_rank(W1, W2), completed_rank(W2.T, W1.T)
        expected = left == m or right == n if k >= min(m, n) else left == k and right == k
        assert is_locally_open(W1, W2) is expected, case
        assert is_locally_open(W2.T, W1.T) is expected, case
        assert is_locally_open(1e-6 * W1, 1e5 * W2) is expected, case


def test_known_points():
    one, zero = T([[1.0]]), T([[0.0]])
    assert all(is_locally_open(a, b) for a in (one, zero) for b in (one, zero))
    assert is_locally_open(torch.zeros(2, 2), torch.zeros(2, 2))
    assert not is_locally_open(torch.diag(T([1.0, 0.0])), torch.diag(T([0.0, 1.0])))
    assert is_locally_open(torch.eye(2), torch.zeros(2, 2))
    assert is_locally_open(torch.zeros(2, 1), torch.zeros(1, 2))
    assert not is_locally_open(torch.zeros(2, 1), T([[1.0, 0.0]]))


def test_product_that_is_zero_up_to_rounding():
    W1, W2 = factors(3, 3, 3, 1, 2, 0)
    assert float((W1 @ W2).abs().max()) > 0  # rounding noise, of rank 1 by its own scale
    assert not is_locally_open(W1, W2)


@pytest.mark.parametrize("z", [1e-2, 1e-4, -1e-6])
def test_distance_at_the_origin_of_the_line(z):
    V1, V2, residual, distance = nearest_factors(T([[0.0]]), T([[0.0]]), T([[z]]))
    assert residual < 1e-12
    assert distance == pytest.approx(math.sqrt(2 * abs(z)), rel=1e-6)
    assert float(V1 * V2) == pytest.approx(z)


def test_distance_that_does_not_shrink():
    # V1 V2 = eps a b^T forces V2 along b: its distance from (1, 0) is the sine of the angle.
    Z = 1e-6 * T([[1.0], [2.0]]) @ T([[0.6, 0.8]])
    *_, residual, distance = nearest_factors(T([[0.0], [0.0]]), T([[1.0, 0.0]]), Z)
    assert residual < 1e-14
    assert distance == pytest.approx(0.8, abs=1e-6)


def test_distance_against_scipy():
    W1, W2 = factors(2, 3, 2, 2, 2, 2)
    Z = W1 @ W2 + 0.05 * torch.ones(2, 3, dtype=torch.float64)
    start = torch.cat([W1.flatten(), W2.flatten()]).numpy()

    def split(v):
        return v[:4].reshape(2, 2), v[4:].reshape(2, 3)

    solved = minimize(
        lambda v: ((v - start) ** 2).sum(),
        start,
        method="SLSQP",
        tol=1e-12,
        constraints={"type": "eq", "fun": lambda v: (split(v)[0] @ split(v)[1] - Z.numpy()).ravel()},
    )
    V1, V2, residual, distance = nearest_factors(W1, W2, Z)
    assert residual < 1e-12
    assert distance == pytest.approx(math.sqrt(solved.fun), rel=1e-4)
    assert distance == pytest.approx(float(((V1 - W1).square().sum() + (V2 - W2).square().sum()).sqrt()))


def test_nothing_to_do():
    W1, W2 = factors(3, 2, 2, 1, 2, 1)
    *_, residual, distance = nearest_factors(W1, W2, W1 @ W2)
    assert residual < 1e-12
    assert distance < 1e-12


@pytest.mark.parametrize("case", [(2, 2, 2, 1, 1, 0), (2, 2, 1, 1, 0, 0), (1, 3, 2, 0, 2, 0), (3, 3, 3, 2, 2, 1)], ids=str)
def test_closed_points_keep_a_distance(case):
    W1, W2 = factors(*case)
    assert not is_locally_open(W1, W2)
    assert openness_ratio(W1, W2, 1e-6, 40, torch.Generator().manual_seed(0)) * 1e-3 > 0.1


@pytest.mark.parametrize(
    "case", [(1, 1, 1, 0, 0, 0), (2, 2, 2, 0, 0, 0), (2, 3, 2, 1, 1, 1), (3, 2, 1, 0, 0, 0), (2, 2, 3, 2, 1, 0)], ids=str
)
def test_open_points_follow_the_square_root(case):
    W1, W2 = factors(*case)
    assert is_locally_open(W1, W2)
    for eps in (1e-3, 1e-6):
        assert openness_ratio(W1, W2, eps, 10, torch.Generator().manual_seed(0)) < 3


def test_ratio_at_the_origin_of_the_line_is_exact():
    assert openness_ratio(T([[0.0]]), T([[0.0]]), 1e-4, 5) == pytest.approx(math.sqrt(2), rel=1e-6)


@pytest.mark.parametrize("case", [(3, 3, 1, 1, 1, 1), (2, 3, 1, 0, 0, 0), (3, 3, 2, 1, 1, 1), (2, 3, 2, 0, 1, 0)], ids=str)
def test_products_lie_in_the_range_at_the_asked_distance(case):
    Z0, k = torch.matmul(*factors(*case)), case[2]
    Z = _products(Z0, k, 1e-3, 20, torch.Generator().manual_seed(0))
    assert (torch.linalg.matrix_rank(Z, atol=1e-12) <= k).all()
    torch.testing.assert_close((Z - Z0).flatten(1).norm(dim=1), torch.full((20,), 1e-3, dtype=torch.float64), rtol=1e-4, atol=0)


def test_generator_decides():
    W1, W2 = factors(2, 2, 2, 1, 1, 0)
    a, b, c = (openness_ratio(W1, W2, 1e-4, 3, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert a == b != c


def test_refuses():
    A = torch.ones(2, 2)
    for bad in (torch.ones(3, 2), torch.ones(2), torch.ones(2, 0)):
        with pytest.raises(ValueError, match="expected factors"):
            is_locally_open(A, bad)
    with pytest.raises(ValueError, match="finite"):
        is_locally_open(A, A / 0)
    with pytest.raises(ValueError, match="product Z"):
        nearest_factors(A, A, torch.ones(2, 3))
    with pytest.raises(ValueError, match="iteration"):
        nearest_factors(A, A, A, iters=0)
    for eps, trials in ((0.0, 3), (-1.0, 3), (math.nan, 3), (0.1, 0)):
        with pytest.raises(ValueError, match="eps > 0"):
            openness_ratio(A, A, eps, trials)
