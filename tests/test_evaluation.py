"""A long evaluation that is cut off goes on where it was, with the same scores."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from finetrial.assemble import Workbench, open_workbench
from finetrial.evaluation import Kept, evaluate
from finetrial.notice import EXIT_CODE
from finetrial.plugins import Scored
from finetrial.store import RunFolder
from finetrial.train import make_accelerator
from fragile import TROUBLE, Interrupted
from tiny_runs import folder_of, make_spec, run

TOKENS = 96  # at once: several batches
OFTEN = {"how": {"checkpoint_steps": 1}}


@pytest.fixture(autouse=True)
def _no_trouble() -> Iterator[None]:
    TROUBLE.reset()
    yield
    TROUBLE.reset()


class Model(NamedTuple):
    """A model that is evaluated, and how many batches it was asked about."""

    bench: Workbench
    folder: RunFolder
    tuned: Any
    tokenizer: Any
    asked: list[int]

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


def cut_off(model: Model, at: int) -> None:
    """An evaluation that ends while it looks at that batch's outputs."""
    TROUBLE.reset(interrupt_at_prediction=at)
    with pytest.raises(Interrupted):
        model.evaluate(Kept(model.folder))
    TROUBLE.reset()


def test_a_cut_off_evaluation_computes_only_what_is_not_there(model):
    whole = model.evaluate(None)
    batches = len(model.asked)
    assert batches > 3
    cut_off(model, 3)  # whose outputs are there
    assert model.evaluate(Kept(model.folder)) == whole
    assert len(model.asked) == batches - 3
    assert model.evaluate(Kept(model.folder)) == whole  # nothing of it is left
    assert len(model.asked) == batches


def test_outputs_of_other_weights_are_not_taken(model):
    cut_off(model, 3)
    trained = [parameter for parameter in model.tuned.parameters() if parameter.requires_grad]
    with torch.no_grad():
        trained[-1].add_(0.5)
    scored = model.evaluate(Kept(model.folder))
    computed = len(model.asked)
    assert scored == model.evaluate(None)
    assert computed == len(model.asked)


def test_damaged_outputs_are_computed_again(model):
    whole = model.evaluate(None)
    batches = len(model.asked)
    cut_off(model, 3)
    part = sorted(model.folder.checkpoint.glob("evaluation/*/outputs.safetensors"))[0]
    content = bytearray(part.read_bytes())
    content[-1] ^= 1
    part.write_bytes(content)
    assert model.evaluate(Kept(model.folder)) == whole
    assert len(model.asked) == batches - 2


def test_a_process_that_is_told_to_end_leaves_within_an_evaluation(model):
    whole = model.evaluate(None)
    batches = len(model.asked)
    with pytest.raises(SystemExit) as ended:
        model.evaluate(Kept(model.folder, asked=lambda: len(model.asked) == 2))
    assert ended.value.code == EXIT_CODE
    assert model.evaluate(Kept(model.folder)) == whole
    assert len(model.asked) == batches - 2


@pytest.mark.parametrize("method", [None, "full", "lora"])
def test_a_run_cut_off_in_an_evaluation_has_the_same_result(tiny_bert, tmp_path, method):
    changes: dict[str, Any] = {"task_params": {"test_rows": 400}, "settings": {"epochs": 1}}
    if method is None:
        changes["stage"] = "baseline"
    spec = make_spec(tiny_bert, method, **OFTEN, **changes)
    whole = run(spec, tmp_path / "whole")
    predictions = TROUBLE.predictions
    TROUBLE.reset(interrupt_at_prediction=predictions)  # the last batch of test
    with pytest.raises(Interrupted):
        run(spec, tmp_path / "cut")
    folder = folder_of(spec, tmp_path / "cut")
    assert list(folder.checkpoint.glob("evaluation/*"))
    TROUBLE.reset()
    again = run(spec, tmp_path / "cut")
    measured = {"cost", "training"}
    assert again.model_dump(exclude=measured) == whole.model_dump(exclude=measured)
    assert not list(folder.checkpoint.glob("evaluation/*"))
