"""AccSGD against its formulas in NumPy; the moment matrices against their limits, a 3x3 matrix by hand and a Monte Carlo run."""

import numpy as np
import pytest
import torch

from dlatlas.theory.accsgd import AccSGD, accsgd_radius, best_rate, hb_radius


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_three_steps_by_the_published_formulas(decay):
    rng = np.random.default_rng(0)
    w, gradients = rng.normal(size=5), rng.normal(size=(3, 5))
    lr, kappa, xi, c = 0.05, 200.0, 4.0, 0.6
    theta = torch.tensor(w, requires_grad=True)
    opt = AccSGD([theta], lr=lr, kappa=kappa, xi=xi, small_const=c, weight_decay=decay)
    beta, large, zeta, buf = c * c * xi / kappa, lr * kappa / c, c / (c + c * c * xi / kappa), w.copy()
    for g in gradients:
        theta.grad = torch.tensor(g)
        opt.step()
        g = g + decay * w
        buf = beta * ((1 / beta - 1) * buf - large * g + w)
        w = zeta * (w - lr * g) + (1 - zeta) * buf
        np.testing.assert_allclose(theta.detach().numpy(), w)


def test_a_zero_gradient_leaves_weights_at_their_start():
    theta = torch.tensor([3.0, -2.0], requires_grad=True)
    opt = AccSGD([theta], lr=0.1)
    for _ in range(5):
        theta.grad = torch.zeros(2)
        opt.step()
    torch.testing.assert_close(theta.detach(), torch.tensor([3.0, -2.0]))  # a buffer of zeros would drag them


def test_plain_sgd_is_the_limit_without_momentum():
    lr, s, p = 0.7, 0.8, 0.3
    assert hb_radius(lr, 0.0, s, p) == pytest.approx(1 - 2 * p * lr * s**2 + p * lr**2 * s**4)
    assert hb_radius(lr, 0.0, s, p, nesterov=True) == pytest.approx(hb_radius(lr, 0.0, s, p))


def test_the_heavy_ball_matrix_by_hand():
    lr, m, s, p = 0.6, 0.7, 0.9, 0.4
    ea = 1 + m - p * lr * s**2
    ea2 = (1 - p) * (1 + m) ** 2 + p * (1 + m - lr * s**2) ** 2
    moments = np.array([[ea2, -2 * m * ea, m**2], [ea, -m, 0], [1, 0, 0]])
    assert hb_radius(lr, m, s, p) == pytest.approx(np.abs(np.linalg.eigvals(moments)).max())


def test_with_certainty_it_is_the_deterministic_rate_squared():
    lr, m, s = 0.3, 0.6, 0.9
    hb = np.array([[1 + m - lr * s**2, -m], [1, 0]])
    assert hb_radius(lr, m, s, p=1.0) == pytest.approx(np.abs(np.linalg.eigvals(hb)).max() ** 2)
    keep = 1 - lr * s**2
    nag = np.array([[keep * (1 + m), -keep * m], [1, 0]])
    assert hb_radius(lr, m, s, p=1.0, nesterov=True) == pytest.approx(np.abs(np.linalg.eigvals(nag)).max() ** 2)


def monte_carlo(update, p, steps=10, chains=100_000):
    """Mean squared error of a coordinate under random draws, after every step."""
    rng = np.random.default_rng(0)
    e, other, out = np.ones(chains), np.ones(chains), []
    for _ in range(steps):
        e, other = update(e, other, rng.random(chains) < p)
        out.append(np.mean(e**2))
    return np.array(out)


def power(update, p, steps=10):
    """The same, exactly, by the full 4x4 matrix of the second moments of both numbers."""
    one, zero = np.ones(1), np.zeros(1)
    A = [
        np.array([[float(update(a, b, np.array([seen]))[i][0]) for a, b in ((one, zero), (zero, one))] for i in (0, 1)])
        for seen in (False, True)
    ]
    M = (1 - p) * np.kron(A[0], A[0]) + p * np.kron(A[1], A[1])
    z, out = np.ones(4), []
    for _ in range(steps):
        z = M @ z
        out.append(z[0])
    return np.array(out), np.abs(np.linalg.eigvals(M)).max()


def heavy_ball(e, prev, b, lr=0.5, m=0.6, s=0.8):
    return e - lr * b * s**2 * e + m * (e - prev), e


def nesterov(e, prev, b, lr=0.5, m=0.6, s=0.8):
    look = e + m * (e - prev)
    return look - lr * b * s**2 * look, e


def acc(e, buf, b, lr=0.5, kappa=20.0, xi=2.0, s=0.8, c=0.7):
    beta, zeta = c * c * xi / kappa, c / (c + c * c * xi / kappa)
    g = b * s**2 * e
    buf = (1 - beta) * buf + beta * (e - lr * kappa / c * g)
    return zeta * (e - lr * g) + (1 - zeta) * buf, buf


RADII = {
    heavy_ball: lambda p: hb_radius(0.5, 0.6, 0.8, p),
    nesterov: lambda p: hb_radius(0.5, 0.6, 0.8, p, nesterov=True),
    acc: lambda p: accsgd_radius(0.5, 20.0, 2.0, 0.8, p),
}


@pytest.mark.parametrize("update", RADII)
@pytest.mark.parametrize("p", [0.5, 0.2])
def test_radii_against_the_full_matrix_and_chains_of_random_draws(update, p):
    exact, radius = power(update, p)
    np.testing.assert_allclose(monte_carlo(update, p), exact, rtol=0.05)
    assert RADII[update](p) == pytest.approx(radius, rel=1e-9)


def test_the_recursion_is_what_the_optimizer_does():
    rng = np.random.default_rng(1)
    theta = torch.ones(1, dtype=torch.float64, requires_grad=True)
    opt = AccSGD([theta], lr=0.5, kappa=20.0, xi=2.0)
    e, buf = np.ones(1), np.ones(1)
    for _ in range(20):
        b = rng.random() < 0.5
        theta.grad = b * 0.8**2 * theta.detach()
        opt.step()
        e, buf = acc(e, buf, np.array([b]))
    assert theta.item() == pytest.approx(e[0])


def test_best_rate_is_the_minimum_of_the_radii_over_its_grid():
    s = 0.3
    lrs, momenta = np.geomspace(1e-3, 2, 6), 1 - np.geomspace(1, 2e-3, 6)
    for method, nesterov in (("hb", False), ("nag", True)):
        loop = min(max(hb_radius(a, m, v, 0.5, nesterov) for v in (1.0, s)) for a in lrs for m in momenta)
        assert best_rate(method, s, grid=6) == pytest.approx(loop)
    assert best_rate("sgd", s, grid=6) == pytest.approx(min(max(hb_radius(a, 0.0, v) for v in (1.0, s)) for a in lrs))
    loop = min(
        max(accsgd_radius(a, k, x, v) for v in (1.0, s))
        for a in np.linspace(0.1, 1.6, 4)
        for k in np.geomspace(1, 1e4, 6)
        for x in np.geomspace(0.5, 200, 6)
    )
    assert best_rate("accsgd", s, grid=6) == pytest.approx(loop)


def test_with_one_direction_sgd_is_done_at_once():
    # sigma2 = 1: a step of 1 removes the error whenever the coordinate is seen.
    assert best_rate("sgd", 1.0, grid=400) == pytest.approx(0.5, abs=1e-3)


def test_state_round_trip():
    def run(restart):
        w = torch.tensor([1.0, -1.0], dtype=torch.float64, requires_grad=True)
        opt = AccSGD([w], lr=0.1, kappa=50.0, xi=3.0)
        for i in range(8):
            if restart and i == 4:
                saved = opt.state_dict()
                opt = AccSGD([w], lr=9.0)
                opt.load_state_dict(saved)

            def closure(opt=opt):
                opt.zero_grad()
                loss = (w**2).sum()
                loss.backward()
                return loss

            loss = opt.step(closure)
        assert loss.item() < 2
        return w.detach()

    assert torch.equal(run(False), run(True))


def test_bad_input():
    w = [torch.zeros(1, requires_grad=True)]
    for kwargs in ({"lr": -1.0}, {"kappa": 0.5}, {"xi": 0.0}, {"small_const": 0.0}, {"small_const": 1.1}, {"weight_decay": -1.0}):
        with pytest.raises(ValueError):
            AccSGD(w, **{"lr": 0.1} | kwargs)
    for kwargs in ({"p": 0.0}, {"p": 1.1}, {"lr": -0.1}, {"momentum": -0.1}, {"sigma": -1.0}):
        with pytest.raises(ValueError):
            hb_radius(**{"lr": 0.1, "momentum": 0.5, "sigma": 1.0} | kwargs)
    for kwargs in ({"p": 0.0}, {"kappa": 0.0}, {"xi": -1.0}, {"small_const": 2.0}):
        with pytest.raises(ValueError):
            accsgd_radius(**{"lr": 0.1, "kappa": 10.0, "xi": 1.0, "sigma": 1.0} | kwargs)
    for args in (("adam", 0.5), ("sgd", 0.0), ("sgd", 0.5, 1)):
        with pytest.raises(ValueError):
            best_rate(*args)
