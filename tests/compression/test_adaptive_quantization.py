"""Margins against a general optimiser and the optimality conditions; rounding against its definition; the quantiser keeps its promise."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import nn
from torch.nn.functional import cross_entropy

from dlatlas.compression.adaptive_quantization import AdaptiveQuantizer, error_margins, quantize_to_margin, storage_bits
from dlatlas.compression.kit.nets import mlp


@pytest.mark.parametrize("seed", range(4))
def test_margins_are_those_of_a_general_optimiser(seed):
    rng = np.random.default_rng(seed)
    g, budget, cap = rng.normal(size=6), 0.5, 0.4
    found = minimize(
        lambda t: -np.log(t).sum(), np.full(6, 1e-2), jac=lambda t: -1 / t, method="SLSQP", bounds=[(1e-6, cap)] * 6, tol=1e-12,
        constraints={"type": "ineq", "fun": lambda t: budget - np.abs(g) @ t, "jac": lambda t: -np.abs(g)}, options={"maxiter": 500},
    )  # fmt: skip
    tau = error_margins(torch.tensor(g), budget, cap).numpy()
    assert found.success
    np.testing.assert_allclose(tau, found.x, rtol=1e-3)
    assert np.log(tau).sum() >= -found.fun - 1e-7


def test_conditions_of_the_optimum():
    g = torch.randn(200, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    tau = error_margins(g, 3.0, 0.05)
    assert float((g.abs() * tau).sum()) == pytest.approx(3.0)
    free = tau < 0.05 * (1 - 1e-12)
    price = (g.abs() * tau)[free]
    assert 0 < free.sum() < 200 and torch.allclose(price, price[0].expand_as(price))
    assert ((g.abs() * 0.05)[~free] <= price[0] + 1e-12).all()
    # Nobody at the cap: the same share of the budget for each.
    torch.testing.assert_close(error_margins(g, 0.01, 10.0**9), 0.01 / (200 * g.abs()))


def test_slack_budgets_flat_directions_and_caps_of_their_own():
    g = torch.tensor([1.0, 0.0, -2.0])
    assert error_margins(g, 100.0, 0.3).tolist() == pytest.approx([0.3] * 3)
    tau = error_margins(g, 0.3, 0.5)
    assert tau[1] == 0.5 and float((g.abs() * tau).sum()) == pytest.approx(0.3)
    caps = torch.tensor([0.1, 0.5, 0.5])
    assert error_margins(g, 1.0, caps)[0] == pytest.approx(0.1)
    assert torch.equal(error_margins(torch.zeros(3), 1.0, 0.2), torch.full((3,), 0.2))


def test_rounding_by_its_definition():
    g = torch.Generator().manual_seed(0)
    w, tau = torch.randn(1000, generator=g), 10 ** (-4 * torch.rand(1000, generator=g))
    q, bits = quantize_to_margin(w, tau)
    assert ((q - w).abs() <= tau).all()
    unit = float(w.abs().max())
    for value, margin, got, n in zip(w.double().tolist(), tau.tolist(), q.tolist(), bits.tolist()):

        def rounded(k, value=value):
            return 0.0 if k == 0 else round(value / (unit / 2 ** (k - 1))) * unit / 2 ** (k - 1)

        assert got == pytest.approx(rounded(n), abs=1e-6)
        if n and abs(rounded(n - 1) - value) < 0.999 * margin:
            pytest.fail(f"{n - 1} bits would do for {value} with the margin {margin}")
    multiples = (q.double() / (unit / 2.0 ** (bits - 1).clamp_min(0)))[bits > 1]
    assert (multiples.round() % 2 == 1).all() and (multiples - multiples.round()).abs().max() < 1e-2


def test_no_bits_for_weights_inside_their_margin_and_at_most_max_bits():
    w = torch.tensor([0.5, -1.0, 0.2])
    q, bits = quantize_to_margin(w, torch.tensor([0.5, 2.0, 0.3]))
    assert bits.tolist() == [0, 0, 0] and not q.any()
    q, bits = quantize_to_margin(w, torch.zeros(3), max_bits=4)
    assert bits.max() == 4 and (q - w).abs().max() <= 0.5 / 8
    assert quantize_to_margin(w, torch.full((3,), 0.01), scale=4.0)[1].tolist() == [4, 3, 9]  # 4/8, 4/4 and 13 * 4/256


def trained(seed=0):
    torch.manual_seed(seed)
    x = torch.randn(256, 6)
    y = (x[:, 0] * x[:, 1] > 0).long()
    net = mlp([6, 24, 2])
    optimizer = torch.optim.Adam(net.parameters(), 0.02)
    for _ in range(200):
        optimizer.zero_grad()
        cross_entropy(net(x), y).backward()
        optimizer.step()
    return net, [(x[:100], y[:100]), (x[100:], y[100:])]


def test_the_loss_stays_within_the_bound_and_bits_are_saved():
    net, batches = trained()
    x, y = (torch.cat(part) for part in zip(*batches))
    before = cross_entropy(net(x), y).item()
    quantizer = AdaptiveQuantizer(net, cross_entropy, batches, before + 0.02)
    assert quantizer.loss() == pytest.approx(before, rel=1e-5)
    found = quantizer.run()
    assert found["loss"] <= before + 0.02 and found["loss"] == pytest.approx(cross_entropy(net(x), y).item(), rel=1e-5)
    mean = sum(int(b.sum()) for b in found["bits"].values()) / sum(b.numel() for b in found["bits"].values())
    assert mean < 8 and any(row["kept"] for row in found["history"])
    for name, bits in found["bits"].items():
        layer = net.get_submodule(name)
        assert bits.shape == layer.weight.shape and ((layer.weight == 0) == (bits == 0)).all()
    kept = [row["bits"] for row in found["history"] if row["kept"]]
    assert kept == sorted(kept, reverse=True)


def test_a_wider_bound_saves_more_and_only_named_layers_change():
    spent = []
    for rise in (0.005, 0.1):
        net, batches = trained()
        last = net[2].weight.detach().clone()
        loss = AdaptiveQuantizer(net, cross_entropy, batches, 1e9).loss()
        found = AdaptiveQuantizer(net, cross_entropy, batches, loss + rise, layers=["0"]).run()
        assert list(found["bits"]) == ["0"] and torch.equal(net[2].weight, last)
        spent.append(int(found["bits"]["0"].sum()))
    assert spent[1] < spent[0]


def test_an_impossible_bound_leaves_the_network_alone():
    net, batches = trained()
    before = [p.detach().clone() for p in net.parameters()]
    loss = AdaptiveQuantizer(net, cross_entropy, batches, 1e9).loss()
    found = AdaptiveQuantizer(net, cross_entropy, batches, loss + 1e-12, max_bits=1).run()
    assert not any(row["kept"] for row in found["history"]) and all(torch.equal(p, b) for p, b in zip(net.parameters(), before))
    assert net.training


def test_every_round_uses_the_gradient_where_the_weights_now_are():
    """The run against a plain transcription of it: fresh gradients, the radius and the budget doubled or halved, failures undone."""
    net, batches = trained()
    x, y = (torch.cat(part) for part in zip(*batches))
    weights = [net[0].weight, net[2].weight]
    tops = [float(w.detach().abs().max()) for w in weights]

    def loss_and_slope():
        loss = cross_entropy(net(x), y)
        return loss.item(), torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights)])

    start = [w.detach().clone() for w in weights]
    bound = loss_and_slope()[0] + 0.05
    found = AdaptiveQuantizer(net, cross_entropy, batches, bound, patience=99).run(12)
    quantized = [w.detach().clone() for w in weights]
    with torch.no_grad():
        for w, old in zip(weights, start):
            w.copy_(old)
    (loss, slope), radius, factor, spent, rows = loss_and_slope(), 0.02, 1.0, 32 * sum(w.numel() for w in weights), []
    for _ in range(12):
        caps = torch.cat([torch.full((w.numel(),), radius * top, dtype=torch.float64) for w, top in zip(weights, tops)])
        margins = error_margins(slope, factor * (bound - loss), caps)
        old = [w.detach().clone() for w in weights]
        pairs = [
            quantize_to_margin(w, m.view_as(w), scale=top) for w, m, top in zip(weights, margins.split([w.numel() for w in weights]), tops)
        ]
        with torch.no_grad():
            for w, (q, _) in zip(weights, pairs):
                w.copy_(q)
        after, new = loss_and_slope()
        bits = sum(int(b.sum()) for _, b in pairs)
        kept = after <= bound and bits < spent
        rows.append((kept, radius, factor, bits))
        change = 2.0 if after <= bound else 0.5
        radius, factor = min(1.0, radius * change), factor * change
        if kept:
            loss, slope, spent = after, new, bits
        else:
            with torch.no_grad():
                for w, q in zip(weights, old):
                    w.copy_(q)
    n = sum(w.numel() for w in weights)
    assert [(row["kept"], row["radius"], row["factor"]) for row in found["history"]] == [row[:3] for row in rows]
    assert {kept for kept, *_ in rows} == {True, False} and sum(kept for kept, *_ in rows) > 2
    np.testing.assert_allclose([row["bits"] for row in found["history"]], [row[3] / n for row in rows], atol=3 / n)
    for w, q in zip(weights, quantized):
        assert ((w - q).abs() > 1e-6).float().mean() < 0.03


def test_only_what_saves_bits_inside_the_bound_is_kept():
    net, batches = trained()
    loss = AdaptiveQuantizer(net, cross_entropy, batches, 1e9).loss()
    history = AdaptiveQuantizer(net, cross_entropy, batches, loss + 0.02).run(40)["history"]
    spent, outcomes = 32.0, set()
    for row in history:
        inside, saves = row["loss"] <= loss + 0.02, row["bits"] < spent
        assert row["kept"] == (inside and saves)
        outcomes.add((inside, saves))
        spent = row["bits"] if row["kept"] else spent
    assert {(True, True), (False, True)} <= outcomes
    # From a radius at its largest nothing changes between rounds: the second is inside but saves nothing.
    wide = AdaptiveQuantizer(trained()[0], cross_entropy, batches, 1e6, 1.0).run()
    assert [row["kept"] for row in wide["history"]] == [True, False, False, False, False]


def test_the_network_is_measured_in_evaluation_mode_and_its_mode_comes_back():
    class Half(nn.Module):
        """Zero in training mode: a loss measured there would be log 2 whatever the weights are."""

        def forward(self, x):
            return 0 * x if self.training else x

    net, batches = trained()
    net.append(Half())
    x, y = (torch.cat(part) for part in zip(*batches))
    exact = cross_entropy(net.eval()(x), y).item()
    net.train()
    quantizer = AdaptiveQuantizer(net, cross_entropy, batches, exact + 0.02)
    assert quantizer.loss() == pytest.approx(exact, rel=1e-5) and exact < 0.5
    assert quantizer.run()["loss"] <= exact + 0.02
    assert net.training and net[-1].training
    net.eval()
    quantizer.loss()
    assert not net.training


def test_storage_by_hand():
    bits = {"a": torch.tensor([0, 0, 0, 0, 1, 1, 3, 2])}
    # Values 7. Widths: four 0, two 1, one 2, one 3 take Huffman codes of 1, 2, 3 and 3 bits; four bytes of table and a float.
    assert storage_bits(bits) == {"values": 7, "index": 14 + 32 + 32, "total": 7 - 2 + 78}


def test_bad_input_is_refused():
    g, w = torch.ones(3), torch.ones(3)
    net, batches = trained()
    calls = [
        lambda: error_margins(g, 0.0, 1.0), lambda: error_margins(g, 1.0, 0.0), lambda: error_margins(g[:0], 1.0, 1.0), lambda: error_margins(g / 0, 1.0, 1.0),
        lambda: quantize_to_margin(w, w[:2]), lambda: quantize_to_margin(w, -w), lambda: quantize_to_margin(w, w, max_bits=60), lambda: quantize_to_margin(w, w, scale=0.0),
        lambda: AdaptiveQuantizer(net, cross_entropy, [], 1.0), lambda: AdaptiveQuantizer(net, cross_entropy, batches, 1e-9), lambda: AdaptiveQuantizer(net, cross_entropy, batches, 9.0, 2.0),
        lambda: AdaptiveQuantizer(net, cross_entropy, batches, 9.0, layers=["x"]), lambda: AdaptiveQuantizer(nn.Tanh(), cross_entropy, batches, 9.0),
        lambda: AdaptiveQuantizer(net, cross_entropy, batches, 9.0).run(0),
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(ValueError, match=r"expected|must"):
            call()
