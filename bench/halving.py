"""Does successive halving choose as well as whole trials do? Recorded learning curves, replayed in many orders.

    python bench/halving.py record FOLDER [--tasks sst2,mrpc,synthetic_qa] [--recordings 0,1,2,3]
    python bench/halving.py replicate FOLDER [CURVES] [--tasks ..] [--recordings ..] [--seeds 1]
    python bench/halving.py replay [CURVES] [--orders 200] [--output bench/results/halving.json]

`record` trains MiniLM at so many settings drawn at random, each to every end that halving has, and keeps the
scores and losses of the single validation examples there, in one file for each task and recording; it may be
stopped and goes on. Every recording draws its settings (the same for all tasks), its seeds and, but for the
first two, which have the same, its rows.
`replay` searches each of them (without a folder: those of the published figures, `bench/results/halving/`)
as the study would, by `search.propose`, with whole trials; a proposal is answered by the recorded setting
that lies nearest and is not yet used. Beside the best of these is set what halving chooses of the same trials
(`choice`), and of those that it proposes itself (`search`). Half of the validation examples are shown to the
search; on the other half, which nobody has seen, the chosen setting's score at full length is its quality.
That score has the luck of the weights that were chosen by it, which a study leaves behind: it trains the
setting anew. `replicate` does so, with seeds of their own, of every setting that any order chooses, and scores
on test; `replay` tells differences of these scores, too.
Orders differ by seed and by halves, and share their recording's curves: the standard error is of the
recordings' means.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from finetrial import halving, search
from finetrial.frozen import Setting, stream_seed
from finetrial.plugins import Metric, metric_of
from finetrial.records import TaskSpec
from finetrial.space import Choice, Range, Space
from halving_curves import ENDS, RULES, TRIALS, Curve, kept, record, replicate, study_of

PUBLISHED = Path(__file__).parent / "results" / "halving"


class Chosen(NamedTuple):
    number: int | None
    tokens: int


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


class Order(NamedTuple):
    """What three searches of one order choose, and half of the examples, which none of them has seen."""

    whole: Chosen
    choice: Chosen  # halving, of the same trials
    search: Chosen  # halving, of trials that it proposes itself
    unseen: Sequence[str]
    own_tokens: int  # of `search`'s trials, were they trained whole


def in_order(
    curves: Sequence[Curve], order: int, orders: int, metric: Metric, space: Space, task: str, recording: int
) -> Order:  # fmt: skip
    names = sorted(next(curve.examples[-1] for curve in curves if curve.examples[-1]))
    seed = recording * orders + order
    mixed = np.random.default_rng(stream_seed("halves", task, seed)).permutation(names).tolist()
    shown, unseen = mixed[: len(mixed) // 2], mixed[len(mixed) // 2 :]
    taken = proposed(curves, len(ENDS) - 1, shown, space, seed, metric)
    own = proposed(curves, 0, shown, space, seed, halving.LOSS)
    return Order(
        whole(curves, taken, shown, metric),
        halved(curves, taken, shown, metric),
        halved(curves, own, shown, metric),
        unseen,
        sum(curves[index].tokens[-1] for index in own),
    )


def replayed(
    curves: Sequence[Curve], found: Sequence[Order], metric: Metric, again: Mapping[int, float]
) -> dict[str, Any]:
    """One recording of a task: what halving's choice is better by, of every order, and its tokens; with what
    settings come to when trained anew, by that, too."""
    apart: dict[str, list[float]] = {"search": [], "choice": []}
    anew: dict[str, list[float]] = {"search": [], "choice": []}
    savings: dict[str, list[float]] = {"its_own_trials": [], "the_whole_search": []}
    for order in found:
        for name, by in (("search", order.search), ("choice", order.choice)):
            here, there = (
                score(curves[each.number], -1, order.unseen) if each.number is not None else metric.worst
                for each in (by, order.whole)
            )
            apart[name].append(here - there)
            tested = [metric.worst if c.number is None else again.get(c.number) for c in (by, order.whole)]
            if again and None not in tested:
                anew[name].append(tested[0] - tested[1])
        savings["its_own_trials"].append(order.own_tokens / order.search.tokens)
        savings["the_whole_search"].append(order.whole.tokens / order.search.tokens)
    names = sorted(next(curve.examples[-1] for curve in curves if curve.examples[-1]))
    return {
        "settings": len(curves), "scores_at_full_length": sorted(
            round(full, 2) for curve in curves if (full := score(curve, -1, names)) is not None
        ),
        "halved_minus_whole": apart, "trained_anew": anew, "times_fewer_tokens": savings,
        "same": sum(order.whole.number == order.choice.number for order in found),
    }  # fmt: skip


def summary(values: Sequence[Sequence[float]]) -> dict[str, Any] | None:
    """Of a difference in every order of every recording: the mean of the recordings' means, and its standard
    error, which is of so many recordings."""
    orders, values = [len(each) for each in values], [each for each in values if each]
    if not values:
        return None
    means = [statistics.fmean(each) for each in values]
    return {
        "mean": statistics.fmean(means),
        "standard_error": statistics.stdev(means) / math.sqrt(len(means)) if len(means) > 1 else None,
        "recordings": means,
        "orders": orders,
        "standard_errors_of_their_orders": [
            statistics.stdev(each) / math.sqrt(len(each)) if len(each) > 1 else None for each in values
        ],
    }


def together(recordings: Sequence[dict[str, Any]], orders: int) -> dict[str, Any]:
    """The recordings of a task."""
    savings = {
        than: [saving for each in recordings for saving in each["times_fewer_tokens"][than]]
        for than in ("its_own_trials", "the_whole_search")
    }
    return {
        "settings": [each["settings"] for each in recordings], "orders": orders,
        "scores_at_full_length": [each["scores_at_full_length"] for each in recordings],
        **{
            of: {name: summary([each[of][name] for each in recordings]) for name in ("search", "choice")}
            for of in ("halved_minus_whole", "trained_anew")
        },
        "same_setting": sum(each["same"] for each in recordings) / orders / len(recordings),
        "times_fewer_tokens": {
            than: {"median": statistics.median(each), "least": min(each), "most": max(each)}
            for than, each in savings.items()
        },
    }  # fmt: skip


def recordings_in(
    folder: Path, orders: int, tasks: Sequence[str] | None, numbers: Sequence[int] | None = None
) -> Iterator[tuple[TaskSpec, int, list[Curve], list[Order]]]:
    """Every recording of more than 15 settings in a folder (of these tasks and numbers): its task, number,
    curves and what is chosen.

    Raises:
        SystemExit: there are none.
    """
    study, none = study_of(0), True
    space = {name: each for name, each in study.spaces["full"].items() if each.kind != "fixed"}
    for task in study.tasks:
        for path in sorted(folder.glob(f"{task.name}-*.npz")):
            curves, number = kept(path), int(path.stem.rpartition("-")[2])
            asked = (tasks is None or task.name in tasks) and (numbers is None or number in numbers)
            if len(curves) > TRIALS and asked:
                none = False
                yield task, number, curves, [
                    in_order(curves, order, orders, metric_of(task), space, task.name, number)
                    for order in range(orders)
                ]  # fmt: skip
    if none:
        raise SystemExit(f"{folder} has no recording of more than {TRIALS} settings; `record` makes them")


def tests_file(folder: Path, task: str, recording: int) -> Path:
    return folder / f"{task}-{recording}.tests.json"


def replay(folder: Path, orders: int, tasks: Sequence[str] | None = None) -> dict[str, Any]:
    """Every task's recordings in a folder, and by scores on test where what is chosen was trained anew.

    Raises:
        SystemExit: there are none.
    """
    by_task: dict[str, list[dict[str, Any]]] = {}
    for task, number, curves, found in recordings_in(folder, orders, tasks):
        metric, again = metric_of(task), {}
        if (tests := tests_file(folder, task.name, number)).exists():
            for index, scores in json.loads(tests.read_text()).items():
                again[int(index)] = statistics.fmean(metric.worst if s is None else s for s in scores)
        by_task.setdefault(task.name, []).append(replayed(curves, found, metric, again))
    return {task: together(recordings, orders) for task, recordings in by_task.items()}


def train_anew(
    folder: Path, curves_in: Path, tasks: Sequence[str], numbers: Sequence[int], orders: int, seeds: int
) -> None:
    """Trains what any order of these recordings chooses, most often chosen first, and keeps its scores."""
    for task, number, curves, found in recordings_in(curves_in, orders, tasks, numbers):
        chosen = Counter(
            each.number
            for order in found
            for each in (order.whole, order.choice, order.search)
            if each.number is not None
        )
        wanted = [index for index, _ in chosen.most_common()]
        tests = replicate(folder, number, task.name, curves, wanted, seeds)
        tests_file(curves_in, task.name, number).write_text(json.dumps(tests) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    recording, training, replaying = map(verbs.add_parser, ("record", "replicate", "replay"))
    for each in (recording, training):
        each.add_argument("folder", type=Path)
        each.add_argument("--tasks", default="sst2,mrpc,synthetic_qa")
        each.add_argument("--recordings", default="0,1,2,3")
    recording.add_argument("--settings", type=int, default=30)
    training.add_argument("curves", type=Path, nargs="?", default=PUBLISHED)
    training.add_argument("--seeds", type=int, default=1)
    replaying.add_argument("folder", type=Path, nargs="?", default=PUBLISHED)
    replaying.add_argument("--output", type=Path)
    for each in (training, replaying):
        each.add_argument("--orders", type=int, default=200)
    given = parser.parse_args()
    if given.verb == "replay":
        text = json.dumps(replay(given.folder, given.orders), indent=1) + "\n"
        sys.stdout.write(text)
        if given.output:
            given.output.write_text(text)
        return 0
    tasks, numbers = given.tasks.split(","), [int(number) for number in given.recordings.split(",")]
    if given.verb == "replicate":
        train_anew(given.folder, given.curves, tasks, numbers, given.orders, given.seeds)
    else:
        for number in numbers:
            record(given.folder, number, tasks, given.settings)
    return 0


if __name__ == "__main__":
    sys.exit(main())
