r"""The high-dimensional geometry of binary networks (anderson2018highdim).

Replacing every weight by its sign sounds brutal, and in three dimensions it is. In a thousand dimensions the sign vector still points almost the
same way for nearly every vector: the angle between a random direction and its signs is about 37 degrees, while two random directions are at 90.
What a layer computes are inner products with its weights, and these keep their order and ratio as far as the angle allows, provided that the
inputs spread over many directions. The pixels of the first layer do not; a rotation before the sign helps them.

Equations, for $w$ with $n$ independent Gaussian entries:

$$\cos \angle(w, \mathrm{sign}\, w) = \frac{\langle w, \mathrm{sign}\, w \rangle}{|w| \sqrt{n}} \;\to\; E|z| = \sqrt{2 / \pi},
\qquad \arccos \sqrt{2 / \pi} \approx 37.1^\circ,$$

with a spread that shrinks like $1 / \sqrt{n}$. Ternary weights that are zero where $|w| \le a$ standard deviations have

$$\cos \angle = \frac{2 \varphi(a)}{\sqrt{2 (1 - \Phi(a))}}$$

with the density $\varphi$ and distribution function $\Phi$ of the standard Gaussian. For inputs $x$ without a preferred direction, the correlation of
$x \cdot w$ with $x \cdot \mathrm{sign}(w)$ is $\cos \angle$ itself. For others the generalised binarisation, with an orthogonal $R$, is

$$\theta_R(w) = R^T\, \mathrm{sign}(R w), \qquad x \cdot \theta_R(w) = (R x) \cdot \mathrm{sign}(R w).$$

Deviations from the paper:

1. The rotation is given: any orthogonal matrix. The paper proposes a fixed random one; :func:`pca_rotation` gives the principal axes of the inputs.
2. Thresholds of ternary weights are in units of the root mean square of the vector, so that they do not depend on its scale.

Later work: the argument is about the forward pass of a network that has been trained, and says nothing about how latent weights are found; Helwegen
et al. (2019) argue that these are no weights at all but an inertia that a bit must overcome to flip. XNOR-Net++ (Bulat and Tzimiropoulos, 2019) and
Real-to-Binary Networks (Martinez et al., 2020) learn scales and match the real-valued network's activations, which recovers part of what the angle
loses.

Example:
    import torch
    from torch import nn
    from dlatlas.compression.hd_geometry import binarization_angle, dot_product_preservation

    x = torch.randn(2000, 256)
    y = (x[:, :128] * x[:, 128:]).sum(1, keepdim=True).sign()
    middle = nn.Linear(512, 256)
    net = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), middle, nn.ReLU(), nn.Linear(256, 1))
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    for step in range(60):
        i = torch.randint(2000, (200,))
        optimizer.zero_grad()
        nn.functional.soft_margin_loss(net(x[i]), y[i]).backward()
        optimizer.step()
    inputs, weights = net[:2](x).detach(), middle.weight.detach()
    angle = binarization_angle(weights)  # between the weights of each unit and their signs
    print(f"own signs: {angle.mean():.1f} degrees, at most {angle.max():.1f}")
    cosine = torch.cosine_similarity(weights, weights.sign().roll(1, 0))
    print(f"signs of another unit: {cosine.arccos().rad2deg().mean():.1f} degrees")
    print(f"correlation of the sums: {dot_product_preservation(inputs, weights):.2f}")
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["binarization_angle", "dot_product_preservation", "expected_angle", "gbt", "pca_rotation"]


def binarization_angle(w: Tensor, threshold: float = 0.0) -> Tensor:
    r"""Angle between each vector and its quantised version.

    Args:
        w: vectors along the last axis ``[..., n]``.
        threshold: 0: signs, +1 where $w \ge 0$; above 0: ternary, 0 where $|w|$ is at most `threshold` times the vector's root mean square.

    Returns:
        Degrees ``[...]``, 90 where nothing is left.

    Raises:
        ValueError: no entries, or a negative threshold.
    """
    if w.dim() < 1 or w.shape[-1] == 0 or not threshold >= 0:
        raise ValueError(f"expected vectors [..., n] with n >= 1 and threshold >= 0, got {tuple(w.shape)} and {threshold}")
    q = _signs(w)
    if threshold > 0:
        q = q * (w.abs() > threshold * w.square().mean(-1, keepdim=True).sqrt())
    lengths = w.norm(dim=-1) * q.norm(dim=-1)
    cosine = (w * q).sum(-1) / lengths.clamp_min(torch.finfo(w.dtype).tiny)
    return torch.rad2deg(torch.arccos(cosine.clamp(-1, 1)))


def expected_angle(threshold: float = 0.0) -> float:
    r"""Limit of :func:`binarization_angle` for Gaussian vectors of growing length, in degrees."""
    if not threshold >= 0:
        raise ValueError(f"expected threshold >= 0, got {threshold}")
    density = math.exp(-(threshold**2) / 2) / math.sqrt(2 * math.pi)
    kept = math.erfc(threshold / math.sqrt(2))  # 2 (1 - Phi)
    return math.degrees(math.acos(2 * density / math.sqrt(kept))) if kept > 0 else 90.0


def dot_product_preservation(x: Tensor, w: Tensor, binarized: Tensor | None = None) -> float:
    r"""Pearson correlation of $x \cdot w$ and $x \cdot \mathrm{sign}(w)$ over all pairs of an input and a weight vector.

    Args:
        x: inputs ``[m, n]``.
        w: weights ``[k, n]``.
        binarized: what stands for $\mathrm{sign}(w)$, for example ``gbt(w, rotation)``; None: the signs.

    Raises:
        ValueError: shapes that do not fit, or fewer than two pairs.
    """
    b = _signs(w) if binarized is None else binarized
    if x.dim() != 2 or w.dim() != 2 or x.shape[1] != w.shape[1] or b.shape != w.shape or len(x) * len(w) < 2:
        raise ValueError(
            f"expected [m, n], [k, n] and as many binarised weights, m k >= 2; got {tuple(x.shape)}, {tuple(w.shape)}, {tuple(b.shape)}"
        )
    pairs = torch.stack([(x @ w.T).flatten(), (x @ b.T).flatten()]).double()
    return float(torch.corrcoef(pairs)[0, 1])


def gbt(x: Tensor, rotation: Tensor) -> Tensor:
    r"""Generalised binarisation of each row, $R^T\, \mathrm{sign}(R x)$.

    Args:
        x: rows ``[m, n]``.
        rotation: orthogonal $R$ ``[n, n]``.

    Raises:
        ValueError: shapes that do not fit, or a matrix that is not orthogonal.
    """
    n = x.shape[-1]
    if x.dim() != 2 or rotation.shape != (n, n):
        raise ValueError(f"expected rows [m, n] and a rotation [n, n], got {tuple(x.shape)} and {tuple(rotation.shape)}")
    error = (rotation @ rotation.T - torch.eye(n, dtype=rotation.dtype, device=rotation.device)).abs().max()
    if not error < 1e-3:
        raise ValueError(f"the rotation must be orthogonal, R R^T differs from the identity by {error:.2g}")
    return _signs(x @ rotation.T) @ rotation


def pca_rotation(x: Tensor) -> Tensor:
    """Principal axes of the rows of `x` ``[m, n]`` as the rows of an orthogonal matrix ``[n, n]``, the widest first."""
    if x.dim() != 2 or len(x) < 2:
        raise ValueError(f"expected at least two rows [m, n], got {tuple(x.shape)}")
    centred = (x - x.mean(0)).double()
    _, axes = torch.linalg.eigh(centred.T @ centred)  # in ascending order
    return axes.T.flip(0).to(x.dtype).contiguous()


def _signs(x: Tensor) -> Tensor:
    return torch.where(x >= 0, 1.0, -1.0).to(x.dtype)
