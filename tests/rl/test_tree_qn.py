"""The backup against a recursive tree in plain Python, closed forms and limits; the network's layout; the agent's two losses."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from dlatlas.rl.envs.grids import PushBox
from dlatlas.rl.envs.toy import Chain
from dlatlas.rl.kit.value_agent import DQN
from dlatlas.rl.tree_qn import ATreeC, TreeQN, TreeQNAgent, path_rewards, soft_backup, tree_backup

D = torch.float64


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def tree(depth=3, actions=3, count=2):
    rewards = [torch.randn(count, actions**level, actions, dtype=D) for level in range(depth)]
    values = [torch.randn(count, actions ** (level + 1), dtype=D) for level in range(depth)]
    return rewards, values


def recursive(rewards, values, gamma, lam, b, level, node, hard=False):
    """Q of one node's actions, by recursion over its children."""
    actions = rewards[0].shape[-1]
    out = []
    for a in range(actions):
        child = node * actions + a
        value = float(values[level][b, child])
        if level + 1 < len(rewards):
            below = recursive(rewards, values, gamma, lam, b, level + 1, child, hard)
            weights = [math.exp(q) for q in below]
            soft = max(below) if hard else sum(w * q for w, q in zip(weights, below)) / sum(weights)
            value = (1 - lam) * value + lam * soft
        out.append(float(rewards[level][b, node, a]) + gamma * value)
    return out


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_backup_by_recursion(depth):
    rewards, values = tree(depth)
    q = tree_backup(rewards, values, 0.9, 0.7)
    np.testing.assert_allclose(q.numpy(), [recursive(rewards, values, 0.9, 0.7, b, 0, 0) for b in range(2)], rtol=1e-12)


def test_large_values_turn_the_soft_maximum_into_the_hard_one():
    rewards, values = tree()
    big = [[1e4 * x for x in part] for part in (rewards, values)]
    hard = [recursive(rewards, values, 0.9, 1.0, b, 0, 0, hard=True) for b in range(2)]
    np.testing.assert_allclose(tree_backup(*big, 0.9, 1.0).numpy() / 1e4, hard, rtol=1e-6)
    q = torch.randn(5, 4, dtype=D)
    torch.testing.assert_close(soft_backup(1e4 * q) / 1e4, q.max(1).values)
    torch.testing.assert_close(soft_backup(1e-6 * q) / 1e-6, q.mean(1), rtol=0, atol=1e-5)


def test_no_backup_is_one_step_and_constants_have_a_closed_form():
    rewards, values = tree()
    torch.testing.assert_close(tree_backup(rewards, values, 0.9, 0.0), rewards[0][:, 0] + 0.9 * values[0])
    r, v, gamma, lam = 0.3, -1.2, 0.9, 0.6
    constant = tree_backup([torch.full_like(x, r) for x in rewards], [torch.full_like(x, v) for x in values], gamma, lam)
    q = r + gamma * v  # all children are equal, so soft_backup is exact
    for _ in range(2):
        q = r + gamma * ((1 - lam) * v + lam * q)
    torch.testing.assert_close(constant, torch.full((2, 3), q, dtype=D))


def test_gradients_of_the_backup():
    rewards, values = tree(2, 2)
    inputs = [x.requires_grad_() for x in (*rewards, *values)]
    assert torch.autograd.gradcheck(lambda *x: tree_backup(x[:2], x[2:], 0.9, 0.7), inputs)


def make(cls=TreeQN, depth=2, **kw):
    return cls(nn.Sequential(nn.Flatten(), nn.Linear(5, 6), nn.Tanh()), 6, 3, depth=depth, **kw).double()


def test_the_tree_is_the_one_of_the_equations_in_the_promised_layout():
    net, obs = make(depth=3, gamma=0.8, lam=0.5), torch.randn(4, 5, dtype=D)
    plan = net.plan(obs)
    W, Wa = (p.detach().numpy() for p in (net.environment.weight, net.action.weight))
    unit = lambda z: z / np.linalg.norm(z)  # noqa: E731

    def child(z, a):
        shared = z + np.tanh(W @ z)
        return unit(shared + np.tanh(Wa[6 * a : 6 * a + 6] @ shared))

    for b in range(4):
        root = unit(net.encoder(obs)[b].detach().numpy())
        for path in ((0, 0, 0), (2, 1, 0), (1, 2, 2)):
            z, node = root, 0
            for level, a in enumerate(path):
                r = net.reward(torch.from_numpy(z)).detach().numpy()
                np.testing.assert_allclose(plan["rewards"][level][b, node].detach().numpy(), r, rtol=1e-9)
                z, node = child(z, a), 3 * node + a
                v = net.value(torch.from_numpy(z)).item()
                np.testing.assert_allclose(plan["values"][level][b, node].item(), v, rtol=1e-9)
    torch.testing.assert_close(net(obs), tree_backup(plan["rewards"], plan["values"], 0.8, 0.5))
    torch.testing.assert_close(net.encode(7 * obs).norm(dim=1), torch.ones(4, dtype=D))


def test_every_parameter_is_trained_and_a_deeper_tree_has_no_more_of_them():
    net = make()
    net(torch.randn(4, 5, dtype=D)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())
    count = lambda net: sum(p.numel() for p in net.parameters())  # noqa: E731
    assert count(make(depth=1)) == count(make(depth=3)) == 36 + 36 + 3 * 36 + 6 * 64 + 64 + 64 * 3 + 3 + 7


def test_actor_critic_tree():
    net, obs = make(ATreeC), torch.randn(4, 5, dtype=D)
    logits, value = net(obs)
    torch.testing.assert_close(logits, tree_backup(**net.plan(obs), gamma=0.99, lam=0.8))
    torch.testing.assert_close(value, net.critic(net.encode(obs))[:, 0])
    assert torch.autograd.grad(value.sum(), net.reward[0].weight, allow_unused=True) == (None,)  # the critic is a head of its own


def test_rewards_along_a_path():
    rewards, _ = tree(3, 3, 4)
    actions = torch.randint(3, (4, 3))
    out = path_rewards(rewards, actions)
    for b in range(4):
        node = 0
        for level in range(3):
            assert out[b, level] == rewards[level][b, node, actions[b, level]]
            node = 3 * node + int(actions[b, level])


def test_the_agents_targets_end_with_the_episode_and_the_segment():
    agent = TreeQNAgent(make(depth=3, gamma=0.9).float(), n=2)
    T, B = 4, 2
    dones, cuts, valid = torch.zeros(T, B), torch.zeros(T, B), torch.ones(T, B, dtype=torch.bool)
    dones[1, 0], cuts[2, 1] = 1, 1
    segment = {
        "obs": torch.arange(8.0).reshape(T, B, 1).expand(T, B, 5),
        "actions": torch.arange(8).reshape(T, B) % 3,
        "rewards": torch.arange(8.0).reshape(T, B),
        "next_values": torch.full((T, B), 100.0),
        "dones": dones, "truncations": cuts, "valid": valid,
    }  # fmt: skip
    out = agent.targets(segment)
    rows = dict(zip([(int(t), int(b)) for t, b in valid.nonzero()], range(8)))
    expected = {(0, 0): 2, (1, 0): 1, (2, 0): 2, (3, 0): 1, (0, 1): 3, (1, 1): 2, (2, 1): 1, (3, 1): 1}
    for (t, b), row in rows.items():
        assert out["seen"][row].tolist() == [k < expected[t, b] for k in range(3)]
        for k in range(expected[t, b]):
            assert out["rewards"][row, k] == segment["rewards"][t + k, b] and out["path"][row, k] == segment["actions"][t + k, b]
        assert out["obs"][row, 0] == 2 * t + b
    assert out["targets"][rows[0, 0]] == 0 + 0.9 * 2  # ended: no bootstrap
    assert out["targets"][rows[1, 1]] == pytest.approx(3 + 0.9 * 5 + 0.81 * 100)


def test_one_update_is_the_gradient_of_both_losses():
    agent = TreeQNAgent(make(depth=2).float(), reward_weight=0.5)
    batch = {
        "obs": torch.randn(6, 5), "actions": torch.randint(3, (6,)), "targets": torch.randn(6),
        "path": torch.randint(3, (6, 2)), "rewards": torch.randn(6, 2), "seen": torch.rand(6, 2) < 0.7,
    }  # fmt: skip
    q = agent.online(batch["obs"])[torch.arange(6), batch["actions"]]
    predicted = path_rewards(agent.online.plan(batch["obs"])["rewards"], batch["path"])
    parts = ((q - batch["targets"]) ** 2).mean(), ((predicted - batch["rewards"]) ** 2 * batch["seen"]).sum() / 6
    gradient = torch.autograd.grad(parts[0] + 0.5 * parts[1], agent.online.value.weight, retain_graph=True)[0]
    deep = torch.autograd.grad(parts[0] + 0.5 * parts[1], agent.online.reward[0].weight)[0]
    report = agent.update(batch)
    assert report == pytest.approx({"loss": parts[0].item(), "reward_loss": parts[1].item()}, rel=1e-5)
    torch.testing.assert_close(agent.online.value.weight.grad, gradient)
    torch.testing.assert_close(agent.online.reward[0].weight.grad, deep)


def test_agents_with_a_tree_learn_the_short_chain():
    encoder = lambda: nn.Sequential(nn.Linear(5, 16), nn.ReLU())  # noqa: E731
    agent = TreeQNAgent(TreeQN(encoder(), 16, 2), epsilon=(1.0, 0.1, 1000), lr=3e-3, segment=14)
    history = agent.fit(Chain(5).batch(16), 4000)
    assert np.mean(history["return"][-16:]) > 5
    x = torch.from_numpy(np.tri(5, dtype=np.float32))
    assert agent.act(x[1:], deterministic=True).tolist() == [1, 1, 1, 1]
    grounded = TreeQNAgent(TreeQN(encoder(), 16, 2), epsilon=(1.0, 1.0, 0), lr=1e-2, segment=14, reward_weight=100.0)
    grounded.fit(Chain(5).batch(16), 4000)  # random play, so that every reward is seen
    edges = grounded.online.plan(x)["rewards"]
    assert abs(edges[0][3, 0, 1] - 1) < 0.2 and edges[0][1:3].abs().max() < 0.2  # only the step into the last state pays
    assert abs(edges[1][2, 1, 1] - 1) < 0.2 and edges[1][2, 1, 0].abs() < 0.2  # seen one step ahead
    dqn = DQN(5, 2, network=TreeQN(encoder(), 16, 2), batch_size=16, warmup=32)
    assert np.isfinite(dqn.fit(Chain(5).batch(4), 100)["return"]).all()


def test_agent_runs_on_planes():
    env = PushBox(size=6, boxes=3, goals=2, obstacles=2, steps=30).batch(4)
    agent = TreeQNAgent(TreeQN(nn.Sequential(nn.Flatten(), nn.Linear(180, 8)), 8, 4), batch_size=32)
    assert np.isfinite(agent.fit(env, 160)["loss"]).all()


@pytest.mark.parametrize("bad", [{"depth": 0}, {"lam": 1.1}, {"lam": -0.1}, {"gamma": 2.0}, {"depth": 1.5}])
def test_bad_trees(bad):
    with pytest.raises(ValueError, match="must"):
        TreeQN(nn.Linear(5, 6), 6, 3, **bad)
    with pytest.raises(ValueError, match="must"):
        ATreeC(nn.Linear(5, 6), 6, 3, **bad)


def test_bad_arguments():
    rewards, values = tree(2)
    for arguments in ((rewards, values[:1]), ([], []), (rewards, values[::-1]), (rewards[::-1], values)):
        with pytest.raises(ValueError, match="level"):
            tree_backup(*arguments, 0.9, 0.5)
    with pytest.raises(ValueError, match="lam"):
        tree_backup(rewards, values, 0.9, 1.5)
    with pytest.raises(ValueError, match="encoder"):
        TreeQN(nn.Linear(5, 7), 6, 3)(torch.zeros(1, 5))
    with pytest.raises(ValueError, match="actions"):
        path_rewards(rewards, torch.zeros(2, 3).long())
    with pytest.raises(ValueError, match="reward_weight"):
        TreeQNAgent(make(), reward_weight=-1.0)
