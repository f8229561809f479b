"""Speed tables of the packed kernels against torch's dense product, for ``python -m dlatlas.book.bench``."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import linear

from dlatlas.compression.alternating import PackedMultiBit, alternating_quantize
from dlatlas.compression.kit import kernels
from dlatlas.compression.kit.timing import speed_ratio

__all__ = ["multibit_row", "processor", "sign_row", "tables"]

Row = dict[str, Any]


def processor() -> str:
    """Name of the processor, or its architecture where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def sign_row(outputs: int, inputs: int, batch: int = 1, repeats: int = 15) -> Row:
    """Time of a binary layer, packing of its activations included, against a dense one of the same size, on one thread."""
    weight, x = torch.randn(outputs, inputs), torch.randn(batch, inputs)
    words = kernels.pack_bits(weight)
    return _row(outputs, inputs, batch, "1", speed_ratio(lambda: linear(x, weight), lambda: kernels.sign_linear(x, words), repeats))


def multibit_row(outputs: int, inputs: int, bits: int = 2, batch: int = 1, repeats: int = 15) -> Row:
    """The same for a multi-bit layer; the alternating quantisation of its activations is included."""
    weight, x = torch.randn(outputs, inputs), torch.randn(batch, inputs)
    layer = PackedMultiBit(*alternating_quantize(weight, bits), bits_a=bits)
    return _row(outputs, inputs, batch, f"{bits}/{bits}", speed_ratio(lambda: linear(x, weight), lambda: layer(x), repeats))


def _row(outputs: int, inputs: int, batch: int, bits: str, measured: dict[str, float]) -> Row:
    return {
        "matrix": f"{outputs} x {inputs}",
        "batch": batch,
        "bits": bits,
        "dense, ms": measured["slow_ms"],
        "packed, ms": measured["fast_ms"],
        "times faster": measured["ratio"],
        "quartiles apart": measured["iqr"],
    }


def tables() -> Iterator[tuple[str, list[Row]]]:
    """(caption, rows) of each table."""
    where = f"{processor()}, {os.cpu_count()} cores; {kernels.describe()}; one thread"
    sizes = [(256, 256), (512, 512), (1024, 1024), (4096, 1024), (4096, 4096)]
    rows = [sign_row(outputs, inputs, batch) for outputs, inputs in sizes for batch in (1, 64)]
    yield f"One-bit layers against torch's dense layer ({where}, packing of the activations included)", rows
    rows = [multibit_row(outputs, inputs, bits, batch) for outputs, inputs in sizes[2:] for bits in (2, 3) for batch in (1, 64)]
    yield f"Multi-bit layers against torch's dense layer ({where}, quantisation of the activations included)", rows
