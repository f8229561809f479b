"""The potential against its derivative, and the energy against the maximum mean discrepancy."""

import pytest
import torch

from dlatlas.gans.coulomb import coulomb_d_loss, coulomb_g_loss, field_energy, make_anchors, plummer_kernel, potential
from dlatlas.gans.mmd import mmd2

G = torch.Generator().manual_seed(0)
REAL, FAKE, AT = (torch.randn(n, 3, dtype=torch.float64, generator=G) for n in (7, 5, 4))


def test_kernel_one_pair_at_a_time():
    k = plummer_kernel(AT, REAL, dim=2, eps=0.7)
    for i in range(4):
        for j in range(7):
            assert k[i, j].item() == pytest.approx(1 / (float((AT[i] - REAL[j]).square().sum()) + 0.49), rel=1e-9)
    torch.testing.assert_close(plummer_kernel(AT, AT, 3, 0.5).diagonal(), torch.full((4,), 8.0, dtype=torch.float64))


def test_potential_attracts_to_real_points_and_its_gradient_is_right():
    assert torch.autograd.gradcheck(lambda a: potential(a, REAL, FAKE, eps=0.8), AT.clone().requires_grad_())
    assert potential(AT, REAL, REAL).abs().max() == 0
    assert potential(REAL[:1], REAL[:1], REAL[:1] + 5) > 0


def test_energy_is_half_the_biased_mmd_and_its_gradient_the_force():
    fake = FAKE.clone().requires_grad_()
    energy = field_energy(REAL, fake, 1, 0.3)
    torch.testing.assert_close(energy, mmd2(REAL, fake, lambda a, b: plummer_kernel(a, b, 1, 0.3), unbiased=False) / 2)
    at = FAKE.clone().requires_grad_()
    (force,) = torch.autograd.grad(potential(at, REAL, FAKE, 1, 0.3).sum(), at)
    torch.testing.assert_close(torch.autograd.grad(energy, fake)[0], -force / 5)


def test_losses():
    a = REAL.clone().requires_grad_()
    target = potential(REAL, REAL, FAKE)
    loss = coulomb_d_loss(lambda x: x.sum(1, keepdim=True), a, REAL, FAKE)
    torch.testing.assert_close(loss, (REAL.sum(1) - target).square().mean() / 2)
    # The target is detached: only D's own slope is left.
    torch.testing.assert_close(torch.autograd.grad(loss, a)[0], ((REAL.sum(1) - target) / 7)[:, None].expand(7, 3))
    torch.testing.assert_close(coulomb_g_loss(lambda x: x.sum(1), FAKE), -FAKE.sum(1).mean() / 2)


def test_the_generator_climbs_along_the_gradient_of_the_potential():
    y = FAKE.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(coulomb_g_loss(lambda x: (x**2).sum(1), y), y)
    torch.testing.assert_close(gradient, -FAKE / 5)


def test_anchors():
    out = make_anchors(torch.zeros(4000, 2), torch.ones(1000, 2), 0.5, torch.Generator().manual_seed(0))
    assert out.shape == (5000, 2)
    assert out[:4000].std().item() == pytest.approx(0.5, rel=0.05) and out[4000:].mean().item() == pytest.approx(1, abs=0.06)


def test_bad_input():
    for bad in (lambda: plummer_kernel(AT, REAL, eps=0), lambda: plummer_kernel(AT, REAL, dim=0), lambda: potential(AT, REAL[:0], FAKE),
                lambda: coulomb_d_loss(lambda x: x, AT, REAL, FAKE)):  # fmt: skip
        with pytest.raises(ValueError, match="expected"):
            bad()
    with pytest.raises(ValueError, match="positive"):
        make_anchors(REAL, FAKE, 0)
    with pytest.raises(ValueError, match="shapes"):
        make_anchors(REAL, FAKE[:, :2], 1)
