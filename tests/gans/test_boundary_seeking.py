"""Importance weights against the softmax, the exact gradient of the divergence, and the boundary."""

import pytest
import torch

from dlatlas.gans.boundary_seeking import continuous_g_loss, discrete_g_loss, normalized_weights

G = torch.Generator().manual_seed(0)
LOGITS, LOG_PROB = (torch.randn(6, 3, dtype=torch.float64, generator=G) for _ in range(2))


def test_weights():
    w = normalized_weights(LOGITS.clone().requires_grad_())
    torch.testing.assert_close(w, LOGITS.exp() / LOGITS.exp().sum(0))
    assert not w.requires_grad
    torch.testing.assert_close(w, normalized_weights(LOGITS + torch.tensor([5.0, -3.0, 900.0])))
    assert (normalized_weights(torch.zeros(4, 2)) == 0.25).all()


def test_losses_and_their_gradients_by_hand():
    lp, F = LOG_PROB.clone().requires_grad_(), LOGITS.clone().requires_grad_()
    w = LOGITS.exp() / LOGITS.exp().sum(0)
    loss = discrete_g_loss(lp, F)
    assert loss.item() == pytest.approx(-float((w * LOG_PROB).sum()) / 3)
    torch.testing.assert_close(torch.autograd.grad(loss, lp)[0], -w / 3)
    loss = discrete_g_loss(lp, F, "reinforce")
    torch.testing.assert_close(torch.autograd.grad(loss, lp)[0], -(LOGITS - LOGITS.mean()) / 18)


@pytest.mark.parametrize("kind", ["importance", "reinforce"])
def test_gradient_tends_to_that_of_the_divergence(kind):
    theta = torch.randn(5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    p = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05], dtype=torch.float64)
    log_g = theta.log_softmax(0)
    x = torch.multinomial(log_g.detach().exp(), 200_000, True, generator=torch.Generator().manual_seed(2))[:, None]
    F = p.log() - log_g  # the optimal logit
    (ours,) = torch.autograd.grad(discrete_g_loss(log_g[x], F[x], kind), theta, retain_graph=True)
    kl = (p * -log_g).sum() if kind == "importance" else (log_g.exp() * (log_g - p.log())).sum()
    torch.testing.assert_close(ours, torch.autograd.grad(kl, theta)[0], atol=0.01, rtol=0)


def test_continuous():
    F = torch.tensor([[0.0], [2.0], [-1.0]], requires_grad=True)
    loss = continuous_g_loss(F)
    assert loss.item() == pytest.approx(5 / 6)
    torch.testing.assert_close(torch.autograd.grad(loss, F)[0], F.detach() / 3)
    assert continuous_g_loss(torch.zeros(4)) == 0


def test_bad_input():
    for bad in (lambda: discrete_g_loss(torch.zeros(1, 3), torch.zeros(1, 3)), lambda: discrete_g_loss(LOG_PROB, LOGITS[:3]),
                lambda: discrete_g_loss(LOG_PROB, LOGITS, "other"), lambda: normalized_weights(torch.zeros(3)),
                lambda: continuous_g_loss(torch.zeros(0))):  # fmt: skip
        with pytest.raises(ValueError, match=r"got"):
            bad()
