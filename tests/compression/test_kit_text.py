"""Batches of characters that continue, and perplexity of models whose answer is known."""

import math

import pytest
import torch
from torch import nn

from dlatlas import data
from dlatlas.compression.kit.nets import CharLSTM
from dlatlas.compression.kit.text import char_batches, encode, king_james, perplexity


def test_real_text_train_then_test():
    train, test = king_james(1000, 500)
    assert train.startswith("In the beginning God created the heaven and the earth.\nAnd the earth was without form")
    whole = "\n".join(data.bible("kjv").values())
    assert train + test == whole[:1500]
    assert len(test) == 500


def test_encode_is_the_place_in_the_alphabet():
    assert encode("abca", "cab").tolist() == [1, 2, 0, 1]
    assert encode("", "a").shape == (0,)
    with pytest.raises(ValueError, match="'d'"):
        encode("abd", "abc")


def test_batches_are_consecutive_and_wrap_round():
    text = "".join(chr(97 + i) for i in range(26))
    stream = char_batches(text, 10, 3, torch.Generator().manual_seed(0))
    pieces = [next(stream) for _ in range(6)]
    for x, y in pieces:
        assert x.shape == y.shape == (10, 3)
        assert torch.equal((x + 1) % 26, y)
    joined = torch.cat([x for x, _ in pieces])
    assert torch.equal((joined[:-1] + 1) % 26, joined[1:])
    again = next(char_batches(encode(text, text), 10, 3, torch.Generator().manual_seed(0)))[0]
    assert torch.equal(again, pieces[0][0])
    starts = {int(next(char_batches(text, 2, 1))[0][0, 0]) for _ in range(200)}
    assert len(starts) > 20


class Fixed(nn.Module):
    """Gives the same distribution whatever it reads; counts how often it saw a new state."""

    def __init__(self, p):
        super().__init__()
        self.p, self.starts = torch.tensor(p), 0

    def forward(self, tokens, state):
        assert not self.training
        self.starts += state is None
        return self.p.log().expand(*tokens.shape, -1), "state"


def test_perplexity_of_a_fixed_distribution():
    model = Fixed([0.5, 0.25, 0.25])
    tokens = torch.tensor([0, 1, 0, 2, 0, 0, 1])  # two pieces of three; targets 1, 0 and 0, 0
    expected = math.exp(-(math.log(0.25) + 3 * math.log(0.5)) / 4)
    assert perplexity(model, tokens, batch=2, seq=1) == pytest.approx(expected)
    assert model.starts == 1
    assert model.training


def test_perplexity_does_not_depend_on_the_window():
    model, tokens = CharLSTM(7, 5), torch.randint(7, (100,))
    assert perplexity(model, tokens, batch=4, seq=3) == pytest.approx(perplexity(model, tokens, batch=4, seq=50), rel=1e-5)
    logits, _ = model(tokens[:-1, None])
    whole = nn.functional.cross_entropy(logits[:, 0], tokens[1:]).exp()
    assert perplexity(model, tokens, batch=1) == pytest.approx(whole.item(), rel=1e-5)


@pytest.mark.parametrize(
    "call",
    [
        lambda: king_james(0, 5),
        lambda: king_james(10**7, 5),
        lambda: char_batches("abc", 3, 1),
        lambda: char_batches("abc", 0, 1),
        lambda: char_batches(torch.zeros(3, 3), 1, 1),
        lambda: perplexity(CharLSTM(3, 2), torch.zeros(3, dtype=torch.long), batch=2),
    ],
)
def test_bad_input(call):
    with pytest.raises(ValueError, match="expected"):
        call()
