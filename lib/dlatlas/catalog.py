"""The catalogue: one row per paper, and the parts and chapters of the book in reading order."""

from __future__ import annotations

import difflib
import functools
import unicodedata
from dataclasses import dataclass
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

import yaml


@dataclass(frozen=True)
class Chapter:
    """A chapter of the book; ``id`` is "part/slug", which is also its path below ``chapters/``."""

    part: str
    slug: str
    title: str

    @property
    def id(self) -> str:
        return f"{self.part}/{self.slug}"

    @property
    def papers(self) -> list[Paper]:
        """Its papers in the order of the catalogue."""
        return [p for p in papers().values() if p.chapter == self.id]


@dataclass(frozen=True)
class Part:
    """A part of the book with its chapters in reading order."""

    slug: str
    title: str
    chapters: tuple[Chapter, ...]


@dataclass(frozen=True)
class Paper:
    """One paper of ICLR 2018. ``chapter`` is the chapter's id, ``module`` the import path of its method."""

    key: str
    number: int
    title: str
    authors: tuple[str, ...]
    arxiv: str | None
    openreview: str | None
    method: str
    part: str
    chapter: str
    module: str

    @property
    def source(self) -> str:
        """Path of the module in the repository."""
        return f"lib/{self.module.replace('.', '/')}.py"

    @property
    def test(self) -> str:
        """Path of its tests in the repository."""
        return f"tests/{self.part}/test_{self.module.rpartition('.')[2]}.py"

    @property
    def implemented(self) -> bool:
        """Whether the library has the method's module."""
        try:
            return find_spec(self.module) is not None
        except ModuleNotFoundError:  # not even its part exists yet
            return False

    @property
    def links(self) -> dict[str, str]:
        """Addresses of the paper by name."""
        found = {}
        if self.arxiv:
            found["arXiv"] = f"https://arxiv.org/abs/{self.arxiv}"
        if self.openreview:
            found["OpenReview"] = f"https://openreview.net/forum?id={self.openreview}"
        return found

    @property
    def bibtex(self) -> str:
        """BibTeX entry."""
        fields = {
            "title": "{" + self.title + "}",  # double braces keep the capitals
            "author": " and ".join(self.authors),
            "booktitle": "International Conference on Learning Representations",
            "year": "2018",
            "url": next(reversed(self.links.values()), ""),
        }
        if self.arxiv:
            fields |= {"eprint": self.arxiv, "archiveprefix": "arXiv"}
        lines = ",\n".join(f"  {name} = {{{_latex(value)}}}" for name, value in fields.items() if value)
        return f"@inproceedings{{{self.key},\n{lines}\n}}\n"


@functools.cache
def _catalogue() -> tuple[dict[str, Part], dict[str, Paper]]:
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times faster where libyaml is there
    data = yaml.load(files("dlatlas").joinpath("catalog.yml").read_text(encoding="utf-8"), Loader=loader)
    part_rows = {
        row["part"]: Part(row["part"], row["title"], tuple(Chapter(row["part"], c["slug"], c["title"]) for c in row["chapters"]))
        for row in data["parts"]
    }
    paper_rows = {}
    for row in data["papers"]:
        authors = tuple(name.strip() for name in row["authors"].split(","))
        paper_rows[row["key"]] = Paper(**row | {"authors": authors, "chapter": f"{row['part']}/{row['chapter']}"})
    return part_rows, paper_rows


def parts() -> dict[str, Part]:
    """All parts by slug, in reading order."""
    return _catalogue()[0]


def chapters() -> dict[str, Chapter]:
    """All chapters by id ("part/slug"), in reading order."""
    return {chapter.id: chapter for part in parts().values() for chapter in part.chapters}


def papers() -> dict[str, Paper]:
    """All papers by key, in the order of the book."""
    return _catalogue()[1]


def paper(key: str) -> Paper:
    """One paper by key; KeyError with the nearest keys when there is none."""
    try:
        return papers()[key]
    except KeyError:
        raise KeyError(f"no paper {key!r} in the catalogue{suggestion(key)}") from None


def suggestion(key: str) -> str:
    """ "; did you mean ...?" for a misspelt key, or nothing."""
    near = difflib.get_close_matches(key, papers(), n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def search(text: str) -> list[Paper]:
    """Papers in which every word of `text` occurs in the key, title, authors, method, chapter or module.

    Case and accents do not matter. Papers whose method or key holds the words come first.
    """
    words = _plain(text).split()
    hits = []
    for row in papers().values():
        name = _plain(f"{row.method} {row.key}")
        everything = f"{name} {_plain(' '.join([row.title, *row.authors, row.chapter, row.module]))}"
        if all(word in everything for word in words):
            hits.append((not all(word in name for word in words), row))
    return [row for _, row in sorted(hits, key=lambda hit: hit[0])]


def references_bib() -> str:
    """All papers as a BibTeX file."""
    return "\n".join(row.bibtex for row in papers().values())


def repository() -> Path | None:
    """Root of the checkout that this library was imported from, or None for an ordinary installation."""
    root = Path(__file__).resolve().parents[2]
    return root if (root / "_config.yml").is_file() and (root / "chapters").is_dir() else None


def _plain(text: str) -> str:
    decomposed = unicodedata.normalize("NFKD", text)
    return "".join(c for c in decomposed if not unicodedata.combining(c)).casefold()


def _latex(text: str) -> str:
    for character in "&%#_":
        text = text.replace(character, "\\" + character)
    return text
