r"""Ape-X: many actors, one prioritised memory, one learner (horgan2018distributed).

Acting and learning are two jobs. Many actors, each with its own amount of randomness, play with slightly old parameters and send what
they see, with a first priority, to one memory. One learner replays from it what surprises it most, and publishes its parameters now and
then. More actors mean more and more varied experience for the same number of updates.

Equations: actor $i$ of $N$ is random with probability $\epsilon_i = \epsilon^{1 + \alpha i / (N-1)}$. With discounts $d_j = \gamma (1 -
\mathrm{done}_j)$,

$$ G = \sum_{k<n} \Big(\prod_{j<k} d_j\Big) r_k + \Big(\prod_{j<n} d_j\Big)\, \bar q\big(s_n, \arg\max_a q(s_n, a)\big) , $$

$$ \delta = G - q(s_0, a_0) , $$

where $\bar q$ is the target network, a copy of $q$ made every so many updates. The priority is $p = |\delta|$, transition $i$ of $M$ is
drawn with

$$ P(i) = p_i^\alpha \Big/ \sum_j p_j^\alpha, \qquad w_i = \big(M P(i)\big)^{-\beta} \Big/ \max_j w_j , $$

and the loss is the mean of $\tfrac12\, w\, \delta^2$.

Deviations from the paper:

1. The memory lives in the learner's process, and every actor has its own pipe to it: no lock is shared, so that an actor that dies takes
   nothing along.
2. At most a fixed number of updates for every step of the actors, so that runs on machines of different speed can be compared; the
   paper's learner runs freely.
3. Actors compute first priorities when a chunk is complete, with the parameters that they acted with.

Later work: R2D2 (Kapturowski et al., 2019) replays sequences for a recurrent network. Fedus et al. (2020) take replay apart: n-step
returns are what makes large memories pay; Obando-Ceron et al. (2023) add that small batches help value learners. Actors with different
amounts of exploration stayed: Agent57 (Badia et al., 2020) lets a bandit choose among them.

Example:
    import torch
    from dlatlas.rl.apex import ApexDQN, SharedReplay, actor_epsilons

    print("randomness of eight actors:", [round(e, 3) for e in actor_epsilons(8).tolist()])
    memory = SharedReplay(capacity=1000)
    memory.add({"reward": torch.tensor([0.0, 0.0, 1.0])}, priorities=torch.tensor([0.1, 0.1, 2.0]))
    batch, index, weights = memory.sample(1000)
    print(f"the surprising third is {(index == 2).float().mean():.2f} of the batch, with weight {weights[index == 2].mean():.2f}")
    agent = ApexDQN("CartPole-v1", n_actors=8, chunk=20, refresh=20, warmup=400, batch_size=64, target_period=100)
    agent.fit(steps=8000)  # workers=2 would put the actors into processes of their own
    print(f"{agent.transitions} transitions from 8 actors, {agent.updates} updates of the learner")
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dlatlas.rl.kit.actors import ActorPool, frozen_copy
from dlatlas.rl.kit.buffers import SumTree
from dlatlas.rl.kit.rollout import as_vector
from dlatlas.rl.kit.value_agent import DQN

__all__ = ["ApexDQN", "SharedReplay", "actor_epsilons", "nstep_double_q_target"]


def actor_epsilons(n: int, base: float = 0.4, alpha: float = 7.0) -> Tensor:
    r"""Exploration of each of `n` actors, $\epsilon_i = \epsilon^{1 + \alpha i/(n-1)}$, ``(n,)``, from bold to nearly greedy.

    Raises:
        ValueError: `n` below 1, `base` outside (0, 1] or `alpha` negative.
    """
    if n < 1 or not 0 < base <= 1 or not alpha >= 0:
        raise ValueError(f"n must be at least 1, base in (0, 1] and alpha >= 0, got {n}, {base} and {alpha}")
    place = torch.arange(n) / max(n - 1, 1)
    return base ** (1 + alpha * place)


def nstep_double_q_target(rewards: Tensor, discounts: Tensor, q_online_last: Tensor, q_target_last: Tensor) -> Tensor:
    r"""n-step target of double Q-learning: the online values choose the last action, the target values judge it.

    Args:
        rewards: $r_0 \dots r_{n-1}$, ``(B, n)``.
        discounts: $d_j = \gamma (1 - \mathrm{done}_j)$, ``(B, n)``; after a 0 nothing counts, not even a reward or value that is not finite.
        q_online_last, q_target_last: values of the last state ``(B, A)``.

    Returns:
        Targets ``(B,)`` without gradient.

    Raises:
        ValueError: shapes that do not fit.
    """
    if rewards.dim() != 2 or rewards.shape != discounts.shape or rewards.numel() == 0:
        raise ValueError(f"rewards and discounts must both be (B, n), got {tuple(rewards.shape)} and {tuple(discounts.shape)}")
    if q_online_last.dim() != 2 or q_online_last.shape != q_target_last.shape or len(q_online_last) != len(rewards):
        raise ValueError(
            f"the values must both be (B, A), B = {len(rewards)}, got {tuple(q_online_last.shape)} and {tuple(q_target_last.shape)}"
        )
    with torch.no_grad():
        reach = discounts.cumprod(1)  # (B, n): factor of whatever comes after step j
        before = torch.cat([torch.ones_like(reach[:, :1]), reach[:, :-1]], 1)
        seen = torch.where(before == 0, 0.0, before * rewards)  # 0 times infinity would not be 0
        last = q_target_last.gather(1, q_online_last.argmax(1, keepdim=True))[:, 0]
        return seen.sum(1) + torch.where(reach[:, -1] == 0, 0.0, reach[:, -1] * last)


class SharedReplay:
    r"""The memory between actors and learner: $P(i) \propto p_i^\alpha$, weights $(M P(i))^{-\beta}$ divided by their maximum.

    Transitions get a running number when they are added; `idx` speaks of these numbers, so that a priority can never land on a
    transition that has
    taken the place of the one that was sampled.

    Args:
        capacity: size to which :meth:`trim` cuts back; :meth:`add` may go beyond it.
        alpha: how much priorities matter, 0 is uniform.
        beta: how much the weights correct for it, 1 fully.

    Raises:
        ValueError: `capacity` below 1, a negative exponent.
    """

    def __init__(self, capacity: int, alpha: float = 0.6, beta: float = 0.4):
        if int(capacity) != capacity or capacity < 1 or not alpha >= 0 or not beta >= 0:
            raise ValueError(f"capacity must be a positive integer, alpha and beta >= 0, got {capacity}, {alpha} and {beta}")
        self.capacity, self.alpha, self.beta = int(capacity), float(alpha), float(beta)
        self._first = self._next = 0  # numbers of the oldest transition and of the next one to come
        self._room, self._rows, self._tree = 0, {}, SumTree(1)

    def __len__(self) -> int:
        return self._next - self._first

    def add(self, transitions: Mapping[str, Any], priorities: Any) -> Tensor:
        """Append B transitions ``{name: (B, ...)}`` with priorities ``(B,)``; returns their numbers ``(B,)``.

        Raises:
            ValueError: lengths, names or shapes of rows that differ, numbers of a kind that the memory cannot hold (fractions where it
                holds integers), or a priority that is negative or not finite.
        """
        rows = {name: torch.as_tensor(x) for name, x in transitions.items()}
        p, lengths = _priorities(priorities), {name: len(x) if x.dim() else -1 for name, x in rows.items()}
        if not rows or set(lengths.values()) != {len(p)}:
            raise ValueError(f"every array must have {len(p)} rows as priorities has, got {lengths}")
        if self._rows and rows.keys() != self._rows.keys():
            raise ValueError(f"this memory holds {sorted(self._rows)}, got {sorted(rows)}")
        for name, held in self._rows.items():
            x = rows[name]
            if x.shape[1:] != held.shape[1:] or not torch.can_cast(x.dtype, held.dtype):
                raise ValueError(
                    f"{name} must have rows of shape {tuple(held.shape[1:])} and fit {held.dtype}, got {tuple(x.shape[1:])} and {x.dtype}"
                )
        self._make_room(len(p), rows)
        idx = torch.arange(self._next, self._next + len(p))
        for name, x in rows.items():
            self._rows[name][idx % self._room] = x.to(self._rows[name].dtype)
        self._tree.set(idx % self._room, p**self.alpha)
        self._next += len(p)
        return idx

    def sample(self, n: int, generator: torch.Generator | None = None) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """`n` transitions drawn with replacement: ``(batch, idx (n,), weights (n,))``. If all priorities are 0 the draw is uniform.

        Raises:
            ValueError: the memory is empty or `n` below 1.
        """
        if not len(self):
            raise ValueError("cannot sample from an empty memory")
        if n < 1:
            raise ValueError(f"n must be at least 1, got {n}")
        total = self._tree.total()
        if total > 0:
            mass = torch.rand(n, dtype=torch.float64, generator=generator).numpy() * total
            slot = self._tree.find(mass)
            share = torch.from_numpy(self._tree[slot]) / total
            idx = self._first + torch.from_numpy((slot - self._first) % self._room)
        else:
            idx = self._first + torch.randint(len(self), (n,), generator=generator)
            share = torch.full((n,), 1 / len(self), dtype=torch.float64)
        weights = (len(self) * share) ** -self.beta
        batch = {name: x[idx % self._room] for name, x in self._rows.items()}
        return batch, idx, (weights / weights.max()).float()

    def update(self, idx: Any, priorities: Any) -> None:
        """Give the transitions with the numbers `idx` ``(n,)`` new priorities ``(n,)``; those that have left meanwhile are passed over.

        Raises:
            ValueError: lengths that differ, a number that was never given out, or a priority that is negative or not finite.
        """
        idx, p = torch.as_tensor(idx), _priorities(priorities)
        if idx.shape != p.shape:
            raise ValueError(f"idx and priorities must both be (n,), got {tuple(idx.shape)} and {tuple(p.shape)}")
        if len(idx) and not (int(idx.min()) >= 0 and int(idx.max()) < self._next):
            raise ValueError(f"idx must be numbers that add or sample returned, below {self._next}, got {int(idx.min())}..{int(idx.max())}")
        here = idx >= self._first
        if here.any():
            self._tree.set(idx[here] % self._room, p[here] ** self.alpha)

    def trim(self) -> int:
        """Drop the oldest transitions down to `capacity`; returns how many."""
        gone = max(0, len(self) - self.capacity)
        if gone:
            self._tree.set(torch.arange(self._first, self._first + gone) % self._room, 0.0)
            self._first += gone
        return gone

    def _make_room(self, more: int, like: Mapping[str, Tensor]) -> None:
        if len(self) + more <= self._room:
            return
        old, alive = self._room, torch.arange(self._first, self._next)
        self._room = max(self.capacity, 2 * old, len(self) + more)
        tree, rows = SumTree(self._room), {name: x.new_zeros((self._room, *x.shape[1:])) for name, x in like.items()}
        if len(alive):
            tree.set(alive % self._room, self._tree[(alive % old).numpy()])
            for name, x in rows.items():
                x[alive % self._room] = self._rows[name][alive % old]
        self._tree, self._rows = tree, rows


def _priorities(p: Any) -> Tensor:
    p = torch.as_tensor(p).detach().double()
    if p.dim() != 1:
        raise ValueError(f"priorities must be (B,), got shape {tuple(p.shape)}")
    if not bool((torch.isfinite(p) & (p >= 0)).all()):
        raise ValueError(f"priorities must be finite and not negative, got values from {float(p.min()):.3g} to {float(p.max()):.3g}")
    return p


class ApexDQN(DQN):
    r"""Ape-X with a deep Q-network: `n_actors` actors with their own $\epsilon_i$, a :class:`SharedReplay` and one learner.

    With ``workers=0`` all actors play in this process, one chunk after the other. With ``workers=w`` they are spread over w processes,
    which read the
    parameters from shared memory and send chunks through a pipe each. If one of them dies, the learner goes on with the others. Every
    actor has its
    own source of randomness: as long as the parameters are the same, it makes the same transitions in both modes.

    Args:
        env_fn: an id or a function that makes an environment; for processes it must be picklable (an id, a `functools.partial`, a
            function of a module).
        n_actors: number of actors N.
        n_step: steps in a target.
        workers: number of processes; 0: none.
        chunk: steps of an actor between two deliveries.
        refresh: steps of an actor between two looks at the learner's parameters.
        base, alpha_epsilon: of :func:`actor_epsilons`.
        capacity, alpha, beta: of the memory.
        warmup: transitions before the first update.
        updates_per_step: updates for every step of all actors; with processes this is an upper limit on the pace.
        priority_floor: added to every priority; a priority of 0 would bury a transition for ever.
        kwargs: those of the kit's `DQN`, for example hidden, lr, gamma, batch_size, target_period, reward_scale. There is no `epsilon`
            (each actor has its own) and no `prioritised` (the memory always is), and the target is always that of double Q-learning.

    Raises:
        ValueError: fewer than one actor, more workers than actors, a chunk or refresh below 1; `epsilon`, `prioritised` or ``double=False``.
    """

    def __init__(
        self,
        env_fn: Any,
        n_actors: int = 8,
        n_step: int = 3,
        *,
        workers: int = 0,
        chunk: int = 50,
        refresh: int = 400,
        base: float = 0.4,
        alpha_epsilon: float = 7.0,
        capacity: int = 100_000,
        alpha: float = 0.6,
        beta: float = 0.4,
        target_period: int = 2500,
        priority_floor: float = 1e-3,
        **kwargs: Any,
    ):
        if n_actors < 1 or not 0 <= workers <= n_actors or chunk < 1 or refresh < 1 or not priority_floor >= 0:
            raise ValueError(
                "n_actors, chunk and refresh must be at least 1, workers in 0..n_actors and priority_floor >= 0, "
                f"got {n_actors}, {chunk}, {refresh}, {workers} and {priority_floor}"
            )
        refused = sorted({"epsilon", "prioritised"} & kwargs.keys()) + ["double=False"] * (not kwargs.get("double", True))
        if refused:
            raise ValueError(
                f"Ape-X always has an epsilon for each actor (base, alpha_epsilon), a prioritised memory (alpha, beta) and double "
                f"Q-learning; got {', '.join(refused)}"
            )
        probe = as_vector(env_fn, 1)
        obs_dim, n_actions = math.prod(probe.single_observation_space.shape), int(probe.single_action_space.n)
        probe.close()
        super().__init__(
            obs_dim, n_actions, n_step=n_step, capacity=capacity, target_period=target_period, alpha=alpha, beta=beta, **kwargs
        )
        self.env_fn, self.workers, self.chunk, self.refresh, self.priority_floor = env_fn, workers, chunk, refresh, priority_floor
        self.epsilons = actor_epsilons(n_actors, base, alpha_epsilon).numpy()
        self.memory = SharedReplay(capacity, alpha, beta)
        self.processes: list[Any] = []

    @torch.no_grad()
    def act(self, obs: np.ndarray | Tensor, deterministic: bool = False) -> np.ndarray:
        """Greedy actions ``(B,)``; unless `deterministic`, with the random actions of the actors, in turn."""
        actions = self.q_values(self.tensor(obs)).argmax(-1).cpu().numpy()
        if deterministic:
            return actions
        random = self.rng.random(len(actions)) < np.resize(self.epsilons, len(actions))
        return np.where(random, self.rng.integers(self.n_actions, size=len(actions)), actions)

    def fit(
        self,
        env: Any = None,
        steps: int = 10_000,
        seed: int = 0,
        *,
        callback: Callable[[ApexDQN, dict[str, list]], bool | None] | None = None,
    ) -> dict[str, list]:
        """Learn from `steps` transitions of all actors together.

        Args:
            env: what the actors play; None: the `env_fn` of the constructor.
            steps: transitions.
            seed: of the actors and of the draws from the memory.
            callback: called after every delivery with the agent and the history; True ends the training.

        Returns:
            Of every finished episode "step" (transitions delivered so far), "update", "return" and "actor"; "alive" is the number of
            workers left after
            every delivery.
        """
        source = self.env_fn if env is None else env
        self.generator.manual_seed(seed)
        history: dict[str, list] = {"step": [], "update": [], "return": [], "actor": [], "alive": []}
        policy = _EpsilonGreedy(frozen_copy(self.online), self.epsilons, self.n_actions, self.priority_floor)
        settings = dict(n_step=self.n_step, gamma=self.gamma, chunk=self.chunk, refresh=self.refresh, reward_scale=self.reward_scale)
        pool = ActorPool(policy, self.online, source, len(self.epsilons), workers=self.workers, seed=seed, **settings)
        self.processes = pool.processes
        stop, owed, deliveries = self.transitions + steps, 0.0, pool.deliveries()
        try:
            while self.transitions < stop:
                transitions, priorities, episodes, alive = next(deliveries)
                self.memory.add(transitions, priorities)
                self.transitions += len(priorities)
                history["alive"].append(alive)
                for actor, total, _ in episodes:
                    history["step"].append(self.transitions)
                    history["update"].append(self.updates)
                    history["return"].append(total)
                    history["actor"].append(actor)
                if self.transitions >= self.warmup:
                    owed += self.updates_per_step * len(priorities) / len(self.epsilons)
                    while owed >= 1:
                        owed -= 1
                        self._learn_once()
                self.memory.trim()
                if callback is not None and callback(self, history):
                    break
        finally:
            deliveries.close()
        return history

    def td_errors(self, batch: dict[str, Tensor]) -> Tensor:
        q = self.online(batch["obs"]).gather(1, batch["actions"][:, None])[:, 0]
        with torch.no_grad():
            after = self.online(batch["next_obs"]), self.target(batch["next_obs"])
        # the n rewards were summed by the actor: what is left is one step with the discount of all
        return q - nstep_double_q_target(batch["returns"][:, None], batch["discounts"][:, None], *after)

    def _learn_once(self) -> None:
        batch, idx, weights = self.memory.sample(self.batch_size, self.generator)
        batch |= {name: batch[name].float() for name in ("obs", "next_obs")}
        report = self.update({name: x.to(self.device) for name, x in batch.items()} | {"weights": weights.to(self.device)})
        self.memory.update(idx, report["priorities"].cpu() + self.priority_floor)
        self.updates += 1


class _EpsilonGreedy:
    """How actors act: each at random with its own probability, and with the first priorities of what they saw."""

    def __init__(self, network: nn.Module, epsilons: np.ndarray, n_actions: int, floor: float):
        self.network, self.epsilons, self.n_actions, self.floor = network, epsilons, n_actions, floor

    def draw(self, rng: np.random.Generator, steps: int) -> np.ndarray:
        return rng.random((steps, 2))

    def act(self, obs: np.ndarray, draws: np.ndarray, names: Sequence[int], step: int) -> np.ndarray:
        greedy = self.network(torch.as_tensor(obs, dtype=torch.float32)).argmax(1).numpy()
        bold, which = draws.T
        return np.where(bold < self.epsilons[names], (which * self.n_actions).astype(np.int64), greedy)

    def priorities(self, rows: dict[str, Tensor]) -> np.ndarray:
        after = self.network(rows["next_obs"].float())
        goal = nstep_double_q_target(rows["returns"][:, None], rows["discounts"][:, None], after, after)
        delta = goal - self.network(rows["obs"].float()).gather(1, rows["actions"][:, None])[:, 0]
        return delta.abs().numpy() + self.floor
