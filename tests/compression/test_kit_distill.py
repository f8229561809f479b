"""The distillation loss against its formula and torch's divergence."""

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div

from dlatlas.compression.kit.distill import kd_loss

torch.manual_seed(1)
S, T, Y = torch.randn(6, 4, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64), torch.randint(4, (6,))


@pytest.mark.parametrize("temperature", [1.0, 5.0])
def test_formula(temperature):
    p, log_q = (T / temperature).softmax(1), (S / temperature).log_softmax(1)
    soft = -(p * log_q).sum(1).mean()
    entropy = -(p * p.log()).sum(1).mean()
    torch.testing.assert_close(soft, kl_div(log_q, p, reduction="batchmean") + entropy)
    expected = 0.3 * cross_entropy(S, Y) + 0.7 * temperature**2 * soft
    torch.testing.assert_close(kd_loss(S, T, Y, T=temperature, soft_weight=0.7), expected)


def test_limits():
    torch.testing.assert_close(kd_loss(S, T, Y, T=3.0, soft_weight=0.0), cross_entropy(S, Y))
    student = T.clone().requires_grad_()
    kd_loss(student, T, Y, T=2.0, soft_weight=1.0).backward()
    assert student.grad.abs().max() < 1e-15  # the teacher's own logits are optimal


def test_only_the_student_learns():
    s, t = S.clone().requires_grad_(), T.clone().requires_grad_()
    kd_loss(s, t, Y, T=2.0).backward()
    assert t.grad is None
    assert torch.autograd.gradcheck(lambda s: kd_loss(s, T, Y, T=2.0), (s,))


@pytest.mark.parametrize(
    "call",
    [
        lambda: kd_loss(S, T[:, :3], Y),
        lambda: kd_loss(S, T, Y[:3]),
        lambda: kd_loss(S, T, Y, T=0.0),
        lambda: kd_loss(S, T, Y, soft_weight=1.5),
    ],
)
def test_bad_input(call):
    with pytest.raises(ValueError, match="got"):
        call()
