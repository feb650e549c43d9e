"""What a worker does for each stage: baseline, trial, replicate, probe. Child side; each gives a Result."""

from __future__ import annotations

import hashlib
import platform
import shutil
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from finetrial import checkpoint, files, models, plugins
from finetrial.assemble import Workbench, input_hash, open_workbench, pick_device
from finetrial.batching import EVALUATION_TOKENS, collate, evaluation_batches
from finetrial.data import cap_rows
from finetrial.errors import Diverged, HomeError
from finetrial.fit import Fit, Ladder, keep_to, peak_bytes
from finetrial.optimisation import plan_steps
from finetrial.plugins import ProbeInput
from finetrial.records import Cost, GroupProof, Proof, Result, RunSpec, Training, canonical_json
from finetrial.store import RunFolder
from finetrial.train import evaluate, make_accelerator, train
from finetrial.training_state import Progress

ENVIRONMENT_PACKAGES = ("torch", "transformers", "peft", "accelerate", "numpy", "tokenizers", "safetensors")

# In a trained model's folder: which run it is of. Folders are named by seed, and optima may change.
OWNER = "finetrial-run.txt"


def run(spec: RunSpec, folder: RunFolder) -> Result:
    """Do what a spec says and give its result; resumes by itself from what the folder holds."""
    stages = {"baseline": _baseline, "trial": _training, "replicate": _training, "probe": _probe}
    return stages[spec.stage](spec, folder)


def _baseline(spec: RunSpec, folder: RunFolder) -> Result:
    """Scores that need no training: the task's trivial answers and the model with a fresh head."""
    clock = _Clock()
    bench = open_workbench(spec, folder.home)
    built = bench.build_base()
    models.check_finite(built.model, spec.model)
    accelerator = make_accelerator(spec.rules)
    model = accelerator.prepare(built.model)
    scores, hashes, calibration = {}, {}, None
    tokens = EVALUATION_TOKENS >> folder.out_of_memory()
    for split, examples in (("validation", bench.splits.validation), ("test", bench.splits.test)):
        features = bench.encode(examples, built)
        scored = evaluate(
            accelerator, model, bench, built.tokenizer, features, examples, calibration, tokens=tokens
        )
        calibration = calibration or scored.calibration
        scores[split], hashes[split] = scored.metrics, input_hash(features)
    return Result(
        run_id=spec.run_id,
        outcome="done",
        scores=scores,
        calibration=calibration or {},
        cost=_cost(clock, model),
        input_sha256=hashes,
        split_rows=_split_rows(bench),
        measures={"baselines": bench.task.head.baselines(bench.splits, bench.task_params)},
        environment=environment(spec),
    )


def _training(spec: RunSpec, folder: RunFolder) -> Result:
    """A trial or a replicate: train, score on validation, and for a replicate on test; keep its model."""
    clock, progress = _Clock(), Progress()
    bench = open_workbench(spec, folder.home)
    shapes, built = bench.build_tuned(shapes_only=True)
    features = bench.encode(bench.splits.train, built)
    validation = bench.encode(bench.splits.validation, built)
    ladder = Ladder(bench, shapes, features, validation, built.tokenizer.pad_token_id)
    fit = ladder.choose(folder.out_of_memory())
    keep_to(fit)
    model, built = bench.build_tuned()
    hashes = {"train": input_hash(features), "validation": input_hash(validation)}
    scored = None
    try:
        trained = train(bench, folder, model, built.tokenizer, features, validation, progress, fit)
        peak = peak_bytes()  # of training: what comes after holds a second model
        if spec.stage == "replicate":
            test = bench.encode(bench.splits.test, built)
            hashes["test"] = input_hash(test)
            scored = evaluate(
                trained.accelerator, trained.model, bench, built.tokenizer, test, bench.splits.test,
                progress.best_calibration, tokens=fit.evaluation_tokens,
            )  # fmt: skip
    except Diverged as diverged:
        reason = str(Diverged(diverged.step or progress.step, diverged.reason))
        return Result(
            run_id=spec.run_id, outcome="diverged", reason=reason, cost=_cost(clock, model, progress, fit=fit),
            training=_training_facts(bench, progress, len(features), fit),
            input_sha256=hashes, split_rows=_split_rows(bench), environment=environment(spec),
        )  # fmt: skip
    scores = {"validation": progress.best_metrics}
    per_example = {"validation": progress.best_per_example}
    saved_bytes = 0
    if scored is not None:
        scores["test"], per_example["test"] = scored.metrics, scored.per_example
        saved_bytes = _save_model(bench, folder, trained.model, built.tokenizer)
    files.write_json(folder.examples_file, per_example)
    return Result(
        run_id=spec.run_id,
        outcome="done",
        score=progress.best_score,
        scores=scores,
        calibration=progress.best_calibration,
        settings_used=trained.settings_used,
        training=_training_facts(bench, progress, len(features), fit),
        proof=prove(bench, trained.model),
        cost=_cost(clock, trained.model, progress, saved_bytes, peak, fit),
        # A replicate's kept weights; a trial keeps none, so those of its last step.
        weights_sha256=weights_hash(checkpoint.trained_tensors(trained.model)),
        input_sha256=hashes,
        split_rows=_split_rows(bench),
        environment=environment(spec),
    )


def _probe(spec: RunSpec, folder: RunFolder) -> Result:
    """Measure one replicate's model (or, as the control, the base itself) against the base."""
    clock = _Clock()
    bench = open_workbench(spec, folder.home)
    device = pick_device()
    built = bench.build_base()
    base = built.model.to(device).eval()
    tuned, neighbour = bench.build_base().model, None
    if spec.subject is not None:
        tuned = _load_replicate(bench, folder, spec.subject)
        neighbour = _load_replicate(bench, folder, spec.reference) if spec.reference else None
    tuned = tuned.to(device).eval()
    neighbour = neighbour.to(device).eval() if neighbour is not None else None
    measures, tokens = {}, EVALUATION_TOKENS >> folder.out_of_memory()
    for name, asked in spec.measures.items():
        plugin = plugins.load("probes", asked["use"])
        params = plugin.Params.model_validate(asked["params"])
        rows = cap_rows(bench.splits.validation, getattr(params, "rows", None))
        features = bench.encode(rows, built)
        batches = [
            collate([features[i] for i in indices], built.tokenizer.pad_token_id, device)
            for indices in evaluation_batches([len(feature.input_ids) for feature in features], tokens)
        ]
        given = ProbeInput(base, tuned, neighbour, batches, input_hash(features))
        measures[name] = plugin.measure(given, params)
    return Result(
        run_id=spec.run_id, outcome="done", cost=_cost(clock, tuned), measures=measures,
        split_rows=_split_rows(bench), environment=environment(spec),
    )  # fmt: skip


def _load_replicate(bench: Workbench, folder: RunFolder, run_id: str) -> Any:
    spec = folder.home.run(run_id).spec()
    subject = Workbench(spec, bench.task, bench.task_params, bench.splits, bench.location, bench.home)
    saved = folder.home.model_folder(spec)
    broken = files.damage(saved)
    if broken is not None:
        raise HomeError(
            f"the trained model {saved} is damaged: {broken}; run again, and it is set aside and trained anew"
        )
    owner = saved / OWNER
    if owner.exists() and owner.read_text(encoding="utf-8").strip() != run_id:
        raise HomeError(
            f"{saved} holds the model of another run, {owner.read_text(encoding='utf-8').strip()}; move "
            f"{folder.home.run(run_id).path} away and run again to train {run_id} anew"
        )
    plugin, _ = subject.method()
    return plugin.load(subject.build_base().model, saved)


def _save_model(bench: Workbench, folder: RunFolder, model: Any, tokenizer: Any) -> int:
    """Commit the model in the format that a user loads; the bytes it takes without the tokenizer."""
    final = folder.home.model_folder(bench.spec)
    final.parent.mkdir(parents=True, exist_ok=True)
    for left_over in final.parent.glob(f".{final.name}.????????.*"):  # a killed attempt's, of this run alone
        shutil.rmtree(left_over, ignore_errors=True)
    temporary = final.with_name(f".{final.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        plugin, _ = bench.method()
        plugin.save(model, temporary)
        size = sum(path.stat().st_size for path in temporary.rglob("*") if path.is_file())
        tokenizer.save_pretrained(temporary)
        files.write_text(temporary / OWNER, bench.spec.run_id + "\n")
        files.commit_folder(temporary, final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return size


def prove(bench: Workbench, model: Any) -> Proof:
    """Which trained tensors moved from their start, and by how much.

    The start is built again from the spec, which is exact and needs no copy during training. A group that
    had to move and did not makes the run void. Of an adapter the tensors that start at zero (LoRA's B) have
    to move: weight decay alone moves the others, and changes nothing that the model computes.
    """
    plugin, _ = bench.method()
    start, built = bench.build_tuned()
    before = checkpoint.trained_tensors(start)
    groups: dict[str, list[tuple[str, float, float]]] = {}
    for name, tensor in checkpoint.trained_tensors(model).items():
        old = before[name].detach().double()
        change = float(torch.linalg.vector_norm(tensor.detach().cpu().double() - old))
        group = plugin.group(_plain_name(name), built.head_names)
        groups.setdefault(group, []).append((name, change, float(torch.linalg.vector_norm(old))))
    proofs = {}
    for group, rows in groups.items():
        change = sum(row[1] ** 2 for row in rows) ** 0.5
        size = sum(row[2] ** 2 for row in rows) ** 0.5
        proofs[group] = GroupProof(
            tensors=len(rows), moved=sum(row[1] > 0 for row in rows), change_norm=change,
            relative_change=change / size if size > 0 else None,
        )  # fmt: skip
    still = [group for group in plugin.must_move() if not _counts_as_moved(group, groups.get(group, []))]
    largest = sorted((row for rows in groups.values() for row in rows), key=lambda row: -row[1])[:5]
    return Proof(
        groups=proofs,
        largest={name: change for name, change, _ in largest},
        void=f"nothing moved in: {', '.join(still)}" if still else None,
    )


def _counts_as_moved(group: str, rows: list[tuple[str, float, float]]) -> bool:
    """Whether a group moved, given each tensor's name, change and size at the start."""
    from_zero = [change for _, change, size in rows if size == 0]
    changes = from_zero if group == "adapter" and from_zero else [change for _, change, _ in rows]
    return any(change > 0 for change in changes)


def _plain_name(name: str) -> str:
    """A parameter's name without what PEFT wraps around it."""
    return name.removeprefix("base_model.model.").replace(".modules_to_save.default", "")


def weights_hash(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over names, shapes and bytes of tensors in order of name."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


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
    )


class _Clock:
    """Time since an attempt at a run began."""

    def __init__(self) -> None:
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def passed(self) -> tuple[float, float]:
        """(Wall, CPU) seconds so far."""
        return time.perf_counter() - self.wall, time.process_time() - self.cpu


def _cost(
    clock: _Clock, model: Any, progress: Progress | None = None, saved_bytes: int = 0, peak: int | None = None,
    fit: Fit | None = None,
) -> Cost:  # fmt: skip
    """What a run cost, over all its attempts as far as they counted."""
    wall, cpu = clock.passed()
    progress = progress or Progress()
    device = pick_device()
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"cpu ({torch.get_num_threads()} threads)"
    return Cost(
        wall_seconds=round(wall + progress.earlier_wall_seconds, 3),
        train_seconds=round(progress.train_seconds, 3),
        evaluate_seconds=round(progress.evaluate_seconds, 3),
        cpu_seconds=round(cpu + progress.earlier_cpu_seconds, 3),
        peak_memory_bytes=peak_bytes() if peak is None else peak,
        predicted_memory_bytes=fit.predicted if fit else None,
        device=name,
        flops=_flops(model, progress.tokens),
        trainable_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        total_parameters=sum(p.numel() for p in model.parameters()),
        saved_bytes=saved_bytes,
    )


def _flops(model: Any, tokens: int) -> float:
    """Floating-point operations of training by the usual count (Kaplan et al. 2020, arXiv:2001.08361).

    2 per weight and token forward, 2 backward to the inputs, and 2 more for every weight that is trained;
    embedding tables are looked up, not multiplied.
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    multiplied = sum(p.numel() for p in model.parameters() if id(p) not in embeddings)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad and id(p) not in embeddings)
    return float((4 * multiplied + 2 * trained) * tokens)


def _split_rows(bench: Workbench) -> dict[str, int]:
    splits = bench.splits
    return {
        "train": len(splits.train), "validation": len(splits.validation), "test": len(splits.test),
    }  # fmt: skip


def environment(spec: RunSpec) -> dict[str, str]:
    """Versions and machine of this process, and the source of the user's own plug-ins that a run uses."""
    from importlib.metadata import version

    facts = {name: version(name) for name in ENVIRONMENT_PACKAGES}
    return facts | {
        "finetrial": version("finetrial"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "threads": str(torch.get_num_threads()),
        **{f"source of {name}": digest for name, digest in plugins.own_sources(_plugins_of(spec)).items()},
    }


def _plugins_of(spec: RunSpec) -> list[str]:
    own = [spec.task.use, *(measure["use"] for measure in spec.measures.values())]
    return [*own, spec.method.use] if spec.method else own


def describe(spec: RunSpec, folder: Path) -> str:
    """One line for the log: what this process is about to do."""
    return f"{spec.run_id} in {folder}: {canonical_json(spec.settings)}"
