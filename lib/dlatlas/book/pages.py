"""The pages that are written by the build: papers, parts, ledger, status, bibliography, and what they are made from.

`Book` holds everything that is known (executed chapters, claims, modules, recorded results); the functions below turn it
into MyST text. Tables are plain HTML inside the page, so that they read without scripts; links in them are relative
paths, which the build checks after Sphinx ran.
"""

from __future__ import annotations

import csv
import html
import io
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from dlatlas import catalog
from dlatlas.book import docs, examples, ledger, peers
from dlatlas.book.field import components, describe, nearest, relations
from dlatlas.claims import Claim
from dlatlas.plot import html_table

esc = html.escape
WORDS_A_MINUTE = 200
REFERENCE = ("map", "tracks", "ledger", "arenas", "peers", "status", "bibliography")
WIDE = "---\nhtml_theme.sidebar_secondary.remove: true\n---\n"


class SiteError(RuntimeError):
    """The site cannot be built; the message says what to do."""


@dataclass(frozen=True)
class Executed:
    """An executed chapter."""

    chapter: catalog.Chapter
    question: str
    prerequisites: tuple[str, ...]
    claims: tuple[dict[str, Any], ...]
    record: dict[str, Any]
    labels: frozenset[str]
    tables: tuple[dict[str, Any], ...]
    words: int

    @property
    def page(self) -> str:
        return f"chapters/{self.chapter.id}"


@dataclass
class Book:
    """All that the generated pages are made from."""

    root: Path
    profile: str
    repository: str
    branch: str
    chapters: dict[str, Executed]
    build: dict[str, Any]
    seeds: dict[str, Any] = field(default_factory=dict)
    full: dict[str, dict[str, Any]] = field(default_factory=dict)
    printed: dict[str, str] = field(default_factory=dict)

    @classmethod
    def read(
        cls, root: Path, source: Path, chapters: Iterable[str], *, profile: str, repository: str, branch: str, build: dict[str, Any]
    ) -> Book:
        """Everything about these chapters, whose executed notebooks are below `source`.

        Raises:
            SiteError: a notebook whose claims were altered, a record that cannot be read, or an example that does not run.
        """
        executed = {name: _executed(root, source, name) for name in chapters}
        results = root / "book" / "results"
        seeds = _json(results / "seeds.json").get("chapters", {})
        full = {name: record for name in catalog.chapters() if (record := _json(results / "full" / f"{name}.json"))}
        book = cls(root, profile, repository, branch, executed, build, seeds, full)
        scripts = {key: module.example for key, module in book.modules.items() if module.example}
        try:
            book.printed = examples.outputs(scripts, source.parent / "examples.json")
        except examples.ExampleError as error:
            raise SiteError(str(error)) from None
        return book

    @cached_property
    def implemented(self) -> dict[str, catalog.Paper]:
        """Papers whose module is in the library of this checkout."""
        return {key: p for key, p in catalog.papers().items() if (self.root / p.source).is_file()}

    @cached_property
    def modules(self) -> dict[str, docs.Module]:
        """What the modules of the implemented papers say about themselves."""
        return {key: docs.read(self.root / row.source) for key, row in self.implemented.items()}

    @cached_property
    def descriptions(self) -> dict[str, str]:
        """The words that describe each paper."""
        return {key: describe(self.root, row) for key, row in catalog.papers().items()}

    @cached_property
    def nearest(self) -> dict[str, list[catalog.Paper]]:
        """The papers whose descriptions resemble each paper's most."""
        rows = list(catalog.papers().values())
        found = nearest(list(self.descriptions.values()), 5)
        return {row.key: [rows[i] for i in others] for row, others in zip(rows, found)}

    @cached_property
    def relations(self) -> dict[str, dict[str, list[str]]]:
        """What the modules of the implemented papers import: ``builds`` and ``parts``."""
        return relations(self.root, self.implemented)

    @cached_property
    def claims(self) -> list[dict[str, Any]]:
        """All claims in the order of the book."""
        return [row for chapter in self.chapters.values() for row in chapter.claims]

    def claims_of(self, key: str) -> list[dict[str, Any]]:
        """The claims of one paper."""
        return [row for row in self.claims if row["key"] == key]

    @cached_property
    def spent(self) -> dict[tuple[str, str], float]:
        """Seconds by (chapter, key): from the last claim of the paper before to the last claim of this one."""
        found: dict[tuple[str, str], float] = {}
        for chapter in self.chapters.values():
            before, last = 0.0, {}
            for row in chapter.claims:
                last[row["key"]] = max(last.get(row["key"], 0.0), row["seconds"])
            for key, end in sorted(last.items(), key=lambda item: item[1]):
                found[chapter.chapter.id, key], before = end - before, end
        return found

    def seeds_of(self, row: Mapping[str, Any]) -> tuple[int, int] | None:
        """(held, runs) of a claim over several seeds, where that was recorded."""
        holds = self.seeds.get(row["chapter"], {}).get("claims", {}).get(row["id"], {}).get("holds")
        return (sum(map(bool, holds)), len(holds)) if holds else None

    def full_of(self, row: Mapping[str, Any]) -> dict[str, Any] | None:
        """The same claim in the full profile, where that was recorded."""
        record = self.full.get(row["chapter"], {})
        return next(({**record, "claim": c} for c in record.get("claims", []) if c.get("id") == row["id"]), None)

    @cached_property
    def numbers(self) -> dict[str, int]:
        """Counts for the prose of hand-written pages."""
        return {
            "papers": len(catalog.papers()),
            "implemented": len(self.implemented),
            "parts": len(catalog.parts()),
            "chapters": len(catalog.chapters()),
            "chapters-built": len(self.chapters),
            "claims": len(self.claims),
            "holding": sum(row["holds"] for row in self.claims),
            "failing": sum(not row["holds"] for row in self.claims),
        }


def _executed(root: Path, source: Path, name: str) -> Executed:
    notebook = ledger.load(source / "chapters" / f"{name}.ipynb")
    record = notebook["metadata"].get("dlatlas", {})
    front = front_matter((root / "chapters" / f"{name}.md").read_text(encoding="utf-8")).get("dlatlas", {}) or {}
    try:
        # The page's own id, not the one that the notebook says: it is where the links have to go.
        claims = tuple({**row, "chapter": name} for row in ledger.claims(notebook))
    except ledger.LedgerError as error:
        raise SiteError(f"chapters/{name}: {error}") from None
    text = "\n".join("".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "markdown")
    labels = frozenset(re.findall(r"^\(([^)\s]+)\)=\s*$", text, flags=re.M))
    prerequisites = tuple(front.get("prerequisites") or ())
    question, tables = str(front.get("question", "")).strip(), tuple(ledger.tables(notebook))
    words = len(re.findall(r"[^\W\d_]{2,}", text))
    return Executed(catalog.chapters()[name], question, prerequisites, claims, record, labels, tables, words)


def front_matter(text: str) -> dict[str, Any]:
    """The YAML block at the head of a page."""
    match = re.match(r"---\n(.*?)\n---\n", text, flags=re.S)
    return (yaml.safe_load(match[1]) or {}) if match else {}


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise SiteError(f"{path}: not valid JSON: {error}") from None


# --- small pieces -----------------------------------------------------------------------------------------------------


def link(start: str, to: str, anchor: str = "") -> str:
    """Relative address from one page to another."""
    return os.path.relpath(f"{to}.html", os.path.dirname(start) or ".") + (f"#{anchor}" if anchor else "")


def raw(markup: str) -> str:
    """HTML inside a MyST page."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`{3,}", markup)), default=0))
    return f"{fence}{{raw}} html\n{markup}\n{fence}"


def a(address: str, text: str, css: str = "") -> str:
    """An HTML link; `text` is HTML."""
    return f'<a href="{esc(address)}"{f" class={css}" if css else ""}>{text}</a>'


def external(address: str, text: str) -> str:
    """A link to another site."""
    return f'<a class="reference external" href="{esc(address)}">{esc(text)}</a>'


def paper_links(row: catalog.Paper) -> str:
    """arXiv and OpenReview as HTML."""
    return " · ".join(external(address, name) for name, address in row.links.items())


def figure(value: Any) -> str:
    """A measured number as people read it."""
    value = float(value) if isinstance(value, str) else value
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def verdict(row: Mapping[str, Any]) -> str:
    """The verdict as a coloured word."""
    return f'<span class="dlatlas-verdict dlatlas-{"holds" if row["holds"] else "fails"}">{esc(Claim(dict(row)).verdict)}</span>'


def count(n: int, one: str, many: str = "") -> str:
    """ "1 claim", "2 claims"."""
    return f"{n:,} {one if n == 1 else many or one + 's'}"


def held(rows: list[dict[str, Any]]) -> str:
    """ "3 of 4 claims hold"."""
    n = sum(row["holds"] for row in rows)
    if len(rows) == 1:
        return "1 claim, which holds" if n else "1 claim, which does not hold"
    return f"{n} of {len(rows)} claims hold"


def authors(row: catalog.Paper, most: int = 0) -> str:
    """Names in a line; more than `most` are shortened."""
    if most and len(row.authors) > most:
        return f"{', '.join(row.authors[: most - 1])} and {len(row.authors) - most + 1} others"
    return ", ".join(row.authors)


def seconds(value: float) -> str:
    """ "14 s", "3 min"."""
    return f"{value:.0f} s" if value < 90 else f"{value / 60:.0f} min"


def exercises_file(chapter: str) -> str:
    """Where the site keeps a chapter's notebook without solutions."""
    return f"exercises/{chapter.replace('/', '-')}.ipynb"


def minutes(words: int) -> str:
    """Time to read so many words of technical prose: "35 min"."""
    return f"{max(1, round(words / WORDS_A_MINUTE))} min"


def filters(table: str, *, text: str, choices: Mapping[str, tuple[str, list[tuple[str, str]]]]) -> str:
    """Search field and menus for a table; they stay hidden where scripts do not run."""
    menus = "".join(
        f'<label>{esc(label)} <select data-filter="{name}"><option value="">all</option>'
        + "".join(f'<option value="{esc(value)}">{esc(shown)}</option>' for value, shown in options)
        + "</select></label>"
        for name, (label, options) in choices.items()
    )
    return (
        f'<form class="dlatlas-filter" data-table="{table}" role="search" hidden>'
        f'<label class="dlatlas-filter-text">{esc(text)} <input type="search" autocomplete="off"></label>{menus}'
        f'<output aria-live="polite"></output></form>'
    )


def data_row(**data: str) -> str:
    """A table row that the filters understand."""
    return "<tr" + "".join(f' data-{name}="{esc(value)}"' for name, value in data.items()) + ">"


# --- paper pages ------------------------------------------------------------------------------------------------------


def paper_page(book: Book, row: catalog.Paper) -> str:
    """Everything about one implemented paper."""
    here = f"papers/{row.key}"
    module = book.modules[row.key]
    idea, rest = docs.split_idea(module.doc)
    # The docstring's title line says what the page's own title says.
    idea = re.sub(rf"^[^\n]*\({re.escape(row.key)}\)\.?\n\n", "", idea)
    claims = book.claims_of(row.key)
    out = [f"(paper-{row.key})=", f"# {docs.escape(row.method)}", raw(_citation(book, row, here))]
    if idea:
        out += ["## The idea", docs.to_myst(idea, level=0)]
    out += ["## What was measured", raw(_measured(book, row, claims, here))]
    if module.example:
        out += [
            "## In your own code",
            f"```python\n{module.example}\n```",
            "It prints (this very script ran when the page was built):",
            f"```text\n{book.printed[row.key]}\n```",
        ]
    if rest.strip():
        out += ["## How it is done here", docs.to_myst(rest, level=3)]
    out += ["## Interface", _api(row.module, module, 3)]
    if shared := _components(book, row, here):
        out.append(raw(shared))
    out += [
        # Colons: a fence of backticks may have none in its title.
        f"::::{{dropdown}} Source: `{row.source}`, {module.lines} lines\n:class-container: dlatlas-source\n\n"
        f"```{{literalinclude}} /{row.source}\n:language: python\n:linenos:\n```\n::::"
    ]
    out += ["## Cite the paper", f"```bibtex\n{row.bibtex.strip()}\n```"]
    out += ["## Related", raw(_related(book, row, here))]
    related = [p for p in catalog.chapters()[row.chapter].papers if p.key != row.key]
    if related:
        out += ["## In the same chapter", raw(_papers_table(book, related, here))]
    return "\n\n".join(out) + "\n"


def _citation(book: Book, row: catalog.Paper, here: str) -> str:
    chapter = catalog.chapters()[row.chapter]
    places = []
    if row.chapter in book.chapters:
        anchor = row.key if row.key in book.chapters[row.chapter].labels else ""
        places.append(a(link(here, f"chapters/{row.chapter}", anchor), f"Read it in the chapter “{esc(chapter.title)}”", "dlatlas-go"))
    places.append(external(f"{book.repository}/blob/{book.branch}/{row.source}", "Source"))
    if (book.root / row.test).is_file():
        places.append(external(f"{book.repository}/blob/{book.branch}/{row.test}", "Tests"))
    return (
        '<div class="dlatlas-paper">'
        f'<p class="dlatlas-paper-title">{esc(row.title)}</p>'
        f'<p class="dlatlas-paper-authors">{esc(authors(row))}. ICLR 2018.</p>'
        f'<p class="dlatlas-paper-links">{" · ".join(filter(None, [paper_links(row), *places]))}</p></div>'
    )


def _measured(book: Book, row: catalog.Paper, claims: list[dict[str, Any]], here: str) -> str:
    if not claims:
        where = "its chapter is not in this build" if row.chapter not in book.chapters else "its chapter makes no claim for it"
        return f'<p class="dlatlas-none">Nothing yet: {where}.</p>'
    cards = []
    for record in claims:
        notes = [
            f"measured with the {esc(str(record['profile']))} profile, seed {record['seed']}, in {_scale(book, record)}; "
            + a(link(here, f"chapters/{row.chapter}", f"claim-{record['id']}"), "see the cell that measured it")
        ]
        if over := book.seeds_of(record):
            notes.append(f"held on {over[0]} of {over[1]} seeds")
        if full := book.full_of(record):
            numbers = ", ".join(f"{k} {figure(v)}" for k, v in full["claim"]["values"].items())
            notes.append(f"full profile on {esc(str(full.get('device', 'unknown device')))}: {verdict(full['claim'])} ({esc(numbers)})")
        # The card ends with </div>; what is known beyond its own cell goes inside.
        card = Claim(record)._repr_html_().removesuffix("</div>")
        cards.append(card + "".join(f"<p class='dlatlas-note'>{_sentence(note)}</p>" for note in notes) + "</div>")
    return "\n".join(cards)


def _scale(book: Book, record: Mapping[str, Any]) -> str:
    """What was spent on all claims of the paper together: the scale beside that of the paper's own figures."""
    device = esc(str(record["device"]))
    spent = max(1.0, book.spent[record["chapter"], record["key"]])
    return f"{seconds(spent)} on {'one core' if device == 'cpu' else device} for all claims of the paper"


def _related(book: Book, row: catalog.Paper, here: str) -> str:
    """What the method builds on, what builds on it, the parts that it shares, and the papers that resemble it."""
    papers, own = catalog.papers(), book.relations[row.key]
    users = [key for key, other in book.relations.items() if row.key in other["builds"]]
    sharing = [key for key, other in book.relations.items() if key != row.key and set(other["parts"]) & set(own["parts"])]
    facts = {
        "Builds on": [method_link(book, papers[key], here) for key in own["builds"]],
        "Used by": [method_link(book, papers[key], here) for key in users],
        "Made with": [a(kit_link(f"dlatlas.{name}", here), name) for name in own["parts"]],
        "Shares these with": [method_link(book, papers[key], here) for key in sharing],
        "Described most alike": [method_link(book, other, here) for other in book.nearest[row.key]],
    }
    lines = [f"<dt>{name}</dt><dd>{', '.join(values)}</dd>" for name, values in facts.items() if values]
    return f'<dl class="dlatlas-related">{"".join(lines)}</dl>\n<p>{a(link(here, "map"), "See it on the map")}</p>'


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


def _api(name: str, module: docs.Module, level: int, label: str = "") -> str:
    """How to import the public names of a module, and their documentation; with `label`, each gets an anchor that begins so."""
    names = [entry.name for entry in module.entries]
    if not names:
        return f"```python\nimport {name}\n```"
    importing = f"from {name} import {', '.join(names)}"
    if len(importing) > docs.LINE:
        importing = f"from {name} import (\n" + "".join(f"    {entry},\n" for entry in names) + ")"
    out = [f"```python\n{importing}\n```"]
    for entry in module.entries:
        out += [f"({label}-{_slug(entry.name)})="] if label else []
        out += [f"{'#' * level} `{entry.name}`", _signature(entry)]
        if entry.doc:
            out.append(docs.to_myst(entry.doc, level=0))
        for member in entry.members:
            out += [f"{'#' * (level + 1)} `{entry.name}.{member.name}`", _signature(member)]
            if member.doc:
                out.append(docs.to_myst(member.doc, level=0))
    return "\n\n".join(out)


def _signature(entry: docs.Entry) -> str:
    # Not "python": a signature alone is no valid Python, and the highlighter would say so.
    return f"```{{code-block}} python\n:force:\n:class: dlatlas-signature\n\n{entry.signature}\n```"


def _papers_table(book: Book, rows: list[catalog.Paper], here: str) -> str:
    """A short table of papers: method, paper, state."""
    body = "".join(
        f'<tr><th scope="row">{method_link(book, row, here)}</th><td>{esc(row.title)}<br><span class="dlatlas-small">{esc(authors(row, 4))}</span></td>'
        f"<td>{_state(book, row)}</td></tr>"
        for row in rows
    )
    head = '<thead><tr><th scope="col">Method</th><th scope="col">Paper</th><th scope="col">State</th></tr></thead>'
    return f'<div class="dlatlas-scroll"><table class="dlatlas-table dlatlas-papers">{head}<tbody>{body}</tbody></table></div>'


def method_link(book: Book, row: catalog.Paper, here: str) -> str:
    """The method's name, linked to its page where it has one."""
    name = esc(row.method)
    return a(link(here, f"papers/{row.key}"), name) if row.key in book.implemented else name


def _state(book: Book, row: catalog.Paper) -> str:
    if row.key not in book.implemented:
        return '<span class="dlatlas-state">not built yet</span>'
    claims = book.claims_of(row.key)
    done = '<span class="dlatlas-state dlatlas-done">implemented</span>'
    return done + (f'<br><span class="dlatlas-small">{held(claims)}</span>' if claims else "")


# --- kits -------------------------------------------------------------------------------------------------------------


def kits(root: Path) -> dict[str, dict[str, Path]]:
    """The shared modules of each part by dotted name; under "shared" those of several parts."""
    found: dict[str, dict[str, Path]] = {}
    library = root / "lib" / "dlatlas"
    for slug in ("shared", *catalog.parts()):
        folder = library / "kit" if slug == "shared" else library / slug / "kit"
        modules = {
            ".".join(path.relative_to(library.parent).with_suffix("").parts).removesuffix(".__init__"): path
            for path in sorted(folder.rglob("*.py"))
            if not path.stem.startswith("_") or path.stem == "__init__"
        }
        if modules := {name: path for name, path in modules.items() if docs.read(path).entries}:
            found[slug] = modules
    return found


def _slug(name: str) -> str:
    # Anchors know no capitals, but a class `LeNet` and a function `lenet` may live side by side.
    return name.lower().replace("_", "-").strip("-") + ("" if name.islower() else "-class")


def _kit_label(module: str, name: str = "") -> str:
    return "-".join(["kit", *(part.replace("_", "-") for part in module.split(".")[1:]), *([_slug(name)] if name else [])])


def kit_link(module: str, here: str, name: str = "") -> str:
    """Where the page of a kit documents a module, or a name in it."""
    slug = module.split(".")[1]
    return link(here, f"kits/{'shared' if slug == 'kit' else slug}", _kit_label(module, name))


def _components(book: Book, row: catalog.Paper, here: str) -> str:
    """What the interface takes from the kits: base classes, networks and loops, each with its first sentence."""
    lines = []
    for module, names in components(book.root, row).items():
        entries = {entry.name: entry for entry in docs.read(book.root / f"lib/{module.replace('.', '/')}.py").entries}
        for name in names:
            if name in entries and (said := docs.first_paragraph(entries[name].doc)):
                sentence = re.split(r"(?<=[.:;])\s", " ".join(said.split()))[0].rstrip(".:;").replace("`", "")
                shown = "" if re.search(r"[$\\]", sentence) else f": {esc(sentence)}"
                lines.append(f"<li>{a(kit_link(module, here, name), name)}{shown}</li>")
    return f"<p>It is made with, and documented there:</p>\n<ul class=dlatlas-kit>{''.join(lines)}</ul>" if lines else ""


def kit_page(book: Book, slug: str, modules: Mapping[str, Path]) -> str:
    """The documentation of all shared modules of a part."""
    here = f"kits/{slug}"
    title = "Shared by several parts" if slug == "shared" else f"Shared in {catalog.parts()[slug].title}"
    out = [f"({here.replace('/', '-')}-page)=", f"# {docs.escape(title)}"]
    for name, path in modules.items():
        module, source = docs.read(path), path.relative_to(book.root).as_posix()
        users = [key for key in book.implemented if name.removeprefix("dlatlas.") in book.relations[key]["parts"]]
        out += [f"({_kit_label(name)})=", f"## `{name.removeprefix('dlatlas.')}`", docs.to_myst(module.doc, level=0)]
        if users:
            linked = ", ".join(method_link(book, catalog.papers()[key], here) for key in users)
            out.append(raw(f"<p class=dlatlas-small>Used by {linked}.</p>"))
        out += [
            _api(name, module, 3, _kit_label(name)),
            f"::::{{dropdown}} Source: `{source}`, {module.lines} lines\n:class-container: dlatlas-source\n\n"
            f"```{{literalinclude}} /{source}\n:language: python\n:linenos:\n```\n::::",
        ]
    return "\n\n".join(out) + "\n"


# --- parts ------------------------------------------------------------------------------------------------------------


def part_page(book: Book, part: catalog.Part) -> str:
    """The chapters of a part, with their papers."""
    here = f"parts/{part.slug}"
    out = [f"(part-{part.slug})=", f"# {docs.escape(part.title)}"]
    if intro := part_intro(book.root, part):
        out.append(intro)
    for chapter in part.chapters:
        executed = book.chapters.get(chapter.id)
        out.append(f"## {docs.escape(chapter.title)}")
        if executed:
            lines = [f"<p class=dlatlas-question>{esc(executed.question)}</p>"] if executed.question else []
            facts = [count(len(chapter.papers), "paper"), held(list(executed.claims))]
            if executed.record.get("seconds"):
                facts.append(f"runs in {seconds(executed.record['seconds'])}")
            lines.append(
                f"<p>{a(link(here, executed.page), 'Read the chapter', 'dlatlas-go')} <span class=dlatlas-small>{' · '.join(facts)}</span></p>"
            )
        else:
            lines = [
                f"<p><span class=dlatlas-state>not built yet</span> <span class=dlatlas-small>{count(len(chapter.papers), 'paper')}</span></p>"
            ]
        out.append(raw("\n".join(lines) + "\n" + _papers_table(book, chapter.papers, here)))
    if part.slug in kits(book.root):
        shared = a(link(here, f"kits/{part.slug}"), "networks, loops, data and scores that these methods share", "dlatlas-go")
        out.append(raw(f"<p>Documentation of the {shared}</p>"))
    return "\n\n".join(out) + "\n"


def part_intro(root: Path, part: catalog.Part) -> str:
    """The hand-written paragraph that opens a part."""
    path = root / "book" / "parts" / f"{part.slug}.md"
    return path.read_text(encoding="utf-8").strip() if path.is_file() else ""


def part_cards(book: Book) -> str:
    """The parts as a grid of cards, in MyST."""
    cards = []
    for part in catalog.parts().values():
        papers = [p for p in catalog.papers().values() if p.part == part.slug]
        built = sum(p.key in book.implemented for p in papers)
        intro = part_intro(book.root, part).split("\n\n")[0]
        footer = f"{count(len(part.chapters), 'chapter')} · {built} of {count(len(papers), 'paper')}"
        cards.append(
            f":::{{grid-item-card}} {docs.escape(part.title)}\n:link: /parts/{part.slug}\n:link-type: doc\n:class-card: dlatlas-part\n\n"
            f"{intro}\n\n*{footer}*\n:::"
        )
    return "::::{grid} 1 1 2 2\n:gutter: 3\n\n" + "\n\n".join(cards) + "\n::::"


# --- ledger -----------------------------------------------------------------------------------------------------------

LEDGER_COLUMNS = ("part", "chapter", "key", "paper", "id", "claim", "criterion", "measured", "null", "holds", "expected", "why", "reported")
LEDGER_COLUMNS += ("paper_seconds", "profile", "seed", "device", "seeds_held", "seeds_run", "page")


def ledger_rows(book: Book) -> list[dict[str, Any]]:
    """One flat row per claim, for the table and the downloads."""
    rows = []
    for row in book.claims:
        paper = catalog.papers().get(row["key"])
        over = book.seeds_of(row)
        rows.append(
            {
                "part": catalog.chapters()[row["chapter"]].part,
                "chapter": row["chapter"],
                "key": row["key"],
                "paper": paper.title if paper else row["key"],
                "id": row["id"],
                "claim": row["text"],
                "criterion": row["criterion"],
                "measured": row["values"],
                "null": row["null"],
                **{k: row.get(k) for k in ("holds", "expected", "why", "reported", "profile", "seed", "device")},
                "paper_seconds": round(book.spent[row["chapter"], row["key"]], 1),
                "seeds_held": over[0] if over else None,
                "seeds_run": over[1] if over else None,
                "page": f"chapters/{row['chapter']}.html#claim-{row['id']}",
            }
        )
    return rows


def ledger_csv(rows: list[dict[str, Any]]) -> str:
    """The ledger as CSV; the measured numbers are JSON in their column."""
    out = io.StringIO()
    writer = csv.DictWriter(out, LEDGER_COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: json.dumps(v, ensure_ascii=False) if isinstance(v, dict) else v for k, v in row.items()})
    return out.getvalue()


def ledger_page(book: Book) -> str:
    """Every claim of the book in one table."""
    rows = book.claims
    out = [WIDE + "(ledger)=\n# Ledger of claims"]
    n = Counter((row["holds"], row["expected"]) for row in rows)
    out.append(
        "Every claim that a chapter makes, as it was decided when the chapter last ran. A claim is a sentence with a criterion over measured "
        "numbers; the *null* is what was measured in the method's place, and the criterion must fail under it. "
        "{doc}`How to read a verdict </how-to-read>` says more."
    )
    if not rows:
        out.append("No chapter of this build makes a claim yet.")
        return "\n\n".join(out) + "\n"
    papers = len({row["key"] for row in rows})
    facts = [
        f"<strong>{count(len(rows), 'claim')}</strong> of {count(papers, 'paper')}",
        f'<span class="dlatlas-verdict dlatlas-holds">{n[True, True] + n[True, False]} hold</span>',
        f'<span class="dlatlas-verdict dlatlas-fails">{n[False, False] + n[False, True]} do not hold</span>'
        + (f" ({n[False, False]} of them known not to at this scale)" if n[False, False] else ""),
        f"{esc(book.profile)} profile",
    ]
    if surprises := n[True, False] + n[False, True]:
        facts.append(f"{surprises} against expectation")
    downloads = 'Download: <a href="ledger.csv" download>CSV</a> · <a href="ledger.json" download>JSON</a>'
    parts = [(slug, part.title) for slug, part in catalog.parts().items() if any(r["chapter"].startswith(f"{slug}/") for r in rows)]
    head = "".join(f'<th scope="col">{name}</th>' for name in ("Claim", "Verdict", "Measured", "Null", "Paper", "Chapter", "Profile"))
    body = "\n".join(_ledger_row(book, row) for row in rows)
    table = (
        f'<div class="dlatlas-scroll"><table class="dlatlas-table dlatlas-sortable" id="ledger-table"><thead><tr>{head}</tr></thead>'
        f"<tbody>\n{body}\n</tbody></table></div>"
    )
    menus = {
        "part": ("Part", parts),
        "verdict": ("Verdict", [("holds", "holds"), ("fails", "does not hold")]),
    }
    out.append(
        raw(
            f'<p class="dlatlas-facts">{" · ".join(facts)}</p>\n<p class="dlatlas-facts">{downloads}</p>\n'
            f"{filters('ledger-table', text='Search the claims', choices=menus)}\n{table}"
        )
    )
    return "\n\n".join(out) + "\n"


def _ledger_row(book: Book, row: dict[str, Any]) -> str:
    paper = catalog.papers().get(row["key"])
    chapter = catalog.chapters()[row["chapter"]]
    part = catalog.parts()[chapter.part]
    numbers = "".join(f"<div><code>{esc(k)}</code> {figure(v)}</div>" for k, v in row["values"].items())
    null = "".join(f"<div><code>{esc(k)}</code> {figure(v)}</div>" for k, v in row["null"].items())
    expected = (
        ""
        if row["holds"] == row["expected"] and row["holds"]
        else f'<div class="dlatlas-small">expected: {"holds" if row["expected"] else "does not hold"}</div>'
    )
    over = book.seeds_of(row)
    seeds = f'<div class="dlatlas-small">{over[0]} of {over[1]} seeds</div>' if over else ""
    full = book.full_of(row)
    more = f'<div class="dlatlas-small">full: {verdict(full["claim"])}</div>' if full else ""
    name = method_link(book, paper, "ledger") if paper else esc(row["key"])
    title = f'<div class="dlatlas-small">{esc(paper.title)}</div>' if paper else ""
    cell = link("ledger", f"chapters/{chapter.id}", f"claim-{row['id']}")
    reported = f'<div class="dlatlas-small">The paper reports: {esc(row["reported"])}</div>' if row.get("reported") else ""
    scale = f'<div class="dlatlas-small">Here: {_scale(book, row)}</div>'
    return (
        data_row(part=part.slug, verdict="holds" if row["holds"] else "fails")
        + f'<td class="dlatlas-claim-text">{a(cell, esc(row["text"]))}'
        f'<div class="dlatlas-small"><code>{esc(row["criterion"])}</code></div>{reported}{scale}</td>'
        f'<td>{verdict(row)}{expected}{seeds}{more}</td><td class="dlatlas-numbers">{numbers}</td><td class="dlatlas-numbers">{null}</td>'
        f"<td>{name}{title}</td><td>{a(link('ledger', f'chapters/{chapter.id}'), esc(chapter.title))}<div class='dlatlas-small'>{esc(part.title)}</div></td>"
        f"<td>{esc(str(row['profile']))}<div class='dlatlas-small'>seed {row['seed']}, {esc(str(row['device']))}</div></td></tr>"
    )


# --- arenas -----------------------------------------------------------------------------------------------------------


def arenas_page(book: Book) -> str:
    """The comparisons of all methods of a chapter, gathered."""
    out = [
        WIDE + "(arenas)=\n# Arenas",
        "Every chapter ends by putting its methods side by side: the same data, the same budget, one table. Here they all are. A figure with ± is "
        "the mean and the standard deviation over paired runs. What a table does and does not show is said beside it in its chapter.",
    ]
    for chapter in book.chapters.values():
        tables = [table for table in chapter.tables if table["name"] == "side-by-side"]
        if tables:
            out.append(f"## {docs.escape(chapter.chapter.title)}")
            facts = [a(link("arenas", chapter.page), "Read the chapter", "dlatlas-go"), f"{esc(book.profile)} profile"]
            markup = [f"<p class=dlatlas-question>{esc(chapter.question)}</p>", f"<p class=dlatlas-facts>{' · '.join(facts)}</p>"]
            out.append(raw("\n".join(markup + [html_table(t["columns"], t["rows"], t["caption"]) for t in tables])))
    if len(out) == 2:
        out.append("No chapter of this build has one yet.")
    return "\n\n".join(out) + "\n"


# --- peers ------------------------------------------------------------------------------------------------------------


def peers_page(book: Book) -> str:
    """The comparisons with other libraries, measured while the site is built."""
    rows = [
        f'<tr><th scope="row">{method_link(book, catalog.papers()[peer.key], "peers")}</th><td>{esc(peer.what)}</td><td><code>{esc(peer.peer)}</code></td>'
        f'<td class="dlatlas-numbers">{figure(difference) if difference else "0"}</td><td class="dlatlas-numbers">{figure(peer.tolerance) if peer.tolerance else "0"}</td>'
        f"<td>{esc(peer.reason)}</td></tr>"
        for peer, difference in peers.measure()
    ]
    names = ("Method", "What is compared", "Peer", "Largest difference", "Allowed", "Why they differ")
    head = "".join(f'<th scope="col">{name}</th>' for name in names)
    table = f'<table class="dlatlas-table dlatlas-sortable"><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
    text = (
        "Where a well-kept library has the same method, or a piece of it, both were given the same input in double precision while this site was built. "
        "The largest absolute difference is below; the tests fail when it exceeds what is allowed, which leaves room for other versions and processors. "
        "Some of these methods have their page already and their chapter later."
    )
    return "\n\n".join([WIDE + "(peers)=\n# Beside other libraries", text, raw(f'<div class="dlatlas-scroll">{table}</div>')]) + "\n"


# --- status and bibliography ------------------------------------------------------------------------------------------


def status_page(book: Book) -> str:
    """All papers, grouped by part and chapter, with what has been built."""
    total, done = len(catalog.papers()), len(book.implemented)
    out = [
        WIDE + "(status)=\n# All papers",
        f"The atlas covers {total} papers of ICLR 2018. {done} of them are implemented in this build; the others are listed with "
        "the chapter that will hold them.",
    ]
    states = [("implemented", f"implemented ({done})"), ("planned", f"not built yet ({total - done})")]
    parts = [(slug, part.title) for slug, part in catalog.parts().items()]
    out.append(
        raw(filters("status-table", text="Search methods, titles, authors", choices={"part": ("Part", parts), "state": ("State", states)}))
    )
    bodies = []
    head = "".join(f'<th scope="col">{name}</th>' for name in ("Method", "Paper", "State", "Links"))
    for part in catalog.parts().values():
        for chapter in part.chapters:
            name = esc(chapter.title)
            if chapter.id in book.chapters:
                name = a(link("status", f"chapters/{chapter.id}"), name)
            rows = "\n".join(_status_row(book, p) for p in chapter.papers)
            title = f'<tr class="dlatlas-group"><th colspan="4" scope="colgroup">{a(link("status", f"parts/{part.slug}"), esc(part.title))} › {name}</th></tr>'
            bodies.append(f"<tbody>{title}\n{rows}</tbody>")
    out.append(
        raw(
            '<div class="dlatlas-scroll"><table class="dlatlas-table dlatlas-status" id="status-table">'
            f"<thead><tr>{head}</tr></thead>\n" + "\n".join(bodies) + "</table></div>"
        )
    )
    return "\n\n".join(out) + "\n"


def _status_row(book: Book, row: catalog.Paper) -> str:
    return (
        data_row(part=row.part, state="implemented" if row.key in book.implemented else "planned")
        + f'<th scope="row" id="{row.key}">{method_link(book, row, "status")}</th>'
        f'<td>{esc(row.title)}<div class="dlatlas-small">{esc(authors(row, 6))}</div></td><td>{_state(book, row)}</td><td>{paper_links(row)}</td></tr>'
    )


def bibliography_page() -> str:
    """All papers as a bibliography that chapters can cite from."""
    return (
        "(bibliography)=\n# Bibliography\n\n"
        'All papers of the atlas. Their entries are in <a href="references.bib" download>references.bib</a>; a paper\'s own page has its entry alone.\n\n'
        "```{bibliography}\n:all:\n:style: plain\n```\n"
    )


# --- everything together ----------------------------------------------------------------------------------------------


def generate(book: Book, skeleton: dict[str, Any]) -> dict[str, str]:
    """All generated files by path below the staged source."""
    out = {f"papers/{key}.md": paper_page(book, row) for key, row in book.implemented.items()}
    out |= {f"parts/{slug}.md": part_page(book, part) for slug, part in catalog.parts().items()}
    out |= {f"kits/{slug}.md": kit_page(book, slug, modules) for slug, modules in kits(book.root).items()}
    return out | {
        "ledger.md": ledger_page(book),
        "arenas.md": arenas_page(book),
        "peers.md": peers_page(book),
        "status.md": status_page(book),
        "bibliography.md": bibliography_page(),
        "references.bib": catalog.references_bib(),
        "atlas.json": json.dumps(extension_data(book, skeleton), indent=1, ensure_ascii=False) + "\n",
    }


def toc(book: Book, skeleton: dict[str, Any]) -> dict[str, Any]:
    """The whole table of contents: the hand-written pages of `skeleton` first, then the atlas, then the reference pages.

    The parts are pages whose children are their chapters, whose children
    are their papers; papers of chapters that are not in this build are children of their part.
    """
    atlas, shared = [], kits(book.root)
    for slug, part in catalog.parts().items():
        sections: list[dict[str, Any]] = []
        for chapter in part.chapters:
            papers = [{"file": f"papers/{p.key}"} for p in chapter.papers if p.key in book.implemented]
            if chapter.id in book.chapters:
                sections.append({"file": f"chapters/{chapter.id}", **({"sections": papers} if papers else {})})
            else:
                sections += papers
        if slug in shared:
            sections.append({"file": f"kits/{slug}"})
        atlas.append({"file": f"parts/{slug}", **({"sections": sections} if sections else {})})
    reference = [{"file": name} for name in (*REFERENCE, *(["kits/shared"] if "shared" in shared else []))]
    return {
        "format": "jb-book",
        "root": skeleton["root"],
        "parts": [
            *skeleton["parts"],
            {"caption": "The atlas", "chapters": atlas},
            {"caption": "Reference", "chapters": reference},
        ],
    }


def extension_data(book: Book, skeleton: dict[str, Any]) -> dict[str, Any]:
    """What the Sphinx extension needs to know."""
    pages: dict[str, dict[str, Any]] = {}
    front = [skeleton["root"], *(entry["file"] for part in skeleton["parts"] for entry in part["chapters"])]
    order = list(front)
    for page in front:
        pages[page] = {"source": f"book/{page}.md"}
    for slug, part in catalog.parts().items():
        pages[f"parts/{slug}"] = {"source": f"book/parts/{slug}.md"}
        order.append(f"parts/{slug}")
        for chapter in part.chapters:
            papers = [f"papers/{p.key}" for p in chapter.papers if p.key in book.implemented]
            home = f"chapters/{chapter.id}" if chapter.id in book.chapters else f"parts/{slug}"
            if chapter.id in book.chapters:
                order.append(home)
                pages[home] = _chapter_data(book.chapters[chapter.id])
            for before, page, after in zip([home, *papers], papers, [*papers[1:], None]):
                source = catalog.papers()[page.removeprefix("papers/")].source
                pages[page] = {"source": source, "prev": before, **({"next": after} if after else {}), "up": home}
    # Ledger and arenas have no source of their own: they are gathered from the chapters.
    pages |= {name: {"source": "lib/dlatlas/catalog.yml"} for name in ("map", "status", "bibliography")}
    pages["tracks"] = {"source": "book/tracks.yml"}
    for slug in kits(book.root):
        folder = "lib/dlatlas/kit" if slug == "shared" else f"lib/dlatlas/{slug}/kit"
        pages[f"kits/{slug}"] = {"source": f"{folder}/__init__.py", "up": "status" if slug == "shared" else f"parts/{slug}"}
    order += REFERENCE
    for before, page, after in zip([None, *order], order, [*order[1:], None]):
        pages.setdefault(page, {})
        pages[page] |= {"prev": before, "next": after}
    for page in pages.values():
        # After the last paper of a chapter the reader goes on to the next chapter.
        if "up" in page and "next" not in page:
            page["next"] = pages[page["up"]].get("next")
    papers = {
        key: {"claims": len(rows), "holding": sum(row["holds"] for row in rows)}
        for key in book.implemented
        for rows in [book.claims_of(key)]
    }
    return {
        "pages": pages,
        "papers": papers,
        "build": build_record(book),
        "repository": {"url": book.repository, "branch": book.branch},
    }


def _chapter_data(executed: Executed) -> dict[str, Any]:
    record = executed.record
    return {
        "source": f"{executed.page}.md",
        "notebook": f"{executed.page}.ipynb",
        "prerequisites": list(executed.prerequisites),
        "papers": len(executed.chapter.papers),
        "claims": held(list(executed.claims)),
        "reading": minutes(executed.words),
        "record": {k: record.get(k) for k in ("parameters", "commit", "date", "seconds", "versions")} | _machine(record),
    }


def _machine(record: Mapping[str, Any]) -> dict[str, Any]:
    used = record.get("used", {})
    return {"device": used.get("device"), "peak_mb": used.get("peak_mb")}


def build_record(book: Book) -> dict[str, Any]:
    """Provenance of the generated pages: this build, and the chapters that it shows."""
    records = [chapter.record for chapter in book.chapters.values()]
    return {
        **book.build,
        "profile": book.profile,
        "seeds": sorted({r.get("parameters", {}).get("seed") for r in records} - {None}),
        "devices": sorted({_machine(r)["device"] for r in records} - {None}),
        "seconds": round(sum(r.get("seconds") or 0 for r in records), 1),
        "chapters": len(records),
    }
