r"""Alignment of two point sets through the dual of a logistic discriminator (usman2018stable).

An adversarial distance asks how well a discriminator can tell two sets apart; making the sets alike is then a game of a maximiser against a
minimiser, with all its circling. If the discriminator is linear and its loss is the logistic one, its problem is convex and has a dual:
the best discriminator can be written with one number between 0 and 1 for each point. Put the dual in the place of the inner problem and the game
is gone. Alignment is one joint minimisation over the transformation *and* these numbers, and an objective that falls is falling.

Equations, with labels $y_i \in \{-1, 1\}$, binary entropy $H$ in nats and $n$ points:

$$ p^* = \min_w \sum_i \log\big( 1 + e^{-y_i w \cdot x_i} \big) + \frac{\lambda}{2} |w|^2, \qquad
d^* = \max_{\alpha \in (0, 1)^n} \sum_i H(\alpha_i) - \frac{1}{2 \lambda} \Big| \sum_i \alpha_i y_i x_i \Big|^2, $$

$$ p^* = d^*, \qquad w^* = \frac{1}{\lambda} \sum_i \alpha_i^* y_i x_i, \qquad \alpha_i^* = \sigma(-y_i w^* \cdot x_i). $$

The distance of the sets is $n \log 2 - p^*$: zero when the best discriminator is the zero one. As $p^* = d^*$ is a maximum over $\alpha$, the distance is a minimum,

$$ \min_\theta \min_\alpha \; n \log 2 - \sum_i H(\alpha_i) + \frac{1}{2 \lambda} \Big| \sum_i \alpha_i y_i x_i(\theta) \Big|^2 . $$

With all $\alpha_i$ equal the last term is the squared distance of the means, the maximum mean discrepancy with a linear kernel: the method reweights it. Another
kernel replaces the inner products $x_i \cdot x_j$.

Deviations from the paper:

1. `solve_dual` is Newton's method; the paper optimises the dual together with the transformation, which is what :class:`DualAligner` does.
2. In the aligner the numbers $\alpha$ move by mirror steps with the entropy, whose size is set by the largest eigenvalue of the Gram matrix. With the
   transformation held still such a step never raises the objective, up to rounding; the numbers are kept within [1e-6, 1 - 1e-6]. The step of the transformation
   is its optimizer's: Adam with a fixed rate, the default, may raise the objective; for an affine map gradient steps no longer than one over the curvature do not.
3. A constant feature stands in for the discriminator's offset, so the offset is regularised too.

Later work: solving one player's problem exactly became the standard view of alignment by transport and by kernels (for example Damodaran et al., 2018, for
domain adaptation); deep discriminators have no such dual, and adversarial training with them went on.

Example:
    import torch
    from torch import nn
    from dlatlas.gans.dual_alignment import DualAligner

    y = torch.randint(2, (400,))
    x = 0.6 * torch.randn(400, 2) + torch.stack([2.0 * y - 1, 1.0 - 2 * y], 1)
    turn = torch.tensor([[1.0, 0.4], [-0.4, 1.0]])
    target, source = x[:200], x[200:] @ turn + torch.tensor([3.0, 2.0])
    classifier, move = nn.Linear(2, 2), nn.Linear(2, 2)
    optimizer = torch.optim.Adam(classifier.parameters(), 0.05)
    for _ in range(100):  # it knows the labels of the target domain only
        optimizer.zero_grad()
        nn.functional.cross_entropy(classifier(target), y[:200]).backward()
        optimizer.step()
    accuracy = lambda points: (classifier(points).argmax(1) == y[200:]).float().mean().item()
    print(f"accuracy on the source domain: {accuracy(source):.2f}")
    nn.init.eye_(move.weight), nn.init.zeros_(move.bias)
    aligner = DualAligner(move, lam=0.1)
    for step in range(201):
        distance = aligner.step(source, target)  # the method: no labels, no game
        if step % 100 == 0:
            print(f"step {step}: distance {distance:.3f}, accuracy {accuracy(move(source)):.2f}")
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

__all__ = ["DualAligner", "dual_objective", "primal_objective", "solve_dual"]

Kernel = Callable[[Tensor, Tensor], Tensor]


def primal_objective(x: Tensor, y: Tensor, w: Tensor, lam: float) -> Tensor:
    r"""$\sum_i \log(1 + e^{-y_i w \cdot x_i}) + \frac{\lambda}{2} |w|^2$, a scalar.

    Args:
        x: points ``[n, d]``.
        y: labels -1 or 1 ``[n]``.
        w: ``[d]``.
        lam: $\lambda$.

    Raises:
        ValueError: other labels, shapes that do not fit, or `lam` not positive.
    """
    _check(x, y, lam)
    return softplus(-y * (x @ w)).sum() + lam / 2 * w.square().sum()


def dual_objective(x: Tensor, y: Tensor, alpha: Tensor, lam: float, kernel: Kernel | None = None) -> Tensor:
    r"""$\sum_i H(\alpha_i) - \frac{1}{2\lambda} |\sum_i \alpha_i y_i x_i|^2$, a scalar, at most the primal one.

    Args:
        x: points ``[n, d]``.
        y: labels -1 or 1 ``[n]``.
        alpha: ``[n]``, in [0, 1].
        lam: $\lambda$.
        kernel: ``kernel(x, x) -> [n, n]`` in place of the inner products.

    Raises:
        ValueError: other labels, shapes that do not fit, or `lam` not positive.
    """
    _check(x, y, lam)
    signed = alpha * y
    quadratic = (signed @ x).square().sum() if kernel is None else signed @ kernel(x, x) @ signed
    return _entropy(alpha).sum() - quadratic / (2 * lam)


@torch.no_grad()
def solve_dual(x: Tensor, y: Tensor, lam: float, steps: int = 500, lr: float | None = None) -> Tensor:
    r"""The maximiser $\alpha^*$ ``[n]`` of the dual with inner products, by Newton's method from $\alpha_i = 1/2$.

    Args:
        x: points ``[n, d]``.
        y: labels -1 or 1 ``[n]``.
        lam: $\lambda$.
        steps: at most so many; it stops early when the gain falls below rounding.
        lr: length of each step; None: 1, halved until the objective rises enough.

    In float32, points that can be separated and a tiny `lam` (1e-6 for forty points) spoil the result by rounding, without a warning: use float64 there.

    Raises:
        ValueError: other labels, shapes that do not fit, or `lam` not positive.
    """
    _check(x, y, lam)
    signed = y[:, None] * x
    alpha = torch.full_like(signed[:, 0], 0.5)
    for _ in range(steps):
        slope = torch.logit(alpha).neg() - signed @ (alpha @ signed) / lam
        curvature = signed @ signed.T / lam + torch.diag(1 / (alpha * (1 - alpha)))
        direction = torch.linalg.solve(curvature, slope)
        gain = float(slope @ direction)
        if gain < 1e-24 * len(alpha):
            break
        # Towards an end of (0, 1) no more than nine tenths of the way.
        room = torch.where(direction > 0, (1 - alpha) / direction, -alpha / direction)[direction != 0]
        size = min(1.0 if lr is None else lr, 0.9 * float(room.min()))
        if lr is None:
            before = dual_objective(x, y, alpha, lam)
            for _ in range(50):
                if dual_objective(x, y, alpha + size * direction, lam) >= before + 1e-4 * size * gain:
                    break
                size /= 2
            else:
                break  # rounding hides the rest of the gain
        alpha = alpha + size * direction
    return alpha


class DualAligner:
    r"""Move one set of points onto another by a transformation that is trained together with the dual numbers.

    >>> aligner = DualAligner(nn.Linear(2, 2), lam=0.1)
    >>> for _ in range(600):
    ...     distance = aligner.step(source, target)

    Args:
        transform: the map of the source ``[n, k] -> [n, d]``; it is trained in place by Adam.
        lam: strength of the regulariser for each point, $\lambda = n\,$`lam` with $n$ the points of both sets, so that it means the same for any number of
            points; :func:`primal_objective`, :func:`dual_objective` and :func:`solve_dual` take $\lambda$ itself.
        lr: of the transformation.
        optimizer: makes the optimizer of the transformation from its parameters; None: Adam with rate `lr`.

    The numbers $\alpha$ are carried over from step to step by their place: give the points in the same order each time. A batch of another size starts them
    anew at one half; another batch of the *same* size goes on from the old ones, so set `alpha` to None before it.

    Raises:
        ValueError: `lam` or `lr` not positive.
    """

    def __init__(
        self,
        transform: nn.Module,
        lam: float = 0.1,
        lr: float = 1e-2,
        *,
        optimizer: Callable[[Iterator[nn.Parameter]], torch.optim.Optimizer] | None = None,
    ):
        if not (lam > 0 and lr > 0):
            raise ValueError(f"lam and lr must be positive, got {lam} and {lr}")
        self.transform, self.lam = transform, lam
        self.alpha: Tensor | None = None  # [n_source + n_target], of the points of the last step
        self._optimizer = torch.optim.Adam(transform.parameters(), lr) if optimizer is None else optimizer(transform.parameters())

    def step(self, source: Tensor, target: Tensor) -> float:
        r"""One mirror step of $\alpha$ and one step of the transformation; returns the distance after both, in nats a point.

        Args:
            source: ``[n, k]``.
            target: ``[m, d]``. With other numbers of points than in the step before, $\alpha$ starts anew.

        Raises:
            ValueError: the transformed source and the target do not have one number of features.
        """
        x, y = self._points(source, target)
        if self.alpha is None or len(self.alpha) != len(x):
            self.alpha = torch.full_like(x[:, 0], 0.5).detach()
        lam = self.lam * len(x)
        with torch.no_grad():
            signed = y[:, None] * x
            # The objective is smooth relative to the entropy with this constant, because the entropy's curvature is at least 4.
            size = 1 / (1 + float(torch.linalg.matrix_norm(signed, 2)) ** 2 / (4 * lam))
            logit = torch.logit(self.alpha)
            logit = logit - size * (logit + signed @ (self.alpha @ signed) / lam)
            self.alpha = logit.sigmoid().clamp(1e-6, 1 - 1e-6)
        loss = self._distance(x, y)
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()
        with torch.no_grad():
            return float(self._distance(*self._points(source, target)))

    def _points(self, source: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        moved = self.transform(source)
        if moved.dim() != 2 or target.dim() != 2 or moved.shape[1] != target.shape[1] or 0 in (len(moved), len(target)):
            raise ValueError(f"expected [n, d] and [m, d] after the transformation, got {tuple(moved.shape)} and {tuple(target.shape)}")
        x = torch.cat([moved, target.to(moved)])
        y = torch.cat([-torch.ones(len(moved)), torch.ones(len(target))]).to(moved)
        return torch.cat([x, torch.ones_like(x[:, :1])], 1), y  # the constant feature is the discriminator's offset

    def _distance(self, x: Tensor, y: Tensor) -> Tensor:
        return math.log(2) - dual_objective(x, y, self.alpha, self.lam * len(x)) / len(x)


def _entropy(alpha: Tensor) -> Tensor:
    return -torch.special.xlogy(alpha, alpha) - torch.special.xlogy(1 - alpha, 1 - alpha)


def _check(x: Tensor, y: Tensor, lam: float) -> None:
    if x.dim() != 2 or y.shape != x.shape[:1] or not bool((y.abs() == 1).all()):
        raise ValueError(
            f"expected points [n, d] and labels [n] of -1 or 1, got {tuple(x.shape)}, {tuple(y.shape)} and {y.unique().tolist()[:5]}"
        )
    if not lam > 0:
        raise ValueError(f"lam must be positive, got {lam}")
