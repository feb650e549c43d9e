"""Which figures the report has: a summary's numbers as tidy rows, each with its caption and description.

Not for drawing (`plots`). The rows are what lands in the CSV beside each figure, so they hold every
point that is drawn and the run that it came from.
"""

from __future__ import annotations

from typing import Any

from finetrial import plots
from finetrial import report_text as text
from finetrial.report_charts import (
    Chart,
    Rows,
    drift,
    file_name,
    forgetting,
    setting_columns,
    spectrum,
)
from finetrial.summary import ArmSummary, ClaimResult, Summary, TaskSummary

PANELS = {
    "score": "score difference",
    "share": "relative change of drift, %",
    "points": "difference in forgetting, points",
    "nats": "difference in forgetting, nats per token",
}


def charts(summary: Summary) -> dict[str | None, list[Chart]]:
    """The study's own figures (under None) and each task's, without those that have nothing to show."""
    found: dict[str | None, list[Chart]] = {None: [c for c in [_claims(summary)] if c]}
    for task in summary.tasks:
        made = (
            _scores(summary, task),
            _search(summary, task),
            _tuning(summary, task),
            drift(summary, task),
            forgetting(summary, task),
            spectrum(summary, task),
            _cost(summary, task),
        )
        found[task.name] = [chart for chart in made if chart]
    return found


def _claims(summary: Summary) -> Chart | None:
    rows: Rows = []
    for claim in summary.claims:
        task = next((task for task in summary.tasks if task.name == claim.task), None)
        rows.append(_claim_row(claim, task.higher_is_better if task else True))
    if not any(row["estimate"] is not None for row in rows):
        return None
    rows.sort(key=lambda row: row["panel"], reverse=True)
    said = "; ".join(f"{c.task}: {c.claim}, {text.VERDICT_WORDS[c.verdict]}" for c in summary.claims)
    return Chart(
        "claims",
        "Every claim, its difference and its margin",
        "Mark: mean difference over paired replicate seeds (number of seeds: in the table above). Bar: "
        "95 % interval, by t, or for drift by Fieller. Tick: the margin; shaded: the side on which the claim "
        "holds. Arrows: the data do not bound the interval.",
        f"Forest plot. {said}.",
        rows,
        plots.claims_figure(rows),
    )


def _claim_row(claim: ClaimResult, higher_is_better: bool) -> dict[str, Any]:
    value, drifts = claim.difference, claim.kind == "drifts_less"
    scale = 100.0 if drifts else 1.0
    margin: float | None = None
    if claim.kind != "within":
        margin = -100.0 * claim.margin if drifts else 0.0
    elif value and claim.contrast:  # contrast = difference ± margin × reference, so this is the border
        margin = value.estimate - claim.contrast.estimate
    return {
        "panel": PANELS[claim.unit],
        "task": claim.task,
        "claim": claim.claim,
        "label": f"{claim.task}: {claim.claim}",
        "verdict": claim.verdict,
        "verdict_text": text.VERDICT_WORDS[claim.verdict],
        "estimate": value.estimate * scale if value else None,
        "low": value.low * scale if value and value.low is not None else None,
        "high": value.high * scale if value and value.high is not None else None,
        "unbounded": value is not None and value.low is None and value.n > 1,
        "n": value.n if value else 0,
        "margin": margin,
        "holds": "right" if claim.kind == "within" and higher_is_better else "left",
    }


def _scores(summary: Summary, task: TaskSummary) -> Chart | None:
    rows: Rows = []
    said, counts = [], []
    places = text.metric_decimals(summary, task, task.metric)
    for arm in text.arms_of(summary, task.name):
        for run in arm.replicates:
            which = {"replicate": run.number, "run_id": run.run_id} | setting_columns(run.settings)
            rows.append(_score_row("replicate", arm.method, None if run.void else run.score, **which))
        mean = arm.test.get(task.metric)
        if mean:
            rows.append(_score_row("mean", arm.method, mean.estimate, low=mean.low, high=mean.high))
        said.append(f"{arm.method} {text.interval(mean, places)}")
        counts.append(f"{arm.method} n = {arm.scored} of {arm.planned}")
    for name, base in task.baselines.items():
        if task.metric in base:
            rows.append(_score_row("baseline", name, base[task.metric]))
            said.append(f"baseline {name} {text.fixed(base[task.metric], places)}")
    if not any(row["score"] is not None for row in rows):
        return None
    return Chart(
        file_name(f"{task.name}.scores"),
        f"Score of every replicate on {task.name}",
        f"Small marks: one replicate each ({', '.join(counts)}); grey lines join the same seed. Large marks: "
        f"mean with its 95 % t-interval over replicates. Horizontal lines: baselines (far ones at the edge).",
        f"Test {task.metric} by method: {', '.join(said)}.",
        rows,
        plots.score_figure(rows, metric=task.metric, methods=text.methods_of(summary)),
    )


def _score_row(series: str, method: str, score: float | None, **more: Any) -> dict[str, Any]:
    row = {
        "series": series,
        "method": method,
        "replicate": None,
        "score": score,
        "low": None,
        "high": None,
        "run_id": None,
    }
    return row | more


def _search(summary: Summary, task: TaskSummary) -> Chart | None:
    rows: Rows = []
    said, counts = [], []
    places = text.metric_decimals(summary, task, task.metric)
    for arm in text.arms_of(summary, task.name):
        rows += _trial_rows(arm)
        failed = sum(trial.score is None for trial in arm.search.trials)
        counts.append(
            f"{arm.method} n = {len(arm.search.trials)}" + (f", {failed} without a score" if failed else "")
        )
        if arm.search.best_score is not None:
            said.append(f"{arm.method} best {text.fixed(arm.search.best_score, places)}")
    if not rows:
        return None
    return Chart(
        file_name(f"{task.name}.search"),
        f"Learning rate against validation score on {task.name}",
        f"One mark a trial ({'; '.join(counts)}). Shaded: the range searched. Hollow: random start-up trials; "
        f"filled: guided by TPE. Ring: the optimum. Crosses at the bottom: trials without a score."
        + (" Small: stopped by halving before the end." if any(row["share"] < 1 for row in rows) else ""),
        f"Validation {task.metric} by learning rate: {', '.join(said) or 'no trial gave a score'}.",
        rows,
        plots.search_figure(rows, metric=task.metric, methods=text.methods_of(summary)),
    )


def _trial_rows(arm: ArmSummary) -> Rows:
    """Trials with a learning rate: the one the optimiser used, else the one asked for."""
    searched = next((d for d in arm.search.dimensions if d.name == "learning_rate" and d.kind == "range"), None)
    rows: Rows = []
    for trial in arm.search.trials:
        rate = trial.settings_used.get("learning_rate", trial.settings.get("learning_rate"))
        if isinstance(rate, bool | str) or rate is None or rate <= 0:
            continue
        rows.append(
            {
                "method": arm.method,
                "trial": trial.number,
                "run_id": trial.run_id,
                "outcome": trial.outcome,
                "learning_rate": float(rate),
                "score": trial.score,
                "startup": trial.startup,
                "share": trial.share,
                "optimum": trial.run_id == arm.search.best,
                "low": searched.low if searched else None,
                "high": searched.high if searched else None,
            }
            | setting_columns({name: trial.settings_used.get(name, v) for name, v in trial.settings.items()})
        )
    return rows


def _tuning(summary: Summary, task: TaskSummary) -> Chart | None:
    rows: Rows = []
    said, counts = [], []
    places = text.metric_decimals(summary, task, task.metric)
    for arm in text.arms_of(summary, task.name):
        curve = arm.search.curve
        if curve is None or len(curve.run_ids) < text.LEAST_CURVE:
            continue
        for number, (expected, low, high) in enumerate(
            zip(curve.expected, curve.low, curve.high, strict=True), start=1
        ):
            rows.append(
                {"method": arm.method, "trials": number, "expected": expected, "low": low, "high": high}
            )
        failed = f", {curve.without_score} without a score" if curve.without_score else ""
        counts.append(f"{arm.method} n = {len(curve.run_ids)} of {len(arm.search.trials)}{failed}")
        first, last = (text.fixed(curve.expected[at], places) for at in (0, -1))
        said.append(f"{arm.method} {first} from one trial, {last} from {len(curve.run_ids)}")
    if not rows:
        return None
    return Chart(
        file_name(f"{task.name}.tuning"),
        f"Tuning curve on {task.name}",
        f"What the best of so many trials is expected to score, from the trials that were drawn at random "
        f"({'; '.join(counts)}): those that TPE has guided depend on one another and are left out. A trial "
        f"without a score counts with the metric's worst value; what a machine's fault ended is left out. "
        f"Shaded: 95 % band of the whole curve at once, cut off at the figure's edge.",
        f"Expected best validation {task.metric}: {', '.join(said)}.",
        rows,
        plots.tuning_figure(rows, metric=task.metric, methods=text.methods_of(summary)),
    )


def _cost(summary: Summary, task: TaskSummary) -> Chart | None:
    arms = text.arms_of(summary, task.name)
    rows: Rows = []
    seconds = {arm.method: arm.cost.train_seconds_each if arm.cost else None for arm in arms}
    longest = max((each.estimate for each in seconds.values() if each), default=0.0)
    _, unit = text.scaled(longest, text.TIMES)
    per = text.SECONDS_PER[unit]
    for method, each in seconds.items():
        rows.append(
            {
                "quantity": "training time",
                "unit": f"{unit} per replicate",
                "log": False,
                "method": method,
                "value": each.estimate / per if each else None,
                "low": each.low / per if each and each.low is not None else None,
                "high": each.high / per if each and each.high is not None else None,
                "text": text.duration(each.estimate) if each else "",
            }
        )
    memory = {arm.method: arm.cost.peak_memory_bytes if arm.cost else None for arm in arms}
    rows += _quantity("peak memory", memory, text.BYTES, text.size)
    rows += _quantity(
        "trainable parameters", {a.method: a.trainable_parameters for a in arms}, None, text.count
    )
    rows += _quantity("saved size", {a.method: a.saved_bytes for a in arms}, text.BYTES, text.size)
    if all(row["value"] is None for row in rows):
        return None
    counts = ", ".join(f"{method} n = {each.n}" for method, each in seconds.items() if each)
    said = ", ".join(f"{row['method']} {row['quantity']} {row['text']}" for row in rows if row["text"])
    return Chart(
        file_name(f"{task.name}.cost"),
        f"What each method costs on {task.name}",
        f"Time of the steps: mean over replicates ({counts or 'not measured'}), line: 95 % t-interval. Memory: "
        f"highest of any replicate. Bars start at 0; dots are on a log scale, used where values differ more "
        f"than tenfold.",
        f"Cost by method: {said}.",
        rows,
        plots.cost_figure(rows, methods=text.methods_of(summary)),
    )


def _quantity(title: str, values: dict[str, int | None], steps: Any, show: Any) -> Rows:
    """Rows of one quantity: in one unit with bars, or as dots where they span more than tenfold."""
    known = [value for value in values.values() if value is not None]
    log = bool(known) and min(known) > 0 and max(known) / min(known) > 10
    factor, unit = (1.0, "") if not steps else text.scaled(max(known, default=0.0), steps)
    if log and steps:
        factor, unit = text.scaled(min(known), steps)
    return [
        {
            "quantity": title,
            "unit": unit,
            "log": log,
            "method": method,
            "value": value / factor if value is not None else None,
            "low": None,
            "high": None,
            "text": show(value) if value is not None else "",
        }
        for method, value in values.items()
    ]
