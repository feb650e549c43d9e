"""A study's folder: every path in it, its records read and written. State is derived, never stored.

A run is done when `result.json` exists, given up when `failure.json` does (unless it says that it goes on), and
unfinished otherwise. This file decides nothing and starts nothing.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from finetrial import files, loaded, sealed
from finetrial.errors import HomeError, Incomplete
from finetrial.lease import FileLock
from finetrial.paths import not_utf8
from finetrial.records import Attempt, Failure, Fit, Result, RunRecord, RunSpec, SearchStop
from finetrial.sealed import Damaged
from finetrial.secrets_guard import hide
from finetrial.summary import Summary

R = TypeVar("R", Result, Failure)
LOG_TAIL_LINES = 40
# In a trained model's folder: which run it is of. Folders are named by seed, and optima may change.
MODEL_OWNER = "finetrial-run.txt"


class RunFolder:
    """One run's folder: the only place that knows its file names."""

    def __init__(self, path: Path):
        self.path = path
        self.spec_file = path / "spec.json"
        self.lease_file = path / "lease.json"
        self.attempts = path / "attempts"
        self.fit_file = path / "fit.json"
        self.metrics_file = path / "metrics.jsonl"
        self.events_file = path / "events.jsonl"
        self.examples_file = path / "examples.json"
        self.log_file = path / "log.txt"
        self.checkpoint = path / "checkpoint"
        self.result_file = path / "result.json"
        self.failure_file = path / "failure.json"
        self.lock_file = path / "worker.lock"
        self.stack_file = path / "stack.json"

    @property
    def home(self) -> Home:
        return Home(self.path.parent.parent)

    def create(self, spec: RunSpec) -> None:
        """Write the spec first. A folder that has one keeps its content; where and how may have changed."""
        self.attempts.mkdir(parents=True, exist_ok=True)
        if not self.spec_file.exists() or self.spec().how != spec.how:
            sealed.write(self.spec_file, spec)

    def spec(self) -> RunSpec:
        spec = sealed.read(self.spec_file, RunSpec)
        if spec.run_id != self.path.name:  # the id is a hash of what the spec says
            raise HomeError(
                f"{self.spec_file} is the spec of {spec.run_id}: its folder was renamed, or another version of "
                f"finetrial wrote it; use that version, or name another folder with --home"
            )
        return spec

    def result(self) -> Result | None:
        return self._of_this_run(sealed.read(self.result_file, Result)) if self.result_file.exists() else None

    def failure(self) -> Failure | None:
        there = self.failure_file.exists()
        return self._of_this_run(sealed.read(self.failure_file, Failure)) if there else None

    def _of_this_run(self, record: R) -> R:
        if record.run_id != self.path.name:
            path = self.result_file if isinstance(record, Result) else self.failure_file
            raise Damaged(path, f"it is of another run, {record.run_id}")
        return record

    def attempt_records(self) -> tuple[Attempt, ...]:
        if self.attempts.exists() and not self.attempts.is_dir():
            raise Damaged(self.attempts, "it is a file, and should be a folder")
        found = []
        paths = self.attempts.glob("*.json")
        numbered = [path for path in paths if path.stem.isascii() and path.stem.isdigit()]
        for path in sorted(numbered, key=lambda path: int(path.stem)):
            attempt = sealed.read(path, Attempt)
            if attempt.number != int(path.stem):
                raise Damaged(path, f"it is of another attempt, {attempt.number}")
            found.append(attempt)
        return tuple(found)

    def current_attempts(self) -> tuple[Attempt, ...]:
        """Those that count: since the run was given up and is tried again, if it was."""
        past = self.attempt_records()
        since = max((attempt.number for attempt in past if attempt.gave_up), default=0)
        return tuple(attempt for attempt in past if attempt.number > since)

    def out_of_memory(self) -> int:
        """How many of its attempts ran out of memory: each halves what the next one takes at once."""
        return sum(attempt.outcome == "out_of_memory" for attempt in self.current_attempts())

    def has_failed(self) -> bool:
        """Whether an attempt that counts has ended without a result, and not only because it had to wait."""
        ends = [attempt.outcome for attempt in self.attempt_records() if attempt.counts]
        return any(outcome not in (None, "done", "diverged", "cancelled") for outcome in ends)

    def record(self) -> RunRecord:
        return RunRecord(self.spec(), self.result(), self.failure(), self.attempt_records())

    def write_result(self, result: Result) -> None:
        sealed.write(self.result_file, result)

    def write_failure(self, failure: Failure) -> None:
        sealed.write(self.failure_file, failure.model_copy(update={"reason": hide(failure.reason)}))

    def write_attempt(self, attempt: Attempt) -> None:
        reason = None if attempt.reason is None else hide(attempt.reason)
        sealed.write(self.attempts / f"{attempt.number}.json", attempt.model_copy(update={"reason": reason}))

    def fit(self) -> Fit | None:
        """How an earlier attempt was fitted to its memory; None if nothing says so, or it is damaged."""
        try:
            return sealed.read(self.fit_file, Fit) if self.fit_file.exists() else None
        except HomeError:  # it is counted again, and comes out the same but for a narrow case
            _say(f"{self.fit_file} cannot be read; what the run takes is counted again")
            return None

    def write_fit(self, fit: Fit) -> None:
        sealed.write(self.fit_file, fit)

    def stacked_with(self) -> list[RunFolder]:
        """The runs that this run's process does as well, besides it."""
        names: Any = []
        with suppress(OSError, ValueError):  # none, or a damaged one: the next start writes it anew
            names = json.loads(self.stack_file.read_text())
        return [self.home.run(str(name)) for name in names] if isinstance(names, list) else []

    def stack_with(self, others: Sequence[RunFolder]) -> None:
        """Have this run's process do others as well; none ends that."""
        if others:
            files.write_json(self.stack_file, [folder.path.name for folder in others])
        else:
            self.stack_file.unlink(missing_ok=True)

    def event(self, event: str, **facts: Any) -> None:
        """Append to the run's structured log: what its process did, with the time (UTC)."""
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        told = {name: hide(value) if isinstance(value, str) else value for name, value in facts.items()}
        files.append_json_line(self.events_file, {"time": now, "event": event, **told})

    def last_metrics(self) -> dict[str, Any] | None:
        """The newest whole record of metrics.jsonl, read from its end."""
        if not self.metrics_file.exists():
            return None
        with self.metrics_file.open("rb") as stream:
            size = stream.seek(0, 2)
            stream.seek(max(0, size - 8192))
            lines = stream.read().split(b"\n")[:-1]
        try:
            record = json.loads(lines[-1]) if lines else None
        except ValueError:  # damaged, or the end of a line that is longer than what was read
            return None
        return record if isinstance(record, dict) else None

    def keep_metrics_up_to(self, step: int, *, unjudged: bool = False) -> None:
        """Drop records after a checkpoint's step: the resumed run writes them again, the same.

        `unjudged`: the evaluation of that step is one of them.
        """
        records = files.json_lines(self.metrics_file, _say_damaged)
        kept = [
            record
            for record in records
            if record.get("step", math.inf) <= step
            and not (unjudged and record.get("kind") == "eval" and record["step"] == step)
        ]
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in kept)
        files.write_text(self.metrics_file, text)

    def log_tail(self) -> str:
        if not self.log_file.exists():
            return ""
        with self.log_file.open("rb") as stream:
            size = stream.seek(0, 2)
            stream.seek(max(0, size - 16384))
            text = stream.read().decode("utf-8", errors="replace")
        return hide("\n".join(text.splitlines()[-LOG_TAIL_LINES:]))

    def checkpoint_step(self) -> int:
        """The step of the newest checkpoint, damaged or not; 0 if there is none."""
        steps = [path.name.removeprefix("step-") for path in self.checkpoint.glob("step-*")]
        return max((int(step) for step in steps if step.isdigit()), default=0)

    def kept_outputs(self) -> int:
        """How many parts of evaluations are kept beside the checkpoint."""
        return len(list(self.checkpoint.glob("evaluation/*/to-*")))

    def before(self, spec: RunSpec) -> RunFolder | None:
        """The run that this one goes on from, if any."""
        return self.home.run(spec.rung.after) if spec.rung and spec.rung.after else None

    def take_over_metrics(self, before: RunFolder) -> None:
        """Begin with the metrics of the run that this one goes on from."""
        # As they are: a damaged line is dropped when they are read.
        data = before.metrics_file.read_bytes() if before.metrics_file.exists() else b""
        files.write_bytes(self.metrics_file, data)

    def drop_checkpoint(self) -> str | None:
        """Delete the checkpoints; a warning if that could not be done, which changes no result."""
        return _drop(self.checkpoint)


class Home:
    """A study's folder, `runs/<study>`: the only place that knows what lies where in it."""

    def __init__(self, path: Path):
        self.path = path
        self.study_file = path / "study.yaml"
        self.lock_file = path / "study.lock.json"
        self.runs = path / "runs"
        self.damaged = path / "damaged"
        self.best = path / "best"
        self.models = path / "models"
        self.analysis = path / "analysis"
        self.summary_file = path / "analysis" / "summary.json"
        self.report = path / "report"
        self.cache = path / "cache"
        self.tracking = path / "tracking"
        self.log_file = path / "log.txt"
        self.check_json = path / "check.json"
        self.check_text = path / "check.md"
        self.coordinator_lock = path / "coordinator.lock"

    def run(self, run_id: str) -> RunFolder:
        return RunFolder(self.runs / run_id)

    def find(self, prefix: str) -> list[RunFolder]:
        """The runs whose id starts with a prefix, in order of their names."""
        if not self.runs.is_dir():
            return []
        paths = sorted(p for p in self.runs.iterdir() if p.name.startswith(prefix) and p.is_dir())
        return [RunFolder(path) for path in paths if (path / "spec.json").exists()]

    def best_file(self, task: str, method: str) -> Path:
        return self.best / f"{task}.{method}.yaml"

    def search_stop(self, task: str, method: str) -> SearchStop | None:
        """Whether an arm's search has been ended early; None too where that file is damaged."""
        path = self._search_stop_file(task, method)
        try:
            return sealed.read(path, SearchStop) if path.exists() else None
        except Damaged:
            return None

    def stop_search(self, task: str, method: str, stop: SearchStop) -> None:
        sealed.write(self._search_stop_file(task, method), stop)

    def _search_stop_file(self, task: str, method: str) -> Path:
        return self.best / f"{task}.{method}.stopped.json"

    def model_folder(self, spec: RunSpec) -> Path:
        """Where a replicate's trained model lies: `models/<task>.<method>.seed<number>`."""
        method = spec.method.name if spec.method else "base"
        return self.models / f"{spec.task.name}.{method}.seed{spec.number}"

    def model_is_of(self, run_id: str, folder: Path) -> bool:
        """Whether a run's trained model lies there, and not another's; one that names no run is its own."""
        owner = folder / MODEL_OWNER
        return folder.exists() and (not owner.exists() or owner.read_text(encoding="utf-8").strip() == run_id)

    def drop_model(self, spec: RunSpec) -> str | None:
        """Delete a replicate's trained model; a warning if that could not be done, which changes no result."""
        folder = self.model_folder(spec)
        if folder.exists():  # half a model is never seen under its name
            folder.rename(folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.old"))
        left = [_drop(old) for old in folder.parent.glob(f".{folder.name}.????????.old")]
        return next((warning for warning in left if warning), None)

    def write_summary(self, summary: Summary) -> None:
        sealed.write(self.summary_file, summary)

    def summary(self) -> Summary:
        """Every number of the report.

        Raises:
            HomeError: the study has none yet, or it is damaged.
        """
        if not self.summary_file.exists() and not self.lock_file.exists():
            if not self.path.exists():
                raise HomeError(f"{self.path} is not there yet; `finetrial run` makes it")
            raise HomeError(f"{self.path} is no study's folder: it has no analysis/summary.json")
        if not self.summary_file.exists():
            raise HomeError(f"{self.path} has no analysis yet; `finetrial report {self.path}` makes one")
        return sealed.read(self.summary_file, Summary)

    @contextmanager
    def coordinate(self) -> Iterator[None]:
        """Be the only coordinator of this folder on this machine, or, where its disk shares locks, on all.

        Raises:
            HomeError: it is no folder, or cannot be written down.
            Incomplete: another process is; the message names it.
        """
        if (why := not_utf8(self.path.absolute())) is not None:
            raise HomeError(f"{why} with --home")
        if self.path.exists() and not self.path.is_dir():
            raise HomeError(f"{self.path} is a file; name a study's folder with --home")
        self.path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.coordinator_lock)
        if lock.acquire() is not None:
            first = f"delete {self.coordinator_lock} first"
            gone = (
                f"; if that machine is gone, and a few minutes have passed, {first}" if lock.elsewhere else ""
            )
            raise Incomplete(
                f"{self.path} is being worked on by {lock.holder}; wait for it, or stop it and run again{gone}"
            )
        try:
            with loaded.told_to_workers():
                yield
        finally:
            lock.release()


def _drop(folder: Path) -> str | None:
    if not folder.exists():
        return None
    try:
        shutil.rmtree(folder)
    except OSError as error:  # a link, too: nothing is deleted through it
        return f"{folder} could not be deleted ({error}); no run is affected, delete it yourself"
    return None


def _say_damaged(path: Path, line: int) -> None:
    _say(f"{path} line {line} is damaged and left out")


def _say(text: str) -> None:
    """Into the run's log: the worker is who resumes."""
    sys.stderr.write(f"{text}\n")
