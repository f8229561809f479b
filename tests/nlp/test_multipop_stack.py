"""Multipop stack: the number of pops by enumeration, hard pops against a Python list, the model against a plain transcription."""

import numpy as np
import pytest
import torch
from torch import nn

from dlatlas.nlp.kit.rnn import run
from dlatlas.nlp.multipop_stack import StackLM, multipop, pop_distribution


def gen(k=0):
    return torch.Generator().manual_seed(k)


def test_pop_distribution_by_enumeration():
    logits = torch.randn(5, 3, dtype=torch.float64, generator=gen())
    rho = 1 / (1 + np.exp(-logits.numpy()))
    pi = pop_distribution(logits).numpy()
    assert pi.shape == (5, 4)
    want = [rho[:, 0], (1 - rho[:, 0]) * rho[:, 1], (1 - rho[:, 0]) * (1 - rho[:, 1]) * rho[:, 2], np.prod(1 - rho, 1)]
    np.testing.assert_allclose(pi, np.stack(want, 1))
    np.testing.assert_allclose(pi.sum(1), 1)
    torch.testing.assert_close(pop_distribution(torch.tensor([[-50.0, 50, 0]])), torch.tensor([[0.0, 1, 0, 0]]))


def test_hard_pops_against_a_list():
    rng = np.random.default_rng(0)
    stack, expected = torch.zeros(1, 6, 2), []
    for _ in range(60):
        k, item = int(rng.integers(0, 4)), rng.normal(size=2).tolist()
        logits = torch.tensor([[-50.0] * k + [50.0] * (3 - k)])
        stack = multipop(stack, pop_distribution(logits), torch.tensor([item]))
        expected = [item, *expected[k:]][:6]  # overflow drops the bottom
        want = np.zeros((6, 2))
        want[: len(expected)] = expected
        np.testing.assert_allclose(stack[0], want, atol=1e-6)


def test_soft_pops_are_the_mean_of_hard_ones():
    stack, push = torch.randn(3, 5, 2, dtype=torch.float64, generator=gen()), torch.randn(3, 2, dtype=torch.float64, generator=gen(1))
    pi = torch.softmax(torch.randn(3, 7, dtype=torch.float64, generator=gen(2)), 1)  # more pops than items
    got = multipop(stack, pi, push)
    hard = [multipop(stack, torch.eye(7, dtype=torch.float64)[k].expand(3, 7), push) for k in range(7)]
    torch.testing.assert_close(got, sum(pi[:, k, None, None] * hard[k] for k in range(7)))
    assert (hard[6][:, 1:] == 0).all() and torch.equal(hard[6][:, 0], push)
    pushed = hard[0]
    back = multipop(pushed, torch.tensor([[0.0, 1, 0]], dtype=torch.float64).expand(3, 3), push)
    torch.testing.assert_close(back[:, 1:], stack[:, :-1])  # one pop undoes one push
    inputs = [t.requires_grad_() for t in (stack, pi.detach(), push)]
    assert torch.autograd.gradcheck(multipop, inputs)


def test_stack_model_against_a_transcription():
    torch.manual_seed(0)
    lm = StackLM(6, 3, depth=4, max_pops=2).double()
    nn.init.normal_(lm.stop_bias)
    tokens = torch.randint(6, (1, 8))
    logits, pops = lm(tokens)
    w = {k: v.detach().numpy() for k, v in lm.state_dict().items()}
    sigmoid = lambda z: 1 / (1 + np.exp(-z))  # noqa: E731
    h, c, M = np.zeros(3), np.zeros(3), [np.zeros(3)] * 4
    for t, token in enumerate(tokens[0].tolist()):
        x = w["embed.weight"][token]
        rho = [sigmoid(w["stop.weight"][0] @ np.concatenate([h, x, M[k]]) + w["stop_bias"][k]) for k in range(2)]
        pi = [rho[0], (1 - rho[0]) * rho[1], (1 - rho[0]) * (1 - rho[1])]
        deep = [*M, np.zeros(3), np.zeros(3)]
        popped = [sum(pi[k] * deep[i + k] for k in range(3)) for i in range(4)]
        z = w["cell.weight_ih"] @ np.concatenate([x, popped[0]]) + w["cell.bias_ih"] + w["cell.weight_hh"] @ h + w["cell.bias_hh"]
        i, f, g, o = z.reshape(4, 3)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
        M = [np.tanh(w["push.weight"] @ h + w["push.bias"]), *popped[:3]]
        np.testing.assert_allclose(pops[0, t].detach(), pi)
        np.testing.assert_allclose(logits[0, t].detach(), w["head.weight"] @ np.concatenate([h, popped[0]]) + w["head.bias"])


def test_attention_reads_the_last_pushes():
    torch.manual_seed(0)
    lm = StackLM(6, 3, depth=2, memory="attention").double()
    tokens = torch.randint(6, (1, 5))
    logits, pops = lm(tokens)
    h, c, pushed = torch.zeros(1, 3).double(), torch.zeros(1, 3).double(), []
    for t, x in enumerate(lm.embed(tokens)[0]):
        read = torch.zeros(3).double()
        if pushed:
            query = lm.query(torch.cat([h[0], x]))
            weights = torch.softmax(torch.stack([query @ v for v in pushed[-2:]]) / 3**0.5, 0)
            read = sum(a * v for a, v in zip(weights, pushed[-2:]))
        h, c = lm.cell(torch.cat([x, read])[None], (h, c))
        pushed.append(torch.tanh(lm.push(h[0])))
        torch.testing.assert_close(logits[0, t], lm.head(torch.cat([h[0], read])))
    assert (pops[..., 0] == 1).all() and (pops[..., 1:] == 0).all()


def test_without_memory_it_is_an_lstm():
    torch.manual_seed(0)
    lm, tokens = StackLM(6, 3, memory="none"), torch.randint(6, (2, 5))
    torch.testing.assert_close(lm(tokens)[0], lm.head(run(lm.cell, lm.embed(tokens))[0]))
    assert not hasattr(lm, "push")


@pytest.mark.parametrize("memory", ["stack", "attention", "none"])
def test_causal_and_trained_everywhere(memory):
    torch.manual_seed(0)
    lm, tokens = StackLM(6, 4, depth=3, memory=memory), torch.randint(6, (2, 7))
    logits, pops = lm(tokens)
    assert logits.shape == (2, 7, 6) and pops.shape == (2, 7, 5)
    other = tokens.clone()
    other[:, 4] = (other[:, 4] + 1) % 6
    again = lm(other)[0]
    assert torch.equal(again[:, :4], logits[:, :4]) and not torch.equal(again[:, 4:], logits[:, 4:])
    logits.square().sum().backward()
    for name, p in lm.named_parameters():
        assert torch.isfinite(p.grad).all() and p.grad.abs().sum() > 0, name


@pytest.mark.parametrize(
    "call",
    [
        lambda: pop_distribution(torch.zeros(2, 0)),
        lambda: multipop(torch.zeros(2, 3, 4), torch.zeros(3, 2), torch.zeros(2, 4)),
        lambda: multipop(torch.zeros(2, 3, 4), torch.zeros(2, 2), torch.zeros(2, 3)),
        lambda: StackLM(6, 4)(torch.zeros(3, dtype=torch.long)),
    ],
)
def test_bad_input(call):
    with pytest.raises(ValueError, match="expected"):
        call()


def test_bad_construction():
    with pytest.raises(ValueError, match="'queue'"):
        StackLM(6, 4, memory="queue")
    with pytest.raises(ValueError, match="depth=0"):
        StackLM(6, 4, depth=0)
