"""The consistency term by hand and the critic's loss from its parts."""

import numpy as np
import pytest
import torch
from torch import nn

from dlatlas.gans.consistency import consistency_term, ct_critic_loss

REAL, FAKE = torch.randn(2, 8, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Stored:
    """A critic that returns prepared answers, one after the other."""

    def __init__(self, *answers):
        self.answers = list(answers)

    def __call__(self, x):
        return self.answers.pop(0)


class Small(nn.Module):
    def __init__(self, p):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Dropout(p)).double()
        self.head = nn.Linear(6, 1).double()

    def forward(self, x):
        h = self.body(x)
        return self.head(h), h


def test_by_hand_in_numpy():
    rng = np.random.default_rng(0)
    s1, s2, f1, f2 = rng.normal(size=(8, 1)), rng.normal(size=(8, 1)), rng.normal(size=(8, 3)), rng.normal(size=(8, 3))
    pairs = [tuple(map(torch.tensor, pair)) for pair in ((s1, f1), (s2, f2))]
    each = [(s1[b, 0] - s2[b, 0]) ** 2 + 0.1 * sum((f1[b, k] - f2[b, k]) ** 2 for k in range(3)) / 3 for b in range(8)]
    assert consistency_term(Stored(*pairs), REAL).item() == pytest.approx(np.mean(each))
    for margin in (0.5, 1.0):
        expected = np.mean([max(0.0, e - margin) for e in each])
        assert 0 < expected < np.mean(each) - margin / 2 or margin == 1.0
        assert consistency_term(Stored(*pairs), REAL, margin=margin).item() == pytest.approx(expected)
    assert consistency_term(Stored(*pairs), REAL, margin=max(each) + 1e-9).item() == 0
    heavy = np.mean([(s1[b, 0] - s2[b, 0]) ** 2 + 2 * ((f1[b] - f2[b]) ** 2).mean() for b in range(8)])
    assert consistency_term(Stored(*pairs), REAL, feature_weight=2.0).item() == pytest.approx(heavy)


def test_scores_with_and_without_a_second_axis_agree():
    s1, s2, f = torch.randn(8), torch.randn(8), torch.randn(8, 3)
    flat = consistency_term(Stored((s1, f), (s2, f)), REAL)
    assert flat.item() == pytest.approx(consistency_term(Stored((s1[:, None], f), (s2[:, None], f)), REAL).item())
    assert flat.item() == pytest.approx((s1 - s2).square().mean().item())


def test_without_dropout_there_is_nothing_to_disagree_about():
    assert consistency_term(Small(0.0), REAL).item() == 0
    critic = Small(0.5)
    assert consistency_term(critic, REAL).item() > 0
    assert ct_critic_loss(critic, REAL, FAKE)[1]["ct"] > 0
    assert ct_critic_loss(critic.eval(), REAL, FAKE)[1]["ct"] == 0


def test_both_passes_carry_gradient():
    a, b = (torch.tensor([v], requires_grad=True) for v in (3.0, 1.0))
    f = torch.zeros(1, 1)
    consistency_term(Stored((a, f), (b, f)), REAL[:1]).backward()
    assert a.grad.item() == 4 and b.grad.item() == -4


def test_parts_recombine():
    critic = Small(0.5)
    for gp, ct in ((10.0, 2.0), (3.0, 0.5), (0.0, 0.0)):
        loss, parts = ct_critic_loss(critic, REAL, FAKE, gp_weight=gp, ct_weight=ct)
        assert set(parts) == {"wasserstein", "gp", "ct"} and all(type(v) is float for v in parts.values())
        assert loss.item() == pytest.approx(parts["wasserstein"] + gp * parts["gp"] + ct * parts["ct"])
    loss.backward()


def test_a_linear_critic_in_closed_form():
    w = torch.tensor([2.0, 0, 0, 0, 0], dtype=torch.float64)
    loss, parts = ct_critic_loss(lambda x: (x @ w, x), REAL, FAKE)
    assert parts["wasserstein"] == pytest.approx((2 * (FAKE - REAL)[:, 0].mean()).item())
    assert parts["gp"] == pytest.approx(1)  # slope 2
    assert parts["ct"] == 0
    assert loss.item() == pytest.approx(parts["wasserstein"] + 10)
    # Two-sided: slope 1/2 is punished as well.
    assert ct_critic_loss(lambda x: (x @ w / 4, x), REAL, FAKE)[1]["gp"] == pytest.approx(0.25)


def test_the_margin_reaches_the_loss():
    far = Stored(*[(torch.full((8,), v, dtype=torch.float64), torch.zeros(8, 2, dtype=torch.float64)) for v in (0.0, 2.0)])
    assert consistency_term(far, REAL, margin=1.5).item() == pytest.approx(2.5)
    critic = Small(0.5)
    assert ct_critic_loss(critic, REAL, FAKE, margin=1e3)[1]["ct"] == 0


def test_the_term_inside_the_loss_by_hand():
    zero = torch.zeros(2, dtype=torch.float64)
    answers = [
        (zero, zero[:, None].expand(2, 4)),
        (zero + 1, zero[:, None].expand(2, 4) + 3),
        (zero, zero[:, None]),
    ]
    given = iter(answers)

    def critic(x):  # two opinions on the real samples, one on the fake, then a linear critic for the penalty
        return next(given, (x.sum(1), x))

    parts = ct_critic_loss(critic, REAL[:2], FAKE[:2])[1]
    assert parts["ct"] == pytest.approx(1 + 0.1 * 9)  # scores differ by 1, four features by 3


def test_every_part_of_the_loss_has_its_gradient():
    real, fake = REAL[:3], FAKE[:3]

    def loss(w, v):
        masks = iter([torch.tensor([1.0, 0.0, 2.0]).double(), torch.tensor([0.0, 2.0, 1.0]).double()])  # dropout, held fixed

        def critic(x):
            h = (x @ w).tanh() * next(masks, torch.ones(3).double())
            return h @ v, h

        return ct_critic_loss(critic, real, fake, generator=torch.Generator().manual_seed(0))[0]

    g = torch.Generator().manual_seed(1)
    w, v = (torch.randn(*shape, dtype=torch.float64, generator=g, requires_grad=True) for shape in ((5, 3), (3,)))
    assert torch.autograd.gradcheck(loss, (w, v))


def test_bad_input():
    critic = Small(0.5)
    for bad in ({"margin": -1.0}, {"feature_weight": -1.0}):
        with pytest.raises(ValueError, match="must not be negative"):
            consistency_term(critic, REAL, **bad)
    for bad in ({"margin": -1.0}, {"gp_weight": -1.0}, {"ct_weight": -1.0}):
        with pytest.raises(ValueError, match="must not be negative"):
            ct_critic_loss(critic, REAL, FAKE, **bad)
    for answer in (lambda x: x[:, 0], lambda x: (x[:, 0],), lambda x: (x, x), lambda x: (x[:, 0], x[:, 0])):
        with pytest.raises(ValueError, match=r"critic must return|expected scores"):
            consistency_term(answer, REAL)
        with pytest.raises(ValueError, match=r"critic must return|expected scores"):
            ct_critic_loss(answer, REAL, FAKE)
