"""All data sets by name."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from dlatlas.data.image_sets import IMAGE_SETS
from dlatlas.data.photo_sets import PHOTO_SETS
from dlatlas.data.store import DataError, Dataset, choose, obtain
from dlatlas.data.table_sets import TABLE_SETS
from dlatlas.data.text_sets import TEXT_SETS

DATASETS = {**IMAGE_SETS, **PHOTO_SETS, **TABLE_SETS, **TEXT_SETS}
NAMES = tuple(DATASETS)


def describe(name: str) -> Dataset:
    """The declaration of a data set: title, licence as stated, citation, files, sources, size, sha256; readable when printed."""
    return DATASETS[choose(name, NAMES)]


def fetch(name: str, *, force: bool = False) -> Path:
    """The cache folder with the verified files of data set `name`; fetches what is missing or damaged, or everything with `force`."""
    return obtain(DATASETS[choose(name, NAMES)], force)


def fetch_all(names: Iterable[str] | None = None, *, report: Callable[[str], object] = print) -> dict[str, Path]:
    """Fetch several data sets (None: all) four at a time; `report` gets a line for each. One DataError at the end tells every failure."""
    names = [choose(name, NAMES) for name in dict.fromkeys(NAMES if names is None else names)]

    def timed(name: str) -> tuple[Path, float]:
        start = time.perf_counter()
        return fetch(name), time.perf_counter() - start

    folders, failures = {}, []
    with ThreadPoolExecutor(max_workers=4) as pool:
        jobs = {pool.submit(timed, name): name for name in names}
        for job in as_completed(jobs):
            name = jobs[job]
            try:
                folders[name], seconds = job.result()
                report(f"{name}: {DATASETS[name].size / 1e6:.1f} MB, {seconds:.1f} s")
            except DataError as error:
                failures.append(str(error))
                report(f"{name}: failed")
    if failures:
        raise DataError("\n\n".join(failures))
    return {name: folders[name] for name in names}
