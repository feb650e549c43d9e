"""What an arm's probes measured, over its replicates: drift, spectrum, forgetting. Pure; for the summary.

Not for measuring (`probes/`), nor for which replicates count (`evidence.py`). A value that a replicate does not
have makes the whole quantity absent, never a mean over fewer parts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

from finetrial import stats
from finetrial.evidence import Arm, measured, measures_of
from finetrial.matching import Point
from finetrial.records import RunRecord
from finetrial.summary import Control
from finetrial.summary_measures import (
    DriftSummary,
    ForgettingSummary,
    ForgottenPart,
    Interval,
    LayerDrift,
    SpectrumSummary,
)

LARGEST = 1e150
REPORTED = ("drift", "spectrum", "forgetting", "interpolation")  # what has a place of its own in the summary
# Of the spectrum's `overall` and of its matrices; the names are the probe's.
OVERALL = (
    "update_norm", "relative_change", "effective_rank_mean", "stable_rank_mean", "rank_for_energy_mean",
    "energy_in_base_top_mean", "top_overlap_mean", "intruders",
)  # fmt: skip
OF_MATRIX = (
    "update_norm", "relative_change", "spectral_norm", "effective_rank", "stable_rank", "rank_for_energy",
    "intruders",
)  # fmt: skip


def interval(values: Sequence[float]) -> Interval:
    """Mean, 95 % t-interval and spread over replicates."""
    return Interval(**stats.mean_interval(values)._asdict())


def drift_per_replicate(arm: Arm) -> dict[int, tuple[str, float]]:
    """Replicate number -> its probe's run and its mean drift over blocks."""
    return {number: (run, found["cka_drift_mean"]) for number, (run, found) in _drifts(arm).items()}


def _drifts(arm: Arm) -> dict[int, tuple[str, dict[str, Any]]]:
    return {
        number: (probe.spec.run_id, found)
        for number, (probe, found) in measures_of(arm, "drift").items()
        if found["cka_drift_mean"] is not None and found["cosine_drift_mean"] is not None
    }


def drift(arm: Arm) -> DriftSummary | None:
    """How far the arm's models moved, by layer and on the mean over blocks."""
    found = _drifts(arm)
    if not found:
        return None
    drifts = [drift for _, drift in found.values()]
    valid = {replicate.spec.run_id for replicate in arm.valid}
    neighbours = [
        drift["neighbour"]
        for number, (_, drift) in found.items()
        if drift.get("neighbour") and arm.probes[number].spec.reference in valid
    ]
    perturbed = [drift["perturbed"] for drift in drifts if drift.get("perturbed")]
    layers = []
    for index, named in enumerate(drifts[0]["layers"]):
        cka = [_from_one(drift["layers"][index]["cka"]) for drift in drifts]
        cosine = [_from_one(drift["layers"][index]["cosine"]) for drift in drifts]
        known_cka, known_cosine = _known(cka), _known(cosine)
        if not known_cka or not known_cosine:
            continue  # a layer that does not vary over the rows has no similarity
        between = [_from_one(neighbour["layers"][index]["cka"]) for neighbour in neighbours]
        layers.append(
            LayerDrift(
                layer=named["layer"],
                cka=tuple(cka),
                cosine=tuple(cosine),
                cka_mean=stats.mean_interval(known_cka).estimate,
                cosine_mean=stats.mean_interval(known_cosine).estimate,
                seed_to_seed=tuple(_known(between)),
                perturbed=_mean_or_none([_from_one(noisy["layers"][index]["cka"]) for noisy in perturbed]),
                measures=_shared_means(
                    [drift["layers"][index] for drift in drifts], besides=("layer", "cka", "cosine")
                ),
            )
        )
    apart = _known(n["cka_drift_mean"] for n in neighbours)
    noise = _known(n["cka_drift_mean"] for n in perturbed)
    return DriftSummary(
        probe_runs=tuple(run for run, _ in found.values()),
        replicates=tuple(found),
        layers=tuple(layers),
        cka=interval([drift["cka_drift_mean"] for drift in drifts]),
        cosine=interval([drift["cosine_drift_mean"] for drift in drifts]),
        # Neighbouring pairs share a model, so that they are not independent: no t-interval.
        seed_to_seed=interval(apart).model_copy(update={"low": None, "high": None}) if apart else None,
        perturbed=interval(noise) if noise else None,
        means={key: interval(values) for key, values in _other_means(drifts).items()},
        rows_error=_mean_or_none([drift.get("rows_error") for drift in drifts]),
        per_replicate={str(number): value for number, (_, value) in drift_per_replicate(arm).items()},
    )


def _other_means(drifts: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Measure -> its mean over blocks in every replicate; what a replicate does not have is left out whole."""
    found = {key: [drift["means"][key] for drift in drifts] for key in drifts[0].get("means", ())}
    if all(drift.get("read") for drift in drifts):
        found["read_cka"] = [drift["read"]["cka_drift_mean"] for drift in drifts]
    return {key: values for key, values in found.items() if None not in values}


def _shared_means(found: Sequence[Mapping[str, Any]], *, besides: Sequence[str]) -> dict[str, float]:
    keys = [key for key in found[0] if key not in besides and all(one[key] is not None for one in found)]
    return {key: _mean([one[key] for one in found]) for key in keys}


def _mean_or_none(values: Sequence[float | None]) -> float | None:
    known = _known(values)
    return _mean(known) if known and len(known) == len(values) else None


def spectrum(arm: Arm) -> SpectrumSummary | None:
    """What training did to the arm's weight matrices."""
    found = measures_of(arm, "spectrum")
    if not found:
        return None
    measured = [spectrum for _, spectrum in found.values()]
    overalls = [spectrum["overall"] for spectrum in measured]
    by_matrix: dict[str, list[Mapping[str, Any]]] = {}
    for one in measured:
        for matrix in one["matrices"]:
            by_matrix.setdefault(matrix["name"], []).append(matrix)
    curves = [overall["intruder_curve"] for overall in overalls]
    return SpectrumSummary(
        probe_runs=tuple(probe.spec.run_id for probe, _ in found.values()),
        replicates=tuple(found),
        matrices=max(overall["changed"] for overall in overalls),
        overall={
            key: interval([overall[key] for overall in overalls])
            for key in OVERALL
            if all(overall[key] is not None for overall in overalls)
        },
        directions=max(overall["directions"] for overall in overalls),
        thresholds=tuple(overalls[0]["thresholds"]),
        intruder_curve=tuple(
            tuple(_mean(counts) for counts in zip(*rows, strict=True)) for rows in zip(*curves, strict=True)
        ),
        per_matrix={name: _of_matrix(some) for name, some in by_matrix.items()},
    )


def _of_matrix(found: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """One matrix's means over the `replicates` in which it changed, whose number is there, too."""
    means = _shared_means([{key: matrix[key] for key in OF_MATRIX} for matrix in found], besides=())
    return means | {"replicates": len(found)}


def forgetting_per_replicate(arm: Arm) -> dict[int, tuple[str, float]]:
    """Replicate number -> its probe's run and what it forgot, by the measure that is judged."""
    found = measures_of(arm, "forgetting")
    judged_by = _judged_by([forgetting for _, forgetting in found.values()])
    values = {number: (probe.spec.run_id, _forgotten(f, judged_by)) for number, (probe, f) in found.items()}
    return {number: (run, value) for number, (run, value) in values.items() if value is not None}


def forgetting(arm: Arm) -> ForgettingSummary | None:
    """What the arm's models lost on tasks and text that they were not trained on."""
    found = measures_of(arm, "forgetting")
    if not found:
        return None
    measured = [forgetting for _, forgetting in found.values()]
    parts = [_part(name, "task", [f["tasks"][name] for f in measured]) for name in measured[0]["tasks"]]
    if all(forgetting["text"] for forgetting in measured):
        parts.append(_part("text", "text", [forgetting["text"] for forgetting in measured]))
    each = {number: value for number, (_, value) in forgetting_per_replicate(arm).items()}
    return ForgettingSummary(
        probe_runs=tuple(probe.spec.run_id for probe, _ in found.values()),
        replicates=tuple(found),
        parts=tuple(parts),
        judged_by=_judged_by(measured),
        forgotten=interval(list(each.values())) if each else None,
        per_replicate={str(number): value for number, value in each.items()},
    )


def own(arm: Arm) -> dict[str, dict[str, Interval]]:
    """Numbers at the top of what the study's other probes gave, each over the replicates: probe -> number."""
    results = [probe.result for probe in arm.probes.values() if probe.result]
    names = dict.fromkeys(name for result in results for name in result.measures if name not in REPORTED)
    found: dict[str, dict[str, Interval]] = {}
    for name in names:
        given = [values for _, values in measures_of(arm, name).values()]
        shared = [key for key in given[0] if all(is_number(each.get(key)) for each in given)] if given else []
        if shared:
            found[name] = {key: interval([float(each[key]) for each in given]) for key in shared}
    return found


def is_number(value: Any) -> bool:
    """Whether it can be averaged: no bool, nothing infinite, and nothing whose square would be."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < LARGEST


def lines(arm: Arm, kind: Literal["drift", "forgetting"]) -> dict[int, tuple[str, list[Point]]]:
    """Replicate number -> its probe's run, and the line from the base to its model, the base first.

    Of replicates whose line was measured with that measure on every point.
    """
    ends = drift_per_replicate(arm) if kind == "drift" else forgetting_per_replicate(arm)
    judged_by = _judged_by([forgetting for _, forgetting in measures_of(arm, "forgetting").values()])
    found = {}
    for number, (probe, line) in measures_of(arm, "interpolation").items():
        if number not in ends:
            continue
        points = []
        for point in line["points"]:
            value = {0.0: 0.0, 1.0: ends[number][1]}.get(point["share"], point[kind])
            if isinstance(value, Mapping):
                value = value[judged_by] if judged_by else None
            score = point["scores"].get(arm.metric.name)
            if value is not None and score is not None:
                points.append(Point(point["share"], score, value))
        if points and len(points) == len(line["points"]):
            found[number] = (probe.spec.run_id, points)
    return found


def controls(base: RunRecord | None, frozen: RunRecord | None) -> Iterator[Control]:
    """What has to be 0: of the base against itself, and of a model whose head alone was trained."""
    for name, run in (("base against base", base), ("frozen body", frozen)):
        if run is None or run.result is None or not run.result.measures:
            continue
        drift, spectrum = measured(run, "drift"), measured(run, "spectrum")
        yield Control(
            name=name,
            run_id=run.spec.run_id,
            drift=tuple(1 - layer["cka"] for layer in drift["layers"] if layer["cka"] is not None)
            if drift
            else (),
            forgotten=forgotten_parts(measured(run, "forgetting")),
            update=spectrum["overall"]["update_norm"] if spectrum else None,
        )


def forgotten_parts(forgetting: Mapping[str, Any] | None) -> dict[str, float]:
    """Task or `text` -> what one probe found forgotten; of the control, whose values have to be 0."""
    if forgetting is None:
        return {}
    texts = {"text": forgetting["text"]} if forgetting["text"] else {}
    return {name: part["forgotten"] for name, part in (forgetting["tasks"] | texts).items()}


def _judged_by(measured: Sequence[Mapping[str, Any]]) -> Any:
    if measured and all(forgetting["text"] for forgetting in measured):
        return "text"
    return "tasks" if any(forgetting["tasks_forgotten"] is not None for forgetting in measured) else None


def _forgotten(forgetting: Mapping[str, Any], judged_by: str | None) -> float | None:
    if judged_by == "text":
        return forgetting["text"]["forgotten"]
    return forgetting["tasks_forgotten"]


def _part(name: str, kind: Any, found: Sequence[Mapping[str, Any]]) -> ForgottenPart:
    return ForgottenPart(
        name=name,
        kind=kind,
        base=_mean([part["base"] for part in found]),  # the same in all of them
        chance=found[0].get("chance"),
        readable=all(part.get("readable", True) for part in found),
        tuned=interval([part["tuned"] for part in found]),
        forgotten=interval([part["forgotten"] for part in found]),
    )


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _known(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _from_one(similarity: float | None) -> float | None:
    return None if similarity is None else 1 - similarity
