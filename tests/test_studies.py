"""The example studies: each is one, and keeps what its page and the quick start promise."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetrial.fairness import decades
from finetrial.plan import overview
from finetrial.space import Range
from finetrial.study import Study
from finetrial.study_file import load_study

FOLDER = Path(__file__).resolve().parent.parent / "studies"
FILES = sorted(FOLDER.glob("*.yaml"))


def study(name: str) -> Study:
    return load_study(FOLDER / f"{name}.yaml")


@pytest.mark.parametrize("file", FILES, ids=[file.stem for file in FILES])
def test_every_example_is_a_study_with_fair_ranges(file):
    loaded = load_study(file)
    assert loaded.study == file.stem
    assert file.read_text(encoding="utf-8").startswith("# ")  # says what it is for
    assert [loaded.methods[0].use, *{method.use for method in loaded.methods[1:]}] == ["full", "lora"]
    assert loaded.claims
    claimed = {name for claim in loaded.claims for name in (claim.method, claim.reference)}
    for method in claimed:  # another one may be there to show what a rate does
        rate = loaded.spaces[method]["learning_rate"]
        assert isinstance(rate, Range), method
        assert decades(rate) == pytest.approx(2.0), method


def test_the_quick_start_is_small_offline_and_large_enough_for_a_verdict():
    quick = study("quickstart")
    assert len(quick.arms) == 2
    assert quick.search.trials >= 6
    assert quick.train.seeds >= 5
    assert quick.model.name.startswith("package:")
    assert [task.use for task in quick.tasks] == ["synthetic_qa"]
    assert not quick.track


def test_the_tinyllama_study_is_the_whole_one():
    whole = study("squad_v2-tinyllama")
    assert whole.model.name.startswith("TinyLlama/TinyLlama-1.1B")
    assert len(whole.model.revision or "") == 40  # a commit, which cannot move
    assert [arm.trials for arm in overview(whole)] == [15, 15]
    assert whole.search.startup_trials == 5
    assert whole.train.seeds >= 5
    assert whole.train.rows is None
    (task,) = whole.tasks
    assert task.use == "squad_v2"
    assert task.params["max_length"] == 384
    assert task.params["validation_rows"] is None
    assert task.params["test_rows"] is None
    assert whole.run.memory_bytes is not None
    assert whole.run.memory_bytes <= 24 * 10**9
    high = {name: space["learning_rate"].high for name, space in whole.spaces.items()}
    assert high == {"full": 5e-5, "lora": 5e-3}
