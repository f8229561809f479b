r"""Spectral normalisation (miyato2018spectral).

A critic that may be as steep as it likes separates real from generated samples by a cliff, and on a cliff the generator's gradient is either
nothing or far too much. A linear layer stretches no vector by more than its largest singular value, and a chain of layers no more than the
product of theirs. So every weight matrix is divided by its largest singular value, and with activations of slope at most 1 the whole critic is
Lipschitz with constant 1 without a penalty. The singular value is not computed but followed: one step of power iteration an update is enough,
because the weights change little in between.

Equations: with the weight reshaped to a matrix $W$ of `out` rows, repeat $n$ times without gradient

$$ v = W^\top u / \lVert W^\top u \rVert, \qquad u = W v / \lVert W v \rVert, $$

and use

$$ W_{SN} = W / \sigma, \qquad \sigma = u^\top W v . $$

For a gradient $G$ with respect to $W_{SN}$ the weight receives

$$ \frac{\partial L}{\partial W} = \frac{1}{\sigma} \big( G - \langle G, W_{SN} \rangle\, u v^\top \big) $$

with $\langle \cdot, \cdot \rangle$ the sum of products: the part of the gradient that would only stretch the first singular direction is
taken out. The critic and the generator minimise the hinge losses

$$ L_D = E\, \max(0, 1 - D(x)) + E\, \max(0, 1 + D(G(z))), \qquad L_G = - E\, D(G(z)) . $$

Deviations from the paper:

1. Fifteen warm-up iterations when the parametrization is made, so that the first forward pass is normalised already.
2. The first axis of a weight counts as its rows, also for transposed convolutions.
3. A matrix of zeros stays as it is instead of being divided by zero.

Later work: for a convolution, the norm of the reshaped kernel is not the norm of the convolution; Sedghi, Gupta and Long (2019) compute the
latter exactly by Fourier transforms. Zhang et al. (2019, SAGAN) normalise the generator as well, and Brock et al. (2019, BigGAN) keep this at
large scale and still see training collapse in the end. Lin, Sekar and Fanti (2021) explain the success by gradients that neither explode
nor vanish.

Example:
    import torch
    from torch import nn
    from dlatlas.gans.spectral_norm import spectral_norm

    critic = nn.Sequential(
        spectral_norm(nn.Conv2d(1, 32, 4, stride=2)), nn.LeakyReLU(0.1), nn.Flatten(), spectral_norm(nn.Linear(32 * 13 * 13, 1))
    )
    images = torch.rand(8, 1, 28, 28)
    print(critic(images).shape)
    print("largest singular value:", round(torch.linalg.matrix_norm(critic[3].weight, ord=2).item(), 3))
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

__all__ = ["SpectralNorm", "hinge_d_loss", "hinge_g_loss", "spectral_norm"]


class SpectralNorm(nn.Module):
    r"""Parametrization $W \mapsto W / \sigma(W)$, the largest singular value $\sigma$ by power iteration.

    The buffers ``u [out]`` and ``v [in * k]`` are the current singular vectors; they move in training mode only, so that evaluation is repeatable.

    Args:
        weight: the weight that will be normalised, ``[out, in, ...]``.
        n_power_iterations: iterations in each forward pass.
        eps: a singular value below this counts as zero.

    Raises:
        ValueError: a weight with fewer than two axes, or fewer than one iteration.
    """

    def __init__(self, weight: Tensor, n_power_iterations: int = 1, eps: float = 1e-12):
        super().__init__()
        if weight.dim() < 2:
            raise ValueError(f"expected a weight with at least 2 axes, got shape {tuple(weight.shape)}")
        if n_power_iterations < 1:
            raise ValueError(f"n_power_iterations must be at least 1, got {n_power_iterations}")
        self.n_power_iterations, self.eps = n_power_iterations, eps
        W = weight.detach().flatten(1)  # [out, in * k]
        self.register_buffer("u", nn.functional.normalize(torch.randn_like(W[:, 0]), dim=0))
        self.register_buffer("v", nn.functional.normalize(torch.randn_like(W[0]), dim=0))
        self._iterate(W, 15)

    def forward(self, weight: Tensor) -> Tensor:
        """The normalised weight, of the same shape."""
        W = weight.flatten(1)  # [out, in * k]
        if self.training:
            self._iterate(W, self.n_power_iterations)
        # Copies: the next forward pass moves the buffers in place, perhaps before this one is differentiated.
        sigma = self.u.clone() @ W @ self.v.clone()
        return weight / torch.where(sigma.abs() > self.eps, sigma, torch.ones_like(sigma))

    def right_inverse(self, value: Tensor) -> Tensor:
        """What an assignment to the weight stores: the value itself."""
        return value

    @torch.no_grad()
    def _iterate(self, W: Tensor, n: int) -> None:
        for _ in range(n):
            self.v.copy_(self._unit(W.T @ self.u, self.v))
            self.u.copy_(self._unit(W @ self.v, self.u))

    def _unit(self, new: Tensor, old: Tensor) -> Tensor:
        """Direction of a vector, or the old one where there is none: a zero would never move again."""
        norm = new.norm()
        return torch.where(norm > self.eps, new / norm, old)


def spectral_norm(module: nn.Module, name: str = "weight", n_power_iterations: int = 1) -> nn.Module:
    """Normalise a weight of a layer from now on; changes the layer and returns it.

    For all layers of a model: ``model.apply(lambda m: spectral_norm(m) if isinstance(m, nn.Linear) else None)``. The state dict then holds the weight
    as ``parametrizations.weight.original``, and the buffers beside it.

    Args:
        module: a layer, such as `nn.Linear` or `nn.Conv2d`, not a model.
        name: its parameter.
        n_power_iterations: iterations in each forward pass.

    Raises:
        ValueError: no parameter of this name, one that is normalised already, or :class:`SpectralNorm` refuses it.
    """
    weight = getattr(module, name, None)
    if not isinstance(weight, Tensor):
        raise ValueError(f"{type(module).__name__} has no parameter {name!r}; it has {[n for n, _ in module.named_parameters()]}")
    if parametrize.is_parametrized(module, name) and any(isinstance(p, SpectralNorm) for p in module.parametrizations[name]):
        raise ValueError(f"expected a parameter without spectral normalisation, got {name!r}, which has it already")
    return parametrize.register_parametrization(module, name, SpectralNorm(weight, n_power_iterations))


def hinge_d_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    r"""The critic's loss $E \max(0, 1 - D(x)) + E \max(0, 1 + D(G(z)))$, for scores of any shape."""
    return (1 - real_logits).relu().mean() + (1 + fake_logits).relu().mean()


def hinge_g_loss(fake_logits: Tensor) -> Tensor:
    r"""The generator's loss $-E\, D(G(z))$; it has no hinge."""
    return -fake_logits.mean()
