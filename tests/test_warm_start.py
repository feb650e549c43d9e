"""A search that begins where another method's best trial says; what the ledger tells of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from finetrial import verify
from finetrial.arm_search import ArmSearch
from finetrial.frozen import short_hash
from finetrial.opening import open_home, resolve_inputs
from finetrial.records import Failure, Result, SearchStop
from finetrial.search import warm
from finetrial.space import Choice
from finetrial.store import Home
from finetrial.study_file import parse_study
from scripted import COST
from test_pipeline import run_study
from wrong_study_files import text_of

STUDY = """\
study: warm
model: {model}
tasks:
  synthetic_qa: {{rows: 32, validation_rows: 24, test_rows: 24, max_length: 64}}
methods:
  full: {{search: {{learning_rate: {{low: 1e-4, high: 1e-2}}}}}}
  lora: {{search: {{learning_rate: {{low: 1e-3, high: 1e-1}}, rank: [2, 4], dropout: 0.0}}}}
search: {{trials: 5, startup: 2, {halving}warm_start: full, space: {{epochs: [1, 3], batch_size: 8}}}}
train: {{seeds: 1}}
measure: []
claims: []
run: {{threads: 1, log_steps: 1, parallel: 2}}
"""


@pytest.mark.parametrize("halving", ["", "halving: 2, "])
def test_the_first_guided_trial_begins_at_ten_times_the_other_searchs_best_rate(tiny_bert, tmp_path, halving):
    study, home = tmp_path / "study.yaml", tmp_path / "home"
    study.write_text(STUDY.format(model=tiny_bert, halving=halving))
    run_study(study, home)
    runs = [folder.record() for folder in Home(home).find("trial.")]
    trials = {
        (r.spec.method.name, r.spec.number): r for r in runs if not r.spec.rung or r.spec.rung.number == 1
    }
    assert len(trials) == 10
    value = (lambda r: -r.result.validation_loss) if halving else (lambda r: r.result.score)
    full = [r for (name, _), r in trials.items() if name == "full"]
    best = max(full, key=lambda r: (value(r), -r.spec.number))
    warm = trials["lora", 2].spec
    assert warm.warm_start.run_id == best.spec.run_id
    assert warm.settings["learning_rate"] == pytest.approx(10 * best.spec.settings["learning_rate"], rel=1e-5)
    for shared in ("epochs", "warmup_ratio", "weight_decay"):
        assert warm.settings[shared] == pytest.approx(best.spec.settings[shared], rel=1e-5)
    assert [r.spec.number for r in trials.values() if r.spec.warm_start] == [2]
    read = parse_study(study.read_text(), file=str(study), base=study.parent)
    opened = open_home(read, Home(home), resolve_inputs(read))
    searches = {method.name: ArmSearch(read, opened, task, method, print) for task, method in read.arms}
    for (name, number), trial in trials.items():  # one that is lost is done anew as it was
        file = Home(home).run(trial.spec.run_id).path
        file.rename(tmp_path / "lost")
        assert searches[name].trial(number) == trial.spec
        (tmp_path / "lost").rename(file)
    full, lora = json.loads((home / "analysis" / "summary.json").read_text())["ledger"]
    assert full["warm_start"] is None
    assert lora["warm_start"] == warm.warm_start.model_dump()
    assert (
        f"from full's trial {best.spec.number}, learning rate x 10"
        in (home / "report" / "report.md").read_text()
    )
    assert not verify.verify(home).differences


def test_a_told_setting_is_the_choice_that_equals_it_and_a_rate_the_nearest_choice():
    """As the choice is written: 1.0 and 1 are told apart by the search that is to learn from the trial."""
    space = {
        "learning_rate": Choice(choices=(1e-4, 1e-3, 3e-3)),
        "epochs": Choice(choices=(0.5, 1.0, 2.0)),
        "shuffle": Choice(choices=(True, False)),
        "batch_size": Choice(choices=(8, 16)),
    }
    settings = {"learning_rate": 1e-4, "epochs": 2.0, "shuffle": False, "batch_size": 8}
    best = {"learning_rate": 1.6e-4, "epochs": 1, "shuffle": 1, "batch_size": 32}
    moved = warm(settings, best, space, 10.0)
    assert moved == {"learning_rate": 1e-3, "epochs": 1.0, "shuffle": False, "batch_size": 8}
    assert isinstance(moved["epochs"], float)
    assert warm(settings, {"learning_rate": 1.8e-4}, space, 10.0)["learning_rate"] == 3e-3  # by ratio
    assert warm(settings, {"shuffle": True}, space, 10.0)["shuffle"] is True


def two_searches(model, folder, rules=""):
    """The opened folder of a study, and the searches of its arms."""
    file = folder / "study.yaml"
    file.write_text(STUDY.format(model=model, halving=rules))
    study = parse_study(file.read_text(), file=str(file), base=file.parent)
    opened = open_home(study, Home(folder / "home"), resolve_inputs(study))
    return opened, *(ArmSearch(study, opened, *arm, print) for arm in study.arms)


def test_it_waits_for_a_trial_that_this_command_tries_again(tiny_bert, tmp_path):
    """A fault of the program stopped the study at the other search's last trial, which will be done."""
    opened, full, lora = two_searches(tiny_bert, tmp_path, "")
    records = []
    for number in range(5):
        record = opened.home.run(full.trial(number).run_id)
        record.create(full.trial(number))
        record.write_result(Result(run_id=record.path.name, outcome="done", cost=COST, score=float(number)))
        records.append(record)
    assert lora._told()
    records[4].result_file.unlink()
    assert not lora._told()
    failure = Failure(run_id=records[4].path.name, kind="bug", reason="no", attempt=1)
    records[4].write_failure(failure)
    again = replace(lora, tried_again={failure.run_id: 1})
    assert not again._told()
    records[4].write_failure(failure.model_copy(update={"kind": "crashed", "final": True, "attempt": 2}))
    assert again._told()  # it was tried again, and in vain
    records[4].write_failure(failure.model_copy(update={"kind": "out_of_memory"}))
    assert not lora._told()  # it goes on with less at once


def test_the_told_trial_is_made_though_the_search_could_end_before_it(tiny_bert, tmp_path):
    opened, full, lora = two_searches(tiny_bert, tmp_path, "early_stop: true, ")

    def finish(spec, score):
        folder = opened.home.run(spec.run_id)
        folder.create(spec)
        folder.write_result(Result(run_id=spec.run_id, outcome="done", cost=COST, score=score))

    for number in range(5):
        finish(full.trial(number), float(number))
    lane = lora.lane()
    for number, spec in enumerate(next(lane)):
        finish(spec, float(number))
    opened.home.stop_search(
        lora.task.name, lora.method.name, SearchStop(after=2, planned=5, gain=0.1, noise=0.2)
    )
    told = next(lane)
    assert told.number == 2
    assert told.warm_start.trial == 4
    finish(told, 1.0)
    assert list(lane) == []


def test_without_it_a_study_is_what_it_was():
    plain = parse_study(text_of(), file="study.yaml", base=Path("/nowhere"))
    asked = parse_study(text_of(search="{warm_start: full}"), file="study.yaml", base=Path("/nowhere"))
    assert asked.search.warm_start == "full"
    assert asked.identity() != plain.identity()
    told = plain.model_dump(mode="json", exclude={"run", "track", "file", "base"})
    for later in ("trials", "halving", "early_stop", "warm_start"):
        del told["search"][later]
    del told["train"]["seeds"]
    assert plain.identity() == short_hash(told, 16)
