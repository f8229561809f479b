"""Products of packed sign vectors: C kernels that the system's compiler builds at first use, and NumPy where there is none.

Signs are packed 64 to a word: bit 1 stands for +1, bit 0 for -1, bits beyond the vector are 0. Two vectors of n signs that differ in d bits
have the inner product ``n - 2 d``, so a product of matrices is exclusive-or and counting. Both backends give the same integers; ``backend()``
tells which one works. Each function takes tensors or arrays and answers in kind, on one thread.

``DLATLAS_KERNELS=numpy`` forces the fallback, ``DLATLAS_CACHE`` moves the folder of built libraries.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from dlatlas.compression.kit.kernels.library import load

__all__ = [
    "alternating", "alternating_values", "backend", "describe", "load", "multibit_gemm", "multibit_linear", "pack_bits", "pack_planes",
    "pack_reached", "sign_linear", "unpack_bits", "xnor_gemm",
]  # fmt: skip

T = TypeVar("T", Tensor, np.ndarray)
_NO_MEMORY = "the kernels found no memory for the packed activations"


def backend() -> str:
    """Which of the two works: 'c' or 'numpy'."""
    return "numpy" if load() is None else "c"


def describe() -> str:
    """The backend in words, for tables."""
    library = load()
    if library is None:
        return "NumPy"
    return "C, AVX-512 popcount" if library.wide() else "C, popcount of words"


def pack_bits(sign: T) -> T:
    """Signs ``[..., n]`` as words ``[..., ceil(n / 64)]``, uint64; bit 1 where the value is above 0."""
    x = _tensor(sign, torch.float32, 1)
    *lead, n = x.shape
    out = torch.empty(*lead, _words(n), dtype=torch.uint64)
    if library := load():
        library.pack_positive(x.data_ptr(), x.numel() // n if n else 0, n, out.data_ptr())
    else:
        _pack(x.numpy() > 0, out.numpy())
    return _like(sign, out)


def unpack_bits(words: T, n: int) -> T:
    """The inverse of :func:`pack_bits`: words ``[..., W]`` as signs ``[..., n]``, float32."""
    w = _tensor(words, torch.uint64, 1).numpy()
    if _words(n) != w.shape[-1]:
        raise ValueError(f"{n} signs take {_words(n)} words, got {w.shape[-1]}")
    bits = np.unpackbits(w.astype("<u8").view(np.uint8), axis=-1, bitorder="little")[..., :n]
    return _like(words, torch.from_numpy(2 * bits.astype(np.float32) - 1))


def xnor_gemm(a: T, b: T, n: int) -> T:
    r"""Inner products of sign vectors, $n - 2\,\mathrm{popcount}(a_m \oplus b_k)$.

    Args:
        a: words ``[M, W]``.
        b: words ``[N, W]``.
        n: number of signs in a row, at most ``64 W``. Words may have unused bits anywhere, if they are 0 in both factors.

    Returns:
        ``[M, N]``, int32.

    Raises:
        ValueError: other shapes or types.
    """
    x, y = _tensor(a, torch.uint64, 2), _tensor(b, torch.uint64, 2)
    if x.shape[1] != y.shape[1] or not 0 <= n <= 64 * x.shape[1]:
        raise ValueError(f"expected words [M, W] and [N, W] of n <= 64 W signs, got {tuple(x.shape)}, {tuple(y.shape)} and n = {n}")
    out = torch.empty(len(x), len(y), dtype=torch.int32)
    if library := load():
        library.xnor_gemm(x.data_ptr(), y.data_ptr(), len(x), len(y), x.shape[1], n, out.data_ptr())
    else:
        words, result = y.numpy(), out.numpy()
        for row, product in zip(x.numpy(), result):  # row by row: all at once would take M times the memory of b
            np.subtract(n, 2 * _popcount(words ^ row).sum(-1, dtype=np.int32), out=product)
    return _like(a, out)


def multibit_gemm(a: T, beta: T, b: T, alpha: T, n: int) -> T:
    r"""Inner products of multi-bit vectors, $\sum_{ij} \alpha_{ki} \beta_{mj}\, (n - 2\,\mathrm{popcount}(a_{mj} \oplus b_{ki}))$.

    Args:
        a: codes ``[M, ka, W]``.
        beta: their scales ``[M, ka]``.
        b: codes ``[N, kb, W]``.
        alpha: their scales ``[N, kb]``.
        n: number of signs in a code.

    Returns:
        ``[M, N]``, float32.

    Raises:
        ValueError: other shapes or types.
    """
    x, y, s, t = _tensor(a, torch.uint64, 3), _tensor(b, torch.uint64, 3), _tensor(beta, torch.float32, 2), _tensor(alpha, torch.float32, 2)
    if x.shape[2] != y.shape[2] or x.shape[:2] != s.shape or y.shape[:2] != t.shape or not 0 <= n <= 64 * x.shape[2]:
        shapes = [tuple(z.shape) for z in (x, s, y, t)]
        raise ValueError(f"expected [M, ka, W], [M, ka], [N, kb, W], [N, kb] and n <= 64 W, got {shapes} and n = {n}")
    (M, ka, W), (N, kb, _) = x.shape, y.shape
    if library := load():
        out = torch.empty(M, N)
        library.multibit_gemm(x.data_ptr(), s.data_ptr(), ka, y.data_ptr(), t.data_ptr(), kb, M, N, W, n, out.data_ptr())
    else:
        products = xnor_gemm(x.reshape(M * ka, W), y.reshape(N * kb, W), n).view(M, ka, N, kb)
        out = torch.einsum("mjki,mj,ki->mk", products.float(), s, t)
    return _like(a, out)


def pack_planes(x: T) -> T:
    """The eight bit planes of bytes: ``[B, n]`` uint8 as words ``[8, B, ceil(n / 64)]``, the lowest bit first."""
    y = _tensor(x, torch.uint8, 2)
    B, n = y.shape
    out = torch.empty(8, B, _words(n), dtype=torch.uint64)
    if library := load():
        library.pack_planes(y.data_ptr(), B, n, out.data_ptr())
    else:
        _pack((y.numpy() >> np.arange(8, dtype=np.uint8)[:, None, None] & 1).astype(bool), out.numpy())
    return _like(x, out)


def pack_reached(z: T, threshold: T) -> T:
    """Signs of ``z - threshold`` as words: bit 1 where ``z [M, n] >= threshold [n]``, both int32."""
    x, t = _tensor(z, torch.int32, 2), _tensor(threshold, torch.int32, 1)
    M, n = x.shape
    if t.shape != (n,):
        raise ValueError(f"expected a threshold for each of {n} columns, got shape {tuple(t.shape)}")
    out = torch.empty(M, _words(n), dtype=torch.uint64)
    if library := load():
        library.pack_reached(x.data_ptr(), t.data_ptr(), M, n, out.data_ptr())
    else:
        _pack(x.numpy() >= t.numpy(), out.numpy())
    return _like(z, out)


def alternating(x: Tensor, bits: int, iters: int) -> tuple[Tensor, Tensor] | None:
    """Alternating multi-bit codes of rows; what it computes is told in :mod:`dlatlas.compression.alternating`.

    Args:
        x: ``[M, n]``, float32.
        bits: signs a value, 1 to 4.
        iters: rounds of least squares and assignment after the greedy start.

    Returns:
        Scales ``[M, bits]`` and packed codes ``[M, bits, ceil(n / 64)]``; None without the C library, whose twin is that module.
    """
    x = _rows(x, bits, iters)
    if (library := load()) is None:
        return None
    M, n = x.shape
    alpha, codes = torch.empty(M, bits), torch.empty(M, bits, _words(n), dtype=torch.uint64)
    library.alternating(x.data_ptr(), M, n, bits, iters, alpha.data_ptr(), codes.data_ptr(), None)
    return alpha, codes


def alternating_values(x: Tensor, bits: int, iters: int) -> Tensor | None:
    """The values ``[M, n]`` that the codes of :func:`alternating` stand for; None without the C library."""
    x = _rows(x, bits, iters)
    if (library := load()) is None:
        return None
    out = torch.empty(x.shape)
    library.alternating(x.data_ptr(), *x.shape, bits, iters, None, None, out.data_ptr())
    return out


def sign_linear(x: Tensor, words: Tensor, bias: Tensor | None = None) -> Tensor:
    """Product of the signs of `x` with packed signs; packing and product are one call of the library.

    Args:
        x: ``[M, n]``, float32; its signs are +1 above 0 and -1 elsewhere.
        words: ``[N, ceil(n / 64)]``, uint64.
        bias: added to the result ``[N]``, float32.

    Returns:
        ``[M, N]``, float32.
    """
    x, words = _tensor(x, torch.float32, 2), _tensor(words, torch.uint64, 2)
    (M, n), (N, W) = x.shape, words.shape
    if _words(n) != W:
        raise ValueError(f"rows of {n} signs take {_words(n)} words, got {W}")
    if bias is not None:
        bias = _bias(bias, N)
    if (library := load()) is None:
        out = xnor_gemm(pack_bits(x), words, n).float()
        return out if bias is None else out + bias
    out = torch.empty(M, N)
    pointer = None if bias is None else bias.data_ptr()
    if library.sign_linear(x.data_ptr(), M, n, words.data_ptr(), pointer, N, out.data_ptr()):
        raise MemoryError(_NO_MEMORY)
    return out


def multibit_linear(x: Tensor, bits: int, iters: int, codes: Tensor, alpha: Tensor, bias: Tensor | None = None) -> Tensor | None:
    """Product of `x`, quantised row by row with :func:`alternating`, with packed multi-bit rows; one call of the library.

    Args:
        x: ``[M, n]``, float32.
        bits: signs an activation, 1 to 4.
        iters: rounds of the quantisation.
        codes: ``[N, kb, ceil(n / 64)]``, uint64.
        alpha: ``[N, kb]``, float32.
        bias: ``[N]``, float32.

    Returns:
        ``[M, N]``, float32; None without the C library.
    """
    x, codes, alpha = _tensor(x, torch.float32, 2), _tensor(codes, torch.uint64, 3), _tensor(alpha, torch.float32, 2)
    (M, n), (N, kb, W) = x.shape, codes.shape
    if not 1 <= bits <= 4 or iters < 0 or n < 1 or _words(n) != W or alpha.shape != (N, kb):
        shapes = [tuple(t.shape) for t in (x, codes, alpha)]
        raise ValueError(
            f"expected x [M, n], codes [N, kb, ceil(n / 64)], alpha [N, kb], 1 to 4 bits, iters >= 0; got {shapes}, {bits}, {iters}"
        )
    if bias is not None:
        bias = _bias(bias, N)
    if (library := load()) is None:
        return None
    out = torch.empty(M, N)
    pointer = None if bias is None else bias.data_ptr()
    if library.multibit_linear(x.data_ptr(), M, n, bits, iters, codes.data_ptr(), alpha.data_ptr(), kb, pointer, N, out.data_ptr()):
        raise MemoryError(_NO_MEMORY)
    return out


# --- details -----------------------------------------------------------------------------------------------------------------------


def _rows(x: Tensor, bits: int, iters: int) -> Tensor:
    x = _tensor(x, torch.float32, 2)
    if not 1 <= bits <= 4 or iters < 0 or x.shape[1] < 1:
        raise ValueError(f"expected 1 to 4 bits, iters >= 0 and rows that are not empty, got {bits}, {iters}, {tuple(x.shape)}")
    return x


def _bias(bias: Tensor, N: int) -> Tensor:
    if bias.shape != (N,):
        raise ValueError(f"expected a bias for each of {N} outputs, got shape {tuple(bias.shape)}")
    return _tensor(bias, torch.float32, 1)


def _words(n: int) -> int:
    return -(-n // 64)


def _tensor(x: Tensor | np.ndarray, dtype: torch.dtype, ndim: int) -> Tensor:
    """Contiguous tensor in main memory; `ndim` axes (1: at least one). Only floats are converted."""
    if x.dtype is dtype and x.ndim == ndim > 1 and x.is_cpu and x.is_contiguous():
        return x  # the common case, for which microseconds count
    t = torch.from_numpy(np.ascontiguousarray(x)) if isinstance(x, np.ndarray) else x.detach()
    if dtype == torch.float32 and t.dtype != torch.uint64:
        t = t.float()
    if t.dtype != dtype or t.dim() < ndim or (ndim > 1 and t.dim() != ndim) or t.device.type != "cpu":
        raise ValueError(f"expected {dtype} with {ndim} axes on the CPU, got {t.dtype} of shape {tuple(t.shape)} on {t.device}")
    return t.contiguous()


def _like(x: T, out: Tensor) -> T:
    return out.numpy() if isinstance(x, np.ndarray) else out


def _pack(bits: np.ndarray, out: np.ndarray) -> None:
    """Truth values ``[..., n]`` into words ``[..., W]``."""
    padded = np.zeros((*bits.shape[:-1], 64 * out.shape[-1]), bool)
    padded[..., : bits.shape[-1]] = bits
    out[...] = np.packbits(padded, axis=-1, bitorder="little").view("<u8")


def _popcount(words: np.ndarray) -> np.ndarray:
    if hasattr(np, "bitwise_count"):  # NumPy 2
        return np.bitwise_count(words)
    return _ONES_OF_16[words.view(np.uint16)].reshape(*words.shape, 4).sum(-1, dtype=np.uint8)


_ONES_OF_16 = np.unpackbits(np.arange(2**16, dtype=np.uint16).view(np.uint8).reshape(-1, 2), axis=1).sum(1, dtype=np.uint8)
