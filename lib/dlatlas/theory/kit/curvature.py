"""Second derivatives of a loss, gradients of single samples, and spectra by Lanczos."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, vmap

from dlatlas.kit.flat import flat_grad

MAX_DENSE = 4000
MAX_EXACT_OUTPUTS = 16


def hvp(loss_fn: Callable[[], Tensor], params: Sequence[Tensor], v: Tensor) -> Tensor:
    """Exact Hessian-vector product ``H v`` ``[P]`` of ``loss_fn()`` with respect to `params`, by double backward."""
    params = list(params)
    _check_vector(params, v)
    gradient = flat_grad(loss_fn(), params, create_graph=True)
    if not gradient.requires_grad:  # a loss that is linear in the parameters
        return torch.zeros_like(v)
    return flat_grad(gradient @ v, params).detach()


def full_hessian(loss_fn: Callable[[], Tensor], params: Sequence[Tensor]) -> Tensor:
    """The whole Hessian ``[P, P]``, one double backward a row; P <= 4000."""
    params = list(params)
    total = sum(p.numel() for p in params)
    if total > MAX_DENSE:
        raise ValueError(f"a dense Hessian is limited to {MAX_DENSE} parameters, got {total}; use hvp or lanczos")
    gradient = flat_grad(loss_fn(), params, create_graph=True)
    if not gradient.requires_grad:
        return gradient.new_zeros(total, total)
    rows = []
    for entry in gradient:
        row = torch.autograd.grad(entry, params, retain_graph=True, allow_unused=True)
        rows.append(torch.cat([(torch.zeros_like(p) if r is None else r).reshape(-1) for p, r in zip(params, row)]))
    return torch.stack(rows).detach()


def per_sample_grads(module: nn.Module, loss: Callable[[Tensor, Tensor], Tensor], X: Tensor, y: Tensor) -> Tensor:
    """Gradient of each sample's own loss ``[N, P]``.

    `loss` takes (prediction, target) of a batch of one and returns a scalar.

    Raises:
        ValueError: the module has batch normalisation, which makes the loss of one sample depend on the others.
    """
    if any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in module.modules()):
        raise ValueError("samples have no gradients of their own in a module with batch normalisation")
    if len(X) != len(y) or len(X) == 0:
        raise ValueError(f"expected as many targets as inputs and at least one, got {len(X)} inputs and {len(y)} targets")
    params = {name: p.detach() for name, p in module.named_parameters()}
    buffers = dict(module.named_buffers())

    def sample_loss(params: dict[str, Tensor], x: Tensor, target: Tensor) -> Tensor:
        return loss(functional_call(module, (params, buffers), (x[None],)), target[None])

    grads = vmap(grad(sample_loss), in_dims=(None, 0, 0))(params, X, y)
    return torch.cat([g.reshape(len(X), -1) for g in grads.values()], dim=1)


def lanczos(matvec: Callable[[Tensor], Tensor], dim: int, steps: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Ritz values ``[k]`` in ascending order and their weights ``[k]`` from a random unit start vector, k <= steps.

    The weights are the squared first components of the Ritz vectors and sum to 1: values and weights together are a
    quadrature of the spectral density. Full reorthogonalisation, float64. Stops early when the Krylov space is exhausted.
    """
    if dim < 1 or not steps >= 1:
        raise ValueError(f"dim and steps must be at least 1, got dim={dim}, steps={steps}")
    q = torch.randn(dim, dtype=torch.float64, generator=generator)
    basis = [q / q.norm()]
    diagonal: list[Tensor] = []
    off: list[Tensor] = []
    for _ in range(min(steps, dim)):
        w = matvec(basis[-1])
        diagonal.append(basis[-1] @ w)
        span = torch.stack(basis)
        for _ in range(2):  # twice is enough (Kahan and Parlett)
            w = w - span.T @ (span @ w)
        norm = w.norm()
        if norm <= 1e-10 * max(1.0, abs(float(diagonal[0]))):
            break
        off.append(norm)
        basis.append(w / norm)
    k = len(diagonal)
    T = torch.diag(torch.stack(diagonal))
    if k > 1:
        beta = torch.stack(off[: k - 1])
        T = T + torch.diag(beta, 1) + torch.diag(beta, -1)
    values, vectors = torch.linalg.eigh(T)
    return values, vectors[0] ** 2


def jacobian_fro(module: nn.Module, X: Tensor, probes: int = 64, generator: torch.Generator | None = None) -> Tensor:
    """Frobenius norm of the input-output Jacobian at each sample ``[N]``.

    Exact for at most 16 outputs; otherwise the square root of Hutchinson's unbiased estimate of ``|J|_F^2``, from `probes`
    random vectors.
    """
    params = {name: p.detach() for name, p in module.named_parameters()}
    buffers = dict(module.named_buffers())

    def f(x: Tensor) -> Tensor:
        return functional_call(module, (params, buffers), (x[None],)).reshape(-1)

    n_out = f(X[0]).numel()
    if n_out <= MAX_EXACT_OUTPUTS:
        return vmap(jacrev(f))(X).flatten(1).norm(dim=1).detach()
    x = X.detach().requires_grad_()
    out = module(x).reshape(len(X), -1)  # [N, n_out]
    total = torch.zeros(len(X), dtype=X.dtype, device=X.device)
    for _ in range(probes):
        v = torch.randn(out.shape, dtype=X.dtype, generator=generator).to(X.device)
        (g,) = torch.autograd.grad(out, x, v, retain_graph=True)
        total += g.flatten(1).pow(2).sum(1)
    return (total / probes).sqrt()


def _check_vector(params: Sequence[Tensor], v: Tensor) -> None:
    total = sum(p.numel() for p in params)
    if v.shape != (total,):
        raise ValueError(f"the parameters have {total} entries, got a vector of shape {tuple(v.shape)}")
