"""A chapter's text for readers without the book's machinery: JupyterLab, Colab and GitHub show plain Markdown only.

Directives become what they stand for: the paper's title and links, the quoted source, the glued number, a heading for an
exercise. The code cells and their outputs stay as they are.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping
from typing import Any

from dlatlas import catalog
from dlatlas.book.probe import LIBRARY

_FENCE = re.compile(r"^(`{3,}|:{3,})\{([\w:-]+)\}[ \t]*(.*?)\n(.*?)^\1[ \t]*$", re.M | re.S)
_OPTION = re.compile(r"^:([\w-]+):[ \t]*(.*)$")
_SOLUTION = re.compile(r"^`{3,}\{(solution-start|solution-end)\}[^\n]*\n(?:[^`\n]*\n)*?`{3,}[ \t]*$", re.M)
GLUE = "application/papermill.record/"


def markdown(text: str, glued: Mapping[str, Any]) -> str:
    """MyST as plain Markdown; `glued` holds the values that :func:`dlatlas.claims.glue` kept."""
    text = re.sub(r"^\([^)\s]+\)=[ \t]*\n", "", text, flags=re.M)
    text = _FENCE.sub(lambda m: _directive(m[2], m[3].strip(), m[4]), text)
    text = re.sub(r"\{glue:text\}`([\w-]+)(?::([^`]*))?`", lambda m: _number(glued.get(m[1], m[1]), m[2] or ""), text)
    text = re.sub(r"\{cite(?::\w)?\}`([^`]+)`", lambda m: "; ".join(_reference(key.strip()) for key in m[1].split(",")), text)
    return re.sub(r"\{(?:ref|doc|numref|eq)\}`(?:([^`<]*?)[ \t]*<[^>]*>|([^`]*))`", lambda m: m[1] or m[2], text)


def _glued(executed: Mapping[str, Any]) -> dict[str, Any]:
    """The values that the notebook's cells kept for its prose."""
    return {
        output["metadata"]["scrapbook"]["name"]: ast.literal_eval("".join(output["data"][f"{GLUE}text/plain"]))
        for cell in executed["cells"]
        for output in cell.get("outputs", [])
        if "scrapbook" in output.get("metadata", {})
    }


def notebook(executed: Mapping[str, Any], glued: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """An executed notebook with plain Markdown cells; `glued` when its outputs no longer hold the values of the prose."""
    glued = _glued(executed) if glued is None else glued
    cells = [
        {**cell, "source": markdown("".join(cell["source"]), glued)} if cell["cell_type"] == "markdown" else cell
        for cell in executed["cells"]
    ]
    return json.loads(json.dumps({**executed, "cells": cells}))


def without_solutions(executed: Mapping[str, Any]) -> dict[str, Any]:
    """The notebook for a course: no outputs, and an empty cell in the place of each solution."""
    cells: list[dict[str, Any]] = []
    inside = False
    for cell in executed["cells"]:
        if cell["cell_type"] != "markdown":
            if not inside:
                cells.append({**cell, "outputs": [], "execution_count": None} if cell["cell_type"] == "code" else dict(cell))
            continue
        kept = []
        for i, part in enumerate(_SOLUTION.split("".join(cell["source"]))):
            if part in ("solution-start", "solution-end"):
                inside = part == "solution-start"
                if inside:
                    kept.append("*Your solution:*")
                    # The text before the solution stays above the empty cell, what follows the solution goes below.
                    cells += [_text(cell, f"{cell['id']}-{i}", kept), _empty(f"{cell['id']}-answer-{i}")]
                    kept = []
            elif not inside and part.strip():
                kept.append(part.strip("\n"))
        if kept:
            cells.append(_text(cell, cell["id"], kept))
    return notebook({**executed, "cells": cells}, glued=_glued(executed))


def _text(cell: Mapping[str, Any], name: str, parts: list[str]) -> dict[str, Any]:
    return {**cell, "id": name, "source": "\n\n".join(parts)}


def _empty(name: str) -> dict[str, Any]:
    return {"cell_type": "code", "id": name, "metadata": {}, "execution_count": None, "outputs": [], "source": ""}


def _directive(name: str, argument: str, body: str) -> str:
    lines = body.splitlines()
    options = {}
    while lines and (match := _OPTION.match(lines[0].strip())):
        options[match[1]] = match[2]
        lines = lines[1:]
    content = "\n".join(lines).strip("\n")
    match name:
        case "paper":
            row = catalog.papers()[argument]
            links = ", ".join(f"[{label}]({address})" for label, address in row.links.items())
            return f"> **{row.title}**. {', '.join(row.authors)}. ICLR 2018. {links}"
        case "literalinclude":
            return f"```python\n{source(argument, options.get('pyobject'))}\n```"
        case "math":
            return f"$$\n{content}\n$$"
        case "exercise":
            return f"**Exercise.** {content}"
        case "solution-start":
            return "**Solution.**"
        case "solution-end" | "raw":
            return ""
        case "code-block":
            return f"```{argument}\n{content}\n```"
    title = argument or name.capitalize()
    return "\n".join(f"> {line}".rstrip() for line in [f"**{title}**", "", *content.splitlines()])


def source(path: str, name: str | None) -> str:
    """The library's source at a book path (``/lib/dlatlas/...``), or of one object in it."""
    text = (LIBRARY.parents[1] / path.lstrip("/")).read_text(encoding="utf-8")
    if name is None:
        return text.rstrip()
    node: ast.AST = ast.parse(text)
    for part in name.split("."):
        node = next(n for n in node.body if getattr(n, "name", None) == part)
    first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
    return "\n".join(text.splitlines()[first - 1 : node.end_lineno])


def _number(value: Any, form: str) -> str:
    return format(value, form) if form and not isinstance(value, str) else str(value)


def _reference(key: str) -> str:
    if key not in catalog.papers():
        return key
    row = catalog.papers()[key]
    address = next(iter(row.links.values()), None)
    name = f"{row.authors[0].split()[-1]}{' et al.' if len(row.authors) > 1 else ''}, 2018"
    return f"[{name}]({address})" if address else name
