"""Opening a study's folder: what is hashed, what may change later, and what is refused by name."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from finetrial import check, pipeline
from finetrial.errors import HomeError, StudyError
from finetrial.opening import Opened, differences, open_home, read_lock, resolve_inputs
from finetrial.progress import Progress
from finetrial.records import Cost, Result
from finetrial.store import Home
from finetrial.study import Study
from finetrial.study_file import load_study

STUDY = """\
study: mine
model: ./model
tasks:
  classification: {data: {train: train.jsonl, test: test.jsonl}}
methods: [full, lora]
"""
LORA, TEST = "[full, lora]", "test: test.jsonl"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A study file with the model and the data that it names (enough to be found and hashed)."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "train.jsonl").write_text('{"text": "a", "label": 0}\n')
    (tmp_path / "test.jsonl").write_text('{"text": "b", "label": 1}\n')
    (tmp_path / "study.yaml").write_text(STUDY)
    return tmp_path


def study_of(folder: Path, *changes: tuple[str, str], more: str = "") -> Study:
    """The study after its file was edited."""
    text = STUDY
    for before, after in changes:
        assert before in text
        text = text.replace(before, after)
    (folder / "study.yaml").write_text(text + more)
    return load_study(folder / "study.yaml")


def opened(study: Study, home: Path) -> Opened:
    return open_home(study, Home(home), resolve_inputs(study))


def test_inputs_are_identified_by_content(folder):
    inputs = resolve_inputs(study_of(folder))["classification"]
    content = (folder / "train.jsonl").read_bytes()
    assert inputs["data/train.jsonl"] == hashlib.sha256(content).hexdigest()
    before = inputs["model"]
    (folder / "model" / "README.md").write_text("no part of the model")
    assert resolve_inputs(study_of(folder))["classification"]["model"] == before
    (folder / "model" / "model.safetensors").write_bytes(b"Weights")
    assert resolve_inputs(study_of(folder))["classification"]["model"] != before


def test_code_of_the_models_own_is_part_of_it_where_it_is_run(folder):
    def hashed(model: str) -> str:
        return resolve_inputs(study_of(folder, ("model: ./model", f"model: {model}")))["classification"][
            "model"
        ]

    trusted = "{name: ./model, trust_remote_code: true}"
    plain, before = hashed("./model"), hashed(trusted)
    assert plain == before
    (folder / "model" / "modeling_own.py").write_text("LAYERS = 2")
    assert hashed("./model") == plain  # never read
    assert hashed(trusted) != before


def test_the_folder_keeps_the_study_as_given_and_as_resolved(folder):
    study = study_of(folder)
    opened(study, folder / "home")
    assert (folder / "home" / "study.yaml").read_bytes() == (folder / "study.yaml").read_bytes()
    lock = read_lock(Home(folder / "home"))
    assert lock.study == study
    assert lock.versions["numpy"]
    assert lock.inputs == resolve_inputs(study)


def test_opening_again_changes_nothing(folder):
    opened(study_of(folder), folder / "home")
    before = (folder / "home" / "study.lock.json").read_bytes()
    opened(study_of(folder), folder / "home")
    assert (folder / "home" / "study.lock.json").read_bytes() == before


def test_a_changed_version_is_said_and_the_lock_keeps_the_first(folder):
    first = opened(study_of(folder), folder / "home")
    assert first.notes == ()
    path = folder / "home" / "study.lock.json"
    text = path.read_text()
    torch = read_lock(Home(folder / "home")).versions["torch"]
    assert text.count(f'"torch": "{torch}"') == 1
    path.write_text(text.replace(f'"torch": "{torch}"', '"torch": "1.0"'))
    (note,) = opened(study_of(folder), folder / "home").notes
    assert note.startswith(f"since this study was begun: torch is {torch} and was 1.0;")
    assert read_lock(Home(folder / "home")).versions["torch"] == "1.0"


def test_a_sentence_embedding_model_that_is_given_token_types_is_advised_against(folder):
    (folder / "model" / "modules.json").write_text("[]")
    (note,) = opened(study_of(folder), folder / "home").notes
    assert "learns much faster with `model: {name: ./model, token_type_ids: false}`" in note
    advised = study_of(folder, ("model: ./model", "model: {name: ./model, token_type_ids: false}"))
    assert opened(advised, folder / "other").notes == ()


def test_trials_seeds_run_and_track_may_change_and_the_lock_follows(folder):
    opened(study_of(folder, more="search: {trials: 5}\n"), folder / "home")
    more = "search: {trials: 7}\ntrain: {seeds: 9}\nrun: {parallel: 2}\ntrack: [wandb]\n"
    study = study_of(folder, more=more)
    found = opened(study, folder / "home")
    assert found.study.search.trials == 7
    assert read_lock(Home(folder / "home")).study == study
    assert (folder / "home" / "study.yaml").read_text().endswith(more)


def test_threads_stay_what_they_were_unless_the_file_says_otherwise(folder):
    study = study_of(folder, more="run: {threads: 3}\n")
    assert opened(study, folder / "home").threads == 3
    # Results depend on the number of threads in their last digits.
    assert opened(study_of(folder), folder / "home").threads == 3


def begin(home: Path, run: str) -> None:
    """As if a run had begun there."""
    spec = home / "runs" / f"{run}-0123abcd" / "spec.json"
    spec.parent.mkdir(parents=True)
    spec.write_text("{}")


@pytest.mark.parametrize(
    ("changes", "more", "named"),
    [
        ([], "search: {rows: 100}\n", "search.rows: 100, was null"),
        ([], "train: {schedule: cosine}\n", "train.schedule: 'cosine', was 'linear'"),
        (
            [(LORA, "{full: {}, lora: {target: attention}}")],
            "",
            "methods.lora.target: 'attention', was 'all-linear'",
        ),
        ([(LORA, "[full]")], "claims: []\n", "methods.lora.use: not there, was 'lora'"),
        (
            [(LORA, "{full: {search: {epochs: 1}}, lora: {}}")],
            "",
            'methods.full.search.epochs: {"kind": "fixed", "va',
        ),
        (
            [(TEST, TEST + ", columns: {text: t}")],
            "",
            "tasks.classification.data.columns.text: 't', was not there",
        ),
        ([("study: mine", "study: yours")], "", "study: 'yours', was 'mine'"),
        (
            [],
            "claims: [lora within 5% of full]\n",
            'claims: ["lora within 5% of full"], was ["lora within 3% of',
        ),
    ],
)
def test_another_study_is_refused_and_told_what_differs(folder, changes, more, named):
    opened(study_of(folder), folder / "home")
    begin(folder / "home", "trial.classification.lora.000")
    before = (folder / "home" / "study.lock.json").read_bytes()
    with pytest.raises(HomeError) as raised:
        opened(study_of(folder, *changes, more=more), folder / "home")
    assert f"\n  {named}" in str(raised.value)
    assert "Only search.trials, train.seeds, run and track may change" in str(raised.value)
    assert (folder / "home" / "study.lock.json").read_bytes() == before


def test_only_what_differs_is_told(folder):
    one = study_of(folder, more="search: {trials: 5, rows: 10}\nrun: {threads: 1}\n")
    other = study_of(folder, more="search: {trials: 9, rows: 20}\ntrain: {seeds: 8}\n")
    assert differences(one, other) == ["search.rows: 20, was 10"]


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ("train.jsonl", "data/train.jsonl of classification"),
        ("model/model.safetensors", "model of classification"),
    ],
)
def test_changed_content_is_refused_by_name(folder, changed, named):
    opened(study_of(folder), folder / "home")
    begin(folder / "home", "trial.classification.lora.000")
    (folder / changed).write_text('{"text": "c", "label": 0}\n')
    with pytest.raises(HomeError, match=rf"{named} is not what it was .*put the old content back"):
        opened(study_of(folder), folder / "home")


@pytest.mark.parametrize("change", ["study", "data"])
def test_a_mended_study_begins_anew_while_only_baselines_have_run(folder, change):
    """After `check`, or a first run that was refused for a wrong column: nobody has to clear up a folder."""
    home = folder / "home"
    opened(study_of(folder), home)
    begin(home, "baseline.classification.000")
    if change == "data":
        (folder / "train.jsonl").write_text('{"text": "c", "label": 0}\n')
    study = study_of(folder, more="search: {rows: 10}\n" if change == "study" else "")
    again = opened(study, home)
    assert "begins anew" in again.notes[-1]
    assert read_lock(Home(home)).study == study
    assert opened(study, home).notes == again.notes[:-1]
    assert Home(home).study_file.read_bytes() == Path(study.file).read_bytes()


def test_what_check_ran_of_another_study_is_no_study_s_that_is_opened_there(folder):
    """A mistyped --home: the pilots are trials that the other study need not run again."""
    home = folder / "home"
    study = study_of(folder)
    open_home(study, Home(home), resolve_inputs(study), begins=False)
    begin(home, "trial.classification.lora.000")
    with pytest.raises(HomeError, match=r"(?s)belongs to another study.* study: 'yours', was 'mine'"):
        opened(study_of(folder, ("study: mine", "study: yours")), home)
    assert [run.path.name for run in Home(home).find("")] == ["trial.classification.lora.000-0123abcd"]
    again = opened(study_of(folder, more="search: {rows: 10}\n"), home)  # the same study, changed
    assert again.notes[-1].endswith("begins anew; what had run of it was deleted (1 run)")
    assert not Home(home).find("")


def test_everything_that_is_not_there_is_told_at_once_and_nothing_is_written(folder):
    (folder / "train.jsonl").rename(folder / "trian.jsonl")
    study = study_of(
        folder, ("./model", "./modle"), ("  classification", "  synthetic_qa: {}\n  classification")
    )
    for verb in (pipeline.run_study, check.check_study):
        with pytest.raises(StudyError) as raised:
            verb(study, folder / "home", Progress())
        assert [problem.where for problem in raised.value.problems] == ["model", "tasks.classification"]
        assert "modle is no folder" in str(raised.value)
        assert "train.jsonl is not there; did you mean trian.jsonl?" in str(raised.value)
    assert not (folder / "home").exists()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            "package:finetrial_not_installed/model",
            "the package 'finetrial_not_installed' is not installed; try `pip",
        ),
        ("package:finetrial/tasks", "has no config.json in"),
        ("package:finetrial/../..", "leads out of the package; name a folder inside it"),
        ("${FINETRIAL_NOT_SET}/model", "the environment variable FINETRIAL_NOT_SET is not set"),
        ("./study.yaml", "study.yaml is no folder"),
    ],
)
def test_a_model_that_is_not_there_says_so(folder, model, message):
    study = study_of(folder, ("./model", model))
    with pytest.raises(StudyError) as raised:
        resolve_inputs(study)
    assert [problem.where for problem in raised.value.problems] == ["model"]
    assert message in str(raised.value)


def test_runs_without_a_lock_are_not_taken_over(folder):
    (folder / "home" / "runs").mkdir(parents=True)
    with pytest.raises(HomeError, match=r"has runs but no study.lock.json; name another folder with --home"):
        opened(study_of(folder), folder / "home")


def test_a_folder_that_is_no_study_s(folder):
    with pytest.raises(HomeError, match="is not there yet; `finetrial run` makes it"):
        read_lock(Home(folder / "nowhere"))
    with pytest.raises(HomeError, match=r"is no study's folder: it has no study.lock.json"):
        read_lock(Home(folder))
    with pytest.raises(HomeError, match="is a file"):
        read_lock(Home(folder / "study.yaml"))


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"schema_version": 1}'])
def test_a_damaged_lock_is_an_error_and_not_a_new_study(folder, damage):
    opened(study_of(folder), folder / "home")
    (folder / "home" / "study.lock.json").write_text(damage)
    with pytest.raises(
        HomeError, match=r"study.lock.json cannot be read .*damaged, or written by another version"
    ):
        opened(study_of(folder), folder / "home")


def test_a_lock_with_an_unknown_key_is_another_version_s(folder):
    opened(study_of(folder), folder / "home")
    path = folder / "home" / "study.lock.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"from_the_future": 1}))
    with pytest.raises(HomeError, match="from_the_future"):
        read_lock(Home(folder / "home"))


def test_another_study_s_file_in_the_folder_is_not_overwritten(folder):
    home = folder / "home"
    home.mkdir()
    (home / "study.yaml").write_text("study: precious\n")
    with pytest.raises(HomeError, match="is there and is another study"):
        opened(study_of(folder), home)
    assert (home / "study.yaml").read_text() == "study: precious\n"


def test_seeds_changed_after_test_scores_could_be_seen_are_recorded_and_those_before_are_not(folder):
    home = folder / "home"
    opened(study_of(folder, more="train: {seeds: 2}\n"), home)
    begin(home, "replicate.classification.lora.000")
    assert opened(study_of(folder, more="train: {seeds: 3}\n"), home).changed == ()
    [run] = Home(home).find("replicate.")
    cost = Cost(wall_seconds=1.0, cpu_seconds=1.0, peak_memory_bytes=1, device="cpu")
    run.write_result(Result(run_id=run.path.name, outcome="diverged", cost=cost))
    assert opened(study_of(folder, more="train: {seeds: 4}\n"), home).changed == ()
    run.write_result(Result(run_id=run.path.name, outcome="done", scores={"test": {"f1": 1.0}}, cost=cost))
    more = "train: {seeds: 2}\nsearch: {trials: 20}\n"
    found = opened(study_of(folder, more=more), home).changed
    assert [(one.what, one.before, one.after, one.scored) for one in found] == [
        ("train.seeds", 4, 2, 1), ("search.trials", 15, 20, 1),
    ]  # fmt: skip
    assert "train.seeds was changed from 4 to 2 when 1 replicate had been scored" in found[0].told
    assert opened(study_of(folder, more=more), home).changed == found
