"""The Khatri-Rao condition against NumPy's kron, autograd and the cases where the theorem does not hold."""

import math

import numpy as np
import pytest
import torch

from dlatlas.theory import vanishing_minima
from dlatlas.theory.vanishing_minima import khatri_rao, residual_is_forced_zero, slope_matrix, train_mse_binary

D = torch.float64


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=D, generator=torch.Generator().manual_seed(seed))


def test_slopes_by_hand():
    W, X = torch.tensor([[1.0, 0.0], [0.0, -1.0]]), torch.tensor([[2.0, 1.0], [-1.0, -3.0], [1.0, 1.0]])
    assert slope_matrix(W, X, 0.25).tolist() == [[1.0, 0.25, 1.0], [0.25, 1.0, 0.25]]
    assert slope_matrix(W, X).tolist() == [[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]]
    assert slope_matrix(W.double(), X.double()).dtype == D


def test_columns_are_kronecker_products():
    A, X = normal(3, 5), normal(5, 4, seed=1)
    K = khatri_rao(A, X)
    assert K.shape == (12, 5)
    for i in range(5):
        np.testing.assert_allclose(K[:, i].numpy(), np.kron(A[:, i].numpy(), X[i].numpy()))


@pytest.mark.parametrize("rho", [0.0, 0.3, -1.0])
def test_the_gradient_is_the_khatri_rao_product_times_the_residual(rho):
    W, X, y = normal(3, 4).requires_grad_(), normal(10, 4, seed=1), normal(10, seed=2)
    inputs = X @ W.T
    f = torch.where(inputs > 0, inputs, rho * inputs).sum(1)
    (gradient,) = torch.autograd.grad((y - f).square().mean(), W)
    e = (y - f).detach()
    ours = -2 / 10 * khatri_rao(slope_matrix(W.detach(), X, rho), X) @ e
    torch.testing.assert_close(ours.view(3, 4), gradient)


def test_rank_decides():
    X = normal(20, 10)
    assert residual_is_forced_zero(normal(4, 10, seed=1), X, 0.1)
    assert not residual_is_forced_zero(normal(1, 10, seed=1), X, 0.1)  # 10 equations, 20 residuals
    twice = X.clone()
    twice[7] = twice[3]
    assert not residual_is_forced_zero(normal(8, 10, seed=1), twice, 0.1)  # the same sample with two labels cannot be fitted
    dead = torch.cat([X.abs(), -X.abs()[:1]])  # positive weights: the last sample switches every unit off
    assert not residual_is_forced_zero(normal(8, 10, seed=1).abs(), dead, 0.0)


def test_linear_slopes_never_get_beyond_the_inputs_dimension():
    X = normal(20, 10)
    assert int(torch.linalg.matrix_rank(khatri_rao(torch.ones(6, 20, dtype=D), X))) == 10
    W = normal(6, 10, seed=1)
    # Almost linear: the rank is full, but only thanks to singular values of order 1 - rho.
    assert residual_is_forced_zero(W, X, 1 - 1e-3)
    assert not residual_is_forced_zero(W, X, 1 - 1e-3, rtol=0.1)


def test_a_bad_stationary_point_exists_exactly_where_the_rank_is_too_small():
    """Residuals in the null space of A o X are invisible to the gradient: a stationary point with a positive loss."""
    W, X = normal(1, 5), normal(12, 5, seed=1)
    K = khatri_rao(slope_matrix(W, X, 0.2), X)
    null = torch.linalg.svd(K).Vh[5:]  # (7, 12)
    w = W.clone().requires_grad_()
    inputs = X @ w.T
    f = torch.where(inputs > 0, inputs, 0.2 * inputs).sum(1)
    loss = (f.detach() + null[0] - f).square().mean()  # labels chosen so that the residual is null[0]
    assert float(loss.detach()) > 0.05
    assert float(torch.autograd.grad(loss, w)[0].norm()) < 1e-12
    assert not residual_is_forced_zero(W, X, 0.2)


def test_training_fits_beyond_the_threshold_only():
    X = normal(60, 10)
    y = torch.randint(0, 2, (60,), generator=torch.Generator().manual_seed(3)) * 2 - 1
    wide = train_mse_binary(X, y, 24, 0.1, 400, torch.Generator().manual_seed(0), lr=0.02, batch=20)
    narrow = train_mse_binary(X, y, 1, 0.1, 400, torch.Generator().manual_seed(0), lr=0.02, batch=20)
    assert set(wide) == {"mse", "class_error", "grad_norm"}
    assert wide["class_error"] == 0 and wide["mse"] < 1e-3
    assert narrow["class_error"] > 0.1 and narrow["mse"] > 0.3
    again, W = train_mse_binary(X, y, 24, 0.1, 400, torch.Generator().manual_seed(0), lr=0.02, batch=20, return_weights=True)
    assert again == wide
    inputs = X @ W.T
    f = torch.where(inputs > 0, inputs, 0.1 * inputs) @ torch.tensor([1.0, -1.0], dtype=D).repeat(12)
    assert float((y - f).square().mean()) == pytest.approx(wide["mse"])


def test_labels_of_any_two_values():
    X = normal(40, 20)
    y = (X[:, 0] > 0).long()
    result = train_mse_binary(X, y, 8, 0.0, 150, torch.Generator().manual_seed(0), lr=0.02)
    assert result["class_error"] == 0 and result["mse"] < 0.05
    untrained = train_mse_binary(X, y, 2, 0.0, 1, torch.Generator().manual_seed(0), lr=1e-9)
    torch.manual_seed(0)
    W = torch.randn(2, 20, dtype=D, generator=torch.Generator().manual_seed(0)) / math.sqrt(20)
    f = (X @ W[0]).relu() - (X @ W[1]).relu()
    assert untrained["mse"] == pytest.approx(float((y - f).square().mean()), rel=1e-6)
    assert untrained["class_error"] == pytest.approx(float(((f > 0.5) != (y > 0)).double().mean()))
    w = W.clone().requires_grad_()
    loss = (y - (X @ w[0]).relu() + (X @ w[1]).relu()).square().mean()
    assert untrained["grad_norm"] == pytest.approx(float(torch.autograd.grad(loss, w)[0].norm()), rel=1e-6)


def test_everything_lives_on_the_device_of_the_samples(monkeypatch):
    """New tensors go to another device here unless they follow the samples; mixing the two raises."""
    monkeypatch.setattr(vanishing_minima, "fit", lambda *args, **kwargs: None)  # Adam keeps its counter on the default device
    X, y = normal(12, 5), (normal(12, seed=1) > 0).long()

    def run():
        return train_mse_binary(X, y, 4, 0.1, 1, torch.Generator().manual_seed(0), return_weights=True)

    expected, W = run()
    with torch.device("meta"):
        result, there = run()
    assert result == expected and there.device == X.device and torch.equal(there, W)


def test_bad_input():
    W, X = normal(2, 3), normal(4, 3)
    for rho in (1.0, 2.0, math.nan):
        with pytest.raises(ValueError, match="rho"):
            slope_matrix(W, X, rho)
    with pytest.raises(ValueError, match="n >= 1"):
        slope_matrix(W, X[:0])
    with pytest.raises(ValueError, match="n >= 1"):
        khatri_rao(normal(2, 3), X)
    with pytest.raises(ValueError, match="finite"):
        slope_matrix(W * math.inf, X)
    with pytest.raises(ValueError, match="differentiable point"):
        residual_is_forced_zero(torch.zeros_like(W), X, 0.1)
    with pytest.raises(ValueError, match="two different values"):
        train_mse_binary(X, torch.ones(4), 2, 0.0, 1)
    with pytest.raises(ValueError, match="at least 1"):
        train_mse_binary(X, torch.tensor([0, 1, 0, 1]), 0, 0.0, 1)
    with pytest.raises(ValueError, match="n >= 1"):
        train_mse_binary(X[:0], torch.ones(0), 2, 0.0, 1)
