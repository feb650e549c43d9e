"""What a worker does for each stage: baseline, check, trial, replicate, probe. Child side; gives a Result."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace
from pathlib import Path
from typing import Any

from finetrial import checkpoint, files, models
from finetrial.account import Clock, cost_of, environment, split_rows
from finetrial.assemble import Workbench, input_hash, open_workbench
from finetrial.batching import EVALUATION_TOKENS
from finetrial.errors import Diverged, HomeError
from finetrial.evaluation import Kept, evaluate
from finetrial.fit import Ladder
from finetrial.frozen import canonical_json
from finetrial.loop import Turn
from finetrial.measuring import keep_and_measure, measure
from finetrial.notice import termination_notice
from finetrial.optimisation import plan_steps
from finetrial.process_memory import keep_to, peak_bytes
from finetrial.proof import prove
from finetrial.records import Fit, Result, RunSpec, Training
from finetrial.rehearsal import rehearse
from finetrial.store import MODEL_OWNER, RunFolder
from finetrial.train import alone, make_accelerator, train
from finetrial.training_state import Progress


def run(spec: RunSpec, folder: RunFolder) -> Result:
    """Do what a spec says and give its result; resumes by itself from what the folder holds."""
    if spec.stage in ("trial", "replicate") or (spec.stage == "baseline" and spec.method):
        return alone(training(spec, folder))
    stages = {"baseline": _baseline, "check": rehearse, "probe": _probe}
    return stages[spec.stage](spec, folder)


def _baseline(spec: RunSpec, folder: RunFolder) -> Result:
    """Scores that need no training: the task's trivial answers and the model with a fresh head."""
    clock = Clock()
    bench = open_workbench(spec, folder.home)
    built = bench.build_base()
    models.check_finite(built.model, spec.model)
    accelerator = make_accelerator(spec.rules)
    model = accelerator.prepare(built.model)
    splits = (("validation", bench.splits.validation), ("test", bench.splits.test))
    judged = [(split, examples, bench.encode(examples, built)) for split, examples in splits]
    scores, hashes, calibration = {}, {}, None
    tokens = EVALUATION_TOKENS >> folder.out_of_memory()
    with termination_notice() as asked:
        for split, examples, features in judged:
            scored = evaluate(
                accelerator, model, bench, built.tokenizer, features, examples, calibration, tokens=tokens,
                kept=Kept(folder.checkpoint, split, spec.how, asked),
            )  # fmt: skip
            calibration = calibration or scored.calibration
            scores[split], hashes[split] = scored.metrics, input_hash(features)
    return Result(
        run_id=spec.run_id,
        outcome="done",
        scores=scores,
        calibration=calibration or {},
        cost=cost_of(clock, model),
        input_sha256=hashes,
        split_rows=split_rows(bench),
        measures={
            "baselines": bench.task.head.baselines(bench.splits, bench.task_params),
            # What trials are compared with, for they are scored there.
            "validation_baselines": bench.task.head.baselines(
                replace(bench.splits, test=bench.splits.validation), bench.task_params
            ),
        },
        environment=environment(spec),
    )


def training(spec: RunSpec, folder: RunFolder) -> Generator[Turn, float, Result]:
    """Train and score on validation: a trial. A replicate also scores on test and keeps its model; the frozen
    body scores on test and is measured at once. Every step waits for its gradients."""
    clock, progress = Clock(), Progress()
    bench = open_workbench(spec, folder.home)
    shapes, built = bench.build_tuned(shapes_only=True)
    features = bench.encode(bench.splits.train, built)
    validation = bench.encode(bench.splits.validation, built)
    test = bench.encode(bench.splits.test, built) if spec.stage != "trial" else []
    ladder = Ladder(bench, shapes, features, [validation, test], built)
    tokens = sum(len(feature.input_ids) for feature in features)
    folder.event("encoded", inputs=len(features), tokens=tokens, validation_inputs=len(validation))
    mine, before = folder.fit(), folder.before(spec)
    earlier = before.fit() if before else None
    halvings = folder.out_of_memory() + (earlier.halvings if ladder.is_as(earlier) else 0)
    fit = ladder.choose(halvings, earlier=mine or earlier)
    if fit != mine:
        folder.write_fit(fit)
    keep_to(fit)
    folder.event("fitted", **fit.model_dump(mode="json", exclude={"schema_version"}))
    model, built = bench.build_tuned()
    hashes = {"train": input_hash(features), "validation": input_hash(validation)}
    scored = None
    try:
        with termination_notice() as asked:
            trained = yield from train(
                bench,
                folder,
                model,
                built.tokenizer,
                features,
                validation,
                progress,
                fit,
                asked,
                (clock.wall, clock.cpu),
            )
            peak = peak_bytes()  # of training: what comes after holds a second model
            folder.event("trained", step=progress.step, peak_bytes=peak, micro_batches=progress.micro_batches)
            if spec.stage != "trial":
                hashes["test"] = input_hash(test)
                scored = evaluate(
                    trained.accelerator, trained.model, bench, built.tokenizer, test, bench.splits.test,
                    progress.best_calibration, tokens=fit.evaluation_tokens,
                    kept=Kept(folder.checkpoint, "test", spec.how, asked),
                )  # fmt: skip
    except Diverged as diverged:
        reason = str(Diverged(diverged.step or progress.step, diverged.reason))
        return Result(
            run_id=spec.run_id, outcome="diverged", reason=reason,
            cost=cost_of(clock, model, progress, fit=fit),
            training=_training_facts(bench, progress, len(features), fit),
            input_sha256=hashes, split_rows=split_rows(bench), environment=environment(spec),
        )  # fmt: skip
    scores = {"validation": progress.best_metrics}
    per_example = {"validation": progress.best_per_example}
    if spec.may_go_on:
        per_example["validation_loss"] = progress.losses
    saved_bytes, measures = 0, {}
    if scored is not None:
        scores["test"], per_example["test"] = scored.metrics, scored.per_example
    if spec.measures:
        tokens = EVALUATION_TOKENS >> folder.out_of_memory()
        whole = trained.accelerator.unwrap_model(trained.model)
        measures = keep_and_measure(
            bench, folder, whole, built.tokenizer, spec.measures, tokens=tokens
        ).measures
    if spec.stage == "replicate":
        saved_bytes = _save_model(bench, folder, trained.model, built.tokenizer)
        folder.event("model saved", bytes=saved_bytes)
    files.write_json(folder.examples_file, per_example)
    return Result(
        run_id=spec.run_id,
        outcome="done",
        score=progress.best_score,
        validation_loss=progress.loss if spec.may_go_on else None,
        scores=scores,
        calibration=progress.best_calibration,
        measures=measures,
        settings_used=trained.settings_used,
        training=_training_facts(bench, progress, len(features), fit),
        proof=prove(bench, trained.model),
        cost=cost_of(clock, trained.model, progress, saved_bytes, peak, fit),
        # Those that were tested; a trial keeps none, so those of its last step.
        weights_sha256=checkpoint.weights_hash(checkpoint.trained_tensors(trained.model)),
        examples_sha256=files.sha256_file(folder.examples_file),
        input_sha256=hashes,
        split_rows=split_rows(bench),
        environment=environment(spec),
    )


def _probe(spec: RunSpec, folder: RunFolder) -> Result:
    """Measure one replicate's model (or, as the control, the base itself) against the base."""
    clock = Clock()
    bench = open_workbench(spec, folder.home)
    built = bench.build_base()
    tuned = _load_replicate(bench, folder, spec.subject) if spec.subject else bench.build_base().model
    neighbour = _load_replicate(bench, folder, spec.reference) if spec.reference else None
    tokens = EVALUATION_TOKENS >> folder.out_of_memory()
    measures = measure(bench, built, tuned, neighbour, spec.measures, tokens=tokens)
    return Result(
        run_id=spec.run_id, outcome="done", cost=cost_of(clock, tuned), measures=measures,
        split_rows=split_rows(bench), environment=environment(spec),
    )  # fmt: skip


def _load_replicate(bench: Workbench, folder: RunFolder, run_id: str) -> Any:
    spec = folder.home.run(run_id).spec()
    subject = replace(bench, spec=spec)
    saved = folder.home.model_folder(spec)
    broken = files.damage(saved)
    if broken is not None:
        raise HomeError(
            f"the trained model {saved} is damaged: {broken}; run again, and it is set aside and trained anew"
        )
    if not folder.home.model_is_of(run_id, saved):
        raise HomeError(
            f"{saved} holds the model of another run; move {folder.home.run(run_id).path} away and run again "
            f"to train {run_id} anew"
        )
    plugin, _ = subject.method()
    return plugin.load(subject.build_base().model, saved)


def _save_model(bench: Workbench, folder: RunFolder, model: Any, tokenizer: Any) -> int:
    """Commit the model in the format that a user loads; the bytes it takes without the tokenizer."""
    final = folder.home.model_folder(bench.spec)
    final.parent.mkdir(parents=True, exist_ok=True)
    for left_over in final.parent.glob(f".{final.name}.????????.*"):  # a killed attempt's, of this run alone
        files.discard(left_over)
    plugin, _ = bench.method()
    with files.committed(final) as temporary:
        plugin.save(model, temporary)
        (temporary / "README.md").unlink(missing_ok=True)  # PEFT's empty card; the report writes one, unsealed
        size = files.size_of(temporary)
        tokenizer.save_pretrained(temporary)
        files.write_text(temporary / MODEL_OWNER, bench.spec.run_id + "\n")
    return size


def _training_facts(bench: Workbench, progress: Progress, inputs: int, fit: Fit) -> Training:
    planned_steps, steps_per_epoch = plan_steps(bench.spec, inputs)
    return Training(
        steps=progress.step,
        planned_steps=planned_steps,
        epochs=progress.step / steps_per_epoch,
        rows=len(bench.splits.train),
        examples=progress.examples,
        tokens=progress.tokens,
        padded_tokens=progress.padded_tokens,
        best_step=progress.best_step or 0,
        stopped_early=progress.stopped_early,
        first_loss=progress.first_loss,
        last_loss=progress.last_loss,
        lost_to_rounding=progress.lost_to_rounding,
        resumed_from=tuple(progress.resumed_from),
        micro_batch_tokens=fit.tokens,
        micro_batches=progress.micro_batches,
        gradient_checkpointing=fit.checkpointing,
        stacked=bench.spec.how.stacked,
    )


def describe(spec: RunSpec, folder: Path) -> str:
    """One line for the log: what this process is about to do."""
    return f"{spec.run_id} in {folder}: {canonical_json(spec.settings)}"
