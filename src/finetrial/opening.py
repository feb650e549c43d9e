"""Opening a study's folder: what the study resolves to, and whether the folder is this study's.

Writes `study.yaml` and `study.lock.json` once; afterwards a changed study, model or data file is refused by
name, because results of two different questions must not lie in one folder.
"""

from __future__ import annotations

import platform
import re
import shutil
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from finetrial import files, processes
from finetrial.errors import HomeError, StudyError
from finetrial.frozen import SCHEMA_VERSION, Frozen, SchemaVersion
from finetrial.packing import Packing
from finetrial.problems import show
from finetrial.sealed import Damaged
from finetrial.sources import (
    data_inputs,
    is_sentence_embedding,
    keep_model_sha256,
    measure_inputs,
    model_inputs,
    not_there,
)
from finetrial.store import Home, RunFolder
from finetrial.study import Study
from finetrial.summary import Meta

PACKAGES = ("finetrial", "torch", "transformers", "peft", "accelerate", "optuna", "numpy", "scipy")


class Changed(Frozen):
    """How many trials or seeds there are, changed when test scores were there to be seen."""

    what: str  # the key of the study file
    before: int
    after: int
    scored: int  # replicates that had a test score

    @property
    def told(self) -> str:
        replicates = "1 replicate" if self.scored == 1 else f"{self.scored} replicates"
        return (
            f"{self.what} was changed from {self.before} to {self.after} when {replicates} had been scored on "
            f"test: a verdict that was waited for, or stopped at, is false more often than the 5 % stated; one "
            f"on seeds that were fixed beforehand is not"
        )


class Lock(Frozen):
    """`study.lock.json`: the study as resolved when its folder was first used."""

    schema_version: SchemaVersion = SCHEMA_VERSION
    identity: str
    inputs: dict[str, dict[str, str]]  # task -> input -> SHA-256
    threads: int  # per run; part of what makes results bit-equal
    versions: dict[str, str]
    created_at: str
    begun: bool = True  # `finetrial run` was; until then the study may be changed
    changed: tuple[Changed, ...] = ()
    study: Study


@dataclass(frozen=True)
class Opened:
    """A study's folder, checked: inputs by content, threads per run."""

    home: Home
    study: Study
    inputs: dict[str, dict[str, str]]
    threads: int
    started: float | None  # seconds since the epoch; None when nothing is run
    notes: tuple[str, ...] = ()  # what changed since the folder was first used, for a person to read
    changed: tuple[Changed, ...] = ()

    @property
    def model_sha256(self) -> str | None:
        return next(iter(self.inputs.values()))["model"]

    def meta(self) -> Meta:
        return Meta(
            finetrial_version=version("finetrial"),
            created_at=datetime.now(UTC).isoformat(timespec="seconds"),
            home=str(self.home.path),
            wall_seconds=round(time.time() - self.started, 1) if self.started is not None else None,
            environment=versions()
            | {
                "matplotlib": version("matplotlib"),
                "platform": platform.platform(),
                "threads": str(self.threads),
            },
            run_rules=self.study.run.model_dump(mode="json"),
        )


def packing_of(study: Study, threads: int) -> Packing:
    """How many runs may go side by side here, each with so many threads."""
    parallel, gpus = study.run.parallel, processes.gpus()
    if parallel == "auto":
        return Packing(max(1, processes.cores() // threads), by_memory=True, stack=study.run.stack, gpus=gpus)
    return Packing(parallel, stack=study.run.stack, gpus=gpus)


def versions() -> dict[str, str]:
    """The versions of what computes, read without importing it."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def open_home(
    study: Study, home: Home, inputs: dict[str, dict[str, str]], *, begins: bool = True
) -> Opened:  # fmt: skip
    """The study's folder, made if it is not there; `inputs` are what `resolve_inputs` found.

    What may change (trials, seeds, run, track; anything until `finetrial run` has begun a trial) is changed in
    its lock, too. `begins`: the study is to be run, not only checked.

    Raises:
        HomeError: the folder belongs to another study, or an input has changed since it was first used.
    """
    notes = _model_notes(study)
    threads = study.run.threads or (
        1 if study.run.parallel == "auto" else max(1, processes.cores() // study.run.parallel)
    )
    lock = read_lock(home) if home.lock_file.exists() else None
    same = lock is not None and lock.study.study == study.study  # else a mistyped --home: nothing of it goes
    if lock and same and _differs(lock, study, inputs) and not (lock.begun and _has_trained(home)):
        # After `finetrial check`, or a first run that was refused: the file was mended, and nothing is lost.
        dropped = _drop_pilots(home)
        lost = f"; what had run of it was deleted ({dropped} run{'s' * (dropped > 1)})"
        notes = (
            *notes,
            f"{study.file} or its data changed since {home.path} was begun, and `finetrial run` had trained "
            f"nothing, so it begins anew{lost if dropped else ''}",
        )
        lock = None
    if lock is None:
        if home.runs.exists() and not home.lock_file.exists():
            raise HomeError(f"{home.path} has runs but no study.lock.json; name another folder with --home")
        text = Path(study.file).read_bytes()
        if home.study_file.exists() and not home.lock_file.exists() and home.study_file.read_bytes() != text:
            raise HomeError(f"{home.study_file} is there and is another study; name another folder with --home")
        lock = Lock(
            identity=study.identity(), inputs=inputs, threads=threads, versions=versions(), study=study,
            begun=begins, created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        )  # fmt: skip
        _write(home, lock)
        keep_model_sha256(study.model, Path(study.base), home.cache)
        return Opened(home, study, inputs, threads, time.time(), notes)
    _compare(home, lock, study, inputs)
    keep_model_sha256(study.model, Path(study.base), home.cache)
    counts = (*lock.changed, *_changed(lock.study, study, home))
    now = lock.model_copy(update={"study": study, "begun": lock.begun or begins, "changed": counts})
    if now != lock:  # more trials or seeds, or another place to run: `status` and `report` read it here
        _write(home, now)
    changed = [
        f"{name} is {now} and was {lock.versions.get(name, 'not recorded')}"
        for name, now in versions().items()
        if lock.versions.get(name) != now
    ]
    if changed:
        note = f"since this study was begun: {', '.join(changed)}; the report says which runs differ"
        notes = (*notes, note)
    return Opened(home, study, inputs, study.run.threads or lock.threads, time.time(), notes, counts)


def _changed(before: Study, after: Study, home: Home) -> list[Changed]:
    """What was added to a study, or taken from it, of which something has been scored on test."""
    pairs = [
        ("train.seeds", before.train.seeds, after.train.seeds),
        ("search.trials", before.search.trials, after.search.trials),
    ]
    pairs = [(what, then, now) for what, then, now in pairs if then != now]
    scored = sum(_is_scored(folder) for folder in home.find("replicate.")) if pairs else 0
    return [Changed(what=what, before=then, after=now, scored=scored) for what, then, now in pairs if scored]


def _is_scored(folder: RunFolder) -> bool:
    try:
        result = folder.result()
    except Damaged:  # it will be set aside
        return False
    return result is not None and "test" in result.scores


def _differs(lock: Lock, study: Study, inputs: dict[str, dict[str, str]]) -> bool:
    return lock.study.identity() != study.identity() or lock.inputs != inputs


def _has_trained(home: Home) -> bool:
    """Whether a run of any arm has begun. A baseline is named after what it does and may stay; a control, the
    probe without a method, has trained nothing."""
    names = [folder.path.name for folder in home.find("")]
    return any(not name.startswith(("baseline.", "check.")) and not CONTROL.match(name) for name in names)


def _drop_pilots(home: Home) -> int:
    """Delete what `finetrial check` ran of another version of the study: its trials are not this one's.

    How many runs they were.
    """
    folders = [folder for folder in home.find("") if not folder.path.name.startswith("baseline.")]
    for folder in folders:
        shutil.rmtree(folder.path)
    return len(folders)


def _model_notes(study: Study) -> tuple[str, ...]:
    if not (study.model.token_type_ids and is_sentence_embedding(study.model, Path(study.base))):
        return ()
    return (
        f"{study.model.name} is a sentence-embedding model, which has seen single texts only; on pairs of "
        f"texts it learns much faster with `model: {{name: {study.model.name}, token_type_ids: false}}`",
    )


def resolve_inputs(study: Study) -> dict[str, dict[str, str]]:
    """Task -> input (`model`, `data/<file>`, `measure.<name>/<file>`) -> SHA-256 of what is there now.

    Raises:
        StudyError: the model or data files are not there; it names all of them.
    """
    base = Path(study.base)
    problems = not_there(study.model, study.tasks, study.measure, base)
    if problems:
        raise StudyError(study.file, problems)
    shared = model_inputs(study.model, base)
    for name, measure in study.measure.items():
        shared |= measure_inputs(name, measure, base)
    return {task.name: shared | data_inputs(task, base) for task in study.tasks}


def _write(home: Home, lock: Lock) -> None:
    files.write_bytes(home.study_file, Path(lock.study.file).read_bytes())
    files.write_text(home.lock_file, lock.model_dump_json(indent=1) + "\n")


def read_lock(home: Home) -> Lock:
    """The lock of a study's folder.

    Raises:
        HomeError: there is none, or it is damaged.
    """
    try:
        return Lock.model_validate_json(home.lock_file.read_bytes())
    except FileNotFoundError:
        if not home.path.exists():
            raise HomeError(f"{home.path} is not there yet; `finetrial run` makes it") from None
        raise HomeError(
            f"{home.path} is no study's folder: it has no study.lock.json; name one that has"
        ) from None
    except NotADirectoryError:
        raise HomeError(f"{home.path} is a file; name a study's folder with --home") from None
    except ValidationError as error:
        where = ".".join(map(str, error.errors()[0]["loc"])) or "file"
        if where == "schema_version":
            raise HomeError(
                f"{home.lock_file} was written by another version of finetrial (its schema_version is "
                f"{error.errors()[0]['input']!r}, this one's {SCHEMA_VERSION}); use that version, or name "
                f"another folder with --home"
            ) from None
        raise HomeError(
            f"{home.lock_file} cannot be read ({where}): damaged, or written by another version; "
            f"name another folder with --home"
        ) from None


def _compare(home: Home, lock: Lock, study: Study, inputs: dict[str, dict[str, str]]) -> None:
    if lock.study.identity() != study.identity():
        found = differences(lock.study, study)
        if len(found) > MOST_DIFFERENCES:
            found[MOST_DIFFERENCES:] = [f"and {len(found) - MOST_DIFFERENCES} more"]
        listed = "\n".join(f"  {line}" for line in found)
        raise HomeError(
            f"{home.path} belongs to another study. What differs from its study.lock.json:\n{listed}\n"
            f"Only search.trials, train.seeds, run and track may change. For the rest rename the study "
            f"(`study:`), or name another folder with --home"
        )
    for task, named in inputs.items():
        for name, digest in named.items():
            if lock.inputs[task].get(name) != digest:
                raise HomeError(
                    f"{name} of {task} is not what it was when {home.path} was begun (its SHA-256 changed); "
                    f"put the old content back, or name another folder with --home"
                )


def differences(before: Study, now: Study) -> list[str]:
    """`key path: value now, was value before` of everything that makes two studies different."""
    old, new = _flat(before), _flat(now)
    keys = sorted(key for key in old.keys() | new.keys() if old.get(key, ABSENT) != new.get(key, ABSENT))
    return [f"{key}: {_shown(new, key)}, was {_shown(old, key)}" for key in keys]


CONTROL = re.compile(r"probe\.[^.]+\.\d+-")  # a run's name without a method in it
ABSENT = object()
MOST_DIFFERENCES = 10


def _shown(flat: dict[str, Any], key: str) -> str:
    return show(flat[key]) if key in flat else "not there"


def _flat(study: Study) -> dict[str, Any]:
    """A study's values by the key paths that its file has."""
    data = study.model_dump(mode="json", exclude={"run", "track", "file", "base"})
    del data["search"]["trials"], data["train"]["seeds"]
    for section in ("tasks", "methods"):
        data[section] = {entry["name"]: {"use": entry["use"], **entry["params"]} for entry in data[section]}
    for method, space in data.pop("spaces").items():
        data["methods"][method]["search"] = space
    data["claims"] = [claim["text"] for claim in data["claims"]]
    flat: dict[str, Any] = {}

    def walk(path: str, value: Any) -> None:
        if isinstance(value, dict) and value and "kind" not in value:
            for key, inner in value.items():
                walk(f"{path}.{key}" if path else key, inner)
        else:
            flat[path] = value

    walk("", data)
    return flat
