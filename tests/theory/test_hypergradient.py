"""Hypergradient descent against torch's optimizers, autograd through a step and a recursion by hand."""

import numpy as np
import pytest
import torch

from dlatlas.theory.hypergradient import SGDHD, AdamHD

G = torch.Generator().manual_seed(0)
A = torch.randn(5, 5, dtype=torch.float64, generator=G)
A = A @ A.T / 5
SHAPES = [(5,), (2, 3)]
START = [torch.randn(s, dtype=torch.float64, generator=G) for s in SHAPES]


def loss_of(params):
    x, w = params
    return 0.5 * x @ A @ x + (w**4).sum() / 4 + (x[:3] * w[0]).sum()


def descend(make, steps=30):
    params = [p.clone().requires_grad_() for p in START]
    opt, rates = make(params), []
    for _ in range(steps):
        opt.zero_grad()
        loss_of(params).backward()
        opt.step()
        rates.append(opt.param_groups[0]["lr"])
    return [p.detach() for p in params], rates


SGD_CASES = [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}, {"momentum": 0.5, "weight_decay": 0.1}]


@pytest.mark.parametrize("kwargs", SGD_CASES)
def test_without_adaptation_it_is_torchs_sgd(kwargs):
    ours, rates = descend(lambda p: SGDHD(p, lr=0.02, hypergrad_lr=0.0, **kwargs))
    torch.testing.assert_close(ours, descend(lambda p: torch.optim.SGD(p, lr=0.02, **kwargs))[0])
    assert set(rates) == {0.02}


def test_without_adaptation_it_is_torchs_adam():
    ours, rates = descend(lambda p: AdamHD(p, lr=0.02, hypergrad_lr=0.0, betas=(0.8, 0.95), eps=1e-3))
    torch.testing.assert_close(ours, descend(lambda p: torch.optim.Adam(p, lr=0.02, betas=(0.8, 0.95), eps=1e-3))[0])
    assert set(rates) == {0.02}


BETA = 1e-5
MAKERS = {
    "sgd": lambda p, b: SGDHD(p, lr=0.02, hypergrad_lr=b),
    "momentum": lambda p, b: SGDHD(p, lr=0.02, hypergrad_lr=b, momentum=0.9),
    "nesterov": lambda p, b: SGDHD(p, lr=0.02, hypergrad_lr=b, momentum=0.9, nesterov=True),
    "adam": lambda p, b: AdamHD(p, lr=0.02, hypergrad_lr=b),
}


@pytest.mark.parametrize("name", MAKERS)
def test_the_rate_moves_by_the_derivative_through_the_step_before(name):
    params = [p.clone().requires_grad_() for p in START]
    opt = MAKERS[name](params, BETA)
    for _ in range(7):
        before, lr = [p.detach().clone() for p in params], opt.param_groups[0]["lr"]
        opt.zero_grad()
        loss_of(params).backward()
        opt.step()
    # What the last step did, as a function of its own rate: autograd differentiates the loss after it.
    new = opt.param_groups[0]["lr"]
    alpha = torch.tensor(new, dtype=torch.float64, requires_grad=True)
    direction = [(b - p.detach()) / new for b, p in zip(before, params)]
    after = [b - alpha * u for b, u in zip(before, direction)]
    (derivative,) = torch.autograd.grad(loss_of(after), alpha)
    opt.zero_grad()
    loss_of(params).backward()
    opt.step()
    assert opt.param_groups[0]["lr"] == pytest.approx(new - BETA * float(derivative), rel=1e-10)
    assert new != lr


def test_the_first_step_leaves_the_rate_alone():
    for make in MAKERS.values():
        assert descend(lambda p, make=make: make(p, 10.0), steps=1)[1] == [0.02]


def test_a_parabola_by_hand():
    # f = x^2/2: g = x, a' = a + b x_t x_{t-1}, x' = (1 - a') x.
    x = torch.tensor([2.0], dtype=torch.float64, requires_grad=True)
    opt = SGDHD([x], lr=0.1, hypergrad_lr=0.05)
    value, last, rate = 2.0, 0.0, 0.1
    for _ in range(12):
        opt.zero_grad()
        (x**2 / 2).sum().backward()
        opt.step()
        rate += 0.05 * value * last
        last, value = value, (1 - rate) * value
        assert float(x.detach()) == pytest.approx(value, rel=1e-12)
        assert opt.param_groups[0]["lr"] == pytest.approx(rate, rel=1e-12)
    assert rate > 0.1


def test_an_overshooting_rate_falls_and_may_turn_negative_unclipped():
    x = torch.tensor([1.0], dtype=torch.float64, requires_grad=True)
    opt = SGDHD([x], lr=1.9, hypergrad_lr=5.0)
    for _ in range(2):
        opt.zero_grad()
        (x**2 / 2).sum().backward()
        opt.step()
    # x_1 = -0.9, so the product is -0.9 and the rate 1.9 - 4.5.
    assert opt.param_groups[0]["lr"] == pytest.approx(-2.6)


def test_adam_hd_in_numpy():
    x = np.array([1.0, -2.0, 0.5])
    target, lr = np.array([3.0, 1.0, 0.0]), 0.01
    theta = torch.tensor(x, requires_grad=True)
    opt = AdamHD([theta], lr=lr, hypergrad_lr=1e-3, betas=(0.7, 0.9), eps=1e-6)
    m = v = u = np.zeros(3)
    for t in range(1, 16):
        opt.zero_grad()
        (0.5 * (theta - torch.tensor(target)) ** 2).sum().backward()
        opt.step()
        g = x - target
        lr = lr + 1e-3 * g @ u
        m, v = 0.7 * m + 0.3 * g, 0.9 * v + 0.1 * g**2
        u = (m / (1 - 0.7**t)) / (np.sqrt(v / (1 - 0.9**t)) + 1e-6)
        x = x - lr * u
        np.testing.assert_allclose(theta.detach().numpy(), x)
    assert opt.param_groups[0]["lr"] == pytest.approx(lr)
    assert lr > 0.02


def test_each_group_has_its_rate_and_the_product_sums_over_its_parameters():
    x, y, z = (torch.full((2,), v, dtype=torch.float64, requires_grad=True) for v in (1.0, 2.0, 3.0))
    opt = SGDHD([{"params": [x, y]}, {"params": [z], "hypergrad_lr": 0.0}], lr=0.1, hypergrad_lr=0.01)
    for _ in range(2):
        opt.zero_grad()
        (0.5 * (x**2 + y**2 + z**2)).sum().backward()
        opt.step()
    # Second gradient is 0.9 times the first: agreement 0.9 (2 * 1 + 2 * 4).
    assert opt.param_groups[0]["lr"] == pytest.approx(0.1 + 0.01 * 9.0)
    assert opt.param_groups[1]["lr"] == 0.1


def test_weight_decay_is_part_of_the_gradient_that_moves_the_rate():
    x = torch.full((1,), 2.0, dtype=torch.float64, requires_grad=True)
    opt = SGDHD([x], lr=0.1, hypergrad_lr=0.01, weight_decay=0.5)
    x.grad = torch.tensor([1.0], dtype=torch.float64)
    opt.step()  # along 1 + 0.5 * 2 = 2, to 1.8
    opt.step()  # the gradient is 1 + 0.5 * 1.8 = 1.9
    assert opt.param_groups[0]["lr"] == pytest.approx(0.1 + 0.01 * 2 * 1.9)
    assert x.item() == pytest.approx(1.8 - opt.param_groups[0]["lr"] * 1.9)


def test_a_parameter_without_gradient_rests_and_takes_no_part():
    x, y = torch.ones(1, dtype=torch.float64, requires_grad=True), torch.ones(1, dtype=torch.float64, requires_grad=True)
    opt = SGDHD([x, y], lr=0.1, hypergrad_lr=0.01)
    for gx, gy in ((1.0, 1.0), (1.0, None), (1.0, 1.0)):
        x.grad = torch.tensor([gx], dtype=torch.float64)
        y.grad = None if gy is None else torch.tensor([gy], dtype=torch.float64)
        opt.step()
    # y had no step just before the third, so only x contributes: 0.1, + 0.01, + 0.01.
    assert opt.param_groups[0]["lr"] == pytest.approx(0.12)


@pytest.mark.parametrize("name", MAKERS)
def test_state_round_trip_keeps_the_direction(name):
    whole, rates = descend(lambda p: MAKERS[name](p, BETA), steps=10)
    params = [p.clone().requires_grad_() for p in START]
    opt = MAKERS[name](params, BETA)
    for i in range(10):
        if i == 5:
            saved = opt.state_dict()
            opt = MAKERS[name](params, 0.0)
            opt.load_state_dict(saved)
        opt.zero_grad()
        loss_of(params).backward()
        opt.step()
    torch.testing.assert_close([p.detach() for p in params], whole, rtol=0, atol=0)
    assert opt.param_groups[0]["lr"] == rates[-1]
    assert isinstance(rates[-1], float)


def test_gradients_that_are_cleared_in_place_do_not_change_the_stored_direction():
    def rates(set_to_none):
        x = torch.ones(1, dtype=torch.float64, requires_grad=True)
        opt, out = SGDHD([x], lr=0.1, hypergrad_lr=0.05), []
        for _ in range(3):
            opt.zero_grad(set_to_none=set_to_none)
            (x**2 / 2).sum().backward()
            opt.step()
            out.append(opt.param_groups[0]["lr"])
        return out

    assert rates(True) == rates(False)


def test_closure_is_evaluated_with_gradients():
    x = torch.ones(1, requires_grad=True)
    opt = SGDHD([x], lr=0.1)

    def closure():
        opt.zero_grad()
        loss = (x**2).sum()
        loss.backward()
        return loss

    assert opt.step(closure).item() == 1.0
    assert float(x.detach()) == pytest.approx(0.8)


def test_bad_input():
    x = [torch.zeros(1, requires_grad=True)]
    for kwargs in ({"lr": -1.0}, {"hypergrad_lr": -1.0}, {"momentum": -0.1}, {"weight_decay": -0.1}, {"nesterov": True}):
        with pytest.raises(ValueError):
            SGDHD(x, **kwargs)
    for kwargs in ({"lr": -1.0}, {"hypergrad_lr": -1.0}, {"eps": -1.0}, {"betas": (0.9, 1.0)}, {"betas": (-0.1, 0.9)}):
        with pytest.raises(ValueError):
            AdamHD(x, **kwargs)
