r"""Width-independent update bound for leaky-ReLU nets (brutzkus2018sgd).

A two-layer network can have far more weights than there are training points, and still plain SGD finds a solution of the hinge
loss after a number of weight changes that does not grow with the width, provided that a straight line separates the data.
The proof is the perceptron's: every change moves the weights by a fixed amount towards one solution that is known
to exist, while their length grows only like a square root, so the changes must run out. Few changes mean that few
examples were used, and a classifier that is a function of few examples generalises.

Equations:

$$N_W(x) = v \sum_{i=1}^{k} \sigma(w_i \cdot x) - v \sum_{i=1}^{k} \sigma(u_i \cdot x), \qquad \sigma(z) = \max(\alpha z, z), \quad v = 1/\sqrt{2k}$$

Only $W = (w_1 \ldots w_k, u_1 \ldots u_k)$ is trained, with steps on $\max(0, 1 - y N_W(x))$ for one example at a time. An update
is *non-zero* when $y N_W(x) < 1$. Assume $|x_i| \le 1$ and some $w^*$ with $y_i\, w^* \cdot x_i \ge 1$ for all $i$. With
$W^* = (w^* \ldots w^*, -w^* \ldots -w^*)$ each update adds at least $\eta \alpha \sqrt{2k}$ to $\langle W, W^* \rangle$ and at most $2 \eta + \eta^2$ to
$|W|^2$ (because $\langle W, \nabla N_W(x) \rangle = N_W(x) < 1$ up to the label's sign), so

$$\#\text{updates} \le \frac{|w^*|^2}{\alpha^2} \Big(1 + \frac{2}{\eta}\Big) + \frac{2\, |w^*|\, |W_0|}{\alpha\, \eta}.$$

The width $k$ has cancelled. A net that makes no error on $n$ examples and is determined by $c$ of them (in order) has, with
probability at least $1 - \delta$, an error of at most $(c \ln n + \ln(1/\delta)) / (n - c)$.

Deviations from the paper:

1. The bound is the explicit form of the paper's theorem, which hides constants in an $O(\cdot)$; it follows the same argument.
2. The paper lets each row start within a ball of radius proportional to $1/\sqrt{2k}$; here the length $|W_0|$ of all rows together appears in the bound.
3. Examples are visited in a new random order every epoch. The bound does not care about the order.
4. $\sigma'(0) = 1$.

Later work: Lyu et al. (2021) and Frei et al. (2022) describe which separator such nets reach when they are trained further with the logistic
loss, in particular on symmetric and on nearly orthogonal data. For ReLU ($\alpha = 0$) no such bound exists: units that are silent on
all data receive no gradient.

Example:
    import torch
    from dlatlas.theory.max_margin_bias import hard_margin_svm
    from dlatlas.theory.overparam_sgd import LeakyTwoLayer, train_hinge, update_bound

    y = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(100)
    x = torch.nn.functional.normalize(torch.randn(200, 10, dtype=torch.float64) / 3 + y[:, None], dim=1)
    bound = update_bound(hard_margin_svm(x, y).norm().item(), lr=0.1, alpha=0.1)
    for k in (1, 10, 1000):  # the bound does not know the width
        made = train_hinge(LeakyTwoLayer(10, k, alpha=0.1), x, y, lr=0.1)
        print(f"{2 * k} hidden units: {made['updates']} updates, at most {bound:.0f}; zero loss: {made['zero_loss']}")
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

__all__ = ["LeakyTwoLayer", "compression_bound", "train_hinge", "update_bound"]


class LeakyTwoLayer(nn.Module):
    r"""$N(x) = v \sum_i \sigma(w_i \cdot x) - v \sum_i \sigma(u_i \cdot x)$ with `2k` hidden units, $v = 1/\sqrt{2k}$: ``[n, d] -> [n]``.

    The weights `W` ``[2k, d]`` are float64, and so is the output.

    Args:
        d: number of inputs.
        k: half the number of hidden units; the first `k` rows of `W` vote for, the others against.
        alpha: slope of the leaky ReLU for negative inputs, strictly between 0 and 1.
        init_scale: Frobenius norm of the start `W0`, whose direction is uniform; 0 starts at zero.
        generator: of the random start.

    Raises:
        ValueError: `alpha` is not in (0, 1), a size is below 1, or `init_scale` is negative.
    """

    def __init__(self, d: int, k: int, alpha: float = 0.1, init_scale: float = 0.0, generator: torch.Generator | None = None):
        super().__init__()
        _check_alpha(alpha)
        if d < 1 or k < 1:
            raise ValueError(f"d and k must be at least 1, got d={d}, k={k}")
        if not 0 <= init_scale < math.inf:
            raise ValueError(f"init_scale must be finite and not negative, got {init_scale}")
        self.alpha = alpha
        start = torch.randn(2 * k, d, dtype=torch.float64, generator=generator)
        self.W = nn.Parameter(init_scale * start / start.norm())
        votes = torch.ones(2 * k, dtype=torch.float64)
        votes[k:] = -1
        self.register_buffer("v", votes / math.sqrt(2 * k))

    def forward(self, x: Tensor) -> Tensor:
        z = x.to(self.W) @ self.W.T  # [n, 2k]
        # Not functional.leaky_relu, whose slope at 0 is alpha: the zero start would then move 1/alpha times slower.
        return torch.where(z >= 0, z, self.alpha * z) @ self.v  # [n]


def update_bound(w_star_norm: float, lr: float, alpha: float, init_norm: float = 0.0) -> float:
    r"""Most non-zero updates that SGD can make: $|w^*|^2 (1 + 2/\eta) / \alpha^2 + 2 |w^*| |W_0| / (\alpha \eta)$.

    Args:
        w_star_norm: $|w^*|$ of any separator with $y\, w^* \cdot x \ge 1$ on the data; the max-margin one gives the best bound.
        lr: the step $\eta$.
        alpha: slope of the leaky ReLU.
        init_norm: Frobenius norm of the start, all rows together.

    Raises:
        ValueError: a number outside the theorem's assumptions.
    """
    _check_alpha(alpha)
    if not (0 < w_star_norm < math.inf and 0 < lr < math.inf and 0 <= init_norm < math.inf):
        raise ValueError(f"expected w_star_norm > 0, lr > 0 and init_norm >= 0, got {w_star_norm}, {lr} and {init_norm}")
    return (w_star_norm / alpha) ** 2 * (1 + 2 / lr) + 2 * w_star_norm * init_norm / (alpha * lr)


@torch.no_grad()
def train_hinge(
    net: LeakyTwoLayer, X: Tensor, y: Tensor, lr: float, max_epochs: int = 1000, generator: torch.Generator | None = None
) -> dict[str, int | bool]:
    """SGD with batch size 1 on the hinge loss, in place, until the training loss is zero.

    Args:
        net: trained in place, in its own dtype.
        X: inputs ``[n, d]`` with rows of length at most 1.
        y: labels ``[n]`` in {-1, +1}.
        lr: the step.
        max_epochs: passes over the data before giving up.
        generator: of the order of examples.

    Returns:
        ``updates`` (non-zero ones), ``epochs`` (the last of which changed nothing if ``zero_loss``) and ``zero_loss``.

    Raises:
        ValueError: labels other than +-1, an input longer than 1, non-finite inputs, wrong shapes.
    """
    X, y = _check_data(net, X, y, lr, max_epochs)
    updates = 0
    for epoch in range(1, max_epochs + 1):
        order, before = torch.randperm(len(X), generator=generator).to(X.device), updates
        at, size = 0, 1
        # Examples with zero loss change nothing, so a whole block can be looked at before the next change.
        while at < len(X):
            block = order[at : at + size]
            violated = (y[block] * net(X[block]) < 1).nonzero()
            if len(violated) == 0:
                at, size = at + len(block), min(2 * size, 1024)
                continue
            first = int(violated[0])
            i = block[first]
            slope = torch.where(net.W @ X[i] >= 0, net.v, net.alpha * net.v)  # [2k]
            net.W += lr * y[i] * torch.outer(slope, X[i])
            updates += 1
            at, size = at + first + 1, max(1, size // 2)
        if updates == before:
            return {"updates": updates, "epochs": epoch, "zero_loss": True}
    # The last change may have been the one that was missing.
    return {"updates": updates, "epochs": max_epochs, "zero_loss": bool((y * net(X) >= 1).all())}


def compression_bound(updates: int, n: int, delta: float) -> float:
    r"""Error of a net with zero training loss after `updates` changes: $(c \ln n + \ln(1/\delta)) / (n - c)$, with probability $1 - \delta$.

    `updates` $c$ must be a number known before the data, such as :func:`update_bound`; with the measured number it is the size
    of the compression set. Values above 1 say nothing.

    Raises:
        ValueError: fewer than ``2 * updates`` examples, where the theorem is silent; `delta` not in (0, 1).
    """
    if updates < 0 or n < 1 or n < 2 * updates:
        raise ValueError(f"the compression theorem needs n >= 2 * updates, got n={n} and updates={updates}")
    if not 0 < delta < 1:
        raise ValueError(f"delta must be in (0, 1), got {delta}")
    return (updates * math.log(n) + math.log(1 / delta)) / (n - updates)


def _check_alpha(alpha: float) -> None:
    if not 0 < alpha < 1:
        raise ValueError(f"alpha must be in (0, 1), got {alpha}: the theorem's leaky ReLU has a positive slope everywhere")


def _check_data(net: LeakyTwoLayer, X: Tensor, y: Tensor, lr: float, max_epochs: int) -> tuple[Tensor, Tensor]:
    if X.dim() != 2 or X.shape[1] != net.W.shape[1] or y.shape != X.shape[:1] or len(X) == 0:
        raise ValueError(f"expected X [n, {net.W.shape[1]}] and y [n], got {tuple(X.shape)} and {tuple(y.shape)}")
    if not 0 < lr < math.inf or max_epochs < 1:
        raise ValueError(f"lr must be positive and max_epochs at least 1, got {lr} and {max_epochs}")
    if not bool((y.abs() == 1).all()):
        raise ValueError(f"labels must be -1 or +1, got values {sorted(set(y.tolist()))[:5]}")
    X, y = X.to(net.W), y.to(net.W)
    if not float(X.norm(dim=1).max()) <= 1 + 1e-6:  # also true for NaN
        raise ValueError(f"the theorem assumes |x| <= 1, got a longest input of {float(X.norm(dim=1).max()):.4g}")
    return X, y
