"""How papers lie to each other, and the map that shows it."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from sklearn.neighbors import NearestNeighbors

from dlatlas import catalog
from dlatlas.book import field as near

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def whole_field():
    """Descriptions and chapters of all papers, and their places."""
    rows = list(catalog.papers().values())
    documents, chapters = [near.describe(ROOT, row) for row in rows], [row.chapter for row in rows]
    return documents, chapters, near.layout(documents, chapters)


def test_the_same_book_gives_the_same_map(whole_field):
    documents, chapters, places = whole_field
    assert places.shape == (425, 2)
    assert places.min() == 0 and places.max() == 1
    np.testing.assert_array_equal(near.layout(documents, chapters), places)


@pytest.mark.parametrize("gone", [7, 333])
def test_one_paper_more_moves_the_others_little(whole_field, gone):
    documents, chapters, places = whole_field
    without = near.layout(documents[:gone] + documents[gone + 1 :], chapters[:gone] + chapters[gone + 1 :])
    moved = np.linalg.norm(without - np.delete(places, gone, 0), axis=1)
    assert np.median(moved) < 0.03
    assert np.quantile(moved, 0.9) < 0.1


def test_neighbours_on_the_map_are_alike(whole_field):
    _, chapters, places = whole_field
    near = NearestNeighbors(n_neighbors=5).fit(places).kneighbors(return_distance=False)
    same = np.array(chapters)[near] == np.array(chapters)[:, None]
    assert same.mean() > 0.6  # by chance 0.015


def test_the_words_place_a_point_not_only_its_chapter():
    subjects = ("attention heads translate sentences", "kernel methods bound regret")
    texts = [f"{subject} example {i}" for subject in subjects for i in range(20)]
    places = near.layout(texts, ["gans/critics", "nlp/speech"] * 20)
    first, second = places[:20], places[20:]
    assert np.linalg.norm(first.mean(0) - second.mean(0)) > 2 * max(first.std(0).mean(), second.std(0).mean())


@pytest.mark.parametrize(
    ("documents", "chapters", "message"),
    [(["a", "b", "c"], ["gans/critics"], "got 1 and 3"), (["a"], ["gans/critics"], "at least three"), (["a"] * 3, ["x/y"] * 3, "x/y")],
)
def test_bad_input_of_the_layout(documents, chapters, message):
    with pytest.raises(ValueError, match=message):
        near.layout(documents, chapters)


def test_points_are_moved_apart_and_no_farther():
    points = np.array([[0.0, 0.0], [0.0, 0.0], [1.0, 0.0], [50.0, 50.0]])
    moved = near.spread_out(points, 4.0)
    gaps = np.linalg.norm(moved[:, None] - moved[None], axis=-1) + 1e9 * np.eye(4)
    assert gaps.min() > 3.9
    np.testing.assert_array_equal(moved[3], points[3])
    assert (points[0] == 0).all()  # the argument stays as it was


def test_the_nearest_share_the_most_words():
    found = near.nearest(["cats purr", "dogs bark", "cats purr loudly", "dogs bark loudly"], 2)
    assert found[:, 0].tolist() == [2, 3, 0, 1]


def test_relations_are_the_imports(tmp_path):
    papers = catalog.papers()
    one, two = papers["miyato2018spectral"], papers["salimans2018otgan"]
    for row, text in (
        (one, "import torch\n"),
        (two, f"from {one.module} import hinge_d_loss\nfrom dlatlas.gans.kit import nets\nfrom dlatlas.kit.metrics import accuracy\n"),
    ):
        (tmp_path / row.source).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / row.source).write_text(text)
    for name in ("gans/kit/nets.py", "kit/metrics.py"):
        (tmp_path / "lib/dlatlas" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "lib/dlatlas" / name).touch()
    found = near.relations(tmp_path, {one.key: one, two.key: two})
    assert found[one.key] == {"builds": [], "parts": []}
    assert found[two.key]["builds"] == [one.key]
    assert found[two.key]["parts"] == ["gans.kit.nets", "kit.metrics"]


def test_the_page_holds_every_paper_as_point_and_as_row(small_site):
    text = (small_site / "map.html").read_text()
    keys = set(catalog.papers())
    assert set(re.findall(r'<a href="[^"]+" class="dlatlas-dot [^"]+" data-key="([^"]+)"', text)) == keys
    assert set(re.findall(r'<tr [^>]*data-key="([^"]+)"', text)) == keys
    told = json.loads(re.search(r'class="dlatlas-map-data">(.*?)</script>', text, flags=re.S)[1])
    assert set(told) == keys
