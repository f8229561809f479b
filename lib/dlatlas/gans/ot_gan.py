r"""OT-GAN: the mini-batch energy distance (salimans2018otgan).

Optimal transport moves one heap of points onto another at the least cost. Between two mini-batches it is cheap to compute, but it is a bad loss:
two batches of the *same* distribution are not equal, the cost between them is positive, and a generator can lower it by putting all samples in the
middle. The paper subtracts what two batches of the same kind cost each other. What remains has mean zero when both distributions are equal (and,
with the cosine as the cost, also when they differ in the lengths of the vectors only), and its gradient over mini-batches estimates the gradient
of that mean without bias.

Equations: for costs $C_{ij}$ and plans $M \ge 0$ with row sums $1/n$ and column sums $1/m$,

$$ W(X, Y) = \langle M^*, C \rangle, \qquad M^* = \arg\min_M\, \langle M, C \rangle - \epsilon H(M), \qquad H(M) = - \textstyle\sum_{ij} M_{ij} \log M_{ij} . $$

Sinkhorn's algorithm finds $M^*_{ij} = \frac{1}{n m} \exp((f_i + g_j - C_{ij}) / \epsilon)$. For two real batches $X, X'$ and two model batches $Y, Y'$, all independent,

$$ D^2 = W(X, Y) + W(X, Y') + W(X', Y) + W(X', Y') - 2 W(X, X') - 2 W(Y, Y') . $$

The cost is $1$ minus the cosine of learned features. The critic maximises $D^2$ and the generator, who gets three updates for each one of the critic, minimises it.
With the entropy held at a bound, the derivative of $W$ is the plan itself, so gradients flow through the costs only.

Deviations from the paper:

1. The entropy has a fixed price $\epsilon$ instead of a fixed bound; the plans are the same family.
2. The first half of the iterations lowers the temperature from the largest cost to $\epsilon$. The fixed point is the same and is reached in fewer steps. The plan
   is the mean of two runs, one that starts with the rows and one with the columns, so that exchanging the two batches gives the same number.
3. The plan is made exact at the end: what is missing in the sums after the last iteration is filled in as a product of the two deficits.

Later work: Genevay et al. (2018) subtract $W(X, X)$ instead, the Sinkhorn divergence, and Feydy et al. (2019) prove that it is positive and convex. Bellemare et al. (2017) had
used an energy distance for the same reason. Fatras et al. (2020) study transport between mini-batches as a loss of its own and confirm
the bias that the subtraction removes. Very large batches were later found to help other GANs too (Brock et al., 2019).

Example:
    import torch
    from torch import nn
    from dlatlas.gans.ot_gan import minibatch_energy_distance, sinkhorn

    def energy(x, y):  # the method: what halves of one kind cost each other is subtracted
        return minibatch_energy_distance(*x.chunk(2), *y.chunk(2), n_iter=20, cost=torch.cdist)

    def transport(x, y):
        return sinkhorn(torch.cdist(x, y), n_iter=20)[0]

    for distance in (transport, energy):
        G = nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 2))
        optimizer = torch.optim.Adam(G.parameters(), 1e-2)
        for _ in range(150):
            loss = distance(torch.randn(32, 2), G(torch.randn(32, 4)))
            optimizer.zero_grad(), loss.backward(), optimizer.step()
        spread = G(torch.randn(2000, 4)).std(0).mean()
        print(f"{distance.__name__}: standard deviation of the samples {spread:.2f} (data: 1.00)")
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["cosine_cost", "minibatch_energy_distance", "sinkhorn"]


def cosine_cost(a: Tensor, b: Tensor) -> Tensor:
    r"""Costs $1 - a_i^\top b_j / (|a_i| |b_j|)$ ``[n, m]``, between 0 and 2; a zero vector costs 1 to every other.

    Args:
        a: features ``[n, d]``.
        b: features ``[m, d]``.

    Raises:
        ValueError: feature sizes that differ, or an empty batch.
    """
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[1] or 0 in (len(a), len(b)):
        raise ValueError(f"expected features [n, d] and [m, d] with n, m >= 1, got {tuple(a.shape)} and {tuple(b.shape)}")
    return 1 - _unit(a) @ _unit(b).T


def sinkhorn(cost: Tensor, reg: float = 0.02, n_iter: int = 100) -> tuple[Tensor, Tensor]:
    r"""Entropic optimal transport between uniform weights, in the log domain.

    Args:
        cost: $C$ ``[..., n, m]``; further axes are problems of their own.
        reg: temperature $\epsilon$, in units of the cost.
        n_iter: iterations.

    Returns:
        The transport cost $\langle M, C \rangle$ ``[...]`` and the plan $M$ ``[..., n, m]``, which carries no gradient.

    Raises:
        ValueError: `reg` is not positive, no iterations, or an empty matrix.
    """
    if not reg > 0 or n_iter < 1:
        raise ValueError(f"expected reg > 0 and n_iter >= 1, got {reg} and {n_iter}")
    if cost.dim() < 2 or 0 in cost.shape:
        raise ValueError(f"expected costs [..., n, m] with n, m >= 1, got {tuple(cost.shape)}")
    plan = _plan(cost.detach(), reg, n_iter)
    return (plan * cost).sum((-2, -1)), plan


def minibatch_energy_distance(
    x: Tensor,
    x2: Tensor,
    y: Tensor,
    y2: Tensor,
    reg: float = 0.02,
    n_iter: int = 100,
    cost: Callable[[Tensor, Tensor], Tensor] = cosine_cost,
) -> Tensor:
    r"""$D^2$ of two independent real batches and two independent model batches, a scalar.

    One value can be negative; only its mean is a squared distance. Do not clamp it and do not take its root.

    Args:
        x: real features ``[n, d]``.
        x2: another real batch.
        y: model features ``[m, d]``.
        y2: another model batch.
        reg: temperature of :func:`sinkhorn`.
        n_iter: its iterations.
        cost: two batches to their costs ``[n, m]``.

    Raises:
        ValueError: from :func:`sinkhorn` and from `cost`.
    """
    pairs = ((x, y), (x, y2), (x2, y), (x2, y2), (x, x2), (y, y2))
    costs = [cost(a, b) for a, b in pairs]
    if len({c.shape for c in costs}) == 1:  # six problems of one size are solved side by side
        w = sinkhorn(torch.stack(costs), reg, n_iter)[0]
    else:
        w = torch.stack([sinkhorn(c, reg, n_iter)[0] for c in costs])
    return w[:4].sum() - 2 * w[4:].sum()


def _unit(v: Tensor) -> Tensor:
    return v / (v.norm(dim=1, keepdim=True) + 1e-12)


@torch.no_grad()
def _plan(cost: Tensor, reg: float, n_iter: int) -> Tensor:
    # Rows first and columns first, averaged: before convergence the two differ.
    if cost.shape[-2] != cost.shape[-1]:
        return (_one_order(cost, reg, n_iter) + _one_order(cost.mT, reg, n_iter).mT) / 2
    rows, columns = _one_order(torch.stack([cost, cost.mT]), reg, n_iter)  # of one shape, so side by side
    return (rows + columns.mT) / 2


def _one_order(cost: Tensor, reg: float, n_iter: int) -> Tensor:
    f, g = torch.zeros_like(cost[..., :1]), torch.zeros_like(cost[..., :1, :])  # [..., n, 1], [..., 1, m]
    start = cost.abs().amax((-2, -1), keepdim=True).clamp_min(reg)  # each problem has its own
    for t in range(n_iter):
        eps = (start * (reg / start) ** (2 * (t + 1) / n_iter)).clamp_min(reg)
        f = -eps * _log_mean_exp((g - cost) / eps, -1)
        g = -eps * _log_mean_exp((f - cost) / eps, -2)
    return _round(((f + g - cost) / reg).exp() / (cost.shape[-2] * cost.shape[-1]))


def _log_mean_exp(z: Tensor, dim: int) -> Tensor:
    top = z.amax(dim, keepdim=True)
    return (z - top).exp().mean(dim, keepdim=True).log() + top


def _round(plan: Tensor) -> Tensor:
    """The nearby plan with exact marginals of Altschuler et al. (2017): scale down what is too much, add what is missing."""
    n, m = plan.shape[-2:]
    plan = plan * (1 / n / plan.sum(-1, keepdim=True)).clamp_max(1)
    plan = plan * (1 / m / plan.sum(-2, keepdim=True)).clamp_max(1)
    rows, cols = 1 / n - plan.sum(-1, keepdim=True), 1 / m - plan.sum(-2, keepdim=True)
    return plan + rows * cols / rows.sum(-2, keepdim=True).clamp_min(torch.finfo(plan.dtype).tiny)
