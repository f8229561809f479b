"""The evidence against closed forms and brute-force integrals, the fit against scikit-learn."""

import math

import numpy as np
import pytest
import torch
from scipy.integrate import dblquad
from scipy.special import expit
from scipy.stats import multivariate_normal
from sklearn.linear_model import LogisticRegression

from dlatlas.theory import bayes_evidence
from dlatlas.theory.bayes_evidence import fit_laplace_logistic, log_evidence, log_ratio_to_null, optimal_batch, sgd_noise_scale


def logistic_data(n=40, d=3, seed=0):
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(n, d))
    return torch.from_numpy(X), torch.from_numpy(np.where(X @ np.ones(d) + rng.normal(size=n) > 0, 1.0, -1.0))


def test_laplace_is_exact_for_a_gaussian_model():
    # y = X w + noise: the marginal likelihood is N(y; 0, s^2 I + X X^T / lam).
    rng = np.random.default_rng(1)
    X, y, s2 = rng.normal(size=(12, 4)), rng.normal(size=12), 0.7
    for lam in (0.01, 1.0, 50.0):
        want = multivariate_normal(np.zeros(12), s2 * np.eye(12) + X @ X.T / lam).logpdf(y)
        H = X.T @ X / s2
        w = np.linalg.solve(H + lam * np.eye(4), X.T @ y / s2)
        nll = 0.5 * ((y - X @ w) ** 2).sum() / s2 + 6 * math.log(2 * math.pi * s2)
        assert log_evidence(nll, w @ w, torch.linalg.eigvalsh(torch.from_numpy(H)), lam) == pytest.approx(want, rel=1e-10)


def test_laplace_is_close_to_the_integral_for_logistic_regression():
    X, y = logistic_data(40, 2, 2)
    for lam in (0.5, 5.0):
        found = fit_laplace_logistic(X, y, lam)

        def joint(b, a, lam=lam):
            m = y.numpy() * (X.numpy() @ np.array([a, b]))
            return math.exp(-np.logaddexp(0, -m).sum() - lam / 2 * (a * a + b * b)) * lam / (2 * math.pi)

        exact, _ = dblquad(joint, -2, 6, -2, 6, epsabs=1e-16, epsrel=1e-6)
        assert log_evidence(found["nll"], float(found["w"] @ found["w"]), found["eigs"], lam) == pytest.approx(math.log(exact), abs=0.06)


def test_evidence_does_not_depend_on_the_units_of_the_data():
    X, y = logistic_data()
    one = fit_laplace_logistic(X, y, 0.3)
    for c in (0.1, 30.0):
        other = fit_laplace_logistic(c * X, y, 0.3 * c**2)
        torch.testing.assert_close(other["w"], one["w"] / c)
        a, b = (log_evidence(f["nll"], float(f["w"] @ f["w"]), f["eigs"], lam) for f, lam in ((one, 0.3), (other, 0.3 * c**2)))
        assert a == pytest.approx(b, rel=1e-10)


def test_fit_agrees_with_sklearn_and_its_hessian_with_autograd():
    X, y = logistic_data(60, 4, 3)
    for lam in (1e-3, 0.1, 10.0):
        found = fit_laplace_logistic(X, y, lam)
        peer = LogisticRegression(C=1 / lam, fit_intercept=False, tol=1e-10, max_iter=10_000).fit(X.numpy(), y.numpy())
        np.testing.assert_allclose(found["w"], peer.coef_[0], rtol=1e-5, atol=1e-7)

        def nll(w):
            return torch.nn.functional.softplus(-y * (X @ w)).sum()

        assert found["nll"] == pytest.approx(float(nll(found["w"])))
        want = torch.linalg.eigvalsh(torch.autograd.functional.hessian(nll, found["w"]))
        torch.testing.assert_close(found["eigs"], want)
        gradient = torch.autograd.functional.jacobian(nll, found["w"]) + lam * found["w"]
        assert float(gradient.abs().max()) < 1e-8
    torch.testing.assert_close(fit_laplace_logistic(X, (y > 0).long(), 1.0)["w"], fit_laplace_logistic(X, y, 1.0)["w"])
    assert found["w"].dtype == torch.float64


def test_newton_converges_where_the_full_step_overshoots():
    failed = 0
    for seed in range(150):  # heavy tails, hardly any prior
        rng = np.random.default_rng(seed)
        Z, lam = rng.standard_t(1, size=(6, 3)) * 5, 1e-4

        def gradient(w, Z=Z, lam=lam):
            return lam * w - Z.T @ expit(-Z @ w)

        w = np.zeros(3)
        for _ in range(200):
            p = expit(-Z @ w)
            w = w - np.linalg.solve((Z * (p * (1 - p))[:, None]).T @ Z + lam * np.eye(3), gradient(w))
        failed += np.abs(gradient(w)).max() > 1e-3
        found = fit_laplace_logistic(torch.from_numpy(Z), torch.ones(6), lam)["w"].numpy()
        assert np.abs(gradient(found)).max() < 1e-6 * np.abs(Z).max()
    assert failed > 0  # without damping some of these diverge


def test_newton_refuses_a_step_that_gains_next_to_nothing(monkeypatch):
    # An objective that falls, but by far less than 1e-4 of what the gradient promises, whatever the size of the step.
    monkeypatch.setattr(bayes_evidence, "_objective", lambda Z, w, lam: 1.0 - 1e-8 * float(w.norm()))
    X, y = logistic_data()
    assert not fit_laplace_logistic(X, y, 1.0)["w"].any()


def test_random_labels_lose_to_the_null_model_and_true_ones_win():
    X, y = logistic_data(200, 30, 5)
    scrambled = y[torch.randperm(200, generator=torch.Generator().manual_seed(1))]
    best = {}
    for name, labels in (("true", y), ("random", scrambled)):
        fits = [(fit_laplace_logistic(X, labels, lam), lam) for lam in (0.01, 0.1, 1.0, 10.0)]
        best[name] = max(log_ratio_to_null(f["nll"], float(f["w"] @ f["w"]), f["eigs"], lam, 200, 2) for f, lam in fits)
        assert all(200 * math.log(2) - f["nll"] > 0 for f, _ in fits)  # the fit alone always looks better than chance
    assert best["true"] > 20
    assert best["random"] < 0


def test_formula_and_null():
    eigs = torch.tensor([0.0, 3.0, 8.0])
    want = -(5.0 + 0.5 * 2.0 * 1.5 + 0.5 * (math.log(5 / 2) + math.log(10 / 2)))
    assert log_evidence(5.0, 1.5, eigs, 2.0) == pytest.approx(want)
    assert log_ratio_to_null(5.0, 1.5, eigs, 2.0, 10, 4) == pytest.approx(want + 10 * math.log(4))
    assert log_ratio_to_null(10 * math.log(3), 0.0, torch.zeros(3), 1.0, 10, 3) == pytest.approx(0)  # the null model itself
    # Sharper minima are less likely: the evidence falls with every eigenvalue.
    assert log_evidence(5.0, 1.5, 2 * eigs, 2.0) < log_evidence(5.0, 1.5, eigs, 2.0)
    assert log_evidence(5.0, 1.5, torch.tensor([-0.5]), 2.0) > log_evidence(5.0, 1.5, torch.tensor([0.0]), 2.0)


def test_noise_scale_and_its_inverse():
    assert sgd_noise_scale(0.1, 1000, 1000) == 0
    assert sgd_noise_scale(0.1, 1000, 10) == pytest.approx(9.9)
    for lr in (0.1, 2.0):
        for n in (100, 6000):
            for batch in (1, 7, 100):
                assert optimal_batch(lr, n, sgd_noise_scale(lr, n, batch)) == pytest.approx(batch)
    assert optimal_batch(0.2, 1000, 50.0) == pytest.approx(2 * optimal_batch(0.1, 1000, 50.0), rel=0.01)
    assert optimal_batch(0.1, 2000, 50.0) == pytest.approx(2 * optimal_batch(0.1, 1000, 50.0))


def test_noise_scale_is_the_variance_of_batch_gradients():
    # Mean of B out of N numbers without replacement: variance s^2 / B (N - B) / (N - 1), so (N / B - 1) up to N / (N - 1).
    rng, n = np.random.default_rng(6), 50
    g = rng.normal(size=n)
    for batch in (5, 20):
        means = np.array([rng.permutation(g)[:batch].mean() for _ in range(20_000)])
        want = g.var() / (n - 1) * sgd_noise_scale(1.0, n, batch)
        assert means.var() == pytest.approx(want, rel=0.05)


def test_bad_input():
    eigs = torch.ones(2)
    for lam in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="lam"):
            log_evidence(1.0, 1.0, eigs, lam)
        with pytest.raises(ValueError, match="lam"):
            fit_laplace_logistic(torch.ones(2, 2), torch.tensor([1, -1]), lam)
    with pytest.raises(ValueError, match="minimum"):
        log_evidence(1.0, 1.0, torch.tensor([-1.0, 5.0]), 1.0)
    with pytest.raises(ValueError, match="vector"):
        log_evidence(1.0, 1.0, torch.eye(2), 1.0)
    with pytest.raises(ValueError, match="finite"):
        log_evidence(math.nan, 1.0, eigs, 1.0)
    with pytest.raises(ValueError, match="finite"):
        log_evidence(1.0, -1.0, eigs, 1.0)
    with pytest.raises(ValueError, match="n_classes"):
        log_ratio_to_null(1.0, 1.0, eigs, 1.0, 10, 1)
    for batch in (0, -1, 101):
        with pytest.raises(ValueError, match="batch"):
            sgd_noise_scale(0.1, 100, batch)
    with pytest.raises(ValueError, match="lr"):
        sgd_noise_scale(0.0, 100, 10)
    with pytest.raises(ValueError, match="g_opt"):
        optimal_batch(0.1, 100, -1.0)
    X, y = logistic_data()
    with pytest.raises(ValueError, match="labels"):
        fit_laplace_logistic(X, y + 1, 1.0)
    with pytest.raises(ValueError, match="expected X"):
        fit_laplace_logistic(X, y[:-1], 1.0)
    with pytest.raises(ValueError, match="finite"):
        fit_laplace_logistic(X * math.inf, y, 1.0)
