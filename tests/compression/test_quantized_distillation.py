"""Grids against a plain transcription in NumPy, unbiasedness, gradients of points against sums by hand, and the two fits."""

import numpy as np
import pytest
import torch
from torch.nn.utils import parametrize

from dlatlas.compression.kit.loop import Batches
from dlatlas.compression.kit.nets import mlp
from dlatlas.compression.quantized_distillation import (
    fit_differentiable_quantization,
    fit_quantized_distillation,
    point_quantize,
    uniform_quantize,
)


def by_hand(v, points, size):
    """Every bucket scaled, sent to the nearest point (the lower one of two) and scaled back."""
    out = np.empty_like(v)
    for start in range(0, len(v), size):
        part = v[start : start + size]
        b, a = part.min(), np.ptp(part)
        for i, x in enumerate(part):
            out[start + i] = x if a == 0 else a * points[np.argmin(np.abs((x - b) / a - points))] + b
    return out


def task(n=128):
    torch.manual_seed(1)
    x = torch.randn(n, 8)
    return x, (x[:, :3].sum(1) > 0).long() + (x[:, 3:6].sum(1) > 0).long()


@pytest.mark.parametrize(("levels", "size"), [(1, 16), (3, 16), (15, 7), (3, 100)])
def test_values_are_those_of_the_equations(levels, size):
    v = np.random.default_rng(0).normal(size=53)
    expected = by_hand(v, np.linspace(0, 1, levels + 1), size)
    found = uniform_quantize(torch.tensor(v), levels, size)
    np.testing.assert_allclose(found, expected, atol=1e-12)
    np.testing.assert_allclose(point_quantize(torch.tensor(v), torch.linspace(0, 1, levels + 1, dtype=torch.float64), size), found)


def test_shape_is_kept_and_one_bucket_is_the_whole_tensor():
    w = torch.randn(4, 3, 5)
    q = uniform_quantize(w, 3, None)
    assert q.shape == w.shape and len(q.unique()) == 4
    torch.testing.assert_close(torch.stack([q.min(), q.max()]), torch.stack([w.min(), w.max()]))


def test_ties_go_down():
    v = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0], dtype=torch.float64)
    assert uniform_quantize(v, 2, None).tolist() == [0, 0, 0.5, 0.5, 1]
    assert point_quantize(v, torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)).tolist() == [0, 0, 0.5, 0.5, 1]


def test_random_rounding_is_unbiased_and_lands_next_door():
    v = torch.rand(20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    draws = torch.stack([uniform_quantize(v, 3, 10, stochastic=True, generator=generator) for _ in range(4000)])
    step = torch.stack([p.max() - p.min() for p in v.split(10)]).repeat_interleave(10) / 3
    assert ((draws - v).abs() < step * (1 + 1e-9)).all()
    assert ((draws.mean(0) - v).abs() < 4 * draws.std(0) / 4000**0.5 + 1e-12).all()
    assert draws.std(0).max() > 0.05


@pytest.mark.parametrize("stochastic", [False, True])
def test_a_constant_bucket_is_returned(stochastic):
    v = torch.full((6,), 0.37)
    assert torch.equal(uniform_quantize(v, 3, 4, stochastic), v)
    assert torch.equal(point_quantize(v, torch.tensor([0.0, 1.0])), v)


def test_weights_get_the_straight_gradient():
    v = torch.randn(10, requires_grad=True)
    up = torch.randn(10)
    uniform_quantize(v, 3, 4).backward(up)
    assert torch.equal(v.grad, up)


def test_points_get_the_sums_of_their_weights_gradients():
    g = torch.Generator().manual_seed(2)
    v = torch.randn(30, generator=g, dtype=torch.float64, requires_grad=True)
    points = torch.tensor([0.1, 0.35, 0.4, 0.9], dtype=torch.float64, requires_grad=True)
    up = torch.randn(30, generator=g, dtype=torch.float64)
    point_quantize(v, points, 8).backward(up)
    expected = np.zeros(4)
    for start in range(0, 30, 8):
        part = v.detach().numpy()[start : start + 8]
        for i, u in enumerate((part - part.min()) / np.ptp(part)):
            expected[np.argmin(np.abs(u - points.detach().numpy()))] += np.ptp(part) * float(up[start + i])
    np.testing.assert_allclose(points.grad, expected)
    assert v.grad is None
    assert torch.autograd.gradcheck(lambda p: point_quantize(v.detach(), p, 8), points)


def test_quantized_distillation_learns_and_ends_on_the_grid():
    x, y = task()
    torch.manual_seed(0)
    teacher, student = mlp([8, 32, 3]), mlp([8, 16, 16, 3])
    first = student[0].weight.detach().clone()
    history = fit_quantized_distillation(
        student, teacher, Batches(x, y, size=32), 3, T=2, soft_weight=0.0, bucket_size=64, epochs=15, lr=3e-2
    )
    assert history["loss"][-4:].mean() < 0.6 * history["loss"][:4].mean()
    assert not parametrize.is_parametrized(student[2])
    assert [len(part.unique()) <= 4 for part in student[2].weight.detach().flatten().split(64)] == [True] * 4
    assert not torch.equal(student[0].weight, first) and len(student[0].weight.unique()) > 64


def test_the_soft_loss_pulls_to_the_teacher():
    x, y = task()
    torch.manual_seed(0)
    teacher, student = mlp([8, 4, 3]), mlp([8, 16, 16, 3])
    with torch.no_grad():
        teacher[2].weight *= 5
    fit_quantized_distillation(student, teacher, Batches(x, y, size=32), 255, T=2, soft_weight=1.0, epochs=60, lr=3e-2)
    agree = (student(x).argmax(1) == teacher(x).argmax(1)).float().mean()
    assert agree > 0.85 > (teacher(x).argmax(1) == y).float().mean()


def test_differentiable_quantization_moves_points_and_nothing_else():
    x, y = task()
    torch.manual_seed(0)
    teacher, student = mlp([8, 32, 3]), mlp([8, 16, 16, 3])
    before = {k: v.clone() for k, v in student.state_dict().items()}
    history = fit_differentiable_quantization(student, teacher, Batches(x, y, size=32), 4, T=2, soft_weight=0, epochs=20, lr=3e-2)
    after = student.state_dict()
    assert [k for k in before if not torch.equal(before[k], after[k])] == ["2.weight"]
    assert 3 <= len(after["2.weight"].unique()) <= 4
    assert history["loss"][-4:].mean() < history["loss"][:4].mean()
    # The assignment is monotone: sorted weights have sorted images.
    order = before["2.weight"].flatten().argsort()
    assert (after["2.weight"].flatten()[order].diff() >= 0).all()


@pytest.mark.parametrize(
    "call",
    [
        lambda: uniform_quantize(torch.rand(4), 0),
        lambda: uniform_quantize(torch.rand(4), 2, 0),
        lambda: point_quantize(torch.rand(4), torch.tensor([0.5, 0.2])),
        lambda: point_quantize(torch.rand(4), torch.rand(2, 2)),
        lambda: fit_differentiable_quantization(mlp([8, 4, 4, 3]), mlp([8, 3]), Batches(*task(), size=32), 1),
    ],
)
def test_bad_input_is_refused(call):
    with pytest.raises(ValueError, match="got"):
        call()
