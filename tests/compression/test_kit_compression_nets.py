"""Networks of the compression chapters: sizes, order of the layers, the language model against torch's cells."""

import pytest
import torch
from torch import nn
from torch.nn.functional import avg_pool2d, conv2d, linear, max_pool2d

from dlatlas.compression.kit.nets import CharLSTM, lenet, small_resnet


def test_lenet_is_lenet():
    net = lenet()
    assert sum(p.numel() for p in net.parameters()) == 156 + 2416 + 256 * 120 + 120 + 120 * 84 + 84 + 850
    x = torch.randn(4, 1, 28, 28)
    h = torch.relu(max_pool2d(conv2d(x, net.conv1.weight, net.conv1.bias), 2))
    h = torch.relu(max_pool2d(conv2d(h, net.conv2.weight, net.conv2.bias), 2)).flatten(1)
    h = torch.relu(linear(torch.relu(linear(h, net.fc1.weight, net.fc1.bias)), net.fc2.weight, net.fc2.bias))
    torch.testing.assert_close(net.features(x), h)
    torch.testing.assert_close(net(x), linear(h, net.fc3.weight, net.fc3.bias))


def test_lenet_scales_and_takes_other_activations():
    net = lenet(0.25, n_classes=3, in_ch=2, act=torch.sign, norm=True)
    assert net.conv1.weight.shape == (2, 2, 5, 5)
    assert net.fc2.weight.shape == (21, 30)
    h = net.features(torch.randn(5, 2, 28, 28))
    assert h.abs().unique().tolist() == [1.0]
    assert sum(isinstance(m, nn.BatchNorm2d | nn.BatchNorm1d) for m in net.modules()) == 4


@pytest.mark.parametrize(("depth", "blocks"), [(8, 3), (14, 6)])
def test_the_resnet_has_its_depth(depth, blocks):
    net = small_resnet(depth, width=4)
    assert sum(isinstance(m, nn.Conv2d | nn.Linear) for m in net.modules()) == depth
    assert len(net.blocks) == blocks
    assert net(torch.randn(2, 1, 28, 28)).shape == (2, 10)
    assert net.blocks(torch.randn(2, 4, 28, 28)).shape == (2, 16, 7, 7)


def test_without_its_convolutions_the_resnet_is_its_shortcut():
    net = small_resnet(8, width=3, bn_affine=False, n_classes=4, in_ch=3).eval()
    for block in net.blocks:
        nn.init.zeros_(block.conv2.weight)
    x = torch.rand(2, 3, 16, 16)
    h = torch.relu(net.norm(net.conv(x)))
    features = net.features(x)
    torch.testing.assert_close(features[:, :3], avg_pool2d(h[..., ::4, ::4], 4).flatten(1))
    assert features[:, 3:].abs().sum() == 0
    assert not any("norm" in name for name, _ in net.named_parameters())


@pytest.mark.parametrize("layers", [1, 2])
def test_the_language_model_is_cells_in_a_loop(layers):
    net = CharLSTM(11, 6, layers).double()
    tokens = torch.randint(11, (5, 3))
    logits, (h, c) = net(tokens)
    states = [(torch.zeros(3, 6).double(), torch.zeros(3, 6).double()) for _ in range(layers)]
    for t, column in enumerate(tokens):
        x = net.embedding.weight[column]
        for k in range(layers):
            w = {name: getattr(net.lstm, f"{name}_l{k}") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")}
            i, f, g, o = (linear(x, w["weight_ih"], w["bias_ih"]) + linear(states[k][0], w["weight_hh"], w["bias_hh"])).chunk(4, 1)
            cell = f.sigmoid() * states[k][1] + i.sigmoid() * g.tanh()
            x = o.sigmoid() * cell.tanh()
            states[k] = (x, cell)
        torch.testing.assert_close(logits[t], linear(x, net.decoder.weight, net.decoder.bias))
    torch.testing.assert_close(h, torch.stack([s[0] for s in states]))
    first, state = net(tokens[:2])
    rest, _ = net(tokens[2:], state)
    torch.testing.assert_close(torch.cat([first, rest]), logits)
    torch.testing.assert_close(c, torch.stack([s[1] for s in states]))


def test_tied_weights_are_one_tensor():
    net = CharLSTM(11, 6, tied=True)
    assert net.decoder.weight is net.embedding.weight
    assert CharLSTM(11, 6).decoder.weight is not CharLSTM(11, 6).embedding.weight


@pytest.mark.parametrize(
    "call",
    [
        lambda: lenet(0.05),
        lambda: lenet(n_classes=0),
        lambda: small_resnet(10),
        lambda: small_resnet(2),
        lambda: small_resnet(width=0),
        lambda: CharLSTM(0, 4),
        lambda: CharLSTM(5, 4)(torch.zeros(3, dtype=torch.long)),
    ],
)
def test_bad_input(call):
    with pytest.raises(ValueError, match="got"):
        call()
