r"""Rotational unit of memory, RUM (dangovski2018rum).

Orthogonal matrices carry a state over many steps without shrinking it, but one fixed matrix treats every input alike. RUM computes a rotation from
the data at each step: the one that turns an embedding of the input into a target, in the plane of the two, and leaves everything else where it
is. The rotations may also be multiplied up over time, and the product is an associative memory. A gate as in a GRU decides how much of the
state is renewed.

Equations: the rotation from $a$ to $b$ turns $u = a / |a|$ into $\hat b = b / |b|$. With $v$ the unit vector along $b - (u \cdot b) u$ and the angle
$\theta$ between them,

$$ R(a, b) = I - u u^\top - v v^\top +
   [u\; v] \begin{pmatrix} \cos\theta & -\sin\theta \\ \sin\theta & \cos\theta \end{pmatrix} [u\; v]^\top . $$

With input $x_t$, state $h_t$, logistic function $\sigma$ and products $\odot$ element by element,

$$ z_t = \sigma(W_z x_t + U_z h_{t-1} + b_z) , \quad \tau_t = W_\tau x_t + U_\tau h_{t-1} + b_\tau , \quad e_t = W_e x_t + b_e , $$

$$ R_t = R_{t-1}^{\lambda} R(e_t, \tau_t) , \quad \tilde h_t = \operatorname{relu}(e_t + R_t h_{t-1}) , \quad
   h_t' = z_t \odot h_{t-1} + (1 - z_t) \odot \tilde h_t , $$

and $h_t = h_t'$, or with time normalisation $h_t = \eta\, h_t' / |h_t'|$. $\lambda = 1$ keeps the product of the rotations, $\lambda = 0$ does not.

Deviations from the paper:

1. The rotation is computed as two reflections, first across the plane normal to $u$, then across the one normal to the bisector
   $m = (u + \hat b) / |u + \hat b|$: $R = (I - 2 m m^\top)(I - 2 u u^\top)$. It is the same matrix, but orthogonal to rounding error whatever the angle,
   smooth where $a$ and $b$ are parallel (the square root of $1 - \cos^2\theta$ has no derivative there), and cheaper to apply.
2. Vectors that are opposite to each other have no plane: a half turn in the plane of $a$ and the axis farthest from it. A zero vector has no
   direction: the identity.
3. The start follows the published code: orthogonal matrices, biases $b_z = b_\tau = 1$ and $b_e = 0$. Its zoneout and layer normalisation are left out.

Later work: The journal version (Dangovski et al., 2019) adds summarisation of long texts. Rotations of pairs of coordinates by an angle that
depends on the position became the usual position code of Transformers (Su et al., 2021), and products of data-dependent reflections are
the state transitions of DeltaNet (Schlag et al., 2021; Yang et al., 2024), which are trained in parallel over time.

Example:
    import torch
    from torch import nn
    from dlatlas.nlp.rum import RUMCell

    for cell in (nn.GRUCell(4, 32), RUMCell(4, 32)):  # the second is the method
        head = nn.Linear(32, 4)
        optimizer = torch.optim.Adam([*cell.parameters(), *head.parameters()], lr=1e-2)
        for step in range(60):
            y = torch.randint(4, (32,))
            x = torch.zeros(40, 32, 4)
            x[0] = nn.functional.one_hot(y, 4).float()  # which symbol was it, 39 blanks ago?
            h = torch.zeros(32, 32)
            for x_t in x:
                h = cell(x_t, h)
                h = h[1] if isinstance(h, tuple) else h  # RUMCell returns (output, state)
            loss = nn.functional.cross_entropy(head(h), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"{type(cell).__name__}: loss {loss:.3f} (guessing: 1.386)")
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["RUMCell", "rotate", "rotation"]

State = Tensor | tuple[Tensor, Tensor]


def rotation(a: Tensor, b: Tensor, eps: float = 1e-8) -> Tensor:
    """Rotations that turn the direction of `a` into that of `b` in their plane, as matrices.

    Args:
        a: ``[batch, dim]``, dim at least 2.
        b: ``[batch, dim]``.
        eps: vectors of this length or shorter have no direction.

    Returns:
        ``[batch, dim, dim]``, orthogonal with determinant 1.

    Raises:
        ValueError: shapes that do not match.
    """
    u, m = _mirrors(a, b, eps)
    eye = torch.eye(a.shape[1], dtype=a.dtype, device=a.device)
    return (eye - 2 * m[:, :, None] * m[:, None]) @ (eye - 2 * u[:, :, None] * u[:, None])


def rotate(a: Tensor, b: Tensor, v: Tensor, eps: float = 1e-8) -> Tensor:
    """``rotation(a, b) @ v`` for each row, without forming the matrices: time in proportion to dim.

    Args:
        a: ``[batch, dim]``, dim at least 2.
        b: ``[batch, dim]``.
        v: ``[batch, dim]``.
        eps: as in :func:`rotation`.

    Raises:
        ValueError: shapes that do not match.
    """
    if v.shape != a.shape:
        raise ValueError(f"expected a vector of shape {tuple(a.shape)}, got {tuple(v.shape)}")
    for mirror in _mirrors(a, b, eps):
        v = v - 2 * mirror * (mirror * v).sum(1, keepdim=True)
    return v


def _mirrors(a: Tensor, b: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Normals of the two reflections, ``[B, D]`` each."""
    if a.dim() != 2 or a.shape != b.shape or a.shape[1] < 2:
        raise ValueError(f"expected two tensors [B, D >= 2], got {tuple(a.shape)} and {tuple(b.shape)}")
    length_a, length_b = (v.norm(dim=1, keepdim=True) for v in (a, b))
    none = (length_a <= eps) | (length_b <= eps)
    # The unused branch of `where` must be finite too, or its gradient is NaN.
    axis = torch.zeros_like(a)
    axis[:, 0] = 1
    u = torch.where(none, axis, a) / torch.where(none, 1, length_a)
    middle = u + torch.where(none, axis, b) / torch.where(none, 1, length_b)
    length = middle.detach().norm(dim=1, keepdim=True)
    # Below this the sum is rounding error as much as direction.
    opposite = length <= max(eps, 2 * torch.finfo(a.dtype).eps ** 0.5)
    away = torch.zeros_like(a).scatter(1, u.detach().abs().argmin(1, keepdim=True), 1.0)
    away = away - u * (u * away).sum(1, keepdim=True)
    m = torch.where(opposite, away, middle)
    return u, m / m.norm(dim=1, keepdim=True)


class RUMCell(nn.Module):
    r"""Rotational unit of memory: ``forward(x_t, state) -> (h_t, state)``.

    The state is $h$ with `lambda_` 0 and $(h, R)$ with `lambda_` 1; zero and the identity at the start.

    Args:
        d_in: size of an input.
        d_hidden: size of the state, at least 2.
        lambda_: 1 multiplies the rotations up over time, 0 does not.
        eta: length of the state after time normalisation; None leaves it out.

    Raises:
        ValueError: sizes too small, another `lambda_`, or a length that is not positive.
    """

    def __init__(self, d_in: int, d_hidden: int, lambda_: int = 0, eta: float | None = None):
        super().__init__()
        if d_in < 1 or d_hidden < 2:
            raise ValueError(f"expected d_in >= 1 and d_hidden >= 2, got {d_in} and {d_hidden}")
        if lambda_ not in (0, 1):
            raise ValueError(f"lambda_ must be 0 or 1, got {lambda_}")
        if eta is not None and not eta > 0:
            raise ValueError(f"eta must be positive or None, got {eta}")
        self.d_in, self.d_hidden, self.lambda_, self.eta = d_in, d_hidden, lambda_, eta
        self.embed = nn.Linear(d_in, d_hidden)
        self.gate_input = nn.Linear(d_in, 2 * d_hidden)  # rows z, target
        self.gate_state = nn.Linear(d_hidden, 2 * d_hidden, bias=False)
        for weight in (self.embed.weight, *self.gate_input.weight.chunk(2), *self.gate_state.weight.chunk(2)):
            nn.init.orthogonal_(weight.data)
        nn.init.zeros_(self.embed.bias)
        nn.init.ones_(self.gate_input.bias)

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """One step: input ``[batch, d_in]`` to the state ``[batch, d_hidden]``.

        Raises:
            ValueError: another shape.
        """
        if x.dim() != 2 or x.shape[1] != self.d_in:
            raise ValueError(f"expected an input [B, {self.d_in}], got {tuple(x.shape)}")
        if state is None:
            h = x.new_zeros(len(x), self.d_hidden)
            R = torch.eye(self.d_hidden, dtype=x.dtype, device=x.device).expand(len(x), -1, -1) if self.lambda_ else None
        else:
            h, R = state if self.lambda_ else (state, None)
        z, target = (self.gate_input(x) + self.gate_state(h)).chunk(2, 1)
        z, e = torch.sigmoid(z), self.embed(x)
        if self.lambda_:
            R = R @ rotation(e, target)  # [B, H, H]
            turned = (R @ h[:, :, None])[:, :, 0]
        else:
            turned = rotate(e, target, h)
        h = torch.lerp(torch.relu(e + turned), h, z)
        if self.eta is not None:
            length = h.norm(dim=1, keepdim=True)
            h = self.eta * h / torch.where(length > 0, length, 1)
        return h, (h, R) if self.lambda_ else h
