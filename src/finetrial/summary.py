"""The shape of `analysis/summary.json`: every number of the report, with the run ids it came from.

Written by `analyse.py`, read by `report.py` and `plots`, which compute nothing. Whatever varies between
two equal studies lives under `cost` and `meta` (times, memory), or says what was attempted again or failed.
"""

from __future__ import annotations

from typing import Any, Literal

from finetrial.frozen import Frozen, Setting
from finetrial.records import ClaimKind, Outcome, SearchStop, WarmStart
from finetrial.summary_measures import DriftSummary, ForgettingSummary, Interval, SpectrumSummary

SummaryVersion = Literal[1]
SUMMARY_VERSION: SummaryVersion = 1
Verdict = Literal["supported", "refuted", "inconclusive", "not_assessable"]
Unit = Literal["score", "share", "points", "nats"]


class TrialPoint(Frozen):
    run_id: str
    number: int
    outcome: Outcome
    score: float | None
    settings: dict[str, Setting]
    settings_used: dict[str, Setting]
    startup: bool  # drawn at random, whatever the others scored; the rest TPE has guided
    share: float = 1.0  # of its steps, up to where halving has stopped it
    loss: float | None = None  # on validation, by which it was compared there


class DimensionSummary(Frozen):
    """One searched dimension: its range or choices, the optimum, and the edge it lies on, if any."""

    name: str
    kind: Literal["range", "choice", "fixed"]
    low: float | None = None
    high: float | None = None
    log: bool = False
    choices: tuple[Setting, ...] = ()
    optimum: Setting | None = None
    edge: Literal["low", "high"] | None = None


class TuningCurve(Frozen):
    """What the best of n random trials is expected to score on validation, for n = 1, 2 ...

    The band holds for all n at once in 95 of 100 searches; None where the metric has no bound on that side.
    """

    run_ids: tuple[str, ...]  # the independent draws
    without_score: int  # of them, counted with the metric's worst value
    expected: tuple[float, ...]
    low: tuple[float | None, ...]
    high: tuple[float | None, ...]


class SearchSummary(Frozen):
    trials: tuple[TrialPoint, ...]
    curve: TuningCurve | None = None  # None: no random trial has ended
    best: str | None  # run id
    best_score: float | None
    dimensions: tuple[DimensionSummary, ...]
    rows: int | None  # training rows per trial; None: all


class ReplicatePoint(Frozen):
    run_id: str
    number: int
    outcome: Outcome
    settings: dict[str, Setting]  # what it was to be trained with
    settings_used: dict[str, Setting]  # what it was
    void: str | None  # why it does not count: something that should have trained did not move
    score: float | None  # the task's metric on test
    validation_score: float | None
    test: dict[str, float]  # every test metric
    weights_sha256: str | None
    moved: dict[str, float]  # group -> relative change


class ArmCost(Frozen):
    """Measured cost of the arm's runs that have a result; varies from run to run."""

    search_seconds: float
    train_seconds: float  # of all replicates, wall clock, from their start to their result
    train_seconds_each: Interval | None  # of steps alone, without evaluations and what comes before and after
    peak_memory_bytes: int | None
    cpu_seconds: float
    device: str


class ArmSummary(Frozen):
    """One method on one task: its search, its replicates, and what was measured of them."""

    task: str
    method: str
    search: SearchSummary
    replicates: tuple[ReplicatePoint, ...]
    test: dict[str, Interval]  # metric -> over replicates
    failed: int  # replicates without a valid score (diverged, void, crashed...), of `planned`
    planned: int
    drift: DriftSummary | None
    spectrum: SpectrumSummary | None
    forgetting: ForgettingSummary | None
    own_measures: dict[str, dict[str, Interval]] = {}  # numbers of other probes: name -> number -> interval
    trainable_parameters: int | None
    total_parameters: int | None
    saved_bytes: int | None
    cost: ArmCost | None

    @property
    def scored(self) -> int:
        """Replicates with a valid score so far."""
        return sum(point.outcome == "done" and point.void is None for point in self.replicates)


# Baselines that are no trivial answers: the model with a fresh head, and its head alone trained.
UNTRAINED, FROZEN_BASELINE = "untrained", "frozen body"


class Control(Frozen):
    """What was measured of a model whose body is the base's: every value must be 0."""

    name: Literal["base against base", "frozen body"]
    run_id: str
    drift: tuple[float, ...]  # 1 - debiased CKA per layer; empty: not measured
    forgotten: dict[str, float]  # per task and text
    update: float | None  # norm of the change of all weight matrices of the blocks


class TaskSummary(Frozen):
    """A task: its rows, its baselines and its controls."""

    name: str
    metric: str
    higher_is_better: bool
    best_possible: float | None = None  # of the metric; None: it has no bound
    split_rows: dict[str, int]
    input_sha256: dict[str, str] = {}  # split -> hash of the encoded inputs; train's is of `train.rows`
    baselines: dict[str, dict[str, float]]  # majority, untrained, frozen body ... -> metric -> test value
    baseline_run: str | None
    controls: tuple[Control, ...]  # those that have ended

    def best_baseline(self, *but: str, metric: str = "") -> tuple[str, float] | None:
        """Name and test score of the best baseline `but` some; of equals the first."""
        metric, sign = metric or self.metric, 1 if self.higher_is_better else -1
        known = {name: scores[metric] for name, scores in self.baselines.items() if metric in scores}
        left = [item for item in known.items() if item[0] not in but]
        return max(left, key=lambda item: sign * item[1], default=None)


class Effect(Frozen):
    """How large the difference of a claim is, over its pairs; decides nothing."""

    g: float | None  # Hedges' g: in standard deviations of the paired differences; None below three pairs
    g_low: float | None
    g_high: float | None
    above: float  # share of pairs in which the method's value is the larger one, a tie counting half
    ratio: float | None  # of the means, method to reference; None of forgetting, which may be 0
    ratio_low: float | None  # Fieller's interval; None: the data do not bound it
    ratio_high: float | None
    p_unpaired: float | None  # the tested quantity by Welch's t over all valid replicates, one-sided


class Denominator(Frozen):
    """An arm's planned replicates for a claim: how many have a value, and why the others have none."""

    planned: int
    valid: int
    absent: dict[str, int]  # reason -> replicates


class Bootstrapped(Frozen):
    """An estimate with its 95 % percentile interval over so many bootstrap samples."""

    estimate: float
    low: float
    high: float
    draws: int


class Discordant(Frozen):
    """McNemar's test of two trained models: the examples that one of them alone got right."""

    number: int  # of the replicate
    method_only: int
    reference_only: int
    p: float  # exact, two-sided


class OnExamples(Frozen):
    """A score difference seen by test example; decides nothing."""

    examples: int | None
    difference: Bootstrapped | None  # seeds and examples drawn again: for new seeds and new examples
    left_out: str | None  # why there is no such interval
    discordant: tuple[Discordant, ...]  # where every example is right or wrong
    method_only: float | None  # their means and the median of their p
    reference_only: float | None
    median_p: float | None


class AtEqualScore(Frozen):
    """Drift or forgetting of both methods where they have one task score; over pairs. Decides nothing."""

    method: Interval
    reference: Interval
    difference: Interval  # method - reference
    shares: tuple[float, float]  # of the updates, mean: method, reference
    score: float  # mean, on validation
    pairs: tuple[int, ...]
    run_ids: tuple[str, ...]


class ClaimResult(Frozen):
    """One claim on one task, judged over paired replicates."""

    claim: str  # as written in the study file
    task: str
    kind: ClaimKind
    method: str
    reference: str
    margin: float  # 0.03 for 3 %; 0 of a claim without one
    unit: Unit  # of the difference, and of the tested quantity where that is no drift
    verdict: Verdict
    reason: str  # one sentence in words
    difference: Interval | None  # method - reference: score, forgetting; drift as a share of the reference's
    contrast: Interval | None  # D_i, the tested quantity: method - (1 -/+ margin) * reference
    contrast_bound: float | None  # one-sided 95 % bound that the verdict rests on
    p_t: float | None  # one-sided t
    p_sign_flip: float | None  # one-sided exact sign-flip
    p_holm: float | None = None  # p_t after Holm over the study's claims
    p_against_holm: float | None = None  # 1 - p_t after Holm likewise: of the claim being refuted
    smallest_detectable: float | None = None  # difference detectable with 80 % power at this n
    seeds_needed: int | None = None  # to settle it at the observed effect and spread (80 % power)
    pairs: tuple[int, ...] = ()  # replicate numbers used
    missing: tuple[int, ...] = ()  # replicate numbers without a valid pair
    run_ids: tuple[str, ...] = ()
    effect: Effect | None = None  # None: no pair
    of_method: Denominator | None = None
    of_reference: Denominator | None = None
    on_examples: OnExamples | None = None  # of "within" alone
    at_equal_score: AtEqualScore | None = None  # of the others, where `interpolation` is measured


class AcrossTasks(Frozen):
    """A method beside the reference over all tasks of the study: a description of these tasks, no verdict."""

    method: str
    reference: str
    # Interquartile mean of score / reference's score over all pairs of all tasks (turned over where lower is
    # better), replicates drawn again within each task; None: fewer than two tasks have such ratios.
    relative: Bootstrapped | None
    left_out: dict[str, str]  # of `relative`: task -> why
    improvement: float  # mean over tasks of the share of pairs in which the method is better, ties as half
    pairs: dict[str, int]  # task -> pairs


class LedgerRow(Frozen):
    """What an arm was given and used, so that equal budgets can be seen."""

    task: str
    method: str
    trials_planned: int
    trials_done: int
    trials_diverged: int
    trials_failed: int
    replicates_planned: int
    replicates_done: int
    replicates_diverged: int
    replicates_failed: int
    attempts: int
    warm_start: WarmStart | None = None  # whose best trial the first guided one took its settings from
    search_stop: SearchStop | None = None  # that no more trials were made, as they would have gained too little
    search_ends: tuple[int, ...] = ()  # with halving: after which parts of the steps trials are compared
    search_counts: tuple[int, ...] = ()  # how many trials were trained to each of these ends
    search_tokens_whole: int | None = None  # that the same trials would have taken at full length
    search_steps: int
    search_tokens: int
    search_flops: float
    train_steps: int
    train_tokens: int
    train_flops: float
    train_rows: int | None
    learning_rate_decades: float | None
    edge_flags: tuple[str, ...]  # "learning_rate: high"
    shared_streams: bool  # replicate seeds equal those of the other arms of the task


class FailureRow(Frozen):
    run_id: str
    arm: str
    kind: Outcome
    reason: str
    attempts: int


class Meta(Frozen):
    """Where, when and with what; varies."""

    finetrial_version: str
    created_at: str
    home: str
    wall_seconds: float | None  # of the last `finetrial run`
    environment: dict[str, str]  # of the analysis: versions, platform
    run_rules: dict[str, Any]


class Summary(Frozen):
    schema_version: SummaryVersion = SUMMARY_VERSION
    study: str
    study_hash: str
    model: str
    model_revision: str | None
    model_gguf_file: str | None = None  # the file of it, where it is one
    model_changes: dict[str, Setting] = {}  # of its config, before anything was trained
    model_sha256: str | None
    complete: bool  # False: written from an unfinished study
    tasks: tuple[TaskSummary, ...]
    arms: tuple[ArmSummary, ...]
    claims: tuple[ClaimResult, ...]
    across: tuple[AcrossTasks, ...] = ()  # of studies with several tasks
    ledger: tuple[LedgerRow, ...]
    fairness_notes: tuple[str, ...]  # rules broken or worth knowing, in words
    failures: tuple[FailureRow, ...]
    environment: dict[str, str]  # with what the runs were made: versions, device, platform
    meta: Meta
