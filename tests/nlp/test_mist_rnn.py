"""MIST against a NumPy transcription that keeps all states, and its shortest paths against enumeration."""

import itertools

import numpy as np
import pytest
import torch

from dlatlas.nlp.kit.rnn import run
from dlatlas.nlp.mist_rnn import MISTRNN, MISTCell, shortest_path


def numpy_mist(cell, x):
    """One sequence [T, d_in]: states and attention, with every state kept."""
    n, H = len(cell.delays), cell.d_hidden
    V, b, G, W = (p.detach().numpy() for p in (cell.input.weight, cell.input.bias, cell.gates.weight, cell.mix.weight))
    states, attention = {}, []
    for t in range(len(x)):
        past = lambda lag: states.get(t - lag, np.zeros(H))  # noqa: B023, E731
        drive, seen = V @ x[t] + b, G @ past(1)
        logits = drive[:n] + seen[:n]
        a = np.exp(logits) / np.exp(logits).sum()
        r = 1 / (1 + np.exp(-(drive[n : n + H] + seen[n:])))
        mixed = r * sum(a[i] * past(2**i) for i in range(n))
        states[t] = np.tanh(drive[n + H :] + W @ mixed)
        attention.append(a)
    return np.stack(list(states.values())), np.stack(attention)


@pytest.mark.parametrize("n_delays", [1, 2, 4])
def test_against_numpy(n_delays):
    rnn = MISTRNN(3, 5, n_delays).double()
    x = torch.randn(2, 25, 3, dtype=torch.float64)
    out, attention = rnn(x)
    assert attention.shape == (2, 25, n_delays)
    for k in range(2):
        states, a = numpy_mist(rnn.cell, x[k].numpy())
        np.testing.assert_allclose(out[k].detach(), states, atol=1e-12)
        np.testing.assert_allclose(attention[k].detach(), a, atol=1e-12)


def test_cell_and_layer_agree_and_the_history_is_the_last_states_newest_first():
    rnn = MISTRNN(3, 5, 4).double()
    x = torch.randn(2, 20, 3, dtype=torch.float64)
    out, history = run(rnn.cell, x)
    torch.testing.assert_close(out, rnn(x)[0])
    assert torch.equal(history, out.flip(1)[:, :8])
    first, middle = run(rnn.cell, x[:, :7])
    torch.testing.assert_close(torch.cat([first, run(rnn.cell, x[:, 7:], middle)[0]], 1), out)


def test_one_delay_is_a_gated_network():
    rnn = MISTRNN(3, 5, 1).double()
    x = torch.randn(2, 6, 3, dtype=torch.float64)
    out, attention = rnn(x)
    assert torch.equal(attention, torch.ones(2, 6, 1, dtype=torch.float64))
    cell, h = rnn.cell, torch.zeros(2, 5, dtype=torch.float64)
    for t in range(6):
        _, r, c = cell.input(x[:, t]).split([1, 5, 5], 1)
        h = torch.tanh(c + cell.mix(torch.sigmoid(r + cell.gates(h)[:, 1:]) * h))
        torch.testing.assert_close(out[:, t], h)


def test_the_gradient_takes_the_short_way():
    """With small weights the shortest path dominates: one step of decay for a power of two, more for lags with more ones."""
    torch.manual_seed(0)
    rnn = MISTRNN(2, 6, 5).double()
    with torch.no_grad():
        rnn.cell.mix.weight.mul_(1e-12)  # so small that the many orders of a path do not count
        rnn.cell.gates.weight.zero_()
    x = torch.randn(1, 40, 2, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(rnn(x)[0][0, -1].sum(), x)
    size = grad[0].norm(dim=1).flip(0).log10()  # by lag
    for lag in range(1, 32):
        decades = (size[0] - size[lag]).item() / (size[0] - size[1]).item()
        assert round(decades) == lag.bit_count()


def test_shortest_path():
    for tau in range(32):
        assert shortest_path(tau, [1, 2, 4, 8, 16]) == tau.bit_count()
    assert shortest_path(100, [1]) == 100 and shortest_path(100, range(1, 9)) == 13
    for tau in range(1, 12):
        ways = [n for n in range(1, tau + 1) if any(sum(w) == tau for w in itertools.combinations_with_replacement([1, 4, 5], n))]
        assert shortest_path(tau, [1, 4, 5]) == min(ways)
    assert shortest_path(8, [1, 4, 5]) == 2  # greedily it would be 4
    assert shortest_path(255, [2**i for i in range(8)]) == 8


def test_gradients():
    rnn = MISTRNN(2, 3, 3).double()
    assert torch.autograd.gradcheck(lambda x: rnn(x), torch.randn(1, 6, 2, dtype=torch.float64, requires_grad=True))
    longer = MISTRNN(2, 2, 4).double()  # more steps than the longest delay
    assert torch.autograd.gradcheck(lambda x: longer(x)[0], torch.randn(1, 11, 2, dtype=torch.float64, requires_grad=True))
    rnn(torch.randn(2, 6, 2, dtype=torch.float64))[0].sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in rnn.parameters())


def test_bad_calls():
    for bad in ({"d_in": 0}, {"d_hidden": 0}, {"n_delays": 0}):
        with pytest.raises(ValueError, match="sizes of at least 1"):
            MISTCell(**{"d_in": 2, "d_hidden": 3} | bad)
    with pytest.raises(ValueError, match=r"\[B, T >= 1, 2\]"):
        MISTRNN(2, 3)(torch.ones(1, 4, 3))
    cell = MISTCell(2, 3, 3)
    with pytest.raises(ValueError, match=r"\[B, 2\]"):
        cell(torch.ones(1, 3))
    with pytest.raises(ValueError, match=r"history \(1, 4, 3\), got \(1, 8, 3\)"):
        cell(torch.ones(1, 2), torch.ones(1, 8, 3))
    for tau, delays, message in (
        (-1, [1], "lag >= 0"),
        (3, [], "delays >= 1"),
        (3, [0, 1], "delays >= 1"),
        (3, [2], "no sum of the delays"),
    ):
        with pytest.raises(ValueError, match=message):
            shortest_path(tau, delays)
