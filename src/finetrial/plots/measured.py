"""Figures of what training did to the models: drift by layer, what was forgotten, the updates' spectrum."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, NullFormatter, StrMethodFormatter

from finetrial.palette import LINES, MUTED, PAPER, look_of
from finetrial.plots.canvas import Row, key, legend, mark, new_figure, present, run_title, style
from finetrial.report_text import short, significant


def drift_figure(rows: Sequence[Row], *, methods: Sequence[str]) -> Figure:
    """Drift by layer: the mean and every seed of each method, the seed-to-seed band, and the control at 0.

    Rows: series ("mean", "seed", "seed_to_seed", "perturbed" or "control"), method, replicate, layer, drift.
    """
    with style():
        figure = new_figure(3.6)
        axes = figure.add_subplot()
        handles: list[Any] = []
        for method in present([r for r in rows if r["series"] == "mean"], methods):
            look = look_of(methods, method)
            colour = look["color"]
            mine = [r for r in rows if r["method"] == method and r["drift"] is not None]
            _band(axes, [r for r in mine if r["series"] == "seed_to_seed"], colour)
            seeds = [r for r in mine if r["series"] == "seed"]
            for replicate in sorted({r["replicate"] for r in seeds}):
                one = [r for r in seeds if r["replicate"] == replicate]
                _line(axes, one, color=colour, linewidth=0.7, alpha=0.45, zorder=2)
            noise = [r for r in mine if r["series"] == "perturbed"]
            _line(axes, noise, color=colour, linewidth=1.1, linestyle=LINES[1], zorder=3)
            means = [r for r in mine if r["series"] == "mean"]
            handles += _line(axes, means, label=short(method), linewidth=2, markersize=5, zorder=4, **look)
        control = [r for r in rows if r["series"] == "control"]
        if control:
            look = {"color": MUTED, "linewidth": 1.2, "linestyle": LINES[2], "zorder": 3}
            handles += _line(axes, control, label="base against base", **look)
        handles.append(Line2D([], [], color=MUTED, linewidth=0.7, label="one seed"))
        if any(r["series"] == "perturbed" for r in rows):
            look = {"color": MUTED, "linewidth": 1.1, "linestyle": LINES[1]}
            handles.append(Line2D([], [], label="noise of the same norm", **look))
        if any(r["series"] == "seed_to_seed" for r in rows):
            handles.append(Patch(color=MUTED, alpha=0.25, linewidth=0, label="seed to seed"))
        axes.set_xlabel("layer (0: embeddings)")
        axes.set_ylabel("drift, 1 − CKA with the base")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(axis="y")
        legend(figure, handles)
        return figure


def _line(axes: Axes, rows: Sequence[Row], **look: Any) -> list[Line2D]:
    ordered = sorted(rows, key=lambda r: r["layer"])
    return axes.plot([r["layer"] for r in ordered], [r["drift"] for r in ordered], **look)


def _band(axes: Axes, rows: Sequence[Row], colour: str) -> None:
    """From the smallest to the largest value of each layer."""
    layers = sorted({r["layer"] for r in rows})
    values = [[r["drift"] for r in rows if r["layer"] == layer] for layer in layers]
    if layers:
        low, high = [min(v) for v in values], [max(v) for v in values]
        axes.fill_between(layers, low, high, color=colour, alpha=0.18, linewidth=0, zorder=1)


def forgetting_figure(rows: Sequence[Row], *, metric: str, unit: str, methods: Sequence[str]) -> Figure:
    """Learning against forgetting: every replicate, the mean of each method, and the line of no loss.

    Rows: series ("replicate" or "mean"), method, score, forgotten, low, high (the mean's interval); for titles
    those of `run_title`.
    """
    with style():
        figure = new_figure(3.6)
        axes = figure.add_subplot()
        axes.axhline(0, color=MUTED, linewidth=1.1, linestyle=LINES[2], zorder=1)
        handles: list[Any] = []
        for method in present(rows, methods):
            look = look_of(methods, method)
            colour, marker = look["color"], look["marker"]
            for row in (r for r in rows if r["method"] == method and r["score"] is not None):
                if row["series"] == "replicate":
                    at = (row["score"], row["forgotten"])
                    score, forgotten = (significant(value, 4) for value in at)
                    said = run_title(row, f"{metric} {score}, forgotten {forgotten} {unit}")
                    mark(axes, *at, marker, colour, 5, said, alpha=0.75, zorder=3)
                    continue
                if row["low"] is not None:
                    ends = [row["low"], row["high"]]
                    axes.plot([row["score"]] * 2, ends, color=colour, linewidth=2, zorder=4)
                at = (row["score"], row["forgotten"])
                mark(axes, *at, marker, colour, 9, markeredgecolor=PAPER, zorder=5)
            handles.append(key(short(method), marker, colour, colour))
        axes.set_xlabel(f"{metric} on test")
        axes.set_ylabel(f"forgotten, {unit}")
        axes.grid()
        axes.margins(x=0.1, y=0.12)
        legend(figure, handles)
        return figure


def spectrum_figure(rows: Sequence[Row], *, methods: Sequence[str]) -> Figure:
    """Intruder dimensions over thresholds for 1 and all directions, and effective ranks by matrix.

    Rows: series ("intruders" or "effective_rank"), method, threshold, top, value, matrix.
    """
    with style():
        figure = new_figure(3.4)
        left, right = figure.add_subplot(1, 2, 1), figure.add_subplot(1, 2, 2)
        ranked = [
            [r["matrix"] for r in rows if r["series"] == "effective_rank" and r["method"] == m] for m in methods
        ]
        # The method that changed most matrices has them in the model's order.
        names = dict.fromkeys(name for some in sorted(ranked, key=len, reverse=True) for name in some)
        places = {name: place for place, name in enumerate(names, start=1)}
        handles: list[Any] = []
        for method in present(rows, methods):
            look = look_of(methods, method)
            mine = [r for r in rows if r["method"] == method]
            curve = [r for r in mine if r["series"] == "intruders"]
            tops = sorted({r["top"] for r in curve})
            for top, width in ((tops[0], 0.8), (tops[-1], 2)):
                some = [r for r in curve if r["top"] == top]
                size = {"linewidth": width, "markersize": 2 * width}
                left.plot([r["threshold"] for r in some], [r["value"] for r in some], **size, **look)
            ranks = [(places[r["matrix"]], r["value"]) for r in mine if r["series"] == "effective_rank"]
            right.plot([x for x, _ in ranks], [y for _, y in ranks], linewidth=1.2, markersize=3.5, **look)
            handles.append(key(short(method), look["marker"], look["color"], look["color"]))
        left.set_xlabel("threshold of likeness")
        left.set_ylabel("intruder dimensions")
        left.yaxis.set_major_locator(MaxNLocator(integer=True))
        right.set_yscale("log")
        right.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        right.yaxis.set_minor_formatter(NullFormatter())
        right.set_xlabel("matrix, by layer")
        right.set_ylabel("effective rank of the update")
        right.xaxis.set_major_locator(MaxNLocator(integer=True))
        for axes in (left, right):
            axes.grid(axis="y")
        legend(figure, handles)
        return figure
