r"""ProxProp (frerix2018proxprop).

Backpropagation can be read as explicit gradient steps on quadratic penalties that tie each layer's output to the value that the
layers above would like to see. For a linear layer that quadratic problem in the weights can be solved outright. Replacing the
explicit by this implicit (proximal) step leaves the rest of backpropagation alone and multiplies the weight gradient by the
inverse of a regularised input covariance.

Equations:

A linear layer maps $n$ inputs, the rows of $A$ (with a column of ones for the bias), to $Z = A \Theta$. Backpropagation gives the
wanted output $Z' = Z - \partial L / \partial Z$ and the explicit step $\Theta - \tau A^T (Z - Z')$. The proximal step is

$$ \Theta' = \operatorname{argmin}_X \; \tfrac12 \|A X - Z'\|_F^2 + \tfrac{1}{2 \tau} \|X - \Theta\|_F^2
           = \left( A^T A + I / \tau \right)^{-1} \left( A^T Z' + \Theta / \tau \right) . $$

The layer reports its displacement as the gradient, which any optimiser can use:

$$ \Theta - \Theta' = \left( A^T A + I / \tau \right)^{-1} A^T \frac{\partial L}{\partial Z} . $$

The matrix in front is positive definite, so this is a descent direction for every $\tau > 0$; for $\tau \to 0$ it is $\tau$ times
the gradient. Instead of a factorisation, a few steps of conjugate gradients from $\Theta$ also give a descent direction.

Deviations from the paper:

1. The exact solve factorises the smaller of the two matrices $A^T A + I/\tau$ and $A A^T + I/\tau$; both give the same step.
2. Linear layers only; the paper also treats convolutions, by conjugate gradients. As in the authors' code, every output has its own column
   of the system and its own conjugate-gradient step sizes.

Later work: Inverse input covariances are one half of K-FAC's Kronecker factors (Martens and Grosse 2015), here per batch and without
the factor on the output side; FOOF (Benzing 2022, "Gradient descent on neurons and its link to approximate second-order
optimization") arrives at the same direction with a running covariance and argues that this factor explains most of K-FAC's
gain. Shampoo and SOAP use both sides. The price of the solve has kept such steps rare outside large-batch training.

Example:
    import torch
    from torch import nn
    from dlatlas.theory.proxprop import ProxLinear

    x = torch.randn(500, 20)
    y = torch.sin(x @ torch.randn(20, 1) / 4)
    x = 3 + x * torch.logspace(1, -1, 20)  # features of very different size
    for tau in (None, 0.1, 1.0, 100.0):
        torch.manual_seed(0)
        layer = nn.Linear if tau is None else lambda a, b: ProxLinear(a, b, tau=tau)
        model = nn.Sequential(layer(20, 64), nn.Tanh(), layer(64, 1))
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)  # a step of 1 takes the proximal step itself
        for step in range(201):
            loss = nn.functional.mse_loss(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"{type(model[0]).__name__}, tau {tau}: loss {loss:.3f}")  # gradient steps blow up, proximal ones never
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

__all__ = ["ProxLinear", "prox_step"]


def prox_step(A: Tensor, Y: Tensor, Z: Tensor, tau: float, cg_steps: int | None = None) -> Tensor:
    r"""Proximal step of a linear least-squares problem.

    $\operatorname{argmin}_X \frac12 \|A X - Y\|_F^2 + \frac{1}{2 \tau} \|X - Z\|_F^2$

    Args:
        A: inputs ``[n, p]``.
        Y: wanted outputs ``[n, q]``.
        Z: where the step starts ``[p, q]``.
        tau: step size $\tau$.
        cg_steps: number of conjugate-gradient steps from Z; None: exact, by Cholesky factorisation.

    Returns:
        The minimiser ``[p, q]``, or its approximation.

    Raises:
        ValueError: tau <= 0, cg_steps < 1, shapes that do not match.
    """
    _check(tau, cg_steps)
    if A.dim() != 2 or Y.dim() != 2 or Z.shape != (A.shape[1], Y.shape[1]) or len(A) != len(Y):
        raise ValueError(f"expected A [n, p], Y [n, q] and Z [p, q], got {tuple(A.shape)}, {tuple(Y.shape)} and {tuple(Z.shape)}")
    return Z - _displacement(A, A @ Z - Y, tau, cg_steps)


class ProxLinear(nn.Linear):
    r"""A linear layer whose gradient is a proximal step: forward as `nn.Linear`, backward with $\Theta - \Theta'$ for the weights.

    Weight and bias are solved for together. The gradient of the input is the usual one.

    Args:
        in_features: inputs.
        out_features: outputs.
        bias: whether there is a bias.
        tau: $\tau$; it acts on $\partial L / \partial Z$, which carries the 1/n of a mean loss while $A^T A$ grows with n.
        cg_steps: conjugate-gradient steps instead of the exact solve.

    Raises:
        ValueError: tau <= 0 or cg_steps < 1.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True, tau: float = 1.0, cg_steps: int | None = None, **kwargs):
        _check(tau, cg_steps)
        super().__init__(in_features, out_features, bias, **kwargs)
        self.tau, self.cg_steps = tau, cg_steps

    def forward(self, input: Tensor) -> Tensor:
        return _Prox.apply(input, self.weight, self.bias, self.tau, self.cg_steps)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, tau={self.tau:g}, cg_steps={self.cg_steps}"


class _Prox(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, tau: float, cg_steps: int | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias, ctx.tau, ctx.cg_steps = bias is not None, tau, cg_steps
        return nn.functional.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        grad_x = grad @ weight if ctx.needs_input_grad[0] else None
        if not (ctx.needs_input_grad[1] or ctx.needs_input_grad[2]):
            return grad_x, None, None, None, None
        A, D = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])  # [n, in], [n, out]
        if ctx.has_bias:
            A = torch.cat([A, A.new_ones(len(A), 1)], 1)  # [n, in + 1]
        step = _displacement(A, D, ctx.tau, ctx.cg_steps)  # [in (+ 1), out]
        return grad_x, step[: x.shape[-1]].T, step[-1] if ctx.has_bias else None, None, None


def _check(tau: float, cg_steps: int | None) -> None:
    if not tau > 0:
        raise ValueError(f"tau must be positive, got {tau}")
    if cg_steps is not None and cg_steps < 1:
        raise ValueError(f"cg_steps must be at least 1 or None, got {cg_steps}")


def _displacement(A: Tensor, D: Tensor, tau: float, cg_steps: int | None) -> Tensor:
    """``(A^T A + I/tau)^{-1} A^T D`` ``[p, q]`` for A ``[n, p]`` and the output gradient D ``[n, q]``."""
    n, p = A.shape
    if cg_steps is not None:
        return _conjugate_gradients(lambda V: A.T @ (A @ V) + V / tau, A.T @ D, cg_steps)
    if n >= p:
        gram = A.T @ A
        gram.diagonal().add_(1 / tau)
        return torch.cholesky_solve(A.T @ D, torch.linalg.cholesky(gram))
    # Push-through identity: (A^T A + I/tau)^{-1} A^T = A^T (A A^T + I/tau)^{-1}.
    gram = A @ A.T  # [n, n]
    gram.diagonal().add_(1 / tau)
    return A.T @ torch.cholesky_solve(D, torch.linalg.cholesky(gram))


def _conjugate_gradients(matmul, b: Tensor, steps: int) -> Tensor:
    """Solve for every column of b from zero; columns that are solved exactly stay as they are."""
    x = torch.zeros_like(b)
    residual = b
    direction = b
    square = b.pow(2).sum(0)  # [q]
    for _ in range(steps):
        image = matmul(direction)
        curvature = (direction * image).sum(0)
        alpha = torch.where(curvature > 0, square / curvature, 0)
        x = x + alpha * direction
        residual = residual - alpha * image
        new = residual.pow(2).sum(0)
        direction = residual + torch.where(square > 0, new / square, 0) * direction
        square = new
    return x
