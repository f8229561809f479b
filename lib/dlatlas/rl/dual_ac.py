r"""Dual actor-critic (dai2018boosting).

Optimal values are the solution of a linear programme: the smallest function that no action can improve on. Its Lagrangian is a game. One
player, the dual critic, moves the values $V$ down; the other one puts weight $\rho$ on states and actions whose Bellman inequality is
violated. That weight is a policy and a distribution over states at once, so actor and critic optimise one and the same objective. Played
naively, such a game circles. A penalty that ties $V$ to returns that were really observed ("path regularisation") bends the critic's side,
and the game comes to rest.

Equations: with start distribution $\mu$ and discount $\gamma$,

$$ \min_V \max_{\rho \ge 0}\; L(V, \rho) = (1-\gamma)\, \mathbb E_\mu V(s) + \sum_{s,a} \rho(s, a)\, \delta(s, a), \qquad \delta = R(s,a) + \gamma\, \mathbb E V(s') - V(s) . $$

At the optimum $V = V^\star$ and $\rho(s, a) = \alpha(s)\, \pi^\star(a|s)$, where $\alpha$ is the normalised discounted occupancy. Over
$k+1$ steps, with observed returns of a behaviour policy $\pi_b$,

$$ L_r = (1-\gamma^{k+1})\, \mathbb E_\mu V + \mathbb E_{\alpha, \pi}\Big[\sum_{i \le k} \gamma^i R_i + \gamma^{k+1} V(s_{k+1}) - V(s_0)\Big]
 + \eta_V\, \mathbb E_{\mu, \pi_b}\Big[\Big(\sum_i \gamma^i R_i - V(s_0)\Big)^2\Big] . $$

One round: gradient steps on $V$; $\alpha \leftarrow \alpha\, e^{\text{step} \cdot \delta}$, renormalised; a natural-gradient step of $\pi$
on $\mathbb E_{\alpha,\pi}[\delta]$.

Deviations from the paper:

1. The ascent step on $\alpha$ is the proximal one in Kullback-Leibler divergence. The agent keeps $\alpha$ as weights of the states of a
   batch, relative to the visited distribution.
2. The behaviour policy of the path term is the present one, whose paths are at hand. The agent starts these paths in all visited states,
   and cuts them at the end of a segment, where $V$ (held fixed) stands for the rest.
3. The policy step uses the score of a path's first action only, weighted by the path's $\delta$; every visited state starts a path, so
   each action is the first one of some path.

Later work: methods that estimate the same weights $\rho$ from logged data of any policy (DualDICE, Nachum et al. 2019, and its family)
grew out of this Lagrangian. Nachum and Dai (2020) collect the reformulations and show that a convex regulariser on $\rho$ makes them
well-posed. For control with on-policy data, proximal policy optimisation with a plain value regression remained the common choice.

Example:
    import torch
    from dlatlas.rl.dual_ac import recover_policy, solve_tabular
    from dlatlas.rl.kit.tabular import value_iteration

    P = torch.rand(12, 3, 12, dtype=torch.float64) ** 4  # a random decision process
    P, R = P / P.sum(2, keepdim=True), torch.rand(12, 3, dtype=torch.float64)
    start = torch.full((12,), 1 / 12, dtype=torch.float64)
    best, q = value_iteration(P, R, 0.9)
    for eta_v in (0.0, 1.0):  # without and with path regularisation
        path, V, rho = solve_tabular(P, R, start, 0.9, eta_v=eta_v, iterations=800, step=0.05)
        policy, weight = recover_policy(rho)
        agree = (policy.argmax(1) == q.argmax(1)).sum().item()
        print(f"eta_v {eta_v}: error of V {(V - best).abs().max():.3f}, best action in {agree} of 12 states")
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.distributions import kl_divergence

from dlatlas.rl.kit.agent import Agent
from dlatlas.rl.kit.nets import ActorCritic
from dlatlas.rl.kit.pg import trpo_step
from dlatlas.rl.kit.returns import discounted
from dlatlas.rl.kit.rollout import Source, as_vector, collect

__all__ = ["DualAC", "lagrangian", "path_lagrangian", "recover_policy", "solve_tabular"]


def lagrangian(P: Tensor, R: Tensor, mu: Tensor, gamma: float, V: Tensor, rho: Tensor) -> Tensor:
    r"""$L(V, \rho) = (1-\gamma) \mu^\top V + \sum_{s,a} \rho(s,a) \big[R(s,a) + \gamma \sum_{s'} P(s'|s,a) V(s') - V(s)\big]$.

    Args:
        P: transition probabilities ``[S, A, S]``.
        R: expected rewards ``[S, A]``.
        mu: start distribution ``[S]``.
        gamma: discount in [0, 1).
        V: values ``[S]``.
        rho: weights ``[S, A]``, not negative.

    Returns:
        A scalar, differentiable in `V` and `rho`.

    Raises:
        ValueError: shapes that do not fit, a discount outside [0, 1) or negative weights.
    """
    _check_mdp(P, R, mu, gamma)
    if V.shape != mu.shape or rho.shape != R.shape:
        raise ValueError(f"expected V {tuple(mu.shape)} and rho {tuple(R.shape)}, got {tuple(V.shape)} and {tuple(rho.shape)}")
    if bool((rho.detach() < 0).any()):
        raise ValueError(f"rho must not be negative, smallest is {float(rho.min()):g}")
    return (1 - gamma) * (mu @ V) + (rho * (R + gamma * P @ V - V.unsqueeze(1))).sum()


def path_lagrangian(
    v0_init: Tensor,
    v0: Tensor,
    rewards: Tensor,
    v_last: Tensor,
    behaviour_rewards: Tensor,
    behaviour_v0: Tensor,
    gamma: float,
    eta_v: float,
    weights: Tensor | None = None,
) -> Tensor:
    r"""Sample estimate of the multi-step Lagrangian $L_r$ with path regularisation.

    Args:
        v0_init: values ``[M]`` of states drawn from the start distribution.
        v0: values ``[B]`` of the first states of the policy's paths.
        rewards: the rewards of these paths, ``[B, k + 1]``.
        v_last: values ``[B]`` of the states after them (0 where the episode has ended).
        behaviour_rewards: rewards ``[C, K]`` of the behaviour policy's paths; $K$ may differ from $k + 1$, a longer path is closer to a
            return.
        behaviour_v0: values ``[C]`` of their first states.
        gamma: discount in [0, 1].
        eta_v: strength $\eta_V$ of the penalty, not negative.
        weights: state weights $\alpha$ of the paths, ``[B]``, not negative; only their proportions count. None weighs all alike.

    Returns:
        A scalar for the critic to minimise, differentiable in all values and weights.

    Raises:
        ValueError: shapes that do not fit, empty batches, a bad discount, or negative `eta_v` or `weights`.
    """
    if rewards.dim() != 2 or v0.shape != rewards.shape[:1] or v_last.shape != v0.shape or rewards.numel() == 0:
        shapes = [tuple(x.shape) for x in (rewards, v0, v_last)]
        raise ValueError(f"expected rewards [B, k + 1], v0 [B] and v_last [B], got {shapes}")
    if behaviour_rewards.dim() != 2 or behaviour_v0.shape != behaviour_rewards.shape[:1] or behaviour_rewards.numel() == 0:
        shapes = [tuple(x.shape) for x in (behaviour_rewards, behaviour_v0)]
        raise ValueError(f"expected behaviour_rewards [C, K] and behaviour_v0 [C], got {shapes}")
    if v0_init.dim() != 1 or len(v0_init) == 0:
        raise ValueError(f"v0_init must have shape [M] with M >= 1, got {tuple(v0_init.shape)}")
    if not 0 <= gamma <= 1 or not eta_v >= 0:
        raise ValueError(f"gamma must be in [0, 1] and eta_v >= 0, got {gamma} and {eta_v}")
    delta = rewards @ _powers(gamma, rewards) + gamma ** rewards.shape[1] * v_last - v0  # [B]
    if weights is None:
        surprise = delta.mean()
    else:
        if weights.shape != v0.shape or bool((weights.detach() < 0).any()) or not float(weights.detach().sum()) > 0:
            raise ValueError(f"weights must be [B] = {tuple(v0.shape)}, not negative and not all zero, got {tuple(weights.shape)}")
        surprise = (weights * delta).sum() / weights.sum()
    miss = behaviour_rewards @ _powers(gamma, behaviour_rewards) - behaviour_v0  # [C]
    return (1 - gamma ** rewards.shape[1]) * v0_init.mean() + surprise + eta_v * miss.square().mean()


def recover_policy(rho: Tensor) -> tuple[Tensor, Tensor]:
    r"""Split $\rho(s, a) = \alpha(s)\, \pi(a|s)$ into policy and state weights.

    Args:
        rho: ``[S, A]``, not negative.

    Returns:
        ``pi [S, A]`` (uniform in states without weight) and ``alpha [S]``.

    Raises:
        ValueError: not a matrix, or negative entries.
    """
    if rho.dim() != 2 or rho.numel() == 0 or not bool((rho >= 0).all()):
        raise ValueError(f"rho must be a matrix [S, A] without negative entries, got shape {tuple(rho.shape)}")
    alpha = rho.sum(1)
    held = (alpha > 0).unsqueeze(1)
    pi = torch.where(held, rho / torch.where(held, alpha.unsqueeze(1), 1.0), 1.0 / rho.shape[1])
    return pi, alpha


def solve_tabular(
    P: Tensor,
    R: Tensor,
    mu: Tensor,
    gamma: float,
    *,
    eta_v: float = 1.0,
    behaviour: Tensor | None = None,
    iterations: int = 3000,
    lr: float = 3.0,
    step: float = 0.1,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Play the game with exact expectations: a gradient step on $V$, then $\rho \leftarrow \rho\, e^{\text{step}\cdot\delta}$.

    The weights are *not* renormalised: with $\sum\rho = 1$ forced, $L$ would not change when a constant is added to $V$, and nothing would
    fix the level of the values.

    Args:
        P: transition probabilities ``[S, A, S]``.
        R: expected rewards ``[S, A]``.
        mu: start distribution ``[S]``.
        gamma: discount in [0, 1).
        eta_v: strength of the path term $\eta_V\, \mathbb E_\mu (V^{\pi_b} - V)^2$ over whole paths.
        behaviour: behaviour policy ``[S, A]`` of that term; None means the present policy.
        iterations: number of rounds.
        lr: step on $V$.
        step: step on $\rho$.

    Returns:
        All values ``[iterations, S]``, and the last `V` and `rho`.

    Raises:
        ValueError: shapes that do not fit, or numbers out of range.
        FloatingPointError: the steps were too large and the game diverged.
    """
    _check_mdp(P, R, mu, gamma)
    if not eta_v >= 0 or iterations < 1 or not lr > 0 or not step > 0:
        raise ValueError(f"expected eta_v >= 0, iterations >= 1, lr > 0, step > 0, got {eta_v}, {iterations}, {lr}, {step}")
    V, rho = torch.zeros_like(mu), torch.full_like(R, 1 / R.numel())
    path, eye = [], torch.eye(len(mu), dtype=P.dtype, device=P.device)
    for i in range(iterations):
        pi, alpha = recover_policy(rho)
        slope = (1 - gamma) * mu + gamma * torch.einsum("sa,sat->t", rho, P) - alpha  # of L in V
        if eta_v > 0:
            if behaviour is None or i == 0:
                pi_b = pi if behaviour is None else behaviour
                value_b = torch.linalg.solve(eye - gamma * torch.einsum("sa,sat->st", pi_b, P), (pi_b * R).sum(1))
            slope = slope + 2 * eta_v * mu * (V - value_b)
        V = V - lr * slope
        if not bool(torch.isfinite(V).all() and torch.isfinite(rho).all()):
            raise FloatingPointError(
                f"the game diverged in round {i + 1} with lr={lr} and step={step}; take smaller steps or a larger eta_v"
            )
        delta = R + gamma * P @ V - V.unsqueeze(1)
        rho = rho * (step * delta).clamp(-5, 5).exp()
        path.append(V)
    return torch.stack(path), V, rho


class DualAC(Agent):
    r"""On-policy agent with a Gaussian policy: gradient steps on $V$, a proximal step on $\alpha$, a natural-gradient step on $\pi$.

    Args:
        obs_dim: width of flat observations.
        act_dim: number of action dimensions.
        k: a path of the Lagrangian has `k + 1` rewards.
        eta_v: strength of path regularisation.
        alpha_step: step of the ascent on the state weights over one round, in standard deviations of $\delta$; 0 keeps the visited
            distribution.
        gamma: discount.
        horizon: steps of a segment.
        max_kl: size of the policy step.
        value_steps: steps of Adam on $V$ in each round.
        lr: its learning rate.
        hidden: widths of the hidden layers.
        log_std: start of the policy's log-width.
        reward_scale: factor on the rewards that are learned from.

    Raises:
        ValueError: a number out of its range.
    """

    def __init__(
        self,
        obs_dim: int,
        act_dim: int,
        *,
        k: int = 9,
        eta_v: float = 1.0,
        alpha_step: float = 0.1,
        gamma: float = 0.99,
        horizon: int = 128,
        max_kl: float = 0.01,
        value_steps: int = 20,
        lr: float = 1e-3,
        hidden: Sequence[int] = (64, 64),
        log_std: float = 0.0,
        reward_scale: float = 1.0,
    ):
        super().__init__()
        if not 0 <= k < horizon or not 0 <= gamma < 1 or value_steps < 1:
            raise ValueError(
                f"expected 0 <= k < horizon, 0 <= gamma < 1 and value_steps >= 1, got {k}, {horizon}, {gamma} and {value_steps}"
            )
        for name, value in (("eta_v", eta_v), ("alpha_step", alpha_step)):
            if not value >= 0:
                raise ValueError(f"{name} must not be negative, got {value}")
        self.k, self.eta_v, self.alpha_step, self.gamma, self.horizon = k, eta_v, alpha_step, gamma, horizon
        self.max_kl, self.value_steps, self.reward_scale = max_kl, value_steps, reward_scale
        self.net = ActorCritic(obs_dim, act_dim=act_dim, hidden=hidden, log_std=log_std)
        self.optimizer = torch.optim.Adam(self.net.critic.parameters(), lr=lr, fused=True)
        self.starts = torch.zeros(0, obs_dim)
        self.ended: Tensor | None = None  # which copies ended an episode with their last step; None: all are fresh

    def act(self, obs: np.ndarray | Tensor, deterministic: bool = False) -> np.ndarray:
        """Draws from the policy, or its mean."""
        return self.net.act(obs, deterministic, self.generator)

    def fit(self, env: Source, steps: int, seed: int = 0, *, n_envs: int = 8) -> dict[str, list]:
        """Train for `steps` transitions over all copies.

        Returns:
            "step" and "return" of finished episodes, and what `update` reported at each "update".
        """
        vec, made = as_vector(env, n_envs), 0
        history: dict[str, list] = {"step": [], "return": [], "update": []}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.generator.manual_seed(seed)
            vec.reset(seed=seed)
            vec.running_returns, self.ended = np.zeros(vec.num_envs), None
            while made < steps:
                segment = collect(self.net, vec, self.horizon, self.generator)
                made += int(segment["valid"].sum())
                episodes = segment["episode_returns"].tolist()
                history["step"] += [made] * len(episodes)
                history["return"] += episodes
                history["update"].append(made)
                for name, value in self.update(segment).items():
                    history.setdefault(name, []).append(value)
        return history

    def update(self, batch: dict[str, Tensor]) -> dict[str, float]:
        """One round on a segment of `dlatlas.rl.kit.rollout.collect`; reports "lagrangian", "kl" and "largest_weight"."""
        paths, value = self.paths(batch), self.net.value
        log_alpha = torch.zeros(len(paths["first"]))  # relative to the visited distribution
        for _ in range(self.value_steps):
            v_last, v_first = value(paths["last"]) * paths["goes_on"], value(paths["first"])
            weights = torch.softmax(log_alpha, 0)
            loss = path_lagrangian(
                value(self.starts),
                v_first,
                paths["rewards"],
                v_last,
                paths["returns"],
                value(paths["visited"]),
                self.gamma,
                self.eta_v,
                weights,
            )
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            surprise = _standard(self.delta(paths, v_first.detach(), v_last.detach()))
            # A few extreme paths must not take all the weight.
            log_alpha = log_alpha + self.alpha_step / self.value_steps * surprise.clamp(-3, 3)
        with torch.no_grad():
            v_last = value(paths["last"]) * paths["goes_on"]
            surprise = _standard(self.delta(paths, value(paths["first"]), v_last))
            weights = torch.softmax(log_alpha, 0)
            old = self.net.distribution(paths["first"])
            logp = old.log_prob(paths["actions"])
            centred = surprise - (weights * surprise).sum()

        def surrogate() -> Tensor:
            ratio = (self.net.distribution(paths["first"]).log_prob(paths["actions"]) - logp).exp()
            return (weights * ratio * centred).sum()

        step = trpo_step(self.net.actor, surrogate, lambda: kl_divergence(old, self.net.distribution(paths["first"])).mean(), self.max_kl)
        return {"lagrangian": loss.item(), "kl": float(step["kl"]), "largest_weight": float(weights.max()) * len(weights)}

    def delta(self, paths: dict[str, Tensor], v_first: Tensor, v_last: Tensor) -> Tensor:
        r"""How much better a path went than the critic said, $\sum_{i\le k}\gamma^i R_i + \gamma^{k+1} V(s_{k+1}) - V(s_0)$."""
        return paths["rewards"] @ _powers(self.gamma, paths["rewards"]) + self.gamma ** (self.k + 1) * v_last - v_first

    @torch.no_grad()
    def paths(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """All paths of `k + 1` rewards in a segment that no time limit cuts; after a termination the rewards are zero.

        Segments must follow each other: the first rows continue where the segment before stopped. Remembers the states that began an episode.
        """
        obs, rewards = batch["obs"], batch["rewards"] * self.reward_scale
        dones, cuts = batch["dones"].float(), batch["truncations"].float()
        T, B = rewards.shape
        ended = torch.clamp(dones + cuts, max=1)
        # A row begins an episode where the row before it ended one, also if that was the last row of the segment before.
        before = torch.ones(B) if self.ended is None else self.ended
        fresh = (torch.cat((before.unsqueeze(0), ended[:-1])) > 0) & batch["valid"]
        self.starts, self.ended = torch.cat((self.starts, obs[fresh]))[-512:], ended[-1]
        n = T - self.k
        alive, whole, rows = torch.ones(n, B), torch.ones(n, B), []
        for i in range(self.k + 1):
            rows.append(alive * rewards[i : i + n])
            if i < self.k:
                whole = whole * (1 - alive * cuts[i : i + n])
            alive = alive * (1 - dones[i : i + n])
        keep = (whole > 0) & batch["valid"][:n]
        returns = discounted(
            rewards,
            dones,
            self.gamma,
            self.net.value(batch["next_obs"][-1]),
            truncations=cuts,
            next_values=self.net.value(batch["next_obs"]),
        )
        return {
            "first": obs[:n][keep],
            "actions": batch["actions"][:n][keep],
            "rewards": torch.stack(rows, 2)[keep],  # [paths, k + 1]
            "last": batch["next_obs"][self.k :][keep],
            "goes_on": alive[keep],
            "visited": obs[batch["valid"]],
            "returns": returns[batch["valid"]].unsqueeze(1),
        }


def _standard(x: Tensor) -> Tensor:
    return (x - x.mean()) / (x.std() + 1e-8)


def _powers(gamma: float, rewards: Tensor) -> Tensor:
    return gamma ** torch.arange(rewards.shape[1], dtype=rewards.dtype, device=rewards.device)


def _check_mdp(P: Tensor, R: Tensor, mu: Tensor, gamma: float) -> None:
    if P.dim() != 3 or R.shape != P.shape[:2] or mu.shape != P.shape[:1] or P.shape[2] != P.shape[0]:
        shapes = [tuple(x.shape) for x in (P, R, mu)]
        raise ValueError(f"expected P [S, A, S], R [S, A] and mu [S], got {shapes}")
    if not 0 <= gamma < 1:
        raise ValueError(f"gamma must be in [0, 1), got {gamma}")
    for name, x in (("P", P), ("mu", mu)):
        if bool((x < 0).any()) or not torch.allclose(x.sum(-1), torch.ones_like(x.sum(-1)), atol=1e-5):
            raise ValueError(
                f"{name} must hold probabilities that sum to one, got sums from {float(x.sum(-1).min()):g} to {float(x.sum(-1).max()):g}"
            )
