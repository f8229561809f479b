"""Twin networks: the alignment by hand, the penalty and its gradients, and what each state has seen."""

import numpy as np
import pytest
import torch
from torch import nn

from dlatlas.nlp.kit.rnn import run
from dlatlas.nlp.twin import TwinLM, align_backward, twin_penalty

MASK = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0]], dtype=torch.bool)


def test_alignment_by_hand():
    tokens = torch.tensor([[1, 2, 3], [4, 5, 0], [6, 0, 0]])
    back = align_backward(tokens, MASK)
    assert back.tolist() == [[3, 2, 1], [5, 4, 0], [6, 0, 0]]
    assert torch.equal(align_backward(back, MASK), tokens)
    features = torch.randn(3, 3, 4)
    reversed_ = align_backward(features, MASK)
    assert torch.equal(reversed_[1], features[1, [1, 0, 2]])
    assert torch.equal(align_backward(reversed_, MASK), features)


def test_penalty_against_numpy():
    torch.manual_seed(0)
    f, b, g = torch.randn(3, 3, 4), torch.randn(3, 3, 5), nn.Linear(4, 5)
    W, w = g.weight.detach().numpy(), g.bias.detach().numpy()
    steps = [(i, t) for i in range(3) for t in range(3) if MASK[i, t]]
    gaps = [W @ f[i, t].numpy() + w - b[i, t].numpy() for i, t in steps]
    assert twin_penalty(f, b, g, MASK).item() == pytest.approx(np.mean([np.linalg.norm(d) for d in gaps]), rel=1e-5)
    assert twin_penalty(f, b, g, MASK, squared=True).item() == pytest.approx(np.mean([np.mean(d**2) for d in gaps]), rel=1e-5)
    other = torch.where(MASK[..., None], b, 99.0)
    assert torch.equal(twin_penalty(f, b, g, MASK), twin_penalty(f, other, g, MASK))
    assert twin_penalty(f, b, g) == twin_penalty(f, b, g, torch.ones(3, 3, dtype=torch.bool))


def test_gradients_reach_the_forward_state_only():
    f, b = torch.randn(2, 3, 4, requires_grad=True), torch.randn(2, 3, 4, requires_grad=True)
    g = nn.Linear(4, 4)
    twin_penalty(f, b, g).backward()
    assert b.grad is None and f.grad.abs().sum() > 0 and g.weight.grad.abs().sum() > 0
    same = torch.randn(2, 3, 4, requires_grad=True)
    value = twin_penalty(same, same.detach(), nn.Identity())
    value.backward()
    assert value.item() == pytest.approx(1e-4) and torch.equal(same.grad, torch.zeros_like(same))
    x, y = (torch.randn(2, 3, 4, dtype=torch.float64) for _ in range(2))
    g = nn.Linear(4, 4).double()
    assert torch.autograd.gradcheck(lambda x: twin_penalty(x, y, g), x.requires_grad_())


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_states_are_cotemporal(cell):
    """Neither state of position t has read token t; together they have read all others."""
    torch.manual_seed(0)
    lm, tokens = TwinLM(9, 4, cell=cell), torch.randint(9, (1, 6))
    mask = torch.ones(1, 6, dtype=torch.bool)
    f, b = lm.states(tokens), lm.twin_states(tokens, mask)
    for t in range(6):
        other = tokens.clone()
        other[0, t] = (other[0, t] + 1) % 9
        df, db = (lm.states(other) - f)[0].abs().sum(1) > 0, (lm.twin_states(other, mask) - b)[0].abs().sum(1) > 0
        assert df.tolist() == [s > t for s in range(6)]
        assert db.tolist() == [s < t for s in range(6)]


def test_loss_against_stepping_by_hand():
    torch.manual_seed(0)
    lm = TwinLM(7, 4, cell="gru", alpha=0.3)
    seqs = [[1, 2, 3, 4], [5, 6]]
    tokens = torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0]])
    mask = tokens > 0
    nll_f, nll_b, twin = [], [], []
    for seq in seqs:
        states = []
        for layer, s in ((lm.forward_net, seq), (lm.backward_net, seq[::-1])):
            cell = nn.GRUCell(4, 4)
            cell.load_state_dict({k.removesuffix("_l0"): v for k, v in layer.state_dict().items()})
            x = torch.cat([torch.zeros(1, 1, 4), lm.embed(torch.tensor([s[:-1]]))], 1)
            states.append(run(cell, x)[0][0])
        f, b = states[0], states[1].flip(0)
        for t, token in enumerate(seq):
            nll_f.append(-torch.log_softmax(lm.forward_head(f[t]), 0)[token].item())
            nll_b.append(-torch.log_softmax(lm.backward_head(b[t]), 0)[token].item())
            twin.append((lm.g(f[t]) - b[t]).norm().item())
    out = lm.loss(tokens, mask)
    got = [out[k].item() for k in ("forward_nll", "backward_nll", "twin", "total")]
    want = [np.mean(nll_f), np.mean(nll_b), np.mean(twin)]
    assert got == pytest.approx([*want, want[0] + want[1] + 0.3 * want[2]], rel=1e-5)
    padded = torch.where(mask, tokens, 5)
    assert lm.loss(padded, mask)["total"].item() == pytest.approx(got[3], rel=1e-6)
    logits = lm(tokens)
    assert nn.functional.cross_entropy(logits[mask], tokens[mask]).item() == pytest.approx(got[0], rel=1e-5)


def test_the_penalty_does_not_train_the_twin():
    torch.manual_seed(0)
    lm, tokens = TwinLM(7, 4), torch.randint(7, (2, 5))
    lm.loss(tokens)["twin"].backward()
    assert all(p.grad is None for p in [*lm.backward_net.parameters(), *lm.backward_head.parameters()])
    assert lm.forward_net.weight_hh_l0.grad.abs().sum() > 0
    grads = {}
    for alpha in (0.0, 2.0):
        lm.alpha = alpha
        lm.zero_grad()
        lm.loss(tokens)["total"].backward()
        grads[alpha] = [p.grad.clone() for p in (lm.backward_net.weight_hh_l0, lm.forward_net.weight_hh_l0)]
    assert torch.equal(grads[0.0][0], grads[2.0][0]) and not torch.equal(grads[0.0][1], grads[2.0][1])


@pytest.mark.parametrize(
    "call",
    [
        lambda: align_backward(torch.zeros(3, 3), MASK.float()),
        lambda: align_backward(torch.zeros(3, 4), MASK),
        lambda: align_backward(torch.zeros(1, 3), torch.tensor([[True, False, True]])),
        lambda: align_backward(torch.zeros(1, 3), torch.zeros(1, 3, dtype=torch.bool)),
        lambda: twin_penalty(torch.zeros(1, 2, 3), torch.zeros(1, 2, 4), nn.Identity()),
        lambda: TwinLM(5, 3, cell="rnn"),
    ],
)
def test_bad_input(call):
    with pytest.raises(ValueError, match="expected"):
        call()


def test_alpha_must_not_be_negative():
    with pytest.raises(ValueError, match="-1"):
        TwinLM(5, 3, alpha=-1.0)
