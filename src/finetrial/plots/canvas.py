"""What all figures are drawn with: one style, marks, legends, and the files they become.

The same rows give the same bytes: no date, no random ids, no user's matplotlibrc, no pyplot state.
"""

from __future__ import annotations

import io
import itertools
import re
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
from finetrial.report_text import setting
from finetrial.tidy_csv import csv_text

Row = Mapping[str, Any]
SETTING = "setting."  # what a row's columns of hyper-parameters begin with
# In matplotlib's SVG: a mark that was given a title in place of an id, and where it lies.
TITLED = re.compile(r'<g id="title: ([^"]*)">(?=.*?<use [^>]*?\bx="([-\d.]+)" y="([-\d.]+)")', re.DOTALL)
TARGET_POINTS = 7  # radius of what a pointer has to hit; marks have 2.5 to 3


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


def mark(
    axes: Axes, x: float, y: float, marker: str, colour: str, size: float = 6, title: str = "", **more: Any
) -> None:
    """One mark, without a line; in SVG a pointer that rests on it is shown its title."""
    gid = f"title: {title}" if title else None
    axes.plot([x], [y], linestyle="none", marker=marker, color=colour, markersize=size, gid=gid, **more)


def run_title(row: Row, said: str) -> str:
    """What the mark of a run is called: `trial.sst2.lora.007-3f9c21aa: learning_rate 3.3e-4, rank 8; f1 88.1`.

    Rows: run_id (absent: no title) and `setting.<name>` for every hyper-parameter (None: not one of the run's).
    """
    if not row.get("run_id"):
        return ""
    known = {name.removeprefix(SETTING): row[name] for name in row if name.startswith(SETTING)}
    settings = ", ".join(f"{name} {setting(value)}" for name, value in known.items() if value is not None)
    return f"{row['run_id']}: {settings}; {said}" if settings else f"{row['run_id']}: {said}"


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
    drawn["svg"] = titled(drawn["svg"].decode()).encode()
    for kind, data in drawn.items():
        files.write_bytes(folder / f"{name}.{kind}", data)
    files.write_text(folder / f"{name}.csv", csv_text(rows))
    return drawn["svg"].decode()


def titled(svg: str) -> str:
    """The SVG with a title in every mark that was given one, and on a target larger than the mark.

    The targets lie below the first of these marks: where they overlap, a mark still answers for itself. Nothing
    else answers, so that no ring, mean or line hides a run from the pointer.
    """
    found = list(TITLED.finditer(svg))
    if not found:
        return svg
    targets = "".join(
        f'<circle cx="{x}" cy="{y}" r="{TARGET_POINTS}"><title>{title}</title></circle>\n'
        for title, x, y in (match.groups() for match in found)
    )
    number = itertools.count(1)
    body = TITLED.sub(lambda m: f'<g id="run_{next(number)}" pointer-events="all"><title>{m[1]}</title>', svg)
    start = found[0].start()
    drawn = f'{svg[:start]}<g id="targets" fill="none" pointer-events="all">\n{targets}</g>\n{body[start:]}'
    return drawn.replace('<g id="figure_1">', '<g id="figure_1" pointer-events="none">', 1)
