"""The temporal convolutional network against sums in NumPy, and what it can and cannot see."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from dlatlas.nlp.tcn import TCN


def numpy_tcn(net, x):
    """One sequence [T, d_in] by the sums of the definition."""
    for i, level in enumerate(net.levels):
        y, d = x, 2**i
        for conv in (level.first, level.second):
            f, b = conv.weight.detach().numpy(), conv.bias.detach().numpy()  # [out, in, k]; the last tap is the present
            k, out = f.shape[2], np.zeros((len(x), f.shape[0]))
            for t in range(len(x)):
                out[t] = b + sum(f[:, :, k - 1 - j] @ y[t - d * j] for j in range(k) if t - d * j >= 0)
            y = np.maximum(out, 0)
        s = level.shortcut
        skip = x if isinstance(s, nn.Identity) else x @ s.weight.detach().numpy()[:, :, 0].T + s.bias.detach().numpy()
        x = np.maximum(skip + y, 0)
    return x


@pytest.mark.parametrize(("channels", "k"), [([4, 4, 3], 3), ([2], 1), ([3, 3], 2)])
def test_against_numpy(channels, k):
    net = TCN(2, channels, kernel_size=k).double()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn_like(p))  # biases that are not zero
    x = torch.randn(2, 17, 2, dtype=torch.float64)
    out = net(x).detach()
    for row, expected in zip(out, x.numpy()):
        np.testing.assert_allclose(row, numpy_tcn(net, expected), atol=1e-12)


def test_the_future_is_not_seen():
    net = TCN(2, [4, 4, 4], kernel_size=3).double().eval()
    x = torch.randn(1, 40, 2, dtype=torch.float64)
    changed = x.clone()
    changed[:, 25] += 1
    before, after = net(x), net(changed)
    assert torch.equal(before[:, :25], after[:, :25])
    assert not torch.equal(before[:, 25], after[:, 25])
    torch.testing.assert_close(net(x[:, :25]), before[:, :25])  # the end of the sequence does not matter either


@pytest.mark.parametrize(("levels", "k"), [(1, 3), (3, 2), (3, 8), (4, 1)])
def test_receptive_field_is_what_the_gradient_reaches(levels, k):
    net = TCN(1, [2] * levels, kernel_size=k).double()
    with torch.no_grad():
        for p in net.parameters():
            p.abs_().add_(0.01)  # nothing cancels, no unit is dead
    T = net.receptive_field + 10
    x = torch.rand(1, T, 1, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(net(x)[0, -1].sum(), x)
    reached = grad[0, :, 0].nonzero()[:, 0]
    assert len(reached) == net.receptive_field == 1 + 2 * sum((k - 1) * 2**i for i in range(levels))
    assert reached.min() == T - net.receptive_field


def test_one_level_is_two_convolutions_of_torch():
    net = TCN(4, [4], kernel_size=3).double()
    first, second = net.levels[0].first, net.levels[0].second
    x = torch.randn(2, 12, 4, dtype=torch.float64)
    y = x.transpose(1, 2)
    for conv in (first, second):
        plain = nn.Conv1d(4, 4, 3, padding=2).double()
        plain.load_state_dict({"weight": conv.weight, "bias": conv.bias})
        y = plain(y)[:, :, :12].relu()
    torch.testing.assert_close(net(x), (x + y.transpose(1, 2)).relu())


def test_weights_are_normalised():
    net = TCN(3, [5, 5], kernel_size=2)
    names = [name for name, _ in net.named_parameters()]
    assert sum("original0" in name for name in names) == 4 and not any(name.endswith("first.weight") for name in names)
    conv = net.levels[0].first
    g = conv.parametrizations.weight.original0.detach().flatten()
    torch.testing.assert_close(conv.weight.detach().flatten(1).norm(dim=1), g)  # one length an output channel
    wide = TCN(50, [200], kernel_size=4).levels[0].first.weight
    assert wide.std().item() == pytest.approx(math.sqrt(2 / 200), rel=0.02)


def test_dropout_takes_whole_channels_and_rests_in_evaluation():
    net = TCN(40, [40], kernel_size=1, dropout=0.5)
    with torch.no_grad():
        for conv in (net.levels[0].first, net.levels[0].second):
            conv.weight = torch.eye(40)[:, :, None]
    x = torch.ones(1, 9, 40)
    out = net.train()(x)[0] - 1  # what the level adds: 0, or 4 where both dropouts kept the channel
    assert (out == out[0]).all() and set(out.round(decimals=4).unique().tolist()) == {0.0, 4.0}
    assert torch.equal(net.eval()(x), 2 * x)


def test_gradients():
    net = TCN(2, [3, 2], kernel_size=2).double()
    assert torch.autograd.gradcheck(net, torch.randn(1, 6, 2, dtype=torch.float64, requires_grad=True))


@pytest.mark.parametrize(
    "bad", [{"channels": []}, {"channels": [4, 0]}, {"kernel_size": 0}, {"dropout": 1.0}, {"dropout": -0.1}, {"d_in": 0}]
)
def test_bad_arguments(bad):
    with pytest.raises(ValueError, match="expected at least one level"):
        TCN(**{"d_in": 2, "channels": [4]} | bad)


def test_bad_inputs():
    for shape in ((2, 5, 3), (5, 2), (2, 0, 2)):
        with pytest.raises(ValueError, match=r"\[B, T >= 1, 2\], got"):
            TCN(2, [4])(torch.ones(shape))
