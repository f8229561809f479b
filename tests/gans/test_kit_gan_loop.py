"""The loop of two players against one that is written out by hand."""

from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.nn.functional import softplus

from dlatlas.gans.kit.loop import fit_gan
from dlatlas.train import minibatches


def d_loss(D, real, fake, step):
    return softplus(-D(real)).mean() + softplus(D(fake)).mean()


def g_loss(D, fake, step):
    return softplus(-D(fake)).mean()


def players():
    torch.manual_seed(0)
    G, D = nn.Linear(3, 2), nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1))
    return G, D, torch.optim.SGD(G.parameters(), 0.1), torch.optim.Adam(D.parameters(), 0.05)


def play(data, steps=4, **kwargs):
    G, D, opt_g, opt_d = players()
    history = fit_gan(G, D, data, d_loss, g_loss, steps=steps, batch=8, z_dim=3, opt_g=opt_g, opt_d=opt_d, seed=5, **kwargs)
    return G, D, history


@pytest.mark.parametrize("n_critic", [1, 3])
def test_against_the_loop_by_hand(n_critic):
    data = torch.randn(20, 2)
    G, D, history = play(data, n_critic=n_critic)
    H, E, opt_g, opt_d = players()
    g = torch.Generator().manual_seed(5)
    order, ds, gs = minibatches(20, 8, g), [], []
    for _ in range(4):
        for _ in range(n_critic):
            fake = H(torch.randn(8, 3, generator=g)).detach()
            loss = d_loss(E, data[next(order)], fake, 0)
            opt_d.zero_grad()
            loss.backward()
            opt_d.step()
        ds.append(loss.item())
        loss = g_loss(E, H(torch.randn(8, 3, generator=g)), 0)
        opt_g.zero_grad()
        loss.backward()
        opt_g.step()
        gs.append(loss.item())
    for p, q in zip((*G.parameters(), *D.parameters()), (*H.parameters(), *E.parameters())):
        torch.testing.assert_close(p, q)
    assert history.d == pytest.approx(ds) and history.g == pytest.approx(gs)
    assert all(p.requires_grad for p in D.parameters())


def test_a_sampler_takes_the_place_of_data():
    asked = []

    def sampler(n):
        asked.append(n)
        return torch.zeros(n, 2)

    play(sampler, n_critic=2)
    assert asked == [8] * 8


def test_snapshots_share_their_noise_and_hooks_see_every_step():
    seen = []
    G, _, history = play(torch.randn(20, 2), snapshot_at={0, 3}, n_snapshot=6, hooks=[lambda i, G, D: seen.append(i)])
    assert seen == [0, 1, 2, 3] and set(history.snapshots) == {0, 3}
    assert history.snapshots[3].shape == (6, 2) and not torch.equal(history.snapshots[0], history.snapshots[3])
    z = torch.randn(6, 3, generator=torch.Generator().manual_seed(6))
    torch.testing.assert_close(history.snapshots[3], G(z).detach())
    alone, _, _ = play(torch.randn(20, 2, generator=torch.Generator().manual_seed(1)))
    watched, _, _ = play(torch.randn(20, 2, generator=torch.Generator().manual_seed(1)), snapshot_at={1})
    assert torch.equal(alone.weight, watched.weight)  # looking does not change the game


def test_the_critic_plays_inside_its_context():
    G, D, opt_g, opt_d = players()
    inside = []

    @contextmanager
    def context(step):
        inside.append(step)
        yield
        inside.append("out")

    def spied(D, fake, step):
        assert inside[-1] == "out"
        return g_loss(D, fake, step)

    kwargs = {"steps": 2, "batch": 4, "z_dim": 3, "opt_g": opt_g, "opt_d": opt_d, "seed": 0, "critic_context": context}
    fit_gan(G, D, torch.randn(9, 2), d_loss, spied, **kwargs)
    assert inside == [0, "out", 1, "out"]


def test_a_loss_that_is_not_a_number_stops_the_game():
    G, D, opt_g, opt_d = players()
    with pytest.raises(FloatingPointError, match="d became nan at step 2"):
        fit_gan(
            G, D, torch.randn(9, 2), lambda D, r, f, i: d_loss(D, r, f, i) * (float("nan") if i == 2 else 1), g_loss,
            steps=5, batch=4, z_dim=3, opt_g=opt_g, opt_d=opt_d, seed=0,
        )  # fmt: skip


def test_counts_below_one_are_refused():
    with pytest.raises(ValueError, match="n_critic=0"):
        play(torch.randn(20, 2), n_critic=0)
