"""PRPN: gates against a double loop, trees against a brute force, the whole model against a plain transcription."""

import itertools

import numpy as np
import pytest
import torch

from dlatlas.nlp.prpn import PRPN, structure_gates, tree_from_distances


def loop_gates(query, d, tau, last):
    """Gates of slots 0..last-1 at one step."""
    gates = []
    for i in range(last):
        g = 1.0
        for j in range(i + 1, last):
            g *= (min(1.0, max(-1.0, tau * (query - d[j]))) + 1) / 2
        gates.append(g)
    return np.array(gates)


def test_gates_against_a_double_loop():
    d = torch.rand(3, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    g = structure_gates(d, tau=1.5)
    assert g.shape == (3, 7, 7)
    for b, t in itertools.product(range(3), range(7)):
        np.testing.assert_allclose(g[b, t, :t], loop_gates(d[b, t], d[b], 1.5, t))
        assert (g[b, t, t:] == 0).all()
        assert (g[b, t, :t].diff() >= 0).all()


def test_gates_in_the_limits():
    rising = torch.arange(6.0)[None]
    assert torch.equal(structure_gates(rising)[0], torch.ones(6, 6).tril(-1))
    assert torch.equal(structure_gates(-rising, tau=100.0)[0], torch.eye(5).new_zeros(6, 6) + torch.diag(torch.ones(5), -1))
    level = structure_gates(torch.ones(1, 4))[0]
    assert level[3].tolist() == [0.25, 0.5, 1.0, 0.0]


def test_gates_have_the_right_gradient():
    d = torch.rand(2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    assert torch.autograd.gradcheck(lambda d: structure_gates(d, 0.9), d)


def brute(tokens, boundaries):
    if len(tokens) == 1:
        return tokens[0]
    k = boundaries.index(max(boundaries))
    return brute(tokens[: k + 1], boundaries[:k]), brute(tokens[k + 1 :], boundaries[k + 1 :])


def test_tree():
    assert tree_from_distances("a", []) == "a"
    assert tree_from_distances(["the", "cat", "sat"], [1.0, 2.0]) == (("the", "cat"), "sat")
    assert tree_from_distances("abcd", torch.tensor([3.0, 2.0, 1.0])) == ("a", ("b", ("c", "d")))
    assert tree_from_distances("abc", [1, 1]) == ("a", ("b", "c"))  # the leftmost
    rng = np.random.default_rng(0)
    for _ in range(20):
        boundaries = rng.integers(0, 4, 8).tolist()
        assert tree_from_distances(list(range(9)), boundaries) == brute(list(range(9)), boundaries)


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = PRPN(9, 4, 5, n_lookback=2, n_slots=3, tau=0.7).double()
    torch.nn.init.normal_(model.embed.weight)  # distances that differ
    return model


def test_model_against_a_transcription(model):
    tokens = torch.randint(9, (1, 7))
    logits, d = model(tokens)
    w = {k: v.detach().numpy() for k, v in model.state_dict().items()}
    e = w["embed.weight"][tokens[0].numpy()]
    sigmoid, relu = lambda z: 1 / (1 + np.exp(-z)), lambda z: np.maximum(z, 0)
    softmax = lambda z: np.exp(z) / np.exp(z).sum()  # noqa: E731
    dist, H, C, out = [], [], [], []
    for t in range(7):
        window = [e[i] if i >= 0 else np.zeros(4) for i in range(t - 2, t + 1)]
        q = relu(w["conv.bias"] + sum(w["conv.weight"][:, :, k] @ window[k] for k in range(3)))
        dist.append(float(relu(w["distance.weight"] @ q + w["distance.bias"])[0]))
    for t in range(7):
        h, c = np.zeros(5), np.zeros(5)
        if t:
            past = range(max(0, t - 3), t)
            k = w["key_h.weight"] @ H[-1] + w["key_x.weight"] @ e[t]
            g = loop_gates(dist[t], dist, 0.7, t)[list(past)]
            s = g / g.sum() * softmax(np.array([H[i] @ k / np.sqrt(5) for i in past]))
            h, c = sum(s[n] * H[i] for n, i in enumerate(past)), sum(s[n] * C[i] for n, i in enumerate(past))
        z = w["cell.weight_ih"] @ e[t] + w["cell.bias_ih"] + w["cell.weight_hh"] @ h + w["cell.bias_hh"]
        i, f, g, o = z.reshape(4, 5)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        H.append(sigmoid(o) * np.tanh(c))
        C.append(c)
        ahead = float(relu(w["next_distance.weight"] @ H[t] + w["next_distance.bias"])[0])
        past = range(max(0, t - 2), t + 1)
        g = loop_gates(ahead, dist, 0.7, t + 1)[list(past)]
        s = g / g.sum() * softmax(np.array([H[i] @ (w["key_l.weight"] @ H[t]) / np.sqrt(5) for i in past]))
        l = sum(s[n] * H[i] for n, i in enumerate(past))
        mixed = np.tanh(w["mix.weight"] @ np.concatenate([l, H[t]]) + w["mix.bias"])
        out.append(w["embed.weight"] @ mixed + w["decoder.bias"])
    np.testing.assert_allclose(d[0].detach(), dist)
    assert min(dist) >= 0 and len(set(dist)) > 4
    np.testing.assert_allclose(logits[0].detach(), np.array(out), rtol=1e-10)


def test_the_future_stays_hidden(model):
    tokens = torch.randint(9, (2, 8))
    logits, d = model(tokens)
    other = tokens.clone()
    other[:, 5:] = (other[:, 5:] + 1) % 9
    again, e = model(other)
    assert torch.equal(logits[:, :5], again[:, :5]) and torch.equal(d[:, :5], e[:, :5])
    assert not torch.equal(logits[:, 5:], again[:, 5:])


def test_the_loss_trains_the_distances(model):
    tokens = torch.randint(9, (2, 8))
    logits, _ = model(tokens)
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and torch.isfinite(p.grad).all() and p.grad.abs().sum() > 0, name


@pytest.mark.parametrize(
    "call",
    [
        lambda: structure_gates(torch.zeros(3)),
        lambda: structure_gates(torch.zeros(1, 0)),
        lambda: tree_from_distances("abc", [1.0]),
        lambda: tree_from_distances("", []),
        lambda: PRPN(9, 4, 5, tau=0.0),
        lambda: PRPN(9, 4, 5, n_slots=0),
        lambda: PRPN(9, 4, 5)(torch.zeros(2, 0, dtype=torch.long)),
    ],
)
def test_bad_input(call):
    with pytest.raises(ValueError, match="expected"):
        call()


def test_tau_must_be_positive():
    with pytest.raises(ValueError, match=r"tau.*-1"):
        structure_gates(torch.zeros(1, 3), tau=-1.0)
