"""The rehearsal of an arm: does it fit, does it learn, how fast is it. Child side; part of `finetrial check`.

Steps of the real loop on the run's own batches, timed with the learning rate at zero; then ten samples again
and again, which an arm that works learns by heart (Karpathy 2019, "A recipe for training neural networks").
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from finetrial import files
from finetrial.account import Clock, cost_of, environment, split_rows
from finetrial.assemble import Workbench, open_workbench
from finetrial.batching import heaviest, padded
from finetrial.data import cap_rows
from finetrial.errors import Diverged
from finetrial.evaluation import evaluate
from finetrial.fit import Ladder, split
from finetrial.frozen import Setting
from finetrial.loop import Loop
from finetrial.measuring import keep_and_measure
from finetrial.optimisation import could_be_bf16, is_slow_in_bf16, planned_batches
from finetrial.plugins import Feature, Splits
from finetrial.process_memory import keep_to, peak_bytes
from finetrial.proof import prove
from finetrial.records import Fit, Result, RunSpec
from finetrial.rehearsed import Overfit, Pace, Phase, Rehearsal, Try
from finetrial.store import RunFolder
from finetrial.train import alone, open_loop
from finetrial.training_state import Progress

SAMPLES = 10
LEARNT_LOSS = 0.1
LEARNING_STEPS = 200  # at each learning rate; at half of them the loss has to be so much of its start, or less
HALF_WAY = 0.75
TIMED_BATCHES = 6
TIMED_SECONDS = 20.0  # at each batch size, unless the fewest take longer
FEWEST_TIMED = 3
JUDGED_ROWS = 48  # of validation, to time an evaluation by


def rehearse(spec: RunSpec, folder: RunFolder) -> Result:
    """Rehearse an arm with its most demanding settings; `measures["rehearsal"]` is what was found.

    Raises:
        DoesNotFit: not one row of it fits into the memory budget.
    """
    clock, lap, asked = Clock(), _Lap(), spec.measures["rehearsal"]["params"]
    whole = open_workbench(spec.model_copy(update={"rows": None}), folder.home)
    bench = _capped(whole, spec.rows)
    shapes, built = bench.build_tuned(shapes_only=True)
    opened = lap()
    validation = bench.encode(bench.splits.validation, built)
    opened += lap()
    searched = bench.encode(cap_rows(whole.splits.train, asked["search_rows"]), built)
    search_encoded = lap()
    features = bench.encode(bench.splits.train, built)
    train_encoded = lap()
    test = bench.encode(bench.splits.test, built)
    lap()
    ladder = Ladder(bench, shapes, features, [validation, test], built)
    fit = ladder.choose(folder.out_of_memory(), count=True)
    keep_to(fit)
    counted = lap()
    counts = spec.how.memory_bytes is not None or not ladder.surely_fits()  # or the run need not
    lap()
    loop = _open(bench, folder, built.tokenizer, features, fit, learning_rate=0.0)
    building = lap()
    speeds = {size: _seconds_per_token(loop, features, size) for size in sorted(asked["batch_sizes"])[::-1]}
    measured, parts = peak_bytes(), loop.progress.micro_batches
    lap()
    judged = _judge(loop, validation)
    checkpoint_seconds, checkpoint_bytes = _write_checkpoint(loop, folder)
    del loop
    overfit, model = _learn_by_heart(bench, folder, built.tokenizer, features, fit, asked["learning_rates"])
    measures = asked["measure"] if overfit.fault is None else {}  # weights that diverged may be no numbers
    kept = keep_and_measure(bench, folder, model, built.tokenizer, measures, neighbour=True)

    def phase(rows: Sequence[Feature], encoded: float) -> Phase:
        paces = tuple(_pace(spec, rows, fit, size, speeds[size]) for size in sorted(speeds))
        # The model is built twice: to train it, and to prove that it moved.
        return Phase(setup_seconds=opened + encoded + counts * counted + 2 * building, paces=paces)

    found = Rehearsal(
        batch_size=int(spec.settings["batch_size"]),
        micro_batches=parts,
        micro_batch_tokens=fit.tokens,
        gradient_checkpointing=fit.checkpointing,
        budget_bytes=fit.budget,
        predicted_memory_bytes=fit.predicted or 0,
        measured_memory_bytes=measured,
        overfit=overfit,
        tokens_per_second=1 / speeds[max(speeds)],
        search=phase(searched, search_encoded),
        train=phase(features, train_encoded),
        validation_seconds=judged * len(whole.splits.validation),
        test_seconds=judged * len(whole.splits.test),
        checkpoint_seconds=checkpoint_seconds,
        checkpoint_bytes=checkpoint_bytes,
        save_seconds=kept.save_seconds,
        model_bytes=kept.model_bytes,
        probe_seconds=opened + kept.measure_seconds if measures else 0.0,
        contradictions=contradictions(features),
        could_be_bf16=could_be_bf16(spec),
        slow_in_bf16=is_slow_in_bf16(spec),
    )
    return Result(
        run_id=spec.run_id, outcome="done", measures={"rehearsal": found.model_dump(mode="json")},
        cost=cost_of(clock, model, peak=measured, fit=fit), split_rows=split_rows(bench),
        environment=environment(spec),
    )  # fmt: skip


def _capped(whole: Workbench, rows: int | None) -> Workbench:
    splits = whole.splits
    if rows is None:
        return whole
    return replace(whole, splits=Splits(cap_rows(splits.train, rows), splits.validation, splits.test))


def _open(
    bench: Workbench, folder: RunFolder, tokenizer: Any, features: Sequence[Feature], fit: Fit, *,
    learning_rate: float, **settings: Setting,
) -> Loop:  # fmt: skip
    """The arm's own loop at one learning rate that stays."""
    spec = bench.spec.model_copy(
        update={
            "settings": bench.spec.settings | {"learning_rate": learning_rate, "warmup_ratio": 0.0} | settings,
            "rules": bench.spec.rules.model_copy(update={"schedule": "constant"}),
        }
    )
    bench = replace(bench, spec=spec)
    model, _ = bench.build_tuned()
    return open_loop(bench, folder, model, tokenizer, features, Progress(), fit, planned_steps=LEARNING_STEPS)


# -- how fast --------------------------------------------------------------------------------------------------


def _batches(spec: RunSpec, features: Sequence[Feature], size: int) -> list[Sequence[Feature]]:
    """The batches of the first epoch at a batch size."""
    lengths = [len(feature.input_ids) for feature in features]
    one = spec.model_copy(update={"settings": spec.settings | {"batch_size": size, "epochs": 1}})
    return [[features[i] for i in batch] for batch in planned_batches(lengths, one)]


def _seconds_per_token(loop: Loop, features: Sequence[Feature], size: int) -> float:
    """Of training, padding included: from batches that are spread evenly over the sizes there are.

    The heaviest go first and are not timed: they are the peak of memory, and warm up what has to be.
    """
    batches = _batches(loop.bench.spec, features, size)
    for batch in heaviest(batches):
        alone(loop.step(batch))
    ordered = sorted(batches, key=lambda batch: _tokens(loop.fit, batch))
    count = min(TIMED_BATCHES, len(ordered))
    places = [int((index + 0.5) / count * len(ordered)) for index in range(count)]
    places.sort(key=lambda place: abs(place - len(ordered) / 2))  # if time runs out, the usual ones were timed
    lap, seconds, tokens = _Lap(), 0.0, 0
    for done, place in enumerate(places):
        if done >= FEWEST_TIMED and seconds > TIMED_SECONDS:
            break
        lap()
        alone(loop.step(ordered[place]))
        seconds += lap()
        tokens += _tokens(loop.fit, ordered[place])
    return seconds / tokens


def _pace(spec: RunSpec, features: Sequence[Feature], fit: Fit, size: int, seconds_per_token: float) -> Pace:
    batches = _batches(spec, features, size)
    tokens = sum(_tokens(fit, batch) for batch in batches)
    return Pace(batch_size=size, steps=len(batches), padded_tokens=tokens, seconds=tokens * seconds_per_token)


def _tokens(fit: Fit, batch: Sequence[Feature]) -> int:
    """Tokens of an effective batch, padding included, as it is split."""
    return sum(padded(part) for part in split(fit, batch))


def _judge(loop: Loop, validation: Sequence[Feature]) -> float:
    """Seconds of evaluation for each row."""
    examples = loop.bench.splits.validation
    rows = min(JUDGED_ROWS, len(examples))
    features = [feature for feature in validation if feature.row < rows]
    lap = _Lap()
    evaluate(
        loop.accelerator, loop.model, loop.bench, loop.tokenizer, features, examples[:rows],
        tokens=loop.fit.evaluation_tokens,
    )  # fmt: skip
    return lap() / rows


def _write_checkpoint(loop: Loop, folder: RunFolder) -> tuple[float, int]:
    lap = _Lap()
    loop.save()
    loop.writer.wait()
    seconds, size = lap(), files.size_of(folder.checkpoint)
    folder.drop_checkpoint()
    return seconds, size


class _Lap:
    """Seconds since the last call."""

    def __init__(self) -> None:
        self.last = time.perf_counter()

    def __call__(self) -> float:
        before, self.last = self.last, time.perf_counter()
        return self.last - before


# -- does it learn ---------------------------------------------------------------------------------------------


def _learn_by_heart(
    bench: Workbench, folder: RunFolder, tokenizer: Any, features: Sequence[Feature], fit: Fit,
    rates: Sequence[float],
) -> tuple[Overfit, Any]:  # fmt: skip
    """Train on ten samples, at one learning rate after the other until one learns them; the last model, too."""
    samples, tries = pick_samples(features), []
    for rate in rates:
        loop = _open(bench, folder, tokenizer, samples, fit, learning_rate=rate, weight_decay=0.0)
        tries.append(_try(loop, samples, rate))
        if tries[-1].learnt:
            break
    model = loop.accelerator.unwrap_model(loop.model)
    fault = None if tries[-1].learnt else _fault(loop, model, tries)
    return Overfit(tries=tuple(tries), fault=fault), model


def pick_samples(features: Sequence[Feature]) -> list[Feature]:
    """Ten short inputs of ten rows, none twice, with no label on more than half of them if there are others."""
    order = sorted(features, key=lambda feature: len(feature.input_ids))
    found: list[Feature] = []
    rows: set[int] = set()
    inputs: set[tuple[int, ...]] = set()
    labels: Counter[tuple[int, ...]] = Counter()
    for most in (SAMPLES // 2, SAMPLES):
        for feature in order:
            if len(found) == SAMPLES:
                break
            label = tuple(feature.labels.values())
            if feature.row in rows or tuple(feature.input_ids) in inputs or labels[label] >= most:
                continue
            found.append(feature)
            rows.add(feature.row)
            inputs.add(tuple(feature.input_ids))
            labels[label] += 1
    return found


def _try(loop: Loop, samples: Sequence[Feature], rate: float) -> Try:
    progress, diverged = loop.progress, None
    try:
        while progress.step < LEARNING_STEPS and not _over(progress):
            alone(loop.step(samples))
    except Diverged as error:
        diverged = error.reason
    loss = progress.last_loss
    return Try(
        learning_rate=rate, steps=progress.step, first_loss=progress.first_loss, loss=loss, diverged=diverged,
        learnt=diverged is None and loss is not None and loss < LEARNT_LOSS,
    )  # fmt: skip


def _over(progress: Progress) -> bool:
    """Whether the samples are learnt, or will not be."""
    first, last = progress.first_loss, progress.last_loss
    if first is None or last is None:
        return False
    return last < LEARNT_LOSS or (2 * progress.step >= LEARNING_STEPS and last > HALF_WAY * first)


def _fault(loop: Loop, model: Any, tries: Sequence[Try]) -> str:
    """Why ten samples are not learnt, as far as it can be told."""
    whole = [each for each in tries if each.diverged is None]
    rates = ", ".join(f"{each.learning_rate:.2g}" for each in tries)
    if not whole:
        return (
            f"training diverges at every learning rate tried ({rates}): {tries[-1].diverged}; lower its range"
        )
    if tries[-1].diverged is None:
        void = prove(loop.bench, model).void
        if void is not None:
            return f"{void}; the method does not train what it says"
        if loop.progress.gradient_norm == 0:
            return "the gradient is zero: the loss does not depend on what is trained"
    best = min(whole, key=lambda each: each.loss or math.inf)
    said = (
        f"the loss of {SAMPLES} samples goes from {best.first_loss:.2g} to {best.loss:.2g} in {best.steps} "
        f"steps and not below {LEARNT_LOSS:g}, at best (learning rates tried: {rates})"
    )
    if len(tries) > 1 and best.learning_rate == max(each.learning_rate for each in tries):
        return f"{said}; raise the upper end of learning_rate"
    if len(tries) > 1 and best.learning_rate == min(each.learning_rate for each in tries):
        return f"{said}; lower the ends of learning_rate"
    return (
        f"{said}; try another range of learning_rate, or else the method trains too little, or the labels do "
        f"not follow from the texts"
    )


def contradictions(features: Sequence[Feature]) -> int:
    """Training inputs that occur again with another label."""
    labels: dict[tuple[int, ...], set[tuple[int, ...]]] = {}
    for feature in features:
        labels.setdefault(tuple(feature.input_ids), set()).add(tuple(feature.labels.values()))
    return sum(len(found) > 1 for found in labels.values())
