"""The verdicts against losses, Hessians, constructed saddles and the list of all critical points at depth 2."""

import itertools

import numpy as np
import pytest
import torch

from dlatlas.theory.global_check import check_global, global_value, is_critical
from dlatlas.theory.kit.curvature import full_hessian
from dlatlas.theory.linear_critical import all_values, shallow_critical


def problem(seed=0, dx=5, dy=4, n=30):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(dx, n, dtype=torch.float64, generator=g), torch.randn(dy, n, dtype=torch.float64, generator=g)


def loss(Ws, X, Y):
    out = X
    for W in Ws:
        out = W @ out
    return 0.5 * (out - Y).square().sum()


def critical(X, Y, J, widths, gauge=None):
    """Product of the singular directions J, spread over the layers; random invertible changes of the hidden coordinates."""
    fit = Y @ torch.linalg.pinv(X)
    U = torch.linalg.svd(fit @ X, full_matrices=False)[0][:, list(J)]
    sizes = [len(X), *widths, len(Y)]
    Ws = [torch.zeros(b, a, dtype=torch.float64) for a, b in itertools.pairwise(sizes)]
    Ws[0][: len(J)] = U.T @ fit
    for W in Ws[1:-1]:
        W[: len(J), : len(J)] = torch.eye(len(J), dtype=torch.float64)
    Ws[-1][:, : len(J)] = U
    if gauge is not None:
        for j, d in enumerate(widths):
            C = torch.randn(d, d, dtype=torch.float64, generator=gauge) + 2 * torch.eye(d, dtype=torch.float64)
            Ws[j], Ws[j + 1] = C @ Ws[j], Ws[j + 1] @ torch.linalg.inv(C)
    return Ws


@pytest.mark.parametrize(
    ("dx", "dy", "widths"), [(5, 4, [2]), (5, 4, [3, 2]), (4, 5, [2, 3, 2]), (5, 4, [6]), (3, 6, [4, 5]), (4, 4, [4, 4])]
)
def test_verdict_is_the_comparison_of_the_loss(dx, dy, widths):
    X, Y = problem(1, dx, dy)
    k = min(dx, dy, *widths)
    best = global_value(X, Y, k)
    g = torch.Generator().manual_seed(5)
    verdicts = []
    for J in all_values(X, Y, k):
        Ws = critical(X, Y, J, widths, g)
        verdicts.append(check_global(Ws, X, Y))
        assert is_critical(Ws, X, Y)
        assert (verdicts[-1] == "global") == (abs(float(loss(Ws, X, Y)) - best) < 1e-8)
    assert verdicts.count("global") == 1
    assert set(verdicts) == {"global", "saddle"}


def test_gradient_is_autograd():
    X, Y = problem(2)
    g = torch.Generator().manual_seed(1)
    Ws = [torch.randn(b, a, dtype=torch.float64, generator=g).requires_grad_() for a, b in [(5, 3), (3, 2), (2, 4)]]
    W1, W2, W3 = (W.detach() for W in Ws)
    factors = [(W3 @ W2).norm(), W3.norm() * W1.norm(), (W2 @ W1).norm()]  # what stands around the slope in each layer's gradient
    factors[0], factors[2] = factors[0] * 5**0.5, factors[2] * 4**0.5  # and the identity on the other side, 5 inputs and 4 outputs
    gradients = torch.autograd.grad(loss(Ws, X, Y), Ws)
    ratio = max(float(d.norm() / (f * (Y @ X.T).norm())) for d, f in zip(gradients, factors))
    assert is_critical(Ws, X, Y, tol=ratio * (1 + 1e-9))
    assert not is_critical(Ws, X, Y, tol=ratio * (1 - 1e-9))
    assert check_global(Ws, X, Y) == "not critical"


def test_only_one_layer_out_of_balance_is_noticed():
    X, Y = problem(3)
    for j in range(3):
        Ws = critical(X, Y, [0, 1], [2, 3])
        Ws[j] = Ws[j] + 1e-3
        assert not is_critical(Ws, X, Y)


@pytest.mark.parametrize("c", [1e-6, 1e-4, 1e4, 1e6])
@pytest.mark.parametrize("what", ["inputs", "targets", "both", "layers"])
def test_units_of_the_data_and_of_the_layers_do_not_matter(c, what):
    X, Y = problem(1)
    g = torch.Generator().manual_seed(5)
    x, y = (c if what in ("inputs", "both") else 1.0), (c if what in ("targets", "both") else 1.0)
    for J, verdict in (((0, 1), "global"), ((0, 2), "saddle"), ((1,), "saddle"), ((), "saddle")):
        W1, W2, W3 = critical(X, Y, J, [3, 2], g)
        # The product has to follow y / x; "layers" only moves a factor from one layer to the other.
        scaled = [W1 / x, W2 * y, W3] if what != "layers" else [c * W1, W2, W3 / c]
        assert check_global(scaled, x * X, y * Y) == verdict
        for j in range(3):
            if J:
                moved = [W * (1 + 1e-3) if i == j else W for i, W in enumerate(scaled)]
                assert check_global(moved, x * X, y * Y) == "not critical"


def test_small_weights_are_not_an_excuse():
    """Near the origin all gradients are small, but they do not vanish: only the origin itself is a critical point."""
    X, Y = problem(1)
    g = torch.Generator().manual_seed(6)
    Ws = [1e-6 * torch.randn(b, a, dtype=torch.float64, generator=g) for a, b in [(5, 3), (3, 2), (2, 4)]]
    assert check_global(Ws, X, Y) == "not critical"


def test_the_tolerance_is_that_of_a_relative_step():
    X, Y = problem(1)
    Ws = critical(X, Y, [0, 1], [3, 2])
    for size, expected in ((1e-11, True), (1e-6, False)):
        assert is_critical([Ws[0] * (1 + size), *Ws[1:]], X, Y) == expected
    # A bottleneck that is turned by 0.02 out of the leading plane is critical to a coarse tolerance, and the turn is below the root of that.
    U = torch.linalg.svd(Y @ torch.linalg.pinv(X) @ X, full_matrices=False)[0]
    tilted = [*Ws[:2], Ws[2] + 0.02 * torch.outer(U[:, 3], Ws[2].new_tensor([1.0, 0.0]))]
    assert check_global(tilted, X, Y) == "not critical"
    assert check_global(tilted, X, Y, tol=1e-2) == "global"


def test_global_value_against_numpy_and_full_rank():
    X, Y = problem(4)
    x, y = X.numpy(), Y.numpy()
    w, E = np.linalg.eigh(x @ x.T)
    s = np.linalg.svd(y @ x.T @ (E / np.sqrt(w)) @ E.T, compute_uv=False)
    for k in (1, 2, 4, 9):
        assert global_value(X, Y, k) == pytest.approx(0.5 * ((y**2).sum() - (s[:k] ** 2).sum()))
    fit = torch.linalg.lstsq(X.T, Y.T).solution.T
    assert global_value(X, Y, 4) == pytest.approx(float(0.5 * (fit @ X - Y).square().sum()))


@pytest.mark.parametrize("widths", [[3], [3, 3], [3, 2, 3]])
def test_the_origin_is_a_saddle(widths):
    X, Y = problem()
    sizes = [5, *widths, 4]
    assert check_global([torch.zeros(b, a) for a, b in itertools.pairwise(sizes)], X, Y) == "saddle"


def test_saddles_at_depth_2_have_a_negative_eigenvalue():
    X, Y = problem(6, 4, 3)
    for J in all_values(X, Y, 2):
        A2, A1 = shallow_critical(X, Y, 2, J)
        leaves = [A1.requires_grad_(), A2.requires_grad_()]
        lowest = torch.linalg.eigvalsh(full_hessian(lambda leaves=leaves: loss(leaves, X, Y), leaves))[0]
        assert check_global(leaves, X, Y) == ("saddle" if lowest < -1e-6 else "global")


def test_end_of_gradient_descent():
    g = torch.Generator().manual_seed(3)
    X, Y = torch.linalg.qr(torch.randn(30, 5, dtype=torch.float64, generator=g))[0].T, problem(7)[1]
    Ws = [(0.3 * torch.randn(b, a, dtype=torch.float64, generator=g)).requires_grad_() for a, b in [(5, 2), (2, 3), (3, 4)]]
    for _ in range(2000):
        gradients = torch.autograd.grad(loss(Ws, X, Y), Ws)
        Ws = [(W - 0.1 * d).detach().requires_grad_() for W, d in zip(Ws, gradients)]
    assert check_global(Ws, X, Y) == "global"
    assert loss(Ws, X, Y).item() == pytest.approx(global_value(X, Y, 2))


def test_assumptions_are_named():
    X, Y = problem()
    Ws = critical(X, Y, [0, 1], [2])
    with pytest.raises(ValueError, match="Y X\\^T of full rank"):
        check_global(Ws, X, Y - Y.mean(0))  # rows that sum to zero, as centred one-hot codes have
    with pytest.raises(ValueError, match="invertible X X\\^T"):
        check_global(Ws, torch.cat([X[:4], X[:1]]), Y)
    with pytest.raises(ValueError, match="invertible X X\\^T"):
        global_value(X[:, :3], Y[:, :3], 1)
    eye = torch.eye(4, dtype=torch.float64)
    with pytest.raises(ValueError, match="distinct singular values"):
        check_global([eye[:2], eye[:, :2]], eye, eye)
    assert check_global([eye, eye], eye, eye) == "global"  # no bottleneck: nothing to tell apart


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([(4, 5)], "at least 2 layers"),
        ([(3, 5), (4, 2)], "5 inputs to 4 outputs"),
        ([(3, 4), (4, 3)], "5 inputs"),
        ([(3, 5), (5, 3)], "4 outputs"),
    ],
)
def test_refuses(shapes, message):
    X, Y = problem()
    for check in (is_critical, check_global):
        with pytest.raises(ValueError, match=message):
            check([torch.zeros(*shape) for shape in shapes], X, Y)


def test_refuses_bad_data():
    X, Y = problem()
    with pytest.raises(ValueError, match="at least 1"):
        global_value(X, Y, 0)
    with pytest.raises(ValueError, match="finite"):
        global_value(X, Y / 0, 1)
    with pytest.raises(ValueError, match="column for each sample"):
        global_value(X, Y[:, 1:], 1)
