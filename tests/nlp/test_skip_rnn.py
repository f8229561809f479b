"""Skip RNN against a NumPy transcription with the gate's arithmetic written out, and its jumps against the step-by-step form."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from dlatlas.nlp.kit.rnn import run
from dlatlas.nlp.skip_rnn import SkipRNN, binarize, budget_loss, next_update_prob

F64 = torch.float64
CELLS = [nn.LSTMCell, nn.GRUCell]


def make(cls, d_in=2, hidden=5, bias=-1.0, spread=1.0, dtype=F64):
    """A unit whose increments are well below one half and differ from step to step."""
    unit = SkipRNN(cls(d_in, hidden), bias=bias).to(dtype)
    with torch.no_grad():
        unit.gate.weight.normal_(0, spread)
    return unit


def numpy_skip(unit, x, mask=None):
    """One sequence: outputs, updates and the last probability."""
    sigmoid, lstm = lambda v: 1 / (1 + np.exp(-v)), isinstance(unit.cell, nn.LSTMCell)
    Wi, Wh, bi, bh = (p.detach().numpy() for p in (unit.cell.weight_ih, unit.cell.weight_hh, unit.cell.bias_ih, unit.cell.bias_hh))
    w, b = unit.gate.weight.detach().numpy()[0], unit.gate.bias.item()
    H, u_tilde, outs, us = unit.cell.hidden_size, 1.0, [], []
    h, c = np.zeros(H), np.zeros(H)
    for t, x_t in enumerate(x):
        if mask is not None and not mask[t]:
            outs.append(np.zeros(H))
            us.append(0)
            continue
        update = u_tilde >= 0.5
        if update and lstm:
            i, f, g, o = (Wi @ x_t + bi + Wh @ h + bh).reshape(4, H)
            c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
            h = sigmoid(o) * np.tanh(c)
        elif update:
            (ri, zi, ni), (rh, zh, nh) = (Wi @ x_t + bi).reshape(3, H), (Wh @ h + bh).reshape(3, H)
            z = sigmoid(zi + zh)
            h = (1 - z) * np.tanh(ni + sigmoid(ri + rh) * nh) + z * h
        delta = sigmoid(w @ (c if lstm else h) + b)
        u_tilde = delta if update else u_tilde + min(delta, 1 - u_tilde)
        outs.append(h.copy())
        us.append(int(update))
    return np.stack(outs), np.array(us), u_tilde


@pytest.mark.parametrize("cls", CELLS)
@pytest.mark.parametrize("masked", [False, True])
def test_against_numpy(cls, masked):
    unit = make(cls)
    x = torch.randn(3, 40, 2, dtype=F64)
    mask = torch.rand(3, 40) < 0.7 if masked else None
    found = unit(x, mask=mask)
    skipped = 0
    for k in range(3):
        out, u, u_tilde = numpy_skip(unit, x[k].numpy(), None if mask is None else mask[k].numpy())
        np.testing.assert_allclose(found["out"][k].detach(), out, atol=1e-12)
        assert found["updates"][k].tolist() == u.tolist()
        assert found["state"][1][k].item() == pytest.approx(u_tilde)
        skipped += (u == 0).sum()
    assert 20 < skipped < 115 and found["updates"][:, 0].min() == (0 if masked and not mask[:, 0].all() else 1)


def test_probability_by_hand():
    """Increment 0.2: 1 (update), 0.2, 0.4, 0.6 (update), 0.2, ..."""
    u_tilde, seen = torch.ones(1), []
    for _ in range(7):
        u = binarize(u_tilde)
        seen.append((round(u_tilde.item(), 3), int(u)))
        u_tilde = next_update_prob(u_tilde, u, torch.full((1,), 0.2))
    assert seen == [(1.0, 1), (0.2, 0), (0.4, 0), (0.6, 1), (0.2, 0), (0.4, 0), (0.6, 1)]
    # The sum never exceeds one.
    assert next_update_prob(torch.tensor(0.45), torch.tensor(0.0), torch.tensor(0.9)).item() == 1


@pytest.mark.parametrize("delta", [0.07, 0.1249, 0.26, 0.3, 0.5, 0.9])
def test_number_of_skips_is_known_at_the_update(delta):
    unit = make(nn.GRUCell, bias=math.log(delta / (1 - delta)), spread=0.0)
    u = unit(torch.randn(1, 60, 2, dtype=F64))["updates"][0]
    gaps = u.nonzero()[:, 0].diff() - 1
    assert set(gaps.tolist()) == {math.ceil(round(0.5 / delta, 9)) - 1}


def test_one_half_updates_and_the_gradient_passes():
    u = torch.tensor([0.0, 0.4999, 0.5, 0.7, 1.0], requires_grad=True)
    out = binarize(u)
    assert out.tolist() == [0, 0, 1, 1, 1]
    (out * torch.arange(5.0)).sum().backward()
    assert u.grad.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("cls", CELLS)
def test_a_large_bias_is_the_plain_cell(cls):
    unit = SkipRNN(cls(2, 5), bias=20.0)
    x = torch.randn(3, 15, 2)
    found = unit(x)
    out, state = run(unit.cell, x)
    assert torch.equal(found["out"], out) and (found["updates"] == 1).all()
    assert torch.equal(*((s[0] if cls is nn.LSTMCell else s) for s in (found["state"][0], state)))


@pytest.mark.parametrize("cls", CELLS)
def test_state_is_copied_bit_by_bit_and_carried_on(cls):
    unit = make(cls)
    x = torch.randn(4, 30, 2, dtype=F64)
    found = unit(x)
    for t in range(1, 30):
        still = found["updates"][:, t] == 0
        assert torch.equal(found["out"][still, t], found["out"][still, t - 1])
    first = unit(x[:, :13])
    second = unit(x[:, 13:], first["state"])
    torch.testing.assert_close(torch.cat([first["out"], second["out"]], 1), found["out"])
    assert torch.equal(torch.cat([first["updates"], second["updates"]], 1), found["updates"])


@pytest.mark.parametrize("cls", CELLS)
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_jumping_is_the_same_and_really_jumps(cls, dtype):
    unit = make(cls, bias=-2.0, dtype=dtype).eval()
    calls = []
    unit.cell.register_forward_hook(lambda *_: calls.append(1))
    for _ in range(5):
        x = torch.randn(1, 80, 2, dtype=dtype)
        with torch.enable_grad():
            slow = unit(x)
        calls.clear()
        with torch.no_grad():
            first = unit(x[:, :33])
            second = unit(x[:, 33:], first["state"])
            whole = unit(x)
        assert len(calls) == 2 * int(slow["updates"].sum()) < 100
        assert torch.equal(whole["updates"], slow["updates"])
        torch.testing.assert_close(whole["out"], slow["out"])
        torch.testing.assert_close(whole["state"], slow["state"])
        torch.testing.assert_close(torch.cat([first["out"], second["out"]], 1), slow["out"])
        assert torch.equal(torch.cat([first["updates"], second["updates"]], 1), slow["updates"])


def test_gradient_of_the_gate_against_a_hand_made_chain():
    """Three steps, one skipped in between: d u3 / d delta1 is 2 (the increment is added twice), through the rounding."""
    unit = make(nn.GRUCell, bias=-1.0, spread=0.0)  # increment 0.269: update, skip, update
    found = unit(torch.randn(1, 3, 2, dtype=F64))
    assert found["updates"][0].tolist() == [1, 0, 1]
    found["updates"][0, 2].backward()
    delta = 1 / (1 + math.e)
    # u3 = u2~ + min(delta2, 1 - u2~) with u2~ = delta1, and u2 = u2~ by the straight-through step:
    # u3~ = u2 delta2 + (1 - u2)(u2~ + delta2); d/du2 adds delta2 - (u2~ + delta2) = -delta1.
    slope = (1 + 1 - delta) * delta * (1 - delta)
    assert unit.gate.bias.grad.item() == pytest.approx(slope)


def test_budget():
    u = torch.tensor([[1.0, 0, 1, 1], [1, 0, 0, 0]], requires_grad=True)
    assert budget_loss(u, cost=0.5).item() == pytest.approx(0.5 * (3 + 1) / 2)
    mask = torch.tensor([[True, True, True, False], [True, True, True, True]])
    assert budget_loss(u, mask, cost=0.5).item() == pytest.approx(0.5 * (2 + 1) / 2)
    assert budget_loss(u).item() == pytest.approx(2e-4)
    budget_loss(u, cost=1.0).backward()
    assert (u.grad == 0.5).all()


def test_everything_learns():
    unit = make(nn.LSTMCell)
    found = unit(torch.randn(2, 20, 2, dtype=F64))
    (found["out"].sum() + budget_loss(found["updates"], cost=1.0)).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in unit.parameters())
    assert SkipRNN(nn.GRUCell(2, 3)).gate.bias.item() == 1


def test_bad_calls():
    with pytest.raises(ValueError, match="got RNNCell"):
        SkipRNN(nn.RNNCell(2, 3))
    unit = SkipRNN(nn.GRUCell(2, 3))
    for shape in ((4, 2), (1, 0, 2), (1, 4, 3)):
        with pytest.raises(ValueError, match=r"\[B, T >= 1, 2\]"):
            unit(torch.ones(shape))
    for mask in (torch.ones(1, 3, dtype=torch.bool), torch.ones(1, 4), torch.zeros(1, 4, dtype=torch.bool)):
        with pytest.raises(ValueError, match="bool mask"):
            unit(torch.ones(1, 4, 2), mask=mask)
    with pytest.raises(ValueError, match="must not be negative"):
        budget_loss(torch.ones(1, 2), cost=-1.0)
    with pytest.raises(ValueError, match=r"\[B, T\]"):
        budget_loss(torch.ones(1, 2), torch.ones(1, 3))
