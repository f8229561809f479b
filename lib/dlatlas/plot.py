"""The house style: figures that read in light and dark, on paper and on a phone.

A figure leaves the notebook as inline SVG. Its text and axes take the colour of the page (``currentColor``), so the same
output is legible on a white page, a dark page and in JupyterLab; data keep the colours below, which were chosen to have
enough contrast with both.
"""

from __future__ import annotations

import hashlib
import html
import io
import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.spines import Spine
from matplotlib.text import Text

TABLE_MIME = "application/vnd.dlatlas.table+json"
# Distinguishable with the common colour-vision deficiencies and at least 3:1 against white and against #121212.
PALETTE = ["#2f7fc1", "#d55e00", "#199e77", "#b45fb0", "#a67c00", "#7f7f7f", "#d1495b", "#3b9ab2"]
LINE_STYLES = ["-", "--", "-.", ":"]
# Stands for "the colour of the page's text" while matplotlib draws; replaced by currentColor in the SVG.
_INK = "#010203"
_MANY_POINTS = 2000

_STYLE = {
    "figure.facecolor": "none",
    "figure.dpi": 100,
    "figure.constrained_layout.use": True,
    "savefig.facecolor": "none",
    "axes.facecolor": "none",
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "axes.titlecolor": _INK,
    "axes.titlesize": 10.5,
    "axes.labelsize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.linewidth": 0.8,
    "axes.prop_cycle": mpl.cycler(color=PALETTE),
    "grid.color": _INK,
    "grid.alpha": 0.14,
    "grid.linewidth": 0.7,
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "lines.linewidth": 1.8,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "font.size": 10,
    "image.cmap": "viridis",
    "svg.fonttype": "path",
}


def color(i: int) -> str:
    """The i-th colour of the house palette, repeating."""
    return PALETTE[i % len(PALETTE)]


def figure(rows: int = 1, cols: int = 1, *, width: float = 7.0, height: float | None = None, **kwargs: Any) -> tuple[Figure, Any]:
    """Figure and axes in the house style; `height` defaults to 3.1 inches a row. Finish it with :func:`show`.

    Further arguments go to :func:`matplotlib.pyplot.subplots`.
    """
    with plt.rc_context(_STYLE):
        return plt.subplots(rows, cols, figsize=(width, 3.1 * rows if height is None else height), **kwargs)


def curves(
    ax: Axes,
    series: Mapping[str, Any],
    *,
    xlabel: str = "",
    ylabel: str = "",
    logx: bool = False,
    logy: bool = False,
    title: str | None = None,
    legend: bool = True,
) -> Axes:
    """Draw one line per entry: ``y``, ``(x, y)`` or ``(x, mean, spread)``; spread is drawn as a band of ``mean +- spread``.

    After the eighth line the dash pattern changes, so that colours are never the only difference.
    """
    with plt.rc_context(_STYLE):
        for i, (label, data) in enumerate(series.items()):
            parts = [_array(d) for d in data] if isinstance(data, tuple) else [_array(data)]
            x, y = (np.arange(len(parts[0])), parts[0]) if len(parts) == 1 else parts[:2]
            style = LINE_STYLES[i // len(PALETTE) % len(LINE_STYLES)]
            ax.plot(x, y, label=label, color=color(i), linestyle=style)
            if len(parts) == 3:
                ax.fill_between(x, y - parts[2], y + parts[2], color=color(i), alpha=0.18, linewidth=0)
        if logx:
            ax.set_xscale("log")
        if logy:
            ax.set_yscale("log")
        ax.set(xlabel=xlabel, ylabel=ylabel)
        if title:
            ax.set_title(title)
        if legend and len(series) > 6:
            ax.legend(loc="upper left", bbox_to_anchor=(1, 1))
        elif legend:
            ax.legend()
    return ax


def bars(
    ax: Axes, values: Mapping[str, float | Sequence[float]], *, ylabel: str = "", horizontal: bool = False, title: str | None = None
) -> Axes:
    """One bar per entry at the mean of its values, with a dot for each value (one per seed)."""
    with plt.rc_context(_STYLE):
        place = np.arange(len(values))
        for i, runs in enumerate(values.values()):
            runs = np.atleast_1d(_array(runs))
            (ax.barh if horizontal else ax.bar)(i, runs.mean(), 0.7, color=color(i), alpha=0.75)
            if len(runs) > 1:
                at = np.full(len(runs), i)
                ax.plot(*((runs, at) if horizontal else (at, runs)), "o", color=_INK, markersize=3.5, alpha=0.75)
        if horizontal:
            ax.set_yticks(place, list(values))
            ax.invert_yaxis()
            ax.set_xlabel(ylabel)
            ax.grid(False, axis="y")
        else:
            ax.set_xticks(
                place, list(values), rotation=25 if max(map(len, values)) > 9 else 0, ha="right" if max(map(len, values)) > 9 else "center"
            )
            ax.set_ylabel(ylabel)
            ax.grid(False, axis="x")
        if title:
            ax.set_title(title)
    return ax


def images(
    x: Any,
    *,
    rows: int | None = None,
    titles: Sequence[str] | None = None,
    cmap: str = "gray",
    size: float = 0.8,
    vmin: float | None = None,
    vmax: float | None = None,
) -> Figure:
    """Sheet of images ``[N, H, W]``, ``[N, 1, H, W]`` or ``[N, 3, H, W]``, row by row."""
    x = _array(x)
    if x.ndim == 4 and x.shape[1] in (1, 3):
        x = x[:, 0] if x.shape[1] == 1 else x.transpose(0, 2, 3, 1)
    if x.ndim not in (3, 4) or len(x) == 0:
        raise ValueError(f"expected images [N, H, W], [N, 1, H, W] or [N, 3, H, W], got shape {x.shape}")
    rows = rows or max(1, math.isqrt(len(x) // 2))
    cols = math.ceil(len(x) / rows)
    fig, axes = figure(rows, cols, width=min(7.0, size * cols), height=rows * (size + (0.25 if titles else 0)), squeeze=False)
    for ax, picture, title in itertools.zip_longest(axes.flat, x, titles or []):
        ax.axis("off")
        if picture is not None:
            ax.imshow(picture, cmap=cmap, vmin=vmin, vmax=vmax, interpolation="nearest")
            ax.set_title(title or "", fontsize=8)
    return fig


def phase(
    ax: Axes,
    field: Callable[[Any], Any],
    xlim: tuple[float, float] = (-3, 3),
    ylim: tuple[float, float] = (-3, 3),
    *,
    n: int = 60,
    arrows: int = 16,
    cmap: str = "viridis",
    levels: int = 14,
) -> Axes:
    """Picture of a function of the plane: ``field(points [M, 2])`` gives values ``[M]`` (surface) or vectors ``[M, 2]`` (arrows)."""
    import torch

    def on_grid(k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        gx, gy = np.meshgrid(np.linspace(*xlim, k), np.linspace(*ylim, k))
        points = torch.as_tensor(np.stack([gx.ravel(), gy.ravel()], 1), dtype=torch.get_default_dtype())
        return gx, gy, _array(field(points))

    gx, gy, out = on_grid(n)
    with plt.rc_context(_STYLE):
        if out.ndim == 1 or out.shape[1] == 1:
            mesh = ax.contourf(gx, gy, out.reshape(n, n), levels=levels, cmap=cmap, alpha=0.85)
            ax.figure.colorbar(mesh, ax=ax, shrink=0.85)
        else:
            gx, gy, out = on_grid(arrows)
            ax.quiver(gx, gy, out[:, 0].reshape(arrows, arrows), out[:, 1].reshape(arrows, arrows), color=_INK, alpha=0.6, width=0.004)
        ax.set(xlim=xlim, ylim=ylim)
        ax.grid(False)
    return ax


class Picture:
    """A finished figure: inline SVG with its alternative text."""

    def __init__(self, svg: str, alt: str):
        self.svg, self.alt = svg, alt

    def __repr__(self) -> str:
        return f"[figure: {self.alt}]"

    def _repr_html_(self) -> str:
        return f"<figure class='dlatlas-figure'>{self.svg}</figure>"


def show(fig: Figure, *, alt: str) -> None:
    """Put the figure into the notebook as SVG and close it; `alt` says in words what it shows.

    Clouds and lines of many points are turned into pixels, everything else stays vector.
    """
    if not alt or len(alt.split()) < 4:
        raise ValueError(f"alt must say what the figure shows in a sentence, got {alt!r}")
    _ink(fig)
    for artist in fig.findobj():
        if isinstance(artist, PathCollection) and len(artist.get_offsets()) > _MANY_POINTS:
            artist.set_rasterized(True)
        if isinstance(artist, mpl.lines.Line2D) and len(artist.get_xdata(orig=False)) > 2 * _MANY_POINTS:
            artist.set_rasterized(True)
    buffer = io.StringIO()
    # A fixed salt: the same figure gives the same bytes.
    with plt.rc_context({**_STYLE, "svg.hashsalt": "dlatlas"}):
        fig.savefig(buffer, format="svg", dpi=110, metadata={"Date": None, "Creator": None})
    plt.close(fig)
    picture = Picture(_inline(buffer.getvalue(), alt), alt)
    try:
        from IPython.display import display
    except ImportError:
        print(picture)
    else:
        display(picture)


def _ink(fig: Figure) -> None:
    """What a chapter drew by itself (legends, colour bars, labels) takes the page's colours too: black would vanish in the dark, white boxes glare."""

    def black(color: Any) -> bool:
        return color is not None and mpl.colors.is_color_like(color) and mpl.colors.to_hex(color) == "#000000"

    for ax in fig.axes:
        for axis in (ax.xaxis, ax.yaxis):
            if any(black(label.get_color()) for label in axis.get_ticklabels()):
                axis.set_tick_params(color=_INK, labelcolor=_INK)  # also of ticks that are made while drawing
    for artist in fig.findobj():
        if isinstance(artist, Legend):
            artist.set_frame_on(False)
        elif isinstance(artist, Text | mpl.lines.Line2D) and black(artist.get_color()):
            artist.set_color(_INK)
        elif isinstance(artist, Spine) and black(artist.get_edgecolor()):
            artist.set_edgecolor(_INK)


def table(rows: Sequence[Mapping[str, Any]], *, caption: str, name: str = "") -> None:
    """Show a table of results. A list of floats is one value a seed and is shown as mean and standard deviation.

    ``name="side-by-side"`` marks the chapter's comparison of all its methods.
    """
    if not rows:
        raise ValueError("the table has no rows")
    columns = list(dict.fromkeys(itertools.chain.from_iterable(rows)))
    plain = [{c: _plain(row.get(c)) for c in columns} for row in rows]
    try:
        from IPython.display import display
    except ImportError:
        print(text_table(columns, plain))
        return
    bundle = {"text/plain": text_table(columns, plain), "text/html": html_table(columns, plain, caption)}
    display(bundle | {TABLE_MIME: {"name": name, "caption": caption, "columns": columns, "rows": plain}}, raw=True)


def _array(x: Any) -> np.ndarray:
    return x.detach().cpu().numpy() if hasattr(x, "detach") else np.asarray(x)


def _plain(value: Any) -> Any:
    if isinstance(value, str) or value is None:
        return value
    array = _array(value)
    return array.item() if array.ndim == 0 else array.astype(float).tolist()


def _format(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, list):
        return f"{_format(float(np.mean(value)))} ± {_format(float(np.std(value, ddof=1)))}" if len(value) > 1 else _format(value[0])
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if isinstance(value, float) else str(value)


def _cell(value: Any, *, first: bool) -> str:
    text = html.escape(_format(value))
    if first:
        return f"<th scope='row'>{text}</th>"
    return f"<td{'' if isinstance(value, str) else ' class=number'}>{text}</td>"


def html_table(columns: Sequence[str], rows: Sequence[Mapping[str, Any]], caption: str) -> str:
    """Rows as an HTML table that scrolls sideways where it must."""
    head = "".join(f"<th scope='col'>{html.escape(c)}</th>" for c in columns)
    body = "".join("<tr>" + "".join(_cell(row[c], first=c == columns[0]) for c in columns) + "</tr>" for row in rows)
    return (
        f"<div class='dlatlas-scroll'><table class='dlatlas-table'><caption>{html.escape(caption)}</caption>"
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def text_table(columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as aligned plain text under their column names."""
    lines = [list(columns), *([_format(row.get(c)) for c in columns] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    return "\n".join("  ".join(text.ljust(w) for text, w in zip(line, widths)).rstrip() for line in lines)


def _inline(svg: str, alt: str) -> str:
    """Make matplotlib's SVG file fit for a page: no XML head, unique ids, page-coloured ink, alternative text, fluid width."""
    svg = svg[svg.index("<svg") :]
    prefix = hashlib.sha256((svg + alt).encode()).hexdigest()[:8]
    # The style element says "every element": inside a page it would reach beyond the figure.
    svg = re.sub(r"\s*<(metadata|style)\b.*?</\1>", "", svg, flags=re.S)
    svg = re.sub(r"""\bid="([^"]+)\"""", rf'id="f{prefix}-\1"', svg)
    svg = re.sub(r"""(href="|url\()#""", rf"\1#f{prefix}-", svg)
    svg = svg.replace(_INK, "currentColor")
    width, height = (float(x) for x in re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg).groups())
    label = html.escape(alt, quote=True)
    opening = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="0 0 {width:g} {height:g}" '
        f'role="img" aria-label="{label}" style="width:100%;max-width:{width * 4 / 3:.0f}px;height:auto;'
        f'stroke-linejoin:round;stroke-linecap:butt"><title>{label}</title>'
    )
    return opening + svg[svg.index(">") + 1 :].strip()
