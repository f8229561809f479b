"""The speed tables say what was measured, where and how."""

import pytest
import torch

from dlatlas.book import bench
from dlatlas.compression.kit import kernels, speed


def test_tables_name_the_processor_and_cover_the_sizes(monkeypatch):
    monkeypatch.setattr(speed, "speed_ratio", lambda slow, fast, repeats: {"ratio": 2.0, "slow_ms": 4.0, "fast_ms": 2.0, "iqr": 0.1})
    monkeypatch.setattr(speed, "alternating_quantize", lambda w, bits: (torch.ones(len(w), bits), torch.ones(len(w), bits, w.shape[1])))
    found = list(speed.tables())
    assert len(found) == 2
    for caption, rows in found:
        assert bench.processor() in caption
        assert kernels.describe() in caption
        assert any(row["matrix"] == "4096 x 4096" and row["batch"] == 1 for row in rows)
        assert all(row["times faster"] == row["dense, ms"] / row["packed, ms"] for row in rows)


def test_both_sides_of_a_row_compute_the_same_product(monkeypatch):
    outputs = []

    def once(slow, fast, repeats):
        outputs.append((slow(), fast()))
        return {"ratio": 1.0, "slow_ms": 1.0, "fast_ms": 1.0, "iqr": 0.0}

    monkeypatch.setattr(speed, "speed_ratio", once)
    speed.sign_row(400, 2000, batch=2)
    speed.multibit_row(400, 2000, bits=4, batch=2)
    for (dense, packed), least in zip(outputs, (0.55, 0.97)):  # two signs keep a correlation of 2 / pi
        assert dense.shape == packed.shape == (2, 400)
        assert torch.corrcoef(torch.stack([dense.flatten(), packed.flatten()]))[0, 1] > least


def test_the_packed_product_is_faster():
    if kernels.backend() != "c":
        pytest.skip("no C compiler")
    assert speed.sign_row(2048, 2048, repeats=7)["times faster"] > 3
    assert speed.multibit_row(2048, 2048, repeats=7)["times faster"] > 1.5
