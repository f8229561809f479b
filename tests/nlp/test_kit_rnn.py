"""Running cells over time against torch's layers, masks, the language model and its perplexity."""

import math

import pytest
import torch
from torch import nn

from dlatlas.nlp.kit.rnn import RNNLM, LMHead, Recurrent, detach, gradient_norms, perplexity, run


@pytest.mark.parametrize("kind", ["RNN", "GRU", "LSTM"])
def test_run_equals_the_layer(kind):
    torch.manual_seed(0)
    layer = getattr(nn, kind)(3, 5, batch_first=True)
    cell = getattr(nn, f"{kind}Cell")(3, 5)
    cell.load_state_dict({k.removesuffix("_l0"): v for k, v in layer.state_dict().items()})
    x = torch.randn(4, 6, 3)
    out, state = run(cell, x)
    expected, last = layer(x)
    torch.testing.assert_close(out, expected)
    first, half = run(cell, x[:, :2])
    second, again = Recurrent(cell)(x[:, 2:], half)
    torch.testing.assert_close(torch.cat([first, second], 1), expected)
    for got, same, want in zip(*((s if kind == "LSTM" else (s,)) for s in (state, again, last))):
        torch.testing.assert_close(got, want[0])
        torch.testing.assert_close(same, want[0])


def test_masked_steps_keep_the_state():
    torch.manual_seed(0)
    cell, x = nn.LSTMCell(3, 5), torch.randn(3, 4, 3)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 1, 0, 1]], dtype=torch.bool)
    out, (h, c) = run(cell, x, mask=mask)
    for b in range(3):
        alone, state = run(cell, x[b : b + 1, mask[b]])
        torch.testing.assert_close(out[b, mask[b]], alone[0])
        torch.testing.assert_close(h[b], state[0][0])
        torch.testing.assert_close(c[b], state[1][0])
    assert (out[~mask] == 0).all()


def test_any_cell_and_detach():
    class Sum(nn.Module):
        def forward(self, x, state):
            total, count = (torch.zeros_like(x), None) if state is None else state
            return total + x, (total + x, count)

    x = torch.randn(2, 3, 4, requires_grad=True)
    out, state = run(Sum(), x)
    torch.testing.assert_close(out, x.cumsum(1))
    cut = detach(state)
    assert state[0].requires_grad and not cut[0].requires_grad and cut[1] is None


def test_gradient_norms_of_a_linear_recurrence():
    a = 0.5

    def layer(x):
        h, out = torch.zeros(x.shape[0], x.shape[2]), []
        for x_t in x.unbind(1):
            h = a * h + x_t
            out.append(h)
        return {"out": torch.stack(out, 1)}

    norms = gradient_norms(layer, torch.randn(400, 5, 3), torch.Generator().manual_seed(0))
    torch.testing.assert_close(norms / norms[-1], a ** torch.arange(4.0, -1, -1))
    assert norms[-1].item() == pytest.approx(1, abs=0.1)  # ||I||_F^2 / H
    assert gradient_norms(nn.GRUCell(3, 4), torch.randn(2, 5, 3)).shape == (5,)


def test_rnnlm_shapes_tying_and_parts():
    torch.manual_seed(0)
    tokens = torch.randint(11, (2, 7))
    lm = RNNLM(11, 6, nn.LSTM(6, 6, batch_first=True), dropout=0.5)
    assert lm.head.linear.weight is lm.embed.weight
    lm.eval()
    logits, state = lm(tokens)
    h, _ = lm.layer(lm.embed(tokens))
    torch.testing.assert_close(logits, h @ lm.embed.weight.T + lm.head.linear.bias)
    assert len(state) == 2
    lm.train()
    assert not torch.equal(lm(tokens)[0], logits)
    loose = RNNLM(11, 6, nn.GRUCell(6, 4), tie=False, d_out=4)
    assert loose.head.linear.weight is not loose.embed.weight
    assert loose(tokens)[0].shape == (2, 7, 11)
    assert isinstance(RNNLM(11, 6, nn.GRUCell(6, 6), head=nn.Linear(6, 3)).head, nn.Linear)


def test_perplexity_carries_the_state():
    torch.manual_seed(0)
    lm = RNNLM(7, 5, nn.GRU(5, 5, batch_first=True), dropout=0.3)
    tokens = torch.randint(7, (1, 25))
    windows = [(tokens[:, i : i + 6], tokens[:, i + 1 : i + 7]) for i in range(0, 24, 6)]
    assert perplexity(lm, windows) == pytest.approx(perplexity(lm, [(tokens[:, :-1], tokens[:, 1:])]), rel=1e-5)
    assert perplexity(lm, windows, stateful=False) != pytest.approx(perplexity(lm, windows), rel=1e-5)
    assert lm.training
    fixed = lambda x, state: (torch.tensor([0.5, 0.25, 0.25]).log().expand(*x.shape, 3), None)  # noqa: E731
    module = type("Fixed", (nn.Module,), {"forward": lambda self, x, s: fixed(x, s)})()
    x = torch.tensor([[0, 1, 0, 2]])
    assert perplexity(module, [(x, x)]) == pytest.approx(math.exp(-(2 * math.log(0.5) + 2 * math.log(0.25)) / 4))


@pytest.mark.parametrize(
    "call",
    [
        lambda: run(nn.GRUCell(3, 4), torch.zeros(2, 0, 3)),
        lambda: run(nn.GRUCell(3, 4), torch.zeros(2, 3)),
        lambda: run(nn.GRUCell(3, 4), torch.zeros(2, 2, 3), mask=torch.ones(2, 3, dtype=torch.bool)),
        lambda: run(nn.GRUCell(3, 4), torch.zeros(2, 2, 3), mask=torch.ones(2, 2)),
        lambda: run(nn.GRUCell(3, 4), torch.zeros(2, 2, 3), mask=torch.zeros(2, 2, dtype=torch.bool)),
        lambda: LMHead(3, 5, nn.Embedding(5, 4)),
        lambda: RNNLM(5, 3, nn.GRU(3, 3)),
        lambda: perplexity(RNNLM(5, 3, nn.GRU(3, 3, batch_first=True)), []),
    ],
)
def test_bad_input(call):
    with pytest.raises(ValueError, match="expected"):
        call()


def test_dropout_in_range():
    with pytest.raises(ValueError, match="dropout"):
        RNNLM(5, 3, nn.GRU(3, 3, batch_first=True), dropout=1.0)
