"""Binarized representation entropy against NumPy, random codes and identical rows."""

import math

import numpy as np
import pytest
import torch

from dlatlas.gans.bre import binarize, bre, correlation_term, marginal_term

H = torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def plain(h, eps=1e-3, s=3.0):
    """ME and AC, entry by entry."""
    scale = np.abs(h).mean()
    a = h / (np.abs(h) + eps * scale)
    B, d = a.shape
    me = np.mean([np.mean([a[b, k] for b in range(B)]) ** 2 for k in range(d)])
    total = 0.0
    for b in range(B):
        for c in range(B):
            if b != c:
                total += max(0.0, abs(sum(a[b, k] * a[c, k] for k in range(d)) / d) - s / math.sqrt(d))
    return me, total / B**2


@pytest.mark.parametrize(("eps", "s"), [(1e-3, 1.0), (0.3, 1.5), (1e-3, 2.0)])
def test_entry_by_entry(eps, s):
    h = H.clone()
    h[1] = h[0]  # two samples of one pattern
    me, ac = plain(h.numpy(), eps, s)
    assert ac > 0 or eps > 0.1
    assert marginal_term(h, eps).item() == pytest.approx(me)
    assert correlation_term(h, eps, s).item() == pytest.approx(ac)
    assert bre([h], eps, s).item() == pytest.approx(me + ac)


def test_soft_signs():
    a = binarize(H)
    assert (a.abs() < 1).all() and (a.sign() == H.sign()).all()
    torch.testing.assert_close(binarize(H, 0.5), H / (H.abs() + 0.5 * H.abs().mean()))
    torch.testing.assert_close(binarize(7.3 * H, 0.5), binarize(H, 0.5))
    torch.testing.assert_close(binarize(torch.zeros(3, 2)), torch.zeros(3, 2))


def test_random_codes_are_left_alone():
    B, codes = 50, (torch.rand(50, 4096) > 0.5).double() * 2 - 1
    assert marginal_term(codes).item() == pytest.approx(1 / B, rel=0.1)
    assert correlation_term(codes).item() < 1e-4


def test_one_pattern_for_all_is_punished_most():
    B, d = 10, 64
    same = torch.randn(1, d, dtype=torch.float64).sign().expand(B, d)
    assert marginal_term(same, eps=1e-9).item() == pytest.approx(1)
    assert correlation_term(same, eps=1e-9).item() == pytest.approx((1 - 3 / 8) * (B - 1) / B)
    opposite = same.clone()
    opposite[::2] *= -1  # balanced units, but two patterns only
    assert marginal_term(opposite, eps=1e-9).item() == pytest.approx(0, abs=1e-12)
    assert correlation_term(opposite, eps=1e-9).item() == pytest.approx((1 - 3 / 8) * (B - 1) / B)


def test_rectified_outputs_look_one_sided():
    h = torch.randn(400, 50)
    assert marginal_term(h).item() < 0.01 and marginal_term(h.relu()).item() == pytest.approx(0.25, abs=0.02)


def test_layers_are_averaged_and_convolutions_flattened():
    other = torch.randn(6, 2, 3, 3, dtype=torch.float64)
    parts = [marginal_term(h) + correlation_term(h, s=1.0) for h in (H, other)]
    torch.testing.assert_close(bre([H, other], s=1.0), (parts[0] + parts[1]) / 2)
    torch.testing.assert_close(bre([other], s=1.0), bre([other.flatten(1)], s=1.0))


def test_gradients_with_the_scale_held_fixed():
    h = H.clone().requires_grad_()
    (grad,) = torch.autograd.grad(binarize(h, 0.5).sum(), h)
    scale = 0.5 * H.abs().mean()
    torch.testing.assert_close(grad, scale / (H.abs() + scale) ** 2)  # no term through the mean
    alike = torch.cat([H, H])
    grads = torch.autograd.functional.jacobian(lambda h: torch.stack([marginal_term(h, 0.1), correlation_term(h, 0.1, 1.0)]), alike)
    assert grads.isfinite().all() and (grads.abs().sum((1, 2)) > 0).all()


def test_descent_raises_the_entropy():
    h = (0.5 + 0.3 * torch.randn(16, 32)).requires_grad_()
    before, optimizer = bre([h], eps=0.1).item(), torch.optim.Adam([h], 0.05)
    for _ in range(100):
        loss = bre([h], eps=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.3 * before


def test_bad_input():
    with pytest.raises(ValueError, match="at least one layer"):
        bre([])
    for call in (marginal_term, correlation_term, lambda h: bre([H, h])):
        with pytest.raises(ValueError, match="two samples"):
            call(H[:1])
    with pytest.raises(ValueError, match="s must"):
        correlation_term(H, s=0.5)
    with pytest.raises(ValueError, match="s must"):
        bre([H], s=0.5)
    with pytest.raises(ValueError, match="eps"):
        binarize(H, 0.0)
    with pytest.raises(ValueError, match="two samples"):
        marginal_term(H[0])
