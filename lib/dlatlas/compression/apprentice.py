r"""Apprentice (mishra2018apprentice): a teacher in full precision for a student in low precision.

A network of few bits has trouble to fit hard labels: 0 or 1 for each class leaves open what to do with an image that is a bit of both.
The soft answers of a large network in full precision say more about each image, and they cost nothing at the time of use. The paper combines
the two old ideas, low precision and distillation, and asks at which stage the teacher should come in. Three schemes: both learn together from
scratch (A); the teacher is trained before and frozen, the student learns from scratch (B); the student first learns in full precision
from the frozen teacher, then its precision is lowered and it is tuned on with a small step (C).

Equations: with the label $y$ and the predictions $p_T$ of the teacher and $p_A$ of the apprentice,

$$ L = \alpha H(y, p_T) + \beta H(y, p_A) + \gamma H(p_T, p_A), \qquad H(p, q) = -\sum_k p_k \log q_k, $$

$\alpha = 1$, $\beta = \gamma = 1/2$. The ternary weights are those of TWN (Li et al., 2016): with the threshold $\Delta = 0.7$ times the mean magnitude,

$$ \hat w = s \, \mathrm{sign}(w) \, 1\{|w| > \Delta\}, \qquad s = \text{mean of } |w| \text{ over } |w| > \Delta. $$

Deviations from the paper:

1. The paper writes the teacher's logits into the third term and calls it a cross-entropy; a cross-entropy needs probabilities, so it is their softmax.
2. The teacher gets no gradient from the third term: otherwise it would be pulled to the student in scheme A. The paper does not say.
3. Adam with one cycle of the learning rate in place of SGD with steps; in scheme C half of the epochs (rounded up) are in full precision, and the
   tuning runs at a tenth of the rate.

Later work: distillation is a standard part of training below 8 bits. QKD (Kim et al., 2019) found that a network of few bits can be too small to
follow the teacher from the start, and gains more when it first learns alone. Shin et al. (2019) found that the softness of the teacher's answers
matters more than its accuracy.

Example:
    import copy
    import torch
    from torch import nn
    from dlatlas.compression.apprentice import ApprenticeLoss, fit_apprentice

    def network(n):
        return nn.Sequential(nn.Linear(20, n), nn.ReLU(), nn.Linear(n, n), nn.ReLU(), nn.Linear(n, 2))

    x = torch.randn(6000, 20)
    truth = (x[:, 0] * x[:, 1] > 0).long()
    y = truth ^ (torch.rand(6000) < 0.2)  # one label in five is wrong
    teacher, student = network(128), network(64)
    optimizer = torch.optim.Adam(teacher.parameters(), lr=3e-3)
    for step in range(150):
        i = torch.randint(4000, (200,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(teacher(x[i]), y[i]).backward()
        optimizer.step()
    batches = [(x[k : k + 50], y[k : k + 50]) for k in range(0, 1000, 50)]
    losses = {"labels": ApprenticeLoss(beta=1, gamma=0), "labels and teacher": ApprenticeLoss()}
    for name, loss in losses.items():
        net = copy.deepcopy(student)
        fit_apprentice(net, teacher, batches, "B", epochs=10, lr=1e-2, loss=loss)  # ternary
        right = (net(x[4000:]).argmax(1) == truth[4000:]).double().mean()
        print(f"{name}: accuracy {right:.3f}, values of a weight: {len(net[2].weight.unique())}")
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from dlatlas.compression.kit.loop import adam_one_cycle, fit_epochs
from dlatlas.compression.kit.qat import layers_of, quantize_aware
from dlatlas.compression.kit.ste import ste_replace

__all__ = ["ApprenticeLoss", "fit_apprentice", "ternary_weight"]

Quantizer = Callable[[Tensor], Tensor]


class ApprenticeLoss(nn.Module):
    r"""$\alpha H(y, p_T) + \beta H(y, p_A) + \gamma H(p_T, p_A)$, mean over the batch; $p_T$ is a constant in the third term.

    Args:
        alpha: weight of the teacher's own loss.
        beta: weight of the student's loss on the labels.
        gamma: weight of the student's loss on the teacher's answers.
    """

    def __init__(self, alpha: float = 1.0, beta: float = 0.5, gamma: float = 0.5):
        super().__init__()
        self.alpha, self.beta, self.gamma = alpha, beta, gamma

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor) -> Tensor:
        """The loss, a scalar.

        Args:
            student_logits: ``[N, K]``.
            teacher_logits: ``[N, K]``.
            target: labels ``[N]``.

        Raises:
            ValueError: shapes differ.
        """
        if student_logits.dim() != 2 or student_logits.shape != teacher_logits.shape or target.shape != student_logits.shape[:1]:
            shapes = [tuple(t.shape) for t in (student_logits, teacher_logits, target)]
            raise ValueError(f"expected logits [N, K] twice and labels [N], got {shapes}")
        teacher = cross_entropy(teacher_logits, target)
        hard = cross_entropy(student_logits, target)
        soft = cross_entropy(student_logits, teacher_logits.detach().softmax(-1))
        return self.alpha * teacher + self.beta * hard + self.gamma * soft

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, beta={self.beta}, gamma={self.gamma}"


def ternary_weight(w: Tensor, delta: float = 0.7) -> Tensor:
    r"""Values $-s, 0, s$ with one $s$ for the tensor; the gradient passes unchanged to every weight.

    Args:
        w: any shape.
        delta: threshold as a multiple of the mean magnitude.

    Raises:
        ValueError: `delta` is negative.
    """
    if delta < 0:
        raise ValueError(f"delta must not be negative, got {delta}")
    with torch.no_grad():
        size = w.abs()
        kept = size > delta * size.mean()
        scale = (size * kept).sum() / kept.sum().clamp_min(1)  # nothing is kept of a tensor of zeros
        codes = w.sign() * kept
    return ste_replace(w, scale * codes)


def fit_apprentice(
    student: nn.Module,
    teacher: nn.Module,
    batches: Iterable,
    scheme: str = "B",
    epochs: int = 3,
    lr: float = 1e-3,
    quantizer: Quantizer | tuple[Quantizer | None, Quantizer | None] | None = None,
    *,
    loss: ApprenticeLoss | None = None,
    skip: tuple[str, ...] = ("first", "last"),
) -> dict[str, Any]:
    """Train a student of low precision with a teacher; changes both networks as the scheme says.

    Args:
        student: in full precision, or made low-precision before (schemes A and B).
        teacher: trained before in schemes B and C, where it is left as it is, in evaluation mode.
        batches: of inputs and labels, gone through once an epoch. In schemes B and C a batch may hold a third entry, the teacher's logits as
            computed before; the teacher is then not called.
        scheme: "A", "B" or "C".
        quantizer: of the weights, or a pair for weights and activations of the inner layers; None: :func:`ternary_weight`, unless the
            student is of low precision already.
        loss: weights of the three terms; None: the paper's.
        skip: layers that stay in full precision, as in :func:`dlatlas.compression.kit.qat.quantize_aware`.

    Returns:
        ``history`` (of scheme C: of the tuning) and ``student``.

    Raises:
        ValueError: unknown scheme, or a student of low precision in scheme C.
    """
    if scheme not in ("A", "B", "C"):
        raise ValueError(f"scheme must be 'A', 'B' or 'C', got {scheme!r}")
    lowered = any(hasattr(m, "parametrizations") or hasattr(m, "quantized_input") for m in layers_of(student).values())
    if scheme == "C" and lowered:
        raise ValueError("scheme C starts in full precision and lowers it itself, but the student is quantised already")
    batches = list(batches) if not hasattr(batches, "__len__") else batches
    loss = ApprenticeLoss() if loss is None else loss
    weight, activation = quantizer if isinstance(quantizer, tuple) else (quantizer or ternary_weight, None)

    def lower() -> None:
        if not lowered or quantizer is not None:
            quantize_aware(student, weight, activation, skip)

    if scheme == "C":
        _fit(student, teacher, batches, loss, (epochs + 1) // 2, lr)
        lower()
        history = _fit(student, teacher, batches, loss, max(epochs // 2, 1), lr / 10)
    else:
        lower()
        history = _fit(student, teacher, batches, loss, epochs, lr, joint=scheme == "A")
    return {"history": history, "student": student}


def _fit(student: nn.Module, teacher: nn.Module, batches: Iterable, loss: ApprenticeLoss, epochs: int, lr: float, joint: bool = False):
    params = [*student.parameters(), *(teacher.parameters() if joint else ())]
    optimizer, schedule = adam_one_cycle(params, lr, epochs * len(batches))
    student.train()
    teacher.train(joint)

    def step(x: Tensor, y: Tensor, answers: Tensor | None = None) -> Tensor:
        if joint or answers is None:
            with torch.set_grad_enabled(joint):
                answers = teacher(x)
        optimizer.zero_grad()
        value = loss(student(x), answers, y)
        value.backward()
        optimizer.step()
        schedule.step()
        return value.detach()

    return fit_epochs(step, batches, epochs)
