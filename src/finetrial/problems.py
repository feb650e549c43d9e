"""Turning what is wrong with a value into a message that says what to do, and collecting them all.

The bridge between pydantic's errors and the study file's: nearest known key, key path, line, value, rule.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from finetrial.errors import Problem

M = TypeVar("M", bound=BaseModel)
Path = tuple[str | int, ...]

# pydantic's error type -> our words. {input} is the value as written, other names are the error's context.
MESSAGES = {
    "missing": "required and not given; add it",
    "int_type": "{input} is not a whole number; write e.g. 5",
    "int_from_float": "{input} is not a whole number; write e.g. 5",
    "float_type": "{input} is not a number; write e.g. 0.1",
    "bool_type": "{input} is neither true nor false; write one of them",
    "string_type": "{input} is not text; put it in quotes",
    "list_type": "{input} is not a list; write [a, b]",
    "dict_type": "{input} is not a mapping; write key: value",
    "greater_than": "{input} is not above {gt}; raise it",
    "greater_than_equal": "{input} is below the least allowed, {ge}; raise it",
    "less_than": "{input} is not below {lt}; lower it",
    "less_than_equal": "{input} is above the most allowed, {le}; lower it",
    "literal_error": "{input} is not one of {expected}; pick one",
    "finite_number": "{input} is not a finite number; write one",
}


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint: the nearest known word where one is near, and all of them."""
    words = list(known)
    near = difflib.get_close_matches(word, words, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{hint}known: {', '.join(words)}"


def show(value: Any) -> str:
    """A value in a message: short, and quoted where it is text."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


class Collector:
    """Every problem of one file, in the order of its lines."""

    def __init__(self, lines: Mapping[Path, int], problems: Iterable[Problem] = ()):
        self.lines = lines
        self.found: list[tuple[int, Problem]] = [(0, problem) for problem in problems]

    def add(self, path: Path, message: str) -> None:
        """One problem at a key path; the line is that of the path or its nearest parent."""
        line = next((self.lines[path[:i]] for i in range(len(path), -1, -1) if path[:i] in self.lines), 0)
        shown = ".".join(map(str, path)) or "file"
        where = f"{shown} (line {line})" if path in self.lines and path else shown
        self.found.append((line, Problem(where, message)))

    @property
    def problems(self) -> list[Problem]:
        return [problem for _, problem in sorted(self.found, key=lambda pair: pair[0])]

    def mapping(self, path: Path, value: Any, known: Iterable[str]) -> dict[str, Any] | None:
        """The value if it is a mapping with known keys only; unknown keys are reported and left out."""
        if not isinstance(value, dict):
            self.add(path, f"{show(value)} is not a mapping; write key: value pairs ({', '.join(known)})")
            return None
        known = list(known)
        for key in value:
            if key not in known:
                self.add((*path, key), f"unknown key; {nearest(key, known)}")
        return {key: value[key] for key in value if key in known}

    def build(self, path: Path, model: type[M], value: Any) -> M | None:
        """A record of that model, or None with every one of its problems reported."""
        given = self.mapping(path, value, model.model_fields)
        if given is None:
            return None
        try:
            return model.model_validate(given)
        except ValidationError as error:
            self.add_all(path, error)
            return None

    def convert(self, path: Path, convert: Callable[[Any], Any], value: Any) -> Any:
        """`convert(value)`, or None with the ValueError's message reported."""
        try:
            return convert(value)
        except ValueError as error:
            self.add(path, str(error))
            return None

    def add_all(self, path: Path, error: ValidationError) -> None:
        """Every error of a pydantic validation, once per key path."""
        seen: set[Path] = set()
        for detail in error.errors():
            # A union reports each of its members; members' names are not keys of the file.
            where = (*path, *(part for part in detail["loc"] if _is_key(part)))
            if where in seen:
                continue
            seen.add(where)
            if detail["type"] == "extra_forbidden":
                self.add(where, "unknown key; remove it or see docs/study-file.md")
                continue
            template = MESSAGES.get(detail["type"])
            if template is None:
                self.add(where, detail["msg"].removeprefix("Value error, "))
                continue
            context = {**detail.get("ctx", {}), "input": show(detail["input"])}
            self.add(where, template.format_map(context))


def _is_key(part: str | int) -> bool:
    return isinstance(part, int) or (part.replace("_", "").replace("-", "").isalnum() and part.islower())
