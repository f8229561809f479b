"""Return arithmetic against loops over single steps, closed forms and stable-baselines3."""

import numpy as np
import pytest
import torch

from dlatlas.rl.kit.returns import categorical_projection, discounted, gae, nstep


def segment(steps=17, count=5, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    r, v, nv = (torch.randn(n, count, generator=g, dtype=dtype) for n in (steps, steps + 1, steps))
    d, cut = (torch.rand(steps, count, generator=g) < 0.15 for _ in range(2))
    cut &= ~d
    nv = torch.where(cut, nv, v[1:])
    return r, v, d, cut, nv


def loop_nstep(r, d, cut, boot, gamma, n):
    steps, count = r.shape
    out = np.zeros((steps, count))
    for b in range(count):
        for t in range(steps):
            for k in range(n):
                out[t, b] += gamma**k * r[t + k, b]
                if d[t + k, b]:
                    break
                if cut[t + k, b] or k == n - 1 or t + k == steps - 1:
                    out[t, b] += gamma ** (k + 1) * boot[t + k, b]
                    break
    return out


def test_discounted_is_an_endless_nstep_return():
    r, v, d, cut, nv = segment()
    plain = discounted(r, d, 0.9, v[-1])
    np.testing.assert_allclose(plain, loop_nstep(r, d, torch.zeros_like(d), torch.cat([v[1:-1], v[-1:]]), 0.9, 10**6), rtol=1e-12)
    with_cuts = discounted(r, d, 0.9, v[-1], truncations=cut, next_values=nv)
    np.testing.assert_allclose(with_cuts, loop_nstep(r, d, cut, nv, 0.9, 10**6), rtol=1e-12)
    assert not torch.allclose(plain, with_cuts)
    assert torch.equal(discounted(torch.ones(3), torch.zeros(3), 1.0), torch.tensor([3.0, 2.0, 1.0]))


@pytest.mark.parametrize("n", [1, 2, 3, 16, 17, 40])
def test_nstep_against_a_loop(n):
    r, _, d, cut, nv = segment()
    np.testing.assert_allclose(nstep(r, d, nv, 0.9, n, truncations=cut), loop_nstep(r, d, cut, nv, 0.9, n), rtol=1e-12, atol=1e-12)
    none = torch.zeros_like(d)
    np.testing.assert_allclose(nstep(r, d.double(), nv, 0.9, n), loop_nstep(r, d, none, nv, 0.9, n), rtol=1e-12, atol=1e-12)


def test_gae_is_the_mixture_of_nstep_returns():
    r, v, d, cut, nv = segment()
    gamma, lam, steps = 0.9, 0.7, len(r)
    # (1-lam) sum_n lam^(n-1) G^(n), all weight that is left on the longest.
    mix = sum((1 - lam) * lam ** (n - 1) * nstep(r, d, nv, gamma, n, truncations=cut) for n in range(1, steps + 60))
    got = gae(r, v, d, gamma, lam, truncations=cut, next_values=nv)
    torch.testing.assert_close(
        got + v[:-1], mix + lam ** (steps + 59) * nstep(r, d, nv, gamma, steps, truncations=cut), rtol=1e-10, atol=1e-10
    )


def test_gae_limits():
    r, v, d, _, _ = segment()
    torch.testing.assert_close(gae(r, v, d, 0.9, 0.0), nstep(r, d, v[1:], 0.9, 1) - v[:-1])
    torch.testing.assert_close(gae(r, v, d, 0.9, 1.0), discounted(r, d, 0.9, v[-1]) - v[:-1])


def test_gae_against_stable_baselines():
    from gymnasium import spaces
    from stable_baselines3.common.buffers import RolloutBuffer

    r, v, d, _, _ = segment(dtype=torch.float32)
    steps, count = r.shape
    peer = RolloutBuffer(steps, spaces.Box(-1, 1, (1,)), spaces.Discrete(2), device="cpu", gae_lambda=0.95, gamma=0.99, n_envs=count)
    starts = np.vstack([np.zeros((1, count)), d[:-1].numpy()])
    for t in range(steps):
        peer.add(np.zeros((count, 1)), np.zeros((count, 1)), r[t].numpy(), starts[t], v[t], torch.zeros(count))
    peer.compute_returns_and_advantage(v[-1], d[-1].numpy().astype(np.float32))
    np.testing.assert_allclose(gae(r, v, d, 0.99, 0.95), peer.advantages, rtol=1e-5, atol=1e-5)


def test_dtype_and_vectors():
    for dtype in (torch.float32, torch.float64):
        r, v, d, _, nv = segment(dtype=dtype)
        assert gae(r, v, d, 0.9, 0.9).dtype == discounted(r, d, 0.9).dtype == nstep(r, d, nv, 0.9, 3).dtype == dtype
        torch.testing.assert_close(gae(r[:, 0], v[:, 0], d[:, 0], 0.9, 0.9), gae(r, v, d, 0.9, 0.9)[:, 0])
        torch.testing.assert_close(nstep(r[:, 0], d[:, 0], nv[:, 0], 0.9, 3), nstep(r, d, nv, 0.9, 3)[:, 0])


def test_bad_returns():
    r, v, d, cut, nv = segment()
    for gamma in (-0.1, 1.1, float("nan")):
        for call in (lambda g: discounted(r, d, g), lambda g: gae(r, v, d, g, 0.9), lambda g: nstep(r, d, nv, g, 2)):
            with pytest.raises(ValueError, match="gamma"):
                call(gamma)
    with pytest.raises(ValueError, match="lam"):
        gae(r, v, d, 0.9, 1.5)
    with pytest.raises(ValueError, match="values"):
        gae(r, v[1:], d, 0.9, 0.9)
    with pytest.raises(ValueError, match="dones"):
        discounted(r, d[1:], 0.9)
    with pytest.raises(ValueError, match="n must"):
        nstep(r, d, nv, 0.9, 0)
    with pytest.raises(ValueError, match="next_values"):
        gae(r, v, d, 0.9, 0.9, truncations=cut)
    with pytest.raises(ValueError, match="rewards"):
        discounted(r[:0], d[:0], 0.9)


def loop_projection(atoms, weights, z):
    out, step = np.zeros(len(z)), z[1] - z[0]
    for x, w in zip(atoms, weights):
        for j, zj in enumerate(z):
            out[j] += w * max(0.0, 1 - abs(min(max(x, z[0]), z[-1]) - zj) / step)
    return out


def test_projection_against_the_tent_formula():
    rng = np.random.default_rng(0)
    z = np.linspace(-3.0, 5.0, 9)
    atoms, weights = rng.uniform(-5, 7, (4, 2, 30)), rng.normal(size=(4, 2, 30))  # negative masses too
    got = categorical_projection(*map(torch.from_numpy, (atoms, weights, z)))
    expected = np.array([[loop_projection(atoms[i, j], weights[i, j], z) for j in range(2)] for i in range(4)])
    np.testing.assert_allclose(got, expected, atol=1e-12)


def test_projection_keeps_mass_mean_and_grid_points():
    z = torch.linspace(-10, 10, 51)
    atoms, weights = torch.rand(7, 40) * 20 - 10, torch.rand(7, 40).softmax(-1)
    p = categorical_projection(atoms, weights, z)
    torch.testing.assert_close(p.sum(-1), torch.ones(7))
    torch.testing.assert_close(p @ z, (atoms * weights).sum(-1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(categorical_projection(z, torch.eye(51), z), torch.eye(51), rtol=0, atol=1e-4)  # broadcasts, points stay
    out = categorical_projection(torch.tensor([-99.0, 99.0]), torch.tensor([0.25, 0.75]), z)
    assert out[0] == 0.25 and out[-1] == 0.75
    for K in (2, 11, 51, 200):  # floats of every grid, to the last bit on the border
        grid = torch.linspace(-1.7, 0.3, K)
        assert torch.isfinite(categorical_projection(grid, torch.ones(K), grid)).all()


def test_projection_is_linear_in_the_masses():
    z = torch.linspace(-1, 1, 5, dtype=torch.float64)
    atoms = torch.rand(3, 4, dtype=torch.float64) * 3 - 1.5
    weights = torch.rand(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda w: categorical_projection(atoms, w, z), weights)


def test_bad_supports():
    for z in (torch.tensor([0.0]), torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0, 3.0]), torch.zeros(2, 2)):
        with pytest.raises(ValueError, match="support"):
            categorical_projection(torch.zeros(1), torch.ones(1), z)


def test_projection_of_mixed_precision_keeps_that_of_the_masses():
    z, atoms, w = torch.linspace(-1, 1, 5), torch.rand(3, 4, dtype=torch.float64), torch.rand(3, 4)
    out = categorical_projection(atoms, w, z)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, categorical_projection(atoms, w.double(), z.double()).float())
    assert categorical_projection(atoms.float(), w.double(), z).dtype == torch.float64
