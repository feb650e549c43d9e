"""What all figures are drawn with: one style, marks, legends, and the files they become.

The same rows give the same bytes: no date, no random ids, no user's matplotlibrc, no pyplot state.
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
from matplotlib.ticker import FuncFormatter, NullFormatter

from finetrial import files, palette
from finetrial.palette import MUTED, PAPER
from finetrial.tidy_csv import csv_text

Row = Mapping[str, Any]


@contextmanager
def style() -> Iterator[None]:
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(palette.STYLE)
        yield


def new_figure(height_inches: float) -> Figure:
    figure = Figure(figsize=(palette.WIDTH_INCHES, height_inches), layout="constrained", facecolor=PAPER)
    FigureCanvasAgg(figure)
    return figure


def present(rows: Sequence[Row], methods: Sequence[str]) -> list[str]:
    return [method for method in methods if any(row["method"] == method for row in rows)]


def mark(axes: Axes, x: float, y: float, marker: str, colour: str, size: float = 6, **more: Any) -> None:
    """One mark, without a line."""
    axes.plot([x], [y], linestyle="none", marker=marker, color=colour, markersize=size, **more)


def key(label: str, marker: str, fill: str = "none", ink: str = MUTED, size: float = 6) -> Line2D:
    """A legend's entry for a mark."""
    look = {"markerfacecolor": fill, "markeredgecolor": ink, "markersize": size, "markeredgewidth": 1.3}
    return Line2D([], [], linestyle="none", marker=marker, label=label, **look)


def legend(figure: Figure, handles: Sequence[Any]) -> None:
    figure.legend(handles=handles, loc="outside lower center", ncols=3, handlelength=2.4, columnspacing=1.4)


def _power(value: float, position: int | None = None) -> str:  # matplotlib gives the position, too
    mantissa, _, exponent = f"{value:.0e}".partition("e")
    return f"{mantissa}e{int(exponent)}"


def log_axis(axes: Axes) -> None:
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(_power))
    axes.xaxis.set_minor_formatter(NullFormatter())


def save(figure: Figure, rows: Sequence[Row], folder: Path, name: str) -> str:
    """Write name.svg, .pdf, .png (300 dpi) and the rows behind them as name.csv; gives the SVG's text."""
    metadata: dict[str, dict[str, None]] = {
        "svg": {"Date": None, "Creator": None},
        "pdf": {"CreationDate": None, "Creator": None, "Producer": None},
        "png": {"Software": None},
    }
    drawn = {}
    with style():
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
