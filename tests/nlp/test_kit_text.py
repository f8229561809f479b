"""Vocabularies, padding, buckets and contiguous batches; the splits of the corpora."""

import pytest
import torch

from dlatlas import data
from dlatlas.nlp.kit.corpora import char_corpus, kjv, word_corpus
from dlatlas.nlp.kit.text import Vocab, bucket_batches, chars, lm_batches, pad, words


def test_words_and_chars():
    assert words("And God said, Let there be light: don't!") == [
        "and",
        "god",
        "said",
        ",",
        "let",
        "there",
        "be",
        "light",
        ":",
        "don't",
        "!",
    ]
    assert words("Beth-el, Pharaoh’s 12") == ["beth-el", ",", "pharaoh’s", "12"]
    assert words("") == []
    assert chars("a b") == ["a", " ", "b"]


def test_vocab_order_round_trip_and_unknown():
    vocab = Vocab(["b", "b", "a", "a", "c", "d", "d", "d"], min_count=2)
    assert vocab.itos == ["<pad>", "<unk>", "<s>", "</s>", "d", "a", "b"]
    assert [vocab.stoi[t] for t in vocab.itos] == list(range(7)) and len(vocab) == 7
    assert vocab.encode(["a", "c", "</s>"]) == [5, 1, 3]
    assert vocab.decode(torch.tensor([4, 1])) == ["d", "<unk>"]
    assert Vocab(["b", "b", "a", "a", "c"], max_size=5).itos[4:] == ["a"]
    bare = Vocab("ab", specials=())
    assert bare.encode("ba") == [1, 0]
    with pytest.raises(ValueError, match="'z'"):
        bare.encode("az")
    assert Vocab(["</s>", "x", "</s>"]).itos == ["<pad>", "<unk>", "<s>", "</s>", "x"]  # a special that occurs is counted once


def test_pad():
    tokens, mask = pad([[1, 2, 3], [4]], value=9)
    assert tokens.tolist() == [[1, 2, 3], [4, 9, 9]]
    assert mask.tolist() == [[True] * 3, [True, False, False]]


def test_buckets_hold_everything_once_and_keep_the_limit():
    lengths = torch.randint(1, 30, (200,), generator=torch.Generator().manual_seed(0)).tolist()
    batches = bucket_batches(lengths, 60, torch.Generator().manual_seed(1))
    assert sorted(i for b in batches for i in b) == list(range(200))
    assert all(len(b) * max(lengths[i] for i in b) <= 60 for b in batches)
    waste = sum(len(b) * max(lengths[i] for i in b) for b in batches) / sum(lengths)
    assert waste < 1.1
    assert batches == bucket_batches(lengths, 60, torch.Generator().manual_seed(1))
    assert batches != bucket_batches(lengths, 60, torch.Generator().manual_seed(2))


def test_lm_batches_continue():
    pairs = list(lm_batches(torch.arange(47), 2, 5))  # rows of 23, four windows
    assert len(pairs) == 4
    for x, y in pairs:
        assert x.shape == y.shape == (2, 5) and torch.equal(x + 1, y)
    assert torch.equal(torch.cat([x for x, _ in pairs], 1), torch.stack([torch.arange(20), torch.arange(23, 43)]))


def test_word_corpora():
    for name, size in (("kjv", 4000), ("brown", 3000)):
        corpus = word_corpus(name, train=50_000, valid=5_000, test=5_000, vocab=size)
        assert [len(p) for p in corpus[:3]] == [50_000, 5_000, 5_000]
        assert len(corpus.vocab) <= size
        assert int(corpus.train.max()) == len(corpus.vocab) - 1
        assert all(p.min() >= 1 and p.max() < len(corpus.vocab) for p in corpus[:3])
    assert corpus.vocab.decode(corpus.train[:5]) == ["the", "fulton", "county", "grand", "jury"]
    assert not any(c in corpus.vocab.stoi for c in ".,;``''")
    assert "N" in corpus.vocab.stoi


def test_splits_share_no_chapter():
    corpus = word_corpus("kjv", 1_000, 1_000, 1_000)
    text = {k: " ".join(t for *_, t in [v for v in kjv() if v[:2] == ("Genesis", k)]) for k in (1, 9, 10)}
    for part, k in ((corpus.train, 1), (corpus.valid, 9), (corpus.test, 10)):
        first = [w if w in corpus.vocab.stoi else "<unk>" for w in words(text[k])[:12]]
        assert [w for w in corpus.vocab.decode(part[:13]) if w != "</s>"][:12] == first[:12]
    whole = char_corpus(train=200_000, valid=20_000, test=20_000)
    train = "".join(whole.vocab.decode(whole.train))
    lines = train.split("\n")
    assert lines[0] == data.bible("kjv")["Genesis", 1, 1]
    assert data.bible("kjv")["Genesis", 9, 1] not in lines


@pytest.mark.parametrize(
    "call",
    [
        lambda: Vocab("ab", min_count=0),
        lambda: Vocab("ab", max_size=4),
        lambda: pad([]),
        lambda: pad([[1], []]),
        lambda: bucket_batches([3, 9], 8),
        lambda: bucket_batches([], 8),
        lambda: lm_batches(torch.arange(10), 2, 5),
        lambda: lm_batches(torch.zeros(4, 4), 2, 1),
        lambda: word_corpus("ptb"),
        lambda: word_corpus("kjv", train=10**8),
        lambda: char_corpus("brown"),
        lambda: char_corpus(test=0),
    ],
)
def test_bad_input(call):
    with pytest.raises(ValueError, match="expected"):
        call()
