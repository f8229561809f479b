"""The book as a PDF."""

import pytest
import yaml
from pypdf import PdfReader

from dlatlas.book import pdf
from dlatlas.book.pages import SiteError

pytestmark = pytest.mark.xdist_group("site")


def test_the_pages_in_reading_order_without_the_papers_own():
    sections = [{"file": "chapters/gans/critics", "sections": [{"file": "papers/miyato2018spectral"}]}]
    toc = {"root": "index", "parts": [{"chapters": [{"file": "how"}]}, {"chapters": [{"file": "parts/gans", "sections": sections}]}]}
    assert pdf.order(toc) == ["index", "how", "parts/gans", "chapters/gans/critics"]


def test_the_small_book_is_bound_with_bookmarks(small_site, tmp_path):
    if not any(map(pdf.shutil.which, pdf.BROWSERS)):
        pytest.skip("no Chromium or Chrome on this machine: `make browser` installs one on Debian and Ubuntu")
    toc = {"root": "index", "parts": [{"chapters": [{"file": "chapters/gans/critics"}]}]}
    sheets = pdf.bind(small_site, toc, tmp_path / "book.pdf")
    bound = PdfReader(tmp_path / "book.pdf")
    assert len(bound.pages) == sheets >= 2
    assert [entry.title for entry in bound.outline] == ["The Deep Learning Atlas", "Critics"]
    assert "Twice two is four" in "".join(page.extract_text() for page in bound.pages)


def test_what_is_missing_is_named(small_site, tmp_path, monkeypatch):
    with pytest.raises(SiteError, match=r"no nowhere\.html: run `make book` first"):
        pdf.bind(small_site, {"root": "nowhere", "parts": []}, tmp_path / "book.pdf")
    monkeypatch.setattr(pdf, "BROWSERS", ("no-such-browser",))
    with pytest.raises(SiteError, match="make browser"):
        pdf.bind(small_site, yaml.safe_load("{root: index, parts: []}"), tmp_path / "book.pdf")
