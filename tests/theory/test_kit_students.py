"""Batched teacher-student losses against loops and autograd, optimisers against closed forms and scipy."""

import math

import numpy as np
import pytest
import scipy.optimize
import torch
from torch import nn

from dlatlas.kit.flat import flat_grad
from dlatlas.theory.kit.gauss import relu_kernel
from dlatlas.theory.kit.students import (
    Student,
    lbfgs_many,
    least_eigenvalue,
    levenberg_marquardt,
    linear_net_loss,
    linear_student,
    relu_cross,
    relu_population_grad,
    relu_population_hessian,
    relu_population_loss,
    relu_pull,
    relu_student,
    split_layers,
    wide_student,
)
from dlatlas.theory.kit.students import __all__ as names

D = torch.float64


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=D, generator=torch.Generator().manual_seed(seed))


def orthonormal(k, d, seed=0):
    return torch.linalg.qr(normal(d, k, seed=seed))[0].T.contiguous()


def test_kernels_are_those_of_single_pairs():
    U, V = normal(2, 3, 5), normal(4, 5, seed=1)
    for b in range(2):
        for i in range(3):
            for j in range(4):
                assert float(relu_cross(U, V)[b, i, j]) == pytest.approx(relu_kernel(U[b, i], V[j]), rel=1e-12)


def test_loss_by_sampling():
    W, V = normal(3, 4), normal(2, 4, seed=1)
    x = normal(400_000, 4, seed=2)
    e = ((x @ W.T).relu().sum(1) - (x @ V.T).relu().sum(1)) ** 2 / 2
    assert abs(float(relu_population_loss(W, V) - e.mean())) < 4 * float(e.std()) / math.sqrt(len(x))
    assert float(relu_population_loss(V, V)) == 0
    assert float(relu_population_loss(V.flip(0), V)) == pytest.approx(0, abs=1e-14)


def naive_loss(W, V):
    """The same by acos and loops; differentiable away from parallel rows."""
    total = 0
    for i, (A, B, sign) in enumerate([(W, W, 1), (W, V, -2), (V, V, 1)]):
        for j, a in enumerate(A):
            for k, b in enumerate(B):
                if i != 1 and j == k:
                    total = total + sign * a @ a / 2
                else:
                    t = torch.acos(a @ b / (a.norm() * b.norm()))
                    total = total + sign * a.norm() * b.norm() * (torch.sin(t) + (math.pi - t) * torch.cos(t)) / (2 * math.pi)
    return total / 2


def test_gradient_and_hessian_by_autograd():
    W, V = normal(2, 3, 4), normal(2, 4, seed=1)
    for b in range(2):
        w = W[b].clone().requires_grad_()
        (gradient,) = torch.autograd.grad(naive_loss(w, V), w)
        torch.testing.assert_close(relu_population_grad(W, V)[b], gradient)
        H = torch.autograd.functional.hessian(lambda w: naive_loss(w, V), W[b]).reshape(12, 12)
        torch.testing.assert_close(relu_population_hessian(W, V)[b], H)


@pytest.mark.parametrize("case", ["same", "teacher", "opposite"])
def test_derivatives_where_rows_are_parallel(case):
    V = orthonormal(2, 4)
    W = {"same": normal(1, 4).repeat(2, 1), "teacher": torch.stack([V[0], normal(4)]), "opposite": torch.stack([V[0], -V[0]])}[case]
    h, eye = 1e-5, torch.eye(8, dtype=D)
    shifted = [(W + h * e.view(2, 4), W - h * e.view(2, 4)) for e in eye]
    gradient = torch.stack([(relu_population_loss(a, V) - relu_population_loss(b, V)) / (2 * h) for a, b in shifted])
    torch.testing.assert_close(relu_population_grad(W, V).flatten(), gradient, atol=1e-9, rtol=0)
    H = torch.stack([(relu_population_grad(a, V) - relu_population_grad(b, V)).flatten() / (2 * h) for a, b in shifted])
    torch.testing.assert_close(relu_population_hessian(W, V), H, atol=1e-4, rtol=0)  # the third derivative jumps here


def test_pull_is_the_derivative_with_the_others_held():
    U, V = normal(2, 5), normal(3, 5, seed=1)
    u = U.clone().requires_grad_()
    total = sum(
        a.norm() * b.norm() * (torch.sin(t) + (math.pi - t) * torch.cos(t)) / (2 * math.pi)
        for a in u
        for b in V
        for t in [torch.acos(a @ b / (a.norm() * b.norm()))]
    )
    torch.testing.assert_close(relu_pull(U, V), torch.autograd.grad(total, u)[0])


def test_linear_loss_is_that_of_the_samples():
    sizes = [3, 2, 4, 2]
    X, Y, flat = normal(50, 3), normal(50, 2, seed=1), normal(5, 6 + 8 + 8, seed=2)
    loss = linear_net_loss(flat, sizes, X.T @ X / 50, Y.T @ X / 50, Y.T @ Y / 50)
    for row, value in zip(flat, loss):
        W1, W2, W3 = row[:6].view(2, 3), row[6:14].view(4, 2), row[14:].view(2, 4)
        assert float(value) == pytest.approx(float((X @ W1.T @ W2.T @ W3.T - Y).square().sum()) / 100)
        for ours, theirs in zip(split_layers(row, sizes), (W1, W2, W3)):
            assert torch.equal(ours, theirs)
    with pytest.raises(ValueError, match="22 weights"):
        split_layers(flat[:, 1:], sizes)


def test_lbfgs_on_quadratics_of_different_conditioning():
    M = normal(4, 6, 6)
    A = M @ M.transpose(1, 2) + 0.1 * torch.eye(6, dtype=D)
    b = normal(4, 6, seed=1)

    def loss(x):
        k = len(x)  # rows may be fewer once some runs have stopped, so each brings its own matrix along
        return (torch.einsum("si,sij,sj->s", x[:, 7:], A[x[:, 0].long()], x[:, 7:]) / 2 - (x[:, 7:] * x[:, 1:7]).sum(1)).reshape(k)

    def gradient(x):
        g = torch.zeros_like(x)
        g[:, 7:] = torch.einsum("sij,sj->si", A[x[:, 0].long()], x[:, 7:]) - x[:, 1:7]
        return g

    start = torch.cat([torch.arange(4.0, dtype=D)[:, None], b, torch.zeros(4, 6, dtype=D)], 1)
    stops = lbfgs_many(loss, start, grad=gradient, tol=1e-7)
    torch.testing.assert_close(stops.x[:, 7:], torch.linalg.solve(A, b), atol=1e-6, rtol=1e-6)
    assert float(stops.grad_norm.max()) <= 1e-7 and stops.steps < 200
    assert float(start[:, 7:].abs().max()) == 0


def test_lbfgs_on_rosenbrock_is_the_same_alone_and_in_company():
    def rosenbrock(x):
        return (100 * (x[:, 1:] - x[:, :-1] ** 2) ** 2 + (1 - x[:, :-1]) ** 2).sum(1)

    starts = torch.tensor([[-1.2, 1.0], [0.0, 0.0], [2.0, -1.0]], dtype=D)
    together = lbfgs_many(rosenbrock, starts, tol=1e-8)
    torch.testing.assert_close(together.x, torch.ones(3, 2, dtype=D), atol=1e-6, rtol=0)
    alone = lbfgs_many(rosenbrock, starts[:1], tol=1e-8)
    torch.testing.assert_close(together.x[:1], alone.x, atol=1e-8, rtol=0)
    theirs = scipy.optimize.minimize(scipy.optimize.rosen, starts[0].numpy(), jac=scipy.optimize.rosen_der, method="L-BFGS-B")
    np.testing.assert_allclose(alone.x[0].numpy(), theirs.x, atol=1e-3)
    early = lbfgs_many(rosenbrock, starts, steps=3)
    assert early.steps == 3 and bool((early.loss <= rosenbrock(starts)).all())


def test_lbfgs_goes_down_and_stops_in_the_nearest_minimum():
    stops = lbfgs_many(lambda x: (x[:, 0] ** 2 - 1) ** 2 + 0.3 * x[:, 0], torch.tensor([[0.9], [-0.9]], dtype=D))
    assert stops.x[0, 0] > 0 > stops.x[1, 0]
    assert stops.loss[0] > stops.loss[1] + 0.5


def test_least_eigenvalue_of_quadratics():
    A = torch.diag(torch.tensor([3.0, -2.0, 1.0], dtype=D))
    values = least_eigenvalue(lambda x: torch.einsum("si,ij,sj->s", x, A, x) / 2, normal(4, 3))
    torch.testing.assert_close(values, torch.full((4,), -2.0, dtype=D))
    assert least_eigenvalue(lambda x: x.sum(1), normal(0, 3)).shape == (0,)


def test_levenberg_marquardt_solves_linear_regression_and_reports_the_gradient():
    X, Y = normal(20, 4), normal(20, 2, seed=1)
    net = nn.Linear(4, 2).double()
    loss, gradient = levenberg_marquardt(net, X, Y, tol=1e-10)
    A = torch.cat([X, torch.ones(20, 1, dtype=D)], 1)
    best = float((A @ torch.linalg.lstsq(A, Y).solution - Y).square().sum()) / 40
    assert loss == pytest.approx(best) and gradient < 1e-9
    torch.manual_seed(0)
    deep = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).double()
    loss, gradient = levenberg_marquardt(deep, X, Y, steps=3)
    mine = (deep(X) - Y).square().sum() / 40
    assert loss == pytest.approx(float(mine.detach()))
    assert gradient == pytest.approx(float(flat_grad(mine, list(deep.parameters())).norm()))
    assert all(p.requires_grad for p in deep.parameters())


def test_students_reach_what_theory_says():
    g = torch.Generator().manual_seed(0)
    outcome = relu_student(orthonormal(2, 4), 2, 20, g).train()
    assert outcome.reached == 1 and outcome.least.shape == (0,) and outcome.grad_norm < 1e-6
    worse = relu_student(orthonormal(10, 10), 10, 30, g).train()
    assert 0.2 < worse.reached < 1
    assert 0 < float(worse.least.min()) <= float(worse.least.max()) < 0.1  # strict minima that are not global
    assert float(worse.gaps.max()) > 1e-2
    X = normal(200, 4)
    Y = X @ normal(3, 4, seed=3).T
    s = torch.linalg.svdvals((Y.T @ X) @ torch.linalg.inv(torch.linalg.cholesky(X.T @ X)).T)
    target = float(Y.square().sum() - s[:2].square().sum()) / 400
    assert linear_student(X, Y, [4, 2, 3], target, 20, g).train().reached == 1
    wide = wide_student(X[:20], Y[:20].sum(1), 20, 5, g)
    assert wide.train().reached == 1
    x = wide.starts[:2].clone().requires_grad_()
    torch.testing.assert_close(wide.grad(x.detach()), torch.autograd.grad(wide.loss(x).sum(), x)[0])


def test_an_outcome_counts_runs_and_looks_at_the_others():
    starts = torch.tensor([[0.9], [-0.9], [-1.1]], dtype=D)
    outcome = Student(lambda x: (x[:, 0] ** 2 - 1) ** 2 + 0.3 * x[:, 0], starts, target=-0.3054).train(tol=1e-3)
    assert outcome.reached == pytest.approx(2 / 3)
    x = scipy.optimize.brentq(lambda z: 4 * z**3 - 4 * z + 0.3, 0.5, 1)
    assert outcome.least.tolist() == pytest.approx([12 * x**2 - 4], rel=1e-4)
    assert float(outcome.gaps.max()) == pytest.approx((x**2 - 1) ** 2 + 0.3 * x + 0.3054, rel=1e-6)


def test_the_tolerance_of_the_gradient_is_passed_on():
    """On a plateau of order four the gradient is small long before the loss is."""
    student = Student(lambda x: x[:, 0] ** 4 / 4, torch.tensor([[0.5], [0.7]], dtype=D), target=0.0)
    coarse, fine = student.train(tol=1e-12, grad_tol=1e-6), student.train(tol=1e-12, grad_tol=1e-12)
    assert coarse.reached == 0 and 1e-12 < coarse.grad_norm <= 1e-6
    assert fine.reached == 1 and fine.grad_norm <= 1e-12
    assert student.train(tol=1e-12).gaps.tolist() == coarse.gaps.tolist()  # 1e-6 unless told otherwise


def test_students_live_on_the_device_of_their_data():
    """The "meta" device knows shapes only and refuses to mix with others, as a GPU does."""
    g, X, y, V = torch.Generator().manual_seed(0), normal(6, 4), normal(6), orthonormal(2, 4)
    build = {
        "wide": lambda d: wide_student(X.to(d), y.to(d), 6, 3, g),
        "linear": lambda d: linear_student(X.to(d), X.to(d), [4, 2, 4], 0.0, 3, g),
        "relu": lambda d: relu_student(V.to(d), 2, 3, g),
    }
    for name, student in build.items():
        there = student("meta")
        assert there.starts.device.type == "meta", name
        assert there.loss(there.starts).device.type == "meta"
        if there.grad is not None:
            assert there.grad(there.starts).device.type == "meta"


def test_bad_input():
    with pytest.raises(ValueError, match="starts"):
        lbfgs_many(lambda x: x.sum(1), normal(3))
    with pytest.raises(ValueError, match=r"must give \[S\]"):
        lbfgs_many(lambda x: x.sum()[None], normal(3, 2))
    with pytest.raises(ValueError, match="at least 4 units"):
        relu_student(orthonormal(4, 5), 3, 2)
    with pytest.raises(ValueError, match="cannot fit"):
        wide_student(normal(20, 4), normal(20), 4, 2)
    assert names == sorted(names)
