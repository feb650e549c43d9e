"""What of a trial is not forward, backward, optimiser or evaluation: a trial of about a minute, and its parts.

    python bench/overhead.py [--repeats 3] [--output bench/results/overhead.json]

MiniLM, whole, on SST-2 in batches of 16, on all cores. The trial runs in this process once imports are done, as
in a forked one (what forking takes: `worker_start.py`); its time counts from reading the spec to the result on
disk. The repeats find the rows prepared, as all trials of a study but the first do.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import throughput
from finetrial import loop, stages, worker  # noqa: F401 - the stages are what a forked process has imported

ROWS = 6400


class Meter:
    """Seconds by part."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(("passes", "batches", "optimiser", "evaluation"), 0.0)
        self.begun = 0.0

    def around(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*given: Any, **named: Any) -> Any:
            begun = time.perf_counter()
            try:
                return call(*given, **named)
            finally:
                self.seconds[name] += time.perf_counter() - begun

        return timed

    def before_step(self, *_: Any) -> None:
        self.begun = time.perf_counter()

    def after_step(self, *_: Any) -> None:
        self.seconds["optimiser"] += time.perf_counter() - self.begun


def trial(folder: Path, number: int, meter: Meter) -> dict[str, float]:
    """Seconds of a trial, and of its parts."""
    spec, home = throughput.prepared("sst2", "full", folder / "home")
    run = home.run(spec.run_id)
    run.create(spec)
    before, begun = dict(meter.seconds), time.perf_counter()
    worker.work(run)
    whole = time.perf_counter() - begun
    if run.result() is None:
        raise SystemExit(run.log_tail())
    run.path.rename(run.path.with_name(str(number)))
    found = {name: seconds - before[name] for name, seconds in meter.seconds.items()}
    found["passes"] -= found["batches"]
    other = whole - found["passes"] - found["optimiser"] - found["evaluation"]
    return {"whole": whole, **found, "other": other, "share": other / whole}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ["FINETRIAL_DATA"] = str(Path(os.environ.get("FINETRIAL_DATA", "../shared/data")).resolve())
    throughput.ROWS["sst2"] = ROWS
    throughput.STUDY = throughput.STUDY.replace("validation_rows: 8", "validation_rows: 872")
    meter = Meter()
    loop.Loop.backward = meter.around("passes", loop.Loop.backward)  # pyrefly: ignore[bad-assignment]
    loop.collate = meter.around("batches", loop.collate)
    loop.evaluate = meter.around("evaluation", loop.evaluate)
    register_optimizer_step_pre_hook(meter.before_step)
    register_optimizer_step_post_hook(meter.after_step)
    rows = []
    with tempfile.TemporaryDirectory() as place:
        for number in range(given.repeats + 1):
            rows.append({name: round(value, 3) for name, value in trial(Path(place), number, meter).items()})
            sys.stdout.write(json.dumps(rows[-1]) + "\n")
            sys.stdout.flush()
    shares = [row["share"] for row in rows[1:]]
    sys.stdout.write(f"other: {statistics.median(shares):.3f} ({min(shares):.3f} .. {max(shares):.3f})\n")
    if given.output:
        machine = {"platform": platform.platform(), "cpus": os.cpu_count()}
        content = {"machine": machine, "first": rows[0], "trials": rows[1:]}
        given.output.write_text(json.dumps(content, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
