"""Who works on a run: a lease with a heartbeat across machines, a lock that dies with its process on one.

A lease on this host is stale as soon as its process is gone (process id and start time must both match, so
that a recycled id is not taken for it); one of another host once it was seen unchanged for STALE_SECONDS. No
machine's clock is compared with another's.
A lease states its own SHA-256, so that a flipped bit in the host does not keep everybody out.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import time
import uuid
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

import psutil

from finetrial import sealed
from finetrial.errors import HomeError
from finetrial.frozen import SCHEMA_VERSION, Frozen, SchemaVersion

# What a file system answers that has no locks, or whose server of locks does not answer.
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)
# A heartbeat is renewed every few seconds; a minute without one is a lost machine, not a slow disk.
STALE_SECONDS = 60.0
LOOK_SECONDS = 0.5
LONGEST_LOOK_SECONDS = 5.0  # of a longer gap between two looks no more counts: the looker may have been stopped
# Of other hosts' leases, by token: the heartbeat last seen, for how long, and when that was (monotonic).
seen: dict[str, tuple[float, float, float]] = {}


class Lease(Frozen):
    """Who holds a run, since when, and when it last said so (seconds since the epoch)."""

    schema_version: SchemaVersion = SCHEMA_VERSION
    token: str
    host: str  # as `this_host` says it; older versions wrote the host's name alone
    pid: int
    process_started_at: float
    renewed_at: float


def claim(path: Path) -> Lease | None:
    """A new lease on the run, or None while another holder's is live.

    Two hosts that claim a stale lease in the same moment may both get it; the one whose claim was written
    over learns so when it renews. On one host the coordinator's lock and the worker's rule that out.
    """
    held = read(path)
    if held is not None and not is_stale(held):
        return None
    lease = _mine(uuid.uuid4().hex)
    sealed.write(path, lease)
    return lease


def renew(path: Path, lease: Lease) -> bool:
    """Say that the holder is alive; False if the lease has been taken over. A damaged one is written anew."""
    held = read(path)
    if held.token != lease.token if held is not None else not path.exists():
        return False
    sealed.write(path, _mine(lease.token))
    return True


def release(path: Path, lease: Lease) -> None:
    held = read(path)
    if held is None or held.token == lease.token:
        path.unlink(missing_ok=True)


def drop_stale(path: Path) -> None:
    """Remove a lease whose holder is gone."""
    held = read(path)
    if held is None or is_stale(held):
        path.unlink(missing_ok=True)


def read(path: Path) -> Lease | None:
    """The lease in a file; None if there is none or it is not what was written."""
    try:
        return sealed.read(path, Lease)
    except (FileNotFoundError, IsADirectoryError, HomeError):
        return None


@cache
def this_host() -> str:
    """Where process ids mean what they mean here: the host's name, its boot, and the namespace of process ids.

    Two containers may have the same name, and a process that is alive in one is unknown in the other.
    """
    found = [socket.gethostname()]
    with contextlib.suppress(OSError):  # not Linux
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        found += [boot, str(Path("/proc/self/ns/pid").stat().st_ino)]
    return "/".join(found)


def is_stale(lease: Lease) -> bool:
    """Whether its holder is gone, as far as this process has seen: another host's takes a minute of looking."""
    if _is_here(lease):
        try:
            process = psutil.Process(lease.pid)
            # A killed process that its parent has not yet waited for still has an id and a start time.
            gone = process.status() == psutil.STATUS_ZOMBIE
            return gone or abs(process.create_time() - lease.process_started_at) > 1.0
        except psutil.NoSuchProcess:
            return True
    now = time.monotonic()
    renewed_at, unchanged, looked_at = seen.get(lease.token, (None, 0.0, now))
    unchanged += min(now - looked_at, LONGEST_LOOK_SECONDS)
    if renewed_at != lease.renewed_at:
        unchanged = 0.0
    seen[lease.token] = (lease.renewed_at, unchanged, now)
    return unchanged >= STALE_SECONDS


def seems_stale(lease: Lease) -> bool:
    """The same at one look, by the clocks: to be shown, and nothing to be decided by."""
    return is_stale(lease) if _is_here(lease) else time.time() - lease.renewed_at > STALE_SECONDS


def watch(paths: Iterable[Path], say: Callable[[str], None]) -> None:
    """Look at leases until it is known of each whether its holder lives: a minute at most, where one does not.

    For a coordinator that holds the folder's lock and has nothing under way yet.
    """
    found = {path: lease for path in paths if (lease := read(path)) is not None and not _is_here(lease)}
    first = {path: lease.renewed_at for path, lease in found.items()}
    told = False
    while found:
        for path in list(found):
            now = read(path)
            if now is None or now.token != found[path].token or now.renewed_at != first[path] or is_stale(now):
                del found[path]
        if found and not told:
            path, lease = next(iter(found.items()))
            more = f", and {len(found) - 1} more" if len(found) > 1 else ""
            wait = f"looking for up to {STALE_SECONDS:.0f} s whether that still works on it"
            say(f"{path.parent.name} is held by {describe(lease)}{more}: {wait}")
            told = True
        time.sleep(LOOK_SECONDS if found else 0)


def describe(lease: Lease) -> str:
    """Who holds it, for a person to read."""
    age = time.time() - lease.renewed_at
    said = f"{age:.0f} s ago" if age >= 0 else f"{-age:.0f} s in the future by this machine's clock"
    return f"process {lease.pid} of {lease.host.partition('/')[0]}, which last said so {said}"


def _is_here(lease: Lease) -> bool:
    return lease.host in (this_host(), socket.gethostname())


def _mine(token: str) -> Lease:
    me = psutil.Process()
    return Lease(
        token=token,
        host=this_host(),
        pid=me.pid,
        process_started_at=me.create_time(),
        renewed_at=time.time(),
    )


def pid_in(content: bytes) -> int:
    """The process id that a lock's file says it is held by; -1 if it says none."""
    first, *_ = content.split() or [b""]
    return int(first) if first.isdigit() else -1


class FileLock:
    """An exclusive lock on this machine that the kernel frees when its process dies, however it dies."""

    def __init__(self, path: Path):
        self.path = path
        self.holder = ""  # who holds it, once it could not be had: process, host and since when, in words
        self.elsewhere = False  # that is another host
        self._descriptor: int | None = None

    def acquire(self, *, wait_seconds: float = 0.0) -> int | None:
        """Take the lock: None when it is ours, else the process id that holds it.

        Raises:
            HomeError: the file system has no locks.
        """
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        deadline = time.monotonic() + wait_seconds
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    content = os.pread(descriptor, 512, 0)
                    os.close(descriptor)
                    pid, (_, *more) = pid_in(content), content.decode(errors="replace").split() or [""]
                    where = f" on {more[0]} since {more[1]}" if len(more) == 2 else ""
                    self.elsewhere = bool(where) and more[0] != socket.gethostname()
                    self.holder = f"process {pid}{where}" if pid >= 0 else "another process"
                    return pid
                time.sleep(0.05)
            except OSError as error:
                os.close(descriptor)
                if error.errno not in NO_LOCKS:
                    raise
                raise HomeError(
                    f"{self.path} cannot be locked ({error.strerror}): its file system has no locks, so two "
                    f"commands could write at once; put the study's folder on another, say a local one (--home)"
                ) from error
            else:
                os.ftruncate(descriptor, 0)
                now = datetime.now(UTC).isoformat(timespec="seconds")
                os.pwrite(descriptor, f"{os.getpid()} {socket.gethostname()} {now}".encode(), 0)
                self._descriptor = descriptor
                return None

    def release(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
