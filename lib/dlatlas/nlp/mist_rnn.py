r"""Mixed history recurrent network, MIST (dipietro2018mist).

What happened $\tau$ steps ago reaches a recurrent state through $\tau$ multiplications, and its gradient fades with each. Direct connections to
older states, as in NARX networks, shorten the way; connections to the last few states shorten it by a constant factor only. MIST connects to the
states 1, 2, 4, 8, ... steps ago, so that any distance is covered in a logarithmic number of steps, and saves the cost of a weight matrix
for each connection by mixing the old states with attention first.

Equations: with $n$ delays, the logistic function $\sigma$, input $x_t$, state $h_t$ ($h_t = 0$ for $t \le 0$) and products element by element,

$$ a_t = \operatorname{softmax}(W_{ax} x_t + W_{ah} h_{t-1} + b_a) \in \mathbb R^n , \qquad r_t = \sigma(W_{rx} x_t + W_{rh} h_{t-1} + b_r) , $$

$$ h_t = \tanh\Big( W_x x_t + W_h \Big[ r_t \odot \sum_{i=0}^{n-1} a_{t,i} \, h_{t - 2^i} \Big] + b \Big) . $$

The gradient of $h_t$ by $h_{t - \tau}$ is a sum over all ways to write $\tau$ as an ordered sum of delays. The longest product in the shortest way
has as many factors as the binary form of $\tau$ has ones, if $\tau < 2^n$: at most $\log_2 \tau + 1$.

Deviations from the paper:

1. The matrices start as torch's linear layers do.

Later work: Skips that double, without attention, are the dilated recurrent networks of Chang et al. (2017). Attention over all earlier
states, instead of a logarithmic number, replaced the recurrence; how many steps lead from one place to another
came back there as the argument for sparse patterns of attention (Child et al., 2019).

Example:
    import torch
    from torch import nn
    from dlatlas.nlp.mist_rnn import MISTRNN, shortest_path

    # the second is the method: it also sees its states of 2, 4, ..., 32 steps ago
    layers = {"tanh": nn.RNN(4, 32, batch_first=True), "MIST": MISTRNN(4, 32, n_delays=6)}
    for name, layer in layers.items():
        head = nn.Linear(32, 4)
        optimizer = torch.optim.Adam([*layer.parameters(), *head.parameters()], lr=2e-2)
        for step in range(60):
            y = torch.randint(4, (32,))
            x = torch.zeros(32, 50, 4)
            x[:, 0] = nn.functional.one_hot(y, 4).float()  # which symbol was it, 49 blanks ago?
            loss = nn.functional.cross_entropy(head(layer(x)[0][:, -1]), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"{name}: loss {loss:.3f} (guessing: 1.386)")
    steps = [shortest_path(49, delays) for delays in ([1], layer.cell.delays)]
    print("steps of the state from the symbol to the end:", steps)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["MISTRNN", "MISTCell", "shortest_path"]


class MISTCell(nn.Module):
    r"""One step of MIST, from the last $2^{n-1}$ states.

    The layer `input` makes logits of the attention, reset gate and candidate (rows $a, r, h$) from the input, `gates` the former two from
    the last state, and `mix` is $W_h$.

    Args:
        d_in: size of an input.
        d_hidden: size of the state.
        n_delays: $n$, for delays $1, 2, \dots, 2^{n-1}$.

    Raises:
        ValueError: a size below 1.
    """

    def __init__(self, d_in: int, d_hidden: int, n_delays: int = 8):
        super().__init__()
        if min(d_in, d_hidden, n_delays) < 1:
            raise ValueError(f"expected sizes of at least 1, got d_in={d_in}, d_hidden={d_hidden}, n_delays={n_delays}")
        self.d_in, self.d_hidden = d_in, d_hidden
        self.delays = [2**i for i in range(n_delays)]
        self.input = nn.Linear(d_in, n_delays + 2 * d_hidden)
        self.gates = nn.Linear(d_hidden, n_delays + d_hidden, bias=False)
        self.mix = nn.Linear(d_hidden, d_hidden, bias=False)

    def forward(self, x: Tensor, history: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """One step: input ``[batch, d_in]`` and states ``[batch, delays[-1], d_hidden]``, newest first, zero if not given.

        Returns:
            the state ``[batch, d_hidden]`` and the new history.

        Raises:
            ValueError: other shapes.
        """
        if x.dim() != 2 or x.shape[1] != self.d_in:
            raise ValueError(f"expected an input [B, {self.d_in}], got {tuple(x.shape)}")
        shape = (len(x), self.delays[-1], self.d_hidden)
        history = x.new_zeros(shape) if history is None else history
        if history.shape != shape:
            raise ValueError(f"expected a history {shape}, got {tuple(history.shape)}")
        old = history[:, [d - 1 for d in self.delays]]  # [B, n, H]
        h, _ = self.step(self.input(x), old)
        return h, torch.cat([h[:, None], history[:, :-1]], 1)

    def step(self, projected: Tensor, old: Tensor) -> tuple[Tensor, Tensor]:
        """State and attention from ``input(x)`` and the states ``[batch, n_delays, d_hidden]`` at the delays, newest first."""
        n, H = len(self.delays), self.d_hidden
        logits, reset, candidate = projected.split([n, H, H], -1)
        seen = self.gates(old[:, 0])
        seen_logits, seen_reset = seen.split([n, H], -1)
        a = torch.softmax(logits + seen_logits, -1)
        mixed = torch.sigmoid(reset + seen_reset) * (a[:, None] @ old).squeeze(1)  # [B, H]
        return torch.tanh(candidate + self.mix(mixed)), a


class MISTRNN(nn.Module):
    """MIST over whole sequences, from a zero history; arguments of :class:`MISTCell`."""

    def __init__(self, d_in: int, d_hidden: int, n_delays: int = 8):
        super().__init__()
        self.cell = MISTCell(d_in, d_hidden, n_delays)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """States ``[batch, time, d_hidden]`` and attention over the delays ``[batch, time, n_delays]`` for inputs ``[batch, time, d_in]``.

        Raises:
            ValueError: another shape, or no time step.
        """
        cell = self.cell
        if x.dim() != 3 or x.shape[2] != cell.d_in or x.shape[1] == 0:
            raise ValueError(f"expected an input [B, T >= 1, {cell.d_in}], got {tuple(x.shape)}")
        zero = x.new_zeros(len(x), cell.d_hidden)
        states, attention = [], []
        for t, projected in enumerate(cell.input(x).unbind(1)):
            old = torch.stack([states[t - d] if t >= d else zero for d in cell.delays], 1)
            h, a = cell.step(projected, old)
            states.append(h)
            attention.append(a)
        return torch.stack(states, 1), torch.stack(attention, 1)


def shortest_path(tau: int, delays: Sequence[int]) -> int:
    r"""Smallest number of recurrent steps that add up to the lag `tau`.

    Args:
        tau: lag, at least 0.
        delays: of the connections, each at least 1.

    Raises:
        ValueError: a negative lag, no delay or one below 1, or a lag that no sum of delays reaches.
    """
    if tau < 0 or not len(delays) or min(delays) < 1:
        raise ValueError(f"expected a lag >= 0 and delays >= 1, got {tau} and {list(delays)}")
    steps = [0]
    for lag in range(1, tau + 1):
        steps.append(min((steps[lag - d] + 1 for d in delays if d <= lag), default=tau + 1))
    if steps[tau] > tau:
        raise ValueError(f"no sum of the delays {list(delays)} is {tau}")
    return steps[tau]
