r"""Reactor: distributional Retrace, the beta-leave-one-out gradient and prioritised sequences (gruslys2018reactor).

An actor-critic that replays old sequences must correct for the difference between the policy that acted and the one that is evaluated. Retrace does so for values over many steps, with
weights that are cut at 1; written as a mixture over all states and actions on the way it works for whole distributions of the return too. The policy then gets a gradient that uses the critic for all actions and
the observed return for the one that was taken. Sequences are replayed by priority, and where no priority is known yet it is guessed from the neighbours in time.

Equations: $x_t, a_t, r_t$ a sequence made by $\mu$, $d_i = \gamma(1 - \mathrm{done}_{t+i})$, $R_n = \sum_{j<n} (\prod_{i<j} d_i)\, r_{t+j}$ and $c_j = \lambda \min(1, \pi(a_{t+j}|x_{t+j}) / \mu(a_{t+j}|x_{t+j}))$. The target of $q(x_t, a_t)$ is the
projection of

$$ \sum_{n=1}^{N} \sum_a \alpha_{n,a}\; q(x_{t+n}, a) \;\text{ placed at }\; R_n + \Big(\prod_{i<n} d_i\Big) z , $$

$$ \alpha_{n,a} = c_1 \cdots c_{n-1} \big(\pi(a|x_{t+n}) - 1[a = a_{t+n}]\, c_n\big) \;\; (n < N), \qquad \alpha_{N,a} = c_1 \cdots c_{N-1}\, \pi(a|x_{t+N}) . $$

The weights add up to 1 and may be negative. The gradient of the policy, with the action $\hat a$ taken with probability $\mu$ and its return $R$, is

$$ G = \beta\, \big(R - Q(\hat a)\big) \nabla \pi(\hat a) + \sum_a Q(a) \nabla \pi(a), \qquad \beta = \min(c, 1/\mu(\hat a)) . $$

With $\beta = 1/\mu$ it is unbiased if $R$ is, however wrong $Q$ may be; a smaller $\beta$ trades bias for variance.

Deviations from the paper:

1. A perceptron without memory in the LSTM's place, and the loss stands on the first state of a sequence only.
2. Unknown priorities are interpolated linearly between known neighbours of the same copy of the environment; the paper averages them with a kernel in a tree of its own.
3. Acting and learning alternate in one process.

Later work: Rowland et al. (2018) and Bellemare et al. (2023) analyse the projection onto atoms that the target goes through. IMPALA (Espeholt et al., 2018) corrects state values instead of action values and scales further; R2D2 (Kapturowski et al., 2019)
uses n-step targets without any correction, with many actors and a large memory of sequences. MPO and its successors use Retrace for their critics.

Example:
    import torch
    from dlatlas.rl.reactor import distributional_retrace, retrace_coefficients

    atoms = torch.linspace(-1, 1, 5)
    rewards = torch.tensor([[0.0], [1.0]])  # two steps of one sequence
    discounts = torch.tensor([[0.9], [0.0]])  # the second step ends the episode
    pi = torch.tensor([[[0.2, 0.8]], [[0.5, 0.5]]])  # target policy in the two states that follow
    actions = torch.tensor([[0], [0]])  # what was done there (the last one does not count)
    probs = torch.full((2, 1, 2, 5), 0.2)  # the critic knows nothing
    for mu in (0.1, 0.4, 1.0):  # how likely that action was for the policy that acted
        c = retrace_coefficients(pi.gather(2, actions[..., None])[..., 0], torch.full((2, 1), mu))
        target = distributional_retrace(atoms, rewards, discounts, pi, actions, c, probs)
        print(f"mu={mu}: c={c[0, 0]:.2f}, target {[round(p, 2) for p in target[0].tolist()]}")
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from gymnasium.vector import VectorEnv
from torch import Tensor, nn

from dlatlas.rl.kit.agent import ReplayAgent
from dlatlas.rl.kit.nets import mlp
from dlatlas.rl.kit.returns import categorical_projection

__all__ = ["Reactor", "beta_loo_loss", "distributional_retrace", "retrace_coefficients", "retrace_mixture"]


def retrace_coefficients(pi_a: Tensor, mu_a: Tensor, lam: float = 1.0) -> Tensor:
    r"""$c = \lambda \min(1, \pi / \mu)$.

    Args:
        pi_a, mu_a: probabilities of the actions taken under the target and the behaviour policy, ``(N, B)``.
        lam: $\lambda$ in [0, 1].

    Raises:
        ValueError: shapes that differ, `lam` outside [0, 1], probabilities outside [0, 1] or a `mu_a` of 0.
    """
    if pi_a.shape != mu_a.shape or pi_a.numel() == 0:
        raise ValueError(f"pi_a and mu_a must have one shape, got {tuple(pi_a.shape)} and {tuple(mu_a.shape)}")
    if not 0 <= lam <= 1:
        raise ValueError(f"lam must lie in [0, 1], got {lam}")
    _probabilities("pi_a", pi_a)
    _probabilities("mu_a", mu_a)
    if not bool((mu_a > 0).all()):
        raise ValueError("mu_a must be positive: an action of probability 0 cannot have been taken")
    return lam * (pi_a / mu_a).clamp_max(1)


def retrace_mixture(pi: Tensor, actions: Tensor, c: Tensor) -> Tensor:
    r"""Weights $\alpha_{n,a}$ ``(N, B, A)`` of the states and actions that Retrace bootstraps from; they sum to 1 over n and a.

    Args:
        pi: target policy at $x_{t+1} \dots x_{t+N}$, ``(N, B, A)``; row k belongs to $x_{t+k+1}$, here and below.
        actions: taken there, ``(N, B)``; the last row is not used.
        c: coefficients there, ``(N, B)``; the last row is not used.

    Raises:
        ValueError: shapes that do not fit or rows of `pi` that are no probabilities.
    """
    if pi.dim() != 3 or pi.numel() == 0 or actions.shape != pi.shape[:2] or c.shape != pi.shape[:2]:
        raise ValueError(f"pi must be (N, B, A), actions and c (N, B), got {tuple(pi.shape)}, {tuple(actions.shape)} and {tuple(c.shape)}")
    _probabilities("pi", pi)
    c = c.to(pi.dtype)
    reach = torch.cat([torch.ones_like(c[:1]), c[:-1]]).cumprod(0)  # (N, B): c_1 ... c_{n-1}
    taken = torch.zeros_like(pi).scatter_(2, actions[..., None], c[..., None])
    taken[-1] = 0  # nothing comes after the last state that could correct it
    return reach[..., None] * (pi - taken)


def distributional_retrace(
    support: Tensor, rewards: Tensor, discounts: Tensor, pi: Tensor, actions: Tensor, c: Tensor, probs: Tensor
) -> Tensor:
    r"""Projected target distribution ``(B, K)`` of $q(x_t, a_t)$, without gradient; single entries may be slightly negative.

    Args:
        support: atoms, an increasing uniform grid ``(K,)``.
        rewards: $r_t \dots r_{t+N-1}$, ``(N, B)``.
        discounts: $d_0 \dots d_{N-1}$, $\gamma$ or 0 where the step ended the episode, ``(N, B)``.
        pi, actions, c: as in `retrace_mixture`; `c` of 0 ends the correction, as after a truncation.
        probs: $q(x_{t+n}, a)$ at $x_{t+1} \dots x_{t+N}$, ``(N, B, A, K)``.

    Raises:
        ValueError: shapes that do not fit.
    """
    if rewards.shape != actions.shape or discounts.shape != actions.shape:
        raise ValueError(f"rewards and discounts must be {tuple(actions.shape)}, got {tuple(rewards.shape)} and {tuple(discounts.shape)}")
    if probs.shape != (*pi.shape, *support.shape):
        raise ValueError(f"probs must be (N, B, A, K) = {(*pi.shape, *support.shape)}, got {tuple(probs.shape)}")
    with torch.no_grad():
        reach = discounts.cumprod(0)  # (N, B): product of the first n discounts
        before = torch.cat([torch.ones_like(reach[:1]), reach[:-1]])
        sums = (before * rewards).cumsum(0)  # R_n
        mixture = torch.einsum("nba,nbak->nbk", retrace_mixture(pi, actions, c).to(probs), probs)
        atoms = sums[..., None] + reach[..., None] * support  # (N, B, K)
        return categorical_projection(atoms, mixture, support).sum(0)


def beta_loo_loss(logits: Tensor, q: Tensor, actions: Tensor, returns: Tensor, mu: Tensor, c: float = 1.0) -> Tensor:
    r"""Minus the surrogate of the leave-one-out gradient, $-\mathrm{mean}[\beta (R - Q(\hat a)) \pi(\hat a) + \sum_a Q(a) \pi(a)]$.

    Args:
        logits: of the policy, ``(B, A)``; the only argument with a gradient.
        q: action values ``(B, A)``.
        actions: taken, ``(B,)``.
        returns: their (Retrace) returns ``(B,)``.
        mu: their probabilities when they were taken, ``(B,)``.
        c: largest $\beta$; infinity gives $\beta = 1/\mu$.

    Raises:
        ValueError: shapes that do not fit, `mu` outside (0, 1] or `c` negative.
    """
    if logits.dim() != 2 or logits.numel() == 0 or logits.shape != q.shape:
        raise ValueError(f"logits and q must both be (B, A), got {tuple(logits.shape)} and {tuple(q.shape)}")
    for name, x in (("actions", actions), ("returns", returns), ("mu", mu)):
        if x.shape != logits.shape[:1]:
            raise ValueError(f"{name} must be {tuple(logits.shape[:1])}, got {tuple(x.shape)}")
    if not bool(((mu > 0) & (mu <= 1 + 1e-5)).all()) or not c >= 0:
        raise ValueError(f"mu must lie in (0, 1] and c must not be negative, got mu from {float(mu.min())} to {float(mu.max())} and c={c}")
    pi, q, at = logits.softmax(-1), q.detach(), actions[:, None]
    beta = (1 / mu.detach()).clamp_max(c)
    taken = beta * (returns.detach() - q.gather(1, at)[:, 0]) * pi.gather(1, at)[:, 0]
    return -(taken + (q * pi).sum(1)).mean()


class Reactor(ReplayAgent):
    r"""One trunk with a policy head and a categorical action-value head, learning from replayed sequences.

    It acts by its policy mixed with a uniform one. The loss is the cross-entropy with the distributional Retrace target, plus the leave-one-out policy loss on
    $Q = \sum_k z_k q_k$ of the online network, without gradient, minus an entropy bonus. It needs an environment in which every step of every copy is a transition.

    Args:
        obs_dim: width of flat observations.
        n_actions: number of actions.
        support: atoms of the return; default 51 from -10 to 10.
        sequence: $N$, steps of a sequence.
        lam: $\lambda$ of Retrace.
        beta_clip: $c$ of the policy gradient.
        explore_rate: share of the uniform policy while training.
        entropy: weight of the entropy bonus.
        policy_weight: weight of the policy loss.
        hidden, lr: of the perceptron and of Adam.
        target_period: updates between two copies into the target network.
        refill_period: updates between two interpolations of unknown priorities (only with `prioritised`).
        kwargs: those of `ReplayAgent` but for `n_step`.
    """

    def __init__(
        self,
        obs_dim: int,
        n_actions: int,
        *,
        support: Tensor | None = None,
        sequence: int = 5,
        lam: float = 1.0,
        beta_clip: float = 1.0,
        explore_rate: float = 0.05,
        entropy: float = 0.01,
        policy_weight: float = 1.0,
        hidden: Sequence[int] = (64, 64),
        lr: float = 1e-3,
        target_period: int = 100,
        refill_period: int = 50,
        **kwargs,
    ):
        super().__init__(n_step=1, **kwargs)
        if sequence < 1 or not 0 <= lam <= 1 or not 0 <= explore_rate <= 1 or not beta_clip >= 0:
            raise ValueError(
                "sequence must be at least 1, lam and explore_rate in [0, 1] and beta_clip >= 0, "
                f"got {sequence}, {lam}, {explore_rate} and {beta_clip}"
            )
        support = torch.linspace(-10, 10, 51) if support is None else torch.as_tensor(support, dtype=torch.float32)
        categorical_projection(torch.zeros(1), torch.ones(1), support)  # raises what is wrong with the grid
        self.support, self.n_actions, self.sequence, self.lam = support.to(self.device), n_actions, sequence, lam
        self.beta_clip, self.explore_rate, self.entropy, self.policy_weight = beta_clip, explore_rate, entropy, policy_weight
        self.target_period, self.refill_period = target_period, refill_period
        self.online = _Heads(obs_dim, n_actions, len(support), hidden).to(self.device)
        self.target = self.make_target(self.online)
        self.optimizer = torch.optim.Adam(self.online.parameters(), lr=lr, fused=True)
        self._mu = np.zeros(0, dtype=np.float32)

    @torch.no_grad()
    def act(self, obs: np.ndarray | Tensor, deterministic: bool = False) -> np.ndarray:
        """The policy's most probable actions ``(B,)``; unless `deterministic` a sample of the policy mixed with the uniform one."""
        pi = self.online(self.tensor(obs))[0].softmax(-1)
        if deterministic:
            return pi.argmax(-1).cpu().numpy()
        mixed = ((1 - self.explore_rate) * pi + self.explore_rate / self.n_actions).cpu()
        actions = torch.multinomial(mixed, 1, generator=self.generator)
        self._mu = mixed.gather(1, actions)[:, 0].numpy()
        return actions[:, 0].numpy()

    def sample(self, n: int | None = None) -> dict[str, Tensor]:
        """`n` sequences: arrays ``(N, n, ...)`` obs, actions, rewards, discounts, next_obs, mu, and goes_on (no cut after the step); idx, weights ``(n,)``."""
        n, length = self.batch_size if n is None else n, self.sequence
        rows = len(self.buffer) // self._copies - length + 1  # how many starts each copy has
        if rows < 1:
            raise ValueError(f"the memory is too short for sequences of {length} steps")
        oldest = self.buffer._next if len(self.buffer) == self.capacity else 0
        if self.prioritised:
            idx = self._draw(n, rows, oldest)
            p = self.tree[idx]
            weights = (rows * self._copies * p / self.tree.total()) ** -self.beta
        else:
            idx = (oldest + torch.randint(rows * self._copies, (n,), generator=self.generator).numpy()) % self.capacity
            weights = np.ones(n)
        at = (idx + self._copies * np.arange(length)[:, None]) % self.capacity  # (N, n)
        flat = self.buffer.take(at.ravel())
        batch = {name: x.reshape(length, n, *x.shape[1:]).to(self.device) for name, x in flat.items()}
        batch["rewards"] = batch.pop("returns")
        same = (batch["next_obs"][:-1] == batch["obs"][1:]).flatten(2).all(2)  # after a cut the next row starts another episode
        batch["goes_on"] = torch.cat([same, torch.ones_like(same[:1]) if length > 1 else same.new_ones(1, n)])
        batch["idx"], batch["weights"] = torch.from_numpy(idx), self.tensor(weights / weights.max())
        return batch

    def update(self, batch: dict[str, Tensor]) -> dict[str, float]:
        """One step of Adam on sequences from `sample`; reports "critic_loss", "policy_loss", "entropy"."""
        nxt, actions = batch["next_obs"].float(), batch["actions"]  # (N, B, ...)
        steps, count = actions.shape
        with torch.no_grad():
            flat = nxt.flatten(0, 1)
            pi = self.online(flat)[0].softmax(-1).reshape(steps, count, -1)
            probs = self.target(flat)[1].softmax(-1).reshape(steps, count, self.n_actions, -1)
            later, mu = (torch.cat([x[1:], x[-1:]]) for x in (actions, batch["mu"]))  # what was done at x_{t+1}, ...
            c = retrace_coefficients(pi.gather(2, later[..., None])[..., 0], mu, self.lam) * batch["goes_on"]
            target = distributional_retrace(self.support, batch["rewards"], batch["discounts"], pi, later, c, probs)  # (B, K)
        logits, q_logits = self.online(batch["obs"][0].float())
        index = torch.arange(count, device=self.device)
        losses = -(target * q_logits[index, actions[0]].log_softmax(-1)).sum(-1)
        q = q_logits.detach().softmax(-1) @ self.support
        policy_loss = beta_loo_loss(logits, q, actions[0], target @ self.support, batch["mu"][0], self.beta_clip)
        log_pi = logits.log_softmax(-1)
        entropy = -(log_pi.exp() * log_pi).sum(-1).mean()
        critic_loss = (batch["weights"] * losses).mean()
        self.optimizer.zero_grad()
        (critic_loss + self.policy_weight * policy_loss - self.entropy * entropy).backward()
        self.optimizer.step()
        self.track_targets(period=self.target_period)
        report = {"critic_loss": critic_loss.item(), "policy_loss": policy_loss.item(), "entropy": entropy.item()}
        if self.prioritised:
            report["priorities"] = (target @ self.support - q[index, actions[0]]).abs()
        return report

    def _make_buffer(self, vec: VectorEnv) -> None:
        super()._make_buffer(vec)
        if self.capacity % vec.num_envs:
            raise ValueError(f"capacity must be a multiple of the {vec.num_envs} copies of the environment, got {self.capacity}")
        self._copies = vec.num_envs
        self.buffer.storage.setdefault("mu", torch.ones(self.capacity))
        self._known = np.zeros(self.capacity, dtype=bool) if not len(self.buffer) else self._known

    def _remember(self, transitions: dict[str, np.ndarray]) -> None:
        if len(transitions["returns"]) != self._copies:
            raise ValueError("sequences need an environment that resets in the step that ends an episode; this one spends steps on resets")
        slots = (self.buffer._next + np.arange(self._copies)) % self.capacity
        super()._remember({**transitions, "mu": self._mu})
        self._known[slots] = False

    def _prioritise(self, slots: Tensor, priorities: Tensor) -> None:
        super()._prioritise(slots, priorities)
        self._known[np.asarray(slots)] = True
        if self.updates % self.refill_period == 0:
            rows, root = len(self.buffer) // self._copies, self.alpha or 1.0  # the tree holds p^alpha
            oldest = self.buffer._next if len(self.buffer) == self.capacity else 0
            order = (oldest + np.arange(rows * self._copies)).reshape(rows, self._copies) % self.capacity
            for copy in order.T:  # the slots of one copy in the order of time
                known = self._known[copy]
                if known.any() and not known.all():
                    guess = np.interp(np.flatnonzero(~known), np.flatnonzero(known), self.tree[copy[known]] ** (1 / root))
                    self.tree.set(copy[~known], guess**root)

    def _draw(self, n: int, rows: int, oldest: int) -> np.ndarray:
        """Starts in proportion to their priorities; the last rows of the ring cannot start a sequence."""
        last = (oldest + rows * self._copies + np.arange((self.sequence - 1) * self._copies)) % self.capacity
        kept = self.tree[last]
        self.tree.set(last, 0.0)
        idx = self.tree.sample(n, self.generator)
        self.tree.set(last, kept)
        return idx


class _Heads(nn.Module):
    def __init__(self, obs_dim: int, n_actions: int, atoms: int, hidden: Sequence[int]):
        super().__init__()
        self.shape = (n_actions, atoms)
        self.trunk = nn.Sequential(nn.Flatten(), *mlp((obs_dim, *hidden), nn.ReLU), nn.ReLU())
        self.policy, self.value = nn.Linear(hidden[-1], n_actions), nn.Linear(hidden[-1], n_actions * atoms)
        with torch.no_grad():  # a policy that is uniform at first
            self.policy.weight.mul_(0.01)
            self.policy.bias.zero_()

    def forward(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        h = self.trunk(obs)
        return self.policy(h), self.value(h).unflatten(-1, self.shape)  # (B, A), (B, A, K)


def _probabilities(name: str, x: Tensor) -> None:
    if not bool(((x >= 0) & (x <= 1 + 1e-5)).all()):
        raise ValueError(f"{name} must hold probabilities, got values from {float(x.min()):.3g} to {float(x.max()):.3g}")
    if name == "pi" and not torch.allclose(x.sum(-1), torch.ones_like(x[..., 0]), atol=1e-3):
        raise ValueError("pi must sum to 1 over the actions")
