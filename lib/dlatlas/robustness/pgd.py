r"""Projected gradient descent and adversarial training (madry2018towards).

Robustness is a game: the network minimises the loss that an adversary, who may move each input within a ball, has maximised. The inner player is
projected gradient ascent: a step along the sign of the gradient, back into the ball, again, from several random starts. Nothing cleverer that uses
gradients found much larger losses, so a network trained on what this attack finds withstands the others too. Training on the inner maximum is
legitimate, because its gradient is a descent direction of the maximum (Danskin).

Equations: with the ball $S = \{\delta : \|\delta\|_p \le \varepsilon\}$, the projection $\Pi$ onto it and cross-entropy $\ell$,

$$\min_\theta\, E_{(x, y)} \max_{\delta \in S} \ell(\theta; x + \delta, y),$$

$$\delta_{k+1} = \Pi_S\big(\delta_k + \alpha\, \mathrm{sign}\, \nabla_x \ell(\theta; x + \delta_k, y)\big) \quad (p = \infty), \qquad
\delta_{k+1} = \Pi_S\big(\delta_k + \alpha\, \nabla_x \ell / \|\nabla_x \ell\|_2\big) \quad (p = 2),$$

followed by clipping $x + \delta$ to the box of valid inputs. $\delta_0$ is uniform in the ball. Of all iterates of all restarts the point of largest loss
is kept for each sample, where a point that is misclassified comes before one that is not.

Deviations from the paper:

1. The best point seen is returned, the start and the first iterates included; the paper returns the last iterate of each restart.
2. The default step is $2.5\, \varepsilon / \mathrm{steps}$, from the authors' later advice, so that the border can be reached from any start.

Later work: AutoAttack (Croce and Hein, 2020) runs the same ascent with a step that adapts and a loss that does not saturate, and still breaks defences
that withstand this one. Rice et al. (2020) found that adversarial training overfits after its learning rate has dropped, so that stopping early does as much
as many improvements of the method.

Example:
    import torch
    from torch import nn
    from dlatlas.robustness.pgd import PGDTrainer, pgd

    y = torch.arange(2000) % 2
    x = (torch.rand(2000, 50) + 0.06 * (2 * y[:, None] - 1)).clamp(0, 1)  # many weak hints
    x[:, 0] = 0.25 + 0.5 * (y ^ (torch.rand(2000) < 0.1))  # a strong one, wrong in one of ten
    for name in ("plain", "adversarial"):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(50, 64), nn.ReLU(), nn.Linear(64, 2))
        optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
        trainer = PGDTrainer(net, optimizer, eps=0.1)
        for step in range(100):
            i = torch.randint(1000, (100,))
            if name == "adversarial":
                trainer.step(x[i], y[i])  # attacks the batch, then learns from what it found
                continue
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x[i]), y[i]).backward()
            optimizer.step()
        attacked = pgd(net, x[1000:], y[1000:], eps=0.1, steps=20)
        clean, left = ((net(z).argmax(1) == y[1000:]).double().mean() for z in (x[1000:], attacked))
        print(f"{name}: accuracy {clean:.2f}, under attack {left:.2f}")
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

__all__ = ["PGDTrainer", "attacking", "pgd", "project"]


def project(delta: Tensor, eps: float, norm: str) -> Tensor:
    r"""Nearest point of the ball $\|\delta\| \le \varepsilon$ for each sample.

    Args:
        delta: ``[batch, ...]``.
        eps: radius.
        norm: "linf" or "l2" (of everything but the batch axis).

    Raises:
        ValueError: unknown norm, or a negative radius.
    """
    _check_ball(eps, norm)
    if norm == "linf":
        return delta.clamp(-eps, eps)
    length = delta.flatten(1).norm(dim=1).view(-1, *[1] * (delta.dim() - 1))
    return delta * (eps / length.clamp_min(torch.finfo(delta.dtype).tiny)).clamp_max(1)


def pgd(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    eps: float,
    alpha: float | None = None,
    steps: int = 10,
    norm: str = "linf",
    random_start: bool = True,
    restarts: int = 1,
    targeted: bool = False,
    clip: tuple[float, float] = (0.0, 1.0),
) -> Tensor:
    r"""The worst point of each sample's ball that projected gradient ascent finds; the model is attacked in evaluation mode and left as it was.

    Args:
        model: ``[batch, ...] -> logits [batch, classes]``.
        x: inputs in the box.
        y: true labels ``[batch]``; the labels to reach if `targeted`.
        eps: radius of the ball in the units of x.
        alpha: step size; None: ``2.5 * eps / steps``.
        steps: of each restart.
        norm: "linf" or "l2".
        random_start: uniform in the ball; otherwise at x.
        restarts: independent starts.
        targeted: go down on the loss at `y` in place of up.
        clip: lower and upper end of the box of valid inputs.

    Returns:
        Points of the shape and dtype of x, without a graph.

    Raises:
        ValueError: unknown norm, a negative radius, a step that is not positive, fewer than one restart, negative steps, inputs outside the box,
            or not one label for each input.
    """
    _check_ball(eps, norm)
    alpha = 2.5 * eps / max(steps, 1) if alpha is None else alpha
    if steps < 0 or restarts < 1 or (alpha <= 0 and eps > 0):
        raise ValueError(f"expected steps >= 0, restarts >= 1 and alpha > 0, got {steps}, {restarts} and {alpha}")
    if len(x) != len(y) or y.dim() != 1:
        raise ValueError(f"expected one label for each input, got {len(x)} inputs and labels of shape {tuple(y.shape)}")
    low, high = clip
    x = x.detach()
    if x.numel() and not (low <= float(x.min()) and float(x.max()) <= high):
        raise ValueError(f"inputs must lie in the box {clip}, got values from {float(x.min()):.4g} to {float(x.max()):.4g}")
    if eps == 0 or len(x) == 0:
        return x.clone()
    sign = -1.0 if targeted else 1.0
    best, best_score = x.clone(), torch.full((len(x),), -math.inf, dtype=x.dtype, device=x.device)
    with attacking(model):
        for _ in range(restarts):
            point = x + _start(x, eps, norm) if random_start else x.clone()
            point = point.clamp(low, high)
            for k in range(steps + 1):
                point.requires_grad_(k < steps)
                with torch.set_grad_enabled(k < steps):
                    logits = model(point)
                    losses = sign * cross_entropy(logits, y, reduction="none")
                reached = (logits.argmax(1) == y) == targeted
                # Cross-entropies of both groups overlap: success goes first by a number that no loss gets near.
                score = losses.detach() + torch.where(reached, 1e6, 0.0)
                better = score > best_score
                best[better], best_score[better] = point.detach()[better], score[better]
                if k < steps:
                    (grad,) = torch.autograd.grad(losses.sum(), point)
                    point = x + project(point.detach() - x + alpha * _direction(grad, norm), eps, norm)
                    point = point.clamp(low, high)  # towards x, which lies in the box, so the ball is not left
    return best


class PGDTrainer:
    """Adversarial training: each step is taken on the points that :func:`pgd` finds against the network as it is.

    Args:
        model: trained in place.
        optimizer: of its parameters.
        eps: radius of the ball, in the maximum norm.
        steps: of the attack.
        alpha: its step size; None as in :func:`pgd`.

    Raises:
        ValueError: a negative radius, or no steps.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, eps: float, steps: int = 7, alpha: float | None = None):
        _check_ball(eps, "linf")
        if steps < 1:
            raise ValueError(f"the attack needs at least one step, got {steps}")
        self.model, self.optimizer, self.eps, self.steps, self.alpha = model, optimizer, eps, steps, alpha

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        """One update on the batch ``x [batch, ...]``, ``y [batch]``; returns the loss at the points found, without a graph."""
        worst = pgd(self.model, x, y, self.eps, self.alpha, self.steps)
        self.optimizer.zero_grad()
        loss = cross_entropy(self.model(worst), y)
        loss.backward()
        self.optimizer.step()
        return loss.detach()


@contextmanager
def attacking(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode and without gradients of its parameters; every module's mode and every flag is restored afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    flags = [(p, p.requires_grad) for p in model.parameters()]
    model.eval()
    for p, _ in flags:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for p, flag in flags:
            p.requires_grad_(flag)


def _check_ball(eps: float, norm: str) -> None:
    if norm not in ("linf", "l2"):
        raise ValueError(f"norm must be 'linf' or 'l2', got {norm!r}")
    if not 0 <= eps < math.inf:
        raise ValueError(f"eps must be finite and not negative, got {eps}")


def _start(x: Tensor, eps: float, norm: str) -> Tensor:
    """Uniform in the ball."""
    if norm == "linf":
        return (2 * torch.rand_like(x) - 1) * eps
    dimension = x[0].numel()
    radius = eps * torch.rand(len(x), *[1] * (x.dim() - 1), dtype=x.dtype, device=x.device) ** (1 / dimension)
    return radius * _direction(torch.randn_like(x), norm)


def _direction(grad: Tensor, norm: str) -> Tensor:
    if norm == "linf":
        return grad.sign()
    length = grad.flatten(1).norm(dim=1).view(-1, *[1] * (grad.dim() - 1))
    return grad / length.clamp_min(torch.finfo(grad.dtype).tiny)  # zero stays zero
