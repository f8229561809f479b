"""Return arithmetic in one tested place: discounted sums, generalised advantages, n-step returns and the categorical projection."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["categorical_projection", "discounted", "gae", "nstep"]


def discounted(
    rewards: Tensor,
    dones: Tensor,
    gamma: float,
    last_value: Tensor | float = 0.0,
    *,
    truncations: Tensor | None = None,
    next_values: Tensor | None = None,
) -> Tensor:
    r"""Reward to go $G_t = r_t + \gamma (1 - \text{done}_t) G_{t+1}$ with $G_T$ = `last_value`.

    Args:
        rewards: ``(T, B)`` or ``(T,)``.
        dones: the same shape, 1 where step t ended the episode by termination.
        gamma: discount in [0, 1].
        last_value: value of the state after the last step, a number or ``(B,)``.
        truncations: the same shape, 1 where a limit cut the episode after step t: there the sum goes on with `next_values`, not with the
            next episode.
        next_values: the same shape, value of the true successor of step t; needed with `truncations`.
    """
    dones, cuts, nxt = _check(rewards, dones, gamma, truncations, next_values)
    out, tail = torch.empty_like(rewards), torch.as_tensor(last_value, dtype=rewards.dtype, device=rewards.device)
    for t in range(len(rewards) - 1, -1, -1):
        if cuts is not None:
            tail = torch.where(cuts[t], nxt[t], tail)
        tail = rewards[t] + gamma * (1 - dones[t]) * tail
        out[t] = tail
    return out


def gae(
    rewards: Tensor,
    values: Tensor,
    dones: Tensor,
    gamma: float,
    lam: float,
    *,
    truncations: Tensor | None = None,
    next_values: Tensor | None = None,
) -> Tensor:
    r"""Generalised advantages $A_t = \delta_t + \gamma\lambda (1 - \text{done}_t) A_{t+1}$, $\delta_t = r_t + \gamma (1-\text{done}_t) V_{t+1} - V_t$.

    Args:
        rewards: ``(T, B)`` or ``(T,)``.
        values: ``(T + 1, B)``, values of the states before every step and after the last.
        dones: as `rewards`, 1 where step t ended the episode by termination.
        gamma: discount in [0, 1].
        lam: the trace parameter in [0, 1].
        truncations: as `rewards`, 1 where a limit cut the episode after step t: the trace ends there, and $V_{t+1}$ is ``next_values[t]``.
        next_values: as `rewards`, value of the true successor of step t; needed with `truncations`.
    """
    dones, cuts, nxt = _check(rewards, dones, gamma, truncations, next_values)
    if not 0 <= lam <= 1:
        raise ValueError(f"lam must lie in [0, 1], got {lam}")
    if values.shape != (len(rewards) + 1, *rewards.shape[1:]):
        raise ValueError(f"values must have shape {(len(rewards) + 1, *rewards.shape[1:])}, got {tuple(values.shape)}")
    values = values.to(rewards.dtype)
    after = values[1:] if cuts is None else torch.where(cuts, nxt, values[1:])
    delta = rewards + gamma * (1 - dones) * after - values[:-1]
    decay = gamma * lam * ((1 - dones) if cuts is None else (1 - dones) * ~cuts)
    out, tail = torch.empty_like(rewards), torch.zeros_like(rewards[0])
    for t in range(len(rewards) - 1, -1, -1):
        tail = torch.addcmul(delta[t], decay[t], tail)
        out[t] = tail
    return out


def nstep(rewards: Tensor, dones: Tensor, bootstrap: Tensor, gamma: float, n: int, *, truncations: Tensor | None = None) -> Tensor:
    r"""n-step returns $\sum_{k<m} \gamma^k r_{t+k} + \gamma^m V_{t+m}$, $m = n$, shorter at the end of the segment and at the end of an episode.

    Args:
        rewards: ``(T, B)`` or ``(T,)``.
        dones: the same shape, 1 where step t ended the episode by termination: no reward and no value after it counts.
        bootstrap: the same shape, value of the true successor of step t (``bootstrap[t]`` is the value of state t+1).
        gamma: discount in [0, 1].
        n: number of steps, at least 1.
        truncations: the same shape, 1 where a limit cut the episode after step t: the sum ends there with ``bootstrap[t]``.
    """
    dones, cuts, bootstrap = _check(
        rewards, dones, gamma, torch.zeros_like(rewards) if truncations is None else truncations, bootstrap, "bootstrap"
    )
    if int(n) != n or n < 1:
        raise ValueError(f"n must be a positive integer, got {n}")
    steps = len(rewards)
    out, alive = torch.zeros_like(rewards), torch.ones_like(rewards)
    for k in range(min(n, steps)):
        m = steps - k  # starts 0..m-1 still have a step k inside the segment
        out[:m] += gamma**k * alive[:m] * rewards[k:]
        alive[:m] *= 1 - dones[k:]
        # The return of a start ends here: at a cut, after n steps, or with the segment.
        last = cuts[k:].clone()
        last[-1] = True
        if k == n - 1:
            last[:] = True
        out[:m] += gamma ** (k + 1) * alive[:m] * last * bootstrap[k:]
        alive[:m] *= ~last
    return out


def categorical_projection(atoms: Tensor, weights: Tensor, support: Tensor) -> Tensor:
    """Projection of a discrete distribution onto a uniform grid: atoms are clipped to the grid, their mass is split linearly between neighbours.

    The result is linear in `weights`, which may be negative and may carry a gradient; its mean is that of the clipped atoms.

    Args:
        atoms: positions ``(..., M)``.
        weights: their masses ``(..., M)``; the leading axes broadcast.
        support: the grid ``(K,)``, increasing and uniform, K >= 2.

    Returns:
        Masses on the grid ``(..., K)``, in the precision of `weights`.
    """
    if support.ndim != 1 or len(support) < 2:
        raise ValueError(f"support must be a vector of at least two points, got shape {tuple(support.shape)}")
    k, low, high = len(support), support[0], support[-1]
    step = (high - low) / (k - 1)
    if not step > 0 or (support.diff() - step).abs().max() > 1e-3 * step:
        raise ValueError(f"support must be an increasing uniform grid, got {support}")
    atoms, weights = torch.broadcast_tensors(atoms, weights)
    place = (atoms.clamp(low, high) - low) / step  # (..., M), in 0..K-1
    left = place.floor().clamp(0, k - 2)
    share = (place - left).clamp(0, 1).to(weights.dtype)
    left = left.long()
    out = weights.new_zeros((*weights.shape[:-1], k))
    return out.scatter_add(-1, left, weights * (1 - share)).scatter_add(-1, left + 1, weights * share)  # (..., K)


def _check(rewards: Tensor, dones: Tensor, gamma: float, truncations: Tensor | None, values: Tensor | None, name: str = "next_values"):
    if rewards.ndim < 1 or rewards.numel() == 0:
        raise ValueError(f"rewards must hold at least one step, got shape {tuple(rewards.shape)}")
    if not rewards.is_floating_point():
        raise ValueError(f"rewards must be floating point, got {rewards.dtype}")
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma must lie in [0, 1], got {gamma}")
    for label, x in (("dones", dones), ("truncations", truncations), (name, values)):
        if x is not None and x.shape != rewards.shape:
            raise ValueError(f"{label} must have the shape of rewards {tuple(rewards.shape)}, got {tuple(x.shape)}")
    if truncations is not None and values is None:
        raise ValueError("truncations need next_values: the value of the observation at which the episode was cut")
    return (
        dones.to(rewards.dtype),
        None if truncations is None else truncations.bool(),
        None if values is None else values.to(rewards.dtype),
    )
