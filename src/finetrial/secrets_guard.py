"""Secrets of the environment: known by the names of their variables, and kept out of whatever is written.

A study that names such a variable, or holds the value of one, is refused; in what is said (logs, reasons)
a value is replaced by its variable's name. Values too short to be told from other text are let be.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import IO, Any

SECRET_ENDINGS = ("_KEY", "_TOKEN", "_SECRET", "_PASSWORD")
SHORTEST = 8  # characters; a shorter value occurs in ordinary text


def is_secret(variable: str) -> bool:
    """Whether an environment variable holds a secret, going by its name."""
    return variable.upper().endswith(SECRET_ENDINGS)


def _secrets(environment: Mapping[str, str]) -> list[tuple[str, str]]:
    """(Value, variable), the longest first: one may hold another."""
    found = {value: name for name, value in environment.items() if is_secret(name) and len(value) >= SHORTEST}
    return sorted(found.items(), key=lambda pair: -len(pair[0]))


def hide(text: str) -> str:
    """The text with every secret of the environment replaced by its variable's name."""
    for value, name in _secrets(os.environ):
        text = text.replace(value, f"[{name}]")
    return text


def held_by(text: str) -> str | None:
    """The variable whose secret a text holds; None if it holds none."""
    return next((name for value, name in _secrets(os.environ) if value in text), None)


class _Hiding:
    """A stream that hides secrets in what is written to it; all else is the stream's own."""

    def __init__(self, stream: IO[str]):
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(hide(text))
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def hidden_output(out: IO[str], err: IO[str]) -> Iterator[None]:
    """Hide secrets in what Python code prints; `out` and `err` are the streams that it goes on to."""
    with redirect_stdout(_Hiding(out)), redirect_stderr(_Hiding(err)):  # pyrefly: ignore
        yield
