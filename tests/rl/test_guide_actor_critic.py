"""The guide actor against scipy: a numerical maximiser under the constraints, the dual's slacks, and limits."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import NonlinearConstraint, minimize
from torch.distributions import MultivariateNormal, kl_divergence

from dlatlas.rl.guide_actor_critic import GAC, gac_dual, guide_actor, negative_definite, solve_dual

F64 = torch.float64


def rand(*shape, seed=0):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def problem(batch=6, d=3, seed=0):
    """Means, covariances, and critics with their own gradients and Hessians at a0."""
    root, curve = rand(batch, d, d, seed=seed), rand(batch, d, d, seed=seed + 1)
    cov, hess = root @ root.mT / d + 0.1 * torch.eye(d, dtype=F64), -curve @ curve.mT
    return rand(batch, d, seed=seed + 2), cov, rand(batch, d, seed=seed + 3), hess, rand(batch, d, seed=seed + 4)


def constraints(mean, cov, new_mean, new_cov):
    old, new = MultivariateNormal(mean, cov), MultivariateNormal(new_mean, new_cov)
    return kl_divergence(new, old).mean().item(), new.entropy().mean().item()


def test_the_formulas_with_plain_inverses():
    mean, cov, grad, hess, a0 = problem()
    got_mean, got_cov = guide_actor(mean, cov, grad, hess, a0, 0.7, 0.2)
    for b in range(6):
        S, H = np.linalg.inv(cov[b].numpy()), hess[b].numpy()
        F = 0.7 * S - H
        L = 0.7 * S @ mean[b].numpy() + grad[b].numpy() - H @ a0[b].numpy()
        np.testing.assert_allclose(got_mean[b].numpy(), np.linalg.inv(F) @ L)
        np.testing.assert_allclose(got_cov[b].numpy(), 0.9 * np.linalg.inv(F))


def test_the_guide_is_the_exponentiated_critic():
    """log pi+ - (eta log pi + Q) / (eta + omega) is one constant, whatever the action."""
    mean, cov, grad, hess, a0 = problem()
    new = MultivariateNormal(*guide_actor(mean, cov, grad, hess, a0, 0.7, 0.2))
    a = rand(50, 6, 3, seed=9)
    away = a - a0
    q = (away * grad).sum(-1) + 0.5 * torch.einsum("nbi,bij,nbj->nb", away, hess, away)
    gap = new.log_prob(a) - (0.7 * MultivariateNormal(mean, cov).log_prob(a) + q) / 0.9
    torch.testing.assert_close(gap, gap[:1].expand_as(gap))


def test_slopes_of_the_dual_are_the_slacks():
    mean, cov, grad, hess, a0 = problem()
    eta, omega = (torch.tensor(x, dtype=F64, requires_grad=True) for x in (0.7, 0.2))
    g_eta, g_omega = torch.autograd.grad(gac_dual(mean, cov, grad, hess, a0, eta, omega, 0.3, -1.0), [eta, omega])
    kl, entropy = constraints(mean, cov, *(x.detach() for x in guide_actor(mean, cov, grad, hess, a0, eta, omega)))
    assert g_eta.item() == pytest.approx(0.3 - kl) and g_omega.item() == pytest.approx(entropy + 1.0)


@pytest.mark.parametrize(("epsilon", "drop", "free"), [(0.1, 0.05, False), (0.5, 3.0, True)])
def test_the_solved_dual_meets_the_constraints(epsilon, drop, free):
    """Both bind, or the entropy is slack and its multiplier vanishes; an independent search over the torch dual agrees."""
    mean, cov, grad, hess, a0 = problem()
    kappa = MultivariateNormal(mean, cov).entropy().mean().item() - drop
    eta, omega = solve_dual(mean, cov, grad, hess, a0, epsilon, kappa)
    kl, entropy = constraints(mean, cov, *guide_actor(mean, cov, grad, hess, a0, eta, omega))
    assert kl == pytest.approx(epsilon, rel=1e-3)
    if free:
        assert entropy > kappa + 0.1 and omega < 1e-3
    else:
        assert entropy == pytest.approx(kappa, abs=1e-3) and omega > 1e-2

    def dual(logs):
        x = torch.tensor(logs, dtype=F64, requires_grad=True)
        value = gac_dual(mean, cov, grad, hess, a0, x[0].exp(), x[1].exp(), epsilon, kappa)
        return value.item(), torch.autograd.grad(value, x)[0].numpy()

    best = minimize(dual, [0.0, 0.0], jac=True, method="L-BFGS-B", bounds=[(-14, 14)] * 2, options={"ftol": 1e-14, "gtol": 1e-9})
    assert dual(np.log([eta, omega]))[0] == pytest.approx(best.fun, abs=1e-4)
    assert eta == pytest.approx(math.exp(best.x[0]), rel=1e-2)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("start", [(1.0, 1.0), (1e-9, 1e-9), (1e5, 1e5)])
def test_the_search_does_not_depend_on_scale_or_start(scale, start):
    mean, cov, grad, hess, a0 = problem()
    kappa = MultivariateNormal(mean, cov).entropy().mean().item() - 0.02
    eta, omega = solve_dual(mean, cov, scale * grad, scale * hess, a0, 0.05, kappa, start=start)
    kl, entropy = constraints(mean, cov, *guide_actor(mean, cov, scale * grad, scale * hess, a0, eta, omega))
    assert kl == pytest.approx(0.05, rel=1e-2) and entropy == pytest.approx(kappa, abs=1e-2)


def test_a_numerical_maximiser_finds_the_same_gaussian():
    """SLSQP over mean and Cholesky factor in two dimensions, with the constraints as written."""
    mean, cov, grad, hess, a0 = (x[:1] for x in problem(d=2))
    old = MultivariateNormal(mean[0], cov[0])
    epsilon, kappa = 0.2, old.entropy().item() - 0.1

    def unpack(x):
        root = torch.stack([torch.stack([x[2].exp(), 0 * x[2]]), torch.stack([x[3], x[4].exp()])])
        return MultivariateNormal(x[:2], scale_tril=root)

    def objective(x):
        new = unpack(x)
        away = new.mean - a0[0]
        return -(grad[0] @ away + 0.5 * away @ hess[0] @ away + 0.5 * (hess[0] * new.covariance_matrix).sum())

    def with_slope(f):
        def call(x):
            x = torch.tensor(x, dtype=F64, requires_grad=True)
            value = f(x)
            return value.item(), torch.autograd.grad(value, x)[0].numpy()

        return lambda x: call(x)[0], lambda x: call(x)[1]

    bounds = [with_slope(lambda x: kl_divergence(unpack(x), old) - epsilon), with_slope(lambda x: kappa - unpack(x).entropy())]
    cons = [NonlinearConstraint(f, -np.inf, 0, jac=j) for f, j in bounds]
    root = torch.linalg.cholesky(cov[0])
    x0 = np.array([*mean[0].numpy(), root[0, 0].log(), root[1, 0], root[1, 1].log()])
    f, j = with_slope(objective)
    found = minimize(f, x0, jac=j, constraints=cons, method="SLSQP", options={"maxiter": 500, "ftol": 1e-12})
    best = unpack(torch.tensor(found.x))
    new_mean, new_cov = guide_actor(mean, cov, grad, hess, a0, *solve_dual(mean, cov, grad, hess, a0, epsilon, kappa))
    torch.testing.assert_close(new_mean[0], best.mean, atol=2e-3, rtol=0)
    torch.testing.assert_close(new_cov[0], best.covariance_matrix, atol=2e-3, rtol=0)


def test_without_curvature_it_is_the_deterministic_policy_gradient():
    mean, cov, grad, hess, _ = problem()
    new_mean, new_cov = guide_actor(mean, cov, grad, 0 * hess, mean, 2.0, 0.0)
    torch.testing.assert_close(new_mean, mean + (cov @ grad.unsqueeze(-1)).squeeze(-1) / 2)
    torch.testing.assert_close(new_cov, cov)


def test_a_rotation_of_the_actions_rotates_the_guide():
    mean, cov, grad, hess, a0 = problem()
    R = torch.linalg.qr(rand(3, 3, seed=7))[0]
    turned = [x @ R.T for x in (mean, grad, a0)], [R @ x @ R.T for x in (cov, hess)]
    m, c = guide_actor(mean, cov, grad, hess, a0, 0.7, 0.2)
    mr, cr = guide_actor(turned[0][0], turned[1][0], turned[0][1], turned[1][1], turned[0][2], 0.7, 0.2)
    torch.testing.assert_close(mr, m @ R.T)
    torch.testing.assert_close(cr, R @ c @ R.T)


def test_projection_onto_the_negative_cone():
    x = rand(5, 3, 3)
    sym = (x + x.mT) / 2
    got = negative_definite(x)
    assert torch.linalg.eigvalsh(got).max() < 1e-12
    # Moreau: what is left is positive semi-definite and orthogonal to the projection.
    assert torch.linalg.eigvalsh(sym - got).min() > -1e-12
    torch.testing.assert_close((got * (sym - got)).sum((1, 2)), torch.zeros(5, dtype=F64), atol=1e-10, rtol=0)
    torch.testing.assert_close(negative_definite(-x @ x.mT), -x @ x.mT)


@pytest.mark.parametrize("kind", ["hessian", "gauss-newton", "none"])
def test_expansion_of_the_critic(kind):
    torch.manual_seed(0)
    obs, a = rand(5, 3), 0.5 * rand(5, 2, seed=1)
    agent = GAC(3, 2, -1.0, 1.0, hidden=(16, 16), curvature=kind)
    agent.critic.double()
    grad, hess = agent.expand(obs, a)
    slope = torch.autograd.functional.jacobian(lambda x: agent.critic(torch.cat((obs, x), 1)).sum(), a)
    bend = torch.autograd.functional.hessian(lambda x: agent.critic(torch.cat((obs, x), 1)).sum(), a)  # [5, 2, 5, 2]
    torch.testing.assert_close(grad, slope)
    for b in range(5):
        want = bend[b, :, b] if kind == "hessian" else -torch.outer(slope[b], slope[b]) * (kind != "none")
        torch.testing.assert_close(hess[b], negative_definite(want))


@pytest.mark.parametrize(("curvature", "expand_at"), [("hessian", "sample"), ("gauss-newton", "mean")])
def test_the_agent_climbs_to_the_best_action_of_a_bandit(bandit, curvature, expand_at):
    torch.manual_seed(0)
    agent = GAC(
        2, 1, -2.0, 4.0, hidden=(32, 32), lr=3e-3, curvature=curvature, expand_at=expand_at, batch_size=128, warmup=200, reward_scale=0.1
    )
    agent.fit(bandit(16, lambda a: -((a - 2.2) ** 2)), 16 * 620, seed=0)  # in unit actions: the best is 0.4
    obs = np.random.default_rng(0).uniform(-1, 1, (100, 2)).astype(np.float32)
    assert np.abs(agent.act(obs, deterministic=True) - 2.2).max() < 0.3
    assert 0.095 < agent.cov.sqrt().item() < 0.6  # never below the final standard deviation
    spread = agent.act(np.zeros((4000, 2))) - agent.act(np.zeros((4000, 2)), deterministic=True)
    assert np.std(spread) == pytest.approx(3 * agent.cov.sqrt().item(), rel=0.05)


def test_the_critics_target_is_the_reward_plus_the_value_of_a_drawn_action():
    torch.manual_seed(0)
    agent, g = GAC(3, 2, -2.0, 2.0, hidden=(8, 8)), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in agent.target_critic.parameters():
            p.add_(0.3)
    obs, after, returns = (torch.randn(*shape, generator=g) for shape in ((16, 3), (16, 3), (16,)))
    batch = {"obs": obs, "next_obs": after, "actions": 4 * torch.rand(16, 2, generator=g) - 2, "returns": returns}
    batch["discounts"] = torch.tensor([0.9] * 12 + [0.0] * 4)
    state = agent.generator.get_state()
    noise = torch.randn(16, 2, generator=agent.generator)
    with torch.no_grad():
        drawn = (agent.actor(after).clamp(-1, 1) + 0.6 * noise).clamp(-1, 1)  # 0.6: the standard deviation at the start
        value = agent.target_critic(torch.cat((after, drawn), 1)).squeeze(1)
        q = agent.critic(torch.cat((obs, batch["actions"] / 2), 1)).squeeze(1)
    assert value.abs().mean() > 0.3
    wanted = 0.5 * (q - returns - batch["discounts"] * value).square().mean()
    agent.generator.set_state(state)
    assert agent.update(batch)["critic_loss"] == pytest.approx(float(wanted), rel=1e-4)


def test_bad_input():
    mean, cov, grad, hess, a0 = problem()
    for call in (lambda: guide_actor(mean, cov, grad, hess, a0, 0.0, 0.1), lambda: guide_actor(mean, cov, grad, hess, a0, 1.0, -0.1),
                 lambda: guide_actor(mean, cov[:, :2], grad, hess, a0, 1.0, 0.1), lambda: guide_actor(mean, cov, grad, -hess, a0, 1e-3, 0.1),
                 lambda: guide_actor(mean, -cov, grad, hess, a0, 1.0, 0.1), lambda: gac_dual(mean, cov, grad, hess, a0, 1.0, 0.1, -1.0, 0.0),
                 lambda: solve_dual(mean, cov, grad, hess, a0, 0.0, 0.0), lambda: solve_dual(mean, cov, grad, -hess, a0, 0.1, 0.0),
                 lambda: negative_definite(torch.ones(2, 3)),
                 lambda: GAC(2, 1, -1.0, 1.0, epsilon=0.0), lambda: GAC(2, 1, -1.0, 1.0, std=0.1, final_std=0.2),
                 lambda: GAC(2, 1, -1.0, 1.0, curvature="newton")):  # fmt: skip
        with pytest.raises(ValueError, match=r"got|must be"):
            call()
