"""Verdicts: each declared claim on each task, judged over paired replicates.

Pure. `analyse.py` says which replicates are valid and brings their values; the numbers come from
`stats.py`; the rules and their sources are in docs/statistics.md. A verdict is never given on fewer than
four pairs, nor where the comparison could not have told the methods apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from finetrial import effects, power, stats
from finetrial.stats import ALPHA, Contrast
from finetrial.study import MIN_PAIRS, Claim
from finetrial.summary import ClaimResult, Unit, Verdict
from finetrial.summary_measures import Interval

ASSAY_FACTOR = 2  # the reference must beat the trivial baseline by this many margins
NOISE_FACTOR = 3  # the reference must drift by this many times base-against-base


@dataclass(frozen=True)
class Side:
    """One arm's values for a claim: per replicate number the value, its runs, or why there is none."""

    name: str
    values: Mapping[int, float]
    run_ids: Mapping[int, Sequence[str]]
    absent: Mapping[int, str]


@dataclass(frozen=True)
class Case:
    """One claim on one task with all that it is judged by.

    `trivial`: name and value of the best baseline that needs no model ("within"); `noise`: the largest
    drift or forgetting of the base against itself. None: not measured, so nothing can be judged.
    """

    claim: Claim
    task: str
    method: Side
    reference: Side
    higher_is_better: bool = True
    trivial: tuple[str, float] | None = None
    noise: float | None = None
    unit: Unit = "score"

    @property
    def planned(self) -> list[int]:
        sides = (self.method, self.reference)
        return sorted({number for side in sides for number in (*side.values, *side.absent)})

    @property
    def pairs(self) -> tuple[int, ...]:
        return tuple(sorted(set(self.method.values) & set(self.reference.values)))

    @property
    def factor(self) -> float:
        """What the reference's value is multiplied with in the tested quantity."""
        less = self.claim.kind != "within" or self.higher_is_better
        return 1 - self.claim.margin if less else 1 + self.claim.margin

    @property
    def missing(self) -> tuple[int, ...]:
        return tuple(number for number in self.planned if number not in self.pairs)


def judge(cases: Sequence[Case]) -> tuple[ClaimResult, ...]:
    """One result per case, in order. Holm is taken over those that can be assessed: once over all that could be
    supported, once over all that could be refuted, so that either kind is false in 5 % of studies at most."""
    obstacles = [_obstacle(case) for case in cases]
    family = [_contrast(c) for c, why in zip(cases, obstacles, strict=True) if why is None]
    judged = zip(
        family,
        stats.holm([contrast.p for contrast in family]),
        stats.holm([contrast.p_against for contrast in family]),
        strict=True,
    )
    results = []
    for case, obstacle in zip(cases, obstacles, strict=True):
        if obstacle is None:
            results.append(_judged(case, *next(judged), len(family)))
        else:  # described where there is something to describe, and not judged
            described = _contrast(case) if len(case.pairs) >= 2 else None
            results.append(_result(case, described, "not_assessable", obstacle))
    return tuple(results)


def _values(case: Case) -> tuple[list[float], list[float]]:
    return (
        [case.method.values[number] for number in case.pairs],
        [case.reference.values[number] for number in case.pairs],
    )


def _contrast(case: Case) -> Contrast:
    method, reference = _values(case)
    if case.claim.kind == "drifts_less":
        return stats.drifts_less(method, reference, case.claim.margin)
    if case.claim.kind == "forgets_less":  # without a relative margin: forgetting may be 0 or below
        return stats.contrast(method, reference, "less")
    return stats.within(method, reference, case.claim.margin, higher_is_better=case.higher_is_better)


def _obstacle(case: Case) -> str | None:
    """Why this claim cannot be judged on this task, or None."""
    if len(case.pairs) < MIN_PAIRS:
        more = "; raise train.seeds, finished runs are kept" if len(case.planned) < MIN_PAIRS else ""
        return (
            f"{len(case.pairs)} of {len(case.planned)} pairs of replicates are valid and a verdict "
            f"needs at least {MIN_PAIRS}{_who_is_absent(case)}{more}"
        )
    _, reference = _values(case)
    mean = sum(reference) / len(reference)
    name, margin = case.reference.name, case.claim.margin
    if case.claim.kind != "within" and case.noise is None:
        return "the base was not measured against itself, so numeric noise is unknown"
    if case.claim.kind == "forgets_less":
        return None
    if case.claim.kind == "drifts_less":
        assert case.noise is not None
        if not mean > NOISE_FACTOR * case.noise:
            return (
                f"{name} drifts by {mean:.3g} on average, which is not above {NOISE_FACTOR} times "
                f"the numeric noise of {case.noise:.3g} (the most that a body which did not train drifts)"
            )
        return None
    if case.trivial is None:
        return "no baseline that needs no model was scored, so a margin cannot be put in proportion"
    if not mean > 0:
        return f"{name} scores {mean:.3g} on average; a relative margin needs a score above 0"
    baseline, value = case.trivial
    gain = mean - value if case.higher_is_better else value - mean
    if not gain > ASSAY_FACTOR * margin * mean:
        return (
            f"{name} scores {mean:.4g} on average and the baseline {baseline} {value:.4g}: a gain of "
            f"{gain:.3g} is not more than twice the margin ({ASSAY_FACTOR * margin * mean:.3g}), so "
            f"even a method that learnt nothing could pass"
        )
    return None


def _judged(case: Case, contrast: Contrast, p_holm: float, p_against_holm: float, family: int) -> ClaimResult:
    test, n = contrast.test, contrast.interval.n
    positive = contrast.supports == "greater"
    for_bound, against_bound = (test.lower, test.upper) if positive else (test.upper, test.lower)
    beyond_zero = for_bound > 0 if positive else for_bound < 0
    below_zero = against_bound < 0 if positive else against_bound > 0
    verdict: Verdict
    needed = None
    bound = for_bound
    constant = contrast.test.p is None
    if beyond_zero and p_holm <= ALPHA:
        verdict = "supported"
        reason = f"{_kept(case)}: {_bound(case, contrast, 'lower' if positive else 'upper', bound)}"
    elif below_zero and p_against_holm <= ALPHA:
        verdict, bound = "refuted", against_bound
        reason = f"not so: {_bound(case, contrast, 'upper' if positive else 'lower', bound)}"
    else:
        verdict = "inconclusive"
        needed = _seeds_needed(contrast, n, family)
        if constant:
            reason = _bound(case, contrast, "lower", bound)
            if bound != 0:
                reason += f", of which p is {2.0**-n:.2g}"
                if family > 1:
                    reason += (
                        f" by itself and {min(p_holm, p_against_holm):.2g} after Holm over {family} claims"
                    )
        elif beyond_zero:
            reason = (
                f"{_bound(case, contrast, 'lower' if positive else 'upper', bound)} by itself, but not after "
                f"Holm over {family} claims (p {p_holm:.2g})"
            )
        elif below_zero:
            reason = (
                f"{_bound(case, contrast, 'upper' if positive else 'lower', against_bound)} by itself, which "
                f"speaks against it, but not after Holm over {family} claims (p {p_against_holm:.2g})"
            )
        else:
            reason = (
                f"{_tested(case)} lies between {test.lower:.3g} and {test.upper:.3g} "
                f"(one-sided 95 % bounds), on either side of 0"
            )
        reason += (
            f"; at this effect and spread about {needed} replicates would settle it with 80 % power"
            if needed
            else "; at this effect and spread no reasonable number of replicates would settle it"
        )
    return _result(
        case, contrast, verdict, reason + _absences(case),
        bound=bound, p_holm=p_holm, p_against_holm=p_against_holm, needed=needed, family=family,
    )  # fmt: skip


def _seeds_needed(contrast: Contrast, n: int, family: int) -> int | None:
    """Replicates for 80 % power at the observed effect, and more than there were."""
    mean, sd = contrast.interval.estimate, contrast.interval.sd or 0.0
    needed = power.seeds_needed(mean, sd, ALPHA / family)  # the level that Holm asks for at worst
    return None if needed is None else max(needed, n + 1)


def _result(
    case: Case, contrast: Contrast | None, verdict: Verdict, reason: str, *,
    bound: float | None = None, p_holm: float | None = None, p_against_holm: float | None = None,
    needed: int | None = None, family: int = 1,
) -> ClaimResult:  # fmt: skip
    assessed = verdict != "not_assessable"
    detectable = None
    if assessed and contrast is not None and contrast.interval.sd:  # without spread there is no t to ask
        detectable = power.smallest_detectable(contrast.interval.sd, contrast.interval.n, ALPHA / family)
    sides = (case.method, case.reference)
    return ClaimResult(
        claim=case.claim.text,
        task=case.task,
        kind=case.claim.kind,
        method=case.method.name,
        reference=case.reference.name,
        margin=case.claim.margin,
        unit=case.unit,
        verdict=verdict,
        reason=reason,
        difference=_difference(case),
        contrast=Interval(**contrast.interval._asdict()) if contrast else None,
        contrast_bound=bound,
        p_t=contrast.test.p if contrast and assessed else None,
        p_sign_flip=contrast.p_sign_flip if contrast and assessed else None,
        p_holm=p_holm,
        p_against_holm=p_against_holm,
        smallest_detectable=detectable,
        seeds_needed=needed,
        pairs=case.pairs,
        missing=case.missing,
        run_ids=tuple(run_id for number in case.pairs for side in sides for run_id in side.run_ids[number]),
    )


def _difference(case: Case) -> Interval | None:
    """Method minus reference: in score or in forgetting, or in drift as a share of the reference's.

    The share is that of the mean drifts with Fieller's interval: the ratios that a two-sided form of the
    claim's own test does not reject at 5 %.
    """
    method, reference = _values(case)
    if not method:
        return None
    if case.claim.kind != "drifts_less":
        return Interval(**stats.paired_difference(method, reference)._asdict())
    ratio = effects.fieller_ratio(method, reference)
    if min(reference) <= 0 or ratio.estimate is None:
        return None
    low, high = (None if end is None else end - 1 for end in (ratio.low, ratio.high))
    return Interval(estimate=ratio.estimate - 1, low=low, high=high, sd=None, n=ratio.n)


# ---- words -------------------------------------------------------------------------------------------


def _percent(share: float) -> str:
    return f"{100 * share:.6g} %"


def _kept(case: Case) -> str:
    method, reference = case.method.name, case.reference.name
    if case.claim.kind == "drifts_less":
        return f"{method} drifts at least {_percent(case.claim.margin)} less than {reference}"
    if case.claim.kind == "forgets_less":
        return f"{method} forgets less than {reference}"
    return f"{method} is at most {_percent(case.claim.margin)} worse than {reference}"


def _tested(case: Case) -> str:
    if case.claim.kind == "forgets_less":
        return f"forgetting of {case.method.name} - forgetting of {case.reference.name}"
    what = "drift of " if case.claim.kind == "drifts_less" else ""
    return f"{what}{case.method.name} - {case.factor:.6g} × {what}{case.reference.name}"


def _bound(case: Case, contrast: Contrast, side: str, bound: float) -> str:
    if contrast.test.p is None:
        return f"{_tested(case)} is {bound:.3g} in every pair"
    sign = "above" if side == "lower" else "below"
    return (
        f"{_tested(case)} is {contrast.interval.estimate:.3g} on average, and its one-sided 95 % "
        f"{side} bound {bound:.3g} is {sign} 0"
    )


def _absences(case: Case) -> str:
    """`; 2 of 5 pairs are missing (lora 1, 3: diverged)`, or nothing."""
    count = len(case.missing)
    if not count:
        return ""
    verb = "is" if count == 1 else "are"
    return f"; {count} of {len(case.planned)} pairs {verb} missing{_who_is_absent(case)}"


def _who_is_absent(case: Case) -> str:
    """` (lora 1, 3: diverged; full 0 to 4: not finished)`, or nothing."""
    parts = []
    for side in (case.method, case.reference):
        numbers: dict[str, list[int]] = {}
        for number, why in sorted(side.absent.items()):
            numbers.setdefault(why, []).append(number)
        parts += [f"{side.name} {_listed(group)}: {why}" for why, group in numbers.items()]
    return f" ({'; '.join(parts)})" if parts else ""


def _listed(numbers: list[int]) -> str:
    first, last = numbers[0], numbers[-1]
    if len(numbers) > 2 and last - first == len(numbers) - 1:
        return f"{first} to {last}"
    return ", ".join(map(str, numbers))
