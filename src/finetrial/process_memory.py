"""What memory a process may take, and takes. Child side.

A GPU's where there is one, else the machine's. `fit.py` decides by it how a run is done.
"""

from __future__ import annotations

import contextlib
import platform
import resource
from pathlib import Path

import psutil
import torch

from finetrial import allocator
from finetrial.assemble import pick_device
from finetrial.errors import OverBudget
from finetrial.processes import memory_limits
from finetrial.records import Fit

# What the runs at a time share unless the study says: so much of the machine's or GPU's memory. The rest is
# for the system, the coordinator, and what a prediction does not see.
SHARE = 0.85
_among, _held = 1, 0


def budget_of(asked: int | None, parallel: int) -> int:
    """Bytes that a run may take: what the study says, or its share of the machine's or GPU's memory."""
    if asked is not None:
        return asked
    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    else:
        total = min([psutil.virtual_memory().total, *memory_limits()])
    return int(total * SHARE / parallel)


def share_process(among: int) -> None:
    """So many trainings are to begin in this process."""
    global _among, _held
    _among, _held = among, 0


def held_bytes() -> int:
    """What this process holds before it does any training, its rows and inputs read.

    Of several at once, before the first, whose rows and inputs are those of all.
    """
    global _held
    if _among == 1:
        return resident_bytes()
    _held = _held or resident_bytes()
    return _held


def resident_bytes() -> int:
    """This process's memory now."""
    return psutil.Process().memory_info().rss


def peak_bytes() -> int:
    """The most memory so far: allocated on the GPU, or resident in this process where there is none."""
    if pick_device().type == "cuda":
        return torch.cuda.max_memory_allocated()
    with contextlib.suppress(OSError):  # Linux's; the other keeps what whoever started this process held
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == "Darwin" else 1024)


def keep_to(fit: Fit) -> None:
    """Hold this process to its budget as far as the system can."""
    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, fit.budget / total))
    elif fit.tight:
        allocator.give_back_at_once()
    else:
        allocator.keep_what_is_freed()


def is_own_limit(fit: Fit | None) -> bool:
    """Whether memory that ran out on a GPU was this process's share: more than that is free or its own."""
    if fit is None or not torch.cuda.is_available():
        return False
    try:
        free, _ = torch.cuda.mem_get_info()
    except RuntimeError:  # there is not even room to ask, which is no doing of its own
        return False
    return free + torch.cuda.memory_reserved() >= fit.budget


def let_go() -> None:
    """The opposite of `keep_to` where it is a limit: what comes is not training, and takes what it takes."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(1.0)


def give_back() -> None:
    """A new run begins here: what an earlier one has freed, and its peak, are none of it."""
    allocator.forget()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def check(fit: Fit) -> None:
    """Whether the run has kept to its budget so far.

    Raises:
        OverBudget: it has not.
    """
    peak = peak_bytes()
    if peak > fit.budget:
        raise OverBudget(f"it took {peak / 1e6:.0f} MB of the {fit.budget / 1e6:.0f} MB that it may use")
