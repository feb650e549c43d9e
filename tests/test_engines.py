"""Engines: a child in its own session, ended whole; what its end is called. (Whole runs: test_pipeline.py.)"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from finetrial import plugins
from finetrial.engines.local import OUT_OF_MEMORY_SCORE, Handle, Local
from finetrial.lease import FileLock
from finetrial.plugins import Exit
from finetrial.store import RunFolder
from scripted import Scripted, make_spec


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "home" / "runs" / make_spec().run_id)
    folder.create(make_spec())
    return folder


def ended(engine: Local, handle: Handle) -> Exit:
    deadline = time.monotonic() + 60
    while (found := engine.poll(handle)) is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert found is not None
    return found


def scripted(folder: RunFolder, program: str) -> tuple[Scripted, Handle]:
    engine = Scripted({make_spec().run_id: [program]})
    return engine, engine.start(folder.path, make_spec())


@pytest.fixture
def worker(folder: RunFolder) -> Iterator[Handle]:
    """A worker of the local engine that waits for its run's lock: it has started and does nothing."""
    lock = FileLock(folder.lock_file)
    assert lock.acquire() is None
    handle = Local().start(folder.path, make_spec())
    yield handle
    Local().stop(handle, 0)
    lock.release()


def test_the_local_child_has_its_own_session_and_goes_first_when_memory_runs_out(worker):
    assert os.getsid(worker.pid) == worker.pid != os.getsid(0)
    if Path("/proc/self/oom_score_adj").exists():
        assert Path(f"/proc/{worker.pid}/oom_score_adj").read_text().strip() == OUT_OF_MEMORY_SCORE
    environment = psutil.Process(worker.pid).environ()
    assert environment["FINETRIAL_PARENT"] == str(os.getpid())
    assert environment["OMP_NUM_THREADS"] == str(make_spec().how.threads)


def test_a_child_is_asked_to_end_and_its_end_is_named(worker):
    engine = Local()
    assert engine.poll(worker) is None
    engine.stop(worker, 10.0)
    assert engine.poll(worker) == Exit(-signal.SIGTERM, reason="killed by SIGTERM")


def test_a_damaged_spec_ends_the_worker_with_a_reason_in_the_log(folder):
    folder.spec_file.write_text("{")
    engine = Local()
    assert ended(engine, engine.start(folder.path, make_spec())) == Exit(1, reason="exit code 1")
    assert "spec.json cannot be read" in folder.log_tail()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux's parent-death signal")
def test_a_worker_whose_parent_is_already_gone_does_nothing(folder):
    environment = {**os.environ, "FINETRIAL_PARENT": "1"}
    command = [sys.executable, "-m", "finetrial.worker", str(folder.path)]
    done = subprocess.run(command, env=environment, timeout=60, capture_output=True, check=False)
    assert done.returncode == 1
    assert not folder.lock_file.exists()


@pytest.mark.parametrize(
    ("program", "exit_"),
    [
        ("pass", Exit(0)),
        ("raise SystemExit(4)", Exit(4, reason="exit code 4")),
        ("import os; os.kill(os.getpid(), 9)", Exit(-9, reason="killed by SIGKILL")),
        ("import os; os.kill(os.getpid(), 40)", Exit(-40, reason="killed by signal 40")),  # has no name
    ],
)
def test_an_end_is_told_by_code_or_signal(folder, program, exit_):
    engine, handle = scripted(folder, program)
    assert ended(engine, handle) == exit_
    assert engine.poll(handle) == exit_


def test_a_child_that_will_not_end_is_killed_after_the_grace(folder):
    ignore = "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    stubborn = ignore + "print('up', flush=True)\ntime.sleep(600)"
    engine, handle = scripted(folder, stubborn)
    while "up" not in folder.log_tail():
        time.sleep(0.01)
    engine.stop(handle, 0.2)
    assert engine.poll(handle) == Exit(-9, reason="killed by SIGKILL")
    engine.stop(handle, 0.2)  # again changes nothing


@pytest.mark.parametrize("name", plugins.names("engines"))
def test_every_engine_keeps_the_protocol(name):
    assert isinstance(plugins.load("engines", name), plugins.Engine)
