"""A run that was cut off and resumed is the same to the bit; a damaged checkpoint is never loaded."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from finetrial.files import json_lines
from finetrial.records import EarlyStopping, How, RunSpec
from finetrial.store import RunFolder
from fragile import TROUBLE, Interrupted
from tiny_runs import examples, folder_of, make_spec, records, run, unmeasured

pytestmark = pytest.mark.usefixtures("no_trouble")


def interrupted_at(spec: RunSpec, home: Path, *losses: int) -> None:
    """Start the run as often as there are numbers; each time it is cut off at that loss computation."""
    for count in losses:
        TROUBLE.reset(interrupt_at=count)
        with pytest.raises(Interrupted):
            run(spec, home)
    TROUBLE.reset()


# 24 rows in batches of 4 for 2 epochs: 12 steps, evaluated after 3, 6, 9 and 12.
RESUMED = {
    "full, best weights from before the cut": ("full", {}, (11,)),
    "lora with dropout": ("lora", {}, (10,)),
    "cut twice": ("lora", {}, (6, 4)),
    "cut before the first checkpoint": ("full", {}, (1,)),
    "cut between best weights and checkpoint": ("full", {"how": {"checkpoint_steps": 4}}, (8,)),
    "keep last": ("full", {"rules": {"keep": "last"}}, (10,)),
    "early stopping": ("full", {"rules": {"early_stopping": EarlyStopping(patience=2)}}, (5,)),
    "a trial": ("lora", {"stage": "trial"}, (10,)),
    "cosine schedule": ("lora", {"rules": {"schedule": "cosine"}}, (7,)),
    "micro-batches": ("full", {"how": {"micro_batch": 2, "checkpoint_steps": 1}}, (15,)),
}


@pytest.mark.parametrize("case", RESUMED, ids=RESUMED.keys())
def test_a_run_that_was_cut_off_and_resumed_is_the_same_to_the_bit(tiny_bert, tmp_path, case):
    method, changes, cuts = RESUMED[case]
    rules = {"evaluations_per_epoch": 2, **changes.get("rules", {})}
    how = {"checkpoint_steps": 1, **changes.get("how", {})}
    spec = make_spec(tiny_bert, method, **{**changes, "rules": rules, "how": how})
    never = How(**{**spec.how.model_dump(), "checkpoint_steps": None})
    whole = run(spec.model_copy(update={"how": never}), tmp_path / "whole")
    interrupted_at(spec, tmp_path / "cut", *cuts)
    resumed = run(spec, tmp_path / "cut")

    assert resumed.weights_sha256 == whole.weights_sha256
    assert records(spec, tmp_path / "cut") == records(spec, tmp_path / "whole")
    assert unmeasured(resumed) == unmeasured(whole)
    assert examples(spec, tmp_path / "cut") == examples(spec, tmp_path / "whole")
    every, micro = how["checkpoint_steps"], how.get("micro_batch", 4)
    at, expected = 0, []
    for cut in cuts:
        at += (cut - 1) * micro // 4  # steps that were finished
        at -= at % every
        expected += [at] if at else []
    assert resumed.training.resumed_from == tuple(expected)
    assert whole.training.resumed_from == ()


def left_at(spec: RunSpec, home: Path, step: int) -> RunFolder:
    """The run's folder, after SIGTERM came within that step and was answered with a checkpoint."""
    TROUBLE.reset(sigterm_at=step)
    with pytest.raises(SystemExit) as left:
        run(spec, home)
    assert left.value.code == 143
    folder = folder_of(spec, home)
    assert folder.checkpoint_step() == step
    return folder


@pytest.mark.parametrize("step", [1, 5, 12])
def test_a_notice_to_end_is_answered_with_a_checkpoint_and_nothing_is_done_twice(tiny_bert, tmp_path, step):
    spec = make_spec(tiny_bert, "lora", rules={"evaluations_per_epoch": 2})  # no checkpoint is ever due
    whole = run(spec, tmp_path / "whole")
    folder = left_at(spec, tmp_path / "cut", step)
    TROUBLE.reset()
    resumed = run(spec, tmp_path / "cut")
    assert TROUBLE.losses == 12 - step
    told = [event["event"] for event in json_lines(folder.events_file)]
    assert [event for event in told if event in ("left when asked to end", "resumed")] == [
        "left when asked to end", "resumed",
    ]  # fmt: skip
    assert resumed.weights_sha256 == whole.weights_sha256
    assert records(spec, tmp_path / "cut") == records(spec, tmp_path / "whole")
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.parametrize("step", [6, 12])
def test_a_notice_to_end_is_answered_within_a_long_evaluation_too(tiny_bert, tmp_path, step):
    spec = make_spec(tiny_bert, "lora", task_params={"validation_rows": 700})  # several batches
    whole = run(spec, tmp_path / "whole")
    folder = left_at(spec, tmp_path / "cut", step)
    assert list(folder.checkpoint.glob("evaluation/*"))
    TROUBLE.reset(interrupt_at=1)
    if step == 6:  # killed after it has judged, before a checkpoint
        with pytest.raises(Interrupted):
            run(spec, tmp_path / "cut")
    TROUBLE.reset()
    resumed = run(spec, tmp_path / "cut")
    assert TROUBLE.losses == 12 - step
    assert unmeasured(resumed) == unmeasured(whole)
    assert records(spec, tmp_path / "cut") == records(spec, tmp_path / "whole")


def test_the_cases_of_resuming_are_what_they_say(tiny_bert, tmp_path):
    """Or they would show nothing: best weights from before the cut, a stop before the end."""
    rules = {"evaluations_per_epoch": 2}
    spec = make_spec(tiny_bert, "full", rules=rules)
    assert run(spec, tmp_path).training.best_step < 9
    spec = make_spec(tiny_bert, "full", rules={**rules, "early_stopping": EarlyStopping(patience=2)})
    training = run(spec, tmp_path).training
    assert training.stopped_early
    assert 5 < training.steps < training.planned_steps == 12


def test_time_and_tokens_of_earlier_attempts_are_counted(tiny_bert, tmp_path):
    spec = make_spec(tiny_bert, "full", how={"checkpoint_steps": 1})
    whole = run(spec, tmp_path / "whole")
    interrupted_at(spec, tmp_path / "cut", 11)
    folder = folder_of(spec, tmp_path / "cut")
    [step] = (folder.checkpoint).glob("step-*")
    state = (step / "state.json").read_text()
    before = float(state.split('"train_seconds": ')[1].split(",")[0])
    resumed = run(spec, tmp_path / "cut")
    assert resumed.cost.train_seconds > before > 0
    assert resumed.cost.wall_seconds > before
    assert resumed.cost.flops == whole.cost.flops > 0


@pytest.mark.parametrize("damage", ["bit", "cut", "no manifest", "best"])
def test_a_damaged_checkpoint_is_never_loaded(tiny_bert, tmp_path, damage, capsys):
    rules, how = {"evaluations_per_epoch": 2}, {"checkpoint_steps": 5}
    spec = make_spec(tiny_bert, "full", settings={"epochs": 1}, rules=rules, how=how)
    whole = run(spec, tmp_path / "whole")
    interrupted_at(spec, tmp_path / "cut", 6)
    folder = folder_of(spec, tmp_path / "cut").checkpoint
    assert [p.name for p in folder.glob("step-*")] == ["step-00000005"]
    best = next(folder.glob("best-*")) / "weights.safetensors"
    weights = folder / "step-00000005" / "weights.safetensors"
    match damage:
        case "bit":
            data = bytearray(weights.read_bytes())
            data[len(data) // 2] ^= 1
            weights.write_bytes(data)
        case "cut":
            weights.write_bytes(weights.read_bytes()[:-1])
        case "no manifest":
            (weights.parent / "manifest.json").unlink()
        case "best":
            best.write_bytes(best.read_bytes()[:-1])
    resumed = run(spec, tmp_path / "cut")
    assert resumed.training.resumed_from == ()
    assert resumed.weights_sha256 == whole.weights_sha256
    assert "step-00000005 is passed over" in capsys.readouterr().err
