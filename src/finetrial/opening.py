"""Opening a study's folder: what the study resolves to, and whether the folder is this study's.

Writes `study.yaml` and `study.lock.json` once; afterwards a changed study, model or data file is refused by
name, because results of two different questions must not lie in one folder.
"""

from __future__ import annotations

import json
import os
import platform
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pydantic import ValidationError

from finetrial import files
from finetrial.errors import HomeError
from finetrial.records import SCHEMA_VERSION, Frozen
from finetrial.sources import data_inputs, model_inputs
from finetrial.store import Home
from finetrial.study import Study
from finetrial.summary import Meta

PACKAGES = ("finetrial", "torch", "transformers", "peft", "accelerate", "optuna", "numpy", "scipy")


class Lock(Frozen):
    """`study.lock.json`: the study as resolved when its folder was first used."""

    schema_version: int = SCHEMA_VERSION
    identity: str
    inputs: dict[str, dict[str, str]]  # task -> input -> SHA-256
    threads: int  # per run; part of what makes results bit-equal
    versions: dict[str, str]
    created_at: str
    study: Study


@dataclass(frozen=True)
class Opened:
    """A study's folder, checked: inputs by content, threads per run."""

    home: Home
    study: Study
    inputs: dict[str, dict[str, str]]
    threads: int
    started: float | None  # seconds since the epoch; None when nothing is run

    @property
    def model_sha256(self) -> str | None:
        return next(iter(self.inputs.values()))["model"]

    def meta(self) -> Meta:
        return Meta(
            finetrial_version=version("finetrial"),
            created_at=datetime.now(UTC).isoformat(timespec="seconds"),
            home=str(self.home.path),
            wall_seconds=round(time.time() - self.started, 1) if self.started is not None else None,
            environment=versions() | {"platform": platform.platform(), "threads": str(self.threads)},
            run_rules=self.study.run.model_dump(mode="json"),
        )


def versions() -> dict[str, str]:
    """The versions of what computes, read without importing it."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def open_home(study: Study, path: Path) -> Opened:
    """The study's folder, made if it is not there.

    Raises:
        HomeError: the folder belongs to another study, or an input has changed since it was first used.
        ModelError, DataError: the model or a data file is not there.
    """
    home = Home(path)
    base = Path(study.base)
    model = model_inputs(study.model, base)
    inputs = {task.name: model | data_inputs(task, base) for task in study.tasks}
    threads = study.run.threads or max(1, (os.cpu_count() or 1) // study.run.parallel)
    if not home.lock_file.exists():
        if home.runs.exists():
            raise HomeError(f"{path} has runs but no study.lock.json; name another folder with --home")
        lock = Lock(
            identity=study.identity(), inputs=inputs, threads=threads, versions=versions(), study=study,
            created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        )  # fmt: skip
        files.write_bytes(home.study_file, Path(study.file).read_bytes())
        files.write_text(home.lock_file, lock.model_dump_json(indent=1) + "\n")
        return Opened(home, study, inputs, threads, time.time())
    lock = read_lock(home)
    _compare(home, lock, study, inputs)
    return Opened(home, study, inputs, study.run.threads or lock.threads, time.time())


def read_lock(home: Home) -> Lock:
    """The lock of a study's folder.

    Raises:
        HomeError: there is none, or it is damaged.
    """
    try:
        return Lock.model_validate_json(home.lock_file.read_bytes())
    except FileNotFoundError:
        raise HomeError(f"{home.path} is no study's folder: it has no study.lock.json") from None
    except ValidationError as error:
        where = ".".join(map(str, error.errors()[0]["loc"])) or "file"
        raise HomeError(
            f"{home.lock_file} cannot be read ({where}): damaged, or written by another version; "
            f"name another folder with --home"
        ) from None


def _compare(home: Home, lock: Lock, study: Study, inputs: dict[str, dict[str, str]]) -> None:
    if lock.identity != study.identity():
        before = json.loads(lock.study.model_dump_json())
        now = json.loads(study.model_dump_json())
        skipped = ("run", "track", "file", "base")
        changed = [key for key in now if key not in skipped and now[key] != before[key]]
        raise HomeError(
            f"{home.path} belongs to another study: {', '.join(changed)} differ from its study.lock.json. "
            f"Only search.trials, train.seeds, run and track may change; for the rest rename the study, or "
            f"name another folder with --home"
        )
    for task, files_ in inputs.items():
        for name, digest in files_.items():
            if lock.inputs[task].get(name) != digest:
                raise HomeError(
                    f"{name} of {task} is not what it was when {home.path} was begun (its SHA-256 changed); "
                    f"put the old content back, or name another folder with --home"
                )
