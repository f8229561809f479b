"""Chrono initialisation against the uniform distribution of memories, and the leaky units against NumPy."""

import copy

import numpy as np
import pytest
import torch
from scipy.stats import kstest
from torch import nn

from dlatlas.nlp.chrono import LeakyCell, chrono_init_, retention, warp
from dlatlas.nlp.kit.rnn import run

GATES = {"LSTM": ["i", "f", "g", "o"], "GRU": ["r", "z", "n"]}


def gates(rnn, suffix):
    """Bias of each gate, by name: the input's and the state's."""
    names = GATES["LSTM" if isinstance(rnn, nn.LSTM | nn.LSTMCell) else "GRU"]
    pair = [getattr(rnn, f"bias_{kind}{suffix}").detach().chunk(len(names)) for kind in ("ih", "hh")]
    return {name: (pair[0][k], pair[1][k]) for k, name in enumerate(names)}


def suffixes(rnn):
    return [name.removeprefix("bias_ih") for name, _ in rnn.named_parameters() if name.startswith("bias_ih")]


CASES = [
    nn.LSTM(3, 800, num_layers=2, bidirectional=True),
    nn.LSTMCell(3, 800),
    nn.LSTM(3, 800, proj_size=5),
    nn.GRU(3, 800, num_layers=2),
    nn.GRUCell(3, 800),
]


@pytest.mark.parametrize("rnn", CASES, ids=lambda rnn: type(rnn).__name__)
def test_memories_are_uniform_and_nothing_else_changes(rnn):
    old = copy.deepcopy(rnn)
    assert chrono_init_(rnn, 50.0, torch.Generator().manual_seed(1)) is rnn
    assert len(suffixes(rnn)) == {2: 4 if getattr(rnn, "bidirectional", False) else 2}.get(getattr(rnn, "num_layers", 1), 1)
    lstm, drawn = isinstance(rnn, nn.LSTM | nn.LSTMCell), []
    for suffix in suffixes(rnn):
        new, before = gates(rnn, suffix), gates(old, suffix)
        keep, zero = new["f" if lstm else "z"]
        assert not zero.any()
        # A gate is the sum of the two biases: its memory 1 + e^b lies between 2 and t_max.
        memory = 1 / (1 - torch.sigmoid((keep + zero).double()))
        assert kstest(memory.numpy(), "uniform", args=(2, 48)).pvalue > 0.01
        if lstm:
            assert torch.equal(new["i"][0] + new["i"][1], -(keep + zero))
        for name in ("g", "o") if lstm else ("r", "n"):
            assert all(torch.equal(a, b) for a, b in zip(new[name], before[name]))
        drawn.append(keep)
    assert all(not torch.equal(drawn[0], other) for other in drawn[1:])
    for (name, p), q in zip(rnn.named_parameters(), old.parameters()):
        assert name.startswith("bias") or torch.equal(p, q)


@pytest.mark.parametrize("cls", [nn.LSTMCell, nn.GRUCell])
def test_the_gate_that_keeps_is_the_one_that_is_set(cls):
    """With weights of zero a state decays by exactly the drawn factor."""
    cell = cls(2, 4).double()
    with torch.no_grad():
        for p in cell.parameters():
            p.zero_()
    chrono_init_(cell, 1000.0)
    start = torch.full((1, 4), 0.5, dtype=torch.float64)
    state, x = ((torch.zeros_like(start), start) if cls is nn.LSTMCell else start), torch.zeros(1, 2, dtype=torch.float64)
    for _ in range(20):
        state = cell(x, state)
    left = state[1] if cls is nn.LSTMCell else state
    bias = cell.bias_ih[4:8]
    torch.testing.assert_close(left, start * retention(bias, 20))
    assert left.min() > 0.2


def test_generator_decides():
    a, b, c = (chrono_init_(nn.LSTM(2, 5), 30, torch.Generator().manual_seed(s)).bias_ih_l0[5:10] for s in (3, 3, 4))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_retention():
    assert retention(0.0, 3).item() == pytest.approx(0.125)
    assert torch.equal(retention(torch.tensor([1.0, 5.0]), 0), torch.ones(2))
    b = torch.linspace(-3, 20, 24, dtype=torch.float64)
    np.testing.assert_allclose(retention(b, 50), (1 / (1 + np.exp(-b.numpy()))) ** 50, rtol=1e-9)
    # In single precision as well, where sigmoid(20) is 1 already.
    assert 1 - retention(torch.tensor(20.0), 10**7).item() == pytest.approx(1 - np.exp(-1e7 * np.exp(-20.0)), rel=1e-3)


@pytest.mark.parametrize("gated", [True, False])
def test_leaky_cell_against_numpy(gated):
    cell = LeakyCell(3, 4, gated).double()
    if not gated:
        cell.rate.data.normal_()
    x = torch.randn(2, 6, 3, dtype=torch.float64)
    out, last = run(cell, x)
    W, b = cell.candidate.weight.detach().numpy(), cell.candidate.bias.detach().numpy()
    for k in range(2):
        h = np.zeros(4)
        for t in range(6):
            both = np.concatenate([x[k, t].numpy(), h])
            rate = cell.rate.weight.detach().numpy() @ both + cell.rate.bias.detach().numpy() if gated else cell.rate.detach().numpy()
            g = 1 / (1 + np.exp(-rate))
            h = g * np.tanh(W @ both + b) + (1 - g) * h
            np.testing.assert_allclose(out[k, t].detach(), h, atol=1e-12)
    assert torch.equal(last, out[:, -1])
    out.sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in cell.parameters())


def test_a_leaky_unit_follows_a_uniform_warp_if_its_rate_does():
    """Slowed down by 8 with the rate divided by 8, a leaky unit without recurrence ends where it did, to first order in the rate."""
    x = torch.randn(1, 10, 2, dtype=torch.float64)
    cell = LeakyCell(2, 3, gated=False).double()
    with torch.no_grad():
        cell.candidate.weight[:, 2:] = 0
        cell.rate.fill_(torch.logit(torch.tensor(0.02)).item())
    fast = run(cell, x)[1]
    with torch.no_grad():
        cell.rate.fill_(torch.logit(torch.tensor(0.02 / 8)).item())
    slow = run(cell, warp(x, 8))[1]
    assert (slow - fast).norm() / fast.norm() < 0.03
    assert (run(cell, x)[1] - fast).norm() / fast.norm() > 0.5


def test_chrono_for_the_gated_unit():
    cell = chrono_init_(LeakyCell(2, 3000), 50.0)
    memory = 1 / torch.sigmoid(cell.rate.bias.detach().double())
    assert kstest(memory.numpy(), "uniform", args=(2, 48)).pvalue > 0.01


def test_warp():
    x = torch.arange(6.0).reshape(1, 3, 2)
    assert warp(x, [2, 0, 1])[0, :, 0].tolist() == [0, 0, 4]
    assert torch.equal(warp(x, 1), x)
    assert torch.equal(LeakyCell.warp(x, torch.tensor([1, 3, 1])), x[:, [0, 1, 1, 1, 2]])
    assert warp(torch.tensor([[7, 8]]), 2).tolist() == [[7, 7, 8, 8]]
    for factors in ([1, 2], [1, -1, 1], [1.0, 1.0, 1.0], 0, [[1, 1, 1]]):
        with pytest.raises(ValueError, match=r"factors|expected"):
            warp(x, factors)


def test_bad_calls():
    for t_max in (2.0, 1, float("nan")):
        with pytest.raises(ValueError, match="t_max must be larger than 2"):
            chrono_init_(nn.LSTM(2, 3), t_max)
    for rnn in (nn.RNN(2, 3), nn.Linear(2, 3), LeakyCell(2, 3, gated=False)):
        with pytest.raises(ValueError, match=type(rnn).__name__):
            chrono_init_(rnn, 10)
    with pytest.raises(ValueError, match="bias=False"):
        chrono_init_(nn.GRU(2, 3, bias=False), 10)
    with pytest.raises(ValueError, match="got -1"):
        retention(0.0, -1)
    with pytest.raises(ValueError, match="d_hidden=0"):
        LeakyCell(2, 0)
    with pytest.raises(ValueError, match=r"\[B, 2\]"):
        LeakyCell(2, 3)(torch.ones(1, 3))
