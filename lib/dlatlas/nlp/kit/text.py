"""Text as numbers: tokens, vocabularies, padding, and batches that continue."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

__all__ = ["Vocab", "bucket_batches", "chars", "lm_batches", "pad", "words"]


def words(text: str) -> list[str]:
    """The words of `text` in lower case, each punctuation mark as a word of its own; ``don't`` and ``Beth-el`` are one word each."""
    return re.findall(r"\w+(?:['’-]\w+)*|[^\w\s]", text.lower())


def chars(text: str) -> list[str]:
    """The characters of `text`, as they are."""
    return list(text)


class Vocab:
    """Tokens and their numbers: `specials` first, then the tokens by falling count, ties in alphabetical order.

    Args:
        tokens: the stream to count.
        min_count: a token must occur that often.
        max_size: keep so many, specials included; None: all.
        specials: padding, unknown, begin and end, with the numbers 0 to 3; (): none, and an unknown token is an error.

    Attributes:
        stoi: number of each token.
        itos: token of each number.

    Raises:
        ValueError: min_count < 1, or a max_size that has no room for a token.
    """

    def __init__(
        self,
        tokens: Iterable[str],
        min_count: int = 1,
        max_size: int | None = None,
        specials: Sequence[str] = ("<pad>", "<unk>", "<s>", "</s>"),
    ):
        if min_count < 1 or (max_size is not None and max_size <= len(specials)):
            raise ValueError(f"expected min_count >= 1 and max_size > {len(specials)} (the specials), got {min_count} and {max_size}")
        counts = Counter(tokens)
        known = sorted((t for t in counts if counts[t] >= min_count and t not in set(specials)), key=lambda t: (-counts[t], t))
        self.itos = (list(specials) + known)[:max_size]
        self.stoi = {token: i for i, token in enumerate(self.itos)}
        self._unk = self.stoi.get("<unk>") if "<unk>" in specials else None

    def encode(self, tokens: Iterable[str]) -> list[int]:
        """Numbers of tokens; unknown ones get the number of ``<unk>``.

        Raises:
            ValueError: an unknown token, and there is no ``<unk>``.
        """
        tokens = list(tokens)
        if self._unk is None and (unknown := sorted(set(tokens) - self.stoi.keys())):
            raise ValueError(f"expected tokens of the vocabulary, which has no <unk>; got {unknown[:5]}")
        return [self.stoi.get(token, self._unk) for token in tokens]

    def decode(self, ids: Iterable[int]) -> list[str]:
        """Tokens of numbers (a list, or a vector)."""
        return [self.itos[int(i)] for i in ids]

    def __len__(self) -> int:
        return len(self.itos)

    def __repr__(self) -> str:
        return f"Vocab({len(self)} tokens: {', '.join(map(repr, self.itos[:8]))}, ...)"


def pad(seqs: Sequence[Sequence[int]], value: int = 0) -> tuple[Tensor, Tensor]:
    """Sequences as a tensor ``[B, T]``, int64, filled up at the end, and the bool mask ``[B, T]`` of what is real.

    Raises:
        ValueError: no sequence, or an empty one.
    """
    lengths = [len(s) for s in seqs]
    if not lengths or min(lengths) < 1:
        raise ValueError(f"expected sequences of at least one token, got lengths {lengths}")
    tokens = torch.full((len(seqs), max(lengths)), value, dtype=torch.long)
    for row, seq in zip(tokens, seqs):
        row[: len(seq)] = torch.as_tensor(seq)
    return tokens, torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


def bucket_batches(lengths: Sequence[int], max_tokens: int, generator: torch.Generator | None = None) -> list[list[int]]:
    """Every index once, in batches of sequences of similar length that hold at most `max_tokens` with their padding, in random order.

    Raises:
        ValueError: no sequence, an empty one, or one that is longer than `max_tokens`.
    """
    if not len(lengths) or min(lengths) < 1 or max(lengths) > max_tokens:
        raise ValueError(f"expected lengths between 1 and max_tokens={max_tokens}, got {sorted(lengths)[:1]} to {sorted(lengths)[-1:]}")
    # Equal lengths in random order, so that an epoch does not repeat the batches of the one before.
    shuffled = torch.randperm(len(lengths), generator=generator).tolist()
    batches: list[list[int]] = [[]]
    for i in sorted(shuffled, key=lambda i: lengths[i]):
        if (len(batches[-1]) + 1) * lengths[i] > max_tokens:  # the newest is the longest
            batches.append([])
        batches[-1].append(i)
    return [batches[k] for k in torch.randperm(len(batches), generator=generator).tolist()]


def lm_batches(ids: Tensor | Sequence[int], batch: int, bptt: int) -> Iterator[tuple[Tensor, Tensor]]:
    """One pass over a text: pairs (tokens, next tokens), both ``[batch, bptt]``, row `b` of each continuing row `b` of the one before.

    The text is cut into `batch` pieces of equal length that are read side by side; what does not fill a window is left out.

    Raises:
        ValueError: sizes below 1, not a vector, or a text too short for one window.
    """
    ids = torch.as_tensor(ids)
    if ids.dim() != 1 or min(batch, bptt) < 1 or (windows := (len(ids) // batch - 1) // bptt) < 1:
        raise ValueError(f"expected batch, bptt >= 1 and at least batch * (bptt + 1) tokens, got {batch}, {bptt}, {tuple(ids.shape)}")
    rows = ids[: len(ids) // batch * batch].view(batch, -1)  # [batch, length]

    def once() -> Iterator[tuple[Tensor, Tensor]]:
        for at in range(0, windows * bptt, bptt):
            yield rows[:, at : at + bptt], rows[:, at + 1 : at + bptt + 1]

    return once()
