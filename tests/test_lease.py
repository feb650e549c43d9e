"""Leases and locks: live holders are respected, dead ones are not waited for."""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from finetrial import lease, sealed
from finetrial.errors import HomeError
from finetrial.lease import FileLock, Lease
from finetrial.store import Home

SLEEP = [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(600)"]


def held_by(path: Path, **changes: object) -> Lease:
    """Write a lease like this process's own, with some fields changed."""
    mine = lease.claim(path)
    assert mine is not None
    other = mine.model_copy(update={"token": "another", **changes})
    sealed.write(path, other)
    return other


@pytest.fixture
def lease_file(tmp_path: Path) -> Path:
    return tmp_path / "lease.json"


def test_a_live_lease_refuses_and_a_released_one_does_not(lease_file):
    first = lease.claim(lease_file)
    assert first is not None
    assert lease.claim(lease_file) is None
    lease.release(lease_file, first)
    second = lease.claim(lease_file)
    assert second is not None
    assert second.token != first.token


def test_the_lease_of_a_killed_process_is_taken_even_before_it_is_reaped(lease_file):
    process = subprocess.Popen(SLEEP, stdout=subprocess.PIPE)
    try:
        process.stdout.readline()
        held_by(lease_file, pid=process.pid, process_started_at=psutil.Process(process.pid).create_time())
        assert lease.claim(lease_file) is None
        process.kill()
        while psutil.Process(process.pid).status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.01)
        assert lease.claim(lease_file) is not None
    finally:
        process.kill()
        process.communicate()


def test_a_process_id_that_another_process_has_now_is_not_taken_for_the_holder(lease_file):
    held_by(lease_file, process_started_at=psutil.Process().create_time() - 3600)
    assert lease.claim(lease_file) is not None


def test_a_host_of_the_same_name_is_another_one_unless_process_ids_mean_the_same(lease_file):
    name, *rest = lease.this_host().split("/")
    assert name == socket.gethostname()
    if sys.platform.startswith("linux"):
        boot, namespace = rest
        assert boot == Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        assert namespace == Path("/proc/self/ns/pid").readlink().name.strip("pid:[]")
    gone = {"pid": 2**22 - 1, "process_started_at": 1.0}  # no process of this container
    held_by(lease_file, host=f"{name}/{'/'.join(rest[:1])}/1", **gone)
    assert lease.claim(lease_file) is None
    lease_file.unlink()
    held_by(lease_file, host=lease.this_host(), **gone)
    assert lease.claim(lease_file) is not None


def test_a_lease_of_an_older_version_names_this_host_without_more(lease_file):
    live = held_by(lease_file, host=socket.gethostname())
    assert lease.read(lease_file) == live
    assert lease.claim(lease_file) is None
    lease_file.unlink()
    held_by(lease_file, host=socket.gethostname(), process_started_at=1.0)
    assert lease.claim(lease_file) is not None


@pytest.mark.parametrize("ahead", [-7200, 0, 7200])
def test_another_hosts_lease_is_taken_once_it_was_seen_unchanged_for_long_whatever_its_clock(
    lease_file, monkeypatch, ahead
):
    monkeypatch.setattr(lease, "STALE_SECONDS", 0.3)
    theirs = held_by(lease_file, host="elsewhere/boot/1", pid=1, renewed_at=time.time() + ahead)
    for _ in range(8):  # it is renewed: by its own clock, which may be any
        assert lease.claim(lease_file) is None
        time.sleep(0.1)
        theirs = theirs.model_copy(update={"renewed_at": theirs.renewed_at + 0.1})
        sealed.write(lease_file, theirs)
    assert lease.claim(lease_file) is None
    time.sleep(0.35)
    assert lease.claim(lease_file) is not None


def test_whoever_was_stopped_between_two_looks_looks_anew(lease_file, monkeypatch):
    """What was suspended together with the holder sees what the holder said before."""
    monkeypatch.setattr(lease, "STALE_SECONDS", 0.3)
    monkeypatch.setattr(lease, "LONGEST_LOOK_SECONDS", 0.1)
    held_by(lease_file, host="elsewhere/boot/1", pid=1)
    for _ in range(3):
        assert lease.claim(lease_file) is None
        time.sleep(0.4)
    assert lease.claim(lease_file) is not None


def test_who_begins_looks_until_it_is_known_which_leases_are_live(tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "STALE_SECONDS", 0.6)
    monkeypatch.setattr(lease, "LOOK_SECONDS", 0.05)
    mine, dead, live = (tmp_path / name / "lease.json" for name in ("mine", "dead", "live"))
    now = time.time()
    lease.claim(mine)
    lost = held_by(dead, host="a-node/boot/1", pid=7, renewed_at=now - 90.4)
    theirs = held_by(live, host="elsewhere/boot/1", token="theirs", renewed_at=now)
    notes, over = [], threading.Event()

    def renewing() -> None:
        for count in itertools.count(1):
            sealed.write(live, theirs.model_copy(update={"renewed_at": now + count}))
            if over.wait(0.1):
                return

    other = threading.Thread(target=renewing)
    other.start()
    try:
        begun = time.monotonic()
        lease.watch([mine, dead, live, tmp_path / "none"], notes.append)
        assert 0.5 < time.monotonic() - begun < 5
        assert lease.claim(dead) is not None
        assert lease.claim(live) is None
    finally:
        over.set()
        other.join()
    assert notes[0].startswith("dead is held by process 7 of a-node, which last said so 9")
    assert notes[0].endswith(" s ago, and 1 more: looking for up to 1 s whether that still works on it")
    assert len(notes) == 1
    assert lost.host == "a-node/boot/1"


def test_nobody_waits_for_leases_of_this_host(tmp_path):
    path = tmp_path / "run" / "lease.json"
    held_by(path, process_started_at=1.0)
    begun = time.monotonic()
    lease.watch([path], pytest.fail)
    assert time.monotonic() - begun < 0.3
    assert lease.claim(path) is not None


def test_the_holder_is_told_with_host_process_and_age(lease_file):
    ahead = held_by(lease_file, host="a-node/boot/1", pid=7, renewed_at=time.time() + 3600.2)
    assert lease.describe(ahead) == (
        "process 7 of a-node, which last said so 3600 s in the future by this machine's clock"
    )
    assert not lease.seems_stale(ahead)
    assert lease.seems_stale(ahead.model_copy(update={"renewed_at": time.time() - 61}))


def test_renewing_moves_the_heartbeat_and_fails_once_the_lease_was_taken_over(lease_file):
    mine = lease.claim(lease_file)
    old = mine.model_copy(update={"renewed_at": 1.0})
    sealed.write(lease_file, old)
    assert lease.renew(lease_file, mine)
    assert lease.read(lease_file).renewed_at > 1.0
    other = mine.model_copy(update={"token": "another"})
    sealed.write(lease_file, other)
    assert not lease.renew(lease_file, mine)
    lease.release(lease_file, mine)
    assert lease.read(lease_file) == other


@pytest.mark.parametrize("text", ["", "{", '{"token": "x"}', "\x00" * 40])
def test_an_unreadable_lease_is_nobodys(lease_file, text):
    lease_file.write_text(text)
    assert lease.read(lease_file) is None
    assert lease.claim(lease_file) is not None


def test_a_flipped_bit_keeps_nobody_out_and_does_not_end_the_holder(lease_file):
    mine = lease.claim(lease_file)
    whole = lease_file.read_bytes()
    for place in range(0, len(whole), 7):
        data = bytearray(whole)
        data[place] ^= 4
        lease_file.write_bytes(data)
        assert lease.read(lease_file) in (None, mine)  # None, or the bit was in white space
        assert lease.renew(lease_file, mine)
        assert lease.read(lease_file).token == mine.token
    lease_file.write_bytes(whole[:50])
    lease.release(lease_file, mine)
    assert not lease_file.exists()
    assert not lease.renew(lease_file, mine)  # another took it over, ended, and released it


def test_the_lock_is_exclusive_names_its_holder_and_is_free_after_a_kill(tmp_path):
    path = tmp_path / "worker.lock"
    program = (
        "import sys, time; from pathlib import Path; from finetrial.lease import FileLock\n"
        "lock = FileLock(Path(sys.argv[1]))\n"
        "assert lock.acquire() is None\n"
        "print('up', flush=True); time.sleep(600)"
    )
    process = subprocess.Popen([sys.executable, "-c", program, path], stdout=subprocess.PIPE)
    try:
        process.stdout.readline()
        mine = FileLock(path)
        assert mine.acquire() == process.pid
        os.kill(process.pid, signal.SIGKILL)
        assert mine.acquire(wait_seconds=30) is None
        assert FileLock(path).acquire() == os.getpid()
        mine.release()
        mine.release()
        again = FileLock(path)
        assert again.acquire() is None
        again.release()
    finally:
        process.kill()
        process.communicate()


def open_files() -> int:
    return psutil.Process().num_fds()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_one_message(tmp_path, monkeypatch, number):
    def no_locks(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    before = open_files()
    with pytest.raises(HomeError, match="its file system has no locks") as refused, Home(tmp_path).coordinate():
        pass
    assert str(refused.value).startswith(
        f"{tmp_path / 'coordinator.lock'} cannot be locked ({os.strerror(number)})"
    )
    assert open_files() == before
