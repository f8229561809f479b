"""Straight-through estimators: exact forward values, prescribed gradients."""

import pytest
import torch

from dlatlas.compression.kit.ste import ste_replace, ste_round, ste_sign


def grad_of(function, x):
    x = x.clone().requires_grad_()
    weights = torch.arange(1.0, len(x) + 1)
    (function(x) * weights).sum().backward()
    return x.grad / weights


def test_round_is_half_to_even_and_its_gradient_one():
    x = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 0.3, 7.7])
    assert ste_round(x).tolist() == [-2, -2, 0, 0, 2, 2, 0, 8]
    assert grad_of(ste_round, x).tolist() == [1] * 8


def test_sign_has_no_zero_and_clips_its_gradient():
    x = torch.tensor([-3.0, -1.0, -0.5, -0.0, 0.0, 0.5, 1.0, 1.0001])
    assert ste_sign(x).tolist() == [-1, -1, -1, 1, 1, 1, 1, 1]
    assert grad_of(ste_sign, x).tolist() == [0, 1, 1, 1, 1, 1, 1, 0]
    assert grad_of(lambda v: ste_sign(v, clip=0.5), x).tolist() == [0, 0, 1, 1, 1, 1, 0, 0]
    assert grad_of(lambda v: ste_sign(v, clip=None), x).tolist() == [1] * 8
    assert ste_sign(torch.tensor([float("inf"), -float("inf")])).tolist() == [1, -1]


def test_replace_gives_exactly_q_and_no_gradient_to_it():
    x, q = torch.randn(1000), torch.full((1000,), 0.1)
    assert ((x + (q - x)) != q).any()  # the formula by which it is usually written
    x.requires_grad_()
    latent_q = q.clone().requires_grad_()
    out = ste_replace(x, latent_q)
    assert torch.equal(out, q)
    out.pow(3).sum().backward()
    torch.testing.assert_close(x.grad, 3 * q**2)
    assert latent_q.grad is None


@pytest.mark.parametrize("function", [ste_round, ste_sign, lambda x: ste_replace(x, x.detach() + 1)])
def test_dtypes_and_second_derivatives(function):
    x = torch.randn(5, dtype=torch.float64, requires_grad=True)
    out = function(x)
    assert out.dtype == torch.float64
    (g,) = torch.autograd.grad((out * x).sum(), x, create_graph=True)  # d/dx = out + x * mask
    (h,) = torch.autograd.grad(g.sum(), x)
    mask = (x.abs() <= 1).double() if function is ste_sign else torch.ones(5, dtype=torch.float64)
    torch.testing.assert_close(h, 2 * mask)
    torch.testing.assert_close(torch.func.vmap(function)(x.detach()[:, None])[:, 0], out.detach())


def test_bad_input():
    with pytest.raises(ValueError, match="clip"):
        ste_sign(torch.zeros(2), clip=0.0)
    with pytest.raises(ValueError, match="shape"):
        ste_replace(torch.zeros(2), torch.zeros(1))
