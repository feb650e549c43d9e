"""A realistic summary for tests of the report: two tasks, two methods, five seeds, failures, all four verdicts.

Not a result of anything: scores are drawn from a seeded generator, intervals computed with scipy. It has a
diverged trial, a void replicate, a missing pair, an optimum on a range's edge and a setting that was not
used as asked, so that every branch of the report has something to show.
"""

from __future__ import annotations

from itertools import combinations

import numpy as np
from scipy import stats

from finetrial.frozen import Setting
from finetrial.summary import (
    AcrossTasks,
    ArmCost,
    ArmSummary,
    AtEqualScore,
    Bootstrapped,
    ClaimResult,
    Control,
    Denominator,
    DimensionSummary,
    Discordant,
    Effect,
    FailureRow,
    LedgerRow,
    Meta,
    OnExamples,
    ReplicatePoint,
    SearchSummary,
    Summary,
    TaskSummary,
    TrialPoint,
    TuningCurve,
    Verdict,
)
from finetrial.summary_measures import (
    DriftSummary,
    ForgettingSummary,
    ForgottenPart,
    Interval,
    LayerDrift,
    SpectrumSummary,
)

SEEDS = 5
OTHER_DRIFTS = {"cka_standardised": 1.2, "rsa": 1.5, "neighbours": 2.0, "angle": 2.0, "relative_change": 3.0}
LAYERS = 7
TRIALS = 9
RANGES = {"full": (5e-6, 5e-4), "lora": (5e-5, 5e-3)}
MEANS = {("squad_v2", "full"): 58.9, ("squad_v2", "lora"): 58.1, ("sst2", "full"): 88.4, ("sst2", "lora"): 86.0}
DRIFTS = {
    ("squad_v2", "full"): 0.24,
    ("squad_v2", "lora"): 0.13,
    ("sst2", "full"): 0.15,
    ("sst2", "lora"): 0.17,
}


def interval_of(values: list[float]) -> Interval:
    """The two-sided 95 % t-interval of the mean."""
    array = np.asarray(values)
    mean = float(array.mean())
    if len(array) < 2:
        return Interval(estimate=mean, low=None, high=None, sd=None, n=len(array))
    sd = float(array.std(ddof=1))
    half = float(stats.t.ppf(0.975, len(array) - 1)) * sd / len(array) ** 0.5
    return Interval(estimate=mean, low=mean - half, high=mean + half, sd=sd, n=len(array))


def _search(task: str, method: str, rng: np.random.Generator) -> SearchSummary:
    low, high = RANGES[method]
    peak = MEANS[task, method] - 1.5
    trials = []
    for number in range(TRIALS):
        share = float(rng.uniform(0, 1)) if number < 3 else float(rng.uniform(0.45, 0.9))
        rate = low * (high / low) ** share
        outcome = "done"
        if method == "full" and number == 1:
            outcome, share, rate = "diverged", 0.995, high * 0.97
        if (task, method, number) == ("squad_v2", "lora", 2):
            outcome = "out_of_memory"
        score = float(peak - 30 * (share - 0.7) ** 2 + rng.normal(0, 0.3)) if outcome == "done" else None
        asked: dict[str, Setting] = {"learning_rate": rate, "epochs": 1 + number % 3, "batch_size": 16}
        if method == "lora":
            asked["rank"] = (4, 8, 16)[number % 3]
        trials.append(
            TrialPoint(
                run_id=f"trial.{task}.{method}.{number:03d}-0a1b2c3d",
                number=number,
                outcome=outcome,
                score=score,
                settings=asked,
                settings_used=asked if outcome == "done" else {},
                startup=number < 3,
            )
        )
    best = max((t for t in trials if t.score is not None), key=lambda t: t.score or 0.0)
    if (task, method) == ("sst2", "full"):
        trials[trials.index(best)] = best = best.model_copy(
            update={"settings_used": {**best.settings, "epochs": 9}}
        )
    edge = "high" if (task, method) == ("sst2", "lora") else None
    dimensions = [
        DimensionSummary(
            name="learning_rate",
            kind="range",
            low=low,
            high=high,
            log=True,
            optimum=best.settings["learning_rate"],
            edge=edge,
        ),
        DimensionSummary(name="epochs", kind="choice", choices=(1, 2, 3), optimum=best.settings["epochs"]),
        DimensionSummary(name="batch_size", kind="fixed", optimum=16),
    ]
    if method == "lora":
        dimensions.append(
            DimensionSummary(name="rank", kind="choice", choices=(4, 8, 16), optimum=best.settings["rank"])
        )
    return SearchSummary(
        trials=tuple(trials), curve=_curve(trials), best=best.run_id, best_score=best.score,
        dimensions=tuple(dimensions), rows=2000,
    )  # fmt: skip


def _curve(trials: list[TrialPoint]) -> TuningCurve:
    """Of the start-up trials: the mean over all subsets of n; the band is made up, and open above for LoRA."""
    drawn = [trial for trial in trials if trial.startup]
    scores = [0.0 if trial.score is None else trial.score for trial in drawn]
    expected = tuple(
        float(np.mean([max(some) for some in combinations(scores, n)])) for n in range(1, len(scores) + 1)
    )
    open_above = any("lora" in trial.run_id for trial in drawn)
    return TuningCurve(
        run_ids=tuple(trial.run_id for trial in drawn),
        without_score=sum(trial.score is None for trial in drawn),
        expected=expected,
        low=tuple(0.6 * value for value in expected),
        high=tuple(None if open_above else min(100.0, 1.2 * value) for value in expected),
    )


def _arm(task: str, method: str, rng: np.random.Generator) -> ArmSummary:
    metric = "f1" if task == "squad_v2" else "accuracy"
    other = "exact" if task == "squad_v2" else "matthews"
    replicates, scores, others = [], [], []
    for number in range(SEEDS):
        void = "the head did not move" if (task, method, number) == ("squad_v2", "full", 3) else None
        diverged = (task, method, number) == ("sst2", "lora", 4)
        score = None if diverged else float(MEANS[task, method] + (-30 if void else rng.normal(0, 0.5)))
        if score is not None and void is None:
            scores.append(score)
            others.append(score - 4.2)
        replicates.append(
            ReplicatePoint(
                run_id=f"replicate.{task}.{method}.{number:03d}-4d5e6f70",
                number=number,
                outcome="diverged" if diverged else "done",
                settings={},
                settings_used={},
                void=void,
                score=score,
                validation_score=score + 0.4 if score is not None else None,
                test={metric: score, other: score - 4.2} if score is not None else {},
                weights_sha256=None if diverged else f"{number}f" * 32,
                moved={} if diverged else {"head": 0.31, "body": 0.021},
            )
        )
    lora = method == "lora"
    seconds = [(61.0 if lora else 95.0) + float(rng.normal(0, 3)) for _ in range(len(scores))]
    search = _search(task, method, rng)
    best = next(trial for trial in search.trials if trial.run_id == search.best)
    trained_with = {"settings": best.settings, "settings_used": best.settings}
    replicates = [replicate.model_copy(update=trained_with) for replicate in replicates]
    return ArmSummary(
        task=task,
        method=method,
        search=search,
        replicates=tuple(replicates),
        test={metric: interval_of(scores), other: interval_of(others)},
        failed=SEEDS - len(scores),
        planned=SEEDS,
        drift=_drift(task, method, len(scores), rng),
        spectrum=_spectrum(task, method, len(scores)),
        forgetting=_forgetting(task, method, len(scores)),
        trainable_parameters=147_456 if lora else 22_565_378,
        total_parameters=22_713_986,
        saved_bytes=612_345 if lora else 90_272_656,
        cost=ArmCost(
            search_seconds=310.0 if lora else 402.0,
            train_seconds=sum(seconds),
            train_seconds_each=interval_of(seconds),
            peak_memory_bytes=710_000_000 if lora else 1_240_000_000,
            cpu_seconds=sum(seconds) * 1.9,
            device="cpu",
        ),
    )


def _drift(task: str, method: str, seeds: int, rng: np.random.Generator) -> DriftSummary:
    layers = []
    for layer in range(LAYERS):
        level = DRIFTS[task, method] * (layer / (LAYERS - 1)) ** 2
        cka = [float(level + abs(rng.normal(0, 0.012))) for _ in range(seeds)]
        cosine = [value * 1.3 for value in cka]
        layers.append(
            LayerDrift(
                layer=layer,
                cka=tuple(cka),
                cosine=tuple(cosine),
                cka_mean=float(np.mean(cka)),
                cosine_mean=float(np.mean(cosine)),
                seed_to_seed=tuple(0.4 * value for value in cka[1:]),
                perturbed=0.02 * layer,
                measures={"angle": 2 * level, "relative_change": 3 * level, "top_1": 0.31},
            )
        )
    blocks = [float(np.mean([layer.cka[i] for layer in layers[1:]])) for i in range(seeds)]
    return DriftSummary(
        probe_runs=tuple(f"probe.{task}.{method}.{i:03d}-99aabbcc" for i in range(seeds)),
        replicates=tuple(range(seeds)),
        layers=tuple(layers),
        cka=interval_of(blocks),
        cosine=interval_of([1.3 * b for b in blocks]),
        seed_to_seed=interval_of([0.4 * b for b in blocks[1:]]),
        perturbed=interval_of([0.07] * seeds),
        means={key: interval_of([scale * b for b in blocks]) for key, scale in OTHER_DRIFTS.items()},
        per_replicate={str(i): b for i, b in enumerate(blocks)},
    )


def _spectrum(task: str, method: str, seeds: int) -> SpectrumSummary:
    rank = 90.0 if method == "full" else 4.0
    intruders = 0.0 if method == "full" else 7.5
    flat = {"relative_change": 0.02, "effective_rank_mean": rank, "stable_rank_mean": rank / 3,
            "rank_for_energy_mean": rank / 2, "intruders": intruders}  # fmt: skip
    of_matrix = {
        "relative_change": 0.02,
        "effective_rank": rank,
        "stable_rank": rank / 3,
        "intruders": intruders / 4,
        "replicates": seeds,
    }
    names = [f"encoder.layer.{i}.{part}.weight" for i in range(2) for part in ("query", "output.dense")]
    return SpectrumSummary(
        probe_runs=tuple(f"probe.{task}.{method}.{i:03d}-99aabbcc" for i in range(seeds)),
        replicates=tuple(range(seeds)),
        matrices=len(names),
        overall={
            key: interval_of([value * (1 + 0.02 * i) for i in range(seeds)]) for key, value in flat.items()
        },
        directions=10 * len(names),
        thresholds=(0.3, 0.5, 0.7),
        intruder_curve=tuple(
            tuple(intruders * share * top / 10 for top in range(1, 11)) for share in (0.4, 1.0, 1.6)
        ),
        per_matrix=dict.fromkeys(names, of_matrix),
    )


def _forgetting(task: str, method: str, seeds: int) -> ForgettingSummary | None:
    """Of the arms on sst2 alone: squad_v2 has not measured it."""
    if task != "sst2":
        return None
    lost = [(1.2 if method == "lora" else 2.6) + 0.3 * i for i in range(seeds)]
    parts = [("mrpc", 72.5, True, lost), ("rte", 51.0, False, [0.4 - 0.1 * i for i in range(seeds)])]
    return ForgettingSummary(
        probe_runs=tuple(f"probe.{task}.{method}.{i:03d}-99aabbcc" for i in range(seeds)),
        replicates=tuple(range(seeds)),
        parts=tuple(
            ForgottenPart(
                name=name, kind="task", base=base, chance=50.4, readable=readable,
                tuned=interval_of([base - value for value in values]), forgotten=interval_of(values),
            )
            for name, base, readable, values in parts
        ),
        judged_by="tasks",
        forgotten=interval_of(lost),
        per_replicate={str(i): value for i, value in enumerate(lost)},
    )  # fmt: skip


def _claim(
    task: str,
    kind: str,
    verdict: Verdict,
    reason: str,
    values: list[float],
    contrast: list[float],
    **more: object,
) -> ClaimResult:
    said, margin, unit = {
        "within": ("lora within 3% of full", 0.03, "score"),
        "drifts_less": ("lora drifts 20% less than full", 0.2, "share"),
        "forgets_less": ("lora forgets less than full", 0.0, "points"),
    }[kind]
    fields = {
        "claim": said,
        "task": task,
        "kind": kind,
        "method": "lora",
        "reference": "full",
        "margin": margin,
        "unit": unit,
        "verdict": verdict,
        "reason": reason,
        "difference": interval_of(values),
        "contrast": interval_of(contrast),
        "contrast_bound": 0.21,
        "p_t": 0.0004,
        "p_sign_flip": 0.03125,
        "p_holm": 0.0016,
        "smallest_detectable": 1.1,
        "pairs": tuple(range(len(values))),
        "run_ids": (f"replicate.{task}.lora.000-4d5e6f70",),
        "effect": _effect(kind, values),
        "of_method": Denominator(planned=5, valid=4, absent={"diverged": 1}) if task == "sst2" else FIVE,
        "of_reference": FIVE if task == "sst2" else Denominator(planned=5, valid=4, absent={VOID: 1}),
        "on_examples": ON_EXAMPLES.get(task) if kind == "within" else None,
        "at_equal_score": AT_EQUAL_SCORE.get(kind) if task == "sst2" else None,
        **more,
    }
    return ClaimResult.model_validate(fields)


AT_EQUAL_SCORE = {
    kind: AtEqualScore(
        method=interval_of([value, value * 1.2]), reference=interval_of([value * 2, value * 2.2]),
        difference=interval_of([-value, -value * 1.1]), shares=(1.0, 0.62), score=88.1, pairs=(0, 1),
        run_ids=("probe.sst2.lora.000-99aabbcc", "probe.sst2.full.000-99aabbcc"),
    )
    for kind, value in (("drifts_less", 0.04), ("forgets_less", 0.8))
}  # fmt: skip
FIVE = Denominator(planned=5, valid=5, absent={})
VOID = "void, the head did not move"
ON_EXAMPLES = {
    # F1 by question is more than right or wrong.
    "squad_v2": OnExamples(
        examples=500, difference=Bootstrapped(estimate=-0.8, low=-2.1, high=0.6, draws=2000), left_out=None,
        discordant=(), method_only=None, reference_only=None, median_p=None,
    ),
    "sst2": OnExamples(
        examples=872, difference=None, left_out="the score is no mean over examples",
        discordant=(
            Discordant(number=0, method_only=20, reference_only=41, p=0.0096),
            Discordant(number=1, method_only=25, reference_only=52, p=0.0027),
        ),
        method_only=22.5, reference_only=46.5, median_p=0.00615,
    ),
}  # fmt: skip


def _effect(kind: str, values: list[float]) -> Effect:
    """d_z and its share above 0 are of the values; the ratio of drifts is not bounded."""
    d = float(np.mean(values) / np.std(values, ddof=1))
    ratio = {"within": 0.98, "drifts_less": 0.6}.get(kind)
    return Effect(
        g=0.8 * d, g_low=0.8 * d - 2, g_high=0.8 * d + 2,
        above=float(np.mean([value > 0 for value in values])),
        ratio=ratio,
        ratio_low=0.95 if kind == "within" else None,
        ratio_high=1.01 if kind == "within" else None,
        p_unpaired=0.0009,
    )  # fmt: skip


def _claims() -> tuple[ClaimResult, ...]:
    return (
        _claim(
            "squad_v2",
            "within",
            "not_assessable",
            "full beats the no_answer baseline by 2.2 points, less than twice the margin of 1.8",
            [-0.9, -0.5, -1.1, -0.7],
            [0.9, 1.3, 0.6, 1.1],
            missing=(3,),
        ),
        _claim(
            "squad_v2",
            "drifts_less",
            "supported",
            "the upper bound of the change is below the margin",
            [-0.44, -0.47, -0.41, -0.46],
            [-0.06, -0.07, -0.05, -0.06],
            missing=(3,),
        ),
        _claim(
            "sst2",
            "within",
            "inconclusive",
            "the interval holds the margin",
            [-2.4, -3.1, -1.6, -2.7],
            [0.2, -0.5, 1.0, -0.1],
            missing=(4,),
            seeds_needed=9,
            p_t=0.31,
            p_holm=0.62,
        ),
        _claim(
            "sst2",
            "drifts_less",
            "refuted",
            "the whole interval lies above the margin",
            [0.12, 0.15, 0.10, 0.16],
            [0.05, 0.06, 0.04, 0.06],
            missing=(4,),
            p_t=0.999,
            p_holm=1.0,
        ),
        _claim(
            "sst2",
            "forgets_less",
            "supported",
            "the upper bound of the difference is below 0",
            [-1.4, -1.2, -1.5, -1.3],
            [-1.4, -1.2, -1.5, -1.3],
            missing=(4,),
        ),
    )


def _ledger(arm: ArmSummary) -> LedgerRow:
    ends = [trial.outcome for trial in arm.search.trials]
    runs = [run.outcome for run in arm.replicates]
    return LedgerRow(
        task=arm.task,
        method=arm.method,
        trials_planned=TRIALS,
        trials_done=ends.count("done"),
        trials_diverged=ends.count("diverged"),
        trials_failed=ends.count("out_of_memory"),
        replicates_planned=SEEDS,
        replicates_done=runs.count("done"),
        replicates_diverged=runs.count("diverged"),
        replicates_failed=0,
        attempts=TRIALS + SEEDS + 1,
        search_steps=2250,
        search_tokens=4_812_345,
        search_flops=6.5e14,
        train_steps=1360,
        train_tokens=3_412_000,
        train_flops=4.6e14,
        train_rows=4350,
        learning_rate_decades=2.0,
        shared_streams=True,
        edge_flags=("learning_rate: high",) if (arm.task, arm.method) == ("sst2", "lora") else (),
    )


def example_summary() -> Summary:
    """The summary, the same on every call."""
    rng = np.random.default_rng(20261101)
    arms = tuple(_arm(task, method, rng) for task in ("squad_v2", "sst2") for method in ("full", "lora"))
    baselines = {
        "squad_v2": {"no_answer": {"f1": 56.7, "exact": 56.7}, "untrained": {"f1": 50.3, "exact": 50.1}},
        "sst2": {
            "majority": {"accuracy": 50.9, "matthews": 0.0},
            "untrained": {"accuracy": 49.1, "matthews": -1.8},
        },
    }
    tasks = tuple(
        TaskSummary(
            name=name,
            metric=metric,
            higher_is_better=True,
            split_rows={"train": 4350, "validation": 400, "test": 872},
            baselines=baselines[name],
            baseline_run=f"baseline.{name}.000-12345678",
            controls=tuple(
                Control(
                    name=control,
                    run_id=run,
                    drift=(0.0,) * LAYERS,
                    update=0.0,
                    forgotten={"mrpc": 0.0, "rte": 0.0} if name == "sst2" else {},
                )
                for control, run in (
                    ("base against base", f"probe.{name}.000-87654321"),
                    ("frozen body", f"baseline.{name}.frozen-body.000-87654321"),
                )
            ),
        )
        for name, metric in (("squad_v2", "f1"), ("sst2", "accuracy"))
    )
    return Summary(
        study="squad-and-sst2-minilm",
        study_hash="3f9c21aa7be04d11",
        model="sentence-transformers/all-MiniLM-L6-v2",
        model_revision="c9745ed1d9f207416be6d2e6f8de32d1f16199bf",
        model_sha256="ab" * 32,
        complete=True,
        tasks=tasks,
        arms=arms,
        claims=_claims(),
        across=(
            AcrossTasks(
                method="lora",
                reference="full",
                improvement=0.125,
                left_out={},
                pairs={"squad_v2": 4, "sst2": 4},
                relative=Bootstrapped(estimate=0.979, low=0.972, high=0.986, draws=2000),
            ),
        ),
        ledger=tuple(_ledger(arm) for arm in arms),
        fairness_notes=(
            "sst2/lora: the best learning rate lies at the high end of its range; widen it and search again.",
            "squad_v2/full: one replicate is void, so its pair is left out of the claims.",
        ),
        failures=(
            FailureRow(
                run_id="trial.squad_v2.full.001-0a1b2c3d",
                arm="squad_v2/full",
                kind="diverged",
                reason="loss is not finite at step 41",
                attempts=1,
            ),
            FailureRow(
                run_id="trial.sst2.full.001-0a1b2c3d",
                arm="sst2/full",
                kind="diverged",
                reason="loss above its start for 50 steps",
                attempts=1,
            ),
            FailureRow(
                run_id="trial.squad_v2.lora.002-0a1b2c3d",
                arm="squad_v2/lora",
                kind="out_of_memory",
                reason="does not fit at micro-batch 1",
                attempts=3,
            ),
            FailureRow(
                run_id="replicate.sst2.lora.004-4d5e6f70",
                arm="sst2/lora",
                kind="diverged",
                reason="gradient norm is not finite at step 12",
                attempts=1,
            ),
        ),
        environment={
            "torch": "2.13.0 (36 runs), 2.14.0 (1 run: trial.squad_v2.lora.002-0a1b2c3d)",
            "device": "cpu",
        },
        meta=Meta(
            finetrial_version="0.1.0",
            created_at="2026-11-01T12:00:00+00:00",
            home="runs/squad-and-sst2-minilm",
            wall_seconds=7512.0,
            environment={"python": "3.11.9", "torch": "2.13.0", "platform": "Linux"},
            run_rules={"engine": "local", "parallel": 1},
        ),
    )
