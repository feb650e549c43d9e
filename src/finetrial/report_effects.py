"""The report's tables beside the verdicts: sizes of effects, test examples, all tasks together.

None of what they show decides a claim. As `report_tables.py`: text from a summary's numbers, no statistics.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from finetrial import report_text as text
from finetrial.report_tables import Cell, Table, columns_of
from finetrial.summary import AcrossTasks, Bootstrapped, ClaimResult, Denominator, Effect, OnExamples, Summary
from finetrial.summary_measures import Interval

INFERENCE_TASKS = 6  # with fewer, no test over tasks can be relied on


def tables_of(summary: Summary) -> list[Table]:
    return [sizes(summary), at_equal_score(summary), examples(summary), across(summary)]


# ---- sizes of effects ----------------------------------------------------------------------------------


def sizes(summary: Summary) -> Table:
    """Of every claim: how large the difference is, in several ways, and out of how many replicates."""
    rows: list[tuple[Cell, ...]] = []
    for claim in summary.claims:
        if claim.effect is None and claim.of_method is None:
            continue  # of a summary that has none
        effect = claim.effect
        rows.append(
            (
                f"{claim.task}: {claim.claim}",
                _hedges(effect),
                text.fixed(effect.above, 2) if effect else text.missing("no pair"),
                _ratio(claim),
                text.p_value(claim.p_t),
                text.p_value(effect.p_unpaired if effect else None),
                _denominator(claim.of_method),
                _denominator(claim.of_reference),
            )
        )
    note = (
        "None of these decides a claim. Hedges' g: mean paired difference in its standard deviations, "
        "corrected for few seeds. Above: share of pairs in which the method's value is the larger, a tie "
        "counting half. Ratio: of the means, method to reference, by Fieller. Unpaired: Welch's t of the "
        "tested quantity over all valid seeds, as a check of the paired one. Brackets: 95 % interval. Seeds: "
        "with a value, of those planned, and why the others have none."
    )
    columns = columns_of(
        "Claim", "#Hedges' g", "#Above", "#Ratio", "#p (t, paired)", "#p (t, unpaired)",
        "Seeds of the method", "Seeds of the reference",
    )  # fmt: skip
    return Table("effects", "Effect sizes", columns, tuple(rows), note)


def _hedges(effect: Effect | None) -> str:
    if effect is None:
        return text.missing("no pair")
    if effect.g is None or effect.g_low is None or effect.g_high is None:
        return text.missing("fewer than three pairs, or no spread")
    low, high = (text.fixed(end, 1, signed=True) for end in (effect.g_low, effect.g_high))
    return f"{text.fixed(effect.g, 1, signed=True)} ({low} to {high})"


def _ratio(claim: ClaimResult) -> str:
    if claim.kind == "forgets_less":
        return text.missing("forgetting may be 0")
    effect = claim.effect
    if effect is None or effect.ratio is None:
        return text.missing("no pair" if effect is None else "the reference is 0")
    if effect.ratio_low is None or effect.ratio_high is None:
        why = "not bounded" if len(claim.pairs) > 1 else "no interval, n = 1"
        return f"{text.fixed(effect.ratio, 3)} ({why})"
    low, high = (text.fixed(end, 3) for end in (effect.ratio_low, effect.ratio_high))
    return f"{text.fixed(effect.ratio, 3)} ({low} to {high})"


def _denominator(given: Denominator | None) -> str:
    """`5 of 5`, or `3 of 5 (diverged: 1; crashed: 1)`."""
    if given is None:
        return text.missing("not counted")
    reasons = "; ".join(f"{why}: {count}" for why, count in given.absent.items())
    return f"{given.valid} of {given.planned}" + (f" ({reasons})" if reasons else "")


def at_equal_score(summary: Summary) -> Table:
    """Drift and forgetting where both methods have one task score."""
    rows: list[tuple[Cell, ...]] = []
    for claim in summary.claims:
        found = claim.at_equal_score
        if found is None:
            continue
        show = partial(text.fixed, decimals=3 if claim.unit == "nats" else 1)
        show = text.significant if claim.kind == "drifts_less" else show
        unit = "" if claim.kind == "drifts_less" else f" {claim.unit}"
        shares = " / ".join(f"{share:.2f}" for share in found.shares)
        places = text.claim_decimals(summary, claim)
        rows.append(
            (
                f"{claim.task}: {claim.claim}",
                str(len(found.pairs)),
                text.fixed(found.score, places),
                shares,
                *(_shown(value, show) + unit for value in (found.method, found.reference, found.difference)),
            )
        )
    note = (
        "Beside the verdicts, which compare the methods where each of them ended: drift or forgetting where "
        "both have the worse one's score on validation. Each model is taken back on the straight line to the "
        "base's body, its head kept, to where its score first reaches that; between measured points the line "
        "is taken as linear. Shares: of the updates that are left, method / reference. Brackets: 95 % "
        "t-interval over pairs of seeds."
    )
    columns = columns_of("Claim", "#Pairs", "#Score", "Shares", "#Method", "#Reference", "#Difference")
    return Table("at-equal-score", "At equal task score", columns, tuple(rows), note)


def _shown(value: Interval, show: Callable[[float], str]) -> str:
    if value.low is None or value.high is None:
        return show(value.estimate)
    return f"{show(value.estimate)} ({show(value.low)} to {show(value.high)})"


# ---- test examples -------------------------------------------------------------------------------------


def examples(summary: Summary) -> Table:
    """Score differences for new test examples too, and who alone got which example right."""
    rows: list[tuple[Cell, ...]] = []
    for claim in summary.claims:
        found = claim.on_examples
        if found is None:
            continue
        places = text.claim_decimals(summary, claim) + 1
        rows.append(
            (
                f"{claim.task}: {claim.claim}",
                f"{found.examples:,}" if found.examples is not None else text.missing("not known"),
                text.interval(claim.difference, places, signed=True, reason="no pair of valid seeds"),
                _bootstrapped(found.difference, places, found.left_out, signed=True),
                _discordant(found),
                text.fixed(found.median_p, 2) if found.median_p is not None else text.missing("not tested"),
            )
        )
    note = (
        "Difference of scores, method minus reference, with its 95 % interval: by t over seeds, for these test "
        "examples; and with seeds and examples both drawn again (crossed bootstrap), for new seeds and new "
        "examples. Alone right: examples that the one model of a pair got right and the other did not, mean "
        "over pairs; p: McNemar's, median over pairs. Models and examples are no replicates of a method, so no "
        "verdict rests on them."
    )
    columns = columns_of(
        "Claim", "#Examples", "#New seeds", "#New seeds and new examples", "Alone right: method / reference",
        "#p (McNemar)",
    )  # fmt: skip
    return Table("examples", "By test example", columns, tuple(rows), note)


def _bootstrapped(value: Bootstrapped | None, places: int, why: str | None, *, signed: bool = False) -> str:
    if value is None:
        return text.missing(why or "not computed")
    estimate, low, high = (
        text.fixed(each, places, signed=signed) for each in (value.estimate, value.low, value.high)
    )
    return f"{estimate} ({low} to {high})"


def _discordant(found: OnExamples) -> str:
    if found.method_only is None or found.reference_only is None:
        return text.missing("examples are not just right or wrong" if found.examples else "not known")
    return f"{text.fixed(found.method_only, 1)} / {text.fixed(found.reference_only, 1)}"


# ---- all tasks together --------------------------------------------------------------------------------


def across(summary: Summary) -> Table:
    """Of a study with several tasks: every method beside the reference over all of them."""
    rows: list[tuple[Cell, ...]] = [
        (
            each.method,
            each.reference,
            _bootstrapped(each.relative, 3, _why_no_ratio(each)),
            text.fixed(each.improvement, 2),
            text.mapping_text(each.pairs),
            "; ".join(f"{task}: {why}" for task, why in each.left_out.items()) or "none",
        )
        for each in summary.across
    ]
    note = (
        "Relative score: score over the reference's, pair by pair (turned over where lower is better): mean "
        "of the middle half of all pairs of all tasks, and the 95 % interval for new seeds on these tasks. "
        "Better: share of pairs in which the method scores better, a tie counting half, mean over tasks. This "
        f"describes these tasks and is no verdict: nothing is inferred over tasks, for which {INFERENCE_TASKS} "
        f"or more would be needed."
    )
    columns = columns_of("Method", "Reference", "#Relative score", "#Better", "Pairs", "Left out of the ratio")
    return Table("across", "Across tasks", columns, tuple(rows), note)


def _why_no_ratio(each: AcrossTasks) -> str:
    return "; ".join(f"{task}: {why}" for task, why in each.left_out.items()) or "fewer than two tasks"
