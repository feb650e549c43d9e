"""SHA-256 of large files, computed once for as long as the system says that nothing about them has changed.

What is remembered serves to see that all is as it was; before anything is refused for it, it is computed anew.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from finetrial import files
from finetrial.frozen import short_hash

# File systems tell times no finer than this: what was written just now may be written again unseen.
SETTLED_SECONDS = 2.0
_known: dict[str, str] = {}  # of this process: state -> SHA-256


class State(NamedTuple):
    """What the system says of some files, but for their content."""

    key: str
    changed_at: float  # the newest of them; seconds since the epoch


def state(paths: Sequence[Path]) -> State:
    """Place, inode, size and times of files. A change that sets the old time of writing sets a new `ctime`."""
    stats = [(str(path), path.stat()) for path in paths]
    facts = [[name, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns] for name, s in stats]
    return State(short_hash(facts, 64), max((s.st_ctime for _, s in stats), default=0.0))


def fresh(paths: Sequence[Path], compute: Callable[[], str]) -> str:
    """What is computed of these files now; from here on this process knows it."""
    begun, before = time.time(), state(paths)
    found = compute()
    if before.changed_at < begun - SETTLED_SECONDS and state(paths) == before:
        _known[before.key] = found
    return found


def known(paths: Sequence[Path], compute: Callable[[], str], cache: Path) -> str:
    """The same, as this process or another of the study computed it if nothing has changed since."""
    key = state(paths).key
    found = _known.get(key) or _read(cache, key)
    if found is None:
        found = fresh(paths, compute)
        keep(paths, cache)
    return found


def keep(paths: Sequence[Path], cache: Path) -> None:
    """Let the study's other processes know what this one computed; no run fails for it."""
    with contextlib.suppress(OSError):
        key = state(paths).key
        path = _file(cache, key)
        if key in _known and not path.exists():
            files.write_json(path, {"of": key, "sha256": _known[key]})


def _file(cache: Path, key: str) -> Path:
    return cache / f"hash-{key[:32]}.json"


def _read(cache: Path, key: str) -> str | None:
    try:
        content = json.loads(_file(cache, key).read_bytes())
        return str(content["sha256"]) if content["of"] == key else None
    except (OSError, ValueError, LookupError, TypeError):  # not there, or damaged: computed anew
        return None
