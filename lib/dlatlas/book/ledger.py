"""Gather the claims and tables that executed notebooks carry in their own outputs, and check that nothing was altered."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dlatlas import catalog
from dlatlas.claims import MIME, ClaimError, check_record
from dlatlas.plot import TABLE_MIME

Notebook = Mapping[str, Any]


class LedgerError(ValueError):
    """An executed chapter whose claims cannot be trusted or are incomplete."""


def load(path: Path) -> Notebook:
    """An executed notebook as plain JSON."""
    return json.loads(path.read_text(encoding="utf-8"))


def records(notebook: Notebook, mime: str) -> Iterator[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """(cell, record) of every output that carries this MIME type, in the order of the page."""
    for cell in notebook["cells"]:
        for output in cell.get("outputs", []):
            if mime in output.get("data", {}):
                yield cell, output["data"][mime]


def claims(notebook: Notebook) -> list[dict[str, Any]]:
    """The chapter's claims, each decided again from its stored numbers.

    Raises:
        LedgerError: a stored verdict is not what its numbers give, a null passes, a criterion is not written in the
            source of the cell that shows it, or two claims have the same text.
    """
    found: dict[str, dict[str, Any]] = {}
    for cell, record in records(notebook, MIME):
        try:
            check_record(record)
        except (ClaimError, AttributeError, KeyError, TypeError, ValueError) as error:
            raise LedgerError(str(error) or repr(error)) from None
        if record["criterion"] not in _criteria("".join(cell["source"])):
            raise LedgerError(f"claim {record['id']}: its criterion {record['criterion']!r} is not written in the cell that shows it")
        if record["id"] in found:
            raise LedgerError(f"claim {record['id']} is made twice: {record['text']!r}")
        found[record["id"]] = {**record, "cell": cell["id"], "chapter": notebook["metadata"].get("dlatlas", {}).get("chapter")}
    return list(found.values())


def tables(notebook: Notebook) -> list[dict[str, Any]]:
    """The result tables of the chapter."""
    return [dict(record) for _, record in records(notebook, TABLE_MIME)]


def missing(chapter: str, rows: list[dict[str, Any]]) -> list[str]:
    """Keys of the chapter's implemented papers that make no claim."""
    claimed = {row["key"] for row in rows}
    return [p.key for p in catalog.papers().values() if p.chapter == chapter and p.implemented and p.key not in claimed]


def drifted(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Claims whose verdict is not the expected one."""
    return [row for row in rows if row["holds"] != row["expected"]]


def collect(folder: Path) -> list[dict[str, Any]]:
    """All claims of the executed chapters below `folder`, in the order of the book."""
    order = {chapter: i for i, chapter in enumerate(catalog.chapters())}
    notebooks = [load(path) for path in sorted((folder / "chapters").rglob("*.ipynb")) if ".failed" not in path.name]
    notebooks.sort(key=lambda nb: order.get(nb["metadata"].get("dlatlas", {}).get("chapter"), len(order)))
    return [row for notebook in notebooks for row in claims(notebook)]


def _criteria(source: str) -> set[str]:
    """The literal criteria in a cell's source; magics and half-written cells have none."""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return set()
    return {
        keyword.value.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        for keyword in node.keywords
        if keyword.arg == "criterion" and isinstance(keyword.value, ast.Constant)
    }
