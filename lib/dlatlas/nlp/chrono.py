r"""Chrono initialisation (tallec2018warp).

Slow an input sequence down, or speed it up and slow it down at will, and a learner of sequences should cope with it. A leaky unit copes
with a change of speed if its rate can follow; making the rate a function of the data gives a gate. So gates are what invariance to time
warps asks for, and the rate of a gate has a meaning: its inverse is the number of steps that the unit remembers. If dependencies may span
up to $T_{\max}$ steps, the biases of the gates should be started such that these times are spread up to $T_{\max}$.

Equations: with the logistic function $\sigma$, input $x_t$, state $h_t$ and products element by element, a leaky unit has one rate $\alpha$,

$$ h_{t+1} = \alpha \tanh(W_x x_t + W_h h_t + b) + (1 - \alpha) h_t . $$

Read as a differential equation, time that runs $c'(t)$ times as fast multiplies $\alpha$ by $c'(t)$. The gated unit learns that factor:

$$ g_t = \sigma(W_{gx} x_t + W_{gh} h_t + b_g) , \qquad h_{t+1} = g_t \tanh(W_x x_t + W_h h_t + b) + (1 - g_t) h_t . $$

A gate that keeps the fraction $f = \sigma(b)$ of the state has the memory $1 / (1 - f) = 1 + e^b$ steps. Chrono initialisation draws
memories between 2 steps and $T_{\max}$, for forget gate $f$ and input gate $i$ of an LSTM and for a gated unit:

$$ b_f \sim \log U[1, T_{\max} - 1], \quad b_i = -b_f ; \qquad b_g \sim -\log U[1, T_{\max} - 1] . $$

In a GRU it is the gate that keeps the state which gets $\log U[1, T_{\max} - 1]$: in torch, where $h' = (1 - z) n + z h$, the gate $z$.

Deviations from the paper:

1. torch adds two biases to a gate. The input's gets the value and the state's is set to zero there.
2. The paper's experiments are on LSTMs and gated leaky units. Its text says that the rule carries over to GRUs; here it is done.
3. The leaky unit without gate has one rate a unit, in (0, 1) by a logistic function, so that the two differ only in what the rate depends on.

Later work: The rule is the usual start for LSTMs on long synthetic tasks. Gu et al. (2020, "Improving the gating mechanism of recurrent neural
networks") found that gates which start near 0 or 1 get little gradient, spread them uniformly and let a second gate refine the first. The
spread of time scales at the start became a design principle of linear state space models, where it decides between learning and failing
(Gu et al., 2020, HiPPO; Orvieto et al., 2023).

Example:
    import torch
    from torch import nn
    from dlatlas.nlp.chrono import chrono_init_

    for start in ("usual", "chrono"):
        torch.manual_seed(0)
        lstm, head = nn.LSTM(4, 32, batch_first=True), nn.Linear(32, 4)
        if start == "chrono":
            chrono_init_(lstm, t_max=50)  # the method: one line after the layer is made
        optimizer = torch.optim.Adam([*lstm.parameters(), *head.parameters()], lr=2e-2)
        for step in range(150):
            y = torch.randint(4, (32,))
            x = torch.zeros(32, 50, 4)
            x[:, 0] = nn.functional.one_hot(y, 4).float()  # which symbol was it, 49 blanks ago?
            loss = nn.functional.cross_entropy(head(lstm(x)[0][:, -1]), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"{start} start: loss {loss:.3f} (guessing: 1.386)")
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["LeakyCell", "chrono_init_", "retention", "warp"]


@torch.no_grad()
def chrono_init_(rnn: nn.Module, t_max: float, generator: torch.Generator | None = None) -> nn.Module:
    r"""Set the gates' biases such that memories are spread up to `t_max` steps, in place; every layer and direction.

    $b \sim \log U[1, t_{\max} - 1]$ for the gate that keeps the state, and $-b$ for the input gate of an LSTM. Weights and the other biases
    are not touched.

    In a stack each layer, and in a bidirectional network each direction, draws memories of its own from the same range: all of them step through
    the same sequence, and each is meant to span a dependency by itself. Where layers should have different ranges, make them one by one.

    Args:
        rnn: ``nn.LSTM``, ``nn.LSTMCell``, ``nn.GRU``, ``nn.GRUCell`` or a gated :class:`LeakyCell`.
        t_max: longest dependency, in steps.
        generator: draws the memories.

    Returns:
        `rnn`.

    Raises:
        ValueError: t_max <= 2, another module, or one without biases.
    """
    if not t_max > 2:
        raise ValueError(f"t_max must be larger than 2, got {t_max}")
    if isinstance(rnn, LeakyCell) and rnn.gated:
        rnn.rate.bias.copy_(-_log_uniform(rnn.rate.bias, t_max, generator))
        return rnn
    if not isinstance(rnn, nn.LSTM | nn.LSTMCell | nn.GRU | nn.GRUCell):
        raise ValueError(f"expected an LSTM, a GRU, a cell of them or a gated LeakyCell, got {type(rnn).__name__}")
    if not rnn.bias:
        raise ValueError(f"expected {type(rnn).__name__} with biases, got bias=False")
    n = rnn.hidden_size
    for name, bias in rnn.named_parameters():
        if not name.startswith("bias_ih"):
            continue
        other = getattr(rnn, name.replace("bias_ih", "bias_hh"))
        keep = _log_uniform(bias[:n], t_max, generator)
        if isinstance(rnn, nn.LSTM | nn.LSTMCell):  # rows i, f, g, o
            bias[n : 2 * n], bias[:n] = keep, -keep
            other[: 2 * n] = 0
        else:  # rows r, z, n
            bias[n : 2 * n] = keep
            other[n : 2 * n] = 0
    return rnn


def retention(bias: Tensor | float, steps: int) -> Tensor:
    r"""What is left of a state after `steps` steps of a gate that only has a bias: $\sigma(b)^{\text{steps}}$.

    Args:
        bias: of the gate that keeps the state.
        steps: at least 0.

    Raises:
        ValueError: a negative number of steps.
    """
    if steps < 0:
        raise ValueError(f"the number of steps must not be negative, got {steps}")
    # By the logarithm: in single precision sigmoid(b) is 1 long before its power is.
    return torch.exp(steps * nn.functional.logsigmoid(torch.as_tensor(bias, dtype=None if isinstance(bias, Tensor) else torch.float64)))


class LeakyCell(nn.Module):
    r"""Leaky unit, or with `gated` a unit whose rate depends on the data: ``forward(x_t, h) -> (h, h)``.

    Args:
        d_in: size of an input.
        d_hidden: number of units.
        gated: the rate is $\sigma(W_{gx} x + W_{gh} h + b_g)$, else $\sigma$ of one learned number a unit.

    Raises:
        ValueError: a size below 1.
    """

    def __init__(self, d_in: int, d_hidden: int, gated: bool = True):
        super().__init__()
        if min(d_in, d_hidden) < 1:
            raise ValueError(f"sizes must be at least 1, got d_in={d_in} and d_hidden={d_hidden}")
        self.d_in, self.d_hidden, self.gated = d_in, d_hidden, gated
        self.candidate = nn.Linear(d_in + d_hidden, d_hidden)
        self.rate = nn.Linear(d_in + d_hidden, d_hidden) if gated else nn.Parameter(torch.zeros(d_hidden))

    def forward(self, x: Tensor, h: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """One step: input ``[batch, d_in]`` and state ``[batch, d_hidden]``, zero if not given, to the state, twice.

        Raises:
            ValueError: another shape.
        """
        if x.dim() != 2 or x.shape[1] != self.d_in:
            raise ValueError(f"expected an input [B, {self.d_in}], got {tuple(x.shape)}")
        h = x.new_zeros(len(x), self.d_hidden) if h is None else h
        both = torch.cat([x, h], 1)
        g = torch.sigmoid(self.rate(both) if self.gated else self.rate)
        h = torch.lerp(h, torch.tanh(self.candidate(both)), g)
        return h, h


def warp(x: Tensor, factors: Tensor | list[int] | int) -> Tensor:
    """A time-warped sequence: step `t` is repeated ``factors[t]`` times, or dropped where that is 0.

    Args:
        x: ``[batch, time, dim]``, or tokens ``[batch, time]``.
        factors: whole numbers, one a step, or one for all.

    Returns:
        The sequence of length ``sum(factors)``.

    Raises:
        ValueError: another number of factors, negative ones, or nothing left.
    """
    counts = torch.as_tensor(factors, device=x.device)
    if x.dim() < 2 or counts.is_floating_point() or counts.dim() > 1 or (counts.dim() and len(counts) != x.shape[1]) or (counts < 0).any():
        raise ValueError(
            f"expected a sequence [B, T, ...] and one whole number >= 0 for all steps or each of them, got {tuple(x.shape)} and {factors}"
        )
    counts = counts.expand(x.shape[1])
    if not counts.any():
        raise ValueError(f"the factors leave no step of a sequence of {x.shape[1]}")
    return x.repeat_interleave(counts, 1)


LeakyCell.warp = staticmethod(warp)


def _log_uniform(like: Tensor, t_max: float, generator: torch.Generator | None) -> Tensor:
    return torch.empty_like(like).uniform_(1, t_max - 1, generator=generator).log_()
