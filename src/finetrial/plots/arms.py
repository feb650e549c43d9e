"""Figures of an arm's runs: scores of replicates, the search's trials, tuning curves, what methods cost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from finetrial.palette import GRID, INK, LINES, MUTED, PAPER, look_of
from finetrial.plots.canvas import Row, key, legend, log_axis, mark, new_figure, present, run_title, style
from finetrial.report_text import outcome_word, short, significant


def score_figure(rows: Sequence[Row], *, metric: str, methods: Sequence[str]) -> Figure:
    """Every replicate's test score, the mean with its interval, and the baselines.

    Rows: series ("replicate", "mean" or "baseline"), method (a baseline's name for baselines), replicate,
    score (None: failed), low, high; for titles those of `run_title`.
    """
    with style():
        figure = new_figure(3.4)
        axes = figure.add_subplot()
        arms = [r for r in rows if r["series"] != "baseline"]
        shown = present(arms, methods)
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
                    said = run_title(row, f"{metric} {significant(row['score'], 4)}")
                    mark(axes, at, row["score"], look["marker"], look["color"], 5, said, alpha=0.75, zorder=3)
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
    mark(axes, x, row["score"], look["marker"], colour, 8.5, markeredgecolor=PAPER, zorder=5)


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


def search_figure(rows: Sequence[Row], *, metric: str, methods: Sequence[str]) -> Figure:
    """Learning rate against validation score: range, start-up and guided trials, optimum, failures.

    Rows: method, trial, outcome, learning_rate, score, startup, share (of its steps), optimum, low, high (the
    range's ends); for titles those of `run_title`.
    """
    with style():
        figure = new_figure(3.7)
        axes = figure.add_subplot()
        log_axis(axes)
        handles: list[Any] = []
        for method in present(rows, methods):
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
                size = 6 if row["share"] == 1 else 3.5  # stopped by halving
                said = run_title(row, f"{metric} {significant(row['score'], 4)}")
                mark(axes, *at, marker, colour, size, said, markerfacecolor=fill, markeredgewidth=1.3, zorder=3)
                if row["optimum"]:
                    mark(axes, *at, "o", INK, 13, markerfacecolor="none", markeredgewidth=1.2, zorder=4)
            handles.append(key(short(method), marker, colour, colour))
        axes.margins(y=0.12)
        _failed_trials(axes, [r for r in rows if not _scored(r)], methods)
        axes.set_xlabel("learning rate (shaded: the range searched)")
        axes.set_ylabel(f"{metric} on validation")
        axes.grid(axis="y")
        legend(figure, handles + _search_keys(rows))
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
        said = run_title(row, f"{outcome_word(row['outcome'])}, no score")
        colour = look_of(methods, row["method"])["color"]
        mark(axes, row["learning_rate"], 0.05, marker, colour, 7, said, **look)


def _search_keys(rows: Sequence[Row]) -> list[Line2D]:
    failed = {r["outcome"] == "diverged" for r in rows if not _scored(r)}
    keys = [key("start-up (hollow)", "o"), key("guided (filled)", "o", MUTED)]
    if any(r["optimum"] for r in rows):
        keys.append(key("optimum", "o", ink=INK, size=10))
    if True in failed:
        keys.append(key("diverged (no score)", "x"))
    if False in failed:
        keys.append(key("failed (no score)", "+"))
    return keys


def tuning_figure(rows: Sequence[Row], *, metric: str, methods: Sequence[str]) -> Figure:
    """What the best of n random trials is expected to score, with its band, as far as that fits.

    Rows: method, trials (n), expected, low, high (None: the band is open on that side).
    """
    with style():
        figure = new_figure(3.4)
        axes = figure.add_subplot()
        bottom, top = min(r["expected"] for r in rows), max(r["expected"] for r in rows)
        room = 1.5 * (top - bottom) or 1.0  # a band of few trials is as wide as the metric: it is cut off
        bottom -= min(room, max(math.inf if r["low"] is None else bottom - r["low"] for r in rows))
        top += min(room, max(math.inf if r["high"] is None else r["high"] - top for r in rows))
        margin = 0.03 * (top - bottom)
        axes.set_ylim(bottom - margin, top + margin)
        handles: list[Any] = []
        for method in present(rows, methods):
            look = look_of(methods, method)
            mine = sorted((r for r in rows if r["method"] == method), key=lambda r: r["trials"])
            budgets = [r["trials"] for r in mine]
            low = [bottom - 2 * room if r["low"] is None else r["low"] for r in mine]
            high = [top + 2 * room if r["high"] is None else r["high"] for r in mine]
            axes.fill_between(budgets, low, high, color=look["color"], alpha=0.13, linewidth=0, zorder=1)
            for ends in (low, high):
                edge = {"color": look["color"], "linestyle": look["linestyle"], "linewidth": 0.7, "alpha": 0.7}
                axes.plot(budgets, ends, **edge)
            expected = [r["expected"] for r in mine]
            handles += axes.plot(budgets, expected, label=short(method), linewidth=2, zorder=3, **look)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("random trials")
        axes.set_ylabel(f"expected best {metric} on validation")
        axes.grid(axis="y")
        legend(figure, handles)
        return figure


def cost_figure(rows: Sequence[Row], *, methods: Sequence[str]) -> Figure:
    """One small panel per quantity, one line per method: bars from 0, or dots on a log axis.

    Rows: quantity, unit, log (dots instead of bars), method, value (None: not measured), low, high, text.
    """
    with style():
        quantities = list(dict.fromkeys(row["quantity"] for row in rows))
        shown = present(rows, methods)
        lines = -(-len(quantities) // 2)
        figure = new_figure(lines * (0.85 + 0.30 * len(shown)))
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
        log_axis(axes)
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
            mark(axes, row["value"], y, look["marker"], look["color"], 6.5)
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
