"""Optimistic steps against NumPy, torch's optimizers and the roots of the characteristic equation."""

import copy

import numpy as np
import pytest
import torch

from dlatlas.gans.optimistic import OMD, OptimisticAdam, bilinear_omd

GRADS = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def walk(make, grads=GRADS):
    p = torch.ones(3, dtype=torch.float64, requires_grad=True)
    opt, path = make([p]), []
    for g in grads:
        p.grad = g.clone()
        opt.step()
        path.append(p.detach().clone())
    return torch.stack(path)


def test_omd_in_numpy():
    x, last, g = np.ones(3), np.zeros(3), GRADS.numpy()
    for t, position in enumerate(walk(lambda p: OMD(p, lr=0.1)).numpy()):
        x = x - 0.2 * g[t] + 0.1 * last
        last = g[t]
        np.testing.assert_allclose(position, x)


def test_a_constant_gradient_is_counted_twice_at_first_and_once_later():
    path = walk(lambda p: OMD(p, lr=0.1), torch.ones(4, 3, dtype=torch.float64))
    torch.testing.assert_close(path[:, 0], torch.tensor([0.8, 0.7, 0.6, 0.5], dtype=torch.float64))


def test_adam_in_numpy_takes_back_the_last_direction_and_not_the_last_gradient():
    b1, b2, eps, lr = 0.8, 0.95, 1e-3, 0.05
    x, m, v, last = np.ones(3), 0, 0, np.zeros(3)
    path = walk(lambda p: OptimisticAdam(p, lr=lr, betas=(b1, b2), eps=eps)).numpy()
    for t, g in enumerate(GRADS.numpy(), 1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        u = (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps)
        x, last = x - 2 * lr * u + lr * last, u
        np.testing.assert_allclose(path[t - 1], x)


def test_twice_the_step_of_adam_at_first():
    ours = walk(lambda p: OptimisticAdam(p, lr=0.01, betas=(0.5, 0.9)), GRADS[:1])
    torch.testing.assert_close(ours, walk(lambda p: torch.optim.Adam(p, lr=0.02, betas=(0.5, 0.9)), GRADS[:1]))


def test_the_bilinear_path_is_that_of_two_optimizers():
    A = torch.randn(3, 2, dtype=torch.float64)
    x, y = (torch.randn(n, dtype=torch.float64, requires_grad=True) for n in (3, 2))
    xs, ys = bilinear_omd(A, x.detach().clone(), y.detach().clone(), 0.1, 7)
    min_player, max_player = OMD([x], 0.1), OMD([y], 0.1)
    for t in range(7):
        torch.testing.assert_close(xs[t], x.detach())
        payoff = x @ A @ y
        (x.grad,), (y.grad,) = torch.autograd.grad(payoff, [x], retain_graph=True), torch.autograd.grad(-payoff, [y])
        min_player.step()
        max_player.step()
    torch.testing.assert_close(xs[7], x.detach())
    torch.testing.assert_close(ys[7], y.detach())


@pytest.mark.parametrize("lr", [0.05, 0.3, 0.57, 0.6])
def test_the_last_iterate_contracts_at_the_rate_of_the_largest_root(lr):
    roots = np.concatenate([np.roots([1, -(1 + 2j * lr * s), 1j * lr * s]) for s in (1, -1)])
    radius = np.abs(roots).max()
    assert (radius < 1) == (lr < 1 / 3**0.5)
    one = torch.ones(1, dtype=torch.float64)
    xs, ys = bilinear_omd(torch.eye(1, dtype=torch.float64), one, one, lr, 2000)
    size = (xs.square() + ys.square()).sum(1).sqrt()
    rate = float((size[2000] / size[1000]) ** (1 / 1000))
    assert rate == pytest.approx(radius, abs=3e-4)


@pytest.mark.parametrize("make", [lambda p: OMD(p, lr=0.1), lambda p: OptimisticAdam(p, lr=0.1)])
def test_state_round_trip_goes_on_along_the_same_path(make):
    whole = walk(make)
    p = torch.ones(3, dtype=torch.float64, requires_grad=True)
    opt = make([p])
    for t, g in enumerate(GRADS):
        if t == 3:
            state = copy.deepcopy(opt.state_dict())
            opt = make([p])
            opt.load_state_dict(state)
        p.grad = g.clone()
        opt.step()
    torch.testing.assert_close(p.detach(), whole[-1])


def test_clearing_a_gradient_in_place_does_not_change_the_memory_of_it():
    p = torch.ones(3, dtype=torch.float64, requires_grad=True)
    opt = OMD([p], lr=0.1)
    p.grad = GRADS[0].clone()
    opt.step()
    for t in (1, 2, 3):  # the first memory of a gradient is made in another line than the later ones
        p.grad.copy_(GRADS[t])
        opt.step()
    torch.testing.assert_close(p.detach(), walk(lambda q: OMD(q, lr=0.1), GRADS[:4])[-1])


def test_groups_closures_and_parameters_at_rest():
    x, y = torch.ones(1, requires_grad=True), torch.ones(1, requires_grad=True)
    opt = OMD([{"params": [x]}, {"params": [y], "lr": 0.5}], lr=0.1)

    def closure():
        opt.zero_grad()
        loss = 3 * x.sum()
        loss.backward()
        return loss

    assert opt.step(closure).item() == pytest.approx(3)
    assert x.item() == pytest.approx(1 - 0.6) and y.item() == 1


@pytest.mark.parametrize("make", [lambda p: OMD(p, lr=0.1), lambda p: OptimisticAdam(p, lr=0.1)])
def test_a_parameter_at_rest_keeps_its_last_direction(make):
    p = torch.ones(3, dtype=torch.float64, requires_grad=True)
    opt = make([p])
    for g in (GRADS[0], None, GRADS[1]):
        before = p.detach().clone()
        p.grad = None if g is None else g.clone()
        opt.step()
        assert g is not None or torch.equal(p.detach(), before)
    torch.testing.assert_close(p.detach(), walk(make, GRADS[:2])[-1])


def test_bad_input():
    p = [torch.ones(1, requires_grad=True)]
    for make in (lambda: OMD(p, lr=0), lambda: OptimisticAdam(p, lr=-1.0), lambda: OptimisticAdam(p, betas=(1.0, 0.9)),
                 lambda: OptimisticAdam(p, betas=(0.5,)), lambda: OptimisticAdam(p, eps=-1.0),
                 lambda: bilinear_omd(torch.eye(2), torch.ones(2), torch.ones(2), 0, 3)):  # fmt: skip
        with pytest.raises(ValueError, match="must be"):
            make()
    with pytest.raises(ValueError, match="expected A"):
        bilinear_omd(torch.eye(2), torch.ones(3), torch.ones(2), 0.1, 3)
