r"""FTPROP: a network of signs learns by setting targets (friesen2018ftprop).

A sign has no useful gradient, but a unit with a sign is a perceptron, and a perceptron is easy to train once one knows what it should have answered.
So learning splits in two: a combinatorial problem, to set a target of plus or minus one for each hidden unit, and a convex one for each layer, to
reach the targets. The target is the sign that makes the loss of the layer above smaller, and how much that would gain is the unit's credit. The
straight-through estimator turns out to be one case of this, with a layer loss that nobody would have chosen on purpose; the paper puts a smoother
one in its place.

Equations: for $h = \mathrm{sign}(z)$ and $g = \partial L / \partial h$, the gradient of the loss of the layer above, target and credit are

$$t = -\mathrm{sign}(g), \qquad c = |g|,$$

and the unit minimises $c\, \ell(z, t)$ with one of the layer losses

$$\ell_\mathrm{hinge} = \max(0, 1 - tz), \qquad \ell_\mathrm{saturated} = \max\big(0, 1 - \max(tz, -1)\big), \qquad \ell_\mathrm{soft} = 1 + \tanh(-tz).$$

Since $-c\, t = g$, the gradient that reaches $z$ is $g$ times a factor of $z$:

$$\frac{\partial}{\partial z}\, c\, \ell(z, t) = g \cdot \begin{cases} 1\{tz \le 1\} & \text{hinge} \\ 1\{|z| \le 1\} & \text{saturated hinge} \\
1 - \tanh^2 z & \text{soft hinge.} \end{cases}$$

The second line is the straight-through estimator that is cut off outside $[-1, 1]$. A quantised ReLU with $L$ levels is a sum of $n = L - 1$ shifted signs,

$$q(z) = \frac{1}{2n} \sum_{k=1}^{n} \Big(1 + \mathrm{sign}\big(z - \tfrac{2k - 1}{2n}\big)\Big),$$

and has one layer loss for the whole staircase, $\tfrac{1}{2} \ell(2z - 1, t)$, which for two levels is that of a single sign.

Deviations from the paper:

1. The thresholds of the quantised ReLU are the midpoints between its levels, so that it rounds $z$ clipped to $[0, 1]$ to the nearest one.
   The authors' program spreads them from 0 to 1 inclusive; the layer loss over the whole staircase is the one of that program.
2. Targets come from the gradient alone. The paper's search over sets of targets, of which this is the cheap case, is not here.
3. A unit whose gradient is exactly zero gets the target +1 in place of none. Its credit is zero, so that nothing follows from it.

Later work: the choice of the pseudo-derivative was studied much further under the name of surrogate gradients for spiking networks (Neftci et al.,
2019), with the finding that its width matters more than its form. Shekhovtsov and Yanush (2021) derive straight-through estimators as gradients of
networks with noise before the sign, which says which form belongs to which noise.

Example:
    import torch
    from torch import nn
    from dlatlas.compression.ftprop import SignActivation

    x = torch.randn(4000, 20)
    y = (x[:, 0] * x[:, 1] > 0).long()
    for learn in (False, True):
        torch.manual_seed(0)
        first, last = nn.Linear(20, 256), nn.Linear(256, 2)
        sign = SignActivation("soft_hinge")  # backward: targets and credits for the layer below
        net = nn.Sequential(first, nn.BatchNorm1d(256), sign, last)
        optimizer = torch.optim.Adam(net.parameters() if learn else last.parameters(), lr=1e-2)
        for step in range(300):
            i = torch.randint(2000, (100,))
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x[i]), y[i]).backward()
            optimizer.step()
        right = (net.eval()(x[2000:]).argmax(1) == y[2000:]).double().mean()
        print(f"hidden signs {'that learn' if learn else 'as drawn'}: accuracy {right:.3f}")
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn.functional import cross_entropy

__all__ = ["QuantizedReLU", "SignActivation", "ftprop_step", "layer_loss", "targets_from_gradient"]


def targets_from_gradient(grad: Tensor) -> Tensor:
    r"""Target of each unit, $t = -\mathrm{sign}(g)$, and +1 where the gradient is zero.

    Args:
        grad: gradient of the loss by the outputs of the units, any shape.
    """
    return torch.where(grad > 0, -1.0, 1.0).to(grad.dtype)


def layer_loss(z: Tensor, t: Tensor, kind: str) -> Tensor:
    r"""Loss $\ell(z, t)$ of each unit, without its credit.

    Args:
        z: what enters the sign, any shape.
        t: targets of the same shape, -1 or +1.
        kind: "soft_hinge", "saturated_hinge" or "hinge".

    Raises:
        ValueError: unknown kind, or different shapes.
    """
    _check(kind)
    if z.shape != t.shape:
        raise ValueError(f"z and t must have one shape, got {tuple(z.shape)} and {tuple(t.shape)}")
    tz = t * z
    if kind == "soft_hinge":
        return 1 + torch.tanh(-tz)
    return (1 - (tz.clamp_min(-1) if kind == "saturated_hinge" else tz)).clamp_min(0)


class SignActivation(nn.Module):
    r"""$+1$ where $z \ge 0$, else $-1$; the gradient is that of the layer loss at the target, times the credit.

    Args:
        loss: "soft_hinge", "saturated_hinge" (the straight-through estimator) or "hinge".

    Raises:
        ValueError: unknown loss.
    """

    def __init__(self, loss: str = "soft_hinge"):
        super().__init__()
        self.loss = _check(loss)

    def forward(self, z: Tensor) -> Tensor:
        return _TargetPropagation.apply(z, self.loss, 1)

    def extra_repr(self) -> str:
        return f"loss={self.loss!r}"


class QuantizedReLU(nn.Module):
    r"""The nearest of `levels` values between 0 and 1, as a sum of shifted signs; gradient of one layer loss for the whole staircase.

    Args:
        loss: as in :class:`SignActivation`. The saturated hinge passes the gradient where $0 \le z \le 1$.
        levels: number $L$ of values $0, 1/(L - 1), \dots, 1$.

    Raises:
        ValueError: unknown loss, or fewer than two levels.
    """

    def __init__(self, loss: str = "soft_hinge", levels: int = 4):
        super().__init__()
        if levels < 2:
            raise ValueError(f"a staircase needs at least 2 levels, got {levels}")
        self.loss, self.levels = _check(loss), levels

    def forward(self, z: Tensor) -> Tensor:
        # Halves on both sides: the gradient by 2z - 1 is half of that by z.
        return (1 + _TargetPropagation.apply(2 * z - 1, self.loss, self.levels - 1)) / 2

    def extra_repr(self) -> str:
        return f"loss={self.loss!r}, levels={self.levels}"


def ftprop_step(
    layers: Sequence[nn.Module],
    x: Tensor,
    y: Tensor,
    opt: torch.optim.Optimizer,
    *,
    kind: str = "soft_hinge",
    output_loss: Callable[[Tensor, Tensor], Tensor] = cross_entropy,
) -> Tensor:
    r"""One update on a mini-batch: from the top down each layer gets its targets and the gradient of its own loss; then all take a step.

    No gradient passes from one layer's loss to another layer: all that comes down are targets and credits.

    Args:
        layers: from the input up, each from the signs below to its $z$; between two of them stands a sign. The last one gives the output.
        x: inputs ``[batch, ...]``.
        y: labels, which are the targets of the last layer.
        opt: of the parameters of all layers.
        kind: loss of the hidden layers, see :func:`layer_loss`.
        output_loss: ``output_loss(z, y)`` of the last layer, a scalar.

    Returns:
        The loss of the last layer before the update, without a graph.

    Raises:
        ValueError: no layers, or unknown kind.
    """
    _check(kind)
    if len(layers) == 0:
        raise ValueError("expected at least one layer, got none")
    below, outputs = [], []
    h = x
    for k, layer in enumerate(layers):
        below.append(h.detach().requires_grad_(k > 0))
        outputs.append(layer(below[-1]))
        h = _signs(outputs[-1])
    opt.zero_grad()
    loss = output_loss(outputs[-1], y)
    loss.backward()
    for z, signs in zip(outputs[-2::-1], below[:0:-1]):  # the layer and its own output, which enters the layer above
        credit, t = signs.grad.abs(), targets_from_gradient(signs.grad)
        (credit * layer_loss(z, t, kind)).sum().backward()
    opt.step()
    return loss.detach()


KINDS = ("soft_hinge", "saturated_hinge", "hinge")


def _check(kind: str) -> str:
    if kind not in KINDS:
        raise ValueError(f"unknown loss: expected one of {', '.join(KINDS)}, got {kind!r}")
    return kind


def _signs(z: Tensor) -> Tensor:
    return torch.copysign(z.new_ones(()), z.detach() + 0.0)  # a sum turns -0 into 0, whose sign is plus


class _TargetPropagation(Function):
    """Mean of `steps` signs, with thresholds spread evenly over [-1, 1]; the gradient is that of one layer loss at `u`."""

    @staticmethod
    def forward(u: Tensor, kind: str, steps: int) -> Tensor:
        if steps == 1:
            return _signs(u)
        return sum(_signs(u - ((2 * k - 1) / steps - 1)) for k in range(1, steps + 1)) / steps

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, str, int], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])
        ctx.kind = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (u,) = ctx.saved_tensors
        if ctx.kind == "soft_hinge":
            return grad * (1 - torch.tanh(u).square()), None, None
        tu = targets_from_gradient(grad) * u
        inside = u.abs() <= 1 if ctx.kind == "saturated_hinge" else tu <= 1
        return grad * inside, None, None
