"""Actors that play with slightly old parameters, in this process or in processes of their own, and deliver what they saw to one learner.

Every actor has its own environment and its own source of randomness, which depends on the seed and its number only: as long as the parameters
are the same, it makes the same transitions whether it plays here or elsewhere, and in whatever company. Processes read the parameters from
shared memory and send chunks of transitions through a pipe each. No lock is shared, so an actor that dies takes nothing along.
"""

from __future__ import annotations

import contextlib
import copy
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import wait
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.multiprocessing as mp
from torch import Tensor, nn

from dlatlas.rl.kit.agent import ReplayAgent, copy_
from dlatlas.rl.kit.buffers import NStepAccumulator
from dlatlas.rl.kit.rollout import Source, as_vector

__all__ = ["ActingPolicy", "ActorPool", "Actors", "Delivery", "fit_from_actors", "frozen_copy"]


class ActingPolicy(Protocol):
    """How actors act. It must be picklable; only the parameters of `network` follow the learner's."""

    network: nn.Module

    def draw(self, rng: np.random.Generator, steps: int) -> np.ndarray:
        """All randomness of one actor for `steps` steps, ``(steps, k)``."""
        ...

    def act(self, obs: np.ndarray, draws: np.ndarray, names: Sequence[int], step: int) -> np.ndarray:
        """Actions ``(B, ...)`` for observations ``(B, ...)`` from the randomness ``(B, k)`` of the actors `names`, in their step number `step`."""
        ...

    def priorities(self, rows: dict[str, Tensor]) -> np.ndarray | None:
        """First priorities ``(M,)`` of new transitions, or None."""
        ...


class Delivery(NamedTuple):
    """What a group of actors brings: transitions ``{name: (M, ...)}``, their priorities, the finished episodes, and the number of living processes."""

    transitions: dict[str, np.ndarray]
    priorities: np.ndarray | None
    episodes: list[tuple[int, float, int]]  # actor, undiscounted return, length
    alive: int = 0


class Actors:
    """A group of actors in one process.

    Args:
        policy: how they act.
        names: their numbers.
        env_fn: what makes their environments.
        seed: with an actor's number, the seed of its environment and of its randomness.
        n_step, gamma: of the transitions.
        chunk: steps between two deliveries.
        refresh: steps between two looks at the learner's parameters.
        reward_scale: factor on the rewards of the transitions.
    """

    def __init__(
        self,
        policy: ActingPolicy,
        names: Sequence[int],
        env_fn: Source,
        seed: int,
        *,
        n_step: int = 1,
        gamma: float = 0.99,
        chunk: int = 50,
        refresh: int = 400,
        reward_scale: float = 1.0,
    ):
        self.policy, self.names, self.chunk, self.refresh, self.reward_scale = policy, list(names), chunk, refresh, reward_scale
        policy.network.requires_grad_(False)
        self.vec = as_vector(env_fn, len(self.names))
        if self.vec.num_envs != len(self.names):
            raise ValueError(f"env_fn must make one environment for each of {len(self.names)} actors, got {self.vec.num_envs}")
        seeds = [np.random.SeedSequence([seed, name]) for name in self.names]
        self.rngs = [np.random.default_rng(s) for s in seeds]
        self.obs, _ = self.vec.reset(seed=[int(s.generate_state(1)[0]) % 2**31 for s in seeds])
        self.accumulator = NStepAccumulator(n_step, gamma)
        self.running, self.length = np.zeros(len(self.names)), np.zeros(len(self.names), dtype=int)
        self.steps, self.looked = 0, None

    def look(self, load: Callable[[nn.Module], None]) -> None:
        """Take over the learner's parameters if it is time for it."""
        if self.looked is None or self.steps - self.looked >= self.refresh:
            load(self.policy.network)
            self.looked = self.steps

    @torch.no_grad()
    def play(self) -> Delivery:
        """A chunk of steps."""
        parts, episodes = [], []
        draws = np.stack([self.policy.draw(rng, self.chunk) for rng in self.rngs], 1)  # [chunk, actors, k]
        for step, drawn in enumerate(draws, self.steps):
            actions = self.policy.act(self.obs, drawn, self.names, step)
            new, rewards, terminated, truncated, info = self.vec.step(actions)
            valid = info["valid"]
            scaled = rewards * self.reward_scale
            parts.append(self.accumulator.push(self.obs, actions, scaled, info["final_obs"], terminated, truncated=truncated, valid=valid))
            self.running += np.where(valid, rewards, 0.0)
            self.length += valid
            for i in np.flatnonzero(info["_final_obs"]):
                episodes.append((self.names[i], float(self.running[i]), int(self.length[i])))
                self.running[i], self.length[i] = 0.0, 0
            self.obs = new
        self.steps += self.chunk
        out = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        out = {name: x if x.dtype.kind in "iu" else x.astype(np.float32) for name, x in out.items()}
        return Delivery(out, self.policy.priorities({name: torch.from_numpy(x) for name, x in out.items()}), episodes)


class ActorPool:
    """All actors of a learner: in this process, one group after the other, or spread over processes.

    Args:
        policy: how they act; its network is a copy of `online`.
        online: the learner's network.
        env_fn: what makes environments; for processes it must be picklable (an id, a class, a `functools.partial`, a function of a module).
        count: number of actors.
        workers: number of processes; 0: none.
        seed, settings: of :class:`Actors`.
    """

    def __init__(self, policy: ActingPolicy, online: nn.Module, env_fn: Source, count: int, *, workers: int, seed: int, **settings: Any):
        if count < 1 or not 0 <= workers <= count:
            raise ValueError(f"expected at least one actor and at most one process for each, got {count} actors and {workers} workers")
        self.policy, self.online, self.env_fn, self.count, self.workers, self.seed = policy, online, env_fn, count, workers, seed
        self.settings = settings
        self.processes: list[Any] = []

    def deliveries(self) -> Iterator[Delivery]:
        """What the actors bring, in the order of its arrival, until the iterator is closed; processes end with it.

        Raises:
            RuntimeError: an actor failed, or all processes have died.
        """
        return self._from_processes() if self.workers else self._in_turn()

    def _in_turn(self) -> Iterator[Delivery]:
        actors = Actors(self.policy, range(self.count), self.env_fn, self.seed, **self.settings)
        while True:
            actors.look(lambda net: copy_(net, [p.detach().cpu() for p in self.online.parameters()]))
            yield actors.play()

    def _parameters(self) -> Tensor:
        return nn.utils.parameters_to_vector(self.online.parameters()).detach().cpu()

    def _from_processes(self) -> Iterator[Delivery]:
        context = _context()
        flat = self._parameters().clone().share_memory_()
        control = torch.zeros(2, dtype=torch.long).share_memory_()  # [version of the parameters, stop]
        pipes = {}
        self.processes.clear()
        try:
            for part in np.array_split(np.arange(self.count), self.workers):
                mine, theirs = context.Pipe(duplex=False)
                arguments = (theirs, flat, control, self.policy, part.tolist(), self.env_fn, self.seed, self.settings)
                process = context.Process(target=_work, args=arguments, daemon=True)
                process.start()
                theirs.close()  # so that the end of the process is the end of the pipe
                self.processes.append(process)
                pipes[mine] = process
            while pipes:
                for pipe in wait(list(pipes)):
                    try:
                        kind, content = pipe.recv()
                    except (EOFError, OSError):  # the actor is gone, perhaps in the middle of a delivery
                        pipe.close()
                        del pipes[pipe]
                        continue
                    if kind == "error":
                        raise RuntimeError(f"an actor failed: {content}")
                    yield content._replace(alive=len(pipes))
                    control[0] += 1  # odd: being written
                    flat.copy_(self._parameters())
                    control[0] += 1
            raise RuntimeError("all actors have died")
        finally:
            control[1] = 1
            for pipe in pipes:
                pipe.close()  # an actor that waits to deliver wakes up with a broken pipe
            for process in self.processes:
                process.join(10)
                if process.is_alive():
                    process.kill()
                    process.join()


def fit_from_actors(
    agent: ReplayAgent,
    policy: ActingPolicy,
    online: nn.Module,
    env: Source,
    steps: int,
    seed: int = 0,
    *,
    count: int = 1,
    workers: int = 0,
    chunk: int = 50,
    refresh: int = 400,
    callback: Callable[[ReplayAgent, dict[str, list]], bool | None] | None = None,
) -> dict[str, list]:
    """As :meth:`ReplayAgent.fit`, with `count` actors that play apart from the learner.

    Args:
        agent: the learner; `agent.processes` are the actors' processes while it runs.
        policy, online: how actors act, and the network whose parameters they follow.
        env, steps, seed, callback: as in `ReplayAgent.fit`; the callback comes after every delivery.
        count, workers, chunk, refresh: of :class:`ActorPool` and :class:`Actors`.

    Returns:
        The history of `ReplayAgent.fit`, with the "actor" of every episode and, for every delivery, the number of processes "alive".
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    probe = as_vector(env, 1)
    agent._make_buffer(probe)
    settings = dict(n_step=agent.n_step, gamma=agent.gamma, chunk=chunk, refresh=refresh, reward_scale=agent.reward_scale)
    pool = ActorPool(policy, online, env, count, workers=workers, seed=seed, **settings)
    agent.processes = pool.processes
    history: dict[str, list] = {"step": [], "return": [], "length": [], "actor": [], "alive": []}
    agent.generator.manual_seed(seed)
    stop, owed, deliveries = agent.transitions + steps, 0.0, pool.deliveries()
    try:
        while agent.transitions < stop:
            delivery = next(deliveries)
            agent._remember(delivery.transitions)
            made = len(delivery.transitions["returns"])
            agent.transitions += made
            history["alive"].append(delivery.alive)
            for actor, total, length in delivery.episodes:
                history["step"].append(agent.transitions)
                history["return"].append(total)
                history["length"].append(length)
                history["actor"].append(actor)
            if agent.transitions >= agent.warmup:
                owed += agent.updates_per_step * made / count
                while owed >= 1:
                    owed -= 1
                    agent._learn(history)
            if callback is not None and callback(agent, history):
                break
    finally:
        deliveries.close()
    return history


def _work(
    pipe: Any, flat: Tensor, control: Tensor, policy: ActingPolicy, names: list[int], env_fn: Source, seed: int, settings: dict
) -> None:
    """What runs in an actor's process: play, deliver, look at the shared parameters, until told to stop."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the learner decides when to stop
    torch.set_num_threads(1)
    mine = torch.empty_like(flat)

    def load(net: nn.Module) -> None:
        while True:  # the learner never waits for a reader: read again if it wrote meanwhile
            version = int(control[0])
            mine.copy_(flat)
            if version % 2 == 0 and version == int(control[0]):
                break
            time.sleep(0.001)
        nn.utils.vector_to_parameters(mine, net.parameters())

    try:
        actors = Actors(policy, names, env_fn, seed, **settings)
        while not control[1]:
            actors.look(load)
            pipe.send(("chunk", actors.play()))
    except (BrokenPipeError, ConnectionResetError):
        pass  # the learner is done
    except Exception as error:
        with contextlib.suppress(OSError):
            pipe.send(("error", f"{type(error).__name__}: {error}"))


def _context() -> Any:
    # Neither copies the learner's open pipes into the actors, so the death of an actor is always seen; the fork server starts faster.
    method = "forkserver" if "forkserver" in mp.get_all_start_methods() else "spawn"
    context = mp.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload([__name__])
    return context


def frozen_copy(network: nn.Module) -> nn.Module:
    """A copy on the processor without gradients, for actors."""
    return copy.deepcopy(network).cpu().requires_grad_(False)
