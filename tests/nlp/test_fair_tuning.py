"""The capped cell against torch's; the tuner's bounds, memory and success; the expected improvement by Monte Carlo."""

import math

import numpy as np
import pytest
import torch
from bayes_opt.acquisition import ExpectedImprovement
from torch import nn

from dlatlas.nlp import fair_tuning
from dlatlas.nlp.fair_tuning import CappedLSTMCell, compare, tune
from dlatlas.nlp.kit.rnn import run

BOX = {"x": (-5.0, 10.0, "linear"), "y": (0.0, 15.0, "linear")}


def branin(p):
    x, y = p["x"], p["y"]
    return (y - 5.1 / (4 * math.pi**2) * x * x + 5 / math.pi * x - 6) ** 2 + 10 * (1 - 1 / (8 * math.pi)) * math.cos(x) + 10


def pair(**kwargs):
    torch.manual_seed(0)
    cell, peer = CappedLSTMCell(3, 4, **kwargs).double(), nn.LSTMCell(3, 4).double()
    cell.load_state_dict(peer.state_dict())
    return cell, peer


def test_without_cap_it_is_torchs_cell():
    cell, peer = pair(cap_input_gate=False)
    x, state = torch.randn(2, 3).double(), (torch.randn(2, 4).double(), torch.randn(2, 4).double())
    for s in (None, state):
        h, (h2, c) = cell(x, s)
        torch.testing.assert_close((h, c), peer(x, s))
        assert h is h2
    xs = torch.randn(2, 5, 3).double()
    torch.testing.assert_close(run(cell, xs)[0], run(peer, xs)[0])


@pytest.mark.parametrize("tied", [False, True])
def test_gates_against_numpy(tied):
    cell, peer = pair(tie_gates=tied)
    x, h, c = (torch.randn(6, n, dtype=torch.float64) * 2 for n in (3, 4, 4))
    w = {k: v.detach().numpy() for k, v in peer.state_dict().items()}
    z = x.numpy() @ w["weight_ih"].T + w["bias_ih"] + h.numpy() @ w["weight_hh"].T + w["bias_hh"]
    i, f, o = (1 / (1 + np.exp(-z[:, 4 * k : 4 * k + 4])) for k in (0, 1, 3))
    assert ((1 - f) < i).any() and ((1 - f) > i).any()
    i = 1 - f if tied else np.minimum(1 - f, i)
    want_c = f * c.numpy() + i * np.tanh(z[:, 8:12])
    got_h, (_, got_c) = cell(x, (h, c))
    np.testing.assert_allclose(got_c.detach(), want_c)
    np.testing.assert_allclose(got_h.detach(), o * np.tanh(want_c))
    assert torch.autograd.gradcheck(lambda x, h, c: cell(x, (h, c))[1], [t.requires_grad_() for t in (x, h, c)])


def test_the_cap_bounds_the_state():
    cell, peer = pair()
    with torch.no_grad():
        for c in (cell, peer):
            c.bias_ih.copy_(torch.tensor([9.0] * 4 + [9.0] * 4 + [9.0] * 4 + [0.0] * 4))
    x = torch.zeros(1, 50, 3, dtype=torch.float64)
    assert run(peer, x)[1][1].min() > 40
    assert run(cell, x)[1][1].max() <= 1


def test_tuner_beats_random_search():
    for batch in (1, 4):
        result = tune(branin, BOX, 30, batch=batch)
        assert result.best_value <= 0.6  # the minimum is 0.3979; random search of 30 points reaches 1.9 on average
        assert len(result.history) == 30
        assert result.best_value == min(v for _, v in result.history) == branin(result.best_params)


def test_bounds_no_repeats_and_the_same_trials_again():
    space = {"k": (1, 4, "int"), "lr": (1e-4, 1.0, "log"), "p": (0.2, 0.3, "linear")}
    seen = []

    def objective(p):
        seen.append(tuple(p.values()))
        assert list(p) == ["k", "lr", "p"] and isinstance(p["k"], int)
        assert 1 <= p["k"] <= 4 and 1e-4 <= p["lr"] <= 1 and 0.2 <= p["p"] <= 0.3
        return (p["k"] - 3) ** 2 + math.log10(p["lr"] / 1e-2) ** 2 + p["p"]

    first = tune(objective, space, 12, seed=1, batch=2)
    assert len(set(seen)) == 12
    assert first.best_params["k"] == 3
    assert tune(objective, space, 12, seed=1, batch=2) == first
    assert tune(objective, space, 12, seed=2, batch=2).history != first.history
    small = tune(lambda p: p["a"] * p["b"], {"a": (0, 1, "int"), "b": (-1, 1, "int")}, 6)
    assert sorted((p["a"], p["b"]) for p, _ in small.history) == [(a, b) for a in (0, 1) for b in (-1, 0, 1)]
    assert small.best_value == -1


def test_the_first_points_are_spread_and_the_log_is_uniform():
    history = tune(lambda p: p["lr"], {"lr": (1e-6, 1.0, "log")}, 8).history
    quarters = [int(math.log10(p["lr"]) // 1.5) for p, _ in history[:4]]
    assert sorted(quarters) == [-4, -3, -2, -1]


def test_runs_that_diverge_are_survived():
    result = tune(lambda p: float("nan") if p["x"] > 3 else branin(p), BOX, 14)
    assert math.isfinite(result.best_value) and any(math.isnan(v) for _, v in result.history)
    with pytest.raises(ValueError, match="finite"):
        tune(lambda p: math.inf, BOX, 4)


def _parts(kernel):
    """The kernels of which a kernel is made."""
    return [kernel] if not hasattr(kernel, "k1") else [*_parts(kernel.k1), *_parts(kernel.k2)]


def test_pending_points_are_filled_with_the_mean_and_losses_with_their_sign(monkeypatch):
    kept = []

    def suggest(self, gp, space, **kwargs):
        kept.append((space.params.copy(), space.target.copy()))
        assert {k.nu for k in _parts(gp.kernel) if hasattr(k, "nu")} == {2.5}
        return np.array([0.1 * len(kept), 0.5])

    monkeypatch.setattr(ExpectedImprovement, "suggest", suggest)
    rng = np.random.RandomState(0)
    points = list(np.random.default_rng(0).uniform(size=(8, 2)))
    values = [float(4 * u[0] - u[1]) for u in points[:6]]
    fair_tuning._propose(points, values, rng)
    params, target = kept[0]
    np.testing.assert_allclose(params, points)
    np.testing.assert_allclose(target[:6], -np.array(values))
    np.testing.assert_allclose(target[6:], [-(4 * u[0] - u[1]) for u in points[6:]], atol=0.4)


def test_expected_improvement_by_monte_carlo():
    ei = ExpectedImprovement(xi=0.0)
    ei.y_max = 0.3  # of minus the loss
    mean, std = np.array([0.0, 0.5, -1.0]), np.array([1.0, 0.2, 0.7])
    draws = mean + std * np.random.default_rng(0).normal(size=(400_000, 3))
    np.testing.assert_allclose(ei.base_acq(mean, std), np.maximum(draws - 0.3, 0).mean(0), atol=4e-3)


def test_compare():
    space = {"x": (-1.0, 1.0, "linear")}
    noisy = lambda p: p["x"] ** 2 + torch.rand(()).item()  # noqa: E731
    models = {"plain": lambda p: p["x"] ** 2, "noisy": noisy, "shifted": lambda p: p["x"] ** 2 + 3}
    rows = compare(models, dict.fromkeys(models, space), 4, seeds=[0, 1, 2])
    assert [r["name"] for r in rows] == list(models)
    for row in rows:
        assert row["best"] == min(row["values"]) and row["mean"] == pytest.approx(np.mean(row["values"]))
        assert row["spread"] == pytest.approx(np.std(row["values"], ddof=1)) and len(row["values"]) == 3
    assert rows[2]["mean"] - rows[0]["mean"] == pytest.approx(3, abs=0.05)
    again = compare({"noisy": noisy}, {"noisy": space}, 4, seeds=[1])[0]
    assert again["values"] == rows[1]["values"][1:2] and again["spread"] == 0.0


@pytest.mark.parametrize(
    "call",
    [
        lambda: tune(branin, {}, 3),
        lambda: tune(branin, BOX, 0),
        lambda: tune(branin, BOX, 3, batch=0),
        lambda: tune(branin, {"x": (1.0, 1.0, "linear")}, 3),
        lambda: tune(branin, {"x": (0.0, 1.0, "log")}, 3),
        lambda: tune(branin, {"x": (0.0, 1.0, "cubic")}, 3),
        lambda: tune(branin, {"x": (0.5, 2.0, "int")}, 3),
        lambda: tune(branin, {"x": (0, 1, "int")}, 3),
        lambda: compare({"a": branin}, {"b": BOX}, 3, [0]),
        lambda: compare({"a": branin}, {"a": BOX}, 3, []),
        lambda: CappedLSTMCell(3, 4)(torch.zeros(2, 4)),
    ],
)
def test_bad_input(call):
    with pytest.raises(ValueError, match="expected"):
        call()


def test_bad_size():
    with pytest.raises(ValueError, match="0"):
        CappedLSTMCell(0, 4)
