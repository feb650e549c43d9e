"""An engine whose runs are one-line programs: real processes, ended and watched as the local engine's are."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

from finetrial.processes import FreshPython, Handle
from finetrial.records import Cost, Failure, ModelSource, Result, RunSpec, Seeds, TaskSpec

COST = Cost(wall_seconds=1.0, cpu_seconds=1.0, peak_memory_bytes=1, device="cpu")
SEEDS = Seeds(data_order=1, head=2, adapter=3, dropout=4)


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
