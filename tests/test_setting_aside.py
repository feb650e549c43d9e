"""Replicates on other inputs than their task's others: set aside with what follows from them, and done anew."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from finetrial import files, setting_aside
from finetrial.records import MethodSpec, Result, RunRecord, RunSpec
from finetrial.store import MODEL_OWNER, Home
from scripted import COST, make_spec

GOOD = {"validation": "v", "test": "t"}


class Study:
    """Runs that are done, with the inputs that they say they had."""

    def __init__(self, home: Path):
        self.home, self.specs = Home(home), []

    def done(self, stage: str, method: str | None = None, number: int = 0, **fields: Any) -> RunSpec:
        named = MethodSpec(name=method, use=method, params={}) if method else None
        of = {key: fields.pop(key) for key in ("subject", "reference") if key in fields}
        spec = make_spec(number, stage=stage, method=named, **of)
        self.specs.append(spec)
        self.again(spec, **fields)
        return spec

    def again(self, spec: RunSpec, **inputs: str) -> None:
        folder = self.home.run(spec.run_id)
        folder.create(spec)
        folder.write_result(
            Result(run_id=spec.run_id, outcome="done", cost=COST, input_sha256={**GOOD, **inputs})
        )

    def arm(self, method: str, *trained_on: str) -> list[RunSpec]:
        return [self.done("replicate", method, n, train=digest) for n, digest in enumerate(trained_on)]

    def records(self) -> list[RunRecord]:
        return [self.home.run(spec.run_id).record() for spec in self.specs]

    def undone(self) -> list[RunSpec]:
        return [spec for spec in self.specs if self.home.run(spec.run_id).result() is None]

    def set_aside(self) -> list[RunSpec]:
        """The replicates that are set aside now; they are done anew by whoever asks."""
        assert all(setting_aside.replicates_of_other_inputs(self.home, self.records()) or [True])
        return self.undone()


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return Study(tmp_path / "home")


def test_a_baseline_on_other_inputs_than_a_replicate_is_done_anew_once(study):
    baseline = study.done("baseline", test="other")
    study.arm("lora", "a", "a")
    (said,) = setting_aside.baselines_of_other_inputs(study.home, study.records())
    assert study.undone() == [baseline]
    assert said == (
        f"{baseline.run_id} is on other inputs than replicates of its task: it is done anew, and set aside in "
        f"{study.home.damaged / baseline.run_id}.1"
    )
    study.again(baseline, test="other")
    assert setting_aside.baselines_of_other_inputs(study.home, study.records()) == []


def test_equal_inputs_set_nothing_aside(study):
    study.done("baseline")
    study.done("baseline", "frozen-body", train="less")
    study.arm("lora", "a", "a")
    study.arm("full", "a")
    assert setting_aside.baselines_of_other_inputs(study.home, study.records()) == []
    assert setting_aside.replicates_of_other_inputs(study.home, study.records()) == []
    assert not study.home.damaged.exists()


def test_a_replicate_on_other_inputs_goes_with_its_model_and_the_probes_that_measured_it(study):
    study.done("baseline")
    first, odd, last = study.arm("lora", "a", "a", "a")
    study.again(odd, train="a", test="other")
    before = study.done("probe", "lora", 0, subject=first.run_id, reference=None)
    probes = [
        study.done("probe", "lora", 1, subject=odd.run_id, reference=first.run_id),
        study.done("probe", "lora", 2, subject=last.run_id, reference=odd.run_id),
    ]
    for spec in (first, odd):
        model = study.home.model_folder(spec)
        (model.parent / "temporary").mkdir(parents=True)
        (model.parent / "temporary" / MODEL_OWNER).write_text(spec.run_id)
        files.commit_folder(model.parent / "temporary", model)
    (said,) = setting_aside.replicates_of_other_inputs(study.home, study.records())
    place = study.home.damaged / f"{odd.run_id}.1"
    assert said == (
        f"{odd.run_id} had other test inputs than the baseline's: it is done anew, and set aside in {place}"
    )
    assert study.undone() == [odd, *probes]
    assert study.home.run(before.run_id).result() is not None
    assert (place / "model" / MODEL_OWNER).read_text() == odd.run_id
    assert not study.home.model_folder(odd).exists()
    assert study.home.model_folder(first).exists()
    for spec in (odd, *probes):
        study.again(spec, test="other", train="a")  # whatever it is, it does so by itself
    assert setting_aside.replicates_of_other_inputs(study.home, study.records()) == []


def test_the_few_that_trained_on_other_inputs_are_done_anew_and_then_the_many_if_it_was_they(study):
    lora, full = study.arm("lora", "new", "new"), study.arm("full", "new", "old")
    assert study.set_aside() == [full[1]]
    study.again(full[1], train="old")  # what it did was right: data were changed for the others
    assert study.set_aside() == [*lora, full[0]]
    for spec in (*lora, full[0]):
        study.again(spec, train="old")
    assert study.set_aside() == []


def test_where_nothing_tells_who_was_right_all_are_done_anew(study):
    runs = [*study.arm("lora", "a", "b"), *study.arm("full", "b", "a")]
    assert study.set_aside() == runs
