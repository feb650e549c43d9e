"""The report's tables of what training did to the models: drift, forgotten tasks and text, spectrum.

As `report_tables.py`: text from a summary's numbers, no statistics.
"""

from __future__ import annotations

from finetrial import report_text as text
from finetrial.report_tables import Badge, Cell, Table, columns_of
from finetrial.summary import ArmSummary, Summary, TaskSummary
from finetrial.summary_measures import ForgottenPart, Interval

DRIFTS = (  # what of the summary, how it is called, decimals
    ("cka", "1 − CKA", 3),
    ("cka_standardised", "1 − CKA, features standardised", 3),
    ("read_cka", "1 − CKA, where a head reads", 3),
    ("cosine", "1 − cosine", 3),
    ("rsa", "1 − RSA", 3),
    ("neighbours", "1 − shared nearest neighbours", 3),
    ("angle", "Procrustes angle, rad", 3),
    ("relative_change", "relative change", 3),
    ("seed_to_seed", "seed to seed, 1 − CKA", 3),
    ("perturbed", "noise of the same norm, 1 − CKA", 4),
)


def drift(summary: Summary, task: TaskSummary) -> Table:
    """How far the models moved by every measure, a column per method; then what seeds and noise alone do."""
    arms = [arm for arm in text.arms_of(summary, task.name) if arm.drift]
    rows: list[tuple[Cell, ...]] = []
    for key, title, places in DRIFTS:
        found = [_drift_value(arm, key) for arm in arms]
        if any(found):
            reason = "needs two seeds" if key == "seed_to_seed" else "not measured"
            cells = (text.interval(value, text.places_of(value, places), reason=reason) for value in found)
            rows.append((title, *cells))
    errors = [arm.drift.rows_error if arm.drift else None for arm in arms]
    if any(error is not None for error in errors):
        shown = (text.missing("not known") if e is None else text.fixed(e, 4) for e in errors)
        rows.append(("error over inputs, 1 − CKA", *shown))
    note = (
        "Between base and tuned hidden states, averaged over blocks; brackets: 95 % t-interval over seeds. The "
        "first line is what claims are about. A head reads an encoder's first and a decoder's last token; all "
        "else is of the mean over the text's tokens. Error over inputs: a seed's standard error because these "
        "inputs were taken and not others, by subsamples. Noise: the base with random matrices for the updates."
    )
    columns = columns_of("Measure", *(f"#{arm.method}" for arm in arms))
    return Table(f"drift.{task.name}", f"Drift from the base model on {task.name}", columns, tuple(rows), note)


def _drift_value(arm: ArmSummary, key: str) -> Interval | None:
    assert arm.drift is not None
    if key in ("cka", "cosine", "seed_to_seed", "perturbed"):
        return getattr(arm.drift, key)
    return arm.drift.means.get(key)


def drift_layers(summary: Summary, task: TaskSummary) -> Table:
    """Drift of every layer, columns per method, and how much of the base's variance is in one feature."""
    arms = [arm for arm in text.arms_of(summary, task.name) if arm.drift]
    layers = sorted({layer.layer for arm in arms if arm.drift for layer in arm.drift.layers})
    rows: list[tuple[Cell, ...]] = []
    for number in layers:
        cells: list[Cell] = [str(number)]
        top: float | None = None
        for arm in arms:
            layer = next((x for x in arm.drift.layers if x.layer == number), None) if arm.drift else None
            if layer is None:
                cells += [text.missing("no such layer")] * 3
                continue
            angle = layer.measures.get("angle")
            top = layer.measures.get("top_1", top)
            cells += [text.fixed(layer.cka_mean, 3), text.fixed(layer.cosine_mean, 3)]
            cells.append(text.fixed(angle, 3) if angle is not None else text.missing("not measured"))
        cells.append(text.percent(top) if top is not None else text.missing("not measured"))
        rows.append(tuple(cells))
    titles = [f"#{arm.method}, {what}" for arm in arms for what in ("1 − CKA", "1 − cosine", "angle")]
    columns = columns_of("Layer", *titles, "#Variance in the base's top feature")
    return Table(f"layers.{task.name}", f"Drift by layer on {task.name}", columns, tuple(rows))


def own(summary: Summary, task: TaskSummary) -> Table:
    """The numbers that the study's other probes gave, a column per method."""
    arms = text.arms_of(summary, task.name)
    found = dict.fromkeys(
        (probe, number) for arm in arms for probe, numbers in arm.own_measures.items() for number in numbers
    )
    rows: list[tuple[Cell, ...]] = []
    for probe, number in found:
        values = [arm.own_measures.get(probe, {}).get(number) for arm in arms]
        rows.append((f"{probe}: {number.replace('_', ' ')}", *map(_of_any_size, values)))
    columns = columns_of("Number", *(f"#{arm.method}" for arm in arms))
    note = "As the study's own probes gave them; brackets: 95 % t-interval over seeds."
    return Table(
        f"own.{task.name}", f"Measured by the study's own probes on {task.name}", columns, tuple(rows), note
    )


def _of_any_size(value: Interval | None) -> str:
    """As `report_text.interval`, to three digits whatever the size."""
    if value is None:
        return text.missing("not measured")
    shown = text.significant(value.estimate)
    if value.low is None or value.high is None:
        return f"{shown} (no interval, n = {value.n})"
    return f"{shown} ({text.significant(value.low)} to {text.significant(value.high)})"


def forgetting(summary: Summary, task: TaskSummary) -> Table:
    """Every task and text that the models were not trained on: the base, each arm's models, what was lost."""
    rows: list[tuple[Cell, ...]] = []
    for arm in text.arms_of(summary, task.name):
        for part in arm.forgetting.parts if arm.forgetting else ():
            places = 3 if part.kind == "text" else 1
            judged = arm.forgetting is not None and _is_judged(arm, part)
            rows.append(
                (
                    f"{arm.method}: {part.name}",
                    text.fixed(part.base, places),
                    text.missing("text") if part.chance is None else text.fixed(part.chance, places),
                    text.interval(part.tuned, places),
                    text.interval(part.forgotten, places, signed=True),
                    "yes" if judged else _why_not_judged(part),
                )
            )
    note = (
        "Tasks: accuracy of a linear classifier on the frozen body, in points, cross-validated; text: loss per "
        "token in nats under the base's own language head. Lost: more is worse. Brackets: 95 % t-interval over "
        "seeds."
    )
    columns = columns_of("Method and what", "#Base", "#Chance", "#After training", "#Lost", "Judged")
    return Table(f"forgetting.{task.name}", f"Forgetting after {task.name}", columns, tuple(rows), note)


def _is_judged(arm: ArmSummary, part: ForgottenPart) -> bool:
    by = arm.forgetting.judged_by if arm.forgetting else None
    return part.kind == "text" if by == "text" else by == "tasks" and part.kind == "task" and part.readable


def _why_not_judged(part: ForgottenPart) -> Cell:
    if part.kind == "task" and not part.readable:
        return Badge("warning", "no", "the base reads it no better than its commonest class")
    return "no: text is"


SPECTRUM = (  # what of the summary, how it is called, decimals; None: a share in percent
    ("relative_change", "change, ‖ΔW‖ / ‖W₀‖", None),
    ("effective_rank_mean", "effective rank", 1),
    ("stable_rank_mean", "stable rank", 1),
    ("rank_for_energy_mean", "rank of 90 % of the energy", 1),
    ("energy_in_base_top_mean", "energy in the base's top directions", 3),
    ("top_overlap_mean", "overlap of the top directions, before and after", 3),
    ("intruders", "intruder dimensions", 1),
)


def spectrum(summary: Summary, task: TaskSummary) -> Table:
    """What training did to the weight matrices of the blocks, over all of them, a column per method."""
    arms = [(arm.method, arm.spectrum) for arm in text.arms_of(summary, task.name) if arm.spectrum]
    rows: list[tuple[Cell, ...]] = []
    if arms:
        rows.append(("matrices changed", *(str(found.matrices) for _, found in arms)))
    for key, title, places in SPECTRUM:
        values = [found.overall.get(key) for _, found in arms]
        if any(values):
            rows.append((title, *(_spectral(value, places) for value in values)))
    note = (
        "Of the update ΔW of every linear layer in the blocks; ranks and shares: mean over changed ones. "
        "Intruders: how many of the largest directions (10 of every matrix, unless the study says otherwise) "
        "are less than 0.5 like any of the base's. Brackets: 95 % t-interval over seeds."
    )
    columns = columns_of("Measure", *(f"#{method}" for method, _ in arms))
    return Table(f"spectrum.{task.name}", f"Spectrum of the updates on {task.name}", columns, tuple(rows), note)


def _spectral(value: Interval | None, places: int | None) -> str:
    if value is None:
        return text.missing("nothing changed")
    return text.percent(value.estimate) if places is None else text.interval(value, places)


def spectrum_matrices(summary: Summary, task: TaskSummary) -> Table:
    """Every matrix: how much and in how many directions each method changed it."""
    arms = [arm for arm in text.arms_of(summary, task.name) if arm.spectrum]
    names = list(dict.fromkeys(name for arm in arms if arm.spectrum for name in arm.spectrum.per_matrix))
    rows: list[tuple[Cell, ...]] = []
    for name in names:
        cells: list[Cell] = [name]
        for arm in arms:
            matrix = arm.spectrum.per_matrix.get(name) if arm.spectrum else None
            if matrix is None:
                cells += [text.missing("unchanged")] * 3
                continue
            change, rank, intruders = (
                matrix.get(k) for k in ("relative_change", "effective_rank", "intruders")
            )
            seeds, all_seeds = int(matrix["replicates"]), len(arm.spectrum.replicates) if arm.spectrum else 0
            some = f" ({seeds} of {all_seeds} seeds)" if seeds < all_seeds else ""
            shown = text.percent(change) if change is not None else text.missing("the base is 0")
            cells.append(f"{shown}{some}")
            cells.append(text.fixed(rank, 1) if rank is not None else text.missing("no rank"))
            cells.append(text.fixed(intruders, 1) if intruders is not None else text.missing("none found"))
        rows.append(tuple(cells))
    titles = [f"#{arm.method}, {what}" for arm in arms for what in ("change", "effective rank", "intruders")]
    return Table(
        f"matrices.{task.name}",
        f"Every matrix's update on {task.name}",
        columns_of("Matrix", *titles),
        tuple(rows),
    )
