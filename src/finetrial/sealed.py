"""Records in files that hold their own SHA-256: a flipped bit must not pass for a number."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from finetrial import files
from finetrial.errors import HomeError
from finetrial.frozen import canonical_json, short_hash

M = TypeVar("M", bound=BaseModel)


class Damaged(HomeError):
    """A record that is not what was written; `finetrial run` does its run, or exports its optimum, anew.

    Not for a whole record of another version: that is a plain HomeError, and nothing is set aside.
    """

    def __init__(self, path: Path, why: str):
        super().__init__(path, why)
        self.path, self.why = path, why

    def __str__(self) -> str:
        return f"{self.path} is damaged: {self.why}; `finetrial run` does what is damaged anew"


def write(path: Path, record: BaseModel) -> None:
    """Write a record with the SHA-256 of its canonical JSON: which `read` checks."""
    content = record.model_dump(mode="json")
    files.write_json(path, {**content, "sha256": digest(content)})


def read(path: Path, model: type[M]) -> M:
    """What `write` wrote.

    Raises:
        Damaged: it is no longer that.
        HomeError: another version of finetrial wrote it.
    """
    stated = None
    try:
        content = json.loads(files.read_bytes(path))
        stated = content.pop("sha256", None) if isinstance(content, dict) else None
        if stated is not None and stated != digest(content):
            raise Damaged(path, "its SHA-256 is not the one that it states")
        return model.model_validate_json(canonical_json(content))
    except ValidationError as error:
        first = error.errors()[0]
        why = f"{'.'.join(map(str, first['loc'])) or 'file'}: {first['msg']}"
        if stated is None:
            raise Damaged(path, why) from None
        raise HomeError(
            f"{path} was written by another version of finetrial ({why}); use that version, or name another "
            f"folder with --home"
        ) from None
    except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, or nothing that was ever written here
        raise Damaged(path, str(error)) from None


def digest(content: Any) -> str:
    """The SHA-256 of a record's canonical JSON."""
    return short_hash(content, 64)
