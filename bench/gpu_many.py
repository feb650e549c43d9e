"""What `bench/gpu.py` measures of many runs on one device: LoRA trials stacked, and one after the other.

A random model of TinyLlama's shape and rows of 384 tokens, batches of 2 to 4, ranks and rates that differ; the
worker's own stages. Trials per hour count everything from the model's files to the result.
"""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState

from finetrial import stacking, stages
from finetrial.process_memory import peak_bytes
from finetrial.records import How, LoopRules, MethodSpec, ModelSource, Result, RunSpec, Seeds, TaskSpec
from finetrial.sources import locate_model
from finetrial.store import Home

TRIALS, AT_ONCE, LENGTH = 15, 8, 384
FASTER = 8.0  # trials per hour, stacked over one after the other
LOSS_TOLERANCE = 0.02  # bf16 sums in another order


def data_of(folder: Path, model: ModelSource, rows: int, length: int) -> dict[str, str]:
    """Two classes of random words, each one token, so that every row is about as long as asked."""
    words = [
        word
        for word in (Path(locate_model(model, Path()).name) / "vocab.txt").read_text().splitlines()
        if word.isalpha() and word.isascii()
    ]
    draw = random.Random(0)
    for split, count in (("train", rows), ("test", 8)):
        lines = [
            json.dumps({"text": " ".join(draw.choices(words, k=length - 2)), "label": index % 2})
            for index in range(count)
        ]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return {split: str(folder / f"{split}.jsonl") for split in ("train", "test")}


def specs_of(model: ModelSource, data: dict[str, str], precision: Any, length: int) -> list[RunSpec]:
    params = {"data": data, "max_length": length, "validation_rows": 8, "test_rows": 8}
    return [
        RunSpec(
            study="many",
            stage="trial",
            number=number,
            model=model,
            task=TaskSpec(name="words", use="classification", params=params),
            method=MethodSpec(name="lora", use="lora", params={}),
            settings={
                "epochs": 1,
                "batch_size": (2, 4)[number % 2],
                "warmup_ratio": 0.1,
                "weight_decay": 0.01,
                "learning_rate": 1e-4 * (1 + number),
                "rank": (4, 8, 16)[number % 3],
                "dropout": 0.0,
            },
            rules=LoopRules(precision=precision),
            how=How(threads=torch.get_num_threads(), log_steps=1),
            seeds=Seeds(data_order=number, head=number, adapter=number, dropout=number),
        )
        for number in range(TRIALS)
    ]


def timed(specs: Sequence[RunSpec], home: Home, at_once: int) -> dict[str, Any]:
    """All trials, so many at once; seconds, the peak of memory, and every trial's last loss."""
    AcceleratorState._reset_state(reset_partial_state=True)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    begun, ends = time.perf_counter(), []
    for start in range(0, len(specs), at_once):
        trainings = []
        for spec in specs[start : start + at_once]:
            folder = home.run(spec.run_id)
            folder.create(spec)
            trainings.append(stages.training(spec, folder))
        ends += stacking.together(trainings)
    seconds = time.perf_counter() - begun
    failed = [repr(end) for end in ends if not isinstance(end, Result)]
    losses = [end.training.last_loss if isinstance(end, Result) and end.training else math.nan for end in ends]
    return {
        "seconds": seconds, "trials_per_hour": 3600 * len(specs) / seconds,
        "peak_memory_gb": peak_bytes() / 1e9, "losses": losses, "failed": failed,
    }  # fmt: skip


def many_runs(model: ModelSource, root: Path, *, dry_run: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """Rows and checks for the report of `gpu.py`."""
    root.mkdir(parents=True)
    length, rows = (48, 8) if dry_run else (LENGTH, 64)
    data = data_of(root, model, rows, length)
    specs = specs_of(model, data, "fp32" if dry_run else "bf16", length)
    found = {}
    for label, at_once in (("LoRA, one after the other", 1), (f"LoRA, stacked by {AT_ONCE}", AT_ONCE)):
        timed(specs[:1], Home(root / f"warm-{at_once}"), 1)
        found[label] = timed(specs, Home(root / f"home-{at_once}"), at_once)
    alone, stacked = found.values()
    pairs = zip(alone["losses"], stacked["losses"], strict=True)
    gap = max(abs(one - other) / abs(one) for one, other in pairs)
    times = stacked["trials_per_hour"] / alone["trials_per_hour"]
    checks = {
        "stacked LoRA: every trial ends, with the loss that it has alone": {
            "passed": not alone["failed"] and not stacked["failed"] and gap < LOSS_TOLERANCE,
            "largest_relative_gap": gap,
        },
    }
    if not dry_run:  # a CPU's cores are busy with one trial
        name = f"stacked LoRA: at least {FASTER:g} times the trials per hour"
        checks[name] = {"passed": times >= FASTER, "times": times}
    return found, checks
