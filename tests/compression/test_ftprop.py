"""Target propagation against the straight-through estimator, autograd of the layer losses, and scikit-learn's hinge regression."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import SGDClassifier
from torch import nn
from torch.nn.functional import cross_entropy

from dlatlas.compression.ftprop import QuantizedReLU, SignActivation, ftprop_step, layer_loss, targets_from_gradient
from dlatlas.compression.kit.ste import ste_sign

KINDS = ("soft_hinge", "saturated_hinge", "hinge")
Z = torch.tensor([-3.0, -1.0, -0.4, 0.0, 0.3, 1.0, 2.5])


def gradient(function, z, grad):
    z = z.clone().requires_grad_()
    out = function(z)
    out.backward(grad.expand_as(out))
    return out.detach(), z.grad


def test_layer_losses_are_the_written_ones():
    z, t = Z.repeat(2), torch.tensor([1.0, -1.0]).repeat_interleave(7)
    a, b = z.numpy(), t.numpy()
    np.testing.assert_allclose(layer_loss(z, t, "hinge"), np.maximum(0, 1 - a * b), atol=1e-6)
    np.testing.assert_allclose(layer_loss(z, t, "saturated_hinge"), np.maximum(0, 1 - np.maximum(a * b, -1)), atol=1e-6)
    np.testing.assert_allclose(layer_loss(z, t, "soft_hinge"), 1 + np.tanh(-a * b), atol=1e-6)


def test_targets_go_against_the_gradient():
    assert targets_from_gradient(torch.tensor([2.0, -3.0, 0.0, -0.0])).tolist() == [-1, 1, 1, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_both_zeros_are_plus_and_the_type_stays(dtype):
    z = torch.tensor([-0.0, 0.0, -1e-7, 1e-7, -3.0, -torch.inf, torch.inf], dtype=dtype)
    out = SignActivation()(z)
    assert out.dtype == dtype and out.tolist() == [1, 1, -1, 1, -1, -1, 1]


def test_saturated_hinge_is_the_clipped_straight_through_estimator():
    z = torch.cat([Z, 2 * torch.randn(500)])
    g = torch.randn_like(z)
    ours, theirs = gradient(SignActivation("saturated_hinge"), z, g), gradient(ste_sign, z, g)
    assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])
    assert 0.2 < (ours[1] == 0).float().mean() < 0.9


@pytest.mark.parametrize("kind", KINDS)
def test_backward_is_the_gradient_of_the_layer_loss_times_credit(kind):
    z = 2 * torch.randn(400, dtype=torch.float64)
    g = torch.randn_like(z)
    out, got = gradient(SignActivation(kind), z, g)
    assert set(out.tolist()) == {-1, 1} and torch.equal(out, torch.where(z >= 0, 1.0, -1.0).double())
    leaf = z.clone().requires_grad_()
    (g.abs() * layer_loss(leaf, -g.sign(), kind)).sum().backward()
    torch.testing.assert_close(got, leaf.grad)


def test_hinge_hears_only_units_that_miss_their_target_or_barely_meet_it():
    _, pushed_up = gradient(SignActivation("hinge"), Z, torch.tensor(-1.0))  # target +1
    _, pushed_down = gradient(SignActivation("hinge"), Z, torch.tensor(2.0))
    assert pushed_up.tolist() == [-1, -1, -1, -1, -1, -1, 0]
    assert pushed_down.tolist() == [0, 2, 2, 2, 2, 2, 2]


@pytest.mark.parametrize("levels", [2, 3, 4, 16])
def test_quantized_relu_rounds_to_levels(levels):
    z = torch.linspace(-0.7, 1.7, 1001, dtype=torch.float64)
    n = levels - 1
    expected = np.floor(n * np.clip(z.numpy(), 0, 1) + 0.5) / n
    out, grad = gradient(QuantizedReLU("saturated_hinge", levels), z, torch.tensor(3.0, dtype=torch.float64))
    np.testing.assert_allclose(out, expected, atol=1e-12)
    assert torch.equal(grad, 3.0 * ((z >= 0) & (z <= 1)))
    _, soft = gradient(QuantizedReLU(levels=levels), z, torch.tensor(3.0, dtype=torch.float64))
    np.testing.assert_allclose(soft, 3 / np.cosh(2 * z.numpy() - 1) ** 2)
    assert np.trapezoid(soft / 3, z) > 0.8  # about the whole rise from 0 to 1


def layers_and_model(kind, seed):
    torch.manual_seed(seed)
    layers = [nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8)), nn.Linear(8, 6), nn.Linear(6, 3)]
    return layers, nn.Sequential(layers[0], SignActivation(kind), layers[1], SignActivation(kind), layers[2])


@pytest.mark.parametrize("kind", KINDS)
def test_layer_local_step_is_backpropagation_through_the_activation(kind):
    x, y = torch.randn(20, 5), torch.randint(3, (20,))
    layers, model = layers_and_model(kind, 1)
    other, reference = layers_and_model(kind, 1)
    del other
    opt = torch.optim.SGD(model.parameters(), lr=0.5)
    ours = ftprop_step(layers, x, y, opt, kind=kind)
    loss = cross_entropy(reference(x), y)
    loss.backward()
    torch.testing.assert_close(ours, loss.detach())
    assert not ours.requires_grad
    for p, q in zip(model.parameters(), reference.parameters()):
        torch.testing.assert_close(p.detach(), q.detach() - 0.5 * q.grad)
    assert all(q.grad.abs().sum() > 0 for q in (reference[0][0].weight, reference[2].weight))


def test_targets_of_one_layer_are_the_labels_and_it_is_hinge_regression():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 4))
    y = np.where(x @ [1.0, -2, 0.5, 1] > 0.3, 1.0, -1.0)
    peer = SGDClassifier(loss="hinge", penalty=None, learning_rate="constant", eta0=0.1)
    layer = nn.Linear(4, 1).double()
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    opt = torch.optim.SGD(layer.parameters(), lr=0.1)

    def hinge(z, t):
        return layer_loss(z[:, 0], t, "hinge").sum()

    for _ in range(30):
        for i in range(60):
            peer.partial_fit(x[i : i + 1], y[i : i + 1], classes=[-1, 1])
            ftprop_step([layer], torch.tensor(x[i : i + 1]), torch.tensor(y[i : i + 1]), opt, output_loss=hinge)
    np.testing.assert_allclose(layer.weight.detach(), peer.coef_, atol=1e-9)
    np.testing.assert_allclose(layer.bias.detach(), peer.intercept_, atol=1e-9)
    assert (np.sign(peer.decision_function(x)) == y).mean() > 0.95


def test_hidden_layers_learn_what_one_layer_cannot():
    torch.manual_seed(0)
    x = torch.rand(300, 2) * 2 - 1
    y = (x[:, 0] * x[:, 1] > 0).long()
    layers = [nn.Linear(2, 40), nn.Linear(40, 2)]
    opt = torch.optim.Adam([p for layer in layers for p in layer.parameters()], lr=0.02)
    losses = [float(ftprop_step(layers, x, y, opt)) for _ in range(200)]
    assert losses[-1] < 0.3 < 0.6 < losses[0]


@pytest.mark.parametrize(
    "call",
    [
        lambda: SignActivation("square"),
        lambda: QuantizedReLU("square"),
        lambda: QuantizedReLU(levels=1),
        lambda: layer_loss(Z, Z, "square"),
        lambda: layer_loss(Z, Z[:3], "hinge"),
        lambda: ftprop_step([], Z, Z, None),
        lambda: ftprop_step([nn.Linear(1, 1)], Z, Z, None, kind="square"),
    ],
)
def test_bad_input_is_refused(call):
    with pytest.raises(ValueError, match="got"):
        call()
