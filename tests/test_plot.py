"""Figures and tables leave as what the page needs: themable SVG with alternative text, records of the numbers."""

import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest
import torch

from dlatlas import plot


@pytest.fixture
def shown(monkeypatch):
    out = []
    monkeypatch.setattr("IPython.display.display", lambda thing, **kwargs: out.append(thing))
    return out


def svg_of(picture):
    return picture._repr_html_().removeprefix("<figure class='dlatlas-figure'>").removesuffix("</figure>")


def draw(shown, y=(1, 2, 3), alt="A line that rises from one to three"):
    fig, ax = plot.figure()
    plot.curves(ax, {"y": np.asarray(y)}, xlabel="step", ylabel="loss")
    plot.show(fig, alt=alt)
    return svg_of(shown[-1])


def test_a_figure_is_well_formed_svg_with_alternative_text_in_the_colour_of_the_page(shown):
    svg = draw(shown, alt='A "line" that rises <steadily>')
    root = ET.fromstring(svg)
    assert root.get("role") == "img" and root.get("aria-label") == 'A "line" that rises <steadily>'
    assert "currentColor" in svg and plot._INK not in svg and "<style" not in svg
    assert root.get("viewBox") and "width:100%" in root.get("style")


def test_equal_figures_have_equal_bytes_and_different_ones_share_no_id(shown):
    first, again, other = draw(shown), draw(shown), draw(shown, y=(3, 2, 1))
    assert first == again
    ids = [set(re.findall(r'\bid="([^"]+)"', svg)) for svg in (first, other)]
    assert ids[0] and not ids[0] & ids[1]
    for svg in (first, other):
        known = set(re.findall(r'\bid="([^"]+)"', svg))
        assert set(re.findall(r'href="#([^"]+)"', svg)) | set(re.findall(r"url\(#([^)]+)\)", svg)) <= known


def test_what_a_chapter_draws_by_itself_takes_the_page_s_colours(shown):
    fig, (left, right) = plot.figure(1, 2)
    left.plot([0, 1], [0, 1], label="one")
    left.plot([0, 1], [1, 0], color="black", label="black")
    left.plot([0, 1], [1, 1], color="#d55e00", label="kept")
    left.legend(loc="upper left")
    bar = fig.colorbar(right.imshow(np.eye(3)), ax=right)
    right.text(0, 0, "words")
    right.text(1, 1, "white words", color="white")
    plot.show(fig, alt="Three lines with a legend, and a picture with a colour bar")
    assert not left.get_legend().get_frame_on()
    ink = [*left.get_legend().get_texts(), left.lines[1], right.texts[0], *bar.ax.get_yticklabels()]
    assert {artist.get_color() for artist in ink} == {plot._INK}
    assert (left.lines[2].get_color(), right.texts[1].get_color()) == ("#d55e00", "white")
    svg = svg_of(shown[-1])
    bare = [
        group
        for group in re.findall(r"<g id=[^>]*text_[^>]*>.*?</g>", svg, flags=re.S)
        if "currentColor" not in group and "#ffffff" not in group
    ]
    assert not bare  # text without a colour of its own would be black


def test_a_figure_without_alternative_text_is_refused():
    fig, _ = plot.figure()
    with pytest.raises(ValueError, match="alt must say"):
        plot.show(fig, alt="plot")
    with pytest.raises(TypeError):
        plot.show(fig)


def test_large_clouds_become_pixels_and_small_ones_stay_vector(shown):
    for n, has_image in ((50, False), (5000, True)):
        fig, ax = plot.figure()
        ax.scatter(*np.random.default_rng(0).random((2, n)))
        plot.show(fig, alt="A cloud of points in a square")
        assert ("<image" in svg_of(shown[-1])) is has_image


def test_curves_take_values_pairs_and_bands():
    _, ax = plot.figure()
    plot.curves(ax, {"a": torch.arange(3), "b": ([1, 2], [3, 4]), "c": ([1, 2], np.ones(2), np.full(2, 0.5))}, logy=True)
    np.testing.assert_array_equal(ax.lines[0].get_xydata(), [[0, 0], [1, 1], [2, 2]])
    np.testing.assert_array_equal(ax.lines[1].get_xydata(), [[1, 3], [2, 4]])
    band = ax.collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == (0.5, 1.5) and ax.get_yscale() == "log"


def test_bars_stand_at_the_mean_with_a_dot_a_seed():
    _, ax = plot.figure()
    plot.bars(ax, {"a": [1.0, 2.0, 6.0], "b": 2.0})
    assert [patch.get_height() for patch in ax.patches] == [3.0, 2.0]
    np.testing.assert_array_equal(ax.lines[0].get_ydata(), [1, 2, 6])


def test_image_sheets_take_grey_and_colour():
    assert len(plot.images(torch.rand(5, 1, 4, 4), rows=2).axes) == 6
    assert plot.images(torch.rand(2, 3, 4, 4)).axes[0].images[0].get_array().shape == (4, 4, 3)
    with pytest.raises(ValueError, match="expected images"):
        plot.images(torch.rand(4, 4))


def test_phase_draws_surfaces_and_arrows():
    _, (left, right) = plot.figure(1, 2)
    plot.phase(left, lambda p: p.pow(2).sum(1))
    plot.phase(right, lambda p: -p)
    assert right.collections[-1].U.shape == (256,)


def test_tables_keep_their_numbers_for_the_machine(shown):
    plot.table(
        [{"method": "SGD <b>", "error": [0.1, 0.2, 0.3], "steps": 1000}, {"method": "Adam", "error": 0.25}],
        caption="C",
        name="side-by-side",
    )
    bundle = shown[-1]
    record = bundle[plot.TABLE_MIME]
    assert record["rows"][0]["error"] == [0.1, 0.2, 0.3] and record["columns"] == ["method", "error", "steps"]
    assert "0.2 ± 0.1" in bundle["text/html"] and "SGD &lt;b&gt;" in bundle["text/html"] and "1,000" in bundle["text/plain"]
    with pytest.raises(ValueError, match="no rows"):
        plot.table([], caption="empty")


def test_the_palette_has_contrast_on_both_pages():
    def luminance(colour):
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for page in ("#ffffff", "#121212"):
        for colour in plot.PALETTE:
            light, dark = sorted([luminance(page), luminance(colour)], reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= 3, (page, colour)
