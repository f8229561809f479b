"""The examples of the modules' docstrings run, print something, and are run again only when something changed."""

import pytest

from dlatlas import catalog
from dlatlas.book import docs, examples

ROOT = catalog.repository()
SCRIPTS = {p.key: docs.read(ROOT / p.source).example for p in catalog.papers().values() if (ROOT / p.source).is_file()}


@pytest.mark.parametrize("key", SCRIPTS)
def test_every_method_has_an_example_of_use_that_runs(key):
    assert SCRIPTS[key], f"{catalog.papers()[key].source}: the docstring has no Example"
    assert catalog.papers()[key].module in SCRIPTS[key], "the example imports the method as a reader would"
    assert 3 <= len(SCRIPTS[key].splitlines()) <= 25
    assert examples.run(SCRIPTS[key])


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("print(1)\n1 / 0", "line 2: ZeroDivisionError"),
        ("x = 1", "prints nothing"),
        ("import warnings\nwarnings.warn('old')", "line 2: UserWarning: old"),
    ],
)
def test_an_example_that_does_not_run_says_where(code, said, tmp_path):
    with pytest.raises(examples.ExampleError, match=said):
        examples.run(code)
    with pytest.raises(examples.ExampleError, match=f"one: .*{said}"):
        examples.outputs({"one": code, "two": "print(2)"}, tmp_path / "examples.json")


def test_an_example_starts_from_the_same_seed_in_its_own_namespace():
    code = "import torch\nprint('x' in globals(), torch.rand(1).item())\nx = 1"
    assert examples.run(code) == examples.run(code)
    assert examples.run(code).startswith("False")


def test_what_did_not_change_is_not_run_again(tmp_path, monkeypatch):
    store, log = tmp_path / "deep/examples.json", tmp_path / "log"
    code = f"open({str(log)!r}, 'a').write('ran ')\nprint('printed')"
    assert examples.outputs({"one": code}, store) == {"one": "printed"}
    assert examples.outputs({"one": code}, store) == {"one": "printed"}
    assert log.read_text() == "ran "
    monkeypatch.setattr(examples, "_library", lambda: "another library")
    assert examples.outputs({"one": code}, store) == {"one": "printed"}
    assert log.read_text() == "ran ran "
