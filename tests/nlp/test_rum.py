"""Rotations against the formula of the paper, SciPy and the axioms; the cell against a NumPy transcription."""

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from dlatlas.nlp.kit.rnn import run
from dlatlas.nlp.rum import RUMCell, rotate, rotation

F64 = torch.float64


def formula(a, b):
    """The paper's matrix for one pair of vectors."""
    u = a / np.linalg.norm(a)
    v = b - (u @ b) * u
    v /= np.linalg.norm(v)
    c = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
    s = np.sqrt(1 - c * c)
    uv = np.stack([u, v], 1)
    return np.eye(len(a)) - np.outer(u, u) - np.outer(v, v) + uv @ np.array([[c, -s], [s, c]]) @ uv.T


def unit(v):
    return v / v.norm(dim=1, keepdim=True)


@pytest.mark.parametrize("D", [2, 3, 8])
def test_against_the_formula(D):
    a, b, v = (torch.randn(20, D, dtype=F64) for _ in range(3))
    R = rotation(a, b)
    for k in range(20):
        np.testing.assert_allclose(R[k], formula(a[k].numpy(), b[k].numpy()), atol=1e-12)
    torch.testing.assert_close(rotate(a, b, v), (R @ v[:, :, None])[:, :, 0])
    torch.testing.assert_close(rotation(3 * a, 0.1 * b), R)  # directions only
    torch.testing.assert_close(rotation(b, a), R.mT)


def test_axioms():
    a, b = torch.randn(30, 6, dtype=F64), torch.randn(30, 6, dtype=F64)
    R = rotation(a, b)
    torch.testing.assert_close(R @ R.mT, torch.eye(6, dtype=F64).expand(30, 6, 6))
    torch.testing.assert_close(torch.linalg.det(R), torch.ones(30, dtype=F64))
    torch.testing.assert_close((R @ unit(a)[:, :, None])[:, :, 0], unit(b))
    # Nothing moves that is orthogonal to both.
    plane = torch.linalg.qr(torch.stack([a, b], 2))[0]
    w = torch.randn(30, 6, 1, dtype=F64)
    w = w - plane @ (plane.mT @ w)
    torch.testing.assert_close(R @ w, w)


def test_in_three_dimensions_against_scipy():
    a, b = torch.randn(10, 3, dtype=F64), torch.randn(10, 3, dtype=F64)
    for k, R in enumerate(rotation(a, b)):
        axis = np.cross(a[k], b[k])
        angle = np.arctan2(np.linalg.norm(axis), float(a[k] @ b[k]))
        np.testing.assert_allclose(R, Rotation.from_rotvec(angle * axis / np.linalg.norm(axis)).as_matrix(), atol=1e-12)


def test_limits():
    a = torch.randn(4, 5, dtype=F64)
    eye = torch.eye(5, dtype=F64).expand(4, 5, 5)
    torch.testing.assert_close(rotation(a, 2 * a), eye)
    for other in (torch.zeros_like(a), torch.full_like(a, 1e-30)):
        torch.testing.assert_close(rotation(a, other), eye)
        torch.testing.assert_close(rotation(other, a), eye)
    half = rotation(a, -a)
    torch.testing.assert_close((half @ unit(a)[:, :, None])[:, :, 0], -unit(a))
    torch.testing.assert_close(torch.linalg.det(half), torch.ones(4, dtype=F64))
    torch.testing.assert_close(half @ half, eye)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("turn", [0.0, 1e-7, 1e-3, 1.0, np.pi - 1e-2, np.pi - 1e-5, np.pi - 1e-9])
def test_orthogonal_to_rounding_error_at_every_angle(dtype, turn):
    u, v = torch.linalg.qr(torch.randn(50, 6, 2, dtype=F64))[0].unbind(2)
    a, b = u.to(dtype), (np.cos(turn) * u + np.sin(turn) * v).to(dtype)
    R, eps = rotation(a, b), torch.finfo(dtype).eps
    assert (R @ R.mT - torch.eye(6, dtype=dtype)).abs().max() < 12 * eps
    # Near a half turn the bisector is known to the square root of the precision only.
    assert ((R @ a[:, :, None])[:, :, 0] - unit(b)).abs().max() < (12 * eps if turn < 3 else 8 * eps**0.5)


def test_gradients():
    a, b, v = (torch.randn(2, 4, dtype=F64, requires_grad=True) for _ in range(3))
    assert torch.autograd.gradcheck(rotate, (a, b, v))
    assert torch.autograd.gradcheck(rotation, (a, b))
    parallel = a.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda b: rotate(a.detach(), b, v.detach()), parallel)
    for bad in (-a.detach(), torch.zeros_like(a)):
        leaf = bad.clone().requires_grad_()
        for f in (lambda x: rotate(a.detach(), x, v.detach()), lambda x: rotate(x, a.detach(), v.detach())):
            (grad,) = torch.autograd.grad(f(leaf).sum(), leaf)
            assert grad.isfinite().all()


def numpy_rum(cell, x):
    H = cell.d_hidden
    We, be, Wx, b, Wh = (
        p.detach().numpy()
        for p in (cell.embed.weight, cell.embed.bias, cell.gate_input.weight, cell.gate_input.bias, cell.gate_state.weight)
    )
    h, R, out = np.zeros(H), np.eye(H), []
    for x_t in x:
        pre = Wx @ x_t + b + Wh @ h
        z, target, e = 1 / (1 + np.exp(-pre[:H])), pre[H:], We @ x_t + be
        turn = formula(e, target)
        R = R @ turn if cell.lambda_ else turn
        h = z * h + (1 - z) * np.maximum(e + R @ h, 0)
        if cell.eta is not None:
            h = cell.eta * h / np.linalg.norm(h)
        out.append(h)
    return np.stack(out), R


@pytest.mark.parametrize("lambda_", [0, 1])
@pytest.mark.parametrize("eta", [None, 2.0])
def test_cell_against_numpy(lambda_, eta):
    cell = RUMCell(3, 5, lambda_, eta).double()
    x = torch.randn(2, 9, 3, dtype=F64)
    out, state = run(cell, x)
    for k in range(2):
        h, R = numpy_rum(cell, x[k].numpy())
        np.testing.assert_allclose(out[k].detach(), h, atol=1e-12)
        if lambda_:
            np.testing.assert_allclose(state[1][k].detach(), R, atol=1e-12)
    assert torch.equal(state[0] if lambda_ else state, out[:, -1])
    if eta:
        torch.testing.assert_close(out.norm(dim=2), torch.full((2, 9), eta, dtype=F64))
    first, middle = run(cell, x[:, :4])
    torch.testing.assert_close(torch.cat([first, run(cell, x[:, 4:], middle)[0]], 1), out)
    out.sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in cell.parameters())


def test_the_memory_stays_orthogonal_through_training_and_time():
    cell = RUMCell(4, 8, lambda_=1)
    optimizer = torch.optim.Adam(cell.parameters(), lr=1e-2)
    x = torch.randn(6, 20, 4)
    for _ in range(15):
        out, _ = run(cell, x)
        loss = (out - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        _, (_, R) = run(cell, torch.randn(6, 200, 4))
    # The error of a product of n matrices adds up, but a step has only rounding error.
    assert (R @ R.mT - torch.eye(8)).abs().max() < 200 * torch.finfo(torch.float32).eps
    assert (R - torch.eye(8)).abs().max() > 0.1


def test_start():
    cell = RUMCell(6, 6)
    for weight in (cell.embed.weight, *cell.gate_input.weight.chunk(2), *cell.gate_state.weight.chunk(2)):
        torch.testing.assert_close(weight @ weight.T, torch.eye(6))
    assert (cell.gate_input.bias == 1).all() and (cell.embed.bias == 0).all()


def test_zero_state_with_time_normalisation():
    cell = RUMCell(2, 3, eta=1.0)
    with torch.no_grad():
        cell.embed.weight.zero_()
    h, _ = cell(torch.zeros(1, 2))
    assert torch.equal(h, torch.zeros(1, 3))
    h.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in cell.parameters())


def test_bad_calls():
    for a, b in ((torch.ones(2, 3), torch.ones(2, 4)), (torch.ones(3), torch.ones(3)), (torch.ones(2, 1), torch.ones(2, 1))):
        with pytest.raises(ValueError, match="expected two tensors"):
            rotation(a, b)
    with pytest.raises(ValueError, match=r"vector of shape \(2, 3\), got \(2, 2\)"):
        rotate(torch.ones(2, 3), torch.ones(2, 3), torch.ones(2, 2))
    for bad, message in (({"d_hidden": 1}, "d_hidden >= 2"), ({"lambda_": 2}, "got 2"), ({"eta": 0.0}, "eta"), ({"d_in": 0}, "d_in >= 1")):
        with pytest.raises(ValueError, match=message):
            RUMCell(**{"d_in": 2, "d_hidden": 3} | bad)
    with pytest.raises(ValueError, match=r"\[B, 2\], got \(1, 3\)"):
        RUMCell(2, 3)(torch.ones(1, 3))
