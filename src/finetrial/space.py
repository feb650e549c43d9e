"""Search spaces: the dimensions a trial's settings are drawn from, and how a study file writes them.

Pure data; sampling is `search.py`'s. In a study file a dimension is one of

    learning_rate: {low: 5e-5, high: 5e-3, log: true}     a range (log: spaced by ratio)
    rank: [4, 8, 16]                                      a choice
    epochs: 2                                             fixed, not searched
"""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import ValidationError, model_validator

from finetrial.records import Frozen, Setting

# An optimum within this share of a range's width from either end is flagged (design, section 5).
EDGE_SHARE = 0.05


class Range(Frozen):
    """Numbers between `low` and `high`, both included; `log` spaces them by ratio."""

    kind: Literal["range"] = "range"
    low: float
    high: float
    log: bool = False
    integer: bool = False

    @model_validator(mode="after")
    def _ordered(self) -> Range:
        if self.low > self.high:
            raise ValueError(f"low {self.low:g} is above high {self.high:g}; swap them")
        if self.low == self.high:
            raise ValueError(f"low and high are both {self.low:g}; write the number alone to fix it")
        if self.log and self.low <= 0:
            raise ValueError(f"low {self.low:g} is not above 0, which `log: true` needs; raise it")
        return self

    @property
    def decades(self) -> float | None:
        return math.log10(self.high / self.low) if self.log else None

    def position(self, value: float) -> float:
        """Where `value` lies in the range: 0 at `low`, 1 at `high`, on the range's own scale."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def edge(self, value: Setting) -> Literal["low", "high"] | None:
        """Which end `value` is within 5 % of, if any."""
        position = self.position(float(value))
        if position <= EDGE_SHARE:
            return "low"
        return "high" if position >= 1 - EDGE_SHARE else None


class Choice(Frozen):
    """One of a few values. The search takes numbers to be ordered by size, and other values not."""

    kind: Literal["choice"] = "choice"
    choices: tuple[Setting, ...]

    @model_validator(mode="after")
    def _several(self) -> Choice:
        if len(self.choices) < 2:
            raise ValueError("a choice needs at least two values; write the value alone to fix it")
        if len({repr(choice) for choice in self.choices}) != len(self.choices):
            raise ValueError("a value is listed twice; list each once")
        return self

    def edge(self, value: Setting) -> None:
        return None


class Fixed(Frozen):
    """A setting that is not searched."""

    kind: Literal["fixed"] = "fixed"
    value: Setting

    def edge(self, value: Setting) -> None:
        return None


Dimension = Range | Choice | Fixed
Space = dict[str, Dimension]

# Dimensions that every method has. The method's plug-in adds its own, learning_rate first.
COMMON_SPACE: Space = {
    "epochs": Choice(choices=(1, 2, 3)),
    "batch_size": Choice(choices=(8, 16, 32)),  # effective: rows per optimiser step
    "warmup_ratio": Range(low=0.0, high=0.1),
    "weight_decay": Range(low=0.0, high=0.1),
}

# The values that make sense at all, whatever the method: (lowest, highest, must be whole).
BOUNDS: dict[str, tuple[float, float, bool]] = {
    "learning_rate": (0.0, 10.0, False),
    "epochs": (0.0, 1000.0, False),
    "batch_size": (1, 65536, True),
    "warmup_ratio": (0.0, 1.0, False),
    "weight_decay": (0.0, 10.0, False),
    "dropout": (0.0, 0.99, False),
    "rank": (1, 65536, True),
}


def parse_dimension(value: Any) -> Dimension:
    """The dimension that a study file's value stands for.

    Raises:
        ValueError: the value is none of the three forms; the message says what to write.
    """
    if isinstance(value, Range | Choice | Fixed):
        return value
    if isinstance(value, list | tuple):
        return _checked(Choice, choices=tuple(value))
    if isinstance(value, dict):
        unknown = sorted(set(value) - {"low", "high", "log", "integer"})
        if unknown or not {"low", "high"} <= set(value):
            raise ValueError(f"{value!r} is not a range; write {{low: 1e-5, high: 1e-3, log: true}}")
        return _checked(Range, **value)
    if isinstance(value, bool | int | float | str):
        return Fixed(value=value)
    raise ValueError(f"{value!r} is not a dimension; write a range, a list of choices, or one value")


def _checked(kind: type[Range] | type[Choice], **fields: Any) -> Dimension:
    try:
        return kind(**fields)
    except ValidationError as error:
        raise ValueError(error.errors()[0]["msg"].removeprefix("Value error, ")) from None


def out_of_bounds(name: str, dimension: Dimension) -> str | None:
    """What is wrong with a dimension's values for the setting of that name, or None."""
    if name not in BOUNDS:
        return None
    low, high, whole = BOUNDS[name]
    values: tuple[Setting, ...]
    match dimension:
        case Range():
            values = (dimension.low, dimension.high)
        case Choice():
            values = dimension.choices
        case Fixed():
            values = (dimension.value,)
    for value in values:
        if isinstance(value, bool | str):
            return f"{value!r} is not a number; {name} lies between {low:g} and {high:g}"
        if not low <= value <= high:
            return f"{value:g} is outside {low:g} .. {high:g}"
        if whole and value != int(value):
            return f"{value:g} is not a whole number"
    if name == "learning_rate" and 0.0 in values:
        return "0 trains nothing; give a rate above 0"
    return None
