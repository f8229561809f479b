r"""Temporal convolutional network (bai2018convolutional).

A sequence model need not be recurrent. A convolution that looks only backwards, with gaps that double from level to level, sees a past whose
length grows exponentially with depth. Residual connections keep such a stack easy to train, all steps are computed at once, and the gradient
travels through the depth of the network in place of the length of the sequence. How far the network can see is known before training.

Equations: a causal convolution with kernel size $k$ and dilation $d$ of a sequence $x$, with zeros before its start, is

$$ (x *_d f)_t = \sum_{i=0}^{k-1} f_i \, x_{t - d i} . $$

Level $i = 0, \dots, L - 1$ has dilation $2^i$. With weight-normalised kernels $f = g\, v / \lVert v \rVert$ (one length $g$ an output channel) and dropout
$D$ of whole channels,

$$ \begin{aligned}
   y^{(i)} &= D(\operatorname{relu}(x^{(i)} *_{2^i} f^{(i,1)} + b^{(i,1)})) , \\
   z^{(i)} &= D(\operatorname{relu}(y^{(i)} *_{2^i} f^{(i,2)} + b^{(i,2)})) , \\
   x^{(i+1)} &= \operatorname{relu}(x^{(i)} + z^{(i)}) ,
   \end{aligned} $$

where a $1 \times 1$ convolution of $x^{(i)}$ takes its place in the sum if the widths differ. An output sees its own step and the

$$ R - 1 = 2 (k - 1) (2^L - 1) $$

steps before it; $R$ is the receptive field. A field that covers the dependency is necessary and not sufficient: if a network whose field is long
enough does not learn, try a smaller learning rate before more levels.

Deviations from the paper:

1. The kernels start with He's variance for rectified units, 2 over the number of inputs of an output. The paper does not say; the published
   code asks for a standard deviation of 0.01, but its weight normalisation puts torch's usual values back at the first forward pass. On
   short copy tasks the wider start learns several times faster.
2. Whole channels are dropped, as the paper says; the published code drops single values.

Later work: Trellis networks (Bai et al., 2019) tie the weights over levels, feed the input to each of them and so contain both this network and
truncated recurrent ones. For language the Transformer took the place of both. Convolutions over whole sequences came back as the
training-time form of linear state space models (Gu et al., 2022) and with kernels made by a small network (Romero et al., 2022).

Example:
    import torch
    from torch import nn
    from dlatlas.nlp.tcn import TCN

    tcn = TCN(4, [16] * 5)  # the method, in the place of nn.RNN(4, 16, batch_first=True)
    print("an output sees", tcn.receptive_field, "steps")
    head = nn.Linear(16, 4)
    optimizer = torch.optim.Adam([*tcn.parameters(), *head.parameters()], lr=1e-2)
    for step in range(41):
        symbols = torch.randint(4, (32, 150))
        x = nn.functional.one_hot(symbols, 4).float()
        logits = head(tcn(x))[:, 50:]  # name the symbol of 50 steps ago
        loss = nn.functional.cross_entropy(logits.transpose(1, 2), symbols[:, :-50])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 20 == 0:
            print(f"step {step}: loss {loss:.3f}")
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.nn.utils.parametrizations import weight_norm

__all__ = ["TCN"]


class TCN(nn.Module):
    """Stack of dilated causal convolutions with residual connections.

    Args:
        d_in: size of an input.
        channels: width of each level; its length is the number of levels $L$.
        kernel_size: $k$.
        dropout: probability of dropping a channel, in [0, 1).

    Raises:
        ValueError: no level, a width or kernel size below 1, or another dropout.
    """

    def __init__(self, d_in: int, channels: Sequence[int], kernel_size: int = 3, dropout: float = 0.0):
        super().__init__()
        if not channels or min(d_in, kernel_size, *channels) < 1 or not 0 <= dropout < 1:
            raise ValueError(
                "expected at least one level, widths and a kernel size of at least 1 and a dropout in [0, 1), "
                f"got d_in={d_in}, channels={channels}, kernel_size={kernel_size}, dropout={dropout}"
            )
        self.d_in, self.kernel_size = d_in, kernel_size
        widths = [d_in, *channels]
        self.levels = nn.ModuleList(_Level(a, b, kernel_size, 2**i, dropout) for i, (a, b) in enumerate(zip(widths, channels)))

    @property
    def receptive_field(self) -> int:
        """Number of inputs, its own step included, that an output depends on."""
        return 1 + 2 * (self.kernel_size - 1) * (2 ** len(self.levels) - 1)

    def forward(self, x: Tensor) -> Tensor:
        """Outputs ``[batch, time, channels[-1]]`` of a sequence ``[batch, time, d_in]``.

        Raises:
            ValueError: another shape, or no time step.
        """
        if x.dim() != 3 or x.shape[2] != self.d_in or x.shape[1] == 0:
            raise ValueError(f"expected an input [B, T >= 1, {self.d_in}], got {tuple(x.shape)}")
        x = x.transpose(1, 2)  # [B, D, T]
        for level in self.levels:
            x = level(x)
        return x.transpose(1, 2)


class _Level(nn.Module):
    def __init__(self, d_in: int, d_out: int, kernel_size: int, dilation: int, dropout: float):
        super().__init__()
        self.first = weight_norm(nn.Conv1d(d_in, d_out, kernel_size, dilation=dilation))
        self.second = weight_norm(nn.Conv1d(d_out, d_out, kernel_size, dilation=dilation))
        self.shortcut = nn.Identity() if d_in == d_out else nn.Conv1d(d_in, d_out, 1)
        self.drop = nn.Dropout1d(dropout)
        self.past = (kernel_size - 1) * dilation
        for conv in (self.first, self.second):
            conv.weight = nn.init.kaiming_normal_(torch.empty_like(conv.weight), nonlinearity="relu")  # sets length and direction
            nn.init.zeros_(conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for conv in (self.first, self.second):
            # Zeros on the left only: padding on both sides would show the future.
            y = self.drop(conv(pad(y, (self.past, 0))).relu())
        return (y + self.shortcut(x)).relu()
