"""The order of reading: columns of chapters, each to the right of what it asks for."""

import re

import pytest

from dlatlas.book.tracks import columns


def test_chapters_stand_to_the_right_of_what_they_ask_for():
    before = {"c": ("b", "a"), "b": ("a",), "a": (), "alone": (), "d": ("elsewhere",)}
    found = columns(before)
    level = {name: i for i, names in enumerate(found) for name in names}
    assert level == {"a": 0, "alone": 0, "elsewhere": 0, "b": 1, "d": 1, "c": 2}
    assert all(level[first] < level[name] for name, names in before.items() for first in names)
    # What others build on comes first, and those that build on it follow in its order.
    assert found[0][0] == "a" and found[1] == ["b", "d"]


def test_chapters_that_wait_for_each_other_are_named():
    with pytest.raises(ValueError, match="a → b → a wait for each other"):
        columns({"a": ("b",), "b": ("a",)})


def test_no_chapter_no_column():
    assert columns({}) == []


def test_the_page_draws_them(small_site):
    text = (small_site / "tracks.html").read_text(encoding="utf-8")
    drawn = re.search(r'<svg class="dlatlas-before".*?</svg>', text, re.S)[0]
    assert drawn.count("<rect") == 2 and drawn.count('class="dlatlas-line"') == 1
    assert 'href="chapters/gans/critics.html"' in drawn
    assert "Optimisers (not built yet)" in drawn
