"""Stacked trainings equal their solo runs, and one that ends or diverges leaves the others as they were."""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from finetrial import stacking, stages
from finetrial.files import json_lines
from finetrial.notice import termination_notice
from finetrial.records import Outcome, Result, RunSpec
from finetrial.store import Home
from test_pipeline import run_study, start, wait_for_running
from tiny_models import write_roberta
from tiny_runs import folder_of, make_spec, run

pytestmark = pytest.mark.usefixtures("as_in_a_run")

LOSS_TOLERANCE, WEIGHTS_TOLERANCE = 1e-4, 1e-3


def eight(model: Path, *, task: dict[str, Any] | None = None, **how: Any) -> list[RunSpec]:
    """Different ranks, rates, sizes, lengths, dropout and streams."""
    return [
        make_spec(
            model,
            "lora",
            number=n,
            **(task or {}),
            settings={
                "rank": (2, 4, 8, 16)[n % 4],
                "learning_rate": 1e-3 * (n + 1),
                "batch_size": (4, 8)[n % 2],
                "epochs": (1, 2)[n // 4],
                "dropout": (0.0, 0.1)[n // 2 % 2],
            },
            seeds={"data_order": n, "head": 10 + n, "adapter": 20 + n, "dropout": 30 + n},
            how={"log_steps": 1, **({"micro_batch": 3} if n == 5 else {}), **how},
        )
        for n in range(8)
    ]


def together(specs: Sequence[RunSpec], home: Path) -> list[Result]:
    ends = stacking.together([stages.training(spec, folder_of(spec, home)) for spec in specs])
    for end in ends:
        if isinstance(end, BaseException):
            raise end
    return [end for end in ends if isinstance(end, Result)]


def losses(spec: RunSpec, home: Path) -> list[float]:
    return [r["loss"] for r in json_lines(folder_of(spec, home).metrics_file) if r["kind"] == "train"]


def weights(spec: RunSpec, home: Path) -> dict[str, torch.Tensor]:
    return load_file(Home(home).model_folder(spec) / "adapter_model.safetensors")


def reviews(folder: Path) -> dict[str, Any]:
    """A classification task of texts of different lengths."""
    for split in ("train", "test"):
        rows = [{"text": f"{split} {'good book ' * (n % 5 + 1)}{n}", "label": n % 2} for n in range(40)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {split: str(folder / f"{split}.jsonl") for split in ("train", "test")}
    return {"use": "classification", "params": {"data": data, "max_length": 24}}


@pytest.mark.parametrize("kind", ["tiny_bert", "tiny_llama", "classifier"])
def test_eight_stacked_trainings_equal_their_solo_runs(request, tmp_path, kind):
    classifier = kind == "classifier"
    model = request.getfixturevalue("tiny_bert" if classifier else kind)
    specs = eight(model, task=reviews(tmp_path) if classifier else None)
    results = together(specs, tmp_path / "stacked")
    for spec, stacked in zip(specs, results, strict=True):
        alone = run(spec, tmp_path / "alone")
        mine, theirs = losses(spec, tmp_path / "stacked"), losses(spec, tmp_path / "alone")
        assert len(mine) == stacked.training.steps == alone.training.steps
        assert mine == pytest.approx(theirs, rel=LOSS_TOLERANCE)
        found, wanted = weights(spec, tmp_path / "stacked"), weights(spec, tmp_path / "alone")
        assert found.keys() == wanted.keys()
        for name, tensor in wanted.items():
            # A bias of all logits alike changes no loss: its gradient is rounding, which AdamW blows up.
            if not name.endswith("qa_outputs.bias"):
                assert (found[name] - tensor).norm() <= WEIGHTS_TOLERANCE * tensor.norm(), name
        assert stacked.settings_used == alone.settings_used
        assert stacked.training.tokens == alone.training.tokens
        assert stacked.training.micro_batches == alone.training.micro_batches
        assert stacked.input_sha256 == alone.input_sha256
        assert stacked.score == pytest.approx(alone.score, abs=1e-6)


def test_passes_are_really_made_together(tiny_bert, tmp_path, monkeypatch):
    from finetrial.loop import Loop

    def never(*_: Any) -> float:
        raise AssertionError("a step was made alone")

    monkeypatch.setattr(Loop, "backward", never)
    together(eight(tiny_bert)[:3], tmp_path)


def test_dropout_in_a_head_is_no_reason_to_train_alone(tiny_bert, tmp_path, monkeypatch):
    """RoBERTa's classifier has one of its own."""
    (tmp_path / "roberta").mkdir()
    model = write_roberta(tmp_path / "roberta", tiny_bert)
    specs = eight(model, task=reviews(tmp_path))[:3]
    alone = [run(spec, tmp_path / "alone") for spec in specs]
    monkeypatch.setattr("finetrial.loop.Loop.backward", None)  # a step alone would fail
    results = together(specs, tmp_path / "stacked")
    for spec, one, other in zip(specs, results, alone, strict=True):
        mine, theirs = losses(spec, tmp_path / "stacked"), losses(spec, tmp_path / "alone")
        assert mine == pytest.approx(theirs, rel=LOSS_TOLERANCE)
        assert one.score == pytest.approx(other.score, abs=1e-6)


def test_one_that_diverges_leaves_without_touching_the_others(tiny_bert, tmp_path):
    good = eight(tiny_bert)[:3]
    bad = make_spec(tiny_bert, "lora", number=9, settings={"learning_rate": 1e30}, how={"log_steps": 1})
    found = together([good[0], bad, *good[1:]], tmp_path / "with")
    assert found[1].outcome == "diverged"
    without = together(good, tmp_path / "without")
    for spec, one, other in zip(good, [found[0], *found[2:]], without, strict=True):
        assert one.outcome == "done"
        assert all(map(math.isfinite, losses(spec, tmp_path / "with")))
        assert losses(spec, tmp_path / "with") == pytest.approx(losses(spec, tmp_path / "without"), rel=1e-5)
        assert one.score == other.score


def test_a_stack_that_mixes_up_its_adapters_is_found_out_though_they_begin_at_zero(tiny_bert, tmp_path):
    specs = eight(tiny_bert)[4:6]
    trainings = [stages.training(spec, folder_of(spec, tmp_path)) for spec in specs]
    turns = [next(training) for training in trainings]
    stack = stacking.Stack([turn.loop for turn in turns])
    before = [{name: p.clone() for name, p in turn.loop.model.named_parameters()} for turn in turns]
    assert stack.agrees([turn.batch for turn in turns])
    for turn, was in zip(turns, before, strict=True):
        assert all(torch.equal(p, was[name]) for name, p in turn.loop.model.named_parameters())
    for own in stack.stacked:
        if hasattr(own[0], "lora_A"):
            own.reverse()  # each with the other's
    assert not stack.agrees([turn.batch for turn in turns])
    for training in trainings:
        training.close()


def test_what_cannot_be_stacked_is_trained_beside_the_stack(tiny_bert, tmp_path):
    full = make_spec(tiny_bert, "full", number=7)
    specs = [full, *eight(tiny_bert)[:2]]
    results = together(specs, tmp_path / "mixed")
    assert results[0].weights_sha256 == run(full, tmp_path / "alone").weights_sha256


def test_a_stacked_training_is_resumed_alone_from_its_own_checkpoint(tiny_bert, tmp_path):
    specs = eight(tiny_bert, checkpoint_steps=2)[4:8:2]
    trainings = [stages.training(spec, folder_of(spec, tmp_path / "cut")) for spec in specs]
    turns = [next(training) for training in trainings]
    stack = stacking.Stack([turn.loop for turn in turns])
    for _ in range(3):
        found = stack.backward([turn.batch for turn in turns])
        turns = [training.send(loss) for training, loss in zip(trainings, found, strict=True)]
    for training in trainings:
        training.close()
    for spec in specs:
        assert folder_of(spec, tmp_path / "cut").checkpoint_step() == 2
        resumed, alone = run(spec, tmp_path / "cut"), run(spec, tmp_path / "alone")
        assert resumed.training.resumed_from == (2,)
        assert losses(spec, tmp_path / "cut") == pytest.approx(losses(spec, tmp_path / "alone"), rel=1e-4)
        assert json.loads(resumed.model_dump_json())["score"] == pytest.approx(alone.score, abs=1e-6)


# ---- a study that stacks -----------------------------------------------------------------------------------

STUDY = """\
study: stacked
model: {model}
tasks:
  synthetic_qa: {{rows: 48, validation_rows: 24, test_rows: 24, max_length: 64}}
methods:
  lora: {{search: {{learning_rate: {{low: 1e-3, high: 1e-1}}, rank: [2, 4]}}}}
search: {{trials: 4, sampler: random, space: {{epochs: 2, batch_size: 8}}}}
train: {{seeds: 2}}
measure: []
claims: []
run: {{threads: 1, log_steps: 1, checkpoint: 3 steps, stack: {stack}, parallel: {parallel}}}
"""


def outcome(home: Path) -> dict[str, tuple[list[Outcome | None], float | None]]:
    found = {}
    for folder in Home(home).find(""):
        record = folder.record()
        if record.spec.stage in ("trial", "replicate"):
            score = record.result.score if record.result else None
            found[record.spec.run_id] = [attempt.outcome for attempt in record.attempts], score
            assert not folder.checkpoint.exists()
            assert not folder.lease_file.exists()
    return found


@pytest.fixture(scope="module")
def done_alone(tiny_bert, tmp_path_factory) -> Path:
    """The home of the study with a process for every run."""
    folder = tmp_path_factory.mktemp("alone")
    (folder / "study.yaml").write_text(STUDY.format(model=tiny_bert, stack=1, parallel=1))
    run_study(folder / "study.yaml", folder / "home")
    return folder / "home"


@pytest.mark.parametrize(("stack", "parallel", "processes"), [("4", "1", 1), ("2", "2", 2), ("3", "auto", 2)])
def test_a_study_whose_runs_share_a_process_comes_out_the_same(
    tiny_bert, done_alone, tmp_path, stack, parallel, processes
):
    study, homes = tmp_path / "study.yaml", [done_alone, tmp_path / "home"]
    study.write_text(STUDY.format(model=tiny_bert, stack=stack, parallel=parallel))
    run_study(study, homes[1])
    alone, stacked = map(outcome, homes)
    assert stacked.keys() == alone.keys()
    for run_id, (attempts, score) in stacked.items():
        assert [attempt for attempt in attempts if attempt != "cancelled"] == ["done"]
        assert score == pytest.approx(alone[run_id][1], abs=1e-6)
    records = [folder.record() for folder in Home(homes[1]).find("trial.")]
    assert len({record.attempts[-1].pid for record in records}) == processes
    told = [json.loads((home / "analysis" / "summary.json").read_text())["fairness_notes"] for home in homes]
    assert [any("several in a process" in note for note in notes) for notes in told] == [False, True]
    charged = sum(record.result.cost.wall_seconds for record in records)
    begun = min(record.attempts[-1].started_at for record in records)
    passed = max(record.attempts[-1].ended_at or 0.0 for record in records) - begun
    assert charged <= passed * processes  # not all of it to each


def test_a_process_that_is_killed_costs_each_of_its_runs_one_attempt_and_nothing_else(tiny_bert, tmp_path):
    study, home = tmp_path / "study.yaml", tmp_path / "home"
    study.write_text(STUDY.format(model=tiny_bert, stack=4, parallel=1).replace("epochs: 2", "epochs: 30"))
    process = start(study, home)
    os.kill(wait_for_running(home, "trial.", process), signal.SIGKILL)
    assert process.wait(timeout=600) == 0, process.stdout.read()
    for run_id, (attempts, _) in outcome(home).items():
        assert attempts == (["crashed", "done"] if run_id.startswith("trial.") else ["done"])


def test_a_notice_within_another_is_the_same_and_leaves_it_standing():
    with termination_notice() as outer:
        with termination_notice() as inner:
            pass
        os.kill(os.getpid(), signal.SIGTERM)
        assert outer()
        assert inner()
