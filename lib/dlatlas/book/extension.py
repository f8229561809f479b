"""The Sphinx extension of the site: the ``{paper}`` directive, buttons that lead to real files, provenance under every page.

What it knows of the book it reads from ``atlas.json`` in the staged sources, which :mod:`dlatlas.book.site` writes.
"""

from __future__ import annotations

import datetime
import html
import json
import os
import re
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from dlatlas import catalog
from dlatlas.book.pages import a, authors, esc, exercises_file, external, link, paper_links, seconds

AFTER_THE_THEME = 900


class PaperDirective(SphinxDirective):
    """```` ```{paper} key ```` : title, authors and links of a paper, and the way to its own page."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        key = self.arguments[0]
        if key not in catalog.papers():
            raise self.error(f"no paper {key!r} in the catalogue{catalog.suggestion(key)}")
        row = catalog.papers()[key]
        links = [paper_links(row)]
        if f"papers/{key}" in self.env.found_docs:
            links.append(
                a(link(self.env.docname, f"papers/{key}"), f"<code>{esc(row.module)}</code>: reference, source, all figures", "dlatlas-go")
            )
        markup = (
            f'<div class="dlatlas-paper"><p class="dlatlas-paper-title">{esc(row.title)}</p>'
            f'<p class="dlatlas-paper-authors">{esc(authors(row))}. ICLR 2018.</p>'
            f'<p class="dlatlas-paper-links">{" · ".join(filter(None, links))}</p></div>'
        )
        return [nodes.raw("", markup, format="html")]


def _assets(app: Sphinx, config: Any) -> None:
    # Not in _config.yml: Jupyter Book would add every script that it finds there to every page, MathJax a second time.
    config.html_static_path.append("_assets")


def _load(app: Sphinx) -> None:
    app.atlas = json.loads((Path(app.srcdir) / "atlas.json").read_text(encoding="utf-8"))


def _context(app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: nodes.document | None) -> None:
    known = app.atlas["pages"].get(page, {})
    _buttons(app, known, context)
    # Live cells would need a server of somebody else's; their script is even declared twice, which is an error in the browser.
    context["script_files"] = [
        file for file in context["script_files"] if "thebe" not in f"{file} {getattr(file, 'attributes', '')}".lower()
    ]
    for name in ("prev", "next"):
        if (to := known.get(name)) and to in app.env.titles:
            title = html.escape(app.env.titles[to].astext())
            context[name] = {"link": context["pathto"](to), "title": title}
        else:
            context[name] = None
    if doctree is None:  # search and index
        return
    body = context["body"]
    if "record" in known:
        body = body.replace("</h1>", f"</h1>\n{_facts(app, page, known)}", 1)
    context["body"] = body + _provenance(app, known)


def _buttons(app: Sphinx, known: dict[str, Any], context: dict[str, Any]) -> None:
    """Edit and source open the file that a page is written in; Colab the executed notebook; Binder the text, through jupytext."""
    repository = app.atlas["repository"]
    source = known.get("source")
    kept = []
    for button in context.get("header_buttons", []):
        inner = button.get("buttons", [])
        for entry in list(inner):
            label, url = entry.get("label", ""), entry.get("url", "")
            if label in {"source-file-button", "source-edit-button"}:
                if not source:
                    inner.remove(entry)
                    continue
                verb, tail = ("edit", "") if label == "source-edit-button" else ("blob", "?plain=1")
                entry["url"] = f"{repository['url']}/{verb}/{repository['branch']}/{source}{tail}"
            elif "colab." in url:
                owner = repository["url"].removeprefix("https://github.com/")
                entry["url"] = f"https://colab.research.google.com/github/{owner}/blob/notebooks/{known['notebook']}"
            elif "mybinder." in url:
                entry["url"] = url.replace(".ipynb", ".md")
        if inner or "buttons" not in button:
            kept.append(button)
    context["header_buttons"] = kept


def _facts(app: Sphinx, page: str, known: dict[str, Any]) -> str:
    """The line under a chapter's title."""
    facts = [f"{known['papers']} papers", known["claims"], f"{known['reading']} to read", f"runs in {seconds(known['record']['seconds'])}"]
    if known["prerequisites"]:
        titles = catalog.chapters()
        names = [
            a(link(page, f"chapters/{name}"), esc(titles[name].title))
            if f"chapters/{name}" in app.env.found_docs
            else esc(titles[name].title)
            for name in known["prerequisites"]
        ]
        facts.append("read before: " + ", ".join(names))
    notebook = os.path.relpath(exercises_file(page.removeprefix("chapters/")), os.path.dirname(page))
    facts.append(f'<a href="{esc(notebook)}" download>notebook without solutions</a>')
    return f'<p class="dlatlas-facts">{" · ".join(facts)}</p>'


def _provenance(app: Sphinx, known: dict[str, Any]) -> str:
    """Commit, profile, seed, versions, device, seconds and date."""
    build, record = app.atlas["build"], known.get("record")
    repository = app.atlas["repository"]["url"]
    shown = datetime.datetime.now(datetime.UTC).date().isoformat()
    if record:
        parts = [
            f"Executed {esc(record['date'][:10])} from {_revision(repository, record['commit'])}",
            f"{record['parameters']['profile']} profile, seed {record['parameters']['seed']}",
            f"{record['seconds']:.0f} s on {esc(str(record['device']))}, at most {record['peak_mb']:,} MB",
            esc(", ".join(f"{name} {version}" for name, version in record["versions"].items())),
        ]
    else:
        seeds = ", ".join(map(str, build["seeds"])) or "none"
        parts = [
            f"Built {shown} from {_revision(repository, build['commit'])}",
            f"{build['profile']} profile, {build['chapters']} executed {'chapter' if build['chapters'] == 1 else 'chapters'}, seed {seeds}",
            f"{build['seconds']:.0f} s on {esc(', '.join(build['devices']) or 'no device')}",
            esc(", ".join(f"{name} {version}" for name, version in build["versions"].items())),
        ]
    return f'<footer class="dlatlas-provenance">{" · ".join(parts)}</footer>'


def _revision(repository: str, commit: str) -> str:
    if not commit:
        return "a copy without history"
    clean = commit.removesuffix("+")
    return external(f"{repository}/commit/{clean}", f"commit {clean}") + (" with local changes" if commit != clean else "")


def _accessible(app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: nodes.document | None) -> None:
    """What scrolls sideways can be reached with the keyboard; the bibliography is no list, as its entries are none."""
    if doctree is not None:
        context["body"] = context["body"].replace('<div role="list" class="citation-list">', '<div class="citation-list">')
        context["body"] = re.sub(r"""<div class=(['"])dlatlas-scroll\1>""", '<div class="dlatlas-scroll" tabindex="0">', context["body"])


def setup(app: Sphinx) -> dict[str, Any]:
    """Called by Sphinx."""
    app.add_directive("paper", PaperDirective)
    app.connect("config-inited", _assets)
    app.connect("builder-inited", _load)
    app.connect("html-page-context", _context, priority=AFTER_THE_THEME)
    app.connect("html-page-context", _accessible, priority=AFTER_THE_THEME + 1)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
