"""Run the examples of use that the modules' docstrings hold, and keep what they print for the paper pages.

An example is plain Python under ``Example:`` in a module's docstring: what a reader would write in a script of their own. It
runs in a namespace of its own, from seed 0, with warnings as errors. What it printed is kept until the library changes.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import traceback
import warnings
from collections.abc import Mapping
from pathlib import Path

from dlatlas.book.probe import LIBRARY

__all__ = ["ExampleError", "outputs", "run"]


class ExampleError(RuntimeError):
    """An example of a docstring that does not run; the message names the module."""


def run(code: str) -> str:
    """What the example prints.

    Raises:
        ExampleError: it raised, warned or printed nothing; the message holds the last line of the error.
    """
    import torch

    torch.manual_seed(0)
    torch.set_num_threads(1)
    printed = io.StringIO()
    try:
        # Progress bars go to stderr; warnings do not, they are errors.
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("error")
            exec(compile(code, "<example>", "exec"), {"__name__": "__main__"})
    except Exception as error:
        line = next((f.lineno for f in reversed(traceback.extract_tb(error.__traceback__)) if f.filename == "<example>"), None)
        raise ExampleError(f"line {line}: {type(error).__name__}: {error}") from None
    if not printed.getvalue().strip():
        raise ExampleError("it prints nothing, so a reader would not see what it does")
    return printed.getvalue().rstrip()


def outputs(codes: Mapping[str, str], store: Path) -> dict[str, str]:
    """What each example prints, by the same keys; run again only when its text or the library has changed since `store` was written.

    Raises:
        ExampleError: the first examples that do not run.
    """
    import joblib

    known = json.loads(store.read_text(encoding="utf-8")) if store.is_file() else {}
    library = _library()
    marks = {key: hashlib.sha256(f"{library}\n{code}".encode()).hexdigest() for key, code in codes.items()}
    stale = [key for key in codes if known.get(key, {}).get("mark") != marks[key]]
    with warnings.catch_warnings():
        # Workers that have grown large are replaced by fresh ones, and joblib says so.
        warnings.filterwarnings("ignore", message="A worker stopped", category=UserWarning)
        fresh = dict(zip(stale, joblib.Parallel(n_jobs=2)(joblib.delayed(_attempt)(codes[key]) for key in stale), strict=True))
    if faults := [f"{key}: {error}" for key, (_, error) in fresh.items() if error]:
        raise ExampleError("examples of docstrings do not run:\n  " + "\n  ".join(faults[:20]))
    known = {key: {"mark": marks[key], "output": fresh[key][0] if key in fresh else known[key]["output"]} for key in codes}
    store.parent.mkdir(parents=True, exist_ok=True)
    store.write_text(json.dumps(known, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return {key: entry["output"] for key, entry in known.items()}


def _attempt(code: str) -> tuple[str, str | None]:
    try:
        return run(code), None
    except ExampleError as error:
        return "", str(error)


def _library() -> str:
    """Digest of the methods' sources; the machinery of the book does not change what an example prints."""
    files = sorted(path for path in LIBRARY.rglob("*") if path.suffix in {".py", ".c"} and "book" not in path.relative_to(LIBRARY).parts)
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
