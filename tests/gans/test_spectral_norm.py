"""Spectral normalisation against the SVD, torch's own parametrization and the closed gradient."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from dlatlas.gans.spectral_norm import SpectralNorm, hinge_d_loss, hinge_g_loss, spectral_norm


def settled(layer, passes=200):
    with torch.no_grad():
        for _ in range(passes):
            _ = layer.weight
    return layer


@pytest.mark.parametrize("layer", [nn.Linear(7, 5), nn.Linear(3, 9).double(), nn.Conv2d(3, 4, 3), nn.Conv1d(2, 6, 5)])
def test_the_reshaped_weight_has_norm_one_and_the_direction_of_the_original(layer):
    W = layer.weight.detach().clone()
    out = settled(spectral_norm(layer)).weight.detach()
    sigma = torch.linalg.matrix_norm(W.flatten(1), 2)
    torch.testing.assert_close(out, W / sigma, rtol=1e-4, atol=1e-6)
    assert torch.linalg.matrix_norm(out.flatten(1), 2) == pytest.approx(1, abs=1e-4)


def test_a_diagonal_by_hand():
    layer = nn.Linear(2, 2)
    layer.weight.data = torch.diag(torch.tensor([3.0, 1.0]))
    torch.testing.assert_close(settled(spectral_norm(layer)).weight.detach(), torch.diag(torch.tensor([1, 1 / 3])))


def test_trains_as_torch_does_once_both_have_settled():
    ours, theirs = nn.Linear(6, 4).double(), nn.Linear(6, 4).double()
    theirs.load_state_dict(ours.state_dict())
    spectral_norm(ours, n_power_iterations=300)
    parametrizations.spectral_norm(theirs, n_power_iterations=300)
    x = torch.randn(5, 6, dtype=torch.float64)
    for _ in range(3):
        torch.testing.assert_close(ours(x), theirs(x))
        for layer in (ours, theirs):
            layer.zero_grad()
            layer(x).square().sum().backward()
        torch.testing.assert_close(*(layer.parametrizations.weight.original.grad for layer in (ours, theirs)))
        for layer in (ours, theirs):
            with torch.no_grad():
                layer.parametrizations.weight.original.add_(layer.parametrizations.weight.original.grad, alpha=-0.1)


def test_one_iteration_by_hand():
    W = torch.randn(4, 3, dtype=torch.float64)
    norm = SpectralNorm(W, n_power_iterations=1)
    u = torch.tensor([1.0, 0, 0, 0], dtype=torch.float64)
    norm.u.copy_(u)
    out = norm(W)
    v = W.T @ u / (W.T @ u).norm()
    u = W @ v / (W @ v).norm()
    torch.testing.assert_close(out, W / (u @ W @ v))
    torch.testing.assert_close(norm.u, u)
    torch.testing.assert_close(norm.v, v)


def test_the_closed_gradient():
    W = torch.randn(5, 3, 2, dtype=torch.float64, requires_grad=True)
    norm = SpectralNorm(W).eval()
    out, G = norm(W), torch.randn(5, 3, 2, dtype=torch.float64)
    (grad,) = torch.autograd.grad(out, W, G)
    sigma = norm.u @ W.detach().flatten(1) @ norm.v
    expected = (G - (G * out.detach()).sum() * torch.outer(norm.u, norm.v).view_as(W)) / sigma
    torch.testing.assert_close(grad, expected)
    assert torch.autograd.gradcheck(norm, (W,))


def test_usable_at_the_first_pass_and_in_one_graph_twice():
    layer = spectral_norm(nn.Linear(20, 20))
    assert torch.linalg.matrix_norm(layer.weight.detach(), 2) < 1.2
    # Two passes move u and v in place; the first must still be differentiable.
    (layer(torch.randn(3, 20)).sum() - layer(torch.randn(3, 20)).sum()).backward()
    assert layer.parametrizations.weight.original.grad.isfinite().all()


def test_evaluation_moves_nothing_and_training_does():
    layer = spectral_norm(nn.Linear(8, 8))
    before = copy.deepcopy(dict(layer.named_buffers()))
    layer.eval()
    x = torch.randn(2, 8)
    assert torch.equal(layer(x), layer(x))
    assert all(torch.equal(before[n], b) for n, b in layer.named_buffers())
    layer.train()(x)
    assert not all(torch.equal(before[n], b) for n, b in layer.named_buffers())


def test_zeros_stay_zeros_and_recover():
    layer = nn.Linear(3, 4)
    layer.weight.data.zero_()
    spectral_norm(layer)
    layer(torch.randn(2, 3)).sum().backward()
    assert (layer.weight == 0).all() and layer.parametrizations.weight.original.grad.isfinite().all()
    with torch.no_grad():
        layer.parametrizations.weight.original.copy_(torch.randn(4, 3))
    assert torch.linalg.matrix_norm(settled(layer).weight.detach(), 2) == pytest.approx(1, abs=1e-4)


def test_state_survives_saving_and_assignment_stores_the_value():
    a, b = spectral_norm(nn.Linear(4, 3)), spectral_norm(nn.Linear(4, 3))
    b.load_state_dict(a.state_dict())
    a.eval(), b.eval()
    assert torch.equal(a.weight, b.weight)
    a.weight = torch.ones(3, 4)
    assert torch.equal(a.parametrizations.weight.original, torch.ones(3, 4))
    assert parametrize.is_parametrized(a, "weight")
    u, v = a.parametrizations.weight[0].u, a.parametrizations.weight[0].v
    assert u.shape == (3,) and v.shape == (4,)


def test_hinge_by_hand():
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-3.0, 0.0, 1.0])
    assert hinge_d_loss(real, fake).item() == pytest.approx((0 + 0.5 + 2) / 3 + (0 + 1 + 2) / 3)
    assert hinge_g_loss(fake).item() == pytest.approx(2 / 3)


def test_hinge_has_no_gradient_beyond_its_margin_and_the_generator_has_everywhere():
    real, fake = (torch.tensor(v, requires_grad=True) for v in ([2.0, 0.0], [-2.0, 0.0]))
    hinge_d_loss(real, fake).backward()
    assert real.grad.tolist() == [0, -0.5] and fake.grad.tolist() == [0, 0.5]
    far = torch.tensor([5.0, -5.0], requires_grad=True)
    hinge_g_loss(far).backward()
    assert far.grad.tolist() == [-0.5, -0.5]


def test_fifteen_iterations_before_the_first_pass():
    W = torch.randn(6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(1)
    norm = SpectralNorm(W)
    torch.manual_seed(1)
    u = nn.functional.normalize(torch.randn(6, dtype=torch.float64), dim=0)
    for _ in range(15):
        v = nn.functional.normalize(W.T @ u, dim=0)
        u = nn.functional.normalize(W @ v, dim=0)
    torch.testing.assert_close(norm.u, u, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(norm.v, v, rtol=1e-9, atol=1e-12)


def test_for_all_layers_of_a_model_and_each_only_once():
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Sequential(nn.Linear(4, 2)))
    net.apply(lambda m: spectral_norm(m) if isinstance(m, nn.Linear) else None)
    assert all(parametrize.is_parametrized(layer, "weight") for layer in (net[0], net[2][0]))
    with pytest.raises(ValueError, match="already"):
        spectral_norm(net[0])
    with pytest.raises(ValueError, match=r"no parameter 'weight'"):
        spectral_norm(net)


def test_bad_input():
    with pytest.raises(ValueError, match="2 axes"):
        SpectralNorm(torch.randn(3))
    with pytest.raises(ValueError, match="at least 1"):
        spectral_norm(nn.Linear(2, 2), n_power_iterations=0)
    with pytest.raises(ValueError, match="'gain'"):
        spectral_norm(nn.Linear(2, 2), "gain")
    with pytest.raises(ValueError, match="2 axes"):
        spectral_norm(nn.Linear(2, 2), "bias")
    with pytest.raises(ValueError, match="no parameter"):
        spectral_norm(nn.Linear(2, 2, bias=False), "bias")
