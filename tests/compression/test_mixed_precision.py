"""Half precision against NumPy's float16, the scaler against torch's GradScaler, and training whose gradients would vanish."""

from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

from dlatlas.compression.kit.nets import lenet, mlp
from dlatlas.compression.mixed_precision import LossScaler, MixedPrecision, half_matmul, saved_bytes, to_half_simulated


def batch(n=16, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.rand(n, 1, 28, 28, generator=g), torch.randint(10, (n,), generator=g)


def wrapped(network=lenet, lr=0.1, seed=0, **options):
    torch.manual_seed(seed)
    net = network()
    scaler = options.pop("scaler", LossScaler())
    return MixedPrecision(net, torch.optim.SGD(net.parameters(), lr), scaler, **options)


def test_rounding_is_that_of_float16_with_subnormals_and_overflow():
    x = torch.tensor([1 + 2**-11, 1 + 2**-10, 2.0**-24, 2.0**-25, 1.1 * 2**-25, 65504.0, 65519.0, 65520.0, -3.14159])
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(to_half_simulated(x).numpy(), x.numpy().astype(np.float16).astype(np.float32))
    assert to_half_simulated(x).tolist()[:6] == [1, 1 + 2**-10, 2.0**-24, 0, 2.0**-24, 65504]
    assert to_half_simulated(x)[7] == torch.inf and to_half_simulated(x).dtype == torch.float32


def test_products_agree_with_numpy_in_both_ways_of_summing():
    g = torch.Generator().manual_seed(1)
    a, b = torch.randn(2, 3, 37, generator=g), torch.randn(37, 4, generator=g)
    a16, b16 = a.numpy().astype(np.float16), b.numpy().astype(np.float16)
    exact = a16.astype(np.float64) @ b16.astype(np.float64)
    out = half_matmul(a, b)
    assert out.dtype == torch.float16 and out.shape == (2, 3, 4)
    np.testing.assert_array_less(np.abs(out.numpy() - exact), 2.0**-11 * np.abs(exact) + 1e-6)  # one rounding
    total = np.zeros((2, 3, 4), np.float16)
    for k in range(37):
        product = a16[..., :, k, None].astype(np.float32) * b16[None, None, k].astype(np.float32)
        total = (total.astype(np.float32) + product).astype(np.float16)
    np.testing.assert_array_equal(half_matmul(a, b, "fp16").numpy(), total)


def test_long_sums_in_half_precision_are_worse_and_finally_stand_still():
    g = torch.Generator().manual_seed(2)
    a, b = torch.rand(4, 4096, generator=g), torch.rand(4096, 4, generator=g)
    exact = a.half().double() @ b.half().double()
    once, always = ((half_matmul(a, b, how).double() - exact).abs().max() for how in ("fp32", "fp16"))
    assert always > 10 * once
    ones = torch.ones(1, 4096)
    assert half_matmul(ones, ones.mT).item() == 4096
    assert half_matmul(ones, ones.mT, "fp16").item() == 2048  # 2048 + 1 is rounded to 2048


@pytest.mark.parametrize("interval", [1, 3])
def test_scaler_decides_as_torch_does(interval):
    rng = np.random.default_rng(interval)
    settings = dict(init_scale=2.0**10, growth_factor=4.0, backoff_factor=0.25, growth_interval=interval)
    peer = torch.amp.GradScaler("cpu", **settings)
    ours = LossScaler(2.0**10, growth=4.0, backoff=0.25, interval=interval)
    p, q = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([q], 0.5)
    skipped = 0
    for _ in range(80):
        bad = rng.choice([0.0, 0.0, 0.0, np.inf, -np.inf, np.nan])
        grad = torch.tensor([1.0, 2.0, -3.0])
        grad[1] += bad
        assert torch.equal(ours.scale(torch.ones(())), peer.scale(torch.ones(())))
        p.grad, q.grad = (ours.factor * grad, peer.get_scale() * grad)
        before = q.detach().clone()
        found = ours.unscale_([p])
        peer.unscale_(optimizer)
        torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=0, equal_nan=True)
        peer.step(optimizer)
        assert found == torch.equal(before, q.detach()) == (not np.isfinite(bad) or bad != 0)
        ours.update(found)
        peer.update()
        assert ours.factor == peer.get_scale()
        skipped += found
    assert 20 < skipped < 60


def test_scaler_never_grows_beyond_a_float_and_can_stand_still():
    peer, ours = torch.amp.GradScaler("cpu", init_scale=2.0**126, growth_interval=1), LossScaler(2.0**126, interval=1)
    p = nn.Parameter(torch.ones(1))
    for _ in range(4):
        peer.scale(torch.ones(()))
        p.grad = torch.ones(1)
        peer.step(torch.optim.SGD([p], 0.0))
        peer.update()
        ours.update(False)
        assert ours.factor == peer.get_scale()
    fixed = LossScaler(8.0, interval=1, dynamic=False)
    fixed.update(True)
    fixed.update(False)
    assert fixed.factor == 8


def test_scaler_goes_on_from_its_state():
    a, b = LossScaler(interval=5), LossScaler(interval=5)
    for found in (False, True, False, False, False):
        a.update(found)
    b.load_state_dict(a.state_dict())
    for found in (False, False, True):
        a.update(found)
        b.update(found)
        assert a.state_dict() == b.state_dict()
    assert a.factor == 2.0**14


def test_a_power_of_two_changes_no_bit_of_training_in_floats():
    runs = [wrapped(scaler=LossScaler(s, dynamic=False), half=torch.float32) for s in (1.0, 2.0**20)]
    plain = lenet()
    plain.load_state_dict(runs[0].model.state_dict())
    optimizer = torch.optim.SGD(plain.parameters(), 0.1)
    for k in range(3):
        x, y = batch(seed=k)
        for mp in runs:
            assert mp.step(cross_entropy(mp(x), y))
        optimizer.zero_grad()
        cross_entropy(plain(x), y).backward()
        optimizer.step()
    for a, b, c in zip(*(mp.model.parameters() for mp in runs), plain.parameters()):
        assert torch.equal(a, b) and torch.equal(a, c)


def test_forward_and_gradient_are_the_rounded_ones_of_each_layer():
    """A perceptron by hand: every tensor between two operations is rounded to half precision, sums are not."""
    torch.manual_seed(3)
    net, x = mlp([5, 7, 4], "relu"), torch.randn(6, 5)
    r = to_half_simulated
    w1, b1, w2, b2 = (r(p.detach()).double() for p in net.parameters())
    h = r((r(x).double() @ w1.T + b1).float()).clamp(min=0).double()
    out = r((h @ w2.T + b2).float())
    mp = MixedPrecision(net, torch.optim.SGD(net.parameters(), 0.0), LossScaler(2.0**8, dynamic=False))
    torch.testing.assert_close(mp(x), out, rtol=2**-11, atol=1e-7)
    assert mp(x).dtype == torch.float32
    g = torch.randn(6, 4)
    assert mp.step((mp(x) * g).sum())
    g2 = r(g * 2**8).double()
    d_hidden = r((g2 @ w2).float()).double() * (h > 0)
    for p, want in zip(net.parameters(), (d_hidden.T @ r(x).double(), d_hidden.sum(0), g2.T @ h, g2.sum(0))):
        torch.testing.assert_close(p.grad, r(want.float()) / 2**8, rtol=2**-10, atol=1e-6)
        assert torch.equal(p.grad * 2**8, r(p.grad * 2**8))  # it was stored in half precision


def test_tensors_between_layers_are_half_and_normalisation_is_not():
    mp = wrapped(lambda: lenet(norm=True))
    seen = []
    for m in mp.modules():
        if isinstance(m, nn.Linear | nn.Conv2d | nn.BatchNorm2d | nn.ReLU):
            m.register_forward_hook(lambda m, i, o: seen.append((o.dtype, m.weight.dtype if hasattr(m, "weight") else None, type(m))))
    x, y = batch()
    reference = lenet(norm=True)
    reference.load_state_dict(mp.model.state_dict())
    mp.step(cross_entropy(mp(x), y))
    assert all(dtype == torch.float16 for dtype, _, _ in seen)
    for _, weight, kind in seen:
        assert weight in (None, torch.float32 if kind is nn.BatchNorm2d else torch.float16)
    reference(x)
    torch.testing.assert_close(mp.model.norms[0].running_var, reference.norms[0].running_var, rtol=1e-3, atol=1e-5)
    assert all(p.dtype == torch.float32 for p in mp.parameters()) and mp.model.norms[0].num_batches_tracked == 1


class Types(TorchDispatchMode):
    """Notes the type of what enters each operation whose name has one of these words."""

    def __init__(self, *words):
        super().__init__()
        self.words, self.seen = words, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(word in func.__name__ for word in self.words):
            self.seen.setdefault(func.__name__, set()).update(
                a.dtype for a in args if isinstance(a, torch.Tensor) and a.is_floating_point()
            )
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "norm",
    [
        lambda: nn.BatchNorm2d(4),
        lambda: nn.BatchNorm2d(4, affine=False, track_running_stats=False),
        lambda: nn.GroupNorm(2, 4),
        lambda: nn.LayerNorm([4, 6, 6]),
        lambda: nn.InstanceNorm2d(4, affine=True),
        lambda: nn.RMSNorm([4, 6, 6]),
        lambda: nn.Softmax(1),
        lambda: nn.LogSoftmax(1),
    ],
)
def test_statistics_are_those_of_floats_rounded_once(norm, half):
    """Forward and backward, to the bit: deviations of 500 from a mean of 1000, whose squares are no half precision numbers."""
    torch.manual_seed(0)
    net, peer = nn.Sequential(norm()), norm()
    peer.load_state_dict(net[0].state_dict())
    x = (1000 + 500 * torch.randn(8, 4, 6, 6)).to(half)
    net.register_parameter("spare", nn.Parameter(torch.zeros(1)))  # a softmax has none, and an optimizer wants one
    mp = MixedPrecision(net, torch.optim.SGD(net.parameters(), 0.0), LossScaler(1.0), half=half)
    given = x.float().requires_grad_()
    with Types("norm", "softmax", "pow", "mean") as types:
        out = mp(given)
        g = torch.randn_like(out).to(half).float()
        out.backward(g)
    assert types.seen and all(kinds == {torch.float32} for kinds in types.seen.values()), types.seen
    floats = x.float().requires_grad_()
    want = peer(floats)
    want.backward(g)
    assert torch.equal(out, want.to(half).float())
    assert torch.equal(given.grad, floats.grad.to(half).float())


def test_small_gradients_vanish_without_scaling_and_survive_with_it():
    x, y = batch(64)
    grads = {}
    for factor, half in ((1.0, torch.float32), (1.0, torch.float16), (2.0**30, torch.float16)):
        mp = wrapped(lr=0.0, scaler=LossScaler(factor, dynamic=False), half=half)
        mp.step(cross_entropy(mp(x), y) * 2.0**-20)
        grads[factor, half] = torch.cat([p.grad.flatten() for p in mp.parameters()])
    exact = grads[1.0, torch.float32]
    assert not grads[1.0, torch.float16].any() and exact.abs().max() > 0
    assert (grads[2.0**30, torch.float16] - exact).norm() < 0.01 * exact.norm()


def test_overflow_skips_the_step_and_the_scaler_walks_down():
    mp, (x, y) = wrapped(scaler=LossScaler(2.0**30, interval=100)), batch()
    before = [p.detach().clone() for p in mp.parameters()]
    applied = mp.step(cross_entropy(mp(x), y))
    assert not applied and mp.scaler.factor == 2.0**29
    assert all(torch.equal(a, b) for a, b in zip(before, mp.parameters()))
    taken = [mp.step(cross_entropy(mp(x), y)) for _ in range(25)]
    first = taken.index(True)
    assert 0 < first < 25 and all(taken[first:]) and mp.scaler.factor == 2.0 ** (29 - first)
    assert not any(torch.equal(a, b) for a, b in zip(before, mp.parameters()))


def test_without_master_weights_small_updates_are_lost():
    x, y = batch()
    kept, lost = (wrapped(lr=1e-6, master_weights=master) for master in (True, False))
    start = [p.detach().clone() for p in lost.parameters()]
    assert all(torch.equal(p, to_half_simulated(p)) for p in start)
    before = [p.detach().clone() for p in kept.parameters()]
    for mp in (kept, lost):
        mp.step(cross_entropy(mp(x), y))
    moved = [sum(int((a != b).sum()) for a, b in zip(old, mp.parameters())) for old, mp in ((start, lost), (before, kept))]
    assert moved[0] < 0.02 * moved[1]
    assert all(torch.equal(p, to_half_simulated(p)) for p in lost.parameters())


def test_the_length_is_cut_after_unscaling():
    mp, (x, y) = wrapped(lr=0.0, max_norm=0.01), batch()
    mp.step(cross_entropy(mp(x), y))
    assert torch.cat([p.grad.flatten() for p in mp.parameters()]).norm() == pytest.approx(0.01, rel=1e-3)


def test_activations_take_half_the_bytes():
    measured = {}
    for half in (torch.float32, torch.float16):
        mp = wrapped(half=half)
        small, large = (saved_bytes(partial(mp, batch(n)[0].requires_grad_())) for n in (8, 16))
        measured[half] = [b - a for a, b in zip(small, large)]
    floats, places = measured[torch.float32]
    # Inputs of the five layers, and what the first two ReLUs stand on: the outputs of the convolutions, of which pooling keeps the places too.
    assert floats == 4 * 8 * (784 + 6 * 24**2 + 6 * 12**2 + 16 * 8**2 + 256 + 120 + 84)
    assert measured[torch.float16] == [floats // 2, places] and places == 8 * 8 * (6 * 12**2 + 256)


def test_bad_input():
    for bad in (dict(init=0.0), dict(init=float("inf")), dict(growth=1.0), dict(backoff=1.0), dict(backoff=0.0), dict(interval=0)):
        with pytest.raises(ValueError, match="expected init > 0"):
            LossScaler(**bad)
    p = nn.Parameter(torch.ones(2, dtype=torch.float16))
    p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match="32 bits"):
        LossScaler().unscale_([p])
    with pytest.raises(ValueError, match="accumulate"):
        half_matmul(torch.ones(2, 2), torch.ones(2, 2), "fp64")
    with pytest.raises(ValueError, match=r"\(2, 3\) and \(2, 3\)"):
        half_matmul(torch.ones(2, 3), torch.ones(2, 3))
    net = lenet()
    with pytest.raises(ValueError, match="half must be"):
        MixedPrecision(net, torch.optim.SGD(net.parameters(), 0.1), LossScaler(), half=torch.int8)
    with pytest.raises(ValueError, match="own parameters"):
        MixedPrecision(net, torch.optim.SGD(lenet().parameters(), 0.1), LossScaler())
    halved = lenet().half()
    with pytest.raises(ValueError, match="float32"):
        MixedPrecision(halved, torch.optim.SGD(halved.parameters(), 0.1), LossScaler())
