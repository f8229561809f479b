r"""Kronecker recurrent units, KRU (jose2018kronecker).

A state of $N$ numbers wants a recurrent matrix of $N^2$, far more than the rest of a small recurrent network, and its singular values decide
whether gradients survive. KRU writes the matrix as a Kronecker product of small complex matrices, which needs only logarithmically many
numbers. The singular values of the product are products of the factors' singular values, so it is enough to hold each small factor near the
unitary matrices, and a penalty does that.

Equations: with factors $W_f \in \mathbb C^{p_f \times p_f}$, $N = \prod_f p_f$, input $x_t$ and state $h_t \in \mathbb C^N$,

$$ h_t = \sigma(W h_{t-1} + U x_t + b) , \qquad W = W_0 \otimes W_1 \otimes \cdots \otimes W_{F-1} . $$

$W h$ is computed by reshaping $h$ to an array with one axis a factor and multiplying along each axis: $N \sum_f p_f$ products in place of $N^2$.
The loss gets $\lambda$ times the penalty

$$ \sum_f \| W_f^H W_f - I \|_F^2 , $$

which is zero where all factors, and hence $W$, are unitary. The output is the real and the imaginary part of the state, side by side.

Deviations from the paper:

1. $\sigma$ is the modReLU of Arjovsky, Shah and Bengio (2016), $h \mapsto \operatorname{relu}(|h| + c)\, h / |h|$ with a learned $c$ that starts at 0,
   where it is the identity. `activation="relu"` cuts off the negative parts of real and imaginary part instead.
2. The factors start as random unitary matrices. `exact=True` keeps them unitary to rounding error at every step of training,
   $W_f = V_f \exp(A_f - A_f^H)$ with a fixed unitary $V_f$; the paper argues for the penalty, which lets the network forget.
3. Neighbouring factors are multiplied out up to size 16 once a sequence; the result is the same, and fewer small products remain in each step.
4. A plain recurrent network; the paper also puts Kronecker factors into an LSTM.

Later work: Kronecker products were used to compress the matrices of recurrent networks for small devices (Thakker et al., 2019), where 2 x 2 factors
were found too poor and larger ones used. Unitary matrices lost importance when linear state space models showed that decays of modulus
just below one on a diagonal are enough (Orvieto et al., 2023), which are both cheaper and parallel over time.

Example:
    import torch
    from torch import nn
    from dlatlas.nlp.kronecker_rnn import KRU

    dense, kru = nn.RNN(4, 64, batch_first=True), KRU(4)  # 64 real numbers, 64 complex ones
    print("recurrent parameters:", dense.weight_hh_l0.numel(), "and", kru.recurrent_parameters)
    for name, layer, width in (("dense", dense, 64), ("Kronecker", kru, 128)):
        head = nn.Linear(width, 4)
        optimizer = torch.optim.Adam([*layer.parameters(), *head.parameters()], lr=1e-3)
        for step in range(60):
            y = torch.randint(4, (32,))
            x = torch.zeros(32, 50, 4)
            x[:, 0] = nn.functional.one_hot(y, 4).float()  # which symbol was it, 49 blanks ago?
            loss = task = nn.functional.cross_entropy(head(layer(x)[0][:, -1]), y)
            if layer is kru:
                loss = task + kru.penalty()  # the method: small factors that stay nearly unitary
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"{name}: loss {task:.3f} (guessing: 1.386)")
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["KRU", "kron_apply", "singular_values", "soft_unitary_penalty"]

MERGE = 16  # neighbouring factors are multiplied out up to this size


def kron_apply(factors: Sequence[Tensor], x: Tensor) -> Tensor:
    r"""$(W_0 \otimes \dots \otimes W_{F-1})\, x$ without forming the product.

    Args:
        factors: matrices ``[p_f, q_f]``, real or complex.
        x: ``[..., prod q_f]``.

    Returns:
        ``[..., prod p_f]``.

    Raises:
        ValueError: no factor, one that is not a matrix, or another last dimension.
    """
    _check(factors)
    size = math.prod(W.shape[1] for W in factors)
    if x.dim() < 1 or x.shape[-1] != size:
        raise ValueError(f"expected a last dimension of {size}, got {tuple(x.shape)}")
    dtype = torch.result_type(factors[0], x)
    y = x.to(dtype).reshape(-1, size)
    for W in factors:
        # Multiply along the first axis and put it last: after all factors the axes are in order again.
        y = y.reshape(len(y), W.shape[1], -1).transpose(1, 2) @ W.to(dtype).T  # [B, rest, p]
        y = y.flatten(1)
    return y.reshape(*x.shape[:-1], -1)


def soft_unitary_penalty(factors: Sequence[Tensor]) -> Tensor:
    r"""$\sum_f \| W_f^H W_f - I \|_F^2$, a real number.

    Args:
        factors: matrices, real or complex.

    Raises:
        ValueError: no factor, or one that is not a matrix.
    """
    _check(factors)
    gaps = [W.mH @ W - torch.eye(W.shape[1], dtype=W.dtype, device=W.device) for W in factors]
    return torch.stack([(gap.real**2 + gap.imag**2).sum() if gap.is_complex() else gap.square().sum() for gap in gaps]).sum()


def singular_values(factors: Sequence[Tensor]) -> Tensor:
    """Singular values of the Kronecker product, largest first: all products of one singular value a factor."""
    _check(factors)
    values = torch.ones(1, dtype=factors[0].real.dtype, device=factors[0].device)
    for W in factors:
        values = (values[:, None] * torch.linalg.svdvals(W)).flatten()
    return values.sort(descending=True).values


class KRU(nn.Module):
    """Recurrent network whose recurrent matrix is a Kronecker product: ``forward(x, state=None) -> (out, state)``.

    Args:
        d_in: size of an input.
        factor_sizes: $p_f$; the state has as many numbers as their product.
        complex: complex state and factors.
        exact: keep the factors unitary, in place of a penalty.
        activation: "modrelu" or "relu".

    Raises:
        ValueError: sizes below 1, no factor, or an unknown activation.
    """

    def __init__(
        self,
        d_in: int,
        factor_sizes: Sequence[int] = (2, 2, 2, 2, 2, 2),
        complex: bool = True,
        *,
        exact: bool = False,
        activation: str = "modrelu",
    ):
        super().__init__()
        if not factor_sizes or min(d_in, *factor_sizes) < 1 or activation not in ("modrelu", "relu"):
            raise ValueError(
                f"expected sizes of at least 1 and activation 'modrelu' or 'relu', got {d_in}, {tuple(factor_sizes)}, {activation!r}"
            )
        self.d_in, self.n, self.complex, self.exact, self.activation = d_in, math.prod(factor_sizes), complex, exact, activation
        self.input = nn.Linear(d_in, self.n * (1 + complex))
        # Real and imaginary part side by side on a last axis, so that `double()` and optimisers see plain real parameters.
        start = [self._real(_haar(p, complex)) for p in factor_sizes]
        self.raw = nn.ParameterList(nn.Parameter(torch.zeros_like(W) if exact else W) for W in start)
        for k, W in enumerate(start if exact else ()):
            self.register_buffer(f"start_{k}", W)
        if activation == "modrelu":
            self.shift = nn.Parameter(torch.zeros(self.n))

    @property
    def factors(self) -> list[Tensor]:
        """The matrices $W_f$."""
        found = [self._matrix(raw) for raw in self.raw]
        if self.exact:
            # In double precision: the rounding error of the exponential grows with its argument.
            turns = [torch.matrix_exp((A - A.mH).to(torch.promote_types(A.dtype, torch.float64))) for A in found]
            starts = [self._matrix(getattr(self, f"start_{k}")) for k in range(len(found))]
            found = [(V.to(turn.dtype) @ turn).to(V.dtype) for V, turn in zip(starts, turns)]
        return found

    @property
    def recurrent_parameters(self) -> int:
        """Number of real parameters of the recurrent matrix."""
        return sum(raw.numel() for raw in self.raw)

    def penalty(self) -> Tensor:
        """:func:`soft_unitary_penalty` of the factors."""
        return soft_unitary_penalty(self.factors)

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Run over a sequence.

        Args:
            x: ``[batch, time, d_in]``.
            state: real and imaginary parts ``[batch, 2 N]``, or ``[batch, N]`` of a real unit; zero if not given.

        Returns:
            outputs ``[batch, time, 2 N]`` or ``[batch, time, N]``, and the last of them, which is the state.

        Raises:
            ValueError: other shapes, or no time step.
        """
        if x.dim() != 3 or x.shape[2] != self.d_in or x.shape[1] == 0:
            raise ValueError(f"expected an input [B, T >= 1, {self.d_in}], got {tuple(x.shape)}")
        width = self.n * (1 + self.complex)
        state = x.new_zeros(len(x), width) if state is None else state
        if state.shape != (len(x), width):
            raise ValueError(f"expected a state {(len(x), width)}, got {tuple(state.shape)}")
        h, factors, out = self._join(state), _merged(self.factors), []
        for drive in self._join(self.input(x)).unbind(1):
            h = self._activate(kron_apply(factors, h) + drive)
            out.append(h)
        h = torch.stack(out, 1)  # [B, T, N]
        out = torch.cat([h.real, h.imag], -1) if self.complex else h
        return out, out[:, -1]

    def _activate(self, h: Tensor) -> Tensor:
        if self.activation == "relu":
            return torch.complex(h.real.relu(), h.imag.relu()) if self.complex else h.relu()
        size = h.abs()
        scale = (size + self.shift).relu() / size.clamp_min(1e-6)
        # Real times real: a product with a complex number costs more, most of all in the backward pass.
        return torch.view_as_complex(torch.view_as_real(h) * scale[..., None]) if self.complex else h * scale

    def _join(self, parts: Tensor) -> Tensor:
        return torch.complex(parts[..., : self.n], parts[..., self.n :]) if self.complex else parts

    def _real(self, W: Tensor) -> Tensor:
        return torch.view_as_real(W).clone() if self.complex else W

    def _matrix(self, raw: Tensor) -> Tensor:
        return torch.view_as_complex(raw) if self.complex else raw


def _haar(p: int, complex: bool) -> Tensor:
    """A random unitary (or orthogonal) matrix, uniformly distributed."""
    Q, R = torch.linalg.qr(torch.randn(p, p, dtype=torch.complex128 if complex else torch.float64))
    d = R.diagonal()
    return (Q * (d / d.abs())).to(torch.complex64 if complex else torch.float32)


def _merged(factors: list[Tensor]) -> list[Tensor]:
    found = factors[:1]
    for W in factors[1:]:
        if len(found[-1]) * len(W) <= MERGE:
            found[-1] = torch.kron(found[-1], W)
        else:
            found.append(W)
    return found


def _check(factors: Sequence[Tensor]) -> None:
    if not len(factors) or any(W.dim() != 2 for W in factors):
        raise ValueError(f"expected at least one matrix, got shapes {[tuple(W.shape) for W in factors]}")
