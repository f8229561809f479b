"""The networks of the compression chapters: two for 28 x 28 images and one for text; multilayer perceptrons come from the shared kit."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from dlatlas.kit.nets import activation, mlp

__all__ = ["CharLSTM", "LeNet", "SmallResNet", "lenet", "mlp", "small_resnet"]

State = tuple[Tensor, Tensor]


class LeNet(nn.Module):
    """Two 5x5 convolutions and three linear layers; see :func:`lenet`."""

    def __init__(self, channels: tuple[int, int], hidden: tuple[int, int], n_classes: int, in_ch: int, act: Callable, norm: bool):
        super().__init__()
        (c1, c2), (h1, h2) = channels, hidden
        self.conv1 = nn.Conv2d(in_ch, c1, 5)
        self.conv2 = nn.Conv2d(c1, c2, 5)
        self.fc1 = nn.Linear(16 * c2, h1)
        self.fc2 = nn.Linear(h1, h2)
        self.fc3 = nn.Linear(h2, n_classes)
        self.pool = nn.MaxPool2d(2)
        self.acts = nn.ModuleList(activation(act) for _ in range(4))
        norms = [nn.BatchNorm2d(c1), nn.BatchNorm2d(c2), nn.BatchNorm1d(h1), nn.BatchNorm1d(h2)]
        self.norms = nn.ModuleList(norms if norm else (nn.Identity() for _ in norms))

    def features(self, x: Tensor) -> Tensor:
        """Penultimate activations ``[batch, hidden]``."""
        # Pooling stands before the activation: the same for a ReLU, and the only order in which a sign keeps information.
        x = self.acts[0](self.norms[0](self.pool(self.conv1(x))))  # [batch, c1, 12, 12]
        x = self.acts[1](self.norms[1](self.pool(self.conv2(x))))  # [batch, c2, 4, 4]
        x = self.acts[2](self.norms[2](self.fc1(x.flatten(1))))
        return self.acts[3](self.norms[3](self.fc2(x)))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc3(self.features(x))


def lenet(
    width: float = 1.0, n_classes: int = 10, in_ch: int = 1, *, act: str | Callable[[Tensor], Tensor] = "relu", norm: bool = False
) -> LeNet:
    """LeNet-5 for 28 x 28 images ``[batch, in_ch, 28, 28] -> [batch, n_classes]``: 6 and 16 channels, 120 and 84 hidden units at width 1.

    Args:
        width: factor on the channels and hidden units.
        act: activation, as in :func:`dlatlas.kit.nets.mlp`.
        norm: batch normalisation before each activation.

    Raises:
        ValueError: a layer would have no unit.
    """
    c1, c2, h1, h2 = (round(width * size) for size in (6, 16, 120, 84))
    if min(c1, n_classes, in_ch) < 1:
        raise ValueError(
            f"every layer needs a unit: expected width >= 0.1 and positive n_classes and in_ch, got {width}, {n_classes}, {in_ch}"
        )
    return LeNet((c1, c2), (h1, h2), n_classes, in_ch, act, norm)


class _Block(nn.Module):
    """Two 3x3 convolutions and a shortcut without parameters: pixels are skipped and new channels are zero."""

    def __init__(self, n_in: int, n_out: int, stride: int, affine: bool):
        super().__init__()
        self.conv1 = nn.Conv2d(n_in, n_out, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(n_out, affine=affine)
        self.conv2 = nn.Conv2d(n_out, n_out, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(n_out, affine=affine)
        self.stride, self.new = stride, n_out - n_in

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x)))))
        return torch.relu(y + pad(x[..., :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.new)))


class SmallResNet(nn.Module):
    """Residual network in three stages; see :func:`small_resnet`."""

    def __init__(self, blocks: int, width: int, bn_affine: bool, n_classes: int, in_ch: int):
        super().__init__()
        self.conv = nn.Conv2d(in_ch, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width, affine=bn_affine)
        stages, n_in = [], width
        for k in range(3):
            n_out = width * 2**k
            for i in range(blocks):
                stages.append(_Block(n_in, n_out, 2 if k and not i else 1, bn_affine))
                n_in = n_out
        self.blocks = nn.Sequential(*stages)
        self.head = nn.Linear(n_in, n_classes)

    def features(self, x: Tensor) -> Tensor:
        """Penultimate activations ``[batch, 4 * width]``."""
        return self.blocks(torch.relu(self.norm(self.conv(x)))).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


def small_resnet(depth: int = 8, width: int = 16, bn_affine: bool = True, *, n_classes: int = 10, in_ch: int = 1) -> SmallResNet:
    """Residual network for small images ``[batch, in_ch, H, W] -> [batch, n_classes]`` in the form used for CIFAR (He et al., 2016).

    Args:
        depth: layers with weights, 6n + 2: three stages of n blocks.
        width: channels of the first stage; the next ones have twice and four times as many on half and a quarter of the side.
        bn_affine: whether batch normalisation learns a scale and an offset.

    Raises:
        ValueError: `depth` is not 8, 14, 20, ...; no channels or classes.
    """
    if depth < 8 or (depth - 2) % 6:
        raise ValueError(f"depth must be 6n + 2 with n >= 1, got {depth}")
    if min(width, n_classes, in_ch) < 1:
        raise ValueError(f"width, n_classes and in_ch must be positive, got {width}, {n_classes}, {in_ch}")
    return SmallResNet((depth - 2) // 6, width, bn_affine, n_classes, in_ch)


class CharLSTM(nn.Module):
    """Language model: embedding, LSTM, linear layer.

    Args:
        vocab: number of different tokens.
        hidden: size of the embedding and of every LSTM layer.
        layers: number of LSTM layers.
        tied: the output layer uses the embedding's weights.

    Raises:
        ValueError: a size is below 1.
    """

    def __init__(self, vocab: int, hidden: int, layers: int = 1, tied: bool = False):
        super().__init__()
        if min(vocab, hidden, layers) < 1:
            raise ValueError(f"vocab, hidden and layers must be positive, got {vocab}, {hidden}, {layers}")
        self.embedding = nn.Embedding(vocab, hidden)
        nn.init.normal_(self.embedding.weight, std=hidden**-0.5)  # as large as the rows of the output layer, which may be the same ones
        self.lstm = nn.LSTM(hidden, hidden, layers)
        self.decoder = nn.Linear(hidden, vocab)
        if tied:
            self.decoder.weight = self.embedding.weight

    def forward(self, tokens: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Logits of each next token and the state after the last one.

        Args:
            tokens: ``[T, B]``, int64.
            state: hidden and cell state, each ``[layers, B, hidden]``; None: zeros.

        Returns:
            Logits ``[T, B, vocab]`` and the state.
        """
        if tokens.dim() != 2:
            raise ValueError(f"tokens must be [T, B], got shape {tuple(tokens.shape)}")
        out, state = self.lstm(self.embedding(tokens), state)  # [T, B, hidden]
        return self.decoder(out), state
