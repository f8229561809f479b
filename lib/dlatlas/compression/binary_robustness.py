r"""Attacks on binarised networks, and whether their robustness is real (galloway2018attacking).

Networks of one-bit weights and activations withstand some attacks better than their full-precision twins, and a first layer whose weights are drawn
anew at every pass blunts attacks of many steps most. But an attack that follows gradients needs some, and a sign has none: what it follows is a
substitute. So the question is how much of the robustness is in the classifier and how much in the attacker's compass. This module has the networks, and
an evaluation by attacks that do not depend on the compass: other substitutes in the backward pass, averages over the random weights, a float twin
as a source, and an attack that sees labels only.

Equations: a latent weight $w$ stands behind each bit,

$$w_b = \mathrm{sign}(w), \qquad \text{or drawn:} \quad P(w_b = +1) = \min\big(\max(\tfrac{w + 1}{2}, 0), 1\big),$$

and layer $l$ computes $z_l = s_l\, (w_b * h_{l-1})$, $h_l = \mathrm{sign}(z_l)$ with one learned scalar $s_l > 0$. Without the scalars the decisions are
the same, but sums reach the number of inputs of a unit: the softmax $p$ saturates, so that many gradients $p - e_y$ fall below $10^{-12}$, and in hidden
layers the window of the substitute below is almost never open.
A backward pass through $h = \mathrm{sign}(z)$ multiplies the gradient by one of

$$1\{|z| \le 1\} \;\text{(clipped)}, \qquad 1 - \tanh^2 z \;\text{(tanh)}, \qquad 1 \;\text{(identity)}.$$

The attack by labels looks for a direction $d \in \{-1, 1\}^n$ with the smallest radius $r$ at which $x + r d$ is misclassified: it turns the signs of
one block of pixels after the other, keeps what shortens $r$, and halves the blocks.

Deviations from the paper:

1. Two strided convolutions and a linear layer for 28 x 28 images in place of three convolutions; all weights are binary, the last layer's too.
2. The scalars are exponentials, so that they stay positive and no decision can depend on them.
3. The paper's attacks follow one gradient, that of training. The other substitutes, the averages and the attack by labels are added here; the
   last one is the search over rays of Chen and Gu (2020). The attack of Carlini and Wagner is left out: in the maximum norm, on rescaled logits, the
   projected ascent has its role.

Later work: Athalye et al. (2018) took apart a number of defences of that year with such means: a substitute in the backward pass where the gradient
is blocked, and the expectation over the random numbers where there are any. Carlini et al. (2019) and Tramèr et al. (2020) made the list of checks,
and the attack that adapts to the defence, the standard of evaluation. Lin et al. (2019) found that quantised networks can amplify the error that an
attack brings in, and are then less robust than their float twins.

Example:
    import torch
    from torch import nn
    from dlatlas.compression.binary_robustness import BinaryConvNet, evaluate_attacks, masking_report

    y = torch.arange(1000) % 10
    x = (torch.rand(10, 1, 28, 28)[y] + 0.5 * torch.randn(1000, 1, 28, 28)).clamp(0, 1)
    net = BinaryConvNet(width=8)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    for step in range(40):
        i = torch.randint(900, (50,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x[i]), y[i]).backward()
        optimizer.step()
        net.clip_latent()
    x, y = x[950:], y[950:]
    # The same decisions twice; what differs is how much of the gradient an attacker sees.
    for name, model in {"with": net.eval(), "without": net.unscaled()}.items():
        zero = masking_report(model, x, y, source=net)["grad_zero_fraction"]  # masked?
        left = evaluate_attacks(model, x, y, 0.05, source=net, steps=5, queries=1, rescale=False)
        print(f"{name} scalars, {zero:.0%} of the gradients are zero. What attacks leave right:")
        print(f"    one step {left['fgsm']:.0%}, steps on the first network {left['transfer']:.0%}")
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, cross_entropy
from torch.nn.utils import parametrize

from dlatlas.compression.ftprop import SignActivation
from dlatlas.compression.kit.ste import ste_replace, ste_sign
from dlatlas.kit.nets import Lambda, mlp
from dlatlas.robustness.kit.attacks import fgsm, transfer
from dlatlas.robustness.kit.evaluate import right, robust_accuracy
from dlatlas.robustness.pgd import attacking, pgd
from dlatlas.train import fit

__all__ = [
    "BinaryConvNet",
    "ExpectedFirstLayer",
    "Rescaled",
    "StochasticSign",
    "evaluate_attacks",
    "label_attack",
    "masking_report",
    "substitute",
    "with_backward",
]

BACKWARD: dict[str, Callable[[], nn.Module]] = {
    "clipped": lambda: SignActivation("saturated_hinge"),
    "tanh": lambda: SignActivation("soft_hinge"),
    "identity": lambda: Lambda(partial(ste_sign, clip=None)),
}


class StochasticSign(nn.Module):
    """Parametrization of a weight: its sign, or a sign drawn at every use with a probability that is linear in the latent weight.

    For ``parametrize.register_parametrization(layer, "weight", StochasticSign())``; the gradient passes to the latent weight unchanged.

    Args:
        mode: "stochastic" or "deterministic".

    Raises:
        ValueError: another mode.
    """

    def __init__(self, mode: str = "stochastic"):
        super().__init__()
        if mode not in ("stochastic", "deterministic"):
            raise ValueError(f"mode must be 'stochastic' or 'deterministic', got {mode!r}")
        self.mode = mode

    def forward(self, w: Tensor) -> Tensor:
        if self.mode == "deterministic":
            return ste_sign(w, None)
        up = torch.rand_like(w) < (w + 1) / 2  # below 0 and above 1 the clip follows by itself
        return ste_replace(w, torch.where(up, 1.0, -1.0))


class BinaryConvNet(nn.Module):
    """Convolutional classifier of one-bit weights and activations, ``[batch, 1, 28, 28] -> [batch, 10]``.

    Args:
        width: channels of the first convolution; the second has twice as many.
        scaled: a learned positive scalar after each layer; without it the same signs give the same decisions.
        stochastic_first: the first layer draws its weights at every pass, also in evaluation mode.
        binary: False: the twin in full precision, with biases in place of scalars and ReLUs in place of signs.
        backward: gradient through the signs of activations: "clipped", "tanh" or "identity".

    Raises:
        ValueError: no channels, or an unknown backward pass.
    """

    def __init__(
        self, width: int = 16, scaled: bool = True, stochastic_first: bool = False, *, binary: bool = True, backward: str = "clipped"
    ):
        super().__init__()
        if width < 1:
            raise ValueError(f"width must be positive, got {width}")
        self.conv1 = nn.Conv2d(1, width, 5, stride=2, bias=not binary)
        self.conv2 = nn.Conv2d(width, 2 * width, 5, stride=2, bias=not binary)
        self.fc = nn.Linear(32 * width, 10, bias=not binary)
        self.binary = binary
        self.set_backward(backward)
        if binary:
            for k, layer in enumerate(self.layers):
                nn.init.uniform_(layer.weight, -0.5, 0.5)
                mode = "stochastic" if k == 0 and stochastic_first else "deterministic"
                parametrize.register_parametrization(layer, "weight", StochasticSign(mode))
        if binary and scaled:
            # Inner products of n signs have the size of sqrt(n): this is where z and the logits start at about one.
            fan_in = torch.tensor([float(layer.weight[0].numel()) for layer in self.layers])
            self.log_scale = nn.Parameter(-0.5 * fan_in.log())
        else:
            self.register_parameter("log_scale", None)

    @property
    def layers(self) -> tuple[nn.Module, nn.Module, nn.Module]:
        """The layers with weights, from the input up."""
        return self.conv1, self.conv2, self.fc

    def set_backward(self, backward: str) -> None:
        """Choose the gradient through the signs of activations; the forward pass does not change."""
        if backward not in BACKWARD:
            raise ValueError(f"backward must be one of {', '.join(BACKWARD)}, got {backward!r}")
        self.sign = BACKWARD[backward]()

    def forward(self, x: Tensor) -> Tensor:
        x = 2 * x - 1 if self.binary else x  # pixels like signs, around zero
        return self.top(self._act(self._scale(self.conv1(x), 0)))  # [batch, width, 12, 12]

    def top(self, h: Tensor) -> Tensor:
        """Logits from the activations of the first layer ``[batch, width, 12, 12]``."""
        h = self._act(self._scale(self.conv2(h), 1))  # [batch, 2 width, 4, 4]
        return self._scale(self.fc(h.flatten(1)), 2)  # [batch, 10]

    def _scale(self, z: Tensor, layer: int) -> Tensor:
        return z if self.log_scale is None else z * self.log_scale[layer].exp()

    def _act(self, z: Tensor) -> Tensor:
        return self.sign(z) if self.binary else torch.relu(z)

    @torch.no_grad()
    def clip_latent(self) -> None:
        """Bring latent weights back to [-1, 1]; to be called after each step of training."""
        for layer in self.layers if self.binary else ():
            layer.parametrizations.weight.original.clamp_(-1, 1)

    def unscaled(self) -> BinaryConvNet:
        """A copy without scalars: the same decisions, larger logits."""
        other = copy.deepcopy(self)
        other.log_scale = None
        return other


def with_backward(model: BinaryConvNet, backward: str) -> BinaryConvNet:
    """A copy with another gradient through its signs, for an attacker: the outputs are the same."""
    other = copy.deepcopy(model)
    other.set_backward(backward)
    return other


class ExpectedFirstLayer(nn.Module):
    r"""A view of a network with a stochastic first layer, for an attacker: the mean of that layer's signs in closed form, without a draw.

    The sums of many drawn signs are nearly Gaussian, with mean $m = E[w_b] * x$ and variance $v = (1 - E[w_b]^2) * x^2$, so that
    $E\, \mathrm{sign}(z) = \mathrm{erf}(m / \sqrt{2 v})$, which has a true gradient.

    Args:
        model: with a stochastic first layer; stays a part of the new module.

    Raises:
        ValueError: the first layer draws nothing.
    """

    def __init__(self, model: BinaryConvNet):
        super().__init__()
        mode = model.conv1.parametrizations.weight[0].mode if model.binary else "real"
        if mode != "stochastic":
            raise ValueError(f"expected a network with a stochastic first layer, got a {mode} one")
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        mean = self.model.conv1.parametrizations.weight.original.clamp(-1, 1)
        x = 2 * x - 1
        m = conv2d(x, mean, stride=2)
        v = conv2d(x.square(), 1 - mean.square(), stride=2)
        return self.model.top(torch.erf(m / (2 * v).clamp_min(1e-6).sqrt()))


class Rescaled(nn.Module):
    """The model with its logits divided by their scale, so that the softmax of an attack's loss does not saturate.

    Args:
        model: stays a part of the new module.
        x: inputs on which the scale is measured.
        size: standard deviation of the logits of an input that results, on average. Much smaller and the loss pulls at all classes at once,
            much larger and it saturates; 4 is about what networks in full precision have.

    Raises:
        ValueError: `size` is not positive.
    """

    def __init__(self, model: nn.Module, x: Tensor, size: float = 4.0):
        super().__init__()
        if not size > 0:
            raise ValueError(f"size must be positive, got {size}")
        with attacking(model), torch.no_grad():
            scale = model(x).std(1).mean() / size
        self.model, self.scale = model, float(scale.clamp_min(1e-12))

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x) / self.scale


def evaluate_attacks(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    eps: float,
    n: int = 200,
    *,
    source: nn.Module | None = None,
    steps: int = 20,
    queries: int = 300,
    draws: int = 1,
    rescale: bool = True,
) -> dict[str, float]:
    """Accuracy under attacks of five kinds in the ball of the maximum norm.

    Args:
        model: attacked with its own gradients.
        x: inputs in [0, 1] ``[N, ...]``.
        y: labels ``[N]``.
        eps: radius.
        n: number of inputs, the first of x.
        source: network whose projected ascent is transferred; None: a perceptron trained on the model's answers, see :func:`substitute`.
        steps: of the projected ascent.
        queries: of the attack by labels, for each input and without its bisections.
        draws: passes over which accuracy is averaged, for networks that draw random numbers.
        rescale: attack logits that are divided by their scale; False: as they are.

    Returns:
        ``fgsm`` one step along the gradient; ``pgd`` projected ascent with a random start; ``transfer`` the same against `source`; ``boundary`` the
        attack by labels; ``noise`` the corners of the ball drawn at random.

    Raises:
        ValueError: no inputs, or what :func:`dlatlas.robustness.pgd.pgd` refuses.
    """
    if n < 1 or len(x) == 0:
        raise ValueError(f"expected at least one input, got {len(x)} and n = {n}")
    x, y = x[:n], y[:n]
    seen = Rescaled(model, x) if rescale else model
    source = substitute(model, x) if source is None else source

    def ascent(model: nn.Module, x: Tensor, y: Tensor, eps: float) -> Tensor:
        return pgd(model, x, y, eps, steps=steps)

    attacks = {
        "fgsm": transfer(fgsm, seen),
        "pgd": transfer(ascent, seen),
        "transfer": transfer(ascent, source),
        "boundary": lambda model, x, y, eps: label_attack(model, x, y, eps, queries)[0],
        "noise": lambda model, x, y, eps: (x + eps * torch.randn_like(x).sign()).clamp(0, 1),
    }
    found = robust_accuracy(model, x, y, attacks, eps, draws=draws)
    return {name: found[name] for name in attacks}


def masking_report(
    model: nn.Module, x: Tensor, y: Tensor, *, eps: float = 0.1, source: nn.Module | None = None, slack: float = 0.02
) -> dict[str, float | bool]:
    r"""Signs that a model's gradients hide what they should show.

    Args:
        model: looked at as it is, without rescaling.
        x: inputs in [0, 1].
        y: labels.
        eps: radius of the attacks.
        source: as in :func:`evaluate_attacks`.
        slack: difference of accuracies that is put down to chance.

    Returns:
        ``grad_zero_fraction``, the share of samples whose gradient of the cross-entropy has no entry above $10^{-12}$; ``single_vs_iterative_ok``,
        whether many steps do at least as much harm as one; ``black_vs_white_ok``, whether the model's own gradients do at least as much as
        those of another network.
    """
    point = x.detach().clone().requires_grad_()
    with attacking(model):
        (grad,) = torch.autograd.grad(cross_entropy(model(point), y, reduction="sum"), point)
    source = substitute(model, x) if source is None else source
    left = {
        "single": fgsm(model, x, y, eps),
        "iterative": pgd(model, x, y, eps, steps=20),
        "black": pgd(source, x, y, eps, steps=20),
    }
    left = {name: float(right(model, points, y).mean()) for name, points in left.items()}
    return {
        "grad_zero_fraction": float((grad.flatten(1).abs().amax(1) < 1e-12).double().mean()),
        "single_vs_iterative_ok": left["iterative"] <= left["single"] + slack,
        "black_vs_white_ok": left["iterative"] <= left["black"] + slack,
    }


def substitute(model: nn.Module, x: Tensor, *, steps: int = 300, hidden: int = 64) -> nn.Module:
    """A perceptron that has learned the model's answers on `x` and on noisy copies of it; asks for labels only."""
    with attacking(model), torch.no_grad():
        classes = model(x[:1]).shape[1]
    net = nn.Sequential(nn.Flatten(), mlp([x[0].numel(), hidden, classes])).to(x)
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)

    def step(i: int) -> Tensor:
        part = x[torch.randint(len(x), (64,), device=x.device)]
        part = (part + 0.1 * torch.randn_like(part)).clamp(0, 1)
        with attacking(model), torch.no_grad():
            answers = model(part).argmax(1)
        optimizer.zero_grad()
        loss = cross_entropy(net(part), answers)
        loss.backward()
        optimizer.step()
        return loss.detach()

    fit(step, steps, every=50)
    return net.eval()


@torch.no_grad()
def label_attack(model: nn.Module, x: Tensor, y: Tensor, eps: float, queries: int = 300) -> tuple[Tensor, Tensor]:
    r"""Search over rays: an attack that sees nothing but labels.

    Args:
        x: inputs in [0, 1].
        y: true labels.
        eps: largest radius.
        queries: directions that are tried for each input.

    Returns:
        Points in the ball, and the radius ``[N]`` at which each input was last seen misclassified: 0 where it is so by itself, infinite where
        no direction did it. Inputs that no direction within `eps` turned are moved to the border of the ball.

    Raises:
        ValueError: a negative radius or no queries.
    """
    if not eps >= 0 or queries < 1:
        raise ValueError(f"expected eps >= 0 and queries >= 1, got {eps} and {queries}")
    flat, shape = x.detach().flatten(1), x.shape
    count, size = flat.shape

    def wrong(index: Tensor, direction: Tensor, radius: Tensor) -> Tensor:
        points = (flat[index] + radius[:, None] * direction).clamp(0, 1)
        return model(points.view(-1, *shape[1:])).argmax(1) != y[index]

    everyone = torch.arange(count, device=x.device)
    best = torch.ones_like(flat)
    with attacking(model):
        first = wrong(everyone, best, torch.zeros_like(flat[:, 0]))
        radius = torch.where(first, 0.0, math.inf).to(flat)
        blocks = 1
        block = 0
        for _ in range(queries):
            edges = (size * block // blocks, size * (block + 1) // blocks)
            trial = best.clone()
            trial[:, edges[0] : edges[1]] *= -1
            block += 1
            if block == blocks:
                blocks, block = min(2 * blocks, size), 0
            # Nothing shorter than the best so far is worth a bisection; at first one in the whole box.
            reach = radius.clamp_max(1.0)
            hit = ((radius > 0) & wrong(everyone, trial, reach)).nonzero()[:, 0]
            if len(hit) == 0:
                continue
            low, high = torch.zeros_like(reach[hit]), reach[hit].clone()
            for _ in range(6):
                middle = (low + high) / 2
                inside = wrong(hit, trial[hit], middle)
                low, high = torch.where(inside, low, middle), torch.where(inside, middle, high)
            closer = high < radius[hit]
            best[hit[closer]], radius[hit[closer]] = trial[hit[closer]], high[closer]
    used = radius.clamp_max(eps)[:, None]
    return (flat + used * best).clamp(0, 1).view(shape), radius
