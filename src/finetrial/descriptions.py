"""What describes and decides nothing: tuning curves, sizes of effects, test examples, all tasks together.

Pure: arms and judged claims in, parts of the summary out. Verdicts are `claims.py`'s, the numbers those of
`effects.py`, `resampling.py`, `tuning_curves.py` and `stats.py`. Random draws are seeded by what they are for,
so that equal studies get equal numbers.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import fmean

import numpy as np

from finetrial import effects, matching, measures, resampling, stats, tuning_curves
from finetrial.claims import Case, Side
from finetrial.evidence import Arm, trial_score
from finetrial.frozen import stream_seed
from finetrial.plugins import Metric
from finetrial.records import ClaimKind, RunRecord
from finetrial.summary import (
    AcrossTasks,
    AtEqualScore,
    Bootstrapped,
    ClaimResult,
    Denominator,
    Discordant,
    Effect,
    OnExamples,
    TuningCurve,
)

Examples = Mapping[str, float]  # example id -> the task's metric on it alone

EXAMPLE_WORK = 8_000_000  # draws x examples of a crossed bootstrap: about a second
LEAST_DRAWS = 400  # of a crossed bootstrap, however many examples there are
ROUNDING = 1e-6  # in units of the score: a mean of examples that is further from the score is another thing


# ---- tuning curves -------------------------------------------------------------------------------------


def tuning_curve(drawn: Sequence[RunRecord], metric: Metric) -> TuningCurve | None:
    """The expected best of n of an arm's independent trials, n = 1 .. all of them; None where there is none.

    A trial without a score counts with the metric's worst value. A score beyond the bounds that the metric
    states shows that they are none; the band is then open on that side.
    """
    if not drawn:
        return None
    known = {record.spec.run_id: trial_score(record) for record in drawn}
    found = [score for score in known.values() if score is not None]
    higher = metric.higher_is_better
    worst = (min if higher else max)([metric.worst, *found])
    best = (max if higher else min)([metric.best, *found])
    scores = [worst if score is None else score for score in known.values()]
    if not all(map(math.isfinite, scores)):  # nothing says what a failed trial is worth
        return None
    budgets = range(1, len(scores) + 1)
    band = tuning_curves.tuning_band(
        scores, budgets, np.random.default_rng(stream_seed("tuning curve")),
        worst=_open(worst, metric.worst), best=_open(best, metric.best),
    )  # fmt: skip
    return TuningCurve(
        run_ids=tuple(known),
        without_score=len(known) - len(found),
        expected=tuple(
            tuning_curves.expected_best(scores, budget, higher_is_better=higher) for budget in budgets
        ),
        low=tuple(_finite(value) for value in band.low),
        high=tuple(_finite(value) for value in band.high),
    )


def _open(seen: float, stated: float) -> float:
    """The bound that a metric states, or an infinite one beyond a score that broke it."""
    return stated if seen == stated else math.copysign(math.inf, seen - stated)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


# ---- claims --------------------------------------------------------------------------------------------


def described(
    case: Case, claim: ClaimResult, tests: Mapping[str, Examples], arms: Mapping[tuple[str, str], Arm]
) -> ClaimResult:
    """A judged claim with the sizes of its effect, its denominators, and what stands beside the verdict.

    `tests`: run id of a replicate -> its test scores by example, where they are known. `arms`: by task and
    method.
    """
    more = {
        "effect": _effect(case, assessed=claim.verdict != "not_assessable"),
        "of_method": _denominator(case.method),
        "of_reference": _denominator(case.reference),
        "on_examples": _on_examples(case, tests) if case.claim.kind == "within" else None,
        "at_equal_score": _at_equal_score(
            arms[case.task, case.method.name], arms[case.task, case.reference.name], case.claim.kind
        ),
    }
    return claim.model_copy(update=more)


def _at_equal_score(method: Arm, reference: Arm, kind: ClaimKind) -> AtEqualScore | None:
    """Drift or forgetting of two arms at one task score, over the pairs of which both lines were measured."""
    if kind == "within":
        return None
    of = "drift" if kind == "drifts_less" else "forgetting"
    mine, theirs = measures.lines(method, of), measures.lines(reference, of)
    pairs = tuple(sorted(set(mine) & set(theirs)))
    if not pairs:
        return None
    higher = method.metric.higher_is_better
    found = [matching.at_equal_score(mine[n][1], theirs[n][1], higher_is_better=higher) for n in pairs]
    return AtEqualScore(
        method=measures.interval([each.method.value for each in found]),
        reference=measures.interval([each.reference.value for each in found]),
        difference=measures.interval([each.method.value - each.reference.value for each in found]),
        shares=(fmean(each.method.share for each in found), fmean(each.reference.share for each in found)),
        score=fmean(each.score for each in found),
        pairs=pairs,
        run_ids=tuple(run for n in pairs for run in (mine[n][0], theirs[n][0])),
    )


def _effect(case: Case, *, assessed: bool) -> Effect | None:
    method = [case.method.values[number] for number in case.pairs]
    reference = [case.reference.values[number] for number in case.pairs]
    if not method:
        return None
    g = effects.hedges_g(method, reference) if len(method) > 2 else effects.StandardisedEffect(None, None, None)
    ratio = effects.fieller_ratio(method, reference) if case.claim.kind != "forgets_less" else None
    return Effect(
        g=g.g,
        g_low=g.low,
        g_high=g.high,
        above=effects.probability_better(method, reference),
        ratio=ratio.estimate if ratio else None,
        ratio_low=ratio.low if ratio else None,
        ratio_high=ratio.high if ratio else None,
        p_unpaired=_p_unpaired(case) if assessed else None,
    )


def _p_unpaired(case: Case) -> float | None:
    """Of the claim's tested quantity over all valid replicates of either side, in the claim's direction."""
    wanted_above = case.claim.kind == "within" and case.higher_is_better
    return stats.unpaired_contrast(
        list(case.method.values.values()),
        list(case.reference.values.values()),
        "greater" if wanted_above else "less",
        factor=case.factor,
    ).p


def _denominator(side: Side) -> Denominator:
    reasons = Counter(why for number, why in sorted(side.absent.items()) if number not in side.values)
    return Denominator(planned=len({*side.values, *side.absent}), valid=len(side.values), absent=dict(reasons))


# ---- test examples -------------------------------------------------------------------------------------


def _on_examples(case: Case, tests: Mapping[str, Examples]) -> OnExamples:
    """The score difference with seeds and examples drawn again, and who alone got which example right."""
    runs = [
        run for number in case.pairs for side in (case.method, case.reference) for run in side.run_ids[number]
    ]
    absent = [run for run in runs if not tests.get(run)]
    if not runs or absent:
        others = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
        why = f"no scores by example of {absent[0]}{others}" if absent else "no pair of valid seeds"
        return OnExamples(
            examples=None, difference=None, left_out=why,
            discordant=(), method_only=None, reference_only=None, median_p=None,
        )  # fmt: skip
    names = sorted(set.intersection(*(set(tests[run]) for run in runs)))
    method_SN, reference_SN = (
        np.array([[tests[side.run_ids[number][0]][name] for name in names] for number in case.pairs])
        for side in (case.method, case.reference)
    )
    left_out = _why_no_mean(case, tests, len(names))
    difference = None
    if left_out is None:
        draws = min(resampling.BOOTSTRAP_DRAWS, max(LEAST_DRAWS, EXAMPLE_WORK // len(names)))
        rng = np.random.default_rng(stream_seed("examples", case.task, case.method.name, case.reference.name))
        found = resampling.crossed_bootstrap(method_SN - reference_SN, rng, draws=draws)
        difference = Bootstrapped(**found._asdict())
    discordant: tuple[Discordant, ...] = ()
    if names and np.isin([method_SN, reference_SN], (0.0, 100.0)).all():
        right = 100.0 if case.higher_is_better else 0.0
        discordant = tuple(
            Discordant(number=number, **stats.mcnemar_exact(method_N == right, reference_N == right)._asdict())
            for number, method_N, reference_N in zip(case.pairs, method_SN, reference_SN, strict=True)
        )
    return OnExamples(
        examples=len(names),
        difference=difference,
        left_out=left_out,
        discordant=discordant,
        method_only=_mean([each.method_only for each in discordant]),
        reference_only=_mean([each.reference_only for each in discordant]),
        median_p=float(np.median([each.p for each in discordant])) if discordant else None,
    )


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def _why_no_mean(case: Case, tests: Mapping[str, Examples], shared: int) -> str | None:
    """Why the difference of scores is no mean over examples that could be drawn again, or None."""
    if min(len(case.pairs), shared) < 2:
        return "fewer than two pairs of seeds or two shared examples"
    for number in case.pairs:
        for side in (case.method, case.reference):
            (run,) = side.run_ids[number]
            if len(tests[run]) != shared:
                return "the replicates were scored on different examples"
            mean, score = math.fsum(tests[run].values()) / shared, side.values[number]
            if abs(mean - score) > ROUNDING * max(1.0, abs(score)):
                return f"the score is no mean over examples ({score:.4g}, and the mean is {mean:.4g}, of {run})"
    return None


# ---- all tasks together --------------------------------------------------------------------------------


def across_tasks(arms: Sequence[Arm], reference: str) -> tuple[AcrossTasks, ...]:
    """Every other method beside the reference over all tasks; nothing where there is only one task."""
    tasks = list(dict.fromkeys(arm.task.name for arm in arms))
    if len(tasks) < 2:
        return ()
    by_name = {(arm.task.name, arm.method.name): arm for arm in arms}
    methods = [name for name in dict.fromkeys(arm.method.name for arm in arms) if name != reference]
    return tuple(
        row
        for method in methods
        if (row := _across(method, reference, [(by_name[t, method], by_name[t, reference]) for t in tasks]))
    )


def _across(method: str, reference: str, sides: Sequence[tuple[Arm, Arm]]) -> AcrossTasks | None:
    """None: no task has a pair."""
    counts: dict[str, int] = {}
    better, ratios_by_task, left_out = [], [], {}
    for ours, theirs in sides:
        task, higher = ours.task.name, ours.metric.higher_is_better
        mine, others = _scores(ours), _scores(theirs)
        shared = sorted(set(mine) & set(others))
        counts[task] = len(shared)
        values = [(mine[n], others[n]) if higher else (others[n], mine[n]) for n in shared]
        if not shared:
            left_out[task] = "no pair of valid seeds"
            continue
        # Where lower is better, both the comparison and the ratio are turned over: above 1 is better.
        better.append(effects.probability_better(*map(list, zip(*values, strict=True))))
        if len(values) < 2:
            left_out[task] = "a single pair of valid seeds has no spread"
        elif min(min(pair) for pair in values) > 0:
            ratios_by_task.append([above / below for above, below in values])
        else:
            left_out[task] = "a ratio needs scores above 0"
    if not better:
        return None
    relative = None
    if len(ratios_by_task) > 1:
        rng = np.random.default_rng(stream_seed("across tasks", method, reference))
        relative = Bootstrapped(**resampling.stratified_bootstrap(ratios_by_task, rng)._asdict())
    return AcrossTasks(
        method=method,
        reference=reference,
        relative=relative,
        left_out=left_out,
        improvement=math.fsum(better) / len(better),
        pairs=counts,
    )


def _scores(arm: Arm) -> dict[int, float]:
    """Replicate number -> the task's metric on test, of the valid ones."""
    return {r.spec.number: r.result.scores["test"][arm.metric.name] for r in arm.valid if r.result}
