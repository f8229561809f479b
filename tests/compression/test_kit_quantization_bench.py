"""The comparison: paired, the same for everybody, and with every bit counted."""

from functools import partial

import pytest
import torch

from dlatlas.compression.kit.bench import Contender, Task, bench, bits_a_weight, bucket_bits, exact, huffman_lengths, rounded, tuned
from dlatlas.compression.kit.nets import mlp
from dlatlas.compression.kit.qat import freeze_quantized, quantize_aware, quantized_bits
from dlatlas.compression.quantized_distillation import uniform_quantize


def make_task():
    torch.manual_seed(0)
    x = torch.randn(160, 6)
    y = (x[:, 0] > 0).long()
    return Task(x[:128], y[:128], x[128:], y[128:], teacher=mlp([6, 5, 2]), epochs=2, size=32)


def start(seed):
    torch.manual_seed(seed)
    return mlp([6, 8, 8, 2])


def test_everybody_starts_from_the_same_network_and_sees_the_same_batches():
    seen = {}

    def spy(name):
        def fit(net, task, seed):
            batches = list(task.batches(seed, soft=name == "soft"))
            seen.setdefault(name, []).append((net[0].weight.detach().clone(), [b[0] for b in batches], [len(b) for b in batches]))
            with torch.no_grad():
                net[0].weight.neg_()
            return net

        return fit

    scores = bench([Contender("hard", spy("hard")), Contender("soft", spy("soft"))], start, make_task(), [3, 4])
    for (w, xs, hard), (v, zs, soft) in zip(seen["hard"], seen["soft"]):
        assert torch.equal(w, v) and all(map(torch.equal, xs, zs)) and set(hard) == {2} and set(soft) == {3}
    assert not torch.equal(seen["hard"][0][0], seen["hard"][1][0])
    assert all(len(v) == 2 for s in scores.values() for v in (s.accuracy, s.bits, s.seconds))
    assert scores["hard"].accuracy == scores["soft"].accuracy and scores["hard"].bits == [32, 32]


def test_fits_round_the_inner_layer():
    task, coarse = make_task(), partial(uniform_quantize, levels=3)
    for fit in (tuned(coarse), rounded(coarse)):
        net = fit(start(0), task, 0)
        assert len(net[2].weight.unique()) == 4 and len(net[0].weight.unique()) > 4
    assert torch.equal(rounded(coarse)(start(0), task, 0)[0].weight, start(0)[0].weight)
    assert len(exact(start(0), task, 0)[2].weight.unique()) > 4 and not torch.equal(exact(start(0), task, 0)[2].weight, start(0)[2].weight)
    zeroed = tuned(coarse, prepare=lambda net: net.requires_grad_(False))
    with pytest.raises(RuntimeError):
        zeroed(start(0), task, 0)


def test_a_contender_that_comes_after_another_gets_its_network_and_its_seconds():
    got = []

    def spy(net, task, seed):
        got.append(net)
        return net

    scores = bench([Contender("exact", exact), Contender("same", spy, after="exact")], start, make_task(), [0])
    assert torch.equal(got[0][2].weight, exact(start(0), make_task(), 0)[2].weight)
    assert scores["same"].accuracy == scores["exact"].accuracy and scores["same"].seconds[0] > scores["exact"].seconds[0]


def test_bits_a_weight_is_the_inner_layers_share():
    net = mlp([6, 8, 8, 2])
    assert bits_a_weight(quantized_bits(net), net) == 32
    assert bits_a_weight(quantized_bits(net) - 32 * 64 + 5 * 64, net) == 5


def test_bucket_bits_by_hand():
    torch.manual_seed(0)
    net = mlp([6, 10, 10, 2])
    outside = 32 * (60 + 10 + 10 + 20 + 2)
    freeze_quantized(quantize_aware(net, partial(uniform_quantize, levels=3, bucket_size=40)))
    assert bucket_bits(net, 40) == outside + 2 * 100 + 3 * 64
    with torch.no_grad():
        net[2].weight.view(-1)[:] = torch.tensor([0.0, 1, 1, 1, 1, 1, 1, 1, 1, 3] * 10)
    # Codes of 1, 2 and 2 bits for 80, 10 and 10 weights, and three bytes for the table.
    assert bucket_bits(net, 100, huffman=True) == outside + 120 + 24 + 64
    assert bucket_bits(net, 100, skip=()) > bucket_bits(net, 100) - outside


def test_huffman_codes_are_those_of_the_textbook():
    assert huffman_lengths([45, 13, 12, 16, 9, 5]) == [1, 3, 3, 3, 4, 4]
    assert huffman_lengths([1, 1, 1, 1]) == [2, 2, 2, 2]
    assert huffman_lengths([0, 7, 0]) == [0, 1, 0]
    assert huffman_lengths([]) == []
    lengths = huffman_lengths([3, 1, 4, 1, 5, 9, 2, 6])
    assert sum(2.0**-n for n in lengths) == 1


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="different names"):
        bench([Contender("a", exact), Contender("a", exact)], start, make_task(), [0])
    with pytest.raises(ValueError, match="not one of those before it"):
        bench([Contender("a", exact, after="b"), Contender("b", exact)], start, make_task(), [0])
    with pytest.raises(ValueError, match="negative"):
        huffman_lengths([1, -1])
