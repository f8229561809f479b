"""One way to run any recurrent cell over time, and a language model around it.

A cell is a module ``cell(x_t [B, D], state) -> (h_t [B, H], state)``; a layer is a module ``layer(x [B, T, D], state) -> (h [B, T, H], state)``
like ``nn.LSTM(batch_first=True)``. The cells of torch, whose signature is another, are taken as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

__all__ = ["RNNLM", "LMHead", "Recurrent", "detach", "gradient_norms", "perplexity", "run"]

State = Any  # a tensor, or a tuple of states


def run(cell: Callable, x: Tensor, state: State = None, mask: Tensor | None = None) -> tuple[Tensor, State]:
    """Step a cell over the time axis of `x`.

    Args:
        cell: ``cell(x_t [B, D], state) -> (h_t [B, H], state)``, state None at the start; or one of torch's cells.
        x: ``[B, T, D]``.
        state: of the step before; the batch is the first axis of each of its tensors.
        mask: ``[B, T]`` bool, True where there is a token. Other steps keep the state and put out zeros.

    Returns:
        outputs ``[B, T, H]`` and the last state.

    Raises:
        ValueError: no time step, wrong shapes, or a sequence without a token.
    """
    if x.dim() != 3 or x.shape[1] < 1:
        raise ValueError(f"expected inputs [batch, time >= 1, dim], got {tuple(x.shape)}")
    if mask is not None:
        if mask.shape != x.shape[:2] or mask.dtype != torch.bool:
            raise ValueError(f"expected a bool mask {tuple(x.shape[:2])}, got {mask.dtype} {tuple(mask.shape)}")
        if not mask.any(1).all():
            raise ValueError(f"expected at least one token in every row of the mask {tuple(mask.shape)}")
    step = _adapt(cell)
    outputs = []
    for t, x_t in enumerate(x.unbind(1)):
        h, new = step(x_t, state)
        if mask is not None and not mask[:, t].all():
            real = mask[:, t]
            h = torch.where(real[:, None], h, 0)
            new = _select(real, new, state)
        outputs.append(h)
        state = new
    return torch.stack(outputs, 1), state


def _adapt(cell: Callable) -> Callable:
    if isinstance(cell, nn.LSTMCell):

        def step(x: Tensor, state: State) -> tuple[Tensor, State]:
            state = cell(x, state)
            return state[0], state

        return step
    if isinstance(cell, nn.RNNCellBase):
        return lambda x, state: (h := cell(x, state), h)
    return cell


def _select(real: Tensor, new: State, old: State) -> State:
    """`new` where `real`, else `old`, or zero if there is no old state."""
    if isinstance(new, tuple):
        return tuple(_select(real, n, None if old is None else o) for n, o in zip(new, new if old is None else old))
    if new is None:
        return None
    return torch.where(real.view(-1, *(1,) * (new.dim() - 1)), new, torch.zeros_like(new) if old is None else old)


def detach(state: State) -> State:
    """The state without its history: truncated backpropagation through time."""
    if isinstance(state, tuple):
        return tuple(detach(s) for s in state)
    return state.detach() if isinstance(state, Tensor) else state


class Recurrent(nn.Module):
    """A cell as a layer: ``forward(x [B, T, D], state=None, mask=None) -> (h [B, T, H], state)``."""

    def __init__(self, cell: nn.Module):
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor, state: State = None, mask: Tensor | None = None) -> tuple[Tensor, State]:
        return run(self.cell, x, state, mask)


def gradient_norms(layer: Callable[[Tensor], Any], x: Tensor, generator: torch.Generator | None = None) -> Tensor:
    r"""How much of each input arrives at the end: $\|\partial (v \cdot h_T) / \partial x_t\|$ for every $t$, root mean square over the batch.

    $v$ is a random direction a sequence, so that the square is, on average, $\|\partial h_T / \partial x_t\|_F^2 / H$.

    Args:
        layer: ``layer(x) -> h [B, T, H]``, or a tuple or a dict that begins with it; or a cell of torch.
        x: ``[B, T, D]``.
        generator: draws the directions.

    Returns:
        ``[T]``, detached.
    """
    x = x.detach().requires_grad_()
    out = run(layer, x) if isinstance(layer, nn.RNNCellBase) else layer(x)
    if isinstance(out, dict):
        out = next(iter(out.values()))
    last = (out[0] if isinstance(out, tuple) else out)[:, -1]  # [B, H]
    v = torch.randn(last.shape, generator=generator, dtype=torch.float64).to(last)
    (grad,) = torch.autograd.grad((last * v / math.sqrt(last.shape[1])).sum(), x)
    return grad.square().sum(2).mean(0).sqrt()


class LMHead(nn.Module):
    """Logits of the next token from a state, with the weights of an embedding if one is given: ``[..., d] -> [..., vocab]``."""

    def __init__(self, d: int, vocab: int, embedding: nn.Embedding | None = None):
        super().__init__()
        self.linear = nn.Linear(d, vocab)
        nn.init.zeros_(self.linear.bias)
        if embedding is not None:
            if embedding.weight.shape != (vocab, d):
                raise ValueError(f"expected an embedding of shape {(vocab, d)}, got {tuple(embedding.weight.shape)}")
            self.linear.weight = embedding.weight

    def forward(self, h: Tensor) -> Tensor:
        return self.linear(h)


class RNNLM(nn.Module):
    """Embedding, recurrence, softmax: ``forward(tokens [B, T], state=None) -> (logits [B, T, vocab], state)``.

    Args:
        vocab: number of tokens.
        d: width of the embedding, of the recurrence's input and, with `tie`, of the softmax.
        cell_or_layer: a layer with ``forward(x, state) -> (h, state)``, batch first, or a cell: one of torch's, or a class whose name
            ends with "Cell".
        tie: input and output embeddings share their weights.
        dropout: on the embedded tokens and on the states before the softmax.
        d_out: width of the recurrence's output if it is not `d`; a linear map takes it to `d`.
        head: what makes logits (or log-probabilities) of ``[B, T, d]``, in place of an :class:`LMHead`; `tie` has no meaning then.

    Raises:
        ValueError: a recurrence of torch that is not batch first, or dropout outside [0, 1).
    """

    def __init__(
        self,
        vocab: int,
        d: int,
        cell_or_layer: nn.Module,
        tie: bool = True,
        dropout: float = 0.0,
        d_out: int | None = None,
        head: nn.Module | None = None,
    ):
        super().__init__()
        if isinstance(cell_or_layer, nn.RNNBase) and not cell_or_layer.batch_first:
            raise ValueError(f"expected a layer with batch_first=True, got {cell_or_layer}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")
        is_cell = isinstance(cell_or_layer, nn.RNNCellBase) or type(cell_or_layer).__name__.endswith("Cell")
        self.embed = nn.Embedding(vocab, d)
        nn.init.uniform_(self.embed.weight, -0.1, 0.1)
        self.layer = Recurrent(cell_or_layer) if is_cell else cell_or_layer
        self.project = nn.Identity() if d_out in (None, d) else nn.Linear(d_out, d)
        self.drop = nn.Dropout(dropout)
        self.head = LMHead(d, vocab, self.embed if tie else None) if head is None else head

    def states(self, tokens: Tensor, state: State = None) -> tuple[Tensor, State]:
        """What the head reads ``[B, T, d]``, and the last state of the recurrence."""
        h, state = self.layer(self.drop(self.embed(tokens)), state)
        return self.drop(self.project(h)), state

    def forward(self, tokens: Tensor, state: State = None) -> tuple[Tensor, State]:
        h, state = self.states(tokens, state)
        return self.head(h), state


@torch.no_grad()
def perplexity(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], stateful: bool = True) -> float:
    """``exp`` of the mean cross-entropy of each next token, in evaluation mode; the model's mode is restored.

    Args:
        model: ``model(x [B, T], state) -> (logits [B, T, V], state)``; logits may be log-probabilities.
        batches: pairs (tokens, next tokens), both ``[B, T]``, whose rows continue from one to the next.
        stateful: carry the state on; else each batch is read by ``model(x)``.

    Raises:
        ValueError: no batch.
    """
    was_training, total, count, state = model.training, 0.0, 0, None
    model.eval()
    try:
        for x, y in batches:
            logits, state = model(x, state) if stateful else model(x)
            total += float(cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="sum"))
            count += y.numel()
    finally:
        model.train(was_training)
    if not count:
        raise ValueError("expected at least one batch, got none")
    return math.exp(total / count)
