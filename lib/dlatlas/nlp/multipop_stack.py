r"""Multipop adaptive computation stack (yogatama2018memory).

A language model with a stack has a memory that fits language: what was opened last is needed first. Most neural stacks pop at most one item a
step, but a word may close several constituents at once. This one pops as often as it likes before it pushes. How often is a random number with a
distribution that the network gives, one stop-or-go decision after another, and the stack is replaced by its expectation, so that everything is
differentiable.

Equations:

Decisions $\rho_k = \sigma(a_k)$ to stop after $k$ pops, for $k = 0, \dots, K - 1$, and $\rho_K = 1$:

$$ \pi_k = \rho_k \prod_{j<k} (1 - \rho_j) . $$

The stack $M$ has its top in row 0. Popping $k$ items moves the rows up, zeros come in from below; the push moves them down by one:

$$ \tilde M[i] = \sum_{k=0}^{K} \pi_k M_{t-1}[i + k] , \qquad M_t[0] = v_t , \quad M_t[i] = \tilde M[i - 1] . $$

Controller: from $h_{t-1}$, the token $x_t$ and the item that would be on top,

$$ \begin{aligned}
   a_k &= w^T [h_{t-1}; x_t; M_{t-1}[k]] + b_k , \qquad v_t = \tanh(W h_t + b_v) , \\
   (h_t, c_t) &= \operatorname{LSTM}([x_t; \tilde M[0]], (h_{t-1}, c_{t-1})) ,
   \end{aligned} $$

and the logits of the next token are affine in $[h_t; \tilde M[0]]$. For $K = 1$ this is a continuous stack that pops or not before it pushes,
as in Joulin and Mikolov (2015).

Deviations from the paper:

1. The order is pop, read, push, with a push at every step. The paper leaves room here: this is one reading of it.
2. The softmax sees the popped top $\tilde M[0]$ and not the new top $v_t$, which is a function of $h_t$.
3. The depth is fixed, and what is pushed off the bottom is lost.
4. `memory="attention"` reads the last `depth` pushed vectors by a softmax of $q_t^T M_{t-1}[i] / \sqrt{d}$, $q_t$ affine in $[h_{t-1}; x_t]$;
   `memory="none"` is the LSTM alone.

Later work: Recurrent networks without a stack were found to be better at agreement than first thought, if they are trained on enough data
(Gulordava et al. 2018, "Colorless green recurrent networks dream hierarchically"). Suzgun et al. (2019, "Memory-augmented recurrent neural
networks can learn generalized Dyck languages") confirm what a stack adds on bracket languages, and DuSell and Chiang (2020) replace the
expectation of stacks by a sum over all runs of a nondeterministic one.

Example:
    import torch
    from torch import nn
    from dlatlas.nlp.multipop_stack import StackLM


    def mirrored(n):  # five letters, a sign, the letters backwards
        word = torch.randint(8, (n, 5))
        return torch.cat([word, torch.full((n, 1), 8), word.flip(1)], 1)


    for memory, d in (("none", 24), ("stack", 16)):  # the second is the method
        model = StackLM(9, d, depth=8, max_pops=2, memory=memory)
        optimizer = torch.optim.Adam(model.parameters(), lr=2e-2)
        for step in range(100):
            x = mirrored(64)
            logits, pops = model(x[:, :-1])
            guess, answer = logits[:, 5:], x[:, 6:]
            loss = nn.functional.cross_entropy(guess.transpose(1, 2), answer)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        right = (guess.argmax(2) == answer).double().mean()
        print(f"memory {memory}: {right:.2f} of the mirrored letters are right")
    print("pops before each push:", pops[0].argmax(1).tolist())
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

__all__ = ["StackLM", "multipop", "pop_distribution"]

MEMORIES = ("stack", "attention", "none")


def pop_distribution(stop_logits: Tensor) -> Tensor:
    r"""Probabilities of 0 to $K$ pops, $\pi_k = \rho_k \prod_{j<k} (1 - \rho_j)$ with $\rho_k = \sigma(a_k)$ and $\rho_K = 1$.

    Args:
        stop_logits: $a$, ``[..., K]``.

    Returns:
        ``[..., K + 1]``, rows that add up to 1.

    Raises:
        ValueError: no decision.
    """
    if not stop_logits.dim() or not stop_logits.shape[-1]:
        raise ValueError(f"expected logits [..., K >= 1], got {tuple(stop_logits.shape)}")
    go = torch.sigmoid(-stop_logits).cumprod(-1)  # [..., K]: still popping after decision k
    before = pad(go, (1, 0), value=1.0)  # [..., K + 1]
    return before * pad(torch.sigmoid(stop_logits), (0, 1), value=1.0)


def multipop(stack: Tensor, pi: Tensor, push: Tensor) -> Tensor:
    r"""The expected stack after popping $k \sim \pi$ items and pushing one: $M_t[0] = v$, $M_t[i] = \sum_k \pi_k M_{t-1}[i - 1 + k]$.

    Args:
        stack: ``[B, S, D]``, top at index 0.
        pi: ``[B, K + 1]``, probabilities of 0 to K pops.
        push: ``[B, D]``.

    Returns:
        ``[B, S, D]``; the bottom item is lost if nothing was popped.

    Raises:
        ValueError: shapes that do not match.
    """
    if stack.dim() != 3 or pi.dim() != 2 or len(pi) != len(stack) or push.shape != (stack.shape[0], stack.shape[2]):
        raise ValueError(
            f"expected a stack [B, S, D], pi [B, K + 1] and push [B, D]; got {tuple(stack.shape)}, {tuple(pi.shape)} and {tuple(push.shape)}"
        )
    return torch.cat([push[:, None], _pop(stack, pi)[:, :-1]], 1)


def _pop(stack: Tensor, pi: Tensor) -> Tensor:
    # Row s of the band [B, S, S] is pi, shifted to the right by s: one product does all shifts.
    B, S, _ = stack.shape
    rows = pad(pi, (0, S))[:, None].expand(-1, S, -1).reshape(B, -1)  # [B, S (K + 1 + S)]
    band = rows[:, : S * (pi.shape[1] + S - 1)].reshape(B, S, -1)[:, :, :S]
    return band @ stack


class StackLM(nn.Module):
    """LSTM language model with a multipop stack, an attention over the last vectors, or no memory.

    Args:
        vocab: number of tokens.
        d: width of embeddings, states and items.
        depth: items that the memory holds.
        max_pops: most pops a step, $K$.
        memory: "stack", "attention" or "none".

    Raises:
        ValueError: a size below 1, or an unknown memory.
    """

    def __init__(self, vocab: int, d: int, depth: int = 10, max_pops: int = 4, memory: str = "stack"):
        super().__init__()
        if min(vocab, d, depth, max_pops) < 1:
            raise ValueError(f"sizes must be at least 1, got vocab={vocab}, d={d}, depth={depth}, max_pops={max_pops}")
        if memory not in MEMORIES:
            raise ValueError(f"memory must be one of {', '.join(MEMORIES)}; got {memory!r}")
        self.d, self.depth, self.max_pops, self.memory = d, depth, max_pops, memory
        self.embed = nn.Embedding(vocab, d)
        self.cell = nn.LSTMCell(d if memory == "none" else 2 * d, d)
        self.head = nn.Linear(d if memory == "none" else 2 * d, vocab)
        if memory != "none":
            self.push = nn.Linear(d, d)
        if memory == "stack":
            self.stop = nn.Linear(3 * d, 1, bias=False)
            self.stop_bias = nn.Parameter(torch.zeros(max_pops))
        if memory == "attention":
            self.query = nn.Linear(2 * d, d)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the next token ``[B, T, vocab]``, and probabilities of the number of pops ``[B, T, K + 1]`` (0 without a stack).

        Raises:
            ValueError: not a matrix of tokens, or no step.
        """
        if tokens.dim() != 2 or not tokens.shape[1]:
            raise ValueError(f"expected tokens [batch, time >= 1], got {tuple(tokens.shape)}")
        e = self.embed(tokens)
        h, c = e.new_zeros(len(e), self.d), e.new_zeros(len(e), self.d)
        memory = e.new_zeros(len(e), self.depth, self.d)
        stay = e.new_zeros(len(e), self.max_pops + 1)
        stay[:, 0] = 1
        features, pops = [], []
        for t, x in enumerate(e.unbind(1)):
            pi, read = stay, None
            if self.memory == "stack":
                pi = pop_distribution(self._stop_logits(h, x, memory))
                memory = _pop(memory, pi)
                read = memory[:, 0]
            elif self.memory == "attention":
                read = self._attend(h, x, memory[:, :t])
            h, c = self.cell(x if read is None else torch.cat([x, read], 1), (h, c))
            if read is not None:
                memory = torch.cat([torch.tanh(self.push(h))[:, None], memory[:, :-1]], 1)  # a multipop of nothing
            features.append(h if read is None else torch.cat([h, read], 1))
            pops.append(pi)
        return self.head(torch.stack(features, 1)), torch.stack(pops, 1)

    def _stop_logits(self, h: Tensor, x: Tensor, memory: Tensor) -> Tensor:
        tops = pad(memory, (0, 0, 0, self.max_pops))[:, : self.max_pops]  # [B, K, d]
        seen = torch.cat([h, x], 1)[:, None].expand(-1, self.max_pops, -1)
        return self.stop(torch.cat([seen, tops], 2)).squeeze(2) + self.stop_bias

    def _attend(self, h: Tensor, x: Tensor, memory: Tensor) -> Tensor:
        if not memory.shape[1]:
            return torch.zeros_like(h)
        scores = memory @ self.query(torch.cat([h, x], 1))[:, :, None] / math.sqrt(self.d)  # [B, slots, 1]
        return (torch.softmax(scores, 1) * memory).sum(1)
