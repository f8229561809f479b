r"""K-FAC for recurrent networks (martens2018kfacrnn).

The natural gradient multiplies the gradient by the inverse Fisher matrix. K-FAC makes that cheap by writing a layer's Fisher matrix
as a Kronecker product of input and output-gradient covariances. In a recurrent network one weight matrix acts at every time step,
its gradient is a sum over time, and the terms of the sum are correlated. Modelling them as a linear Gaussian chain keeps the
Kronecker structure and still gives a closed-form inverse.

Equations:

The gradient of a weight matrix $W$ over a sequence of length $T$ is $\sum_t g_t a_t^T$, with $a_t$ its input and $g_t$ the gradient
at its output. Let $w_t = \operatorname{vec}(g_t a_t^T)$ (columns stacked). Assume that $a$ and $g$ are independent, that the process is
stationary and that $w_t$ depends on the past through $w_{t-1}$, linearly and with Gaussian noise. With

$$ A_0 = E[a_t a_t^T] , \quad A_1 = E[a_t a_{t-1}^T] , \quad G_0 = E[g_t g_t^T] , \quad G_1 = E[g_t g_{t-1}^T] , $$

$$ V_0 = A_0 \otimes G_0 , \quad V_1 = A_1 \otimes G_1 , \quad \Psi = V_1 V_0^{-1} , \quad
   F = \sum_{d=-T}^{T} (T - |d|) V_d , \quad V_d = \Psi^d V_0 , \quad V_{-d} = V_d^T . $$

Write $\hat\Psi = V_0^{-1/2} V_1 V_0^{-1/2} = \hat\Psi_A \otimes \hat\Psi_G$. Three ways to apply $F^{-1}$:

1. `independent`: the terms are uncorrelated, $F = T V_0$, and $F^{-1}$ takes a gradient $V$ to $\frac1T G_0^{-1} V A_0^{-1}$.
2. `symmetric`: $A_1$ and $G_1$ are symmetric. In the eigenbasis of $\hat\Psi$ the matrix $V_0^{-1/2} F V_0^{-1/2}$ is diagonal, with

$$ \eta(x) = \sum_{d=-T}^{T} (T - |d|) x^{|d|} = \frac{T (1 - x^2) - 2 x (1 - x^T)}{(1 - x)^2} , \qquad \eta(1) = T^2 . $$

3. `limit`: sequences are long compared with the memory of the chain, $F / T \to V_0^{1/2} \hat F V_0^{1/2}$ with

$$ \hat F^{-1} = (I - \hat\Psi^T) (I - \hat\Psi \hat\Psi^T)^{-1} (I - \hat\Psi) . $$

Every factor is a Kronecker product or diagonal in a Kronecker basis, so nothing larger than the weight matrix is formed.

Deviations from the paper:

1. The lag-1 moments are divided by $T$, like the lag-0 moments, although there are only $T - 1$ pairs. The biased estimate is positive
   semidefinite as a whole, so $\|\hat\Psi\| \le 1$ and no extra shrinking is needed.
2. Damping is added to $A_0$ and $G_0$ in K-FAC's factored way, $\pi \sqrt\lambda$ and $\sqrt\lambda / \pi$ times the identity, with
   $\pi^2$ the ratio of their mean eigenvalues. $A_1$ and $G_1$ are not damped, which pulls $\hat\Psi$ away from 1.
3. One recurrent cell with its two weight matrices, each with its own block; the paper trains LSTM language models with all their layers.
4. The step is limited by the predicted change of the output distribution, as in distributed K-FAC (Ba et al. 2017).
5. Biases get plain SGD with the same step. Where the natural gradient wants a large step this can be too much for them: use a cell
   without biases and an input with a constant entry (a one-hot input already contains one).

Later work: The Kronecker view of sums over shared weights was taken up for other architectures: Eschenhagen et al. (2023,
"Kronecker-factored approximate curvature for modern neural network architectures") call the two ways of handling the sum K-FAC-expand and
K-FAC-reduce. `independent` is of the first kind. Attention replaced recurrence in language modelling, and Kronecker-factored
preconditioning is used there through Shampoo and SOAP, which do not model time.

Example:
    import torch
    from torch import nn
    from dlatlas.theory.kfac_rnn import KFACRNN

    cell, readout = nn.RNNCell(1, 16), nn.Linear(16, 1)
    optimizer, plain = KFACRNN(cell, lr=0.1, damping=0.1), torch.optim.SGD(readout.parameters(), lr=0.1)

    def predict(x):  # [time, batch, 1] -> the last output [batch, 1]
        h = x.new_zeros(x.shape[1], 16)
        for now in x:
            h = cell(now, h)
        return readout(h)

    for step in range(151):
        x = torch.randn(10, 128, 1)
        with optimizer.record():  # the Fisher matrix, from targets drawn from the model itself
            mean = predict(x)
            (0.5 * (mean - mean.detach() - torch.randn_like(mean)) ** 2).mean().backward()
        cell.zero_grad(), readout.zero_grad()
        loss = (predict(x) - torch.tanh(x.sum(0))).square().mean()
        loss.backward()
        optimizer.step(), plain.step()
        if step % 50 == 0:
            print(f"step {step}: loss {loss.item():.3f}")
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

__all__ = ["KFACRNN", "chain_fisher", "kfac_rnn_solve"]

MODES = ("independent", "symmetric", "limit")


def chain_fisher(A0: Tensor, A1: Tensor, G0: Tensor, G1: Tensor, T: int) -> Tensor:
    r"""Fisher matrix of the linear Gaussian chain, formed densely: the reference for small sizes.

    $F = \sum_{d=-T}^{T} (T - |d|) V_d$ with $V_d = \Psi^d (A_0 \otimes G_0)$, $\Psi = (A_1 \otimes G_1)(A_0 \otimes G_0)^{-1}$

    Args:
        A0: input moment ``[a, a]``, symmetric positive definite.
        A1: lag-1 input moment ``[a, a]``.
        G0: output-gradient moment ``[g, g]``, symmetric positive definite.
        G1: lag-1 output-gradient moment ``[g, g]``.
        T: sequence length.

    Returns:
        ``[a g, a g]``, for vectors that stack the columns of ``[g, a]`` matrices.

    Raises:
        ValueError: T < 1, moments that do not match or A0, G0 that are not symmetric.
    """
    _check(A0, A1, G0, G1, T)
    V0 = torch.kron(A0, G0)
    psi = torch.linalg.solve(V0, torch.kron(A1, G1), left=False)
    total, V = T * V0, V0
    for d in range(1, int(T)):
        V = psi @ V
        total = total + (T - d) * (V + V.T)
    return total


def kfac_rnn_solve(
    V: Tensor, A0: Tensor, A1: Tensor, G0: Tensor, G1: Tensor, T: int | Tensor, mode: str = "independent", damping: float = 0.0
) -> Tensor:
    r"""Natural gradient $F^{-1} V$ of a weight matrix under the linear Gaussian chain.

    Args:
        V: gradient of the weight matrix ``[g, a]``.
        A0: input moment ``[a, a]``, symmetric positive definite.
        A1: lag-1 input moment ``[a, a]``; `symmetric` uses its symmetric part.
        G0: output-gradient moment ``[g, g]``, symmetric positive definite.
        G1: lag-1 output-gradient moment ``[g, g]``; `symmetric` uses its symmetric part.
        T: sequence length, or lengths ``[n]`` over which $T$ (or $\eta$, in mode `symmetric`) is averaged.
        mode: "independent", "symmetric" or "limit".
        damping: $\lambda \ge 0$, put on the per-step matrix $A_0 \otimes G_0$.

    Returns:
        ``[g, a]`` in the dtype of `V`.

    Raises:
        ValueError: T < 1, unknown mode, damping < 0, shapes that do not match, A0 or G0 not symmetric or not positive definite,
            or a spectral radius of $\Psi$ of at least 1 in mode `limit`.
    """
    if V.shape != (len(G0), len(A0)):
        raise ValueError(f"expected a gradient of shape {(len(G0), len(A0))}, got {tuple(V.shape)}")
    return _inverse(A0, A1, G0, G1, T, mode, damping)(V.double()).to(V.dtype)


def _inverse(A0: Tensor, A1: Tensor, G0: Tensor, G1: Tensor, T: int | Tensor, mode: str, damping: float) -> Callable[[Tensor], Tensor]:
    """The function that applies the inverse Fisher matrix to a float64 matrix ``[g, a]``."""
    lengths = _check(A0, A1, G0, G1, T)
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    if not damping >= 0:
        raise ValueError(f"damping must be >= 0, got {damping}")
    A0, A1, G0, G1 = (M.double() for M in (A0, A1, G0, G1))
    if damping > 0:
        # The ratio of the factors' sizes splits the damping as evenly as a Kronecker product can.
        pi = (A0.diagonal().mean() / G0.diagonal().mean().clamp_min(1e-30)).sqrt().clamp(1e-6, 1e6)
        A0 = A0 + damping**0.5 * pi * torch.eye(len(A0), dtype=A0.dtype, device=A0.device)
        G0 = G0 + damping**0.5 / pi * torch.eye(len(G0), dtype=G0.dtype, device=G0.device)
    root_A, root_G = _inverse_root(A0, "A0"), _inverse_root(G0, "G0")
    if mode == "independent":
        inv_A, inv_G = root_A @ root_A / lengths.mean(), root_G @ root_G
        return lambda V: inv_G @ V @ inv_A
    psi_A, psi_G = root_A @ A1 @ root_A, root_G @ G1 @ root_G
    if mode == "symmetric":
        p, U_A = torch.linalg.eigh((psi_A + psi_A.T) / 2)
        q, U_G = torch.linalg.eigh((psi_G + psi_G.T) / 2)
        scale = _eta(q[:, None] * p, lengths)  # [g, a]
        left, right = root_G @ U_G, root_A @ U_A
        return lambda V: left @ ((left.T @ V @ right) / scale) @ right.T
    radius = float(torch.linalg.eigvals(psi_A).abs().max() * torch.linalg.eigvals(psi_G).abs().max())
    if radius >= 1:
        raise ValueError(f"mode 'limit' needs a spectral radius of Psi below 1, got {radius:.6g}; shrink A1 or G1, or add damping")
    s, U_A = torch.linalg.eigh(psi_A @ psi_A.T)
    r, U_G = torch.linalg.eigh(psi_G @ psi_G.T)
    middle = 1 - r[:, None] * s  # [g, a]

    def apply(V: Tensor) -> Tensor:
        V = root_G @ V @ root_A
        V = V - psi_G @ V @ psi_A.T  # (I - Psi) vec V
        V = U_G @ ((U_G.T @ V @ U_A) / middle) @ U_A.T
        V = V - psi_G.T @ V @ psi_A  # (I - Psi^T) vec V
        return root_G @ V @ root_A / lengths.mean()

    return apply


class KFACRNN(Optimizer):
    r"""K-FAC for an `nn.RNNCell`: natural gradient for its two weight matrices, SGD for its biases.

    Inside ``with optimizer.record():`` run the cell over a batch of sequences and call `backward` on the loss with targets that are
    *sampled from the model's own predictions*: this measures the Fisher matrix. Then `zero_grad`, the true loss, `backward`, `step`.
    Recording may be done less often than stepping.

    The update of a weight matrix is $m \leftarrow \mu m + \nu F^{-1} \nabla$, $W \leftarrow W - \epsilon m$ with
    $\nu = \min(1, \sqrt{\kappa / (\epsilon^2 \nabla^T F^{-1} \nabla)})$.

    Args:
        cell: the cell; what reads its states is trained by another optimiser.
        lr: step $\epsilon$.
        mode: "independent", "symmetric" or "limit".
        damping: $\lambda > 0$ on the per-step Fisher matrix.
        decay: decay of the running moments, in [0, 1).
        momentum: $\mu$ in [0, 1).
        clip: largest predicted change $\kappa$ (twice the Kullback-Leibler divergence) of one direction, before momentum adds earlier ones.

    Raises:
        ValueError: not an RNNCell, unknown mode, numbers out of range.
    """

    def __init__(
        self,
        cell: nn.RNNCell,
        lr: float = 1e-2,
        mode: str = "limit",
        damping: float = 1e-2,
        decay: float = 0.95,
        momentum: float = 0.9,
        clip: float = 1e-2,
    ):
        if not isinstance(cell, nn.RNNCell):
            raise ValueError(f"expected an nn.RNNCell, got {type(cell).__name__}")
        if mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
        if not (lr >= 0 and damping > 0 and clip > 0 and 0 <= decay < 1 and 0 <= momentum < 1):
            raise ValueError(
                "expected lr >= 0, damping > 0, clip > 0, decay and momentum in [0, 1), "
                f"got lr={lr}, damping={damping}, clip={clip}, decay={decay}, momentum={momentum}"
            )
        self.cell = cell
        self._inverses: dict[Tensor, Callable[[Tensor], Tensor]] = {}
        super().__init__(
            cell.parameters(), {"lr": lr, "mode": mode, "damping": damping, "decay": decay, "momentum": momentum, "clip": clip}
        )

    @contextmanager
    def record(self) -> Iterator[None]:
        """Measure the moments from one batch of sequences: one pass of the cell over time and one `backward` of a mean over the batch.

        The cell's gradients are put back afterwards as they were; those of other modules are not.
        """
        steps: list[list[Tensor | None]] = []

        def keep(cell: nn.RNNCell, args: tuple, kwargs: dict, out: Tensor) -> None:
            x, h = (*args, kwargs.get("input"))[0], (*args[1:], kwargs.get("hx"))[0]
            entry = [x.detach(), torch.zeros_like(out) if h is None else h.detach(), out.detach(), None]
            steps.append(entry)
            # The hook of a tensor sees the sum over all its uses: the next time step and the loss.
            out.register_hook(lambda grad: entry.__setitem__(3, grad.detach()))

        params = [p for group in self.param_groups for p in group["params"]]
        saved = [p.grad for p in params]
        handle = self.cell.register_forward_hook(keep, with_kwargs=True)
        try:
            for p in params:
                p.grad = None
            yield
        finally:
            handle.remove()
            for p, grad in zip(params, saved):
                p.grad = grad
        if not steps or all(entry[3] is None for entry in steps):
            raise RuntimeError("nothing to record: run the cell and call backward() inside `with optimizer.record()`")
        self._update_moments(steps)

    @torch.no_grad()
    def _update_moments(self, steps: list[list[Tensor | None]]) -> None:
        x, h, out = (torch.stack([entry[i].reshape(-1, entry[i].shape[-1]) for entry in steps]) for i in range(3))  # [T, N, ...]
        g = torch.stack([torch.zeros_like(o) if entry[3] is None else entry[3].reshape(o.shape) for entry, o in zip(steps, out)])
        # From the state's gradient of a batch mean to the pre-activation's gradient of single sequences.
        g = g * (1 - out**2 if self.cell.nonlinearity == "tanh" else (out > 0).to(out)) * out.shape[1]
        G = _moments(g)
        decay = self.param_groups[0]["decay"]
        for weight, a in ((self.cell.weight_ih, x), (self.cell.weight_hh, h)):
            new = dict(zip(("A0", "A1", "G0", "G1"), (*_moments(a), *G))) | {"T": torch.tensor(float(len(steps)))}
            state = self.state[weight]
            for name, value in new.items():
                state[name] = value if name not in state else state[name].lerp(value, 1 - decay)
        self._inverses.clear()

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """One update; returns the closure's loss.

        Raises:
            RuntimeError: no moments have been recorded yet.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            directions = {p: self._direction(p, group) for p in group["params"] if p.grad is not None and p.dim() == 2}
            change = group["lr"] ** 2 * sum(float((p.grad * d).sum()) for p, d in directions.items())
            nu = 1.0 if change <= group["clip"] else (group["clip"] / change) ** 0.5
            for p in group["params"]:
                if p in directions:
                    buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                    p.sub_(buffer.mul_(group["momentum"]).add_(directions[p], alpha=nu), alpha=group["lr"])
                elif p.grad is not None:  # a bias
                    p.sub_(p.grad, alpha=group["lr"])
        return loss

    def _direction(self, p: Tensor, group: dict) -> Tensor:
        if p not in self._inverses:
            state = self.state[p]
            if "A0" not in state:
                raise RuntimeError("no moments yet: use `with optimizer.record()` before the first step")
            moments = [state[name] for name in ("A0", "A1", "G0", "G1", "T")]
            self._inverses[p] = _inverse(*moments, group["mode"], group["damping"])
        return self._inverses[p](p.grad.double()).to(p.dtype)

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        self._inverses.clear()


def _moments(z: Tensor) -> tuple[Tensor, Tensor]:
    """Second moment and lag-1 moment ``[d, d]`` of ``[T, N, d]``, both divided by T N."""
    now, before = z[1:].flatten(0, 1), z[:-1].flatten(0, 1)
    count = z.shape[0] * z.shape[1]
    z = z.flatten(0, 1)
    return z.T @ z / count, now.T @ before / count


def _eta(x: Tensor, lengths: Tensor) -> Tensor:
    """Mean over the lengths of ``sum_d (T - |d|) x^|d|``, summed by Horner's rule: the closed form cancels near x = 1."""
    weights = [float((lengths - d).clamp_min(0).mean()) for d in range(int(lengths.max().ceil()))]
    total = torch.zeros_like(x)
    for w in reversed(weights[1:]):
        total = (total + w) * x
    return weights[0] + 2 * total


def _inverse_root(M: Tensor, name: str) -> Tensor:
    values, U = torch.linalg.eigh(M)
    if not values[0] > 0:
        raise ValueError(f"{name} must be positive definite, its smallest eigenvalue is {float(values[0]):.3g}; add damping")
    return (U / values.sqrt()) @ U.T


def _check(A0: Tensor, A1: Tensor, G0: Tensor, G1: Tensor, T: int | Tensor) -> Tensor:
    lengths = torch.as_tensor(T, dtype=torch.float64).reshape(-1)
    if lengths.numel() == 0 or not (lengths >= 1).all():
        raise ValueError(f"T must be at least 1, got {T}")
    for name, M, shape in (("A0", A0, A0.shape), ("A1", A1, A0.shape), ("G0", G0, G0.shape), ("G1", G1, G0.shape)):
        if M.dim() != 2 or M.shape[0] != M.shape[1] or M.shape != shape:
            raise ValueError(f"expected square moments, A1 like A0 and G1 like G0; got {name} of shape {tuple(M.shape)}")
        if not M.isfinite().all():
            raise ValueError(f"{name} holds NaN or infinity")
    for name, M in (("A0", A0), ("G0", G0)):
        if not torch.allclose(M, M.T, rtol=1e-4, atol=1e-6 * float(M.abs().max())):
            raise ValueError(f"{name} must be symmetric, got a largest asymmetry of {float((M - M.T).abs().max()):.3g}")
    return lengths
