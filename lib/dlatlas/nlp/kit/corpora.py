"""Real text for language models, with splits that are fixed once: the King James Bible and the Brown corpus."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from dlatlas import data
from dlatlas.nlp.kit.text import Vocab, chars, words

__all__ = ["CORPORA", "Corpus", "char_corpus", "kjv", "word_corpus"]

CORPORA = ("kjv", "brown")
END = "</s>"  # closes each verse or sentence
CHAR_LEVEL = ("kjv",)


class Corpus(NamedTuple):
    """Three vectors of token numbers, int64, and the vocabulary, which is counted on the training text alone."""

    train: Tensor
    valid: Tensor
    test: Tensor
    vocab: Vocab


def kjv() -> list[tuple[str, int, int, str]]:
    """The verses of the King James Bible in order: (book, chapter, verse, text)."""
    return [(*ref, text) for ref, text in data.bible("kjv").items()]


def word_corpus(name: str = "kjv", train: int = 300_000, valid: int = 30_000, test: int = 30_000, vocab: int = 4_000) -> Corpus:
    """Words of real text, each verse or sentence closed by ``</s>``, cut to the given numbers of tokens.

    Of every ten chapters (kjv) or documents (brown) in order, the first eight are training text, the ninth validation and the tenth test
    text: no verse or sentence is in two of them, and all three are of one kind, also when they are cut. The Brown corpus (1961, fifteen
    genres) stands in for the Penn Treebank, which is not free, and is prepared as that one is for language models: lower case, numbers
    as ``N``, no punctuation. The King James text keeps its punctuation.

    Args:
        name: "kjv" or "brown".
        train: tokens of training text.
        valid: tokens of validation text.
        test: tokens of test text.
        vocab: size of the vocabulary; other words are ``<unk>``.

    Raises:
        ValueError: unknown name, or a size that is not positive or beyond the text.
    """
    if name not in CORPORA:
        raise ValueError(f"expected a corpus of {', '.join(CORPORA)}; got {name!r}")
    parts = [_cut(part, size, what) for part, size, what in zip(_word_parts(name), (train, valid, test), ("train", "valid", "test"))]
    return _numbered(parts, Vocab(parts[0], max_size=vocab))


def char_corpus(name: str = "kjv", train: int = 1_000_000, valid: int = 100_000, test: int = 100_000) -> Corpus:
    """Characters of the King James Bible, one verse a line, split by chapters as :func:`word_corpus` splits them.

    The vocabulary has no specials; the characters are those of all parts, so that none is unknown.

    Raises:
        ValueError: unknown name, or a size that is not positive or beyond the text.
    """
    if name not in CHAR_LEVEL:
        raise ValueError(f"expected a corpus of {', '.join(CHAR_LEVEL)}; got {name!r}")
    whole = ["".join(f"{text}\n" for *_, text in part) for part in _verses_by_chapter()]
    parts = [_cut(chars(part), size, what) for part, size, what in zip(whole, (train, valid, test), ("train", "valid", "test"))]
    alphabet = sorted(set("".join(whole)))
    return _numbered(parts, Vocab(alphabet, specials=()))


def _cut(tokens: list[str], size: int, what: str) -> list[str]:
    if not 1 <= size <= len(tokens):
        raise ValueError(f"{what}: expected 1 to {len(tokens)} tokens, got {size}")
    return tokens[:size]


def _numbered(parts: list[list[str]], vocab: Vocab) -> Corpus:
    return Corpus(*(torch.tensor(vocab.encode(part)) for part in parts), vocab)


def _verses_by_chapter() -> list[list[tuple[str, int, int, str]]]:
    verses = kjv()
    return _split(verses, [v[:2] for v in verses])


def _split(items: list, units: list) -> list[list]:
    """Items of the units 0-7, 8, 9, 10-17, 18, ... as train, valid and test."""
    number = {unit: i for i, unit in enumerate(dict.fromkeys(units))}
    parts: list[list] = [[], [], []]
    for item, unit in zip(items, units):
        parts[max(0, number[unit] % 10 - 7)].append(item)
    return parts


@functools.lru_cache(maxsize=2)
def _word_parts(name: str) -> list[list[str]]:
    if name == "kjv":
        return [[w for *_, text in part for w in (*words(text), END)] for part in _verses_by_chapter()]
    sentences = data.brown()
    parts = _split(sentences, [s.document for s in sentences])
    return [[w for s in part for w in (*_treebank(s.words), END)] for part in parts]


def _treebank(tokens: tuple[str, ...]) -> Iterator[str]:
    """Words as in the Penn Treebank's version for language models."""
    for token in tokens:
        if re.search(r"\d", token) and not re.search(r"[a-zA-Z]{2}", token):
            yield "N"
        elif re.search(r"\w", token):
            yield token.lower()
