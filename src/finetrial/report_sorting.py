"""What a cell of the page is sorted by: the number that its text begins with, in its base unit.

Not for writing numbers (`report_text.py`, which this reads back) nor for sorting, which the page's script does.
"""

from __future__ import annotations

import re

from finetrial import report_text as text

UNITS = {unit: factor for factor, unit in (*text.BYTES, *text.COUNTS)} | text.SECONDS_PER
# `< 0.001`, `−2.5 points`, `1.24 GB (reference)`, `22.6 M`, `4 of 5`, `1.9e-5`.
NUMBER = re.compile(
    rf"(?P<below>< )?(?P<sign>[+{text.MINUS}-]?)(?P<digits>\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?)"
    r"(?: (?P<unit>[A-Za-z]+))?(?![\w.])"
)


def sort_key(cell: object, numeric: bool) -> str | None:
    """The value to sort a cell by where its text will not do: its number, or nothing for a missing value.

    None: the text itself, which is a plain number, or not a number at all, as that of a badge.
    """
    if not isinstance(cell, str):
        return None
    if cell.startswith(text.MISSING):
        return ""
    found = NUMBER.match(cell) if numeric else None
    if not found or re.fullmatch(r"\d+(\.\d+)?", cell):
        return None
    if found["below"]:
        return "0"
    value = float(found["digits"].replace(",", "")) * UNITS.get(found["unit"] or "", 1.0)
    return f"{-value if found['sign'] in (text.MINUS, '-') else value:.15g}"
