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

from finetrial.frozen import Frozen, Setting
from finetrial.problems import guess, nearest, show, wrong_kind

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
            raise ValueError(
                f"low {self.low:g} is not above 0, and the range goes by ratio; raise it, or add log: false"
            )
        return self

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

RANGE_KEYS = ("low", "high", "log", "integer")
RANGE_HELP = "{low: 1e-5, high: 1e-3}"
TRAINS_NOTHING_AT_ZERO = ("learning_rate", "epochs")

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


def edge_of(name: str, dimension: Dimension, value: Setting) -> Literal["low", "high"] | None:
    """Which end of its range a setting lies at, unless that end is the setting's own: beyond it is nothing."""
    end = dimension.edge(value)
    if end is None or not isinstance(dimension, Range) or name not in BOUNDS:
        return end
    lowest, highest, _ = BOUNDS[name]
    last = dimension.low <= lowest if end == "low" else dimension.high >= highest
    return None if last else end


def space_fault(space: Any) -> str | None:
    """What is wrong with a method's own space, and what to do; None: nothing."""
    if not isinstance(space, dict) or "learning_rate" not in space:
        return "has no learning_rate in its space; give it a Range"
    for key, dimension in space.items():
        if not isinstance(dimension, Dimension):
            given = f"{key!r}: {show(dimension)} in its space"
            return f"has {given}, which is none of Range, Choice and Fixed; write e.g. Range(low=..., high=...)"
    return None


def middle(dimension: Dimension) -> Setting:
    """The value half-way: by ratio where the range goes by ratio; of a choice the upper median."""
    match dimension:
        case Range():
            return _at(dimension, 0.5)
        case Choice():
            ordered = sorted(dimension.choices) if _numeric(dimension) else list(dimension.choices)
            return ordered[len(ordered) // 2]
        case Fixed():
            return dimension.value


def largest(dimension: Dimension) -> Setting:
    """The largest value; of a choice between words the first."""
    match dimension:
        case Range():
            return _at(dimension, 1.0)
        case Choice():
            return max(dimension.choices) if _numeric(dimension) else dimension.choices[0]
        case Fixed():
            return dimension.value


def smallest(dimension: Dimension) -> Setting:
    """The smallest value; of a choice between words the first."""
    match dimension:
        case Range():
            return _at(dimension, 0.0)
        case Choice():
            return min(dimension.choices) if _numeric(dimension) else dimension.choices[0]
        case Fixed():
            return dimension.value


def spread(dimension: Dimension, points: int = 64) -> list[Setting]:
    """Values as the start-up trials of a search draw them on average: of a range, evenly spaced ones."""
    match dimension:
        case Range():
            return [_at(dimension, (index + 0.5) / points) for index in range(points)]
        case Choice():
            return list(dimension.choices)
        case Fixed():
            return [dimension.value]


def _at(dimension: Range, share: float) -> int | float:
    low, high = dimension.low, dimension.high
    value = low * (high / low) ** share if dimension.log else low + (high - low) * share
    value = min(max(value, low), high)
    return round(value) if dimension.integer else value


def _numeric(dimension: Choice) -> bool:
    return all(isinstance(choice, int | float) for choice in dimension.choices)


def parse_dimension(value: Any) -> Dimension:
    """The dimension that a study file's value stands for.

    Raises:
        ValueError: the value is none of the three forms; the message says what to write.
    """
    if isinstance(value, Range | Choice | Fixed):
        return value
    if isinstance(value, list | tuple):
        for choice in value:
            if not isinstance(choice, bool | int | float | str):
                raise ValueError(f"{show(choice)} cannot be a choice; list numbers or words, e.g. [4, 8, 16]")
        return _checked(Choice, choices=tuple(value))
    if isinstance(value, dict):
        return _parse_range(value)
    if isinstance(value, bool | int | float | str):
        return Fixed(value=value)
    raise ValueError(f"{show(value)} is no setting; write {RANGE_HELP}, a list of choices, or one value")


def _parse_range(value: dict[str, Any]) -> Dimension:
    wrong = [f"unknown key {key!r}; {nearest(key, RANGE_KEYS)}" for key in value if key not in RANGE_KEYS]
    meant = {guess(key, RANGE_KEYS) for key in value if key not in RANGE_KEYS}
    for key in ("low", "high"):
        if key not in value:
            wrong += [] if key in meant else [f"{key} is missing; write {RANGE_HELP}"]
        elif isinstance(value[key], bool) or not isinstance(value[key], int | float):
            wrong.append(f"{key} {wrong_kind(value[key], 'a number', f'write {RANGE_HELP}')}")
    for key in ("log", "integer"):
        if not isinstance(value.get(key, False), bool):
            wrong.append(f"{key} {wrong_kind(value[key], 'true or false', 'write one of them')}")
    if wrong:
        raise ValueError("; ".join(wrong))
    return _range(**value)


def _range(**fields: Any) -> Dimension:
    made = _checked(Range, **fields)
    if isinstance(made, Range) and made.integer and not (made.low.is_integer() and made.high.is_integer()):
        raise ValueError(f"{made.low:g} .. {made.high:g} is a range of whole numbers; give whole ends")
    return made


def _checked(kind: type[Range] | type[Choice], **fields: Any) -> Dimension:
    try:
        return kind(**fields)
    except ValidationError as error:
        reasons = [str(found.get("ctx", {}).get("error", found["msg"])) for found in error.errors()]
        raise ValueError("; ".join(reasons)) from None


def override(name: str, before: Dimension, value: Any) -> Dimension:
    """The dimension that replaces a method's own for the setting of that name.

    A range keeps the spacing of the one that it replaces (a rate's stays spaced by ratio) and a setting that
    is counted stays whole, unless the value says otherwise.

    Raises:
        ValueError: the value is no dimension, or not one for this setting; the message says what to write.
    """
    dimension = parse_dimension(value)
    _check_values(name, before, dimension)
    if not isinstance(dimension, Range) or not isinstance(value, dict):
        return dimension
    kept = {"integer": BOUNDS[name][2] if name in BOUNDS else False}
    if isinstance(before, Range):
        kept = {"log": before.log, "integer": before.integer or kept["integer"]}
    if kept["integer"] and value.get("integer") is False:
        raise ValueError(f"{name} is a whole number; leave `integer: false` out")
    return _range(**{**kept, **value})


def _check_values(name: str, before: Dimension, dimension: Dimension) -> None:
    """Refuse values that make no sense for a setting. Raises ValueError."""
    low, high, whole = BOUNDS.get(name, (-math.inf, math.inf, False))
    numeric = name in BOUNDS or not any(isinstance(v, bool | str) for v in _values(before))
    for value in _values(dimension) if numeric else ():
        if isinstance(value, bool | str):
            lies = f"; {name} lies between {low:g} and {high:g}" if name in BOUNDS else "; give one"
            raise ValueError(f"{show(value)} is not a number{lies}")
        if not low <= value <= high:
            raise ValueError(f"{value:g} is outside {low:g} .. {high:g}; give a value within")
        if whole and value != int(value):
            raise ValueError(f"{value:g} is not a whole number; {name} is counted")
        if value == 0 and name in TRAINS_NOTHING_AT_ZERO:
            raise ValueError(f"0 trains nothing; give a value above 0 for {name}")


def _values(dimension: Dimension) -> tuple[Setting, ...]:
    """The values that a dimension names: its ends, its choices, or the one."""
    match dimension:
        case Range():
            return (dimension.low, dimension.high)
        case Choice():
            return dimension.choices
        case Fixed():
            return (dimension.value,)
