"""Fraternal dropout: the loss by hand, the penalty in closed form for a linear network, and the bound."""

import numpy as np
import pytest
import torch
from torch import nn

from dlatlas.nlp.fraternal import expectation_linear_penalty, fraternal_loss, fraternal_penalty


def test_loss_against_numpy():
    rng = np.random.default_rng(0)
    a, b, y = rng.normal(size=(2, 3, 4)), rng.normal(size=(2, 3, 4)), rng.integers(0, 4, (2, 3))
    mask = np.array([[1, 1, 0], [1, 0, 0]], dtype=bool)
    for keep in (None, mask):
        places = [i for i in np.ndindex(2, 3) if keep is None or keep[i]]
        ce = [np.log(np.exp(p[i]).sum()) - p[i][y[i]] for p in (a, b) for i in places]
        penalty = np.mean([(a[i] - b[i]) ** 2 for i in places])
        out = fraternal_loss(*map(torch.tensor, (a, b, y)), kappa=0.3, mask=None if keep is None else torch.tensor(keep))
        assert out["ce"].item() == pytest.approx(np.mean(ce))
        assert out["penalty"].item() == pytest.approx(penalty)
        assert out["total"].item() == pytest.approx(np.mean(ce) + 0.3 * penalty)


def test_equal_passes_symmetry_and_default():
    torch.manual_seed(0)
    a, b, y = torch.randn(5, 4), torch.randn(5, 4), torch.randint(4, (5,))
    same = fraternal_loss(a, a, y)
    assert same["penalty"] == 0 and torch.equal(same["total"], same["ce"])
    torch.testing.assert_close(same["ce"], nn.functional.cross_entropy(a, y))
    one, two = fraternal_loss(a, b, y), fraternal_loss(b, a, y)
    torch.testing.assert_close(one["total"], two["total"])
    torch.testing.assert_close(one["total"] - one["ce"], 0.1 * one["penalty"])


def test_gradient_flows_through_both_passes():
    torch.manual_seed(0)
    a, b = (torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    y = torch.tensor([0, 1, 3])
    assert torch.autograd.gradcheck(lambda a, b: fraternal_loss(a, b, y, kappa=0.7)["total"], (a, b))
    fraternal_loss(a, b, y)["penalty"].backward()
    torch.testing.assert_close(a.grad, 2 * (a - b).detach() / 12)
    torch.testing.assert_close(b.grad, -a.grad)


def test_penalties_of_a_linear_network_in_closed_form():
    torch.manual_seed(0)
    p = 0.3
    model = nn.Sequential(nn.Dropout(p), nn.Linear(4, 3)).double()
    x = torch.randn(6, 4, dtype=torch.float64)
    variance = (model[1].weight.square().sum(0) * x.square()).sum(1).mean() * p / (1 - p)  # tr Cov, mean over inputs
    pairs = fraternal_penalty(model, x, 8000)
    assert pairs.item() == pytest.approx(2 * variance.item(), rel=0.05)
    single = expectation_linear_penalty(model, x, 8000)
    assert single.item() == pytest.approx(variance.item(), rel=0.05)  # so that the factor 2 is tight


def test_bound_for_a_network_that_is_not_linear():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 3))
    x = torch.randn(50, 4)
    with torch.no_grad():
        pairs, single = fraternal_penalty(model, x, 400), expectation_linear_penalty(model, x, 400)
        passes = torch.stack([model(x) for _ in range(800)])
    assert pairs.item() == pytest.approx(2 * passes.var(0).sum(1).mean().item(), rel=0.1)
    assert single < pairs < 2 * single


def test_the_mode_of_every_part_is_put_back():
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 3)).train()
    model[0].eval()
    x = torch.randn(2, 4)
    fraternal_penalty(model, x, 1), expectation_linear_penalty(model, x, 1)
    assert [m.training for m in model.modules()] == [True, False, True]
    model.eval()
    assert fraternal_penalty(model, x, 2) > 0
    assert not any(m.training for m in model.modules())
    fraternal_penalty(model, x, 2).backward()
    assert model[1].weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: fraternal_loss(torch.zeros(2, 3), torch.zeros(2, 4), torch.zeros(2)), r"\(2, 4\)"),
        (lambda: fraternal_loss(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(3)), r"\(3,\)"),
        (lambda: fraternal_loss(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2).long(), kappa=-0.1), "-0.1"),
        (lambda: fraternal_loss(*[torch.zeros(2, 3)] * 2, torch.zeros(2).long(), mask=torch.zeros(2, dtype=torch.bool)), "True"),
        (lambda: fraternal_loss(*[torch.zeros(2, 3)] * 2, torch.zeros(2).long(), mask=torch.ones(2)), "bool"),
        (lambda: fraternal_penalty(nn.Linear(2, 2), torch.zeros(1, 2), 0), "0"),
        (lambda: expectation_linear_penalty(nn.Linear(2, 2), torch.zeros(1, 2), 0), "0"),
    ],
)
def test_bad_input(call, match):
    with pytest.raises(ValueError, match=match):
        call()
