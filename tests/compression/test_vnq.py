"""VNQ's divergences against quadrature of the true ones, its layers against sampled weights and a plain transcription of the rounding."""

import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from torch import nn
from torch.nn.functional import conv2d, linear

from dlatlas.compression.kit.loop import Batches
from dlatlas.compression.kit.nets import lenet, mlp
from dlatlas.compression.vnq import VNQConv2d, VNQLinear, fit_vnq, kl_log_uniform, quantize_vnq, vnq, vnq_kl

CODES = (-0.2, 0.0, 0.2)


def grid(thetas, log_sigma2s):
    t, s = np.meshgrid(thetas, log_sigma2s)
    return torch.tensor(t.ravel(), dtype=torch.float64), torch.tensor(s.ravel(), dtype=torch.float64)


def expectation(function, theta, sigma, points):
    def density(w):
        return function(w) * math.exp(-0.5 * ((w - theta) / sigma) ** 2) / (sigma * math.sqrt(2 * math.pi))

    low, high = theta - 9 * sigma, theta + 9 * sigma
    inside = sorted({p for p in (*points, theta, theta - sigma, theta + sigma) if low < p < high})
    return quad(density, low, high, points=inside, limit=300)[0]


def true_log_uniform(theta, log_sigma2):
    """E log|w| - log sigma + (gamma + log 2) / 2: the divergence, with the constant that makes it 0 for a mean of 0."""
    sigma = math.exp(log_sigma2 / 2)
    return expectation(lambda w: math.log(abs(w) + 1e-300), theta, sigma, [0.0]) - math.log(sigma) + 0.5 * (np.euler_gamma + math.log(2))


def true_quantising(theta, log_sigma2):
    """The same for the quantising prior; midpoints, because its logarithm has three poles."""
    sigma, n = math.exp(log_sigma2 / 2), 100_000
    e = (np.arange(n) + 0.5) / n * 18 - 9
    log_prior = np.log(sum(1 / np.abs(theta + sigma * e - c) for c in CODES) / 3)
    mean = (log_prior * np.exp(-0.5 * e**2)).sum() * 18 / n / math.sqrt(2 * math.pi)
    return -mean - math.log(sigma) + 0.5 * (np.euler_gamma + math.log(2))


def test_log_uniform_divergence_is_the_true_one():
    theta, log_sigma2 = grid([0.0, 0.01, 0.1, 0.5, 2.0], [-7.0, -5.0, -3.0, -1.0, 1.0])
    truth = [true_log_uniform(t, s) for t, s in zip(theta.tolist(), log_sigma2.tolist())]
    np.testing.assert_allclose(kl_log_uniform(theta, log_sigma2), truth, atol=0.02)


def test_log_uniform_divergence_is_even_positive_and_depends_on_the_ratio():
    theta, log_sigma2 = grid(np.linspace(-1, 1, 21), np.linspace(-8, 1, 10))
    kl = kl_log_uniform(theta, log_sigma2)
    assert (kl >= 0).all() and torch.equal(kl, kl_log_uniform(-theta, log_sigma2))
    away = theta.abs() > 0.05
    torch.testing.assert_close(kl_log_uniform(7 * theta, log_sigma2 + 2 * math.log(7))[away], kl[away], atol=1e-4, rtol=1e-4)
    assert (kl_log_uniform(theta, log_sigma2 + 1)[away] < kl[away]).all()
    assert torch.isfinite(kl_log_uniform(torch.zeros(1), torch.tensor([-10.0]))).all()


def test_quantising_divergence_is_the_equation():
    theta, log_sigma2 = grid(np.linspace(-0.5, 0.5, 31), [-9.0, -5.0, -2.0])

    def f(t):
        alpha = np.exp(log_sigma2.numpy()) / (t**2 + 1e-8)
        return 0.63576 - 0.63576 / (1 + np.exp(-(1.87320 + 1.48695 * np.log(alpha)))) + 0.5 * np.log(1 + 1 / alpha)

    t = theta.numpy()
    left, right = np.exp(-((t + 0.2) ** 2) / (2 * 0.075**2)), np.exp(-((t - 0.2) ** 2) / (2 * 0.075**2))
    expected = left * f(t + 0.2) + right * f(t - 0.2) + np.maximum(1 - left - right, 0) * f(t)
    np.testing.assert_allclose(vnq_kl(theta, log_sigma2, CODES), expected, rtol=1e-7)
    torch.testing.assert_close(vnq_kl(theta, log_sigma2, torch.tensor([0.0])), kl_log_uniform(theta, log_sigma2))


def test_quantising_divergence_is_as_near_to_the_true_one_as_the_paper_says():
    # The constant of the true one makes both agree far from all codes; the paper gives 1.07 as the largest deviation.
    theta, log_sigma2 = grid([*np.linspace(-0.4, 0.4, 33), 3.0], [-10.0, -8.0, -6.0, -4.0, -2.0, 0.0])
    truth = torch.tensor([true_quantising(t, s) for t, s in zip(theta.tolist(), log_sigma2.tolist())])
    difference = vnq_kl(theta, log_sigma2, CODES) - truth
    assert 1.0 < difference.abs().max() < 1.1
    assert difference[theta == 3].abs().max() < 0.05
    assert np.corrcoef(vnq_kl(theta, log_sigma2, CODES), truth)[0, 1] > 0.97


def test_narrow_weights_are_cheap_at_the_codes_only():
    theta = torch.linspace(-0.3, 0.3, 601, dtype=torch.float64)
    kl = vnq_kl(theta, torch.full_like(theta, -9.0), CODES)
    lowest = [i for i in range(1, 600) if kl[i] < kl[i - 1] and kl[i] < kl[i + 1]]
    assert theta[lowest].tolist() == pytest.approx(CODES, abs=2e-3)


def test_gradients_of_the_divergence():
    theta = torch.tensor([-0.31, -0.12, 0.05, 0.19, 0.4], dtype=torch.float64, requires_grad=True)
    log_sigma2 = torch.tensor([-7.0, -5.0, -3.0, -6.0, -1.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t, s: vnq_kl(t, s, CODES), (theta, log_sigma2))


def test_divergence_of_a_layer_scales_with_its_codebook():
    torch.manual_seed(0)
    layer = VNQLinear(6, 5).double()
    with torch.no_grad():
        layer.scale.fill_(0.5)
        layer.log_sigma2.uniform_(-9, 0)
    assert layer.codebook.tolist() == pytest.approx([-0.1, 0, 0.1])
    expected = vnq_kl(layer.weight, layer.log_sigma2, (-0.1, 0.0, 0.1), tau=0.0375).sum()
    torch.testing.assert_close(layer.kl(), expected, rtol=1e-5, atol=0)
    (slope,) = torch.autograd.grad(layer.kl(), layer.scale)
    with torch.no_grad():
        layer.scale.fill_(0.5 + 1e-6)
        up = layer.kl()
        layer.scale.fill_(0.5 - 1e-6)
        assert float(slope) == pytest.approx(float((up - layer.kl()) / 2e-6), rel=1e-4)


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_pre_activations_have_the_moments_of_sampled_weights(kind):
    torch.manual_seed(0)
    draws = 20_000
    layer = VNQLinear(7, 3) if kind == "linear" else VNQConv2d(2, 3, 3, stride=2, padding=1)
    with torch.no_grad():
        layer.log_sigma2.uniform_(-3, 0)
    x = torch.randn(1, 7) if kind == "linear" else torch.randn(1, 2, 4, 4)
    weights = layer.weight + (0.5 * layer.log_sigma2).exp() * torch.randn(draws, *layer.weight.shape)
    if kind == "linear":
        one_by_one = linear(x, weights.flatten(0, 1)).view(draws, 3) + layer.bias
    else:
        one_by_one = conv2d(x, weights.flatten(0, 1), stride=2, padding=1).view(draws, 3, 2, 2) + layer.bias.view(3, 1, 1)
    with torch.no_grad():
        at_once = layer.train()(x.expand(draws, *x.shape[1:]))
        torch.testing.assert_close(layer.eval()(x)[0], one_by_one.mean(0), atol=0.06, rtol=0)
    torch.testing.assert_close(at_once.mean(0), one_by_one.mean(0), atol=0.06, rtol=0)
    torch.testing.assert_close(at_once.std(0), one_by_one.std(0), atol=0, rtol=0.03)


def test_rounding_prunes_wide_weights_and_takes_the_nearest_code():
    layer = VNQLinear(6, 1, codebook=(-0.4, 0.0, 0.4))
    with torch.no_grad():
        layer.scale.fill_(0.5)
        layer.weight.copy_(torch.tensor([[0.3, -0.11, 0.09, 0.3, -0.3, 0.15]]))
        layer.log_sigma2.copy_(torch.tensor([[-8.0, -8.0, -8.0, 0.0, -0.3, -8.0]]))  # log alpha of the 4th 2.41, of the 5th 2.11
    plain = layer.quantize()
    assert type(plain) is nn.Linear and plain.weight.requires_grad
    torch.testing.assert_close(plain.weight.detach(), torch.tensor([[0.2, -0.2, 0.0, 0.0, 0.0, 0.2]]))
    torch.testing.assert_close(layer.quantize(2.2).weight.detach(), torch.tensor([[0.2, -0.2, 0.0, 0.0, -0.2, 0.2]]))
    assert torch.equal(plain.bias, layer.bias)


def test_limits_are_the_papers():
    layer = VNQLinear(4, 1)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, -1.0, 0.1, 0.21]]))
        layer.log_sigma2.copy_(torch.tensor([[-4.0, -30.0, 5.0, -4.0]]))
        layer.scale.fill_(0.1)
    layer.constrain()
    assert layer.codebook.tolist() == pytest.approx([-0.05, 0, 0.05])
    assert layer.log_sigma2[0].tolist() == [-4, -10, 1, -4]
    edge = 0.05 + 0.223 * math.exp(-2)
    assert layer.weight[0].tolist() == pytest.approx([edge, -(0.05 + 0.223 * math.exp(-5)), 0.1, edge])
    sparse = VNQLinear(4, 1, codebook=(0.0,))
    weight = sparse.weight.detach().clone()
    sparse.constrain()
    assert torch.equal(sparse.weight, weight)


def test_network_keeps_its_function_and_its_convolutions():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 4, 3, stride=2, padding=1, groups=2, bias=False), nn.Flatten(), nn.Linear(16, 3))
    x = torch.randn(5, 2, 4, 4)
    before = net(x)
    assert vnq(net) is net and isinstance(net[0], VNQConv2d) and isinstance(net[2], VNQLinear)
    torch.testing.assert_close(net.eval()(x), before)
    assert not torch.allclose(net.train()(x), before)
    quantize_vnq(net, skip=("0",))
    assert isinstance(net[0], VNQConv2d) and type(net[2]) is nn.Linear
    quantize_vnq(net)
    assert type(net[0]) is nn.Conv2d and net[0].groups == 2 and net[0].bias is None
    values = net[2].weight.detach().unique().tolist()
    assert all(min(abs(v - c) for c in CODES) < 1e-6 for v in values)
    names = [name for name, layer in vnq(lenet(0.5), skip=("first", "fc2", "last")).named_modules() if hasattr(layer, "kl")]
    assert names == ["conv2", "fc1"]


def test_training_draws_weights_to_the_codes():
    torch.manual_seed(0)
    y = torch.randint(3, (512,))
    x = torch.randn(512, 12) + 2 * nn.functional.one_hot(y, 12)
    net = vnq(mlp([12, 20, 3]))
    biases = net[0].bias.detach().clone()

    @torch.no_grad()
    def distance():
        kept = torch.cat([layer.weight.flatten()[(layer.log_alpha() < 2).flatten()] for layer in (net[0], net[2])])
        return float((kept.unsqueeze(-1) - net[0].codebook).abs().amin(-1).mean())

    before = distance()
    history = fit_vnq(net, Batches(x, y, size=32), 25, len(x), lr=2e-2)
    assert math.isfinite(history.final()) and distance() < 0.7 * before
    assert net[0].scale.item() != 1 and not torch.equal(net[0].bias, biases)
    exact = (net.eval()(x).argmax(1) == y).float().mean()
    rounded = (quantize_vnq(net)(x).argmax(1) == y).float().mean()
    assert rounded > 0.8 and exact - rounded < 0.05


def test_rounding_skips_the_layers_of_the_network_that_are_named():
    def left(skip, model=None):
        model = quantize_vnq(vnq(lenet(0.5)) if model is None else model, skip=skip)
        return [name for name, layer in model.named_modules() if hasattr(layer, "kl")]

    assert left(("first", "last")) == ["conv1", "fc3"]
    assert left("last") == ["fc3"] and left(("conv2", "fc3")) == ["conv2", "fc3"] and left(()) == []
    # First and last of the network, not of its variational layers.
    assert left(("first", "last"), vnq(lenet(0.5), skip=("first",))) == ["fc3"]


@pytest.mark.parametrize("warmup", [0.0, 0.5])
def test_loss_is_the_equation_with_the_divergence_warmed_up(warmup):
    """Two steps by hand, with the noise of the layers drawn from the same seed."""

    def start():
        torch.manual_seed(0)
        x, y = torch.randn(8, 5), torch.randint(3, (8,))
        return vnq(mlp([5, 4, 3])), x, y

    n, lr = 50, 1e-2
    net, x, y = start()
    torch.manual_seed(1)
    fit_vnq(net, [(x, y)], 4, n, lr=lr, warmup=warmup)
    other, x, y = start()
    layers = [other[0], other[2]]
    scales = [layer.scale for layer in layers]
    rest = [p for layer in layers for p in (layer.weight, layer.log_sigma2, layer.bias)]
    optimizer = torch.optim.Adam([{"params": rest}, {"params": scales}], lr)
    torch.manual_seed(1)
    for t, weight in enumerate([0.5, 1.0, 1.0, 1.0] if warmup else [1.0] * 4):
        optimizer.param_groups[0]["lr"], optimizer.param_groups[1]["lr"] = lr * (1 - t / 4), lr / 100 * (1 - t / 4)
        kl = sum(vnq_kl(layer.weight / layer.scale, layer.log_sigma2 - 2 * layer.scale.log(), CODES).sum() for layer in layers)
        loss = nn.functional.cross_entropy(other(x), y) + weight * kl / n
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for layer in layers:
            layer.constrain()
    for (name, p), q in zip(net.named_parameters(), other.parameters()):
        torch.testing.assert_close(p, q, atol=2e-6, rtol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize(
    "call",
    [
        lambda: vnq_kl(torch.zeros(3), torch.zeros(3), (-0.2, 0.2)),
        lambda: vnq_kl(torch.zeros(3), torch.zeros(3), (0.0, 0.2, 0.2)),
        lambda: vnq_kl(torch.zeros(3), torch.zeros(3), CODES, tau=0),
        lambda: vnq_kl(torch.zeros(3), torch.zeros(2), CODES),
        lambda: VNQLinear(2, 2, codebook=(-1.0, 1.0)),
        lambda: VNQConv2d(2, 2, 3, codebook=(0.5,)),
        lambda: vnq(mlp([2, 2]), skip=("first",)),
        lambda: vnq(nn.Sequential(nn.ReLU())),
        lambda: quantize_vnq(vnq(lenet(0.5)), skip=("nonsense",)),
        lambda: quantize_vnq(vnq(mlp([2, 2])), skip=("first",)),
        lambda: quantize_vnq(mlp([2, 2])),
        lambda: fit_vnq(mlp([2, 2]), [], 1, 10),
        lambda: fit_vnq(vnq(mlp([2, 2])), [], 1, 0),
    ],
)
def test_bad_input_is_refused(call):
    with pytest.raises(ValueError, match=r"got|none is left"):
        call()
