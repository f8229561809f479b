"""Curvature against quadratics, loops and autograd's own Hessian."""

import pytest
import torch
from torch import nn

from dlatlas.kit.flat import flat_params
from dlatlas.theory.kit.curvature import full_hessian, hvp, jacobian_fro, lanczos, per_sample_grads
from dlatlas.theory.kit.nets import mlp

G = torch.Generator().manual_seed(0)
A = torch.randn(6, 6, dtype=torch.float64, generator=G)
A = A @ A.T


def net(seed=0, **kwargs):
    torch.manual_seed(seed)
    return mlp([3, 4, 2], "tanh", **kwargs).double()


X = torch.randn(5, 3, dtype=torch.float64, generator=G)
Y = torch.tensor([0, 1, 1, 0, 1])


def test_a_quadratic_has_its_matrix_as_hessian():
    x, y = torch.randn(4, dtype=torch.float64, requires_grad=True), torch.randn(2, dtype=torch.float64, requires_grad=True)

    def loss():
        z = torch.cat([x, y])
        return 0.5 * z @ A @ z

    v = torch.randn(6, dtype=torch.float64)
    torch.testing.assert_close(hvp(loss, [x, y], v), A @ v)
    torch.testing.assert_close(full_hessian(loss, [x, y]), A)


def test_a_linear_loss_has_no_curvature():
    x = torch.ones(3, requires_grad=True)
    assert torch.equal(hvp(lambda: x.sum(), [x], torch.ones(3)), torch.zeros(3))
    assert torch.equal(full_hessian(lambda: 2 * x.sum(), [x]), torch.zeros(3, 3))


def test_the_hessian_of_a_network_is_that_of_torch():
    model = net()
    params = list(model.parameters())

    def as_function(vector):
        pieces = [t.view_as(p) for t, p in zip(vector.split([p.numel() for p in params]), params)]
        named = dict(zip(dict(model.named_parameters()), pieces))
        return nn.functional.cross_entropy(torch.func.functional_call(model, named, (X,)), Y)

    oracle = torch.autograd.functional.hessian(as_function, flat_params(model))
    ours = full_hessian(lambda: nn.functional.cross_entropy(model(X), Y), params)
    torch.testing.assert_close(ours, oracle)
    v = torch.randn(len(ours), dtype=torch.float64)
    torch.testing.assert_close(hvp(lambda: nn.functional.cross_entropy(model(X), Y), params, v), oracle @ v)


def test_gradients_of_single_samples_by_loop():
    model = net()
    ours = per_sample_grads(model, nn.functional.cross_entropy, X, Y)
    for i in range(len(X)):
        model.zero_grad()
        nn.functional.cross_entropy(model(X[i : i + 1]), Y[i : i + 1]).backward()
        torch.testing.assert_close(ours[i], torch.cat([p.grad.reshape(-1) for p in model.parameters()]))
    assert all(p.requires_grad for p in model.parameters())


def test_lanczos_finds_the_spectrum_and_is_a_quadrature():
    values, weights = lanczos(lambda v: A @ v, 6, 6, torch.Generator().manual_seed(1))
    torch.testing.assert_close(values, torch.linalg.eigvalsh(A))
    assert float(weights.sum()) == pytest.approx(1)
    start = torch.randn(6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    start /= start.norm()
    few, w = lanczos(lambda v: A @ v, 6, 3, torch.Generator().manual_seed(1))
    for power in range(6):  # k nodes integrate polynomials up to degree 2k - 1
        exact = float(start @ torch.linalg.matrix_power(A, power) @ start)
        assert float(w @ few**power) == pytest.approx(exact, rel=1e-9)


def test_lanczos_stops_when_the_space_is_exhausted():
    values, weights = lanczos(lambda v: 3 * v, 10, 5)
    assert values.tolist() == pytest.approx([3.0]) and weights.tolist() == pytest.approx([1.0])


def test_jacobian_norm_exact_and_estimated():
    model = net()
    exact = [torch.autograd.functional.jacobian(lambda x: model(x[None])[0], x).norm() for x in X]
    torch.testing.assert_close(jacobian_fro(model, X), torch.stack(exact))
    wide = mlp([3, 40], bias=False).double()
    estimate = jacobian_fro(wide, X, probes=4000, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(estimate, wide[0].weight.norm().detach().expand(5), rtol=0.03, atol=0)


def test_bad_input():
    x = torch.ones(3, requires_grad=True)
    with pytest.raises(ValueError, match="3 entries"):
        hvp(lambda: x.sum(), [x], torch.ones(2))
    with pytest.raises(ValueError, match="limited to 4000"):
        full_hessian(lambda: 0, [torch.zeros(4001)])
    with pytest.raises(ValueError, match="batch normalisation"):
        per_sample_grads(net(batchnorm=True), nn.functional.cross_entropy, X, Y)
    with pytest.raises(ValueError, match="5 inputs and 4 targets"):
        per_sample_grads(net(), nn.functional.cross_entropy, X, Y[:4])
    with pytest.raises(ValueError, match="at least 1"):
        lanczos(lambda v: v, 3, 0)
