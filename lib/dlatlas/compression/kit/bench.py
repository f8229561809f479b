"""A fair comparison of quantisers: one trained network, one set of batches and one number of steps for everybody, and an honest count of bits."""

from __future__ import annotations

import copy
import heapq
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from dlatlas.compression.kit.loop import Batches, fit_classifier
from dlatlas.compression.kit.qat import choose_layers, freeze_quantized, layers_of, quantize_aware, quantized_bits
from dlatlas.kit.metrics import accuracy

__all__ = ["Contender", "Score", "Task", "bench", "bits_a_weight", "bucket_bits", "exact", "huffman_lengths", "rounded", "tuned"]


Quantizer = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Task:
    """Data and budget: everybody starts from the same trained network and gets `epochs` more of the same batches.

    Args:
        x: training inputs.
        y: labels ``[N]``.
        x_test: test inputs.
        y_test: test labels.
        teacher: a trained network for the methods that learn from one; its answers to `x` are computed once.
        epochs: of tuning.
        lr: largest learning rate of the tuning.
        size: examples a batch.
    """

    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor
    teacher: nn.Module
    epochs: int = 3
    lr: float = 1e-2
    size: int = 64
    answers: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.teacher.eval()
        with torch.no_grad():
            object.__setattr__(self, "answers", torch.cat([self.teacher(part) for part in self.x.split(1024)]))

    def batches(self, seed: int, soft: bool = False) -> Batches:
        """The batches of a seed, with the teacher's answers as a third part on request; the order does not depend on it."""
        return Batches(self.x, self.y, *([self.answers] if soft else []), size=self.size, seed=seed)


Fit = Callable[[nn.Module, Task, int], nn.Module]


@dataclass(frozen=True)
class Contender:
    """A method.

    Args:
        name: as it stands in tables.
        fit: ``fit(network, task, seed)`` quantises the trained network, with or without tuning, and returns it.
        bits: bits of the file of the network that `fit` returned.
        activations: bits of the activations, for the table.
        after: name of an earlier contender: `fit` gets a copy of the network that this one returned, and its seconds are added.
    """

    name: str
    fit: Fit
    bits: Callable[[nn.Module], float] = quantized_bits
    activations: int = 32
    after: str | None = None


@dataclass
class Score:
    """One value a seed: accuracy in per cent, bits a weight of the inner layers with all that is stored beside, seconds of the whole fit."""

    accuracy: list[float] = field(default_factory=list)
    bits: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


def tuned(weight: Quantizer, activation: Quantizer | None = None, prepare: Callable[[nn.Module], nn.Module] | None = None) -> Fit:
    """Fit that trains the inner layers with quantised weights (and inputs) by straight-through gradients and then rounds for good.

    Args:
        weight: quantiser of weights.
        activation: quantiser of the inputs of layers.
        prepare: changes the trained network before.
    """

    def fit(net: nn.Module, task: Task, seed: int) -> nn.Module:
        net = quantize_aware(prepare(net) if prepare else net, weight, activation)
        fit_classifier(net, task.batches(seed), task.epochs, task.lr)
        return freeze_quantized(net)

    return fit


def exact(net: nn.Module, task: Task, seed: int) -> nn.Module:
    """Fit that goes on in full precision."""
    fit_classifier(net, task.batches(seed), task.epochs, task.lr)
    return net


def rounded(weight: Quantizer) -> Fit:
    """Fit that only rounds the weights of the inner layers; for contenders that come after another one."""
    return lambda net, task, seed: freeze_quantized(quantize_aware(net, weight))


def bench(contenders: Sequence[Contender], start: Callable[[int], nn.Module], task: Task, seeds: Sequence[int]) -> dict[str, Score]:
    """Let each contender quantise its own copy of the same trained network, once a seed.

    Args:
        start: ``start(seed)`` gives a network trained in full precision.
        seeds: of the network, of the order of batches and of what else a method draws.

    Returns:
        Scores by name. Seconds are those of the processor, which other programs on the machine do not lengthen.

    Raises:
        ValueError: two contenders have one name, or one comes after a contender that has not been before it.
    """
    names = [c.name for c in contenders]
    if len(set(names)) < len(names):
        raise ValueError(f"contenders need different names, got {names}")
    for k, contender in enumerate(contenders):
        if contender.after is not None and contender.after not in names[:k]:
            raise ValueError(f"{contender.name!r} comes after {contender.after!r}, which is not one of those before it: {names[:k]}")
    scores = {name: Score() for name in names}
    for seed in seeds:
        trained, done = start(seed), {}
        for contender in contenders:
            torch.manual_seed(seed)
            first, spent = (trained, 0.0) if contender.after is None else (done[contender.after], scores[contender.after].seconds[-1])
            began = time.process_time()
            net = done[contender.name] = contender.fit(copy.deepcopy(first), task, seed)
            score = scores[contender.name]
            score.seconds.append(spent + time.process_time() - began)
            score.accuracy.append(100 * accuracy(net, task.x_test, task.y_test, 500))  # larger blocks are slower
            score.bits.append(bits_a_weight(contender.bits(net), trained))
    return scores


def bits_a_weight(total: float, network: nn.Module) -> float:
    """Bits a weight of the inner layers when the whole file has `total` bits and everything else in it is raw, as in the given network."""
    inner = sum(layer.weight.numel() for layer in list(layers_of(network).values())[1:-1])
    tensors = (*network.parameters(), *network.buffers())
    raw = sum(8 * t.element_size() * t.numel() for t in tensors if t.is_floating_point())
    return (total - raw + 32 * inner) / inner


@torch.no_grad()
def bucket_bits(model: nn.Module, bucket_size: int = 256, *, huffman: bool = False, skip: Sequence[str] = ("first", "last")) -> int:
    """Bits of the file of a network whose inner weights stand on an even grid in each bucket of consecutive weights.

    A layer takes an index for each weight and two floats for each bucket. With `huffman` the indices have a Huffman code, and its table takes
    a byte for each symbol. The grid itself is known. The rest is raw.

    Args:
        model: quantised with buckets, see :func:`dlatlas.compression.quantized_distillation.uniform_quantize`.
        skip: layers that were not, by name or "first" and "last".
    """
    coded = {name: layer.weight for name, layer in choose_layers(model, skip).items()}
    skipped = {id(w) for w in coded.values()}
    tensors = (*model.parameters(), *model.buffers())
    total = sum(8 * t.element_size() * t.numel() for t in tensors if id(t) not in skipped and t.is_floating_point())
    for weight in coded.values():
        buckets = weight.detach().flatten().split(bucket_size)
        # Rounding errors of the scale must not make two symbols of one.
        units = torch.cat([((b - b.min()) / (b.max() - b.min()).clamp_min(1e-30)).mul(1e4).round() for b in buckets])
        counts = units.unique(return_counts=True)[1].tolist()
        if huffman:
            total += sum(n * bits for n, bits in zip(counts, huffman_lengths(counts))) + 8 * len(counts)
        else:
            total += weight.numel() * math.ceil(math.log2(len(counts)))
        total += 2 * 32 * len(buckets)
    return total


def huffman_lengths(counts: Sequence[int]) -> list[int]:
    """Code lengths in bits of a Huffman code for symbols that occur `counts` times; 0 for those that never occur, 1 for a single one.

    Raises:
        ValueError: a negative count.
    """
    if any(n < 0 for n in counts):
        raise ValueError(f"counts must not be negative, got {list(counts)}")
    lengths = [0] * len(counts)
    heap = [(int(n), i, (i,)) for i, n in enumerate(counts) if n > 0]
    if len(heap) == 1:
        lengths[heap[0][1]] = 1
    heapq.heapify(heap)
    while len(heap) > 1:
        (n, i, left), (m, _, right) = heapq.heappop(heap), heapq.heappop(heap)
        for symbol in left + right:
            lengths[symbol] += 1
        heapq.heappush(heap, (n + m, i, left + right))
    return lengths
