"""LR-nets against sums over the few values of a weight, against sampled weight matrices and against plain layers."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import kurtosis
from torch import nn
from torch.nn.functional import conv2d, linear

from dlatlas.compression.kit.loop import Batches, fit_classifier
from dlatlas.compression.kit.nets import lenet, mlp
from dlatlas.compression.lr_nets import (
    LRBinaryLinear,
    LRTernaryConv2d,
    LRTernaryLinear,
    lr_net,
    reestimate_norms,
    regularizer,
    sampled,
)


def randomize(layer):
    with torch.no_grad():
        for p in (layer.a, *([layer.b] if hasattr(layer, "b") else [])):
            p.normal_(0, 1.5)
    return layer


def probabilities(layer):
    """P(-1), P(0), P(1) as NumPy arrays."""
    sigmoid = lambda t: 1 / (1 + np.exp(-t.detach().double().numpy()))  # noqa: E731
    if isinstance(layer, LRBinaryLinear):
        return 1 - sigmoid(layer.a), 0, sigmoid(layer.a)
    zero, positive = sigmoid(layer.a), sigmoid(layer.b)
    return (1 - zero) * (1 - positive), zero, (1 - zero) * positive


@pytest.mark.parametrize(
    "layer", [LRTernaryLinear(6, 4), LRTernaryConv2d(2, 3, 3), LRBinaryLinear(6, 4)], ids=["ternary", "conv", "binary"]
)
def test_moments_and_draws_have_the_probabilities(layer):
    torch.manual_seed(0)
    minus, _, plus = probabilities(randomize(layer))
    np.testing.assert_allclose(layer.weight_mean().detach(), plus - minus, atol=1e-6)
    np.testing.assert_allclose(layer.weight_var().detach(), plus + minus - (plus - minus) ** 2, atol=1e-6)
    draws = torch.stack([layer.sample() for _ in range(4000)])
    assert set(draws.unique().tolist()) <= ({-1, 1} if isinstance(layer, LRBinaryLinear) else {-1, 0, 1})
    np.testing.assert_allclose((draws == 1).double().mean(0), plus, atol=0.04)
    np.testing.assert_allclose((draws == -1).double().mean(0), minus, atol=0.04)
    one, two = (layer.sample(torch.Generator().manual_seed(s)) for s in (3, 3))
    assert torch.equal(one, two)


@pytest.mark.parametrize("kind", ["ternary", "conv", "binary"])
def test_pre_activations_have_the_moments_of_sampled_weights(kind):
    torch.manual_seed(0)
    draws = 20_000
    layer = {"ternary": LRTernaryLinear(9, 3), "conv": LRTernaryConv2d(2, 3, 3, stride=2, padding=1), "binary": LRBinaryLinear(9, 3)}[kind]
    randomize(layer)
    x = torch.randn(1, 2, 4, 4) if kind == "conv" else torch.randn(1, 9)
    weights = torch.cat([layer.sample() for _ in range(draws)])
    if kind == "conv":
        one_by_one = conv2d(x, weights, stride=2, padding=1).view(draws, 3, 2, 2) + layer.bias.detach().view(3, 1, 1)
    else:
        one_by_one = linear(x, weights).view(draws, 3) + layer.bias.detach()
    with torch.no_grad():
        at_once = layer.train()(x.expand(draws, *x.shape[1:]))
        torch.testing.assert_close(layer.eval()(x)[0], one_by_one.mean(0), atol=0.07, rtol=0)
    torch.testing.assert_close(at_once.mean(0), one_by_one.mean(0), atol=0.07, rtol=0)
    torch.testing.assert_close(at_once.std(0), one_by_one.std(0), atol=0, rtol=0.03)
    assert at_once.std() > 0.5  # every example and unit has a draw of its own
    assert abs(np.corrcoef(at_once.flatten(1).T)[0, 1]) < 0.03


def test_sums_are_gaussian_where_many_weights_meet_and_not_where_few_do():
    torch.manual_seed(0)
    found = {}
    for fan_in, draws in ((2, 20_000), (25, 20_000), (512, 8000)):
        layer = LRTernaryLinear(fan_in, draws, bias=False)  # a unit is a draw
        with torch.no_grad():
            layer.a.fill_(2.0)
            layer.b.fill_(0.0)
        found[fan_in] = kurtosis((layer.sample() @ torch.ones(fan_in)).numpy(), fisher=False)
    # A weight that is not 0 with probability p has kurtosis 1 / p; excess kurtosis of a sum is that of a term divided by the number.
    p = 1 / (1 + math.exp(2))
    for fan_in, value in found.items():
        assert value == pytest.approx(3 + (1 / p - 3) / fan_in, rel=0.06)
    assert abs(found[512] - 3) < 0.2 < found[2] - 3


@pytest.mark.parametrize("cls", [LRTernaryLinear, LRBinaryLinear])
def test_start_is_the_papers(cls):
    torch.manual_seed(0)
    w = 0.3 * torch.randn(40, 50)
    layer = cls(50, 40)
    assert layer.from_weight(w) is layer
    t = np.clip(w.numpy() / w.numpy().std(), -1, 1)
    minus, zero, plus = probabilities(layer)
    if cls is LRTernaryLinear:
        expected_zero = 0.95 - 0.9 * np.abs(t)
        np.testing.assert_allclose(zero, expected_zero, atol=1e-5)
        np.testing.assert_allclose(plus / (plus + minus), np.clip(0.5 * (1 + t / (1 - expected_zero)), 0.05, 0.95), atol=1e-4)
    else:
        np.testing.assert_allclose(plus, np.clip(0.5 * (1 + t), 0.05, 0.95), atol=1e-5)
    assert np.corrcoef((plus - minus).ravel(), t.ravel())[0, 1] > 0.99
    scaled = cls(50, 40).from_weight(100 * w)
    torch.testing.assert_close(scaled.a, layer.a, atol=1e-3, rtol=1e-3)
    narrow = cls(50, 40).from_weight(w, p_min=0.2, p_max=0.8)
    assert torch.sigmoid(narrow.a).min() > 0.199 and torch.sigmoid(narrow.a).max() < 0.801


def test_mean_is_the_weight_where_nothing_is_clipped():
    layer = LRTernaryLinear(8, 1)
    w = torch.tensor([[0.0, 0.2, -0.2, 0.5, -0.5, 0.9, -0.9, 0.1]])
    w = torch.cat([w, torch.tensor([[3.0] * 4 + [-3.0] * 4])])
    layer = LRTernaryLinear(8, 2).from_weight(w)
    t = w / w.std(correction=0)
    small = t.abs() < 0.5
    torch.testing.assert_close(layer.weight_mean()[small], t[small], atol=1e-2, rtol=0.08)


def test_gradients_are_finite_at_certainty_and_right_elsewhere():
    layer = LRTernaryLinear(4, 3)
    for a, b in ((-60.0, 60.0), (60.0, 0.0), (-60.0, -60.0)):
        with torch.no_grad():
            layer.a.fill_(a)
            layer.b.fill_(b)
        assert (layer.weight_var() >= 0).all() and layer.weight_var().max() < 1e-6
        for x in (torch.randn(5, 4), torch.zeros(5, 4)):
            layer.zero_grad()
            layer.train()(x).square().sum().backward()
            assert torch.isfinite(layer.a.grad).all() and torch.isfinite(layer.b.grad).all()
    exact = randomize(LRTernaryLinear(4, 3).double())
    x = torch.randn(5, 4, dtype=torch.float64)

    def forward(a, b):
        torch.manual_seed(0)
        return torch.func.functional_call(exact, {"a": a, "b": b}, (x,))

    assert torch.autograd.gradcheck(forward, (exact.a, exact.b))


def test_certain_zeros_leave_the_bias():
    layer = LRTernaryLinear(4, 3)
    with torch.no_grad():
        layer.a.fill_(40.0)
    for mode in (True, False):
        torch.testing.assert_close(layer.train(mode)(torch.randn(5, 4)).detach(), layer.bias.detach().expand(5, 3), atol=1e-4, rtol=0)


def test_penalties():
    ternary, binary = randomize(LRTernaryLinear(3, 2)), randomize(LRBinaryLinear(3, 2))
    a, b = (p.detach().double().numpy() for p in (ternary.a, ternary.b))
    p = probabilities(binary)[2]
    decay, beta = 0.5 * ((a**2).sum() + (b**2).sum()), (p * (1 - p)).sum()
    both = nn.Sequential(ternary, binary)
    assert float(regularizer(ternary).detach()) == pytest.approx(1e-11 * decay)
    assert float(regularizer(binary).detach()) == pytest.approx(1e-6 * beta)
    assert float(regularizer(both, p_decay=0.1, beta=0.2).detach()) == pytest.approx(0.1 * decay + 0.2 * beta)
    regularizer(both, p_decay=1.0, beta=1.0).backward()
    torch.testing.assert_close(ternary.a.grad, ternary.a.detach())
    assert (binary.a.grad * binary.a < 0).all()  # a step against the gradient makes logits larger in magnitude


def test_network_to_deploy_is_plain_and_the_original_stays():
    torch.manual_seed(0)
    net = lr_net(lenet(0.5, norm=True))
    assert isinstance(net.conv1, LRTernaryConv2d) and isinstance(net.fc2, LRTernaryLinear) and type(net.fc3) is nn.Linear
    assert "weight" not in dict(net.conv1.named_parameters())
    x = torch.rand(300, 1, 28, 28)
    one, two = (sampled(net, x, torch.Generator().manual_seed(s)) for s in (1, 2))
    assert isinstance(net.conv1, LRTernaryConv2d)
    for plain in (one.conv1, one.fc1):
        assert type(plain) in (nn.Conv2d, nn.Linear) and set(plain.weight.detach().unique().tolist()) == {-1, 0, 1}
    assert torch.equal(one.conv1.bias, net.conv1.bias) and not torch.equal(one.fc1.weight, two.fc1.weight)
    stale = sampled(net, generator=torch.Generator().manual_seed(1))
    assert torch.equal(stale.fc1.weight, one.fc1.weight)
    assert torch.equal(stale.norms[0].running_mean, net.norms[0].running_mean)
    names = [name for name, layer in lr_net(lenet(0.5), skip=("first", "fc2", "last")).named_modules() if hasattr(layer, "sample")]
    assert names == ["conv2", "fc1"]


def test_statistics_are_averages_over_the_data():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, momentum=0.3))
    x = 5 + torch.randn(512, 3)
    net(-x)  # must be forgotten
    assert reestimate_norms(net.train(), x, batch=128) is net and not net.training
    z = net[0](x).detach()
    torch.testing.assert_close(net[1].running_mean, z.mean(0))
    torch.testing.assert_close(net[1].running_var, torch.stack([part.var(0) for part in z.split(128)]).mean(0))
    assert net[1].momentum == 0.3


@pytest.mark.parametrize("n", [2, 3, 257, 513])
def test_no_part_is_a_single_example(n):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    x = torch.randn(n, 3)
    seen = []
    net[0].register_forward_hook(lambda _, args, out: seen.append(len(out)))
    reestimate_norms(net, x, batch=256 if n > 3 else 2)
    assert sum(seen) == n and min(seen) > 1 and max(seen) - min(seen) <= 1 and max(seen) <= 256
    torch.testing.assert_close(net[1].running_mean, net.eval()[0](x).mean(0).detach(), atol=2e-2 if n > 256 else 1e-6, rtol=0)


def test_only_normalisation_is_in_training_mode_meanwhile():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(3, 64), nn.Dropout(0.5), nn.BatchNorm1d(64), nn.Linear(64, 8), nn.BatchNorm1d(8, track_running_stats=False)
    )
    modes = []
    net[4].register_forward_hook(lambda *_: modes.append([m.training for m in net]))
    x = torch.randn(300, 3)
    reestimate_norms(net.train(), x, batch=300)
    assert modes == [[False, False, True, False, False]] and not any(m.training for m in net.modules())
    torch.testing.assert_close(net[2].running_mean, net[0](x).mean(0).detach())  # nothing was dropped


def test_a_failure_leaves_momentum_and_modes_in_order():
    net = nn.Sequential(nn.BatchNorm1d(3, momentum=0.2), nn.Linear(3, 2), nn.BatchNorm1d(2, momentum=0.4))
    with pytest.raises(RuntimeError):
        reestimate_norms(nn.Sequential(*net, nn.Linear(5, 1)).train(), torch.randn(8, 3))
    assert [net[0].momentum, net[2].momentum] == [0.2, 0.4] and not any(m.training for m in net[:3])


def test_it_trains():
    torch.manual_seed(0)
    y = torch.randint(3, (512,))
    x = torch.randn(512, 12) + 3 * nn.functional.one_hot(y, 12)
    net = lr_net(nn.Sequential(nn.Linear(12, 30), nn.BatchNorm1d(30), nn.ReLU(), nn.Linear(30, 3)))
    fit_classifier(net, Batches(x, y, size=32), 12, lr=0.1)
    assert (sampled(net, x)(x).argmax(1) == y).float().mean() > 0.9


@pytest.mark.parametrize(
    "call",
    [
        lambda: LRTernaryLinear(3, 2).from_weight(torch.ones(3, 2)),
        lambda: LRTernaryLinear(3, 2).from_weight(torch.ones(2, 3), p_min=0.5, p_max=0.5),
        lambda: LRBinaryLinear(3, 2).from_weight(torch.ones(2, 3), p_max=1.0),
        lambda: lr_net(mlp([2, 2])),
        lambda: sampled(mlp([2, 2])),
        lambda: reestimate_norms(nn.BatchNorm1d(2), torch.ones(1, 2)),
        lambda: reestimate_norms(nn.BatchNorm1d(2), torch.ones(4, 2), batch=1),
        lambda: regularizer(nn.Linear(2, 2)),
        lambda: regularizer(LRTernaryLinear(2, 2), p_decay=-1),
    ],
)
def test_bad_input_is_refused(call):
    with pytest.raises(ValueError, match=r"got|none is left"):
        call()
