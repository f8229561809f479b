r"""Skip RNN: learning to skip state updates (campos2018skip).

A recurrent network that reads a signal sampled too finely does the same work over and over. Skip RNN wraps any cell with a binary gate: either the
cell runs, or its state is copied. After an update the state decides how fast an update probability grows; when it reaches one half the
next update is due. Between updates nothing changes, so at the moment of an update it is known how many steps will be skipped, and a program
may jump over them.

Equations: for a cell $S$, input $x_t$, state $s_t$ and logistic function $\sigma$,

$$ u_t = \operatorname{round}(\tilde u_t) , \qquad s_t = u_t \, S(s_{t-1}, x_t) + (1 - u_t) \, s_{t-1} , $$

$$ \Delta_t = \sigma(W_p s_t + b_p) , \qquad \tilde u_{t+1} = u_t \Delta_t + (1 - u_t) (\tilde u_t + \min(\Delta_t, 1 - \tilde u_t)) , $$

with $\tilde u_1 = 1$ and $b_p = 1$ at the start of training. After an update with increment $\Delta$ the next $\lceil 0.5 / \Delta \rceil - 1$ steps are
skipped. The gradient passes the rounding as if it were not there. A cost $\lambda \sum_t u_t$ in the loss makes updates expensive.

Deviations from the paper:

1. For an LSTM $W_p$ reads the cell state $c$, as in the published code.
2. In evaluation without gradients and with one sequence the skipped steps are really jumped over, and the cell does not run for them.

Later work: Neil et al. (2016, Phased LSTM) had skipped on a fixed rhythm, which the paper compares with. Skim-RNN updates a part of the state
in place of nothing; Structural-Jump-LSTM (Hansen et al., 2019) skips words and jumps to the end of a sentence. In Transformers the idea lives on
as layers that are skipped for single tokens (Raposo et al., 2024, Mixture-of-Depths).

Example:
    import torch
    from torch import nn
    from dlatlas.nlp.skip_rnn import SkipRNN, budget_loss

    for cost in (0.0, 2e-3):
        torch.manual_seed(0)
        layer, head = SkipRNN(nn.GRUCell(1, 32)), nn.Linear(32, 2)  # the method wraps a cell
        optimizer = torch.optim.Adam([*layer.parameters(), *head.parameters()], lr=1e-2)
        for step in range(80):
            y = torch.randint(2, (32,))
            angle = 6.28 * ((2 + 2 * y[:, None]) * torch.arange(30) / 30 + torch.rand(32, 1))
            x = torch.sin(angle) + 0.1 * torch.randn(32, 30)  # a slow wave or a fast one?
            out = layer(x[..., None])
            logits = head(out["out"][:, -1])
            loss = nn.functional.cross_entropy(logits, y) + budget_loss(out["updates"], cost=cost)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        right, share = (logits.argmax(1) == y).double().mean(), out["updates"].mean()
        print(f"cost {cost}: {right:.2f} right, {share:.2f} of the steps are updates")
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd import Function

__all__ = ["SkipRNN", "binarize", "budget_loss", "next_update_prob"]


def next_update_prob(u_tilde: Tensor, u: Tensor, delta: Tensor) -> Tensor:
    r"""$\tilde u_{t+1} = u \Delta + (1 - u)(\tilde u + \min(\Delta, 1 - \tilde u))$, element by element.

    Args:
        u_tilde: update probability of this step.
        u: whether it updated, 0 or 1.
        delta: increment.
    """
    return torch.lerp(u_tilde + torch.minimum(delta, 1 - u_tilde), delta, u)


def binarize(u_tilde: Tensor) -> Tensor:
    """1 where `u_tilde` is one half or more, else 0; the gradient passes unchanged."""
    return _Round.apply(u_tilde)


def budget_loss(updates: Tensor, mask: Tensor | None = None, cost: float = 1e-4) -> Tensor:
    r"""Mean over the batch of $\lambda \sum_t u_t$.

    Args:
        updates: $u$ ``[batch, time]``.
        mask: ``[batch, time]``, True for real steps.
        cost: $\lambda$, at least 0.

    Raises:
        ValueError: a negative cost, or shapes that do not match.
    """
    if not cost >= 0:
        raise ValueError(f"the cost must not be negative, got {cost}")
    if updates.dim() != 2 or (mask is not None and mask.shape != updates.shape):
        raise ValueError(f"expected updates and mask [B, T], got {tuple(updates.shape)} and {None if mask is None else tuple(mask.shape)}")
    if mask is not None:
        updates = updates * mask
    return cost * updates.sum(1).mean()


class SkipRNN(nn.Module):
    r"""A cell that is run when its update gate says so.

    Args:
        cell: ``nn.LSTMCell`` or ``nn.GRUCell``.
        bias: start of $b_p$; large values update at every step.

    Raises:
        ValueError: another cell.
    """

    def __init__(self, cell: nn.Module, bias: float = 1.0):
        super().__init__()
        if not isinstance(cell, nn.LSTMCell | nn.GRUCell):
            raise ValueError(f"expected an LSTMCell or a GRUCell, got {type(cell).__name__}")
        self.cell, self.gate = cell, nn.Linear(cell.hidden_size, 1)
        nn.init.constant_(self.gate.bias, bias)

    def forward(self, x: Tensor, state: Any = None, mask: Tensor | None = None) -> dict[str, Any]:
        r"""Run over a sequence.

        Args:
            x: ``[batch, time, d_in]``.
            state: what an earlier call returned: the cell's state and $\tilde u$ ``[batch]``; zero and one if not given.
            mask: ``[batch, time]``, True for real steps; the others change nothing and put out zeros.

        Returns:
            ``out`` ``[batch, time, hidden]``, ``state``, and ``updates`` $u$ ``[batch, time]``.

        Raises:
            ValueError: other shapes, no time step, or a sequence without a real step.
        """
        if x.dim() != 3 or x.shape[2] != self.cell.input_size or x.shape[1] == 0:
            raise ValueError(f"expected an input [B, T >= 1, {self.cell.input_size}], got {tuple(x.shape)}")
        if mask is not None and (mask.shape != x.shape[:2] or mask.dtype != torch.bool or not mask.any(1).all()):
            raise ValueError(
                f"expected a bool mask {tuple(x.shape[:2])} with a real step in each row, got {mask.dtype} {tuple(mask.shape)}"
            )
        zero = x.new_zeros(len(x), self.cell.hidden_size)
        lstm = isinstance(self.cell, nn.LSTMCell)
        s, u_tilde = ((zero, zero) if lstm else zero, x.new_ones(len(x))) if state is None else state
        s = s if lstm else (s,)
        if len(x) == 1 and mask is None and not self.training and not torch.is_grad_enabled() and x.dtype in (torch.float32, torch.float64):
            out, s, u_tilde, updates = self._jump(x, s, u_tilde)
        else:
            out, s, u_tilde, updates = self._all_steps(x, s, u_tilde, mask)
        return {"out": out, "state": (s if lstm else s[0], u_tilde), "updates": updates}

    def _update(self, x: Tensor, s: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return self.cell(x, s) if len(s) == 2 else (self.cell(x, s[0]),)

    def _all_steps(self, x: Tensor, s: tuple[Tensor, ...], u_tilde: Tensor, mask: Tensor | None) -> tuple[Tensor, ...]:
        out, updates = [], []
        for t, x_t in enumerate(x.unbind(1)):
            u = binarize(u_tilde)[:, None]
            new = tuple(torch.lerp(old, n, u) for n, old in zip(self._update(x_t, s), s))  # exact for 0 and 1
            delta = torch.sigmoid(self.gate(new[-1]))
            new_tilde, h = next_update_prob(u_tilde[:, None], u, delta)[:, 0], new[0]
            u = u[:, 0]
            if mask is not None:
                real = mask[:, t]
                new = tuple(torch.where(real[:, None], n, old) for n, old in zip(new, s))
                new_tilde, u, h = torch.where(real, new_tilde, u_tilde), u * real, h * real[:, None]
            s, u_tilde = new, new_tilde
            out.append(h)
            updates.append(u)
        return torch.stack(out, 1), s, u_tilde, torch.stack(updates, 1)

    def _jump(self, x: Tensor, s: tuple[Tensor, ...], u_tilde: Tensor) -> tuple[Tensor, ...]:
        """One sequence, one iteration an update. Numbers as in `_all_steps`, in the same precision."""
        T, number = x.shape[1], np.float32 if x.dtype == torch.float32 else np.float64
        out, updates = x.new_empty(1, T, self.cell.hidden_size), x.new_zeros(1, T)
        one, half, t, tilde = number(1), number(0.5), 0, number(u_tilde.item())
        delta = number(torch.sigmoid(self.gate(s[-1])).item())
        while t < T:
            start = t
            if tilde >= half:
                s = self._update(x[:, t], s)
                updates[0, t] = 1
                tilde = delta = number(torch.sigmoid(self.gate(s[-1])).item())
                t += 1
            while t < T and tilde < half:
                tilde = tilde + min(delta, one - tilde)
                t += 1
            out[:, start:t] = s[0][:, None]
        return out, s, u_tilde.new_tensor([float(tilde)]), updates


class _Round(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return (x >= 0.5).to(x.dtype)  # torch.round would take one half to the even number, which is 0

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad
