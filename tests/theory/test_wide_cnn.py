"""Features of a wide layer: ranks against constructed cases, heads against lstsq, the certificate against autograd."""

import numpy as np
import pytest
import torch
from torch import nn

from dlatlas.theory.wide_cnn import critical_point_is_global, feature_matrix, feature_rank, feature_spectrum, zero_loss_head

D = torch.float64


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=D, generator=torch.Generator().manual_seed(seed))


def conv_net(activation=None, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3), activation or nn.Softplus(), nn.Flatten(), nn.Linear(6 * 36, 5), nn.Softplus(), nn.Linear(5, 2)
    ).double()


def test_features_are_the_outputs_of_that_module():
    net, X = conv_net(), normal(4, 1, 8, 8)
    assert feature_matrix(net, X, 1).shape == (4, 216)
    torch.testing.assert_close(feature_matrix(net, X, 0), net[0](X).flatten(1).detach())
    torch.testing.assert_close(feature_matrix(net, X, 5), net(X).detach())
    assert not feature_matrix(net, X, 1).requires_grad


def test_a_convolution_by_hand():
    net = nn.Sequential(nn.Conv2d(1, 2, 2, bias=False)).double()
    X = normal(3, 1, 3, 3)
    F = feature_matrix(net, X, 0)
    w = net[0].weight.detach()
    for i in range(3):
        naive = [(X[i, 0, r : r + 2, c : c + 2] * w[k, 0]).sum() for k in range(2) for r in range(2) for c in range(2)]
        torch.testing.assert_close(F[i], torch.stack(naive))


def test_wide_layers_have_full_rank_and_narrow_ones_that_of_their_width():
    X = normal(100, 1, 8, 8)
    assert feature_rank(conv_net(), X, 1) == 100  # 216 units, 64 pixels
    assert feature_rank(conv_net(), X, 4) == 5
    assert feature_rank(conv_net(nn.Identity()), X, 1) == 64 + 1  # linear: all pixels and the bias


def test_duplicates_cost_exactly_their_number():
    X = normal(60, 1, 8, 8)
    X[50:57] = X[:7]
    assert feature_rank(conv_net(), X, 1) == 53


def test_spectrum_and_rank_agree_with_numpy():
    net, X = conv_net(), normal(30, 1, 8, 8)
    F = feature_matrix(net, X, 1).numpy()
    np.testing.assert_allclose(feature_spectrum(net, X, 1).numpy(), np.linalg.svd(F, compute_uv=False))
    assert feature_rank(net, X, 1) == np.linalg.matrix_rank(F, tol=1e-7 * np.linalg.norm(F, 2))
    zero = nn.Sequential(nn.Linear(3, 4)).double()
    with torch.no_grad():
        zero[0].weight.zero_(), zero[0].bias.zero_()
    assert feature_rank(zero, normal(5, 3), 0) == 0


@pytest.mark.parametrize("shape", [(20, 20), (20, 50), (50, 10)])
def test_head_is_the_least_squares_solution(shape):
    F, Y = normal(*shape), normal(shape[0], 3, seed=1)
    W, b, residual = zero_loss_head(F, Y)
    assert W.shape == (3, shape[1]) and b.shape == (3,)
    A = np.concatenate([F.numpy(), np.ones((len(F), 1))], 1)
    best = np.linalg.lstsq(A, Y.numpy(), rcond=None)[0]
    np.testing.assert_allclose(W.numpy(), best[:-1].T, atol=1e-8)
    np.testing.assert_allclose(b.numpy(), best[-1], atol=1e-8)
    assert residual == pytest.approx(np.linalg.norm(A @ best - Y.numpy()), abs=1e-9)
    if shape[0] <= shape[1]:
        assert residual < 1e-9
        torch.testing.assert_close(F @ W.T + b, Y)
    else:
        assert residual > 1


def test_a_full_rank_leaves_no_room_for_an_error():
    net, X = conv_net(), normal(40, 1, 8, 8)
    F = feature_matrix(net, X, 1)
    assert critical_point_is_global(F, torch.zeros(40, 5, dtype=D), 1e-8)
    assert not critical_point_is_global(F, normal(40, 5), 1e-8)
    dependent = F.clone()
    dependent[1] = dependent[0]
    hidden = torch.zeros(40, 5, dtype=D)
    hidden[0], hidden[1] = 1.0, -1.0  # invisible: F^T delta = 0 although delta is not
    assert float((dependent.T @ hidden).norm()) == 0
    assert not critical_point_is_global(dependent, hidden, 1e-8)


def test_nearly_dependent_features_can_hide_an_error():
    U, _, Vh = torch.linalg.svd(normal(6, 9), full_matrices=False)
    F = U * torch.logspace(0, -5, 6, dtype=D) @ Vh  # condition number 1e5, full rank by any tolerance
    delta = 1e-2 * U[:, 5:]  # the error along the weakest direction
    gradient = float((F.T @ delta).norm())
    assert gradient == pytest.approx(1e-7)
    assert not critical_point_is_global(F, delta, 1e-6)  # a gradient of 1e-7 allows an error of 1e-2
    assert critical_point_is_global(F, delta, 1.01e-2) and not critical_point_is_global(F, delta, 0.99e-2)
    # Along the strongest direction the bound is cautious by the condition number.
    assert critical_point_is_global(F, 1e-12 * U[:, :1], 1.01e-7) and not critical_point_is_global(F, 1e-12 * U[:, :1], 0.99e-7)
    for c in (1e-4, 1e4):  # the unit of the features cancels
        assert critical_point_is_global(c * F, delta, 1.01e-2) and not critical_point_is_global(c * F, delta, 0.99e-2)


@pytest.mark.parametrize("seed", range(3))
def test_the_certificate_bounds_the_error(seed):
    F, delta = normal(8, 12, seed=seed), normal(8, 3, seed=seed + 9)
    size = float(delta.norm())
    assert not critical_point_is_global(F, delta, 0.99 * size)  # the bound is never below the error itself
    assert critical_point_is_global(F, delta, 1.01 * size * float(torch.linalg.cond(F)))


def test_the_gradient_of_the_next_layer_is_features_times_delta():
    net, X, Y = conv_net(), normal(12, 1, 8, 8), normal(12, 2, seed=1)
    inputs = net[:4](X).detach().requires_grad_()
    (net[4:](inputs) - Y).square().sum().backward()
    delta = inputs.grad
    (net(X) - Y).square().sum().backward()
    torch.testing.assert_close(delta.T @ feature_matrix(net, X, 2), net[3].weight.grad)


def test_bad_input():
    net, X = conv_net(), normal(4, 1, 8, 8)
    for layer in (-1, 6, 1.0, True):
        with pytest.raises(ValueError, match="layer"):
            feature_matrix(net, X, layer)
    with pytest.raises(ValueError, match="at least one sample"):
        feature_rank(net, X[:0], 1)
    with pytest.raises(ValueError, match="n <= units"):
        zero_loss_head(normal(5, 3), normal(5, 1), exact=True)
    zero_loss_head(normal(3, 3), normal(3, 1), exact=True)
    with pytest.raises(ValueError, match="features"):
        zero_loss_head(normal(5, 3), normal(4, 1))
    with pytest.raises(ValueError, match="delta"):
        critical_point_is_global(normal(5, 8), normal(4, 1), 1e-8)
    for tol in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="tol > 0"):
            critical_point_is_global(normal(5, 8), normal(5, 1), tol)
    with pytest.raises(ValueError, match="not finite"):
        critical_point_is_global(normal(5, 8) / 0, normal(5, 1), 1e-8)
