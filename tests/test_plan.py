"""A study as runs: which there are, what makes two of them the same, and which random streams they share."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from finetrial import plan
from finetrial.records import RunSpec
from finetrial.study_file import parse_study
from wrong_study_files import text_of

INPUTS = {"synthetic_qa": {"model": "aa"}, "other": {"model": "aa"}}
SETTINGS = {"learning_rate": 1e-3, "epochs": 1}


def make_study(**sections: str):
    sections = {"tasks": "{synthetic_qa: {}, other: {use: synthetic_qa, seed: 1}}"} | sections
    return parse_study(text_of(**sections), file="study.yaml", base=Path("/somewhere"))


def trial(study, method=0, number=0, *, settings=SETTINGS, inputs=INPUTS, threads=1, task=0) -> RunSpec:
    return plan.trial(study, study.tasks[task], study.methods[method], number, settings, inputs, threads)


def replicate(study, method=0, number=0) -> RunSpec:
    return plan.replicate(study, study.tasks[0], study.methods[method], number, SETTINGS, INPUTS, 1)


def test_every_arm_has_the_same_number_of_runs():
    arms = plan.overview(make_study(search="{trials: 6}", train="{seeds: 4}"))
    assert [(arm.task, arm.method) for arm in arms] == [
        ("synthetic_qa", "full"), ("synthetic_qa", "lora"), ("other", "full"), ("other", "lora"),
    ]  # fmt: skip
    assert {(arm.trials, arm.replicates, arm.probes) for arm in arms} == {(6, 4, 4)}


def test_without_measures_there_are_no_probes():
    assert {arm.probes for arm in plan.overview(make_study(measure="[]", claims="[]"))} == {0}


def test_ids_are_readable_and_a_function_of_what_is_run():
    first, again = trial(make_study(), 1, 7), trial(make_study(), 1, 7)
    assert first.run_id == again.run_id
    name, _, digest = first.run_id.rpartition("-")
    assert name == "trial.synthetic_qa.lora.007"
    assert len(digest) == 8
    assert int(digest, 16) >= 0


def test_where_and_how_a_run_is_done_is_not_part_of_its_identity():
    here = trial(make_study())
    there = trial(make_study(run="{parallel: 4, trial_limit: 1 h, micro_batch: 2, engine: inline}"), threads=8)
    assert there.how != here.how
    assert there.run_id == here.run_id


@pytest.mark.parametrize(
    "changed",
    [
        {"model": "./another"},
        {"search": "{rows: 100}"},
        {"train": "{schedule: cosine}"},
        {"train": "{early_stopping: {patience: 2}}"},
        {"search": "{seed: 1}"},
        {"tasks": "{synthetic_qa: {rows: 48}}"},
        {"methods": "{full: {}, lora: {target: attention}}"},
    ],
)
def test_what_is_run_is_part_of_a_run_s_identity(changed):
    assert trial(make_study(**changed), 1).run_id != trial(make_study(), 1).run_id


def test_settings_inputs_and_number_are_part_of_a_run_s_identity():
    study = make_study()
    ids = {
        trial(study).run_id,
        trial(study, settings=SETTINGS | {"epochs": 2}).run_id,
        trial(study, inputs={"synthetic_qa": {"model": "bb"}}).run_id,
        trial(study, number=1).run_id,
        trial(study, method=1).run_id,
        trial(study, task=1).run_id,
        replicate(study).run_id,
    }
    assert len(ids) == 7


def test_more_trials_and_seeds_leave_the_runs_there_are_as_they_were():
    few, many = make_study(search="{trials: 3}", train="{seeds: 2}"), make_study(train="{seeds: 9}")
    assert trial(few, 1, 2).run_id == trial(many, 1, 2).run_id
    assert replicate(few, 1, 1).run_id == replicate(many, 1, 1).run_id


def test_methods_share_their_random_streams_and_replicates_do_not():
    study = make_study()
    for number in range(3):
        assert replicate(study, 0, number).seeds == replicate(study, 1, number).seeds
        assert trial(study, 0, number).seeds == trial(study, 1, number).seeds
    streams = [replicate(study, 0, number).seeds for number in range(3)]
    for one, other in itertools.combinations(streams, 2):
        assert not set(one.model_dump().values()) & set(other.model_dump().values())


def test_trials_share_one_luck_which_no_replicate_has():
    study = make_study()
    trials = {trial(study, 0, number).seeds for number in range(4)}
    assert len(trials) == 1
    assert trials.isdisjoint(replicate(study, 0, number).seeds for number in range(4))


def test_the_four_streams_of_a_run_are_separate_and_depend_on_the_study_s_seed_and_task():
    seeds = trial(make_study()).seeds
    assert len(set(seeds.model_dump().values())) == 4
    assert trial(make_study(search="{seed: 1}")).seeds != seeds
    assert trial(make_study(), task=1).seeds != seeds


def test_search_trains_on_its_own_rows_and_replicates_on_theirs():
    study = make_study(search="{rows: 100}", train="{rows: 700}")
    assert trial(study).rows == 100
    assert replicate(study).rows == 700


def test_a_probe_names_whom_it_measures_and_against_whom():
    study = make_study()
    one, two = replicate(study, 0, 0), replicate(study, 0, 1)
    alone, compared = plan.probe(study, two, None), plan.probe(study, two, one)
    assert alone.stage == "probe"
    assert (alone.subject, alone.reference) == (two.run_id, None)
    assert compared.reference == one.run_id
    assert alone.run_id != compared.run_id
    assert alone.name == "probe.synthetic_qa.full.001"


def test_the_control_measures_the_base_itself():
    study = make_study()
    control = plan.control(plan.baseline(study, study.tasks[0], INPUTS, 1), study)
    assert control.name == "probe.synthetic_qa.000"
    assert control.subject is None
    assert control.measures == {"drift": {"use": "drift", "params": {"rows": 512, "perturbation": True}}}


def test_a_spec_comes_back_from_its_json_with_the_same_id():
    spec = trial(make_study(), 1, 3)
    again = RunSpec.model_validate_json(spec.model_dump_json(indent=1))
    assert again == spec
    assert again.run_id == spec.run_id
