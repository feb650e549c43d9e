"""What a worker makes of an error: memory that ran out, a disk that is full, or a fault of the program."""

from __future__ import annotations

import contextlib
import resource
import subprocess
import sys

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from finetrial import worker


def test_pytorchs_own_words_for_too_little_cpu_memory_are_known():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**58, dtype=torch.float32)
    assert worker.classify(caught.value)[0] == "out_of_memory"


@pytest.mark.parametrize("text", ["CUDA error: out of memory\nmore of it", "CUBLAS_STATUS_ALLOC_FAILED"])
def test_a_gpu_without_memory_for_a_context_or_a_library_is_out_of_memory(text):
    assert worker.classify(RuntimeError(text))[0] == "out_of_memory"


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
