"""Everything that steps environments: all ways of resetting give the same transitions, in segments, memories, agents and scores."""

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv
from scipy.stats import trim_mean
from torch.distributions import Categorical

from dlatlas.rl.kit.actor_critic import DDPG, ActorCriticAgent
from dlatlas.rl.kit.agent import ReplayAgent, copy_, polyak_
from dlatlas.rl.kit.evaluate import aggregate, evaluate
from dlatlas.rl.kit.nets import ActorCritic, GaussianPolicy
from dlatlas.rl.kit.rollout import SameStep, as_vector, collect, make_vec, to_action_space, true_next
from dlatlas.rl.kit.value_agent import DQN, greedy_episodes, solved_after


class Counter(gymnasium.Env):
    """Observes (episode, time, action taken last); action 1 terminates from time 3 on, time 5 truncates."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (3,), np.float32)
    action_space = gymnasium.spaces.Discrete(2)

    def __init__(self):
        self.episode = -1

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episode, self.time = self.episode + 1, 0
        return np.array([self.episode, 0, -1], np.float32), {}

    def step(self, action):
        self.time += 1
        terminated = bool(action == 1 and self.time >= 3)
        return np.array([self.episode, self.time, action], np.float32), float(self.time), terminated, self.time >= 5 and not terminated, {}


def sync(mode, n=4):
    return SyncVectorEnv([Counter] * n, autoreset_mode=mode)


class Opaque(VectorEnv):
    """A vector environment that resets in the next step and cannot be reset in part."""

    def __init__(self):
        self.inner = sync(AutoresetMode.NEXT_STEP)
        self.num_envs, self.metadata = 4, {"autoreset_mode": AutoresetMode.NEXT_STEP}
        self.single_observation_space, self.single_action_space = self.inner.single_observation_space, self.inner.single_action_space
        self.observation_space, self.action_space = self.inner.observation_space, self.inner.action_space

    def reset(self, *, seed=None, options=None):
        assert options is None
        return self.inner.reset(seed=seed)

    def step(self, actions):
        return self.inner.step(actions)


def transitions(vec, steps, seed=0):
    """The transitions of every copy, with actions that depend only on the observation."""
    obs, _ = vec.reset(seed=0)
    seen = [[] for _ in range(vec.num_envs)]
    for _ in range(steps):
        actions = ((obs[:, 0] * 3 + obs[:, 1] + np.arange(vec.num_envs)) % 7 == 0).astype(int)
        new, rewards, terminated, truncated, info = vec.step(actions)
        for b in range(vec.num_envs):
            if info["valid"][b]:
                seen[b].append((obs[b].tolist(), int(actions[b]), rewards[b], info["final_obs"][b].tolist(), terminated[b], truncated[b]))
        obs = new
    return seen


@pytest.mark.parametrize("make", [*(lambda m=m: sync(m) for m in AutoresetMode), Opaque, lambda: [Counter() for _ in range(4)]])
def test_all_modes_give_the_same_transitions(make):
    """Against four environments stepped by hand."""
    env = make()
    vec = make_vec(Counter, 4) if isinstance(env, list) else as_vector(env)
    assert vec.metadata["autoreset_mode"] == AutoresetMode.SAME_STEP
    seen = transitions(vec, 60)
    for b in range(4):
        env = Counter()
        obs, _ = env.reset(seed=0)
        assert 40 < len(seen[b]) <= 60
        for row in seen[b]:
            action = int((obs[0] * 3 + obs[1] + b) % 7 == 0)
            new, reward, terminated, truncated, _ = env.step(action)
            assert row == (obs.tolist(), action, reward, new.tolist(), terminated, truncated)
            obs = env.reset()[0] if terminated or truncated else new
    ends = [(row[4], row[5]) for b in range(4) for row in seen[b]]
    assert (True, False) in ends and (False, True) in ends


def test_a_mode_must_be_declared():
    env = Opaque()
    env.metadata = {}
    with pytest.raises(ValueError, match="autoreset_mode"):
        as_vector(env)
    with pytest.raises(ValueError, match="reset"):
        make_vec(Counter, 2).step(np.zeros(2, int))


def test_true_next_of_plain_vector_environments():
    env = sync(AutoresetMode.SAME_STEP, 2)
    env.reset(seed=0)
    for _ in range(2):
        env.step(np.array([1, 0]))
    obs, _, terminated, _, info = env.step(np.array([1, 0]))
    assert terminated.tolist() == [True, False] and obs[0].tolist() == [1, 0, -1]
    assert true_next(obs, info).tolist() == [[0, 3, 1], [0, 3, 0]]
    assert true_next(obs, {}) is obs


def test_what_makes_copies():
    class Batched(Opaque):
        def __init__(self, n, flag=False):
            super().__init__()
            self.asked = (n, flag)

    class Single(Counter):
        batched = Batched

    assert make_vec(Single, 3, flag=True).unwrapped.asked == (3, True)
    assert make_vec(Batched, 5).unwrapped.asked == (5, False)
    assert make_vec("CartPole-v1", 3).num_envs == 3
    assert make_vec(lambda: Counter(), 2).num_envs == 2
    assert as_vector(lambda: Opaque()).num_envs == 4
    assert as_vector(Counter()).num_envs == 1
    vec = make_vec(Counter, 2)
    assert as_vector(vec) is vec and isinstance(vec, SameStep) and isinstance(vec, VectorEnv)
    with pytest.raises(ValueError, match="copies"):
        as_vector(Counter(), 2)
    with pytest.raises(ValueError, match="n must"):
        make_vec(Counter, 0)
    with pytest.raises(ValueError, match="env_cls"):
        make_vec(3, 2)


def test_actions_fit_the_space():
    box = gymnasium.spaces.Box(-2, 2, (1,), np.float32)
    out = to_action_space(np.array([[-9.0], [0.5]]), box)
    assert out.dtype == np.float32 and out.tolist() == [[-2.0], [0.5]]
    assert to_action_space(np.array([1.0]), gymnasium.spaces.Discrete(3)).dtype == np.int64


def policy(obs):
    """Values and logits that are readable functions of the observation."""
    return Categorical(logits=torch.stack([torch.zeros(len(obs)), torch.sin(obs.sum(1))], 1)), 10 * obs[:, 0] + obs[:, 1]


@pytest.mark.parametrize("make", [lambda: make_vec(Counter, 4), lambda: as_vector(Opaque())])
def test_segments_against_the_environment(make):
    vec, g = make(), torch.Generator().manual_seed(0)
    parts = [collect(policy, vec, T, g) for T in (13, 7)]
    assert torch.equal(parts[0]["values"][-1], parts[1]["values"][0])  # the second call goes on
    s = {name: torch.cat([p[name] for p in parts]) for name in parts[0] if name not in ("values", "episode_returns")}
    values = torch.cat([parts[0]["values"][:-1], parts[1]["values"]])
    ok = s["valid"]
    assert s["obs"].shape == (20, 4, 3) and values.shape == (21, 4)
    # Episode stays, time goes up by one, the last entry is the action: also across the end of an episode.
    assert torch.equal(s["next_obs"][ok][:, :2], s["obs"][ok][:, :2] + torch.tensor([0.0, 1.0]))
    assert torch.equal(s["next_obs"][ok][:, 2], s["actions"][ok].float())
    assert torch.equal(s["rewards"][ok], s["next_obs"][ok][:, 1])
    terminated = (s["actions"] == 1) & (s["next_obs"][..., 1] >= 3)
    assert torch.equal(s["dones"][ok].bool(), terminated[ok]) and s["dones"][~ok].all()
    assert torch.equal(s["truncations"][ok].bool(), (~terminated & (s["next_obs"][..., 1] == 5))[ok])
    assert terminated[ok].any() and s["truncations"].any()
    flat = s["obs"].flatten(0, 1)
    torch.testing.assert_close(s["logp"].flatten(), policy(flat)[0].log_prob(s["actions"].flatten()))
    torch.testing.assert_close(values[:-1].flatten(), policy(flat)[1])
    # Where an episode goes on or was cut, the next value is that of the true successor.
    going = ok & ~terminated
    torch.testing.assert_close(s["next_values"][going], policy(s["next_obs"][going])[1])
    episodes = torch.cat([p["episode_returns"] for p in parts])
    length = s["next_obs"][..., 1][ok & (s["dones"].bool() | s["truncations"].bool())]
    torch.testing.assert_close(episodes, length * (length + 1) / 2)


def test_segments_are_repeatable_and_continuous_actions_are_kept_as_drawn():
    torch.manual_seed(0)
    net = GaussianPolicy(3, 1, log_std=2.0)
    a, b = (collect(net, make_vec("Pendulum-v1", 2), 30, torch.Generator().manual_seed(4)) for _ in range(2))
    for name in a:
        assert torch.equal(a[name], b[name])
    assert a["actions"].abs().max() > 2 and not a["values"].any()
    torch.testing.assert_close(a["logp"], net(a["obs"]).log_prob(a["actions"]))
    both = collect(ActorCritic(3, act_dim=1), make_vec("Pendulum-v1", 2), 4)
    assert both["values"].shape == (5, 2) and both["values"].any() and not both["values"].requires_grad
    with pytest.raises(ValueError, match="T must"):
        collect(net, make_vec("Pendulum-v1", 2), 0)


def test_a_vector_environment_of_gymnasium_itself():
    vec = as_vector(gymnasium.make_vec("CartPole-v1", num_envs=3, vectorization_mode="vector_entry_point"))
    s = collect(lambda obs: Categorical(logits=torch.zeros(3, 2)), vec, 200, torch.Generator().manual_seed(0))
    assert (~s["valid"]).sum() >= 10
    # A transition never leaves the start of an episode: all starts lie within 0.05, as do no ends.
    ends = s["next_obs"][s["valid"] & s["dones"].bool()]
    assert (ends[:, [0, 2]].abs() > torch.tensor([2.4, 0.2])).any(1).all()
    assert s["rewards"][s["valid"]].eq(1).all()


class Recorder(ReplayAgent):
    """Acts at random and writes down what the loop does."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.batches, self.masks = [], []

    def act(self, obs, deterministic=False):
        return self.rng.integers(2, size=len(obs))

    def begin_episodes(self, mask):
        self.masks.append(mask.copy())

    def update(self, batch):
        self.batches.append({name: x.clone() for name, x in batch.items()})
        return {"loss": 1.0} | ({"priorities": batch["returns"]} if self.prioritised else {})


MAKERS = [*(lambda m=m: sync(m) for m in AutoresetMode), Opaque]


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("n_step", [1, 3])
def test_the_memory_holds_true_transitions(make, n_step):
    agent = Recorder(n_step=n_step, gamma=0.5, warmup=10**9)
    history = agent.fit(make(), 400, seed=1)
    assert 400 <= agent.transitions < 404 and not agent.updates
    rows = agent.buffer.take(np.arange(len(agent.buffer)))
    start, end = rows["obs"][:, 1], rows["next_obs"][:, 1]
    steps = end - start
    assert torch.equal(rows["obs"][:, 0], rows["next_obs"][:, 0])  # within one episode
    assert steps.min() >= 1 and steps.max() == n_step
    terminated = (rows["next_obs"][:, 2] == 1) & (end >= 3)
    truncated = ~terminated & (end == 5)
    assert terminated.any() and truncated.any()
    assert (steps[~(terminated | truncated)] == n_step).all()
    torch.testing.assert_close(rows["discounts"], torch.where(terminated, 0.0, 0.5**steps))
    sums = [sum(0.5**k * (s + k + 1) for k in range(int(m))) for s, m in zip(start.tolist(), steps.tolist())]
    torch.testing.assert_close(rows["returns"], torch.tensor(sums))
    if n_step == 1:
        assert torch.equal(rows["actions"], rows["next_obs"][:, 2].long()) and len(agent.buffer) == agent.transitions
    # Finished episodes: the return is the sum of the times.
    length = np.array(history["length"])
    assert set(length) <= {3, 4, 5} and history["return"] == (length * (length + 1) / 2).tolist()
    assert history["step"] == sorted(history["step"]) and history["step"][-1] <= agent.transitions
    assert agent.masks[0].all() and sum(m.sum() for m in agent.masks[1:]) == len(length)


def test_updates_and_scaled_rewards():
    agent = Recorder(batch_size=16, warmup=50, updates_per_step=0.25, reward_scale=10.0)
    history = agent.fit(sync(AutoresetMode.SAME_STEP), 200, seed=0)
    assert agent.updates == len(agent.batches) == 9  # 38 steps from transition 52 on, a quarter of an update each
    batch = agent.batches[0]
    assert batch["obs"].shape == (16, 3) and batch["obs"].dtype == batch["returns"].dtype == torch.float32
    torch.testing.assert_close(batch["returns"], 10 * batch["next_obs"][:, 1])
    assert max(history["return"]) <= 15
    agent = Recorder(batch_size=4, warmup=0, updates_per_step=3)
    agent.fit(Counter(), 70, seed=0, callback=lambda agent, history: agent.transitions >= 40)
    assert agent.transitions == 40 and agent.updates == 120
    agent.fit(Counter, 10, seed=0, n_envs=2)
    assert agent.transitions == 50 and len(agent.buffer) == 50 and agent.updates == 135


def test_priorities_are_drawn_weighted_and_written_back():
    agent = Recorder(prioritised=True, alpha=0.5, beta=1.0, batch_size=512, capacity=64, warmup=300)
    agent.fit(sync(AutoresetMode.SAME_STEP), 400, seed=0)
    assert len(agent.buffer) == 64 and agent.updates > 20
    batch = agent.sample(20_000)
    stored = agent.tree[batch["idx"].numpy()]
    probability = stored / agent.tree.total()
    weight = 1 / (64 * probability)
    # The largest weight of the batch is one, the others are in proportion.
    np.testing.assert_allclose(batch["weights"], weight / weight.max(), rtol=1e-5)
    counts = np.bincount(batch["idx"], minlength=64)
    np.testing.assert_allclose(
        counts, 20_000 * agent.tree[np.arange(64)] / agent.tree.total(), atol=2
    )  # stratified: whole strata and two cut ones
    # Slots of the last batch hold priority^alpha; new transitions hold the largest priority so far.
    last = agent.batches[-1]
    np.testing.assert_allclose(agent.tree[last["idx"].numpy()], last["returns"].numpy() ** 0.5, rtol=1e-6)
    before = agent._top
    agent.warmup = 10**9
    agent.fit(sync(AutoresetMode.SAME_STEP), 4, seed=9)
    assert before == 5.0 and np.sum(np.isclose(agent.tree[np.arange(64)], before**0.5)) >= 4


@pytest.mark.parametrize(
    "make", [lambda: DQN(4, 2, warmup=50, batch_size=8, prioritised=True), lambda: DDPG(3, 1, -2, 2, warmup=50, batch_size=8)]
)
def test_a_seed_fixes_the_training(make):
    def train(seed):
        torch.manual_seed(5)
        agent = make()
        torch.rand(3)
        before = torch.get_rng_state()
        history = agent.fit("CartPole-v1" if isinstance(agent, DQN) else "Pendulum-v1", 260, seed, n_envs=2)
        assert torch.equal(before, torch.get_rng_state())
        net = agent.online if isinstance(agent, DQN) else agent.actor
        return torch.nn.utils.parameters_to_vector(net.parameters()).detach(), history

    (a, ha), (b, hb), (c, _) = train(1), train(1), train(2)
    assert torch.equal(a, b) and ha == hb and not torch.equal(a, c)


def batch_of(obs_dim, actions, n=6, **more):
    g = torch.Generator().manual_seed(0)
    out = {"obs": torch.randn(n, obs_dim, generator=g), "next_obs": torch.randn(n, obs_dim, generator=g), "actions": actions}
    out |= {"returns": torch.randn(n, generator=g), "discounts": torch.tensor([0.9, 0.0, 0.81, 0.9, 0.9, 0.0])[:n]}
    return out | more


@pytest.mark.parametrize("double", [True, False])
def test_dqn_errors_against_a_loop(double):
    agent = DQN(3, 4, double=double, hidden=(8,))
    with torch.no_grad():
        for p in agent.online.parameters():
            p.add_(torch.randn_like(p))
    batch = batch_of(3, torch.tensor([0, 1, 2, 3, 0, 1]))
    delta = agent.td_errors(batch)
    for i in range(6):
        q, after, frozen = agent.online(batch["obs"])[i], agent.online(batch["next_obs"])[i], agent.target(batch["next_obs"])[i]
        value = frozen[after.argmax()] if double else frozen.max()
        assert delta[i].item() == pytest.approx(
            (q[batch["actions"][i]] - batch["returns"][i] - batch["discounts"][i] * value).item(), abs=1e-5
        )
    assert all(p.grad is None for p in agent.target.parameters())
    weights = torch.linspace(0, 1, 6)
    expected = torch.autograd.grad((weights * 0.5 * delta**2).mean(), list(agent.online.parameters()))
    report = agent.update({**batch, "weights": weights})
    for p, g in zip(agent.online.parameters(), expected):
        torch.testing.assert_close(p.grad, g)
    torch.testing.assert_close(report["priorities"], delta.detach().abs())


def test_targets():
    agent = DQN(3, 2, target_period=3, lr=0.1)
    first = [p.clone() for p in agent.target.parameters()]
    for i in range(1, 7):
        agent.update(batch_of(3, torch.tensor([0, 1, 0, 1, 0, 1])))
        same = all(torch.equal(p, q) for p, q in zip(agent.target.parameters(), agent.online.parameters()))
        assert same == (i % 3 == 0)
        if i < 3:
            assert all(torch.equal(p, q) for p, q in zip(agent.target.parameters(), first))
    a, b = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    expected = 0.75 * a.weight.detach() + 0.25 * b.weight.detach()
    polyak_(a, b, 0.25)
    torch.testing.assert_close(a.weight.detach(), expected)
    copy_(a, b)
    assert torch.equal(a.weight, b.weight) and a.weight.data_ptr() != b.weight.data_ptr()


def test_epsilon_falls_and_ties_go_to_the_lowest_action():
    agent = DQN(4, 3, epsilon=(1.0, 0.2, 100), zero_head=True)
    obs = np.random.default_rng(0).normal(size=(4000, 4))
    assert agent.epsilon == 1.0 and not agent.q_values(agent.tensor(obs)).any()
    agent.transitions = 50
    assert agent.epsilon == pytest.approx(0.6)
    agent.transitions = 1000
    assert (agent.act(obs) != 0).mean() == pytest.approx(0.2 * 2 / 3, abs=0.02)
    assert not agent.act(obs, deterministic=True).any()


def test_ddpg_losses_against_autograd():
    agent = DDPG(3, 2, [-1.0, 0.0], [1.0, 4.0], noise=0.3, lr=1e-3, tau=0.5)
    with torch.no_grad():
        for p in [*agent.actor.parameters(), *agent.critic.parameters()]:
            p.add_(0.3 * torch.randn_like(p))
    batch = batch_of(3, torch.rand(6, 2) * torch.tensor([2.0, 4.0]) - torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(agent.scale(agent.unscale(batch["actions"])), batch["actions"])
    torch.testing.assert_close(agent.unscale(torch.tensor([[-1.0, 0.0], [1.0, 4.0]])), torch.tensor([[-1.0, -1.0], [1.0, 1.0]]))
    unit = (batch["actions"] - torch.tensor([0.0, 2.0])) / torch.tensor([1.0, 2.0])
    after = torch.cat((batch["next_obs"], agent.target_actor(batch["next_obs"]).tanh()), 1)
    goal = batch["returns"] + batch["discounts"] * agent.target_critic(after)[:, 0]
    q = agent.critic(torch.cat((batch["obs"], unit), 1))[:, 0]
    torch.testing.assert_close(agent.td_errors(batch), q - goal)
    expected = torch.autograd.grad(0.5 * ((q - goal.detach()) ** 2).mean(), list(agent.critic.parameters()))
    before = [p.clone() for p in agent.target_actor.parameters()]
    agent.update(batch)
    for p, g in zip(agent.critic.parameters(), expected):
        torch.testing.assert_close(p.grad, g)  # the actor's step leaves no gradient in the critic
    for p, old, online in zip(agent.target_actor.parameters(), before, agent.actor.parameters()):
        torch.testing.assert_close(p, 0.5 * old + 0.5 * online.detach())
    agent = DDPG(3, 2, [-1.0, 0.0], [1.0, 4.0], noise=0.3)  # starts near the middle of the box
    obs = np.random.default_rng(0).normal(size=(500, 3))
    quiet, loud = agent.act(obs, deterministic=True), agent.act(obs)
    assert (loud >= [-1, 0]).all() and (loud <= [1, 4]).all()
    assert np.std((loud - quiet)[:, 1]) == pytest.approx(0.6, rel=0.1)  # half the width of the box is 2
    random = agent.explore(obs)  # before warmup: uniform in the box
    assert random[:, 1].mean() == pytest.approx(2, abs=0.2) and random[:, 1].std() == pytest.approx(4 / 12**0.5, abs=0.15)


def test_dqn_learns_cartpole():
    torch.manual_seed(0)
    agent = DQN(4, 2, batch_size=64, n_step=3, epsilon=(1.0, 0.05, 2000), warmup=500, target_period=100, updates_per_step=2)
    agent.fit("CartPole-v1", 6000, seed=0, n_envs=4)
    assert evaluate(agent, "CartPole-v1", 10, seed=100)["mean"] > 100  # a random policy reaches 20


class Target(gymnasium.Env):
    """One step: the reward is minus the squared distance of the action from a function of the observation."""

    observation_space = gymnasium.spaces.Box(-1, 1, (1,), np.float32)
    action_space = gymnasium.spaces.Box(0.0, 4.0, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x = self.np_random.uniform(-1, 1, 1).astype(np.float32)
        return self.x, {}

    def step(self, action):
        return self.x, -float((action[0] - 2 - self.x[0]) ** 2), True, False, {}


def test_ddpg_finds_the_best_action():
    torch.manual_seed(0)
    agent = DDPG(1, 1, 0.0, 4.0, batch_size=64, warmup=200, tau=0.05, lr=3e-3)
    agent.fit(Target, 4000, seed=0, n_envs=8)
    obs = np.linspace(-0.9, 0.9, 7)[:, None]
    np.testing.assert_allclose(agent.act(obs, deterministic=True), 2 + obs, atol=0.25)


def test_exploration_measures():
    history = {"return": [0, 1, 1, 0, 1, 1, 1, 1], "step": [5, 10, 15, 20, 25, 30, 35, 40]}
    assert solved_after(history, 1, window=3) == 35
    assert solved_after(history, 1, window=3, at="episode") == 7
    assert solved_after(history, 1, window=2) == 15
    assert solved_after(history, 1, window=5) is None and solved_after({"return": [], "step": []}, 1) is None
    agent = DQN(3, 2, zero_head=True)
    assert greedy_episodes(agent, Counter, 3).tolist() == [15.0, 15.0, 15.0]  # always action 0: truncated after five steps


def test_bad_arguments_of_agents():
    for kwargs in ({"gamma": 1.1}, {"batch_size": 0}, {"n_step": 0}, {"warmup": -1}, {"updates_per_step": -1}, {"capacity": 0}):
        with pytest.raises(ValueError, match=next(iter(kwargs))):
            ReplayAgent(**kwargs)
    with pytest.raises(ValueError, match="epsilon"):
        DQN(2, 2, epsilon=(2, 0, 1))
    with pytest.raises(ValueError, match="low"):
        ActorCriticAgent(2, 1, 1.0, 1.0)
    with pytest.raises(ValueError, match="steps"):
        DQN(3, 2).fit(Counter, 0)
    with pytest.raises(ValueError, match="empty"):
        DQN(3, 2).sample()
    with pytest.raises(ValueError, match="Box"):
        DQN(16, 4).fit("FrozenLake-v1", 10)
    agent = DQN(3, 2, network=torch.nn.Linear(3, 2))
    agent.fit(Counter, 5)
    with pytest.raises(ValueError, match="memory"):
        agent.fit("CartPole-v1", 5)


@pytest.mark.parametrize(
    ("agent", "env", "message"),
    [
        (DQN(3, 2), "CartPole-v1", "observations of 3 numbers"),
        (DQN(4, 3), "CartPole-v1", "3 discrete actions"),
        (DQN(3, 2), "Pendulum-v1", "2 discrete actions"),
        (DDPG(4, 1, -2.0, 2.0), "Pendulum-v1", r"observations of shape \(4,\)"),
        (DDPG(3, 2, -2.0, 2.0), "Pendulum-v1", "a Box of 2 actions"),
        (DDPG(4, 1, -2.0, 2.0), "CartPole-v1", "a Box of 1 actions"),
        (DDPG(3, 1, -2.5, 2.0), "Pendulum-v1", "actions lie in"),
    ],
)
def test_an_agent_refuses_an_environment_that_it_was_not_made_for(agent, env, message):
    with pytest.raises(ValueError, match=message):
        agent.fit(env, 1)
    assert agent.transitions == 0
    with pytest.raises(ValueError, match=message):
        evaluate(agent, env, 1)


def test_a_box_within_the_environments_is_the_agents_choice():
    agent = DDPG(3, 1, -1.0, 1.5)
    agent.fit("Pendulum-v1", 20)
    assert agent.buffer.storage["actions"][:20].abs().max() <= 1.5 and agent.transitions == 20


def test_an_episode_that_does_not_end_is_no_wait_for_ever():
    class Circle:
        def act(self, obs, deterministic=False):
            return np.array([0, 0])[: len(obs)]  # left, against the wall

    with pytest.raises(ValueError, match=r"500 steps.*max_episode_steps"):
        evaluate(Circle(), "CliffWalking-v1", 2, longest=500)
    assert evaluate(Circle(), lambda: gymnasium.make("CliffWalking-v1", max_episode_steps=40), 2, longest=40)["mean"] == -40


class Fixed:
    """Terminates in episode-dependent steps: copies with an even episode number stop at three."""

    def act(self, obs, deterministic=False):
        self.asked = deterministic
        return (obs[:, 0] % 2 == 0).astype(int)


@pytest.mark.parametrize("env", [Counter, lambda: Counter(), lambda: sync("NextStep"), lambda: Opaque()])
@pytest.mark.parametrize("episodes", [1, 4, 6])
def test_episodes_by_hand(env, episodes):
    agent = Fixed()
    out = evaluate(agent, env, episodes)
    assert agent.asked and len(out["returns"]) == len(out["lengths"]) == episodes
    assert set(out["lengths"]) <= {3, 5}
    np.testing.assert_array_equal(out["returns"], out["lengths"] * (out["lengths"] + 1) / 2)
    assert out["mean"] == out["returns"].mean() and out["std"] == out["returns"].std()


def test_one_environment_plays_one_after_the_other():
    out = evaluate(Fixed(), Counter(), 4)
    assert len(out["returns"]) == 4


def test_seeds_and_bad_counts():
    class Push:
        def act(self, obs, deterministic=False):
            return np.full((len(obs), 1), 99.0)  # clipped on its way

    a, b, c = (evaluate(Push(), "Pendulum-v1", 3, seed)["returns"] for seed in (1, 1, 2))
    assert np.array_equal(a, b) and not np.array_equal(a, c) and len(set(a)) == 3
    with pytest.raises(ValueError, match="episodes"):
        evaluate(Push(), "Pendulum-v1", 0)


def test_summaries_against_definitions():
    scores = np.random.default_rng(0).normal(size=(12, 4)) + np.arange(4)
    out = aggregate(scores)
    ordered = np.sort(scores.ravel())
    assert out["iqm"] == pytest.approx(ordered[12:36].mean())
    assert out["median"] == pytest.approx(np.median(scores.mean(0)))
    assert out["mean"] == pytest.approx(scores.mean())
    assert out["iqr"] == pytest.approx(tuple(np.percentile(scores, [25, 75])))
    one = aggregate(scores[:, 0])
    assert one["median"] == pytest.approx(np.median(scores[:, 0])) and one["iqm"] == pytest.approx(trim_mean(scores[:, 0], 0.25))
    assert aggregate([3.0] * 5)["iqm_ci"] == (3.0, 3.0)


def test_intervals_are_stratified_and_cover():
    # Runs of a task are equal, tasks differ: resampling within tasks leaves nothing to vary.
    flat = np.repeat(np.arange(5.0)[None], 6, 0)
    out = aggregate(flat)
    assert out["mean_ci"] == (2.0, 2.0) and out["median_ci"] == (2.0, 2.0)
    rng = np.random.default_rng(0)
    hits = 0
    for k in range(200):
        low, high = aggregate(rng.normal(size=(20, 3)), reps=300, seed=k)["mean_ci"]
        hits += low <= 0 <= high
        assert high - low == pytest.approx(2 * 1.96 / 60**0.5, rel=0.5)
    assert 175 <= hits <= 199  # 95% nominal; the percentile bootstrap is a little narrow
    assert aggregate(flat, seed=1) == aggregate(flat, seed=1)


def test_bad_runs():
    for runs in ([], np.zeros((1, 1, 1)), [np.nan]):
        with pytest.raises(ValueError, match="runs"):
            aggregate(runs)
    with pytest.raises(ValueError, match="level"):
        aggregate([1.0], level=1.0)


def test_an_environment_that_can_multiply_itself_is_stepped_as_one_batch():
    from dlatlas.rl.envs.toy import BatchedChain, Chain

    for vec in (make_vec(lambda: Chain(12), 3), as_vector(Chain(12), 3)):
        assert isinstance(vec.unwrapped, BatchedChain)
        assert vec.reset(seed=0)[0].shape == (3, 12)
    # A wrapper would be lost, so its copies are stepped one by one.
    limited = make_vec(lambda: gymnasium.wrappers.TimeLimit(Chain(12), 5), 3)
    limited.reset(seed=0)
    truncations = [limited.step(np.ones(3, dtype=int))[3].all() for _ in range(5)]
    assert truncations == [False] * 4 + [True]


def test_a_reset_forgets_the_rewards_of_unfinished_episodes():
    vec, still = as_vector(sync(AutoresetMode.SAME_STEP)), lambda obs: Categorical(logits=torch.tensor([0.0, -1e9]).expand(len(obs), 2))
    collect(still, vec, 2)
    assert vec.running_returns.tolist() == [3.0] * 4
    vec.reset(seed=0)
    assert vec.running_returns.tolist() == [0.0] * 4
