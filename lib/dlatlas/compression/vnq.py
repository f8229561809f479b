r"""Variational network quantisation (achterhold2018variational).

Each weight gets a Gaussian in place of a value, and the prior says where a Gaussian may be narrow: at the points of a codebook such
as -a, 0, a, and nowhere else. A weight that must be known exactly is therefore drawn to a point of the codebook, and a weight that
need not be known is allowed to become so wide that it can be set to zero. When training is over, rounding to the codebook changes
little, and no fine-tuning follows.

Equations: with the posterior $q(w) = N(\theta, \sigma^2)$, $\alpha = \sigma^2 / \theta^2$ and the sigmoid $S$, the divergence from the
log-uniform prior $p(w) \propto 1/|w|$ is, up to a constant (Molchanov et al., 2017),

$$ F(\theta, \sigma) = k_1 - k_1 S(k_2 + k_3 \log \alpha) + \tfrac12 \log(1 + \alpha^{-1}), \quad
   k = (0.63576, 1.87320, 1.48695). $$

The quantising prior $p(w) \propto \sum_k 1/|w - c_k|$ has a spike at each code. Its divergence is a mixture of shifted copies:

$$ \mathrm{KL} \approx \sum_{c_k \ne 0} \Omega_k F(\theta - c_k, \sigma) + \Big(1 - \sum_{c_k \ne 0} \Omega_k\Big) F(\theta, \sigma), \qquad
   \Omega_k = e^{-(\theta - c_k)^2 / (2 \tau^2)}. $$

A codebook $s c$ needs no new formula: $\theta / s$ and $\sigma / s$ are compared with $c$. So the scale $s$ is learned with the weights. The
loss is $N$ times the cross-entropy plus the sum of all divergences, with one draw of the pre-activations (local reparametrisation):

$$ z = x \theta^\top + \sqrt{x^2 (\sigma^2)^\top}\, \epsilon, \qquad \epsilon \sim N(0, 1). $$

Deployment: $\log \alpha \ge 2$ gives 0, any other weight the code nearest to $\theta$.

Deviations from the paper:

1. The weight of the central spike is not allowed below zero; it falls there where codes lie closer together than about $2 \tau$.
2. $\theta^2$ has $10^{-8}$ added before the logarithm; the divergence at $\theta = c_k$ would be infinite.
3. A few epochs instead of 195, hence a larger learning rate: $10^{-2}$ instead of $10^{-3}$.

Later work: Hron et al. (2018) show that with the improper log-uniform prior the exact posterior does not exist, so the objective is best read as a
penalised likelihood, not as a bound on the evidence. Louizos et al. (2019) quantise with a smoothed categorical distribution over the
grid instead, and van Baalen et al. (2020) learn bit widths and pruning together by variational inference with gates on nested grids.

Example:
    import copy
    import torch
    from torch import nn
    from dlatlas.compression.apprentice import ternary_weight
    from dlatlas.compression.vnq import fit_vnq, quantize_vnq, vnq

    x = torch.randn(3000, 10)
    y = (x[:, 0] * x[:, 1] > 0).long()
    net = nn.Sequential(nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 2))
    batches = [(x[k : k + 50], y[k : k + 50]) for k in range(0, 2000, 50)]
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    for inputs, labels in 10 * batches:
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(inputs), labels).backward()
        optimizer.step()
    rounded, variational = copy.deepcopy(net), vnq(copy.deepcopy(net))
    for layer in (rounded[0], rounded[2]):
        layer.weight.data = ternary_weight(layer.weight)
    fit_vnq(variational, batches, epochs=8, n_examples=2000)  # the prior pulls to -a, 0 and a
    last = quantize_vnq(copy.deepcopy(variational.eval()))
    nets = {"trained": net, "rounded": rounded, "with the prior": variational, "then rounded": last}
    for name, model in nets.items():
        print(f"{name}: accuracy {(model(x[2000:]).argmax(1) == y[2000:]).double().mean():.3f}")
    print(f"weights that are zero: {(last[0].weight == 0).double().mean():.0%}")
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear, softplus

from dlatlas.compression.kit.loop import fit_epochs
from dlatlas.compression.kit.qat import choose_layers, conv_arguments, filled, plain_layer
from dlatlas.train import History

__all__ = ["VNQConv2d", "VNQLinear", "fit_vnq", "kl_log_uniform", "quantize_vnq", "vnq", "vnq_kl"]

K1, K2, K3 = 0.63576, 1.87320, 1.48695


def kl_log_uniform(theta: Tensor, log_sigma2: Tensor) -> Tensor:
    r"""$F(\theta, \sigma)$ for each element: 0 for infinitely wide weights, growing like $\log(|\theta| / \sigma)$ for narrow ones.

    Args:
        theta: means, any shape.
        log_sigma2: logarithms of the variances, same shape.
    """
    log_alpha = _log_alpha(theta, log_sigma2)
    return K1 * torch.sigmoid(-K2 - K3 * log_alpha) + 0.5 * softplus(-log_alpha)  # 1 - S(x) = S(-x)


def vnq_kl(theta: Tensor, log_sigma2: Tensor, codebook: Tensor | Sequence[float], tau: float = 0.075) -> Tensor:
    r"""Divergence from the quantising prior for each element, up to a constant.

    Args:
        theta: means, any shape.
        log_sigma2: logarithms of the variances, same shape.
        codebook: ``[K]``, one of the codes is 0.
        tau: width of the windows $\Omega_k$.

    Raises:
        ValueError: shapes differ, a codebook without 0 or with a code twice, or `tau` is not positive.
    """
    if theta.shape != log_sigma2.shape:
        raise ValueError(f"means and variances must have one shape, got {tuple(theta.shape)} and {tuple(log_sigma2.shape)}")
    if not tau > 0:
        raise ValueError(f"tau must be positive, got {tau}")
    total, central = torch.zeros_like(theta), torch.ones_like(theta)
    for code in _checked(codebook).tolist():
        if code != 0:
            window = torch.exp(-((theta - code) ** 2) / (2 * tau**2))
            total = total + window * kl_log_uniform(theta - code, log_sigma2)
            central = central - window
    return total + central.clamp_min(0) * kl_log_uniform(theta, log_sigma2)


class _Variational:
    """What both layers share: variational parameters, divergence, limits and rounding. ``weight`` holds the means."""

    def _start(self, codebook: Tensor | Sequence[float]) -> None:
        self.register_buffer("reference", _checked(codebook).to(self.weight))
        self.scale = nn.Parameter(self.weight.new_ones(()))  # one number: symmetric codes stay symmetric
        self.log_sigma2 = nn.Parameter(torch.full_like(self.weight, -8.0))

    @property
    def codebook(self) -> Tensor:
        """The codes as learned so far ``[K]``."""
        return self.scale * self.reference

    def kl(self) -> Tensor:
        """Sum of the divergences of all weights."""
        log_sigma2 = self.log_sigma2 - 2 * self.scale.log()
        return vnq_kl(self.weight / self.scale, log_sigma2, self.reference).sum()

    def log_alpha(self) -> Tensor:
        r"""$\log(\sigma^2 / \theta^2)$ of each weight."""
        return _log_alpha(self.weight, self.log_sigma2)

    @torch.no_grad()
    def constrain(self) -> None:
        """The paper's limits, in place: no code shrinks below 0.05, no mean lies beyond the outermost funnels, no variance is extreme."""
        self.log_sigma2.clamp_(-10, 1)
        largest = self.reference.abs().max()
        if largest > 0:  # with the code 0 alone there is nothing to scale and nowhere to be pushed
            self.scale.clamp_(min=0.05 / float(largest))
            slack = 0.223 * (0.5 * self.log_sigma2).exp()  # log alpha = 3 around the outermost codes
            self.weight.copy_(self.weight.clamp(self.codebook.min() - slack, self.codebook.max() + slack))

    @torch.no_grad()
    def rounded_weight(self, log_alpha_max: float = 2.0) -> Tensor:
        """Weights for deployment: 0 from `log_alpha_max` on, the nearest code below."""
        nearest = (self.weight.unsqueeze(-1) - self.codebook).abs().argmin(-1)
        return torch.where(self.log_alpha() >= log_alpha_max, 0.0, self.codebook[nearest])

    def _noisy(self, mean: Tensor, variance: Tensor) -> Tensor:
        # The small number keeps the gradient of the root finite where an input is all zeros.
        return mean + (variance + 1e-8).sqrt() * torch.randn_like(mean)


class VNQLinear(_Variational, nn.Linear):
    """`Linear` with a Gaussian for each weight; noisy in training mode, computes with the means in evaluation mode.

    Args:
        codebook: codes at the start, one of them 0; their common scale is learned.

    Raises:
        ValueError: a codebook without 0 or with a code twice.
    """

    def __init__(self, in_features: int, out_features: int, codebook: Sequence[float] = (-0.2, 0.0, 0.2), bias: bool = True, **kwargs: Any):
        super().__init__(in_features, out_features, bias, **kwargs)
        self._start(codebook)

    def forward(self, x: Tensor) -> Tensor:
        mean = linear(x, self.weight, self.bias)
        return self._noisy(mean, linear(x**2, self.log_sigma2.exp())) if self.training else mean

    def quantize(self, log_alpha_max: float = 2.0) -> nn.Linear:
        """The layer to deploy; see :meth:`rounded_weight`."""
        return filled(plain_layer(self), self.rounded_weight(log_alpha_max), self.bias)


class VNQConv2d(_Variational, nn.Conv2d):
    """`Conv2d` with a Gaussian for each weight; arguments of `torch.nn.Conv2d`, then those of :class:`VNQLinear`."""

    def __init__(self, *args: Any, codebook: Sequence[float] = (-0.2, 0.0, 0.2), **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._start(codebook)

    def forward(self, x: Tensor) -> Tensor:
        mean = self._conv_forward(x, self.weight, self.bias)
        return self._noisy(mean, self._conv_forward(x**2, self.log_sigma2.exp(), None)) if self.training else mean

    def quantize(self, log_alpha_max: float = 2.0) -> nn.Conv2d:
        """The layer to deploy; see :meth:`rounded_weight`."""
        return filled(plain_layer(self), self.rounded_weight(log_alpha_max), self.bias)


def vnq(model: nn.Module, codebook: Sequence[float] = (-0.2, 0.0, 0.2), skip: Sequence[str] = ()) -> nn.Module:
    """Put variational layers in the place of all Linear and Conv2d layers; means are the weights. Changes the model and returns it.

    Args:
        codebook: see :class:`VNQLinear`.
        skip: names of layers that stay, or "first" and "last".

    Raises:
        ValueError: `skip` names no layer or leaves none, or a codebook without 0.
    """
    for name, layer in choose_layers(model, skip).items():
        if isinstance(layer, nn.Conv2d):
            new = VNQConv2d(*conv_arguments(layer), codebook=codebook)
        else:
            new = VNQLinear(layer.in_features, layer.out_features, codebook, layer.bias is not None)
        model.set_submodule(name, filled(new, layer.weight, layer.bias))
    return model


def quantize_vnq(model: nn.Module, log_alpha_max: float = 2.0, skip: Sequence[str] = ()) -> nn.Module:
    """Replace the variational layers by the ones to deploy; changes the model and returns it.

    Args:
        log_alpha_max: weights become 0 from here on.
        skip: layers that stay variational, by name or "first" and "last" of the network; layers that are not variational stay in any case.

    Raises:
        ValueError: no layer is variational, or `skip` names no layer or leaves none.
    """
    chosen = choose_layers(model, skip)
    layers = {name: layer for name, layer in _variational(model).items() if name in chosen}
    if not layers:
        raise ValueError(f"expected a variational layer among {list(chosen)}, got none")
    for name, layer in layers.items():
        model.set_submodule(name, layer.quantize(log_alpha_max))
    return model


def fit_vnq(model: nn.Module, batches: Iterable, epochs: int, n_examples: int, *, lr: float = 1e-2, warmup: float = 0.3) -> History:
    """Minimise the cross-entropy plus the divergence of all variational layers divided by the number of examples.

    Args:
        batches: of inputs and labels.
        n_examples: size N of the training set.
        lr: of the means and all else, falling linearly to 0; that of the codebook's scale is 100 times smaller.
        warmup: share of the steps in which the weight of the divergence rises from 0 to 1.

    Raises:
        ValueError: the network has no variational layer, or `n_examples` is below 1.
    """
    layers = list(_variational(model).values())
    if not layers or n_examples < 1:
        raise ValueError(f"expected variational layers and examples, got {len(layers)} layers and n_examples={n_examples}")
    scales = [layer.scale for layer in layers]
    others = [p for p in model.parameters() if not any(p is scale for scale in scales)]
    groups = [{"params": others}, {"params": scales, "lr": lr / 100}]
    optimizer, steps, done = torch.optim.Adam(groups, lr, fused=True), epochs * len(batches), 0
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 - t / steps)
    model.train()

    def step(x: Tensor, y: Tensor) -> Tensor:
        nonlocal done
        done += 1
        optimizer.zero_grad()
        divergence = sum(layer.kl() for layer in layers) / n_examples
        loss = cross_entropy(model(x), y) + min(1.0, done / max(warmup * steps, 1)) * divergence
        loss.backward()
        optimizer.step()
        schedule.step()
        for layer in layers:
            layer.constrain()
        return loss.detach()

    return fit_epochs(step, batches, epochs)


def _variational(model: nn.Module) -> dict[str, VNQLinear | VNQConv2d]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, _Variational)}


def _log_alpha(theta: Tensor, log_sigma2: Tensor) -> Tensor:
    return log_sigma2 - torch.log(theta**2 + 1e-8)


def _checked(codebook: Tensor | Sequence[float]) -> Tensor:
    codes = codebook.detach() if isinstance(codebook, Tensor) else torch.tensor(codebook, dtype=torch.float64)
    if codes.dim() != 1 or not (codes == 0).any() or len(codes.unique()) < len(codes):
        raise ValueError(f"a codebook is a vector of different codes and one of them is 0, got {codes.tolist()}")
    return codes
