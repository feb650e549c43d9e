"""A run's folder and what a study's end means: what may change in a begun run, and the exit code."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetrial import files, setting_aside
from finetrial.errors import HomeError
from finetrial.evidence import trial_score
from finetrial.records import (
    Attempt,
    Cost,
    Failure,
    GroupProof,
    How,
    ModelSource,
    Proof,
    Result,
    Rung,
    RunRecord,
    RunSpec,
    Seeds,
    TaskSpec,
)
from finetrial.sealed import Damaged
from finetrial.store import MODEL_OWNER, Home, RunFolder
from finetrial.terminal import exit_code
from scripted import COST
from summary_example import example_summary

SEEDS = Seeds(data_order=1, head=2, adapter=3, dropout=4)
SPEC = RunSpec(
    study="s", stage="trial", task=TaskSpec(name="t", use="t", params={}), number=0,
    model=ModelSource(name="./m"), seeds=SEEDS, how=How(base="/here"),
)  # fmt: skip


def written(home: Home) -> RunFolder:
    """A run with one record of each kind."""
    folder = home.run(SPEC.run_id)
    folder.create(SPEC)
    folder.write_attempt(Attempt(number=1, host="h", pid=1, started_at=1.5))
    folder.write_failure(Failure(run_id=SPEC.run_id, kind="crashed", reason="why", attempt=1))
    cost = Cost(wall_seconds=1.0, cpu_seconds=1.0, peak_memory_bytes=1, device="cpu")
    folder.write_result(Result(run_id=SPEC.run_id, outcome="done", score=0.1 + 0.2, cost=cost))
    return folder


RECORDS = ("spec.json", "attempts/1.json", "failure.json", "result.json")


@pytest.fixture(scope="module")
def one_of_each(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return written(Home(tmp_path_factory.mktemp("records")))


@settings(deadline=None, max_examples=150)
@given(name=st.sampled_from(RECORDS), where=st.integers(0, 10_000), bit=st.integers(0, 7))
def test_a_flipped_bit_in_a_record_changes_nothing_unseen(one_of_each, name, where, bit):
    path, before = one_of_each.path / name, one_of_each.record()
    whole = path.read_bytes()
    data = bytearray(whole)
    data[where % len(data)] ^= 1 << bit
    path.write_bytes(data)
    try:
        after = one_of_each.record()
    except Damaged:
        return
    finally:
        path.write_bytes(whole)
    # In white space, or where and how it is executed, which is no part of what the run is.
    assert after._replace(spec=before.spec) == before
    assert after.spec.run_id == before.spec.run_id


@settings(deadline=None, max_examples=50)
@given(name=st.sampled_from(RECORDS), share=st.floats(0, 0.99))
def test_a_record_cut_short_is_seen(one_of_each, name, share):
    path = one_of_each.path / name
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    try:
        with pytest.raises(Damaged, match="does what is damaged anew"):
            one_of_each.record()
    finally:
        path.write_bytes(whole)


def test_a_record_of_another_version_is_no_damage(tmp_path):
    """Whole, and with a field that this version does not know: nothing is set aside, nothing is done anew."""
    home = Home(tmp_path)
    folder = written(home)
    content = json.loads(folder.result_file.read_text())
    del content["sha256"]
    content["of_tomorrow"] = 1
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    content["sha256"] = hashlib.sha256(canonical.encode()).hexdigest()
    folder.result_file.write_text(json.dumps(content))
    with pytest.raises(HomeError, match="written by another version of finetrial") as refused:
        setting_aside.damaged(home)
    assert not isinstance(refused.value, Damaged)
    assert folder.result_file.exists()


def test_what_a_damaged_run_was_to_do_is_kept(tmp_path):
    home = Home(tmp_path)
    folder = written(home)
    folder.result_file.write_text("{")
    setting_aside.damaged(home)
    assert folder.spec() == SPEC
    assert folder.record() == RunRecord(SPEC, None, None, ())


def test_a_damaged_run_that_is_half_set_aside_is_not_done_and_keeps_its_spec(tmp_path, monkeypatch):
    home = Home(tmp_path)
    folder = written(home)
    folder.write_attempt(Attempt(number=1, host="h", pid=1, started_at=0.0, outcome="done"))
    (folder.attempts / "1.json").write_text("{")
    rename, moved = Path.rename, []

    def killed_at_the_second(path: Path, to: Path) -> Path:
        moved.append(path.name)
        if len(moved) == 2:
            raise KeyboardInterrupt
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", killed_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        setting_aside.damaged(home)
    monkeypatch.setattr(Path, "rename", rename)
    assert moved[0] == "result.json"
    assert folder.spec() == SPEC
    setting_aside.damaged(home)
    assert folder.record() == RunRecord(SPEC, None, None, ())


def test_a_damaged_run_is_set_aside_whole_and_others_stay(tmp_path):
    home = Home(tmp_path)
    folder = written(home)
    other = home.run(SPEC.model_copy(update={"number": 1}).run_id)
    other.create(SPEC.model_copy(update={"number": 1}))
    assert setting_aside.damaged(home) == []
    for count in (1, 2):  # it may happen again to the same run
        written(home)
        folder.result_file.write_text(folder.result_file.read_text().replace("0.30000000000000004", "0.9"))
        (said,) = setting_aside.damaged(home)
        assert f"its run is set aside in {home.damaged / folder.path.name}.{count}" in said
        assert not folder.result_file.exists()
    assert home.run(other.path.name).spec().number == 1
    assert (home.damaged / f"{folder.path.name}.1" / "attempts" / "1.json").exists()


def test_a_halved_trial_whose_numbers_by_example_are_damaged_is_done_anew(tmp_path):
    """By them it is decided which trials go on."""
    home = Home(tmp_path)
    spec = SPEC.model_copy(update={"stage": "trial", "rung": Rung(ends=(9, 3))})
    folder = home.run(spec.run_id)
    folder.create(spec)
    files.write_json(folder.examples_file, {"validation_loss": {"a": 1.0}})
    stated = files.sha256_file(folder.examples_file)
    folder.write_result(Result(run_id=spec.run_id, outcome="done", cost=COST, examples_sha256=stated))
    assert setting_aside.damaged(home) == []
    folder.examples_file.write_text(folder.examples_file.read_text().replace("1.0", "2.0"))
    (said,) = setting_aside.damaged(home)
    assert said.startswith(f"{folder.examples_file} is damaged: it is not what its run wrote")
    assert folder.record() == RunRecord(spec, None, None, ())


def test_a_replicate_whose_model_another_optimum_has_replaced_trains_it_anew_where_models_are_kept(tmp_path):
    home = Home(tmp_path)
    spec = SPEC.model_copy(update={"stage": "replicate", "number": 1})
    home.run(spec.run_id).create(spec)
    home.run(spec.run_id).write_result(Result(run_id=spec.run_id, outcome="done", cost=COST))
    model = home.model_folder(spec)
    assert setting_aside.without_model(home, [], [spec]) == []  # it was let go of
    model.mkdir(parents=True)
    for owner in (spec.run_id, "replicate.t.m.001-another"):
        (model / MODEL_OWNER).write_text(owner + "\n")
        assert home.model_is_of(owner, model)
        assert setting_aside.without_model(home, [], []) == []
        said = setting_aside.without_model(home, [], [spec])
        assert len(said) == (owner != spec.run_id)
    assert "holds another run's model" in said[0]
    assert home.run(spec.run_id).result() is None


def test_a_damaged_model_is_set_aside_with_its_run_once_a_probe_was_refused(tmp_path):
    home = Home(tmp_path)
    specs = [SPEC.model_copy(update={"stage": "replicate", "number": number}) for number in (0, 1)]
    for spec in specs:
        home.run(spec.run_id).create(spec)
        home.run(spec.run_id).write_result(Result(run_id=spec.run_id, outcome="done", cost=COST))
        model = home.model_folder(spec)
        (model.parent / "temporary").mkdir(parents=True)
        (model.parent / "temporary" / "weights").write_bytes(b"1234")
        files.commit_folder(model.parent / "temporary", model)
    broken = home.model_folder(specs[1])
    (broken / "weights").write_bytes(b"1235")
    assert setting_aside.damaged(home) == []  # nobody has needed it yet
    probe = SPEC.model_copy(update={"stage": "probe", "subject": specs[1].run_id})
    home.run(probe.run_id).create(probe)
    home.run(probe.run_id).write_failure(
        Failure(run_id=probe.run_id, kind="refused", reason="is damaged", attempt=1)
    )
    (said,) = setting_aside.damaged(home)
    place = home.damaged / f"{specs[1].run_id}.1"
    assert said.startswith(f"{broken} is damaged: weights does not have the SHA-256")
    assert (place / "model" / "weights").read_bytes() == b"1235"
    assert (place / "result.json").exists()
    assert not broken.exists()
    assert home.run(specs[1].run_id).record() == RunRecord(specs[1], None, None, ())
    assert home.run(specs[0].run_id).result() is not None
    assert setting_aside.damaged(home) == []


def test_a_begun_run_follows_a_changed_place_and_limit_and_keeps_its_id(tmp_path: Path):
    folder = RunFolder(tmp_path / SPEC.run_id)
    folder.create(SPEC)
    moved = SPEC.model_copy(update={"how": How(base="/there", limit_seconds=60.0, micro_batch=2)})
    folder.create(moved)
    assert folder.spec().how == moved.how
    assert folder.spec().run_id == SPEC.run_id


def result(void: str | None) -> Result:
    proof = Proof(
        groups={"adapter": GroupProof(tensors=1, moved=0, relative_change=None, change_norm=0.0)},
        largest={},
        void=void,
    )
    cost = Cost(wall_seconds=1.0, cpu_seconds=1.0, peak_memory_bytes=1, device="cpu")
    return Result(run_id=SPEC.run_id, outcome="done", score=99.0, proof=proof, cost=cost)


def test_a_trial_that_trained_nothing_has_no_score_to_win_with():
    assert trial_score(RunRecord(SPEC, result(None), None, ())) == 99.0
    assert trial_score(RunRecord(SPEC, result("nothing moved in: adapter"), None, ())) is None


def summary_with(*, complete: bool = True, kinds: tuple[str, ...] = (), valid: bool = True):
    """The example study with chosen failures, and arms with or without a valid replicate."""
    example = example_summary()
    row = example.failures[0]
    arms = tuple(arm.model_copy(update={"failed": 0 if valid else arm.planned}) for arm in example.arms)
    failures = tuple(row.model_copy(update={"kind": kind}) for kind in kinds)
    return example.model_copy(update={"complete": complete, "failures": failures, "arms": arms})


@pytest.mark.parametrize(
    ("case", "code"),
    [
        ({}, 0),
        ({"kinds": ("diverged",)}, 0),  # counted and reported, and no fault
        ({"kinds": ("crashed",)}, 3),
        ({"valid": False}, 3),  # all replicates void or diverged: nothing was compared
        ({"complete": False}, 4),
        ({"complete": False, "kinds": ("diverged", "cancelled")}, 4),
        ({"complete": False, "kinds": ("crashed",)}, 3),
    ],
)
def test_the_exit_code_says_how_a_study_ended(case, code):
    assert exit_code(summary_with(**case)) == code
