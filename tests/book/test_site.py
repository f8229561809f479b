"""The built site: what stands on its pages, and what must stop the build."""

import csv
import json
import re
import shutil
import subprocess
import sys
import time

import pytest

from dlatlas import catalog
from dlatlas.book import pages, site
from dlatlas.book.site import SiteError, faults_of

pytestmark = pytest.mark.xdist_group("site")
CHAPTER = "gans/critics"
REPOSITORY = "https://github.com/dlatlas/dlatlas"


def page(folder, name):
    return (folder / f"{name}.html").read_text()


def test_the_chapter_page_shows_paper_figure_claim_and_glued_number(small_site):
    text = page(small_site, f"chapters/{CHAPTER}")
    assert "Spectral Normalization for Generative Adversarial Networks" in text
    assert "https://arxiv.org/abs/1802.05957" in text
    assert re.search(r'<svg[^>]*role="img"[^>]*aria-label="A line that rises', text)
    assert "Claim holds." in text
    assert "The product is <span" in text
    assert "0.15 ± 0.07071" in text
    assert "1 claim, which holds" in text


def test_every_page_ends_with_its_provenance(small_site):
    chapter, index = page(small_site, f"chapters/{CHAPTER}"), page(small_site, "index")
    assert re.search(
        r"<footer class=\"dlatlas-provenance\">Executed \d{4}-\d\d-\d\d from .* quick profile, seed 0 · \d+ s on cpu, at most [\d,]+ MB",
        chapter,
    )
    for known in ("torch 2", "numpy", "python 3"):
        assert known in chapter[chapter.index("dlatlas-provenance") :]
    for path in sorted(small_site.rglob("*.html")):
        if "_static" not in path.parts and path.stem not in {"search", "genindex"}:
            assert "dlatlas-provenance" in path.read_text(), path
    assert "1 executed chapter" in index


def test_buttons_lead_to_files_that_exist(small_site, small_book):
    text = page(small_site, f"chapters/{CHAPTER}")
    assert f"{REPOSITORY}/edit/main/chapters/{CHAPTER}.md" in text
    assert f"{REPOSITORY}/blob/main/chapters/{CHAPTER}.md?plain=1" in text
    assert f"https://colab.research.google.com/github/dlatlas/dlatlas/blob/notebooks/chapters/{CHAPTER}.ipynb" in text
    assert f"https://mybinder.org/v2/gh/dlatlas/dlatlas/main?urlpath=lab/tree/chapters/{CHAPTER}.md" in text
    assert (small_book / "chapters" / f"{CHAPTER}.md").is_file()
    for path in sorted(small_site.rglob("*.html")):
        for name in re.findall(rf"{REPOSITORY}/(?:edit|blob)/main/([^?\"#]+)", path.read_text()):
            assert (small_book / name).is_file() or (site.LIBRARY.parents[1] / name).is_file(), f"{path.name} points at {name}"
    # The ledger is gathered, not written: nothing to edit.
    assert f"{REPOSITORY}/edit/" not in page(small_site, "ledger")


def test_the_reading_order_leads_from_page_to_page(small_site):
    def after(name):
        found = re.search(r'class="right-next"\s+href="([^"]+)"', page(small_site, name))
        return found and found[1]

    assert after("index") == "how-to-read.html"
    assert after("parts/gans") == f"../chapters/{CHAPTER}.html"
    assert after(f"chapters/{CHAPTER}") == "../../parts/latent.html"
    assert after("bibliography") is None


def test_status_lists_all_papers_and_the_ledger_every_claim(small_site):
    status = page(small_site, "status")
    assert all(f'id="{key}"' in status for key in catalog.papers())
    rows = json.loads((small_site / "ledger.json").read_text())
    assert [(r["key"], r["holds"], r["measured"], r["null"]) for r in rows] == [
        ("miyato2018spectral", True, {"product": 4}, {"product": 5})
    ]
    with (small_site / "ledger.csv").open() as file:
        assert [row["criterion"] for row in csv.DictReader(file)] == ["product == 4"]
    assert "Twice two is four" in page(small_site, "ledger")
    assert (small_site / "references.bib").read_text().count("@inproceedings") == 425


def test_the_mathematics_is_on_board(small_site):
    folder = small_site / "_static/mathjax"
    assert (folder / "tex-chtml-full.js").stat().st_size > 1e6
    assert len(list((folder / "output/chtml/fonts/woff-v2").glob("*.woff"))) > 20
    assert 'src="../../_static/mathjax/tex-chtml-full.js' in page(small_site, f"chapters/{CHAPTER}")


def test_an_unchanged_book_is_not_built_again_and_a_changed_page_is(small_book, small_site):
    index = small_site / "index.html"
    before = index.stat().st_mtime_ns
    start = time.perf_counter()
    site.build(small_book)
    assert time.perf_counter() - start < 5
    assert index.stat().st_mtime_ns == before
    source = small_book / "book/how-to-read.md"
    original = source.read_text()
    try:
        source.write_text(original + "\nSee {doc}`no-such-page`.\n")
        with pytest.raises(SiteError, match="no-such-page"):
            site.build(small_book)
        # A failed build must not be taken for a finished one.
        with pytest.raises(SiteError, match="no-such-page"):
            site.build(small_book)
    finally:
        source.write_text(original)
    assert site.build(small_book).is_file()


def test_an_unknown_name_in_a_hand_written_page_is_refused(small_book, small_site):
    source = small_book / "book/how-to-read.md"
    original = source.read_text()
    try:
        source.write_text(original + "\n{{ no-such-number }}\n")
        with pytest.raises(SiteError, match=r"how-to-read\.md: unknown \{\{ no-such-number \}\}"):
            site.build(small_book)
    finally:
        source.write_text(original)


def test_dead_links_requests_to_other_hosts_and_misunderstood_markup_are_found(tmp_path):
    (tmp_path / "a.html").write_text(
        '<h1 id="top">A</h1><a href="b.html#here">1</a><a href="b.html#gone">2</a><a href="c.html">3</a><a href="#top">4</a>'
        '<a href="https://example.org">5</a><script src="https://cdn.example.org/x.js"></script><img src="none.png">'
        '<link rel="stylesheet" href="//fonts.example.org/f.css">'
    )
    (tmp_path / "b.html").write_text('<p id="here">B</p>')
    (tmp_path / "d.html").write_text("<pre>## Cite\n```{raw} html\n</pre>")
    found = sorted(faults_of(tmp_path))
    assert found == [
        "a.html links to b.html#gone: no such place on that page",
        "a.html links to c.html, which does not exist",
        "a.html links to none.png, which does not exist",
        "a.html loads //fonts.example.org/f.css from another host",
        "a.html loads https://cdn.example.org/x.js from another host",
        "d.html shows ```{raw} html as text: a fence around it was not understood",
    ]


def test_notebooks_for_colab_install_the_library_first(small_book, tmp_path):
    (path,) = site.notebooks(small_book, tmp_path)
    assert path == tmp_path / "chapters" / f"{CHAPTER}.ipynb"
    first, *rest = json.loads(path.read_text())["cells"]
    assert "pip install -q git+https://github.com/dlatlas/dlatlas" in first["source"]
    assert any(cell.get("outputs") for cell in rest)
    text = "\n".join("".join(cell["source"]) for cell in rest if cell["cell_type"] == "markdown")
    assert "{" not in re.sub(r"\$\$.*?\$\$|\$[^$]*\$", "", text, flags=re.S)  # no directive is left
    assert "> **Spectral Normalization for Generative Adversarial Networks**. Takeru Miyato" in text
    assert "The product is 4." in text
    assert "bounds the slope [Miyato et al., 2018](https://arxiv.org/abs/1802.05957)" in text
    assert "**Exercise.** Multiply." in text


def test_the_build_command_explains_itself_outside_a_checkout(tmp_path):
    shutil.copytree(site.LIBRARY, tmp_path / "site/dlatlas", ignore=shutil.ignore_patterns("__pycache__"))
    for module in ("dlatlas.book.build", "dlatlas.book.execute"):
        done = subprocess.run([sys.executable, "-m", module], cwd=tmp_path / "site", capture_output=True, text=True)
        assert done.returncode == 2
        assert "run this in a checkout" in done.stderr


def test_tracks_name_papers_of_the_catalogue_and_say_what_is_built(small_site, small_book):
    text = page(small_site, "tracks")
    assert 'href="chapters/gans/critics.html#miyato2018spectral"' in text
    assert "chapter not built yet" in text
    assert re.search(r"after Optimisers \(not built yet\).*\d+ min to read, runs in \d+ s", text)
    source = small_book / "book/tracks.yml"
    original = source.read_text()
    try:
        source.write_text("- {title: Nowhere, for: nobody, steps: [[unheard2018of, why]]}\n")
        with pytest.raises(SiteError, match=r"'Nowhere' names unheard2018of"):
            site.build(small_book)
    finally:
        source.write_text(original)


def test_arenas_gather_the_comparisons_of_the_chapters(small_site):
    text = page(small_site, "arenas")
    assert "Does the machinery work?" in text
    assert "<caption>Errors</caption>" in text and "0.15 ± 0.07071" in text


def test_what_methods_share_is_documented_and_linked_from_their_pages():
    book = pages.Book(site.LIBRARY.parents[1], "quick", REPOSITORY, "main", {}, {}, printed=dict.fromkeys(catalog.papers(), ""))
    kits = {f"kits/{slug}": pages.kit_page(book, slug, modules) for slug, modules in pages.kits(book.root).items()}
    assert "updates after every step of the whole vector environment" in kits["kits/rl"]
    for row in book.implemented.values():
        for kit, anchor in re.findall(r'href="\.\./(kits/\w+)\.html#([\w-]+)"', pages.paper_page(book, row)):
            assert f"({anchor})=" in kits[kit], f"{row.key} links to {anchor}"
    assert "#kit-rl-kit-actor-critic-actorcriticagent-class" in pages.paper_page(book, catalog.papers()["haarnoja2018soft"])
    assert "../kits/rl.html" in pages.part_page(book, catalog.parts()["rl"])
