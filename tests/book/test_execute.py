"""The runner, on real kernels: what a finished chapter is, and everything that must not be taken for one."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dlatlas.book import execute as runner
from dlatlas.book import ledger
from dlatlas.book.execute import ChapterError, check, execute, inputs, is_fresh, run, write_atomically

HEAD = """---
jupytext:
  text_representation: {extension: .md, format_name: myst}
kernelspec: {display_name: Python 3, language: python, name: python3}
---
# A chapter

```{code-cell} ipython3
:tags: [parameters]
profile = "quick"
seed = 0
```
"""
CLAIM = """claim("soudry2018implicit", "Twice two is four, not five", criterion="product == 4", product=2 * 2, null=dict(product=5))"""
CHAPTER = "theory/sgd-noise"
OTHER = "theory/landscape"


def text(*cells: str, claim: str = CLAIM) -> str:
    """A chapter with these code cells and one claim; the claim needs no method module of the library."""
    code = ["from dlatlas.claims import claim", claim, *cells]
    return HEAD + "".join(f"\n```{{code-cell}} ipython3\n{cell}\n```\n" for cell in code)


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A book of its own; its chapter's papers count as not implemented, so that one claim completes it."""
    monkeypatch.setattr(ledger, "missing", lambda chapter, rows: [])
    (tmp_path / "chapters" / "theory").mkdir(parents=True)
    return tmp_path


def write(root: Path, chapter: str, content: str) -> Path:
    path = root / "chapters" / f"{chapter}.md"
    path.write_text(content)
    return path


def target(root: Path, chapter: str = CHAPTER) -> Path:
    return root / "_build/quick/src/chapters" / f"{chapter}.ipynb"


def run_one(root: Path, **options):
    (outcome,) = run(root, jobs=1, say=lambda line: None, **options)
    return outcome


def test_a_finished_chapter_carries_its_claims_and_provenance_and_is_not_run_again(root):
    write(root, CHAPTER, text("import dlatlas.kit.flat"))
    outcome = run_one(root)
    assert outcome.status == "ran", outcome.error
    notebook = ledger.load(target(root))
    record = notebook["metadata"]["dlatlas"]
    assert record["parameters"] == {"profile": "quick", "seed": 0}
    used = record["used"]
    assert {"claims.py", "kit/flat.py"} <= set(used["files"])
    assert not any(name.startswith("book/") for name in used["files"])
    assert record["versions"]["torch"] and used["peak_mb"] > 50 and record["seconds"] > 0
    (claim,) = ledger.claims(notebook)
    assert claim["holds"] and claim["values"] == {"product": 4} and claim["profile"] == "quick" and claim["seed"] == 0
    assert "papermill" not in notebook["metadata"]
    before = target(root).stat().st_mtime_ns
    assert run_one(root).status == "up to date"
    assert target(root).stat().st_mtime_ns == before


def test_parameters_reach_the_notebook(root):
    write(root, CHAPTER, text("assert (profile, seed) == ('full', 3)"))
    assert run_one(root, profile="full", seed=3, out=root / "elsewhere").status == "ran"
    assert (root / "elsewhere/chapters" / f"{CHAPTER}.ipynb").is_file()


def test_equal_runs_give_equal_notebooks():
    source = text("import torch; torch.manual_seed(seed); print(torch.rand(3))")
    first, second = (execute(CHAPTER, source, {"profile": "quick", "seed": 0})[0] for _ in range(2))

    def content(notebook):
        cells = json.loads(json.dumps(notebook["cells"]))
        for cell in cells:
            for output in cell.get("outputs", []):
                output.get("data", {}).get("application/vnd.dlatlas.claim+json", {}).pop("seconds", None)
        return cells

    assert content(first) == content(second)


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ("1 / 0", "ZeroDivisionError"),
        ("assert 1 == 2, 'gate'", "AssertionError: gate"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "the kernel died"),
        ("import os; os._exit(0)", "the kernel died"),
        ("import sys; sys.exit(0)", "SystemExit|stopped before its end"),
        ("import sys; print('late warning', file=sys.stderr)", "wrote to stderr: late warning"),
        ("import warnings; warnings.warn('deprecated thing')", "wrote to stderr"),
    ],
    ids=["exception", "gate", "sigkill", "os_exit", "sys_exit", "stderr", "warning"],
)
def test_a_chapter_that_goes_wrong_fails_with_its_reason_and_leaves_no_finished_notebook(root, cell, message):
    write(root, CHAPTER, text(cell, "after = 1"))
    outcome = run_one(root)
    assert outcome.status == "failed"
    assert re.search(message, outcome.error), outcome.error
    assert CHAPTER in outcome.error
    assert not target(root).exists()
    assert target(root).with_suffix(".failed.ipynb").is_file()


def test_a_cell_that_takes_too_long_fails(root):
    write(root, CHAPTER, text("import time; time.sleep(60)"))
    started = time.perf_counter()
    outcome = run_one(root, timeout=3)
    assert outcome.status == "failed"
    assert "longer than 3 s" in outcome.error
    assert time.perf_counter() - started < 40


def test_claims_that_do_not_stand_fail_the_chapter(root):
    cases = {
        "makes no claim": text(claim="nothing = 0"),
        "holds under the null": text(claim=CLAIM.replace("null=dict(product=5)", "null=dict(product=4)")),
        "null": text(claim=CLAIM.replace(", null=dict(product=5)", "")),
        "expected otherwise": text(claim=CLAIM.replace("2 * 2", "2 * 3")),
    }
    for message, content in cases.items():
        write(root, CHAPTER, content)
        outcome = run_one(root)
        assert outcome.status == "failed"
        assert message in outcome.error, outcome.error


def test_one_failing_chapter_does_not_stop_the_others(root):
    write(root, CHAPTER, text("1 / 0"))
    write(root, OTHER, text())
    outcomes = {o.chapter: o.status for o in run(root, jobs=2, say=lambda line: None)}
    assert outcomes == {CHAPTER: "failed", OTHER: "ran"}
    assert target(root, OTHER).is_file()


def test_a_drifted_verdict_is_allowed_only_when_asked_for(root):
    write(root, CHAPTER, text(claim=CLAIM.replace("2 * 2", "2 * 3")))
    assert run_one(root, allow_drift=True).status == "ran"


def test_a_failure_takes_back_an_older_success(root):
    write(root, CHAPTER, text())
    assert run_one(root).status == "ran"
    write(root, CHAPTER, text("1 / 0"))
    assert run_one(root).status == "failed"
    assert not target(root).exists()


def test_what_makes_a_chapter_stale(tmp_path, monkeypatch):
    """Its text, its parameters, a library file or a data set that it used, a version; nothing else."""
    library = tmp_path / "lib"
    (library / "kit").mkdir(parents=True)
    used, unused = library / "kit/used.py", library / "kit/unused.py"
    for path in (used, unused):
        path.write_text("x = 1")
    monkeypatch.setattr(runner, "LIBRARY", library)
    digests = {"mnist": "aa"}
    monkeypatch.setattr(runner, "_current_data", lambda recorded: {name: digests[name] for name in recorded})
    parameters = {"profile": "quick", "seed": 0}
    record = {"used": {"files": ["kit/used.py"], "data": {"mnist": "aa"}}}
    record["inputs"] = inputs("text", parameters, **record["used"])
    notebook = tmp_path / "chapter.ipynb"
    notebook.write_text(json.dumps({"cells": [], "metadata": {"dlatlas": record}}))

    assert is_fresh(notebook, "text", parameters)
    unused.write_text("x = 2")
    assert is_fresh(notebook, "text", parameters)
    assert not is_fresh(notebook, "text!", parameters)
    assert not is_fresh(notebook, "text", parameters | {"seed": 1})
    used.write_text("x = 2")
    assert not is_fresh(notebook, "text", parameters)
    used.write_text("x = 1")
    assert is_fresh(notebook, "text", parameters)
    digests["mnist"] = "bb"
    assert not is_fresh(notebook, "text", parameters)
    digests["mnist"] = "aa"
    used.unlink()
    assert not is_fresh(notebook, "text", parameters)
    notebook.write_text('{"cells": [], "metad')  # half a file
    assert not is_fresh(notebook, "text", parameters)
    assert not is_fresh(tmp_path / "absent.ipynb", "text", parameters)


def test_a_missing_paper_and_an_unrun_cell_are_found():
    cell = {"cell_type": "code", "id": "a", "source": CLAIM, "execution_count": None, "outputs": [], "metadata": {}}
    with pytest.raises(ChapterError, match="cell 1 never ran"):
        check(CHAPTER, {"cells": [cell], "metadata": {}})


def test_a_paper_without_a_claim_fails(root, monkeypatch):
    write(root, CHAPTER, text())
    monkeypatch.setattr(ledger, "missing", lambda chapter, rows: ["smith2018bayesian"])
    outcome = run_one(root)
    assert outcome.status == "failed"
    assert "no claim for smith2018bayesian" in outcome.error


def test_an_unwritable_target_is_reported_and_leaves_nothing_behind(root):
    write(root, CHAPTER, text())
    blocked = root / "blocked"
    blocked.write_text("a file where a folder should be")
    outcome = run_one(root, out=blocked)
    assert outcome.status == "failed"
    assert "cannot write" in outcome.error


def test_a_full_disk_leaves_the_old_file_and_no_half_one(tmp_path, monkeypatch):
    path = tmp_path / "chapter.ipynb"
    write_atomically(path, "old")

    class Full:
        def __init__(self, handle, *_, **__):
            self.handle = handle

        def __enter__(self):
            return self

        def __exit__(self, *_):
            os.close(self.handle)

        def write(self, content):
            os.write(self.handle, content[:3].encode())
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("builtins.open", Full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, "new content")
    monkeypatch.undo()
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["chapter.ipynb"]


def test_wrong_names_are_explained(root):
    write(root, CHAPTER, text())
    with pytest.raises(ChapterError, match=r"no such chapter: sgd-noise \(did you mean theory/sgd-noise\?\)"):
        run(root, ["sgd-noise"])
    (root / "chapters/theory/unheard-of.md").write_text(text())
    with pytest.raises(ChapterError, match="not in the catalogue: theory/unheard-of"):
        run(root)


def test_data_that_the_front_matter_does_not_name_fails(root):
    cell = "from dlatlas import data; data.images('digits', train=10, test=10)"
    write(root, CHAPTER, text(cell))
    assert "add `data: [digits]`" in run_one(root).error
    write(root, CHAPTER, text(cell).replace("kernelspec:", "dlatlas: {data: [digits]}\nkernelspec:"))
    assert run_one(root).status == "ran"
    assert runner.needed_data(root) == ["digits"]
    assert run_one(root).status == "up to date"


def test_a_chapter_without_parameters_cell_is_refused():
    _, error = execute(CHAPTER, text().replace(":tags: [parameters]\n", ""), {})
    assert "no cell is tagged 'parameters'" in error


def test_an_interrupt_keeps_what_is_finished_and_the_next_run_goes_on(root):
    write(root, CHAPTER, text())
    write(root, OTHER, text("import time; time.sleep(120)"))
    script = (
        "import sys; from pathlib import Path; from dlatlas.book import execute, ledger\n"
        "ledger.missing = lambda *a: []\n"
        f"execute.run(Path({str(root)!r}), jobs=2)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script], start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.time() + 90
        while not target(root).exists() and time.time() < deadline:
            time.sleep(0.2)
        assert target(root).exists()
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(timeout=30) != 0
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert not target(root, OTHER).exists()
    write(root, OTHER, text())
    assert {o.chapter: o.status for o in run(root, jobs=1, say=lambda line: None)} == {CHAPTER: "up to date", OTHER: "ran"}


def test_the_same_runner_on_a_dask_cluster_of_two_processes(root):
    from distributed import LocalCluster

    source = text("import os; print('process', os.getppid())")
    write(root, CHAPTER, source)
    write(root, OTHER, source)
    with LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as cluster:
        outcomes = run(root, backend="dask", scheduler=cluster.scheduler_address, say=lambda line: None)
    assert {o.chapter: o.status for o in outcomes} == {CHAPTER: "ran", OTHER: "ran"}, outcomes
