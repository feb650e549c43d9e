"""An engine whose runs are one-line programs, ended and watched as the local one; a scheduler that uses it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil

from finetrial.packing import Packing
from finetrial.processes import FreshPython, Handle
from finetrial.progress import Progress
from finetrial.records import Cost, Failure, ModelSource, Result, RunRecord, RunSpec, Seeds, TaskSpec
from finetrial.schedule import GIVEN_UP, TRIED_AGAIN, Lane, Scheduler
from finetrial.store import Home

COST = Cost(wall_seconds=1.0, cpu_seconds=1.0, peak_memory_bytes=1, device="cpu")
SEEDS = Seeds(data_order=1, head=2, adapter=3, dropout=4)
SLEEP = "import time; time.sleep(600)"


def make_spec(number: int = 0, **changes: Any) -> RunSpec:
    task = TaskSpec(name="t", use="synthetic_qa", params={})
    fields = {"study": "s", "stage": "baseline", "task": task, "number": number, "seeds": SEEDS}
    return RunSpec(**{**fields, "model": ModelSource(name="./m"), **changes})


def done(spec: RunSpec, **changes: Any) -> str:
    """A program that writes this run's result."""
    result = Result(**{"run_id": spec.run_id, "outcome": "done", "cost": COST, **changes})
    return f"open('result.json', 'w').write({result.model_dump_json()!r})"


def failed(spec: RunSpec, kind: str, reason: str, attempt: int = 1, **changes: Any) -> str:
    """A program that writes a failure of a kind and exits with 1."""
    failure = Failure(run_id=spec.run_id, kind=kind, reason=reason, attempt=attempt, **changes)
    return f"open('failure.json', 'w').write({failure.model_dump_json()!r}); raise SystemExit(1)"


class Scripted(FreshPython):
    """Runs, for each run, the programs given for it, one per attempt; the last one again and again."""

    def __init__(self, programs: dict[str, list[str]]):
        self.programs = programs
        self.started: list[str] = []
        self.handles: list[Handle] = []

    def start(self, run_folder: Path, spec: RunSpec) -> Handle:
        self.started.append(spec.run_id)
        programs = self.programs[spec.run_id]
        program = programs[min(self.started.count(spec.run_id), len(programs)) - 1]
        with (run_folder / "log.txt").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-S", "-c", program],
                cwd=run_folder,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.handles.append(Handle(process.pid, process))
        return self.handles[-1]


class Recorder(Progress):
    """The progress display, with what it was told kept; can press Ctrl-C at the n-th look at a run."""

    def __init__(self, interrupt_at: int | None = None) -> None:
        super().__init__()
        self.notes: list[str] = []
        self.looks, self.interrupt_at = 0, interrupt_at

    def note(self, text: str) -> None:
        self.notes.append(text)

    def tick(self, spec: RunSpec, last_record: Any) -> None:
        self.looks += 1
        if self.looks == self.interrupt_at:
            raise KeyboardInterrupt


class Bench:
    """A home, an engine of programs, and what the scheduler reported."""

    def __init__(self, path: Path):
        self.home = Home(path / "home")
        self.programs: dict[str, list[str]] = {}
        self.engine: Any = Scripted(self.programs)
        self.progress = Recorder()
        self.finished: list[RunRecord] = []

    def spec(self, number: int, *programs: str, **changes: Any) -> RunSpec:
        spec = make_spec(number, **changes)
        self.programs[spec.run_id] = list(programs) or [done(spec)]
        return spec

    def run(
        self,
        *lanes: Lane,
        parallel: int = 1,
        attempts: int = 3,
        retry: bool = False,
        packing: Packing | None = None,
    ) -> None:
        packing = packing or Packing(parallel)
        Scheduler(
            self.home, self.engine, packing, attempts, self.progress, self.finished.append,
            TRIED_AGAIN | GIVEN_UP if retry else TRIED_AGAIN,
        ).run(list(lanes))  # fmt: skip

    def outcomes(self, spec: RunSpec) -> list[str | None]:
        return [attempt.outcome for attempt in self.home.run(spec.run_id).attempt_records()]

    def nothing_runs(self) -> bool:
        return all(handle.process.poll() is not None for handle in self.engine.handles)


def gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
