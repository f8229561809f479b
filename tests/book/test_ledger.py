"""The ledger believes nothing that the notebook does not prove."""

import copy
import json

import pytest

from dlatlas.book import ledger
from dlatlas.claims import MIME, claim
from dlatlas.plot import TABLE_MIME

SOURCE = """claim("reddi2018amsgrad", "Halves the error",
      criterion="error < 0.5 * baseline", error=0.1, baseline=0.4, null=dict(error=0.4))"""


@pytest.fixture
def notebook():
    record = claim(
        "reddi2018amsgrad", "Halves the error", criterion="error < 0.5 * baseline", error=0.1, baseline=0.4, null=dict(error=0.4)
    ).record
    table = {"name": "side-by-side", "caption": "c", "columns": ["a"], "rows": [{"a": 1}]}
    outputs = [{"output_type": "display_data", "data": {MIME: record}}, {"output_type": "display_data", "data": {TABLE_MIME: table}}]
    cell = {"cell_type": "code", "id": "c0003", "source": SOURCE, "execution_count": 1, "outputs": outputs, "metadata": {}}
    text = {"cell_type": "markdown", "id": "c0001", "source": "text", "metadata": {}}
    return json.loads(json.dumps({"cells": [text, cell], "metadata": {"dlatlas": {"chapter": "theory/optimizers"}}}))


def record_of(notebook):
    return notebook["cells"][1]["outputs"][0]["data"][MIME]


def test_claims_and_tables_are_read_with_their_place(notebook):
    (row,) = ledger.claims(notebook)
    assert row["holds"] and row["cell"] == "c0003" and row["chapter"] == "theory/optimizers" and row["values"]["error"] == 0.1
    assert ledger.tables(notebook)[0]["rows"] == [{"a": 1}]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"holds": False}, "stored verdict"),
        ({"criterion": "error < 0.9 * baseline", "null": {"error": 0.39}}, "does not fail under its null|not written in the cell"),
        ({"criterion": "error < 1 * baseline"}, "not written in the cell"),
        ({"values": {"error": 0.3, "baseline": 0.4}}, "stored verdict"),
        ({"null": {}}, "does not fail under its null"),
        ({"null": {"error": 0.01}}, "does not fail under its null"),
        ({"criterion": "__import__('os')"}, "names|comparison|allowed"),
        ({"values": None}, "NoneType"),
    ],
)
def test_an_altered_record_is_refused(notebook, change, message):
    record_of(notebook).update(change)
    with pytest.raises(ledger.LedgerError, match=message):
        ledger.claims(notebook)


def test_an_altered_threshold_is_refused_even_if_cell_text_says_so_elsewhere(notebook):
    record_of(notebook)["criterion"] = "error < 1.0 * baseline"
    notebook["cells"][0]["source"] = 'criterion="error < 1.0 * baseline"'
    notebook["cells"][1]["source"] += '\n# criterion="error < 1.0 * baseline"'
    with pytest.raises(ledger.LedgerError, match="not written in the cell"):
        ledger.claims(notebook)


def test_a_claim_made_twice_is_refused(notebook):
    notebook["cells"].append(copy.deepcopy(notebook["cells"][1]))
    with pytest.raises(ledger.LedgerError, match="made twice"):
        ledger.claims(notebook)


def test_drift_and_missing_papers(notebook, monkeypatch):
    rows = ledger.claims(notebook)
    assert ledger.drifted(rows) == []
    assert ledger.drifted([rows[0] | {"expected": False}])
    from dlatlas import catalog

    monkeypatch.setattr(catalog.Paper, "implemented", property(lambda self: self.key in {"reddi2018amsgrad", "krishnan2018neumann"}))
    assert ledger.missing("theory/optimizers", rows) == ["krishnan2018neumann"]


def test_collect_follows_the_order_of_the_book_and_skips_failed_runs(tmp_path, notebook):
    second = copy.deepcopy(notebook)
    second["metadata"]["dlatlas"]["chapter"] = "gans/critics"
    failed = {"cells": [], "metadata": {}}
    for name, content in {"theory/optimizers": notebook, "gans/critics": second, "gans/games.failed": failed}.items():
        path = tmp_path / "chapters" / f"{name}.ipynb"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
    assert [row["chapter"] for row in ledger.collect(tmp_path)] == ["gans/critics", "theory/optimizers"]
