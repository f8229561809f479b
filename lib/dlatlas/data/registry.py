"""All data sets by name."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from dlatlas.data.fetch import DataError, choose, obtain
from dlatlas.data.images import IMAGE_SETS

DATASETS = {**IMAGE_SETS}
NAMES = tuple(DATASETS)


def describe(name: str) -> dict:
    """What is known about a data set: name, title, licence as stated, citation, sources in order, files, size in bytes, checksum."""
    dataset = DATASETS[choose(name, NAMES)]
    return {
        "name": dataset.name,
        "title": dataset.title,
        "licence": dataset.licence,
        "citation": dataset.citation,
        "sources": [source.label for source in dataset.sources],
        "files": {file: {"size": size, "sha256": digest} for file, (size, digest) in dataset.files.items()},
        "size": dataset.size,
        "sha256": dataset.sha256,
    }


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
