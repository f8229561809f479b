"""Mixture of softmaxes against a sum of probabilities, its limit of one expert, and the ranks that the theory allows."""

import numpy as np
import pytest
import torch
from torch import nn

from dlatlas.nlp.mixture_of_softmaxes import MixtureOfSoftmaxes, log_prob_rank


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@pytest.mark.parametrize("bias", [True, False])
def test_against_a_sum_in_probability_space(bias):
    torch.manual_seed(0)
    mos = MixtureOfSoftmaxes(5, 7, n_experts=3, d_latent=4, bias=bias).double()
    h = torch.randn(2, 6, 5, dtype=torch.float64)
    U, V, v, W = (p.detach().numpy() for p in (mos.prior.weight, mos.latent.weight, mos.latent.bias, mos.decoder.weight))
    b = mos.decoder.bias.detach().numpy() if bias else 0
    expected = np.zeros((2, 6, 7))
    for i in np.ndindex(2, 6):
        x = h[i].numpy()
        pi = softmax(U @ x)
        for k in range(3):
            expected[i] += pi[k] * softmax(W @ np.tanh(V[4 * k : 4 * k + 4] @ x + v[4 * k : 4 * k + 4]) + b)
    logp = mos(h)
    np.testing.assert_allclose(logp.detach().exp().numpy(), expected, rtol=1e-12)
    torch.testing.assert_close(logp.exp().sum(-1), torch.ones(2, 6, dtype=torch.float64))
    assert (mos.decoder.bias is None) is not bias
    assert mos.prior.bias is None


def test_one_expert_is_one_softmax():
    mos = MixtureOfSoftmaxes(4, 9, n_experts=1)
    h = torch.randn(3, 4)
    torch.testing.assert_close(mos(h), torch.log_softmax(mos.decoder(torch.tanh(mos.latent(h))), -1))
    assert mos.latent.out_features == 4


def test_rank_of_one_softmax_is_bounded_and_of_the_mixture_not():
    torch.manual_seed(0)
    h = 3 * torch.randn(40, 2, dtype=torch.float64)
    for bias, bound in ((False, 3), (True, 4)):
        one = nn.Linear(2, 6, bias=bias).double()
        assert log_prob_rank(torch.log_softmax(one(h), -1)) == bound
        mos = MixtureOfSoftmaxes(2, 6, n_experts=3, bias=bias).double()
        for p in mos.parameters():
            nn.init.normal_(p, std=2.0)
        assert log_prob_rank(mos(h)) == 6
        # A mixture of contexts is one softmax.
        states = torch.tanh(mos.latent(h)).view(40, 3, 2)
        mixed = (torch.softmax(mos.prior(h), -1)[..., None] * states).sum(1)
        assert log_prob_rank(torch.log_softmax(mos.decoder(mixed), -1)) == bound


def test_rank_is_relative_and_counts():
    u = torch.linalg.qr(torch.randn(9, 4, dtype=torch.float64))[0]
    m = u * torch.tensor([1.0, 1e-2, 1e-4, 1e-7], dtype=torch.float64)
    assert log_prob_rank(m) == log_prob_rank(1e6 * m) == 3
    assert log_prob_rank(m, rtol=1e-3) == 2
    assert log_prob_rank(m.T, rtol=1e-9) == 4


def test_no_underflow_and_gradients():
    torch.manual_seed(0)
    mos = MixtureOfSoftmaxes(3, 5, n_experts=2, d_latent=2)
    with torch.no_grad():
        mos.decoder.bias.copy_(torch.tensor([0.0, -200, 0, 0, 0]))
    h = torch.randn(4, 3, requires_grad=True)
    logp = mos(h)
    assert torch.isfinite(logp).all() and (logp[:, 1] < -150).all()
    logp[:, 1].sum().backward()
    assert torch.isfinite(h.grad).all() and h.grad.abs().sum() > 0
    mos = mos.double()
    assert torch.autograd.gradcheck(mos, torch.randn(2, 3, dtype=torch.float64, requires_grad=True))
    weights = list(mos.parameters())
    h = torch.randn(2, 3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *w: torch.func.functional_call(mos, dict(zip(dict(mos.named_parameters()), w)), h), weights)


def test_bad_input():
    for kwargs in ({"n_experts": 0}, {"d_latent": 0}):
        with pytest.raises(ValueError, match="0"):
            MixtureOfSoftmaxes(4, 5, **kwargs)
    with pytest.raises(ValueError, match=r"\[\.\.\., 4\].*\(2, 3\)"):
        MixtureOfSoftmaxes(4, 5)(torch.zeros(2, 3))
    for bad in (torch.zeros(3), torch.full((2, 2), -torch.inf), torch.zeros(0, 3)):
        with pytest.raises(ValueError, match="expected"):
            log_prob_rank(bad)
    with pytest.raises(ValueError, match="rtol"):
        log_prob_rank(torch.zeros(2, 2), rtol=0.0)


def test_the_rank_is_relative_to_the_largest_singular_value():
    assert log_prob_rank(torch.diag(torch.tensor([1.0, 2e-5, 5e-6], dtype=torch.float64))) == 2
