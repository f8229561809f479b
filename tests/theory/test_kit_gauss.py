"""Gaussian expectations against sampling, moments and each other."""

import math

import pytest
import torch

from dlatlas.theory.kit.gauss import gauss_expect, relu_kernel


def test_relu_kernel_by_sampling():
    u, v = torch.tensor([1.0, -0.5, 2.0], dtype=torch.float64), torch.tensor([0.3, 0.8, 1.0], dtype=torch.float64)
    x = torch.randn(2_000_000, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    products = (x @ u).relu() * (x @ v).relu()
    assert abs(relu_kernel(u, v) - float(products.mean())) < 4 * float(products.std()) / math.sqrt(len(x))


def test_relu_kernel_in_its_limits():
    u = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert relu_kernel(u, u) == pytest.approx(25 / 2)
    assert relu_kernel(u, -u) == pytest.approx(0, abs=1e-12)
    assert relu_kernel(u, torch.tensor([-4.0, 3.0], dtype=torch.float64)) == pytest.approx(25 / (2 * math.pi))
    assert relu_kernel(u, 0 * u) == 0
    assert relu_kernel(u, 2 * u) == pytest.approx(25)


def test_quadrature_is_exact_for_polynomials():
    for degree, moment in {0: 1, 1: 0, 2: 1, 3: 0, 4: 3, 6: 15, 8: 105}.items():
        assert gauss_expect(lambda z, d=degree: z**d, order=5) == pytest.approx(moment, abs=1e-9)
    assert gauss_expect(torch.cos) == pytest.approx(math.exp(-0.5))
    assert gauss_expect(torch.relu) == pytest.approx(1 / math.sqrt(2 * math.pi), rel=2e-2)


def test_bad_input():
    with pytest.raises(ValueError, match="vectors of one length"):
        relu_kernel(torch.ones(2), torch.ones(3))
    with pytest.raises(ValueError, match="at least 1"):
        gauss_expect(torch.cos, 0)
    with pytest.raises(ValueError, match="must map"):
        gauss_expect(lambda z: z.sum())
