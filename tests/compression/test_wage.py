"""WAGE's layers against a transcription in floats on the grid, random rounding against its mean, the grid against every step of training."""

import copy
import io
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import conv2d, cross_entropy, max_pool2d, relu

from dlatlas.compression.wage import WAGE, WAGEConv2d, WAGELinear, quantize, quantize_gradient, shift

LINE = torch.linspace(-1.5, 1.5, 2401, dtype=torch.float64)


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_quantize_is_the_equation_idempotent_and_odd(bits):
    unit = 2.0 ** (1 - bits)
    q = quantize(LINE, bits)
    np.testing.assert_array_equal(q, np.clip(unit * np.round(LINE.numpy() / unit), -1 + unit, 1 - unit))
    assert torch.equal(quantize(q, bits), q) and torch.equal(quantize(-LINE, bits), -q)
    assert len(q.unique()) == 2**bits - 1


def test_shift_is_exact_for_powers_of_two_and_rounds_the_logarithm():
    powers = 2.0 ** torch.arange(-40, 40)
    assert torch.equal(shift(powers), powers)
    x = torch.rand(1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 9 + 1e-3
    np.testing.assert_allclose(shift(x), 2 ** np.round(np.log2(x.numpy())), rtol=0)
    assert shift(torch.zeros(2)).tolist() == [0, 0]


@pytest.mark.parametrize("lr", [0.25, 1, 8])
def test_mean_of_the_update_is_the_scaled_gradient(lr):
    g = torch.tensor([3.1, -0.4, 0.01, -1.7, 0.0], dtype=torch.float64)
    n = 20_000
    draws = torch.stack([quantize_gradient(g, lr, 8, torch.Generator().manual_seed(k)) for k in range(200)])
    draws = torch.cat([draws, quantize_gradient(g.expand(n, 5), lr, 8, torch.Generator().manual_seed(999))])
    scaled = lr * g / 4  # the logarithm of 3.1 is nearer to that of 4 than to that of 2
    fraction = scaled.abs() - scaled.abs().floor()
    error = (draws.mean(0) * 2**7 - scaled).abs()
    assert (error <= 4 * (fraction * (1 - fraction) / len(draws)).sqrt() + 1e-12).all()
    units = draws * 2**7
    assert torch.equal(units, units.round()) and ((units.abs() - scaled.abs()).abs() < 1).all()


def test_update_without_chance_drops_what_is_below_half_a_unit():
    g = torch.tensor([4.0, 1.9, -2.1, 0.1])
    assert (quantize_gradient(g, 1, stochastic=False) * 2**7).tolist() == [1, 0, -1, 0]
    assert not quantize_gradient(torch.zeros(3), 1).any() and quantize_gradient(torch.zeros(0), 1).shape == (0,)


def start(layer):
    return layer.weight.double() * 2.0 ** (1 - layer.bits_g)


def transcription(layer, product, x, error):
    """Output, next error and gradient of the equations, in float64 on the grid, with torch's own gradients of the product."""
    w = quantize(start(layer), layer.bits_w).requires_grad_()
    a = quantize(x.detach().double(), layer.bits_a).requires_grad_()
    z = product(a, w)
    if layer.pool > 1:
        z = max_pool2d(z, layer.pool)
    n = math.prod(layer.weight.shape[1:])
    alpha = max(2.0 ** round(math.log2(1.5 * 2.0 ** (1 - layer.bits_w) / math.sqrt(6 / n))), 1)
    out = quantize(relu(z) / alpha, layer.bits_a) if layer.activation else z / alpha
    e = quantize(error.double() / shift(error.double().abs().max()), layer.bits_e)
    if layer.activation:
        e = e * (z.detach() > 0) * (z.detach() / alpha <= 1 - 2.0 ** (1 - layer.bits_a))
    return out.detach(), *torch.autograd.grad(z, (a, w), e)


CASES = [
    (lambda: WAGELinear(300, 20), (16, 300), lambda a, w: a @ w.mT),
    (lambda: WAGELinear(30, 20, activation=False), (16, 30), lambda a, w: a @ w.mT),
    (lambda: WAGELinear(30, 20, 4, 6, 5, bits_g=7), (16, 30), lambda a, w: a @ w.mT),
    (lambda: WAGEConv2d(3, 8, 3, padding=1), (4, 3, 9, 8), lambda a, w: conv2d(a, w, padding=1)),
    (lambda: WAGEConv2d(3, 8, (3, 2), stride=2), (4, 3, 9, 8), lambda a, w: conv2d(a, w, stride=2)),
    (lambda: WAGEConv2d(2, 5, 5, pool=2, bits_w=5), (4, 2, 13, 12), conv2d),
]


@pytest.mark.parametrize(("make", "shape", "product"), CASES)
def test_layers_compute_the_equations(make, shape, product):
    torch.manual_seed(0)
    layer = make()
    x = (torch.rand(shape) * 2 - 1).requires_grad_()
    out = layer(x)
    error = 1e-4 * torch.randn_like(out)
    out.backward(error)
    want_out, want_error, want_gradient = transcription(layer, product, x, error)
    assert torch.equal(out.detach().double(), want_out)
    assert torch.equal(x.grad.double(), want_error)
    units = 2.0 ** (2 - layer.bits_e - layer.bits_a)
    assert layer.weight.grad.dtype == torch.int32 and torch.equal(layer.weight.grad * units, want_gradient)


def test_error_from_a_layer_above_is_shifted_as_if_divided():
    torch.manual_seed(1)
    below, above = WAGELinear(40, 30), WAGELinear(30, 20, activation=False)
    x = torch.rand(16, 40, requires_grad=True)
    middle = below(x)
    middle.retain_grad()
    error = torch.randn(16, 20)
    above(middle).backward(error)
    _, want_error, want_gradient = transcription(below, lambda a, w: a @ w.mT, x, middle.grad)
    assert torch.equal(x.grad.double(), want_error) and torch.equal(below.weight.grad * 2.0**-14, want_gradient)


def test_integers_are_stored_and_kept():
    layer = WAGEConv2d(1, 4, 3, pool=2)
    assert layer.weight.dtype == torch.int8 and set(layer.quantized_weight().unique().tolist()) <= {-1, 0, 1}
    kept = []
    layer_in = torch.rand(2, 1, 8, 8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(layer_in)
    assert kept and all(t.dtype in (torch.int8, torch.uint8, torch.bool) for t in kept)


def test_gradients_of_two_batches_add_up():
    torch.manual_seed(0)
    layer, x = WAGELinear(5, 3, activation=False), torch.rand(4, 5)
    e = torch.randn(4, 3)
    layer(x).backward(e)
    once = layer.weight.grad.clone()
    layer(x).backward(e)
    assert torch.equal(layer.weight.grad, 2 * once)


def net():
    return nn.Sequential(WAGEConv2d(1, 4, 3, pool=2), nn.Flatten(), WAGELinear(36, 16), WAGELinear(16, 2, activation=False))


def test_training_stays_on_the_grid_and_learns():
    torch.manual_seed(0)
    model = net()
    optimizer = WAGE(model.parameters(), lr=4, generator=torch.Generator().manual_seed(0))
    x = torch.rand(256, 1, 8, 8)
    y = (x[:, 0, :4].mean((1, 2)) > x[:, 0, 4:].mean((1, 2))).long()
    x[y == 1, :, :4] += 0.5
    x.clamp_(0, 1)
    changed = torch.zeros(())
    for k in range(120):
        optimizer.param_groups[0]["lr"] = 4 if k < 60 else 0.5
        before = [p.clone() for p in model.parameters()]
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()
        for p, old in zip(model.parameters(), before):
            assert p.dtype == torch.int8 and p.abs().max() <= 127
            assert (p.int() - old.int()).abs().max() <= math.ceil(4 * 2**0.5)
            changed += (p != old).sum()
    assert changed > 0
    assert (model(x).argmax(1) == y).float().mean() > 0.85


def test_updates_of_integers_have_the_mean_of_the_equation_and_go_downhill():
    g = torch.tensor([1000, -300, 7, 0], dtype=torch.int32).expand(20_000, 4)
    layer = WAGELinear(4, 20_000)
    layer.weight.zero_()
    layer.weight.grad = g
    WAGE(layer.parameters(), lr=2, generator=torch.Generator().manual_seed(0)).step()
    want = -2 * g[0].double() / 1024
    fraction = want.abs() - want.abs().floor()
    assert ((layer.weight.double().mean(0) - want).abs() <= 4 * (fraction * (1 - fraction) / 20_000).sqrt() + 1e-12).all()


def test_float_weights_follow_the_same_rule_and_are_clipped():
    p = nn.Parameter(torch.tensor([126 / 128, -127 / 128, 0.5]))
    p.grad = torch.tensor([-4.0, 4.0, 4.0])
    assert WAGE([p], lr=2, stochastic=False).step(lambda: torch.tensor(3.0)).item() == 3
    assert (p * 128).tolist() == [127, -127, 62]


def test_state_and_copies_keep_integers():
    model = net()
    twin, other = copy.deepcopy(model), net()
    other.load_state_dict(model.state_dict())
    x = torch.rand(2, 1, 8, 8)
    assert torch.equal(twin(x), model(x)) and torch.equal(other(x), model(x))
    assert all(p.dtype == torch.int8 for m in (twin, other) for p in m.parameters())
    cross_entropy(twin(x), torch.tensor([0, 1])).backward()
    WAGE(twin.parameters()).step()
    assert all(p.grad is None for p in model.parameters())


def test_a_model_that_was_pickled_whole_trains_on():
    torch.manual_seed(0)
    model, x, y = net(), torch.rand(8, 1, 8, 8), torch.randint(2, (8,))
    model[2].requires_grad_(False)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    for m in (model, loaded):
        cross_entropy(m(x), y).backward()
        WAGE(m.parameters(), generator=torch.Generator().manual_seed(1)).step()
    assert all(type(p) is type(q) and torch.equal(p, q) for p, q in zip(model.parameters(), loaded.parameters()))
    assert [p.grad is None for p in loaded.parameters()] == [False, True, False]


@pytest.mark.parametrize("freeze", [lambda m: m.requires_grad_(False), lambda m: setattr(m.weight, "requires_grad", False)])
def test_frozen_weights_get_no_gradient_and_hand_the_error_on(freeze):
    torch.manual_seed(0)
    layer, x, e = WAGELinear(5, 3, activation=False), torch.rand(4, 5, requires_grad=True), torch.randn(4, 3)
    assert layer.weight.requires_grad
    (want,) = torch.autograd.grad(layer(x), x, e)
    assert layer.weight.grad is not None  # the side effect that the docstring tells of
    layer.weight.grad = None
    freeze(layer)
    (got,) = torch.autograd.grad(layer(x), x, e)
    assert torch.equal(got, want) and layer.weight.grad is None
    assert not layer(x.detach()).requires_grad and not copy.deepcopy(layer).weight.requires_grad
    before = layer.weight.clone()
    WAGE(layer.parameters()).step()
    assert torch.equal(layer.weight, before)
    layer.requires_grad_()
    layer(x).backward(e)
    assert layer.weight.grad is not None


def test_error_and_gradient_of_zeros_are_zeros():
    layer = WAGELinear(5, 3)
    x = torch.rand(4, 5, requires_grad=True)
    layer(x).backward(torch.zeros(4, 3))
    before = layer.weight.clone()
    WAGE(layer.parameters()).step()
    assert not x.grad.any() and torch.equal(layer.weight, before)


def test_worst_case_sums_are_exact_and_larger_ones_refused():
    layer = WAGELinear(100_000, 1, bits_w=8, activation=False)
    layer.weight.fill_(127)
    out = layer(torch.ones(1, 100_000))
    assert out.double().item() == float(torch.tensor(100_000 * 127 * 127).float()) * 2.0 ** (-14 - layer.log2_alpha)
    with pytest.raises(ValueError, match="32 bits"):
        WAGELinear(140_000, 1)(torch.ones(1, 140_000))


@pytest.mark.parametrize(
    "bad",
    [
        lambda: quantize(torch.ones(2), 1),
        lambda: shift(torch.tensor([1.0, -1.0])),
        lambda: quantize_gradient(torch.ones(2), 1, 1),
        lambda: quantize_gradient(torch.ones(2), 0.3),
        lambda: quantize_gradient(torch.ones(2), 0),
        lambda: WAGE([nn.Parameter(torch.ones(2))], lr=3),
        lambda: WAGE([nn.Parameter(torch.ones(2))], bits_g=1),
        lambda: WAGELinear(2, 2, bits_w=1),
        lambda: WAGELinear(2, 2, bits_a=9),
        lambda: WAGELinear(2, 2, bits_w=8, bits_g=4),
        lambda: WAGEConv2d(2, 2, 1, pool=0),
        lambda: WAGELinear(3, 2)(torch.ones(3)),
        lambda: WAGELinear(3, 2)(torch.ones(4, 2, 3)),
        lambda: WAGEConv2d(3, 2, 1)(torch.ones(3, 5, 5)),
        lambda: WAGEConv2d(3, 2, 1)(torch.ones(1, 2, 5, 5)),
    ],
)
def test_bad_input(bad):
    with pytest.raises(ValueError, match="got"):
        bad()


def test_a_diverged_training_is_reported():
    with pytest.raises(ValueError, match="finite gradient"):
        quantize_gradient(torch.tensor([float("nan"), 1.0]), 1)
    layer = WAGELinear(3, 2, activation=False)
    with pytest.raises(ValueError, match="diverged"):
        (layer(torch.ones(1, 3, requires_grad=True)) * float("nan")).sum().backward()
