"""What a process is said to hold and to have taken, and what becomes of what it frees."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from finetrial import process_memory
from finetrial.records import Fit


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="of the C library of Linux")
def test_of_several_trainings_in_a_process_one_that_is_short_of_memory_decides():
    program = """
from finetrial import allocator, process_memory
allocator.give_back_at_once()
allocator.keep_what_is_freed()
before = process_memory.resident_bytes()
held = [bytearray(100_000) for _ in range(2000)]
held.clear()
print(process_memory.resident_bytes() - before)
"""
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert int(done.stdout) < 20e6


def test_what_a_process_holds_for_several_trainings_is_counted_once_with_what_they_read():
    program = """
from finetrial import allocator, process_memory
process_memory.share_process(2)
rows = b"x" * 300_000_000
before = process_memory.held_bytes()
model = b"x" * 300_000_000
print(before, process_memory.held_bytes())
process_memory.share_process(1)
print(process_memory.held_bytes())
"""
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    first, second, alone = map(int, done.stdout.split())
    assert first == second > 300e6
    assert alone > first + 290e6


@pytest.mark.parametrize(
    ("free", "own"), [(9, True), (8, False), (RuntimeError("CUDA error: out of memory"), False)]
)
def test_memory_ran_out_by_a_runs_own_share_where_more_than_that_is_free_or_its_own(monkeypatch, free, own):
    """The GPU's answers are made up: 1 byte is this process's. Without room to ask, others have all."""

    def asked() -> tuple[int, int]:
        if isinstance(free, Exception):
            raise free
        return free, 100

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", asked)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 1)
    fit = Fit(device="cuda", budget=10, predicted=None, evaluation_tokens=1)
    assert process_memory.is_own_limit(fit) is own


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="of Linux")
def test_what_an_earlier_run_took_at_most_is_not_the_next_one_s_of_its_process():
    program = """
from finetrial import allocator, process_memory
held = bytearray(300_000_000)
held[::4096] = b"x" * len(held[::4096])
before = process_memory.peak_bytes()
del held
process_memory.give_back()
print(before - process_memory.peak_bytes())
"""
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert int(done.stdout) > 250e6


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="of the C library of Linux")
def test_what_a_run_has_freed_does_not_stay_with_the_next_one_of_its_process():
    """Blocks that lie between others that are still held: freeing them alone gives nothing back."""
    program = """
from finetrial import allocator, process_memory
allocator.keep_what_is_freed()
before = process_memory.resident_bytes()
held = [b"x" * 200_000 for _ in range(2000)]
del held[::2]
freed = process_memory.resident_bytes()
process_memory.give_back()
print(before, freed, process_memory.resident_bytes())
"""
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    before, freed, after = map(int, done.stdout.split())
    assert freed - before > 380e6
    assert after - before < 240e6
