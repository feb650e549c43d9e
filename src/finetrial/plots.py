"""Tidy rows in, figures out; the only file that imports matplotlib.

Not for choosing what is shown (`report_figures.py`) nor for its colours (`palette.py`). The same rows give
the same bytes: no date, no random ids, no user's matplotlibrc, no pyplot state.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from finetrial import files, palette
from finetrial.palette import GREEN, GRID, INK, LINES, MUTED, PAPER, look_of
from finetrial.report_text import short
from finetrial.tidy_csv import csv_text

Row = Mapping[str, Any]


@contextmanager
def _style() -> Iterator[None]:
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(palette.STYLE)
        yield


def _figure(height_inches: float) -> Figure:
    figure = Figure(figsize=(palette.WIDTH_INCHES, height_inches), layout="constrained", facecolor=PAPER)
    FigureCanvasAgg(figure)
    return figure


def _present(rows: Sequence[Row], methods: Sequence[str]) -> list[str]:
    return [method for method in methods if any(row["method"] == method for row in rows)]


def _mark(axes: Axes, x: float, y: float, marker: str, colour: str, size: float = 6, **more: Any) -> None:
    """One mark, without a line."""
    axes.plot([x], [y], linestyle="none", marker=marker, color=colour, markersize=size, **more)


def _key(label: str, marker: str, fill: str = "none", ink: str = MUTED, size: float = 6) -> Line2D:
    """A legend's entry for a mark."""
    look = {"markerfacecolor": fill, "markeredgecolor": ink, "markersize": size, "markeredgewidth": 1.3}
    return Line2D([], [], linestyle="none", marker=marker, label=label, **look)


def _legend(figure: Figure, handles: Sequence[Any]) -> None:
    figure.legend(handles=handles, loc="outside lower center", ncols=3, handlelength=2.4, columnspacing=1.4)


def _power(value: float, position: int | None = None) -> str:  # matplotlib gives the position, too
    mantissa, _, exponent = f"{value:.0e}".partition("e")
    return f"{mantissa}e{int(exponent)}"


def _log_axis(axes: Axes) -> None:
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(_power))
    axes.xaxis.set_minor_formatter(NullFormatter())


def score_figure(rows: Sequence[Row], *, metric: str, methods: Sequence[str]) -> Figure:
    """Every replicate's test score, the mean with its interval, and the baselines.

    Rows: series ("replicate", "mean" or "baseline"), method (a baseline's name for baselines), replicate,
    score (None: failed), low, high.
    """
    with _style():
        figure = _figure(3.4)
        axes = figure.add_subplot()
        arms = [r for r in rows if r["series"] != "baseline"]
        shown = _present(arms, methods)
        runs = [r for r in arms if r["series"] == "replicate" and r["score"] is not None]
        numbers = sorted({r["replicate"] for r in runs})
        spread = 0.10 / max(1, len(numbers) - 1)
        nudge = {n: -0.21 + spread * i for i, n in enumerate(numbers)}
        for number in numbers:  # the same seed in every method: the pairs that are compared
            pair = sorted((shown.index(r["method"]), r["score"]) for r in runs if r["replicate"] == number)
            xs = [x + nudge[number] for x, _ in pair]
            axes.plot(xs, [y for _, y in pair], color=GRID, linewidth=0.9, zorder=1)
        for x, method in enumerate(shown):
            look = look_of(methods, method)
            for row in runs:
                if row["method"] == method:
                    at = x + nudge[row["replicate"]]
                    _mark(axes, at, row["score"], look["marker"], look["color"], 5, alpha=0.75, zorder=3)
            for row in arms:
                if row["series"] == "mean" and row["method"] == method:
                    _mean(axes, x + 0.16, row, look)
        axes.set_xticks(range(len(shown)), [_arm_label(arms, method) for method in shown])
        axes.set_xlim(-0.5, max(len(shown), 1) - 0.5)
        axes.set_ylabel(f"{metric} on test")
        axes.grid(axis="y")
        axes.tick_params(axis="x", length=0)
        axes.margins(y=0.12)
        _baselines(axes, arms, [r for r in rows if r["series"] == "baseline"])
        return figure


def _arm_label(rows: Sequence[Row], method: str) -> str:
    mine = [r for r in rows if r["series"] == "replicate" and r["method"] == method]
    valid = sum(r["score"] is not None for r in mine)
    count = f"{valid} seeds" if valid == len(mine) else f"{valid} of {len(mine)} seeds"
    return f"{short(method, 16)}\n{count}"


def _mean(axes: Axes, x: float, row: Row, look: Mapping[str, Any]) -> None:
    colour = look["color"]
    if row["low"] is not None:
        axes.plot([x, x], [row["low"], row["high"]], color=colour, linewidth=2, zorder=4)
        for end in ("low", "high"):
            axes.plot([x - 0.035, x + 0.035], [row[end]] * 2, color=colour, linewidth=1.4, zorder=4)
    _mark(axes, x, row["score"], look["marker"], colour, 8.5, markeredgecolor=PAPER, zorder=5)


def _baselines(axes: Axes, arms: Sequence[Row], rows: Sequence[Row]) -> None:
    """Lines across, named at the right edge, moved apart where names would overlap.

    A baseline so far off that the replicates would shrink to a point is named at the edge instead.
    """
    ends = [r[key] for r in arms for key in ("score", "low", "high") if r[key] is not None]
    reach = 3 * (max(ends) - min(ends)) if ends else 0.0
    near = [r for r in rows if not reach or min(ends) - reach <= r["score"] <= max(ends) + reach]
    for place, row in enumerate(r for r in rows if r not in near):
        text = f"{'↓' if row['score'] < min(ends) else '↑'} baseline {short(row['method'])}: {row['score']:.3g}"
        axes.text(0.01, 0.03 + 0.07 * place, text, transform=axes.transAxes, color=MUTED, fontsize=8)
    ordered = sorted(near, key=lambda r: r["score"])
    for index, row in enumerate(ordered):
        axes.axhline(row["score"], color=MUTED, linewidth=1.1, linestyle=LINES[1 + index % 4], zorder=2)
    low, high = axes.get_ylim()
    axes.set_ylim(low, high)
    place = -1.0
    for row in ordered:
        share = (row["score"] - low) / (high - low)
        place = max(share, place + 0.07)
        line = {"color": MUTED, "linewidth": 0.7, "clip_on": False, "transform": axes.transAxes}
        axes.plot([1.0, 1.025], [share, place], **line)
        axes.text(
            1.035, place, short(row["method"]), transform=axes.transAxes, color=MUTED, fontsize=8, va="center"
        )


def drift_figure(rows: Sequence[Row], *, methods: Sequence[str]) -> Figure:
    """Drift by layer: the mean and every seed of each method, the seed-to-seed band, and the control at 0.

    Rows: series ("mean", "seed", "seed_to_seed" or "control"), method, replicate, layer, drift.
    """
    with _style():
        figure = _figure(3.6)
        axes = figure.add_subplot()
        handles: list[Any] = []
        for method in _present([r for r in rows if r["series"] == "mean"], methods):
            look = look_of(methods, method)
            colour = look["color"]
            mine = [r for r in rows if r["method"] == method and r["drift"] is not None]
            _band(axes, [r for r in mine if r["series"] == "seed_to_seed"], colour)
            seeds = [r for r in mine if r["series"] == "seed"]
            for replicate in sorted({r["replicate"] for r in seeds}):
                one = [r for r in seeds if r["replicate"] == replicate]
                _line(axes, one, color=colour, linewidth=0.7, alpha=0.45, zorder=2)
            means = [r for r in mine if r["series"] == "mean"]
            handles += _line(axes, means, label=short(method), linewidth=2, markersize=5, zorder=4, **look)
        control = [r for r in rows if r["series"] == "control"]
        if control:
            look = {"color": MUTED, "linewidth": 1.2, "linestyle": LINES[2], "zorder": 3}
            handles += _line(axes, control, label="base against base", **look)
        handles.append(Line2D([], [], color=MUTED, linewidth=0.7, label="one seed"))
        if any(r["series"] == "seed_to_seed" for r in rows):
            handles.append(Patch(color=MUTED, alpha=0.25, linewidth=0, label="seed to seed"))
        axes.set_xlabel("layer (0: embeddings)")
        axes.set_ylabel("drift, 1 − CKA with the base")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(axis="y")
        _legend(figure, handles)
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


def search_figure(rows: Sequence[Row], *, metric: str, methods: Sequence[str]) -> Figure:
    """Learning rate against validation score: range, start-up and guided trials, optimum, failures.

    Rows: method, trial, outcome, learning_rate, score, startup, optimum, low, high (the range's ends).
    """
    with _style():
        figure = _figure(3.7)
        axes = figure.add_subplot()
        _log_axis(axes)
        handles: list[Any] = []
        for method in _present(rows, methods):
            look = look_of(methods, method)
            colour, marker = look["color"], look["marker"]
            mine = [r for r in rows if r["method"] == method]
            low, high = mine[0]["low"], mine[0]["high"]
            if low is not None:
                axes.axvspan(low, high, color=colour, alpha=0.07, linewidth=0, zorder=0)
                for end in (low, high):
                    axes.axvline(end, color=colour, linewidth=0.9, linestyle=look["linestyle"], alpha=0.7)
            for row in (r for r in mine if _scored(r)):
                at = (row["learning_rate"], row["score"])
                fill = "none" if row["startup"] else colour
                _mark(axes, *at, marker, colour, markerfacecolor=fill, markeredgewidth=1.3, zorder=3)
                if row["optimum"]:
                    _mark(axes, *at, "o", INK, 13, markerfacecolor="none", markeredgewidth=1.2, zorder=4)
            handles.append(_key(short(method), marker, colour, colour))
        axes.margins(y=0.12)
        _failed_trials(axes, [r for r in rows if not _scored(r)], methods)
        axes.set_xlabel("learning rate (shaded: the range searched)")
        axes.set_ylabel(f"{metric} on validation")
        axes.grid(axis="y")
        _legend(figure, handles + _search_keys(rows))
        return figure


def _scored(row: Row) -> bool:
    return row["score"] is not None and row["outcome"] == "done"


def _failed_trials(axes: Axes, rows: Sequence[Row], methods: Sequence[str]) -> None:
    """Crosses along the bottom edge: they have a learning rate, but no score."""
    if not rows:
        return
    low, high = axes.get_ylim()
    axes.set_ylim(low - 0.14 * (high - low), high)
    for row in rows:
        marker = "x" if row["outcome"] == "diverged" else "+"
        look = {"transform": axes.get_xaxis_transform(), "markeredgewidth": 1.8, "zorder": 3}
        _mark(axes, row["learning_rate"], 0.05, marker, look_of(methods, row["method"])["color"], 7, **look)


def _search_keys(rows: Sequence[Row]) -> list[Line2D]:
    failed = {r["outcome"] == "diverged" for r in rows if not _scored(r)}
    keys = [_key("start-up (hollow)", "o"), _key("guided (filled)", "o", MUTED)]
    if any(r["optimum"] for r in rows):
        keys.append(_key("optimum", "o", ink=INK, size=10))
    if True in failed:
        keys.append(_key("diverged (no score)", "x"))
    if False in failed:
        keys.append(_key("failed (no score)", "+"))
    return keys


def cost_figure(rows: Sequence[Row], *, methods: Sequence[str]) -> Figure:
    """One small panel per quantity, one line per method: bars from 0, or dots on a log axis.

    Rows: quantity, unit, log (dots instead of bars), method, value (None: not measured), low, high, text.
    """
    with _style():
        quantities = list(dict.fromkeys(row["quantity"] for row in rows))
        shown = _present(rows, methods)
        lines = -(-len(quantities) // 2)
        figure = _figure(lines * (0.85 + 0.30 * len(shown)))
        for index, quantity in enumerate(quantities):
            mine = [r for r in rows if r["quantity"] == quantity]
            axes = figure.add_subplot(lines, 2, index + 1)
            _cost_panel(axes, mine, shown, methods)
            unit = mine[0]["unit"]
            axes.set_title(f"{quantity}, {unit}" if unit else quantity, color=INK)
        return figure


def _cost_panel(axes: Axes, rows: Sequence[Row], shown: Sequence[str], methods: Sequence[str]) -> None:
    log = rows[0]["log"]
    ends = {row["method"]: row["value"] if row["high"] is None else row["high"] for row in rows}
    known = [end for end in ends.values() if end is not None]
    if log:
        _log_axis(axes)
        axes.set_xlim(min(known) / 4, max(known) * 15)
    else:
        axes.set_xlim(0, (max(known, default=1) or 1) * 1.5)
        axes.xaxis.set_major_locator(MaxNLocator(4))
    for row in rows:
        y, look = shown.index(row["method"]), look_of(methods, row["method"])
        if row["value"] is None:
            across = axes.get_yaxis_transform()
            axes.text(0.02, y, "not measured", transform=across, va="center", color=MUTED, fontsize=8)
            continue
        if log:
            _mark(axes, row["value"], y, look["marker"], look["color"], 6.5)
        else:
            axes.barh([y], [row["value"]], height=0.5, color=look["color"], alpha=0.85)
        if row["low"] is not None:
            axes.plot([max(row["low"], 0), row["high"]], [y, y], color=INK, linewidth=1.2)
        beside = {"xytext": (6, 0), "textcoords": "offset points", "va": "center", "fontsize": 8}
        axes.annotate(row["text"], (ends[row["method"]], y), **beside)
    axes.set_yticks(range(len(shown)), [short(method, 14) for method in shown])
    axes.set_ylim(len(shown) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=7.5)
    axes.grid(axis="x")


def claims_figure(rows: Sequence[Row]) -> Figure:
    """A forest plot: each claim's difference with its interval, and the side of the margin where it holds.

    Rows: panel (the axis label), label, verdict, verdict_text, estimate, low, high (None: no interval),
    margin (where the claim's border lies), holds ("right" or "left" of it).
    """
    with _style():
        panels = list(dict.fromkeys(row["panel"] for row in rows))
        heights = [0.62 + 0.52 * sum(row["panel"] == panel for row in rows) for panel in panels]
        figure = _figure(sum(heights))
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
    inside = PAPER if fill == "none" else fill
    _mark(axes, row["estimate"], y, marker, colour, 8, markerfacecolor=inside, markeredgewidth=1.5, zorder=4)
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


def save(figure: Figure, rows: Sequence[Row], folder: Path, name: str) -> str:
    """Write name.svg, .pdf, .png (300 dpi) and the rows behind them as name.csv; gives the SVG's text."""
    metadata: dict[str, dict[str, None]] = {
        "svg": {"Date": None, "Creator": None},
        "pdf": {"CreationDate": None, "Creator": None, "Producer": None},
        "png": {"Software": None},
    }
    drawn = {}
    with _style():
        figure.draw_without_rendering()  # lay out once: the three formats then agree, and take half the time
        figure.set_layout_engine("none")
        for kind, fields in metadata.items():
            buffer = io.BytesIO()
            figure.savefig(buffer, format=kind, dpi=palette.PNG_DPI if kind == "png" else 72, metadata=fields)
            drawn[kind] = buffer.getvalue()
    for kind, data in drawn.items():
        files.write_bytes(folder / f"{name}.{kind}", data)
    files.write_text(folder / f"{name}.csv", csv_text(rows))
    return drawn["svg"].decode()
