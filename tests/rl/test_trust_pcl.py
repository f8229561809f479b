"""Trust-PCL against an exact soft solution, a loop in NumPy and an independent divergence."""

import numpy as np
import pytest
import torch
from gymnasium import spaces

from dlatlas.rl.envs import BatchedEnv
from dlatlas.rl.kit.nets import SquashedGaussian, draw
from dlatlas.rl.trust_pcl import TrustPCL, lambda_for_kl, path_consistency, trust_pcl_loss

F64 = torch.float64


class Clock(BatchedEnv):
    """Observes (copy, episode, time); copy k terminates after 3 + k steps, all are cut after 6; the reward is 100 episode + time."""

    def __init__(self, num_envs):
        super().__init__(num_envs, spaces.Box(-1.0, 1e4, (3,)), spaces.Box(-1.0, 1.0, (1,)), 6)
        self.episode = np.full(num_envs, -1)

    def _begin(self, which):
        self.episode[which] += 1

    def _advance(self, actions):
        return 100.0 * self.episode + self.t, self.t + 1 >= 3 + self.copies

    def _observe(self):
        return np.stack([self.copies, self.episode, self.t], 1).astype(np.float32)


def rand(*shape, seed=0):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def soft_solution(P, R, prior, gamma, tau, lam):
    """Value and policy that are optimal for reward - tau log pi - lam (log pi - log prior), by plain iteration."""
    V, T = np.zeros(len(P)), tau + lam
    for _ in range(4000):
        x = (R + gamma * P @ V + lam * np.log(prior)) / T
        V = T * (np.log(np.exp(x - x.max(1, keepdims=True)).sum(1)) + x.max(1))
    return V, np.exp(x - V[:, None] / T)


def deterministic_mdp(S=6, A=3, seed=0):
    rng = np.random.default_rng(seed)
    after = rng.integers(0, S, (S, A))
    return np.eye(S)[after], after, rng.normal(size=(S, A)), rng.dirichlet(np.ones(A), S)


@pytest.mark.parametrize("gamma", [0.5, 0.95, 1.0])
@pytest.mark.parametrize("d", [1, 4, 11])
def test_in_numpy(gamma, d):
    v0, vd, r, logp, prior = rand(5), rand(5, seed=1), rand(d, 5, seed=2), rand(d, 5, seed=3), rand(d, 5, seed=4)
    want = []
    for b in range(5):
        c = -v0[b].item() + gamma**d * vd[b].item()
        for i in range(d):
            c += gamma**i * (r[i, b] - 0.3 * logp[i, b] - 0.7 * (logp[i, b] - prior[i, b])).item()
        want.append(c)
    got = path_consistency(v0, vd, r, logp, prior, gamma, 0.3, 0.7)
    np.testing.assert_allclose(got.numpy(), want)
    assert trust_pcl_loss(v0, vd, r, logp, prior, gamma, 0.3, 0.7).item() == pytest.approx(np.mean(np.square(want)) / 2)


@pytest.mark.parametrize(("tau", "lam"), [(0.3, 0.0), (0.0, 0.5), (0.2, 0.4)])
@pytest.mark.parametrize("gamma", [0.6, 0.9])
def test_the_exact_solution_is_consistent_along_any_path(tau, lam, gamma):
    P, after, R, prior = deterministic_mdp()
    V, pi = soft_solution(P, R, prior, gamma, tau, lam)
    rng = np.random.default_rng(1)
    for d in (1, 3, 9):
        s, path = rng.integers(0, 6, 20), []
        first = s
        for _ in range(d):
            a = rng.integers(0, 3, 20)  # not the policy's actions
            path.append((R[s, a], np.log(pi[s, a]), np.log(prior[s, a])))
            s = after[s, a]
        r, logp, logq = (torch.tensor(np.array(x)) for x in zip(*path))
        c = path_consistency(torch.tensor(V[first]), torch.tensor(V[s]), r, logp, logq, gamma, tau, lam)
        torch.testing.assert_close(c, torch.zeros(20, dtype=F64), atol=1e-9, rtol=0)


def test_a_large_price_makes_the_prior_optimal():
    P, _, R, prior = deterministic_mdp()
    _, pi = soft_solution(P, R, prior, 0.9, 0.0, 1e6)
    np.testing.assert_allclose(pi, prior, atol=1e-4)
    v, zero = torch.zeros(4, dtype=F64), torch.zeros(3, 4, dtype=F64)
    logp = rand(3, 4)
    assert path_consistency(v, v, zero, logp, logp, 0.9, 0.0, 1e6).abs().max() < 1e-8


def test_without_prior_it_is_path_consistency_learning():
    """lam = 0 is PCL, and so is any lam with a uniform prior once its constant lam log(1/A) is counted as reward."""
    v0, vd, r, logp = rand(5), rand(5, seed=1), rand(4, 5, seed=2), rand(4, 5, seed=3)
    uniform = torch.full((4, 5), -np.log(3.0), dtype=F64)
    pcl = path_consistency(v0, vd, r, logp, uniform, 0.9, 0.5, 0.0)
    torch.testing.assert_close(path_consistency(v0, vd, r + 0.3 * np.log(3.0), logp, uniform, 0.9, 0.2, 0.3), pcl)


def test_gradients_flow_to_policy_and_both_values_and_not_to_the_prior():
    args = [rand(5), rand(5, seed=1), rand(4, 5, seed=2), rand(4, 5, seed=3), rand(4, 5, seed=4)]
    leaves = [x.requires_grad_() for x in args]
    c = path_consistency(*leaves, 0.9, 0.3, 0.7).detach() / 5
    trust_pcl_loss(*leaves, 0.9, 0.3, 0.7).backward()
    torch.testing.assert_close(leaves[0].grad, -c)
    torch.testing.assert_close(leaves[1].grad, 0.9**4 * c)
    torch.testing.assert_close(leaves[3].grad, -torch.stack([0.9**i * c for i in range(4)]))
    assert leaves[4].grad is None


@pytest.mark.parametrize("epsilon", [0.01, 0.3, 2.0])
def test_the_price_has_the_divergence_asked_for(epsilon):
    returns = 50 * np.random.default_rng(0).normal(size=100) - 400
    lam = lambda_for_kl(torch.tensor(returns), epsilon)
    w = torch.softmax(torch.tensor(returns / lam), 0)
    uniform = torch.distributions.Categorical(probs=torch.ones(100, dtype=F64))
    assert torch.distributions.kl_divergence(torch.distributions.Categorical(probs=w), uniform).item() == pytest.approx(epsilon, rel=1e-6)


def test_prices_out_of_reach():
    returns = np.arange(10.0)
    assert lambda_for_kl(returns, np.log(10) + 0.01) == 1e-6
    assert lambda_for_kl(returns, np.log(10) + 0.01, lo=0.5) == 0.5
    assert lambda_for_kl(returns, 0.0) == 1e6
    assert lambda_for_kl(np.full(4, 2.0), 0.1) == 1e-6  # equal returns: no weights diverge
    assert lambda_for_kl(np.array([0.0, 1.0, 1.0]), np.log(3 / 2) + 0.01) == 1e-6  # a shared best return: log(3/2) is all there is
    assert lambda_for_kl(3 * returns, 0.5) == pytest.approx(
        3 * lambda_for_kl(returns + 100, 0.5)
    )  # scales with the returns, shifts do not matter


@pytest.mark.parametrize("capacity", [1000, 103])  # 103: the ring overwrites, and not at a multiple of the copies
def test_paths_from_the_memory(capacity):
    torch.manual_seed(0)
    agent = TrustPCL(3, 1, d=4, gamma=0.9, hidden=(8, 8), capacity=capacity, warmup=10**6)
    agent.fit(Clock(5), 5 * 40, seed=0)
    batch = agent.sample(2000)
    obs, alive = batch["obs"], batch["alive"]
    length = alive.sum(0).long()
    assert set(length.tolist()) == {1, 2, 3, 4} and (alive[0] == 1).all() and (alive[1:] <= alive[:-1]).all()
    for i in range(2000):
        m, (copy_, episode, time) = int(length[i]), obs[0, i].tolist()
        want = torch.tensor([[copy_, episode, time + k] for k in range(m)])
        torch.testing.assert_close(obs[:m, i], want)
        torch.testing.assert_close(batch["rewards"][:, i], torch.cat((100 * want[:, 1] + want[:, 2], torch.zeros(4 - m))))
        torch.testing.assert_close(batch["last_obs"][i], torch.tensor([copy_, episode, time + m]))
        ends = time + m == min(3 + copy_, 6)
        assert m == 4 or ends or episode == agent.buffer.storage["obs"][:, 1][agent.buffer.storage["obs"][:, 0] == copy_].max()
        dead = ends and 3 + copy_ <= 6
        assert batch["last_discount"][i].item() == pytest.approx(0 if dead else 0.9 ** (m - 4), rel=1e-5)


@pytest.mark.parametrize("ends", [True, False])
def test_paths_where_all_observations_look_alike(ends):
    """What looks like one path goes neither past a terminal state nor past the newest row of the memory."""

    class Still(Clock):
        def _advance(self, actions):
            return np.ones(self.num_envs), np.full(self.num_envs, ends)

        def _observe(self):
            return np.zeros((self.num_envs, 3), np.float32)

    agent = TrustPCL(3, 1, d=4, hidden=(8, 8), warmup=10**6)
    agent.fit(Still(5), 15, seed=0)
    batch = agent.sample(200)
    assert batch["alive"].sum(0).max() == (1 if ends else 3)
    assert (batch["last_discount"] == 0).all() == ends


def test_an_update_is_the_consistency_of_each_path_at_its_own_length():
    torch.manual_seed(0)
    agent = TrustPCL(3, 1, -1.0, 1.0, d=4, gamma=0.9, tau=0.3, lam=0.7, epsilon=None, hidden=(8, 8), warmup=10**6, batch_size=30)
    agent.fit(Clock(5), 5 * 20, seed=0)
    with torch.no_grad():
        for p in agent.prior.parameters():
            p.add_(0.1 * torch.randn(p.shape))
    batch = agent.sample()
    total = 0.0
    for i in range(30):
        m = int(batch["alive"][:, i].sum())
        laws = [
            torch.distributions.TransformedDistribution(net(batch["obs"][:m, i]).base_dist, torch.distributions.TanhTransform())
            for net in (agent.policy, agent.prior)
        ]
        logp, logq = (law.log_prob(batch["actions"][:m, i]).sum(-1) for law in laws)
        end = float(batch["last_discount"][i] > 0) * agent.value(batch["last_obs"][i])
        c = path_consistency(
            agent.value(batch["obs"][:1, i]).view(1),
            end.view(1),
            batch["rewards"][:m, i : i + 1],
            logp[:, None],
            logq[:, None],
            0.9,
            0.3,
            0.7,
        )
        total += c.item() ** 2 / 2 / 30
    assert agent.update(batch)["loss"] == pytest.approx(total, rel=1e-4)


def test_the_price_follows_the_returns():
    torch.manual_seed(0)
    agent = TrustPCL(3, 1, epsilon=0.1, window=7, reward_scale=0.01, hidden=(8, 8), warmup=10**6, lam_bounds=(1e-3, 1e3))
    history = agent.fit(Clock(5), 200, seed=0)
    returns, lengths = (np.array(history[name][-7:]) for name in ("return", "length"))
    mean = lengths.mean()
    scores = 0.01 * returns / lengths * (1 - 0.99**mean) / 0.01
    want = pytest.approx(lambda_for_kl(scores, 0.1 * mean, 1e-3, 1e3))
    assert agent.lam == want and 1e-3 < agent.lam < 1e3
    fixed = TrustPCL(3, 1, epsilon=None, lam=0.4, hidden=(8, 8), warmup=10**6)
    calls = []
    fixed.fit(Clock(5), 50, callback=lambda a, h: calls.append(a))
    assert fixed.lam == 0.4 and calls == [fixed] * 10


def test_actions_can_be_drawn_for_networks_on_another_device():
    """The agent's generator lives with the processor; "meta" stands for any other device."""
    mean, g = torch.zeros(5, 2, device="meta"), torch.Generator()
    squashed = SquashedGaussian(mean, mean)
    normal = torch.distributions.Independent(torch.distributions.Normal(mean, torch.ones_like(mean), validate_args=False), 1)
    for sample in (squashed.rsample(generator=g), draw(squashed, g), draw(normal, g)):
        assert sample.device.type == "meta" and sample.shape == (5, 2)
    here = SquashedGaussian(torch.zeros(5, 2), torch.zeros(5, 2))
    torch.testing.assert_close(
        here.rsample(generator=torch.Generator().manual_seed(1)), torch.tanh(torch.randn(5, 2, generator=torch.Generator().manual_seed(1)))
    )


def test_the_agent_climbs_to_the_best_action_of_a_bandit(bandit):
    torch.manual_seed(0)
    agent = TrustPCL(
        2,
        1,
        -2.0,
        4.0,
        d=3,
        lag=0.9,
        tau=0.05,
        epsilon=None,
        lam=1.0,
        hidden=(32, 32),
        lr=5e-3,
        value_lr=2e-2,
        reward_scale=0.1,
        batch_size=128,
        warmup=200,
    )
    agent.fit(bandit(16, lambda a: -((a - 2.2) ** 2)), 16 * 500, seed=0)
    obs = np.random.default_rng(0).uniform(-1, 1, (100, 2)).astype(np.float32)
    assert np.abs(agent.act(obs, deterministic=True) - 2.2).max() < 0.4
    gap = [(p - q).abs().max().item() for p, q in zip(agent.policy.parameters(), agent.prior.parameters())]
    assert 0 < max(gap) < 0.5


def test_bad_input():
    v, x = torch.ones(3), torch.ones(2, 3)
    for call in (lambda: path_consistency(v, v, x, x, torch.ones(3, 2), 0.9, 0, 1), lambda: path_consistency(torch.ones(2), v, x, x, x, 0.9, 0, 1),
                 lambda: path_consistency(v, v, x, x, x, 1.1, 0, 1), lambda: path_consistency(v, v, x, x, x, 0.9, -1, 1),
                 lambda: path_consistency(v, v, x, x, x, 0.9, 0, -1), lambda: path_consistency(v[:0], v[:0], x[:, :0], x[:, :0], x[:, :0], 0.9, 0, 1),
                 lambda: lambda_for_kl(np.ones(0), 0.1), lambda: lambda_for_kl(np.ones(3), -1), lambda: lambda_for_kl(np.ones(3), 1, lo=2, hi=1),
                 lambda: lambda_for_kl(np.array([1.0, np.nan]), 1), lambda: TrustPCL(2, 1, d=0), lambda: TrustPCL(2, 1, lag=1.5),
                 lambda: TrustPCL(2, 1, tau=-1)):  # fmt: skip
        with pytest.raises(ValueError, match="got"):
            call()
    with pytest.raises(ValueError, match="n_step must be 1"):
        TrustPCL(2, 1, n_step=2)
