import copy

import numpy as np
import pytest
import torch
from torch import nn

from dlatlas.theory.neumann import Neumann, neumann_solve


def spd(n, low=0.5, high=3.0):
    q, _ = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))
    return q @ torch.diag(torch.linspace(low, high, n, dtype=torch.float64)) @ q.T


def quadratic(parameter, A, b):
    """Put the gradient of x.Ax/2 - b.x into the parameter."""
    parameter.grad = A @ parameter.detach() - b


def test_solve_converges_to_the_solution_at_the_spectral_rate():
    A, b = spd(20), torch.randn(20, dtype=torch.float64)
    exact, lr = torch.linalg.solve(A, b), 0.5
    torch.testing.assert_close(neumann_solve(lambda m: A @ m, b, lr, 400), exact)
    rate = float((1 - lr * torch.linalg.eigvalsh(A)).abs().max())
    errors = [float((neumann_solve(lambda m: A @ m, b, lr, k) - exact).norm()) for k in (60, 61)]
    assert errors[1] / errors[0] == pytest.approx(rate, rel=1e-3)
    # k terms of the series, written out
    series = lr * sum(torch.linalg.matrix_power(torch.eye(20, dtype=torch.float64) - lr * A, k) @ b for k in range(7))
    torch.testing.assert_close(neumann_solve(lambda m: A @ m, b, lr, 7), series)


def test_solve_diverges_above_the_limit_and_takes_matrices():
    A, b = spd(6), torch.randn(6, 2, dtype=torch.float64)
    assert float(neumann_solve(lambda m: A @ m, b, 0.7, 300).norm()) > 1e6  # 2 / 3 is the limit
    torch.testing.assert_close(neumann_solve(lambda m: A @ m, b, 0.5, 400), torch.linalg.solve(A, b))
    assert not neumann_solve(lambda m: A @ m, b, 0.5, 0).any()


def transcription(gradient, theta, steps, lr, alpha, beta, gamma, momentum, reset_every, warmup, double):
    """The published algorithm on one NumPy vector; returns the stored point and m after every step."""
    out, m, u = [], np.zeros_like(theta), theta.copy()
    next_reset, interval, k = warmup, reset_every, 0
    for t in range(steps):
        g = gradient(theta)
        if t < warmup:
            theta = theta - lr * g
            u = theta.copy()
        elif t == next_reset:
            m, k = -lr * g, 0
            next_reset, interval = t + interval, interval * (2 if double else 1)
        else:
            k += 1
            mu = np.clip(1 - 1 / (1 + k), *momentum)
            r = np.linalg.norm(theta - u)
            d = g + (0 if r == 0 else (alpha * r**2 - beta / r**2) * (theta - u) / r)
            m = mu * m - lr * d
            theta = theta + mu * m - lr * d
            u = theta + gamma * (u - theta)
        out.append((theta.copy(), m.copy()))
    return out


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("warmup", [0, 3])
def test_against_a_transcription_with_resets_warmup_and_strong_regularisers(warmup, double):
    A, b = spd(7), torch.randn(7, dtype=torch.float64)
    start = torch.randn(7, dtype=torch.float64)
    settings = {"lr": 0.05, "alpha": 0.2, "beta": 1e-4, "gamma": 0.9, "momentum": (0.5, 0.8), "reset_every": 4}
    expected = transcription(lambda x: A.numpy() @ x - b.numpy(), start.numpy(), 30, **settings, warmup=warmup, double=double)
    # Two parameters: the norms are those of the whole group.
    first, second = nn.Parameter(start[:3].clone()), nn.Parameter(start[3:].clone())
    optimizer = Neumann([first, second], **settings, warmup=warmup, double_resets=double)
    for theta, m in expected:
        gradient = A @ torch.cat([first, second]).detach() - b
        first.grad, second.grad = gradient[:3].clone(), gradient[3:].clone()
        optimizer.step()
        np.testing.assert_allclose(torch.cat([first, second]).detach().numpy(), theta, rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(torch.cat([optimizer.state[p]["m"] for p in (first, second)]).numpy(), m, rtol=1e-10, atol=1e-12)


def test_a_group_may_have_its_own_reset_interval():
    x, y = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = Neumann([{"params": [x], "reset_every": 3}, {"params": [y]}], 0.1, reset_every=1000, double_resets=False)
    resets = [0, 0]
    for _ in range(12):
        x.grad, y.grad = torch.ones(2), torch.ones(2)
        optimizer.step()
        for k, group in enumerate(optimizer.param_groups):
            resets[k] += group["since_reset"] == 0
    assert resets == [4, 1]


def test_without_regularisers_and_resets_it_is_the_idealised_recursion():
    A, b, lr, mu = spd(5), torch.randn(5, dtype=torch.float64), 0.1, 0.7
    x = nn.Parameter(torch.randn(5, dtype=torch.float64))
    optimizer = Neumann([x], lr, alpha=0, beta=0, momentum=(mu, mu), reset_every=10**9)
    quadratic(x, A, b)
    optimizer.step()  # the first step fills m
    m = -lr * (A @ x.detach() - b)
    w = x.detach() - mu * m
    for _ in range(25):
        quadratic(x, A, b)
        optimizer.step()
        m = mu * m - lr * (A @ (w + mu * m) - b)
        w = w + m
        torch.testing.assert_close(x.detach(), w + mu * m)
    optimizer.finalize()
    torch.testing.assert_close(x.detach(), w)
    optimizer.finalize()
    torch.testing.assert_close(x.detach(), w)


def test_between_resets_it_is_nesterov_momentum_of_torch():
    A, b = spd(5), torch.randn(5, dtype=torch.float64)
    x = nn.Parameter(torch.randn(5, dtype=torch.float64))
    y = nn.Parameter(x.detach().clone())
    ours = Neumann([x], 0.1, alpha=0, beta=0, momentum=(0.9, 0.9), reset_every=10**9)
    peer = torch.optim.SGD([y], lr=0.1, momentum=0.9, nesterov=True)
    quadratic(x, A, b)
    ours.step()
    peer.state[y]["momentum_buffer"] = x.grad.clone()  # the reset fills the buffer and moves nothing
    for _ in range(30):
        for parameter, optimizer in ((x, ours), (y, peer)):
            quadratic(parameter, A, b)
            optimizer.step()
        torch.testing.assert_close(x, y)


def test_one_step_by_hand():
    x = nn.Parameter(torch.tensor([2.0], dtype=torch.float64))
    optimizer = Neumann([x], 0.1, alpha=0, beta=0, momentum=(0.5, 0.9))
    x.grad = x.detach().clone()  # of x^2/2
    optimizer.step()
    assert x.item() == 2.0
    assert optimizer.state[x]["m"].item() == pytest.approx(-0.2)
    x.grad = x.detach().clone()
    optimizer.step()
    m = 0.5 * -0.2 - 0.1 * 2.0
    assert optimizer.state[x]["m"].item() == pytest.approx(m)
    assert x.item() == pytest.approx(2.0 + 0.5 * m - 0.2)


def test_regulariser_repels_near_and_attracts_far():
    def moved(distance):
        x = nn.Parameter(torch.tensor([distance], dtype=torch.float64))
        optimizer = Neumann([x], 1.0, alpha=1.0, beta=1.0, momentum=(0.0, 0.0))
        x.grad = torch.zeros_like(x)
        optimizer.step()
        optimizer.state[x]["u"].zero_()
        optimizer.step()
        return x.item() - distance

    assert moved(0.5) == pytest.approx(1 / 0.25 - 0.25)
    assert moved(2.0) == pytest.approx(1 / 4 - 4)
    assert moved(0.0) == 0.0  # no direction, no NaN


def test_converges_on_a_quadratic_with_default_regularisers():
    A, b = spd(10), torch.randn(10, dtype=torch.float64)
    x = nn.Parameter(torch.zeros(10, dtype=torch.float64))
    optimizer = Neumann([x], 0.1, beta=0.0)
    for _ in range(400):
        quadratic(x, A, b)
        optimizer.step()
    optimizer.finalize()
    torch.testing.assert_close(x.detach(), torch.linalg.solve(A, b), atol=1e-6, rtol=0)


def test_state_dict_round_trip_and_closure():
    A, b = spd(4), torch.randn(4, dtype=torch.float64)
    x = nn.Parameter(torch.randn(4, dtype=torch.float64))
    optimizer = Neumann([x], 0.05, reset_every=3)

    def closure():
        optimizer.zero_grad()
        loss = x @ A @ x / 2 - b @ x
        loss.backward()
        return loss

    value = float((x @ A @ x / 2 - b @ x).detach())
    assert optimizer.step(closure).item() == pytest.approx(value)
    for _ in range(8):
        optimizer.step(closure)
    y = nn.Parameter(x.detach().clone())
    other = Neumann([y], 0.5)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for _ in range(12):
        quadratic(x, A, b)
        quadratic(y, A, b)
        optimizer.step()
        other.step()
    assert torch.equal(x, y)


def test_parameters_without_gradient_stay_and_groups_have_their_own_step():
    x, y, z = (nn.Parameter(torch.ones(2)) for _ in range(3))
    optimizer = Neumann([{"params": [x, z]}, {"params": [y], "lr": 0.0}], 0.1)
    for _ in range(3):
        x.grad, y.grad = torch.ones(2), torch.ones(2)
        optimizer.step()
    assert float(x.detach().max()) < 1
    assert torch.equal(y, torch.ones(2))
    assert torch.equal(z, torch.ones(2))
    optimizer.finalize()
    assert torch.equal(z, torch.ones(2))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"gamma": 1.0}, "gamma"),
        ({"gamma": -0.1}, "gamma"),
        ({"reset_every": 0}, "reset_every"),
        ({"momentum": (0.9, 0.5)}, "momentum"),
        ({"momentum": (0.5, 1.0)}, "momentum"),
        ({"momentum": (-0.1, 0.5)}, "momentum"),
        ({"lr": -1.0}, "lr"),
        ({"beta": -1.0}, "beta"),
        ({"warmup": -1}, "warmup"),
    ],
)
def test_bad_input(kwargs, message):
    with pytest.raises(ValueError, match=message):
        Neumann([nn.Parameter(torch.ones(1))], **({"lr": 0.1} | kwargs))


def test_bad_input_of_the_solver():
    with pytest.raises(ValueError, match="lr"):
        neumann_solve(lambda m: m, torch.ones(1), 0.0, 3)
    with pytest.raises(ValueError, match="steps"):
        neumann_solve(lambda m: m, torch.ones(1), 0.1, -1)
