"""Durable writes: after a crash at any moment a file is the old one or the new one, whole.

The order is the one that survives a power cut: temporary file in the same folder, fsync, `os.replace`,
fsync of the folder. A folder of several files is committed by a manifest, written last, that holds every
file's size and SHA-256, because a flipped bit loads silently from safetensors files.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import math
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
# What some file systems answer that sync no folder (SMB, FUSE): there a rename is as safe as they make it.
NO_SYNC_OF_FOLDERS = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
LOG = logging.getLogger("finetrial")


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file atomically and durably; the folder is made if needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with temporary.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)  # there still, if something was raised
    sync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON; NaN and infinity are refused, never written as something else."""
    write_text(path, json_text(value))


def json_text(value: Any) -> str:
    """What `write_json` writes; a ValueError for NaN and infinity."""
    return json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def sync_folder(folder: Path) -> None:
    """Have a folder's entries reach the disk, where its file system can be asked to."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NO_SYNC_OF_FOLDERS:
            raise
    finally:
        os.close(descriptor)


def read_bytes(path: Path) -> bytes:
    """A file's content; read again, once, where another machine has just replaced it (NFS: a stale handle)."""
    try:
        return path.read_bytes()
    except OSError as error:
        if error.errno != errno.ESTALE:
            raise
    return path.read_bytes()


def append_json_line(path: Path, value: Any) -> None:
    """Append one record and flush it to the operating system, so that a killed process loses none.

    A line that an earlier process has left torn stays by itself.
    """
    line = json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n"
    torn = _last_byte(path) not in (b"", b"\n")
    with path.open("a", encoding="utf-8") as stream:
        stream.write("\n" + line if torn else line)


def _last_byte(path: Path) -> bytes:
    """Of a file; nothing if it is empty or not there."""
    if not path.exists() or path.stat().st_size == 0:
        return b""
    with path.open("rb") as stream:
        stream.seek(-1, os.SEEK_END)
        return stream.read(1)


def json_lines(
    path: Path, on_damage: Callable[[Path, int], None] = lambda path, line: None
) -> Iterator[dict[str, Any]]:
    """The records of a JSON-lines file; a torn line (a kill or a full disk in mid-write) is left out.

    Of one that is not the last, `on_damage` is told with its number.
    """
    if not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.endswith("\n"):
                return
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                record = None
            if isinstance(record, dict):
                yield record
            else:
                on_damage(path, number)


def sha256_file(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def size_of(folder: Path) -> int:
    """Bytes of the files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def sealed(folder: Path, otherwise: set[str]) -> set[str]:
    """The names of the files that a committed folder's manifest holds; `otherwise` where it cannot be read."""
    try:
        return set(json.loads((folder / MANIFEST).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return otherwise


@contextmanager
def committed(final: Path) -> Iterator[Path]:
    """Where to make and fill a folder that becomes the final one; on an error nothing of it is left."""
    temporary = final.with_name(f".{final.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield temporary
        commit_folder(temporary, final)
    finally:
        discard(temporary)


def commit_folder(temporary: Path, final: Path) -> None:
    """Make a filled temporary folder the final one: sync its files, write the manifest, rename.

    An existing final folder is replaced; a crash in between leaves the old one, none, or the new one, and
    only a folder whose manifest holds is ever read.
    """
    manifest = {}
    for path in sorted(p for p in temporary.rglob("*") if p.is_file()):
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
        name = path.relative_to(temporary).as_posix()
        manifest[name] = {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
    write_json(temporary / MANIFEST, manifest)
    if final.exists():
        aside = final.with_name(f".{final.name}.{uuid.uuid4().hex[:8]}.old")
        final.rename(aside)
        temporary.rename(final)
        discard(aside)
    else:
        temporary.rename(final)
    sync_folder(final.parent)


def discard(folder: Path) -> None:
    """Delete a folder that nobody reads any more, if it is there; what cannot be deleted is a warning."""
    try:
        shutil.rmtree(folder)
    except FileNotFoundError:
        pass
    except OSError as error:
        LOG.warning("%s could not be deleted (%s); no run is affected, delete it yourself", folder, error)


def damage(folder: Path) -> str | None:
    """What is wrong with a committed folder, in words, or None if its manifest holds."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        stated = [(name, facts["bytes"], facts["sha256"]) for name, facts in manifest.items()]
    except FileNotFoundError:
        return "its manifest is missing"
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        return f"its manifest cannot be read: {error!r}"
    if not stated:
        return "its manifest names no file"
    for name, size, digest in stated:
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, not {size}"
        if sha256_file(path) != digest:
            return f"{name} does not have the SHA-256 that its manifest states"
    return None


def json_numbers(path: Path, key: str, *, sha256: str) -> dict[str, float]:
    """Name -> finite number, under one key of a JSON file.

    Nothing if not all of it is there and can be read, or the file has another hash.
    """
    try:
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != sha256:
            return {}
        numbers = {name: float(value) for name, value in json.loads(data)[key].items()}
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return {}
    return numbers if all(map(math.isfinite, numbers.values())) else {}
