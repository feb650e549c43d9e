"""The report's tables of what training did to the models: drift, forgotten tasks and text, spectrum.

As `report_tables.py`: text from a summary's numbers, no statistics.
"""

from __future__ import annotations

from finetrial import report_text as text
from finetrial.report_tables import Badge, Cell, Table, columns_of
from finetrial.summary import ArmSummary, ForgottenPart, Summary, TaskSummary


def drift(summary: Summary, task: TaskSummary) -> Table:
    """Each arm's mean drift from the base, and from seed to seed."""
    rows: list[tuple[Cell, ...]] = []
    for arm in text.arms_of(summary, task.name):
        if arm.drift is None:
            rows.append((arm.method, *[text.missing("not measured")] * 4))
            continue
        rows.append(
            (
                arm.method,
                str(arm.drift.cka.n),
                text.interval(arm.drift.cka, 3),
                text.interval(arm.drift.cosine, 3),
                text.interval(arm.drift.seed_to_seed, 3, reason="needs two seeds"),
            )
        )
    note = (
        "Drift: 1 − debiased linear CKA, and 1 − mean-subtracted cosine, between base and tuned hidden "
        "states, averaged over blocks; brackets: 95 % t-interval over seeds. Seed to seed: the same between "
        "two replicates."
    )
    columns = columns_of("Method", "#Seeds", "#1 − CKA", "#1 − cosine", "#Seed to seed (1 − CKA)")
    return Table(f"drift.{task.name}", f"Drift from the base model on {task.name}", columns, tuple(rows), note)


def drift_layers(summary: Summary, task: TaskSummary) -> Table:
    """Drift of every layer, one column per method."""
    arms = [arm for arm in text.arms_of(summary, task.name) if arm.drift]
    layers = sorted({layer.layer for arm in arms if arm.drift for layer in arm.drift.layers})
    rows: list[tuple[Cell, ...]] = []
    for number in layers:
        cells: list[Cell] = [str(number)]
        for arm in arms:
            layer = next((x for x in arm.drift.layers if x.layer == number), None) if arm.drift else None
            cells += (
                [text.fixed(layer.cka_mean, 3), text.fixed(layer.cosine_mean, 3)]
                if layer
                else [text.missing("no such layer")] * 2
            )
        rows.append(tuple(cells))
    titles = [title for arm in arms for title in (f"#{arm.method}, 1 − CKA", f"#{arm.method}, 1 − cosine")]
    return Table(
        f"layers.{task.name}", f"Drift by layer on {task.name}", columns_of("Layer", *titles), tuple(rows)
    )


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


SPECTRUM = (  # quantity, column, decimals; None: as a share in percent
    ("relative_change", "#Change ‖ΔW‖ / ‖W₀‖", None),
    ("effective_rank_mean", "#Effective rank", 1),
    ("stable_rank_mean", "#Stable rank", 1),
    ("rank_for_energy_mean", "#Rank of 90 % energy", 1),
    ("intruders", "#Intruder dimensions", 1),
)


def spectrum(summary: Summary, task: TaskSummary) -> Table:
    """What training did to the weight matrices of the blocks, over all of them."""
    rows: list[tuple[Cell, ...]] = []
    for arm in text.arms_of(summary, task.name):
        found = arm.spectrum
        if found is None:
            continue
        cells: list[Cell] = [arm.method, str(len(found.replicates)), str(found.matrices)]
        for key, _, places in SPECTRUM:
            value = found.overall.get(key)
            if value is None:
                cells.append(text.missing("nothing changed"))
            elif places is None:
                cells.append(text.percent(value.estimate))
            else:
                cells.append(text.interval(value, places))
        rows.append(tuple(cells))
    note = (
        "Of the update ΔW of every linear layer in the blocks; ranks: mean over changed ones. Intruders: of "
        "the 10 largest directions of every matrix those whose likeness to any of the base's is below 0.5. "
        "Brackets: 95 % t-interval over seeds."
    )
    columns = columns_of("Method", "#Seeds", "#Matrices changed", *(title for _, title, _ in SPECTRUM))
    return Table(f"spectrum.{task.name}", f"Spectrum of the updates on {task.name}", columns, tuple(rows), note)


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
            cells.append(text.percent(change) if change is not None else text.missing("the base is 0"))
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
