r"""Skim-RNN: neural speed reading (seo2018skim).

Most words of a text matter little for a question about it. A Skim-RNN decides at each word whether to read it, with a recurrent network of full
size, or to skim it, with a small one that updates only the first few entries of the state and leaves the rest as it was. Both share one
state, so that a full read can follow a skim. What is saved is arithmetic, and time where the program really takes the cheap branch.

Equations: with input $x_t$, state $h_t \in \mathbb R^d$, a big cell $f$ and a small cell $f'$ with $d' \ll d$ outputs, both seeing all of $x_t$ and
$h_{t-1}$,

$$ p_t = \operatorname{softmax}(W [x_t; h_{t-1}] + \beta) \in \mathbb R^2 , \qquad
   h_t = \begin{cases} f(x_t, h_{t-1}) & \text{read} \\ [f'(x_t, h_{t-1}) ; h_{t-1, d'+1 .. d}] & \text{skim} \end{cases} $$

and likewise for the cell state of an LSTM. In training the choice is softened, with $g_{t,1}, g_{t,2}$ from a Gumbel distribution,

$$ r_{t,i} = \frac{\exp((\log p_{t,i} + g_{t,i}) / \tau)}{\sum_j \exp((\log p_{t,j} + g_{t,j}) / \tau)} , \qquad
   h_t = r_{t,1} h_t^{\text{read}} + r_{t,2} h_t^{\text{skim}} , $$

at a temperature that falls with the step $n$, $\tau = \max(0.5, e^{-rn})$, $r = 10^{-4}$. The loss is that of the task plus
$-\gamma \frac1T \sum_t \log p_{t,2}$, which pulls towards skimming. In use a word is skimmed where $p_{t,2}$, the second component, exceeds a threshold: a knob for speed.

Deviations from the paper:

1. The small LSTM reads $h_{t-1, d'+1..d}$ as part of its input and $h_{t-1, 1..d'}$ as its state, which is the same function.
2. In evaluation without gradients and with one sequence only the chosen cell runs; else both run and the choice is made afterwards.
3. One layer and one direction.

Later work: LSTM-Jump (Yu et al., 2017) before it, and Structural-Jump-LSTM (Hansen et al., 2019) after it, leave words out altogether. For
Transformers, PoWER-BERT (Goyal et al., 2020) and Length-Adaptive Transformer (Kim and Cho, 2021) drop word vectors from layer to layer,
and mixture-of-experts layers send each token to one of several networks of equal size.

Example:
    import torch
    from torch import nn
    from dlatlas.nlp.skim_rnn import SkimLSTM, flops_fraction, temperature

    def texts(n):  # of 20 words, three tell the class: words 0-9 the one, 10-19 the other
        words, y = torch.randint(20, 100, (n, 20)), torch.randint(2, (n, 1))
        places = torch.rand(n, 20).argsort(1)[:, :3]
        return words.scatter(1, places, torch.randint(10, (n, 3)) + 10 * y), y[:, 0]

    embed, lstm, head = nn.Embedding(100, 32), SkimLSTM(32, 64, 4), nn.Linear(64, 2)
    model = nn.ModuleList([embed, lstm, head])
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for step in range(60):
        words, y = texts(32)
        out = lstm(embed(words), tau=temperature(step, rate=0.01), gamma=0.1)  # the method
        loss = nn.functional.cross_entropy(head(out["out"][:, -1]), y)
        optimizer.zero_grad()
        (loss + out["penalty"]).backward()
        optimizer.step()
    words, y = texts(500)
    out = lstm.eval()(embed(words))
    print(f"right: {(head(out['out'][:, -1]).argmax(1) == y).double().mean():.2f}")
    print(f"multiplications: {flops_fraction(out['skimmed'], 32, 64, 4):.2f} of always reading")
    for name, which in (("that tell", words < 20), ("that do not", words >= 20)):
        print(f"words {name}: {1 - out['skimmed'][which].double().mean():.2f} are read")
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

__all__ = ["SkimLSTM", "flops_fraction", "temperature"]


def temperature(step: int, rate: float = 1e-4, floor: float = 0.5) -> float:
    r"""$\tau = \max(\text{floor}, e^{-\text{rate} \cdot n})$ for training step $n$."""
    return max(floor, math.exp(-rate * step))


class SkimLSTM(nn.Module):
    """LSTM that reads or skims each input.

    The layer `decide` gives the two logits (read, skim), `big` and `small` are torch's cells.

    Args:
        d_in: size of an input.
        d_hidden: size of the state $d$.
        d_small: number of entries $d'$ that a skim updates, between 1 and d - 1.
        threshold: in evaluation, a probability of skimming above it skims; 1 never does, below 0 always.

    Raises:
        ValueError: sizes out of range.
    """

    def __init__(self, d_in: int, d_hidden: int, d_small: int, threshold: float = 0.5):
        super().__init__()
        if d_in < 1 or not 1 <= d_small < d_hidden:
            raise ValueError(f"expected d_in >= 1 and 1 <= d_small < d_hidden, got {d_in}, {d_small} and {d_hidden}")
        self.d_in, self.d_hidden, self.d_small, self.threshold = d_in, d_hidden, d_small, threshold
        self.big = nn.LSTMCell(d_in, d_hidden)
        self.small = nn.LSTMCell(d_in + d_hidden - d_small, d_small)
        self.decide = nn.Linear(d_in + d_hidden, 2)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        tau: float = 1.0,
        gamma: float = 0.0,
        generator: torch.Generator | None = None,
        state: tuple[Tensor, Tensor] | None = None,
        skim: Tensor | None = None,
    ) -> dict[str, Any]:
        r"""Run over a sequence; softly in training mode, with hard choices in evaluation mode.

        Args:
            x: ``[batch, time, d_in]``.
            mask: ``[batch, time]``, True for real steps; the others change nothing and put out zeros.
            tau: temperature, positive.
            gamma: weight of the penalty.
            generator: draws the Gumbel noise.
            state: $h_0$ and $c_0$ ``[batch, d_hidden]``; zeros if not given.
            skim: ``[batch, time]`` bool, choices to make in place of the learned ones, hard in both modes.

        Returns:
            ``out`` ``[batch, time, d_hidden]``, ``state`` $(h, c)$, ``skim_prob`` $p_{t,2}$ ``[batch, time]``, ``skimmed`` ``[batch, time]`` bool (in
            training mode, what the threshold would say), and ``penalty``, $\gamma$ times the mean of $-\log p_{t,2}$ over each sequence's steps
            and over the batch.

        Raises:
            ValueError: other shapes, no time step, a sequence without a real step, or a temperature that is not positive.
        """
        if x.dim() != 3 or x.shape[2] != self.d_in or x.shape[1] == 0:
            raise ValueError(f"expected an input [B, T >= 1, {self.d_in}], got {tuple(x.shape)}")
        if not tau > 0:
            raise ValueError(f"the temperature must be positive, got {tau}")
        for name, choice in (("mask", mask), ("skim", skim)):
            if choice is not None and (choice.shape != x.shape[:2] or choice.dtype != torch.bool):
                raise ValueError(f"expected a bool {name} {tuple(x.shape[:2])}, got {choice.dtype} {tuple(choice.shape)}")
        if mask is not None and not mask.any(1).all():
            raise ValueError(f"expected a real step in each row of the mask {tuple(mask.shape)}")
        zero = x.new_zeros(len(x), self.d_hidden)
        h, c = (zero, zero) if state is None else state
        branch = len(x) == 1 and mask is None and not self.training and not torch.is_grad_enabled()
        out, margins, skims = [], [], []
        for t, x_t in enumerate(x.unbind(1)):
            both = torch.cat([x_t, h], 1)
            read_logit, skim_logit = self.decide(both).unbind(1)
            margin = skim_logit - read_logit  # [B], log p2 - log p1
            hard = torch.sigmoid(margin) > self.threshold if skim is None else skim[:, t]
            if branch:
                h, c = self._skim(x_t, h, c) if hard.item() else self.big(x_t, (h, c))
                new_h = h
            else:
                weight = hard.to(x.dtype) if skim is not None or not self.training else self._soft(margin, tau, generator)
                read, skimmed = self.big(x_t, (h, c)), self._skim(x_t, h, c)
                new_h, new_c = (torch.lerp(a, b, weight[:, None]) for a, b in zip(read, skimmed))
                if mask is not None:
                    real = mask[:, t, None]
                    h, c, new_h = torch.where(real, new_h, h), torch.where(real, new_c, c), new_h * real
                else:
                    h, c = new_h, new_c
            out.append(new_h)
            margins.append(margin)
            skims.append(hard)
        margin, skimmed = torch.stack(margins, 1), torch.stack(skims, 1)  # [B, T]
        counts = torch.ones_like(margin) if mask is None else mask.to(margin)
        penalty = gamma * (-(logsigmoid(margin) * counts).sum(1) / counts.sum(1)).mean()
        if mask is not None:
            skimmed = skimmed & mask
        return {"out": torch.stack(out, 1), "state": (h, c), "skim_prob": torch.sigmoid(margin), "skimmed": skimmed, "penalty": penalty}

    def _skim(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        k = self.d_small
        small_h, small_c = self.small(torch.cat([x, h[:, k:]], 1), (h[:, :k], c[:, :k]))
        return torch.cat([small_h, h[:, k:]], 1), torch.cat([small_c, c[:, k:]], 1)

    @staticmethod
    def _soft(margin: Tensor, tau: float, generator: torch.Generator | None) -> Tensor:
        """Weight $r^2$ of skimming: the softmax of two numbers is a logistic function of their difference."""
        uniform = torch.rand(2, *margin.shape, generator=generator, dtype=margin.dtype, device=margin.device)
        gumbel = -(-uniform.clamp_min(torch.finfo(margin.dtype).tiny).log()).clamp_min(torch.finfo(margin.dtype).tiny).log()
        return torch.sigmoid((margin + gumbel[1] - gumbel[0]) / tau)


def flops_fraction(skimmed: Tensor, d_in: int, d_hidden: int, d_small: int, mask: Tensor | None = None, decision: bool = False) -> float:
    r"""Multiplications of the matrices of the cells that ran, as a fraction of those of always reading.

    A read costs $4 d (d_\text{in} + d)$, a skim $4 d' (d_\text{in} + d)$, so that the fraction is $1 - s (1 - d' / d)$ for a share $s$ of skims.

    Args:
        skimmed: ``[batch, time]`` bool.
        d_in: size of an input.
        d_hidden: $d$.
        d_small: $d'$.
        mask: ``[batch, time]``, True for real steps.
        decision: count the $2 (d_\text{in} + d)$ of the decision as well; then never skimming costs a little more than 1.

    Raises:
        ValueError: shapes that do not match, no real step, or sizes out of range.
    """
    if d_in < 1 or not 0 < d_small < d_hidden:
        raise ValueError(f"expected d_in >= 1 and 0 < d_small < d_hidden, got {d_in}, {d_small} and {d_hidden}")
    real = torch.ones_like(skimmed, dtype=torch.bool) if mask is None else mask
    if real.shape != skimmed.shape or not real.any():
        raise ValueError(f"expected a mask {tuple(skimmed.shape)} with real steps, got {tuple(real.shape)}")
    share = float(skimmed.bool()[real].double().mean())
    read, skim = 4 * d_hidden * (d_in + d_hidden), 4 * d_small * (d_in + d_hidden)
    return ((1 - share) * read + share * skim + decision * 2 * (d_in + d_hidden)) / read
