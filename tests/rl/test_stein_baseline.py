"""The Stein estimator against analytic gradients, NumPy and its own limit cases."""

import numpy as np
import pytest
import torch

from dlatlas.rl.envs.control import BatchedPendulum
from dlatlas.rl.kit.nets import ActorCritic
from dlatlas.rl.kit.pg import ppo
from dlatlas.rl.stein_baseline import SteinBaseline, SteinHooks, gaussian_stein_gradients, stein_surrogate

F64 = torch.float64


def problem(n, d=3, seed=0):
    """Q = -(a-c)' M (a-c): value, and gradients of its mean in the mean and the variances of the policy."""
    g = torch.Generator().manual_seed(seed)
    c, mean, std = (
        torch.randn(d, dtype=F64, generator=g),
        torch.randn(d, dtype=F64, generator=g),
        torch.tensor([0.5, 1.0, 0.8][:d], dtype=F64),
    )
    m = torch.randn(d, d, dtype=F64, generator=g)
    m = m @ m.T / d + torch.eye(d, dtype=F64)
    a = mean + std * torch.randn(n, d, dtype=F64, generator=g)
    q = -(((a - c) @ m) * (a - c)).sum(1)
    return a, q, mean.expand(n, d), std, -2 * m @ (mean - c), -m.diagonal(), (c, m)


def any_phi(a):
    """An arbitrary smooth function that is not Q, its gradient and its second derivatives."""
    phi = torch.sin(a).sum(1) + 0.3 * a[:, 0] * a[:, 1] ** 2
    grad = torch.cos(a)
    grad[:, 0] += 0.3 * a[:, 1] ** 2
    grad[:, 1] += 0.6 * a[:, 0] * a[:, 1]
    hess = -torch.sin(a)
    hess[:, 1] += 0.6 * a[:, 0]
    return phi, grad, hess


@pytest.mark.parametrize("with_hessian", [False, True])
def test_unbiased_for_an_arbitrary_baseline(with_hessian):
    a, q, mean, std, true_mean, true_var, _ = problem(500_000)
    phi, grad, hess = any_phi(a)
    g_mean, g_var = gaussian_stein_gradients(mean, std, a, q, phi, grad, hess if with_hessian else None)
    for g, true in ((g_mean, true_mean), (g_var, true_var)):
        error, se = (g.mean(0) - true).abs(), g.std(0) / len(g) ** 0.5
        assert (error < 4 * se).all(), (error / se).tolist()
        assert (se < 0.1 * true.abs().clamp_min(0.3)).all()  # the check is sharp
    wrong, _ = gaussian_stein_gradients(mean, std, a, q, phi, torch.zeros_like(grad))
    assert ((wrong.mean(0) - true_mean).abs() > 5 * wrong.std(0) / len(a) ** 0.5).any()


def test_in_numpy():
    a, q, mean, std, *_ = problem(5)
    phi, grad, hess = any_phi(a)
    A, M, S, G = a.numpy(), mean.numpy(), std.numpy(), grad.numpy()
    rest = (q - phi).numpy()[:, None]
    g_mean, g_var = gaussian_stein_gradients(mean, std, a, q, phi, grad)
    np.testing.assert_allclose(g_mean, (A - M) / S**2 * rest + G)
    np.testing.assert_allclose(g_var, 0.5 * (((A - M) ** 2 / S**4 - S**-2) * rest + (A - M) / S**2 * G))
    np.testing.assert_allclose(
        gaussian_stein_gradients(mean, std, a, q, phi, grad, hess)[1], 0.5 * (((A - M) ** 2 / S**4 - S**-2) * rest + hess.numpy())
    )


def test_the_exact_value_leaves_the_path_derivative_alone():
    a, q, mean, std, _, _, (c, m) = problem(50)
    grad = -2 * (a - c) @ m
    g_mean, g_var = gaussian_stein_gradients(mean, std, a, q, q, grad, (-2 * m.diagonal()).expand_as(a))
    torch.testing.assert_close(g_mean, grad)
    torch.testing.assert_close(g_var, -m.diagonal().expand_as(a))


def test_a_constant_is_an_ordinary_baseline():
    a, q, mean, std, *_ = problem(50)
    g_mean, _ = gaussian_stein_gradients(mean, std, a, q, torch.full_like(q, 2.0), torch.zeros_like(a))
    torch.testing.assert_close(g_mean, (a - mean) / std**2 * (q - 2).unsqueeze(1))


def test_the_surrogate_has_the_estimators_gradient_and_no_other():
    _, _, mean, std, *_ = problem(40)
    mean = mean.clone().requires_grad_()
    noise = torch.randn(40, 3, dtype=F64)
    moving = mean + std * noise  # a = f(s, noise)
    a = moving.detach()
    q = (-(a**2).sum(1)).requires_grad_()
    phi, grad, _ = (x.requires_grad_() for x in any_phi(a))
    logp = torch.distributions.Normal(mean, std).log_prob(a).sum(1)
    stein_surrogate(logp, moving, q, phi, grad).backward()
    expected, _ = gaussian_stein_gradients(mean.detach(), std, a, q.detach(), phi.detach(), grad.detach())
    torch.testing.assert_close(mean.grad, expected / 40)
    assert q.grad is None and phi.grad is None and grad.grad is None


@pytest.mark.parametrize("kind", ["quadratic", "mlp"])
def test_grad_is_the_gradient_of_phi(kind):
    torch.manual_seed(0)
    b = SteinBaseline(2, 3, kind).double()
    s, a = torch.randn(30, 2, dtype=F64), torch.randn(30, 3, dtype=F64)
    b.fit(s, a, 5 + 3 * torch.randn(30, dtype=F64), steps=5)
    g, h = b.grad(s, a), 1e-6
    assert not g.requires_grad and not b.phi(s, a).requires_grad and (g != 0).all()
    for i in range(3):
        e = torch.zeros(3, dtype=F64)
        e[i] = h
        torch.testing.assert_close(g[:, i], (b.phi(s, a + e) - b.phi(s, a - e)) / (2 * h), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("objective", ["fitq", "minvar"])
def test_a_fitted_quadratic_cuts_the_variance_on_fresh_samples(objective):
    torch.manual_seed(0)
    a, q, mean, std, *_ = problem(2000)
    s = torch.zeros(len(a), 1, dtype=F64)
    b = SteinBaseline(1, 3, hidden=()).double()
    loss = b.fit(s[:1000], a[:1000], q[:1000], objective, mean=mean[:1000], std=std, steps=400)
    assert len(loss) == 400 and loss[-1] < 0.3 * loss[0]
    fresh = slice(1000, None)
    args = mean[fresh], std, a[fresh], q[fresh]
    plain, _ = gaussian_stein_gradients(*args, q[:1000].mean().expand(1000), torch.zeros_like(a[fresh]))
    ours, _ = gaussian_stein_gradients(*args, b.phi(s[fresh], a[fresh]), b.grad(s[fresh], a[fresh]))
    assert ours.var(0).sum() < 0.5 * plain.var(0).sum()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in b.parameters())


def test_the_loss_of_minvar_starts_at_the_variance_of_the_plain_estimator():
    torch.manual_seed(0)
    a, q, mean, std, *_ = problem(200)
    b = SteinBaseline(1, 3, hidden=()).double()
    with torch.no_grad():
        for p in b.parameters():
            p.zero_()
    assert b.fit(torch.zeros(200, 1, dtype=F64), a, q, "minvar", mean=mean, std=std, steps=1)[0] == pytest.approx(1)
    assert not a.requires_grad


@pytest.mark.parametrize("kind", ["quadratic", "mlp"])
def test_a_second_fit_goes_on_where_the_first_stopped(kind):
    torch.manual_seed(0)
    a, q, *_ = problem(300)
    s, b = torch.randn(300, 1, dtype=F64), SteinBaseline(1, 3, kind).double()
    first = b.fit(s, a, q, steps=150, lr=0.02)
    before = b.phi(s, a)
    more = b.fit(s + 2, 3 * a, 10 * q + 100, steps=1, lr=1e-12)  # other samples in other units, and no step to speak of
    torch.testing.assert_close(b.phi(s, a), before, rtol=1e-6, atol=1e-6)
    assert more[0] == pytest.approx(float((10 * q + 100 - b.phi(s + 2, 3 * a)).square().mean() / (10 * q).var()), rel=1e-4)
    assert b.fit(s, a, q, steps=1)[0] == pytest.approx(float((q - before).square().mean() / q.var()), rel=1e-4) and first[-1] < first[0]
    copy = SteinBaseline(1, 3, kind).double()
    copy.load_state_dict(b.state_dict())
    copy.fit(s + 2, 3 * a, 10 * q, steps=1, lr=1e-12)
    torch.testing.assert_close(copy.phi(s, a), b.phi(s, a), rtol=1e-6, atol=1e-6)


def test_bad_input():
    a, q, mean, std, *_ = problem(4)
    phi, grad, _ = any_phi(a)
    b = SteinBaseline(2, 3)
    s, x = torch.zeros(4, 2), torch.zeros(4, 3)
    for call in (
        lambda: gaussian_stein_gradients(mean, std, a, q[:3], phi, grad),
        lambda: gaussian_stein_gradients(mean, -std, a, q, phi, grad),
        lambda: gaussian_stein_gradients(mean, std[:2], a, q, phi, grad),
        lambda: gaussian_stein_gradients(mean, std, a, q, phi, grad, grad[:, 0]),
        lambda: stein_surrogate(q, a, q, phi, grad[:, :2]),
        lambda: stein_surrogate(q[:0], a[:0], q[:0], phi[:0], grad[:0]),
        lambda: SteinBaseline(2, 3, "cubic"),
        lambda: SteinBaseline(0, 3),
        lambda: b.phi(s, torch.zeros(4, 2)),
        lambda: b.grad(torch.zeros(3, 2), x),
        lambda: b.fit(s, x, torch.zeros(3)),
        lambda: b.fit(s, x, torch.zeros(4), "other"),
        lambda: b.fit(s, x, torch.zeros(4), "minvar"),
    ):
        with pytest.raises(ValueError, match=r"must|expected|needs"):
            call()


def segment(policy, n=64, seed=0):
    g = torch.Generator().manual_seed(seed)
    obs = torch.randn(n, 3, generator=g)
    with torch.no_grad():
        dist = policy.distribution(obs)
        actions = dist.mean + dist.stddev * torch.randn(n, 2, generator=g)
    adv = -(actions - obs[:, :2]).square().sum(1) + 0.3 * torch.randn(n, generator=g)
    return {"obs": obs, "actions": actions, "logp": dist.log_prob(actions), "adv": adv}


@pytest.mark.parametrize("clip", [None, 0.2])
def test_the_hooks_loss_has_the_stein_gradient_at_the_old_policy(clip):
    torch.manual_seed(0)
    policy = ActorCritic(3, act_dim=2, log_std=-0.5)
    hooks = SteinHooks(SteinBaseline(3, 2), steps=30)
    hooks.after_rollout(policy, segment(policy, seed=1))
    raw = segment(policy)
    phi, grad = hooks.baseline.phi(raw["obs"], raw["actions"]), hooks.baseline.grad(raw["obs"], raw["actions"])  # before the second fit
    batch = hooks.after_rollout(policy, raw)
    assert hooks.explained[0] == 0 and hooks.explained[1] > 0.2
    rest = raw["adv"] - phi
    torch.testing.assert_close(batch["adv"] * rest.std() + rest.mean(), rest)
    torch.testing.assert_close(batch["grad_phi"] * rest.std(), grad)
    dist = policy.distribution(raw["obs"])
    ours = torch.autograd.grad(hooks.policy_loss(policy, batch, dist, clip), list(policy.actor.parameters()))
    dist = policy.distribution(raw["obs"])
    moving = dist.mean + dist.stddev * ((raw["actions"] - dist.mean) / dist.stddev).detach()
    surrogate = stein_surrogate(dist.log_prob(raw["actions"]), moving, raw["adv"] - rest.mean(), phi, grad) / rest.std()
    for g, e in zip(ours, torch.autograd.grad(-surrogate, list(policy.actor.parameters()))):
        torch.testing.assert_close(g, e, rtol=1e-3, atol=1e-5)


def test_the_repayment_is_clipped_on_the_side_of_gain_only():
    policy = ActorCritic(1, act_dim=1)
    obs = torch.zeros(1, 1)
    with torch.no_grad():
        dist = policy.distribution(obs)
    batch = {
        "obs": obs,
        "actions": dist.mean,
        "logp": dist.log_prob(dist.mean),
        "adv": torch.zeros(1),
        "noise": torch.zeros(1, 1),
        "old_std": dist.stddev,
    }
    for slope, expected in ((1.0, -0.2), (-1.0, 0.7)):  # moved by 0.7 standard deviations
        mean = (dist.mean + 0.7 * dist.stddev).requires_grad_()
        moved = torch.distributions.Independent(torch.distributions.Normal(mean, dist.stddev), 1)
        loss = SteinHooks(SteinBaseline(1, 1)).policy_loss(policy, {**batch, "grad_phi": torch.full((1, 1), slope)}, moved, 0.2)
        assert loss.item() == pytest.approx(expected)
        (g,) = torch.autograd.grad(loss, mean)
        assert g.item() == (0 if slope > 0 else pytest.approx(1.0))


def test_ppo_takes_the_hooks():
    torch.manual_seed(0)
    hooks = SteinHooks(SteinBaseline(3, 1, hidden=(8,)), steps=5)
    _, history = ppo(BatchedPendulum(4), 1600, horizon=200, seed=1, hooks=hooks)
    assert len(hooks.explained) == 2 and np.isfinite(history["policy_loss"]).all() and len(history["return"]) == 8
