"""Every error a user can meet: each names the thing, the value, the rule and the next step.

Not for programmer errors (those are plain exceptions and become the outcome `bug`). All classes stay
picklable, because they cross processes. To add one: subclass `FinetrialError`, give it an exit code,
produce it in a test.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Sequence
from typing import NamedTuple

EXIT_DONE = 0
EXIT_STUDY_WRONG = 1  # 2 is Click's, of a command that is wrong
EXIT_RUNS_FAILED = 3
EXIT_INCOMPLETE = 4


# No fault of the program: what may pass (a full disk or quota, a disk that fails, no more processes, memory or
# open files to be had, a server that shares a disk and is away), and a place that cannot be read or written.
MAY_PASS = (
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE,
    errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENOLCK,
)  # fmt: skip
NO_ACCESS = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY,
    errno.ELOOP, errno.ENAMETOOLONG,
)  # fmt: skip


def disk_fault(error: OSError) -> str | None:
    """What is wrong with the place that an error names, on one line; None if it is a fault of another kind."""
    if error.errno not in (*MAY_PASS, *NO_ACCESS):
        return None
    place = error.filename2 or error.filename  # of a rename it is where to
    return f"{place}: {error.strerror}" if place else str(error.strerror)


def of_the_system(error: BaseException) -> OSError:
    """The system's error that a library written in Rust has made its own, by the number in its text."""
    told = re.search(r"\(os error (\d+)\)", str(error))
    number = int(told[1]) if told else 0
    return OSError(number, os.strerror(number))


class FinetrialError(Exception):
    """Base of all errors that are shown as a message, never as a traceback."""

    exit_code = EXIT_STUDY_WRONG


class Problem(NamedTuple):
    """One mistake: where it is (a key path or a file and line) and what to do about it."""

    where: str
    message: str

    def __str__(self) -> str:
        return f"{self.where}: {self.message}"


class StudyError(FinetrialError):
    """The study file is wrong; carries every problem found, not only the first."""

    def __init__(self, file: str, problems: Sequence[Problem]):
        super().__init__(file, problems)
        self.file = file
        self.problems = tuple(problems)

    def __str__(self) -> str:
        count = len(self.problems)
        head = f"{self.file} has {count} problem{'s' if count != 1 else ''}"
        return "\n".join([head, *(f"  {problem}" for problem in self.problems)])


class PluginError(FinetrialError):
    """A plug-in that is not there, does not load, or does not keep its protocol."""


class DataError(FinetrialError):
    """Data that cannot be read as the study says: a missing file, column, label or split."""


class ModelError(FinetrialError):
    """A base model that cannot be found or loaded."""


class HomeError(FinetrialError):
    """A study folder that cannot be used: it belongs to another study, is in use, or is damaged."""


class RunsFailed(FinetrialError):
    """The study went as far as it could, and some runs failed for good."""

    exit_code = EXIT_RUNS_FAILED


class Incomplete(FinetrialError):
    """The study stopped before its end; the same command goes on from here."""

    exit_code = EXIT_INCOMPLETE


class Diverged(FinetrialError):
    """Training left the region of finite numbers: an outcome of a run, not a fault of the program."""

    def __init__(self, step: int, reason: str):
        super().__init__(step, reason)
        self.step = step
        self.reason = reason

    def __str__(self) -> str:
        return f"diverged at step {self.step}: {self.reason}"


class OutOfMemory(FinetrialError):
    """A run took more memory than there is or than it may use; it goes on with smaller micro-batches."""


class OverBudget(OutOfMemory):
    """A run passed the budget that is its own, whatever else was on the machine."""


class DoesNotFit(OutOfMemory):
    """A run does not fit into its memory even with its smallest micro-batch: it is given up."""
