"""Alternating quantisation against brute force and a plain transcription; packed products against dense ones; the LSTM against torch's."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import linear

from dlatlas.compression import alternating
from dlatlas.compression.alternating import MultiBitLinear, MultiBitLSTM, PackedMultiBit, alternating_quantize, dequantize, quantize_rows
from dlatlas.compression.kit import kernels


def error(w, alpha, codes):
    return (w - dequantize(alpha, codes)).square().sum(1)


def plain(w, bits, iters):
    """One row, as the paper tells it: loops, least squares by NumPy, nearest by search through all sums."""
    w = w.numpy()
    residual, alpha, codes = w.copy(), [], []
    for _ in range(bits):
        alpha.append(np.abs(residual).mean())
        codes.append(np.where(residual >= 0, 1.0, -1.0))
        residual = residual - alpha[-1] * codes[-1]
    for _ in range(iters):
        alpha = np.linalg.lstsq(np.stack(codes, 1), w, rcond=None)[0]
        sums = {signs: float(np.dot(signs, alpha)) for signs in itertools.product((-1, 1), repeat=bits)}
        chosen = [min(sums, key=lambda signs, x=x: abs(sums[signs] - x)) for x in w]
        codes = np.array(chosen, float).T
    return float(((w - np.dot(alpha, codes)) ** 2).sum())


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("iters", [0, 1, 2, 5])
def test_the_error_is_that_of_the_plain_algorithm(bits, iters):
    w = torch.randn(6, 40, dtype=torch.float64)
    found = error(w, *alternating_quantize(w, bits, iters))
    expected = [plain(row, bits, iters) for row in w]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-12)


def test_one_bit_is_the_mean_and_the_sign():
    w = torch.randn(5, 33, dtype=torch.float64)
    w[0, 0] = 0.0
    alpha, codes = alternating_quantize(w, 1)
    torch.testing.assert_close(alpha[:, 0], w.abs().mean(1), rtol=1e-7, atol=0)
    assert torch.equal(codes[:, 0], torch.where(w >= 0, 1.0, -1.0).double())


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_rounds_never_raise_the_error_and_scales_are_not_negative(bits):
    for w in (
        torch.randn(50, 64, dtype=torch.float64),
        torch.rand(50, 64, dtype=torch.float64),
        torch.randn(50, 64, dtype=torch.float64) ** 5,
    ):
        errors = torch.stack([error(w, *alternating_quantize(w, bits, iters)) for iters in range(6)])
        assert (errors.diff(dim=0) <= 1e-9 * errors[0]).all()
        assert errors[5].mean() < (1.0 if w.min() > 0 else 0.97) * errors[0].mean()  # for even weights the start is nearly best
        alpha, codes = alternating_quantize(w, bits)
        assert (alpha >= 0).all()
        assert (codes.abs() == 1).all()


def test_brute_force_is_never_beaten_and_sometimes_reached():
    w = torch.randn(30, 5, dtype=torch.float64)
    best = torch.full((30,), torch.inf, dtype=torch.float64)
    for pair in itertools.combinations_with_replacement(itertools.product((-1.0, 1.0), repeat=5), 2):
        B = torch.tensor(pair, dtype=torch.float64).T
        fit = torch.linalg.lstsq(B, w.T, driver="gelsd").solution
        best = torch.minimum(best, (w.T - B @ fit).square().sum(0))
    found = error(w, *alternating_quantize(w, 2, 10))
    assert (found >= best - 1e-9).all()
    assert (found <= best + 1e-9).float().mean() > 0.3


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_rows_that_are_levels_already_and_degenerate_rows(bits):
    w = torch.zeros(5, 70, dtype=torch.float64)
    w[1] = 3.0
    w[2] = torch.randn(70, dtype=torch.float64).sign()
    w[3, 7] = -2.0
    alpha, codes = alternating_quantize(w, bits)
    assert alpha[0].abs().max() == 0
    found = error(w, alpha, codes)
    assert torch.isfinite(found).all()
    assert found[[0, 1, 2, 4]].max() < 1e-12
    if bits > 1:  # two codes that are equal almost everywhere: 0 and the one entry
        assert found[3] < 1e-12


def test_equal_codes_give_the_shortest_solution():
    codes = torch.tensor([[[1.0, 1, -1], [1, 1, -1]]], dtype=torch.float64)
    alpha = alternating._least_squares(torch.tensor([[2.0, 4, -3]], dtype=torch.float64), codes)
    torch.testing.assert_close(alpha, torch.tensor([[1.5, 1.5]], dtype=torch.float64), rtol=1e-6, atol=0)


def test_a_negative_scale_is_turned_round():
    codes = torch.tensor([[[1.0, 1, 1], [1, -1, 1]]], dtype=torch.float64)  # w = 2 b_1 - b_2
    alpha = alternating._least_squares(torch.tensor([[1.0, 3, 1]], dtype=torch.float64), codes)
    torch.testing.assert_close(alpha, torch.tensor([[2.0, 1.0]], dtype=torch.float64), rtol=1e-6, atol=0)


# --- the C library finds the same codes ---------------------------------------------------------------------------------------------


def needs_c():
    if kernels.backend() != "c":
        pytest.skip("no C compiler")


# Seven entries in sixteen levels would be fitted exactly, with ties that rounding decides.
@pytest.mark.parametrize(("bits", "n"), [(1, 1), (2, 7), *itertools.product([1, 2, 3, 4], [63, 64, 65, 500])])
@pytest.mark.parametrize("iters", [0, 1, 3])
def test_the_library_finds_the_same_codes(bits, n, iters):
    needs_c()
    crossing = 1 + 1e-3 * torch.randn(5, n)  # the third greedy scale is larger than the second: its cut would lie beyond its interval
    crossing[:, 0], crossing[:, -1] = 0.0, 2.0
    w = torch.cat(
        [
            crossing,
            torch.randn(20, n),
            torch.rand(10, n) - 0.2,
            torch.randn(10, n) ** 5,
            torch.eye(n)[:1] * 7,
            torch.zeros(1, n),
            torch.ones(1, n),
            -torch.ones(1, n),
        ]
    )
    alpha, codes = alternating_quantize(w.double(), bits, iters)
    c_alpha, c_codes = kernels.alternating(w, bits, iters)
    torch.testing.assert_close(c_alpha, alpha.float(), rtol=1e-5, atol=1e-6)
    unpacked = kernels.unpack_bits(c_codes, n).double()
    # Where two levels coincide, different codes have one value; elsewhere the codes are the same ones.
    torch.testing.assert_close(dequantize(alpha, unpacked), dequantize(alpha, codes), rtol=1e-5, atol=1e-5)
    if n > 100:
        assert torch.equal(unpacked[:40], codes[:40])
    torch.testing.assert_close(kernels.alternating_values(w, bits, iters), dequantize(alpha, codes).float(), rtol=1e-5, atol=1e-5)


# --- layers --------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["chosen", "numpy"])
def backend(request, monkeypatch):
    if request.param == "numpy":
        monkeypatch.setattr(kernels, "load", lambda: None)
    return request.param


@pytest.mark.parametrize(("bits_w", "bits_a"), [(1, 1), (2, 2), (3, 2), (4, 4)])
@pytest.mark.parametrize("n", [1, 64, 65, 200])
def test_packed_products_are_dense_products(backend, bits_w, bits_a, n):
    layer = MultiBitLinear(n, 11, bits_w, bits_a)
    x = torch.randn(5, n)
    packed = layer.pack()
    W, X = (dequantize(*alternating_quantize(t.detach().double(), b)) for t, b in ((layer.weight, bits_w), (x, bits_a)))
    expected = (X @ W.T + layer.bias.double()).float().detach()
    torch.testing.assert_close(packed(x), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(packed(x), layer(x).detach(), rtol=1e-4, atol=1e-4)
    assert packed.storage_bits() == 11 * bits_w * (64 * -(-n // 64) + 32)
    assert not list(packed.parameters())


def test_without_bias(backend):
    layer = MultiBitLinear(70, 3, bias=False, iters=0)
    x = torch.randn(2, 70)
    torch.testing.assert_close(layer.pack()(x), layer(x).detach(), rtol=1e-4, atol=1e-4)


def test_gradients_pass_straight_through(backend):
    layer = MultiBitLinear(20, 4)
    x = torch.randn(6, 20, requires_grad=True)
    out = layer(x)
    W, X = quantize_rows(layer.weight, 2).detach().requires_grad_(), quantize_rows(x, 2).detach().requires_grad_()
    torch.testing.assert_close(out, linear(X, W, layer.bias))
    out.pow(2).sum().backward()
    linear(X, W, layer.bias.detach()).pow(2).sum().backward()
    torch.testing.assert_close(layer.weight.grad, W.grad)
    torch.testing.assert_close(x.grad, X.grad)


def test_leading_axes_and_convolutions():
    layer = MultiBitLinear(20, 4)
    x = torch.randn(3, 5, 20)
    torch.testing.assert_close(layer(x)[1, 2], layer(x[1, 2][None])[0])
    w = torch.randn(6, 3, 5, 5)
    assert all(len(row.unique()) <= 4 for row in quantize_rows(w, 2).flatten(1))


def test_clipping_and_sharing():
    dense = nn.Linear(5, 3)
    layer = MultiBitLinear.from_dense(dense, 3, 1)
    assert layer.weight is dense.weight
    nn.init.constant_(layer.weight, 7.0)
    layer.clip_()
    assert dense.weight.eq(1).all()


@pytest.mark.parametrize("layers", [1, 2])
def test_the_lstm_is_torchs_but_for_the_rounding(monkeypatch, layers):
    lstm = nn.LSTM(9, 12, layers)
    x = torch.randn(7, 4, 9)
    state = (torch.randn(layers, 4, 12), torch.randn(layers, 4, 12))
    quantised = MultiBitLSTM(lstm, 4, 4)
    assert quantised.lstm.weight_hh_l0 is lstm.weight_hh_l0
    coarse, _ = MultiBitLSTM(lstm, 1, 1)(x, state)
    fine, _ = quantised(x, state)
    exact, _ = lstm(x, state)
    assert (fine - exact).abs().mean() < 0.4 * (coarse - exact).abs().mean()
    asked = []
    monkeypatch.setattr(alternating, "quantize_rows", lambda t, bits, iters: asked.append((tuple(t.shape), bits)) or t)
    out, (h, c) = MultiBitLSTM(lstm, 3, 2)(x, state)
    expected, (h_expected, c_expected) = lstm(x, state)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(h, h_expected)
    torch.testing.assert_close(c, c_expected)
    torch.testing.assert_close(MultiBitLSTM(lstm)(x)[0], lstm(x)[0])
    # Once a layer: both matrices and the input; then the state at every step.
    first = [((48, 9), 3), ((48, 12), 3), ((28, 9), 2), *[((4, 12), 2)] * 7]
    assert asked[: len(first)] == first


def test_the_lstm_learns_through_its_rounding():
    model = MultiBitLSTM(nn.LSTM(3, 8), 2, 2)
    out, _ = model(torch.randn(5, 2, 3))
    out.sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.parametrize(
    "call",
    [
        lambda: alternating_quantize(torch.ones(3), 2),
        lambda: alternating_quantize(torch.ones(3, 0), 2),
        lambda: alternating_quantize(torch.ones(3, 2, dtype=torch.long), 2),
        lambda: alternating_quantize(torch.ones(3, 2), 0),
        lambda: alternating_quantize(torch.ones(3, 2), 5),
        lambda: alternating_quantize(torch.ones(3, 2), 2, -1),
        lambda: dequantize(torch.ones(3, 2), torch.ones(3, 3, 4)),
        lambda: MultiBitLinear(3, 2, 5),
        lambda: MultiBitLinear(3, 2, 2, 0),
        lambda: MultiBitLinear(3, 2).pack()(torch.ones(2, 4)),
        lambda: PackedMultiBit(torch.ones(3, 2), torch.ones(3, 4)),
        lambda: MultiBitLSTM(nn.LSTM(3, 4, batch_first=True)),
        lambda: MultiBitLSTM(nn.LSTM(3, 4), 0),
    ],
)
def test_bad_input(call):
    with pytest.raises(ValueError, match=r"got"):
        call()
