"""What becomes of memory that this process frees: kept in case it serves again, or given back. Child side."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
from pathlib import Path
from typing import Any

# Where large blocks are given back at once: freed ones below the limit lie between a step's gradients and may
# not serve again; at 256 KB, SmolLM2 with LoRA took 80 MB more.
LARGE_BLOCK_BYTES = 65_536
KEPT_BLOCK_BYTES = 1 << 30
DEFAULT_TRIM_BYTES = 128 << 10
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)
_gives_back = False


def give_back_at_once() -> None:
    """From now on a large block goes back to the system when it is freed, where the C library can be told.

    Of several trainings in a process, it holds for all once one has asked for it.
    """
    global _gives_back
    _gives_back = True
    if (library := _c_library()) is not None:
        library.mallopt(M_MMAP_THRESHOLD, LARGE_BLOCK_BYTES)
        library.mallopt(M_TRIM_THRESHOLD, DEFAULT_TRIM_BYTES)
        library.malloc_trim(0)


def forget() -> None:
    """A new run begins in this process, which does with what it frees what it will."""
    global _gives_back
    _gives_back = False
    return_freed()


def return_freed() -> None:
    """Give the system what this process has freed and not given back, and count its peak from here."""
    gc.collect()
    if (library := _c_library()) is not None:
        library.malloc_trim(0)
    with contextlib.suppress(OSError):  # where Linux lets a process forget its peak
        Path("/proc/self/clear_refs").write_text("5")


def keep_what_is_freed() -> None:
    """The opposite: blocks above 32 MB too are used again, where the default maps each anew, page by page."""
    if not _gives_back and (library := _c_library()) is not None:
        # Before glibc 2.35 no more than the default's own limit.
        if not library.mallopt(M_MMAP_THRESHOLD, KEPT_BLOCK_BYTES):
            library.mallopt(M_MMAP_THRESHOLD, 32 << 20)
        library.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def _c_library() -> Any:
    """The C library, if its way with large blocks can be changed."""
    library = ctypes.CDLL(None) if sys.platform.startswith("linux") else None
    return library if hasattr(library, "mallopt") else None
