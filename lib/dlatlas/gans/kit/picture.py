"""What a critic of points in the plane looks like: its values as colours, its gradient as arrows, the two sets as dots."""

from __future__ import annotations

from collections.abc import Callable

import torch
from matplotlib.axes import Axes
from torch import Tensor

from dlatlas import plot
from dlatlas.gans.kit.gradients import input_gradients

__all__ = ["critic_panel"]


def critic_panel(
    ax: Axes,
    critic: Callable[[Tensor], Tensor],
    real: Tensor,
    fake: Tensor,
    *,
    xlim: tuple[float, float] | None = None,
    ylim: tuple[float, float] | None = None,
    arrows: int = 11,
    n: int = 60,
    levels: int = 12,
    dots: int = 150,
    title: str | None = None,
) -> Axes:
    """Draw one panel: bright where the critic's value is high, arrows uphill, which is where the generator would move a sample.

    The longest arrow of a panel fills one cell of the grid of arrows, whatever the critic's scale: arrows compare places, not critics.

    Args:
        ax: axes of :func:`dlatlas.plot.figure`.
        critic: points ``[M, 2]`` to values ``[M]`` or ``[M, 1]``.
        real: ``[N, 2]``, drawn as dots.
        fake: ``[M, 2]``, drawn as crosses.
        xlim: range of the first axis; by default that of all points and a margin.
        ylim: range of the second axis, likewise.
        arrows: arrows along each axis.
        n: points of the surface along each axis.
        levels: steps of colour.
        dots: points of each set that are drawn at most.
        title: of the panel.

    Raises:
        ValueError: points that are not in the plane, an empty set, or a count below 1 (2 for `arrows`, `n` and `levels`).
    """
    for name, points in (("real", real), ("fake", fake)):
        if points.dim() != 2 or points.shape[1] != 2 or len(points) == 0:
            raise ValueError(f"expected {name} points [N, 2], got {tuple(points.shape)}")
    if min(arrows, n, levels) < 2 or dots < 1:
        raise ValueError(f"expected arrows, n, levels >= 2 and dots >= 1, got {arrows}, {n}, {levels} and {dots}")
    points = torch.cat([real, fake]).detach()
    xlim, ylim = (given or _range(points[:, i]) for i, given in enumerate((xlim, ylim)))
    gx, gy = torch.meshgrid(*(torch.linspace(*lim, n, dtype=real.dtype) for lim in (xlim, ylim)), indexing="xy")
    with torch.no_grad():
        values = critic(torch.stack([gx.ravel(), gy.ravel()], 1)).reshape(n, n)
    # A constant critic has no contours.
    if values.max() > values.min():
        ax.contourf(gx.numpy(), gy.numpy(), values.double().cpu().numpy(), levels=levels, cmap="viridis", alpha=0.8)
    places, (ux, uy) = _arrows(critic, xlim, ylim, arrows, real.dtype)
    ax.quiver(
        *places.T.numpy(), ux, uy, angles="xy", scale_units="xy", scale=1, color="#101010", alpha=0.75, width=0.006, headwidth=4, zorder=3
    )
    ax.plot(*real[:dots].detach().T.cpu().numpy(), "o", ms=3.5, color="white", mec="#101010", mew=0.6, label="real", zorder=4)
    ax.plot(*fake[:dots].detach().T.cpu().numpy(), "x", ms=4, color=plot.color(1), mew=1.2, label="fake", zorder=4)
    ax.set(xlim=xlim, ylim=ylim, xticks=[], yticks=[])
    ax.grid(False)
    if title:
        ax.set_title(title)
    return ax


def _range(values: Tensor) -> tuple[float, float]:
    low, high = float(values.min()), float(values.max())
    margin = 0.25 * (high - low) or 1.0
    return low - margin, high + margin


def _arrows(critic, xlim, ylim, count: int, dtype: torch.dtype):
    """Places ``[count^2, 2]`` in the middle of the cells, and arrows ``([count^2], [count^2])`` of which the longest is one cell long."""
    cell = [(high - low) / count for low, high in (xlim, ylim)]
    xs, ys = (low + size * (torch.arange(count, dtype=dtype) + 0.5) for (low, _), size in zip((xlim, ylim), cell))
    places = torch.cartesian_prod(xs, ys)
    gradient = input_gradients(critic, places, create_graph=False).double().cpu()
    longest = float(gradient.norm(dim=1).max())
    scaled = gradient * (min(cell) / longest if longest > 0 else 0.0)
    return places, (scaled[:, 0].numpy(), scaled[:, 1].numpy())
