"""The limit direction of gradient descent against scikit-learn's SVM, closed forms and a plain gradient descent."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from sklearn.svm import SVC

from dlatlas.theory.kit.tasks import separable_blobs
from dlatlas.theory.max_margin_bias import direction_gap, gd_path, hard_margin_svm, svm_duals


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("n", "d"), [(30, 2), (60, 5), (40, 80)])
def test_svm_agrees_with_sklearn(n, d):
    X, y = separable_blobs(n, d, 0.3, gen(n))
    # Points mirrored with the other label: the separator through the origin of the symmetric problem has no intercept.
    both, labels = torch.cat([X, -X]).numpy(), torch.cat([y, -y]).numpy()
    peer = SVC(kernel="linear", C=1e8, tol=1e-8).fit(both, labels)
    np.testing.assert_allclose(hard_margin_svm(X, y), peer.coef_[0], rtol=1e-4, atol=1e-5)
    assert abs(peer.intercept_[0]) < 1e-5


def test_svm_satisfies_the_optimality_conditions():
    X, y = separable_blobs(80, 10, 0.2, gen(1))
    w, alpha = hard_margin_svm(X, y), svm_duals(X, y)
    margins = y * (X @ w)
    assert float(margins.min()) == pytest.approx(1, abs=1e-9)
    assert float(alpha.min()) >= 0
    torch.testing.assert_close(X.T @ (alpha * y), w)
    assert float((alpha * (margins - 1)).abs().max()) < 1e-8
    assert float(alpha.sum()) == pytest.approx(float(w @ w))  # no duality gap


def test_svm_in_closed_form_and_under_scaling():
    x = torch.tensor([3.0, 4.0])
    X, y = torch.stack([x, -x]), torch.tensor([1, -1])
    torch.testing.assert_close(hard_margin_svm(X, y), x.double() / 25)
    for c in (1e-3, 2.0, 1e3):
        torch.testing.assert_close(hard_margin_svm(c * X, y), x.double() / 25 / c)
    # Two support vectors at a right angle.
    torch.testing.assert_close(hard_margin_svm(torch.eye(2), torch.tensor([1.0, -1.0])), torch.tensor([1.0, -1.0]).double())


@pytest.mark.parametrize("angle", [1e-2, 1e-4])
def test_a_very_narrow_street_is_still_a_street(angle):
    # Two points of one class, `angle` short of opposite: the separator is upright and has margin sin(angle / 2).
    X = torch.tensor([[math.cos(angle / 2), math.sin(angle / 2)], [-math.cos(angle / 2), math.sin(angle / 2)]]).double()
    w = hard_margin_svm(X, torch.ones(2))
    assert float(w[1]) == pytest.approx(1 / math.sin(angle / 2), rel=1e-4)
    assert abs(float(w[0])) < 1e-4 * float(w[1])


@pytest.mark.parametrize(("loss", "slope"), [("logistic", lambda m: 1 / (1 + np.exp(m))), ("exp", lambda m: np.exp(-m))])
def test_path_is_plain_gradient_descent(loss, slope):
    X, y = separable_blobs(25, 3, 0.3, gen(2))
    before = X.clone()
    path = gd_path(X, y, loss, 0.01, [0, 1, 7, 20])
    A, b, w, want = X.numpy(), y.numpy(), np.zeros(3), []
    for t in range(21):
        if t in (0, 1, 7, 20):
            want.append(w.copy())
        gradient = np.zeros(3)
        for xi, yi in zip(A, b):
            gradient -= slope(yi * xi @ w) * yi * xi
        w -= 0.01 * gradient
    np.testing.assert_allclose(path, want, rtol=1e-12, atol=1e-14)
    assert torch.equal(X, before)
    assert path.dtype == torch.float64


def test_default_step_is_one_over_the_smoothness():
    X, y = separable_blobs(25, 3, 0.3, gen(2))
    sigma = np.linalg.svd(X.numpy(), compute_uv=False)[0]
    torch.testing.assert_close(gd_path(X, y, record=[50]), gd_path(X, y, lr=4 / sigma**2, record=[50]))
    torch.testing.assert_close(gd_path(X, y, "exp", record=[50]), gd_path(X, y, "exp", lr=1 / sigma**2, record=[50]))
    # The smoothness bound is tight for one direction: X with one singular value, at w = 0.
    with pytest.raises(ValueError, match=r"2/beta"):
        gd_path(X, y, lr=8.001 / sigma**2, record=[1])


def test_two_symmetric_points_follow_the_one_dimensional_recursion():
    # With X = (x, -x) every step is along x: m(t+1) = m(t) + 2 lr |x|^2 / (1 + e^m), whose solution grows like log t.
    X, y = torch.tensor([[2.0], [-2.0]]), torch.tensor([1.0, -1.0])
    record = [10**k for k in range(1, 6)]
    w = gd_path(X, y, lr=0.5, record=record)[:, 0]
    rho = w - 0.5 * torch.tensor(record).double().log()  # w_hat = 1/2
    assert float(rho[-1] - rho[-2]) == pytest.approx(0, abs=1e-3)
    # Dual variable: w_hat = alpha_1 x + alpha_2 x, so alpha = 1/8 each, and lr t e^{-2w} tends to it.
    assert 0.5 * record[-1] * math.exp(-2 * float(w[-1])) == pytest.approx(1 / 8, rel=2e-3)


@pytest.mark.parametrize("loss", ["logistic", "exp"])
def test_residual_is_bounded_and_direction_converges(loss):
    X, y = separable_blobs(30, 3, 0.5, gen(3))
    w_hat, record = hard_margin_svm(X, y), [100, 1000, 10_000, 50_000]
    path = gd_path(X, y, loss, record=record)
    rho = (path @ w_hat / w_hat.norm() ** 2 - torch.tensor(record).double().log()).tolist()
    drift = [abs(b - a) for a, b in pairwise(rho)]
    assert drift[0] > drift[1] > drift[2]  # while log t grows by 2.3, 2.3 and 1.6
    assert drift[2] < 0.25
    gaps = [direction_gap(w, w_hat) for w in path]
    assert gaps[0] > gaps[1] > gaps[2] > gaps[3]
    # Not the direction of least squares, the plausible rival.
    assert direction_gap(path[-1], torch.linalg.lstsq(X, y).solution) > gaps[-1]


def test_duplicating_an_ordinary_point_leaves_the_limit():
    X, y = separable_blobs(30, 3, 0.4, gen(4))
    far = int((y * (X @ hard_margin_svm(X, y))).argmax())
    more = torch.cat([X, X[far].expand(100, 3)]), torch.cat([y, y[far].expand(100)])
    assert direction_gap(hard_margin_svm(*more), hard_margin_svm(X, y)) < 1e-9


def test_direction_gap():
    u = torch.tensor([1.0, 0.0])
    assert direction_gap(u, 5 * u) == 0
    assert direction_gap(u, -u) == 2
    assert direction_gap(u, torch.tensor([0.0, 3.0])) == pytest.approx(math.sqrt(2))
    with pytest.raises(ValueError, match="not zero"):
        direction_gap(u, 0 * u)
    with pytest.raises(ValueError, match="one length"):
        direction_gap(u, torch.ones(3))


def test_assumptions_are_checked():
    X, y = separable_blobs(20, 2, 0.3, gen(5))
    overlapping = torch.cat([X, X[:1]]), torch.cat([y, -y[:1]])
    for call in (hard_margin_svm, svm_duals, gd_path):
        with pytest.raises(ValueError, match="not linearly separable"):
            call(*overlapping)
        with pytest.raises(ValueError, match=r"-1 or \+1"):
            call(X, (y > 0).double())
        with pytest.raises(ValueError, match="finite"):
            call(X * math.nan, y)
        with pytest.raises(ValueError, match="expected X"):
            call(X, y[:-1])
    with pytest.raises(ValueError, match="all rows"):
        hard_margin_svm(0 * X, y)
    for record in ([], [10, 10], [100, 10], [-1, 5]):
        with pytest.raises(ValueError, match="increasing"):
            gd_path(X, y, record=record)
    with pytest.raises(ValueError, match="logistic"):
        gd_path(X, y, "hinge", record=[1])
    for lr in (0.0, -1.0, math.nan, 1e3):
        with pytest.raises(ValueError, match="step"):
            gd_path(X, y, lr=lr, record=[1])
