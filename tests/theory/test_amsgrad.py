"""AMSGrad against torch's Adam and a NumPy transcription, AdamNC against Adagrad, the online problem against its theorem."""

import itertools
import math

import numpy as np
import pytest
import torch

from dlatlas.theory.amsgrad import AdamNC, AMSGrad, reddi_problem

G = torch.Generator().manual_seed(0)
A = torch.randn(6, 6, dtype=torch.float64, generator=G)
A, B = A @ A.T, torch.randn(6, dtype=torch.float64, generator=G)
START = torch.randn(6, dtype=torch.float64, generator=G)


def trajectory(make, steps=50):
    """Iterates on a quadratic whose gradient shrinks and changes sign, so that the maximum and the average differ."""
    x = START.clone().requires_grad_()
    optimizer, path = make([x]), []
    for t in range(steps):
        optimizer.zero_grad()
        (0.5 * x @ A @ x + B @ x * math.cos(t)).backward()
        optimizer.step()
        path.append(x.detach().clone())
    return torch.stack(path)


def gradient(x, t):
    return A.numpy() @ x + B.numpy() * math.cos(t)


def test_with_bias_correction_it_is_torchs_amsgrad():
    ours = trajectory(lambda p: AMSGrad(p, lr=0.1, betas=(0.8, 0.9), eps=1e-2, bias_correction=True))
    torchs = trajectory(lambda p: torch.optim.Adam(p, lr=0.1, betas=(0.8, 0.9), eps=1e-2, amsgrad=True))
    torch.testing.assert_close(ours, torchs)
    assert not torch.allclose(ours, trajectory(lambda p: torch.optim.Adam(p, lr=0.1, betas=(0.8, 0.9))))


def test_without_bias_correction_it_is_the_papers_algorithm():
    x, m, v, vhat = START.numpy(), 0.0, 0.0, np.zeros(6)
    for t in range(50):
        g = gradient(x, t)
        m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g**2
        vhat = np.maximum(vhat, v)
        x = x - 0.1 * m / (np.sqrt(vhat) + 1e-2)  # outside the root
    np.testing.assert_allclose(trajectory(lambda p: AMSGrad(p, lr=0.1, betas=(0.8, 0.9), eps=1e-2))[-1].numpy(), x)


def test_constant_gradients_leave_nothing_to_remember():
    paths = []
    for amsgrad in (True, False):
        x = torch.zeros(3, dtype=torch.float64, requires_grad=True)
        opt = AMSGrad([x], lr=0.1, bias_correction=True) if amsgrad else torch.optim.Adam([x], lr=0.1)
        for _ in range(30):
            x.grad = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
            opt.step()
        paths.append(x.detach())
    # Torch corrects v first and we correct the maximum: with constant gradients v grows, so both are v.
    torch.testing.assert_close(*paths)


def test_the_maximum_never_falls_although_the_average_does():
    x = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    opt, vhat, v = AMSGrad([x], betas=(0.9, 0.5)), [], []
    for t in range(20):
        x.grad = torch.tensor([3.0 if t % 5 == 0 else -0.1], dtype=torch.float64)
        opt.step()
        vhat.append(float(opt.state[x]["vhat"]))
        v.append(float(opt.state[x]["v"]))
    assert all(b >= a for a, b in itertools.pairwise(vhat))
    assert any(b < a for a, b in itertools.pairwise(v))


def test_adamnc_without_momentum_is_adagrad():
    ours = trajectory(lambda p: AdamNC(p, lr=0.3, beta1=0.0, eps=0.0))
    torch.testing.assert_close(ours, trajectory(lambda p: torch.optim.Adagrad(p, lr=0.3, eps=0.0)))


def test_adamnc_with_fading_momentum_in_numpy():
    x, m, squares = START.numpy(), 0.0, 0.0
    for t in range(1, 41):
        g = gradient(x, t - 1)
        b1 = 0.9 * 0.8 ** (t - 1)
        m = b1 * m + (1 - b1) * g
        squares = squares + g**2
        x = x - 0.3 / math.sqrt(t) * m / (np.sqrt(squares / t) + 1e-3)
    ours = trajectory(lambda p: AdamNC(p, lr=0.3, beta1=0.9, beta1_decay=0.8, eps=1e-3), steps=40)
    np.testing.assert_allclose(ours[-1].numpy(), x)


@pytest.mark.parametrize("C", [2.1, 3.0, 10.0])
def test_adam_is_back_at_the_worst_point_after_every_period(C):
    path = reddi_problem("adam", C=C, steps=600)
    assert torch.equal(path[::3], torch.ones(201, dtype=torch.float64))  # the theorem: x_{3k+1} = 1 for all k
    assert path.shape == (601,)
    assert path.dtype == torch.float64
    assert float(path.abs().max()) <= 1
    g = torch.tensor([C, -1.0, -1.0] * 200, dtype=torch.float64)
    regret = (g * (path[:-1] + 1)).view(200, 3).sum(1)  # against the best fixed point, -1
    assert float(regret.min()) >= 2 * C - 4


@pytest.mark.parametrize("method", ["amsgrad", "adamnc"])
def test_the_remedies_reach_the_best_point_with_vanishing_regret(method):
    path = reddi_problem(method, steps=3000)
    assert float(path[-1]) < -0.9
    g = torch.tensor([3.0, -1.0, -1.0] * 1000, dtype=torch.float64)
    regret = (g * (path[:-1] + 1)).cumsum(0) / torch.arange(1, 3001)
    assert float(regret[-1]) < 0.3 * float(regret[299])  # like 1/sqrt(T): 0.32


@pytest.mark.parametrize("method", ["adam", "amsgrad", "adamnc"])
def test_the_problem_runs_what_the_optimizers_compute(method):
    x = torch.ones(1, dtype=torch.float64, requires_grad=True)
    beta2, path = 0.3, [1.0]
    if method == "adamnc":
        opt = AdamNC([x], lr=0.5, beta1=0.0, eps=0.0)
    else:
        opt = AMSGrad([x], lr=0.5, betas=(0.0, beta2), eps=0.0)
    for t in range(1, 61):
        if method != "adamnc":
            opt.param_groups[0]["lr"] = 0.5 / math.sqrt(t)
        if method == "adam" and t > 1:
            opt.state[x]["vhat"].zero_()  # an AMSGrad without memory
        x.grad = torch.tensor([3.0 if t % 3 == 1 else -1.0], dtype=torch.float64)
        opt.step()
        with torch.no_grad():
            x.clamp_(-1, 1)
        path.append(x.item())
    np.testing.assert_allclose(reddi_problem(method, steps=60, beta2=beta2).numpy(), path)


@pytest.mark.parametrize("cls", [AMSGrad, AdamNC])
def test_state_round_trip_groups_and_closure(cls):
    def run(restart):
        x, y = torch.ones(2, requires_grad=True), torch.ones(3, requires_grad=True)
        idle = torch.ones(1, requires_grad=True)
        make = lambda: cls([{"params": [x]}, {"params": [y, idle], "lr": 0.0}], lr=0.1)  # noqa: E731
        opt = make()

        def closure():
            opt.zero_grad()
            loss = (x**4).sum() + (y**2).sum()
            loss.backward()
            return loss

        for i in range(6):
            if restart and i == 3:
                saved = opt.state_dict()
                opt = make()
                opt.load_state_dict(saved)
            loss = opt.step(closure)
        assert loss.item() < 5
        assert torch.equal(y, torch.ones(3))
        assert torch.equal(idle, torch.ones(1))
        return x.detach()

    assert torch.equal(run(False), run(True))


def test_bad_input():
    x = [torch.zeros(1, requires_grad=True)]
    for kwargs in ({"lr": -1.0}, {"betas": (1.0, 0.9)}, {"betas": (0.9, -0.1)}, {"betas": (0.9, 1.0)}, {"eps": -1.0}):
        with pytest.raises(ValueError):
            AMSGrad(x, **kwargs)
    for kwargs in ({"lr": -1.0}, {"beta1": 1.0}, {"beta1_decay": 0.0}, {"beta1_decay": 1.1}):
        with pytest.raises(ValueError):
            AdamNC(x, **kwargs)
    for kwargs in ({"C": 2.0}, {"C": math.nan}, {"beta2": 1.0}, {"alpha": -0.1}, {"steps": 0}, {"x0": 1.5}):
        with pytest.raises(ValueError):
            reddi_problem("adam", **kwargs)
    with pytest.raises(ValueError, match="'sgd'"):
        reddi_problem("sgd")
