"""Which finetrial this process has loaded, and that no other has taken its place on the disk since.

An upgrade while a command runs would mix two versions: modules that are loaded, and those that still will be.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from finetrial.errors import Incomplete

VARIABLE = "FINETRIAL_SOURCES"  # in the environment of workers: what their coordinator has loaded


@contextmanager
def told_to_workers() -> Iterator[None]:
    """Meanwhile the workers that are started know what this process has loaded."""
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = SOURCES
    try:
        yield
    finally:
        if before is None:
            del os.environ[VARIABLE]
        else:
            os.environ[VARIABLE] = before


def check() -> None:
    """See that this process, its coordinator and the disk have the same version.

    Raises:
        Incomplete: they have not.
    """
    if {SOURCES, os.environ.get(VARIABLE, SOURCES)} != {_on_disk()}:
        raise Incomplete("finetrial changed while it ran, say by an upgrade; run the same command again")


def _on_disk() -> str:
    digest = hashlib.sha256()
    try:
        for path in sorted(Path(__file__).parent.rglob("*.py")):
            digest.update(path.read_bytes())
    except FileNotFoundError:  # it is being replaced right now
        return ""
    return digest.hexdigest()


# SHA-256 of what this process, or the one that it was forked from, has loaded.
SOURCES = _on_disk()
