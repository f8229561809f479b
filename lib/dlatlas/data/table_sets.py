"""Tables of numbers: one row an example, one column a measurement, and what is to be predicted."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from dlatlas.data.store import Dataset, Source, choose, installed, mark_used, obtain


class Table(NamedTuple):
    """Measurements ``[N, d]`` and targets ``[N]``, float64, in their own units, and the names of the columns."""

    x: torch.Tensor
    y: torch.Tensor
    columns: tuple[str, ...]


def table(name: str) -> Table:
    """The table `name`: 'diabetes' (442 patients, 10 measurements; a score of the disease's progress after a year).

    Raises:
        ValueError: unknown name.
        DataError: the data set is not in the cache and no source answered.
    """
    dataset = TABLE_SETS[choose(name, TABLE_SETS, "table")]
    columns, values = _values(obtain(dataset) / f"{name}.csv")
    mark_used(dataset)
    numbers = torch.from_numpy(values.copy())
    return Table(numbers[:, :-1].contiguous(), numbers[:, -1].contiguous(), columns[:-1])


@functools.lru_cache(maxsize=8)
def _values(path: Path) -> tuple[tuple[str, ...], np.ndarray]:
    header, *lines = path.read_text("ascii").splitlines()
    return tuple(header.split(",")), np.array([line.split(",") for line in lines], dtype=np.float64)


def _diabetes_from_sklearn(_: Path) -> Mapping[str, bytes]:
    from sklearn.datasets import load_diabetes

    bunch = load_diabetes(scaled=False)
    rows = [",".join([*bunch.feature_names, "progress"])]
    rows += [",".join(f"{v:.10g}" for v in (*x, y)) for x, y in zip(bunch.data, bunch.target)]
    return {"diabetes.csv": ("\n".join(rows) + "\n").encode("ascii")}


TABLE_SETS = {
    dataset.name: dataset
    for dataset in (
        Dataset(
            name="diabetes",
            title="Progress of diabetes, 442 patients with 10 measurements",
            licence="none stated by the authors; scikit-learn: BSD-3-Clause",
            citation="Efron, Hastie, Johnstone, Tibshirani (2004). Least angle regression. Annals of Statistics 32(2), 407-499",
            files={"diabetes.csv": (18503, "c62f36c952d91c04c60cf9bf682a55ebfcf9e31aa8692b790383d0395ad746e9")},
            sources=(Source("scikit-learn (installed)", installed, _diabetes_from_sklearn),),
        ),
    )
}
