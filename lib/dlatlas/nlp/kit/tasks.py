"""The synthetic tasks of the literature on memory, generated as published, and real digits read pixel by pixel.

Random parts are drawn from `generator`, or from torch's global one. Tokens are int64.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dlatlas import data
from dlatlas.nlp.kit.text import Vocab, pad

__all__ = ["Sentences", "adding", "agreement", "copy_memory", "dyck", "latch", "pixel_sequences", "recall"]


def copy_memory(n: int, T: int, n_symbols: int = 8, length: int = 10, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Copy memory (Hochreiter and Schmidhuber 1997, in the form of Arjovsky, Shah and Bengio 2016): tokens and targets ``[n, T + 2 length]``.

    `length` random symbols ``0..n_symbols-1``, ``T - 1`` blanks (``n_symbols``), a delimiter (``n_symbols + 1``), `length` blanks. The
    target is blank everywhere but in the last `length` steps, where it is the symbols. Without a memory the best mean cross-entropy is
    ``length log(n_symbols) / (T + 2 length)``.
    """
    _positive(n=n, T=T, n_symbols=n_symbols, length=length)
    symbols = torch.randint(n_symbols, (n, length), generator=generator)
    x = torch.full((n, T + 2 * length), n_symbols)
    x[:, :length] = symbols
    x[:, length + T - 1] = n_symbols + 1
    y = torch.full_like(x, n_symbols)
    y[:, -length:] = symbols
    return x, y


def adding(n: int, T: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """The adding problem (same sources): inputs ``[n, T, 2]``, values in [0, 1) beside marks, and the sum ``[n]`` of the two marked values.

    One mark is in the first half, the other in the second. Always answering 1 has a mean squared error of 1/6.
    """
    _positive(n=n, T=T)
    if T < 2:
        raise ValueError(f"expected at least two steps for two marks, got T={T}")
    values, marks = torch.rand(n, T, generator=generator), torch.zeros(n, T)
    half = T // 2
    first = torch.randint(half, (n, 1), generator=generator)
    second = half + torch.randint(T - half, (n, 1), generator=generator)
    marks.scatter_(1, torch.cat([first, second], 1), 1.0)
    return torch.stack([values, marks], 2), (values * marks).sum(1)


def latch(n: int, T: int, n_symbols: int = 8, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Which of `n_symbols` came first? Tokens ``[n, T + 1]``: a symbol and `T` blanks (``n_symbols``); targets ``[n]``, for the last step."""
    _positive(n=n, T=T, n_symbols=n_symbols)
    y = torch.randint(n_symbols, (n,), generator=generator)
    x = torch.full((n, T + 1), n_symbols)
    x[:, 0] = y
    return x, y


def recall(n: int, T: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Associative recall (Ba et al. 2016): tokens ``[n, T + 3]`` and the digit ``[n]`` that stood behind the letter asked for.

    `T / 2` pairs of a letter (0-25, no letter twice) and a digit (26-35), two question marks (36) and one of the letters: ``c9k8j3??k`` has
    the answer 8, as number 34.
    """
    _positive(n=n, T=T)
    if T % 2 or T > 52:
        raise ValueError(f"expected an even T of at most 52 (26 letters), got {T}")
    letters = torch.rand(n, 26, generator=generator).argsort(1)[:, : T // 2]
    digits = 26 + torch.randint(10, (n, T // 2), generator=generator)
    asked = torch.randint(T // 2, (n, 1), generator=generator)
    pairs = torch.stack([letters, digits], 2).flatten(1)  # [n, T]
    x = torch.cat([pairs, torch.full((n, 2), 36), letters.gather(1, asked)], 1)
    return x, digits.gather(1, asked)[:, 0]


def dyck(n: int, depth: int | tuple[int, int], k: int, length: int = 40, generator: torch.Generator | None = None) -> Tensor:
    """Balanced strings of `k` kinds of brackets ``[n, length]``: ``0..k-1`` open, ``k..2k-1`` close.

    Args:
        n: number of strings.
        depth: largest nesting, or (lowest, highest) for the deepest place of each string. Strings are uniform under that condition.
        k: kinds of brackets.
        length: even.
        generator: source of randomness.

    Raises:
        ValueError: sizes below 1, an odd length, or a nesting that the length does not allow.
    """
    low, high = (1, depth) if isinstance(depth, int) else depth
    _positive(n=n, depth=high, k=k, length=length)
    if length % 2 or not 1 <= low <= high or 2 * low > length:
        raise ValueError(f"expected an even length and a depth 1 <= low <= high with 2 low <= length, got length={length}, depth={depth}")
    # ways[r][h]: how many walks of r steps lead from height h to 0 below the limit.
    ways = torch.zeros(length + 1, high + 2, dtype=torch.float64)
    ways[0, 0] = 1
    for r in range(1, length + 1):
        ways[r, : high + 1] = ways[r - 1, 1:]
        ways[r, 1 : high + 1] += ways[r - 1, :high]
        ways[r, high + 1] = 0
    found: list[Tensor] = []
    while sum(map(len, found)) < n:
        found.append(_walks(2 * n, low, high, k, length, ways, generator))
    return torch.cat(found)[:n]


def _walks(n: int, low: int, high: int, k: int, length: int, ways: Tensor, generator: torch.Generator | None) -> Tensor:
    height, deepest = torch.zeros(n, dtype=torch.long), torch.zeros(n, dtype=torch.long)
    stack = torch.zeros(n, high, dtype=torch.long)
    out, rows = torch.empty(n, length, dtype=torch.long), torch.arange(n)
    for t in range(length):
        rest = length - t
        up = torch.rand(n, generator=generator, dtype=torch.float64) < ways[rest - 1, height + 1] / ways[rest, height]
        kind = torch.randint(k, (n,), generator=generator)
        stack[rows[up], height[up]] = kind[up]
        top = stack[rows, (height - 1).clamp_min(0)]
        out[:, t] = torch.where(up, kind, k + top)
        height += torch.where(up, 1, -1)
        deepest = torch.maximum(deepest, height)
    return out[deepest >= low]


class Sentences(NamedTuple):
    """Padded sentences: tokens and mask ``[n, T]``, the place ``[n]`` of the main verb, whether it is plural ``[n]``, and the vocabulary."""

    tokens: Tensor
    mask: Tensor
    verb: Tensor
    plural: Tensor
    vocab: Vocab


# Nouns and verbs as (singular, plural): a verb agrees with its subject.
NOUNS = [(w, w + "s") for w in ("key", "cabinet", "dog", "king", "river", "judge", "ship", "girl", "farmer", "letter")]
VERBS = [(w + "s", w) for w in ("see", "like", "find", "know", "follow", "remember")]
MAIN = [("is", "are"), ("was", "were"), ("has", "have"), *VERBS]
PREPOSITIONS, LAST = ("near", "of", "behind", "with", "to"), ("here", "there", "today", "again")


def agreement(n: int, attractors: int | tuple[int, int], generator: torch.Generator | None = None) -> Sentences:
    """Sentences in which nouns of the other number, the attractors, come between the subject and its verb (Linzen, Dupoux, Goldberg 2016).

    As in "the keys that the man near the cabinet likes are here": phrases with a preposition and relative clauses with a verb of
    their own. Up to two nouns of the subject's number are mixed with the attractors, so that neither the last noun nor any other fixed one
    gives the answer.

    Args:
        n: number of sentences.
        attractors: how many, or (lowest, highest), drawn uniformly.
        generator: source of randomness.

    Raises:
        ValueError: n < 1 or a range of attractors that makes no sense.
    """
    low, high = (attractors, attractors) if isinstance(attractors, int) else attractors
    _positive(n=n)
    if not 0 <= low <= high:
        raise ValueError(f"expected attractors 0 <= low <= high, got {attractors}")

    def draw(below: int) -> int:
        return int(torch.randint(below, (), generator=generator))

    def phrase(numbers: list[int]) -> list[str]:
        """A noun of numbers[0], and the others below it."""
        found = ["the", NOUNS[draw(len(NOUNS))][numbers[0]]]
        if len(numbers) > 1 and draw(2):
            return [*found, PREPOSITIONS[draw(len(PREPOSITIONS))], *phrase(numbers[1:])]
        if len(numbers) > 1:
            return [*found, "that", *phrase(numbers[1:]), VERBS[draw(len(VERBS))][numbers[1]]]
        return found

    sentences, places, plural = [], [], []
    for _ in range(n):
        number = draw(2)
        between = [1 - number] * (low + draw(high - low + 1)) + [number] * draw(3)
        between = [between[i] for i in torch.randperm(len(between), generator=generator).tolist()]
        subject = phrase([number, *between])
        sentences.append([*subject, MAIN[draw(len(MAIN))][number], LAST[draw(len(LAST))], "."])
        places.append(len(subject))
        plural.append(bool(number))
    # Every word of the grammar, so that the numbers do not depend on what was drawn.
    vocab = Vocab(sorted({"the", "that", ".", *PREPOSITIONS, *LAST, *(w for pair in (*NOUNS, *MAIN) for w in pair)}))
    return Sentences(*pad([vocab.encode(s) for s in sentences]), torch.tensor(places), torch.tensor(plural), vocab)


def pixel_sequences(
    train: int, test: int, name: str = "mnist", pool: int = 1, permute: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Digits read pixel by pixel, row by row (Le, Jaitly and Hinton 2015): ``x [n, 784, 1]`` in [0, 1] and labels, for training and test.

    Args:
        train: number of training images.
        test: number of test images.
        name: of the image set.
        pool: mean over squares of that side first: 2 makes sequences of 196 pixels.
        permute: read in one random order, the same for all images and in every call.

    Raises:
        ValueError: unknown set, sizes that it does not have, or pool < 1.
    """
    _positive(pool=pool)
    x, y, x_test, y_test = data.images(name, train=train, test=test)
    order = None

    def flat(images: Tensor) -> Tensor:
        nonlocal order
        pixels = torch.nn.functional.avg_pool2d(images, pool).flatten(1)[..., None]  # [n, T, 1]
        if permute and order is None:
            order = torch.randperm(pixels.shape[1], generator=torch.Generator().manual_seed(0))
        return pixels[:, order] if permute else pixels

    return flat(x), y, flat(x_test), y_test


def _positive(**sizes: int) -> None:
    if wrong := {name: size for name, size in sizes.items() if size < 1}:
        raise ValueError(f"expected sizes of at least 1, got {wrong}")
