r"""Chekhov GAN: training a GAN by online learning (grnarova2018chekhov).

A zero-sum game need not have an equilibrium in single strategies, but it has one in mixed strategies: each player draws at random from a set.
If both players learn without regret (in hindsight no fixed strategy would have done much better), the *averages* of what they played form
such an equilibrium, although what they play last may circle for ever. Follow-the-regularised-leader is such a learner. For
networks this becomes a recipe: let each player train against a queue of opponents, the present one and some of its past states, and return the queue of
generators as the mixture.

Equations for a matrix game with payoff $x^\top A y$, $x$ minimising over the simplex, $y$ maximising: with the entropy as regulariser,
follow-the-regularised-leader is Hedge,

$$ x_t \propto \exp\Big( -\frac{\eta_0}{\sqrt t} \sum_{s < t} A y_s \Big), \qquad y_t \propto \exp\Big( \frac{\eta_0}{\sqrt t} \sum_{s < t} A^\top x_s \Big),
\qquad \mathrm{gap} = \max_j (A^\top \bar x)_j - \min_i (A \bar y)_i , $$

and the duality gap of the averages is at most the sum of both regrets divided by $T$, $O(\sqrt{\log n / T})$. For networks with queues of $K$ generators
$G_k$ and discriminators $D_k$ (logits; $\sigma$ the sigmoid), each player minimises at step $t$

$$ L_D = -\mathrm{mean} \log \sigma(D(x)) - \frac1K \sum_k \mathrm{mean} \log \sigma(-D(G_k(z))) + \frac{\lambda}{\sqrt t} |\theta_D|^2, $$

$$ L_G = -\frac1K \sum_k \mathrm{mean} \log \sigma(D_k(G(z))) + \frac{\lambda}{\sqrt t} |\theta_G|^2 . $$

Deviations from the paper:

1. The distance between kept snapshots is fixed; the paper lets it grow, so that the queue reaches back over a growing past.
2. The generator's logistic loss is the non-saturating one.
3. The paper's queue always holds the present player at its newest place. Here that is ``keep_current=True``; without it the newest copy may be up to
   `every` - 1 steps old.

Later work: averaging returned in the generator's weights (Yazici et al., 2019): one running mean over time, which costs no memory for a queue and became a
standard ingredient. MIX+GAN (Arora et al., 2017), of the same months as this paper, trains a mixture of generators and discriminators outright.

Example:
    import torch
    from dlatlas.gans.chekhov import ftrl_zero_sum

    # How often a penalty kick is saved: it goes left, middle or right (rows), so does the keeper.
    saved = torch.tensor([[0.6, 0.1, 0.05], [0.3, 0.9, 0.3], [0.05, 0.1, 0.4]])
    fixed = saved.amax(1).min() - saved.amin(0).max()
    print(f"best pair of fixed choices: duality gap {fixed:.3f}")
    for rounds in (10, 100, 1000):
        kicker, keeper, gap = ftrl_zero_sum(saved, rounds, eta0=2.0)  # the method
        print(f"average of {rounds} rounds: duality gap {gap:.3f}")
    mixture = [round(p, 2) for p in kicker.tolist()]
    print(f"the kicker's mixture {mixture}: at most {(saved.T @ kicker).max():.2f} are saved")
    print(f"the best fixed kick: at most {saved.amax(1).min():.2f}")
"""

from __future__ import annotations

import copy
import math
from collections import deque
from collections.abc import Iterator
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

__all__ = ["SnapshotQueue", "chekhov_d_loss", "chekhov_g_loss", "ftrl_zero_sum"]


def ftrl_zero_sum(A: Tensor, steps: int, eta0: float = 1.0) -> tuple[Tensor, Tensor, float]:
    r"""Both players of a matrix game play Hedge; their averages and the duality gap of these.

    Args:
        A: payoff ``[n, m]``; the row player minimises.
        steps: $T$.
        eta0: $\eta_0$; about ``sqrt(log n)`` over the range of the payoffs suits the bound.

    Returns:
        ``x_avg [n]``, ``y_avg [m]`` and the gap, which is at least 0 and 0 at an equilibrium only.

    Raises:
        ValueError: `A` is no matrix, `steps` is below 1 or `eta0` not positive.
    """
    if A.dim() != 2 or 0 in A.shape or steps < 1 or not eta0 > 0:
        raise ValueError(f"expected a matrix, steps >= 1 and eta0 > 0, got {tuple(A.shape)}, {steps}, {eta0}")
    losses, gains = A.new_zeros(A.shape[0]), A.new_zeros(A.shape[1])  # summed over the past
    x_sum, y_sum = torch.zeros_like(losses), torch.zeros_like(gains)
    for t in range(1, steps + 1):
        x = torch.softmax(-eta0 / math.sqrt(t) * losses, 0)
        y = torch.softmax(eta0 / math.sqrt(t) * gains, 0)
        losses, gains = losses + A @ y, gains + A.T @ x
        x_sum, y_sum = x_sum + x, y_sum + y
    x, y = x_sum / steps, y_sum / steps
    return x, y, float((A.T @ x).max() - (A @ y).min())


class SnapshotQueue:
    """The last few states of a network, as frozen copies in evaluation mode.

    Args:
        capacity: how many are kept; a new one pushes the oldest out.
        every: a state is taken at every `every`-th step that is offered.
        keep_current: also between these steps the newest place holds a copy of the parameters and buffers that were offered last; as in the paper.

    Raises:
        ValueError: a number below 1.
    """

    def __init__(self, capacity: int = 5, every: int = 10, *, keep_current: bool = False):
        if capacity < 1 or every < 1:
            raise ValueError(f"capacity and every must be at least 1, got {capacity} and {every}")
        self.every, self.keep_current = every, keep_current
        self._kept: deque[nn.Module] = deque(maxlen=capacity)

    def offer(self, module: nn.Module, step: int) -> bool:
        """Keep a copy if `step` is a multiple of `every` (0 is one); tells whether it was kept for good."""
        due = step % self.every == 0
        if due:
            self._kept.append(copy.deepcopy(module).eval().requires_grad_(False))
        elif self.keep_current and self._kept:
            with torch.no_grad():  # into the copy of the step before: much cheaper than a new one
                for kept, now in zip(_tensors(self._kept[-1]), _tensors(module), strict=True):
                    kept.copy_(now)
        return due

    def __len__(self) -> int:
        return len(self._kept)

    def __iter__(self) -> Iterator[nn.Module]:
        """From the oldest to the newest."""
        return iter(self._kept)


def chekhov_d_loss(D: nn.Module, past_g: SnapshotQueue, real: Tensor, z: Tensor, reg: float = 0.0, t: int = 1) -> Tensor:
    r"""The discriminator's loss against a mixture of past generators, a scalar.

    Args:
        D: examples to logits.
        past_g: queue of generators; all get the same noise.
        real: ``[B, ...]``.
        z: noise ``[B, z_dim]``.
        reg: $\lambda$.
        t: the step, counted from 1.

    Raises:
        ValueError: the queue is empty, `reg` is negative or `t` below 1.
    """
    _check(past_g, reg, t)
    with torch.no_grad():
        fakes = [G(z) for G in past_g]
    against = sum(softplus(D(fake)).mean() for fake in fakes) / len(fakes)
    return softplus(-D(real)).mean() + against + _regulariser(D, reg, t)


def chekhov_g_loss(G: nn.Module, past_d: SnapshotQueue, z: Tensor, reg: float = 0.0, t: int = 1) -> Tensor:
    r"""The generator's loss against a mixture of past discriminators, a scalar; arguments as in :func:`chekhov_d_loss`."""
    _check(past_d, reg, t)
    fake = G(z)
    return sum(softplus(-D(fake)).mean() for D in past_d) / len(past_d) + _regulariser(G, reg, t)


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    return chain(module.parameters(), module.buffers())


def _check(queue: SnapshotQueue, reg: float, t: int) -> None:
    if len(queue) == 0:
        raise ValueError("the queue of past opponents is empty: offer it one before the first loss")
    if not reg >= 0 or t < 1:
        raise ValueError(f"expected reg >= 0 and t >= 1, got {reg} and {t}")


def _regulariser(module: nn.Module, reg: float, t: int) -> Tensor | float:
    return reg / math.sqrt(t) * sum(p.square().sum() for p in module.parameters()) if reg else 0.0
