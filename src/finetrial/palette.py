"""The figures' colours, markers, lines and type: pure data, read by `plots` and by the report's page.

Not for drawing. Colours are Okabe and Ito's (2008, "Color universal design"), always doubled by a marker and
a line style, so that none of them carries a meaning alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# The report swaps these for its own light and dark colours, so no other shade may be used for the same thing.
INK, MUTED, GRID, PAPER = "#1f2329", "#69717b", "#dcdfe3", "#ffffff"
BLUE, VERMILLION, GREEN, PURPLE = "#0072b2", "#d55e00", "#009e73", "#cc79a7"
ORANGE, SKY = "#e69f00", "#56b4e9"
COLOURS = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY)
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINES = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (4, 1, 1, 1)), (0, (7, 2)))
VERDICT_LOOK = {
    "supported": (GREEN, "o", GREEN),
    "refuted": (VERMILLION, "X", VERMILLION),
    "inconclusive": (ORANGE, "D", "none"),
    "not_assessable": (MUTED, "s", "none"),
}
WIDTH_INCHES = 4.9  # between one journal column and two; its 9 pt text is still legible on a phone
PNG_DPI = 300
STYLE = {
    "font.family": ["DejaVu Sans"],  # ships with matplotlib: the same on every machine
    "font.size": 9,
    "text.parse_math": False,  # names are text, not formulae
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "svg.fonttype": "path",
    "svg.hashsalt": "finetrial",
    "pdf.fonttype": 42,
    "savefig.facecolor": PAPER,
}


def look_of(methods: Sequence[str], method: str) -> dict[str, Any]:
    """Colour, marker and line of a method, by its place among all: the same in every figure of a report."""
    index = methods.index(method)
    return {
        "color": COLOURS[index % len(COLOURS)],
        "marker": MARKERS[index % len(MARKERS)],
        "linestyle": LINES[index % len(LINES)],
    }
