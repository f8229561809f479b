r"""Alternating multi-bit quantisation (xu2018alternating).

A row of weights is written as a sum of a few sign vectors, each with one scale. Two signs an entry give four levels, three give eight, and the
levels are fitted to the row instead of being spread evenly. Products with such a row need no multiplication: two packed sign vectors are
compared bit by bit and the differences counted. Finding the best codes and scales together is hard, but either half is easy when the other
one is fixed, so the two are solved in turn. The hidden state of a recurrent network is quantised in the same way while it runs.

Equations, for a row $w$ with $n$ entries and $k$ bits:

$$\min_{\alpha \in \mathbb{R}^k,\; b_i \in \{-1, 1\}^n} \; \Big\| w - \sum_{i=1}^k \alpha_i b_i \Big\|^2$$

Greedy start, with $r_0 = w$: $\alpha_i = \|r_{i-1}\|_1 / n$, $b_i = \mathrm{sign}(r_{i-1})$, $r_i = r_{i-1} - \alpha_i b_i$. Then, in turn, the
scales by least squares with $B = [b_1, \dots, b_k]$,

$$\alpha = (B^T B)^{-1} B^T w,$$

and the codes by giving each $w_j$ the nearest of the $2^k$ sums $\sum_i \pm \alpha_i$, found by bisection among the sorted sums. The product
with an activation $\sum_j \beta_j c_j$ is

$$\sum_{i,j} \alpha_i \beta_j\, \big( n - 2\, \mathrm{popcount}(b_i \oplus c_j) \big).$$

Training computes with the quantised tensors and hands the gradient to the full-precision ones unchanged.

Deviations from the paper:

1. The levels are symmetric about zero, so codes are found for $|w|$ and turned round where $w < 0$. Only a $w_j$ that is exactly half-way
   between two levels can get another code, at the same error.
2. Where two codes are equal, $B^T B$ is singular. A ridge of $10^{-8} n$ on its diagonal then leads to the shortest least-squares solution.
3. The paper keeps the full-precision weights in $[-1, 1]$; here that is :meth:`MultiBitLinear.clip_`, to be called after an update.

Later work: fitted levels were taken up by LQ-Nets (Zhang et al., 2018), which learns such a basis inside the network for images too. Since about
2022 the question has moved to large language models, where groups of weights with 3 or 4 bits and few outliers in higher precision are the
rule (GPTQ, Frantar et al., 2023); sums of sign vectors came back there for weights only, as BCQ in LUT-GEMM (Park et al., 2024), whose
activations stay floats.

Example:
    import torch
    from torch import nn
    from dlatlas.compression.alternating import MultiBitLinear

    x = torch.randn(2000, 32)
    y = (x[:, :16] * x[:, 16:]).sum(1).sign().clamp_min(0).long()
    inner = MultiBitLinear(256, 256, bits_w=2, bits_a=2)  # in the place of nn.Linear(256, 256)
    model = nn.Sequential(nn.Linear(32, 256), nn.ReLU(), inner, nn.ReLU(), nn.Linear(256, 2))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(201):
        i = torch.randint(2000, (100,))
        loss = nn.functional.cross_entropy(model(x[i]), y[i])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 0:
            print(f"step {step}: loss {loss:.3f}")
    trained = model(x).argmax(1)
    model[2] = inner.pack()  # signs in machine words: exclusive-or and bit counts replace products
    print("answers that packing changes:", int((model(x).argmax(1) != trained).sum()))
    dense = 32 * inner.weight.numel()
    print(f"weights of the layer: {dense / model[2].storage_bits():.1f} times smaller")
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from dlatlas.compression.kit import kernels
from dlatlas.compression.kit.ste import ste_replace

__all__ = ["MultiBitLSTM", "MultiBitLinear", "PackedMultiBit", "alternating_quantize", "dequantize", "quantize_rows"]

MAX_BITS = 4
State = tuple[Tensor, Tensor]


def alternating_quantize(w: Tensor, bits: int, iters: int = 2) -> tuple[Tensor, Tensor]:
    r"""Scales and codes of each row: $w \approx \sum_i \alpha_i b_i$.

    Args:
        w: rows ``[R, n]``.
        bits: $k$, 1 to 4.
        iters: rounds of least squares and assignment; 0 gives the greedy start.

    Returns:
        Scales ``[R, bits]``, not negative, and codes ``[R, bits, n]`` in {-1, +1}.

    Raises:
        ValueError: `w` is not a matrix with columns, `bits` is not 1 to 4 or `iters` is negative.
    """
    if w.dim() != 2 or w.shape[1] == 0 or not w.is_floating_point():
        raise ValueError(f"w must be a matrix [R, n] of floats with n >= 1, got {w.dtype} of shape {tuple(w.shape)}")
    _check(bits, iters)
    w = w.detach()
    size = w.abs()
    alpha, codes = _greedy(size, bits)
    for _ in range(iters):
        alpha = _least_squares(size, codes)
        codes = _nearest(size, alpha)
    return alpha, codes * torch.where(w >= 0, 1.0, -1.0).to(w.dtype)[:, None]


def _greedy(w: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    residual, alpha, codes = w, [], []
    for _ in range(bits):
        alpha.append(residual.abs().mean(1))
        codes.append(torch.where(residual >= 0, 1.0, -1.0).to(w.dtype))
        residual = residual - alpha[-1][:, None] * codes[-1]
    return torch.stack(alpha, 1), torch.stack(codes, 1)


def _least_squares(w: Tensor, codes: Tensor) -> Tensor:
    """Best scales ``[R, k]`` for fixed codes; a negative one is turned positive, since its code is assigned anew."""
    k, n = codes.shape[1:]
    system = torch.cat([codes @ codes.mT, codes @ w[:, :, None]], 2).double()  # [R, k, k + 1]
    system[:, range(k), range(k)] += 1e-8 * n
    for p, i in itertools.combinations(range(k), 2):  # elimination in all rows at once; positive definite, hence no pivots
        system[:, i] -= system[:, p] * (system[:, i, p] / system[:, p, p])[:, None]
    alpha = torch.zeros_like(system[:, 0, :k])
    for i in reversed(range(k)):
        alpha[:, i] = (system[:, i, k] - (system[:, i, :k] * alpha).sum(1)) / system[:, i, i]
    return alpha.abs().to(w.dtype)


def _nearest(w: Tensor, alpha: Tensor) -> Tensor:
    """Codes ``[R, k, n]`` of the level nearest to each entry of `w`, which is not negative."""
    k = alpha.shape[1]
    signs = [(1, *reversed(rest)) for rest in itertools.product((-1, 1), repeat=k - 1)]  # one of each pair of opposite codes
    signs = torch.tensor(signs, dtype=w.dtype, device=w.device)  # [2^(k-1), k]
    level = alpha @ signs.T
    signs = torch.where(level < 0, -1.0, 1.0).to(w.dtype)[..., None] * signs  # [R, 2^(k-1), k]
    level, order = level.abs().sort(dim=1, stable=True)
    signs = signs.gather(1, order[..., None].expand_as(signs))
    half_way = (level[:, 1:] + level[:, :-1]) / 2
    place = torch.searchsorted(half_way.contiguous(), w.contiguous(), right=True)  # [R, n]
    return signs.gather(1, place[..., None].expand(*place.shape, k)).mT


def dequantize(alpha: Tensor, codes: Tensor) -> Tensor:
    r"""$\sum_i \alpha_i b_i$ ``[R, n]`` from scales ``[R, bits]`` and codes ``[R, bits, n]``."""
    if codes.dim() != 3 or alpha.shape != codes.shape[:2]:
        raise ValueError(f"expected scales [R, bits] and codes [R, bits, n], got {tuple(alpha.shape)} and {tuple(codes.shape)}")
    return (alpha[:, None] @ codes)[:, 0]


def quantize_rows(x: Tensor, bits: int, iters: int = 2) -> Tensor:
    """The quantised value of `x` ``[R, ...]`` with the gradient passed straight through; everything behind the first axis is one row."""
    rows = x.detach().flatten(1)
    values = None
    if (
        rows.dtype == torch.float32 and rows.is_cpu
    ):  # a recurrent network asks for this at every step: the library takes a twentieth of the time
        values = kernels.alternating_values(rows, bits, iters)
    if values is None:
        values = dequantize(*alternating_quantize(rows, bits, iters))
    return ste_replace(x, values.view_as(x))


class MultiBitLinear(nn.Linear):
    """Linear layer that computes with quantised weights and activations and trains full-precision ones.

    Args:
        in_features: $n$.
        out_features: $R$.
        bits_w: bits a weight, one set of scales an output.
        bits_a: bits an activation, one set of scales a sample.
        bias: whether there is one; it stays full precision.
        iters: rounds of the alternating quantisation.

    Raises:
        ValueError: a number of bits that is not 1 to 4.
    """

    def __init__(self, in_features: int, out_features: int, bits_w: int = 2, bits_a: int = 2, *, bias: bool = True, iters: int = 2):
        _check(bits_w, iters)
        _check(bits_a, iters)
        super().__init__(in_features, out_features, bias)
        self.bits_w, self.bits_a, self.iters = bits_w, bits_a, iters

    @classmethod
    def from_dense(cls, layer: nn.Linear, bits_w: int = 2, bits_a: int = 2, *, iters: int = 2) -> MultiBitLinear:
        """The layer with the parameters of `layer`, shared and not copied."""
        new = cls(layer.in_features, layer.out_features, bits_w, bits_a, bias=layer.bias is not None, iters=iters)
        new.weight, new.bias = layer.weight, layer.bias
        return new

    def forward(self, x: Tensor) -> Tensor:
        rows = quantize_rows(x.reshape(-1, x.shape[-1]), self.bits_a, self.iters)
        return linear(rows.view_as(x), quantize_rows(self.weight, self.bits_w, self.iters), self.bias)

    @torch.no_grad()
    def clip_(self, limit: float = 1.0) -> None:
        """Keep the full-precision weights in ``[-limit, limit]``."""
        self.weight.clamp_(-limit, limit)

    @torch.no_grad()
    def pack(self) -> PackedMultiBit:
        """The layer as packed codes for inference on the CPU."""
        alpha, codes = alternating_quantize(self.weight.float(), self.bits_w, self.iters)
        return PackedMultiBit(alpha, codes, self.bias, bits_a=self.bits_a, iters=self.iters)


class PackedMultiBit(nn.Module):
    """Product with packed multi-bit weights ``[B, n] -> [B, R]``: activations are quantised and packed as they come, signs compared and counted.

    Args:
        alpha: scales ``[R, bits]``.
        codes: ``[R, bits, n]`` in {-1, +1}.
        bias: ``[R]`` or None.
        bits_a: bits an activation.
        iters: rounds of their alternating quantisation.
    """

    def __init__(self, alpha: Tensor, codes: Tensor, bias: Tensor | None = None, *, bits_a: int = 2, iters: int = 2):
        _check(bits_a, iters)
        if codes.dim() != 3 or alpha.shape != codes.shape[:2]:
            raise ValueError(f"expected scales [R, bits] and codes [R, bits, n], got {tuple(alpha.shape)} and {tuple(codes.shape)}")
        super().__init__()
        self.n, self.bits_a, self.iters = codes.shape[2], bits_a, iters
        self.register_buffer("alpha", alpha.detach().float().clone())
        self.register_buffer("codes", kernels.pack_bits(codes))  # [R, bits, ceil(n / 64)]
        self.register_buffer("bias", None if bias is None else bias.detach().float().clone())

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 2 or x.shape[1] != self.n:
            raise ValueError(f"expected [B, {self.n}], got {tuple(x.shape)}")
        out = kernels.multibit_linear(x, self.bits_a, self.iters, self.codes, self.alpha, self.bias)
        if out is None:  # no C library; float64 as there, so that the codes are the same ones
            beta, codes = alternating_quantize(x.double(), self.bits_a, self.iters)
            out = kernels.multibit_gemm(kernels.pack_bits(codes), beta, self.codes, self.alpha, self.n)
            out = out if self.bias is None else out + self.bias
        return out

    def storage_bits(self) -> int:
        """Bits of codes and scales, without the bias."""
        return 64 * self.codes.numel() + 32 * self.alpha.numel()


class MultiBitLSTM(nn.Module):
    """LSTM whose two matrices, input and hidden state are quantised; takes the place of the `torch.nn.LSTM` that it is given.

    Args:
        lstm: one direction, `batch_first=False`, without projection or dropout; its parameters are used, not copied.
        bits_w: bits a weight.
        bits_a: bits an activation.
        iters: rounds of the alternating quantisation.

    Raises:
        ValueError: another kind of LSTM, or bits that are not 1 to 4.
    """

    def __init__(self, lstm: nn.LSTM, bits_w: int = 2, bits_a: int = 2, *, iters: int = 2):
        _check(bits_w, iters)
        _check(bits_a, iters)
        if lstm.bidirectional or lstm.batch_first or lstm.proj_size or lstm.dropout or not lstm.bias:
            raise ValueError(f"expected one direction, time first, biases, no projection and no dropout; got {lstm}")
        super().__init__()
        self.lstm, self.bits_w, self.bits_a, self.iters = lstm, bits_w, bits_a, iters

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """``[T, B, input] -> [T, B, hidden]`` and the state, each ``[layers, B, hidden]``, as `torch.nn.LSTM` does."""
        layers, hidden = self.lstm.num_layers, self.lstm.hidden_size
        h0, c0 = state if state is not None else (x.new_zeros(layers, x.shape[1], hidden),) * 2
        last = []
        for k in range(layers):
            w_x, w_h = (quantize_rows(getattr(self.lstm, f"{name}_l{k}"), self.bits_w, self.iters) for name in ("weight_ih", "weight_hh"))
            bias = getattr(self.lstm, f"bias_ih_l{k}") + getattr(self.lstm, f"bias_hh_l{k}")
            from_x = linear(quantize_rows(x.flatten(0, 1), self.bits_a, self.iters), w_x, bias).unflatten(0, x.shape[:2])
            h, c, out = h0[k], c0[k], []
            for gates in from_x:  # [B, 4 hidden]
                i, f, g, o = (gates + linear(quantize_rows(h, self.bits_a, self.iters), w_h)).chunk(4, 1)
                c = f.sigmoid() * c + i.sigmoid() * g.tanh()
                h = o.sigmoid() * c.tanh()
                out.append(h)
            x = torch.stack(out)
            last.append((h, c))
        return x, (torch.stack([h for h, _ in last]), torch.stack([c for _, c in last]))


def _check(bits: int, iters: int) -> None:
    if not 1 <= bits <= MAX_BITS or iters < 0:
        raise ValueError(f"expected 1 to {MAX_BITS} bits and iters >= 0, got {bits} bits and {iters}")
