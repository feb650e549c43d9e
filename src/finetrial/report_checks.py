"""The report's tables on whether to trust it: claims in detail, ledger, failures, controls, environment.

The second half of `report_tables.py`, under the same rule: text from a summary's numbers, no statistics.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from finetrial import report_text as text
from finetrial.report_tables import Badge, Cell, Table, columns_of
from finetrial.summary import ClaimResult, LedgerRow, Summary


def claim_details(summary: Summary) -> Table:
    """What each verdict rests on: bounds, p-values, power, missing pairs."""
    rows = []
    for claim in summary.claims:
        places = text.claim_decimals(summary, claim) + 1 if claim.kind == "within" else _places(claim)
        bound, least = claim.contrast_bound, claim.smallest_detectable
        rows.append(
            (
                f"{claim.task}: {claim.claim}",
                text.interval(
                    claim.contrast,
                    places,
                    signed=True,
                    reason="fewer than two pairs" if claim.pairs else "no pair of valid seeds",
                ),
                text.fixed(bound, places, signed=True) if bound is not None else text.missing("no test"),
                text.p_value(claim.p_t),
                text.p_value(claim.p_sign_flip),
                text.p_value(claim.p_holm),
                text.p_value(claim.p_against_holm),
                text.fixed(least, places) if least is not None else text.missing(_why_no_least(claim)),
                str(claim.seeds_needed)
                if claim.seeds_needed
                else text.missing(
                    "none needed" if claim.verdict in ("supported", "refuted") else "cannot be said"
                ),
                ", ".join(map(str, claim.missing)) or "none",
            )
        )
    note = (
        "Tested quantity, over paired seeds: method − (1 ∓ margin) × reference. Bound: one-sided 95 %. p: "
        "one-sided t, exact sign-flip, t after Holm over all claims; against: the opposite t likewise. "
        "Detectable: with 80 % power at this n."
    )
    columns = columns_of(
        "Claim",
        "#Tested quantity",
        "#Bound",
        "#p (t)",
        "#p (sign-flip)",
        "#p (Holm)",
        "#p against (Holm)",
        "#Detectable",
        "#Seeds needed",
        "Seeds missing",
    )
    return Table("claims", "The claims in detail", columns, tuple(rows), note)


def _why_no_least(claim: ClaimResult) -> str:
    if claim.verdict == "not_assessable":
        return "no test"
    return "no spread"


def _places(claim: ClaimResult) -> int:
    """Decimals of what is no score: four, or as many as its first three digits need."""
    found = claim.contrast
    largest = max((abs(v) for v in (found.estimate, found.low, found.high) if v), default=0.0) if found else 0.0
    return max(4, 2 - math.floor(math.log10(largest))) if largest else 4


def _warm_start(row: LedgerRow) -> str:
    found = row.warm_start
    if found is None:
        return "none"
    return f"from {found.method}'s trial {found.trial}, learning rate x {found.factor:g}"


def _stopped(row: LedgerRow) -> str:
    if row.search_stop is None:
        return "no"
    after, planned, gain, noise = (
        getattr(row.search_stop, key) for key in ("after", "planned", "gain", "noise")
    )
    what = "less loss" if row.search_ends else "more"
    return f"after {after} of {planned}: {gain:.2g} {what} expected, noise {noise:.2g}"


def _counts(row: LedgerRow) -> str:
    if not row.search_ends:
        return "off: all to the end"
    parts = zip(row.search_counts, row.search_ends, strict=True)
    return ", ".join(f"{count} to {'the end' if end == 1 else f'1/{end}'}" for count, end in parts)


def _without_halving(row: LedgerRow) -> str:
    if row.search_tokens_whole is None:
        return text.missing("halving is off")
    factor = f" ({row.search_tokens_whole / row.search_tokens:.2f} times as many)" if row.search_tokens else ""
    return f"{text.count(row.search_tokens_whole)}{factor}"


# What the ledger lists: a title, the value's text, and whether fairness asks for equal values.
LEDGER: tuple[tuple[str, Callable[[LedgerRow], str], bool], ...] = (
    ("trials planned", lambda r: str(r.trials_planned), True),
    (
        "trials done / diverged / failed",
        lambda r: f"{r.trials_done} / {r.trials_diverged} / {r.trials_failed}",
        False,
    ),
    ("replicates planned", lambda r: str(r.replicates_planned), True),
    (
        "replicates done / diverged / failed",
        lambda r: f"{r.replicates_done} / {r.replicates_diverged} / {r.replicates_failed}",
        False,
    ),
    ("training rows per replicate", lambda r: "all" if r.train_rows is None else f"{r.train_rows:,}", True),
    ("replicate seeds shared with the other methods", lambda r: "yes" if r.shared_streams else "no", True),
    (
        "learning-rate range, decades",
        lambda r: (
            text.missing("not searched")
            if r.learning_rate_decades is None
            else f"{r.learning_rate_decades:.3g}"
        ),
        True,
    ),
    ("optima at a range's edge", lambda r: ", ".join(r.edge_flags) or "none", False),
    ("attempts, trials and replicates", lambda r: str(r.attempts), False),
    ("warm start", lambda r: _warm_start(r), False),
    ("search ended early", lambda r: _stopped(r), False),
    ("halving: trials trained to each part of their steps", lambda r: _counts(r), False),
    ("search: optimiser steps", lambda r: text.count(r.search_steps), False),
    ("search: tokens", lambda r: text.count(r.search_tokens), False),
    ("search: tokens without halving", lambda r: _without_halving(r), False),
    ("search: FLOPs", lambda r: text.count(r.search_flops), False),
    ("training: optimiser steps", lambda r: text.count(r.train_steps), False),
    ("training: tokens", lambda r: text.count(r.train_tokens), False),
    ("training: FLOPs", lambda r: text.count(r.train_flops), False),
)


def ledger(summary: Summary, task: str) -> Table:
    """One task's ledger: what each arm was given and used, and whether what must be equal is equal."""
    given = [row for row in summary.ledger if row.task == task]
    rows: list[tuple[Cell, ...]] = []
    for title, show, must_match in LEDGER:
        values = [show(row) for row in given]
        rows.append((title, *values, _equal(values, must_match)))
    for title, read in (("search: wall time", "search_seconds"), ("training: wall time", "train_seconds")):
        costs_ = [
            next((a.cost for a in text.arms_of(summary, task) if a.method == r.method), None) for r in given
        ]
        rows.append((title, *(text.duration(getattr(cost, read) if cost else None) for cost in costs_), ""))
    columns = columns_of("Given and used", *(f"#{row.method}" for row in given), "Equal?")
    note = (
        "Totals over the arm's runs that have a result; what an attempt had done beyond its last checkpoint "
        "when it was killed is in none. k, M, G, T, P: 10³, 10⁶, 10⁹, 10¹², 10¹⁵."
    )
    return Table(f"ledger.{task}", f"Fairness ledger: {task}", columns, tuple(rows), note)


def _equal(values: Sequence[str], must_match: bool) -> Cell:
    if not must_match or len(values) < 2:
        return ""
    return Badge("good", "equal") if len(set(values)) == 1 else Badge("warning", "differs")


def failures(summary: Summary) -> Table:
    order = sorted(summary.failures, key=lambda row: (row.kind, row.arm, row.run_id))
    rows = [(text.outcome_word(row.kind), row.arm, row.run_id, str(row.attempts), row.reason) for row in order]
    return Table(
        "failures", "Failures by kind", columns_of("Kind", "Arm", "Run", "#Attempts", "Reason"), tuple(rows)
    )


def controls(summary: Summary) -> Table:
    """What was measured where nothing has moved: all of it has to be 0."""
    rows: list[tuple[Cell, ...]] = []
    for task in summary.tasks:
        if not task.controls:
            rows.append((task.name, *[text.missing("not measured")] * 5))
        for control in task.controls:
            found = [
                ("drift, of any layer", control.drift),
                ("forgetting", tuple(control.forgotten.values())),
                ("weights of the blocks", () if control.update is None else (control.update,)),
            ]
            for what, values in found:
                if values:
                    worst = max(values, key=abs)
                    rows.append(
                        (task.name, control.name, control.run_id, what, text.significant(worst), _zero(worst))
                    )
    note = (
        "The base model measured against itself, in passes of its own; and a model of which the head alone was "
        "trained, read back from disk: every value must be 0."
    )
    columns = columns_of("Task", "Control", "Run", "What", "#Largest", "Result")
    return Table("controls", "Controls: where nothing has moved", columns, tuple(rows), note)


def _zero(worst: float) -> Badge:
    if worst == 0:
        return Badge("good", "zero")
    return Badge("warning", "not zero", "less than this is noise")


def environment(summary: Summary) -> Table:
    """With what and where the runs were made, and then the analysis."""
    meta = summary.meta
    analysis = {
        name: value for name, value in meta.environment.items() if summary.environment.get(name) != value
    }
    rows = [
        ("study hash", summary.study_hash),
        ("model", summary.model),
        ("model revision", summary.model_revision or text.missing("none given")),
        *([("model's GGUF file", summary.model_gguf_file)] if summary.model_gguf_file else []),
        ("changes to the model's config", text.changes(summary) or "none"),
        ("model SHA-256", summary.model_sha256 or text.missing("not hashed")),
        *((f"runs: {name}", value) for name, value in summary.environment.items()),
        ("analysed at", meta.created_at),
        ("wall time of the last `finetrial run`", text.duration(meta.wall_seconds, "not recorded")),
        ("home", meta.home),
        *((f"analysis: {name}", value) for name, value in analysis.items()),
        *((f"run.{name}", str(value)) for name, value in meta.run_rules.items()),
    ]
    return Table("environment", "Environment", columns_of("What", "Value"), tuple(rows))
