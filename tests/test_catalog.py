"""The 425 rows and what is derived from them."""

import re
from pathlib import Path

import pytest

from dlatlas import catalog

ROOT = Path(__file__).parents[1]


def test_all_papers_are_there_once():
    rows = list(catalog.papers().values())
    assert len(rows) == 425
    for field in ("key", "number", "module", "title", "openreview"):
        assert len({getattr(row, field) for row in rows}) == 425, field
    assert {row.number for row in rows} == set(range(1, 426))


def test_the_book_has_ten_parts_and_65_chapters_that_hold_every_paper():
    assert len(catalog.parts()) == 10
    assert len(catalog.chapters()) == 65
    assert sum(len(chapter.papers) for chapter in catalog.chapters().values()) == 425
    assert all(chapter.papers for chapter in catalog.chapters().values())


def test_rows_are_well_formed_and_in_the_order_of_the_book():
    order = list(catalog.chapters())
    rows = list(catalog.papers().values())
    assert [order.index(row.chapter) for row in rows] == sorted(order.index(row.chapter) for row in rows)
    for row in rows:
        assert re.fullmatch(r"[a-z0-9]+2018[a-z0-9]*|[a-z]+2018[a-z0-9-]*", row.key), row.key
        assert row.arxiv is None or re.fullmatch(r"\d{4}\.\d{4,5}", row.arxiv), row.arxiv
        assert re.fullmatch(r"dlatlas\.[a-z]+\.[a-z0-9_]+", row.module), row.module
        assert row.module.split(".")[1] == row.part
        assert row.authors and all(row.authors) and row.title and row.method


def test_a_known_row():
    row = catalog.paper("reddi2018amsgrad")
    assert row.title == "On the Convergence of Adam and Beyond"
    assert row.authors == ("Sashank J. Reddi", "Satyen Kale", "Sanjiv Kumar")
    assert row.chapter == "theory/optimizers"
    assert row.source == "lib/dlatlas/theory/amsgrad.py" and row.test == "tests/theory/test_amsgrad.py"
    assert row.links == {"arXiv": "https://arxiv.org/abs/1904.09237", "OpenReview": "https://openreview.net/forum?id=ryQu7f-RZ"}
    assert row.bibtex.startswith("@inproceedings{reddi2018amsgrad,")


def test_bibliography_is_balanced_and_complete():
    bib = catalog.references_bib()
    assert len(re.findall(r"^@inproceedings\{", bib, re.M)) == 425
    assert bib.count("{") == bib.count("}")
    assert not re.search(r"(?<!\\)[&%#]", bib)


def test_search_finds_methods_titles_and_authors_first_by_method():
    assert catalog.search("amsgrad")[0].key == "reddi2018amsgrad"
    assert "frerix2018proxprop" in {row.key for row in catalog.search("mollenhoff")}  # without the accent
    assert {row.key for row in catalog.search("Reddi Adam")} == {"reddi2018amsgrad"}
    assert catalog.search("no such words at all") == []


def test_a_misspelt_key_gets_a_suggestion():
    with pytest.raises(KeyError, match="did you mean reddi2018amsgrad"):
        catalog.paper("reddi2018amsgard")


def test_every_implemented_method_has_its_test_file_and_chapter_section():
    """The catalogue, the library, the tests and the chapters grow together."""
    for row in catalog.papers().values():
        path = ROOT / row.source
        assert row.implemented == path.is_file(), row.key
        if not row.implemented:
            continue
        assert (ROOT / row.test).is_file(), f"{row.source} has no {row.test}"
        assert row.key in path.read_text(), f"{row.source} does not name its paper {row.key}"


def test_every_section_of_a_chapter_belongs_to_a_paper_with_a_module():
    for name, chapter in catalog.chapters().items():
        path = ROOT / "chapters" / f"{name}.md"
        if not path.is_file():
            continue
        text = path.read_text()
        for row in chapter.papers:
            assert row.implemented, f"{name} exists but {row.source} does not"
            assert f"({row.key})=" in text, f"{name} has no section ({row.key})="
            assert f"```{{paper}} {row.key}" in text, f"{name} does not cite {row.key}"
            assert f"/{row.source.removeprefix('lib/')}" in text, f"{name} does not show {row.source}"
