"""What a chapter really used, asked of the kernel that ran it. Imported by the last cell that the runner appends."""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path

LIBRARY = Path(__file__).resolve().parents[1]


def used_files() -> list[str]:
    """Library files behind the modules that this process imported, relative to the library; the book's machinery excepted.

    C sources count for the package that holds them. The catalogue does not: a new row changes no result.
    """
    found = set()
    for name, module in list(sys.modules.items()):
        if not name.startswith("dlatlas") or name.startswith("dlatlas.book"):
            continue
        path = Path(getattr(module, "__file__", None) or "/")
        if LIBRARY not in path.parents:
            continue
        found.add(path)
        if path.name == "__init__.py":
            found.update(path.parent.glob("*.c"))
    return sorted(str(path.relative_to(LIBRARY)) for path in found)


def report() -> None:
    """Print files, data sets with their checksums, peak memory and device as one line of JSON."""
    data = sys.modules.get("dlatlas.data")
    torch = sys.modules.get("torch")
    on_gpu = torch is not None and torch.cuda.is_initialized()
    print(
        json.dumps(
            {
                "files": used_files(),
                "data": dict(data.used()) if data is not None else {},
                # Kilobytes on Linux, bytes on macOS.
                "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)),
                "device": torch.cuda.get_device_name() if on_gpu else "cpu",
            }
        )
    )
