"""Text as characters: real text, batches of it, and how surprised a language model is by it."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from dlatlas import data

__all__ = ["char_batches", "encode", "king_james", "perplexity"]


def king_james(train: int, test: int) -> tuple[str, str]:
    """The first `train` characters of the King James Bible, one verse a line, and the `test` characters that follow.

    Raises:
        ValueError: a part is empty or the text is shorter.
    """
    text = "\n".join(data.bible("kjv").values())
    if min(train, test) < 1 or train + test > len(text):
        raise ValueError(f"expected two positive lengths that add up to at most {len(text)}, got {train} and {test}")
    return text[:train], text[train : train + test]


def encode(text: str, alphabet: str) -> Tensor:
    """Positions in `alphabet` of the characters of `text` ``[len(text)]``, int64.

    Raises:
        ValueError: `text` has a character that is not in `alphabet`.
    """
    index = {c: i for i, c in enumerate(alphabet)}
    if unknown := sorted(set(text) - index.keys()):
        raise ValueError(f"the alphabet {alphabet!r} has no {unknown}")
    return torch.tensor([index[c] for c in text], dtype=torch.long)


def char_batches(text: str | Tensor, seq: int, batch: int, generator: torch.Generator | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless (inputs, next characters), both ``[seq, batch]``, int64, from `batch` places that move through the text side by side.

    The places are drawn once. Each batch begins where the one before it ended, so that the state of a recurrent network may be carried on,
    and what runs over the end of the text continues at its start.

    Args:
        text: a string, numbered by its sorted set of characters, or a vector of numbers from :func:`encode`.
        seq: characters a row of a batch.
        batch: number of places.
        generator: draws the places.

    Raises:
        ValueError: sizes below 1, or a text shorter than ``seq + 1``.
    """
    tokens = encode(text, "".join(sorted(set(text)))) if isinstance(text, str) else text
    if tokens.dim() != 1 or min(seq, batch) < 1 or len(tokens) <= seq:
        raise ValueError(f"expected seq, batch >= 1 and a text longer than seq, got {seq}, {batch}, {tuple(tokens.shape)}")

    def endless() -> Iterator[tuple[Tensor, Tensor]]:
        place = torch.randint(len(tokens), (batch,), generator=generator)
        window = torch.arange(seq + 1)[:, None]
        while True:
            rows = tokens[(place + window) % len(tokens)]  # [seq + 1, batch]
            yield rows[:-1], rows[1:]
            place = place + seq

    return endless()


@torch.no_grad()
def perplexity(model: nn.Module, tokens: Tensor, batch: int = 32, seq: int = 128) -> float:
    """``exp`` of the mean cross-entropy of each next character; the model's mode is restored.

    The text is cut into `batch` pieces that are read side by side, each from its start to its end with the state carried on. Characters
    beyond ``batch * (len(tokens) // batch)`` are left out.

    Args:
        model: ``model(tokens [T, B], state) -> (logits [T, B, V], state)``.
        tokens: the text, numbers ``[N]``.
    """
    if tokens.dim() != 1 or min(batch, seq) < 1 or len(tokens) < 2 * batch:
        raise ValueError(f"expected batch, seq >= 1 and at least two characters a piece, got {batch}, {seq}, {tuple(tokens.shape)}")
    rows = tokens[: len(tokens) // batch * batch].view(batch, -1).T  # [length, batch]
    was_training, total, state = model.training, 0.0, None
    model.eval()
    try:
        for x, y in zip(rows[:-1].split(seq), rows[1:].split(seq)):
            logits, state = model(x, state)
            total += float(cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="sum"))
    finally:
        model.train(was_training)
    return math.exp(total / rows[1:].numel())
