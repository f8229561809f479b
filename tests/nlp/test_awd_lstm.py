"""Weight drop against nn.LSTM, locked masks, penalties by hand, and NT-ASGD against SGD, ASGD and a plain mean."""

import numpy as np
import pytest
import torch
from torch import nn

from dlatlas.nlp.awd_lstm import NTASGD, LockedDropout, WeightDropLSTM, activation_penalties, embedding_dropout


def test_without_drop_it_is_an_lstm():
    torch.manual_seed(0)
    layer, peer = WeightDropLSTM(3, 4, weight_drop=0.0), nn.LSTM(3, 4, batch_first=True)
    layer.lstm.load_state_dict(peer.state_dict())
    x, state = torch.randn(2, 5, 3), (torch.randn(1, 2, 4), torch.randn(1, 2, 4))
    for s in (None, state):
        (out, (h, c)), (want, (hw, cw)) = layer(x, s), peer(x, s)
        torch.testing.assert_close((out, h, c), (want, hw, cw))
    dropping = WeightDropLSTM(3, 4, weight_drop=0.9).eval()
    dropping.lstm.load_state_dict(peer.state_dict())
    torch.testing.assert_close(dropping(x)[0], peer(x)[0])


def test_one_mask_for_all_steps_and_all_gates():
    torch.manual_seed(0)
    layer = WeightDropLSTM(3, 6, weight_drop=0.4)
    layer.lstm.weight_hh_l0.data.fill_(0.1)
    x = torch.randn(2, 7, 3)
    torch.manual_seed(5)
    out, _ = layer(x)
    torch.manual_seed(5)
    dropped = nn.functional.dropout(layer.lstm.weight_hh_l0, 0.4)
    assert set(np.round(dropped.unique().tolist(), 6)) == {0.0, round(0.1 / 0.6, 6)}
    assert all((part == 0).any() for part in dropped.chunk(4))
    peer = nn.LSTM(3, 6, batch_first=True)
    peer.load_state_dict({**layer.lstm.state_dict(), "weight_hh_l0": dropped.detach()})
    torch.testing.assert_close(out, peer(x)[0])
    assert not torch.allclose(layer(x)[0], out)  # the next call has another
    assert torch.equal(layer.lstm.weight_hh_l0, torch.full((24, 6), 0.1))
    torch.manual_seed(5)
    layer(x)[0].sum().backward()
    grad = layer.lstm.weight_hh_l0.grad
    assert (grad[dropped == 0] == 0).all() and (grad[dropped != 0] != 0).any()


def test_locked_dropout():
    torch.manual_seed(0)
    drop = LockedDropout(0.3)
    out = drop(torch.ones(40, 5, 50))
    assert torch.equal(out, out[:, :1].expand_as(out))
    assert set(np.round(out.unique().tolist(), 5)) == {0.0, round(1 / 0.7, 5)}
    assert (out[:, 0] == 0).float().mean().item() == pytest.approx(0.3, abs=0.03)
    assert not torch.equal(out[0], out[1])
    x = torch.randn(2, 3, 4)
    assert torch.equal(drop.eval()(x), x)


def test_embedding_dropout():
    torch.manual_seed(0)
    weight = torch.randn(1000, 4, requires_grad=True)
    out = embedding_dropout(weight, 0.2, training=True)
    kept = (out != 0).all(1)
    assert ((out == 0).all(1) | kept).all()
    assert kept.float().mean().item() == pytest.approx(0.8, abs=0.04)
    torch.testing.assert_close(out[kept], weight[kept] / 0.8)
    out.sum().backward()
    assert (weight.grad[~kept] == 0).all() and (weight.grad[kept] == 1.25).all()
    assert torch.equal(embedding_dropout(weight, 0.2, training=False), weight)


def test_penalties():
    rng = np.random.default_rng(0)
    h, hd = rng.normal(size=(2, 5, 3)), rng.normal(size=(2, 5, 3))
    expected = 0.7 * np.mean(hd**2) + 0.2 * np.mean([(h[b, t + 1] - h[b, t]) ** 2 for b in range(2) for t in range(4)])
    assert activation_penalties(torch.tensor(h), torch.tensor(hd), 0.7, 0.2).item() == pytest.approx(expected)
    one = torch.full((1, 1, 4), 3.0)
    assert activation_penalties(one, one).item() == 18.0
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: activation_penalties(x, 2 * x), x)


def noisy_run(make, steps, after_step=lambda opt, k: None):
    """Weights after each step of a quadratic with noisy gradients."""
    torch.manual_seed(1)
    w = nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    opt, path = make([w]), []
    for k in range(1, steps + 1):
        opt.zero_grad()
        (w.square().sum() + w @ torch.randn(2, dtype=torch.float64)).backward()
        opt.step()
        path.append(w.detach().clone())
        after_step(opt, k)
    return torch.stack(path), opt, w


def test_sgd_goes_on_and_the_mean_starts_at_the_trigger():
    make = lambda p: NTASGD(p, lr=0.3, nonmono=0, weight_decay=0.1)  # noqa: E731
    trigger = lambda opt, k: opt.observe(float(k)) if k in (6, 10) else None  # noqa: E731
    path, opt, w = noisy_run(make, 30, trigger)
    peer, _, _ = noisy_run(lambda p: torch.optim.SGD(p, lr=0.3, weight_decay=0.1), 30)
    torch.testing.assert_close(path, peer)
    with opt.averaged():
        torch.testing.assert_close(w.detach(), path[9:].mean(0))  # w_T, ..., w_k with T = 10
    assert torch.equal(w.detach(), path[-1])
    _, asgd, v = noisy_run(lambda p: torch.optim.ASGD(p, lr=0.3, lambd=0, alpha=0, t0=9, weight_decay=0.1), 30)
    with opt.averaged():
        # ASGD's mean of w_{T+1}, ..., w_k and the first iterate.
        torch.testing.assert_close(w.detach(), (asgd.state[v]["ax"] * 20 + path[9]) / 21)


def test_before_the_trigger_nothing_is_averaged():
    path, opt, w = noisy_run(lambda p: NTASGD(p, lr=0.1), 5)
    with opt.averaged():
        assert torch.equal(w.detach(), path[-1])
    assert not opt.triggered


def test_trigger_rule():
    def reference(values, n):
        logs = []
        for t, v in enumerate(values):
            if t > n and v > min(logs[: t - n]):
                return t
            logs.append(v)
        return None

    rng = np.random.default_rng(0)
    for n in (0, 1, 3, 5):
        for _ in range(20):
            values = (np.exp(-0.3 * np.arange(15)) + 0.05 * rng.normal(size=15)).tolist()
            opt = NTASGD([nn.Parameter(torch.zeros(1))], nonmono=n)
            fired = [t for t, v in enumerate(values) if opt.observe(v)]
            want = reference(values, n)
            assert fired == ([] if want is None else [want]) and opt.triggered is (want is not None)


def test_state_round_trip_and_closure():
    def run(restart):
        x, y = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))
        make = lambda: NTASGD([{"params": [x]}, {"params": [y], "lr": 0.0}], lr=0.1, nonmono=1)  # noqa: E731
        opt = make()

        def closure():
            opt.zero_grad()
            loss = (x**2).sum() + (y**2).sum()
            loss.backward()
            return loss

        for i in range(8):
            if restart and i in (2, 5):
                saved = opt.state_dict()
                opt = make()
                opt.load_state_dict(saved)
            loss = opt.step(closure)
            opt.observe([3.0, 1.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0][i])
        assert opt.triggered and loss.item() < 5
        with opt.averaged():
            assert torch.equal(y, torch.ones(3))
            return x.detach().clone()

    assert torch.equal(run(False), run(True))


def test_averaged_puts_back_after_an_error():
    path, opt, w = noisy_run(lambda p: NTASGD(p, lr=0.1, nonmono=0), 5, lambda opt, k: opt.observe(float(k)))
    with pytest.raises(KeyError), opt.averaged():
        raise KeyError
    assert torch.equal(w.detach(), path[-1])


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: WeightDropLSTM(2, 3, weight_drop=1.0), "1.0"),
        (lambda: LockedDropout(-0.1), "-0.1"),
        (lambda: LockedDropout(0.1)(torch.zeros(2, 3)), r"\(2, 3\)"),
        (lambda: embedding_dropout(torch.zeros(3), 0.1, True), r"\(3,\)"),
        (lambda: embedding_dropout(torch.zeros(3, 2), 1.5, True), "1.5"),
        (lambda: activation_penalties(torch.zeros(1, 2, 3), torch.zeros(1, 2, 4)), r"\(1, 2, 4\)"),
        (lambda: activation_penalties(torch.zeros(1, 2, 3), torch.zeros(1, 2, 3), alpha=-1.0), "-1.0"),
        (lambda: NTASGD([nn.Parameter(torch.zeros(1))], lr=-1.0), "-1.0"),
        (lambda: NTASGD([nn.Parameter(torch.zeros(1))]).observe(float("nan")), "nan"),
    ],
)
def test_bad_input(call, match):
    with pytest.raises(ValueError, match=match):
        call()
