"""Successive halving: who goes on, and that a trial in parts is the trial in one piece."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from finetrial import plan, search, verify
from finetrial.arm_search import ArmSearch
from finetrial.evidence import best_trial
from finetrial.frozen import short_hash
from finetrial.halving import LOSS, Standing, chosen, is_worse
from finetrial.opening import open_home, resolve_inputs
from finetrial.plugins import Metric
from finetrial.records import EarlyStopping, Result, Rung, RunRecord, RunSpec
from finetrial.store import Home
from finetrial.study import SearchRules
from finetrial.study_file import parse_study
from fragile import TROUBLE
from test_pipeline import FINETRIAL, run_study, start, wait_for_running, without_measured
from tiny_runs import folder_of, make_spec, records, run

ENDS = (9, 3, 1)
F1 = Metric(name="f1", higher_is_better=True, worst=0.0, best=100.0)


# ---- who goes on -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("trials", "by", "expected"),
    [
        (15, 3, (15, 5, 2)),
        (27, 3, (27, 9, 3)),
        (10, 3, (10, 4, 2)),
        (16, 2, (16, 8, 4)),
        (1, 3, (1, 1, 1)),
        (15, None, (15,)),
    ],
)
def test_a_third_goes_on_after_every_end(trials, by, expected):
    assert SearchRules(trials=trials, halving=by).counts == expected


def test_fifteen_trials_by_thirds_train_less_than_a_quarter_and_a_bit():
    counts = SearchRules(trials=15, halving=3).counts
    assert counts == (15, 5, 2)
    assert pytest.approx(3.649, abs=1e-3) == 15 / (15 / 9 + 5 * (1 / 3 - 1 / 9) + 2 * (1 - 1 / 3))
    assert SearchRules(halving=3).ends == ENDS
    assert SearchRules().ends == ()


def test_the_best_go_on_and_among_equals_the_first():
    standings = [Standing(n, score) for n, score in enumerate([50.0, 71.0, None, 70.0, 71.0, math.nan])]
    assert chosen(standings, 3, F1, final=False) == [1, 4, 3]
    assert chosen(standings, 2, LOSS, final=False) == [0, 3]
    assert chosen(standings[2:3], 2, F1, final=True) == []


@given(
    scores=st.lists(st.one_of(st.none(), st.floats(0, 100)), max_size=20),
    most=st.integers(1, 8),
    higher=st.booleans(),
)
def test_nobody_who_stays_is_better_than_one_who_goes_on(scores, most, higher):
    metric = F1 if higher else LOSS
    going = chosen([Standing(n, score) for n, score in enumerate(scores)], most, metric, final=False)
    known = {n: score for n, score in enumerate(scores) if score is not None}
    assert len(going) == min(most, len(known))
    sign = 1 if higher else -1
    stays = [sign * score for n, score in known.items() if n not in going]
    assert all(sign * known[n] >= stay for n in going for stay in stays)


def examples(values):
    return {f"e{n}": float(value) for n, value in enumerate(values)}


def test_before_the_last_end_only_those_go_on_that_examples_do_not_tell_from_the_best():
    best = Standing(0, 80.0, examples([1] * 80 + [0] * 20))
    near = Standing(1, 79.0, examples([1] * 79 + [0] * 21))
    far = Standing(2, 60.0, examples([1] * 60 + [0] * 40))
    assert chosen([far, near, best], 3, F1, final=True) == [0, 1]
    assert chosen([far, near, best], 3, F1, final=False) == [0, 1, 2]
    unknown = far._replace(examples={})
    assert chosen([unknown, near, best], 3, F1, final=True) == [0, 1, 2]


@given(st.integers(0, 2**32), st.integers(2, 40), st.floats(-1, 1), st.sampled_from([1.0, -1.0]))
def test_told_apart_is_scipys_paired_test(seed, count, shift, sign):
    rng = np.random.default_rng(seed)
    one, best = rng.normal(size=count), rng.normal(loc=shift, size=count)
    p = scipy.stats.ttest_rel(sign * best, sign * one, alternative="greater").pvalue
    found = is_worse(Standing(0, 0.0, examples(one)), Standing(1, 0.0, examples(best)), sign)
    assert found == (p < 0.05)


# ---- in parts as in one piece ------------------------------------------------------------------------------

LEARNT = (
    "score", "scores", "calibration", "weights_sha256", "settings_used", "input_sha256", "validation_loss",
    "examples_sha256",
)  # fmt: skip


def part(model: Path, ends: tuple[int, ...], after: str | None = None, **changes) -> RunSpec:
    rung = Rung(ends=ends, after=after) if ends else None
    settings = {"epochs": 3, "batch_size": 4, **changes.pop("settings", {})}
    return make_spec(model, stage="trial", settings=settings, rung=rung, **changes)


def learnt(result: Result) -> dict[str, object]:
    training = result.training.model_dump(exclude={"resumed_from"})
    return {name: getattr(result, name) for name in LEARNT} | {"training": training}


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_trial_in_parts_is_the_trial_in_one_piece(tiny_bert, tmp_path, method):
    home, alone = tmp_path / "parts", tmp_path / "alone"
    spec = part(tiny_bert, ENDS[:1], method=method)
    result = run(spec, home)
    for end in (2, 3):
        spec = part(tiny_bert, ENDS[:end], spec.run_id, method=method)
        result = run(spec, home)
    assert result.training.steps == result.training.planned_steps == 18
    assert result.training.resumed_from == ()
    whole = run(spec, alone)  # nothing to go on from: from the beginning
    assert learnt(whole) == learnt(result)
    assert records(spec, alone) == records(spec, home)
    plain = run(part(tiny_bert, (), method=method), tmp_path / "plain")
    # Of an embedding table the rows that are not read are decayed at evaluations, of which this has fewer.
    assert plain.training.last_loss == result.training.last_loss
    assert plain.training.tokens == result.training.tokens


def test_each_part_ends_at_its_share_of_the_steps_and_is_scored_there(tiny_bert, tmp_path):
    first = part(tiny_bert, ENDS[:1])
    result = run(first, tmp_path)
    assert (result.training.steps, result.training.planned_steps) == (2, 18)
    assert [r["step"] for r in records(first, tmp_path) if r["kind"] == "eval"] == [2]
    second = part(tiny_bert, ENDS[:2], first.run_id)
    assert run(second, tmp_path).training.steps == 6
    assert [r["step"] for r in records(second, tmp_path) if r["kind"] == "eval"] == [2, 6]
    assert second.name == "trial.qa.m.000.rung2"


def test_what_ran_out_of_memory_goes_on_with_as_little_at_once(tiny_bert, tmp_path):
    how = {"memory_bytes": 10**12}
    first = part(tiny_bert, ENDS[:1], how=how)
    run(first, tmp_path)
    folder = folder_of(first, tmp_path)
    folder.write_fit(folder.fit().model_copy(update={"halvings": 1}))
    second = part(tiny_bert, ENDS[:2], first.run_id, how=how)
    run(second, tmp_path)
    assert folder_of(second, tmp_path).fit().halvings == 1
    roomier = part(tiny_bert, ENDS[:2], first.run_id, how={"memory_bytes": 2 * 10**12}, seeds={"dropout": 9})
    run(roomier, tmp_path)
    assert folder_of(roomier, tmp_path).fit().halvings == 0


def test_ends_that_fall_together_leave_what_the_next_goes_on_from(tiny_bert, tmp_path):
    """Two steps in all: the first two ends are the last step."""
    two = {"settings": {"epochs": 1, "batch_size": 12}}
    first = part(tiny_bert, ENDS[:1], **two)
    assert run(first, tmp_path).training.steps == 2
    second = part(tiny_bert, ENDS[:2], first.run_id, **two)
    assert run(second, tmp_path).training.steps == 2
    assert list(folder_of(second, tmp_path).checkpoint.glob("step-*"))


def test_evaluations_at_ends_do_not_count_for_early_stopping(tiny_bert, tmp_path):
    """Of the regular ones the second is the first without a gain, with ends between them and without."""
    rules = {"early_stopping": EarlyStopping(patience=1), "evaluations_per_epoch": 1}
    for name, ends in (("halved", ENDS), ("whole", None)):
        TROUBLE.reset(scores=[50.0] * (ends is not None) + [40.0, 30.0, 20.0, 10.0])
        result = run(part(tiny_bert, ends, rules=rules), tmp_path / name)
        TROUBLE.reset()
        assert result.training.steps == 12  # 2 is an end alone; 6 is the first epoch's
        assert result.training.stopped_early


@pytest.mark.parametrize(("keep", "as_after"), [("best", 1), ("last", 2)])
def test_a_part_is_compared_by_the_lowest_loss_so_far_or_the_one_whose_weights_are_kept(
    tiny_bert, tmp_path, keep, as_after
):
    TROUBLE.reset(loss_factors=[1.0, 5.0])
    first = part(tiny_bert, ENDS[:1], rules={"keep": keep})
    second = part(tiny_bert, ENDS[:2], first.run_id, rules={"keep": keep})
    results = [run(first, tmp_path), run(second, tmp_path)]
    TROUBLE.reset()
    losses = [r["loss"] for r in records(second, tmp_path) if r["kind"] == "eval"]
    assert losses[1] > 2 * losses[0]
    assert results[0].validation_loss == losses[0]
    assert results[1].validation_loss == losses[as_after - 1]
    own = json.loads(folder_of(second, tmp_path).examples_file.read_text())["validation_loss"]
    assert statistics.fmean(own.values()) == pytest.approx(losses[as_after - 1])


def test_a_loss_on_validation_that_is_no_number_ends_the_run(tiny_bert, tmp_path):
    TROUBLE.reset(loss_factors=[math.nan])
    result = run(part(tiny_bert, ENDS[:1]), tmp_path)
    TROUBLE.reset()
    assert result.outcome == "diverged"
    assert result.reason == "diverged at step 2: the loss on validation is nan"


def test_from_a_damaged_checkpoint_the_same_comes_out(tiny_bert, tmp_path):
    home = tmp_path / "damaged"
    first = part(tiny_bert, ENDS[:1])
    run(first, home)
    (weights,) = folder_of(first, home).checkpoint.glob("step-*/weights.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1])
    second = part(tiny_bert, ENDS[:2], first.run_id)
    run(first, tmp_path / "whole")
    assert learnt(run(second, home)) == learnt(run(second, tmp_path / "whole"))


def test_from_damaged_metrics_the_same_comes_out(tiny_bert, tmp_path):
    home = tmp_path / "damaged"
    first = part(tiny_bert, ENDS[:1])
    run(first, home)
    metrics = folder_of(first, home).metrics_file
    data = bytearray(metrics.read_bytes())
    data[3] |= 0x80  # no UTF-8 any more
    metrics.write_bytes(data)
    second = part(tiny_bert, ENDS[:2], first.run_id)
    run(first, tmp_path / "whole")
    assert learnt(run(second, home)) == learnt(run(second, tmp_path / "whole"))


def test_a_run_without_halving_and_warm_start_is_named_as_before(tiny_bert):
    spec = part(tiny_bert, ())
    stated = spec.model_dump(mode="json", exclude={"how"})
    assert (stated.pop("rung"), stated.pop("warm_start")) == (None, None)
    assert spec.run_id == f"trial.qa.m.000-{short_hash(stated)}"


# ---- a whole study -----------------------------------------------------------------------------------------

STUDY = """\
study: halved
model: {model}
tasks:
  synthetic_qa: {{rows: 48, validation_rows: 24, test_rows: 24, max_length: 64}}
methods:
  full: {{search: {{learning_rate: {{low: 1e-4, high: 1e-2}}}}}}
search: {{trials: 7, halving: 3, space: {{epochs: 3, batch_size: 8}}}}
train: {{seeds: 1}}
run: {{threads: 1, log_steps: 1}}
"""


@pytest.fixture(scope="module")
def halved(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("halved")
    study = folder / "study.yaml"
    study.write_text(STUDY.format(model=tiny_bert))
    run_study(study, folder / "home")
    return study, folder / "home"


def test_a_halved_study_trains_what_it_says(halved):
    _, home = halved
    runs = [folder.record() for folder in Home(home).find("trial.")]
    reached = [sum(run.spec.rung.number == rung for run in runs) for rung in (1, 2, 3)]
    assert reached[:2] == [7, 3]
    assert reached[2] in (1, 2)
    assert not any(Home(home).run(run.spec.run_id).checkpoint.exists() for run in runs)
    summary = json.loads((home / "analysis" / "summary.json").read_text())
    assert summary["complete"]
    (row,) = summary["ledger"]
    assert row["search_counts"] == reached
    steps = {1: 2, 2: 6, 3: 18}
    left = [7 - 3, 3 - reached[2], reached[2]]
    assert row["search_steps"] == sum(count * steps[rung] for rung, count in enumerate(left, start=1))
    assert 2.5 < row["search_tokens_whole"] / row["search_tokens"] < 4
    (arm,) = summary["arms"]
    trials = arm["search"]["trials"]
    assert sorted(trial["number"] for trial in trials) == list(range(7))
    whole = {trial["run_id"]: trial["score"] for trial in trials if trial["share"] == 1}
    assert whole[arm["search"]["best"]] == max(whole.values())
    assert arm["search"]["curve"] is None
    assert "stopped at 1/9" in (home / "report" / "report.md").read_text()


def by_rung(home: Path) -> list[dict[int, RunRecord]]:
    runs = [folder.record() for folder in Home(home).find("trial.")]
    return [{run.spec.number: run for run in runs if run.spec.rung.number == rung} for rung in (1, 2, 3)]


def test_those_of_the_lowest_validation_loss_go_on_and_the_best_score_wins(halved):
    _, home = halved
    first, second, third = by_rung(home)
    for before, after in ((first, second), (second, third)):
        losses = {number: run.result.validation_loss for number, run in before.items()}
        assert sorted(after) == sorted(sorted(losses, key=losses.get)[: len(after)])
    assert all(run.result.validation_loss is None for run in third.values())
    for each in [*first.values(), *second.values()]:
        evaluations = [r for r in records(each.spec, home) if r["kind"] == "eval"]
        assert each.result.validation_loss == min(r["loss"] for r in evaluations)
        examples = json.loads(folder_of(each.spec, home).examples_file.read_text())
        own = examples["validation_loss"]
        assert statistics.fmean(own.values()) == pytest.approx(each.result.validation_loss)
        assert own.keys() == examples["validation"].keys()


def test_trials_are_told_apart_by_what_they_are_compared_by(halved):
    path, home = halved
    study = parse_study(path.read_text(), file=str(path), base=path.parent)
    opened = open_home(study, Home(home), resolve_inputs(study))
    ((task, method),) = study.arms
    arm = ArmSearch(study, opened, task, method, note=print)
    for rung, of in enumerate(("validation_loss", "validation_loss", "validation"), start=1):
        for each in arm.runs(rung=rung):
            standing = arm.standing(each, examples=True)
            assert standing.examples == json.loads(folder_of(each.spec, home).examples_file.read_text())[of]
            assert standing.score == (each.result.score if rung == 3 else each.result.validation_loss)


def test_among_stopped_trials_the_best_is_of_the_lowest_loss(halved):
    first, second, third = (list(runs.values()) for runs in by_rung(halved[1]))
    metric = Metric(name="f1", higher_is_better=True, worst=0.0, best=100.0)
    for runs in (first, second):
        assert best_trial(runs, metric) == min(runs, key=lambda r: r.result.validation_loss)
    assert best_trial([*first, *third], metric) == max(third, key=lambda r: r.result.score)


def test_tpe_is_told_the_losses_at_the_first_end(halved):
    study, home = halved
    rules = parse_study(study.read_text(), file=str(study), base=study.parent)
    past = [
        search.Past(number, run.spec.settings, "done", run.result.validation_loss)
        for number, run in by_rung(home)[0].items()
    ]
    for each in past[rules.search.startup_trials :]:
        told = search.propose(
            past[: each.number], rules.spaces["full"], number=each.number, seed=rules.search.seed,
            startup=rules.search.startup_trials, sampler="tpe", metric=LOSS,
        )  # fmt: skip
        assert told == each.settings
    assert past[rules.search.startup_trials :]


def test_a_halved_study_is_rederived_from_its_folders(halved):
    _, home = halved
    assert not verify.verify(home).differences


def test_a_finished_halved_study_starts_nothing_again(halved):
    study, home = halved
    before = {path: path.stat().st_mtime_ns for path in (home / "runs").rglob("*.json")}
    run_study(study, home)
    assert {path: path.stat().st_mtime_ns for path in (home / "runs").rglob("*.json")} == before


@pytest.mark.parametrize("victim", ["child", "parent"])
def test_killed_between_its_ends_a_halved_study_comes_out_the_same(halved, tmp_path, victim):
    study, finished = halved
    home = tmp_path / "killed"
    process = start(study, home)
    pid = wait_for_running(home, "trial.synthetic_qa.full.", process)
    while not Home(home).find("trial.") or not any(".rung2" in f.path.name for f in Home(home).find("trial.")):
        time.sleep(0.05)
        assert process.poll() is None, process.stdout.read()
    for folder in Home(home).find("trial."):
        pid = max([a.pid for a in folder.attempt_records() if a.outcome is None and a.pid], default=pid)
    with contextlib.suppress(ProcessLookupError):
        os.kill(process.pid if victim == "parent" else pid, signal.SIGKILL)
    process.wait(timeout=600)
    run_study(study, home)
    first, second = (json.loads((of / "analysis" / "summary.json").read_text()) for of in (finished, home))
    for summary in (first, second):
        for row in summary["ledger"]:
            row.pop("attempts")
    assert without_measured(first) == without_measured(second)
    assert not any(folder.checkpoint.exists() for folder in Home(home).find("trial."))


def test_more_trials_later_are_compared_with_those_that_there_were(halved, tmp_path):
    study, finished = halved
    home, more = tmp_path / "more", tmp_path / "more.yaml"
    shutil.copytree(finished, home)
    more.write_text(study.read_text().replace("trials: 7", "trials: 10"))
    run_study(more, home)
    summary = json.loads((home / "analysis" / "summary.json").read_text())
    assert summary["complete"]
    assert summary["ledger"][0]["search_counts"][0] == 10
    assert summary["ledger"][0]["search_counts"][1] >= 4


def test_what_a_begun_trial_goes_on_from_is_kept_though_others_are_better(halved, tmp_path):
    """Killed just after it began, with trials asked for since that are better."""
    path, finished = halved
    shutil.copytree(finished, tmp_path / "home")
    study = parse_study(path.read_text(), file=str(path), base=path.parent)
    opened = open_home(study, Home(tmp_path / "home"), resolve_inputs(study))
    arm = ArmSearch(study, opened, *study.arms[0], note=print)
    first, second, _ = by_rung(opened.home.path)
    begun, left = sorted(first.keys() - second.keys())[:2]
    further = plan.further(study, first[begun].spec, 1)
    opened.home.run(further.run_id).create(further)
    folders = [opened.home.run(first[number].spec.run_id) for number in (begun, left)]
    for folder in folders:
        folder.checkpoint.mkdir()
    arm.let_go_of_hopeless()
    assert [folder.checkpoint.exists() for folder in folders] == [True, False]


def test_status_knows_how_many_runs_there_are(halved):
    _, home = halved
    done = subprocess.run(
        [*FINETRIAL, "status", str(home), "--json"], capture_output=True, text=True, check=True
    )
    (row,) = [row for row in json.loads(done.stdout)["stages"] if row["stage"] == "trial"]
    assert row["planned"] == 7 + 3 + 1
    assert row["runs"]["done"] <= row["planned"]
