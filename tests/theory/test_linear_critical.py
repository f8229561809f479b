"""The listed critical points against gradients, Hessians, PCA and a brute-force count."""

import itertools

import numpy as np
import pytest
import torch

from dlatlas.theory.kit.curvature import full_hessian
from dlatlas.theory.linear_critical import all_values, critical_value, relu_spurious_example, shallow_critical


def problem(seed=0, d0=5, d2=5, n=30, rank=None):
    g = torch.Generator().manual_seed(seed)
    X = torch.randn(rank or d0, n, dtype=torch.float64, generator=g)
    if rank:
        X = torch.randn(d0, rank, dtype=torch.float64, generator=g) @ X
    return X, torch.randn(d2, n, dtype=torch.float64, generator=g)


def loss(A2, A1, X, Y):
    return 0.5 * (A2 @ A1 @ X - Y).square().sum()


def gradient_norm(A2, A1, X, Y):
    A2, A1 = A2.clone().requires_grad_(), A1.clone().requires_grad_()
    return float(sum(g.square().sum() for g in torch.autograd.grad(loss(A2, A1, X, Y), (A2, A1)))) ** 0.5


@pytest.mark.parametrize("sizes", [{}, {"d0": 3}, {"d2": 2}, {"d0": 6, "rank": 3}, {"n": 4}])
def test_every_listed_point_is_critical_with_the_listed_value(sizes):
    X, Y = problem(**sizes)
    C = torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    values = all_values(X, Y, 3)
    for J, value in values.items():
        for gauge in (None, C):
            A2, A1 = shallow_critical(X, Y, 3, list(J), gauge)
            assert A2.shape == (len(Y), 3)
            assert A1.shape == (3, len(X))
            assert gradient_norm(A2, A1, X, Y) < 1e-9
            assert float(loss(A2, A1, X, Y)) == pytest.approx(value, abs=1e-9)
            assert torch.linalg.matrix_rank(A2 @ A1, rtol=1e-9) == len(J)
        assert critical_value(X, Y, J) == pytest.approx(value, abs=1e-12)


def test_values_against_a_transcription_with_numpy():
    X, Y = problem(1, d0=4, n=12)
    x, y = X.numpy(), Y.numpy()
    sigma = y @ np.linalg.pinv(x) @ x @ y.T
    lam = np.sort(np.linalg.eigvalsh(sigma))[::-1][:4]  # the rank is 4: four inputs
    values = all_values(X, Y, 2)
    assert list(values) == [J for p in range(3) for J in itertools.combinations(range(4), p)]
    for J, value in values.items():
        assert value == pytest.approx(0.5 * (np.trace(y @ y.T) - lam[list(J)].sum()), abs=1e-10)


def test_number_of_sets():
    X, Y = problem()
    assert len(all_values(X, Y, 3)) == 26
    assert len(all_values(X, Y, 9)) == 32


def test_exactly_one_set_is_a_minimum():
    X, Y = problem(2, d0=4, d2=3, n=20)
    minima = []
    for J in all_values(X, Y, 2):
        A2, A1 = (A.requires_grad_() for A in shallow_critical(X, Y, 2, J))
        H = full_hessian(lambda A2=A2, A1=A1: loss(A2, A1, X, Y), [A2, A1])
        if torch.linalg.eigvalsh(H)[0] > -1e-8:
            minima.append(J)
    assert minima == [(0, 1)]


def test_linear_autoencoder_is_pca():
    X, _ = problem(3)
    s = torch.linalg.svdvals(X)
    U = torch.linalg.svd(X)[0][:, :2]
    A2, A1 = shallow_critical(X, X, 2, [0, 1])
    torch.testing.assert_close(A2 @ A1, U @ U.T)
    assert critical_value(X, X, [1, 3]) == pytest.approx(0.5 * float(s[0] ** 2 + s[2] ** 2 + s[4] ** 2))


def test_global_value_is_the_best_low_rank_fit():
    X, Y = problem(4)
    A2, A1 = shallow_critical(X, Y, 2, [1, 0])
    best = critical_value(X, Y, (0, 1))
    # Reduced rank regression by another route: least squares first, then truncation in the metric of the inputs.
    M = torch.linalg.lstsq(X.T, Y.T).solution.T
    root = torch.linalg.cholesky(X @ X.T)
    U, s, V = torch.linalg.svd(M @ root)
    R = U[:, :2] * s[:2] @ V[:2] @ torch.linalg.inv(root)
    torch.testing.assert_close(A2 @ A1, R)
    assert float(0.5 * (R @ X - Y).square().sum()) == pytest.approx(best)


def test_idle_hidden_units_are_zero_columns():
    X, Y = problem()
    A2, A1 = shallow_critical(X, Y, 4, [2])
    assert (A2[:, 1:] == 0).all()
    assert (A1[1:] == 0).all()


def test_repeated_eigenvalues():
    X = torch.eye(3, dtype=torch.float64)
    Y = torch.diag(torch.tensor([2.0, 2.0, 1.0], dtype=torch.float64))
    with pytest.raises(ValueError, match="distinct eigenvalues"):
        shallow_critical(X, Y, 2, [0])
    A2, A1 = shallow_critical(X, Y, 2, [0, 1])  # the whole eigenspace is unambiguous
    torch.testing.assert_close(A2 @ A1, torch.diag(torch.tensor([2.0, 2.0, 0.0], dtype=torch.float64)))
    assert all_values(X, Y, 1)[1,] == pytest.approx(2.5)


def test_inputs_that_carry_nothing_about_the_targets():
    X = torch.tensor([[1.0, 1.0, -1.0, -1.0]], dtype=torch.float64)
    Y = torch.tensor([[1.0, -1.0, 1.0, -1.0]], dtype=torch.float64)
    assert all_values(X, Y, 1) == {(): 2.0}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((2, [0, 1, 2]), "at most 2 indices"),
        ((3, [1, 1]), "different"),
        ((3, [5]), "rank 5"),
        ((3, [-1]), "rank 5"),
        ((2, [0], torch.ones(2, 2)), "invertible"),
        ((2, [0], torch.eye(3)), "invertible"),
        ((0, []), "0 hidden units"),
    ],
)
def test_refuses(arguments, message):
    X, Y = problem()
    with pytest.raises(ValueError, match=message):
        shallow_critical(X, Y, *arguments)


def test_refuses_bad_data():
    X, Y = problem()
    with pytest.raises(ValueError, match="column for each sample"):
        critical_value(X, Y[:, :-1], [0])
    with pytest.raises(ValueError, match="finite"):
        all_values(X, Y * float("nan"), 2)
    with pytest.raises(ValueError, match="rank 5"):
        critical_value(X, Y, [7])
    with pytest.raises(ValueError, match="hidden unit"):
        all_values(X, Y, 0)


def test_inputs_are_not_modified():
    X, Y = problem()
    x, y = X.clone(), Y.clone()
    shallow_critical(X, Y, 2, [0])
    assert torch.equal(X, x)
    assert torch.equal(Y, y)


def test_rectifier_example_is_a_spurious_minimum():
    e = relu_spurious_example()
    X, Y, W1, W2 = e["X"], e["Y"], e["W1"], e["W2"]

    def value(first, second):
        return 0.5 * (second @ torch.relu(first @ X) - Y).square().sum()

    assert float(value(W1, W2)) == e["loss"] == 0.5
    assert e["global_loss"] == 0.0
    assert (W1 @ X > 0).all()  # inside the cone where the net is linear
    assert e["loss"] == pytest.approx(critical_value(X, Y, [0]))
    A2, A1 = shallow_critical(X, Y, 2, [0])
    torch.testing.assert_close(W2 @ W1, A2 @ A1)
    g = torch.Generator().manual_seed(0)
    for _ in range(500):
        D1, D2 = torch.randn(2, 2, generator=g, dtype=torch.float64), torch.randn(1, 2, generator=g, dtype=torch.float64)
        step = 1e-3 / float(D1.square().sum() + D2.square().sum()) ** 0.5
        assert value(W1 + step * D1, W2 + step * D2) >= e["loss"] - 1e-12
