"""Speed tables of this machine: the book's own machinery, then every table that a part of the library offers.

    python -m dlatlas.book.bench

A part offers tables in ``dlatlas.<part>.kit.speed``: a function ``tables()`` that yields (caption, rows). Times are the
median of several runs on one thread.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dlatlas import catalog, plot
from dlatlas.book import execute, ledger

Table = tuple[str, Sequence[Mapping[str, Any]]]
_EMPTY = """---
kernelspec: {display_name: Python 3, language: python, name: python3}
---
```{code-cell} ipython3
:tags: [parameters]
profile = "quick"
```

```{code-cell} ipython3
%s
```
"""
# What a chapter of an average kind imports before its first line of work.
_IMPORTS = "import torch\nfrom dlatlas import data, plot\nfrom dlatlas.claims import claim\nfrom dlatlas.run import Run"


def processor() -> str:
    """Name of the processor, or its architecture where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def machinery() -> Iterator[Table]:
    """Kernel start and imports, and the chapters as they last ran."""
    rows = []
    for name, source in (("kernel, papermill and checks", "pass"), ("the same with torch and the library", _IMPORTS)):
        start = time.perf_counter()
        _, error = execute.execute("bench", _EMPTY % source, {})
        if error:
            raise RuntimeError(error)
        rows.append({"step": name, "seconds": round(time.perf_counter() - start, 2)})
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", _IMPORTS], check=True)
    rows.append({"step": "plain Python with the same imports", "seconds": round(time.perf_counter() - start, 2)})
    yield "Start of a chapter", rows
    root = catalog.repository()
    records = []
    for name in execute.sources(root) if root else ():
        path = root / "_build/quick/src/chapters" / f"{name}.ipynb"
        if path.is_file():
            record = ledger.load(path)["metadata"]["dlatlas"]
            records.append({"chapter": name, "seconds": record["seconds"], "peak MB": record["used"]["peak_mb"]})
    if records:
        yield "Chapters, as they last ran in the quick profile", records


def tables() -> Iterator[Table]:
    """The machinery's tables, then those of the parts in the order of the book."""
    yield from machinery()
    for part in catalog.parts():
        name = f"dlatlas.{part}.kit.speed"
        try:
            found = importlib.util.find_spec(name)
        except ModuleNotFoundError:  # the part has no kit yet
            continue
        if found:
            yield from importlib.import_module(name).tables()


def main() -> int:
    """Print every table."""
    import torch

    torch.set_num_threads(1)
    print(f"{processor()}, {os.cpu_count()} cores, Python {platform.python_version()}, torch {torch.__version__}, one thread")
    for caption, rows in tables():
        columns = list(dict.fromkeys(name for row in rows for name in row))
        print(f"\n{caption}\n{plot.text_table(columns, rows)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
