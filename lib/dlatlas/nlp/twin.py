r"""Twin networks (serdyuk2018twin).

A recurrent generator is trained to predict the next token, and tends to look no further. A twin network reads the same sequence backwards, so that its
state sums up the future. During training the forward state must be able to predict, by an affine map, the backward state of the
same position: it has to carry what helps with the tokens to come. At test time the twin is thrown away.

Equations:

$h^f_t$ has read the tokens before $t$ and predicts $x_t$; $h^b_t$ has read those after $t$ and predicts the same $x_t$. With an affine map $g$,

$$ L_t = \lVert g(h^f_t) - \operatorname{stopgrad}(h^b_t) \rVert_2 , $$

$$ \max \; \sum_t \left[ \log p_f(x_t \mid x_{<t}) + \log p_b(x_t \mid x_{>t}) \right] - \alpha \operatorname{mean}_t L_t . $$

The gradient of $L_t$ reaches the forward network and $g$, not the twin.

Deviations from the paper:

1. Losses are means over the real tokens, so that $\alpha$ does not depend on the length: `total` is the sum of the two mean
   negative log-likelihoods and $\alpha$ times the mean of $L_t$.
2. The root has $10^{-8}$ inside, as the norm has no gradient at zero. `squared=True` gives the mean of squares over units instead.
3. The word vectors are shared by the two networks; their recurrent layers and softmaxes are not.
4. A sequence is closed on both sides by its own: the first forward and the first backward step read a zero vector.

Later work: The paper itself finds gains in speech recognition and captioning and little in word-level language modelling. Z-Forcing (Goyal et
al. 2017) lets a latent variable carry the backward state. Since masked and permuted language models (BERT 2018, XLNet 2019) context from
both sides is used directly where a model need not generate; for generators the idea came back as the prediction of several tokens at
once (Gloeckle et al. 2024).

Example:
    import torch
    from dlatlas.nlp.twin import TwinLM

    words = torch.randint(8, (1400, 4))
    text = torch.cat([words, words.flip(1)], 1)  # four letters and the same backwards
    for alpha in (0.0, 0.5):
        torch.manual_seed(0)
        model = TwinLM(8, 32, alpha=alpha)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        for step in range(200):
            loss = model.loss(text[torch.randint(400, (32,))])["total"]  # the method: a twin's loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        test = model.loss(text[400:])
        print(f"alpha {alpha}: the twin's state is guessed to {test['twin']:.2f}", end=", ")
        print(f"test loss {test['forward_nll']:.3f}")
    print("without the twin:", tuple(model(text[:1]).shape))  # logits of the forward network alone
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad

__all__ = ["TwinLM", "align_backward", "twin_penalty"]

CELLS = {"lstm": nn.LSTM, "gru": nn.GRU}


def align_backward(tokens: Tensor, mask: Tensor) -> Tensor:
    """The tokens ``[B, T]`` or features ``[B, T, D]``, reversed inside each length; the padding stays at the end. Its own inverse.

    Args:
        tokens: padded sequences.
        mask: ``[B, T]`` bool, True for the real tokens, which come first.

    Raises:
        ValueError: a mask of another shape or type, with a row without tokens, or with tokens behind the padding.
    """
    lengths = _lengths(tokens, mask)
    t = torch.arange(tokens.shape[1], device=tokens.device)
    index = torch.where(mask, lengths[:, None] - 1 - t, t)  # [B, T]
    return tokens.gather(1, index.view(*index.shape, *(1,) * (tokens.dim() - 2)).expand_as(tokens))


def twin_penalty(h_fwd: Tensor, h_bwd: Tensor, g: nn.Module, mask: Tensor | None = None, squared: bool = False) -> Tensor:
    r"""Mean over the real steps of $\lVert g(h^f_t) - \operatorname{stopgrad}(h^b_t) \rVert_2$.

    Args:
        h_fwd: forward states ``[B, T, D]``, entry `t` before reading token `t`.
        h_bwd: backward states ``[B, T, D]`` of the same positions; they get no gradient.
        g: maps forward states to backward ones.
        mask: ``[B, T]`` bool, True for the real tokens; None: all.
        squared: the mean over units of the squares, in place of the norm.

    Raises:
        ValueError: shapes that do not match, or a mask with a row without tokens.
    """
    guess = g(h_fwd)
    if h_fwd.dim() != 3 or guess.shape != h_bwd.shape:
        raise ValueError(f"expected states [batch, time, dim] that g makes {tuple(h_bwd.shape)}, got {tuple(guess.shape)}")
    squares = (guess - h_bwd.detach()).square()  # [B, T, D]
    distance = squares.mean(2) if squared else (squares.sum(2) + 1e-8).sqrt()  # [B, T]
    if mask is None:
        return distance.mean()
    _lengths(h_fwd, mask)
    return distance[mask].mean()


class TwinLM(nn.Module):
    """A recurrent language model with a twin that reads backwards while it is trained.

    Args:
        vocab: number of tokens.
        d: width of embeddings and states.
        cell: "lstm" or "gru".
        alpha: weight of the penalty, not negative.

    Raises:
        ValueError: unknown cell, or a negative alpha.
    """

    def __init__(self, vocab: int, d: int, cell: str = "lstm", alpha: float = 1.0):
        super().__init__()
        if cell not in CELLS:
            raise ValueError(f"expected a cell of {', '.join(CELLS)}; got {cell!r}")
        if not alpha >= 0:
            raise ValueError(f"alpha must not be negative, got {alpha}")
        self.alpha = alpha
        self.embed = nn.Embedding(vocab, d)
        self.forward_net, self.backward_net = CELLS[cell](d, d, batch_first=True), CELLS[cell](d, d, batch_first=True)
        self.forward_head, self.backward_head = nn.Linear(d, vocab), nn.Linear(d, vocab)
        self.g = nn.Linear(d, d)

    def states(self, tokens: Tensor) -> Tensor:
        """Forward states ``[B, T, d]``: entry `t` has read the tokens before `t`."""
        return self.forward_net(_shifted(self.embed(tokens)))[0]

    def twin_states(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Backward states ``[B, T, d]``: entry `t` has read the tokens after `t`."""
        backward = self.backward_net(_shifted(self.embed(align_backward(tokens, mask))))[0]
        return align_backward(backward, mask)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits ``[B, T, vocab]`` of each token from those before it, by the forward network alone."""
        return self.forward_head(self.states(tokens))

    def loss(self, tokens: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        """Scalars `total`, `forward_nll`, `backward_nll` and `twin`.

        Args:
            tokens: ``[B, T]``.
            mask: ``[B, T]`` bool, True for the real tokens, which come first; None: all.
        """
        everything = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
        h_fwd, h_bwd = self.states(tokens), self.twin_states(tokens, everything)
        real = (lambda t: t.flatten(0, 1)) if mask is None else (lambda t: t[mask])  # an index costs more than a view
        forward_nll = cross_entropy(real(self.forward_head(h_fwd)), real(tokens))
        backward_nll = cross_entropy(real(self.backward_head(h_bwd)), real(tokens))
        twin = twin_penalty(h_fwd, h_bwd, self.g, mask)
        total = forward_nll + backward_nll + self.alpha * twin
        return {"total": total, "forward_nll": forward_nll, "backward_nll": backward_nll, "twin": twin}


def _shifted(e: Tensor) -> Tensor:
    """What is read before each step: nothing at the first."""
    return pad(e[:, :-1], (0, 0, 1, 0))


def _lengths(tokens: Tensor, mask: Tensor) -> Tensor:
    if mask.dtype != torch.bool or mask.shape != tokens.shape[:2]:
        raise ValueError(f"expected a bool mask {tuple(tokens.shape[:2])}, got {mask.dtype} {tuple(mask.shape)}")
    if not mask.shape[1] or not mask[:, 0].all() or (mask[:, 1:] & ~mask[:, :-1]).any():
        raise ValueError(f"expected at least one token a row and no token behind the padding, got a mask {tuple(mask.shape)}")
    return mask.sum(1)
