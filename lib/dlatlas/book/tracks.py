"""The page of reading paths: the tracks of ``book/tracks.yml``, and which chapter asks to be read after which."""

from __future__ import annotations

import html
import textwrap

import yaml

from dlatlas import catalog
from dlatlas.book import docs
from dlatlas.book.pages import Book, SiteError, a, held, link, method_link, minutes, raw, seconds

__all__ = ["columns", "tracks_page"]

WIDTH, HEIGHT, GAP, BETWEEN = 184, 46, 14, 44
esc = html.escape


def tracks_page(book: Book) -> str:
    """The reading paths of ``book/tracks.yml``, and which chapter asks to be read after which.

    Raises:
        SiteError: the file is not a list of tracks, or a step names no paper of the catalogue.
    """
    path = book.root / "book" / "tracks.yml"
    tracks = yaml.safe_load(path.read_text(encoding="utf-8"))
    out = [
        "(tracks)=\n# Tracks",
        "Paths through the book for one purpose each. A step is a section of minutes; what is not built yet is said, so that you can skip it.",
    ]
    for track in tracks:
        out += [f"## {docs.escape(track['title'])}", docs.escape(track["for"])]
        keys = [key for key, _ in track["steps"]]
        if unknown := [key for key in keys if key not in catalog.papers()]:
            raise SiteError(f"{path}: the track {track['title']!r} names {', '.join(unknown)}, which the catalogue does not hold")
        steps = "".join(_step(book, catalog.papers()[key], reason) for key, reason in track["steps"])
        out.append(raw(f'<ol class="dlatlas-track">{steps}</ol>'))
    out += ["## What to read before", raw(f"{_drawing(book)}\n{_listing(book)}")]
    return "\n\n".join(out) + "\n"


def _step(book: Book, row: catalog.Paper, reason: str) -> str:
    executed = book.chapters.get(row.chapter)
    if executed is None:
        name, state = method_link(book, row, "tracks"), '<span class="dlatlas-state">chapter not built yet</span>'
    else:
        anchor = row.key if row.key in executed.labels else ""
        name = a(link("tracks", executed.page, anchor), esc(row.method))
        state = f'<span class="dlatlas-small">{held(claims)}</span>' if (claims := book.claims_of(row.key)) else ""
    where = esc(catalog.chapters()[row.chapter].title)
    return f'<li>{name}. {esc(reason)} <span class="dlatlas-small">{where}.</span> {state}</li>'


def columns(before: dict[str, tuple[str, ...]]) -> list[list[str]]:
    """The chapters in columns: each stands to the right of all that it asks for, beside those that it needs or that need it.

    Args:
        before: for each chapter the chapters to read first; names that are no keys are chapters too.

    Raises:
        ValueError: chapters that wait for each other.
    """
    order = [*before, *(name for names in before.values() for name in names if name not in before)]
    order = list(dict.fromkeys(order))
    depth: dict[str, int] = {}

    def place(name: str, path: tuple[str, ...]) -> int:
        if name in path:
            raise ValueError(f"the chapters {' → '.join([*path[path.index(name) :], name])} wait for each other")
        if name not in depth:
            depth[name] = 1 + max((place(first, (*path, name)) for first in before.get(name, ())), default=-1)
        return depth[name]

    for name in order:
        place(name, ())
    found: list[list[str]] = [[] for _ in range(max(depth.values(), default=-1) + 1)]
    # A chapter that others build on comes before its neighbours, and those follow in its order: so lines hardly cross.
    asked = {name: sum(name in names for names in before.values()) for name in order}
    for name in order:
        found[depth[name]].append(name)
    for level, names in enumerate(found):
        row = {other: i for i, other in enumerate(found[level - 1])} if level else {}
        names.sort(key=lambda name: (min((row[o] for o in before.get(name, ()) if o in row), default=len(row)), -(not level) * asked[name]))
    return found


def _drawing(book: Book) -> str:
    """An SVG of the chapters of this build, an arrow from each to those that ask for it."""
    before = {name: executed.prerequisites for name, executed in book.chapters.items()}
    placed = columns(before)
    at = {
        name: (level * (WIDTH + BETWEEN) + 2, i * (HEIGHT + GAP) + 2) for level, names in enumerate(placed) for i, name in enumerate(names)
    }
    wide = len(placed) * (WIDTH + BETWEEN) - BETWEEN + 4
    high = max(map(len, placed), default=0) * (HEIGHT + GAP) - GAP + 4
    lines = "".join(_arrow(at[first], at[name]) for name, names in before.items() for first in names)
    boxes = "".join(_box(book, name, *place) for name, place in at.items())
    label = "Chapters as boxes, with an arrow from each chapter to those that ask for it; the list below says the same"
    return (
        f'<div class="dlatlas-scroll" tabindex="0"><svg class="dlatlas-before" viewBox="0 0 {wide} {high}" width="{wide}" height="{high}" role="group" '
        f'aria-label="{label}"><defs><marker id="arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
        f'<path d="M0 0L8 4L0 8z"/></marker></defs>{lines}{boxes}</svg></div>'
    )


def _arrow(start: tuple[int, int], end: tuple[int, int]) -> str:
    (x, y), (u, v) = (start[0] + WIDTH, start[1] + HEIGHT / 2), (end[0] - 2, end[1] + HEIGHT / 2)
    bend = (u - x) / 2
    return f'<path class="dlatlas-line" d="M{x} {y}C{x + bend} {y} {u - bend} {v} {u} {v}" marker-end="url(#arrow)"/>'


def _box(book: Book, name: str, x: int, y: int) -> str:
    title = textwrap.wrap(catalog.chapters()[name].title.split(":")[0], 25, max_lines=2, placeholder=" …")
    middle = y + HEIGHT / 2 + (5 if len(title) == 1 else -4)
    words = "".join(f'<tspan x="{x + 10}" y="{middle + 17 * i:.0f}">{esc(line)}</tspan>' for i, line in enumerate(title))
    built = name in book.chapters
    shape = f'<rect x="{x}" y="{y}" width="{WIDTH}" height="{HEIGHT}" rx="5"{"" if built else " stroke-dasharray=5"}/><text>{words}</text>'
    full = esc(catalog.chapters()[name].title)
    if not built:
        return f"<g><title>{full} (not built yet)</title>{shape}</g>"
    return f'<a href="{esc(link("tracks", f"chapters/{name}"))}" aria-label="{full}">{shape}</a>'


def _listing(book: Book) -> str:
    """The chapters of this build as a list, each with what it asks to be read first."""
    items = []
    for name, executed in book.chapters.items():
        before = [
            a(link("tracks", f"chapters/{other}"), esc(catalog.chapters()[other].title))
            if other in book.chapters
            else f"{esc(catalog.chapters()[other].title)} (not built yet)"
            for other in executed.prerequisites
        ]
        asks = f"after {', '.join(before)}" if before else "can be read first"
        times = f"{minutes(executed.words)} to read, runs in {seconds(executed.record.get('seconds') or 0)}"
        items.append(
            f"<li>{a(link('tracks', f'chapters/{name}'), esc(executed.chapter.title))}: {asks} <span class=dlatlas-small>{times}</span></li>"
        )
    return f"<ul>{''.join(items)}</ul>"
