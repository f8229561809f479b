import copy

import numpy as np
import pytest
import torch
from torch import nn

from dlatlas.theory.kfac_rnn import KFACRNN, chain_fisher, kfac_rnn_solve

A, G = 4, 3


def chain(n, strength=0.6, symmetric=False):
    """Moments of a stationary process: M1 = M0^{1/2} R M0^{1/2} with |R| = strength."""
    Q = torch.randn(n, n, dtype=torch.float64)
    M0 = Q @ Q.T / n + 0.3 * torch.eye(n, dtype=torch.float64)
    R = torch.randn(n, n, dtype=torch.float64)
    R = R + R.T if symmetric else R
    R *= strength / torch.linalg.matrix_norm(R, 2)
    root = torch.linalg.cholesky(M0) if not symmetric else _sqrt(M0)
    return M0, root @ R @ root.T


def _sqrt(M):
    w, U = torch.linalg.eigh(M)
    return U @ torch.diag(w.sqrt()) @ U.T


def vec(V):
    return V.T.reshape(-1)  # columns stacked


def dense_solve(V, moments, T):
    return torch.linalg.solve(chain_fisher(*moments, T), vec(V)).reshape(V.shape[1], V.shape[0]).T


def gradient():
    return torch.randn(G, A, dtype=torch.float64)


def test_dense_fisher_is_the_covariance_of_the_sum_over_a_simulated_chain():
    """w_t = vec(g_t a_t^T) of two independent stationary Gaussian AR(1) processes of length 4."""
    A0, A1 = chain(2)
    G0, G1 = chain(2)
    T, n = 4, 400_000
    total = torch.zeros(n, 4, dtype=torch.float64)
    a, g = (torch.randn(n, 2, dtype=torch.float64) @ torch.linalg.cholesky(M).T for M in (A0, G0))
    for t in range(T):
        if t:
            a, g = (_next(z, M0, M1) for z, M0, M1 in ((a, A0, A1), (g, G0, G1)))
        total += (a[:, :, None] * g[:, None, :]).reshape(n, 4)  # entry (g, a) stands at a * 2 + g: columns stacked
    covariance = total.T @ total / n
    exact = chain_fisher(A0, A1, G0, G1, T)
    assert float((covariance - exact).norm() / exact.norm()) < 0.02


def _next(z, M0, M1):
    P = M1 @ torch.linalg.inv(M0)
    noise = torch.linalg.cholesky(M0 - P @ M0 @ P.T)
    return z @ P.T + torch.randn_like(z) @ noise.T


def test_dense_fisher_by_a_double_loop():
    moments = (*chain(2), *chain(2))
    A0, A1, G0, G1 = (M.numpy() for M in moments)
    V0 = np.kron(A0, G0)
    psi = np.kron(A1, G1) @ np.linalg.inv(V0)
    F = np.zeros((4, 4))
    for s in range(5):
        for t in range(5):
            V = np.linalg.matrix_power(psi, abs(s - t)) @ V0
            F += V if s >= t else V.T
    np.testing.assert_allclose(chain_fisher(*moments, 5).numpy(), F, rtol=1e-10)


@pytest.mark.parametrize("T", [1, 2, 7, 40])
@pytest.mark.parametrize("strength", [0.1, 0.6, 0.999999])
def test_symmetric_mode_is_exact_for_symmetric_chains(T, strength):
    moments = (*chain(A, strength, symmetric=True), *chain(G, strength, symmetric=True))
    V = gradient()
    torch.testing.assert_close(kfac_rnn_solve(V, *moments, T, mode="symmetric"), dense_solve(V, moments, T), rtol=1e-8, atol=1e-8)


def test_symmetric_mode_against_the_closed_form_of_eta():
    T = 9
    eye = torch.eye(1, dtype=torch.float64)
    for x in (-0.9, -0.3, 0.0, 0.5, 0.99):
        eta = (T * (1 - x**2) - 2 * x * (1 - x**T)) / (1 - x) ** 2
        solved = kfac_rnn_solve(eye, eye, x * eye, eye, eye, T, mode="symmetric")
        assert 1 / solved.item() == pytest.approx(eta, rel=1e-9)
    assert 1 / kfac_rnn_solve(eye, eye, eye, eye, eye, T, mode="symmetric").item() == pytest.approx(T**2)


def test_symmetric_mode_uses_the_symmetric_part():
    A0, A1 = chain(A)
    G0, G1 = chain(G)
    V = gradient()
    ours = kfac_rnn_solve(V, A0, A1, G0, G1, 6, mode="symmetric")
    torch.testing.assert_close(ours, kfac_rnn_solve(V, A0, (A1 + A1.T) / 2, G0, (G1 + G1.T) / 2, 6, mode="symmetric"))


def test_error_of_the_limit_falls_like_one_over_T_for_general_chains():
    moments = (*chain(A, 0.8), *chain(G, 0.8))
    V = gradient()

    def error(T):
        exact = dense_solve(V, moments, T)
        return float((kfac_rnn_solve(V, *moments, T, mode="limit") - exact).norm() / exact.norm())

    errors = [error(T) for T in (50, 100, 200)]
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.1)
    assert errors[1] / errors[2] == pytest.approx(2, rel=0.05)
    assert errors[2] < 0.01


def test_limit_mode_against_the_dense_series():
    A0, A1 = chain(A, 0.7)
    G0, G1 = chain(G, 0.7)
    V0 = torch.kron(A0, G0)
    psi = torch.kron(A1, G1) @ torch.linalg.inv(V0)
    F, term = V0.clone(), V0
    for _ in range(300):
        term = psi @ term
        F += term + term.T
    V = gradient()
    exact = torch.linalg.solve(F, vec(V)).reshape(A, G).T / 5
    torch.testing.assert_close(kfac_rnn_solve(V, A0, A1, G0, G1, 5, mode="limit"), exact)


@pytest.mark.parametrize("without", ["A1", "G1"])
def test_without_correlation_all_modes_agree(without):
    A0, A1 = chain(A)
    G0, G1 = chain(G)
    A1, G1 = (torch.zeros_like(A1), G1) if without == "A1" else (A1, torch.zeros_like(G1))
    V = gradient()
    plain = torch.linalg.inv(G0) @ V @ torch.linalg.inv(A0) / 6
    for mode in ("independent", "symmetric", "limit"):
        torch.testing.assert_close(kfac_rnn_solve(V, A0, A1, G0, G1, 6, mode=mode), plain)


def test_length_one_is_the_kronecker_product_alone():
    moments = (*chain(A), *chain(G))
    V = gradient()
    for mode in ("independent", "symmetric"):
        torch.testing.assert_close(kfac_rnn_solve(V, *moments, 1, mode=mode), dense_solve(V, moments, 1))


def test_several_lengths_are_averaged():
    moments = (*chain(A, symmetric=True), *chain(G, symmetric=True))
    V = gradient()
    mean_fisher = (chain_fisher(*moments, 3) + chain_fisher(*moments, 8)) / 2
    exact = torch.linalg.solve(mean_fisher, vec(V)).reshape(A, G).T
    torch.testing.assert_close(kfac_rnn_solve(V, *moments, torch.tensor([3, 8]), mode="symmetric"), exact)
    torch.testing.assert_close(
        kfac_rnn_solve(V, *moments, torch.tensor([3, 8]), mode="limit"), kfac_rnn_solve(V, *moments, torch.tensor(5.5), mode="limit")
    )


def test_damping_is_factored_and_symmetric_between_the_factors():
    moments = A0, A1, G0, G1 = (*chain(A), *chain(G))
    V, lam = gradient(), 0.04
    pi = float(((A0.trace() / A) / (G0.trace() / G)).sqrt())
    damped = A0 + 0.2 * pi * torch.eye(A, dtype=torch.float64), G0 + 0.2 / pi * torch.eye(G, dtype=torch.float64)
    for mode in ("independent", "symmetric", "limit"):
        expected = kfac_rnn_solve(V, damped[0], A1, damped[1], G1, 6, mode=mode)
        torch.testing.assert_close(kfac_rnn_solve(V, *moments, 6, mode=mode, damping=lam), expected)


@pytest.mark.parametrize("mode", ["independent", "symmetric", "limit"])
def test_the_preconditioner_is_positive_definite(mode):
    moments = (*chain(A, 0.95), *chain(G, 0.95))
    for _ in range(10):
        V = gradient()
        assert float((V * kfac_rnn_solve(V, *moments, 6, mode=mode)).sum()) > 0


def rnn_loss(cell, x, target):
    """Mean over the batch of a sum over time of squared errors."""
    h, total = None, x.new_zeros(())
    for t in range(len(x)):
        h = cell(x[t]) if h is None else cell(x[t], hx=h)
        total = total + (h[:, :2] - target[t]).pow(2).sum() / x.shape[1]
    return total


@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
def test_recorded_moments_are_those_of_the_weight_gradient(nonlinearity):
    """The recorded g_t and a_t must add up to the gradient: with one sequence, grad = sum_t g_t a_t^T."""
    cell = nn.RNNCell(3, 5, nonlinearity=nonlinearity).double()
    x, target = torch.randn(6, 1, 3, dtype=torch.float64), torch.randn(6, 1, 2, dtype=torch.float64)
    optimizer = KFACRNN(cell)
    with optimizer.record():
        rnn_loss(cell, x, target).backward()
    assert cell.weight_hh.grad is None  # put back
    # Independent route: perturb every pre-activation by its own leaf.
    leaves = [torch.zeros(1, 5, dtype=torch.float64, requires_grad=True) for _ in x]
    h, states, loss = torch.zeros(1, 5, dtype=torch.float64), [], 0
    act = torch.tanh if nonlinearity == "tanh" else torch.relu
    for t, leaf in enumerate(leaves):
        states.append(h)
        pre = x[t] @ cell.weight_ih.T + cell.bias_ih + h @ cell.weight_hh.T + cell.bias_hh + leaf
        h = act(pre)
        loss = loss + (h[:, :2] - target[t]).pow(2).sum()
    g = [v.numpy()[0] for v in torch.autograd.grad(loss, leaves)]
    for weight, a in ((cell.weight_ih, x[:, 0].numpy()), (cell.weight_hh, [s.detach().numpy()[0] for s in states])):
        state = optimizer.state[weight]
        expected = {
            "A0": sum(np.outer(a[t], a[t]) for t in range(6)) / 6,
            "A1": sum(np.outer(a[t], a[t - 1]) for t in range(1, 6)) / 6,
            "G0": sum(np.outer(g[t], g[t]) for t in range(6)) / 6,
            "G1": sum(np.outer(g[t], g[t - 1]) for t in range(1, 6)) / 6,
        }
        for name, value in expected.items():
            np.testing.assert_allclose(state[name].numpy(), value, atol=1e-12, err_msg=name)
        assert float(state["T"]) == 6


def test_recording_puts_the_gradients_back_that_were_there():
    cell = nn.RNNCell(3, 5).double()
    x, target = torch.randn(6, 2, 3, dtype=torch.float64), torch.randn(6, 2, 2, dtype=torch.float64)
    optimizer = KFACRNN(cell)
    rnn_loss(cell, x, target).backward()
    before = {name: p.grad.clone() for name, p in cell.named_parameters()}
    with optimizer.record():
        rnn_loss(cell, 3 * x, target).backward()
    for name, p in cell.named_parameters():
        assert torch.equal(p.grad, before[name]), name


def test_moments_do_not_depend_on_repeating_the_batch_and_average_over_time():
    cell = nn.RNNCell(3, 5).double()
    x, target = torch.randn(6, 2, 3, dtype=torch.float64), torch.randn(6, 2, 2, dtype=torch.float64)
    once, twice = KFACRNN(cell), KFACRNN(cell, decay=0.9)
    with once.record():
        rnn_loss(cell, x, target).backward()
    with twice.record():
        rnn_loss(cell, x.repeat(1, 3, 1), target.repeat(1, 3, 1)).backward()
    for name in ("A0", "A1", "G0", "G1"):
        torch.testing.assert_close(once.state[cell.weight_hh][name], twice.state[cell.weight_hh][name])
    before = twice.state[cell.weight_ih]["A0"].clone()
    with twice.record():
        rnn_loss(cell, 2 * x, target).backward()
    torch.testing.assert_close(twice.state[cell.weight_ih]["A0"], 0.9 * before + 0.1 * 4 * before)


def test_estimated_chains_are_contractions_even_for_constant_sequences():
    cell = nn.RNNCell(3, 5).double()
    x = torch.randn(1, 4, 3, dtype=torch.float64).repeat(9, 1, 1)  # the input never changes
    optimizer = KFACRNN(cell, damping=1e-8)
    with optimizer.record():
        rnn_loss(cell, x, torch.zeros(9, 4, 2, dtype=torch.float64)).backward()
    rnn_loss(cell, x, torch.ones(9, 4, 2, dtype=torch.float64)).backward()
    optimizer.step()  # mode "limit" raises where the radius reaches 1
    assert all(p.isfinite().all() for p in cell.parameters())


@pytest.mark.parametrize("mode", ["independent", "symmetric", "limit"])
def test_step_against_the_solver(mode):
    cell = nn.RNNCell(3, 5).double()
    x, target = torch.randn(6, 8, 3, dtype=torch.float64), torch.randn(6, 8, 2, dtype=torch.float64)
    optimizer = KFACRNN(cell, lr=0.1, mode=mode, damping=0.05, momentum=0.5, clip=1e9)
    buffers = {}
    for k in range(3):
        with optimizer.record():  # new moments must replace what was computed from the old ones
            rnn_loss(cell, x + k, target).backward()
        before = {name: p.detach().clone() for name, p in cell.named_parameters()}
        optimizer.zero_grad()
        optimizer.step(lambda: (loss := rnn_loss(cell, x, target)).backward() or loss)
        for name, p in cell.named_parameters():
            if name.startswith("bias"):
                torch.testing.assert_close(p.detach(), before[name] - 0.1 * p.grad)
                continue
            moments = [optimizer.state[p][k] for k in ("A0", "A1", "G0", "G1")]
            direction = kfac_rnn_solve(p.grad, *moments, 6, mode=mode, damping=0.05)
            buffers[name] = 0.5 * buffers.get(name, 0) + direction
            torch.testing.assert_close(p.detach(), before[name] - 0.1 * buffers[name])


def test_clip_limits_the_predicted_change():
    cell = nn.RNNCell(3, 5, bias=False).double()
    x, target = torch.randn(6, 8, 3, dtype=torch.float64), torch.randn(6, 8, 2, dtype=torch.float64)
    optimizer = KFACRNN(cell, lr=2.0, momentum=0.0, clip=1e-3)
    with optimizer.record():
        rnn_loss(cell, x, target).backward()
    rnn_loss(cell, x, target).backward()
    before = [p.detach().clone() for p in cell.parameters()]
    optimizer.step()
    moved = [(b - p.detach()) / 2 for b, p in zip(before, cell.parameters())]
    directions = [
        kfac_rnn_solve(p.grad, *(optimizer.state[p][k] for k in ("A0", "A1", "G0", "G1")), 6, "limit", 0.01) for p in cell.parameters()
    ]
    nu = float(moved[0].norm() / directions[0].norm())
    for m, d in zip(moved, directions):
        torch.testing.assert_close(m, nu * d)
    assert (2 * nu) ** 2 * sum(float((p.grad * d).sum()) for p, d in zip(cell.parameters(), directions)) == pytest.approx(1e-3)


def test_state_dict_round_trip():
    cell = nn.RNNCell(3, 5)
    x, target = torch.randn(6, 8, 3), torch.randn(6, 8, 2)
    optimizer = KFACRNN(cell, lr=0.1)
    with optimizer.record():
        rnn_loss(cell, x, target).backward()

    def step(cell, optimizer):
        optimizer.zero_grad()
        rnn_loss(cell, x, target).backward()
        optimizer.step()

    step(cell, optimizer)
    other_cell = copy.deepcopy(cell)
    other = KFACRNN(other_cell, lr=1.0, mode="independent")
    with other.record():
        rnn_loss(other_cell, 3 * x, target).backward()
    step(other_cell, other)
    other_cell.load_state_dict(cell.state_dict())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for _ in range(3):
        step(cell, optimizer)
        step(other_cell, other)
    assert all(torch.equal(p, q) for p, q in zip(cell.parameters(), other_cell.parameters()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"T": 0}, "T must be at least 1"),
        ({"A0": torch.tensor([[1.0, 0.5], [0.0, 1.0]])}, "A0 must be symmetric"),
        ({"G0": torch.tensor([[1.0, 0.5], [0.0, 1.0]])}, "G0 must be symmetric"),
        ({"A1": torch.eye(3)}, "A1 of shape"),
        ({"G1": torch.full((2, 2), torch.nan)}, "G1 holds NaN"),
    ],
)
def test_bad_moments(change, message):
    eye = torch.eye(2)
    arguments = {"A0": eye, "A1": 0.1 * eye, "G0": eye, "G1": 0.1 * eye, "T": 3} | change
    with pytest.raises(ValueError, match=message):
        chain_fisher(**arguments)
    with pytest.raises(ValueError, match=message):
        kfac_rnn_solve(torch.ones(2, 2), **arguments)


def test_bad_calls():
    eye = torch.eye(2)
    with pytest.raises(ValueError, match="spectral radius of Psi below 1, got 1"):
        kfac_rnn_solve(eye, eye, eye, eye, eye, 3, mode="limit")
    with pytest.raises(ValueError, match="mode"):
        kfac_rnn_solve(eye, eye, eye, eye, eye, 3, mode="exact")
    with pytest.raises(ValueError, match="damping"):
        kfac_rnn_solve(eye, eye, eye, eye, eye, 3, damping=-1.0)
    with pytest.raises(ValueError, match="positive definite"):
        kfac_rnn_solve(eye, torch.ones(2, 2), eye, eye, eye, 3)
    with pytest.raises(ValueError, match="gradient of shape"):
        kfac_rnn_solve(torch.ones(3, 2), eye, eye, eye, eye, 3)
    with pytest.raises(ValueError, match="RNNCell"):
        KFACRNN(nn.Linear(2, 2))
    for kwargs in ({"mode": "no"}, {"damping": 0.0}, {"decay": 1.0}, {"momentum": 1.0}, {"clip": 0.0}, {"lr": -1.0}):
        with pytest.raises(ValueError, match=next(iter(kwargs))):
            KFACRNN(nn.RNNCell(2, 2), **kwargs)
    optimizer = KFACRNN(cell := nn.RNNCell(2, 2))
    with pytest.raises(RuntimeError, match="nothing to record"), optimizer.record():
        pass
    cell(torch.ones(1, 2)).sum().backward()
    with pytest.raises(RuntimeError, match="no moments"):
        optimizer.step()
