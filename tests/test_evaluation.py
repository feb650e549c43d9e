"""A long evaluation that is cut off goes on where it was, with the same scores."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from finetrial.assemble import Workbench, open_workbench
from finetrial.batching import collate, model_inputs
from finetrial.engines.inline import Handle, Inline
from finetrial.evaluation import Kept, evaluate
from finetrial.notice import EXIT_CODE
from finetrial.packing import Packing
from finetrial.plugins import Scored
from finetrial.progress import Progress
from finetrial.records import RunRecord, RunSpec
from finetrial.schedule import Scheduler
from finetrial.store import RunFolder
from finetrial.train import make_accelerator
from fragile import TROUBLE, Interrupted
from tiny_runs import folder_of, make_spec, run, unmeasured

pytestmark = pytest.mark.usefixtures("no_trouble")

TOKENS = 96  # at once: several batches
OFTEN = {"how": {"checkpoint_steps": 1}}


class Model(NamedTuple):
    """A model that is evaluated, and how many batches it was asked about."""

    bench: Workbench
    folder: RunFolder
    tuned: Any
    tokenizer: Any
    asked: list[int]

    def kept(self, asked: Callable[[], bool] = lambda: False) -> Kept:
        return Kept(self.folder.checkpoint, "test", self.bench.spec.how, asked)

    def evaluate(self, kept: Kept | None) -> Scored:
        self.asked.clear()
        bench = self.bench
        features = bench.encode(bench.splits.test, bench.build_base())
        accelerator = make_accelerator(bench.spec.rules)
        return evaluate(
            accelerator, self.tuned, bench, self.tokenizer, features, bench.splits.test,
            {"no_answer_threshold": 0.0}, tokens=TOKENS, kept=kept,
        )  # fmt: skip


@pytest.fixture(params=["full", "lora"])
def model(request: pytest.FixtureRequest, tiny_bert: Path, tmp_path: Path) -> Model:
    spec = make_spec(tiny_bert, request.param, **OFTEN)
    folder = folder_of(spec, tmp_path)
    bench = open_workbench(spec, folder.home)
    tuned, built = bench.build_tuned()
    asked: list[int] = []
    tuned.register_forward_hook(lambda *_: asked.append(1))
    return Model(bench, folder, tuned, built.tokenizer, asked)


def test_every_example_has_its_own_loss(model):
    """The head's of a batch of its inputs alone, whatever was beside them."""
    losses = model.evaluate(None).losses
    bench = model.bench
    features = bench.encode(bench.splits.test, bench.build_base())
    for row, example in enumerate(bench.splits.test):
        tensors = collate([f for f in features if f.row == row], model.tokenizer.pad_token_id)
        with torch.no_grad():
            alone = bench.task.head.losses(model.tuned(**model_inputs(tensors)), tensors)
        assert losses[example["id"]] == pytest.approx(float(alone.mean()), rel=1e-5)
    assert len(losses) == len(bench.splits.test)
    assert len(set(losses.values())) > 1


def cut_off(model: Model, at: int) -> None:
    """An evaluation that ends while it looks at that batch's outputs."""
    TROUBLE.reset(interrupt_at_prediction=at)
    with pytest.raises(Interrupted):
        model.evaluate(model.kept())
    TROUBLE.reset()


def test_a_cut_off_evaluation_computes_only_what_is_not_there(model):
    whole = model.evaluate(None)
    batches = len(model.asked)
    assert batches > 3
    cut_off(model, 3)  # whose outputs are there
    assert model.evaluate(model.kept()) == whole
    assert len(model.asked) == batches - 3


def test_outputs_of_other_weights_are_not_taken(model):
    cut_off(model, 3)
    trained = [parameter for parameter in model.tuned.parameters() if parameter.requires_grad]
    with torch.no_grad():
        trained[-1].add_(0.5)
    scored = model.evaluate(model.kept())
    computed = len(model.asked)
    assert scored == model.evaluate(None)
    assert computed == len(model.asked)


def test_damaged_outputs_are_computed_again(model):
    whole = model.evaluate(None)
    batches = len(model.asked)
    cut_off(model, 3)
    part = sorted(model.folder.checkpoint.glob("evaluation/*/*/outputs.safetensors"))[0]
    content = bytearray(part.read_bytes())
    content[-1] ^= 1
    part.write_bytes(content)
    assert model.evaluate(model.kept()) == whole
    assert len(model.asked) == batches - 2


def test_a_process_that_is_told_to_end_leaves_within_an_evaluation(model):
    whole = model.evaluate(None)
    batches = len(model.asked)
    with pytest.raises(SystemExit) as ended:
        model.evaluate(model.kept(lambda: len(model.asked) == 2))
    assert ended.value.code == EXIT_CODE
    assert model.evaluate(model.kept()) == whole
    assert len(model.asked) == batches - 2


SLOW_TEST: dict[str, Any] = {"task_params": {"test_rows": 700}, "settings": {"epochs": 1}}  # several batches


@pytest.mark.parametrize("method", [None, "full", "lora"])
def test_a_run_cut_off_in_its_test_goes_on_there(tiny_bert, tmp_path, method):
    stage = "replicate" if method else "baseline"
    spec = make_spec(tiny_bert, method, stage=stage, **OFTEN, **SLOW_TEST)
    whole = run(spec, tmp_path / "whole")
    batches, steps = TROUBLE.predictions, TROUBLE.losses
    TROUBLE.reset(interrupt_at_prediction=batches)  # the last batch of test
    with pytest.raises(Interrupted):
        run(spec, tmp_path / "cut")
    folder = folder_of(spec, tmp_path / "cut")
    parts = folder.kept_outputs()
    assert parts == len(list(folder.checkpoint.glob("evaluation/test/*"))) >= 2
    TROUBLE.reset()
    again = run(spec, tmp_path / "cut")
    # Trained no more, and validation, whose weights were judged by then, is not asked again.
    assert (TROUBLE.losses, TROUBLE.predictions) == (0, batches - 1 if method else batches)
    assert (steps > 0) == (method is not None)
    measured = {"cost", "training"}
    assert again.model_dump(exclude=measured) == whole.model_dump(exclude=measured)
    assert method is None or unmeasured(again) == unmeasured(whole)


@pytest.mark.parametrize("method", [None, "lora"])
def test_a_notice_to_end_is_answered_in_the_test_too(tiny_bert, tmp_path, method):
    stage = "replicate" if method else "baseline"
    spec = make_spec(tiny_bert, method, stage=stage, **SLOW_TEST)  # no checkpoint is due
    whole = run(spec, tmp_path / "whole")
    batches = TROUBLE.predictions
    TROUBLE.reset(sigterm_at_prediction=batches - 2)
    with pytest.raises(SystemExit) as left:
        run(spec, tmp_path / "cut")
    assert left.value.code == EXIT_CODE
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert folder_of(spec, tmp_path / "cut").kept_outputs() == 1
    TROUBLE.reset()
    again = run(spec, tmp_path / "cut")
    assert TROUBLE.losses == 0  # nothing is trained twice
    measured = {"cost", "training"}
    assert again.model_dump(exclude=measured) == whole.model_dump(exclude=measured)


def test_parts_of_an_evaluation_count_as_getting_further(tiny_bert, tmp_path):
    """Killed again and again at a test of which each attempt does one batch more."""
    spec = make_spec(tiny_bert, None, stage="baseline", how={"checkpoint_steps": 1}, **SLOW_TEST)
    folder = folder_of(spec, tmp_path)
    finished: list[RunRecord] = []
    Scheduler(folder.home, OneBatch(), Packing(1), 2, Progress(), finished.append).run([iter([spec])])
    record = finished[0]
    assert record.outcome == "done"
    assert len(record.attempts) > 2
    assert {attempt.outcome for attempt in record.attempts[:-1]} == {"crashed"}


class OneBatch(Inline):
    """An engine whose workers die after they have computed one batch more than the last one."""

    attempts = 1

    def start(self, run_folder: Path, spec: RunSpec) -> Any:
        self.attempts += 1
        TROUBLE.reset(interrupt_at_prediction=self.attempts)
        try:
            return super().start(run_folder, spec)
        except Interrupted:
            return Handle(os.getpid(), -signal.SIGKILL)
