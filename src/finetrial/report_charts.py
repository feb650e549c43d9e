"""What a chart is, and the charts of what training did to the models: drift, forgetting, spectrum.

As `report_figures.py`, which has the others: a summary's numbers as tidy rows; drawing is `plots`'s.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from finetrial import plots
from finetrial import report_text as text
from finetrial.frozen import Setting
from finetrial.summary import Control, Summary, TaskSummary

Rows = list[dict[str, Any]]


class Chart(NamedTuple):
    """A figure with what stands under it and what is read out instead of it."""

    name: str  # of its files
    title: str
    caption: str
    description: str
    rows: Rows
    figure: plots.Figure


def file_name(name: str) -> str:
    """A name that is safe as a file name and as an HTML id."""
    return re.sub(r"[^A-Za-z0-9._-]", "_", name).lstrip(".-") or "_"


def setting_columns(settings: Mapping[str, Setting | None]) -> dict[str, Setting | None]:
    """A run's hyper-parameters as columns of its row, which no other column can be called."""
    return {f"{plots.SETTING}{name}": value for name, value in settings.items()}


def drift(summary: Summary, task: TaskSummary) -> Chart | None:
    """Drift by layer: means, single seeds, the seed-to-seed range and the control."""
    rows: Rows = []
    counts, said = [], []
    for arm in text.arms_of(summary, task.name):
        if arm.drift is None:
            continue
        for layer in arm.drift.layers:
            base = {"method": arm.method, "layer": layer.layer}
            rows.append(base | {"series": "mean", "replicate": None, "drift": layer.cka_mean})
            for number, value in zip(arm.drift.replicates, layer.cka, strict=False):
                rows.append(base | {"series": "seed", "replicate": number, "drift": value})
            if layer.perturbed is not None:
                rows.append(base | {"series": "perturbed", "replicate": None, "drift": layer.perturbed})
            for value in layer.seed_to_seed:
                rows.append(base | {"series": "seed_to_seed", "replicate": None, "drift": value})
        counts.append(f"{arm.method} n = {len(arm.drift.replicates)}")
        said.append(f"{arm.method} {text.interval(arm.drift.cka, 3)}")
    if not rows:
        return None
    for layer, value in enumerate(base.drift if (base := _base_control(task)) else ()):
        rows.append({"method": "base", "layer": layer, "series": "control", "replicate": None, "drift": value})
    return Chart(
        file_name(f"{task.name}.drift"),
        f"Drift from the base model by layer on {task.name}",
        f"Thick lines: mean over seeds ({', '.join(counts)}). Thin lines: single seeds. Shaded: the range of "
        f"seed-to-seed differences. Dashed, thin: the base with noise of the updates' norm instead of them. "
        f"Dotted: base against base, which must be 0.",
        f"Drift (1 − CKA) by layer. Mean over blocks: {', '.join(said)}.",
        rows,
        plots.drift_figure(rows, methods=text.methods_of(summary)),
    )


def _base_control(task: TaskSummary) -> Control | None:
    return next((control for control in task.controls if control.name == "base against base"), None)


def forgetting(summary: Summary, task: TaskSummary) -> Chart | None:
    """The learning-forgetting plane: each replicate's test score against what it forgot."""
    rows: Rows = []
    said, counts, units = [], [], set()
    for arm in text.arms_of(summary, task.name):
        found = arm.forgetting
        if found is None or found.forgotten is None:
            continue
        units.add("nats per token" if found.judged_by == "text" else "points")
        scores = {str(run.number): run for run in arm.replicates if run.score is not None}
        pairs = [(scores[n], lost) for n, lost in found.per_replicate.items() if n in scores]
        for run, lost in pairs:
            rows.append(
                {"series": "replicate", "method": arm.method, "replicate": run.number, "score": run.score,
                 "forgotten": lost, "low": None, "high": None, "run_id": run.run_id}
                | setting_columns(run.settings)
            )  # fmt: skip
        mean = arm.test.get(task.metric)
        rows.append(
            {"series": "mean", "method": arm.method, "replicate": None,
             "score": mean.estimate if mean else None, "forgotten": found.forgotten.estimate,
             "low": found.forgotten.low, "high": found.forgotten.high, "run_id": None}
        )  # fmt: skip
        counts.append(f"{arm.method} n = {len(pairs)}")
        said.append(f"{arm.method} {text.interval(found.forgotten, 3)}")
    if not rows:
        return None
    unit = " or ".join(sorted(units))
    return Chart(
        file_name(f"{task.name}.forgetting"),
        f"Learning and forgetting on {task.name}",
        f"Small marks: one replicate each ({', '.join(counts)}). Large marks: mean; line: 95 % t-interval of "
        f"what was forgotten. Down is less forgotten; at the dotted line nothing is.",
        f"Forgetting, {unit}: {', '.join(said)}.",
        rows,
        plots.forgetting_figure(rows, metric=task.metric, unit=unit, methods=text.methods_of(summary)),
    )


def spectrum(summary: Summary, task: TaskSummary) -> Chart | None:
    """Intruder dimensions over thresholds, and the effective rank of every matrix's update."""
    rows: Rows = []
    said, counts = [], []
    for arm in text.arms_of(summary, task.name):
        found = arm.spectrum
        if found is None or not found.per_matrix:
            continue
        for threshold, by_top in zip(found.thresholds, found.intruder_curve, strict=True):
            for top, intruders in enumerate(by_top, start=1):
                rows.append(
                    {"series": "intruders", "method": arm.method, "threshold": threshold, "top": top,
                     "value": intruders, "matrix": None}
                )  # fmt: skip
        for name, matrix in found.per_matrix.items():
            if "effective_rank" in matrix:
                rows.append(
                    {"series": "effective_rank", "method": arm.method, "threshold": None, "top": None,
                     "value": matrix["effective_rank"], "matrix": name}
                )  # fmt: skip
        counts.append(f"{arm.method} n = {len(found.replicates)}")
        if rank := found.overall.get("effective_rank_mean"):
            said.append(f"{arm.method} effective rank {text.interval(rank, 1)}")
    if not rows:
        return None
    return Chart(
        file_name(f"{task.name}.spectrum"),
        f"Spectrum of the updates on {task.name}",
        f"Left: how many of the largest directions of all matrices (thick: all that were looked at; thin: the "
        f"first of each) are less like any of the base's than the threshold; mean over replicates "
        f"({', '.join(counts)}). Right: effective rank of every matrix's update, in the order of the layers.",
        f"Spectrum: {', '.join(said)}.",
        rows,
        plots.spectrum_figure(rows, methods=text.methods_of(summary)),
    )
