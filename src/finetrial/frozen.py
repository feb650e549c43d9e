"""What every record is made of: a strict, frozen model, its one JSON text, and hashes and seeds of that."""

from __future__ import annotations

import hashlib
import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

SchemaVersion = Literal[1]  # of every record but the summary; another is refused by name, never guessed at
SCHEMA_VERSION: SchemaVersion = 1

Setting = bool | int | float | str


class Frozen(BaseModel):
    """A strict record: unknown keys are refused, values are never changed after creation."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


def canonical_json(value: Any) -> str:
    """The one JSON text of a value: sorted keys, no spaces, no NaN; equal values give equal text."""
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json")
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def short_hash(value: Any, length: int = 8) -> str:
    """The first hexadecimal digits of the SHA-256 of a value's canonical JSON."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:length]


def stream_seed(*key: object) -> int:
    """A 63-bit seed for one named random stream: a pure function of its key, on every machine."""
    text = "|".join(str(part) for part in key)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
