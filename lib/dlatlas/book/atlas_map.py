"""The map of the field: every paper a point, near to what its description resembles, with the same papers as a table below."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dlatlas import catalog
from dlatlas.book.field import idea, layout, spread_out
from dlatlas.book.pages import WIDE, Book, a, authors, count, data_row, esc, filters, held, link, raw

__all__ = ["map_page"]

WIDTH, HEIGHT, MARGIN, RADIUS = 1000.0, 760.0, 30.0, 7.0
# One colour a part, in the book's order; each has at least 3:1 against the page in light and in dark.
COLORS = ("#2f7fc1", "#d55e00", "#199e77", "#b45fb0", "#a67c00", "#7a7f87", "#d1495b", "#0f8f9f", "#7b6fd0", "#6a8a2a")


STATES = {"holds": "every claim holds", "fails": "a claim does not hold here", "done": "implemented", "planned": "not built yet"}


def _state(book: Book, key: str) -> str:
    if key not in book.implemented:
        return "planned"
    rows = book.claims_of(key)
    if not rows:
        return "done"
    return "holds" if all(row["holds"] for row in rows) else "fails"


def map_page(book: Book) -> str:
    """The map as a drawing whose points are links, with the same papers as a table below it."""
    rows = list(catalog.papers().values())
    places = layout(list(book.descriptions.values()), [row.chapter for row in rows])
    places = places * ((WIDTH - 2 * MARGIN) / places.max(0)[0], (HEIGHT - 2 * MARGIN) / places.max(0)[1]) + MARGIN
    places = spread_out(places, 2.3 * RADIUS).clip(RADIUS + 2, (WIDTH - RADIUS - 2, HEIGHT - RADIUS - 2))
    states = {row.key: _state(book, row.key) for row in rows}
    told = {row.key: _told(book, row) for row in rows}
    parts = [(slug, part.title) for slug, part in catalog.parts().items()]
    menus = {"part": ("Part", parts), "state": ("State", list(STATES.items()))}
    edges = "".join(
        f'<label><input type="checkbox" data-edges="{name}"{" checked" if name == "builds" else ""}> {text}</label>'
        for name, text in (("builds", "builds on"), ("parts", "shares a component"), ("chapter", "compared in the same chapter"))
    )
    intro = (
        f"{len(rows)} papers, each a point; the nearer, the more alike are their descriptions. The colour is the part of the book, the shape the "
        "state: a disc is a method whose claims all hold in this build, a diamond one with a claim that does not hold here, a pale disc is implemented "
        "but its chapter is not in this build, a ring is not built yet. Point at one to read what it does, or move with the arrow keys; a click opens "
        "its page. On a touch screen the first tap tells and the second opens. The table below the map holds the same papers, those with a page first."
    )
    drawing = (
        f'<div class="dlatlas-map"><div class="dlatlas-scroll"><svg viewBox="0 0 {WIDTH:.0f} {HEIGHT:.0f}" role="group" '
        f'aria-label="Map of {len(rows)} papers, coloured by part of the book; the table below lists the same papers">'
        f'<g class="dlatlas-map-edges"></g>\n{_dots(book, rows, places, states)}\n{_labels(rows, places)}</svg></div>'
        f'<div class="dlatlas-map-tools" hidden><span>Lines of the chosen paper:</span> {edges}</div>'
        '<div class="dlatlas-map-told" aria-live="polite"></div>'
        f'<script type="application/json" class="dlatlas-map-data">{_json(told)}</script></div>'
    )
    search = filters("map-table", text="Find a method, a title, an author", choices=menus)
    return "\n\n".join([WIDE + "(map)=\n# Map of the field", intro, raw(f"{search}\n{drawing}\n{_table(book, rows, states)}")]) + "\n"


def _json(value: Any) -> str:
    # "</" would end the script.
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).replace("</", "<\\/")


def _told(book: Book, row: catalog.Paper) -> dict[str, Any]:
    sentence = re.split(r"(?<=[a-z)\]][.:]) (?=[A-Z])", " ".join(idea(book.root, row).split()))[0]
    found: dict[str, Any] = {"method": row.method, "title": row.title, "chapter": row.chapter}
    if sentence and "$" not in sentence:
        found["does"] = sentence.replace("`", "")
    if claims := book.claims_of(row.key):
        found["claims"] = held(claims)
    return found | {name: values for name, values in book.relations.get(row.key, {}).items() if values}


def _address(book: Book, row: catalog.Paper) -> str:
    return link("map", f"papers/{row.key}") if row.key in book.implemented else link("map", "status", row.key)


def _dots(book: Book, rows: Sequence[catalog.Paper], places: np.ndarray, states: Mapping[str, str]) -> str:
    color = dict(zip(catalog.parts(), COLORS, strict=True))
    out = []
    for row, (x, y) in zip(rows, places):
        if states[row.key] == "fails":
            side = RADIUS * 1.25
            shape = f'<path d="M{x:.1f} {y - side:.1f}l{side:.1f} {side:.1f}l-{side:.1f} {side:.1f}l-{side:.1f} -{side:.1f}z"/>'
        else:
            shape = f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{RADIUS:.0f}"/>'
        label = esc(f"{row.method}: {row.title} ({STATES[states[row.key]]})")
        out.append(
            f'<a href="{esc(_address(book, row))}" class="dlatlas-dot dlatlas-dot-{states[row.key]}" data-key="{row.key}" '
            f'style="--dot:{color[row.part]}" aria-label="{label}">{shape}</a>'
        )
    return "\n".join(out)


def _labels(rows: Sequence[catalog.Paper], places: np.ndarray) -> str:
    """The parts' names above their points."""
    out = []
    taken: list[tuple[float, float, float]] = []  # middle, height and half width of the words that are placed
    for slug in catalog.parts():
        own = places[[row.part == slug for row in rows]]
        name = catalog.parts()[slug].title.split(" and ")[0].split(",")[0]
        half = 5.2 * len(name)  # about half of the word's width
        x = np.median(own[:, 0]).clip(half, WIDTH - half)
        y = max(np.quantile(own[:, 1], 0.04) - 1.6 * RADIUS, 18.0)
        while any(abs(x - other) < half + width and abs(y - at) < 22 for other, at, width in taken):
            y += 4
        taken.append((x, y, half))
        out.append(f'<text x="{x:.0f}" y="{y:.0f}" aria-hidden="true">{esc(name)}</text>')
    return "\n".join(out)


def _table(book: Book, rows: Sequence[catalog.Paper], states: Mapping[str, str]) -> str:
    head = "".join(f'<th scope="col">{name}</th>' for name in ("Method", "Paper", "Chapter", "State"))
    body = "\n".join(
        data_row(part=row.part, state=states[row.key], key=row.key) + f'<th scope="row">{a(_address(book, row), esc(row.method))}</th>'
        f'<td>{esc(row.title)}<div class="dlatlas-small">{esc(authors(row, 4))}</div></td>'
        f"<td>{esc(catalog.chapters()[row.chapter].title)}</td><td>{_said(book, row, states[row.key])}</td></tr>"
        for row in sorted(rows, key=lambda row: states[row.key] == "planned")
    )
    caption = f"<caption>The {count(len(rows), 'paper')} of the map: those with a page first, each group in the order of the book</caption>"
    return f'<div class="dlatlas-scroll"><table class="dlatlas-table" id="map-table">{caption}<thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>'


def _said(book: Book, row: catalog.Paper, state: str) -> str:
    claims = book.claims_of(row.key)
    return esc(held(claims)) if claims else STATES[state]
