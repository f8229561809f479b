"""The loss of a student that learns from labels and from a teacher."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import cross_entropy

__all__ = ["kd_loss"]


def kd_loss(student_logits: Tensor, teacher_logits: Tensor, target: Tensor, T: float = 1.0, soft_weight: float = 0.5) -> Tensor:
    r"""Distillation loss $(1 - w)\, H(y, p_s) + w T^2 H(p_t^{(T)}, p_s^{(T)})$, mean over the batch.

    $H$ is the cross-entropy and $p^{(T)} = \mathrm{softmax}(z / T)$. The factor $T^2$ keeps the gradient of the second term at the same
    size for every temperature. The teacher gets no gradient.

    Args:
        student_logits: ``[N, K]``.
        teacher_logits: ``[N, K]``.
        target: labels ``[N]``.
        T: temperature.
        soft_weight: $w$, between 0 and 1.

    Raises:
        ValueError: shapes differ, `T` is not positive or `soft_weight` is outside [0, 1].
    """
    if student_logits.shape != teacher_logits.shape or target.shape != student_logits.shape[:1]:
        shapes = [tuple(t.shape) for t in (student_logits, teacher_logits, target)]
        raise ValueError(f"expected logits [N, K] twice and labels [N], got {shapes}")
    if not T > 0 or not 0 <= soft_weight <= 1:
        raise ValueError(f"T must be positive and soft_weight in [0, 1], got {T} and {soft_weight}")
    soft = cross_entropy(student_logits / T, (teacher_logits.detach() / T).softmax(-1))
    return (1 - soft_weight) * cross_entropy(student_logits, target) + soft_weight * T**2 * soft
