"""YAML read strictly: what a study file says is what it means.

PyYAML's safe loader reads `1e-5` as text, `no` as false, `010` as eight, and lets the last of two equal keys
win. Here numbers are numbers, only `true` and `false` are truth values, duplicate keys, anchors, tags and
several documents are refused, all of them at once. Also units: `24 GB`, `30 min`.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from finetrial.errors import Problem

MAX_BYTES = 1_000_000

SIZE_UNITS = {
    "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
}  # fmt: skip
TIME_UNITS = {
    "s": 1, "sec": 1, "second": 1, "seconds": 1, "m": 60, "min": 60, "minute": 60, "minutes": 60,
    "h": 3600, "hour": 3600, "hours": 3600, "d": 86400, "day": 86400, "days": 86400,
}  # fmt: skip

QUANTITY = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]+)\s*")


class _Loader(yaml.SafeLoader):
    """Collects problems and line numbers while it builds plain Python values."""

    def __init__(self, text: str):
        super().__init__(text)
        self.problems: list[Problem] = []
        self.lines: dict[tuple[str | int, ...], int] = {}


_Loader.yaml_implicit_resolvers = {}
_RESOLVERS = (
    ("tag:yaml.org,2002:bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("tag:yaml.org,2002:null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("tag:yaml.org,2002:int", r"[-+]?[0-9]+", "-+0123456789"),
    (
        "tag:yaml.org,2002:float",
        r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?",
        "-+0123456789.",
    ),
)
for _tag, _pattern, _first in _RESOLVERS:
    _Loader.add_implicit_resolver(_tag, re.compile(rf"(?:{_pattern})\Z"), list(_first))
# YAML 1.1's reader takes 010 for eight; the digits mean what they say.
_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(loader.construct_scalar(node)))


def parse(text: str) -> tuple[Any, dict[tuple[str | int, ...], int], list[Problem]]:
    """The value of a YAML text, the line of every key path, and every problem of form.

    The value is None when the text could not be parsed at all; then there is exactly one problem.
    """
    if len(text.encode()) > MAX_BYTES:
        return None, {}, [Problem("file", f"larger than {MAX_BYTES:,} bytes; a study file is a page or two")]
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            if getattr(event, "anchor", None):  # shared nodes also let a small file expand without bound
                where = f"line {event.start_mark.line + 1}"
                return None, {}, [Problem(where, "anchors and aliases are not used here; write it out")]
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None, {}, [Problem("file", "empty; `finetrial init` writes a commented one")]
            value = _build(loader, node, ())
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        return None, {}, [_syntax_problem(error)]
    return value, loader.lines, loader.problems


def _build(loader: _Loader, node: yaml.Node, path: tuple[str | int, ...]) -> Any:
    line = node.start_mark.line + 1
    loader.lines[path] = line
    match node:
        case yaml.MappingNode():
            built: dict[str, Any] = {}
            for key_node, value_node in node.value:
                key = str(loader.construct_scalar(key_node))
                key_line = key_node.start_mark.line + 1
                if key in built:
                    where = ".".join(map(str, (*path, key)))
                    loader.problems.append(
                        Problem(
                            f"{where} (line {key_line})",
                            f"written twice, first on line {loader.lines[(*path, key)]}; keep one",
                        )
                    )
                    continue
                built[key] = _build(loader, value_node, (*path, key))
                loader.lines[(*path, key)] = key_line
            return built
        case yaml.SequenceNode():
            return [_build(loader, child, (*path, i)) for i, child in enumerate(node.value)]
        case _:
            if node.tag not in {tag for tag, _, _ in _RESOLVERS} | {"tag:yaml.org,2002:str"}:
                loader.problems.append(
                    Problem(f"line {line}", f"the tag {node.tag} is not allowed; write plain values")
                )
                return None
            return loader.construct_object(node)


def _syntax_problem(error: yaml.YAMLError) -> Problem:
    mark = getattr(error, "problem_mark", None)
    where = f"line {mark.line + 1}, column {mark.column + 1}" if mark else "file"
    what = getattr(error, "problem", None) or str(error)
    return Problem(where, f"not valid YAML: {what}; check indentation, brackets and quotes there")


def parse_size(value: Any) -> int:
    """Bytes of `24 GB`, `512 MiB` or a plain number of bytes.

    Raises:
        ValueError: it is none of these; the message says what to write.
    """
    return round(_quantity(value, SIZE_UNITS, "size", "24 GB or 512 MiB", str.upper))


def parse_duration(value: Any) -> float:
    """Seconds of `30 min`, `2 h`, `90 s` or a plain number of seconds.

    Raises:
        ValueError: it is none of these; the message says what to write.
    """
    return _quantity(value, TIME_UNITS, "time", "30 min or 2 h", str.lower)


def _quantity(value: Any, units: dict[str, int], noun: str, example: str, fold: Any) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool):
        number, factor = float(value), 1
    else:
        found = QUANTITY.fullmatch(value) if isinstance(value, str) else None
        if not found or fold(found[2]) not in units:
            raise ValueError(f"{value!r} is not a {noun}; write e.g. {example}")
        number, factor = float(found[1]), units[fold(found[2])]
    if number <= 0:
        raise ValueError(f"{value!r} is not above 0; write e.g. {example}")
    return number * factor
