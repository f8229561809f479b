"""Apprentice's loss against its terms by other routes, the ternary grid against a transcription, the schemes against what they promise."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, kl_div

from dlatlas.compression.apprentice import ApprenticeLoss, fit_apprentice, ternary_weight
from dlatlas.compression.kit.loop import Batches
from dlatlas.compression.kit.nets import mlp
from dlatlas.compression.kit.qat import quantize_aware


@pytest.fixture
def logits():
    torch.manual_seed(0)
    s, t = (torch.randn(9, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    return s, t, torch.randint(5, (9,))


def task(n=256):
    torch.manual_seed(1)
    x = torch.randn(n, 8)
    return x, (x[:, :3].sum(1) > 0).long() + (x[:, 3:6].sum(1) > 0).long()


def test_hard_terms_are_cross_entropies(logits):
    s, t, y = logits
    loss = ApprenticeLoss(alpha=0.7, beta=0.2, gamma=0)(s, t, y)
    torch.testing.assert_close(loss, 0.7 * cross_entropy(t, y) + 0.2 * cross_entropy(s, y))


def test_soft_term_is_divergence_plus_the_teachers_entropy(logits):
    s, t, y = logits
    p = t.softmax(1)
    entropy = -(p * p.log()).sum(1).mean()
    expected = kl_div(s.log_softmax(1), p, reduction="batchmean") + entropy
    torch.testing.assert_close(ApprenticeLoss(0, 0, 1)(s, t, y), expected)


def test_the_teacher_feels_its_own_term_only(logits):
    s, t, y = logits
    ApprenticeLoss(alpha=0)(s, t, y).backward()
    assert t.grad is None or not t.grad.any()
    with torch.no_grad():
        expected = 0.5 * (s.softmax(1) - nn.functional.one_hot(y, 5)) / 9 + 0.5 * (s.softmax(1) - t.softmax(1)) / 9
    torch.testing.assert_close(s.grad, expected)
    s.grad = None
    ApprenticeLoss()(s, t, y).backward()
    with torch.no_grad():
        torch.testing.assert_close(t.grad, (t.softmax(1) - nn.functional.one_hot(y, 5)) / 9)


@pytest.mark.parametrize("delta", [0.7, 0.0, 1.3])
def test_ternary_values_are_those_of_the_equation(delta):
    w = np.random.default_rng(0).normal(size=(6, 7))
    threshold = delta * np.abs(w).mean()
    kept = np.abs(w) > threshold
    expected = np.abs(w[kept]).mean() * np.sign(w) * kept
    np.testing.assert_allclose(ternary_weight(torch.tensor(w), delta), expected)


def test_ternary_has_three_values_and_a_straight_gradient():
    w = torch.randn(40, 30, requires_grad=True)
    q = ternary_weight(w)
    assert len(q.unique()) == 3 and q.unique()[1] == 0
    up = torch.randn_like(w)
    q.backward(up)
    assert torch.equal(w.grad, up)
    torch.testing.assert_close(ternary_weight(5 * w), 5 * q)


def test_zeros_stay_zeros():
    assert torch.equal(ternary_weight(torch.zeros(3, 4)), torch.zeros(3, 4))


@pytest.mark.parametrize("scheme", ["A", "B", "C"])
def test_schemes_learn_and_touch_only_what_they_may(scheme):
    x, y = task()
    torch.manual_seed(0)
    teacher, student = mlp([8, 32, 32, 3], norm="batch"), mlp([8, 16, 16, 3])
    before = copy.deepcopy(teacher.state_dict())
    out = fit_apprentice(student, teacher, Batches(x, y, size=32), scheme, epochs=10, lr=3e-2)
    unchanged = all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    assert unchanged == (scheme != "A")
    assert out["student"] is student and len(out["history"]["loss"]) == 8 * (5 if scheme == "C" else 10)
    assert len(student[2].weight.unique()) <= 3 and len(student[0].weight.unique()) > 3
    assert (student(x).argmax(1) == y).float().mean() > (0.8 if scheme == "A" else 0.5)


def test_frozen_teacher_is_in_evaluation_mode_and_may_be_computed_before():
    x, y = task(128)
    teacher = nn.Sequential(nn.Dropout(0.9), mlp([8, 6, 6, 3])).train()
    with torch.no_grad():
        answers = teacher[1](x)
    finals = []
    for batches in (Batches(x, y, size=32), Batches(x, y, answers, size=32)):
        torch.manual_seed(0)
        finals.append(fit_apprentice(mlp([8, 5, 5, 3]), teacher, batches, epochs=2, lr=1e-2)["history"]["loss"])
    np.testing.assert_allclose(finals[0], finals[1], rtol=1e-5)


def test_a_quantised_student_keeps_its_grid():
    x, y = task(64)
    teacher = mlp([8, 6, 6, 3])
    coarse = quantize_aware(mlp([8, 5, 5, 3]), lambda w: ternary_weight(w, 2.0))
    fit_apprentice(coarse, teacher, Batches(x, y, size=32), epochs=1)
    assert (coarse[2].weight == 0).float().mean() > 0.7
    both = fit_apprentice(mlp([8, 5, 5, 3]), teacher, Batches(x, y, size=32), epochs=1, quantizer=(None, torch.round))["student"]
    assert not hasattr(both[2], "parametrizations") and hasattr(both[2], "quantized_input")
    with pytest.raises(ValueError, match="scheme C"):
        fit_apprentice(coarse, teacher, Batches(x, y, size=32), "C")


def test_bad_input_is_refused(logits):
    s, t, y = logits
    for bad in ((s, t[:, :4], y), (s, t, y[:3]), (s[0], t[0], y)):
        with pytest.raises(ValueError, match="got"):
            ApprenticeLoss()(*bad)
    with pytest.raises(ValueError, match="'D'"):
        fit_apprentice(mlp([8, 5, 5, 3]), mlp([8, 5, 5, 3]), Batches(*task(64), size=32), "D")
    with pytest.raises(ValueError, match="delta"):
        ternary_weight(s, -1)
