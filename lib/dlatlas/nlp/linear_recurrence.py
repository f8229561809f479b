r"""Parallel linear recurrence and the GILR-LSTM (martin2018parallelizing).

A recurrence that is linear in its state can be computed for many steps at once: two neighbouring steps combine into one step of the same
form, and this combination is associative. The sequence is cut into pieces, all pieces are worked on side by side as if they began at zero,
one short recurrence over the pieces finds what enters each of them, and one multiplication adds it. Gates and inputs are allowed to be
non-linear in the data, only not in the state; a second linear recurrence supplies an LSTM with a substitute for the state in its gates.

Equations: $h_t = a_t \odot h_{t-1} + b_t$ for $t = 1, \dots, T$. A step is a pair $(a, b)$; first step 1, then step 2, is the step

$$ (a_2, b_2) \bullet (a_1, b_1) = (a_2 a_1,\; a_2 b_1 + b_2) . $$

With the gradient $g_t$ of the loss by $h_t$ alone, the whole gradient $s_t$ is again a linear recurrence, from the end to the start:

$$ s_t = g_t + a_{t+1} \odot s_{t+1} , \qquad
   \frac{\partial L}{\partial b_t} = s_t , \quad \frac{\partial L}{\partial a_t} = s_t \odot h_{t-1} , \quad
   \frac{\partial L}{\partial h_0} = a_1 \odot s_1 . $$

GILR-LSTM, with the logistic function $\sigma$, products element by element and $[\cdot\,, \cdot]$ for two vectors put together:

$$ g_t = \sigma(V_g x_t + b_g) , \quad j_t = \tanh(V_j x_t + b_j) , \quad \tilde h_t = g_t \tilde h_{t-1} + (1 - g_t) j_t , $$

$$ \begin{aligned}
   f_t, i_t, o_t &= \sigma(W [\tilde h_{t-1}, x_t] + b) , & z_t &= \tanh(W_z [\tilde h_{t-1}, x_t] + b_z) , \\
   c_t &= f_t c_{t-1} + i_t z_t , & h_t &= o_t c_t .
   \end{aligned} $$

Both recurrences are linear, so no step waits for another one.

Deviations from the paper:

1. The kernel is made of torch operations on views of the sequence. The pieces are 32 steps long and the recurrence over the pieces is cut in
   turn, so a sequence takes about $32 \log_{32} T$ operations one after another and work in proportion to $T$. The paper's CUDA kernel has
   one piece a warp and a serial recurrence over the pieces.
2. The gates see the substitute state of the step before, as in the paper's equations; the published code gives them that of the same step. As in both, there is no tanh on
   $c_t$.

Later work: A recurrence of this kind, with better ways to set its decays, is the core of S5 (Smith et al., 2023), of the linear recurrent unit
(Orvieto et al., 2023) and of Mamba (Gu and Dao, 2023), which also makes the decays depend on the input, as the gates do here. Feng et al.
(2024) came back to LSTM and GRU without state in the gates, trained by a scan, and found them competitive on small tasks, a
small language model among them. Merrill et al. (2024) showed a price: with diagonal decays, whatever their sign, a fixed number of layers
cannot follow some simple state machines, such as one that composes permutations (at limited precision, and unless two classes of circuits are
the same). With positive decays not even parity can be followed at any length; negative ones cure that (Sarrof et al., 2024; Grazzi et al., 2024).

Example:
    import torch
    from dlatlas.nlp.linear_recurrence import GILRLSTM, linear_recurrence

    x, h, states = torch.randn(1, 1000, 3), torch.zeros(1, 3), []
    for t in range(1000):  # a thousand steps, each waits for the one before
        h = torch.tensor([0.5, 0.9, 0.99]) * h + x[:, t]
        states.append(h)
    states = torch.stack(states, 1)
    logits = torch.zeros(3, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.1)
    for step in range(150):
        decay = torch.sigmoid(logits).expand_as(x)
        guess = linear_recurrence(decay, x)  # the method: all steps at once, and their gradient
        loss = ((guess - states) / states.std(1)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print("decays found from the states:", [round(v, 3) for v in torch.sigmoid(logits).tolist()])
    layer = GILRLSTM(3, 16).chrono_(t_max=1000)  # a layer made of it, in the place of nn.LSTM
    out, state = layer(x[:, :600])
    rest, state = layer(x[:, 600:], state)  # goes on where the first part ended
    print("same in two parts:", torch.allclose(torch.cat([out, rest], 1), layer(x)[0], atol=1e-5))
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn.functional import pad

__all__ = ["GILRLSTM", "linear_recurrence"]

PIECE = 32  # steps of a piece; between 16 and 64 the time hardly changes


def linear_recurrence(decay: Tensor, impulse: Tensor, initial: Tensor | None = None) -> Tensor:
    r"""All states of $h_t = a_t \odot h_{t-1} + b_t$, computed in parallel over time.

    No division and no logarithm: decays may be zero, negative or larger than one. Differentiable in all arguments, any number of times.

    Args:
        decay: $a$ ``[batch, time, dim]``.
        impulse: $b$ ``[batch, time, dim]``.
        initial: $h_0$ ``[batch, dim]``; zero if not given.

    Returns:
        $h$ ``[batch, time, dim]``.

    Raises:
        ValueError: shapes that do not match, no time step, or tensors that are not of one floating type.
    """
    if decay.dim() != 3 or decay.shape != impulse.shape or decay.shape[1] == 0:
        raise ValueError(f"expected decay and impulse [B, T, D] with T >= 1, got {tuple(decay.shape)} and {tuple(impulse.shape)}")
    if initial is None:
        initial = impulse.new_zeros(impulse.shape[0], impulse.shape[2])
    if initial.shape != (impulse.shape[0], impulse.shape[2]):
        raise ValueError(f"expected an initial state {(impulse.shape[0], impulse.shape[2])}, got {tuple(initial.shape)}")
    if not decay.is_floating_point() or not decay.dtype == impulse.dtype == initial.dtype:
        raise ValueError(f"expected one floating type, got {decay.dtype}, {impulse.dtype} and {initial.dtype}")
    return _Recurrence.apply(decay, impulse, initial)


class GILRLSTM(nn.Module):
    r"""LSTM whose gates look at a gated linear recurrence instead of its own output: no serial step.

    The layer `input` multiplies the inputs by the matrices of all gates (rows $g, f, i, o, j, z$), `recurrent` the substitute state by those of
    the cell's (rows $f, i, o, z$).

    Args:
        d_in: size of an input.
        d_hidden: size of the state.

    Raises:
        ValueError: a size below 1.
    """

    def __init__(self, d_in: int, d_hidden: int):
        super().__init__()
        if min(d_in, d_hidden) < 1:
            raise ValueError(f"sizes must be at least 1, got d_in={d_in} and d_hidden={d_hidden}")
        self.d_in, self.d_hidden = d_in, d_hidden
        self.input = nn.Linear(d_in, 6 * d_hidden)
        self.recurrent = nn.Linear(d_hidden, 4 * d_hidden, bias=False)

    @torch.no_grad()
    def chrono_(self, t_max: float, generator: torch.Generator | None = None) -> GILRLSTM:
        r"""Start both recurrences with memories spread up to `t_max` steps, $b \sim \log U[1, t_{\max} - 1]$; returns the layer.

        The rule of :mod:`dlatlas.nlp.chrono`: gate $g$ and gate $f$ get $b$, gate $i$ gets $-b$ of gate $f$.

        Raises:
            ValueError: t_max <= 2.
        """
        if not t_max > 2:
            raise ValueError(f"t_max must be larger than 2, got {t_max}")
        g, f, i, *_ = self.input.bias.chunk(6)
        for bias in (g, f):
            bias.uniform_(1, t_max - 1, generator=generator).log_()
        i.copy_(-f)
        return self

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        r"""Run over a sequence.

        Args:
            x: ``[batch, time, d_in]``.
            state: $\tilde h_0$ and $c_0$, each ``[batch, d_hidden]``; zeros if not given.

        Returns:
            ``[batch, time, d_hidden]`` and the state after the last step.

        Raises:
            ValueError: another shape.
        """
        if x.dim() != 3 or x.shape[2] != self.d_in or x.shape[1] == 0:
            raise ValueError(f"expected an input [B, T >= 1, {self.d_in}], got {tuple(x.shape)}")
        zero = x.new_zeros(len(x), self.d_hidden)
        first, cell = (zero, zero) if state is None else state
        n = self.d_hidden
        g, gates, j, z = self.input(x).split([n, 3 * n, n, n], -1)  # [B, T, H] each, the gates f, i, o [B, T, 3 H]
        g = torch.sigmoid(g)
        surrogate = linear_recurrence(g, (1 - g) * torch.tanh(j), first)
        seen = self.recurrent(torch.cat([first[:, None], surrogate[:, :-1]], 1))  # [B, T, 4 H]
        f, i, o = torch.sigmoid(gates + seen[..., : 3 * n]).chunk(3, -1)
        c = linear_recurrence(f, i * torch.tanh(z + seen[..., 3 * n :]), cell)
        return o * c, (surrogate[:, -1], c[:, -1])


class _Recurrence(Function):
    @staticmethod
    def forward(ctx: Any, decay: Tensor, impulse: Tensor, initial: Tensor) -> Tensor:
        h = _scan(decay, impulse, initial)
        ctx.save_for_backward(decay, h, initial)
        return h

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        decay, h, initial = ctx.saved_tensors
        # Reversed in time; what leaves the last step is zero, so its decay does not matter.
        later = torch.cat([decay[:, :1], decay[:, 1:].flip(1)], 1)
        s = _Recurrence.apply(later, grad.flip(1), torch.zeros_like(initial)).flip(1)
        before = torch.cat([initial[:, None], h[:, :-1]], 1)
        return s * before, s, decay[:, 0] * s[:, 0]


def _scan(decay: Tensor, impulse: Tensor, initial: Tensor) -> Tensor:
    """The recurrence over ``[B, T, D]``, in pieces that are worked on side by side."""
    B, T, D = impulse.shape
    if T <= PIECE:
        return _steps(decay, impulse, initial)[0]
    short = -T % PIECE
    if short:
        decay, impulse = pad(decay, (0, 0, 0, short)), pad(impulse, (0, 0, 0, short))
    a, b = decay.reshape(B, -1, PIECE, D), impulse.reshape(B, -1, PIECE, D)  # [B, pieces, PIECE, D]
    h, product = _steps(a, b, None)
    # The last step of a piece sums it up: one step of a recurrence over the pieces.
    ends = _scan(product[:, :-1, -1], h[:, :-1, -1], initial)  # [B, pieces - 1, D]
    enters = torch.cat([initial[:, None], ends], 1)
    return h.addcmul_(product, enters[:, :, None]).reshape(B, -1, D)[:, :T]


def _steps(a: Tensor, b: Tensor, initial: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Step by step over the axis before the last: the states, and without an initial state also the products of the decays so far."""
    h, product = b.clone(memory_format=torch.contiguous_format), None
    columns, decays = h.unbind(-2), a.unbind(-2)
    if initial is not None:
        columns[0].addcmul_(decays[0], initial)
    else:
        product = torch.empty_like(h)
        products = product.unbind(-2)
        products[0].copy_(decays[0])
    for k in range(1, len(columns)):
        columns[k].addcmul_(decays[k], columns[k - 1])
        if product is not None:
            torch.mul(decays[k], products[k - 1], out=products[k])
    return h, product
