"""Records of seeds and of the full profile."""

import json

import pytest

from dlatlas.book import execute, record
from dlatlas.book.execute import Outcome


def row(holds, text="Halves the error"):
    return {
        "id": f"reddi2018amsgrad-{text[:4]}", "key": "reddi2018amsgrad", "text": text, "expected": True, "holds": holds,
        "criterion": "a > 1", "values": {"a": 2}, "null": {"a": 0}, "why": None, "reported": None,
    }  # fmt: skip


@pytest.fixture
def runs(monkeypatch):
    """`execute.run` replaced: the claim holds on even seeds, one chapter fails on seed 2."""

    def run(root, chapters, *, seed=0, out=None, **options):
        assert options["allow_drift"]
        failing = seed == 2
        return [
            Outcome("gans/critics", "ran", claims=[row(seed % 2 == 0)]),
            Outcome(
                "theory/optimizers", "failed" if failing else "ran", error="e" if failing else "", claims=[] if failing else [row(True)]
            ),
        ]

    monkeypatch.setattr(execute, "run", run)


def test_seeds_are_recorded_per_claim_and_other_chapters_keep_their_record(runs, tmp_path, capsys):
    path = tmp_path / "book/results/seeds.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"chapters": {"gans/games": {"seeds": [0], "claims": {}}}}))
    record.seeds(tmp_path, [], [0, 1, 2])
    kept = json.loads(path.read_text())["chapters"]
    assert list(kept) == ["gans/critics", "gans/games", "theory/optimizers"]  # the order of the book
    assert kept["gans/critics"]["seeds"] == [0, 1, 2]
    (claim,) = kept["gans/critics"]["claims"].values()
    assert claim["holds"] == [True, False, True] and claim["expected"]
    assert kept["theory/optimizers"]["seeds"] == [0, 1]
    assert kept["gans/games"] == {"seeds": [0], "claims": {}}
    assert "held on 2 of 3 seeds" in capsys.readouterr().out


def test_the_full_profile_is_recorded_with_its_device(monkeypatch, tmp_path):
    meta = {
        "used": {"device": "NVIDIA X"}, "versions": {"torch": "2"}, "seconds": 9.0, "parameters": {"seed": 0, "profile": "full"},
        "commit": "abc", "date": "2026-01-01",
    }  # fmt: skip
    notebook = tmp_path / "_build/full/src/chapters/gans/critics.ipynb"
    notebook.parent.mkdir(parents=True)
    notebook.write_text(json.dumps({"cells": [], "metadata": {"dlatlas": meta}}))

    def run(root, chapters, **options):
        assert options["profile"] == "full"
        return [Outcome("gans/critics", "ran", claims=[row(True) | {"cell": "c1"}]), Outcome("gans/games", "failed")]

    monkeypatch.setattr(execute, "run", run)
    record.full(tmp_path, [])
    kept = json.loads((tmp_path / "book/results/full/gans/critics.json").read_text())
    assert kept["device"] == "NVIDIA X" and kept["claims"][0]["values"] == {"a": 2}
    assert not (tmp_path / "book/results/full/gans/games.json").exists()
