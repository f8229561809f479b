"""Kernels against loops and scikit-learn."""

import numpy as np
import pytest
import torch
from sklearn.metrics.pairwise import rbf_kernel

from dlatlas.kit.kernels import imq, median_bandwidth, rbf, sq_dists

X = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Y = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_distances_by_loop_and_never_negative():
    loop = [[sum((a - b) ** 2 for a, b in zip(x, y)) for y in Y.tolist()] for x in X.tolist()]
    torch.testing.assert_close(sq_dists(X, Y), torch.tensor(loop, dtype=torch.float64))
    far = 1e4 + torch.randn(50, 3)
    assert sq_dists(far, far).min() >= 0


def test_kernels_against_their_definitions():
    np.testing.assert_allclose(rbf(X, Y, 0.7).numpy(), rbf_kernel(X.numpy(), Y.numpy(), gamma=1 / (2 * 0.7**2)))
    torch.testing.assert_close(imq(X, Y, 2.0), 2 / (2 + torch.cdist(X, Y) ** 2))
    assert rbf(X, Y).dtype == torch.float64
    assert torch.linalg.eigvalsh(rbf(X, X)).min() > -1e-12


def test_median_bandwidth_by_loop():
    pairs = [float((X[i] - X[j]).norm()) for i in range(6) for j in range(i)]
    assert median_bandwidth(X) == pytest.approx(np.sort(pairs)[(len(pairs) - 1) // 2])


def test_kernels_are_differentiable():
    x = X.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: rbf(x, Y, 1.3), (x,))
    assert torch.autograd.gradcheck(lambda x: imq(x, Y, 1.3), (x,))


@pytest.mark.parametrize(
    "call", [lambda: sq_dists(X, Y[:, :2]), lambda: rbf(X, Y, 0.0), lambda: imq(X, Y, -1.0), lambda: median_bandwidth(X[:1])]
)
def test_bad_input(call):
    with pytest.raises(ValueError, match="got"):
        call()
