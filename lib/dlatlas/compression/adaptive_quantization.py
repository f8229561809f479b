r"""Adaptive quantisation: a number of bits for each weight (khoram2018adaptive).

All weights of a layer need not be equally exact. How far may a weight move before the loss notices? The gradient answers: far where it is small. So a budget
for the rise of the loss is shared out as an error margin for each weight, and each weight takes the fewest bits that keep it inside its margin, often
none at all. The gradient is only true nearby. Hence the margins are also bounded by a trust radius, and the whole is repeated at the rounded weights
with a fresh gradient, a smaller radius where the forecast failed and a larger one where it was kept, until no bit can be saved.

Equations: $b$ bits halve a range $b$ times, so the bits of all weights are, up to a constant, $-\sum_i \log_2 \tau_i$ with the margins $\tau_i$. With
the gradient $g$, the budget $\beta$ (the largest loss allowed less the loss now) and the radius $\tau_{\max}$,

$$ \max_\tau \sum_i \log_2 \tau_i \quad \text{subject to} \quad \sum_i |g_i| \tau_i \le \beta, \quad 0 < \tau_i \le \tau_{\max} . $$

The solution has one unknown $\lambda$, fixed by using up the budget:

$$ \tau_i = \min(\tau_{\max}, \lambda / |g_i|), \qquad \sum_i \min(|g_i| \tau_{\max}, \lambda) = \beta, $$

and without the radius $\tau_i = \beta / (n |g_i|)$. A weight of a layer with largest magnitude $M$ then takes the smallest $N$ with $|w^{(N)} - w| \le \tau$, where $w^{(0)} = 0$
and $w^{(N)}$ is $w$ rounded to a multiple of $M / 2^{N-1}$. Because $N$ is the smallest, the multiple is an odd one (an even one would do with less), and
no more than $2^N$ values can occur.

Deviations from the paper:

1. The schedule of the radius and the stopping rule are ours: a step is kept if the loss stays within the bound, and then the radius doubles; else it is undone and the radius halves.
   The run ends when steps have failed or saved nothing `patience` times in a row.
2. The forecast $\sum_i |g_i| \tau_i$ is the worst case, every error at its margin and uphill; the true rise is a small part of it. So the budget is multiplied by a factor that starts at one and
   is doubled and halved with the radius. Without it the steps creep and some weights keep more than twelve bits.
3. The radius is given as a share of each layer's largest magnitude, so that one number fits layers of different size.
4. The paper counts the bits of the values. :func:`storage_bits` also counts what a file needs to tell the width of each weight.

Later work: hardware wants one width for many weights, so the question moved to layers: HAQ (Wang et al., 2019) lets a reinforcement learner choose the bits of each layer, HAWQ (Dong et al., 2019)
takes the curvature of the loss in place of its gradient, which at a trained network is close to zero. A width for each weight has survived as sparsity and as a few outliers in higher
precision next to a low-bit matrix (SpQR, Dettmers et al., 2024).

Example:
    import torch
    from torch import nn
    from dlatlas.compression.adaptive_quantization import AdaptiveQuantizer, storage_bits

    x = torch.randn(2000, 20)
    y = (x[:, 0] * x[:, 1] > 0).long()
    net = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 2))
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    for step in range(200):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(x[:1000]), y[:1000])
        loss.backward()
        optimizer.step()

    def accuracy():
        return (net(x[1000:]).argmax(1) == y[1000:]).double().mean()

    print(f"trained: loss {loss:.3f}, accuracy {accuracy():.3f}")
    batches, bound = [(x[:1000], y[:1000])], loss.item() + 0.03
    quantizer = AdaptiveQuantizer(net, nn.functional.cross_entropy, batches, bound)
    found = quantizer.run()  # each weight gets as few bits as the bound on the loss allows
    print(f"quantised: loss {found['loss']:.3f}, accuracy {accuracy():.3f}")
    n = sum(bits.numel() for bits in found["bits"].values())
    print({name: f"{bits / n:.2f} bits" for name, bits in storage_bits(found["bits"]).items()})
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dlatlas.compression.kit.bench import huffman_lengths
from dlatlas.compression.kit.qat import layers_of

__all__ = ["AdaptiveQuantizer", "error_margins", "quantize_to_margin", "storage_bits"]


def error_margins(grad: Tensor, budget: float, tau_max: float | Tensor) -> Tensor:
    r"""Margins $\tau_i = \min(\tau_{\max}, \lambda / |g_i|)$ whose forecast $\sum_i |g_i| \tau_i$ is the budget, or all at the cap if that is less.

    Args:
        grad: gradient ``[n]``, or of any shape.
        budget: rise of the loss to share out, positive.
        tau_max: cap on every margin, or one for each weight; positive.

    Returns:
        Margins of the shape of `grad`.

    Raises:
        ValueError: the budget or a cap is not positive, no weights, or a gradient that is not finite.
    """
    cap = torch.as_tensor(tau_max, dtype=torch.float64, device=grad.device)
    if not budget > 0 or not (cap > 0).all():
        raise ValueError(f"expected a positive budget and positive caps, got {budget} and {float(cap.min())}")
    if grad.numel() == 0 or not grad.isfinite().all():
        raise ValueError(f"expected a finite gradient of at least one weight, got shape {tuple(grad.shape)}")
    slope = grad.detach().double().abs()
    cap = cap.expand_as(slope)
    price = (slope * cap).flatten()  # rise of the loss if every weight used its cap
    if price.sum() <= budget:
        return cap.to(grad.dtype).clone()
    # The k cheapest weights are at their cap and the others pay lambda each: the first k for which lambda does not exceed the next price.
    cheap = price.sort().values
    paid = torch.cat([cheap.new_zeros(1), cheap.cumsum(0)[:-1]])
    level = (budget - paid) / torch.arange(len(cheap), 0, -1, device=cheap.device)
    fits = level <= cheap
    fits[-1] = True  # a sum that exceeds the budget by less than its rounding error
    lam = level[fits.nonzero()[0, 0]]
    return torch.minimum(cap, lam / slope.clamp_min(torch.finfo(torch.float64).tiny)).to(grad.dtype)


def quantize_to_margin(w: Tensor, tau: Tensor, max_bits: int = 32, *, scale: float | None = None) -> tuple[Tensor, Tensor]:
    r"""Each weight rounded with the fewest bits N that keep it inside its margin: 0 for N = 0, else to multiples of $\max|w| / 2^{N-1}$.

    Args:
        w: weights ``[n]``, or of any shape.
        tau: margins, not negative, of the same shape.
        max_bits: a weight whose margin is too small even for these takes them all the same.
        scale: in the place of the largest magnitude.

    Returns:
        Rounded weights, and the bits of each as integers.

    Raises:
        ValueError: shapes differ, a margin is negative or NaN, `max_bits` outside 0..52 or a scale that is not positive.
    """
    if w.shape != tau.shape or not (tau >= 0).all():
        raise ValueError(f"expected margins >= 0 of the weights' shape, got {tuple(w.shape)} and {tuple(tau.shape)}")
    if not 0 <= max_bits <= 52 or (scale is not None and not scale > 0):
        raise ValueError(f"expected max_bits in 0..52 and a positive scale, got {max_bits} and {scale}")
    flat, tau = w.detach().flatten(), tau.flatten()
    exact = flat.double()
    unit = scale if scale is not None else float(exact.abs().max()) if len(flat) else 1.0
    quantized, bits = torch.zeros_like(flat), torch.zeros(len(flat), dtype=torch.long, device=w.device)
    outside = (flat.abs() > tau).nonzero()[:, 0]
    for n in range(1, max_bits + 1):
        if not len(outside):
            break
        step = unit / 2 ** (n - 1)
        rounded = ((exact[outside] / step).round() * step).to(w.dtype)
        quantized[outside], bits[outside] = rounded, n
        outside = outside[(rounded - flat[outside]).abs() > tau[outside]]
    return quantized.view_as(w), bits.view_as(w)


class AdaptiveQuantizer:
    """Quantises a trained network, a width for each weight, so that its loss on the given batches stays within a bound.

    Args:
        model: trained; its weights are changed in place. It is measured in evaluation mode.
        loss_fn: ``loss_fn(model(x), y)``, the mean over a batch.
        batches: pairs ``(x, y)``; all of them are used for every loss and gradient.
        loss_bound: largest mean loss allowed, above the present one.
        trust_radius: first cap on the margins, as a share of the largest magnitude of the layer.
        tau_max: largest radius, in the same unit.
        layers: names of Linear and Conv2d layers whose weights are quantised; None: all.
        max_bits: of a weight.
        patience: failures in a row that end the run.

    Raises:
        ValueError: a bound that is not above the loss now, no batch, unknown layers, or a radius outside (0, tau_max].
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[[Tensor, Tensor], Tensor],
        batches: Iterable[tuple[Tensor, Tensor]],
        loss_bound: float,
        trust_radius: float = 0.02,
        tau_max: float = 1.0,
        *,
        layers: Sequence[str] | None = None,
        max_bits: int = 32,
        patience: int = 4,
    ):
        known = layers_of(model)
        names = list(known) if layers is None else list(layers)
        if not names or set(names) - known.keys():
            raise ValueError(f"layers must be names among {list(known)}, got {names}")
        if not 0 < trust_radius <= tau_max:
            raise ValueError(f"expected 0 < trust_radius <= tau_max, got {trust_radius} and {tau_max}")
        self.model, self.loss_fn, self.batches = model, loss_fn, [tuple(batch) for batch in batches]
        if not self.batches:
            raise ValueError("expected at least one batch, got none")
        self.weights = {name: known[name].weight for name in names}
        # Fixed: the grids of all rounds lie inside each other, so that bits only go down.
        self.scales = {name: max(float(w.detach().abs().max()), 1e-30) for name, w in self.weights.items()}
        self.loss_bound, self.radius, self.tau_max = loss_bound, trust_radius, tau_max
        self.max_bits, self.patience = max_bits, patience
        if not (now := self.loss()) < loss_bound:
            raise ValueError(f"the bound must lie above the loss of the network as it is, got {loss_bound} and a loss of {now}")

    def loss(self) -> float:
        """Mean loss over all batches."""
        with torch.no_grad():
            return self._measure(lambda loss: None)

    def run(self, max_iters: int = 50) -> dict[str, Any]:
        """Quantise for at most `max_iters` rounds.

        Returns:
            `bits`: integers of the shape of each weight, by the layer's name (:func:`storage_bits` counts them); `loss`: of the quantised network; `history`: a list of
            dicts with the numbers of each round (`loss`, its worst-case `forecast`, `radius`, `factor` of the budget, mean `bits` and whether it was `kept`).

        Raises:
            ValueError: no round.
        """
        if max_iters < 1:
            raise ValueError(f"expected at least one round, got {max_iters}")
        loss, history, failures, factor = self.loss(), [], 0, 1.0
        bits = {name: torch.full(w.shape, self.max_bits, dtype=torch.long, device=w.device) for name, w in self.weights.items()}
        grad = self._gradient()
        for _ in range(max_iters):
            if failures >= self.patience or loss >= self.loss_bound:
                break
            old = {name: w.detach().clone() for name, w in self.weights.items()}
            margins, forecast = self._margins(grad, factor * (self.loss_bound - loss))
            new = {}
            with torch.no_grad():
                for name, w in self.weights.items():
                    rounded, new[name] = quantize_to_margin(w, margins[name], self.max_bits, scale=self.scales[name])
                    w.copy_(rounded)
            found, saved = self.loss(), _total(bits) - _total(new)
            inside = found <= self.loss_bound
            kept = inside and saved > 0
            history.append(
                {"loss": found, "forecast": loss + forecast, "radius": self.radius, "factor": factor, "bits": _mean(new), "kept": kept}
            )
            change = 2.0 if inside else 0.5
            factor, self.radius = factor * change, min(self.tau_max, self.radius * change)
            failures = 0 if kept else failures + 1
            if kept:
                loss, bits, grad = found, new, self._gradient()
            else:
                with torch.no_grad():
                    for name, w in self.weights.items():
                        w.copy_(old[name])
        return {"bits": bits, "loss": loss, "history": history}

    def _margins(self, grad: dict[str, Tensor], budget: float) -> tuple[dict[str, Tensor], float]:
        slope = torch.cat([g.flatten() for g in grad.values()])
        cap = torch.cat([torch.full((g.numel(),), self.radius * self.scales[name], dtype=torch.float64) for name, g in grad.items()]).to(
            slope.device
        )
        tau = error_margins(slope, budget, cap)
        parts = tau.split([g.numel() for g in grad.values()])
        return {name: t.view_as(g).to(g.dtype) for t, (name, g) in zip(parts, grad.items())}, float(
            (slope.double().abs() * tau.double()).sum()
        )

    def _gradient(self) -> dict[str, Tensor]:
        weights = list(self.weights.values())
        total = [torch.zeros_like(w) for w in weights]

        def add(loss: Tensor) -> None:
            for t, g in zip(total, torch.autograd.grad(loss, weights)):
                t.add_(g)

        with torch.enable_grad():
            self._measure(add)
        return dict(zip(self.weights, total))

    def _measure(self, use: Callable[[Tensor], None]) -> float:
        was_training, total = self.model.training, 0.0
        count = sum(len(x) for x, _ in self.batches)
        self.model.eval()
        try:
            for x, y in self.batches:
                share = self.loss_fn(self.model(x), y) * (len(x) / count)
                use(share)
                total += float(share.detach())
        finally:
            self.model.train(was_training)
        return total


def storage_bits(bits: dict[str, Tensor]) -> dict[str, int]:
    """Bits that the widths found by :meth:`AdaptiveQuantizer.run` cost.

    Returns:
        `values`: the sum of the widths, which is what the paper counts. `index`: the width of each weight in a Huffman code of its layer, with a byte of
        table for each width in use and one float for the range. `total`: a file with both, in which a weight of width N > 1 takes N - 1
        bits, because its multiple is known to be odd.
    """
    index = odd = 0
    for width in bits.values():
        counts = width.flatten().bincount().tolist()
        index += sum(n * length for n, length in zip(counts, huffman_lengths(counts))) + 8 * sum(n > 0 for n in counts) + 32
        odd += sum(counts[2:])
    return {"values": _total(bits), "index": index, "total": _total(bits) - odd + index}


def _total(bits: dict[str, Tensor]) -> int:
    return sum(int(b.sum()) for b in bits.values())


def _mean(bits: dict[str, Tensor]) -> float:
    return _total(bits) / sum(b.numel() for b in bits.values())
