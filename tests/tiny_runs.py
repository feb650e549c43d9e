"""One run in this process, on a tiny random model: no child process, a fraction of a second."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from finetrial.files import json_lines
from finetrial.records import How, LoopRules, MethodSpec, ModelSource, Result, RunSpec, Seeds, TaskSpec
from finetrial.store import Home, RunFolder

torch.set_num_threads(1)

QA_ROWS = {"rows": 24, "validation_rows": 12, "test_rows": 12, "max_length": 64}
SETTINGS: dict[str, Any] = {
    "learning_rate": 3e-3,
    "epochs": 2,
    "batch_size": 4,
    "warmup_ratio": 0.1,
    "weight_decay": 0.01,
    "rank": 4,
    "dropout": 0.1,
}
SEEDS = Seeds(data_order=1, head=2, adapter=3, dropout=4)


def make_spec(model: Path, method: str | None = "full", **changes: Any) -> RunSpec:
    """A replicate of the fragile QA task; `settings`, `rules`, `how`, `task_params` change single fields."""
    task = TaskSpec(
        name="qa", use=changes.pop("use", "fragile:QA"), params={**QA_ROWS, **changes.pop("task_params", {})}
    )
    if "params" in changes:
        task = task.model_copy(update={"params": changes.pop("params")})
    fields: dict[str, Any] = {
        "study": "test",
        "stage": "replicate",
        "task": task,
        "method": method and MethodSpec(name="m", use=method, params=changes.pop("method_params", {})),
        "number": 0,
        "model": ModelSource(name=str(model)),
        "settings": {**SETTINGS, **changes.pop("settings", {})},
        "rules": LoopRules(**{"precision": "fp32", **changes.pop("rules", {})}),
        "how": How(**{"log_steps": 4, "checkpoint_seconds": None, **changes.pop("how", {})}),
        "seeds": SEEDS.model_copy(update=changes.pop("seeds", {})),
    }
    return RunSpec(**{**fields, **changes})


def folder_of(spec: RunSpec, home: Path) -> RunFolder:
    folder = Home(home).run(spec.run_id)
    folder.create(spec)
    return folder


def run(spec: RunSpec, home: Path) -> Result:
    """The run's result; what the worker does, without its failure handling."""
    from finetrial import worker

    return worker.prepare(spec).run(spec, folder_of(spec, home))


def records(spec: RunSpec, home: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what is measured on the clock."""
    found = list(json_lines(folder_of(spec, home).metrics_file))
    return [{key: value for key, value in record.items() if key != "seconds"} for record in found]


def examples(spec: RunSpec, home: Path) -> dict[str, dict[str, float]]:
    return json.loads(folder_of(spec, home).examples_file.read_text())


def unmeasured(result: Result) -> dict[str, Any]:
    """A result without times, memory, and which attempt made it."""
    content = result.model_dump(exclude={"cost"})
    content["training"].pop("resumed_from")
    return content
