"""Penalties against linear critics, autograd sample by sample, and the Wasserstein distance on the line."""

import numpy as np
import pytest
import torch
from scipy.stats import wasserstein_distance

from dlatlas.gans.lipschitz_penalty import lipschitz_penalty, wgan_lp_loss
from dlatlas.kit.nets import mlp

REAL, FAKE = torch.randn(2, 6, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def linear(slope):
    a = torch.full((2, 3), slope / 6**0.5, dtype=torch.float64)
    return lambda x: (x * a).sum((1, 2))


@pytest.mark.parametrize("sampling", ["interpolate", "perturb"])
@pytest.mark.parametrize("slope", [0.3, 1.0, 2.5])
def test_a_linear_critic_in_closed_form(slope, sampling):
    lp, gp = (lipschitz_penalty(linear(slope), REAL, FAKE, one_sided=s, sampling=sampling) for s in (True, False))
    assert lp.item() == pytest.approx(max(0, slope - 1) ** 2, abs=1e-9)
    assert gp.item() == pytest.approx((slope - 1) ** 2, abs=1e-9)


@pytest.mark.parametrize("flat", [lambda x: torch.zeros(len(x), 1, dtype=x.dtype), lambda x: 0 * x.sum((1, 2))])
def test_a_flat_critic_is_finite(flat):
    assert lipschitz_penalty(flat, REAL, FAKE).item() == 0
    assert lipschitz_penalty(flat, REAL, FAKE, one_sided=False).item() == pytest.approx(1, abs=1e-5)
    layer = torch.nn.Linear(6, 1, bias=False).double()
    torch.nn.init.zeros_(layer.weight)
    lipschitz_penalty(lambda x: layer(x.flatten(1)), REAL, FAKE, one_sided=False).backward()
    assert layer.weight.grad.isfinite().all()


@pytest.mark.parametrize("one_sided", [True, False])
def test_sample_by_sample_on_the_segments(one_sided):
    net = mlp([6, 8, 1], "tanh").double()
    with torch.no_grad():
        net[0].weight.mul_(6)

    def critic(x):
        return net(x.flatten(1))

    ours = lipschitz_penalty(critic, REAL, FAKE, one_sided=one_sided, generator=torch.Generator().manual_seed(5))
    t = torch.rand(6, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    terms = []
    for b in range(6):
        x = (t[b] * REAL[b] + (1 - t[b]) * FAKE[b]).clone().requires_grad_()
        (g,) = torch.autograd.grad(critic(x[None]).squeeze(), x)
        excess = float(np.sqrt((g.numpy() ** 2).sum())) - 1
        terms.append(max(excess, 0) ** 2 if one_sided else excess**2)
    assert ours.item() == pytest.approx(np.mean(terms), rel=1e-6)
    assert np.mean(terms) > 0


def test_perturbed_points_stay_near_their_samples_and_may_differ_in_number():
    seen = []

    def critic(x):
        seen.append(x.detach().clone())
        return linear(1.0)(x)

    real, fake = REAL, 100 + FAKE[:4]
    lipschitz_penalty(critic, real, fake, sampling="perturb", noise=0.5, generator=torch.Generator().manual_seed(1))
    for points, moved in ((real, seen[0][:6]), (fake, seen[0][6:])):
        shift = (moved - points) / points.std(correction=0)
        assert (shift >= 0).all() and (shift <= 0.5).all() and shift.std() > 0.05
    lipschitz_penalty(critic, real, fake, sampling="perturb", noise=0.0)
    torch.testing.assert_close(seen[1], torch.cat([real, fake]))


def test_the_gradient_reaches_the_critic_and_not_the_samples():
    net = mlp([6, 5, 1], "tanh").double()
    fake = FAKE.clone().requires_grad_()
    lipschitz_penalty(lambda x: 3 * net(x.flatten(1)), REAL, fake, one_sided=False).backward()
    assert fake.grad is None and net[0].weight.grad.abs().sum() > 0
    (a,) = (torch.tensor([0.5, 2.0], dtype=torch.float64, requires_grad=True),)
    points = torch.randn(4, 2, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda a: lipschitz_penalty(lambda x: x.square() @ a, points, points, False), a)


def test_the_loss_adds_its_parts():
    critic = linear(3.0)
    value = wgan_lp_loss(critic, REAL, FAKE, weight=2.0).item()
    assert value == pytest.approx((critic(FAKE).mean() - critic(REAL).mean()).item() + 2 * 4)
    one, two = (wgan_lp_loss(linear(0.5), REAL, FAKE, weight=8.0, one_sided=s).item() for s in (True, False))
    assert two - one == pytest.approx(8 * 0.25, abs=1e-5)
    assert wgan_lp_loss(critic, REAL, FAKE).item() - wgan_lp_loss(critic, REAL, FAKE, weight=0.0).item() == pytest.approx(5 * 4)


def test_the_trained_critic_measures_the_distance_on_the_line():
    g = torch.Generator().manual_seed(0)
    real, fake = torch.randn(100, 1, generator=g), 3 + 0.5 * torch.randn(100, 1, generator=g)
    D = mlp([1, 32, 32, 1])
    optimizer = torch.optim.Adam(D.parameters(), 2e-3, betas=(0.5, 0.9))
    for _ in range(300):
        loss = wgan_lp_loss(D, real, fake, weight=20.0, generator=g)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        estimate = (D(real).mean() - D(fake).mean()).item()
    assert estimate == pytest.approx(wasserstein_distance(real.ravel().numpy(), fake.ravel().numpy()), rel=0.1)


def test_generators_repeat():
    net = mlp([6, 8, 1], "tanh").double()
    for sampling in ("interpolate", "perturb"):
        a, b, c = (
            lipschitz_penalty(lambda x: 9 * net(x.flatten(1)), REAL, FAKE, False, sampling, generator=torch.Generator().manual_seed(s))
            for s in (1, 1, 2)
        )
        assert a == b != c


def test_bad_input():
    with pytest.raises(ValueError, match=r"\(6, 2, 3\)"):
        lipschitz_penalty(linear(1.0), REAL, FAKE[:5])
    with pytest.raises(ValueError, match="'nowhere'"):
        lipschitz_penalty(linear(1.0), REAL, FAKE, sampling="nowhere")
    with pytest.raises(ValueError, match="one shape"):
        lipschitz_penalty(linear(1.0), REAL, FAKE[:, :1], sampling="perturb")
    with pytest.raises(ValueError, match="noise"):
        lipschitz_penalty(linear(1.0), REAL, FAKE, sampling="perturb", noise=-1.0)
    with pytest.raises(ValueError, match="weight"):
        wgan_lp_loss(linear(1.0), REAL, FAKE, weight=-1.0)
    with pytest.raises(ValueError, match="one score"):
        lipschitz_penalty(lambda x: x, REAL, FAKE)
