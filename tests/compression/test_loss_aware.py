"""Loss-aware codes against brute force and plain loops; the quantiser against Adam and against the rules applied by hand."""

import copy
import itertools

import numpy as np
import pytest
import torch
from torch import nn

from dlatlas.compression.loss_aware import LossAwareQuantizer, objective, quantize_mbit, ternarize, ternarize_two_scale, twn


def problem(n=8, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, generator=g, dtype=torch.float64), torch.rand(n, generator=g, dtype=torch.float64) + 0.05


def best_for(w, d, codes):
    """Objective of fixed codes with their best positive scale."""
    codes = np.array(codes, float)
    below = (d * codes * codes).sum()
    alpha = max((d * codes * w).sum() / below, 0) if below else 0
    return 0.5 * (d * (alpha * codes - w) ** 2).sum()


@pytest.mark.parametrize("seed", range(8))
def test_exact_codes_are_never_beaten_by_any_of_all_codes(seed):
    w, d = problem(6, seed)
    least = min(best_for(w.numpy(), d.numpy(), codes) for codes in itertools.product((-1, 0, 1), repeat=6))
    alpha, b = ternarize(w, d, exact=True)
    assert objective(w, d, alpha * b) == pytest.approx(least, abs=1e-12)
    assert set(b.unique().tolist()) <= {-1, 0, 1} and alpha > 0


@pytest.mark.parametrize("seed", range(4))
def test_exact_is_below_approximate_is_below_plain(seed):
    w, d = problem(200, seed)
    values = [objective(w, d, a * b) for a, b in (ternarize(w, d, exact=True), ternarize(w, d), twn(w))]
    assert values[0] <= values[1] + 1e-12 and values[1] <= values[2] + 1e-12
    rounds = [objective(w, d, a * b) for a, b in (ternarize(w, d, iters=k) for k in (1, 2, 3, 10))]
    assert all(later <= earlier + 1e-12 for earlier, later in itertools.pairwise(rounds))


def test_the_approximate_solution_is_a_fixed_point_of_both_steps():
    w, d = problem(100)
    alpha, b = ternarize(w, d, iters=50)
    assert torch.equal(b, torch.where(w.abs() > alpha / 2, w.sign(), torch.zeros_like(w)))
    assert alpha.item() == pytest.approx(float((d * b * w).sum() / (d * b * b).sum()))


def by_alternation(w, d, alpha, rounds):
    """Plain loop from one start; objective of its end."""
    size = np.abs(w)
    for _ in range(rounds):
        q = (size > alpha / 2).astype(float)
        if not q.any():
            q[size.argmax()] = 1
        alpha = (d * size * q).sum() / (d * q).sum()
    return 0.5 * (d * (alpha * q - size) ** 2).sum()


def test_of_two_starts_the_better_end_is_kept():
    winners = set()
    for seed in range(60):
        w, d = problem(12, seed)
        d = d**4  # uneven, so that the starts end apart
        mean = float(w.abs().mean())
        ends = [by_alternation(w.numpy(), d.numpy(), start, 30) for start in (mean, 1.4 * mean)]
        alpha, b = ternarize(w, d, iters=30)
        assert objective(w, d, alpha * b) == pytest.approx(min(ends), rel=1e-9)
        if max(ends) > min(ends) * (1 + 1e-6):
            winners.add(int(np.argmin(ends)))
    assert winners == {0, 1}  # each of the two is needed


def test_scaling_and_constant_curvature():
    w, d = problem(50)
    alpha, b = ternarize(w, d, exact=True)
    scaled, same = ternarize(3 * w, d, exact=True)
    assert torch.equal(b, same) and scaled.item() == pytest.approx(3 * alpha.item())
    assert torch.equal(ternarize(w, 7 * d, exact=True)[1], b)
    # Equal curvature: ternary weight networks with the threshold that is best, found here by trying all.
    flat = torch.ones_like(w)
    size, tries = w.abs(), []
    for threshold in [0.0, *size.tolist()][:-1]:
        kept = size > threshold
        if kept.any():
            tries.append(objective(w, flat, size[kept].mean() * w.sign() * kept))
    alpha, b = ternarize(w, flat, exact=True)
    assert objective(w, flat, alpha * b) == pytest.approx(min(tries))


def test_curvature_decides_which_weight_the_scale_suits():
    w = torch.tensor([1.0, 0.6])
    steep_first, steep_second = torch.tensor([100.0, 1.0]), torch.tensor([1.0, 100.0])
    assert abs(float(ternarize(w, steep_first, exact=True)[0]) - 1.0) < 0.02
    assert abs(float(ternarize(w, steep_second, exact=True)[0]) - 0.6) < 0.02


def test_two_scales_are_two_problems():
    w, d = problem(40)
    up, down, b = ternarize_two_scale(w, d, exact=True)
    for scale, side, sign in ((up, w > 0, 1), (down, w < 0, -1)):
        alpha, codes = ternarize(w[side], d[side], exact=True)
        assert scale.item() == pytest.approx(alpha.item()) and torch.equal(b[side], codes) and (sign * codes >= 0).all()
    q = torch.where(b > 0, up, down) * b
    one = ternarize(w, d, exact=True)
    assert objective(w, d, q) <= objective(w, d, one[0] * one[1])
    up, down, b = ternarize_two_scale(w.abs(), d)
    assert down == 0 and (b >= 0).all() and up > 0


@pytest.mark.parametrize(
    ("bits", "grid", "points"), [(3, "linear", [0, 1 / 3, 2 / 3, 1]), (3, "log", [0, 0.25, 0.5, 1]), (2, "linear", [0, 1])]
)
def test_more_bits_use_their_grid_and_the_nearest_point_of_it(bits, grid, points):
    w, d = problem(300)
    alpha, b = quantize_mbit(w, d, bits, grid, iters=60)
    assert {round(v, 6) for v in b.abs().tolist()} <= {round(p, 6) for p in points}
    distance = (w.abs()[:, None] - alpha * torch.tensor(points, dtype=torch.float64)).abs()
    torch.testing.assert_close((w - alpha * b).abs(), distance.min(1).values)
    assert alpha.item() == pytest.approx(float((d * b * w).sum() / (d * b * b).sum()))


def test_errors_fall_with_the_bits():
    w, d = problem(500)
    errors = [objective(w, d, a * b) for a, b in (quantize_mbit(w, d, k) for k in (2, 3, 4, 6))]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.05 * errors[0]


def test_plain_rule_by_hand():
    alpha, b = twn(torch.tensor([1.0, -0.8, 0.1, 0.0]))  # threshold 0.7 * 0.475
    assert b.tolist() == [1, -1, 0, 0] and alpha.item() == pytest.approx(0.9)


def test_zeros_and_shapes():
    for rule in (lambda w, d: ternarize(w, d, exact=True), ternarize, lambda w, d: quantize_mbit(w, d, 3)):
        alpha, b = rule(torch.zeros(2, 3), torch.ones(2, 3))
        assert alpha == 0 and not b.any() and b.shape == (2, 3)
        alpha, b = rule(torch.randn(2, 3), torch.ones(2, 3))
        assert b.shape == (2, 3) and b.any() and alpha.dim() == 0 and b.dtype == torch.float32
    up, down, b = ternarize_two_scale(torch.zeros(4), torch.ones(4))
    assert up == down == 0 and not b.any()


def net_and_data(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1)), torch.randn(32, 5), torch.randn(32, 1)


def train(net, step, x, y, steps=5):
    for _ in range(steps):
        net.zero_grad()
        (net(x) - y).square().mean().backward()
        step()


@pytest.mark.parametrize("kind", ["lat", "lat2", "laq", "twn"])
def test_steps_are_adams_on_the_exact_weights_with_the_gradient_at_the_rounded_ones(kind):
    net, x, y = net_and_data()
    twin = copy.deepcopy(net)
    optimizer = torch.optim.Adam(net.parameters(), 0.02, betas=(0.8, 0.95), eps=1e-4)
    quantizer = LossAwareQuantizer(optimizer, [net[0].weight], kind)
    other = torch.optim.Adam(twin.parameters(), 0.02, betas=(0.8, 0.95), eps=1e-4)
    exact, v = twin[0].weight.detach().clone(), torch.zeros(8, 5)
    for t in range(1, 5):
        torch.testing.assert_close(quantizer.latent(net[0].weight), exact)
        d = torch.ones(8, 5) if t == 1 else ((v / (1 - 0.95 ** (t - 1))).sqrt() + 1e-4) / 0.02
        torch.testing.assert_close(quantizer.curvature(net[0].weight), d)
        if kind == "lat2":
            up, down, b = ternarize_two_scale(exact, d)
            rounded = torch.where(b > 0, up, down) * b
        else:
            alpha, b = {"lat": ternarize, "laq": lambda w, d: quantize_mbit(w, d, 3), "twn": lambda w, d: twn(w)}[kind](exact, d)
            rounded = alpha * b
        torch.testing.assert_close(net[0].weight.detach(), rounded)
        train(net, quantizer.step, x, y, 1)
        with torch.no_grad():
            twin[0].weight.copy_(rounded)
        twin.zero_grad()
        (twin(x) - y).square().mean().backward()
        v = 0.95 * v + 0.05 * twin[0].weight.grad.square()
        with torch.no_grad():
            twin[0].weight.copy_(exact)
        other.step()
        exact = twin[0].weight.detach().clone()
    torch.testing.assert_close(net[2].weight, twin[2].weight)  # trained as ever


def test_the_state_goes_on_where_it_was():
    net, x, y = net_and_data()
    quantizer = LossAwareQuantizer(torch.optim.Adam(net.parameters(), 0.02), [net[0].weight], exact=True)
    train(net, quantizer.step, x, y, 3)
    other, _, _ = net_and_data(1)
    other.load_state_dict(net.state_dict())
    resumed = LossAwareQuantizer(torch.optim.Adam(other.parameters(), 0.5), [other[0].weight], exact=True)
    with torch.no_grad():
        other[0].weight.normal_()  # what the network holds must not matter
    resumed.load_state_dict(copy.deepcopy(quantizer.state_dict()))
    assert torch.equal(other[0].weight, net[0].weight) and len(other[0].weight.detach().abs().unique()) <= 2
    assert torch.equal(resumed.latent(other[0].weight), quantizer.latent(net[0].weight))
    for n, q in ((net, quantizer), (other, resumed)):
        train(n, q.step, x, y, 3)
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), other.parameters()))
    with pytest.raises(ValueError, match="shapes"):
        LossAwareQuantizer(torch.optim.Adam(net.parameters()), [net[2].weight]).load_state_dict(quantizer.state_dict())


def test_a_closure_sees_the_quantised_network():
    net, x, y = net_and_data()
    quantizer = LossAwareQuantizer(torch.optim.Adam(net.parameters(), 0.02), [net[0].weight])

    def closure():
        assert len(net[0].weight.detach().abs().unique()) <= 2
        net.zero_grad()
        loss = (net(x) - y).square().mean()
        loss.backward()
        return loss

    assert quantizer.step(closure) > 0


def test_bad_input_is_refused():
    w, d = problem()
    net, _, _ = net_and_data()
    adam = torch.optim.Adam(net.parameters())
    calls = [
        lambda: ternarize(w, d[:3]), lambda: ternarize(w, 0 * d), lambda: ternarize(w, -d, exact=True), lambda: ternarize(w[:0], d[:0]),
        lambda: ternarize(w, d, iters=0), lambda: ternarize_two_scale(w, 0 * d), lambda: quantize_mbit(w, d, 1), lambda: quantize_mbit(w, d, 3, "odd"),
        lambda: LossAwareQuantizer(torch.optim.SGD(net.parameters(), 0.1), [net[0].weight]), lambda: LossAwareQuantizer(adam, []),
        lambda: LossAwareQuantizer(adam, [torch.ones(2, requires_grad=True)]), lambda: LossAwareQuantizer(adam, [net[0].weight], "best"),
        lambda: LossAwareQuantizer(adam, [net[0].weight], "laq", 1),
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(ValueError, match=r"expected|must be"):
            call()
