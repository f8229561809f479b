"""The update bound against the quadratic it solves, the net against autograd, and the training against a plain perceptron."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import brentq

from dlatlas.theory.kit.tasks import separable_blobs
from dlatlas.theory.max_margin_bias import hard_margin_svm
from dlatlas.theory.overparam_sgd import LeakyTwoLayer, compression_bound, train_hinge, update_bound


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def blobs(n, d, margin, seed=0):
    """Separable data with every |x| <= 1."""
    X, y = separable_blobs(n, d, margin, gen(seed))
    return X / X.norm(dim=1).max(), y


@pytest.mark.parametrize(("w", "lr", "alpha", "r"), [(3.0, 0.1, 0.1, 0.0), (10.0, 1.0, 0.5, 2.0), (1.5, 2.0, 0.9, 7.0)])
def test_bound_is_the_root_of_the_quadratic(w, lr, alpha, r):
    # After t updates <W, W*> >= t lr alpha sqrt(2k) - r |W*| and |W|^2 <= r^2 + t (2 lr + lr^2), with |W*| = sqrt(2k) w.
    for k in (1, 50):
        star = math.sqrt(2 * k) * w

        def slack(t, star=star, k=k):
            return t * lr * alpha * math.sqrt(2 * k) - r * star - star * math.sqrt(r * r + t * (2 * lr + lr * lr))

        root = brentq(slack, 1e-9 if r == 0 else 0, 1e9, xtol=1e-9, rtol=1e-14)
        assert update_bound(w, lr, alpha, r) == pytest.approx(root, rel=1e-8)


def test_net_is_its_formula_and_homogeneous():
    net = LeakyTwoLayer(4, 3, 0.2, init_scale=2.0, generator=gen(1))
    assert float(net.W.detach().norm()) == pytest.approx(2.0)
    x = torch.randn(7, 4, dtype=torch.float64, generator=gen(2))
    W, want = net.W.detach().numpy(), []
    for row in x.numpy():
        z = [float(w @ row) for w in W]
        s = [max(0.2 * a, a) for a in z]
        want.append((sum(s[:3]) - sum(s[3:])) / math.sqrt(6))
    np.testing.assert_allclose(net(x).detach(), want, rtol=1e-12)
    total = net(x).sum()
    (g,) = torch.autograd.grad(total, net.W)
    assert float((net.W.detach() * g).sum()) == pytest.approx(float(total.detach()))  # Euler: <W, grad N> = N
    assert not LeakyTwoLayer(4, 3)(x).any()


def plain_sgd(net, X, y, lr, epochs, generator):
    """One example at a time with autograd, in the same order."""
    updates = 0
    for _ in range(epochs):
        for i in torch.randperm(len(X), generator=generator):
            loss = (1 - y[i] * net(X[i : i + 1])[0]).clamp_min(0)
            if loss > 0:
                (g,) = torch.autograd.grad(loss, net.W)
                with torch.no_grad():
                    net.W -= lr * g
                updates += 1
    return updates


def test_training_is_plain_sgd_on_the_hinge_loss():
    X, y = blobs(40, 5, 0.1, 3)
    fast, slow = (LeakyTwoLayer(5, 4, 0.3, init_scale=1.0, generator=gen(4)) for _ in range(2))
    told = train_hinge(fast, X, y, 0.5, max_epochs=6, generator=gen(5))
    assert told["updates"] == plain_sgd(slow, X, y, 0.5, 6, gen(5))
    torch.testing.assert_close(fast.W, slow.W)
    assert told["epochs"] == 6
    assert not told["zero_loss"]


def test_one_linear_unit_pair_is_a_perceptron_with_margin():
    # alpha -> 1: N(x) = (w - u).x / sqrt(2), and w - u moves by lr sqrt(2) y x on every violated margin.
    X, y = blobs(50, 3, 0.2, 6)
    net = LeakyTwoLayer(3, 1, 1 - 1e-12)
    told = train_hinge(net, X, y, 0.7, generator=gen(7))
    p, updates, epochs, order = np.zeros(3), 0, 0, gen(7)
    while True:
        before, epochs = updates, epochs + 1
        for i in torch.randperm(50, generator=order):
            if float(y[i]) * (p @ X[i].numpy()) < 1:
                p = p + 0.7 * float(y[i]) * X[i].numpy()
                updates += 1
        if updates == before:
            break
    assert epochs > 2
    assert told == {"updates": updates, "epochs": epochs, "zero_loss": True}  # the last epoch changed nothing
    np.testing.assert_allclose((net.W[0] - net.W[1]).detach() / math.sqrt(2), p, rtol=1e-9)


def test_first_update_from_zero_has_slope_one_in_every_unit():
    x, k = torch.tensor([[0.6, -0.8]], dtype=torch.float64), 3
    net = LeakyTwoLayer(2, k, 0.1)
    told = train_hinge(net, x, torch.tensor([-1.0]), 0.5, max_epochs=1)
    want = -0.5 * x / math.sqrt(2 * k)  # lr y sigma'(0) v x, with the sign of the vote
    torch.testing.assert_close(net.W.detach(), torch.cat([want.expand(k, 2), -want.expand(k, 2)]))
    assert told["updates"] == 1


def test_bound_for_another_output_scale_is_a_change_of_step_and_start():
    # With v = c / sqrt(2k): <W, W*> >= t lr alpha c sqrt(2k) - r |W*| and |W|^2 <= r^2 + t (2 lr + lr^2 c^2).
    w, lr, alpha, r, k = 4.0, 0.5, 0.3, 1.5, 7
    star = math.sqrt(2 * k) * w
    for c in (0.5, 1.0, 4.0):

        def slack(t, c=c):
            return t * lr * alpha * c * math.sqrt(2 * k) - r * star - star * math.sqrt(r * r + t * (2 * lr + (lr * c) ** 2))

        assert update_bound(w, lr * c**2, alpha, c * r) == pytest.approx(brentq(slack, 0, 1e9, xtol=1e-9, rtol=1e-14), rel=1e-8)
    X, y = blobs(40, 3, 0.2, 12)
    for k in (2, 30):
        net = LeakyTwoLayer(3, k, alpha, init_scale=r, generator=gen(13))
        net.v *= math.sqrt(k)
        told = train_hinge(net, X, y, lr, generator=gen(14))
        assert told["zero_loss"]
        assert told["updates"] <= update_bound(float(hard_margin_svm(X, y).norm()), lr * k, alpha, math.sqrt(k) * r)


def test_bound_holds_over_many_draws_and_widths():
    worst = 0.0
    for seed in range(27):
        X, y = blobs(30, 4, 0.3, seed)
        alpha, lr, start = [0.1, 0.5, 0.9][seed % 3], [0.1, 1.0, 5.0][seed // 3 % 3], [0.0, 1.0, 20.0][seed // 9 % 3]
        net = LeakyTwoLayer(4, [1, 8, 64][seed % 3], alpha, init_scale=start, generator=gen(seed))
        told = train_hinge(net, X, y, lr, generator=gen(seed))
        bound = update_bound(float(hard_margin_svm(X, y).norm()), lr, alpha, start)
        assert told["zero_loss"]
        assert bool((y * net(X) >= 1).all())
        worst = max(worst, told["updates"] / bound)
    assert 0.02 < worst <= 1  # neither broken nor empty


def test_zero_start_counts_the_same_at_every_width():
    X, y = blobs(60, 5, 0.1, 8)
    counts = {train_hinge(LeakyTwoLayer(5, k, 0.2), X, y, 0.3, generator=gen(9))["updates"] for k in (1, 3, 40)}
    assert len(counts) == 1


def test_relu_can_be_stuck_where_leaky_relu_is_not():
    X, y = blobs(30, 3, 0.3, 10)
    net = LeakyTwoLayer(3, 1, 0.1)
    direction = torch.linalg.lstsq(X, torch.ones(30, dtype=torch.float64)).solution
    X = X + 3 * direction / direction.norm()  # all points on one side of a hyperplane
    X = X / X.norm(dim=1).max()
    with torch.no_grad():
        net.W.copy_(-(direction / direction.norm()).expand(2, 3))
        assert float((X @ net.W.T).max()) < 0
    stuck = LeakyTwoLayer(3, 1, 0.1)
    stuck.load_state_dict(net.state_dict())
    stuck.alpha = 0.0
    assert not train_hinge(stuck, X, y, 1.0, max_epochs=20)["zero_loss"]
    torch.testing.assert_close(stuck.W, net.W)
    train_hinge(net, X, y, 1.0, max_epochs=20)
    assert float((net.W - stuck.W).detach().norm()) > 0.1


def test_zero_loss_is_seen_after_the_last_epoch():
    X, y = torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), torch.tensor([1, -1])
    told = train_hinge(LeakyTwoLayer(2, 2, 0.5), X, y, 10.0, max_epochs=1, generator=gen())
    assert told == {"updates": 1, "epochs": 1, "zero_loss": True}


def test_compression_bound():
    # The smallest eps with n^c (1 - eps)^(n - c) <= delta is below it, and close when eps is small.
    n, c, delta = 5000, 20, 0.05
    exact = brentq(lambda e: c * math.log(n) + (n - c) * math.log1p(-e) - math.log(delta), 1e-9, 0.9)
    assert exact <= compression_bound(c, n, delta) <= 1.05 * exact
    assert compression_bound(0, 100, 0.5) == pytest.approx(math.log(2) / 100)
    assert compression_bound(30, 100, 0.1) == pytest.approx((30 * math.log(100) + math.log(10)) / 70)
    for arguments in ((60, 100, 0.1), (-1, 100, 0.1)):
        with pytest.raises(ValueError, match=r"n >= 2"):
            compression_bound(*arguments)
    for delta in (0, 1, -0.1, math.nan):
        with pytest.raises(ValueError, match="delta"):
            compression_bound(1, 100, delta)


def test_compression_bound_holds_over_many_draws():
    """With probability 1 - delta the error on fresh data is below the bound: counted over draws."""
    broken = 0
    for seed in range(15):
        X, y = blobs(2400, 2, 0.15, seed)
        net = LeakyTwoLayer(2, 3, 0.5)
        told = train_hinge(net, X[:400], y[:400], 1.0, generator=gen(seed))
        assert told["zero_loss"]
        error = float((y[400:] * net(X[400:]) <= 0).double().mean())
        broken += error > compression_bound(told["updates"], 400, 0.2) if 2 * told["updates"] <= 400 else 0
    assert broken <= 3 + 3 * 1.6  # 0.2 of 15 draws, and three standard deviations


def test_bad_input():
    for alpha in (0.0, 1.0, -0.1, math.nan):
        with pytest.raises(ValueError, match="alpha"):
            LeakyTwoLayer(3, 2, alpha)
        with pytest.raises(ValueError, match="alpha"):
            update_bound(1.0, 1.0, alpha)
    with pytest.raises(ValueError, match="at least 1"):
        LeakyTwoLayer(0, 2)
    with pytest.raises(ValueError, match="init_scale"):
        LeakyTwoLayer(3, 2, init_scale=-1.0)
    for bad in ((0.0, 1.0, 0.5), (1.0, 0.0, 0.5), (1.0, 1.0, 0.5, -1.0), (math.inf, 1.0, 0.5)):
        with pytest.raises(ValueError, match="expected"):
            update_bound(*bad)
    X, y = blobs(20, 3, 0.2)
    net = LeakyTwoLayer(3, 2)
    with pytest.raises(ValueError, match=r"\|x\| <= 1"):
        train_hinge(net, 2 * X, y, 1.0)
    with pytest.raises(ValueError, match=r"\|x\| <= 1"):
        train_hinge(net, X * math.nan, y, 1.0)
    with pytest.raises(ValueError, match=r"-1 or \+1"):
        train_hinge(net, X, (y > 0).long(), 1.0)
    with pytest.raises(ValueError, match="expected X"):
        train_hinge(net, X[:, :2], y, 1.0)
    with pytest.raises(ValueError, match="lr"):
        train_hinge(net, X, y, 0.0)
