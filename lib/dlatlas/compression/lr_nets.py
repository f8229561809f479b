r"""LR-nets: discrete weights by the local reparametrisation trick (shayer2018lrnets).

What is trained is not a weight but the probabilities that it is -1, 0 or 1. A unit sums many independent weights times inputs, so by the
central limit theorem its pre-activation is nearly Gaussian, and mean and variance of it are smooth functions of the probabilities. Sample
that Gaussian instead of the weights, and ordinary back-propagation trains a discrete network, without any straight-through step.

Equations: with logits $a, b$ of each weight, $p_0 = P(w = 0) = S(a)$ and $q = P(w = 1 \mid w \ne 0) = S(b)$ for the sigmoid $S$,

$$ \mu = (1 - p_0)(2q - 1), \qquad \nu = (1 - p_0) - \mu^2, \qquad
   z = x \mu^\top + \sqrt{x^2 \nu^\top + 10^{-10}}\; \epsilon, \quad \epsilon \sim N(0, 1), $$

with one $\epsilon$ for each unit and example. Batch normalisation follows, so the weights need no scale. Binary weights have $P(w = 1) = S(a)$, hence
$\mu = 2 S(a) - 1$ and $\nu = 1 - \mu^2$. Start from a trained weight, divided by the standard deviation of its layer and clipped
to $\tilde w \in [-1, 1]$: with $p_{\min} = 0.05$ and $p_{\max} = 0.95$

$$ p_0 = p_{\max} - (p_{\max} - p_{\min}) |\tilde w|, \qquad q = \tfrac12 \Big( 1 + \frac{\tilde w}{1 - p_0} \Big) \text{ clipped to } [p_{\min}, p_{\max}]. $$

The mean is then $\tilde w$ for small weights only. Beyond $|\tilde w| = 0.24$, $q$ is clipped and the mean is $0.9 (1 - p_0)$ in size, up to 0.145 short of
$|\tilde w|$; of Gaussian weights one in five keeps its value. Deployment: the weights are drawn once.

Deviations from the paper:

1. The variance under the root has $10^{-10}$ added; the authors' published code adds $10^{-3}$.
2. The statistics of batch normalisation are estimated anew for the drawn weights. The published code keeps those of training, which
   are an average over all draws.
3. Evaluation mode computes with the mean weights; the network to deploy is a plain one, made by :func:`sampled`.
4. The penalties are those of the published code: half the sum of squared logits times $10^{-11}$ for ternary weights, and for binary ones
   $10^{-6} \sum p (1 - p)$, the kernel of a beta density with both exponents 2, which pushes $p$ to 0 or 1. They are :func:`regularizer` and nothing adds
   them by itself: the book's chapter trains without them.

Later work: Peters and Welling (2018) carry means and variances through binary activations as well, and Roth et al. (2019) allow weights of
any few values and sign activations. Straight-through estimators remained the common tool, because sampling doubles the cost of a layer.

Example:
    import torch
    from torch import nn
    from dlatlas.compression.lr_nets import lr_net, sampled

    x = torch.randn(4000, 20)
    y = (2 * (x[:, 0] * x[:, 1] > 0) + (x[:, 2] * x[:, 3] > 0)).long()
    inner = [nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU()]
    first = [nn.Linear(20, 64), nn.BatchNorm1d(64), nn.ReLU()]
    net = nn.Sequential(*first, *inner, nn.Linear(64, 4))

    def train(net, lr):
        optimizer = torch.optim.Adam(net.parameters(), lr)
        for step in range(200):
            i = torch.randint(2000, (100,))
            optimizer.zero_grad()
            nn.functional.cross_entropy(net.train()(x[i]), y[i]).backward()
            optimizer.step()
    def accuracy(net):
        return (net.eval()(x[2000:]).argmax(1) == y[2000:]).double().mean()

    train(net, lr=1e-2)
    print(f"floats: accuracy {accuracy(net):.3f}")
    train(lr_net(net, skip=("first", "last")), lr=0.1)  # inner weights become odds of -1, 0 and 1
    drawn = sampled(net, x[:2000])  # one draw of the weights, with statistics of its own
    print(f"drawn: accuracy {accuracy(drawn):.3f}, weights {drawn[3].weight.int().unique().tolist()}")
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from dlatlas.compression.kit.qat import choose_layers, conv_arguments, filled, plain_layer

__all__ = ["LRBinaryLinear", "LRTernaryConv2d", "LRTernaryLinear", "lr_net", "reestimate_norms", "regularizer", "sampled"]


class _Random:
    """What all layers share. A subclass tells mean and variance of its weights, how to draw them and where they start."""

    def _start(self, names: Sequence[str]) -> None:
        shape_of = self.weight
        del self.weight  # the layer has probabilities in its place
        for name in names:
            self.register_parameter(name, nn.Parameter(torch.empty_like(shape_of)))
        self.from_weight(shape_of.detach())

    def _preactivation(self, x: Tensor) -> Tensor:
        mean = self._apply_weight(x, self.weight_mean(), self.bias)
        if not self.training:
            return mean
        # The small number keeps the gradient of the root finite where the variance vanishes.
        spread = (self._apply_weight(x**2, self.weight_var(), None) + 1e-10).sqrt()
        return mean + spread * torch.randn_like(mean)


class _Ternary(_Random):
    def weight_mean(self) -> Tensor:
        r"""$\mu$, shape of the weight."""
        return torch.sigmoid(-self.a) * torch.tanh(0.5 * self.b)  # 2 S(b) - 1 = tanh(b / 2)

    def weight_var(self) -> Tensor:
        r"""$\nu$, shape of the weight; never negative."""
        some, lean = torch.sigmoid(-self.a), torch.tanh(0.5 * self.b) ** 2
        return some * ((1 - lean) + lean * torch.sigmoid(self.a))

    @torch.no_grad()
    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Weights in {-1, 0, 1}, drawn independently."""
        some, positive = _uniform(self.a, generator) >= torch.sigmoid(self.a), _uniform(self.b, generator) < torch.sigmoid(self.b)
        return some * torch.where(positive, 1.0, -1.0).to(self.a.dtype)

    @torch.no_grad()
    def from_weight(self, w: Tensor, p_min: float = 0.05, p_max: float = 0.95) -> _Ternary:
        """Set the probabilities so that the mean follows a trained weight; returns the layer.

        Args:
            w: shape of the layer's weight.
            p_min: smallest probability.
            p_max: largest probability.

        Raises:
            ValueError: another shape, or not 0 < p_min < p_max < 1.
        """
        w = _normalized(w, self.a, p_min, p_max)
        zero = p_max - (p_max - p_min) * w.abs()
        self.a.copy_(torch.logit(zero))
        self.b.copy_(torch.logit((0.5 * (1 + w / (1 - zero))).clamp(p_min, p_max)))
        return self


class LRTernaryLinear(_Ternary, nn.Linear):
    """`Linear` whose weights are -1, 0 or 1 with learned probabilities; parameters ``a`` and ``b`` are their logits ``[out, in]``.

    In training mode the pre-activations are drawn; in evaluation mode the layer computes with the mean weights.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True, **kwargs: Any):
        super().__init__(in_features, out_features, bias, **kwargs)
        self._start("ab")

    def _apply_weight(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return linear(x, weight, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self._preactivation(x)


class LRTernaryConv2d(_Ternary, nn.Conv2d):
    """`Conv2d` whose weights are -1, 0 or 1 with learned probabilities; arguments of `torch.nn.Conv2d`."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._start("ab")

    def _apply_weight(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self._conv_forward(x, weight, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self._preactivation(x)


class LRBinaryLinear(_Random, nn.Linear):
    """`Linear` whose weights are -1 or 1 with learned probabilities; the parameter ``a`` is the logit of 1."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True, **kwargs: Any):
        super().__init__(in_features, out_features, bias, **kwargs)
        self._start("a")

    _apply_weight = LRTernaryLinear._apply_weight
    forward = LRTernaryLinear.forward

    def weight_mean(self) -> Tensor:
        r"""$\mu$, shape of the weight."""
        return torch.tanh(0.5 * self.a)

    def weight_var(self) -> Tensor:
        r"""$\nu$, shape of the weight."""
        return 4 * torch.sigmoid(self.a) * torch.sigmoid(-self.a)

    @torch.no_grad()
    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Weights in {-1, 1}, drawn independently."""
        return torch.where(_uniform(self.a, generator) < torch.sigmoid(self.a), 1.0, -1.0).to(self.a.dtype)

    @torch.no_grad()
    def from_weight(self, w: Tensor, p_min: float = 0.05, p_max: float = 0.95) -> LRBinaryLinear:
        r"""Set $P(w = 1) = (1 + \tilde w) / 2$, clipped; see :meth:`LRTernaryLinear.from_weight`."""
        self.a.copy_(torch.logit((0.5 * (1 + _normalized(w, self.a, p_min, p_max))).clamp(p_min, p_max)))
        return self


def regularizer(model: nn.Module, p_decay: float = 1e-11, beta: float = 1e-6) -> Tensor:
    r"""Penalty of all layers: `p_decay` times $\tfrac12 \sum (a^2 + b^2)$ of ternary and `beta` times $\sum p(1 - p)$ of binary weights.

    The first keeps probabilities away from 0 and 1, the second drives them there.

    Args:
        model: network with at least one such layer.

    Raises:
        ValueError: no such layer, or a negative weight.
    """
    if p_decay < 0 or beta < 0:
        raise ValueError(f"weights of penalties must not be negative, got {p_decay} and {beta}")
    terms = []
    for layer in _random_layers(model).values():
        if isinstance(layer, LRBinaryLinear):
            terms.append(beta / 4 * layer.weight_var().sum())
        else:
            terms.append(0.5 * p_decay * (layer.a.square().sum() + layer.b.square().sum()))
    return torch.stack(terms).sum()


def lr_net(model: nn.Module, skip: Sequence[str] = ("last",)) -> nn.Module:
    """Put ternary layers in the place of Linear and Conv2d layers, started from their weights. Changes the model and returns it.

    Args:
        model: trained; batch normalisation should follow each layer that is replaced.
        skip: layers that stay, by name or "first" and "last"; the paper keeps the last.

    Raises:
        ValueError: `skip` names no layer or leaves none.
    """
    for name, layer in choose_layers(model, skip).items():
        if isinstance(layer, nn.Conv2d):
            new = LRTernaryConv2d(*conv_arguments(layer))
        else:
            new = LRTernaryLinear(layer.in_features, layer.out_features, layer.bias is not None)
        model.set_submodule(name, _with_bias(new.to(layer.weight), layer.bias).from_weight(layer.weight))
    return model


def sampled(model: nn.Module, x: Tensor | None = None, generator: torch.Generator | None = None) -> nn.Module:
    """A copy of plain layers whose weights are drawn once: the network to deploy.

    Args:
        x: inputs for new statistics of batch normalisation; None keeps those of training.
        generator: of the draw.

    Raises:
        ValueError: the network has no layer with random weights.
    """
    model = copy.deepcopy(model)
    for name, layer in _random_layers(model).items():
        model.set_submodule(name, filled(plain_layer(layer), layer.sample(generator), layer.bias))
    return model if x is None else reestimate_norms(model, x)


@torch.no_grad()
def reestimate_norms(model: nn.Module, x: Tensor, batch: int = 256) -> nn.Module:
    """Statistics of batch normalisation as averages over `x`; changes the model, leaves it in evaluation mode and returns it.

    Only normalisation is in training mode meanwhile: dropout and random layers compute as in evaluation.

    Args:
        x: at least two inputs. They are cut into parts of nearly equal size, so that none of them holds a single example.
        batch: largest part, at least 2.

    Raises:
        ValueError: fewer than two inputs, or parts of fewer than two.
    """
    if len(x) < 2 or batch < 2:
        raise ValueError(f"variances need at least two examples: expected two inputs and parts of two, got {len(x)} and {batch}")
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    before = [norm.momentum for norm in norms]
    model.eval()
    try:
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # a plain average over the batches
            norm.train()
        # Three inputs in parts of two would leave a single one: one part of three then.
        for part in x.tensor_split(max(1, min(-(-len(x) // batch), len(x) // 2))):
            model(part)
    finally:
        for norm, momentum in zip(norms, before):
            norm.momentum = momentum
        model.eval()
    return model


def _random_layers(model: nn.Module) -> dict[str, _Random]:
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, _Random)}
    if not layers:
        raise ValueError(f"expected a network with ternary or binary random layers, got {type(model).__name__} without any")
    return layers


def _uniform(like: Tensor, generator: torch.Generator | None) -> Tensor:
    device = like.device if generator is None else generator.device
    return torch.rand(like.shape, generator=generator, dtype=like.dtype, device=device).to(like.device)


def _normalized(w: Tensor, like: Tensor, p_min: float, p_max: float) -> Tensor:
    if w.shape != like.shape or not 0 < p_min < p_max < 1:
        raise ValueError(f"expected a weight {tuple(like.shape)} and 0 < p_min < p_max < 1, got {tuple(w.shape)}, {p_min}, {p_max}")
    size = w.std(correction=0) if w.numel() > 1 else w.abs().max()
    return (w / size.clamp_min(1e-12)).clamp(-1, 1).to(like)


@torch.no_grad()
def _with_bias(layer: nn.Module, bias: Tensor | None) -> nn.Module:
    if bias is not None:
        layer.bias.copy_(bias)
    return layer
