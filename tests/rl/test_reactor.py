"""Distributional Retrace against a scalar recursion, the policy gradient by enumeration, and the agent's sequences."""

import copy
import math

import numpy as np
import pytest
import torch

from dlatlas.rl.envs.toy import Chain, SlipperyGrid
from dlatlas.rl.reactor import Reactor, beta_loo_loss, distributional_retrace, retrace_coefficients, retrace_mixture

D = torch.float64


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def sequences(n=4, b=6, a=3, k=41):
    """Random sequences whose returns stay inside the support."""
    pi = torch.randn(n, b, a, dtype=D).softmax(-1)
    mu = torch.randn(n, b, a, dtype=D).softmax(-1)
    actions = torch.randint(a, (n, b))
    discounts = torch.full((n, b), 0.9, dtype=D)
    discounts[1, 0] = 0  # one sequence ends in its second step
    rewards = torch.randn(n, b, dtype=D)
    probs = torch.randn(n, b, a, k, dtype=D).softmax(-1)
    pi_a, mu_a = (p.gather(2, actions[..., None])[..., 0] for p in (pi, mu))
    return torch.linspace(-20, 20, k, dtype=D), rewards, discounts, pi, actions, pi_a, mu_a, probs


def scalar_retrace(rewards, discounts, pi, actions, c, q):
    """Backwards: G_k = r_k + d_k (sum_a pi q - c q(a) + c G_{k+1}), plain loops; the last step bootstraps with sum_a pi q."""
    n, b = rewards.shape
    out = np.zeros(b)
    for i in range(b):
        g = None
        for k in range(n - 1, -1, -1):
            value = sum(pi[k, i, a] * q[k, i, a] for a in range(pi.shape[2]))
            if g is not None:
                value += c[k, i] * (g - q[k, i, actions[k, i]])
            g = rewards[k, i] + discounts[k, i] * value
        out[i] = g
    return out


@pytest.mark.parametrize("lam", [0.0, 0.7, 1.0])
def test_the_mean_of_the_target_is_scalar_retrace(lam):
    support, rewards, discounts, pi, actions, pi_a, mu_a, probs = sequences()
    c = retrace_coefficients(pi_a, mu_a, lam)
    target = distributional_retrace(support, rewards, discounts, pi, actions, c, probs)
    torch.testing.assert_close(target.sum(1), torch.ones(6, dtype=D))
    oracle = scalar_retrace(*(x.numpy() for x in (rewards, discounts, pi, actions, c, probs @ support)))
    np.testing.assert_allclose((target @ support).numpy(), oracle, rtol=1e-9)


def test_coefficients():
    pi, mu = torch.rand(3, 4, dtype=D), torch.rand(3, 4, dtype=D)
    np.testing.assert_allclose(retrace_coefficients(pi, mu, 0.5), 0.5 * np.minimum(1, pi.numpy() / mu.numpy()))


def test_weights_sum_to_one_whatever_comes_in_and_may_be_negative():
    _, _, _, pi, actions, _, _, _ = sequences()
    alpha = retrace_mixture(pi, actions, torch.rand(4, 6, dtype=D))
    torch.testing.assert_close(alpha.sum((0, 2)), torch.ones(6, dtype=D))
    assert alpha.min() < 0
    other = retrace_mixture(pi, actions.clone().index_fill_(0, torch.tensor([3]), 0), torch.rand(4, 6, dtype=D))
    c = torch.rand(4, 6, dtype=D)
    changed = c.clone()
    changed[-1] = 0.123  # the last coefficient is not used
    assert torch.equal(retrace_mixture(pi, actions, c), retrace_mixture(pi, actions, changed)) and other.shape == alpha.shape


def test_no_trace_is_the_one_step_expected_mixture():
    support, rewards, discounts, pi, actions, pi_a, mu_a, probs = sequences()
    c = retrace_coefficients(pi_a, mu_a, 0.0)
    long = distributional_retrace(support, rewards, discounts, pi, actions, c, probs)
    short = distributional_retrace(support, rewards[:1], discounts[:1], pi[:1], actions[:1], c[:1], probs[:1])
    torch.testing.assert_close(long, short)
    for i in range(6):  # expected SARSA: mix the next distributions by pi, shift, scale, project
        mixed = (pi[0, i, :, None] * probs[0, i]).sum(0)
        target = np.zeros(41)
        for p, z in zip(mixed.numpy(), support.numpy()):
            y = rewards[0, i].item() + discounts[0, i].item() * z
            target += p * np.clip(1 - np.abs(y - support.numpy()), 0, 1)
        np.testing.assert_allclose(short[i].numpy(), target, atol=1e-12)


def test_on_policy_with_certain_actions_the_target_is_the_whole_return():
    pi = torch.nn.functional.one_hot(torch.tensor([[0], [1], [0]]), 2).to(D)  # (3, 1, 2)
    actions, ones = torch.tensor([[0], [1], [0]]), torch.ones(3, 1, dtype=D)
    probs = torch.rand(3, 1, 2, 21, dtype=D)
    probs /= probs.sum(-1, keepdim=True)
    support = torch.linspace(-10, 10, 21, dtype=D)
    target = distributional_retrace(support, ones, ones, pi, actions, ones, probs)
    expected = torch.zeros(21, dtype=D)  # three rewards and the last distribution, moved by three atoms
    expected[3:] = probs[2, 0, 0, :18]
    expected[-1] += probs[2, 0, 0, 18:].sum()
    torch.testing.assert_close(target[0], expected)


def test_after_the_end_of_an_episode_nothing_counts():
    support, rewards, discounts, pi, actions, pi_a, mu_a, probs = sequences()
    c = retrace_coefficients(pi_a, mu_a)
    one = distributional_retrace(support, rewards, discounts, pi, actions, c, probs)[0]
    rewards[2:, 0], probs[1:, 0], actions[1:, 0] = 100.0, probs.flip(3)[1:, 0], 0
    two = distributional_retrace(support, rewards, discounts, pi, actions, c, probs)[0]
    torch.testing.assert_close(one, two)


@pytest.mark.parametrize("c", [math.inf, 2.0, 1.0])
def test_policy_gradient_by_enumeration(c):
    """E_mu[G] against sum_a R(a) grad pi(a); with beta = 1/mu it is unbiased however wrong Q is."""
    logits = torch.randn(1, 4, dtype=D, requires_grad=True)
    mu, q, returns = torch.randn(4, dtype=D).softmax(0), torch.randn(1, 4, dtype=D), torch.randn(4, dtype=D)
    mean = torch.zeros(1, 4, dtype=D)
    for a in range(4):
        loss = beta_loo_loss(logits, q, torch.tensor([a]), returns[[a]], mu[[a]], c)
        mean -= mu[a] * torch.autograd.grad(loss, logits)[0]
    (truth,) = torch.autograd.grad((returns * logits.softmax(1)).sum(), logits)
    weight = (mu * (1 / mu).clamp_max(c)).detach()  # what is left of R - Q
    (biased,) = torch.autograd.grad(((weight * (returns - q) + q) * logits.softmax(1)).sum(), logits)
    torch.testing.assert_close(mean, biased)
    assert torch.allclose(mean, truth) == (c == math.inf)


def test_only_the_policy_gets_a_gradient():
    tensors = [torch.rand(3, 2, requires_grad=True), torch.rand(3, 2, requires_grad=True), torch.rand(3, requires_grad=True)]
    beta_loo_loss(tensors[0], tensors[1], torch.zeros(3, dtype=torch.long), tensors[2], torch.ones(3)).backward()
    assert tensors[0].grad is not None and tensors[1].grad is None and tensors[2].grad is None


def test_bad_arguments():
    support, rewards, discounts, pi, actions, pi_a, mu_a, probs = sequences()
    with pytest.raises(ValueError, match="lam"):
        retrace_coefficients(pi_a, mu_a, 1.5)
    with pytest.raises(ValueError, match="mu_a"):
        retrace_coefficients(pi_a, torch.zeros_like(mu_a))
    with pytest.raises(ValueError, match="probabilities"):
        retrace_coefficients(-pi_a, mu_a)
    with pytest.raises(ValueError, match="sum to 1"):
        retrace_mixture(0.5 * pi, actions, pi_a)
    with pytest.raises(ValueError, match="actions and c"):
        retrace_mixture(pi, actions[:2], pi_a)
    with pytest.raises(ValueError, match="probs"):
        distributional_retrace(support, rewards, discounts, pi, actions, pi_a, probs[..., :5])
    with pytest.raises(ValueError, match="rewards"):
        distributional_retrace(support, rewards[:2], discounts, pi, actions, pi_a, probs)
    with pytest.raises(ValueError, match="mu must"):
        beta_loo_loss(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2).long(), torch.zeros(2), torch.zeros(2))
    with pytest.raises(ValueError, match="returns"):
        beta_loo_loss(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2).long(), torch.zeros(3), torch.ones(2))
    for bad in ({"lam": 2.0}, {"sequence": 0}, {"explore_rate": -0.1}, {"support": torch.tensor([0.0, 1, 3])}):
        with pytest.raises(ValueError, match="must"):
            Reactor(3, 2, **bad)


@pytest.mark.parametrize("prioritised", [False, True])
def test_sequences_of_the_memory_are_what_was_played(prioritised):
    """The ring wraps round; rows of one sequence follow each other in one copy, also across the ring's end."""
    env, played = Chain(5).batch(4), []
    agent = Reactor(5, 2, sequence=3, capacity=40, batch_size=64, warmup=20, hidden=(8,), prioritised=prioritised, refill_period=3)
    agent.fit(env, 4 * 33, callback=lambda a, h: played.append((a._mu.copy(), a.buffer._next)) and False)
    batch = agent.sample(400)
    obs, nxt, on = batch["obs"], batch["next_obs"], batch["goes_on"]
    assert obs.shape == (3, 400, 5) and batch["mu"].shape == (3, 400)
    where = obs.sum(2) - 1
    moved = (where + 2 * batch["actions"] - 1).clamp(0, 4)
    assert torch.equal(nxt.sum(2) - 1, moved)
    assert torch.equal(nxt[:-1][on[:-1]], obs[1:][on[:-1]])
    assert torch.equal(batch["rewards"], torch.where(moved == 4, 1.0, torch.where(moved == 0, 0.001, 0.0)))
    assert (~on[:-1]).any() and (obs[1:][~on[:-1]].sum(1) == 2).all()  # a cut is followed by the start state 1
    kept = torch.from_numpy(np.concatenate([mu for mu, _ in played[-10:]]))
    assert torch.equal(batch["mu"].unique(), kept.unique()[torch.isin(kept.unique(), batch["mu"])])
    # the youngest two rows cannot start a sequence of three
    assert not set(batch["idx"].tolist()) & {(agent.buffer._next - 1 - i) % 40 for i in range(8)}
    assert len(batch["idx"].unique()) == 32


def test_unknown_priorities_lie_between_their_neighbours():
    agent = Reactor(5, 2, sequence=2, capacity=40, batch_size=4, warmup=1000, hidden=(8,), prioritised=True, alpha=1.0)
    agent.fit(Chain(5).batch(4), 40)
    agent.updates = agent.refill_period
    agent._prioritise(torch.tensor([4, 20]), torch.tensor([1.0, 5.0]))  # copy 0 at times 1 and 5
    times = agent.tree[np.arange(0, 40, 4)]
    np.testing.assert_allclose(times, [1, 1, 2, 3, 4, 5, 5, 5, 5, 5])
    np.testing.assert_allclose(agent.tree[np.arange(1, 40, 4)], 1.0)  # another copy, nothing known
    agent._remember({**{k: v[:4].numpy() for k, v in agent.buffer.storage.items() if k != "mu"}})
    assert not agent._known[:4].any() and agent._known[4]


def test_agent_learns_the_short_chain_and_a_stochastic_grid():
    agent = Reactor(
        5, 2, support=torch.linspace(0, 12, 25), batch_size=64, warmup=200, capacity=4000, hidden=(32,), lr=3e-3, target_period=20
    )
    history = agent.fit(Chain(5).batch(8), 8 * 300)
    assert agent.act(np.tri(5, dtype=np.float32)[1:], deterministic=True).tolist() == [1, 1, 1, 1]
    assert np.mean(history["return"][-8:]) > np.mean(history["return"][:8]) and np.isfinite(history["critic_loss"]).all()
    again = Reactor(25, 4, support=torch.linspace(-1, 1, 21), batch_size=32, warmup=100, capacity=800, hidden=(16,), prioritised=True)
    assert np.isfinite(again.fit(SlipperyGrid().batch(4), 4 * 80)["return"]).all()


def test_a_run_is_decided_by_its_seed_and_odd_memories_are_refused():
    def run(seed):
        torch.manual_seed(7)
        agent = Reactor(5, 2, batch_size=16, warmup=40, capacity=400, hidden=(8,), prioritised=True)
        agent.fit(Chain(5).batch(4), 200, seed=seed)
        return torch.cat([p.flatten() for p in agent.online.parameters()])

    assert torch.equal(run(1), run(1)) and not torch.equal(run(1), run(2))
    with pytest.raises(ValueError, match="multiple"):
        Reactor(5, 2, capacity=39).fit(Chain(5).batch(4), 8)


def test_unknown_priorities_are_interpolated_as_priorities_and_not_as_their_powers():
    agent = Reactor(5, 2, sequence=2, capacity=40, batch_size=4, warmup=1000, hidden=(8,), prioritised=True, alpha=0.5)
    agent.fit(Chain(5).batch(4), 40)
    agent.updates = agent.refill_period
    agent._prioritise(torch.tensor([4, 20]), torch.tensor([1.0, 5.0]))
    np.testing.assert_allclose(agent.tree[np.arange(0, 40, 4)], np.sqrt([1, 1, 2, 3, 4, 5, 5, 5, 5, 5]))


@pytest.mark.parametrize("weighted", [False, True])
def test_one_update_against_losses_by_hand(weighted):
    """A batch made by hand: actions and probabilities of row k + 1 belong to the state after row k, and a cut ends the trace."""
    agent = Reactor(4, 3, support=torch.linspace(-6, 6, 25), sequence=3, hidden=(8,), lam=0.9, beta_clip=2.0, entropy=0.05)
    with torch.no_grad():
        for p in agent.online.parameters():
            p.add_(0.5 * torch.randn_like(p))
        for p in agent.target.parameters():
            p.add_(0.5 * torch.randn_like(p))
        agent.target.value.bias.copy_(-agent.support.square().repeat(3))  # little mass at the ends, where targets are clipped
    n, b = 3, 5
    obs, nxt = torch.randn(n, b, 4), torch.randn(n, b, 4)
    batch = dict(obs=obs, next_obs=nxt, actions=torch.randint(3, (n, b)), mu=0.1 + 0.8 * torch.rand(n, b), rewards=0.3 * torch.randn(n, b))
    batch |= dict(discounts=torch.full((n, b), 0.9), goes_on=torch.ones(n, b, dtype=torch.bool), weights=torch.ones(b))
    batch["goes_on"][0, 1], batch["discounts"][1, 2] = False, 0.0
    if weighted:
        batch["weights"] = torch.linspace(0.1, 1.0, b)
    with torch.no_grad():
        pi = agent.online(nxt.flatten(0, 1))[0].softmax(-1).view(n, b, 3)
        q_next = (agent.target(nxt.flatten(0, 1))[1].softmax(-1) @ agent.support).view(n, b, 3)
        logits, q_logits = agent.online(obs[0])
    goal, i = torch.zeros(b), torch.arange(b)
    for j in range(b):  # backwards: what was done at x_{t+k+1} is in row k + 1
        g = None
        for k in (2, 1, 0):
            value = float(pi[k, j] @ q_next[k, j])
            if g is not None:
                a = int(batch["actions"][k + 1, j])
                c = 0.9 * min(1.0, float(pi[k, j, a] / batch["mu"][k + 1, j])) * float(batch["goes_on"][k, j])
                value += c * (g - float(q_next[k, j, a]))
            g = float(batch["rewards"][k, j]) + float(batch["discounts"][k, j]) * value
        goal[j] = g
    a, q = batch["actions"][0], q_logits.softmax(-1) @ agent.support
    beta, p = (1 / batch["mu"][0]).clamp_max(2.0), logits.softmax(-1)
    policy_loss = -(beta * (goal - q[i, a]) * p[i, a] + (q * p).sum(1)).mean()
    # the cross-entropy is linear in the target: weight times the loss of every transition by itself
    one = [agent_loss(agent, {k: (x[:, [j]] if x.dim() > 1 else torch.ones(1)) for k, x in batch.items()}) for j in range(b)]
    report = agent.update(batch)
    assert report["policy_loss"] == pytest.approx(float(policy_loss), rel=1e-3, abs=1e-3)
    assert report["critic_loss"] == pytest.approx(float((batch["weights"] * torch.tensor(one)).mean()), rel=1e-4)


def agent_loss(agent, batch):
    """The critic loss that a copy of the agent reports for a batch."""
    return copy.deepcopy(agent).update(batch)["critic_loss"]


def test_targets_of_mixed_precision():
    support, rewards, discounts, pi, actions, pi_a, mu_a, probs = sequences()
    c = retrace_coefficients(pi_a, mu_a)
    exact = distributional_retrace(support, rewards, discounts, pi, actions, c, probs)
    mixed = distributional_retrace(support.float(), rewards, discounts, pi.float(), actions, c, probs.float())
    torch.testing.assert_close(mixed.double(), exact, rtol=1e-4, atol=1e-5)
