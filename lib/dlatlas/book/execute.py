"""Execute chapters: MyST text -> jupytext -> papermill -> checked notebook, in parallel and only where something changed.

    python -m dlatlas.book.execute                       # every chapter that is not up to date
    python -m dlatlas.book.execute theory/optimizers     # one chapter
    python -m dlatlas.book.execute --backend dask --scheduler tcp://host:8786

`execute` takes text and returns a notebook, so workers need the package installed and nothing else: no shared disk. A
notebook gets its final name only after it ran to its end and its claims were checked; until then, and after a failure,
it is `<chapter>.failed.ipynb`.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import yaml

from dlatlas import catalog
from dlatlas.book import ledger
from dlatlas.book.probe import LIBRARY

PROBE = "from dlatlas.book.probe import report\nreport()"
# Seconds that design allows a chapter in the quick profile, on one core.
BUDGET = {"rl": 180}
DEFAULT_BUDGET = 90
KERNEL_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "TQDM_DISABLE": "1",
    "PYTHONHASHSEED": "0",
    "PYDEVD_DISABLE_FILE_VALIDATION": "1",
    # Arrays of megabytes are made and dropped all the time; giving their pages back to the system costs more than the arithmetic on them.
    "MALLOC_TRIM_THRESHOLD_": "500000000",
    "MALLOC_MMAP_THRESHOLD_": "100000000",
}


class ChapterError(RuntimeError):
    """A chapter that did not run to its end, or whose claims do not stand."""


@dataclasses.dataclass
class Outcome:
    """What became of one chapter."""

    chapter: str
    status: str  # "ran", "up to date" or "failed"
    seconds: float = 0.0
    error: str = ""
    claims: list[dict[str, Any]] = dataclasses.field(default_factory=list)


# --- one chapter: text in, notebook out -------------------------------------------------------------------------------


def execute(chapter: str, text: str, parameters: dict[str, Any], timeout: int = 600) -> tuple[dict[str, Any], str]:
    """Run one chapter and return (notebook as JSON, error); the error is "" when every cell ran.

    Works on any machine that has the package: nothing is read from or written to a shared disk.

    Args:
        chapter: its id, for messages.
        text: MyST-Markdown notebook.
        parameters: injected after the cell tagged "parameters".
        timeout: seconds allowed to one cell.
    """
    import jupytext
    import nbformat
    import papermill
    from nbclient.exceptions import CellTimeoutError, DeadKernelError
    from papermill.exceptions import PapermillExecutionError
    from traitlets.config import Config

    notebook = jupytext.reads(text, fmt="md:myst")
    for i, cell in enumerate(notebook.cells):
        cell.id = f"c{i:04d}"  # jupytext draws random ids, which would make every build differ
    if not any("parameters" in cell.metadata.get("tags", []) for cell in notebook.cells):
        return notebook, f"{chapter}: no cell is tagged 'parameters'"
    notebook.cells.append(nbformat.v4.new_code_cell(PROBE, id="probe"))
    # The default name of the kernel's sockets is shared by all kernels of a user; each gets a folder of its own.
    folder = Path(tempfile.mkdtemp(prefix="dlatlas-"))
    start, error = time.perf_counter(), ""
    result = folder / "out.ipynb"
    os.environ.update(KERNEL_ENVIRONMENT)
    try:
        notebook = papermill.execute_notebook(
            notebook,
            str(result),
            parameters=parameters,
            kernel_name="python3",  # ipykernel of the environment that runs this
            language="python",
            progress_bar=False,
            execution_timeout=timeout,
            start_timeout=120,
            cwd=str(folder),
            config=Config({"KernelManager": {"transport": "ipc", "ip": str(folder / "k")}}),
            # A kernel that is told to stop while it still tidies up its last cell would complain of the interrupt.
            extra_arguments=["--IPKernelApp.log_level=CRITICAL"],
        )
    except PapermillExecutionError as failure:
        error = f"{failure.ename}: {failure.evalue}".strip().splitlines()[0]
    except CellTimeoutError:
        error = f"a cell took longer than {timeout} s"
    except DeadKernelError:
        error = "the kernel died (killed, or out of memory)"
    except Exception as failure:
        error = f"{type(failure).__name__}: {failure}".splitlines()[0]
    finally:
        if error and result.exists():
            notebook = nbformat.read(result, 4)
        shutil.rmtree(folder, ignore_errors=True)
    seconds = time.perf_counter() - start
    probe = next((cell for cell in notebook.cells if cell.id == "probe"), None)
    where = _first_bad_cell(notebook)
    _tidy(notebook)
    if error:
        return notebook, f"{chapter}: {where}: {error}"
    if probe is None or probe.execution_count is None:
        return notebook, f"{chapter}: {where}: the notebook stopped before its end (sys.exit in a cell?)"
    used = json.loads("".join(output.get("text", "") for output in probe.outputs))
    notebook.metadata["dlatlas"] = {
        **notebook.metadata.get("dlatlas", {}),  # what the chapter's front matter says: question, prerequisites, data
        "chapter": chapter,
        "parameters": parameters,
        "seconds": round(seconds, 1),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "used": used,
    }
    return notebook, ""


def _first_bad_cell(notebook: Any) -> str:
    """Where a notebook stopped: the first cell with an error output, else the first code cell that never ran."""
    numbered = [(i, cell) for i, cell in enumerate(notebook.cells, 1) if cell.cell_type == "code" and "".join(cell.source).strip()]
    for i, cell in numbered:
        if any(output.output_type == "error" for output in cell.outputs):
            return f"cell {i}"
    for i, cell in numbered:
        if cell.execution_count is None:
            return f"cell {i} (never ran to its end)"
    return "notebook"


def _tidy(notebook: Any) -> None:
    """Drop what papermill and the runner added for themselves, so that equal runs give equal notebooks."""
    notebook.cells = [c for c in notebook.cells if c.id != "probe" and "papermill-error-cell-tag" not in c.metadata.get("tags", [])]
    notebook.metadata.pop("papermill", None)
    for cell in notebook.cells:
        for key in ("papermill", "execution"):
            cell.metadata.pop(key, None)
        if "plot.show(" in cell.source and "claim(" not in cell.source:
            # The code of a figure is a click away: readers come for the figure.
            cell.metadata.setdefault("tags", []).append("hide-input")
        if "injected-parameters" in cell.metadata.get("tags", []):
            cell.id = "injected"
            cell.metadata["tags"].append("remove-cell")


def check(chapter: str, notebook: dict[str, Any], *, allow_drift: bool = False) -> list[dict[str, Any]]:
    """The chapter's claims, after everything that must be true of a finished chapter was checked.

    Raises:
        ChapterError: a code cell never ran, something was written to stderr, there are no claims, an implemented paper of
            the chapter makes none, a data set was used that the front matter does not name, a claim was tampered with, or a verdict is not the expected one (unless `allow_drift`).
    """
    for i, cell in enumerate(notebook["cells"], 1):
        if cell["cell_type"] != "code" or not "".join(cell["source"]).strip():
            continue
        if cell.get("execution_count") is None:
            raise ChapterError(f"{chapter}: cell {i} never ran")
        for output in cell["outputs"]:
            if output.get("name") == "stderr":
                last = "".join(output["text"]).strip().splitlines()[-1:]
                raise ChapterError(f"{chapter}: cell {i} wrote to stderr: {''.join(last)}")
    record = notebook["metadata"].get("dlatlas", {})
    if undeclared := set(record.get("used", {}).get("data", {})) - set(record.get("data", [])):
        raise ChapterError(
            f"{chapter}: uses data that its front matter does not name; add `data: [{', '.join(sorted(undeclared))}]` under dlatlas"
        )
    try:
        rows = ledger.claims(notebook)
    except ledger.LedgerError as error:
        raise ChapterError(f"{chapter}: {error}") from None
    if not rows:
        raise ChapterError(f"{chapter}: makes no claim")
    if absent := ledger.missing(chapter, rows):
        raise ChapterError(f"{chapter}: no claim for {', '.join(absent)}")
    if (drift := ledger.drifted(rows)) and not allow_drift:
        lines = [
            f"claim {r['id']} {'holds' if r['holds'] else 'does not hold'}, expected otherwise: {r['text']} {r['values']}" for r in drift
        ]
        raise ChapterError(f"{chapter}: " + "; ".join(lines))
    return rows


# --- what a chapter depends on ----------------------------------------------------------------------------------------


def versions() -> dict[str, str]:
    """Versions that can change a figure."""
    from importlib.metadata import version

    return {
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "numpy", "scipy", "scikit-learn", "matplotlib")},
    }


def inputs(text: str, parameters: dict[str, Any], files: Iterable[str], data: dict[str, str]) -> dict[str, str]:
    """Digest of everything that an executed chapter depends on, by name."""
    found = {"text": _digest(text.encode()), "parameters": _digest(json.dumps(parameters, sort_keys=True).encode())}
    for name in files:
        path = LIBRARY / name
        found[f"lib {name}"] = _digest(path.read_bytes()) if path.is_file() else "gone"
    found.update({f"data {name}": digest for name, digest in data.items()})
    found.update({f"version {name}": value for name, value in versions().items()})
    return found


def is_fresh(target: Path, text: str, parameters: dict[str, Any]) -> bool:
    """Whether the executed notebook at `target` still belongs to this text, these parameters and what it used."""
    try:
        recorded = ledger.load(target)["metadata"]["dlatlas"]
        return recorded["inputs"] == inputs(text, parameters, recorded["used"]["files"], _current_data(recorded["used"]["data"]))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _current_data(recorded: dict[str, str]) -> dict[str, str]:
    if not recorded:
        return {}
    from dlatlas import data

    return {name: data.describe(name).sha256 if name in data.NAMES else "gone" for name in recorded}


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


# --- many chapters ----------------------------------------------------------------------------------------------------


def sources(root: Path) -> dict[str, Path]:
    """The chapters that exist, by id, in the order of the book.

    Raises:
        ChapterError: a file below chapters/ that is no chapter of the catalogue.
    """
    found = {str(path.relative_to(root / "chapters").with_suffix("")): path for path in sorted((root / "chapters").rglob("*.md"))}
    if unknown := [name for name in found if name not in catalog.chapters()]:
        raise ChapterError(f"not in the catalogue: {', '.join(unknown)} (chapters/<part>/<chapter>.md as in catalog.yml)")
    return {name: found[name] for name in catalog.chapters() if name in found}


def run(
    root: Path,
    chapters: Iterable[str] | None = None,
    *,
    profile: str = "quick",
    seed: int = 0,
    out: Path | None = None,
    jobs: int | None = None,
    backend: str = "loky",
    scheduler: str | None = None,
    timeout: int = 600,
    force: bool = False,
    allow_drift: bool = False,
    say: Callable[[str], None] = print,
) -> list[Outcome]:
    """Execute the chapters that are not up to date; one that fails does not stop the others.

    Finished notebooks are at ``out/chapters/<part>/<chapter>.ipynb``; `out` defaults to ``_build/<profile>/src``. An
    interrupt keeps the chapters finished so far.
    """
    available = sources(root)
    wanted = list(chapters) if chapters else list(available)
    if unknown := [name for name in wanted if name not in available]:
        near = {name: [c for c in available if name.split("/")[-1] in c] for name in unknown}
        hints = "; ".join(f"{n}{' (did you mean ' + ' or '.join(c) + '?)' if c else ''}" for n, c in near.items())
        raise ChapterError(f"no such chapter: {hints}. There are: {', '.join(available) or 'none'}")
    out = out or root / "_build" / profile / "src"
    parameters = {"profile": profile, "seed": seed}
    texts = {name: available[name].read_text(encoding="utf-8") for name in wanted}
    targets = {name: out / "chapters" / f"{name}.ipynb" for name in wanted}
    outcomes: dict[str, Outcome] = {}
    for name in wanted:
        if not force and is_fresh(targets[name], texts[name], parameters):
            with contextlib.suppress(ChapterError):
                rows = check(name, ledger.load(targets[name]), allow_drift=allow_drift)
                outcomes[name] = Outcome(name, "up to date", claims=rows)
    stale = [name for name in wanted if name not in outcomes]
    # Longest first (new ones count as longest), so that no core waits for a long last chapter.
    stale.sort(key=lambda name: -_last_seconds(targets[name]))
    revision = commit(root)
    for name, notebook, error in _execute_all([(n, texts[n], parameters, timeout) for n in stale], jobs, backend, scheduler):
        outcome = outcomes[name] = _finish(name, notebook, error, targets[name], texts[name], parameters, revision, allow_drift)
        say(f"{outcome.seconds:7.1f} s  {outcome.status:6}  {name}")
        if outcome.error:
            say(f"           {outcome.error}")
        budget = BUDGET.get(name.split("/")[0], DEFAULT_BUDGET)
        if profile == "quick" and outcome.seconds > budget:
            say(f"           over the chapter's budget of {budget} s")
    return [outcomes[name] for name in wanted]


def _finish(
    name: str, notebook: Any, error: str, target: Path, text: str, parameters: dict[str, Any], revision: str, allow_drift: bool
) -> Outcome:
    """Check an executed notebook and put it in its place, or beside it when it failed."""
    record = notebook["metadata"].get("dlatlas", {})
    seconds = record.get("seconds", 0.0)
    rows: list[dict[str, Any]] = []
    if not error:
        record["inputs"] = inputs(text, parameters, record["used"]["files"], record["used"]["data"])
        record["commit"] = revision
        try:
            rows = check(name, notebook, allow_drift=allow_drift)
        except ChapterError as failure:
            error = str(failure)
    failed = target.with_suffix(".failed.ipynb")
    try:
        write_atomically(failed if error else target, json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")
        if error:
            # What failed must not be taken for finished: an older success belongs to another text or library.
            target.unlink(missing_ok=True)
            error += f"\n           see {failed}"
        else:
            failed.unlink(missing_ok=True)
    except OSError as failure:
        error = f"{error or name}: cannot write {target}: {failure.strerror or failure}"
    return Outcome(name, "failed" if error else "ran", seconds, error, rows)


def write_atomically(path: Path, content: str) -> None:
    """Write the whole file or nothing: a temporary file in the same folder, then a rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(handle, "w", encoding="utf-8") as file:
            file.write(content)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _one(task: tuple[str, str, dict[str, Any], int]) -> tuple[str, Any, str]:
    return task[0], *execute(*task)


def _execute_all(tasks: list[tuple], jobs: int | None, backend: str, scheduler: str | None) -> Iterable[tuple[str, Any, str]]:
    """Results in the order in which they finish."""
    if not tasks:
        return
    from joblib import Parallel, delayed, parallel_config

    with contextlib.ExitStack() as stack:
        options: dict[str, Any] = {"n_jobs": min(jobs or os.cpu_count() or 1, len(tasks))}
        if backend == "dask":
            from distributed import Client

            stack.enter_context(Client(scheduler))
            options["n_jobs"] = -1
        stack.enter_context(parallel_config(backend=backend, **options))
        yield from Parallel(return_as="generator_unordered", pre_dispatch="all", batch_size=1)(delayed(_one)(task) for task in tasks)


def needed_data(root: Path) -> list[str]:
    """Data sets that the front matter of the chapters names."""
    found: dict[str, None] = {}
    for path in sources(root).values():
        front = yaml.safe_load(path.read_text(encoding="utf-8").split("---", 2)[1]) or {}
        found.update(dict.fromkeys(front.get("dlatlas", {}).get("data", [])))
    return list(found)


def _last_seconds(target: Path) -> float:
    try:
        return ledger.load(target)["metadata"]["dlatlas"]["seconds"]
    except (OSError, ValueError, KeyError):
        return float("inf")


def commit(root: Path) -> str:
    """Short commit of the checkout, with "+" when files that make the book differ from it; "" outside git."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "--", "lib", "chapters") else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


def summary(outcomes: list[Outcome]) -> str:
    """The closing lines: how many chapters ran, how many claims held, how long each chapter took."""
    count = {status: sum(o.status == status for o in outcomes) for status in ("ran", "up to date", "failed")}
    rows = [row for outcome in outcomes for row in outcome.claims]
    known = sum(not row["holds"] and not row["expected"] for row in rows)
    times = ", ".join(f"{o.chapter} {o.seconds:.0f} s" for o in outcomes if o.status != "up to date")
    lines = [
        f"chapters: {count['ran']} ran, {count['up to date']} up to date, {count['failed']} failed"
        f"; claims: {sum(row['holds'] for row in rows)} of {len(rows)} hold"
        + (f", {known} known not to hold at this scale" if known else "")
    ]
    if times:
        lines.append(f"seconds: {times}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Command line; the exit status is 0 only when every chapter is finished."""
    parser = argparse.ArgumentParser(prog="python -m dlatlas.book.execute", description="Execute chapters of the book with papermill.")
    parser.add_argument("chapters", nargs="*", metavar="part/chapter", help="chapters to execute (default: all)")
    parser.add_argument("--profile", choices=("quick", "full"), default="quick")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="folder for the executed notebooks (default: _build/<profile>/src)")
    parser.add_argument("--jobs", type=int, help="chapters at a time (default: one per core)")
    parser.add_argument("--backend", choices=("loky", "dask"), default="loky")
    parser.add_argument("--scheduler", help="address of a dask scheduler, with --backend dask")
    parser.add_argument("--timeout", type=int, default=None, help="seconds allowed to one cell (default: 600 quick, 7200 full)")
    parser.add_argument("--force", action="store_true", help="execute even what is up to date")
    options = parser.parse_args(arguments)
    if (options.scheduler is None) != (options.backend != "dask"):
        parser.error("--backend dask and --scheduler ADDRESS go together")
    root = catalog.repository()
    if root is None:
        print("dlatlas: the chapters are not part of an installed package; run this in a checkout of the repository", file=sys.stderr)
        return 2
    try:
        outcomes = run(
            root,
            [re.sub(r"^chapters/|\.md$", "", name) for name in options.chapters],
            profile=options.profile,
            seed=options.seed,
            out=options.out,
            jobs=options.jobs,
            backend=options.backend,
            scheduler=options.scheduler,
            timeout=options.timeout or (600 if options.profile == "quick" else 7200),
            force=options.force,
        )
    except ChapterError as error:
        print(f"dlatlas: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; finished chapters are kept, the next run goes on from here", file=sys.stderr)
        return 130
    print(summary(outcomes))
    return int(any(o.status == "failed" for o in outcomes))


if __name__ == "__main__":
    sys.exit(main())
