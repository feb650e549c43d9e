"""Ways in which a study's folder can be wrong: what is done to it, which verbs meet it, what they say."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple


class Wrong(NamedTuple):
    """What is done to `runs/small`, the verbs that have to refuse it, and what they have to say."""

    spoil: Callable[[Path], object]
    verbs: str
    said: tuple[str, ...]
    code: int = 1


def run_of(home: Path, stage: str = "replicate") -> Path:
    return next(path for path in (home / "runs").iterdir() if path.name.startswith(stage))


def record(path: Path, **changes: Any) -> None:
    """Change a record as another version would write it: with its own, right SHA-256."""
    content = {**json.loads(path.read_text()), **changes}
    if content.pop("sha256", None):
        canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        content["sha256"] = hashlib.sha256(canonical.encode()).hexdigest()
    path.write_text(json.dumps(content))


def in_run(name: str, change: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda home: change(run_of(home) / name)


def lock(change: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda home: change(home / "study.lock.json")


def as_folder(path: Path) -> None:
    as_nothing(path)
    path.mkdir()


def as_file(path: Path) -> None:
    as_nothing(path)
    path.write_text("x")


def as_nothing(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def undone(home: Path, then: Callable[[Path], object]) -> None:
    """The replicate has no result yet, and something else is wrong."""
    (run_of(home) / "result.json").unlink()
    then(home)


def of_another_study(home: Path) -> None:
    path = home.parent.parent / "study.yaml"
    path.write_text(path.read_text().replace("epochs: 1", "epochs: 2"))


EVERY, WRITERS, READERS = "check run status report", "check run", "status report"
ANOTHER_VERSION = "another version of finetrial"
MEND = "mend that and run the same command again"
DAMAGED = ("is damaged", "does what is damaged anew")

HOMES: dict[str, Wrong] = {
    "another study's": Wrong(
        of_another_study, WRITERS, ("runs/small belongs to another study", "epochs", "rename the study")
    ),
    # study.lock.json
    "lock of a newer version": Wrong(
        lock(lambda path: record(path, schema_version=2)),
        EVERY,
        ("study.lock.json", ANOTHER_VERSION, "is 2, ", "--home"),
    ),
    "lock of an older version": Wrong(
        lock(lambda path: record(path, schema_version=0)),
        EVERY,
        ("study.lock.json", ANOTHER_VERSION, "is 0, ", "--home"),
    ),
    "lock with a newer key": Wrong(
        lock(lambda path: record(path, tomorrow=1)),
        EVERY,
        ("study.lock.json cannot be read (tomorrow)", "--home"),
    ),
    "lock cut short": Wrong(lock(half), EVERY, ("study.lock.json cannot be read", "damaged", "--home")),
    "lock empty": Wrong(
        lock(lambda path: path.write_text("")), EVERY, ("study.lock.json cannot be read", "--home")
    ),
    "lock a list": Wrong(lock(lambda path: path.write_text("[]")), EVERY, ("study.lock.json cannot be read",)),
    "lock of bytes": Wrong(
        lock(lambda path: path.write_bytes(b"\xff\0")), EVERY, ("study.lock.json cannot be read",)
    ),
    "lock too deep": Wrong(
        lock(lambda path: path.write_text("[" * 99_999)), EVERY, ("study.lock.json cannot",)
    ),
    "lock a folder": Wrong(lock(as_folder), EVERY, ("study.lock.json: Is a directory", MEND)),
    "runs without a lock": Wrong(
        lock(as_nothing), WRITERS, ("runs/small has runs but no study.lock.json", "--home")
    ),
    "no lock": Wrong(lock(as_nothing), READERS, ("runs/small is no study's folder", "name")),
    # the folder
    "a file": Wrong(as_file, WRITERS, ("runs/small is a file; name a study's folder with --home",)),
    "a file to be read": Wrong(as_file, READERS, ("runs/small is neither a study's folder",), 2),
    "a link to itself": Wrong(
        lambda home: (shutil.rmtree(home), home.symlink_to(home.name)), WRITERS, ("runs/small", MEND)
    ),
    "runs a file": Wrong(
        lambda home: as_file(home / "runs"), WRITERS, ("runs/small/runs", "Not a directory", MEND)
    ),
    "study.yaml a folder": Wrong(
        lambda home: (
            as_folder(home / "study.yaml"),
            as_nothing(home / "study.lock.json"),
            as_nothing(home / "runs"),
        ),
        WRITERS,
        ("runs/small/study.yaml: Is a directory", MEND),
    ),
    "another's study.yaml": Wrong(
        lambda home: (
            (home / "study.yaml").write_text("study: precious\n"),
            as_nothing(home / "study.lock.json"),
            as_nothing(home / "runs"),
        ),
        WRITERS,
        ("study.yaml is there and is another study", "--home"),
    ),
    "coordinator.lock a folder": Wrong(
        lambda home: as_folder(home / "coordinator.lock"), WRITERS, ("coordinator.lock: Is a directory", MEND)
    ),
    "analysis a file": Wrong(lambda home: as_file(home / "analysis"), "report", ("small/analysis", MEND)),
    "summary a folder": Wrong(
        lambda home: as_folder(home / "analysis" / "summary.json"),
        "report",
        ("summary.json: Is a directory", MEND),
    ),
    "an optimum a folder": Wrong(
        lambda home: as_folder(next((home / "best").iterdir())), "run report", ("synthetic_qa.full.yaml", MEND)
    ),
    "an optimum changed": Wrong(
        lambda home: (path := next((home / "best").iterdir())).write_text(path.read_text() + "more: 1\n"),
        READERS,
        ("synthetic_qa.full.yaml", *DAMAGED),
    ),
    # one run
    "result of a newer version": Wrong(
        in_run("result.json", lambda path: record(path, schema_version=2)),
        EVERY,
        ("result.json", ANOTHER_VERSION, "--home"),
    ),
    "result of an older version": Wrong(
        in_run("result.json", lambda path: record(path, schema_version=0)),
        EVERY,
        ("result.json", ANOTHER_VERSION, "--home"),
    ),
    "result with a newer key": Wrong(
        in_run("result.json", lambda path: record(path, tomorrow=1)),
        EVERY,
        ("result.json", ANOTHER_VERSION, "tomorrow"),
    ),
    "result of another run": Wrong(
        in_run(
            "result.json",
            lambda path: shutil.copy(run_of(path.parent.parent.parent, "trial") / "result.json", path),
        ),
        READERS,
        ("result.json", "it is of another run, trial.", *DAMAGED),
    ),
    "result cut short": Wrong(in_run("result.json", half), READERS, ("result.json", *DAMAGED)),
    "result too deep": Wrong(
        in_run("result.json", lambda path: path.write_text("[" * 99_999)), READERS, ("result.json", *DAMAGED)
    ),
    "result a folder": Wrong(in_run("result.json", as_folder), EVERY, ("result.json: Is a directory", MEND)),
    "spec of another run": Wrong(
        in_run("spec.json", lambda path: record(path, number=7)), EVERY, ("spec.json is the spec of", "--home")
    ),
    "spec of a newer version": Wrong(
        in_run("spec.json", lambda path: record(path, schema_version=2)), EVERY, ("spec.json", ANOTHER_VERSION)
    ),
    "spec a folder": Wrong(in_run("spec.json", as_folder), EVERY, ("spec.json: Is a directory", MEND)),
    "attempts a file": Wrong(
        in_run("attempts", as_file), READERS, ("attempts", "should be a folder", *DAMAGED)
    ),
    "attempt of another number": Wrong(
        in_run("attempts", lambda path: shutil.copy(path / "1.json", path / "2.json")),
        READERS,
        ("2.json", "it is of another attempt, 1", *DAMAGED),
    ),
    "run a file": Wrong(in_run("", as_file), "run", ("replicate", "Not a directory", MEND)),
    "lease a folder": Wrong(in_run("lease.json", as_folder), "run", ("lease.json: Is a directory", MEND)),
    "log a folder": Wrong(
        lambda home: undone(home, in_run("log.txt", as_folder)), "run", ("log.txt: Is a directory", MEND)
    ),
    "worker.lock a folder": Wrong(
        lambda home: undone(home, in_run("worker.lock", as_folder)),
        "run",
        ("worker.lock: Is a directory", MEND),
    ),
    "checkpoint a file": Wrong(
        lambda home: undone(home, in_run("checkpoint", as_file)), "run", ("checkpoint", "Not a directory", MEND)
    ),
    "models a file": Wrong(
        lambda home: undone(home, lambda home: as_file(home / "models")), "run", ("models: File exists", MEND)
    ),
    "damaged a file": Wrong(
        lambda home: (half(run_of(home) / "result.json"), as_file(home / "damaged")),
        WRITERS,
        ("damaged: File exists", MEND),
    ),
    "home below a file": Wrong(
        lambda home: (as_nothing(home.parent), home.parent.write_text("x")), WRITERS, ("runs/small", MEND)
    ),
}
