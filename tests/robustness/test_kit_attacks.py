"""The shared attacks against closed forms of linear models and plain averages."""

import pytest
import torch
from torch import nn

from dlatlas.robustness.kit.attacks import eot, fgsm, transfer
from dlatlas.robustness.pgd import pgd

X, Y = torch.rand(20, 6, generator=torch.Generator().manual_seed(0)), torch.arange(20) % 2


def linear(seed=0):
    torch.manual_seed(seed)
    return nn.Linear(6, 2)


def test_fgsm_is_one_step_along_the_sign():
    model = linear()
    w = (model.weight[1] - model.weight[0]).detach()
    side = (1 - 2.0 * Y)[:, None]
    torch.testing.assert_close(fgsm(model, X, Y, 0.1), (X + 0.1 * side * w.sign()).clamp(0, 1))
    torch.testing.assert_close(fgsm(model, X, Y, 0.1, targeted=True), (X - 0.1 * side * w.sign()).clamp(0, 1))
    assert torch.equal(fgsm(model, X, Y, 0.0), X)


def test_fgsm_leaves_the_model_as_it_was():
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 2))
    model[1].eval()
    model[0].bias.requires_grad_(False)
    out = fgsm(model, X, Y, 0.1)
    assert not out.requires_grad and out.dtype == X.dtype
    assert model.training and not model[1].training and model[1].num_batches_tracked == 0
    assert not model[0].bias.requires_grad and model[0].weight.requires_grad and model[0].weight.grad is None


def test_transfer_looks_at_the_source_only():
    source = linear(1)

    class Never(nn.Module):
        def forward(self, x):
            raise AssertionError("the victim was asked")

    assert torch.equal(transfer(fgsm, source)(Never(), X, Y, eps=0.1), fgsm(source, X, Y, 0.1))
    torch.manual_seed(0)
    expected = pgd(source, X, Y, 0.1, steps=3)
    torch.manual_seed(0)
    assert torch.equal(transfer(pgd, source)(Never(), X, Y, 0.1, steps=3), expected)


def test_eot_is_the_mean_of_passes_and_of_their_gradients():
    class Counter(nn.Module):
        def __init__(self):
            super().__init__()
            self.calls = 0

        def forward(self, x):
            self.calls += 1
            return self.calls * x

    x = torch.ones(2, 3, requires_grad=True)
    out = eot(Counter(), 4)(x)
    assert torch.equal(out, 2.5 * torch.ones(2, 3))
    out.sum().backward()
    assert torch.equal(x.grad, 2.5 * torch.ones(2, 3))


def test_eot_sees_through_noise():
    class Noisy(nn.Module):
        def forward(self, x):
            z = x.sum(1) - 3 + 20 * torch.randn(len(x)) * x[:, 0]
            return torch.stack([torch.zeros_like(z), z], 1)

    torch.manual_seed(0)
    x, y = torch.full((200, 6), 0.5), torch.ones(200, dtype=torch.long)
    share = [float((fgsm(model, x, y, 0.1)[:, 0] < 0.5).float().mean()) for model in (Noisy(), eot(Noisy(), 400))]
    assert share[0] < 0.65 and share[1] > share[0] + 0.1


@pytest.mark.parametrize(
    "call",
    [
        lambda: fgsm(linear(), X, Y, -0.1),
        lambda: fgsm(linear(), X + 2, Y, 0.1),
        lambda: fgsm(linear(), X, Y[:3], 0.1),
        lambda: eot(linear(), 0),
    ],
)
def test_bad_input_is_refused(call):
    with pytest.raises(ValueError, match="got"):
        call()
