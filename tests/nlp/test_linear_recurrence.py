"""The parallel recurrence against a loop, a filter of SciPy and closed forms; the GILR-LSTM against a step-by-step NumPy transcription."""

import numpy as np
import pytest
import torch
from scipy.signal import lfilter

from dlatlas.nlp.linear_recurrence import GILRLSTM, linear_recurrence

F64 = torch.float64


def loop(a, b, h):
    out = []
    for t in range(a.shape[1]):
        h = a[:, t] * h + b[:, t]
        out.append(h)
    return torch.stack(out, 1)


# Around one piece of 32, around 32 pieces and beyond, where the recurrence over the pieces is cut in turn.
@pytest.mark.parametrize("T", [1, 2, 31, 32, 33, 64, 65, 1000, 1024, 1025, 1057])
def test_against_the_loop(T):
    a, b, h0 = torch.randn(2, T, 3, dtype=F64), torch.randn(2, T, 3, dtype=F64), torch.randn(2, 3, dtype=F64)
    a = 1.1 * torch.tanh(a)  # some decays above one, some negative
    torch.testing.assert_close(linear_recurrence(a, b, h0), loop(a, b, h0), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(linear_recurrence(a, b), loop(a, b, torch.zeros_like(h0)), rtol=1e-9, atol=1e-9)


def test_constant_decay_is_a_filter():
    b = torch.randn(3, 200, 4, dtype=F64)
    ours = linear_recurrence(torch.full_like(b, 0.9), b)
    np.testing.assert_allclose(ours, lfilter([1.0], [1.0, -0.9], b.numpy(), axis=1), atol=1e-12)


def test_limits():
    b = torch.randn(2, 77, 3, dtype=F64)
    assert torch.equal(linear_recurrence(torch.zeros_like(b), b), b)
    torch.testing.assert_close(linear_recurrence(torch.ones_like(b), b), b.cumsum(1))
    a = torch.rand(2, 77, 3, dtype=F64)
    a[:, 40] = 0  # a closed form by division would fail here
    h = linear_recurrence(a, b, torch.full((2, 3), 1e200, dtype=F64))
    torch.testing.assert_close(h[:, 40:], loop(a[:, 40:], b[:, 40:], torch.zeros(2, 3, dtype=F64)))
    tiny = linear_recurrence(torch.full((1, 5000, 1), 1e-3), torch.ones(1, 5000, 1))  # products underflow
    torch.testing.assert_close(tiny[0, 10:, 0], torch.full((4990,), 1 / (1 - 1e-3)))


def test_a_cut_sequence_with_its_state_carried_on():
    a, b = torch.rand(2, 150, 3, dtype=F64), torch.randn(2, 150, 3, dtype=F64)
    first = linear_recurrence(a[:, :70], b[:, :70])
    second = linear_recurrence(a[:, 70:], b[:, 70:], first[:, -1])
    torch.testing.assert_close(torch.cat([first, second], 1), linear_recurrence(a, b))


@pytest.mark.parametrize("T", [1, 3, 40])
def test_gradients(T):
    a, b, h0 = (torch.randn(*shape, dtype=F64, requires_grad=True) for shape in ((1, T, 2), (1, T, 2), (1, 2)))
    assert torch.autograd.gradcheck(linear_recurrence, (a, b, h0))
    if T < 40:
        assert torch.autograd.gradgradcheck(linear_recurrence, (a, b, h0))


def test_gradient_against_the_loops_on_a_long_sequence():
    leaves = [torch.randn(2, 1100, 3, dtype=F64).tanh(), torch.randn(2, 1100, 3, dtype=F64), torch.randn(2, 3, dtype=F64)]
    weight = torch.randn(2, 1100, 3, dtype=F64)
    grads = []
    for f in (linear_recurrence, loop):
        fresh = [v.clone().requires_grad_() for v in leaves]
        grads.append(torch.autograd.grad((f(*fresh) * weight).sum(), fresh))
    for ours, theirs in zip(*grads):
        torch.testing.assert_close(ours, theirs)


def test_arguments_stay_as_they_were_and_need_not_be_contiguous():
    a, b = torch.rand(3, 2, 70, dtype=F64).transpose(1, 2), torch.randn(70, 3, 2, dtype=F64).transpose(0, 1)
    before = a.clone(), b.clone()
    torch.testing.assert_close(linear_recurrence(a, b), loop(*before, torch.zeros(3, 2, dtype=F64)))
    assert torch.equal(a, before[0]) and torch.equal(b, before[1])


def numpy_gilr(layer, x, surrogate, c):
    """One sequence [T, d_in], step by step."""
    n = layer.d_hidden
    V, b, W = (p.detach().numpy() for p in (layer.input.weight, layer.input.bias, layer.recurrent.weight))
    sigmoid, out = lambda v: 1 / (1 + np.exp(-v)), []
    for x_t in x:
        g, f, i, o, j, z = (V @ x_t + b).reshape(6, n)
        wf, wi, wo, wz = (W @ surrogate).reshape(4, n)  # the state of the step before
        g = sigmoid(g)
        surrogate = g * surrogate + (1 - g) * np.tanh(j)
        c = sigmoid(f + wf) * c + sigmoid(i + wi) * np.tanh(z + wz)
        out.append(sigmoid(o + wo) * c)
    return np.stack(out), surrogate, c


def test_gilr_lstm_against_numpy_and_its_state():
    layer = GILRLSTM(3, 4).double()
    x, state = torch.randn(2, 50, 3, dtype=F64), (torch.randn(2, 4, dtype=F64), torch.randn(2, 4, dtype=F64))
    out, (surrogate, c) = layer(x, state)
    for k in range(2):
        h_k, s_k, c_k = numpy_gilr(layer, x[k].numpy(), state[0][k].numpy(), state[1][k].numpy())
        np.testing.assert_allclose(out[k].detach(), h_k, atol=1e-12)
        np.testing.assert_allclose(surrogate[k].detach(), s_k, atol=1e-12)
        np.testing.assert_allclose(c[k].detach(), c_k, atol=1e-12)
    first, middle = layer(x[:, :20])
    torch.testing.assert_close(torch.cat([first, layer(x[:, 20:], middle)[0]], 1), layer(x)[0])
    assert layer(x)[0].grad_fn is not None
    layer(x)[0].sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in layer.parameters())


def test_chrono_start():
    layer = GILRLSTM(3, 4000)
    before = layer.input.bias.detach().clone()
    assert layer.chrono_(100.0, torch.Generator().manual_seed(0)) is layer
    g, f, i, *rest = layer.input.bias.detach().chunk(6)
    for bias in (g, f):
        times = bias.exp()
        assert times.min() >= 1 and times.max() <= 99 and times.mean() == pytest.approx(50, rel=0.03)
    assert torch.equal(i, -f) and not torch.equal(g, f)
    assert all(torch.equal(new, old) for new, old in zip(rest, before.chunk(6)[3:]))


@pytest.mark.parametrize(
    ("a", "b", "h", "message"),
    [
        ((2, 3, 4), (2, 3, 5), None, r"got \(2, 3, 4\) and \(2, 3, 5\)"),
        ((2, 0, 4), (2, 0, 4), None, "T >= 1"),
        ((3, 4), (3, 4), None, "T >= 1"),
        ((2, 3, 4), (2, 3, 4), (2, 3), r"initial state \(2, 4\)"),
    ],
)
def test_bad_shapes(a, b, h, message):
    with pytest.raises(ValueError, match=message):
        linear_recurrence(torch.ones(a), torch.ones(b), None if h is None else torch.ones(h))


def test_bad_arguments():
    with pytest.raises(ValueError, match="one floating type"):
        linear_recurrence(torch.ones(1, 2, 3), torch.ones(1, 2, 3, dtype=F64))
    with pytest.raises(ValueError, match="one floating type"):
        linear_recurrence(torch.ones(1, 2, 3, dtype=torch.long), torch.ones(1, 2, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="d_hidden=0"):
        GILRLSTM(3, 0)
    with pytest.raises(ValueError, match=r"\[B, T >= 1, 3\]"):
        GILRLSTM(3, 4)(torch.ones(2, 5, 4))
    with pytest.raises(ValueError, match="t_max"):
        GILRLSTM(3, 4).chrono_(2.0)
