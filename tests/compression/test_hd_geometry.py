"""Angles and correlations with known answers."""

import math

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from dlatlas.compression.hd_geometry import binarization_angle, dot_product_preservation, expected_angle, gbt, pca_rotation


def rotation(n):
    return torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))[0]


def test_gaussian_vectors_approach_the_limit_with_a_shrinking_spread():
    angles = binarization_angle(torch.randn(200, 4096))
    assert float(angles.mean()) == pytest.approx(math.degrees(math.acos(math.sqrt(2 / math.pi))), abs=0.1)
    assert angles.shape == (200,)
    short = binarization_angle(torch.randn(200, 64))
    assert float(short.std() / angles.std()) == pytest.approx(8, rel=0.3)


def test_uniform_one_hot_and_sign_vectors():
    assert float(binarization_angle(2 * torch.rand(100, 4096) - 1).mean()) == pytest.approx(30, abs=0.1)
    hot = torch.eye(16, dtype=torch.float64)[3]
    assert float(binarization_angle(hot)) == pytest.approx(math.degrees(math.acos(1 / 4)))
    assert float(binarization_angle(torch.tensor([2.0, -2.0, 2.0]))) == pytest.approx(0, abs=0.05)
    assert float(binarization_angle(torch.zeros(5))) == 90


def test_by_hand_ternary():
    w = torch.tensor([[3.0, -0.1, -4.0, 0.2]], dtype=torch.float64)  # root mean square 2.50
    expected = math.degrees(math.acos(7 / (math.sqrt(9 + 0.01 + 16 + 0.04) * math.sqrt(2))))
    assert float(binarization_angle(w, 0.5)) == pytest.approx(expected)
    assert float(binarization_angle(w, 1.2)) == pytest.approx(math.degrees(math.acos(4 / 2.503 / 2)), abs=0.1)  # only 4 is above 3.0
    assert float(binarization_angle(100 * w, 0.5)) == pytest.approx(expected)
    assert float(binarization_angle(w, 5.0)) == 90  # nothing left
    assert torch.equal(binarization_angle(w, 1e-9), binarization_angle(w))


@pytest.mark.parametrize("a", [0.0, 0.3, 0.61, 1.5])
def test_the_limit_is_the_integral(a):
    dot = 2 * integrate.quad(lambda z: z * stats.norm.pdf(z), a, np.inf)[0]
    size = 2 * integrate.quad(stats.norm.pdf, a, np.inf)[0]
    assert expected_angle(a) == pytest.approx(math.degrees(math.acos(dot / math.sqrt(size))), abs=1e-6)
    assert float(binarization_angle(torch.randn(100, 4096), a).mean()) == pytest.approx(expected_angle(a), abs=0.3)


def test_a_ternary_code_can_be_nearer_than_a_sign():
    assert expected_angle(0.61) < expected_angle(0.0)
    assert expected_angle(1e3) == 90


def test_correlation_is_the_cosine_for_inputs_without_direction():
    x, w = torch.randn(3000, 400), torch.randn(20, 400)
    cosine = math.cos(math.radians(float(binarization_angle(w).mean())))
    assert dot_product_preservation(x, w) == pytest.approx(cosine, abs=0.01)
    a, b = (x @ w.T).flatten().numpy(), (x @ w.sign().T).flatten().numpy()
    assert dot_product_preservation(x, w) == pytest.approx(stats.pearsonr(a, b)[0], abs=1e-5)
    assert dot_product_preservation(x, w.sign()) == pytest.approx(1)
    assert dot_product_preservation(x, w, -w) == pytest.approx(-1)


def test_generalised_binarisation():
    x, R = torch.randn(7, 12, dtype=torch.float64), rotation(12)
    expected = np.stack([R.numpy().T @ np.sign(R.numpy() @ row) for row in x.numpy()])
    assert np.allclose(gbt(x, R).numpy(), expected)
    assert torch.equal(gbt(x, torch.eye(12, dtype=torch.float64)), x.sign())
    # A product with it is a product in rotated coordinates, and its length is that of a sign vector.
    z = torch.randn(5, 12, dtype=torch.float64)
    torch.testing.assert_close(z @ gbt(x, R).T, (z @ R.T) @ (x @ R.T).sign().T)
    torch.testing.assert_close(gbt(x, R).norm(dim=1), torch.full((7,), math.sqrt(12), dtype=torch.float64))


def test_a_random_rotation_restores_the_angle_of_uneven_vectors():
    x = torch.randn(50, 300, dtype=torch.float64) * torch.exp(-0.1 * torch.arange(300))
    rotated = gbt(x, rotation(300))
    cosine = (x * rotated).sum(1) / x.norm(dim=1) / rotated.norm(dim=1)
    assert float(binarization_angle(x).mean()) > 60
    assert float(torch.rad2deg(cosine.arccos()).mean()) == pytest.approx(expected_angle(), abs=2)


def test_principal_axes():
    R = rotation(6)
    x = torch.randn(5000, 6, dtype=torch.float64) * torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0, 0.5]) @ R + 7
    axes = pca_rotation(x)
    torch.testing.assert_close(axes @ axes.T, torch.eye(6, dtype=torch.float64))
    spread = (x @ axes.T).std(0)
    assert (spread.diff() < 0).all()
    torch.testing.assert_close((axes @ R.T).abs(), torch.eye(6, dtype=torch.float64), atol=0.1, rtol=0)
    assert pca_rotation(x.float()).dtype == torch.float32


@pytest.mark.parametrize(
    "call",
    [
        lambda: binarization_angle(torch.tensor(1.0)),
        lambda: binarization_angle(torch.ones(3, 0)),
        lambda: binarization_angle(torch.ones(3), -1.0),
        lambda: expected_angle(-0.1),
        lambda: dot_product_preservation(torch.ones(2, 3), torch.ones(2, 4)),
        lambda: dot_product_preservation(torch.ones(1, 3), torch.ones(1, 3)),
        lambda: dot_product_preservation(torch.ones(2, 3), torch.ones(2, 3), torch.ones(1, 3)),
        lambda: gbt(torch.ones(2, 3), torch.eye(4)),
        lambda: gbt(torch.ones(2, 3), 2 * torch.eye(3)),
        lambda: pca_rotation(torch.ones(1, 3)),
    ],
)
def test_bad_input(call):
    with pytest.raises(ValueError, match=r"expected|must"):
        call()
