"""`finetrial check`: what it says of a study that can run and of one that cannot, and what it leaves behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import Result

from conftest import call
from finetrial.store import Home
from wrong_study_files import text_of

pytestmark = pytest.mark.usefixtures("in_a_folder_of_its_own")

RATES = "{search: {learning_rate: {low: 1e-3, high: 1e-2}}}"
SMALL = {
    "study": "small",
    "tasks": "{synthetic_qa: {rows: 24, validation_rows: 9, test_rows: 9, max_length: 64}}",
    "methods": f"{{full: {RATES}, lora: {RATES}}}",
    "search": "{trials: 3, rows: 16, space: {epochs: 1, batch_size: [4, 8]}}",
    "train": "{seeds: 1}",
    "claims": "[]",
    "measure": "{drift: {rows: 8}}",
    "run": "{engine: inline, threads: 1}",
}
MODEL = "{{name: {}, config: {{hidden_dropout_prob: 0.0, attention_probs_dropout_prob: 0.0}}}}"
HOME = Home(Path("runs/small"))


def write_study(model: Path, **changes: str) -> None:
    Path("study.yaml").write_text(text_of(**{**SMALL, "model": MODEL.format(model), **changes}))


def check_json() -> dict:
    return json.loads(Path("runs/small/check.json").read_text())


def said(result: Result) -> str:
    return " ".join(result.stdout.split())


def test_it_fits_learns_and_foretells(tiny_bert):
    write_study(tiny_bert)
    result = call("check", "study.yaml")
    assert result.exit_code == 0, result.output
    found = check_json()
    assert (found["faults"], found["killed"], found["retries"]) == ([], 0, 0)
    assert found["runs"] == found["ended_well"] == 1 + 2 + 1 + 1 + 2  # baseline, arms, frozen, control, pilots
    for arm in found["arms"].values():
        rehearsal = arm["rehearsal"]
        assert rehearsal["overfit"]["tries"][-1]["loss"] < 0.1
        assert 0.5 < rehearsal["predicted_memory_bytes"] / rehearsal["measured_memory_bytes"] < 2
        assert [pace["batch_size"] for pace in rehearsal["search"]["paces"]] == [4, 8]
        assert [pace["steps"] for pace in rehearsal["search"]["paces"]] == [4, 2]
        assert [pace["steps"] for pace in rehearsal["train"]["paces"]] == [6, 3]
    assert sorted(len(arm["pilots"]) for arm in found["arms"].values()) == [0, 2]
    demanding = max(found["arms"], key=lambda arm: found["arms"][arm]["rehearsal"]["predicted_memory_bytes"])
    assert len(found["arms"][demanding]["pilots"]) == 2
    task = found["tasks"]["synthetic_qa"]
    assert set(task["test"]) == {"no_answer", "random_span"}
    assert set(task["validation"]) == {"no_answer", "random_span", "untrained", "frozen body"}
    phases = found["forecast"]["phases"]
    assert set(phases) == {"baseline", "control", "search", "train", "measure", "report"}
    assert found["forecast"]["seconds"] == pytest.approx(sum(phases.values()))
    for words in ("memory, predicted peak", "ten samples loss", "the whole study, predicted"):
        assert words in said(result)
    assert "| ten samples | loss" in Path("runs/small/check.md").read_text()


def test_what_run_needs_too_is_done_once(tiny_bert):
    write_study(tiny_bert)
    assert call("check", "study.yaml").exit_code == 0
    before = {
        folder.path.name: folder.result_file.stat().st_mtime_ns
        for folder in HOME.find("")
        if not folder.path.name.startswith("check.")
    }
    assert sum(name.startswith("trial.") for name in before) == 2
    assert call("run", "study.yaml").exit_code == 0
    after = {folder.path.name: folder.result_file.stat().st_mtime_ns for folder in HOME.find("")}
    assert {name: after[name] for name in before} == before
    assert "rehears" not in Path("runs/small/report/index.html").read_text().lower()


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="of Linux")
@pytest.mark.parametrize("train", ["{seeds: 1}", "{seeds: 1, precision: fp32}"])
def test_a_processor_whose_bf16_nobody_has_decided_on_is_told(tiny_bert, train):
    flags = set(Path("/proc/cpuinfo").read_text().split())
    native = bool(flags & {"avx512_bf16", "amx_bf16", "bf16"}) and not torch.cuda.is_available()
    write_study(tiny_bert, measure="[]", methods=f"{{full: {RATES}}}", train=train)
    assert call("check", "study.yaml").exit_code == 0
    told = [note for note in check_json()["notes"] if "instructions for bf16" in note]
    assert len(told) == (native and "fp32" not in train)


def test_trials_too_short_for_halving_are_told_until_the_study_has_begun(tiny_bert):
    search = "{trials: 3, rows: 16, halving: 3, space: {epochs: 1, batch_size: [4, 8]}}"
    write_study(tiny_bert, measure="[]", methods=f"{{full: {RATES}}}", search=search)
    for begun in (False, True):
        result = call("check", "study.yaml")
        assert result.exit_code == 0, result.output
        told = "note: synthetic_qa/full: its trials are first compared after 1 step on the average"
        assert (told in said(result)) is not begun
        assert begun or call("run", "study.yaml").exit_code == 0


def test_json_is_the_file_and_nothing_else(tiny_bert):
    write_study(tiny_bert, measure="[]", methods=f"{{full: {RATES}}}")
    result = call("check", "study.yaml", "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout) == check_json()


def test_after_a_check_alone_the_study_may_be_changed_and_its_pilots_go(tiny_bert):
    write_study(tiny_bert)
    assert call("check", "study.yaml").exit_code == 0
    pilots = {folder.path.name for folder in HOME.find("trial.")}
    gone = len(HOME.find("")) - len(HOME.find("baseline."))
    write_study(tiny_bert, search="{trials: 2, rows: 12, space: {epochs: 1, batch_size: 8}}")
    changed = call("run", "study.yaml")
    assert changed.exit_code == 0, changed.output
    assert "`finetrial run` had trained nothing, so it begins anew" in said(changed)
    assert f"what had run of it was deleted ({gone} runs)" in said(changed)
    assert not pilots & {folder.path.name for folder in HOME.find("trial.")}
    write_study(tiny_bert)
    refused = call("check", "study.yaml")
    assert refused.exit_code == 1
    assert "belongs to another study" in refused.stderr


def test_an_arm_that_does_not_fit_is_named_with_what_to_do(tiny_bert):
    write_study(tiny_bert, run="{engine: inline, threads: 1, memory: 50 MB}")
    result = call("check", "study.yaml")
    assert result.exit_code == 1
    assert "synthetic_qa/full: out of memory" in said(result)
    assert "of the budget of 50 MB" in said(result)
    assert "raise run.memory" in said(result)
    assert check_json()["forecast"] is None
    assert not HOME.find("trial.")


def test_an_arm_that_does_not_learn_is_named_with_what_to_do(tiny_bert):
    methods = (
        "{full: {search: {learning_rate: 1e-3}}, lora: {search: {learning_rate: {low: 1e-9, high: 1e-8}}}}"
    )
    write_study(tiny_bert, methods=methods)
    result = call("check", "study.yaml")
    assert result.exit_code == 1
    [fault] = check_json()["faults"]
    assert fault.startswith(
        "synthetic_qa/lora does not learn ten samples by heart: the loss of 10 samples goes"
    )
    assert fault.endswith("raise the upper end of learning_rate")
    assert fault in said(result)


def test_an_arm_whose_rates_are_all_too_high_is_named(tiny_bert):
    write_study(tiny_bert, methods="{full: {search: {learning_rate: {low: 5, high: 10}}}}")
    assert call("check", "study.yaml").exit_code == 1
    [fault] = check_json()["faults"]
    assert "training diverges at every learning rate tried (7.1, 10, 5)" in fault
    assert fault.endswith("lower its range")


def test_a_limit_that_a_run_would_not_keep_is_told(tiny_bert):
    write_study(tiny_bert, run="{engine: inline, threads: 1, trial_limit: 0.01 s}")
    result = call("check", "study.yaml")
    assert result.exit_code == 1
    assert "more than run.trial_limit" in said(result)


def test_a_disk_that_will_not_do_is_told(tiny_bert):
    write_study(tiny_bert, run="{engine: inline, threads: 1, disk: 12 MB}")
    result = call("check", "study.yaml")
    assert result.exit_code == 1
    assert "more than run.disk (12 MB); raise it" in said(result)


def test_a_second_check_rehearses_anew_and_keeps_the_pilots(tiny_bert):
    write_study(tiny_bert)
    assert call("check", "study.yaml").exit_code == 0
    trials = [folder.result_file.stat().st_mtime_ns for folder in HOME.find("trial.")]
    rehearsals = [folder.result_file.stat().st_mtime_ns for folder in HOME.find("check.")]
    assert call("check", "study.yaml").exit_code == 0
    assert [folder.result_file.stat().st_mtime_ns for folder in HOME.find("trial.")] == trials
    again = [folder.result_file.stat().st_mtime_ns for folder in HOME.find("check.")]
    assert len(again) == len(rehearsals)
    assert not set(again) & set(rehearsals)
