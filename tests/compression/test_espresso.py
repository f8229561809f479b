"""Packed networks against dense ones, integer for integer, on both backends."""

import pytest
import torch
from torch import nn
from torch.nn.functional import conv2d, linear

from dlatlas.compression import espresso
from dlatlas.compression.espresso import PackedConv2d, PackedLinear, bitplane_linear, compile_bdnn
from dlatlas.compression.ftprop import SignActivation
from dlatlas.compression.kit import kernels
from dlatlas.compression.kit.qat import quantize_aware
from dlatlas.compression.kit.ste import ste_sign
from dlatlas.kit.nets import Lambda, mlp

SIZES = [1, 63, 64, 65, 1000]


@pytest.fixture(params=["chosen", "numpy"], autouse=True)
def _backend(request, monkeypatch):
    if request.param == "numpy":
        monkeypatch.setattr(kernels, "load", lambda: None)


def signs(*shape):
    return torch.randint(0, 2, shape).float() * 2 - 1


@pytest.mark.parametrize("n", SIZES)
def test_linear(n):
    x, weight, bias = signs(5, n), torch.randn(9, n), torch.randn(9)
    weight[0, 0] = 0.0  # counts as +1
    layer = PackedLinear.from_dense(weight, bias)
    expected = linear(x.double(), torch.where(weight >= 0, 1.0, -1.0).double())
    assert torch.equal(layer(x), expected.float() + bias)
    assert torch.equal(layer(kernels.pack_bits(x)), layer(x))
    assert torch.equal(PackedLinear.from_dense(weight)(x), expected.float())
    assert layer.words.numel() == 9 * -(-n // 64)


@pytest.mark.parametrize("channels", [1, 3, 64, 70])
@pytest.mark.parametrize(("kernel", "stride", "padding"), [((3, 3), 1, 1), ((3, 3), 2, 1), ((1, 1), 1, 0), ((5, 2), 1, 3), ((2, 4), 3, 0)])
def test_convolution_pads_with_zeros(channels, kernel, stride, padding):
    x, weight = signs(2, channels, 9, 7), torch.randn(4, channels, *kernel)
    layer = PackedConv2d.from_dense(weight, stride, padding)
    expected = conv2d(x, torch.where(weight >= 0, 1.0, -1.0), stride=stride, padding=padding)
    assert torch.equal(layer(x), expected)
    small = signs(1, channels, 5, 6)  # another size: the correction belongs to the size
    assert torch.equal(layer(small), conv2d(small, torch.where(weight >= 0, 1.0, -1.0), stride=stride, padding=padding))


@pytest.mark.parametrize("n", SIZES)
def test_bit_planes_give_the_product_of_bytes(n):
    x, weight = torch.randint(0, 256, (6, n), dtype=torch.uint8), signs(7, n)
    x[0], x[1] = 0, 255
    out = bitplane_linear(x, weight)
    assert out.dtype == torch.int32
    assert torch.equal(out, (x.long() @ weight.long().T).int())
    # The paper's own form: bits under the masks of positive and of negative weights.
    planes = [x.int() >> b & 1 for b in range(8)]
    by_masks = sum(2**b * ((p[:, None] & (weight > 0)).sum(2) - (p[:, None] & (weight < 0)).sum(2)) for b, p in enumerate(planes))
    assert torch.equal(out, by_masks.int())


def shuffled_norms(model):
    """Normalisation as after a strange training: scales of both signs and zero."""
    for m in model.modules():
        if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d):
            m.running_mean.normal_(0, 10)
            m.running_var.uniform_(1, 300)
            if m.affine:
                nn.init.normal_(m.weight)
                nn.init.normal_(m.bias)
                with torch.no_grad():
                    m.weight[0], m.weight[1], m.bias[1] = 0.0, 0.0, -1.0
    return model.eval()


def binary(model):
    return shuffled_norms(quantize_aware(model, ste_sign, skip=()))


@pytest.mark.parametrize("bias", [False, True])
def test_a_multilayer_perceptron(bias):
    model = binary(nn.Sequential(nn.Flatten(), *mlp([50, 70, 64, 5], ste_sign, norm="batch", bias=bias), nn.BatchNorm1d(5)))
    x = torch.randint(0, 256, (40, 1, 10, 5), dtype=torch.uint8)
    packed = compile_bdnn(model)
    assert torch.equal(packed(x), model(x.float()))
    assert packed.weight_bits() == 64 * (70 * 1 + 64 * 2 + 5 * 1)
    assert not packed(x).requires_grad
    model.double()
    assert torch.equal(compile_bdnn(model)(x), model(x.double()))
    model.float()
    z = signs(40, 50)
    assert torch.equal(compile_bdnn(model, bytes_in=False)(z), model(z))


def test_without_normalisation():
    model = binary(mlp([30, 20, 5], ste_sign))
    z = signs(40, 30)
    torch.testing.assert_close(compile_bdnn(model, bytes_in=False)(z), model(z))


@pytest.mark.parametrize("bytes_in", [True, False])
def test_a_convolutional_network(bytes_in):
    sign = Lambda(ste_sign)
    convolutions = nn.Sequential(
        nn.Conv2d(2, 6, 5, bias=False), nn.MaxPool2d(2), nn.BatchNorm2d(6), sign,
        nn.Conv2d(6, 70, 3, stride=2, padding=1), nn.BatchNorm2d(70, affine=False), sign,
    )  # fmt: skip
    head = nn.Sequential(nn.Flatten(), nn.Linear(70 * 3 * 2, 20), nn.BatchNorm1d(20), sign, nn.Dropout(), nn.Linear(20, 4))
    model = binary(nn.Sequential(convolutions, head))
    x = torch.randint(0, 256, (30, 2, 14, 12), dtype=torch.uint8) if bytes_in else signs(30, 2, 14, 12)
    torch.testing.assert_close(compile_bdnn(model, bytes_in)(x), model(x.float()))


def test_thresholds_agree_at_and_beside_the_boundary():
    """Every integer that a layer can give, for scales of both signs and boundaries that are integers themselves."""
    norm = nn.BatchNorm1d(6, eps=0.0).eval()
    norm.running_mean.copy_(torch.tensor([0.0, 2.0, 2.5, 0.0, 2.0, 2.5]))
    norm.weight.data.copy_(torch.tensor([1.0, 2.0, 0.5, -1.0, -2.0, -0.5]))
    z = torch.arange(-8, 9, dtype=torch.int32)[:, None].expand(-1, 6).contiguous()
    words = espresso._Threshold(norm, None, [PackedLinear.from_dense(torch.ones(6, 1))])(z)
    assert torch.equal(kernels.unpack_bits(words, 6), ste_sign(norm(z.float())).detach())


def conv_net(**changes):
    return binary(nn.Sequential(nn.Conv2d(4, 4, 3, **changes), nn.Flatten(), nn.Linear(4, 2)))


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: PackedLinear.from_dense(torch.ones(3)), r"\[N, n\]"),
        (lambda: PackedLinear.from_dense(torch.ones(3, 2), torch.ones(2)), r"\[N, n\]"),
        (lambda: PackedConv2d.from_dense(torch.ones(3, 2)), "filters"),
        (lambda: PackedConv2d.from_dense(torch.ones(3, 2, 1, 1), stride=0), "stride"),
        (lambda: PackedConv2d.from_dense(torch.ones(3, 2, 1, 1))(signs(1, 3, 4, 4)), r"\[B, 2, H, W\]"),
        (lambda: bitplane_linear(torch.ones(2, 3), signs(2, 3)), "bytes"),
        (lambda: bitplane_linear(torch.ones(2, 3, dtype=torch.uint8), 0.5 * signs(2, 3)), r"-1 or \+1"),
        (lambda: compile_bdnn(mlp([3, 4, 2], ste_sign)), r"-1 or \+1"),
        (lambda: compile_bdnn(binary(mlp([3, 4, 2]))), "cannot pack ReLU"),
        (lambda: compile_bdnn(binary(mlp([3, 4, 2], SignActivation))), r"cannot pack SignActivation.*Lambda\(ste_sign\)"),
        (lambda: compile_bdnn(binary(mlp([3, 4, 2], torch.sign))), r"cannot pack Lambda\(sign\).*expected .*Lambda\(ste_sign\)"),
        (lambda: compile_bdnn(binary(mlp([3, 4, 2], ste_sign, final=ste_sign))), "must end"),
        (lambda: compile_bdnn(nn.Sequential()), "must end"),
        (lambda: compile_bdnn(conv_net(stride=(1, 2))), "stride"),
        (lambda: compile_bdnn(conv_net(groups=2)), "groups"),
        (lambda: compile_bdnn(conv_net()), "cannot pack Flatten"),
        (lambda: compile_bdnn(binary(mlp([3, 4, 2], ste_sign)))(signs(1, 3)), "bytes"),
    ],
)
def test_bad_input(call, match):
    with pytest.raises(ValueError, match=match):
        call()
