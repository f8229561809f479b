"""Attacks that several chapters share; all take ``(model, x, y, ...)``, return points like x without a graph, and leave the model as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from dlatlas.robustness.pgd import attacking, pgd, project

__all__ = ["eot", "fgsm", "transfer"]

Attack = Callable[..., Tensor]


def fgsm(model: nn.Module, x: Tensor, y: Tensor, eps: float, targeted: bool = False) -> Tensor:
    r"""Fast gradient sign method (Goodfellow et al., 2015), $x + \varepsilon\, \mathrm{sign}\, \nabla_x \ell(x, y)$ clipped to [0, 1].

    Args:
        x: inputs in [0, 1].
        y: true labels; the labels to reach if `targeted`.
        eps: size of the step.

    Raises:
        ValueError: a negative step, inputs outside [0, 1], or not one label for each input.
    """
    project(torch.zeros(1, 1), eps, "linf")  # checks eps
    point = pgd(model, x, y, 0.0).requires_grad_()  # a checked copy
    with attacking(model):
        (grad,) = torch.autograd.grad(cross_entropy(model(point), y, reduction="sum"), point)
    return (x.detach() + (-eps if targeted else eps) * grad.sign()).clamp(0, 1)


def transfer(attack: Attack, source: nn.Module) -> Attack:
    """The attack with all its looks into a network directed at `source`: a black-box attack on whatever model is then given.

    >>> black_box = transfer(pgd, twin)
    >>> x_adv = black_box(victim, x, y, eps=0.1)  # the victim is not asked
    """

    def attack_source(model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        return attack(source, *args, **kwargs)

    return attack_source


def eot(model: nn.Module, n: int) -> nn.Module:
    """Mean output of `n` passes: the target of attacks on networks that draw random numbers (expectation over transformations).

    Args:
        model: with noise of its own; it stays a part of the new module.
        n: passes.

    Raises:
        ValueError: no passes.
    """
    return _Mean(model, n)


class _Mean(nn.Module):
    def __init__(self, model: nn.Module, n: int):
        super().__init__()
        if n < 1:
            raise ValueError(f"expected at least one pass, got {n}")
        self.model, self.n = model, n

    def forward(self, x: Tensor) -> Tensor:
        return sum(self.model(x) for _ in range(self.n)) / self.n
