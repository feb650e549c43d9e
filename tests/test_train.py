"""The training loop: settings that arrive, one set of random streams, whole-batch losses, divergence."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from finetrial import checkpoint, plugins
from finetrial.assemble import open_workbench
from finetrial.batching import collate, epoch_batches, model_inputs
from finetrial.errors import Diverged
from finetrial.fair_time import FAIR
from finetrial.optimisation import evaluation_steps, prepare_optimisation
from finetrial.records import EarlyStopping, LoopRules, RunSpec
from finetrial.space import COMMON_SPACE, Choice, Dimension, Range
from finetrial.train import make_accelerator
from finetrial.training_state import Clock, Progress, guard
from fragile import TROUBLE
from tiny_runs import folder_of, make_spec, records, run

pytestmark = pytest.mark.usefixtures("no_trouble")


# ---- which weights are kept, and when to stop ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("keep", "patience", "min_delta", "scores", "stops_at", "kept"),
    [
        ("best", 2, 0.0, [50.0, 30.0, 40.0, 60.0], 3, 1),
        ("last", 2, 0.0, [50.0, 30.0, 40.0, 60.0], 3, 3),  # against the best, not against the last
        ("best", 3, 0.0, [50.0, 30.0, 40.0, 60.0], None, 4),
        ("last", 3, 0.0, [50.0, 30.0, 60.0, 40.0], None, 4),
        ("best", 2, 5.0, [50.0, 52.0, 54.0, 70.0], 3, 3),  # better, and not by enough to go on
        ("best", 2, 0.0, [50.0, 50.0, 50.0, 50.0], 3, 1),  # of equals the first
    ],
)
def test_stopping_and_keeping_follow_the_scores(
    tiny_bert, tmp_path, keep, patience, min_delta, scores, stops_at, kept
):
    TROUBLE.reset(scores=scores)
    stopping = EarlyStopping(patience=patience, min_delta=min_delta)
    spec = make_spec(
        tiny_bert,
        "full",
        stage="trial",
        settings={"epochs": 4},
        rules={"keep": keep, "early_stopping": stopping},
    )
    result = run(spec, tmp_path)
    assert result.training.stopped_early == (stops_at is not None)
    assert result.training.steps == 6 * (stops_at or 4)
    assert result.training.best_step == 6 * kept
    assert result.score == result.scores["validation"]["f1"] == scores[kept - 1]


@pytest.mark.parametrize("stage", ["replicate", "baseline"])
def test_what_is_tested_are_the_best_evaluations_weights(tiny_bert, tmp_path, stage):
    """The first evaluation is the best: so are the weights of a run that ends there."""
    settings, rules = {"warmup_ratio": 0.0}, {"schedule": "constant"}
    TROUBLE.reset(scores=[50.0, 30.0, 40.0, 50.0])
    spec = make_spec(tiny_bert, "frozen", stage=stage, settings=settings | {"epochs": 3}, rules=rules)
    best = run(spec, tmp_path / "best")
    TROUBLE.reset(scores=[50.0, 50.0])
    spec = make_spec(tiny_bert, "frozen", stage=stage, settings=settings | {"epochs": 1}, rules=rules)
    assert run(spec, tmp_path / "short").weights_sha256 == best.weights_sha256


def test_no_more_is_decayed_than_matrices(tiny_bert, tmp_path):
    """Biases and norm weights are left alone, as is usual for transformers."""
    spec = make_spec(tiny_bert, "full", settings={"weight_decay": 0.07})
    model, _ = open_workbench(spec, folder_of(spec, tmp_path).home).build_tuned()
    accelerator = make_accelerator(spec.rules)
    optimizer, _ = prepare_optimisation(accelerator, list(model.parameters()), spec, 10)
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decays == {id(p): 0.07 if p.ndim > 1 else 0.0 for p in model.parameters()}


def test_keep_best_scores_and_keeps_the_best_evaluation(tiny_bert, tmp_path):
    settings = {"epochs": 5, "learning_rate": 1e-2}
    result = run(spec := make_spec(tiny_bert, "full", settings=settings), tmp_path)
    scores = {r["step"]: r["score"] for r in records(spec, tmp_path) if r["kind"] == "eval"}
    assert result.score == max(scores.values())
    assert scores[result.training.best_step] == result.score
    shorter = make_spec(tiny_bert, "full", settings=settings, rules={"keep": "last"})
    last = run(shorter, tmp_path)
    assert (last.weights_sha256 == result.weights_sha256) == (result.training.best_step == last.training.steps)


# ---- every searched dimension reaches the optimiser ------------------------------------------------------


def dimensions() -> list[tuple[str, str, Dimension]]:
    return [
        (method, name, dimension)
        for method in plugins.names("methods")
        for name, dimension in {**COMMON_SPACE, **plugins.load("methods", method).space}.items()
    ]


def two_values(dimension: Dimension) -> tuple[Any, Any]:
    match dimension:
        case Range():
            return dimension.low, dimension.high
        case Choice():
            return dimension.choices[0], dimension.choices[-1]
    raise AssertionError(f"{dimension} is not searched")


def middle(method: str) -> dict[str, Any]:
    space = {**COMMON_SPACE, **plugins.load("methods", method).space}
    return {name: two_values(dimension)[1] for name, dimension in space.items()}


@pytest.mark.parametrize(
    ("method", "name", "dimension"), dimensions(), ids=lambda v: v if isinstance(v, str) else ""
)
def test_a_searched_setting_reaches_the_optimiser_and_changes_the_weights(
    tiny_bert, tmp_path, method, name, dimension
):
    others = {**middle(method), "epochs": 1, "batch_size": 4}  # shorter, where they are not the question
    low, high = two_values(dimension)
    common = {"stage": "trial", "task_params": {"rows": 48}}
    first, second = (
        run(make_spec(tiny_bert, method, settings={**others, name: value}, **common), tmp_path)
        for value in (low, high)
    )
    assert first.settings_used[name] == low
    assert second.settings_used[name] == high
    for other in others.keys() - {name}:
        assert first.settings_used[other] == second.settings_used[other] == others[other]
    assert first.weights_sha256 != second.weights_sha256


def test_a_batch_larger_than_the_data_is_recorded_as_it_was(tiny_bert, tmp_path):
    spec = make_spec(tiny_bert, "full", stage="trial", settings={"batch_size": 64, "epochs": 1})
    result = run(spec, tmp_path)
    assert result.settings_used["batch_size"] == 24
    assert result.training.steps == 1


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("warmup_ratio", [0.0, 0.25, 1.0])
def test_the_warm_up_read_back_is_the_one_asked_for(tiny_bert, tmp_path, schedule, warmup_ratio):
    settings = {"warmup_ratio": warmup_ratio, "epochs": 2, "batch_size": 6}
    spec = make_spec(
        tiny_bert, "lora", stage="trial", settings=settings, rules={"schedule": schedule}, how={"log_steps": 1}
    )
    used = run(spec, tmp_path).settings_used
    assert (used["warmup_ratio"], used["warmup_steps"]) == (warmup_ratio, round(8 * warmup_ratio))
    rates = [r["learning_rate"] for r in records(spec, tmp_path) if r["kind"] == "train"]
    warmup = round(8 * warmup_ratio)
    shapes = {
        "linear": lambda step: (8 - step) / (8 - warmup),
        "cosine": lambda step: (1 + math.cos(math.pi * (step - warmup) / (8 - warmup))) / 2,
        "constant": lambda step: 1.0,
    }
    expected = [step / warmup if step < warmup else shapes[schedule](step) for step in range(8)]
    assert rates == pytest.approx([3e-3 * share for share in expected])


# ---- one loop, one set of random streams ----------------------------------------------------------------


def batches_seen(spec: RunSpec, home: Path) -> list[list[list[int]]]:
    TROUBLE.reset()
    run(spec, home)
    return TROUBLE.batches


def test_two_methods_of_a_replicate_see_the_same_batches_and_start_from_the_same_head(tiny_bert, tmp_path):
    full, lora = make_spec(tiny_bert, "full"), make_spec(tiny_bert, "lora")
    seen = batches_seen(full, tmp_path)
    assert len(seen) == 12
    assert batches_seen(lora, tmp_path) == seen
    heads = []
    for spec in (full, lora):
        model, built = open_workbench(spec, folder_of(spec, tmp_path).home).build_tuned()
        trained = checkpoint.trained_tensors(model)
        heads.append([t for name, t in trained.items() if "qa_outputs" in name])
        assert built.head_names == ("qa_outputs",)
    assert len(heads[0]) == len(heads[1]) == 2
    for one, other in zip(*heads, strict=True):
        assert torch.equal(one, other)
    assert float(heads[0][0].detach().std()) > 0


@pytest.mark.parametrize("stream", ["data_order", "head", "adapter", "dropout"])
def test_a_seed_changes_its_own_stream_and_no_other(tiny_bert, tmp_path, stream):
    def facts(spec: RunSpec) -> dict[str, Any]:
        model, _ = open_workbench(spec, folder_of(spec, tmp_path).home).build_tuned()
        trained = checkpoint.trained_tensors(model)
        of = lambda part: {n: t.detach().clone() for n, t in trained.items() if part in n}  # noqa: E731
        seen = batches_seen(spec, tmp_path)
        return {"data_order": seen, "head": of("qa_outputs"), "adapter": of("lora_A")}

    def same(one: Any, other: Any) -> bool:
        if isinstance(one, dict):
            return all(torch.equal(one[name], other[name]) for name in one)
        return one == other

    spec, changed = (make_spec(tiny_bert, "lora", seeds={stream: seed}) for seed in (70, 71))
    one, other = facts(spec), facts(changed)
    assert {name for name in one if not same(one[name], other[name])} == {stream} - {"dropout"}
    first, second = (records(each, tmp_path) for each in (spec, changed))
    assert first != second  # each of them matters


def test_the_order_is_the_documented_function_of_seed_and_epoch(tiny_bert, tmp_path):
    spec = make_spec(tiny_bert, "full")
    bench = open_workbench(spec, folder_of(spec, tmp_path).home)
    features = bench.encode(bench.splits.train, bench.build_base())
    lengths = [len(feature.input_ids) for feature in features]
    expected = [
        [features[i].input_ids for i in batch]
        for epoch in (0, 1)
        for batch in epoch_batches(lengths, 4, seed=1, epoch=epoch)
    ]
    assert batches_seen(spec, tmp_path) == expected


# ---- whole-batch losses ----------------------------------------------------------------------------------


def test_the_micro_batch_changes_no_loss_and_no_gradient_norm(tiny_llama, tmp_path):
    # A Llama has no dropout; its windows have different lengths, so micro-batches pad differently.
    settings = {"batch_size": 6, "learning_rate": 1e-4}
    found = {}
    for micro in (None, 1, 2, 4):  # 4 leaves a rest of 2
        how = {"micro_batch": micro, "log_steps": 1}
        spec = make_spec(tiny_llama, "full", settings=settings, how=how)
        result = run(spec, tmp_path / str(micro))
        trained = [r for r in records(spec, tmp_path / str(micro)) if r["kind"] == "train"]
        found[micro] = [(r["loss"], r["gradient_norm"]) for r in trained]
        assert len(found[micro]) == result.training.steps == 8
        assert result.training.padded_tokens >= result.training.tokens
    for micro in (1, 2, 4):
        for one, other in zip(found[micro], found[None], strict=True):
            assert one == pytest.approx(other, rel=1e-5)
        assert found[micro][0][0] == pytest.approx(found[None][0][0], rel=1e-6)


def test_losses_rates_and_clipping_are_those_of_a_plain_torch_loop(tiny_llama, tmp_path):
    """Written out here from the definitions: AdamW, linear warm-up and decay, clipping at the global norm."""
    norm_limit, rate, warmup, steps = 3.3, 1e-3, 2, 12
    spec = make_spec(
        tiny_llama, "full", stage="trial", how={"log_steps": 1, "micro_batch": 2},
        settings={"learning_rate": rate, "warmup_ratio": warmup / steps, "weight_decay": 0.1},
        rules={"max_grad_norm": norm_limit},
    )  # fmt: skip
    run(spec, tmp_path)
    ours = [r for r in records(spec, tmp_path) if r["kind"] == "train"]
    assert len({r["gradient_norm"] > norm_limit for r in ours}) == 2  # clipped, and not

    bench = open_workbench(spec, folder_of(spec, tmp_path).home)
    model, built = bench.build_tuned()
    features = bench.encode(bench.splits.train, built)
    lengths = [len(feature.input_ids) for feature in features]
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    kept = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": kept, "weight_decay": 0.0}]
    )
    order = [b for epoch in (0, 1) for b in epoch_batches(lengths, 4, seed=1, epoch=epoch)]
    for step, (indices, record) in enumerate(zip(order, ours, strict=True)):
        for group in optimizer.param_groups:
            group["lr"] = rate * (step / warmup if step < warmup else (steps - step) / (steps - warmup))
        batch = collate([features[i] for i in indices], 0)
        outputs = model(**model_inputs(batch))
        ends = [
            torch.nn.functional.cross_entropy(
                logits.masked_fill(batch["attention_mask"] == 0, -torch.inf), batch[name]
            )
            for logits, name in (
                (outputs.start_logits, "start_positions"),
                (outputs.end_logits, "end_positions"),
            )
        ]
        loss = sum(ends) / 2
        optimizer.zero_grad()
        loss.backward()
        norm = math.sqrt(math.fsum(float((p.grad.double() ** 2).sum()) for p in model.parameters()))
        for parameter in model.parameters():
            parameter.grad *= min(1.0, norm_limit / norm)
        optimizer.step()
        assert record["loss"] == pytest.approx(float(loss.detach()), rel=1e-4)
        assert record["gradient_norm"] == pytest.approx(norm, rel=1e-3)
    assert ours[-1]["learning_rate"] == pytest.approx(rate / (steps - warmup))


def test_what_a_run_took_before_its_loop_counts_as_neither_training_nor_evaluation():
    progress, (wall, cpu) = Progress(), FAIR.now()
    Clock(progress, (wall - 5.0, cpu - 3.0))
    assert (progress.wall_seconds, progress.cpu_seconds) == pytest.approx((5.0, 3.0), abs=0.5)
    assert (progress.train_seconds, progress.evaluate_seconds) == (0.0, 0.0)


# ---- divergence -------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_a_number_ends_the_run_at_that_step(tiny_bert, tmp_path):
    TROUBLE.reset(nan_loss_at=5)
    spec = make_spec(tiny_bert, "full", how={"log_steps": 1})
    result = run(spec, tmp_path)
    assert (result.outcome, result.reason) == ("diverged", "diverged at step 5: the loss is nan")
    assert (result.score, result.weights_sha256) == (None, None)
    assert result.training.steps == 5
    assert result.training.tokens > 0
    assert result.cost.flops > 0
    found = records(spec, tmp_path)
    assert [r["step"] for r in found] == [1, 2, 3, 4, 5]
    assert (found[-1]["kind"], found[-1]["reason"]) == ("diverged", "the loss is nan")


def test_an_absurd_learning_rate_diverges(tiny_bert, tmp_path):
    result = run(make_spec(tiny_bert, "full", settings={"learning_rate": 1e30}), tmp_path)
    assert result.outcome == "diverged"
    assert "diverged at step" in result.reason


@pytest.mark.parametrize("method", ["full", "lora", "frozen"])
def test_a_learning_rate_of_ten_diverges_within_twenty_steps(tiny_bert, tmp_path, method):
    settings = {"learning_rate": 10.0, "epochs": 8}
    result = run(make_spec(tiny_bert, method, settings=settings), tmp_path)
    assert result.outcome == "diverged"
    assert result.training.planned_steps > 20
    assert result.training.steps <= 20


@pytest.mark.parametrize(
    ("later", "step"),
    [
        ([1.9] * 30, None),  # above, not far above
        ([2.1] * 30, 5 + 3),  # three steps
        ([2.1, 2.1, 1.0, 2.1, 2.1, 2.1], 5 + 6),  # in a row
        ([2.1, math.nan], 5 + 2),
    ],
)
def test_a_loss_that_stays_far_above_its_start_has_diverged(later, step):
    progress, rules = Progress(), LoopRules(divergence_factor=2.0, divergence_steps=3)
    seen = None
    for progress.step, loss in enumerate([0.8, 1.2, 1.0, 1.1, 0.9, *later], start=1):
        try:
            guard(progress, rules, loss)
        except Diverged as diverged:
            seen = diverged.step
            break
    assert seen == step


def test_one_lucky_first_batch_and_a_loss_below_zero_are_no_divergence():
    for losses in ([0.1] + [0.7] * 30, [-2.0] * 5 + [-1.0] * 30, [0.0] + [0.3] * 30):
        progress, rules = Progress(), LoopRules(divergence_factor=2.0, divergence_steps=3)
        for progress.step, loss in enumerate(losses, start=1):
            guard(progress, rules, loss)


def test_an_explosion_in_the_first_steps_is_not_taken_for_the_start():
    progress, rules = Progress(), LoopRules(divergence_factor=2.0, divergence_steps=3)
    for progress.step, loss in enumerate([1.0, 50.0, 60.0], start=1):
        guard(progress, rules, loss)
    progress.step = 4
    with pytest.raises(Diverged, match=r"the loss, 70, was above 2 times its start of 10 for 3 steps"):
        guard(progress, rules, 70.0)


@pytest.mark.parametrize(
    ("starts", "later", "said"),
    [
        ([2.0], [99.0, 100.0], None),  # 50 times, not more
        ([2.0], [99.0, 101.0, 1.0], "step 2: the trained weights are 50.5 times as large as at the start"),
        ([0.0, 0.001], [4.9, 5.0], None),  # an adapter, or a head, may grow from nothing
        ([0.0, 0.001], [4.9, 5.1], "step 2: the trained weights are 51 times as large as at the start"),
        ([2.0], [2.0, math.nan], "step 2: the trained weights' size is nan"),
        ([2.0, 2.0, 2.0], [math.inf], "step 1: the trained weights' size is nan"),
    ],
)
def test_weights_far_from_their_start_have_diverged_whatever_the_loss_says(starts, later, said):
    progress, rules = Progress(first_weight_sizes=starts), LoopRules(divergence_growth=50.0)
    seen = None
    for progress.step, size in enumerate(later, start=1):
        progress.weigh([size] * len(starts))
        try:
            guard(progress, rules, 0.7)
        except Diverged as diverged:
            seen = f"step {diverged.step}: {diverged.reason}"
            break
    assert seen == said


def test_weights_are_looked_at_in_the_first_twenty_steps_and_at_every_fourth(tiny_bert, tmp_path):
    settings = {"epochs": 4, "batch_size": 4}
    spec = make_spec(tiny_bert, "full", settings=settings, how={"log_steps": 1})
    run(spec, tmp_path)
    growth = {r["step"]: r["weight_growth"] for r in records(spec, tmp_path) if r["kind"] == "train"}
    changed = [step for step in sorted(growth) if step > 1 and growth[step] != growth[step - 1]]
    assert changed == [*range(2, 21), 24]
    assert max(growth) == 24


def test_half_of_the_tensors_must_have_grown_but_one_that_is_not_finite_is_enough():
    progress = Progress(first_weight_sizes=[1.0, 1.0, 1.0])
    progress.weigh([1.0, 2.0, 1000.0])
    assert progress.weight_growth == 2.0
    progress.weigh([1.0, 2.0, math.nan])
    with pytest.raises(Diverged, match="the trained weights' size is nan"):
        guard(progress, LoopRules(), 0.7)


@pytest.mark.parametrize(
    ("evaluation", "step"), [(1, 6), (2, 12), (3, 12)], ids=["first", "last", "test split"]
)
def test_logits_that_are_not_numbers_diverge_at_the_step_they_were_seen(tiny_bert, tmp_path, evaluation, step):
    TROUBLE.reset(nan_logits_at_evaluation=evaluation)
    result = run(make_spec(tiny_bert, "full"), tmp_path)
    assert result.outcome == "diverged"
    assert result.reason.startswith(f"diverged at step {step}: non-finite logits")


def test_a_score_that_is_not_a_number_diverges(tiny_bert, tmp_path):
    TROUBLE.reset(scores=[math.nan])
    result = run(make_spec(tiny_bert, "full"), tmp_path)
    assert (result.outcome, result.reason) == ("diverged", "diverged at step 6: the score is nan")


# ---- when to evaluate -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("planned", "per_epoch", "evaluations", "expected"),
    [
        (12, 6, 1, {6, 12}),
        (12, 6, 2, {3, 6, 9, 12}),
        (7, 6, 1, {6, 7}),
        (3, 6, 1, {3}),
        (2, 2, 5, {1, 2}),
        (1, 1, 1, {1}),
    ],
)
def test_evaluations_are_spread_over_the_epochs_and_end_with_the_last_step(
    planned, per_epoch, evaluations, expected
):
    assert evaluation_steps(planned, per_epoch, evaluations) == expected
