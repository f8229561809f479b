r"""Loss-aware weight quantisation, LAT and LAQ (hou2018lossaware).

Most quantisers look for the grid point nearest to a weight, as if an error in one weight were as bad as the same error in another. What counts is
the loss. Near the current weights it looks like a bowl, and the second moment of the gradients that Adam keeps anyway says along which weights the bowl is
steep. So the rounding error of each weight is counted with that curvature: steep weights get the grid point that suits them, flat ones yield.

Equations: with the gradient $g$ at the quantised weights, Adam's moments $\hat m, \hat v$ with bias correction and its rate $\eta$, the curvature is
$d = (\sqrt{\hat v} + \epsilon) / \eta$ and the step in full precision goes to $w' = w - \hat m / d$. The layer then computes with $\alpha b$ from

$$ \min_{\alpha > 0,\, b \in \mathcal{Q}^n} \; \tfrac12 \sum_i d_i (\alpha b_i - w'_i)^2, $$

a proximal Newton step with diagonal curvature. For a fixed scale, $b_i$ is the point of the grid $\mathcal{Q}$ nearest to $w'_i / \alpha$; for fixed codes
$\alpha = \sum_i d_i b_i w'_i / \sum_i d_i b_i^2$. The approximate solver repeats these two. For three values the exact one is a sort: the entries that are not zero
are the largest in magnitude, so of the $n$ prefixes $S$ of the sorted list take the one that maximises

$$ \Big( \sum_{i \in S} d_i |w'_i| \Big)^2 \Big/ \sum_{i \in S} d_i , \qquad \alpha = \sum_{i \in S} d_i |w'_i| \Big/ \sum_{i \in S} d_i . $$

Two scales are the same problem for the positive and for the negative entries. With $m$ bits and $k = 2^{m-1} - 1$ the linear grid is $0, \pm\frac1k, \dots, \pm 1$, the
logarithmic one $0, \pm 2^{-(k-1)}, \dots, \pm\frac12, \pm 1$.

Deviations from the paper:

1. The approximate solver starts from two scales, one of them that of "ternary weight networks" (and from a third with more than three values), and keeps the better end, so that its objective is never above
   that of ternary weight networks on the same input. All sums are in float64.
2. If every code would be zero, the largest weight keeps its code.
3. `kind="twn"` trains with the rule of ternary weight networks, which knows no curvature, through the same code: the baseline.

Later work: Hou et al. (2019) found that quantised LSTMs have exploding gradients and that normalising their weights cures it. Adaptive loss-aware quantisation (Qu et al., 2020) prunes sign
vectors by the same kind of curvature, with another number of bits for each group of weights. After training, the diagonal gives way to larger pieces of the curvature: GPTQ (Frantar et al., 2023) rounds a language model
column by column and corrects the columns that are left, with the full Hessian of each layer's squared error.

Example:
    import torch
    from torch import nn
    from dlatlas.compression.loss_aware import LossAwareQuantizer

    x = torch.randn(3000, 20)
    y = (2 * (x[:, 0] * x[:, 1] > 0) + (x[:, 2] * x[:, 3] > 0)).long()
    inner = nn.Linear(64, 64)
    net = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), inner, nn.ReLU(), nn.Linear(64, 4))
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    def train(stepper):
        for step in range(200):
            i = torch.randint(1500, (100,))
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x[i]), y[i]).backward()
            stepper.step()
    def report(name):
        right = (net(x[1500:]).argmax(1) == y[1500:]).double().mean()
        print(f"{name}: accuracy {right:.3f}, values of a weight: {len(inner.weight.unique())}")

    train(optimizer)
    report("floats")
    quantizer = LossAwareQuantizer(optimizer, [inner.weight], exact=True)  # the method
    report("rounded")
    train(quantizer)  # its step takes the place of the optimizer's
    report("trained rounded")
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

__all__ = ["LossAwareQuantizer", "objective", "quantize_mbit", "ternarize", "ternarize_two_scale", "twn"]


def ternarize(w: Tensor, d: Tensor, exact: bool = False, iters: int = 10) -> tuple[Tensor, Tensor]:
    r"""Scale and codes of $\min_{\alpha, b} \frac12 \sum_i d_i (\alpha b_i - w_i)^2$ with $b_i \in \{-1, 0, 1\}$.

    Args:
        w: weights ``[n]``, or of any shape.
        d: curvature, positive, of the same shape.
        exact: the best of all prefixes of the sorted weights in place of alternating steps.
        iters: rounds of the alternation, at least 1.

    Returns:
        Scale (a tensor without axes) and codes of the shape of `w`. If all weights are zero, so are both.

    Raises:
        ValueError: shapes differ, an entry of `d` is not positive, no weights, or no round.
    """
    x, c = _checked(w, d, iters)
    alpha, b = _exact(x, c) if exact else _alternate(x, c, 2, "linear", iters)
    return alpha.to(w.dtype), b.view_as(w).to(w.dtype)


def ternarize_two_scale(w: Tensor, d: Tensor, exact: bool = False, iters: int = 10) -> tuple[Tensor, Tensor, Tensor]:
    r"""Two scales and codes: entries $\alpha_+$, 0 and $-\alpha_-$. Positive and negative weights are two problems of :func:`ternarize`.

    Returns:
        $\alpha_+$, $\alpha_-$ and codes in $\{-1, 0, 1\}$. A scale is zero where no weight has that sign.
    """
    x, c = _checked(w, d, iters)
    b, scales = torch.zeros_like(x), []
    for sign in (1.0, -1.0):
        side = sign * x > 0
        if side.any():
            alpha, b[side] = ternarize(x[side], c[side], exact, iters)
        scales.append(alpha if side.any() else x.new_zeros(()))
    return scales[0].to(w.dtype), scales[1].to(w.dtype), b.view_as(w).to(w.dtype)


def quantize_mbit(w: Tensor, d: Tensor, bits: int, grid: str = "linear", iters: int = 10) -> tuple[Tensor, Tensor]:
    r"""Scale and codes of the same objective for the $2^{m} - 1$ values of an m-bit grid.

    Args:
        w: weights of any shape.
        d: curvature, positive.
        bits: 2 to 8.
        grid: "linear" or "log".
        iters: rounds of the alternation.

    Raises:
        ValueError: as :func:`ternarize`; other bits or grid.
    """
    x, c = _checked(w, d, iters)
    alpha, b = _alternate(x, c, bits, grid, iters)
    return alpha.to(w.dtype), b.view_as(w).to(w.dtype)


def twn(w: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and codes of ternary weight networks (Li et al., 2016): zero up to 0.7 times the mean magnitude, then the mean of what is left."""
    x, _ = _checked(w, torch.ones_like(w), 1)
    b = x.sign() * _codes(x.abs(), 1.4 * x.abs().mean(), 2, "linear")
    return (x * b).sum().div(b.abs().sum().clamp_min(1)).to(w.dtype), b.view_as(w).to(w.dtype)


def objective(w: Tensor, d: Tensor, q: Tensor) -> float:
    r"""$\frac12 \sum_i d_i (q_i - w_i)^2$ in float64."""
    return float((d.double() * (q.double() - w.double()).square()).sum() / 2)


class LossAwareQuantizer:
    r"""Steps of a `torch.optim.Adam` whose parameters are rounded, loss-aware, after every step.

    Between two steps ``p.data`` holds $\alpha b$, so that loss and gradient are those of the quantised network; the weight in full precision is kept here, and Adam's
    step is applied to it. One training step is, in this order: ``optimizer.zero_grad()``, ``loss.backward()``, clipping of gradients if wanted,
    ``quantizer.step()`` in the place of ``optimizer.step()``, then ``schedule.step()`` if there is a schedule. After the last step the network is quantised.

    Args:
        optimizer: Adam (or AdamW). It may hold further parameters, which it trains as ever.
        params: those of its parameters that are to be quantised, each with its own scale.
        kind: "lat" (three values), "lat2" (three values, two scales), "laq" (`bits` bits) or "twn" (three values, no curvature: the baseline).
        bits: of "laq".
        grid: of "laq", "linear" or "log".
        exact: solve "lat" and "lat2" exactly.
        iters: rounds of the approximate solver.

    Raises:
        ValueError: not Adam, no parameters or some that the optimizer does not hold, or an unknown kind, grid or number of bits.
    """

    def __init__(
        self,
        optimizer: torch.optim.Adam,
        params: Iterable[Tensor],
        kind: str = "lat",
        bits: int = 3,
        *,
        grid: str = "linear",
        exact: bool = False,
        iters: int = 10,
    ):
        self.params = list(params)
        rules: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, ...]]] = {
            "lat": lambda w, d: ternarize(w, d, exact, iters),
            "lat2": lambda w, d: ternarize_two_scale(w, d, exact, iters),
            "laq": lambda w, d: quantize_mbit(w, d, bits, grid, iters),
            "twn": lambda w, d: twn(w),
        }
        if not isinstance(optimizer, torch.optim.Adam):
            raise ValueError(f"the curvature is Adam's second moment: expected torch.optim.Adam, got {type(optimizer).__name__}")
        self._group = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        if not self.params or any(id(p) not in self._group for p in self.params):
            raise ValueError(f"expected parameters that the optimizer holds, got {[tuple(p.shape) for p in self.params]}")
        if kind not in rules:
            raise ValueError(f"kind must be one of {sorted(rules)}, got {kind!r}")
        _grid(bits, grid)
        self.optimizer, self.kind, self._rule = optimizer, kind, rules[kind]
        self._latent = [p.detach().clone() for p in self.params]
        self._write()

    def latent(self, p: Tensor) -> Tensor:
        """The full-precision weight behind a quantised parameter."""
        return self._latent[self._index(p)]

    @torch.no_grad()
    def curvature(self, p: Tensor) -> Tensor:
        r"""$(\sqrt{\hat v} + \epsilon) / \eta$ of a parameter, and ones before Adam's first step."""
        group, state = self._group[id(p)], self.optimizer.state.get(p)
        if not state:
            return torch.ones_like(p)
        moment = state["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"]
        root = (moment / (1 - group["betas"][1] ** float(state["step"]))).sqrt() + group["eps"]
        # A rate of zero: a factor that all weights share changes neither scale nor codes.
        return root / float(group["lr"]) if float(group["lr"]) > 0 else root

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """One step of Adam on the weights in full precision, with the gradient at the quantised ones, and rounding; returns the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()  # before the exact weights come back: the loss is that of the quantised network
        for p, w in zip(self.params, self._latent):
            p.copy_(w)
        self.optimizer.step()
        for p, w in zip(self.params, self._latent):
            w.copy_(p)
        self._write()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Adam's state, the weights in full precision and the quantised ones."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "latent": [w.clone() for w in self._latent],
            "quantized": [p.detach().clone() for p in self.params],
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a :meth:`state_dict`; the quantised parameters are written too.

        Raises:
            ValueError: the shapes differ.
        """
        want, got = [[tuple(t.shape) for t in ts] for ts in (self.params, state["latent"])]
        if want != got:
            raise ValueError(f"expected weights of shapes {want}, got {got}")
        self.optimizer.load_state_dict(state["optimizer"])
        self._group = {id(p): group for group in self.optimizer.param_groups for p in group["params"]}
        for p, w, new, q in zip(self.params, self._latent, state["latent"], state["quantized"]):
            w.copy_(new)
            p.copy_(q)

    @torch.no_grad()
    def _write(self) -> None:
        for p, w in zip(self.params, self._latent):
            *scales, b = self._rule(w, self.curvature(p))
            p.copy_(scales[0] * b if len(scales) == 1 else torch.where(b > 0, scales[0], scales[1]) * b)

    def _index(self, p: Tensor) -> int:
        return next(i for i, q in enumerate(self.params) if q is p)


def _checked(w: Tensor, d: Tensor, iters: int) -> tuple[Tensor, Tensor]:
    if w.shape != d.shape or w.numel() == 0 or not w.is_floating_point():
        raise ValueError(f"expected weights and curvature of one shape, got {w.dtype} {tuple(w.shape)} and {tuple(d.shape)}")
    if not (d > 0).all():
        raise ValueError(f"the curvature must be positive, got {float(d.min())}")
    if iters < 1:
        raise ValueError(f"expected at least one round, got {iters}")
    return w.detach().flatten().double(), d.detach().flatten().double()


def _grid(bits: int, grid: str) -> tuple[Callable[[Tensor], Tensor], float]:
    """A function from magnitudes to the nearest magnitudes of the grid, and the smallest one that is not zero."""
    if not 2 <= bits <= 8 or grid not in ("linear", "log"):
        raise ValueError(f"expected 2 to 8 bits and the grid 'linear' or 'log', got {bits} and {grid!r}")
    k = 2 ** (bits - 1) - 1
    if grid == "linear":
        return lambda size: (size * k).round_().clamp_(max=k).div_(k), 1 / k
    points = torch.cat([torch.zeros(1), 2.0 ** torch.arange(1 - k, 1)]).double()
    middles = (points[1:] + points[:-1]) / 2
    return lambda size: points.to(size.device)[torch.bucketize(size, middles.to(size.device))], 2.0 ** (1 - k)


def _codes(size: Tensor, alpha: Tensor, bits: int, grid: str) -> Tensor:
    nearest, smallest = _grid(bits, grid)
    q = nearest(size / alpha.clamp_min(torch.finfo(size.dtype).tiny))
    if not q.any():
        q[size.argmax()] = smallest
    return q


def _alternate(x: Tensor, d: Tensor, bits: int, grid: str, iters: int) -> tuple[Tensor, Tensor]:
    size = x.abs()
    mean = size.mean()
    starts = [mean, 1.4 * mean] if bits == 2 else [mean, 1.4 * mean, size.max()]
    weighted, best = d * size, (x.new_zeros(()), torch.zeros_like(x))
    gain = 0.0
    for alpha in starts if mean > 0 else ():
        for _ in range(iters):
            q = _codes(size, alpha, bits, grid)
            fit = weighted.dot(q)
            before, alpha = alpha, fit / d.dot(q * q)
            if alpha == before:
                break
        # The objective is a constant less half of this: sum d x^2 - fit^2 / sum d q^2.
        if (found := float(fit * alpha)) > gain:
            gain, best = found, (alpha, q)
    return best[0], x.sign() * best[1]


def _exact(x: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    size, order = x.abs().sort(descending=True)
    total, weight = (d[order] * size).cumsum(0), d[order].cumsum(0)
    k = (total.square() / weight).argmax()
    b = torch.zeros_like(x)
    b[order[: k + 1]] = x[order[: k + 1]].sign()
    return total[k] / weight[k], b
