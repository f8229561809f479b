"""How the papers lie to each other: by the words of their descriptions, and by what their modules import.

Positions come from words alone. The descriptions (method, title, chapter, part, and the idea where the method is implemented) become
TF-IDF vectors, and t-SNE on their cosine distances lays them out. It starts from the chapters on a circle, in the order of the
book, without early exaggeration and with large neighbourhoods: so the same book gives the same map, and one more paper moves the
others little.
"""

from __future__ import annotations

import ast
import re
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.manifold import TSNE
from sklearn.neighbors import NearestNeighbors

from dlatlas import catalog
from dlatlas.book import docs

__all__ = ["components", "describe", "idea", "layout", "nearest", "relations", "spread_out"]


def describe(root: Path, row: catalog.Paper) -> str:
    """The words by which a paper is placed."""
    chapter = catalog.chapters()[row.chapter]
    named = f"{row.method} {row.title} " * 2  # its own words count twice beside those that it shares with its neighbours
    return f"{named}{chapter.title} {catalog.parts()[row.part].title} {idea(root, row)}"


def idea(root: Path, row: catalog.Paper) -> str:
    """The first paragraph of an implemented method's docstring, or nothing."""
    path = root / row.source
    return docs.first_paragraph(docs.read(path).doc.partition("\n\n")[2]) if path.is_file() else ""


def layout(documents: Sequence[str], chapters: Sequence[str]) -> np.ndarray:
    """Positions ``[n, 2]`` between 0 and 1 on the longer axis, similar documents near to each other.

    Args:
        documents: one text a point.
        chapters: the chapter's id of each point; it says where the point starts from.

    Raises:
        ValueError: lists of different lengths, fewer than three points, or an unknown chapter.
    """
    if len(documents) != len(chapters) or len(documents) < 3:
        raise ValueError(f"expected as many chapters as documents and at least three, got {len(chapters)} and {len(documents)}")
    order = {name: i for i, name in enumerate(catalog.chapters())}
    if unknown := sorted(set(chapters) - order.keys()):
        raise ValueError(f"no chapters {unknown} in the catalogue")
    vectors = _vectors(documents)
    around = 2 * np.pi * np.array([order[name] for name in chapters]) / len(order)
    # Points of one chapter start side by side; where, depends on their own first words only.
    aside = np.array([float(zlib.crc32(text[:40].encode())) for text in documents])
    start = 20 * np.stack([np.cos(around), np.sin(around)], 1) + 0.2 * np.stack([np.cos(aside), np.sin(aside)], 1)
    tsne = TSNE(
        metric="cosine",
        init=start,
        perplexity=min(50.0, (len(documents) - 1) / 3),
        early_exaggeration=1.0,
        learning_rate=50.0,
        max_iter=300,
        random_state=0,
    )
    points = tsne.fit_transform(vectors)
    points = points - points.min(0)
    return points / points.max()


def nearest(documents: Sequence[str], n: int) -> np.ndarray:
    """Positions ``[len(documents), n]`` in the list of the `n` other documents that resemble each most, best first."""
    return NearestNeighbors(n_neighbors=n, metric="cosine").fit(_vectors(documents)).kneighbors(return_distance=False)


def _vectors(documents: Sequence[str]):
    return TfidfVectorizer(stop_words="english", sublinear_tf=True).fit_transform(documents)


def spread_out(points: np.ndarray, distance: float, rounds: int = 60) -> np.ndarray:
    """The points moved apart, in `rounds` small steps, until hardly any two are nearer than `distance`."""
    points = np.array(points, dtype=float)
    for _ in range(rounds):
        near = NearestNeighbors(radius=distance).fit(points).radius_neighbors_graph(points, mode="distance").tocoo()
        first, second, gap = near.row, near.col, near.data
        pair = first < second
        if not pair.any():
            break
        first, second, gap = first[pair], second[pair], gap[pair]
        apart = points[first] - points[second]
        apart[gap == 0] = (1.0, 0.0)
        push = apart / np.maximum(np.linalg.norm(apart, axis=1), 1e-9)[:, None] * (distance - gap)[:, None] / 2
        np.add.at(points, first, push)
        np.add.at(points, second, -push)
    return points


_KIT = re.compile(r"dlatlas\.(\w+\.)?kit\.")


def relations(root: Path, rows: Mapping[str, catalog.Paper]) -> dict[str, dict[str, list[str]]]:
    """What the modules import: for each key ``builds`` (keys of other papers) and ``parts`` (shared components, as module names)."""
    by_module = {row.module: key for key, row in rows.items()}
    found = {}
    for key, row in rows.items():
        builds = sorted({by_module[name] for name in _imports(root / row.source) if name in by_module} - {key})
        found[key] = {"builds": builds, "parts": [name.removeprefix("dlatlas.") for name in components(root, row)]}
    return found


def components(root: Path, row: catalog.Paper) -> dict[str, list[str]]:
    """Modules of the kits that a paper's module imports, each with the names that it takes from it."""
    imported = _imports(root / row.source)
    modules = sorted(name for name in imported if _KIT.match(name) and (root / f"lib/{name.replace('.', '/')}.py").is_file())
    return {module: sorted(name.removeprefix(f"{module}.") for name in imported if name.startswith(f"{module}.")) for module in modules}


def _imports(path: Path) -> set[str]:
    """Modules that a file imports; of ``from a import b`` both ``a`` and ``a.b``, as b may be a module."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found
