r"""AWD-LSTM: dropped recurrent weights, activation penalties and a triggered average (merity2018regularizing).

An ordinary LSTM is a strong language model if it is regularised everywhere. Dropout on the recurrent *weights*, one mask for a whole pass, keeps the
state's own dynamics intact where dropout on the state would erase its memory. Words are dropped whole, inputs and outputs with one mask a
sequence, and large or jumping activations cost a little. Training is plain SGD at a constant step, and once the validation loss has stopped to
improve for a few evaluations, the running mean of the weights is the model.

Equations:

Dropped weights, for the matrix $U$ from state to gates, with one mask for all time steps of a pass:

$$ U \leftarrow \frac{m \odot U}{1 - p} , \qquad m_{ij} \sim \operatorname{Bernoulli}(1 - p) . $$

Penalties on the states $h_t$ of the last layer and their dropped version $\hat h_t$, means over batch, time and units:

$$ \alpha \operatorname{mean}(\hat h_t^2) + \beta \operatorname{mean}((h_{t+1} - h_t)^2) . $$

Non-monotonically triggered averaging: with validation losses $v_0, v_1, \dots$, the first evaluation $t > n$ with
$v_t > \min(v_0, \dots, v_{t-n-1})$ sets $T$ to the number $k$ of steps taken so far. SGD goes on as before, and

$$ \bar w = \frac{1}{k - T + 1} \sum_{i=T}^{k} w_i . $$

Deviations from the paper:

1. One layer a module; the paper stacks three, with different widths.
2. The mean starts with $w_T$, the iterate at the moment of the trigger. `torch.optim.ASGD(lambd=0, alpha=0)` starts with the next one.
3. `embedding_dropout` returns a weight matrix, to be used with `torch.nn.functional.embedding`.
4. Random lengths of the backpropagation window belong to the training loop and are not here.

Later work: Melis et al. (2018, in this atlas) reach the same perplexity with another well-tuned LSTM. AWD-LSTM became the standard recurrent
baseline, and ULMFiT (Howard and Ruder 2018) fine-tunes it. PyTorch moved the weights of an LSTM into one flat buffer, and code that replaced a
weight by its dropped version could silently stop to have an effect: here the pass gets the dropped matrix as an argument.

Example:
    import torch
    from torch import nn
    from dlatlas.nlp.awd_lstm import NTASGD, LockedDropout, WeightDropLSTM

    words, follows = [torch.randint(20, (500,))], (2 * torch.randn(20, 20)).softmax(1)
    for _ in range(20):
        words.append(follows[words[-1]].multinomial(1)[:, 0])
    text = torch.stack(words, 1)  # 200 sequences to train on, 300 held out
    for p in (0.0, 0.5):
        lstm = WeightDropLSTM(32, 64, weight_drop=p)  # the method: in the place of nn.LSTM
        embed, drop, head = nn.Embedding(20, 32), LockedDropout(p / 2), nn.Linear(64, 20)
        model = nn.ModuleList([embed, drop, lstm, head])
        optimizer = NTASGD(model.parameters(), lr=5.0, nonmono=3)  # in the place of SGD
        def loss(x, training):
            model.train(training)
            logits = head(drop(lstm(drop(embed(x[:, :-1])))[0]))
            return nn.functional.cross_entropy(logits.transpose(1, 2), x[:, 1:])
        for step in range(250):
            optimizer.zero_grad()
            loss(text[torch.randint(200, (16,))], training=True).backward()
            optimizer.step()
            if step % 25 == 24:
                with optimizer.averaged():  # the mean of the weights, once it runs
                    optimizer.observe(held_out := loss(text[200:], training=False).item())
        print(f"weight drop {p}: held-out loss {held_out:.3f}")
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout
from torch.optim import Optimizer

__all__ = ["NTASGD", "LockedDropout", "WeightDropLSTM", "activation_penalties", "embedding_dropout"]


class WeightDropLSTM(nn.Module):
    """One LSTM layer, batch first, whose recurrent weights are dropped anew for each call in training.

    Args:
        d_in: width of the input.
        d_hidden: width of the state.
        weight_drop: probability $p$ of each recurrent weight, in [0, 1); to be chosen by validation loss. The paper has 0.5; a text that is not
            learnt by heart in the time of the training needs none.

    Raises:
        ValueError: weight_drop outside [0, 1).
    """

    def __init__(self, d_in: int, d_hidden: int, weight_drop: float = 0.5):
        super().__init__()
        self.weight_drop = _probability(weight_drop)
        self.lstm = nn.LSTM(d_in, d_hidden, batch_first=True)

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Outputs ``[B, T, d_hidden]`` and the state, as `nn.LSTM`."""
        dropped = dropout(self.lstm.weight_hh_l0, self.weight_drop, self.training)
        return torch.func.functional_call(self.lstm, {"weight_hh_l0": dropped}, (x, state))

    def extra_repr(self) -> str:
        return f"weight_drop={self.weight_drop}"


class LockedDropout(nn.Module):
    """Dropout with one mask a sequence: what is dropped of ``x [B, T, D]`` at one step is dropped at all.

    Args:
        p: probability of each unit, in [0, 1).

    Raises:
        ValueError: p outside [0, 1).
    """

    def __init__(self, p: float):
        super().__init__()
        self.p = _probability(p)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 3:
            raise ValueError(f"expected [batch, time, dim], got {tuple(x.shape)}")
        return x * dropout(torch.ones_like(x[:, :1]), self.p, self.training)

    def extra_repr(self) -> str:
        return f"p={self.p}"


def embedding_dropout(weight: Tensor, p: float, training: bool) -> Tensor:
    r"""Word vectors ``[V, D]`` with whole rows zeroed, each with probability `p`, and the others divided by $1 - p$.

    Raises:
        ValueError: not a matrix, or p outside [0, 1).
    """
    if weight.dim() != 2:
        raise ValueError(f"expected word vectors [vocab, dim], got {tuple(weight.shape)}")
    return weight * dropout(torch.ones_like(weight[:, :1]), _probability(p), training)


def activation_penalties(out: Tensor, out_dropped: Tensor, alpha: float = 2.0, beta: float = 1.0) -> Tensor:
    r"""$\alpha \operatorname{mean}(\hat h_t^2) + \beta \operatorname{mean}((h_{t+1} - h_t)^2)$, a scalar.

    Args:
        out: states of the last layer ``[B, T, D]``, before dropout.
        out_dropped: the same after dropout.
        alpha: weight of the size of the activations.
        beta: weight of their change; a single step has none.

    Raises:
        ValueError: shapes that differ or are not ``[B, T, D]``, or a negative weight.
    """
    if out.dim() != 3 or out.shape != out_dropped.shape or not out.numel():
        raise ValueError(f"expected two times the same [batch, time, dim], got {tuple(out.shape)} and {tuple(out_dropped.shape)}")
    if not (alpha >= 0 and beta >= 0):
        raise ValueError(f"alpha and beta must not be negative, got {alpha} and {beta}")
    change = (out[:, 1:] - out[:, :-1]).square()
    return alpha * out_dropped.square().mean() + (beta * change.mean() if change.numel() else 0.0)


class NTASGD(Optimizer):
    r"""SGD that starts to average its iterates when the validation loss has stopped to improve.

    Call :meth:`observe` with each validation loss (of the weights as they are: once triggered, inside :meth:`averaged`), and use the
    model inside ``with optimizer.averaged():``.

    Args:
        params: parameters or parameter groups.
        lr: constant step.
        nonmono: $n$, evaluations without improvement that are let pass.
        weight_decay: L2 penalty.

    Attributes:
        triggered: whether the average is running.

    Raises:
        ValueError: a negative number.
    """

    def __init__(self, params: Any, lr: float = 30.0, nonmono: int = 5, weight_decay: float = 0.0):
        if not (lr >= 0 and nonmono >= 0 and weight_decay >= 0):
            raise ValueError(f"lr, nonmono and weight_decay must not be negative, got {lr}, {nonmono} and {weight_decay}")
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "nonmono": nonmono, "logs": [], "count": 0})

    # What is not a parameter's lives in the first group, so that it is saved with the rest.
    @property
    def triggered(self) -> bool:
        return self.param_groups[0]["count"] > 0

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """One step of SGD, and of the running mean after the trigger; returns the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.triggered:
            self.param_groups[0]["count"] += 1
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(p.grad.add(p, alpha=group["weight_decay"]), alpha=group["lr"])
                if self.triggered:
                    self.state[p]["mean"].lerp_(p, 1 / self.param_groups[0]["count"])
        return loss

    @torch.no_grad()
    def observe(self, val_loss: float) -> bool:
        """Note a validation loss; True if it starts the average, which happens once.

        Raises:
            ValueError: the loss is not finite.
        """
        if not math.isfinite(val_loss):
            raise ValueError(f"expected a finite validation loss, got {val_loss}")
        first = self.param_groups[0]
        old = first["logs"][: max(0, len(first["logs"]) - first["nonmono"])]
        fires = not self.triggered and bool(old) and val_loss > min(old)
        first["logs"].append(float(val_loss))
        if fires:
            first["count"] = 1
            for p in (p for group in self.param_groups for p in group["params"]):
                self.state[p]["mean"] = p.clone()
        return fires

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The parameters are their means inside the block, and what they were after it; no change before the trigger."""
        params = [p for group in self.param_groups for p in group["params"]] if self.triggered else []
        saved = [p.detach().clone() for p in params]
        with torch.no_grad():
            for p in params:
                p.copy_(self.state[p]["mean"])
        try:
            yield
        finally:
            with torch.no_grad():
                for p, value in zip(params, saved):
                    p.copy_(value)


def _probability(p: float) -> float:
    if not 0 <= p < 1:
        raise ValueError(f"expected a probability in [0, 1), got {p}")
    return p
