r"""One ReLU filter under general inputs (du2018convfilter).

A single filter slides over the patches of an input, a rectifier cuts off its negative responses and the mean is the output.
Another filter of the same form made the labels. Does gradient descent find it? Earlier answers needed Gaussian inputs. Here the
question is split by the signs of the two responses: samples on which both filters are on pull $w$ straight to the teacher, those on
which only the learner is on push it towards zero. Descent works as long as the first group outweighs the second,
which a smooth input distribution guarantees once the angle is small.

Equations: patches $z_1, \dots, z_k$ of an input $Z$, $f(w, Z) = \tfrac1k \sum_i \operatorname{relu}(w \cdot z_i)$ and the loss
$\tfrac12 E (f(w, Z) - f(w^\star, Z))^2$. For one patch, with the moments of the two groups

$$ A_{++} = E[z z^\top 1\{w \cdot z \ge 0, w^\star \cdot z \ge 0\}], \qquad
   A_{+-} = E[z z^\top 1\{w \cdot z \ge 0, w^\star \cdot z \le 0\}], $$

the gradient is

$$ \nabla = A_{++} (w - w^\star) + A_{+-} w . $$

For Gaussian inputs, with $\theta$ the angle between $w$ and $w^\star$,

$$ \nabla = \tfrac12 (w - w^\star) + \tfrac1{2\pi} \Big( \theta\, w^\star - \frac{|w^\star|}{|w|} \sin\theta\; w \Big) . $$

If $|w_0 - w^\star| < |w^\star|$, the angle stays below $\pi/2$ and the distance shrinks; a small random start satisfies this with
probability near one half. As the angle falls the contraction gets stronger, so a second stage may take larger steps.

Deviations from the paper:

1. Steps are those of full-batch gradient descent. The paper also treats stochastic steps.
2. The bounds with their constants are not implemented, only the identities they rest on.

Later work: Du, Lee, Tian, Poczos and Singh (2018) learn the output weights too and find a spurious minimum that descent meets with
constant probability. Goel, Klivans and Meka (2018) learn overlapping patches by a simple stochastic rule from any start.
Yehudai and Shamir (2020) show that some assumption on the inputs is needed even for one rectifier.

Example:
    import torch
    from dlatlas.theory.conv_filter import filter_net, learn_filter

    teacher = torch.randn(9, dtype=torch.float64)
    patches = torch.randn(2000, 4, 9, dtype=torch.float64)  # [samples, patches, pixels of a patch]
    labels = filter_net(teacher, patches)
    starts = torch.randn(5, 9, dtype=torch.float64) / 3  # five starts side by side
    path = learn_filter(patches, labels, starts, lr=1.0, steps=200)
    for step in (0, 50, 200):
        print(f"step {step}: distances to the teacher", (path[step] - teacher).norm(dim=1).round(decimals=3).tolist())
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["filter_net", "gaussian_grad", "learn_filter", "region_matrices"]


def filter_net(w: Tensor, Z: Tensor) -> Tensor:
    r"""Output $\tfrac1k \sum_i \operatorname{relu}(w \cdot z_i)$ of the filter on each input.

    Args:
        w: filter `[p]`.
        Z: patches `[n, k, p]`; the result is `[n]`.

    Raises:
        ValueError: shapes that do not fit.
    """
    if Z.dim() != 3 or w.shape != Z.shape[2:] or Z.shape[1] == 0:
        raise ValueError(f"expected a filter [p] and patches [n, k, p], got {tuple(w.shape)} and {tuple(Z.shape)}")
    return torch.relu(Z @ w).mean(1)


def gaussian_grad(w: Tensor, w_star: Tensor) -> Tensor:
    r"""Gradient of $\tfrac12 E (\operatorname{relu}(w \cdot z) - \operatorname{relu}(w^\star \cdot z))^2$ for $z \sim N(0, I)$.

    Args:
        w: filter `[p]`, not zero.
        w_star: filter of the teacher `[p]`.

    Raises:
        ValueError: shapes that differ, non-finite entries, or `w = 0`, where the loss is not differentiable.
    """
    _pair(w, w_star)
    length, target = w.norm(), w_star.norm()
    if length == 0:
        raise ValueError("the loss is not differentiable at w = 0: the gradient depends on the direction of approach")
    if target == 0:
        return w / 2
    # Half-angle form: acos loses half of the digits at 0 and pi.
    a, b = w / length, w_star / target
    theta = 2 * torch.atan2((a - b).norm(), (a + b).norm())
    return (w - w_star) / 2 + (theta * w_star - target * torch.sin(theta) * a) / (2 * math.pi)


def region_matrices(w: Tensor, w_star: Tensor, Z1: Tensor) -> tuple[Tensor, Tensor]:
    r"""Second moments $A_{++}$ and $A_{+-}$ of the inputs on which both filters are on, and only the learner is.

    Args:
        w: filter `[p]`.
        w_star: filter of the teacher `[p]`.
        Z1: inputs of one patch each `[n, p]`.

    Returns:
        `A_pp` and `A_pm`, both `[p, p]`: sums over the group, divided by `n`.

    Raises:
        ValueError: shapes that do not fit, or no input.
    """
    _pair(w, w_star)
    if Z1.dim() != 2 or Z1.shape[1:] != w.shape or len(Z1) == 0:
        raise ValueError(f"expected inputs [n, {len(w)}], at least one, got {tuple(Z1.shape)}")
    on, target = Z1 @ w >= 0, Z1 @ w_star
    both, only = Z1[on & (target >= 0)], Z1[on & (target <= 0)]
    return both.T @ both / len(Z1), only.T @ only / len(Z1)


def learn_filter(Z: Tensor, y: Tensor, w0: Tensor, lr: float, steps: int, two_stage: tuple[int, float] | None = None) -> Tensor:
    r"""Gradient descent on $\tfrac12 \operatorname{mean} (f(w, Z) - y)^2$; returns the whole path.

    Args:
        Z: patches `[n, k, p]`.
        y: labels `[n]`.
        w0: start `[p]`, or starts `[s, p]` that are run side by side.
        lr: step size.
        steps: number of steps.
        two_stage: `(step, lr)`: from this step on, the second step size is used.

    Returns:
        `w` before each step and after the last, `[steps + 1, p]` or `[steps + 1, s, p]`.

    Raises:
        ValueError: shapes that do not fit, negative `steps`, step sizes that are not positive, or a second stage that
            does not begin between 0 and `steps`.
    """
    if Z.dim() != 3 or 0 in Z.shape or y.shape != Z.shape[:1] or w0.dim() not in (1, 2) or w0.shape[-1:] != Z.shape[2:]:
        shapes = tuple(Z.shape), tuple(y.shape), tuple(w0.shape)
        raise ValueError(f"expected patches [n, k, p], labels [n] and a start [p] or [s, p], got {shapes}")
    switch, second = two_stage if two_stage is not None else (steps, lr)
    if steps < 0 or lr <= 0 or second <= 0 or not 0 <= switch <= steps:
        raise ValueError(f"expected steps >= 0, lr > 0 and a second stage (step, lr) within the steps, got {steps}, {lr}, {two_stage}")
    n, k, p = Z.shape
    rows = Z.reshape(n * k, p)
    w = w0.detach().clone().reshape(-1, p)  # [s, p]
    path = [w]
    for step in range(steps):
        response = (rows @ w.T).reshape(n, k, -1)  # [n, k, s]
        error = torch.relu(response).mean(1) - y[:, None]  # [n, s]
        push = (response > 0) * (error / (n * k))[:, None]  # [n, k, s]
        w = w - (lr if step < switch else second) * (push.reshape(n * k, -1).T @ rows)
        path.append(w)
    return torch.stack(path).reshape(steps + 1, *w0.shape)


def _pair(w: Tensor, w_star: Tensor) -> None:
    if w.dim() != 1 or w.shape != w_star.shape:
        raise ValueError(f"expected two filters [p], got {tuple(w.shape)} and {tuple(w_star.shape)}")
    if not (torch.isfinite(w).all() and torch.isfinite(w_star).all()):
        raise ValueError("the filters must be finite, got NaN or infinite entries")
