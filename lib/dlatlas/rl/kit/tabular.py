"""Exact answers for small Markov decision processes: the truth that learners are measured against.

Everywhere P has shape ``(S, A, S)`` and R has shape ``(S, A)``; tensors or NumPy arrays go in and the same kind comes out, in the same precision.
A terminal state is one that leads to itself with reward zero.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

__all__ = ["hitting_times", "maze_mdp", "occupancy", "policy_evaluation", "soft_value_iteration", "value_iteration"]

Array = np.ndarray | Tensor
MOVES = ((-1, 0), (1, 0), (0, -1), (0, 1))  # up, down, left, right


def value_iteration(P: Array, R: Array, gamma: float, tol: float = 1e-10, *, max_iter: int = 1_000_000) -> tuple[Array, Array]:
    r"""Optimal values $V(s) = \max_a Q(s,a)$, $Q(s,a) = R(s,a) + \gamma \sum_{s'} P(s'|s,a) V(s')$.

    Args:
        P: transition probabilities ``(S, A, S)``.
        R: expected rewards ``(S, A)``.
        gamma: discount in [0, 1].
        tol: bound on the error of V (for gamma = 1, on its last change).
        max_iter: sweeps before giving up.

    Returns:
        V ``(S,)`` and Q ``(S, A)``.
    """
    return _iterate(P, R, gamma, tol, max_iter, lambda Q: Q.max(-1).values)


def soft_value_iteration(
    P: Array,
    R: Array,
    gamma: float,
    tau: float,
    *,
    prior: Array | None = None,
    lam: float = 0.0,
    tol: float = 1e-10,
    max_iter: int = 1_000_000,
) -> tuple[Array, Array, Array]:
    r"""Entropy-regularised optimal values $V(s) = \tau \log \sum_a \exp(Q(s,a)/\tau)$ and policy $\pi(a|s) = \exp((Q(s,a) - V(s))/\tau)$.

    With a `prior` policy and `lam` the objective is $E \sum \gamma^t [r - \tau \log \pi - \lambda \log(\pi / \text{prior})]$, so that
    $V(s) = (\tau+\lambda) \log \sum_a \exp((Q(s,a) + \lambda \log \text{prior}(a|s)) / (\tau+\lambda))$.

    Args:
        P: transition probabilities ``(S, A, S)``.
        R: expected rewards ``(S, A)``.
        gamma: discount in [0, 1].
        tau: weight of the entropy, at least 0; tau + lam must be positive.
        prior: reference policy ``(S, A)``, needed when lam is not 0.
        lam: weight of the relative entropy, at least 0.
        tol: bound on the error of V.
        max_iter: sweeps before giving up.

    Returns:
        V ``(S,)``, Q ``(S, A)`` and pi ``(S, A)``.
    """
    if tau < 0 or lam < 0 or not tau + lam > 0:
        raise ValueError(f"tau and lam must not be negative and their sum must be positive, got tau={tau} and lam={lam}")
    if lam and prior is None:
        raise ValueError("lam needs a prior policy (S, A)")
    p, r = _mdp(P, R, gamma)
    weight, shift = tau + lam, torch.zeros_like(r)
    if lam:
        shift = lam * _policy(prior, r, "prior").log()
    backup = lambda Q: weight * torch.logsumexp((Q + shift) / weight, -1)  # noqa: E731
    V, Q = _iterate(p, r, gamma, tol, max_iter, backup)
    return _like(P, V, Q, ((Q + shift) / weight).softmax(-1))


def policy_evaluation(P: Array, R: Array, pi: Array, gamma: float) -> tuple[Array, Array]:
    r"""Values of a policy by a linear solve: $V = (I - \gamma P_\pi)^{-1} R_\pi$ and $Q = R + \gamma P V$.

    Args:
        P: transition probabilities ``(S, A, S)``.
        R: expected rewards ``(S, A)``.
        pi: policy ``(S, A)``.
        gamma: discount in [0, 1); 1 has no unique solution.

    Returns:
        V ``(S,)`` and Q ``(S, A)``.
    """
    p, r = _mdp(P, R, gamma, below_one=True)
    pi = _policy(pi, r, "pi")
    p_pi = torch.einsum("sa,sat->st", pi, p)
    V = torch.linalg.solve(torch.eye(len(r), dtype=r.dtype) - gamma * p_pi, (pi * r).sum(-1))
    return _like(P, V, r + gamma * p @ V)


def occupancy(P: Array, pi: Array, mu: Array, gamma: float) -> Array:
    r"""Normalised discounted occupancy $\rho(s,a) = (1-\gamma) \sum_t \gamma^t \Pr(s_t=s, a_t=a)$ ``(S, A)``, $s_0 \sim \mu$; it sums to one.

    Args:
        P: transition probabilities ``(S, A, S)``.
        pi: policy ``(S, A)``.
        mu: law of the first state ``(S,)``.
        gamma: discount in [0, 1).
    """
    p = torch.as_tensor(P)
    p, zero = _mdp(p, torch.zeros(p.shape[:2], dtype=p.dtype), gamma, below_one=True)
    pi, mu = _policy(pi, zero, "pi"), torch.as_tensor(mu).to(p.dtype)
    if mu.shape != (len(p),) or (mu < 0).any() or abs(mu.sum() - 1) > 1e-4:
        raise ValueError(f"mu must be a distribution over {len(p)} states, got {mu}")
    p_pi = torch.einsum("sa,sat->st", pi, p)
    state = torch.linalg.solve(torch.eye(len(p), dtype=p.dtype) - gamma * p_pi.T, (1 - gamma) * mu)
    return _like(P, state[:, None] * pi)[0]


def maze_mdp(
    grid: Sequence[str], *, slip: float = 0.0, goal_reward: float = 1.0, pit_reward: float = -1.0
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The exact MDP of a maze, in float64: actions up, down, left, right; a move into a wall or over the edge stays.

    Args:
        grid: rows of equal length; '#' wall, 'G' goal, 'X' pit, anything else free. Goals and pits are terminal.
        slip: probability that a uniformly random move replaces the chosen one.
        goal_reward: reward of arriving in a goal.
        pit_reward: reward of arriving in a pit.

    Returns:
        P ``(S, 4, S)``, R ``(S, 4)`` and the maps ``{"state": (H, W) index of a cell or -1 at walls, "cell": (S, 2) row and column of a state}``.
    """
    rows = ["".join(row) for row in grid]
    if not rows or not rows[0] or len({len(row) for row in rows}) != 1:
        raise ValueError(f"grid must be rows of equal, positive length, got {rows}")
    if not 0 <= slip <= 1:
        raise ValueError(f"slip must lie in [0, 1], got {slip}")
    cells = np.array([list(row) for row in rows])
    free = cells != "#"
    if not free.any():
        raise ValueError("grid must have at least one free cell")
    state = np.full(cells.shape, -1)
    state[free] = np.arange(free.sum())
    cell = np.argwhere(free)
    target = np.stack([cell + move for move in MOVES], 1)  # (S, 4, 2)
    inside = ((target >= 0) & (target < cells.shape)).all(-1)
    target = np.where(inside[..., None], target, cell[:, None])
    to = state[target[..., 0], target[..., 1]]
    to = np.where(to < 0, np.arange(len(cell))[:, None], to)  # (S, 4)
    move = np.zeros((len(cell), 4, len(cell)))
    np.put_along_axis(move, to[..., None], 1.0, -1)
    P = (1 - slip) * move + slip * move.mean(1, keepdims=True)
    kind = cells[free]
    arrival = goal_reward * (kind == "G") + pit_reward * (kind == "X")
    end = (kind == "G") | (kind == "X")
    P[end] = np.eye(len(cell))[end][:, None]
    R = np.where(end[:, None], 0.0, P @ arrival)
    return torch.from_numpy(P), torch.from_numpy(R), {"state": torch.from_numpy(state), "cell": torch.from_numpy(cell)}


def hitting_times(P_pi: Array) -> Array:
    r"""Expected number of steps $h_{ij}$ ``(S, S)`` from state i until state j is first reached: 0 for i = j, infinite where it may never be.

    $$h_{ij} = 1 + \sum_{k \ne j} P_\pi(k|i)\, h_{kj}, \qquad h_{jj} = 0.$$

    Args:
        P_pi: transition probabilities of a Markov chain ``(S, S)``.
    """
    p = torch.as_tensor(P_pi)
    n = len(p)
    _mdp(p[:, None], torch.zeros(n, 1, dtype=p.dtype), 0.0)
    edge = p > 0
    h = torch.full((n, n), torch.inf, dtype=p.dtype)
    for j in range(n):
        reach = _backwards(edge, torch.arange(n) == j)
        walk = edge.clone()
        walk[j] = False  # the walk ends in j
        sure = ~_backwards(walk, ~reach)
        sure[j] = False
        h[j, j] = 0
        inner = p[sure][:, sure]
        h[sure, j] = torch.linalg.solve(torch.eye(len(inner), dtype=p.dtype) - inner, torch.ones(len(inner), dtype=p.dtype))
    return _like(P_pi, h)[0]


def _backwards(edge: Tensor, mask: Tensor) -> Tensor:
    """All states from which a state of the mask can be reached."""
    while True:
        wider = mask | (edge & mask).any(-1)
        if (wider == mask).all():
            return mask
        mask = wider


def _iterate(P, R, gamma, tol, max_iter, backup):
    p, r = _mdp(P, R, gamma)
    if not tol > 0:
        raise ValueError(f"tol must be positive, got {tol}")
    n_states, n_actions = r.shape
    flat = p.reshape(n_states * n_actions, n_states)
    bound = gamma / (1 - gamma) if gamma < 1 else 1.0
    V = backup(r)
    for _ in range(max_iter):
        Q = r + gamma * (flat @ V).view(n_states, n_actions)
        new = backup(Q)
        change, V = (new - V).abs().max(), new
        # Below the rounding of V itself no further progress can be seen.
        if bound * change <= tol or change <= 4 * torch.finfo(r.dtype).eps * V.abs().max():
            return _like(P, V, r + gamma * (flat @ V).view(n_states, n_actions))
    raise RuntimeError(f"value iteration did not converge in {max_iter} sweeps: last change {change:.3g}, gamma {gamma}")


def _mdp(P: Array, R: Array, gamma: float, below_one: bool = False) -> tuple[Tensor, Tensor]:
    p = torch.as_tensor(P)
    r = torch.as_tensor(R).to(p.dtype)
    if p.ndim != 3 or p.shape[0] != p.shape[2] or not p.numel() or not p.is_floating_point():
        raise ValueError(f"P must be floating point of shape (S, A, S), got {p.dtype} of shape {tuple(p.shape)}")
    if r.shape != p.shape[:2]:
        raise ValueError(f"R must have shape {tuple(p.shape[:2])}, got {tuple(r.shape)}")
    if (p < 0).any() or (p.sum(-1) - 1).abs().max() > 1e-4:
        raise ValueError("P must hold probabilities: not negative, every row of next states with sum 1")
    if not 0 <= gamma <= 1 or (below_one and gamma == 1):
        raise ValueError(f"gamma must lie in [0, 1{')' if below_one else ']'}, got {gamma}")
    return p, r


def _policy(pi: Array, like: Tensor, name: str) -> Tensor:
    pi = torch.as_tensor(pi).to(like.dtype)
    if pi.shape != like.shape or (pi < 0).any() or (pi.sum(-1) - 1).abs().max() > 1e-4:
        raise ValueError(f"{name} must hold one distribution over actions a state, shape {tuple(like.shape)}; got shape {tuple(pi.shape)}")
    return pi


def _like(P: Array, *out: Tensor) -> tuple[Array, ...]:
    return out if isinstance(P, Tensor) else tuple(x.numpy() for x in out)
