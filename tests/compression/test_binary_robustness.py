"""Random signs against their distribution, networks against a plain transcription, and attacks on models whose answer is known."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import conv2d
from torch.nn.utils import parametrize

from dlatlas.compression import binary_robustness
from dlatlas.compression.binary_robustness import (
    BinaryConvNet,
    ExpectedFirstLayer,
    Rescaled,
    StochasticSign,
    evaluate_attacks,
    label_attack,
    masking_report,
    substitute,
    with_backward,
)
from dlatlas.robustness.kit.evaluate import right


def linear_model(gain, classes=2, size=16, seed=0):
    """Classes by the sign of one direction; logits of the size of `gain`."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(size, classes, bias=False))
    w = torch.randn(size)
    w -= w.mean()  # blind to brightness
    with torch.no_grad():
        model[1].weight.copy_(gain * torch.stack([-w, w]))
    x = torch.rand(200, 1, 4, 4)
    return model, x, model(x).argmax(1), w


def test_frequency_of_plus_is_the_hard_sigmoid():
    w = torch.tensor([-1.7, -1.0, -0.5, 0.0, 0.2, 1.0, 3.0])
    draw = StochasticSign()
    draws = torch.stack([draw(w) for _ in range(4000)])
    assert set(draws.flatten().tolist()) == {-1, 1}
    np.testing.assert_allclose((draws > 0).double().mean(0), np.clip((w.double().numpy() + 1) / 2, 0, 1), atol=0.03)
    assert StochasticSign("deterministic")(w).tolist() == [-1, -1, -1, 1, 1, 1, 1]


@pytest.mark.parametrize("mode", ["stochastic", "deterministic"])
def test_gradient_reaches_the_latent_weight(mode):
    layer = parametrize.register_parametrization(nn.Linear(5, 3, bias=False), "weight", StochasticSign(mode))
    x = torch.randn(4, 5)
    layer(x).sum().backward()
    torch.testing.assert_close(layer.parametrizations.weight.original.grad, x.sum(0).expand(3, 5))


def plain(net, x, scales):
    a, b, c = (torch.where(layer.parametrizations.weight.original >= 0, 1.0, -1.0) for layer in net.layers)
    h = torch.where(scales[0] * conv2d(2 * x - 1, a, stride=2) >= 0, 1.0, -1.0)
    h = torch.where(scales[1] * conv2d(h, b, stride=2) >= 0, 1.0, -1.0)
    return scales[2] * h.flatten(1) @ c.T


def test_network_is_the_transcription():
    net = BinaryConvNet(6)
    x = torch.rand(5, 1, 28, 28)
    torch.testing.assert_close(net(x), plain(net, x, net.log_scale.exp()))
    torch.testing.assert_close(net.log_scale.exp(), torch.tensor([25.0, 150.0, 192.0]) ** -0.5)
    assert torch.equal(net(x), net(x))


def test_scalars_change_no_decision():
    net = BinaryConvNet(6)
    with torch.no_grad():
        net.log_scale.add_(torch.randn(3))
    x = torch.rand(50, 1, 28, 28)
    bare = BinaryConvNet(6, scaled=False)
    bare.load_state_dict({k: v for k, v in net.state_dict().items() if k != "log_scale"})
    assert torch.equal(bare(x), plain(net, x, (1, 1, 1))) and torch.equal(bare(x), net.unscaled()(x))
    assert torch.equal(bare(x).argmax(1), net(x).argmax(1))
    assert net.log_scale is not None  # the copy is a copy


def test_only_the_first_layer_is_stochastic_also_in_evaluation_mode():
    net = BinaryConvNet(6, stochastic_first=True).eval()
    assert not torch.equal(net.conv1.weight, net.conv1.weight)
    assert torch.equal(net.conv2.weight, net.conv2.weight) and torch.equal(net.fc.weight, net.fc.weight)


def test_expected_first_layer_is_the_mean_over_draws():
    net = BinaryConvNet(3, stochastic_first=True).eval()
    view = ExpectedFirstLayer(net)
    seen = []
    net.top = lambda h: seen.append(h) or h.flatten(1)
    x = torch.rand(4, 1, 28, 28)
    with torch.no_grad():
        exact = view(x)
        drawn = sum(net(x) for _ in range(1500)) / 1500
    assert (drawn - exact).abs().mean() < 0.03 and (drawn - exact).abs().max() < 0.2
    assert exact.std() > 0.15 and seen[0].shape == (4, 3, 12, 12)


def test_twin_is_real_and_latent_weights_are_clipped():
    twin = BinaryConvNet(6, binary=False)
    assert len(twin.conv1.weight.unique()) > 2 and twin.conv1.bias is not None and twin.log_scale is None
    twin.clip_latent()
    net = BinaryConvNet(6)
    latent = net.conv2.parametrizations.weight.original
    latent.data.mul_(9)
    net.clip_latent()
    assert latent.abs().max() == 1


def test_backward_passes_differ_and_forward_does_not():
    net = BinaryConvNet(6)
    net.log_scale.data += 1
    x = torch.rand(8, 1, 28, 28, requires_grad=True)
    out, grads = net(x), {}
    for name in ("clipped", "tanh", "identity"):
        other = with_backward(net, name)
        assert torch.equal(other(x), out)
        (grads[name],) = torch.autograd.grad(other(x)[:, 0].sum(), x)
    # Two layers of signs, written out: the gradient of z is that of h times the factor.
    w, s = [layer.weight.detach() for layer in net.layers], net.log_scale.detach().exp()
    z1 = s[0] * conv2d(2 * x.detach() - 1, w[0], stride=2)
    z2 = s[1] * conv2d(torch.where(z1 >= 0, 1.0, -1.0), w[1], stride=2)
    factors = {"clipped": lambda z: (z.abs() <= 1).float(), "tanh": lambda z: 1 - z.tanh() ** 2, "identity": torch.ones_like}
    for name, f in factors.items():
        g2 = f(z2) * s[2] * w[2][0].view(1, 12, 4, 4)
        # The last row and column lie beyond the last window: no gradient.
        g1 = f(z1) * nn.functional.pad(nn.functional.conv_transpose2d(g2, s[1] * w[1], stride=2), (0, 1, 0, 1))
        g0 = 2 * nn.functional.pad(nn.functional.conv_transpose2d(g1, s[0] * w[0], stride=2), (0, 1, 0, 1))
        torch.testing.assert_close(grads[name], g0, rtol=1e-4, atol=1e-6)


def test_report_flags_a_saturated_linear_model_and_no_other():
    clear, x, y, w = linear_model(1.0)
    report = masking_report(clear, x, y, eps=0.05, source=linear_model(1.0)[0])
    assert report == {"grad_zero_fraction": 0.0, "single_vs_iterative_ok": True, "black_vs_white_ok": True}
    masked, *_ = linear_model(1e5)
    report = masking_report(masked, x, y, eps=0.05)  # black box: a substitute of its own
    assert report["grad_zero_fraction"] > 0.9 and not report["black_vs_white_ok"]
    # Share of zero gradients by hand: cross-entropy at the true label below the smallest difference from one.
    half, x, y, w = linear_model(30.0)
    z = 2 * half(x).amax(1).double()
    lost = (torch.exp(-z) * 30 * 2 * float(w.abs().max()) < 1e-12).double().mean()
    assert masking_report(half, x, y)["grad_zero_fraction"] == pytest.approx(float(lost), abs=0.25)


def test_attacks_on_a_linear_model_leave_what_the_margin_says():
    model, x, y, w = linear_model(1.0)
    # Misclassified as soon as the margin is used up, clipping to the box included.
    side = (1 - 2.0 * y)[:, None] * w.sign()
    optimal = (x.flatten(1) + 0.1 * side).clamp(0, 1) @ w
    true = float(((optimal > 0).long() == y).double().mean())
    found = evaluate_attacks(model, x, y, 0.1, source=model, queries=200)
    assert list(found) == ["fgsm", "pgd", "transfer", "boundary", "noise"]
    assert found["fgsm"] == pytest.approx(true) and found["pgd"] == pytest.approx(true) and found["transfer"] == pytest.approx(true)
    assert true <= found["boundary"] <= true + 0.05 and found["noise"] > true + 0.2
    assert evaluate_attacks(model, x, y, 0.0, n=7, queries=2) == dict.fromkeys(found, 1.0)


def test_rescaling_undoes_saturation_in_the_evaluation():
    model, x, y, _ = linear_model(1e5)
    blind, seeing = (evaluate_attacks(model, x, y, 0.1, source=model, queries=1, rescale=r) for r in (False, True))
    assert blind["fgsm"] > 0.9 and seeing["fgsm"] < 0.6
    for size, seen in ((4.0, Rescaled(model, x)), (0.5, Rescaled(model, x, 0.5))):
        assert seen(x).detach().std(1).mean().item() == pytest.approx(size, rel=1e-4)


def test_search_by_labels_finds_nearly_the_margin_and_sees_only_labels():
    model, x, y, w = linear_model(1.0)
    x = 0.4 + 0.2 * x  # far from the box
    y = model(x).argmax(1)
    y[:5] = 1 - y[:5]  # five that are wrong by themselves
    points, radius = label_attack(LabelsOnly(model), x, y, 0.3, queries=250)
    margin = (x.flatten(1) @ w).abs() / w.abs().sum()
    assert (radius[:5] == 0).all() and torch.equal(points[:5], x[:5])
    assert (radius[5:] >= 0.99 * margin[5:]).all()
    assert (radius[5:] / margin[5:]).median() < 1.1
    found = radius <= 0.3
    assert (model(points).argmax(1) != y)[found].all()
    assert ((points - x).abs().amax((1, 2, 3)) <= 0.3 + 1e-6).all()
    never, radius = label_attack(LabelsOnly(model), x, model(x).argmax(1), 0.0, queries=3)
    assert torch.equal(never, x)
    _, radius = label_attack(Constant(), x, torch.zeros(200, dtype=torch.long), 0.3, queries=3)
    assert (radius == math.inf).all()


class LabelsOnly(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        assert not torch.is_grad_enabled()
        return nn.functional.one_hot(self.model(x).argmax(1), 2).float()


class Constant(nn.Module):
    def forward(self, x):
        return torch.eye(2)[0].expand(len(x), 2)


def test_substitute_learns_the_answers_from_labels():
    model, x, *_ = linear_model(1.0)
    net = substitute(LabelsOnly(model), x)
    fresh = torch.rand(300, 1, 4, 4)
    assert float(right(net, fresh, model(fresh).argmax(1)).mean()) > 0.85


@pytest.mark.parametrize(
    "call",
    [
        lambda: StochasticSign("random"),
        lambda: BinaryConvNet(0),
        lambda: BinaryConvNet(4, backward="sigmoid"),
        lambda: with_backward(BinaryConvNet(2), "sigmoid"),
        lambda: ExpectedFirstLayer(BinaryConvNet(2)),
        lambda: ExpectedFirstLayer(BinaryConvNet(2, binary=False)),
        lambda: Rescaled(Constant(), torch.rand(2, 1, 4, 4), 0.0),
        lambda: evaluate_attacks(Constant(), torch.rand(2, 3), torch.zeros(2, dtype=torch.long), 0.1, n=0),
        lambda: label_attack(Constant(), torch.rand(2, 3), torch.zeros(2, dtype=torch.long), -0.1),
        lambda: label_attack(Constant(), torch.rand(2, 3), torch.zeros(2, dtype=torch.long), 0.1, 0),
    ],
)
def test_bad_input_is_refused(call):
    with pytest.raises(ValueError, match="got"):
        call()


def test_the_expected_layer_agrees_with_many_draws_for_nearly_certain_weights(monkeypatch):
    torch.manual_seed(0)
    net = BinaryConvNet(4, stochastic_first=True).eval()
    with torch.no_grad():
        latent = net.conv1.parametrizations.weight.original
        latent.copy_(0.9 * latent.sign())
    x, seen = torch.rand(2, 1, 28, 28), []
    monkeypatch.setattr(net, "top", lambda h: (seen.append(h), torch.zeros(2, 10))[1])
    with torch.no_grad():
        ExpectedFirstLayer(net)(x)
        drawn = [torch.where(conv2d(2 * x - 1, net.conv1.weight, stride=2) >= 0, 1.0, -1.0) for _ in range(400)]
    assert (seen[0] - torch.stack(drawn).mean(0)).abs().mean() < 0.06


def test_the_transfer_asks_the_source_and_not_the_model(monkeypatch):
    torch.manual_seed(0)
    x, y = torch.rand(4, 1, 28, 28), torch.tensor([0, 1, 2, 3])
    model, source = BinaryConvNet(2).eval(), BinaryConvNet(2, binary=False).eval()
    targets = []
    real = binary_robustness.pgd
    monkeypatch.setattr(binary_robustness, "pgd", lambda net, *args, **kwargs: (targets.append(net), real(net, *args, **kwargs))[1])
    evaluate_attacks(model, x, y, 0.1, 4, source=source, steps=2, queries=2, rescale=False)
    assert len(targets) == 2 and targets[0] is model and targets[1] is source
