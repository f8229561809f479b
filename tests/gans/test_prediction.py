"""The prediction step against closed forms of bilinear games, and as a context that leaves no trace."""

import numpy as np
import pytest
import torch
from torch import nn

from dlatlas.gans.prediction import Predicted


def play(K, u0, v0, a, b, steps, gamma):
    u, v = u0.clone().requires_grad_(), v0.clone().requires_grad_()
    first, second = Predicted(torch.optim.SGD([u], a), gamma), torch.optim.SGD([v], b, maximize=True)
    path = [(u0, v0)]
    for _ in range(steps):
        first.zero_grad()
        (u @ K @ v).backward()
        first.step()
        second.zero_grad()
        with first.lookahead():
            (u.detach() @ K @ v).backward()
        second.step()
        path.append((u.detach().clone(), v.detach().clone()))
    return path


def start(n=4):
    g = torch.Generator().manual_seed(0)
    K, _ = torch.linalg.qr(torch.randn(n, n, generator=g, dtype=torch.float64))
    return K, torch.randn(n, generator=g, dtype=torch.float64), torch.randn(n, generator=g, dtype=torch.float64)


@pytest.mark.parametrize("gamma", [0.0, 1.0, 0.5])
def test_one_iteration_is_the_linear_map_of_the_formula(gamma):
    K, u, v = start()
    a, b = 0.3, 0.7
    (_, _), (u1, v1) = play(K, u, v, a, b, 1, gamma)
    expected_u = u - a * K @ v
    expected_v = v + b * K.T @ (expected_u + gamma * (expected_u - u))
    torch.testing.assert_close(u1, expected_u)
    torch.testing.assert_close(v1, expected_v)


def test_chambolle_pock_converges_at_the_rate_of_its_iteration_matrix_where_alternation_keeps_its_size():
    K, u, v = start()
    a = b = 0.5

    def radius(gamma):
        # One singular value 1: u' = u - a v, v' = v + b (u' + gamma (u' - u)).
        return np.abs(np.linalg.eigvals([[1, -a], [b, 1 - a * b * (1 + gamma)]])).max()

    def rate(gamma):
        size = [float((u.square().sum() + v.square().sum()).sqrt()) for u, v in play(K, u, v, a, b, 120, gamma)]
        return (size[120] / size[60]) ** (1 / 60)

    assert radius(0.0) == pytest.approx(1)
    assert rate(0.0) == pytest.approx(1, abs=5e-3)
    assert radius(1.0) < 0.9
    assert rate(1.0) == pytest.approx(radius(1.0), abs=5e-3)


def small():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    return net, torch.randn(8, 3)


@pytest.mark.parametrize("make", [lambda p: torch.optim.Adam(p, 0.1), lambda p: torch.optim.SGD([{"params": list(p)}], 0.1, momentum=0.9)])
def test_ahead_is_one_more_step_of_the_same_size_and_the_return_is_exact(make):
    net, x = small()
    opt = Predicted(make(net.parameters()), gamma=1.5)
    old = [p.detach().clone() for p in net.parameters()]
    net(x).sum().backward()
    opt.step()
    new = [p.detach().clone() for p in net.parameters()]
    with opt.lookahead():
        for p, a, b in zip(net.parameters(), old, new):
            torch.testing.assert_close(p.detach(), b + 1.5 * (b - a))
    assert all(torch.equal(p, b) for p, b in zip(net.parameters(), new))
    with pytest.raises(KeyError), opt.lookahead():
        raise KeyError
    assert all(torch.equal(p, b) for p, b in zip(net.parameters(), new))


def test_gradients_taken_ahead_are_used_at_home():
    u, v = torch.ones(1, requires_grad=True), torch.ones(1, requires_grad=True)
    opt = Predicted(torch.optim.SGD([u], 0.1))
    (u * v).backward()
    opt.step()  # 1 -> 0.9, ahead 0.8
    v.grad = None
    with opt.lookahead():
        (u * v).backward()
    assert v.grad.item() == pytest.approx(0.8) and u.item() == pytest.approx(0.9)


def test_a_schedule_takes_the_inner_optimizer():
    u = torch.ones(1, requires_grad=True)
    opt = Predicted(torch.optim.SGD([u], 0.1))
    schedule = torch.optim.lr_scheduler.StepLR(opt.optimizer, 1, gamma=0.5)
    for ahead in (0.8, 0.8):  # 1 -> 0.9, one more step is 0.8; then 0.9 -> 0.85 at half the rate, one more is 0.8
        u.grad = torch.ones(1)
        opt.step()
        schedule.step()
        with opt.lookahead():
            assert u.item() == pytest.approx(ahead)
    assert opt.param_groups[0]["lr"] == pytest.approx(0.025)


def test_state_round_trip():
    net, x = small()
    opt = Predicted(torch.optim.Adam(net.parameters(), 0.1), gamma=0.5)
    net(x).sum().backward()
    opt.step()
    other = Predicted(torch.optim.Adam(net.parameters(), 0.7))
    other.load_state_dict(opt.state_dict())
    assert other.param_groups[0]["lr"] == 0.1 and other.gamma == 0.5
    with opt.lookahead():
        ahead = [p.detach().clone() for p in net.parameters()]
    with other.lookahead():
        assert all(torch.equal(p, a) for p, a in zip(net.parameters(), ahead))


def test_closures_and_misuse():
    net, x = small()
    opt = Predicted(torch.optim.SGD(net.parameters(), 0.1))

    def closure():
        opt.zero_grad()
        loss = net(x).square().mean()
        loss.backward()
        return loss

    with pytest.raises(RuntimeError, match="before the first step"), opt.lookahead():
        pass
    assert opt.step(closure) > 0
    with opt.lookahead():
        with pytest.raises(RuntimeError, match="inside"), opt.lookahead():
            pass
        with pytest.raises(RuntimeError, match=r"step\(\) inside"):
            opt.step()
    with pytest.raises(ValueError, match="gamma"):
        Predicted(torch.optim.SGD(net.parameters(), 0.1), gamma=-1)
