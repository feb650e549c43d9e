"""Numbers and findings put into words: how the report writes a score, a size, an interval, a verdict.

Pure text from values; it computes no statistic, knows no file format and escapes nothing (each template
does that for its own format). A value that is missing is an en dash with its reason, never a zero.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from finetrial.frozen import Setting
from finetrial.summary import ArmSummary, ClaimResult, Summary, TaskSummary, Verdict
from finetrial.summary_measures import Interval

MINUS = "−"
MISSING = "–"
NARROW = "\u00a0"  # keeps a number and its percent sign on one line
VERDICT_WORDS: dict[Verdict, str] = {
    "supported": "supported",
    "refuted": "refuted",
    "inconclusive": "inconclusive",
    "not_assessable": "not assessable",
}
# From this many claims on, the opening paragraph groups them by claim instead of giving each a sentence.
CLAIMS_IN_FULL = 4
# Scores up to this size are shares of one (0.842); above it they are points of a hundred (84.2).
LARGEST_SHARE = 1.5
POINTS = 100.0
# With fewer random trials a tuning curve has nothing to show.
LEAST_CURVE = 3


def missing(reason: str) -> str:
    """An en dash with the reason why there is no value."""
    return f"{MISSING} ({reason})"


def fixed(value: float, decimals: int, *, signed: bool = False) -> str:
    """The value with so many decimals and a true minus sign; a rounded zero carries no sign."""
    text = f"{abs(value):,.{decimals}f}"
    if not any(digit in "123456789" for digit in text):
        return text
    return (MINUS if value < 0 else "+" if signed else "") + text


def significant(value: float, digits: int = 3) -> str:
    """The value with so many significant digits; `1.9e-5` where plain digits would be long."""
    if value == 0:
        return "0"
    if 1e-2 <= abs(value) < 1e6:
        text = f"{value:.{digits}g}"
        text = f"{value:,.0f}" if "e" in text else text
    else:
        mantissa, _, exponent = f"{value:.{digits - 1}e}".partition("e")
        mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
        text = f"{mantissa}e{int(exponent)}"
    return text.replace("-", MINUS, 1) if value < 0 else text


def short(name: str, length: int = 24) -> str:
    """A name that leaves room for a figure; its full form stands in the tables and the CSV."""
    return name if len(name) <= length else name[: length - 1] + "…"


def setting(value: Setting | None) -> str:
    """A hyper-parameter as a person would write it in the study file."""
    if value is None:
        return missing("not set")
    if isinstance(value, bool):
        return "true" if value else "false"
    return significant(value) if isinstance(value, float) else str(value)


def decimals_for(values: Iterable[float], best_possible: float | None = None) -> int:
    """Decimals for scores of one metric: one for points (0 .. 100), three for shares (0 .. 1). Where all values
    are small, the best that it can be tells points from shares."""
    points = best_possible == POINTS or max((abs(value) for value in values), default=0.0) > LARGEST_SHARE
    return 1 if points else 3


def places_of(value: Interval | None, least: int) -> int:
    """At least so many decimals, and as many as show its estimate to two digits."""
    if value is None or not value.estimate:
        return least
    return max(least, 1 - math.floor(math.log10(abs(value.estimate))))


def interval(
    value: Interval | None, decimals: int, *, signed: bool = False, reason: str = "no valid run"
) -> str:
    """`57.9 (57.1 to 58.7)`; without an interval the number of values is said instead."""
    if value is None:
        return missing(reason)
    text = fixed(value.estimate, decimals, signed=signed)
    if value.low is None or value.high is None:
        return f"{text} (no interval, n = {value.n})"
    low, high = (fixed(end, decimals, signed=signed) for end in (value.low, value.high))
    return f"{text} ({low} to {high})"


def p_value(value: float | None) -> str:
    """A p-value to two digits, never rounded down to zero."""
    if value is None:
        return missing("not tested")
    return "< 0.001" if value < 0.001 else f"{value:.2g}" if value < 0.1 else f"{value:.2f}"


def scaled(value: float, steps: Sequence[tuple[float, str]]) -> tuple[float, str]:
    """The value in the largest unit that leaves at least one whole, and that unit's name."""
    for factor, unit in steps:
        if abs(value) >= factor:
            return factor, unit
    return steps[-1]


BYTES = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B"))
COUNTS = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""))
TIMES = ((3600.0, "h"), (120.0, "min"), (1.0, "s"))
SECONDS_PER = {"h": 3600.0, "min": 60.0, "s": 1.0}


def size(value: float | None, reason: str = "not measured") -> str:
    """Bytes in decimal units: 1 GB is 10^9 bytes."""
    if value is None:
        return missing(reason)
    factor, unit = scaled(value, BYTES)
    return f"{_three(value / factor)} {unit}"


def count(value: float | None, reason: str = "not counted") -> str:
    """A count: in full below ten thousand, with a prefix (k, M, G, T, P, E) above."""
    if value is None:
        return missing(reason)
    if abs(value) < 10_000:
        return f"{value:,.0f}"
    factor, prefix = scaled(value, COUNTS)
    return f"{_three(value / factor)} {prefix}".rstrip()


def duration(seconds: float | None, reason: str = "not measured") -> str:
    """`42 s`, `12.5 min`, `3.1 h`."""
    if seconds is None:
        return missing(reason)
    _, unit = scaled(seconds, TIMES)
    return f"{_three(seconds / SECONDS_PER[unit])} {unit}"


def _three(value: float) -> str:
    """Three significant digits without an exponent, trailing zeros kept off."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def times(ratio: float) -> str:
    """A ratio to the reference: `0.4×`, or `1/240` where that reads better."""
    if ratio >= 10:
        return f"{ratio:,.0f}×"
    if ratio >= 0.095:
        return f"{ratio:.2g}×"
    return f"1/{1 / ratio:,.0f}" if ratio > 0 else "0×"


def plain(text: str) -> str:
    """The text for any terminal: ASCII minus, dash, times sign."""
    return text.replace(MINUS, "-").replace(MISSING, "-").replace("×", "x").replace(NARROW, " ")


def percent(share: float, *, signed: bool = False) -> str:
    """A share as percent, without decimals unless it is small."""
    value = 100 * share
    return f"{fixed(value, 0 if abs(value) >= 2 or value == 0 else 1, signed=signed)}{NARROW}%"


def margin(share: float) -> str:
    """A declared margin as percent, as it was declared."""
    return f"{100 * share:.6g}{NARROW}%"


def difference(claim: ClaimResult, decimals: int) -> str:
    """Method minus reference with its 95 % interval: in points of the score, or in % of the drift."""
    value = claim.difference
    if value is None:
        return missing("the reference is 0" if claim.pairs else "no pair of valid seeds")
    if claim.kind == "drifts_less":
        text = percent(value.estimate, signed=True)
        if value.low is None or value.high is None:
            return f"{text} ({'not bounded' if value.n > 1 else f'no interval, n = {value.n}'})"
        low, high = (percent(end, signed=True).removesuffix(f"{NARROW}%") for end in (value.low, value.high))
        return f"{text} ({low} to {high})"
    if claim.unit != "score":
        decimals = 3 if claim.unit == "nats" else 1
    if value.low is not None and value.high is not None and value.high - value.low < 4 * 10**-decimals:
        decimals += 1
    text, _, rest = interval(value, decimals, signed=True).partition(" (")
    unit = " nats" if claim.unit == "nats" else " points" if decimals <= 2 else ""
    return f"{text}{unit} ({rest}"


def seeds(claim: ClaimResult) -> str:
    """The pairs of replicates that the verdict rests on, of those planned."""
    used, absent = len(claim.pairs), len(claim.missing)
    return f"{used} of {used + absent}" if absent else str(used)


def changes(summary: Summary) -> str:
    """What the study has changed in the base model's config, as keyword arguments; empty if nothing."""
    return ", ".join(f"{name}={value!r}" for name, value in summary.model_changes.items())


def short_verdict(claim: ClaimResult) -> str:
    """A verdict for the terminal, in ASCII: what would settle it, or why there is none."""
    word = VERDICT_WORDS[claim.verdict]
    if claim.verdict == "inconclusive" and claim.seeds_needed:
        return f"{word}: {claim.seeds_needed} seeds for 80 % power"
    return f"{word}: {plain(claim.reason)}" if claim.verdict == "not_assessable" else word


def claim_decimals(summary: Summary, claim: ClaimResult) -> int:
    """Decimals of the score that a claim is about."""
    for task in summary.tasks:
        if task.name == claim.task:
            return metric_decimals(summary, task, task.metric)
    return 1


def metric_decimals(summary: Summary, task: TaskSummary, metric: str) -> int:
    """Decimals of one metric of a task, from the best that it can be or else from all its values."""
    values = [base[metric] for base in task.baselines.values() if metric in base]
    values += [arm.test[metric].estimate for arm in arms_of(summary, task.name) if metric in arm.test]
    return decimals_for(values, task.best_possible if metric == task.metric else None)


def arms_of(summary: Summary, task: str) -> list[ArmSummary]:
    return [arm for arm in summary.arms if arm.task == task]


def methods_of(summary: Summary) -> list[str]:
    """Every method, in the order in which the study names them."""
    return list(dict.fromkeys(arm.method for arm in summary.arms))


def reference_of(summary: Summary, task: str) -> str | None:
    """The method that costs are compared with: the claims' reference on this task, else the first."""
    methods = [arm.method for arm in arms_of(summary, task)]
    named = [c.reference for c in summary.claims if c.task == task and c.reference in methods]
    return named[0] if named else methods[0] if methods else None


def listed(parts: Sequence[str]) -> str:
    """`a, b and c`."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


# ---- the opening paragraph -------------------------------------------------------------------------------


def paragraph(summary: Summary) -> str:
    """What was found, for a reader who stops there: every verdict, n, what failed, what is in doubt."""
    parts = [] if summary.complete else ["This study is not finished: everything below may still change."]
    parts += _opening(summary)
    if len(summary.claims) <= CLAIMS_IN_FULL:
        parts += [sentence(claim, claim_decimals(summary, claim)) for claim in summary.claims]
    else:
        parts += _grouped(summary.claims)
    parts += _below_baseline(summary)
    parts.append(_failures(summary))
    notes = len(summary.fairness_notes)
    if notes:
        parts.append(f"{counted(notes, 'fairness note')} below should be read before relying on this.")
    return " ".join(parts)


def _opening(summary: Summary) -> list[str]:
    if not summary.claims:
        return ["The study declares no claims, so this report describes and gives no verdict."]
    tally = Counter(claim.verdict for claim in summary.claims)
    counts = [f"{tally[verdict]} {VERDICT_WORDS[verdict]}" for verdict in VERDICT_WORDS if tally[verdict]]
    if len(summary.claims) == 1:
        return []
    return [f"Of {len(summary.claims)} claims, {listed(counts)}."]


def sentence(claim: ClaimResult, decimals: int) -> str:
    """One verdict as a sentence that is true on its own."""
    verb, said = {
        "within": ("is", f"at most {margin(claim.margin)} worse than {claim.reference}"),
        "drifts_less": ("drifts", f"at least {margin(claim.margin)} less than {claim.reference}"),
        "forgets_less": ("forgets", f"less than {claim.reference}"),
    }[claim.kind]
    names = f"{claim.method} {verb}"
    if claim.verdict == "not_assessable":
        return f"On {claim.task}, whether {names} {said} could not be judged: {_clause(claim.reason)}."
    pairs = seeds(claim)
    noun = "paired seed" if pairs == "1" else "paired seeds"
    shown = difference(claim, decimals).partition(" (")[0]
    evidence = f"({shown}, {pairs} {noun})"
    if claim.verdict == "supported":
        return f"On {claim.task}, {names} {said} {evidence}."
    if claim.verdict == "refuted":
        return f"On {claim.task}, it is refuted that {names} {said} {evidence}."
    settle = f"; about {claim.seeds_needed} seeds would settle it with 80 % power" if claim.seeds_needed else ""
    return f"On {claim.task}, it stays open whether {names} {said} {evidence}{settle}."


def _clause(reason: str) -> str:
    """A reason as the end of a sentence."""
    reason = reason.strip().rstrip(".")
    return reason or "no reason was recorded"


def _grouped(claims: Sequence[ClaimResult]) -> list[str]:
    """Many claims: each claim once, with its tasks by verdict and the seeds behind them."""
    sentences = []
    for text in dict.fromkeys(claim.claim for claim in claims):
        same = [claim for claim in claims if claim.claim == text]
        by_verdict = [
            f"{VERDICT_WORDS[verdict]} on "
            + listed([f"{c.task} ({seeds(c)} seeds)" for c in same if c.verdict == verdict])
            for verdict in VERDICT_WORDS
            if any(c.verdict == verdict for c in same)
        ]
        sentences.append(f"“{text}” is {'; '.join(by_verdict)}.")
    return sentences


def _below_baseline(summary: Summary) -> list[str]:
    """Arms whose mean does not beat the best baseline: without this a reader would be misled."""
    sentences = []
    for task in summary.tasks:
        if not (found := task.best_baseline()):
            continue
        name, best = found
        sign = 1 if task.higher_is_better else -1
        weak = [
            arm.method
            for arm in arms_of(summary, task.name)
            if task.metric in arm.test and sign * arm.test[task.metric].estimate <= sign * best
        ]
        if weak:
            verb = "does" if len(weak) == 1 else "do"
            sentences.append(f"On {task.name}, {listed(weak)} {verb} not beat the {name} baseline.")
    return sentences


def _failures(summary: Summary) -> str:
    planned = sum(arm.planned for arm in summary.arms)
    failed = sum(arm.failed for arm in summary.arms)
    outcomes = Counter(
        "void" if trial.outcome == "done" else trial.outcome
        for arm in summary.arms
        for trial in arm.search.trials
        if trial.score is None
    )
    untrained = sum(arm.planned for arm in summary.arms if arm.search.best is None) if summary.complete else 0
    trials = sum(len(arm.search.trials) for arm in summary.arms)
    others = Counter(row.run_id.partition(".")[0] for row in summary.failures)
    others = {stage: others[stage] for stage in ("baseline", "probe") if others[stage]}
    if not failed and not outcomes and not others and not summary.complete:
        return "No run has failed so far."
    if not failed and not outcomes and not others:
        return f"All {counted(planned, 'replicate')} and {counted(trials, 'trial')} ended with a score."
    parts = []
    if failed:
        parts.append(f"{failed} of {counted(planned, 'replicate')} gave no valid score")
    if untrained:
        parts.append(
            f"{untrained} of {counted(planned, 'replicate')} were not trained, as no trial gave a score"
        )
    if outcomes:
        kinds = listed([f"{n} {outcome_word(kind)}" for kind, n in sorted(outcomes.items())])
        parts.append(f"{sum(outcomes.values())} of {counted(trials, 'search trial')} failed ({kinds})")
    parts += [f"{counted(number, stage)} failed" for stage, number in others.items()]
    return f"{listed(parts)}; failures are counted and listed, never averaged in."


def outcome_word(outcome: str) -> str:
    return outcome.replace("_", " ")


def mapping_text(values: Mapping[str, object]) -> str:
    """`train 4,350, validation 400` or, for other values, `name value` pairs."""
    return ", ".join(
        f"{name} {value:,}" if isinstance(value, int) else f"{name} {value}" for name, value in values.items()
    )
