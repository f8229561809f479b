"""The synthetic tasks have the form, the difficulty and the distribution that was published."""

import itertools
import math
from collections import Counter

import pytest
import torch

from dlatlas import data
from dlatlas.nlp.kit.tasks import MAIN, NOUNS, adding, agreement, copy_memory, dyck, latch, pixel_sequences, recall


def gen(k=0):
    return torch.Generator().manual_seed(k)


def test_copy_memory():
    x, y = copy_memory(200, 7, n_symbols=4, length=3, generator=gen())
    assert x.shape == y.shape == (200, 13)
    assert x[:, :3].max() == 3 and x[:, :3].unique().tolist() == [0, 1, 2, 3]
    assert (x[:, 3:9] == 4).all() and (x[:, 9] == 5).all() and (x[:, 10:] == 4).all()
    assert torch.equal(y[:, 10:], x[:, :3]) and (y[:, :10] == 4).all()


def test_adding():
    x, y = adding(4000, 11, gen())
    assert x.shape == (4000, 11, 2)
    assert (x[:, :5, 1].sum(1) == 1).all() and (x[:, 5:, 1].sum(1) == 1).all()
    expected = [sum(float(v) for v, m in row if m) for row in x[:50]]
    assert y[:50].tolist() == pytest.approx(expected)
    assert ((y - 1) ** 2).mean() == pytest.approx(1 / 6, abs=0.01)
    assert (x[:, :, 1].sum(0) > 300).all()  # every place is marked at times


def test_latch():
    x, y = latch(100, 6, generator=gen())
    assert x.shape == (100, 7) and torch.equal(x[:, 0], y) and (x[:, 1:] == 8).all()
    assert y.unique().tolist() == list(range(8))


def test_recall():
    x, y = recall(300, 8, gen())
    assert x.shape == (300, 11)
    for row, answer in zip(x.tolist(), y.tolist()):
        pairs = dict(zip(row[0:8:2], row[1:8:2]))
        assert len(pairs) == 4 and row[8:10] == [36, 36] and pairs[row[10]] == answer
        assert all(k < 26 for k in pairs) and all(26 <= v < 36 for v in pairs.values())


def depths(string, k):
    stack, found = [], []
    for s in string:
        if s < k:
            stack.append(s)
        else:
            assert stack.pop() == s - k
        found.append(len(stack))
    assert not stack
    return max(found)


def test_dyck_is_balanced_and_has_the_depth():
    strings = dyck(300, (4, 6), 3, length=20, generator=gen())
    assert strings.shape == (300, 20)
    assert Counter(depths(s, 3) for s in strings.tolist()).keys() == {4, 5, 6}
    assert all(depths(s, 2) <= 2 for s in dyck(100, 2, 2, length=12, generator=gen()).tolist())


def test_dyck_is_uniform():
    every = []
    for s in itertools.product((0, 1), repeat=8):
        heights = list(itertools.accumulate(1 if c == 0 else -1 for c in s))
        if min(heights) >= 0 and heights[-1] == 0 and 2 <= max(heights) <= 3:
            every.append(s)
    counts = Counter(tuple(s) for s in dyck(6000, (2, 3), 1, length=8, generator=gen()).tolist())
    assert counts.keys() == set(every)
    expected = 6000 / len(every)
    assert all(abs(c - expected) < 5 * math.sqrt(expected) for c in counts.values())


def test_agreement_counts_attractors():
    number = {w: i for pair in NOUNS for i, w in enumerate(pair)}
    verb = {w: i for pair in MAIN for i, w in enumerate(pair)}
    s = agreement(300, (1, 3), gen())
    seen, last_agrees = set(), 0
    for tokens, mask, place, plural in zip(*s[:4]):
        sentence = s.vocab.decode(tokens[mask])
        nouns = [number[w] for w in sentence[:place] if w in number]
        assert nouns[0] == verb[sentence[place]] == int(plural)
        assert sentence[-1] == "." and len(sentence) == place + 3
        seen.add(sum(i != nouns[0] for i in nouns))
        last_agrees += nouns[-1] == nouns[0]
        for i, w in enumerate(sentence[:place]):  # a relative clause opens for each verb before the main one
            assert w != "that" or sentence[i + 1] == "the"
        assert sentence[:place].count("that") == sum(w in verb for w in sentence[:place])
    assert seen == {1, 2, 3}
    assert 30 < last_agrees < 270
    assert len(agreement(1, 0, gen()).vocab) == len(s.vocab)
    assert 0.4 < s.plural.float().mean() < 0.6


def test_pixel_sequences():
    x, y, x_test, y_test = pixel_sequences(30, 20)
    images = data.images("mnist", train=30, test=20)
    assert x.shape == (30, 784, 1) and x_test.shape == (20, 784, 1)
    assert torch.equal(x[3, :, 0], images[0][3].flatten()) and torch.equal(y, images[1]) and torch.equal(y_test, images[3])
    p, _, p_test, _ = pixel_sequences(30, 20, permute=True)
    assert not torch.equal(p, x) and torch.equal(p.sort(1).values, x.sort(1).values)
    order = torch.randperm(784, generator=gen())
    assert torch.equal(p, x[:, order]) and torch.equal(p_test, x_test[:, order])
    small = pixel_sequences(30, 20, pool=2)[0]
    assert small.shape == (30, 196, 1)
    assert small[5, 15, 0].item() == pytest.approx(images[0][5, 0, 2:4, 2:4].mean().item())


@pytest.mark.parametrize(
    "call",
    [
        lambda: copy_memory(2, 0),
        lambda: adding(2, 1),
        lambda: latch(0, 5),
        lambda: recall(2, 7),
        lambda: recall(2, 54),
        lambda: dyck(2, 3, 2, length=7),
        lambda: dyck(2, (4, 3), 2),
        lambda: dyck(2, (9, 10), 2, length=10),
        lambda: agreement(2, (3, 2)),
        lambda: agreement(2, -1),
        lambda: pixel_sequences(10, 10, pool=0),
    ],
)
def test_bad_input(call):
    with pytest.raises(ValueError, match="expected"):
        call()
