"""Expectations under Gaussian inputs in closed form and by quadrature."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor


def relu_kernel(u: Tensor, v: Tensor) -> float:
    r"""First arc-cosine kernel: ``E[relu(u.x) relu(v.x)]`` for ``x ~ N(0, I)``.

    $|u||v| (\sin t + (\pi - t) \cos t) / (2 \pi)$ with $t$ the angle between $u$ and $v$.
    """
    if u.shape != v.shape or u.dim() != 1:
        raise ValueError(f"expected two vectors of one length, got {tuple(u.shape)} and {tuple(v.shape)}")
    norms = float(u.norm() * v.norm())
    if norms == 0:
        return 0.0
    # atan2 of |u^ - v^| and |u^ + v^| keeps its precision where acos loses it: at angles near 0 and pi.
    a, b = u / u.norm(), v / v.norm()
    t = 2 * math.atan2(float((a - b).norm()), float((a + b).norm()))
    return norms * (math.sin(t) + (math.pi - t) * math.cos(t)) / (2 * math.pi)


def gauss_expect(f: Callable[[Tensor], Tensor], order: int = 101) -> float:
    """``E f(z)`` for ``z ~ N(0, 1)`` by Gauss-Hermite quadrature; exact for polynomials of degree below ``2 order``.

    `f` maps nodes ``[order]`` (float64) to values ``[order]``. A kink of `f` at 0, as relu has, costs accuracy of order
    ``1/order``.
    """
    if order < 1:
        raise ValueError(f"order must be at least 1, got {order}")
    nodes, weights = np.polynomial.hermite_e.hermegauss(order)
    values = f(torch.from_numpy(nodes))
    if values.shape != (order,):
        raise ValueError(f"f must map [{order}] to [{order}], got {tuple(values.shape)}")
    return float(values @ torch.from_numpy(weights / math.sqrt(2 * math.pi)))
