"""YAML read strictly: what a study file says is what it means.

PyYAML's safe loader reads `1e-5` as text, `no` as false, `010` as eight, and lets the last of two equal keys
win. Here numbers are numbers, only `true` and `false` are truth values, and duplicate keys, anchors, tags and
several documents are refused, each with its line. Also units: `24 GB`, `30 min`. Not for what the values
mean: that is `study_file.py`'s.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import yaml

from finetrial.errors import Problem
from finetrial.problems import show

MAX_BYTES = 1_000_000
# Deeper than any study file, and far below where Python's own recursion limit would end the reading.
MAX_DEPTH = 50
LARGEST_WHOLE = 2**63 - 1

SIZE_UNITS = {
    "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
}  # fmt: skip
TIME_UNITS = {
    "s": 1, "sec": 1, "second": 1, "seconds": 1, "m": 60, "min": 60, "minute": 60, "minutes": 60,
    "h": 3600, "hour": 3600, "hours": 3600, "d": 86400, "day": 86400, "days": 86400,
}  # fmt: skip

QUANTITY = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]+)\s*", re.ASCII)

Lines = dict[tuple[str | int, ...], int]


class _Loader(yaml.SafeLoader):
    """Collects problems and line numbers while plain Python values are built."""

    def __init__(self, text: str):
        super().__init__(text)
        self.problems: list[Problem] = []
        self.lines: Lines = {}


class _Dumper(yaml.SafeDumper):
    """Quotes a text that would be read as something else: by YAML's own rules or by those below."""


_Loader.yaml_implicit_resolvers = {}
_RESOLVERS = (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("int", r"[-+]?[0-9]+", "-+0123456789"),
    ("float", r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?", "-+0123456789."),
)
for _kind, _pattern, _first in _RESOLVERS:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(
            f"tag:yaml.org,2002:{_kind}", re.compile(rf"(?:{_pattern})\Z", re.ASCII), list(_first)
        )


def dump(value: Any) -> str:
    """A value as YAML that `parse` gives back equal: maps, lists, text, finite numbers, true, false, null."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def parse(text: str) -> tuple[Any, Lines, list[Problem]]:
    """The value of a YAML text, the line of every key path, and every problem of form.

    The value is None when the text could not be read at all; then there is at least one problem.
    """
    if len(text) > MAX_BYTES:
        return None, {}, [Problem("file", f"larger than {MAX_BYTES:,} bytes; a study file is a page or two")]
    try:
        problems = _refused(text)
        if problems:
            return None, {}, problems
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            value = None if node is None else _build(loader, node, ())
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        return None, {}, [_syntax_problem(error)]
    if value is None and not loader.problems:
        return None, {}, [Problem("file", "empty; `finetrial init` writes a commented one")]
    return value, loader.lines, loader.problems


def _refused(text: str) -> list[Problem]:
    """What YAML allows and a study file does not, found without building anything."""
    problems, depth, documents = [], 0, 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        where = f"line {event.start_mark.line + 1}"
        # Shared nodes let a small file expand without bound, and hide what a line says.
        if getattr(event, "anchor", None):
            problems.append(Problem(where, "anchors and aliases (& and *) are not used here; write it out"))
        if getattr(event, "tag", None):
            problems.append(Problem(where, f"the tag {event.tag!r} is not allowed; write the plain value"))
        if isinstance(event, yaml.DocumentStartEvent):
            documents += 1
            if documents == 2:
                problems.append(Problem(where, "a second document begins here; keep one (remove the ---)"))
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > MAX_DEPTH:
                return [Problem(where, f"more than {MAX_DEPTH} levels deep; a study file has about five")]
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
    return problems


def _build(loader: _Loader, node: yaml.Node, path: tuple[str | int, ...]) -> Any:
    loader.lines[path] = node.start_mark.line + 1
    match node:
        case yaml.MappingNode():
            built: dict[str, Any] = {}
            for key_node, value_node in node.value:
                key_line = key_node.start_mark.line + 1
                if not isinstance(key_node, yaml.ScalarNode):
                    loader.problems.append(
                        Problem(f"line {key_line}", "a key is a list or a mapping; write one word")
                    )
                    continue
                key = key_node.value
                if key in built:
                    where = ".".join(map(str, (*path, key)))
                    first = loader.lines[(*path, key)]
                    loader.problems.append(
                        Problem(f"{where} (line {key_line})", f"written twice, first on line {first}; keep one")
                    )
                    continue
                built[key] = _build(loader, value_node, (*path, key))
                loader.lines[(*path, key)] = key_line
            return built
        case yaml.SequenceNode():
            return [_build(loader, child, (*path, i)) for i, child in enumerate(node.value)]
        case _:
            value = _scalar(node)
            if value is not None and value in (math.inf, -math.inf):
                where = ".".join(map(str, path)) or "file"
                digits = node.value if len(node.value) <= 20 else f"{node.value[:17]}..."
                message = f"{digits} is too large a number; write one of at most 18 digits"
                loader.problems.append(Problem(f"{where} (line {node.start_mark.line + 1})", message))
                return 0
            return value


def _scalar(node: yaml.Node) -> Any:
    """A plain value; a number that is too large is infinite."""
    text = node.value
    match node.tag.rpartition(":")[2]:
        case "bool":
            return text.lower() == "true"
        case "null":
            return None
        case "int":
            # Also not YAML 1.1's octal: the digits mean what they say.
            if len(text.lstrip("+-0")) > 19 or abs(int(text)) > LARGEST_WHOLE:
                return math.inf
            return int(text)
        case "float":
            return float(text)
        case _:
            return text


def _syntax_problem(error: yaml.YAMLError) -> Problem:
    if isinstance(error, yaml.reader.ReaderError):
        code = error.character if isinstance(error.character, int) else ord(error.character[0])
        what = f"the character U+{code:04X} at position {error.position} is not allowed in YAML; remove it"
        return Problem("file", what)
    mark = getattr(error, "problem_mark", None)
    where = f"line {mark.line + 1}, column {mark.column + 1}" if mark else "file"
    what = getattr(error, "problem", None) or str(error)
    began = getattr(error, "context_mark", None)
    if began and mark and began.line != mark.line:
        what += f" ({getattr(error, 'context', 'a part')}, begun on line {began.line + 1})"
    tabs = "indent with spaces, not tabs" if r"'\t'" in what else "check indentation, brackets and quotes there"
    return Problem(where, f"not valid YAML: {what}; {tabs}")


def parse_size(value: Any) -> int:
    """Bytes of `24 GB` or `512 MiB`.

    Raises:
        ValueError: it is none of these; the message says what to write.
    """
    return round(_quantity(value, SIZE_UNITS, "size", "24 GB or 512 MiB", str.upper))


def parse_duration(value: Any) -> float:
    """Seconds of `30 min`, `2 h` or `90 s`.

    Raises:
        ValueError: it is none of these; the message says what to write.
    """
    return _quantity(value, TIME_UNITS, "time", "30 min or 2 h", str.lower)


def _quantity(
    value: Any, units: Mapping[str, int], noun: str, example: str, fold: Callable[[str], str]
) -> float:
    shown = show(value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        raise ValueError(f"{shown} has no unit; write e.g. {example} (units: {', '.join(units)})")
    found = QUANTITY.fullmatch(value) if isinstance(value, str) else None
    if not found:
        raise ValueError(f"{shown} is not a {noun}; write e.g. {example}")
    if fold(found[2]) not in units:
        raise ValueError(
            f"{shown} has an unknown unit, {found[2]!r}; write e.g. {example} (units: {', '.join(units)})"
        )
    number, factor = float(found[1]), units[fold(found[2])]
    if not math.isfinite(number * factor):
        raise ValueError(f"{shown} is too large; write e.g. {example}")
    if number <= 0:
        raise ValueError(f"{shown} is not above 0; write e.g. {example}")
    return number * factor
