"""Skim-RNN against a NumPy transcription, its limits, and the count of operations by hand."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import kstest
from torch import nn

from dlatlas.nlp.kit.rnn import run
from dlatlas.nlp.skim_rnn import SkimLSTM, flops_fraction, temperature

F64 = torch.float64


def sigmoid(v):
    return 1 / (1 + np.exp(-v))


def numpy_lstm(cell, x, h, c):
    W, V, b = cell.weight_ih.detach().numpy(), cell.weight_hh.detach().numpy(), (cell.bias_ih + cell.bias_hh).detach().numpy()
    i, f, g, o = np.split(W @ x + V @ h + b, 4)
    c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
    return sigmoid(o) * np.tanh(c), c


def numpy_skim(net, x, weights=None, mask=None):
    """One sequence; `weights` [T] of skimming, or the hard choice of the threshold."""
    k, H = net.d_small, net.d_hidden
    h, c, out, probs = np.zeros(H), np.zeros(H), [], []
    W, b = net.decide.weight.detach().numpy(), net.decide.bias.detach().numpy()
    for t, x_t in enumerate(x):
        logits = W @ np.concatenate([x_t, h]) + b
        p = np.exp(logits[1]) / np.exp(logits).sum()
        probs.append(p)
        if mask is not None and not mask[t]:
            out.append(np.zeros(H))
            continue
        r = float(p > net.threshold) if weights is None else weights[t]
        read = numpy_lstm(net.big, x_t, h, c)
        small = numpy_lstm(net.small, np.concatenate([x_t, h[k:]]), h[:k], c[:k])
        h, c = ((1 - r) * a + r * np.concatenate([s, old[k:]]) for a, s, old in zip(read, small, (h, c)))
        out.append(h)
    return np.stack(out), np.array(probs)


def make(threshold=0.5, spread=2.0):
    net = SkimLSTM(3, 6, 2, threshold).double()
    with torch.no_grad():
        net.decide.weight.normal_(0, spread)
    return net


@pytest.mark.parametrize("masked", [False, True])
def test_hard_choices_against_numpy(masked):
    net, x = make().eval(), torch.randn(3, 20, 3, dtype=F64)
    mask = torch.rand(3, 20) < 0.7 if masked else None
    found = net(x, mask=mask)
    for k in range(3):
        out, p = numpy_skim(net, x[k].numpy(), mask=None if mask is None else mask[k].numpy())
        np.testing.assert_allclose(found["out"][k].detach(), out, atol=1e-12)
        np.testing.assert_allclose(found["skim_prob"][k].detach(), p, atol=1e-12)
        real = np.ones(20, bool) if mask is None else mask[k].numpy()
        assert found["skimmed"][k].tolist() == ((p > 0.5) & real).tolist()
    assert 0.1 < found["skimmed"].double().mean() < 0.9
    last = found["state"][0]
    assert torch.equal(last, found["out"][:, -1]) or masked


def test_soft_choices_against_numpy():
    net, x = make().train(), torch.randn(2, 9, 3, dtype=F64)
    found = net(x, tau=0.7, generator=torch.Generator().manual_seed(5))
    g = torch.Generator().manual_seed(5)
    noise = torch.stack([torch.rand(2, 2, generator=g, dtype=F64) for _ in range(9)]).numpy()  # [T, choice, B]
    gumbel = -np.log(-np.log(noise))
    for k in range(2):
        # The weights depend on the probabilities, which depend on the state: step by step.
        weights = np.zeros(9)
        for t in range(9):
            p = numpy_skim(net, x[k, : t + 1].numpy(), weights)[1][t]
            logits = (np.log([1 - p, p]) + gumbel[t, :, k]) / 0.7
            weights[t] = np.exp(logits[1]) / np.exp(logits).sum()
        np.testing.assert_allclose(found["out"][k].detach(), numpy_skim(net, x[k].numpy(), weights)[0], atol=1e-10)


def test_soft_choice_becomes_the_hard_one_with_its_probability():
    margin = torch.full((20_000,), 0.8, dtype=F64)
    r = SkimLSTM._soft(margin, 1e-3, torch.Generator().manual_seed(0))
    assert ((r < 0.01) | (r > 0.99)).double().mean() > 0.99
    assert r.mean().item() == pytest.approx(sigmoid(0.8), abs=0.01)
    # The difference of two Gumbel variables is logistic.
    logits = torch.logit(SkimLSTM._soft(torch.zeros(5000, dtype=F64), 1.0, torch.Generator().manual_seed(1)))
    assert kstest(logits.numpy(), "logistic").pvalue > 0.01


def test_thresholds_at_the_ends():
    x = torch.randn(2, 12, 3, dtype=F64)
    never, always = make(1.0).eval(), make(-0.1).eval()
    assert not never(x)["skimmed"].any()
    torch.testing.assert_close(never(x)["out"], run(never.big, x)[0])
    start = torch.randn(2, 6, dtype=F64), torch.randn(2, 6, dtype=F64)
    found = always(x, state=start)
    assert found["skimmed"].all()
    assert torch.equal(found["out"][:, :, 2:], start[0][:, None, 2:].expand(2, 12, 4))
    assert torch.equal(found["state"][1][:, 2:], start[1][:, 2:])
    assert (found["out"][:, 1:, :2] != found["out"][:, :-1, :2]).all()
    zero = make(0.0).eval()
    assert zero(x)["skimmed"].all()


def test_given_choices_in_both_modes():
    net, x = make(), torch.randn(2, 15, 3, dtype=F64)
    skim = torch.rand(2, 15) < 0.5
    trained, evaluated = net.train()(x, skim=skim), net.eval()(x, skim=skim)
    assert torch.equal(trained["out"], evaluated["out"]) and torch.equal(evaluated["skimmed"], skim)
    for k in range(2):
        np.testing.assert_allclose(evaluated["out"][k].detach(), numpy_skim(net, x[k].numpy(), skim[k].double().numpy())[0], atol=1e-12)


def test_one_sequence_runs_only_the_chosen_cell():
    net, x = make().eval(), torch.randn(1, 40, 3, dtype=F64)
    calls = {"big": 0, "small": 0}
    for name in calls:
        getattr(net, name).register_forward_hook(lambda *_, name=name: calls.__setitem__(name, calls[name] + 1))
    with torch.no_grad():
        fast = net(x)
    skims = int(fast["skimmed"].sum())
    assert calls == {"big": 40 - skims, "small": skims} and 4 < skims < 36
    slow = net(x)
    assert torch.equal(slow["skimmed"], fast["skimmed"])
    torch.testing.assert_close(slow["out"], fast["out"])
    torch.testing.assert_close(slow["state"], fast["state"])


def test_penalty():
    net, x = make().train(), torch.randn(2, 7, 3, dtype=F64)
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[0, 4:] = False
    found = net(x, mask=mask, gamma=0.3)
    p = found["skim_prob"].detach().numpy()
    expected = 0.3 * np.mean([-np.log(p[0, :4]).mean(), -np.log(p[1]).mean()])
    assert found["penalty"].item() == pytest.approx(expected)
    found["penalty"].backward()
    assert net.decide.bias.grad[1] < 0 < net.decide.bias.grad[0]  # towards skimming
    assert net(x)["penalty"].item() == 0


def test_masked_steps_change_nothing():
    net, x = make().eval(), torch.randn(2, 10, 3, dtype=F64)
    mask = torch.ones(2, 10, dtype=torch.bool)
    mask[:, 6:] = False
    padded, short = net(x, mask=mask), net(x[:, :6])
    torch.testing.assert_close(padded["state"], short["state"])
    assert (padded["out"][:, 6:] == 0).all() and not padded["skimmed"][:, 6:].any()


def test_gradients():
    net = make().train()

    def forward(x):
        found = net(x, tau=0.5, gamma=0.1, generator=torch.Generator().manual_seed(0))
        return found["out"], found["penalty"]

    assert torch.autograd.gradcheck(forward, torch.randn(2, 4, 3, dtype=F64, requires_grad=True))
    forward(torch.randn(2, 4, 3, dtype=F64))[0].sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in net.parameters())


def test_count_of_operations_by_hand():
    d_in, d, small = 10, 20, 2
    skimmed = torch.tensor([[True, True, True, False], [False, True, False, False]])
    read, skim = 4 * d * (d_in + d), 4 * small * (d_in + d)
    assert flops_fraction(skimmed, d_in, d, small) == pytest.approx((4 * skim + 4 * read) / (8 * read))
    mask = torch.tensor([[True, True, False, False], [True, True, True, True]])
    assert flops_fraction(skimmed, d_in, d, small, mask) == pytest.approx((3 * skim + 3 * read) / (6 * read))
    assert flops_fraction(torch.zeros(1, 3, dtype=torch.bool), d_in, d, small) == 1
    assert flops_fraction(torch.ones(1, 3, dtype=torch.bool), d_in, d, small) == small / d
    with_decision = flops_fraction(skimmed, d_in, d, small, decision=True)
    assert with_decision == pytest.approx((4 * skim + 4 * read + 8 * 2 * (d_in + d)) / (8 * read))
    # The matrices that the formula counts are those of the cells.
    net = SkimLSTM(d_in, d, small)
    assert [sum(W.numel() for W in (c.weight_ih, c.weight_hh)) for c in (net.big, net.small)] == [read, skim]
    assert isinstance(net.big, nn.LSTMCell)


def test_temperature():
    assert temperature(0) == 1 and temperature(1000) == pytest.approx(math.exp(-0.1)) and temperature(10**6) == 0.5
    assert temperature(10, rate=1.0, floor=0.01) == 0.01


def test_bad_calls():
    for bad in ({"d_small": 0}, {"d_small": 6}, {"d_in": 0}):
        with pytest.raises(ValueError, match="expected d_in >= 1"):
            SkimLSTM(**{"d_in": 3, "d_hidden": 6, "d_small": 2} | bad)
        with pytest.raises(ValueError, match="expected d_in >= 1"):
            flops_fraction(torch.ones(1, 2, dtype=torch.bool), **{"d_in": 3, "d_hidden": 6, "d_small": 2} | bad)
    net, x = SkimLSTM(3, 6, 2), torch.ones(2, 4, 3)
    with pytest.raises(ValueError, match=r"\[B, T >= 1, 3\]"):
        net(torch.ones(2, 4, 2))
    with pytest.raises(ValueError, match="temperature"):
        net(x, tau=0.0)
    for name in ("mask", "skim"):
        with pytest.raises(ValueError, match=f"bool {name}"):
            net(x, **{name: torch.ones(2, 3, dtype=torch.bool)})
    with pytest.raises(ValueError, match="real step in each row"):
        net(x, mask=torch.zeros(2, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="real steps"):
        flops_fraction(torch.ones(1, 2, dtype=torch.bool), 3, 6, 2, mask=torch.zeros(1, 2, dtype=torch.bool))
