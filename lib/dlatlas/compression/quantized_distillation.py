r"""Quantized distillation and differentiable quantization (polino2018distillation): a small student on a grid that learns from a large teacher.

Two ways to a network that is both smaller and coarser. Quantized distillation trains a small student with the teacher's soft answers while its
weights stand on an even grid: each step computes the loss with rounded weights and moves the exact ones. Differentiable quantization leaves
the weights where they are and moves the grid: the points are parameters, and each receives the gradient of all weights assigned to it.

Equations: a bucket of consecutive weights $v$ is scaled to $[0, 1]$, rounded there and scaled back,

$$ Q(v) = a\, \hat Q(u) + b, \qquad u = \frac{v - b}{a}, \quad b = \min v, \quad a = \max v - \min v. $$

On an even grid of $s$ steps, with $\xi$ the rounding of the remainder,

$$ \hat Q(u) = \frac{\lfloor u s \rfloor + \xi}{s}, \qquad \xi = 1\{us - \lfloor us \rfloor > 1/2\} \ \text{or}\ \xi \sim \mathrm{Bernoulli}(us - \lfloor us \rfloor); $$

the random rounding is unbiased. On free points $p_1 \le \dots \le p_P$, $\hat Q(u)$ is the nearest point and

$$ \frac{\partial Q(v)_i}{\partial p_j} = a_i \ \text{if}\ u_i \ \text{is assigned to}\ p_j, \ \text{else}\ 0. $$

Deviations from the paper:

1. Every inner layer has the same number of bits; the paper can give more of them to layers with large gradients.
2. The points of differentiable quantization are trained by Adam and sorted after each step.
3. The first and the last layer stay in full precision by default, as in the other methods of this library.

Later work: the straight-through training of the first method has become the common one; free grids survive as codebooks learned after
training, for example for large language models (SqueezeLLM, Kim et al., 2023; QLoRA's quantile grid NF4, Dettmers et al., 2023), and small
buckets with a scale each are in every format for 4-bit weights.

Example:
    import copy
    import torch
    from torch import nn
    from dlatlas.compression.quantized_distillation import fit_quantized_distillation, uniform_quantize

    def network(n):
        return nn.Sequential(nn.Linear(20, n), nn.ReLU(), nn.Linear(n, n), nn.ReLU(), nn.Linear(n, 4))

    x = torch.randn(6000, 20)
    y = (2 * (x[:, 0] * x[:, 1] > 0) + (x[:, 2] * x[:, 3] > 0)).long()
    batches = [(x[k : k + 100], y[k : k + 100]) for k in range(0, 4000, 100)]
    teacher, student = network(128), network(32)
    for net in (teacher, student):
        optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
        for inputs, labels in 8 * batches:
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(inputs), labels).backward()
            optimizer.step()
    rounded, trained = copy.deepcopy(student), copy.deepcopy(student)
    rounded[2].weight.data = uniform_quantize(student[2].weight, levels=3)
    fit_quantized_distillation(trained, teacher, batches, levels=3, lr=3e-3)  # on 2 bits
    for name, net in {"student": student, "rounded": rounded, "trained rounded": trained}.items():
        print(f"{name}: accuracy {(net(x[4000:]).argmax(1) == y[4000:]).double().mean():.3f}")
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from dlatlas.compression.kit.distill import kd_loss
from dlatlas.compression.kit.loop import adam_one_cycle, fit_epochs
from dlatlas.compression.kit.qat import freeze_quantized, quantize_aware
from dlatlas.compression.kit.ste import ste_replace
from dlatlas.train import History

__all__ = [
    "fit_differentiable_quantization",
    "fit_quantized_distillation",
    "point_quantize",
    "uniform_quantize",
]


def uniform_quantize(
    v: Tensor, levels: int, bucket_size: int | None = 256, stochastic: bool = False, generator: torch.Generator | None = None
) -> Tensor:
    r"""Nearest of ``levels + 1`` even points between the least and the greatest value of each bucket; the gradient passes unchanged.

    Args:
        v: any shape; buckets are consecutive entries, the last one may be shorter.
        levels: steps $s$ of the grid $\{0, 1/s, \dots, 1\}$; k bits address $s = 2^k - 1$ steps. Ties go down.
        bucket_size: entries a bucket; None: one bucket.
        stochastic: round up with the probability of the remainder.
        generator: of the random rounding.

    Raises:
        ValueError: `levels` or `bucket_size` is below 1.
    """
    if levels < 1:
        raise ValueError(f"levels must be at least 1, got {levels}")
    with torch.no_grad():
        u, a, b = _scaled(v, bucket_size)
        low = (u * levels).floor()
        rest = u * levels - low
        up = rest > (torch.rand(rest.shape, generator=generator, dtype=v.dtype).to(v.device) if stochastic else 0.5)
        q = _unscaled((low + up) / levels, a, b, v)
    return ste_replace(v, q)


def point_quantize(v: Tensor, points: Tensor, bucket_size: int | None = None) -> Tensor:
    """Nearest of the given points, in the unit of each bucket; differentiable in the points, constant in `v`.

    Args:
        v: any shape.
        points: ``[P]``, sorted, in the scale where a bucket reaches from 0 to 1. Ties go down.
        bucket_size: entries a bucket; None: one bucket.

    Raises:
        ValueError: no points, or points that are not sorted.
    """
    if points.dim() != 1 or len(points) < 1 or bool((points.detach().diff() < 0).any()):
        raise ValueError(f"points must be a sorted vector [P], got shape {tuple(points.shape)}: {points.detach().tolist()}")
    with torch.no_grad():
        u, a, b = _scaled(v, bucket_size)
        index = torch.bucketize(u, (points[1:] + points[:-1]) / 2)  # a value on a border belongs to the lower point
    return _unscaled(points[index], a, b, v)


def fit_quantized_distillation(
    student: nn.Module,
    teacher: nn.Module,
    batches: Iterable,
    levels: int,
    T: float = 5.0,
    soft_weight: float = 0.7,
    *,
    bucket_size: int | None = 256,
    epochs: int = 3,
    lr: float = 1e-3,
    stochastic: bool = False,
    skip: Sequence[str] = ("first", "last"),
) -> History:
    r"""Train the student with rounded weights on labels and teacher; it ends with rounded weights.

    The loss and its gradient are those of the rounded weights; the step is applied to the exact ones, which are rounded anew at each step.

    Args:
        student: in full precision; changed.
        teacher: trained; called in evaluation mode without gradients.
        batches: of inputs and labels, gone through once an epoch; a third entry of a batch is taken for the teacher's logits.
        levels: steps of the even grid, $2^k - 1$ for k bits.
        T: temperature of the soft answers.
        soft_weight: share of the soft loss.
        skip: layers that stay in full precision.
    """
    quantize_aware(student, partial(uniform_quantize, levels=levels, bucket_size=bucket_size, stochastic=stochastic), skip=skip)
    history = _distil(student, teacher, batches, list(student.parameters()), T, soft_weight, epochs, lr)
    freeze_quantized(student)
    return history


def fit_differentiable_quantization(
    student: nn.Module,
    teacher: nn.Module,
    batches: Iterable,
    n_points: int,
    T: float = 5.0,
    soft_weight: float = 0.7,
    *,
    bucket_size: int | None = None,
    epochs: int = 1,
    lr: float = 1e-3,
    skip: Sequence[str] = ("first", "last"),
) -> History:
    """Train the points of a grid for each inner layer; the student's weights stay, and end rounded to these points.

    The points start at quantiles of each layer's scaled weights, so that each has equally many weights.

    Args:
        student: trained, in full precision; changed.
        n_points: points a layer, $2^k$ for k bits.

    Other arguments as in :func:`fit_quantized_distillation`.

    Raises:
        ValueError: fewer than 2 points.
    """
    if n_points < 2:
        raise ValueError(f"expected at least 2 points, got {n_points}")
    quantize_aware(student, _Points(n_points, bucket_size), skip=skip)
    grids = [m for m in student.modules() if isinstance(m, _Points)]
    for layer in student.modules():
        if parametrize.is_parametrized(layer, "weight"):
            layer.parametrizations.weight[0].function.reset(layer.parametrizations.weight.original)
    # Only the points are trained; the student's weights are data here.
    points = [grid.points for grid in grids]
    history = _distil(student, teacher, batches, points, T, soft_weight, epochs, lr, after=lambda: [g.sort() for g in grids])
    freeze_quantized(student)
    return history


class _Points(nn.Module):
    """A grid of free points as a quantiser of weights."""

    def __init__(self, n: int, bucket_size: int | None):
        super().__init__()
        self.points = nn.Parameter(torch.linspace(0, 1, n))
        self.bucket_size = bucket_size

    @torch.no_grad()
    def reset(self, w: Tensor) -> None:
        u = _scaled(w, self.bucket_size)[0].flatten()[: w.numel()]
        shares = (torch.arange(len(self.points), dtype=u.dtype, device=u.device) + 0.5) / len(self.points)
        self.points.data = u.quantile(shares).to(w)

    @torch.no_grad()
    def sort(self) -> None:
        self.points.copy_(self.points.sort().values)

    def forward(self, w: Tensor) -> Tensor:
        return point_quantize(w, self.points, self.bucket_size)


def _scaled(v: Tensor, bucket_size: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Buckets scaled to [0, 1] ``[buckets, size]``, their widths and their minima ``[buckets, 1]``; the last is filled up by its last value."""
    if bucket_size is not None and bucket_size < 1:
        raise ValueError(f"bucket_size must be at least 1 or None, got {bucket_size}")
    flat = v.detach().reshape(-1)
    size = min(bucket_size or len(flat), len(flat))
    missing = -len(flat) % size
    buckets = torch.cat([flat, flat[-1:].expand(missing)]).view(-1, size)
    b = buckets.amin(1, keepdim=True)
    a = buckets.amax(1, keepdim=True) - b
    return (buckets - b) / torch.where(a > 0, a, torch.ones_like(a)), a, b


def _unscaled(u: Tensor, a: Tensor, b: Tensor, like: Tensor) -> Tensor:
    return (a * u + b).flatten()[: like.numel()].view_as(like)


def _distil(student, teacher, batches, params, T, soft_weight, epochs, lr, after=lambda: None) -> History:
    batches = list(batches) if not hasattr(batches, "__len__") else batches
    optimizer, schedule = adam_one_cycle(params, lr, epochs * len(batches))
    student.train()
    teacher.eval()

    def step(x: Tensor, y: Tensor, answers: Tensor | None = None) -> Tensor:
        if answers is None:
            with torch.no_grad():
                answers = teacher(x)
        student.zero_grad()  # all of it, also what is not trained here
        loss = kd_loss(student(x), answers, y, T, soft_weight)
        loss.backward()
        optimizer.step()
        schedule.step()
        after()
        return loss.detach()

    return fit_epochs(step, batches, epochs)
