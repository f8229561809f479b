r"""E-values: counters that look ahead (fox2018dora).

A visit counter says how often an action was tried here. It does not say whether the action leads to a place where nothing has been tried
yet. An E-value does: it is the value function of a world without any reward, started at 1 and learned by SARSA. The true value is 0, so
what is left of the 1 measures what is still to be learned, here *and* downstream. Its logarithm is a generalised counter.

Equations: with $E(s, a) = 1$ at first and the action $a'$ that is really taken in the next state $s'$,

$$ E(s, a) \leftarrow (1 - \alpha) E(s, a) + \alpha \gamma_E E(s', a'), \qquad C(s, a) = \log_{1-\alpha} E(s, a) . $$

With $\gamma_E = 0$ each visit multiplies by $1 - \alpha$, so $C$ is the number of visits. A stochastic rule $f(a \mid s)$ is made
deterministic by taking the action that is most behind its share of the visits (LLL: log f minus log of the log of E):

$$ a = \arg\max_a \; \log f(a \mid s) - \log C(s, a), \qquad \text{for a softmax: } \arg\max_a \; \beta\, q(s, a) - \log C(s, a) . $$

An action that was never tried has $C = 0$ and comes first.

Deviations from the paper:

1. The table holds $\log E$ and its rule (`EValues.choose`) works on these, so that counters of ten thousand visits can still be compared;
   the E-values themselves are 0 in floating point by then.
2. The tabular agent breaks ties between actions at random; otherwise the order in which the actions are named would be a hint.
3. The network learns E from the stream of transitions as they are taken (SARSA needs the next action), not from the memory, and by
   cross-entropy with the target: the same minimum as the square, but a gradient that does not vanish where the sigmoid is flat, which is
   where E starts.

Later work: For pixels, which never repeat, density models (Bellemare et al., 2016), hashes (Tang et al., 2017) and the error of
predicting a random network (Burda et al., 2019) became the usual surrogate counts. Propagating the novelty itself as a value, as here,
came back as successor counts (Machado et al., 2020) and as separate intrinsic value functions (Burda et al., 2019; Badia et al., 2020).

Example:
    from dlatlas.rl.e_values import DoraQ
    from dlatlas.rl.envs.toy import BatchedBridge

    for gamma_e in (0.0, 0.9):  # 0.0: plain visit counters
        agent = DoraQ(3 * 13 + 1, 4, copies=10, gamma_e=gamma_e)
        history = agent.fit(BatchedBridge(10, 12), steps=40_000)
        crossed = sum(r > 0 for r in history["return"])
        print(f"gamma_E = {gamma_e}: {crossed} of {len(history['return'])} episodes crossed the bridge of length 12")
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from dlatlas.rl.kit.agent import Agent
from dlatlas.rl.kit.nets import mlp
from dlatlas.rl.kit.rollout import Source, as_vector
from dlatlas.rl.kit.value_agent import DQN

__all__ = ["DoraDQN", "DoraQ", "EValues", "lll_action"]


class EValues:
    r"""Table of E-values, $E \leftarrow (1-\alpha) E + \alpha \gamma_E E(s', a')$, all 1 at first.

    Args:
        n_states: number of states S.
        n_actions: number of actions A.
        alpha: learning rate, in (0, 1).
        gamma_e: how far exploratory value travels, in [0, 1); 0 gives plain visit counts.

    Raises:
        ValueError: a rate outside its range or an empty table.
    """

    def __init__(self, n_states: int, n_actions: int, alpha: float = 0.1, gamma_e: float = 0.9):
        if not 0 < alpha < 1 or not 0 <= gamma_e < 1:
            raise ValueError(f"alpha must be in (0, 1) and gamma_e in [0, 1), got {alpha} and {gamma_e}")
        if n_states < 1 or n_actions < 1:
            raise ValueError(f"n_states and n_actions must be positive, got {n_states} and {n_actions}")
        self.alpha, self.gamma_e = alpha, gamma_e
        self._log = torch.zeros(n_states, n_actions, dtype=torch.float64)

    @property
    def E(self) -> Tensor:
        """The E-values ``[S, A]``, in (0, 1] up to underflow."""
        return self._log.exp()

    def counters(self) -> Tensor:
        r"""Generalised counts $\log_{1-\alpha} E$, ``[S, A]``."""
        return self._log / math.log1p(-self.alpha)

    def update(self, s: int | Tensor, a: int | Tensor, s2: int | Tensor, a2: int | Tensor, done: float | Tensor = False) -> None:
        r"""One SARSA step without reward; after the end of an episode the next E-value is 0.

        Args:
            s, a: state and action, integers or ``[B]`` of different pairs, which are then updated at the same time.
            s2, a2: the next state and the action taken there (any valid entries where `done`).
            done: whether the episode ended by termination, as bool or number.

        Raises:
            ValueError: indices outside the table, or a pair twice in one batch: the second visit would be lost.
        """
        s, a, s2, a2 = (torch.as_tensor(i).reshape(-1) for i in (s, a, s2, a2))
        for name, i, n in zip(("s", "a", "s2", "a2"), (s, a, s2, a2), 2 * self._log.shape):
            if i.is_floating_point() or (len(i) and not 0 <= int(i.min()) <= int(i.max()) < n):
                raise ValueError(f"{name} must hold integers in 0..{n - 1}, got {i.tolist()}")
        if len(s) > 1 and len(set((s * self._log.shape[1] + a).tolist())) < len(s):
            raise ValueError("a batch must name every pair (state, action) at most once; got one of them twice")
        ahead = self._log[s2, a2] + (math.log(self.gamma_e) if self.gamma_e else -math.inf)
        ahead = torch.where(torch.as_tensor(done).reshape(-1).bool(), -math.inf, ahead)
        self._log[s, a] = torch.logaddexp(self._log[s, a] + math.log1p(-self.alpha), ahead + math.log(self.alpha))

    def choose(self, s: int, q: Tensor, beta: float = 1.0) -> int:
        r"""The deterministic rule in state `s` for values `q` ``[A]``, $\arg\max_a \beta q_a - \log C(s, a)$, however often all was tried.

        Ties go to the lowest index.

        Raises:
            ValueError: a state outside the table or `q` of another shape.
        """
        q, (n_states, n_actions) = torch.as_tensor(q), self._log.shape
        if not 0 <= s < n_states or q.shape != (n_actions,):
            raise ValueError(f"s must be in 0..{n_states - 1} and q ({n_actions},), got {s} and {tuple(q.shape)}")
        return _first_best(_lll_scores(q, self.counters()[s], beta))


def lll_action(q: Tensor, e: Tensor, alpha: float, beta: float = 1.0) -> int:
    r"""The softmax rule made deterministic, $\arg\max_a \beta q_a - \log \log_{1-\alpha} e_a$; ties go to the lowest index.

    Args:
        q: action values ``[A]``.
        e: E-values ``[A]`` in [0, 1]; an action with $e = 1$ was never tried and comes first, one with $e = 0$ was tried endlessly and comes
            last. After thousands of visits every E-value rounds to 0 (in float64 when $C > 745 / |\log(1 - \alpha)|$): `EValues.choose` works on.
        alpha: the learning rate of the E-values.
        beta: inverse temperature of the softmax.

    Raises:
        ValueError: shapes that differ, `alpha` outside (0, 1), E-values outside [0, 1] or all 0, which say nothing any more.
    """
    q, e = torch.as_tensor(q), torch.as_tensor(e)
    if q.dim() != 1 or q.shape != e.shape or len(q) == 0:
        raise ValueError(f"q and e must both be [A], got {tuple(q.shape)} and {tuple(e.shape)}")
    if not 0 < alpha < 1:
        raise ValueError(f"alpha must be in (0, 1), got {alpha}")
    if not bool(((e >= 0) & (e <= 1)).all()):
        raise ValueError(f"e must be in [0, 1], got values from {float(e.min()):.3g} to {float(e.max()):.3g}")
    if not bool((e > 0).any()):
        raise ValueError("all e are 0: they have underflowed and cannot be compared; use EValues.choose, which works on their logarithms")
    return _first_best(_lll_scores(q, e.log() / math.log1p(-alpha), beta))


def _first_best(scores: Tensor) -> int:
    return int((scores == scores.max()).nonzero()[0])


def _lll_scores(q: Tensor, counters: Tensor, beta: float) -> Tensor:
    # log(0) = -inf makes an untried action +inf, whatever its value; no division anywhere.
    return beta * q - counters.clamp_min(0).log()


class DoraQ(Agent):
    r"""Tabular Q-learning whose exploration is guided by E-values; independent learners, one a copy of the environment, side by side.

    With ``rule="lll"`` it takes $\arg\max_a \beta q_a - \log C_a$, where C are E-value counters (or, with ``gamma_e=0``, plain visit
    counts); the
    rules "softmax" ($\propto e^{\beta q_a}$) and "epsilon" (greedy, random with probability `epsilon`) do not look at them. Ties are
    broken at random.

    Args:
        n_states, n_actions: sizes of the tables; observations are indices of states.
        copies: number of independent learners; copy i learns from row i of every batch only.
        rule: "lll", "softmax" or "epsilon".
        gamma, alpha: discount and learning rate of the action values.
        gamma_e, alpha_e: discount and learning rate of the E-values.
        beta: inverse temperature.
        epsilon: share of random actions.

    Raises:
        ValueError: an unknown rule or a rate outside its range.
    """

    def __init__(
        self,
        n_states: int,
        n_actions: int,
        *,
        copies: int = 1,
        rule: str = "lll",
        gamma: float = 0.95,
        alpha: float = 0.1,
        gamma_e: float = 0.9,
        alpha_e: float = 0.1,
        beta: float = 10.0,
        epsilon: float = 0.1,
    ):
        super().__init__()
        if rule not in ("lll", "softmax", "epsilon"):
            raise ValueError(f"rule must be 'lll', 'softmax' or 'epsilon', got {rule!r}")
        if copies < 1 or not 0 <= gamma <= 1 or not 0 < alpha <= 1 or not 0 <= epsilon <= 1:
            raise ValueError(
                f"copies >= 1, gamma, epsilon in [0, 1] and alpha in (0, 1] expected, got {copies}, {gamma}, {epsilon}, {alpha}"
            )
        self.n_states, self.rule, self.gamma, self.alpha, self.beta, self.epsilon = n_states, rule, gamma, alpha, beta, epsilon
        # Independent copies are one table with disjoint states.
        self.e_values = EValues(copies * n_states, n_actions, alpha_e, gamma_e)
        self.q = torch.zeros(copies * n_states, n_actions, dtype=torch.float64)
        self._base = torch.arange(copies) * n_states

    def act(self, obs: Any, deterministic: bool = False) -> np.ndarray:
        """Actions ``(copies,)`` for the states ``(copies,)``; `deterministic` is greedy in the values, with ties to the lowest index."""
        if deterministic:
            return self.q[self._base + torch.as_tensor(obs)].numpy().argmax(1)
        rows = self._base + torch.as_tensor(obs)
        q, noise = self.q[rows], torch.rand(len(rows), self.q.shape[1], dtype=torch.float64, generator=self.generator)
        if self.rule == "lll":
            scores = _lll_scores(q, self.e_values.counters()[rows], self.beta)
        elif self.rule == "softmax":
            return (self.beta * q - (-noise.log()).log()).argmax(1).numpy()  # the Gumbel trick
        else:
            scores = q
        tied = scores == scores.max(1, keepdim=True).values
        if self.rule == "epsilon":
            tied |= torch.rand(len(rows), 1, generator=self.generator) < self.epsilon  # a random step is a tie between all
        return torch.where(tied, noise, -1.0).argmax(1).numpy()

    def update(self, batch: Mapping[str, Any]) -> dict[str, float]:
        """One step of Q-learning and of the E-values for every copy: obs, actions, rewards, next_obs, next_actions, dones (bool or
        number), each ``(copies,)``."""
        s, s2 = (self._base + torch.as_tensor(batch[name]) for name in ("obs", "next_obs"))
        a, a2 = (torch.as_tensor(batch[name]) for name in ("actions", "next_actions"))
        done = torch.as_tensor(batch["dones"]).bool()
        target = torch.as_tensor(batch["rewards"]) + self.gamma * ~done * self.q[s2].max(1).values
        delta = target - self.q[s, a]
        self.q[s, a] += self.alpha * delta
        self.e_values.update(s, a, s2, a2, done)
        return {"td_error": float(delta.abs().mean())}

    def fit(
        self, env: Source, steps: int, seed: int = 0, *, callback: Callable[[DoraQ, dict[str, list]], bool | None] | None = None
    ) -> dict[str, list]:
        """Learn for `steps` transitions over all copies; `callback` as in the kit's agents, True ends the training.

        Returns:
            A row for every finished episode: "step" (transitions so far), "return" and "copy" (which learner).
        """
        vec = as_vector(env, len(self._base))
        if vec.num_envs != len(self._base):
            raise ValueError(f"this agent learns in {len(self._base)} copies, the environment has {vec.num_envs}")
        self.generator.manual_seed(seed)
        history: dict[str, list] = {"step": [], "return": [], "copy": []}
        running, done_steps = np.zeros(vec.num_envs), 0
        obs, _ = vec.reset(seed=seed)
        actions = self.act(obs)
        while done_steps < steps:
            new, rewards, terminated, truncated, info = vec.step(actions)
            # SARSA: the action taken next, chosen before this transition changes the table. After a cut nothing is taken any more.
            following = taken = self.act(new)
            if truncated.any():
                taken = np.where(truncated, self.act(info["final_obs"]), following)
            self.update(
                {
                    "obs": obs,
                    "actions": actions,
                    "rewards": rewards,
                    "next_obs": info["final_obs"],
                    "next_actions": taken,
                    "dones": terminated,
                }
            )
            done_steps += vec.num_envs
            running += rewards
            ended = np.flatnonzero(info["_final_obs"])
            history["step"] += [done_steps] * len(ended)
            history["return"] += running[ended].tolist()
            history["copy"] += ended.tolist()
            running[ended] = 0.0
            obs, actions = new, following
            if callback is not None and callback(self, history):
                break
        return history


class DoraDQN(DQN):
    r"""DQN with a second head for E-values, $E = \mathrm{sigmoid}(\cdot)$, and the deterministic rule in place of epsilon.

    The E head is trained on every step as it is taken, by one step of gradient descent on the cross-entropy of $E(s, a)$ and
    $\gamma_E E(s', a')$, or 0 after the end of an episode. In
    $\arg\max_a \beta q_a - \log\log_{1-\alpha} E_a$ the base of the logarithm shifts all actions alike and drops out.

    Args:
        obs_dim, n_actions: as in `DQN`.
        hidden: widths of the layers that both heads share.
        gamma_e: discount of the E-values.
        e_lr: learning rate of the plain gradient steps of the E head.
        e_bias: initial bias of the E head; 4 starts E near 0.98.
        beta: inverse temperature of the rule.
        zero_head: start with equal values, so that at first only the E-values speak.
        kwargs: those of `DQN`; `n_step` must stay 1 and `network` and `epsilon` are not used.

    Raises:
        ValueError: `gamma_e` outside [0, 1), a learning rate that is not positive, or `n_step` above 1.
    """

    def __init__(
        self,
        obs_dim: int,
        n_actions: int,
        *,
        hidden: tuple[int, ...] = (64, 64),
        gamma_e: float = 0.9,
        e_lr: float = 0.05,
        e_bias: float = 4.0,
        beta: float = 10.0,
        zero_head: bool = True,
        **kwargs: Any,
    ):
        if not 0 <= gamma_e < 1 or not e_lr > 0:
            raise ValueError(f"gamma_e must be in [0, 1) and e_lr positive, got {gamma_e} and {e_lr}")
        if kwargs.get("n_step", 1) != 1:
            raise ValueError(f"the E-values follow single steps: n_step must be 1, got {kwargs['n_step']}")
        super().__init__(obs_dim, n_actions, network=_TwoHeads(obs_dim, n_actions, hidden, e_bias), zero_head=zero_head, **kwargs)
        self.gamma_e, self.beta = gamma_e, beta
        self.e_optimizer = torch.optim.SGD(self.online.parameters(), lr=e_lr)
        self._seen, self._began = -1, np.zeros(0, dtype=bool)

    def e_values(self, obs: Tensor) -> Tensor:
        """E-values ``(B, n_actions)`` in (0, 1)."""
        return self.online.e_logits(obs).sigmoid()

    @torch.no_grad()
    def act(self, obs: np.ndarray | Tensor, deterministic: bool = False) -> np.ndarray:
        """The deterministic rule, or, with `deterministic`, the best action."""
        obs = self.tensor(obs)
        scores = self.q_values(obs)
        if not deterministic:
            scores = _lll_scores(scores, -self.e_values(obs).log(), self.beta)
        return scores.argmax(1).cpu().numpy()

    def begin_episodes(self, mask: np.ndarray) -> None:
        self._began = mask.copy()

    def explore(self, obs: np.ndarray) -> np.ndarray:
        actions = self.act(obs)
        if len(self.buffer) and self.transitions - self._seen == len(obs):
            # With single steps the newest rows of the memory are the last step of every copy, in order.
            newest = (self.transitions - len(obs) + np.arange(len(obs))) % self.capacity
            batch, began = self.buffer.take(newest), torch.as_tensor(self._began)
            done = batch["discounts"] == 0
            self._learn_e(batch, self.tensor(actions, torch.long), done, keep=~began | done)  # after a cut nothing was taken next
        self._seen, self._began = self.transitions, np.zeros(len(obs), dtype=bool)
        return actions

    def _learn_e(self, batch: dict[str, Tensor], next_actions: Tensor, done: Tensor, keep: Tensor) -> None:
        batch, done, keep = {name: x.to(self.device) for name, x in batch.items()}, done.to(self.device), keep.to(self.device)
        with torch.no_grad():
            ahead = self.e_values(batch["next_obs"].float()).gather(1, next_actions[:, None])[:, 0]
        logits = self.online.e_logits(batch["obs"].float()).gather(1, batch["actions"][:, None])[:, 0]
        loss = (keep * binary_cross_entropy_with_logits(logits, self.gamma_e * ~done * ahead, reduction="none")).mean()
        self.e_optimizer.zero_grad()
        loss.backward()
        self.e_optimizer.step()


class _TwoHeads(nn.Module):
    """Shared layers under a linear head of action values and a sigmoid head of E-values."""

    def __init__(self, obs_dim: int, n_actions: int, hidden: tuple[int, ...], e_bias: float):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), *mlp((obs_dim, *hidden), nn.ReLU), nn.ReLU())
        self.e_head, self.q_head = nn.Linear(hidden[-1], n_actions), nn.Linear(hidden[-1], n_actions)
        nn.init.zeros_(self.e_head.weight)
        nn.init.constant_(self.e_head.bias, e_bias)

    def forward(self, obs: Tensor) -> Tensor:
        return self.q_head(self.body(obs))

    def e_logits(self, obs: Tensor) -> Tensor:
        return self.e_head(self.body(obs))
