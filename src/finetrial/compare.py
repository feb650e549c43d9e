"""`finetrial compare`: several studies side by side, from their summaries alone; first what sets them apart.

Not for inference: no difference between studies is tested, nor is a mean taken across them. Claims are judged
within each study, over its paired replicates.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from finetrial import report_text as text
from finetrial.errors import HomeError
from finetrial.frozen import SCHEMA_VERSION, Frozen, SchemaVersion
from finetrial.store import Home
from finetrial.summary import ArmCost, ArmSummary, ClaimResult, DimensionSummary, Summary, TaskSummary
from finetrial.summary_measures import Interval

NOTHING = "-"
SHORT_HASH = 12  # digits of a SHA-256 that are shown
NO_INFERENCE = (
    "nothing is tested across studies: each claim is judged within its study, over paired seeds; a difference "
    "between two studies may come from anything in which they differ"
)
DIFFER = "the studies differ in what is listed first; their numbers must not be read as those of one study"
ALIKE = "the studies agree in all that a summary says of model, data, search, seeds and versions"
HASH_ALONE = (
    "the study hash covers settings that a summary does not repeat; each folder's study.lock.json has all"
)


class StudyNamed(Frozen):
    label: str  # the study's name, or its folder where two have the same
    home: str
    study: str
    study_hash: str
    complete: bool


class Differs(Frozen):
    """Something in which the studies are not the same, in words; None: a study has no such thing."""

    what: str
    values: tuple[str | None, ...]  # one per study


class ArmOfStudy(Frozen):
    """An arm's numbers in one study. Intervals are over that study's replicates."""

    task: str
    method: str
    label: str
    metric: str
    higher_is_better: bool
    best_possible: float | None
    score: Interval | None  # the metric on test
    valid: int  # replicates with a valid score, of `planned`
    planned: int
    drift: Interval | None
    seed_to_seed: Interval | None
    trainable_parameters: int | None
    saved_bytes: int | None
    cost: ArmCost | None


class ClaimOfStudy(Frozen):
    label: str
    claim: ClaimResult


class Compared(Frozen):
    """What `compare --json` prints."""

    schema_version: SchemaVersion = SCHEMA_VERSION
    studies: tuple[StudyNamed, ...]
    differs: tuple[Differs, ...]
    arms: tuple[ArmOfStudy, ...]  # by task and method, then by study
    claims: tuple[ClaimOfStudy, ...]  # by task and claim, then by study
    notes: tuple[str, ...]


def read(homes: Sequence[Path]) -> list[Summary]:
    """The summary of every folder.

    Raises:
        HomeError: some have none or one that is damaged; the message names all of them.
    """
    summaries, problems = [], []
    for home in homes:
        try:
            summaries.append(Home(home).summary())
        except HomeError as error:
            problems.append(str(error))
    if problems:
        raise HomeError("\n".join(problems))
    return summaries


def compare(summaries: Sequence[Summary], homes: Sequence[Path]) -> Compared:
    """Studies side by side; `homes` are their folders, in the same order."""
    names = [summary.study for summary in summaries]
    labels = [name if names.count(name) == 1 else str(home) for name, home in zip(names, homes, strict=True)]
    differs = _differs(summaries)
    labelled = list(zip(labels, summaries, strict=True))
    notes = [DIFFER if differs else ALIKE]
    if [each.what for each in differs] == ["study hash"]:
        notes.append(HASH_ALONE)
    notes += [
        f"{label} is not finished: its numbers may still change" for label, s in labelled if not s.complete
    ]
    return Compared(
        studies=tuple(
            StudyNamed(label=label, home=str(home), study=s.study, study_hash=s.study_hash, complete=s.complete)
            for (label, s), home in zip(labelled, homes, strict=True)
        ),
        differs=tuple(differs),
        arms=tuple(
            _arm(label, task, arm)
            for name, method in dict.fromkeys((arm.task, arm.method) for s in summaries for arm in s.arms)
            for label, s in labelled
            for task in s.tasks
            for arm in s.arms
            if (task.name, arm.task, arm.method) == (name, name, method)
        ),
        claims=tuple(
            ClaimOfStudy(label=label, claim=claim)
            for task, said in dict.fromkeys((claim.task, claim.claim) for s in summaries for claim in s.claims)
            for label, s in labelled
            for claim in s.claims
            if (claim.task, claim.claim) == (task, said)
        ),
        notes=(*notes, NO_INFERENCE),
    )


def _arm(label: str, task: TaskSummary, arm: ArmSummary) -> ArmOfStudy:
    score = arm.test.get(task.metric)
    return ArmOfStudy(
        task=arm.task, method=arm.method, label=label,
        metric=task.metric, higher_is_better=task.higher_is_better, best_possible=task.best_possible,
        score=score, valid=score.n if score else 0, planned=arm.planned,
        drift=arm.drift.cka if arm.drift else None, seed_to_seed=arm.drift.seed_to_seed if arm.drift else None,
        trainable_parameters=arm.trainable_parameters, saved_bytes=arm.saved_bytes, cost=arm.cost,
    )  # fmt: skip


# ---- what sets studies apart ---------------------------------------------------------------------------------


def _differs(summaries: Sequence[Summary]) -> list[Differs]:
    """Everything that is not the same in all, the weightiest first."""
    found = [_facts(summary) for summary in summaries]
    rows = {
        what: tuple(facts.get(what) for facts in found)
        for what in dict.fromkeys(what for facts in found for what in facts)
    }
    return [
        Differs(what=what, values=values)
        for what, values in rows.items()
        if len(set(values)) > 1
        # What analysed the runs is mostly what ran them: said once.
        and not (what.startswith("analysis: ") and values == rows.get(what.replace("analysis: ", "runs: ")))
    ]


def _facts(summary: Summary) -> dict[str, str]:
    """What a study is, what it was asked and with what it was made, in words."""
    facts = {"study hash": summary.study_hash, "finished": "yes" if summary.complete else "no"}
    facts["model"] = summary.model
    if summary.model_revision:
        facts["model revision"] = summary.model_revision
    if summary.model_gguf_file:
        facts["model's GGUF file"] = summary.model_gguf_file
    if summary.model_sha256:
        facts["model SHA-256"] = summary.model_sha256[:SHORT_HASH]
    facts["changes to the model's config"] = text.changes(summary) or "none"
    facts["tasks"] = ", ".join(task.name for task in summary.tasks)
    for task in summary.tasks:
        facts[f"{task.name}: metric"] = task.metric
        facts[f"{task.name}: rows"] = text.mapping_text(dict(sorted(task.split_rows.items())))
        for split, sha256 in task.input_sha256.items():
            facts[f"{task.name}: {split} inputs, SHA-256"] = sha256[:SHORT_HASH]
    facts["methods"] = ", ".join(text.methods_of(summary))
    for arm in summary.arms:
        for dimension in arm.search.dimensions:
            facts[f"{arm.method}: {dimension.name}"] = _range(dimension)
    facts["trials per arm"] = _each(row.trials_planned for row in summary.ledger)
    facts["halving"] = _each(", ".join(map(str, row.search_ends)) or "none" for row in summary.ledger)
    facts["warm start"] = _each(row.warm_start.method for row in summary.ledger if row.warm_start) or "none"
    facts["rows per trial"] = _each(arm.search.rows or "all" for arm in summary.arms)
    facts["replicates per arm"] = _each(arm.planned for arm in summary.arms)
    facts["rows per replicate"] = _each(row.train_rows or "all" for row in summary.ledger)
    facts["claims"] = "; ".join(dict.fromkeys(claim.claim for claim in summary.claims)) or "none"
    facts["finetrial"] = summary.meta.finetrial_version
    facts |= {f"runs: {name}": value for name, value in summary.environment.items()}
    return facts | {f"analysis: {name}": value for name, value in summary.meta.environment.items()}


def _each(values: Iterable[object]) -> str:
    """The one value of all arms, or every one that is there."""
    return ", ".join(dict.fromkeys(str(value) for value in values))


def _range(dimension: DimensionSummary) -> str:
    if dimension.low is None or dimension.high is None:
        return ", ".join(text.setting(value) for value in dimension.choices)
    ends = f"{text.setting(dimension.low)} .. {text.setting(dimension.high)}"
    return f"{ends}, log" if dimension.log else ends


# ---- for the terminal, in ASCII: a header and rows -----------------------------------------------------------


def difference_rows(compared: Compared) -> list[tuple[str, ...]]:
    """A fact in each row, a study in each column."""
    rows: list[tuple[str, ...]] = [("what differs", *(study.label for study in compared.studies))]
    return rows + [(row.what, *(value or NOTHING for value in row.values)) for row in compared.differs]


def arm_rows(compared: Compared) -> list[tuple[str, ...]]:
    """Score, drift and cost of every arm, the studies below each other."""
    titles = ("task", "method", "study", "test score", "seeds", "drift", "training time", "peak memory")
    rows: list[tuple[str, ...]] = [titles]
    for arm in compared.arms:
        each = arm.cost.train_seconds_each if arm.cost else None
        cells = (
            arm.task,
            arm.method,
            arm.label,
            f"{arm.metric} {_ends(text.interval(arm.score, _decimals(compared, arm.task)))}",
            str(arm.valid) if arm.valid == arm.planned else f"{arm.valid} of {arm.planned}",
            _ends(text.interval(arm.drift, text.places_of(arm.drift, 3), reason="not measured")),
            text.duration(each.estimate if each else None),
            text.size(arm.cost.peak_memory_bytes if arm.cost else None),
        )
        rows.append(tuple(text.plain(cell) for cell in cells))
    return rows


def claim_rows(compared: Compared) -> list[tuple[str, ...]]:
    """Every verdict, the studies below each other."""
    titles = ("task", "verdict on", "study", "difference (95 % interval)", "seeds", "verdict")
    rows: list[tuple[str, ...]] = [titles]
    for label, claim in ((each.label, each.claim) for each in compared.claims):
        said = text.plain(_ends(text.difference(claim, _decimals(compared, claim.task))))
        rows.append((claim.task, claim.claim, label, said, text.seeds(claim), text.short_verdict(claim)))
    return rows


def _decimals(compared: Compared, task: str) -> int:
    arms = [arm for arm in compared.arms if arm.task == task]
    best = max((arm.best_possible for arm in arms if arm.best_possible is not None), default=None)
    return text.decimals_for((arm.score.estimate for arm in arms if arm.score), best)


def _ends(interval: str) -> str:
    return interval.replace(" to ", " .. ")
