r"""Mixed precision with loss scaling (micikevicius2018mixed).

Activations, gradients and the weights that a layer multiplies by are half precision numbers, in half the memory of floats. Three habits keep the
accuracy. A master copy of the weights stays in 32 bits, because an update is far smaller than its weight. The loss is multiplied by a large number
before the backward pass and the gradients are divided by it afterwards, in 32 bits, because many gradients are too small for half precision.
And sums, those in products as well as those in losses and normalisations, are accumulated in 32 bits and rounded once at the end.

Equations: with master weights $W$, the scale $S$, the loss $L$ and the learning rate $\eta$ (of plain gradient descent, as an example),

$$ W_{16} = \mathrm{half}(W), \qquad g_{16} = \frac{\partial (S L)}{\partial W_{16}}, \qquad g = \frac{g_{16}}{S}, \qquad W \leftarrow W - \eta\, g. $$

Half precision has normal numbers from $2^{-14}$ to 65504 and subnormal ones down to $2^{-24}$, and 11 significant bits, so that adding less than
$2^{-12}$ of a weight to it changes nothing. If any gradient is infinite or not a number, the step is left out and $S$ is multiplied by
`backoff`; after `interval` clean steps in a row it is multiplied by `growth`.

Deviations from the paper:

1. The paper's scale is constant or, as a variant, grows and shrinks; here it grows and shrinks unless ``dynamic=False``.
2. A processor without half precision units is assumed: tensors between operations are stored in half precision, and a product converts them to
   floats, multiplies, and rounds once. That is what the paper's hardware does, without its speed.
3. Without master weights, the optimizer's arithmetic and its state still are in 32 bits, and only the result is rounded, which is kinder to
   half precision than an optimizer in half precision would be.

Later work: dynamic scaling became the default of all large frameworks. bfloat16 has the exponents of a float and needs no scaling, at three bits
less of precision, and has mostly taken the place of half precision for large models (Kalamkar et al., 2019). Without master
weights one can train by rounding at random, so that small updates survive on average (Gupta et al., 2015). Training in 8-bit floats went back to
scales, now one for each tensor (Micikevicius et al., 2022).

Example:
    import torch
    from torch import nn
    from dlatlas.compression.mixed_precision import LossScaler, MixedPrecision

    x = torch.randn(2000, 20)
    y = x[:, :1] * x[:, 1:2]
    scalers = {"scaled": LossScaler(2.0**40), "not scaled": LossScaler(1.0, dynamic=False)}
    for name, scaler in scalers.items():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(20, 128), nn.ReLU(), nn.Linear(128, 1))
        mp = MixedPrecision(net, torch.optim.Adam(net.parameters(), lr=1e-2, eps=1e-14), scaler)
        for step in range(200):
            i = torch.randint(2000, (100,))
            loss = (mp(x[i]) - y[i]).square().mean()  # mp(x) computes in half precision
            mp.step(1e-6 * loss)  # backward and step; the factor makes the gradients tiny
        print(f"{name}: loss {loss:.3f}, scale at the end {scaler.factor:.3g}")
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

__all__ = ["LossScaler", "MixedPrecision", "half_matmul", "saved_bytes", "to_half_simulated"]


class LossScaler:
    r"""The factor $S$ of the loss: shrinks after an overflow, grows after `interval` steps in a row without one.

    Args:
        init: the first $S$.
        growth: factor after `interval` clean steps.
        backoff: factor after a step with an infinite gradient or one that is not a number.
        interval: steps.
        dynamic: False keeps $S$ as it is.

    Raises:
        ValueError: `init` is not positive and finite, `growth` is not above 1, `backoff` is not between 0 and 1, or `interval` is below 1.
    """

    def __init__(self, init: float = 2.0**15, growth: float = 2.0, backoff: float = 0.5, interval: int = 2000, dynamic: bool = True):
        if not (0 < init < math.inf and 1 < growth < math.inf and 0 < backoff < 1 and interval >= 1):
            raise ValueError(
                f"expected init > 0, growth > 1, 0 < backoff < 1 and interval >= 1, got {init}, {growth}, {backoff} and {interval}"
            )
        self.factor, self.clean_steps = float(init), 0
        self.growth, self.backoff, self.interval, self.dynamic = growth, backoff, interval, dynamic

    def scale(self, loss: Tensor) -> Tensor:
        r"""$S L$."""
        return loss * self.factor

    @torch.no_grad()
    def unscale_(self, params: Iterable[Tensor]) -> bool:
        r"""Divide the gradients by $S$ in place; parameters without a gradient are passed over.

        Returns:
            Whether any gradient is infinite or not a number.

        Raises:
            ValueError: a gradient is in half precision, where the quotient would vanish again.
        """
        grads = [p.grad for p in params if p.grad is not None]
        if any(g.dtype.itemsize < 4 for g in grads):
            raise ValueError(f"expected gradients of 32 bits or more, got {sorted({str(g.dtype) for g in grads})}")
        found_inf = not all(bool(g.isfinite().all()) for g in grads)
        for g in grads:
            g.div_(self.factor)
        return found_inf

    def update(self, found_inf: bool) -> None:
        """Change the factor after a step; `found_inf` is what :meth:`unscale_` returned."""
        if not self.dynamic:
            return
        if found_inf:
            self.factor, self.clean_steps = self.factor * self.backoff, 0
            return
        self.clean_steps += 1
        if self.clean_steps == self.interval:
            grown = self.factor * self.growth
            self.factor = grown if grown <= torch.finfo(torch.float32).max else self.factor  # the loss is a float
            self.clean_steps = 0

    def state_dict(self) -> dict[str, float]:
        """The factor and the number of clean steps since it changed."""
        return {"factor": self.factor, "clean_steps": self.clean_steps}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Go on from a :meth:`state_dict`."""
        self.factor, self.clean_steps = float(state["factor"]), int(state["clean_steps"])


class MixedPrecision(nn.Module):
    r"""A network that computes in half precision and is trained in 32 bits: ``mp.step(loss(mp(x), y))``.

    The parameters of `model`, which the optimizer changes, are the master weights. Each forward pass makes half precision copies of them.
    Parameters of normalisation layers are used as they are.

    Args:
        model: with float32 parameters.
        optimizer: of these parameters.
        scaler: of the loss; ``LossScaler(1.0, dynamic=False)`` is no scaling.
        master_weights: False rounds the weights to half precision after each step (and once before the first).
        half: float16, bfloat16, or float32 for comparison.
        max_norm: if given, the length of the whole gradient is cut to this after it was divided by the scale.

    Raises:
        ValueError: `half` is none of the three, a parameter is not float32, or the optimizer holds a parameter that is not the model's.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        scaler: LossScaler,
        master_weights: bool = True,
        half: torch.dtype = torch.float16,
        *,
        max_norm: float | None = None,
    ):
        super().__init__()
        if half not in (torch.float16, torch.bfloat16, torch.float32):
            raise ValueError(f"half must be torch.float16, bfloat16 or float32, got {half}")
        if others := {str(p.dtype) for p in model.parameters() if p.dtype != torch.float32}:
            raise ValueError(f"expected a model with float32 parameters, which are the master weights, got {sorted(others)}")
        self._params = [p for group in optimizer.param_groups for p in group["params"]]
        if not {id(p) for p in self._params} <= {id(p) for p in model.parameters()}:
            raise ValueError("expected an optimizer of the model's own parameters, got one with others")
        self.model, self.optimizer, self.scaler = model, optimizer, scaler
        self.master_weights, self.dtype, self.max_norm = master_weights, half, max_norm
        self._norms = [name for name, m in model.named_modules() if isinstance(m, _NORMS)]
        if not master_weights:
            self._round_weights()

    def forward(self, x: Tensor) -> Tensor:
        """The output in float32, for a loss in float32; everything before it is stored in half precision.

        Args:
            x: the input of `model`; floats are rounded to half precision.
        """
        copies = {name: p.to(self.dtype) for name, p in self.model.named_parameters() if name.rpartition(".")[0] not in self._norms}
        with _RoundOnce():
            out = torch.func.functional_call(self.model, copies, (x.to(self.dtype) if x.is_floating_point() else x,))
        return out.float()

    def step(self, loss: Tensor) -> bool:
        """Backward pass of the scaled loss and one step of the optimizer.

        Returns:
            Whether the step was taken; it is not when a gradient overflowed.
        """
        self.optimizer.zero_grad()
        # The way back through the conversion of a weight leaves its half precision gradient in a float32 tensor.
        self.scaler.scale(loss).backward()
        found_inf = self.scaler.unscale_(self._params)
        if not found_inf:
            if self.max_norm is not None:
                nn.utils.clip_grad_norm_(self._params, self.max_norm)
            self.optimizer.step()
            if not self.master_weights:
                self._round_weights()
        self.scaler.update(found_inf)
        return not found_inf

    @torch.no_grad()
    def _round_weights(self) -> None:
        for p in self._params:
            p.copy_(p.to(self.dtype))


def to_half_simulated(x: Tensor) -> Tensor:
    """The nearest half precision numbers, as float32."""
    return x.half().float()


def half_matmul(a: Tensor, b: Tensor, accumulate: str = "fp32") -> Tensor:
    r"""Product of matrices in half precision.

    Args:
        a: ``[..., M, K]``, rounded to half precision first.
        b: ``[..., K, N]``, likewise.
        accumulate: "fp32" sums in 32 bits and rounds once; "fp16" adds one product after the other and rounds each sum, $c \leftarrow
            \mathrm{half}(c + a_k b_k)$.

    Returns:
        float16 ``[..., M, N]``.

    Raises:
        ValueError: `accumulate` is neither, or the shapes do not fit.
    """
    if accumulate not in ("fp32", "fp16"):
        raise ValueError(f"accumulate must be 'fp32' or 'fp16', got {accumulate!r}")
    if min(a.dim(), b.dim()) < 2 or a.shape[-1] != b.shape[-2]:
        raise ValueError(f"expected [..., M, K] and [..., K, N], got {tuple(a.shape)} and {tuple(b.shape)}")
    a, b = to_half_simulated(a), to_half_simulated(b)
    if accumulate == "fp32":
        return (a @ b).half()
    batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    total = torch.zeros(*batch, a.shape[-2], b.shape[-1], dtype=torch.float16, device=a.device)
    for k in range(a.shape[-1]):
        total = (total.float() + a[..., :, k, None] * b[..., None, k, :]).half()  # a product of two halves is exact in a float
    return total


def saved_bytes(function: Callable[[], Tensor]) -> tuple[int, int]:
    """Bytes that a forward pass keeps for the backward pass; what several operations keep counts once.

    Args:
        function: runs the forward pass and returns its output.

    Returns:
        Bytes of floating point tensors, among them weights, and bytes of others, such as the places of maxima.
    """
    kept: dict[int, Tensor] = {}  # the tensors themselves, so that no address is used twice

    def pack(t: Tensor) -> Tensor:
        if t.data_ptr() not in kept or kept[t.data_ptr()].nbytes < t.nbytes:
            kept[t.data_ptr()] = t.detach()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = function()
    floats = sum(t.nbytes for t in kept.values() if t.is_floating_point())
    others = sum(t.nbytes for t in kept.values() if not t.is_floating_point())
    del out  # the graph had to live until everything was counted
    return floats, others


_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
_PRODUCTS = {F.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, torch.conv1d, torch.conv2d, torch.conv3d}
_IN_FLOAT32 = {
    F.batch_norm,
    torch.batch_norm,
    F.instance_norm,
    F.layer_norm,
    F.rms_norm,
    F.group_norm,
    F.softmax,
    F.log_softmax,
    F.cross_entropy,
}
_IN_FLOAT32 |= {torch.softmax, torch.log_softmax, Tensor.softmax, Tensor.log_softmax}


class _RoundOnce(TorchFunctionMode):
    """Products of half precision tensors accumulate in float32 and round once; statistics and softmax are in float32."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func in _PRODUCTS and _is_half(args[0]):
            tensors, rest = [a for a in args if isinstance(a, Tensor)], [a for a in args if not isinstance(a, Tensor)]
            # Operands come first: (x, weight) or (x, weight, bias), and a missing bias stays in `rest`.
            named = {k: v for k, v in kwargs.items() if isinstance(v, Tensor)}
            options = {k: v for k, v in kwargs.items() if k not in named}

            def product(*t: Tensor) -> Tensor:
                return func(*t[: len(tensors)], *rest, **dict(zip(named, t[len(tensors) :])), **options)

            return _Product.apply(product, *tensors, *named.values())
        if func in _IN_FLOAT32 and _is_half(args[0]):
            return func(args[0].float(), *args[1:], **kwargs).to(args[0].dtype)
        return func(*args, **kwargs)


class _Product(Function):
    """A multilinear function, computed in float32 and rounded once, forward and backward; only half precision tensors are kept."""

    @staticmethod
    def forward(ctx: Any, product: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        ctx.product = product
        return product(*(t.float() for t in tensors)).to(tensors[0].dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[1:]
        with torch.enable_grad():
            floats = [t.float().requires_grad_(w) for t, w in zip(ctx.saved_tensors, wanted)]
            out = ctx.product(*floats)
        grads = iter(torch.autograd.grad(out, [t for t, w in zip(floats, wanted) if w], grad.float()))
        return None, *(next(grads).to(grad.dtype) if w else None for w in wanted)


def _is_half(x: Any) -> bool:
    return isinstance(x, Tensor) and x.dtype in (torch.float16, torch.bfloat16)
