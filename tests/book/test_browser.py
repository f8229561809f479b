"""The built site in a headless browser, as a reader without network sees it: from a file, light and dark, on a phone."""

import gzip
import shutil
from functools import cache
from importlib.resources import files
from pathlib import Path
from urllib.parse import unquote, urlparse

import pytest

from dlatlas import catalog

# Tests of the small book share a process with those that build it; those of the whole book run beside them.
SMALL, WHOLE = (pytest.mark.xdist_group(name) for name in ("site", "the book"))
ROOT = Path(__file__).parents[2]
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# Chromium's own background traffic is no request of a page.
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--no-first-run"]


@pytest.fixture(scope="session")
def browser():
    if BROWSER is None:
        pytest.skip("no Chromium or Chrome on this machine: `make browser` installs one on Debian and Ubuntu")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=BROWSER, args=ARGUMENTS)
        yield running
        running.close()


@pytest.fixture(scope="session", params=[pytest.param("small book", marks=SMALL), pytest.param("the book", marks=WHOLE)])
def html(request):
    """Folder of a built site: a small one, and the atlas itself where `make book` has built it."""
    if request.param == "small book":
        return request.getfixturevalue("small_site")
    folder = ROOT / "_build/quick/_build/html"
    if not (folder.parents[1] / "site.sha256").is_file():
        pytest.skip("the book has not been built in this checkout: `make book` builds it")
    return folder


def samples(html: Path, turn: int | None = None) -> list[str]:
    """Every kind of page: all chapters, the reference pages, some parts and papers.

    `turn` is 0 or 1: every second page, so that two tests that differ in the colours only share the pages.
    """
    names = [str(path.relative_to(html)) for path in sorted(html.rglob("*.html")) if "_static" not in path.parts]
    chapters = [name for name in names if name.startswith("chapters/")]
    papers = [name for name in names if name.startswith("papers/")]
    top = [name for name in names if "/" not in name and name not in {"search.html", "genindex.html"}]
    kits = [name for name in names if name.startswith("kits/")]  # the small book has none
    found = [
        *top,
        *chapters,
        *papers[:: max(1, len(papers) // 4)],
        "parts/gans.html",
        "parts/theory.html",
        *sorted(kits, key=lambda name: (html / name).stat().st_size)[-1:],
    ]
    return found if turn is None else found[turn::2]


class Watched:
    """A page of the browser that remembers everything that went wrong."""

    def __init__(self, context):
        self.page = context.new_page()
        self.faults: list[str] = []
        self.page.on("console", lambda m: self.faults.append(f"console: {m.text}") if m.type == "error" else None)
        self.page.on("pageerror", lambda e: self.faults.append(f"error: {e}"))
        self.page.on("requestfailed", lambda r: self.faults.append(f"failed: {r.url}"))
        self.page.on(
            "request", lambda r: None if r.url.startswith(("file:", "data:", "blob:")) else self.faults.append(f"request: {r.url}")
        )

    def open(self, path: Path, query: str = ""):
        self.page.goto(path.as_uri() + query)
        self.page.wait_for_load_state("load")
        self.page.wait_for_function(
            "!window.MathJax || !MathJax.startup || !MathJax.startup.promise || MathJax.startup.promise.then(() => true)"
        )
        return self.page


@pytest.fixture
def desktop(browser):
    context = browser.new_context(viewport={"width": 1280, "height": 900}, offline=True)
    yield Watched(context)
    context.close()


@cache
def compressed(path: Path) -> int:
    """Bytes of a file as a server sends it."""
    return len(gzip.compress(path.read_bytes(), 6))


def test_pages_load_without_fault_and_weigh_little_maths_is_rendered_and_figures_have_alternative_texts(html, desktop):
    formulas = figures = 0
    loaded: set[Path] = set()
    desktop.page.on("request", lambda r: loaded.add(Path(unquote(urlparse(r.url).path))) if r.url.startswith("file:") else None)
    for name in samples(html):
        loaded.clear()
        page = desktop.open(html / name)
        sent = sum(map(compressed, loaded))
        assert sent <= 2.5e6, f"{name} sends {sent / 1e6:.2f} MB"
        assert not desktop.faults, f"{name}: {desktop.faults[:5]}"
        assert page.locator("article h1").count() == 1, name
        formulas += page.locator("mjx-container").count()
        assert page.locator("mjx-merror").count() == 0, f"{name}: {page.locator('mjx-merror').first.get_attribute('data-mjx-error')}"
        assert page.locator(".math:not(:has(mjx-container))").count() == 0, f"{name}: a formula was not rendered"
        for figure in page.locator("figure.dlatlas-figure svg").all():
            assert len((figure.get_attribute("aria-label") or "").split()) >= 4, name
            box = figure.bounding_box()
            assert box is None or box["height"] > 40, name
            figures += 1
        assert page.locator("img:not([alt])").count() == 0, name
    assert formulas > 0
    assert figures > 0


@pytest.mark.parametrize(("turn", "theme"), [(0, "light"), (1, "dark")])
def test_a_phone_shows_every_page_at_once_without_sideways_scrolling_and_with_contrast(html, browser, turn, theme):
    context = browser.new_context(viewport={"width": 390, "height": 844}, color_scheme=theme, offline=True)
    context.add_init_script(f"localStorage.setItem('mode', '{theme}'); localStorage.setItem('theme', '{theme}')")
    watched = Watched(context)
    for name in samples(html, turn):
        # Text within a second of opening the file; a machine that does something else meanwhile gets three tries.
        for _ in range(3):
            page = watched.open(html / name)
            paint = page.evaluate("performance.getEntriesByName('first-contentful-paint')[0]?.startTime ?? 0")
            if 0 < paint < 1000:
                break
        assert 0 < paint < 1000, f"{name} shows itself after {paint:.0f} ms"
        assert page.evaluate("document.documentElement.dataset.theme") == theme
        width = page.evaluate("document.documentElement.scrollWidth")
        assert width <= 390, f"{name} is {width} pixels wide"
        ratio = page.evaluate(CONTRAST)
        assert ratio["worst"] >= 4.5, f"{name}: contrast {ratio}"
    context.close()


# The lowest contrast between the house's own coloured words and what lies behind them (WCAG 2).
CONTRAST = """() => {
  const parse = (c) => c.match(/[\\d.]+/g).map(Number);
  const behind = (e) => {  // the colours of all ancestors, one over the other
    let [r, g, b, left] = [0, 0, 0, 1];
    for (; e && left > 0; e = e.parentElement) {
      const [x, y, z, alpha = 1] = parse(getComputedStyle(e).backgroundColor);
      [r, g, b] = [r + left * alpha * x, g + left * alpha * y, b + left * alpha * z];
      left *= 1 - alpha;
    }
    return [r + 255 * left, g + 255 * left, b + 255 * left];
  };
  const light = (c) => { const [r, g, b] = c.slice(0, 3).map((v) => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  let worst = { worst: 21, where: "" };
  for (const e of document.querySelectorAll("article p, article .dlatlas-verdict, .dlatlas-small, .dlatlas-facts, .dlatlas-provenance, .dlatlas-state, caption")) {
    if (!e.textContent.trim() || !e.offsetParent) continue;
    const [a, b] = [light(parse(getComputedStyle(e).color)), light(behind(e))].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < worst.worst) worst = { worst: ratio, where: e.className + ": " + e.textContent.slice(0, 40) };
  }
  return worst;
}"""


# Ten thousand words of code in a handful of colours, and the strokes of drawings that have a name as a whole, cost axe half a
# minute a page. One word of every colour stays, and each drawing with its name.
LIGHTEN = """() => {
  const seen = new Set();
  for (const word of document.querySelectorAll('pre span')) {
    if (seen.has(word.className)) word.replaceWith(...word.childNodes);
    seen.add(word.className);
  }
  for (const drawing of document.querySelectorAll('figure.dlatlas-figure svg')) drawing.replaceChildren();
}"""


@pytest.mark.parametrize(("turn", "theme"), [(1, "light"), (0, "dark")])
def test_axe_finds_no_serious_violation(html, browser, turn, theme):
    axe = files("axe_playwright_python").joinpath("axe.min.js").read_text(encoding="utf-8")
    context = browser.new_context(viewport={"width": 1280, "height": 900}, color_scheme=theme, offline=True)
    context.add_init_script(f"localStorage.setItem('mode', '{theme}'); localStorage.setItem('theme', '{theme}')")
    watched = Watched(context)
    for name in samples(html, turn):
        page = watched.open(html / name)
        page.evaluate(LIGHTEN)
        page.evaluate(axe)
        found = page.evaluate("axe.run(document, { resultTypes: ['violations'] })")["violations"]
        serious = [f"{v['id']}: {v['nodes'][0]['html'][:200]}" for v in found if v["impact"] in {"serious", "critical"}]
        assert not serious, f"{name}, {theme}: {serious}"
    context.close()


def test_search_finds_a_method(html, desktop):
    page = desktop.open(html / "search.html", "?q=AMSGrad")
    page.wait_for_selector("#search-results li a", timeout=15_000)
    assert page.locator("#search-results li a").count() >= 1
    assert not [fault for fault in desktop.faults if "fetch" not in fault.lower() and not fault.startswith("failed: file:")]


def test_the_table_of_all_papers_filters(html, desktop):
    page = desktop.open(html / "status.html")
    rows = page.locator("#status-table tbody tr:not(.dlatlas-group):visible")
    assert rows.count() == len(catalog.papers())
    page.locator(".dlatlas-filter input").fill("amsgrad")
    assert rows.count() == 1
    page.locator(".dlatlas-filter input").fill("")
    page.locator("select[data-filter=part]").select_option("theory")
    assert rows.count() == sum(paper.part == "theory" for paper in catalog.papers().values())
    assert not desktop.faults


def test_the_map_answers_to_search_pointer_and_keys(html, desktop):
    page = desktop.open(html / "map.html")
    told = page.locator(".dlatlas-map-told")
    assert page.locator(".dlatlas-dot:not(.dlatlas-faint)").count() == len(catalog.papers())
    page.locator(".dlatlas-filter input").fill("amsgrad")
    assert page.locator(".dlatlas-dot:not(.dlatlas-faint)").count() == 1
    assert "AMSGrad" in told.inner_text()
    page.locator(".dlatlas-filter input").fill("")
    dot = page.locator('[data-key="miyato2018spectral"]:not(tr)')
    dot.scroll_into_view_if_needed()
    dot.hover()
    assert "Spectral Normalization for Generative Adversarial Networks" in told.inner_text()
    page.locator("[data-edges=chapter]").check()
    assert page.locator(".dlatlas-map-edges line").count() >= 9
    # One stop for the tabulator; the arrow keys go on from there, Enter opens the page.
    assert page.locator(".dlatlas-dot[tabindex='0']").count() == 1
    dot.focus()
    page.keyboard.press("ArrowUp")
    key = page.evaluate("document.activeElement.dataset.key")
    assert key != "miyato2018spectral"
    assert catalog.papers()[key].title in told.inner_text()
    page.keyboard.press("Enter")
    page.wait_for_function("!location.href.includes('map.html')")
    assert not desktop.faults


def test_a_tap_on_the_map_tells_and_a_second_opens(html, browser):
    context = browser.new_context(viewport={"width": 390, "height": 844}, has_touch=True, offline=True)
    page = Watched(context).open(html / "map.html")
    dot = page.locator('[data-key="miyato2018spectral"]:not(tr)')
    dot.scroll_into_view_if_needed()
    box = dot.bounding_box()
    place = (box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.touchscreen.tap(*place)
    assert "map.html" in page.url
    assert "Spectral" in page.locator(".dlatlas-map-told").inner_text()
    page.touchscreen.tap(*place)
    page.wait_for_function("!location.href.includes('map.html')")
    context.close()


def test_the_ledger_sorts_by_a_column(html, desktop):
    page = desktop.open(html / "ledger.html")
    column = page.locator("#ledger-table tbody td:nth-child(1)")
    page.locator("#ledger-table thead button").first.click()
    upwards = column.all_inner_texts()
    page.locator("#ledger-table thead button").first.click()
    assert column.all_inner_texts() == upwards[::-1]
    assert page.locator("#ledger-table th[aria-sort=descending]").count() == 1
    assert not desktop.faults
