"""The book as one PDF: every page of the site but the papers' own, printed by a headless browser and bound together.

python -m dlatlas.book.pdf [--out book.pdf]     # after `make book`
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml
from pypdf import PdfReader, PdfWriter

from dlatlas import catalog
from dlatlas.book.pages import SiteError

__all__ = ["bind", "order"]

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
# Time for the formulas, in the browser's own clock.
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-pdf-header-footer",
    "--virtual-time-budget=20000",
    "--run-all-compositor-stages-before-draw",
)


def order(toc: dict[str, Any]) -> list[str]:
    """The pages of a table of contents in reading order, without the papers' own pages."""

    def walk(entries: list[dict[str, Any]]) -> Iterator[str]:
        for entry in entries:
            yield entry["file"]
            yield from walk(entry.get("sections", []))

    pages = [toc["root"], *(name for part in toc["parts"] for name in walk(part["chapters"]))]
    return [name for name in pages if not name.startswith(("papers/", "kits/"))]


def bind(html: Path, toc: dict[str, Any], out: Path, jobs: int = 2) -> int:
    """Print the pages below `html` and write them to `out` with bookmarks; the number of sheets.

    Raises:
        SiteError: no browser, a page that is not there, or one that the browser does not print.
    """
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        raise SiteError("no Chromium or Chrome on this machine: `make browser` installs one on Debian and Ubuntu")
    pages = order(toc)
    if missing := [name for name in pages if not (html / f"{name}.html").is_file()]:
        raise SiteError(f"{html} has no {missing[0]}.html: run `make book` first")
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(jobs) as pool:
        printed = list(pool.map(lambda i: _print(browser, html / f"{pages[i]}.html", Path(folder) / str(i)), range(len(pages))))
        writer = PdfWriter()
        for name, path in zip(pages, printed):
            reader = PdfReader(path)
            writer.append(reader, outline_item=_title(html / f"{name}.html"), import_outline=False)
        writer.add_metadata({"/Title": "The Deep Learning Atlas"})
        out.parent.mkdir(parents=True, exist_ok=True)
        writer.write(out)
        return len(writer.pages)


def _print(browser: str, page: Path, folder: Path) -> Path:
    path = folder / "page.pdf"
    command = [browser, *FLAGS, f"--user-data-dir={folder / 'profile'}", f"--print-to-pdf={path}", page.as_uri()]
    folder.mkdir()
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=300)
    if not path.is_file():
        raise SiteError(f"{browser} did not print {page}: {done.stderr.strip().splitlines()[-1:] or done.returncode}")
    return path


def _title(page: Path) -> str:
    text = page.read_text(encoding="utf-8")
    return text.partition("<title>")[2].partition("</title>")[0].split(" &#8212;")[0].split(" —")[0].strip()


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m dlatlas.book.pdf", description="Bind the built site into one PDF.")
    parser.add_argument("--profile", choices=("quick", "full"), default="quick")
    parser.add_argument("--out", type=Path, help="file to write (default: _build/<profile>/atlas.pdf)")
    options = parser.parse_args(arguments)
    root = catalog.repository()
    try:
        if root is None:
            raise SiteError("run this in a checkout of the repository")
        base = root / "_build" / options.profile
        if not (base / "src/_toc.yml").is_file():
            raise SiteError("the book has not been built: run `make book` first")
        out = options.out or base / "atlas.pdf"
        sheets = bind(base / "_build/html", yaml.safe_load((base / "src/_toc.yml").read_text(encoding="utf-8")), out)
    except (OSError, SiteError, subprocess.TimeoutExpired) as error:
        print(f"dlatlas: {error}", file=sys.stderr)
        return 1
    print(f"{out}: {sheets} pages")
    return 0


if __name__ == "__main__":
    sys.exit(main())
