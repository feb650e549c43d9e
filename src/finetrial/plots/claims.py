"""The forest plot: every claim's difference, its interval and its margin."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from finetrial import palette
from finetrial.palette import GREEN, INK, MUTED, PAPER
from finetrial.plots.canvas import Row, mark, new_figure, style
from finetrial.report_text import short


def claims_figure(rows: Sequence[Row]) -> Figure:
    """A forest plot: each claim's difference with its interval, and the side of the margin where it holds.

    Rows: panel (the axis label), label, verdict, verdict_text, estimate, low, high (None: no interval),
    unbounded (whether the data do not bound it), margin (where the claim's border lies), holds ("right" or
    "left" of it).
    """
    with style():
        panels = list(dict.fromkeys(row["panel"] for row in rows))
        heights = [0.62 + 0.52 * sum(row["panel"] == panel for row in rows) for panel in panels]
        figure = new_figure(sum(heights))
        grid = figure.add_gridspec(len(panels), 1, height_ratios=heights)
        for index, panel in enumerate(panels):
            axes = figure.add_subplot(grid[index])
            mine = [row for row in rows if row["panel"] == panel]
            axes.axvline(0, color=MUTED, linewidth=0.9, zorder=1)
            for y, row in enumerate(mine):
                _claim(axes, y, row)
            axes.margins(x=0.08)
            _sides(axes, mine)
            axes.set_ylim(len(mine) - 0.45, -0.72)
            axes.set_yticks([])
            axes.spines["left"].set_visible(False)
            axes.set_xlabel(panel)
            axes.grid(axis="x")
        return figure


def _claim(axes: Axes, y: int, row: Row) -> None:
    colour, marker, fill = palette.VERDICT_LOOK[row["verdict"]]
    text: dict[str, Any] = {
        "transform": axes.get_yaxis_transform(),
        "va": "center",
        "fontsize": 8.5,
        "zorder": 5,
    }
    text["bbox"] = {"facecolor": PAPER, "edgecolor": "none", "pad": 0.6}
    axes.text(0, y - 0.42, short(row["label"], 46), **text)
    axes.text(1, y - 0.42, row["verdict_text"], ha="right", fontweight="bold", **text)
    if row["estimate"] is None:
        axes.text(0, y, "no interval", **text | {"color": MUTED})
        return
    if row["low"] is not None:
        ends = [row["low"], row["high"]]
        axes.plot(ends, [y, y], color=colour, linewidth=2, solid_capstyle="butt", zorder=3)
    elif row["unbounded"]:
        across = {"transform": axes.get_yaxis_transform(), "zorder": 3}
        axes.plot([0.0, 1.0], [y, y], color=colour, linewidth=1.4, linestyle=(0, (1, 1.6)), **across)
        for end, head in ((0.006, "<"), (0.994, ">")):
            axes.plot([end], [y], marker=head, color=colour, markersize=6, linestyle="none", **across)
    inside = PAPER if fill == "none" else fill
    mark(axes, row["estimate"], y, marker, colour, 8, markerfacecolor=inside, markeredgewidth=1.5, zorder=4)
    if row["margin"] is not None:
        axes.plot([row["margin"]] * 2, [y - 0.2, y + 0.2], color=INK, linewidth=1.4, zorder=2)


def _sides(axes: Axes, rows: Sequence[Row]) -> None:
    """Shade, in every line, from the margin to the edge on the side where the claim holds."""
    low, high = axes.get_xlim()
    for y, row in enumerate(rows):
        if row["margin"] is not None:
            start, end = (row["margin"], high) if row["holds"] == "right" else (low, row["margin"])
            axes.barh(
                [y], [end - start], left=start, height=0.4, color=GREEN, alpha=0.13, linewidth=0, zorder=0
            )
    axes.set_xlim(low, high)
