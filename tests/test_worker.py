"""What a worker makes of an error: memory that ran out, a disk that is full, or a fault of the program."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from finetrial import worker
from finetrial.errors import ModelError
from finetrial.lease import FileLock
from finetrial.processes import HELD_CODE
from finetrial.store import RunFolder
from scripted import make_spec


def test_pytorchs_own_words_for_too_little_cpu_memory_are_known():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**58, dtype=torch.float32)
    assert worker.classify(caught.value)[0] == "out_of_memory"


@pytest.mark.parametrize("text", ["CUDA error: out of memory\nmore of it", "CUBLAS_STATUS_ALLOC_FAILED"])
def test_a_gpu_without_memory_for_a_context_or_a_library_is_out_of_memory(text):
    assert worker.classify(RuntimeError(text))[0] == "out_of_memory"


def test_memory_that_runs_out_while_a_model_loads_is_out_of_memory():
    refusal = ModelError("the model x does not load")
    assert worker.classify(refusal) == ("refused", "the model x does not load")
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**58, dtype=torch.float32)
    refusal.__cause__ = caught.value  # as `raise ... from` makes it
    assert worker.classify(refusal)[0] == "out_of_memory"


def test_memory_that_runs_out_while_a_model_loads_says_that_less_does_not_help(tmp_path):
    folder = made(tmp_path)
    refusal = ModelError("the model x does not load")
    refusal.__cause__ = MemoryError()
    assert worker._conclude(folder, folder.spec(), refusal) == 1
    failure = folder.failure()
    assert (failure.kind, failure.less_helps, failure.goes_on) == ("out_of_memory", False, True)


@contextlib.contextmanager
def files_of_at_most(size):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_is_full_for_a_library_written_in_rust_is_refused(tmp_path):
    """It raises an error of its own, which is no OSError: here for a file that may grow no further."""
    with files_of_at_most(1000), pytest.raises(SafetensorError) as caught:
        save_file({"a": torch.zeros(10_000)}, tmp_path / "a.safetensors")
    kind, reason = worker.classify(caught.value)
    assert kind == "refused"
    assert reason == "File too large; mend that and run the same command again"


HELD_BACK = """\
import os, signal
from finetrial.notice import termination_notice
with termination_notice() as asked:
    os.kill(os.getpid(), signal.SIGHUP)
    print(asked(), signal.getsignal(signal.SIGHUP) is signal.SIG_IGN)
print(signal.getsignal(signal.SIGTERM) is signal.SIG_DFL)
"""


@pytest.mark.parametrize("ignored", [False, True])
def test_a_hang_up_is_a_notice_to_end_unless_it_is_ignored(ignored):
    nohup = ["sh", "-c", "trap '' HUP; exec \"$@\"", "sh"] if ignored else []
    done = subprocess.run([*nohup, sys.executable, "-c", HELD_BACK], capture_output=True, text=True)
    assert done.returncode == 0, done
    assert done.stdout.splitlines() == [f"{not ignored} {ignored}", "True"]


# ---- runs that cannot begin ------------------------------------------------------------------------------


def made(home: Path) -> RunFolder:
    folder = RunFolder(home / "runs" / make_spec().run_id)
    folder.create(make_spec())
    return folder


def test_a_run_that_another_process_holds_is_told_by_the_exit_code(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(worker, "LOCK_SECONDS", 0.1)
    folder = made(tmp_path)
    lock = FileLock(folder.lock_file)
    assert lock.acquire() is None
    assert worker.work(folder) == HELD_CODE
    lock.release()
    assert f"another process ({os.getpid()}) is still working" in capsys.readouterr().err
    assert folder.failure() is None


@pytest.mark.parametrize("name", ["lock_file", "spec_file"])
def test_a_run_whose_files_cannot_be_opened_fails_with_the_reason(tmp_path, name):
    folder = made(tmp_path)
    path = getattr(folder, name)
    path.unlink(missing_ok=True)
    path.mkdir()
    assert worker.work(folder) == 1
    failure = folder.failure()
    assert failure.kind == "refused"
    assert failure.reason == f"{path}: Is a directory; mend that and run the same command again"


def test_a_server_of_locks_that_is_away_is_a_reason_and_no_crash(tmp_path, monkeypatch):
    def away(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    folder = made(tmp_path)
    monkeypatch.setattr("fcntl.flock", away)
    assert worker.work(folder) == 1
    assert folder.failure().kind == "refused"
    assert folder.failure().reason.startswith(f"{folder.lock_file} cannot be locked")
