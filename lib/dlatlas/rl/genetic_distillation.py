r"""Genetic policy optimisation: crossover by distillation (gangwani2018policy).

A genetic algorithm for policies needs a crossover that keeps what both parents can do. Mixing the parameters of two networks does not: their
hidden units mean different things. Crossover in *state* space does: a classifier learns where each parent is at home, the two parents
behind it form one hierarchical teacher, and a child network imitates the teacher. Mutation is policy gradient, selection goes by return.

Equations: with a switch $\rho(s) \in (0, 1)$, the probability that a state belongs to parent $y$, the teacher is

$$ \pi_H(a|s) = \pi_x(a|s) \text{ if } \rho(s) < \tfrac12, \quad \pi_y(a|s) \text{ otherwise} , $$

and the child minimises $\mathbb{E}_s [\mathrm{KL}(\pi_H(\cdot|s) \,\|\, \pi_c(\cdot|s))]$, for Gaussians of one fixed width the squared distance of the means. The
first states are the parents' own; every round of DAgger adds states that the child visits, labelled by the teacher. A pair's fitness is
$f_x + f_y$, with the diversity rule plus $\mathrm{KL}(\pi_x \| \pi_y) + \mathrm{KL}(\pi_y \| \pi_x)$.

Deviations from the paper:

1. The switch weights states by how far the return of their episode lies above the average of both parents, and leaves out those below. A parent
   none of whose episodes is above it teaches nothing: the other one is the teacher everywhere.
2. Members share the rows of their last segments, and only with members whose sampled divergence is small; PPO's ratio is the importance weight.
3. A child inherits the value network of the fitter parent; distillation is about the actor only.
4. PPO only, with a learning rate drawn log-uniformly for each member and generation.

Later work: Khadka and Tumer (2018, ERL) and Pourchot and Sigaud (2019, CEM-RL) join populations with off-policy learners and pass on what was
learned through a shared memory. Bodnar et al. (2020, PDERL) confirm that crossover of raw parameters destroys policies, and distil
two parents through a critic that chooses the better of their actions in each state.

Example:
    import torch
    from dlatlas.rl.envs.points import PointNav
    from dlatlas.rl.genetic_distillation import crossover, weight_crossover
    from dlatlas.rl.kit.evaluate import evaluate
    from dlatlas.rl.kit.nets import GaussianPolicy

    room = PointNav(goal=(0.0, 0.0), start=(-1.0, -0.1, 1.0, 0.1), goal_in_obs=False)  # a point mass, observed with its speed
    family = {}
    for name, push in (("pushes right", 1.0), ("pushes left", -1.0)):
        parent = GaussianPolicy(4, 2, log_std=-1.0)
        with torch.no_grad():
            parent.net[-1].bias.copy_(torch.tensor([push, 0.0]))
        family[name] = parent
    parents = list(family.values())
    left_or_right = lambda states: torch.sigmoid(9 * (states[:, 0] + states[:, 2]))  # or train_switch on the parents' episodes
    family["child"] = crossover(*parents, room, GaussianPolicy(4, 2, log_std=-1.0), left_or_right, dagger_rounds=2)
    family["mixed weights"] = weight_crossover(*parents)
    for name, policy in family.items():
        print(f"{name}: return {evaluate(policy, room, 50)['mean']:.1f}")
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import Independent, Normal, kl_divergence
from torch.nn import functional as F

from dlatlas.rl.kit.evaluate import evaluate
from dlatlas.rl.kit.nets import ActorCritic, GaussianPolicy, mlp
from dlatlas.rl.kit.pg import Hooks, ppo
from dlatlas.rl.kit.rollout import Source, as_vector, collect

__all__ = ["GPO", "crossover", "select", "train_switch", "weight_crossover"]

COPIES = 20
# A state-independent width: below this the divergence of two nearly deterministic policies explodes.
MIN_LOG_STD = -2.5


def train_switch(
    states_x: Tensor,
    states_y: Tensor,
    hidden: int = 32,
    steps: int = 300,
    seed: int = 0,
    *,
    weights_x: Tensor | None = None,
    weights_y: Tensor | None = None,
    lr: float = 1e-2,
) -> nn.Module:
    r"""A classifier ``states [batch, obs] -> probabilities [batch]`` in (0, 1) that a state belongs to parent y, by logistic regression.

    Args:
        states_x: states that parent x visited ``[n, obs]``.
        states_y: states that parent y visited ``[m, obs]``.
        hidden: width of the hidden layer.
        steps: full-batch steps of Adam.
        seed: seed of the network.
        weights_x: weights of the states of x ``[n]``, not negative; default all one.
        weights_y: the same for y ``[m]``.
        lr: learning rate.

    Raises:
        ValueError: empty or mismatched states, or weights that do not fit.
    """
    if states_x.dim() != 2 or states_y.dim() != 2 or states_x.shape[1:] != states_y.shape[1:] or not (len(states_x) and len(states_y)):
        raise ValueError(f"expected states [n, obs] and [m, obs], got {tuple(states_x.shape)} and {tuple(states_y.shape)}")
    weights = []
    for states, w in ((states_x, weights_x), (states_y, weights_y)):
        w = torch.ones(len(states), dtype=states.dtype) if w is None else w
        if w.shape != (len(states),) or not (w >= 0).all() or not w.sum() > 0:
            raise ValueError(f"weights must be {len(states)} numbers that are not negative nor all zero, got shape {tuple(w.shape)}")
        weights.append(w)
    inputs = torch.cat((states_x, states_y))
    labels = torch.cat((torch.zeros(len(states_x)), torch.ones(len(states_y)))).to(inputs)
    weights = torch.cat(weights)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = _Switch(inputs, hidden)
    opt = torch.optim.Adam(net.parameters(), lr=lr)
    for _ in range(steps):
        loss = F.binary_cross_entropy_with_logits(net.logits(inputs), labels, weights) * len(inputs) / weights.sum()
        opt.zero_grad()
        loss.backward()
        opt.step()
    return net.requires_grad_(False)


def crossover(
    policy_x: GaussianPolicy,
    policy_y: GaussianPolicy,
    env_fn: Source,
    child: GaussianPolicy,
    switch: nn.Module | None = None,
    dagger_rounds: int = 3,
    samples: int = 2000,
    seed: int = 0,
    *,
    steps: int = 300,
    lr: float = 3e-3,
) -> GaussianPolicy:
    r"""Distils two parents into a child through a switch, first on the parents' states and then on the child's own.

    Args:
        policy_x: first parent.
        policy_y: second parent.
        env_fn: an id, a class or a function that makes an environment, or one.
        child: the network to train, in place.
        switch: ``states -> probability of y``; default: trained here on the parents' trajectories, of their better episodes, or constant if only
            one parent has episodes above the average of both.
        dagger_rounds: rounds of collecting with the child, 0 for plain imitation.
        samples: states from each parent, and from the child in each round.
        seed: seed of the environments, the actions, the switch and the batches.
        steps: steps of Adam before the first round and after each.
        lr: learning rate of the child.

    Returns:
        The child.

    Raises:
        ValueError: `samples` or `steps` below 1, or a negative number of rounds.
    """
    if samples < 1 or steps < 1 or dagger_rounds < 0:
        raise ValueError(f"expected samples >= 1, steps >= 1 and dagger_rounds >= 0, got {samples}, {steps} and {dagger_rounds}")
    vec, generator = as_vector(env_fn, COPIES), torch.Generator().manual_seed(seed)
    own = [_visit(parent, vec, samples, generator) for parent in (policy_x, policy_y)]
    if switch is None:
        (states_x, returns_x), (states_y, returns_y) = own
        weights_x, weights_y = _advantage(torch.cat((returns_x, returns_y))).split([len(states_x), len(states_y)])
        if weights_x.any() and weights_y.any():
            switch = train_switch(states_x, states_y, seed=seed, weights_x=weights_x, weights_y=weights_y)
        else:
            # One parent is nowhere above the average: the limit of the weighted switch as its weights vanish.
            switch = _Constant(float(weights_y.any()))
    states = torch.cat([s for s, _ in own])
    opt = torch.optim.Adam(child.parameters(), lr=lr, fused=True)
    for round_ in range(dagger_rounds + 1):
        if round_:
            states = torch.cat((states, _visit(child, vec, samples, generator)[0]))
        teacher = _teacher(policy_x, policy_y, switch, states)
        for _ in range(steps):
            idx = torch.randint(len(states), (min(256, len(states)),), generator=generator)
            target = Independent(Normal(teacher[0][idx], teacher[1][idx], validate_args=False), 1, validate_args=False)
            loss = kl_divergence(target, child(states[idx])).mean()
            opt.zero_grad()
            loss.backward()
            opt.step()
            with torch.no_grad():
                child.log_std.clamp_(min=MIN_LOG_STD)
    return child


def weight_crossover(policy_x: GaussianPolicy, policy_y: GaussianPolicy, generator: torch.Generator | None = None) -> GaussianPolicy:
    """The baseline: a child that takes each parameter from one of the parents, by a fair coin.

    Args:
        policy_x: first parent.
        policy_y: second parent, of the same architecture.
        generator: source of the coins.

    Raises:
        ValueError: parents of different architectures.
    """
    child, shapes = copy.deepcopy(policy_x), [[tuple(p.shape) for p in parent.parameters()] for parent in (policy_x, policy_y)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"the parents must share one architecture, got parameters {shapes[0]} and {shapes[1]}")
    with torch.no_grad():
        for p, other in zip(child.parameters(), policy_y.parameters()):
            p.copy_(torch.where(torch.rand(p.shape, generator=generator) < 0.5, p, other))
    return child


def select(fitness: Tensor | Sequence[float], m: int, rule: str = "performance", kl: Tensor | None = None) -> list[tuple[int, int]]:
    r"""The `m` best pairs of parents, best first.

    Args:
        fitness: returns ``[k]``.
        m: number of pairs, at most $k (k - 1) / 2$.
        rule: "performance" scores a pair $f_i + f_j$, "diversity" adds $K_{ij} + K_{ji}$.
        kl: divergences $K_{ij} = \mathrm{KL}(\pi_i \| \pi_j)$ ``[k, k]``, for the diversity rule.

    Raises:
        ValueError: an unknown rule, divergences missing or of a wrong shape, or more pairs asked for than there are.
    """
    f = torch.as_tensor(fitness, dtype=torch.float64)
    pairs = list(itertools.combinations(range(len(f)), 2)) if f.dim() == 1 else []
    if rule not in {"performance", "diversity"} or not 1 <= m <= len(pairs):
        raise ValueError(f"expected rule 'performance' or 'diversity' and 1 <= m <= {len(pairs)} pairs, got {rule!r} and {m}")
    bonus = torch.zeros(len(f), len(f), dtype=torch.float64)
    if rule == "diversity":
        if kl is None or kl.shape != bonus.shape:
            raise ValueError(f"the diversity rule needs kl of shape {tuple(bonus.shape)}, got {None if kl is None else tuple(kl.shape)}")
        bonus = (kl + kl.T).double()
    return sorted(pairs, key=lambda p: -float(f[p[0]] + f[p[1]] + bonus[p]))[:m]


class GPO:
    r"""Generations of mutation, selection and crossover over a population of actor-critics.

    Mutation is PPO with a learning rate drawn at random for each member. Members share the rows of their last segments: those of another member
    whose policy is near enough are appended, with the probabilities under which *they* were drawn, so that PPO's ratio is their importance weight.

    Args:
        env_fn: an id, a class or a function that makes an environment, with continuous actions.
        population: number of members, at least 3.
        steps: transitions of a member's mutation in one generation.
        lr: range of the learning rate, drawn uniformly in its logarithm.
        rule: see :func:`select`.
        episodes: episodes that measure a member's fitness.
        share_kl: largest sampled divergence of a member whose rows are shared, 0 for none.
        dagger_rounds: see :func:`crossover`.
        samples: see :func:`crossover`.
        distill_steps: its `steps`.
        seed: seed of everything.
        ppo_kwargs: further arguments of :func:`dlatlas.rl.kit.pg.ppo`.

    Attributes:
        members: the population, fittest first after :meth:`fit`.

    Raises:
        ValueError: fewer than 3 members, or ranges that are not positive.
    """

    def __init__(
        self,
        env_fn: Source,
        population: int = 8,
        *,
        steps: int = 4096,
        lr: tuple[float, float] = (1e-4, 1e-3),
        rule: str = "performance",
        episodes: int = 20,
        share_kl: float = 0.05,
        dagger_rounds: int = 3,
        samples: int = 2000,
        distill_steps: int = 300,
        seed: int = 0,
        ppo_kwargs: Mapping[str, Any] | None = None,
    ):
        if population < 3 or steps < 1 or episodes < 1 or not 0 < lr[0] <= lr[1] or not share_kl >= 0:
            raise ValueError(
                f"expected population >= 3, steps, episodes >= 1, 0 < lr and share_kl >= 0, got {population}, {steps}, {episodes}, {lr}, {share_kl}"
            )
        self.env_fn, self.steps, self.lr, self.rule, self.episodes = env_fn, steps, lr, rule, episodes
        self.share_kl, self.dagger_rounds, self.samples, self.ppo_kwargs = share_kl, dagger_rounds, samples, dict(ppo_kwargs or {})
        self.distill_steps = distill_steps
        self.rng = np.random.default_rng(seed)
        vec = as_vector(env_fn, 1)
        self.obs_dim, self.act_dim = vec.single_observation_space.shape[0], vec.single_action_space.shape[0]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.members = [ActorCritic(self.obs_dim, act_dim=self.act_dim) for _ in range(population)]

    def fit(self, generations: int) -> dict[str, list]:
        """Runs generations; the last one ends after its mutation, with the population sorted by fitness.

        Returns:
            A row a generation: "step" (transitions of PPO so far, of all members), "best", "mean" and "fitness" (a list over the members).
        """
        if generations < 1:
            raise ValueError(f"generations must be at least 1, got {generations}")
        history: dict[str, list] = {"step": [], "best": [], "mean": [], "fitness": []}
        made = 0
        for generation in range(generations):
            made += self._mutate()
            seed = self._seed()
            fitness = [evaluate(member, self.env_fn, self.episodes, seed=seed)["mean"] for member in self.members]
            for name, value in (("step", made), ("best", max(fitness)), ("mean", float(np.mean(fitness))), ("fitness", fitness)):
                history[name].append(value)
            if generation + 1 < generations:
                self._breed(fitness)
        self.members = [self.members[i] for i in np.argsort(fitness)[::-1]]
        return history

    def _mutate(self) -> int:
        pool: list[dict[str, Tensor]] = []
        made = 0
        for member in self.members:
            shared = _Shared(pool, self.share_kl)
            lr = float(np.exp(self.rng.uniform(*np.log(self.lr))))
            _, history = ppo(self.env_fn, self.steps, policy=member, lr=lr, seed=self._seed(), hooks=shared, **self.ppo_kwargs)
            pool.append(shared.last)
            made += history["update"][-1]
        return made

    def _breed(self, fitness: list[float]) -> None:
        kl = None
        if self.rule == "diversity":
            states = torch.cat(
                [_visit(m, as_vector(self.env_fn, COPIES), 200, torch.Generator().manual_seed(self._seed()))[0] for m in self.members]
            )
            with torch.no_grad():
                laws = [member.distribution(states) for member in self.members]
                kl = torch.tensor([[kl_divergence(p, q).mean() for q in laws] for p in laws])
        children = []
        for i, j in select(fitness, len(self.members), self.rule, kl):
            fitter, other = (i, j) if fitness[i] >= fitness[j] else (j, i)
            child = copy.deepcopy(self.members[fitter])  # with its critic; the actor learns from both
            crossover(
                self.members[fitter].actor, self.members[other].actor, self.env_fn, child.actor,
                dagger_rounds=self.dagger_rounds, samples=self.samples, steps=self.distill_steps, seed=self._seed(),
            )  # fmt: skip
            children.append(child)
        self.members = children

    def _seed(self) -> int:
        return int(self.rng.integers(2**31 - 1))


class _Shared(Hooks):
    """Appends the last segments of other members whose policy is near."""

    def __init__(self, pool: list[dict[str, Tensor]], share_kl: float):
        self.pool, self.share_kl = pool, share_kl
        self.last: dict[str, Tensor] = {}

    @torch.no_grad()
    def after_rollout(self, policy: ActorCritic, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        self.last, rows = batch, [batch]
        for other in self.pool:
            log_ratio = policy.distribution(other["obs"]).log_prob(other["actions"]) - other["logp"]
            if (log_ratio.exp() - 1 - log_ratio).mean() < self.share_kl:
                rows.append(other)
        return {name: torch.cat([r[name] for r in rows]) for name in batch}


class _Switch(nn.Module):
    """Standardises its inputs by the training states, then one hidden layer."""

    def __init__(self, inputs: Tensor, hidden: int):
        super().__init__()
        self.register_buffer("center", inputs.mean(0))
        self.register_buffer("spread", inputs.std(0, unbiased=False).clamp_min(1e-6))
        self.net = mlp((inputs.shape[1], hidden, 1)).to(inputs.dtype)

    def logits(self, states: Tensor) -> Tensor:
        return self.net((states - self.center) / self.spread).squeeze(-1)

    def forward(self, states: Tensor) -> Tensor:
        return torch.sigmoid(self.logits(states))


class _Constant(nn.Module):
    """The switch of a parent that is at home everywhere."""

    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def forward(self, states: Tensor) -> Tensor:
        return torch.full_like(states[:, 0], self.p)


def _visit(policy: GaussianPolicy, vec, samples: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """States ``[n, obs]`` of episodes played by the policy, with the return of the episode that each is from."""
    vec.reset(seed=int(torch.randint(2**31 - 1, (), generator=generator)))
    batch = collect(policy, vec, -(-samples // vec.num_envs), generator)
    ends = ((batch["dones"] + batch["truncations"]) > 0).long()  # [T, B]
    episode = ends.cumsum(0) - ends  # 0, 1, ... in each copy; the last step belongs to the episode that it ends
    returns = torch.zeros_like(batch["rewards"]).scatter_add_(0, episode, batch["rewards"]).gather(0, episode)
    keep = episode < ends.sum(0)  # whole episodes, if there are any
    keep = keep & batch["valid"] if keep.any() else batch["valid"]
    return batch["obs"][keep], returns[keep]


def _advantage(returns: Tensor) -> Tensor:
    """Weights of episodes: how far the return is above the average, 0 below it, scaled to mean one; ones if all are equal."""
    above = (returns - returns.mean()).clamp_min(0)
    return above / above.mean() if above.any() else torch.ones_like(returns)


@torch.no_grad()
def _teacher(policy_x: GaussianPolicy, policy_y: GaussianPolicy, switch: nn.Module, states: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the hierarchical policy at the states ``[n, obs]``."""
    second = (switch(states) >= 0.5).unsqueeze(-1)  # [n, 1]
    x, y = policy_x(states), policy_y(states)
    mean, std = torch.where(second, y.mean, x.mean), torch.where(second, y.stddev, x.stddev)
    return mean, std.clamp_min(float(np.exp(MIN_LOG_STD)))
