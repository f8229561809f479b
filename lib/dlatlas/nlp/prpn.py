r"""Parsing-reading-predict network, PRPN (shen2018neural).

A sentence is a tree, and a word should be predicted from the constituents around it rather than from whatever stands near. PRPN learns the tree
from plain text. A small convolution gives each gap between neighbouring words a *syntactic distance*: how high the two words meet in
the tree. Looking back from a gap, everything beyond a larger distance belongs to another constituent. A soft comparison of distances turns that into
gates on the memory of an LSTM, and since the comparison is differentiable, the language model's loss trains the distances.

Equations:

Distances, from the embedded words $e$, with $d_i$ between words $i - 1$ and $i$:

$$ q_i = \operatorname{relu}(\operatorname{conv}(e_{i-L}, \dots, e_i)) , \qquad d_i = \operatorname{relu}(w_d^T q_i + b_d) . $$

Gates of slot $i < t$ at step $t$; the empty product is 1, so the last slot is always open, and the gates grow with $i$:

$$ \alpha_j^t = \tfrac12 \left( \operatorname{hardtanh}(\tau (d_t - d_j)) + 1 \right) , \qquad g_i^t = \prod_{j=i+1}^{t-1} \alpha_j^t . $$

Reading: attention over the last slots, gated, then the usual update of an LSTM:

$$ \begin{aligned}
   k_t &= W_h h_{t-1} + W_x e_t , & \tilde s_i^t &= \operatorname{softmax}_i (h_i^T k_t / \sqrt{\dim k}) , \\
   s_i^t &= \frac{g_i^t}{\sum_j g_j^t} \tilde s_i^t , & (\tilde h_t, \tilde c_t) &= \sum_i s_i^t (h_i, c_i) ,
   \end{aligned} $$

$$ (h_t, c_t) = \operatorname{LSTM}(e_t, (\tilde h_t, \tilde c_t)) . $$

Predicting: the next distance is not known yet, so it is guessed, $\hat d_{t+1} = \operatorname{relu}(w_p^T h_t + b_p)$. Gates $g^{t+1}$ from it weigh the
memory up to $t$ by the same attention, with the key $W_l h_t$, to $l_t$, and the logits are $E \tanh(W_f [l_t; h_t] + b_f) + b$.

Deviations from the paper:

1. One layer; the paper stacks two, without batch normalisation and dropout here.
2. The vector that is compared with the word vectors $E$ (shared with the input) is one tanh layer; the paper has a residual block.
3. The biases $b_d$, $b_p$ start at 1, so that no distance starts in the dead half of the relu.
4. `tree_from_distances` splits at the largest distance. The parser of the original experiments closes constituents from the right, which
   alone prefers right-branching trees (Dyer et al. 2019).
5. The prediction reads the memory with a query of its own, $W_l h_t$, weighted by the gates of the next distance.

Later work: Htut, Cho and Bowman (2018, "Grammar induction with neural language models: an unusual replication") find that the published trees came
from models selected on the test trees, and that PRPN still beats its baselines without. Dyer, Melis and Blunsom (2019, "A critical analysis of
biased parsers in unsupervised parsing") show the parser's bias. Ordered neurons (Shen et al. 2019) put the same idea into the gates of an LSTM.

Example:
    import torch
    from torch import nn
    from dlatlas.nlp.prpn import PRPN, tree_from_distances

    phrases = torch.tensor([[1, 2, 3], [4, 5, 6], [7, 8, 9]])
    text = phrases[torch.randint(3, (1000, 4))].flatten(1)  # four phrases of three words
    model = PRPN(10, 16, 24, n_lookback=2)  # the method: a language model that learns distances
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(100):
        x = text[torch.randint(1000, (32,))]
        logits, distances = model(x[:, :-1])
        loss = nn.functional.cross_entropy(logits.transpose(1, 2), x[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    sentence = torch.tensor([[1, 2, 3, 7, 8, 9, 4, 5, 6]])
    gaps = model.distances(sentence)[0, 1:]
    print("distances:", [round(v, 1) for v in gaps.tolist()])
    print("tree:", tree_from_distances(sentence[0].tolist(), gaps))
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import hardtanh, pad

__all__ = ["PRPN", "structure_gates", "tree_from_distances"]


def structure_gates(d: Tensor, tau: float = 10.0) -> Tensor:
    r"""Gates $g_i^t = \prod_{j=i+1}^{t-1} \frac12 (\operatorname{hardtanh}(\tau (d_t - d_j)) + 1)$ for $i < t$, zero elsewhere.

    Args:
        d: distances ``[B, T]``.
        tau: sharpness of the comparison, positive.

    Returns:
        ``[B, T, T]``, entry ``[b, t, i]``.

    Raises:
        ValueError: not a matrix, no step, or tau not positive.
    """
    if d.dim() != 2 or not d.shape[1]:
        raise ValueError(f"expected distances [batch, time >= 1], got {tuple(d.shape)}")
    return _gates(d, d, tau)


def _gates(query: Tensor, d: Tensor, tau: float, shift: int = 0) -> Tensor:
    """Gates ``[B, T, T]`` of the slots ``i < t + shift``, from the distance `query` of each step to those of the slots."""
    if not tau > 0:
        raise ValueError(f"tau must be positive, got {tau}")
    alpha = (hardtanh(tau * (query[:, :, None] - d[:, None, :])) + 1) / 2  # [B, t, j]
    slots = torch.ones_like(alpha[0], dtype=torch.bool).tril(shift - 1)  # [t, j]
    alpha = torch.where(slots, alpha, 1.0)
    after = pad(alpha[:, :, 1:], (0, 1), value=1.0)  # slot i is closed by those after it, not by itself
    return torch.where(slots, after.flip(2).cumprod(2).flip(2), 0.0)


def tree_from_distances(tokens: Sequence[Any], boundaries: Sequence[float] | Tensor) -> Any:
    """The binary tree that splits at the largest distance first, as nested pairs; a single token is itself.

    Args:
        tokens: the leaves.
        boundaries: distance between each two neighbours, one less than there are tokens; the leftmost of equal ones wins.

    Raises:
        ValueError: no token, or another number of boundaries.
    """
    boundaries = boundaries.tolist() if isinstance(boundaries, Tensor) else list(boundaries)
    if not len(tokens) or len(boundaries) != len(tokens) - 1:
        raise ValueError(f"expected at least one token and one boundary less, got {len(tokens)} tokens and {len(boundaries)} boundaries")
    if len(tokens) == 1:
        return tokens[0]
    k = max(range(len(boundaries)), key=boundaries.__getitem__)
    return tree_from_distances(tokens[: k + 1], boundaries[:k]), tree_from_distances(tokens[k + 1 :], boundaries[k + 1 :])


class PRPN(nn.Module):
    """Language model with learnt syntactic distances.

    Args:
        vocab: number of tokens.
        d_embed: width of the word vectors, which the softmax shares.
        d_hidden: width of the states and of the convolution.
        n_lookback: words before the current one that a distance may depend on, $L$.
        n_slots: how many past states the memory holds.
        tau: sharpness of the comparison of distances.

    Raises:
        ValueError: a size below 1, or tau not positive.
    """

    def __init__(self, vocab: int, d_embed: int, d_hidden: int, n_lookback: int = 5, n_slots: int = 15, tau: float = 10.0):
        super().__init__()
        if min(vocab, d_embed, d_hidden, n_lookback, n_slots) < 1 or not tau > 0:
            raise ValueError(
                f"expected sizes of at least 1 and tau > 0, got vocab={vocab}, d_embed={d_embed}, d_hidden={d_hidden}, "
                f"n_lookback={n_lookback}, n_slots={n_slots}, tau={tau}"
            )
        self.n_lookback, self.n_slots, self.tau = n_lookback, n_slots, tau
        self.embed = nn.Embedding(vocab, d_embed)
        nn.init.uniform_(self.embed.weight, -0.1, 0.1)
        self.conv = nn.Conv1d(d_embed, d_hidden, n_lookback + 1)
        self.distance, self.next_distance = nn.Linear(d_hidden, 1), nn.Linear(d_hidden, 1)
        for linear in (self.distance, self.next_distance):
            nn.init.ones_(linear.bias)
        self.key_h, self.key_x = nn.Linear(d_hidden, d_hidden, bias=False), nn.Linear(d_embed, d_hidden, bias=False)
        self.key_l = nn.Linear(d_hidden, d_hidden, bias=False)
        self.cell = nn.LSTMCell(d_embed, d_hidden)
        self.mix = nn.Linear(2 * d_hidden, d_embed)
        self.decoder = nn.Linear(d_embed, vocab)
        nn.init.zeros_(self.decoder.bias)
        self.decoder.weight = self.embed.weight

    def distances(self, tokens: Tensor) -> Tensor:
        """``[B, T]``: entry `t` lies between the tokens `t - 1` and `t`; entry 0 is before the first."""
        e = self.embed(tokens).transpose(1, 2)  # [B, d_embed, T]
        q = self.conv(pad(e, (self.n_lookback, 0))).relu().transpose(1, 2)  # [B, T, d_hidden]
        return self.distance(q).squeeze(-1).relu()

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the next token ``[B, T, vocab]`` and the distances ``[B, T]``.

        Raises:
            ValueError: not a matrix of tokens, or no step.
        """
        if tokens.dim() != 2 or not tokens.shape[1]:
            raise ValueError(f"expected tokens [batch, time >= 1], got {tuple(tokens.shape)}")
        e, d = self.embed(tokens), self.distances(tokens)
        gates = _gates(d, d, self.tau)
        hs, cs = [], []
        for t in range(tokens.shape[1]):
            state = None
            if t:
                past = slice(max(0, t - self.n_slots), t)
                H, C = torch.stack(hs[past], 1), torch.stack(cs[past], 1)  # [B, slots, d_hidden]
                s = self._attend(H, (self.key_h(hs[-1]) + self.key_x(e[:, t]))[:, None], gates[:, t : t + 1, past])  # [B, 1, slots]
                state = ((s @ H).squeeze(1), (s @ C).squeeze(1))
            h, c = self.cell(e[:, t], state)
            hs.append(h)
            cs.append(c)
        H = torch.stack(hs, 1)  # [B, T, d_hidden]
        ahead = _gates(self.next_distance(H).squeeze(-1).relu(), d, self.tau, shift=1)
        reach = torch.ones_like(ahead[0], dtype=torch.bool).tril().triu(1 - self.n_slots)  # slots t - n_slots < i <= t
        l = self._attend(H, self.key_l(H), ahead, reach) @ H
        return self.decoder(torch.tanh(self.mix(torch.cat([l, H], 2)))), d

    @staticmethod
    def _attend(memory: Tensor, key: Tensor, gates: Tensor, reach: Tensor | None = None) -> Tensor:
        """Gated weights ``[B, t, slots]``; slots out of `reach` have no part in the softmax, or the future would leak through its sum."""
        scores = key @ memory.transpose(1, 2) / math.sqrt(memory.shape[2])
        if reach is not None:
            scores, gates = scores.masked_fill(~reach, -math.inf), gates * reach
        return gates / gates.sum(-1, keepdim=True) * torch.softmax(scores, -1)
