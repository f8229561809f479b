"""The two networks that most experiments need: a multilayer perceptron and a small convolutional classifier."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": lambda: nn.LeakyReLU(0.2),
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "softplus": nn.Softplus,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "linear": nn.Identity,
}
NORMS: dict[str, Callable[[int], nn.Module]] = {"batch": nn.BatchNorm1d, "layer": nn.LayerNorm}


class Lambda(nn.Module):
    """A plain function as a module, so that it can stand in a `Sequential`."""

    def __init__(self, function: Callable[[Tensor], Tensor]):
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)

    def extra_repr(self) -> str:
        return getattr(self.function, "__name__", repr(self.function))


class Residual(nn.Module):
    """``x + body(x)``."""

    def __init__(self, body: nn.Module):
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


def activation(act: str | type[nn.Module] | Callable[[Tensor], Tensor]) -> nn.Module:
    """A fresh activation module from its name, its class, an instance or a function of a tensor."""
    if isinstance(act, str):
        if act not in ACTIVATIONS:
            raise ValueError(f"unknown activation {act!r}; expected one of {', '.join(ACTIVATIONS)}, a module or a function")
        return ACTIVATIONS[act]()
    if isinstance(act, type) and issubclass(act, nn.Module):
        return act()
    if isinstance(act, nn.Module):
        return act
    if callable(act):
        return Lambda(act)
    raise ValueError(f"activation must be a name, a module or a function, got {act!r}")


def mlp(
    sizes: Sequence[int],
    act: str | type[nn.Module] | Callable[[Tensor], Tensor] = "relu",
    *,
    final: str | type[nn.Module] | Callable[[Tensor], Tensor] | None = None,
    norm: str | None = None,
    bias: bool = True,
    residual: bool = False,
) -> nn.Sequential:
    """Multilayer perceptron ``[batch, sizes[0]] -> [batch, sizes[-1]]``.

    Every hidden layer is Linear, then `norm` ("batch", "layer" or None), then `act`. With `residual`, a hidden layer
    whose two widths agree becomes ``x + layer(x)``. `final` is an activation after the last Linear.
    """
    if len(sizes) < 2 or any(int(s) != s or s < 1 for s in sizes):
        raise ValueError(f"sizes must hold at least two positive integers, got {list(sizes)}")
    if norm is not None and norm not in NORMS:
        raise ValueError(f"unknown norm {norm!r}; expected None or one of {', '.join(NORMS)}")
    layers: list[nn.Module] = []
    for n_in, n_out in itertools.pairwise(sizes[:-1]):
        block: list[nn.Module] = [nn.Linear(n_in, n_out, bias=bias)]
        if norm is not None:
            block.append(NORMS[norm](n_out))
        block.append(activation(act))
        layers += [Residual(nn.Sequential(*block))] if residual and n_in == n_out else block
    layers.append(nn.Linear(sizes[-2], sizes[-1], bias=bias))
    if final is not None:
        layers.append(activation(final))
    return nn.Sequential(*layers)


class SmallCNN(nn.Module):
    """Two 3x3 convolutions with pooling, then one hidden layer; see :func:`small_cnn`."""

    def __init__(self, in_ch: int, n_classes: int, width: int, size: int, pool: Callable[[Tensor], Tensor]):
        super().__init__()
        self.conv1 = nn.Conv2d(in_ch, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, 2 * width, 3, padding=1)
        self.pool = pool if isinstance(pool, nn.Module) else Lambda(pool)
        with torch.no_grad():
            # Measured, not computed: a custom pool may shrink by any factor.
            side = self.pool(self.conv2(self.pool(self.conv1(torch.zeros(1, in_ch, size, size)))))
        self.hidden = nn.Linear(side.numel(), 4 * width)
        self.head = nn.Linear(4 * width, n_classes)

    def features(self, x: Tensor) -> Tensor:
        """Penultimate activations ``[batch, 4 * width]``."""
        x = self.pool(torch.relu(self.conv1(x)))  # [batch, width, size/2, size/2]
        x = self.pool(torch.relu(self.conv2(x)))  # [batch, 2 width, size/4, size/4]
        return torch.relu(self.hidden(x.flatten(1)))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


def small_cnn(
    in_ch: int = 1, n_classes: int = 10, width: int = 16, size: int = 28, pool: str | Callable[[Tensor], Tensor] = "max"
) -> SmallCNN:
    """Small convolutional classifier ``[batch, in_ch, size, size] -> [batch, n_classes]`` with ``.features`` and ``.head``.

    `pool` is "max", "avg" or a module/function that shrinks the two spatial axes.
    """
    if min(in_ch, n_classes, width) < 1 or size < 4:
        raise ValueError(f"in_ch, n_classes and width must be >= 1 and size >= 4, got {in_ch}, {n_classes}, {width}, {size}")
    pools = {"max": nn.MaxPool2d(2), "avg": nn.AvgPool2d(2)}
    if isinstance(pool, str) and pool not in pools:
        raise ValueError(f"unknown pool {pool!r}; expected 'max', 'avg' or a function")
    return SmallCNN(in_ch, n_classes, width, size, pools[pool] if isinstance(pool, str) else pool)
