"""What a run's result holds: proof of training, scores, the saved model; and how the worker ends a run."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForQuestionAnswering, AutoTokenizer

from finetrial import checkpoint, files, worker
from finetrial.assemble import input_hash, open_workbench
from finetrial.batching import collate, model_inputs
from finetrial.errors import HomeError, OutOfMemory
from finetrial.proof import prove
from finetrial.records import ModelSource, RunSpec
from finetrial.store import Home
from fragile import TROUBLE
from tiny_runs import examples, folder_of, make_spec, run

pytestmark = pytest.mark.usefixtures("no_trouble")


# ---- proof of training -----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_run_that_trained_says_what_moved(tiny_bert, tmp_path, method):
    spec = make_spec(tiny_bert, method)
    result = run(spec, tmp_path)
    proof = result.proof
    assert proof.void is None
    bench = open_workbench(spec, folder_of(spec, tmp_path).home)
    start = checkpoint.trained_tensors(bench.build_tuned()[0])
    assert sum(group.tensors for group in proof.groups.values()) == len(start)
    assert set(proof.groups) == {"full": {"head", "body"}, "lora": {"head", "adapter"}}[method]
    assert proof.groups["head"].tensors == 2
    assert all(0 < group.moved <= group.tensors for group in proof.groups.values())
    assert len(proof.largest) == 5
    assert list(proof.largest.values()) == sorted(proof.largest.values(), reverse=True)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_rate_too_small_for_the_numbers_voids_the_run(tiny_bert, tmp_path, method):
    result = run(make_spec(tiny_bert, method, settings={"learning_rate": 1e-38}), tmp_path)
    assert result.outcome == "done"
    assert result.proof.void.startswith("nothing moved in: ")
    assert all(group.change_norm < 1e-20 for group in result.proof.groups.values())


def test_a_method_that_freezes_what_has_to_move_voids_the_run(tiny_bert, tmp_path):
    proof = run(make_spec(tiny_bert, "fragile:HEAD_ONLY"), tmp_path).proof
    assert proof.void == "nothing moved in: body"
    assert proof.groups["head"].moved > 0


def test_an_adapter_that_only_decayed_has_not_moved(tiny_bert, tmp_path):
    """Weight decay shrinks LoRA's A without any gradient; B stays zero and the model computes the same."""
    spec = make_spec(tiny_bert, "lora")
    bench = open_workbench(spec, folder_of(spec, tmp_path).home)
    model, _ = bench.build_tuned()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                parameter.mul_(0.99)
            elif parameter.requires_grad and "qa_outputs" in name:
                parameter.add_(1.0)
    proof = prove(bench, model)
    assert proof.groups["adapter"].moved == proof.groups["adapter"].tensors / 2
    assert proof.void == "nothing moved in: adapter"


def test_distances_in_the_proof_are_the_euclidean_ones(tiny_bert, tmp_path):
    spec = make_spec(tiny_bert, "full")
    bench = open_workbench(spec, folder_of(spec, tmp_path).home)
    model, _ = bench.build_tuned()
    with torch.no_grad():
        start = float(
            sum((p.double() ** 2).sum() for n, p in model.named_parameters() if "qa_outputs" in n) ** 0.5
        )
        model.qa_outputs.bias.add_(torch.tensor([3.0, 4.0]))
        model.bert.embeddings.LayerNorm.bias[0] += 2.0
    proof = prove(bench, model)
    head, body = proof.groups["head"], proof.groups["body"]
    assert (head.tensors, head.moved, head.change_norm) == (2, 1, pytest.approx(5.0))
    assert head.relative_change == pytest.approx(5.0 / start)
    assert (body.moved, body.change_norm) == (1, pytest.approx(2.0))
    assert list(proof.largest)[:2] == ["qa_outputs.bias", "bert.embeddings.LayerNorm.bias"]
    assert proof.void is None


def test_the_weights_hash_tells_values_names_shapes_and_signs_apart():
    kinds = [
        {"a": torch.zeros(2)},
        {"b": torch.zeros(2)},
        {"a": torch.zeros(1, 2)},
        {"a": -torch.zeros(2)},
        {"a": torch.zeros(2, dtype=torch.int32)},
        {"a": torch.tensor(0.0)},
        {"a": torch.zeros(0)},
        {},
    ]
    assert len({checkpoint.weights_hash(kind) for kind in kinds}) == len(kinds)
    matrix = torch.arange(6.0).reshape(2, 3)
    assert checkpoint.weights_hash({"a": matrix.T}) == checkpoint.weights_hash({"a": matrix.T.contiguous()})
    assert checkpoint.weights_hash({"a": matrix, "b": matrix}) == checkpoint.weights_hash(
        {"b": matrix, "a": matrix}
    )


# ---- results ---------------------------------------------------------------------------------------------


def test_a_replicate_scores_test_with_validations_threshold_and_saves_the_scored_model(tiny_bert, tmp_path):
    spec = make_spec(tiny_bert, "full")
    result = run(spec, tmp_path)
    saved = folder_of(spec, tmp_path).home.model_folder(spec)
    assert files.damage(saved) is None
    assert AutoTokenizer.from_pretrained(saved).pad_token == "[PAD]"
    model = AutoModelForQuestionAnswering.from_pretrained(saved)
    assert checkpoint.weights_hash(dict(model.named_parameters())) == result.weights_sha256
    assert result.cost.saved_bytes == sum(
        p.stat().st_size for p in saved.iterdir() if p.name in ("config.json", "model.safetensors")
    )
    bench = open_workbench(spec, folder_of(spec, tmp_path).home)
    built = bench.build_base()
    test = bench.encode(bench.splits.test, built)
    assert result.input_sha256["test"] == input_hash(test)
    assert result.scores["test"]["f1"] == pytest.approx(
        sum(examples(spec, tmp_path)["test"].values()) / len(bench.splits.test)
    )
    assert result.split_rows == {"train": 24, "validation": 12, "test": 12}
    assert "no_answer_threshold" in result.calibration
    assert TROUBLE.calibrations == [None, None, result.calibration]  # after each epoch, and on test
    assert result.score == result.scores["validation"]["f1"]
    assert result.training.rows == 24
    assert result.training.examples == 48


def test_a_trial_neither_sees_test_nor_keeps_a_model(tiny_bert, tmp_path):
    spec = make_spec(tiny_bert, "lora", stage="trial", rows=10)
    result = run(spec, tmp_path)
    assert set(result.scores) == {"validation"}
    assert set(result.input_sha256) == {"train", "validation"}
    assert result.split_rows["train"] == result.training.rows == 10
    assert result.cost.saved_bytes == 0
    assert not folder_of(spec, tmp_path).home.models.exists()


def test_methods_differ_in_trained_parameters_and_not_in_inputs(tiny_bert, tmp_path):
    full, lora = (run(make_spec(tiny_bert, method), tmp_path) for method in ("full", "lora"))
    assert full.input_sha256 == lora.input_sha256
    assert full.training.tokens == lora.training.tokens
    assert full.training.padded_tokens == lora.training.padded_tokens
    assert full.cost.trainable_parameters == full.cost.total_parameters
    # Rank 4 beside 4 layers of 32 x 32 and two of 32 x 64 in each of two blocks, and the head's 66.
    assert lora.cost.trainable_parameters == 2 * 4 * (4 * 64 + 2 * 96) + 66
    assert lora.cost.saved_bytes < full.cost.saved_bytes / 10
    assert lora.cost.flops < full.cost.flops


def test_a_baseline_scores_the_untrained_model_and_the_trivial_answer(tiny_bert, tmp_path):
    spec = make_spec(tiny_bert, None, stage="baseline", settings={})
    result = run(spec, tmp_path)
    assert result.measures["baselines"]["no_answer"]["f1"] == pytest.approx(100 / 3)
    validation = open_workbench(spec, folder_of(spec, tmp_path).home).splits.validation
    withheld = sum(not row["answers"]["text"] for row in validation)
    expected = 100 * withheld / len(validation)
    assert result.measures["validation_baselines"]["no_answer"]["f1"] == pytest.approx(expected)
    assert set(result.scores) == {"validation", "test"}
    assert result.training is None
    assert result.cost.flops == 0


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_probe_measures_the_saved_model_against_the_base(tiny_bert, tmp_path, method):
    spec = make_spec(tiny_bert, method)
    run(spec, tmp_path)
    measures = {"drift": {"use": "drift", "params": {"rows": 12}}}
    probe = spec.model_copy(update={"stage": "probe", "measures": measures, "subject": spec.run_id})
    found = run(probe, tmp_path).measures["drift"]
    assert found["rows"] == 12
    assert found["cka_drift_mean"] > 0
    control = spec.model_copy(update={"stage": "probe", "measures": measures})
    assert run(control, tmp_path).measures["drift"]["cka_drift_mean"] == 0
    saved = folder_of(spec, tmp_path).home.model_folder(spec)
    (saved / "manifest.json").unlink()
    with pytest.raises(HomeError, match=r"is damaged.*run\s+again"):
        run(probe, tmp_path)


@pytest.mark.parametrize(("method", "changed"), [("full", 12), ("lora", 12), ("frozen", 0)])
def test_the_spectrum_is_measured_without_inputs(tiny_bert, tmp_path, method, changed):
    spec = make_spec(tiny_bert, method)
    run(spec, tmp_path)
    measures = {"spectrum": {"use": "spectrum", "params": {}}}
    TROUBLE.reset()
    probe = spec.model_copy(update={"stage": "probe", "measures": measures, "subject": spec.run_id})
    overall = run(probe, tmp_path).measures["spectrum"]["overall"]
    assert (overall["changed"], overall["unchanged"]) == (changed, 12 - changed)
    assert (overall["relative_change"] > 0) == (changed > 0)
    if method == "lora":
        assert overall["effective_rank_mean"] <= spec.settings["rank"] + 1e-9
    control = spec.model_copy(update={"stage": "probe", "measures": measures})
    assert run(control, tmp_path).measures["spectrum"]["overall"]["changed"] == 0


@pytest.mark.parametrize("rows", [None, 5, "all"])
def test_a_probe_is_given_the_rows_that_its_parameters_ask_for(tiny_bert, tmp_path, monkeypatch, rows):
    (tmp_path / "counting_rows.py").write_text(COUNTING_ROWS)
    monkeypatch.syspath_prepend(tmp_path)
    use = {None: "counting_rows:NONE", 5: "counting_rows:SOME", "all": "counting_rows:ALL"}[rows]
    spec = make_spec(tiny_bert, None).model_copy(
        update={"stage": "probe", "measures": {"count": {"use": use, "params": {}}}}
    )
    given = run(spec, tmp_path / "home").measures["count"]["inputs"]
    assert given == {None: 0, 5: 5, "all": 12}[rows]


COUNTING_ROWS = """
from finetrial.frozen import Frozen

class Some(Frozen):
    rows: int | None = 5

class All(Frozen):
    rows: int | None = None

class Counting:
    def __init__(self, params):
        self.Params = params

    def measure(self, given, params):
        return {"inputs": sum(len(batch["input_ids"]) for batch in given.batches)}

NONE, SOME, ALL = Counting(Frozen), Counting(Some), Counting(All)
"""


def test_a_probe_refuses_a_model_that_another_optimum_has_overwritten(tiny_bert, tmp_path):
    spec = make_spec(tiny_bert, "lora", settings={"epochs": 1})
    run(spec, tmp_path)
    run(make_spec(tiny_bert, "lora", settings={"epochs": 1, "learning_rate": 1e-3}), tmp_path)
    measures = {"drift": {"use": "drift", "params": {"rows": 12}}}
    probe = spec.model_copy(update={"stage": "probe", "measures": measures, "subject": spec.run_id})
    with pytest.raises(HomeError, match="holds the model of another run"):
        run(probe, tmp_path)


def test_what_a_killed_save_left_behind_is_cleared_away(tiny_bert, tmp_path):
    spec = make_spec(tiny_bert, "lora")
    models = folder_of(spec, tmp_path).home.models
    final = folder_of(spec, tmp_path).home.model_folder(spec)
    models.mkdir(parents=True)
    (models / f".{final.name}.0123abcd.tmp").mkdir()
    (models / f".{final.name}.0123abcd.old").mkdir()
    other = models / ".qa.m.seed7.0123abcd.tmp"
    other.mkdir()
    run(spec, tmp_path)
    assert {p.name for p in models.iterdir()} == {final.name, other.name}


# ---- the worker ------------------------------------------------------------------------------------------


def work(spec: RunSpec, home: Path) -> int:
    return worker.work(folder_of(spec, home))


def test_the_worker_writes_the_result_drops_the_checkpoint_and_does_nothing_twice(tiny_bert, tmp_path):
    spec = make_spec(tiny_bert, "lora", how={"checkpoint_steps": 5})
    folder = folder_of(spec, tmp_path)
    assert work(spec, tmp_path) == 0
    assert folder.result().run_id == spec.run_id
    assert not folder.checkpoint.exists()
    before = folder.result_file.stat().st_mtime_ns
    assert work(spec, tmp_path) == 0
    assert folder.result_file.stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("error", "kind", "reason"),
    [
        (ZeroDivisionError("by zero"), "bug", "ZeroDivisionError: by zero"),
        (RuntimeError("shapes\nand more"), "bug", "RuntimeError: shapes"),
        (MemoryError(), "out_of_memory", "MemoryError"),
        (torch.OutOfMemoryError("CUDA out of memory."), "out_of_memory", "CUDA out of memory."),
        (OutOfMemory("not at micro-batch 1"), "out_of_memory", "not at micro-batch 1"),
        (
            OSError(errno.ENOSPC, "No space left on device", "/home/x"),
            "refused",
            "/home/x: No space left on device; mend that and run the same command again",
        ),
        (OSError(errno.EBADF, "Bad file descriptor"), "bug", "OSError: [Errno 9] Bad file descriptor"),
        (HomeError("gone; put it back"), "refused", "gone; put it back"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_an_error_in_training_becomes_a_failure_of_its_kind(tiny_bert, tmp_path, error, kind, reason):
    TROUBLE.reset(error_at=(3, error))
    spec = make_spec(tiny_bert, "lora")
    assert work(spec, tmp_path) == 1
    failure = folder_of(spec, tmp_path).failure()
    assert (failure.kind, failure.reason, failure.attempt) == (kind, reason, 1)
    assert folder_of(spec, tmp_path).result() is None


def test_a_model_that_is_not_there_is_refused_in_one_line(tmp_path, capsys):
    spec = make_spec(tmp_path / "none", "lora")
    assert work(spec, tmp_path / "home") == 1
    failure = folder_of(spec, tmp_path / "home").failure()
    assert failure.kind == "refused"
    assert "is not there" in failure.reason
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("marked", [True, False])
def test_token_types_reach_the_model_unless_the_study_says_no(tiny_bert, tmp_path, marked):
    model = ModelSource(name=str(tiny_bert), token_type_ids=marked)
    spec = make_spec(tiny_bert).model_copy(update={"model": model})
    bench = open_workbench(spec, Home(tmp_path))
    built = bench.build_base()
    features = bench.encode(bench.splits.test, built)
    assert all((feature.token_type_ids is not None) == marked for feature in features)
    # Whoever loads the tokenizer saved beside a model makes the inputs that the model was trained on.
    built.tokenizer.save_pretrained(tmp_path / "saved")
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert ("token_type_ids" in again("a question", "a context")) == marked
    batch = collate(features[:4], built.tokenizer.pad_token_id)
    assert ("token_type_ids" in model_inputs(batch)) == marked


def test_a_diverged_run_is_a_result_and_not_a_failure(tiny_bert, tmp_path):
    TROUBLE.reset(nan_loss_at=2)
    spec = make_spec(tiny_bert, "lora")
    assert work(spec, tmp_path) == 0
    assert folder_of(spec, tmp_path).record().outcome == "diverged"


def test_the_inline_engine_does_the_run_here_and_its_log_is_in_the_failure(tiny_bert, tmp_path):
    from finetrial.engines.inline import PLUGIN

    TROUBLE.reset(error_at=(2, ZeroDivisionError("by zero")))
    spec = make_spec(tiny_bert, "lora")
    folder = folder_of(spec, tmp_path)
    handle = PLUGIN.start(folder.path, spec)
    assert PLUGIN.poll(handle).code == 1
    assert "Traceback" in folder.failure().log_tail
    assert "ZeroDivisionError: by zero" in folder.failure().log_tail
    TROUBLE.reset()
    folder.failure_file.unlink()
    assert PLUGIN.poll(PLUGIN.start(folder.path, spec)).code == 0
    assert folder.result().outcome == "done"


def test_two_runs_in_one_process_are_the_same_as_one(tiny_bert, tmp_path):
    """Nothing that the first leaves behind (generators, caches, Accelerate's state) reaches the second."""
    spec = make_spec(tiny_bert, "lora")

    def hashed(home: Path, **draws: Any) -> str | None:
        torch.rand(draws.get("draws", 0))
        return run(spec, home).weights_sha256

    assert hashed(tmp_path / "a") == hashed(tmp_path / "b", draws=17)
