"""Paths as a study file writes them: `~`, `${VAR}`, `${VAR:-default}`, relative to the file's folder."""

from __future__ import annotations

import os
import re
from pathlib import Path

from finetrial.errors import DataError
from finetrial.secrets_guard import SECRET_ENDINGS, is_secret

VARIABLE = re.compile(r"\$\{([A-Za-z_]\w*)(?::-([^}]*))?\}")


def expand_path(text: str, base: Path) -> Path:
    """The absolute path that a text in a study file means.

    Raises:
        DataError: a variable without a default is not set, or no file can have that path.
    """

    def variable(found: re.Match[str]) -> str:
        name, default = found.groups()
        if is_secret(name):  # the path goes into the study's lock, its log and its report
            raise DataError(
                f"{text}: {name} looks like a secret by its name, and a path is written down; use a variable "
                f"that does not end in {', '.join(SECRET_ENDINGS)}"
            )
        value = os.environ.get(name) or default
        if value is None:
            raise DataError(
                f"{text}: the environment variable {name} is not set; set it (export {name}=/path/to/data) or "
                f"give a default in the study file (${{{name}:-../data}})"
            )
        return value

    try:
        path = (base / Path(VARIABLE.sub(variable, text)).expanduser()).resolve()
        path.exists()  # raises where a name is too long, or a folder on the way may not be looked into
    except (OSError, RuntimeError) as error:  # RuntimeError: a user who is not there, a link to itself
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise DataError(f"{text} is no path that can be looked up: {reason}; mend it") from error
    wrong = not_utf8(path)
    if wrong is not None:
        raise DataError(f"{text}: {wrong}")
    return path


def not_utf8(path: Path) -> str | None:
    """What is wrong with a path that cannot be written down, as records are; None if nothing is."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        shown = os.fsencode(path).decode("utf-8", "backslashreplace")
        return f"the path {shown} has a byte that is not UTF-8; rename that file or folder, or move to another"
    return None
