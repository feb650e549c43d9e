"""Turning what is wrong with a value into a message that says what to do, and collecting them all.

The bridge between pydantic's errors and the study file's: key path, line, value, rule, next step. Not for
which keys and values are right: that is the models' and `study_file.py`'s.
"""

from __future__ import annotations

import difflib
import json
import re
import types
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from finetrial.errors import Problem

M = TypeVar("M", bound=BaseModel)
KeyPath = tuple[str | int, ...]

# pydantic's error types for a value of the wrong kind -> what it should have been, and how to write that.
KINDS = {
    "int_type": ("a whole number", "write e.g. 5"),
    "int_from_float": ("a whole number", "write e.g. 5"),
    "float_type": ("a number", "write e.g. 0.1"),
    "bool_type": ("true or false", "write one of them"),
    "string_type": ("text", "put it in quotes"),
    "list_type": ("a list", "write [a, b]"),
    "tuple_type": ("a list", "write [a, b]"),
    "dict_type": ("a mapping", "write key: value pairs"),
    "model_type": ("a mapping", "write key: value pairs"),
    "model_attributes_type": ("a mapping", "write key: value pairs"),
}
# Other error types -> our words. {input} is the value as written, other names are the error's context.
MESSAGES = {
    "missing": "required and not given; add it",
    "greater_than": "{input} is not above {gt}; raise it",
    "greater_than_equal": "{input} is below the least allowed, {ge}; raise it",
    "less_than": "{input} is not below {lt}; lower it",
    "less_than_equal": "{input} is above the most allowed, {le}; lower it",
    "finite_number": "{input} is not a finite number; write one",
    "too_short": "{input} has {actual_length} entries; give at least {min_length}",
    "too_long": "{input} has {actual_length} entries; give at most {max_length}",
    "string_too_short": "{input} is shorter than {min_length} characters; write more",
    "string_too_long": "{input} is longer than {max_length} characters; shorten it",
    "string_pattern_mismatch": "{input} does not match {pattern}; change it",
}


def nearest(word: object, known: Iterable[str]) -> str:
    """A hint: the nearest known word where one is near, and all of them."""
    words = list(known)
    if not words:
        return "nothing can be set here; remove it"
    near = guess(word, words)
    return f"{f'did you mean {near!r}? ' if near else ''}known: {', '.join(words)}"


def guess(word: object, known: Iterable[str]) -> str | None:
    """The known word that a misspelt one is nearest to, if one is near; case and hyphens do not count."""
    folded = {other.lower().replace("-", "_"): other for other in known}
    near = difflib.get_close_matches(str(word).lower().replace("-", "_"), folded, n=1, cutoff=0.5)
    return folded[near[0]] if near else None


def show(value: Any) -> str:
    """A value in a message: short, as a study file would have it."""
    text = repr(value) if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= 60 else f"{text[:57]}..."


def as_written(name: str) -> str:
    """A name as a study file has to have it: YAML strips spaces, and takes some words for values."""
    plain = re.fullmatch(r"[A-Za-z_][\w.-]*", name) and name.lower() not in ("true", "false", "null")
    return name if plain else json.dumps(name, ensure_ascii=False)  # whose quotes are YAML's, too


def wrong_kind(value: Any, noun: str, fix: str) -> str:
    """That a value is not of the kind it should be, and what to write; a number in quotes gets its own."""
    bare = value.replace("_", "").replace(",", "").strip() if isinstance(value, str) else ""
    if isinstance(value, float) and value.is_integer() and noun == "a whole number":
        fix = f"write {value:.0f}"
    elif "number" in noun and re.fullmatch(r"[-+]?[0-9.]+(e[-+]?[0-9]+)?", bare, re.IGNORECASE | re.ASCII):
        fix = f"write {bare}, without quotes"
    elif noun == "text" and isinstance(value, list | dict):
        fix = "write one text"
    return f"{show(value)} is not {noun}; {fix}"


class Place(NamedTuple):
    """Where in a model an error lies."""

    path: KeyPath
    model: type[BaseModel] | None  # the innermost one around it
    union: KeyPath | None  # the outermost union on the way, and which of its members pydantic speaks of
    member: str | None


class Collector:
    """Every problem of one file, in the order of its lines; `base` is the file's folder."""

    def __init__(
        self, lines: Mapping[KeyPath, int], problems: Iterable[Problem] = (), base: Path | None = None
    ):
        self.lines = lines
        self.base = base
        self.found: list[tuple[int, Problem]] = [(_line(problem), problem) for problem in problems]
        self.unread = {problem.where for problem in problems}  # their values stand for nothing
        self.meant: set[KeyPath] = set()  # keys that a misspelt one stands for
        self.faulty: set[KeyPath] = set()  # key paths with a problem

    def add(self, path: KeyPath, message: str) -> None:
        """One problem at a key path; the line is that of the path or its nearest parent."""
        self.faulty.add(path)
        line = next((self.lines[path[:i]] for i in range(len(path), 0, -1) if path[:i] in self.lines), 0)
        shown = ".".join(_plain(part) for part in path) or "file"
        where = f"{shown} (line {line})" if line else shown
        if where not in self.unread:
            self.found.append((line, Problem(where, message)))

    def is_sound(self, *path: str | int) -> bool:
        """Whether nothing is wrong at a key path, around it or in it, so that its value can be used.

        An entry of a list is found by its number and known by its name: a fault in one is one in all of them.
        """
        for found in self.faulty:
            where = found[:1] if any(isinstance(part, int) for part in found[:2]) else found
            if path[: len(where)] == where[: len(path)]:
                return False
        return True

    @property
    def problems(self) -> list[Problem]:
        """In order of their lines, each once (a shared setting is looked at once per method)."""
        return list(dict.fromkeys(problem for _, problem in sorted(self.found, key=lambda pair: pair[0])))

    def mapping(
        self, path: KeyPath, value: Any, known: Iterable[str], besides: Iterable[str] = ()
    ) -> dict[str, Any] | None:
        """The value if it is a mapping with known keys only; unknown keys are reported and left out.

        `besides` are keys that are dealt with elsewhere: they are suggested, too.
        """
        known = list(known)
        if not isinstance(value, dict):
            keys = f" ({', '.join(known)})" if known else ""
            self.add(path, f"{show(value)} is not a mapping; write key: value pairs{keys}")
            return None
        for key in value:
            if key not in known:
                self.unknown((*path, key), [*known, *besides])
        return {key: value[key] for key in value if key in known}

    def unknown(self, path: KeyPath, known: Iterable[str], what: str = "unknown key") -> None:
        """Report a key that is not known, with the nearest that is."""
        known = list(known)
        meant = guess(path[-1], known)
        if meant:
            self.meant.add((*path[:-1], meant))
        self.add(path, f"{what}; {nearest(path[-1], known)}")

    def build(
        self,
        path: KeyPath,
        model: type[M],
        value: Any,
        *,
        besides: Iterable[str] = (),
        names: Mapping[str, str] | None = None,
    ) -> M | None:
        """A record of that model, or None with every one of its problems reported.

        `names` gives the file's key for a field that is called otherwise; `besides` is as for `mapping`.
        """
        given = self.mapping(path, value, model.model_fields, besides)
        if given is None:
            return None
        try:
            return model.model_validate(given)
        except ValidationError as error:
            self._add_all(path, model, error, names or {})
            return None

    def convert(self, path: KeyPath, convert: Callable[[Any], Any], value: Any) -> Any:
        """`convert(value)`, or None with the ValueError's message reported."""
        try:
            return convert(value)
        except ValueError as error:
            self.add(path, str(error))
            return None

    def _add_all(
        self, path: KeyPath, model: type[BaseModel], error: ValidationError, names: Mapping[str, str]
    ) -> None:
        """Every error of a pydantic validation; what a union's members say becomes one message."""
        unions: dict[KeyPath, list[tuple[Place, Any]]] = {}
        # Unknown keys first: a key that is missing may be there, misspelt.
        for detail in sorted(error.errors(), key=lambda found: found["type"] != "extra_forbidden"):
            place = locate(model, detail["loc"])
            if place.union is not None:
                unions.setdefault(place.union, []).append((place, detail))
            else:
                self._add_one(path, place, detail, names)
        for where, members in unions.items():
            # The member that a value was meant for is the one that finds fault with more than its kind.
            closer: dict[str | None, list[tuple[Place, Any]]] = {}
            for place, detail in members:
                if place.path != where or detail["type"] not in (*KINDS, "literal_error"):
                    closer.setdefault(place.member, []).append((place, detail))
            if closer:
                for place, detail in min(closer.values(), key=len):
                    self._add_one(path, place, detail, names)
                continue
            nouns = [KINDS.get(d["type"], (d.get("ctx", {}).get("expected"), ""))[0] for _, d in members]
            kinds = " or ".join(dict.fromkeys(nouns))
            message = wrong_kind(members[0][1]["input"], kinds, "write one of these")
            self.add(_renamed(path, where, names), message)

    def _add_one(self, path: KeyPath, place: Place, detail: Any, names: Mapping[str, str]) -> None:
        where = _renamed(path, place.path, names)
        kind, value, context = detail["type"], detail["input"], detail.get("ctx", {})
        if kind == "extra_forbidden":
            self.unknown(where, place.model.model_fields if place.model else ())
        elif kind == "missing" and where in self.meant:
            return  # reported as the misspelt key
        elif kind == "literal_error":
            words = re.findall(r"'([^']*)'", context["expected"])
            near = guess(value, words)
            hint = f"did you mean {near!r}?" if near else "pick one"
            self.add(where, f"{show(value)} is not one of {context['expected']}; {hint}")
        elif kind in KINDS:
            self.add(where, wrong_kind(value, *KINDS[kind]))
        elif kind in MESSAGES:
            self.add(where, MESSAGES[kind].format_map({**context, "input": show(value)}))
        elif kind == "value_error":
            self.add(where, str(context["error"]))
        else:
            self.add(where, f"{show(value)}: {detail['msg']}; change it")


def locate(model: type[BaseModel], location: tuple[str | int, ...]) -> Place:
    """The key path of an error that pydantic found at `location` in a model.

    pydantic puts the names of a union's members among the keys; here they are left out, and `union` is the
    path of the outermost union passed through.
    """
    path: list[str | int] = []
    options: list[Any] = [model]
    union: KeyPath | None = None
    member: str | None = None
    around: type[BaseModel] | None = None
    for part in location:
        if len(options) > 1:  # this part names the member
            union, member = (tuple(path), str(part)) if union is None else (union, member)
            options = [option for option in options if _is_named(option, str(part))] or options[:1]
            continue
        option = options[0] if options else Any
        if isinstance(option, type) and issubclass(option, BaseModel):
            around = option
            field = option.model_fields.get(str(part))
            options = _options(field.annotation) if field else []
        else:
            if part == "[key]":
                continue
            arguments = get_args(option)
            inner = -1 if get_origin(option) in (dict, Mapping) else 0
            options = _options(arguments[inner]) if arguments else []
        path.append(part)
    return Place(tuple(path), around, union, member)


def _options(annotation: Any) -> list[Any]:
    """The members of a union, without None; of anything else itself."""
    if get_origin(annotation) is Annotated:
        return _options(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return [o for member in get_args(annotation) if member is not type(None) for o in _options(member)]
    return [annotation]


def _is_named(option: Any, tag: str) -> bool:
    """Whether pydantic's name of a union's member (`int`, `list[str]`, `DataSource`) means this one."""
    name = getattr(get_origin(option) or option, "__name__", str(option))
    return tag.partition("[")[0].lower() == name.lower() or f"[{name}]" in tag or f"{name}]" in tag


def _renamed(path: KeyPath, inside: KeyPath, names: Mapping[str, str]) -> KeyPath:
    return (*path, *(names.get(str(part), part) if i == 0 else part for i, part in enumerate(inside)))


def _plain(part: str | int) -> str:
    """A key as it is shown; one that could upset a terminal or cannot be seen is quoted."""
    text = str(part)
    return text if text.isprintable() and text.strip() else repr(text)


def _line(problem: Problem) -> int:
    found = re.search(r"line (\d+)", problem.where)
    return int(found[1]) if found else 0
