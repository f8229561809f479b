"""Build the site from the executed chapters: stage every page, run Jupyter Book with warnings as errors, check the links.

Sources of the pages go to ``_build/<profile>/src`` at the paths that they have in the site: executed notebooks (the
runner put them there), hand-written pages of ``book/``, generated pages, and the library, which the pages quote.

    python -m dlatlas.book.site --notebooks DIR               # export the executed notebooks as Colab opens them
    python -m dlatlas.book.site --notebooks DIR --student     # for a course: no outputs, no solutions
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import yaml

from dlatlas import catalog
from dlatlas.book import atlas_map, execute, ledger, pages, portable, tracks
from dlatlas.book.pages import Book, SiteError
from dlatlas.book.probe import LIBRARY

__all__ = ["SiteError", "build", "notebooks"]

MATHJAX = "sphinx-mathjax-offline"
# One component with every TeX extension, and its fonts: 1.7 MB of the package's 24.
MATHJAX_FILES = re.compile(r"static/mathjax/(tex-chtml-full\.js|output/chtml/fonts/woff-v2/.+\.woff)$")
QUOTED = re.compile(r"\{literalinclude\} /(lib/dlatlas/[\w/]+\.\w+)")
STATIC = Path(__file__).with_name("static")
PACKAGES = ("dlatlas", "torch", "jupyter-book", "sphinx", "papermill")


def build(root: Path, profile: str = "quick") -> Path:
    """The index page of the finished site; nothing is done when no page, setting or piece of machinery changed.

    Raises:
        SiteError: a warning of Sphinx, a link that leads nowhere, or a request to another host.
    """
    base = root / "_build" / profile
    source, html = base / "src", base / "_build" / "html"
    config = _config(root)
    book = _read(root, source, profile, config)
    staged = _stage(book, source)
    stamp, mark = base / "site.sha256", _digest(staged, [root / "_config.yml", *Path(__file__).parent.glob("*.py")])
    index = html / "index.html"
    if index.is_file() and stamp.is_file() and stamp.read_text() == mark:
        return index
    stamp.unlink(missing_ok=True)
    shutil.rmtree(base / "_build", ignore_errors=True)
    _sphinx(root, source, base)
    for name, content in _downloads(book, source).items():
        execute.write_atomically(html / name, content)
    if faults := list(faults_of(html)):
        raise SiteError("the site has faults:\n  " + "\n  ".join(faults[:40]))
    stamp.write_text(mark)
    return index


def _config(root: Path) -> dict:
    return yaml.safe_load((root / "_config.yml").read_text(encoding="utf-8"))


def _read(root: Path, source: Path, profile: str, config: dict) -> Book:
    chapters = [name for name in execute.sources(root) if (source / "chapters" / f"{name}.ipynb").is_file()]
    record = {"commit": execute.commit(root), "versions": {name: importlib.metadata.version(name) for name in PACKAGES}}
    repository = config["repository"]
    return Book.read(root, source, chapters, profile=profile, repository=repository["url"], branch=repository["branch"], build=record)


# --- staging ----------------------------------------------------------------------------------------------------------


def _stage(book: Book, source: Path) -> dict[str, str]:
    """Write all sources, remove those of an earlier build that are gone, and return the digest of each."""
    skeleton = yaml.safe_load((book.root / "book" / "_toc.yml").read_text(encoding="utf-8"))
    files: dict[str, bytes] = {name: text.encode() for name, text in pages.generate(book, skeleton).items()}
    files["tracks.md"] = tracks.tracks_page(book).encode()
    files["map.md"] = atlas_map.map_page(book).encode()
    files["_toc.yml"] = yaml.safe_dump(pages.toc(book, skeleton), sort_keys=False, allow_unicode=True).encode()
    for path in sorted((book.root / "book").glob("*.md")):
        files[path.name] = _fill(path, book).encode()
    for path in sorted(STATIC.iterdir()):
        files[f"_static/{path.name}"] = path.read_bytes()
    for name, path in _mathjax():
        files[f"_assets/mathjax/{name}"] = path.read_bytes()
    notebooks = {f"chapters/{name}.ipynb" for name in book.chapters}
    texts = [
        *(content.decode() for name, content in files.items() if name.endswith(".md")),
        *((source / name).read_text() for name in notebooks),
    ]
    for name in sorted({name for text in texts for name in QUOTED.findall(text)}):
        if (LIBRARY.parents[1] / name).is_file():  # of a file that is not there Sphinx says so
            files[name] = (LIBRARY.parents[1] / name).read_bytes()
    for path in source.rglob("*"):
        name = str(path.relative_to(source))
        if path.is_file() and name not in files and name not in notebooks and ".failed" not in name:
            path.unlink()
    for name, content in files.items():
        target = source / name
        if not target.is_file() or target.read_bytes() != content:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    return digests | {name: hashlib.sha256((source / name).read_bytes()).hexdigest() for name in notebooks}


def _fill(path: Path, book: Book) -> str:
    """A hand-written page with its ``{{ name }}`` replaced by what is counted or generated."""
    known = {name: str(value) for name, value in book.numbers.items()} | {"part-cards": pages.part_cards(book)}

    def value(match: re.Match[str]) -> str:
        if match[1] not in known:
            raise SiteError(f"{path}: unknown {match[0]}; known are {', '.join(known)}")
        return known[match[1]]

    return re.sub(r"\{\{ ([a-z-]+) \}\}", value, path.read_text(encoding="utf-8"))


def _mathjax() -> Iterator[tuple[str, Path]]:
    files = importlib.metadata.files(MATHJAX) or []
    found = [(match.string.split("static/mathjax/")[1], Path(str(f.locate()))) for f in files if (match := MATHJAX_FILES.search(str(f)))]
    if not found:
        raise SiteError(f"the package {MATHJAX} holds no MathJax; install it again: pip install --force-reinstall {MATHJAX}")
    return iter(found)


def _downloads(book: Book, source: Path) -> dict[str, str]:
    """Files beside the pages, for readers to download."""
    rows = pages.ledger_rows(book)
    exercises = {
        pages.exercises_file(chapter): _installing(
            portable.without_solutions(ledger.load(source / "chapters" / f"{chapter}.ipynb")), book.repository
        )
        for chapter in book.chapters
    }
    return exercises | {
        "references.bib": catalog.references_bib(),
        "ledger.json": json.dumps(rows, indent=1, ensure_ascii=False) + "\n",
        "ledger.csv": pages.ledger_csv(rows),
    }


def _digest(staged: dict[str, str], machinery: Iterable[Path]) -> str:
    parts = [f"{name} {digest}" for name, digest in sorted(staged.items())]
    parts += [hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(machinery)]
    parts += [f"{name} {importlib.metadata.version(name)}" for name in PACKAGES]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


# --- Sphinx -----------------------------------------------------------------------------------------------------------


def _sphinx(root: Path, source: Path, base: Path) -> None:
    command = [
        sys.executable,
        "-c",
        "from jupyter_book.cli.main import main; main()",
        "build",
        str(source),
        "--config",
        str(root / "_config.yml"),
    ]
    command += ["--toc", str(source / "_toc.yml"), "--path-output", str(base), "-W", "-n", "--keep-going", "--all", "-q"]
    # Deprecations of Jupyter Book's own dependencies are not ours to mend; Sphinx's warnings do not go through this filter.
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", env=environment)
    if done.returncode == 0 and (base / "_build" / "html" / "index.html").is_file():
        return
    output = re.sub(r"\x1b\[[0-9;]*m", "", done.stdout + "\n" + done.stderr)
    (base / "sphinx.log").write_text(output, encoding="utf-8")
    told = [line for line in output.splitlines() if re.search(r"WARNING|ERROR|[Ee]rror:", line)]
    raise SiteError(
        "Sphinx did not accept the pages:\n  "
        + "\n  ".join(told[:40] or output.splitlines()[-5:])
        + f"\n  all of it: {base / 'sphinx.log'}"
    )


# --- checks on the finished site --------------------------------------------------------------------------------------


class _Page(HTMLParser):
    """Ids, links and loaded resources of one page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.ids.update(given[name] for name in ("id", "name") if name in given)
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        elif tag == "link" and given.get("rel") not in {"canonical", "next", "prev"}:
            self.loads.append(given.get("href", ""))
        elif tag in {"script", "img", "iframe", "source", "video", "audio"}:
            self.loads.append(given.get("src", ""))


def faults_of(html: Path) -> Iterator[str]:
    """Links that lead nowhere, resources of other hosts, and markup that was not understood, in every page below `html`."""
    texts = {path: path.read_text(encoding="utf-8") for path in sorted(html.rglob("*.html")) if "_static" not in path.parts}
    parsed = {path: _Page(text) for path, text in texts.items()}
    for path, page in parsed.items():
        where = path.relative_to(html)
        if directive := re.search(r"(`{3,}|:{3,})\{[\w:-]+\}[^\n]*", texts[path]):
            yield f"{where} shows {directive[0]} as text: a fence around it was not understood"
        for address in page.loads:
            if re.match(r"(https?:)?//", address):
                yield f"{where} loads {address} from another host"
        for address in {*page.links, *page.loads}:
            if re.match(r"[a-z]+:|//", address) or address in {"", "#"}:
                continue
            file, _, anchor = address.partition("#")
            target = (path.parent / unquote(file.partition("?")[0])).resolve() if file else path
            if not target.exists():
                yield f"{where} links to {address}, which does not exist"
            elif anchor and target in parsed and unquote(anchor) not in parsed[target].ids:
                yield f"{where} links to {address}: no such place on that page"


# --- notebooks for Colab ----------------------------------------------------------------------------------------------


def notebooks(root: Path, out: Path, profile: str = "quick", *, student: bool = False) -> list[Path]:
    """Write the executed notebooks to ``out/chapters/...``, in plain Markdown, with a first cell that installs the library.

    With `student` they have neither outputs nor solutions.
    """
    form = portable.without_solutions if student else portable.notebook
    written = []
    for name in execute.sources(root):
        executed = ledger.load(root / "_build" / profile / "src" / "chapters" / f"{name}.ipynb")
        path = out / "chapters" / f"{name}.ipynb"
        execute.write_atomically(path, _installing(form(executed), _config(root)["repository"]["url"]))
        written.append(path)
    return written


def _installing(notebook: dict, repository: str) -> str:
    """The notebook as a file, with a first cell that installs the library where it is missing."""
    install = f"%pip install -q git+{repository}"
    cell = {
        "cell_type": "code",
        "id": "install",
        "metadata": {},
        "execution_count": None,
        "outputs": [],
        "source": f'import importlib.util\n\nif importlib.util.find_spec("dlatlas") is None:\n    {install}',
    }
    content = {**notebook, "cells": [cell, *notebook["cells"]]}
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m dlatlas.book.site", description="Export the executed notebooks.")
    parser.add_argument("--notebooks", type=Path, required=True, metavar="DIR", help="folder to write to")
    parser.add_argument("--student", action="store_true", help="without outputs and solutions, for a course")
    parser.add_argument("--profile", choices=("quick", "full"), default="quick")
    options = parser.parse_args(arguments)
    root = catalog.repository()
    try:
        if root is None:
            raise SiteError("run this in a checkout of the repository")
        for path in notebooks(root, options.notebooks, options.profile, student=options.student):
            print(path)
    except (OSError, SiteError) as error:
        print(f"dlatlas: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
