"""The tables of docs/benchmarks.md, from the files in bench/results/.

python bench/tables.py            # write them anew, between their marks
python bench/tables.py --check    # exit code 1 if one is not what its file says
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "benchmarks.md"
RESULTS = Path(__file__).parent / "results"
MARKED = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- /table -->)", re.DOTALL)
VARIANTS = {
    "padded": "(a) padded", "grouped": "(b) grouped", "finetrial": "finetrial",
    "finetrial_bf16": "finetrial in bf16",
}  # fmt: skip
FASTER = {
    "finetrial_faster_than_padded": "than (a)", "finetrial_faster_than_grouped": "than (b)",
    "finetrial_bf16_faster_than_padded": "in bf16 than (a)",
    "finetrial_bf16_faster_than_grouped": "in bf16 than (b)",
}  # fmt: skip
METHODS = {"full": "full", "lora": "LoRA"}


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Median (lowest .. highest)."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} .. {max(values):.{digits}f})"


def _stated(found: Sequence[float]) -> str:
    median, low, high = found
    return f"{median:.2f} ({low:.2f} .. {high:.2f})"


def throughput(found: dict[str, Any]) -> str:
    shown = [name for name in VARIANTS if f"{name}_s" in found["rows"][0]]
    rows = [
        (
            row["task"], METHODS[row["method"]],
            *(spread(row[f"{name}_s"], 1) for name in shown),
            f"{row['loss_gap']:.0e}",
        )
        for row in found["rows"]
    ]  # fmt: skip
    columns = [f"{VARIANTS[name]}, s" for name in shown]
    return table(("task", "method", *columns, "gap of losses"), rows)


def faster(found: dict[str, Any]) -> str:
    shown = [key for key in FASTER if key in found["rows"][0]]
    rows = [
        (row["task"], METHODS[row["method"]], *(_stated(row[key]) for key in shown)) for row in found["rows"]
    ]
    return table(("task", "method", *(FASTER[key] for key in shown)), rows)


def worker_start(found: dict[str, Any]) -> str:
    seconds = found["seconds"]
    rows = [
        ("forked (`local`)", spread(seconds["local"])),
        ("a fresh Python (`spawn`)", spread(seconds["spawn"])),
        ("forked, the first of a study", f"{found['first']:.2f}"),
    ]
    return table(("how its process is made", "seconds"), rows)


def regression(found: dict[str, Any]) -> str:
    ratios = found.get("ratios", found)
    rows = [(item, spread(values)) for item, values in ratios.items() if isinstance(values, list)]
    return table(("path", "times its yardstick's time"), rows)


def similarity(found: dict[str, Any]) -> str:
    rows = [(name, spread(values, 1)) for name, values in found["ratio_to_table"].items()]
    return table(("all pairs of layers by", "times `cka_table`'s time"), rows)


def overhead(found: dict[str, Any]) -> str:
    names = {"passes": "forward and backward", "optimiser": "optimiser", "evaluation": "evaluation"}
    rows = [(label, spread([row[name] for row in found["trials"]], 1)) for name, label in names.items()]
    rows.append(("all else", spread([row["other"] for row in found["trials"]], 1)))
    rows.append(("all else, share", spread([row["share"] for row in found["trials"]], 3)))
    return table(("part of a trial", "seconds"), rows)


def halving(found: dict[str, Any]) -> str:
    rows = []
    for task, row in found.items():
        fewer = (row["times_fewer_tokens"][than] for than in ("its_own_trials", "the_whole_search"))
        rows.append(
            (
                task, ", ".join(map(str, row["settings"])), str(row["orders"]),
                *(f"{each['median']:.2f} ({each['least']:.2f} .. {each['most']:.2f})" for each in fewer),
                f"{100 * row['same_setting']:.0f} %",
            )
        )  # fmt: skip
    columns = (
        "settings of each recording",
        "orders of each",
        "times fewer tokens than its trials trained whole",
        "than the other search",
        "of the same trials it chooses the same",
    )
    return table(("task", *columns), rows)


def halving_choice(found: dict[str, Any]) -> str:
    def told(apart: dict[str, Any] | None) -> str:
        if apart is None:
            return "-"
        if apart["standard_error"] is None:
            return f"{apart['mean']:+.2f} (one recording)"
        each = ", ".join(f"{mean:+.2f}" for mean in apart["recordings"])
        if len(set(apart["orders"])) > 1:
            each += "; of " + ", ".join(map(str, apart["orders"])) + " orders"
        return f"{apart['mean']:+.2f} ± {apart['standard_error']:.2f} ({each})"

    scores, searches = ("trained_anew", "halved_minus_whole"), ("choice", "search")
    anew = any(row[scores[0]]["choice"] for row in found.values())
    rows = [
        (task, *(told(row[of][name]) for name in searches for of in scores if anew or of == scores[1]))
        for task, row in found.items()
    ]
    named = (("same trials, trained anew", True), ("same trials, as trained", False),
             ("trials of its own, trained anew", True), ("trials of its own, as trained", False))  # fmt: skip
    return table(("task", *(name for name, new in named if anew or not new)), rows)


def study(found: dict[str, Any]) -> str:
    taken = [
        (row["task"], *(row[name] for name in ("seconds", "trainer_s", "recipe_s")))
        for row in found["rows"]
        if row["size"] == "whole" and row["variant"] == "finetrial" and "seconds" in row
    ]
    taken.append(("both", *(sum(row[column] for row in taken) for column in (1, 2, 3))))
    rows = [
        (
            task,
            f"{own:,.0f}",
            f"{trainer:,.0f}",
            f"{trainer / own:.1f}",
            f"{recipe:,.0f}",
            f"{recipe / own:.1f}",
        )
        for task, own, trainer, recipe in taken
    ]
    return table(("task", "finetrial, s", "(a) reckoned, s", "times", "(c) reckoned, s", "times"), rows)


def study_scores(found: dict[str, Any]) -> str:
    rows = []
    for task, by_method in found.get("less_than_trainer", {}).items():
        own = {
            row["variant"]: row["scores"]
            for row in found["rows"]
            if (row["size"], row["task"]) == ("whole", task)
        }
        for arm, gap in by_method.items():
            method, name = arm.split()
            paired = (own[variant][method][name][: gap["n"]] for variant in ("finetrial", "as-trainer"))
            means = map(statistics.fmean, paired)
            interval = f"{gap['estimate']:+.2f} ({gap['low']:+.2f} .. {gap['high']:+.2f})"
            ranks = found["less_than_trainer_by_ranks"][task][arm]
            counts = f"{ranks['ours']} and {ranks['theirs']}"
            shift = f"{ranks['estimate']:+.2f} ({ranks['low']:+.2f} .. {ranks['high']:+.2f})"
            found_ = (*(f"{mean:.2f}" for mean in means), interval, counts, shift)
            rows.append((task, METHODS[method], name, *found_))
    columns = (
        "on test", "finetrial", "as (a) searches and trains", "difference, 95 % interval",
        "all replicates", "shift by ranks, 95 % interval",
    )  # fmt: skip
    return table(("task", "method", *columns), rows)


def study_parts(found: dict[str, Any]) -> str:
    small = [row for row in found["rows"] if row["size"] == "small" and "seconds" in row]
    whole = {row["task"]: row["seconds"] for row in small if row["variant"] == "finetrial"}
    rows = [
        (row["variant"], row["task"], f"{row['seconds']:,.0f}", f"{row['seconds'] / whole[row['task']]:.2f}")
        for row in small
        if row["variant"] != "finetrial" and row["task"] in whole
    ]
    rows += [("nothing", task, f"{seconds:,.0f}", "1") for task, seconds in whole.items()]
    return table(("switched off", "task", "seconds", "times as long"), rows)


# The name of a table -> the file that it is of, and how it is written.
TABLES: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "throughput": ("throughput.json", throughput),
    "faster": ("throughput.json", faster),
    "worker_start": ("worker_start.json", worker_start),
    "overhead": ("overhead.json", overhead),
    "study": ("study.json", study),
    "study_scores": ("study.json", study_scores),
    "study_parts": ("study.json", study_parts),
    "halving": ("halving.json", halving),
    "halving_choice": ("halving.json", halving_choice),
    "halving_short": ("halving_short.json", halving),
    "halving_short_choice": ("halving_short.json", halving_choice),
    "regression": ("regression.json", regression),
    "similarity": ("similarity.json", similarity),
}


def written(page: str) -> str:
    """The page with every table as its file says.

    Raises:
        KeyError: a mark names no table.
    """

    def anew(match: re.Match[str]) -> str:
        file, write = TABLES[match[2]]
        return match[1] + write(json.loads((RESULTS / file).read_text(encoding="utf-8"))) + match[3]

    return MARKED.sub(anew, page)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    given = parser.parse_args()
    before = PAGE.read_text(encoding="utf-8")
    after = written(before)
    if given.check:
        return int(before != after)
    PAGE.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
