"""The figures of docs/replications.md, from the folders of finished studies.

    python bench/replications.py HOME [HOME ...]

Run the studies that it names first. A row per arm: what its search
chose, what its updates look like, and what is known of its embeddings; everything but the last from
`analysis/summary.json`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from finetrial.store import Home
from finetrial.summary import ArmSummary, Summary
from finetrial.summary_measures import Interval

TITLES = (
    "study", "arm", "best rate", "update / weights", "effective rank", "intruders", "embeddings moved",
    "drift of layer 0", "drift", "noise of that norm", "score",
)  # fmt: skip


def told(value: Interval | None, places: int) -> str:
    if value is None:
        return "–"
    if value.low is None or value.high is None:
        return f"{value.estimate:.{places}f}"
    return f"{value.estimate:.{places}f} ({value.low:.{places}f} .. {value.high:.{places}f})"


def embeddings(home: Home, arm: ArmSummary) -> str:
    """The largest relative change of an embedding over all probes of the arm."""
    changes = [
        embedding["relative_change"]
        for run in (arm.spectrum.probe_runs if arm.spectrum else ())
        if (result := home.run(run).result())
        for embedding in result.measures["spectrum"]["embeddings"]
    ]
    return f"{max(changes):.2g}" if changes else "–"


def row(home: Home, summary: Summary, arm: ArmSummary) -> tuple[str, ...]:
    spectrum, drift = arm.spectrum, arm.drift
    metric = next(task.metric for task in summary.tasks if task.name == arm.task)
    rate = next((d.optimum for d in arm.search.dimensions if d.name == "learning_rate"), None)
    overall = spectrum.overall if spectrum else {}
    first = next((layer for layer in drift.layers if layer.layer == 0), None) if drift else None
    of = f" of {spectrum.directions}" if spectrum else ""
    return (
        summary.study, f"{arm.task}/{arm.method}", f"{float(rate):.1e}" if rate is not None else "–",
        told(overall.get("relative_change"), 4), told(overall.get("effective_rank_mean"), 1),
        told(overall.get("intruders"), 1) + of, embeddings(home, arm),
        f"{max(map(abs, (value for value in first.cka if value is not None))):.2g}" if first else "–",
        told(drift.cka if drift else None, 3), told(drift.perturbed if drift else None, 4),
        told(arm.test.get(metric), 1),
    )  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("homes", nargs="+", type=Path)
    lines = [TITLES, ("---",) * len(TITLES)]
    for path in parser.parse_args().homes:
        home = Home(path)
        summary = home.summary()
        lines += [row(home, summary, arm) for arm in summary.arms]
    sys.stdout.write("".join(f"| {' | '.join(cells)} |\n" for cells in lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
