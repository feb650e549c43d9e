"""What `bench/gpu.py` measures of processes that share a GPU: trials packed by the memory foretold.

Full fine-tuning of a random model of SmolLM2-135M's shape, rows of 384 tokens, batches of 4, mixed precision;
finetrial's own scheduler and workers, one after the other and as many as cores and memory allow. And whether
memory that ran out is told apart: a process's own share, or a GPU that others have filled.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from finetrial import plugins, processes
from finetrial.packing import Packing
from finetrial.process_memory import is_own_limit, keep_to, let_go
from finetrial.progress import Progress
from finetrial.records import Fit, How, LoopRules, MethodSpec, ModelSource, RunSpec, Seeds, TaskSpec
from finetrial.schedule import Scheduler
from finetrial.store import Home
from gpu_many import data_of

SMOLLM2 = {
    "hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
    "intermediate_size": 1536, "tie_word_embeddings": True,
}  # fmt: skip
TRIALS, LENGTH, ROWS = 6, 384, 512
FASTER = 2.5  # trials per hour, packed over one after the other
# Another process leaves so much of the GPU; and what of it a run may take.
LEFT_BYTES, SHARE_BYTES = 2_000_000_000, 4_000_000_000
FILL = """
import sys, torch
free, _ = torch.cuda.mem_get_info()
held = torch.empty(free - int(sys.argv[1]), dtype=torch.uint8, device="cuda")
print("full", flush=True)
sys.stdin.read()
"""


def specs_of(model: ModelSource, data: dict[str, str], length: int, *, packed: bool) -> list[RunSpec]:
    params = {"data": data, "max_length": length, "validation_rows": 8, "test_rows": 8}
    common = {"epochs": 1, "batch_size": 4, "warmup_ratio": 0.1, "weight_decay": 0.01}
    return [
        RunSpec(
            study="packed", stage="trial", number=number, model=model,
            task=TaskSpec(name="words", use="classification", params=params),
            method=MethodSpec(name="full", use="full", params={}),
            settings={**common, "learning_rate": 1e-5 * (1 + number)},
            rules=LoopRules(precision="bf16"), how=How(threads=1, packed=packed),
            seeds=Seeds(data_order=number, head=number, adapter=number, dropout=number),
        )
        for number in range(TRIALS)
    ]  # fmt: skip


def timed(specs: list[RunSpec], home: Home, packing: Packing) -> dict[str, Any]:
    """All trials by the scheduler; seconds, how every attempt ended, and what was foretold and taken."""
    engine, begun = plugins.load("engines", "local"), time.perf_counter()
    Scheduler(home, engine, packing, 1, Progress(), lambda record: None).run([iter([specs])])
    seconds = time.perf_counter() - begun
    folders = [home.run(spec.run_id) for spec in specs]
    results, fits = [folder.result() for folder in folders], [folder.fit() for folder in folders]
    return {
        "seconds": seconds, "trials_per_hour": 3600 * len(specs) / seconds,
        "attempts": [[attempt.outcome for attempt in folder.attempt_records()] for folder in folders],
        "foretold_gb": [fit.predicted / 1e9 if fit and fit.predicted else None for fit in fits],
        "peak_memory_gb": max((each.cost.peak_memory_bytes / 1e9 for each in results if each), default=0.0),
    }  # fmt: skip


def whose_limit() -> tuple[bool, bool]:
    """Whether memory ran out by the process's own share: where that is so, and where another holds the rest."""
    fit = Fit(device="cuda", budget=SHARE_BYTES, predicted=None, evaluation_tokens=1)

    def run_out() -> bool:
        held = []
        with contextlib.suppress(torch.OutOfMemoryError):
            while True:
                held.append(torch.empty(100_000_000, dtype=torch.uint8, device="cuda"))
        told = is_own_limit(fit)
        held.clear()
        return told

    torch.cuda.empty_cache()
    keep_to(fit)
    own = run_out()
    let_go()
    other = subprocess.Popen(
        [sys.executable, "-c", FILL, str(LEFT_BYTES)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout is not None
    other.stdout.readline()
    keep_to(fit)
    crowded = run_out()
    let_go()
    other.communicate()
    return own, crowded


def packed_runs(model: ModelSource, root: Path, *, dry_run: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """Rows and checks for the report of `gpu.py`; `model` is of SmolLM2's shape."""
    root.mkdir(parents=True)
    length, rows = (48, 16) if dry_run else (LENGTH, ROWS)
    data = data_of(root, model, rows, length)
    ways = {
        "full, one after the other": Packing(1),
        "full, packed by memory": Packing(min(TRIALS, processes.cores()), by_memory=True),
    }
    found = {
        label: timed(
            specs_of(model, data, length, packed=packing.by_memory), Home(root / f"home-{number}"), packing
        )
        for number, (label, packing) in enumerate(ways.items())
    }
    alone, packed = found.values()
    checks: dict[str, Any] = {
        "packed by memory: every trial ends at its first attempt": {
            "passed": alone["attempts"] == packed["attempts"] == [["done"]] * TRIALS,
            "attempts": packed["attempts"],
        },
    }
    if not dry_run:
        times = packed["trials_per_hour"] / alone["trials_per_hour"]
        name = f"packed by memory: at least {FASTER:g} times the trials per hour"
        checks[name] = {"passed": times >= FASTER, "times": times}
    if torch.cuda.is_available():
        own, crowded = whose_limit()
        checks["out of memory: a run's own share and a full GPU are told apart"] = {
            "passed": own and not crowded, "own": own, "crowded": crowded,
        }  # fmt: skip
    return found, checks
