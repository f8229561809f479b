import itertools

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import nn
from torch.nn import functional as F

from dlatlas.theory.proxprop import ProxLinear, prox_step


def problem(n=12, p=5, q=3):
    return [torch.randn(*shape, dtype=torch.float64) for shape in ((n, p), (n, q), (p, q))]


def normal_equations(A, Y, Z, tau):
    eye = torch.eye(A.shape[1], dtype=A.dtype)
    return torch.linalg.solve(A.T @ A + eye / tau, A.T @ Y + Z / tau)


@pytest.mark.parametrize("n", [12, 3])  # more and fewer rows than columns: two factorisations
@pytest.mark.parametrize("tau", [1e-3, 1.0, 50.0])
def test_exact_step_solves_the_normal_equations(n, tau):
    A, Y, Z = problem(n)
    torch.testing.assert_close(prox_step(A, Y, Z, tau), normal_equations(A, Y, Z, tau))


def test_exact_step_is_the_minimiser():
    A, Y, Z = (t.numpy() for t in problem())
    tau = 0.7

    def objective(x):
        X = x.reshape(Z.shape)
        return 0.5 * np.sum((A @ X - Y) ** 2) + np.sum((X - Z) ** 2) / (2 * tau)

    found = minimize(objective, Z.ravel(), tol=1e-12).x.reshape(Z.shape)
    np.testing.assert_allclose(prox_step(*map(torch.from_numpy, (A, Y, Z)), tau).numpy(), found, atol=1e-5)


def test_limits_of_tau():
    A, Y, Z = problem()
    gradient = A.T @ (A @ Z - Y)
    tau = 1e-7
    torch.testing.assert_close((Z - prox_step(A, Y, Z, tau)) / tau, gradient, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(prox_step(A, Y, Z, 1e10), torch.linalg.lstsq(A, Y).solution, rtol=1e-6, atol=1e-6)


def test_conjugate_gradients_are_exact_after_p_steps_and_better_with_each():
    A, Y, Z = problem()
    exact = prox_step(A, Y, Z, 2.0)
    torch.testing.assert_close(prox_step(A, Y, Z, 2.0, cg_steps=5), exact)
    torch.testing.assert_close(prox_step(A, Y, Z, 2.0, cg_steps=40), exact)  # no division by zero once converged

    def objective(X):
        return float(0.5 * (A @ X - Y).pow(2).sum() + (X - Z).pow(2).sum() / 4)

    values = [objective(Z)] + [objective(prox_step(A, Y, Z, 2.0, cg_steps=k)) for k in range(1, 6)]
    assert all(b < a - 1e-9 for a, b in itertools.pairwise(values))


def test_one_conjugate_gradient_step_is_steepest_descent_column_by_column():
    A, Y, Z = problem()
    ours = prox_step(A, Y, Z, 2.0, cg_steps=1)
    H = (A.T @ A + torch.eye(5, dtype=A.dtype) / 2).numpy()
    R = (A.T @ (Y - A @ Z)).numpy()
    for j in range(3):
        r = R[:, j]
        np.testing.assert_allclose(ours[:, j].numpy(), Z[:, j].numpy() + (r @ r) / (r @ H @ r) * r)


def test_perfect_fit_does_not_move():
    A, _, Z = problem()
    torch.testing.assert_close(prox_step(A, A @ Z, Z, 1.0, cg_steps=3), Z)
    torch.testing.assert_close(prox_step(A, A @ Z, Z, 1.0), Z)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("cg_steps", [None, 3])
@pytest.mark.parametrize("shape", [(20,), (4, 5)])  # leading axes are flattened
def test_layer_gradients_against_the_equation(bias, cg_steps, shape):
    layer = ProxLinear(6, 4, bias, tau=0.8, cg_steps=cg_steps).double()
    x = torch.randn(*shape, 6, dtype=torch.float64, requires_grad=True)
    target = torch.randn(*shape, 4, dtype=torch.float64)
    z = layer(x)
    torch.testing.assert_close(z, F.linear(x, layer.weight, layer.bias))
    loss = (z - target).pow(2).mean()
    (dz,) = torch.autograd.grad(loss, z, retain_graph=True)
    loss.backward()

    A = x.detach().reshape(20, 6)
    theta = layer.weight.detach().T
    if bias:
        A = torch.cat([A, torch.ones(20, 1, dtype=torch.float64)], 1)
        theta = torch.cat([theta, layer.bias.detach()[None]])
    wanted = A @ theta - dz.reshape(20, 4)
    expected = theta - (normal_equations(A, wanted, theta, 0.8) if cg_steps is None else prox_step(A, wanted, theta, 0.8, cg_steps))
    torch.testing.assert_close(layer.weight.grad, expected[:6].T)
    if bias:
        torch.testing.assert_close(layer.bias.grad, expected[6])
    # The input's gradient is that of an ordinary layer.
    torch.testing.assert_close(
        x.grad, torch.autograd.grad((F.linear(y := x.detach().requires_grad_(), layer.weight, layer.bias) - target).pow(2).mean(), y)[0]
    )


@pytest.mark.parametrize("tau", [1e-3, 1.0, 1e4])
@pytest.mark.parametrize("cg_steps", [None, 1, 3])
def test_every_layer_of_a_network_gets_a_descent_direction(tau, cg_steps):
    net = nn.Sequential(ProxLinear(8, 7, tau=tau, cg_steps=cg_steps), nn.Tanh(), ProxLinear(7, 3, tau=tau, cg_steps=cg_steps)).double()
    plain = nn.Sequential(nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    plain.load_state_dict(net.state_dict())
    x, y = torch.randn(30, 8, dtype=torch.float64), torch.randint(3, (30,))
    for model in (net, plain):
        F.cross_entropy(model(x), y).backward()
    for prox, explicit in zip((net[0], net[2]), (plain[0], plain[2])):
        pairs = zip(prox.parameters(), explicit.parameters())
        assert sum(float((p.grad * e.grad).sum()) for p, e in pairs) > 0


def test_small_tau_makes_the_layer_ordinary():
    prox, plain = ProxLinear(4, 2, tau=1e-8).double(), nn.Linear(4, 2).double()
    plain.load_state_dict(prox.state_dict())
    x = torch.randn(9, 4, dtype=torch.float64)
    for model in (prox, plain):
        model(x).pow(2).sum().backward()
    torch.testing.assert_close(prox.weight.grad / 1e-8, plain.weight.grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(prox.bias.grad / 1e-8, plain.bias.grad, rtol=1e-5, atol=1e-6)


def test_frozen_weights_and_inputs_without_gradient():
    layer = ProxLinear(3, 2)
    layer.requires_grad_(False)
    x = torch.randn(5, 3, requires_grad=True)
    layer(x).sum().backward()
    assert layer.weight.grad is None
    assert layer.bias.grad is None
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(5, 3))
    layer = ProxLinear(3, 2)
    layer(torch.randn(5, 3)).sum().backward()
    assert layer.weight.grad.shape == (2, 3)
    assert layer.bias.grad.shape == (2,)


def test_second_derivatives_are_refused_instead_of_wrong():
    layer = ProxLinear(3, 2)
    (g,) = torch.autograd.grad(layer(torch.randn(5, 3)).pow(2).sum(), layer.weight, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        g.sum().backward()


def test_trains_with_any_optimizer():
    layer = ProxLinear(5, 1, tau=1e6).double()
    x = torch.randn(40, 5, dtype=torch.float64)
    y = x @ torch.randn(5, 1, dtype=torch.float64) + 0.3
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    loss = 0.5 * (layer(x) - y).pow(2).sum()
    loss.backward()
    optimizer.step()  # one proximal step with a large tau solves least squares
    assert float((layer(x) - y).detach().abs().max()) < 1e-5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ProxLinear(2, 2, tau=0.0), "tau"),
        (lambda: ProxLinear(2, 2, cg_steps=0), "cg_steps"),
        (lambda: prox_step(torch.ones(3, 2), torch.ones(3, 1), torch.ones(2, 1), -1.0), "tau"),
        (lambda: prox_step(torch.ones(3, 2), torch.ones(3, 1), torch.ones(2, 1), 1.0, 0), "cg_steps"),
        (lambda: prox_step(torch.ones(3, 2), torch.ones(4, 1), torch.ones(2, 1), 1.0), "expected A"),
        (lambda: prox_step(torch.ones(3, 2), torch.ones(3, 1), torch.ones(1, 2), 1.0), "expected A"),
        (lambda: prox_step(torch.ones(3), torch.ones(3, 1), torch.ones(1, 1), 1.0), "expected A"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
