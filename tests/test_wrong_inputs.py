"""Malformed data files, model folders and homes as a user meets them: what is wrong, what next, nothing lost.

Wrong study files are in `test_cli.py`. What is refused while the study file is resolved makes no home at all;
what only a run can find leaves its home, with that run's failure in it, and changes nothing else.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

import pytest
from click.testing import Result

from conftest import call
from wrong_data import DATA
from wrong_homes import HOMES
from wrong_models import MODELS
from wrong_study_files import ONE_MISTAKE, text_of

pytestmark = pytest.mark.usefixtures("in_a_folder_of_its_own")

SMALL = {
    "study": "small",
    "methods": "{full: {search: {learning_rate: 1e-3}}}",
    "search": "{trials: 1, space: {epochs: 1, batch_size: 8}}",
    "train": "{seeds: 1}",
    "claims": "[]",
    "measure": "[]",
    "run": "{engine: inline, threads: 1}",
}
ROWS = "".join(f'{{"text": "text {n}", "label": {n % 2}}}\n' for n in range(12))
TEXTS = "{classification: {max_length: 16, data: {train: train.jsonl, test: test.jsonl}}}"


@pytest.fixture(autouse=True)
def _a_variable_is_not_set(monkeypatch):
    monkeypatch.delenv("FINETRIAL_NOT_SET", raising=False)


def everything(besides: str | None = None) -> dict[str, tuple[int, str]]:
    """Every path here but those below one: when it was changed, and what it is or holds."""
    found = {}
    for path in sorted(Path().rglob("*")):
        if besides is not None and path.is_relative_to(besides):
            continue
        if path.parent == Path("runs/small") and path.name in ("coordinator.lock", "log.txt"):
            continue  # who works here, and what was said here: all that a refusal may touch
        if path.is_symlink():
            what = f"-> {path.readlink()}"
        else:
            what = "folder" if path.is_dir() else hashlib.sha256(path.read_bytes()).hexdigest()
        # A folder that coordinator.lock is made in changes, too; its names are compared all the same.
        when = 0 if path.is_dir() else path.lstat().st_mtime_ns
        found[str(path)] = (when, what)
    return found


def assert_refused(result: Result, said: tuple[str, ...], code: int = 1) -> None:
    """The exit code, no traceback, and in the last thing that is said all that has to be."""
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    assert 'File "' not in result.output  # nor a part of one
    message = " ".join(result.stderr.split())
    for words in said:
        assert words in message, result.output
    # Said once: progress may say that a run was refused, and leaves why to the message.
    assert not any(words in result.stdout for words in said if " " in words), result.stdout


def test_there_are_more_than_a_hundred_of_every_kind_together():
    assert len(ONE_MISTAKE) >= 70
    assert len(DATA) >= 80
    assert len(MODELS) >= 45
    assert len(HOMES) >= 40


@pytest.mark.parametrize("name", DATA)
def test_a_wrong_data_file_is_named_with_what_to_do(tiny_bert, name):
    wrong = DATA[name]
    for file, content in wrong.files.items():
        if content is None:
            Path(file).mkdir()
        else:
            Path(file).write_bytes(content.encode() if isinstance(content, str) else content)
    Path("study.yaml").write_text(text_of(**SMALL, model=str(tiny_bert), tasks=wrong.task))
    before = everything()
    for verb in ("check", "run"):
        assert_refused(call(verb, "study.yaml"), wrong.said)
        assert everything(besides="runs") == before
        assert not list(Path().glob("runs/*/runs/*/result.json"))


@pytest.mark.parametrize("name", MODELS)
def test_a_wrong_model_folder_is_named_with_what_to_do(tiny_bert, name):
    wrong = MODELS[name]
    shutil.copytree(tiny_bert, "model")
    wrong.spoil(Path("model"))
    Path("train.jsonl").write_text(ROWS)
    Path("test.jsonl").write_text(ROWS.replace("text ", "test "))
    Path("study.yaml").write_text(text_of(**SMALL, model=wrong.named, tasks=TEXTS))
    before = everything()
    for verb in ("check", "run"):
        assert_refused(call(verb, "study.yaml"), wrong.said)
        assert everything(besides="runs") == before  # so nothing was run that a pickle planted
        assert not list(Path().glob("runs/*/runs/*/result.json"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path) -> Path:
    """A folder with study.yaml and its finished runs/small: one trial, one replicate."""
    folder, before = tmp_path_factory.mktemp("finished") / "there", Path.cwd()
    folder.mkdir()
    tasks = "{synthetic_qa: {rows: 16, validation_rows: 9, test_rows: 9, max_length: 64}}"
    (folder / "study.yaml").write_text(text_of(**SMALL, model=str(tiny_bert), tasks=tasks))
    os.chdir(folder)
    try:
        done = call("run", "study.yaml")
    finally:
        os.chdir(before)
    assert done.exit_code == 0, done.output
    shutil.copytree(folder, folder.with_name("kept"))
    return folder


@pytest.mark.parametrize("name", HOMES)
def test_a_wrong_home_is_named_with_what_to_do(finished, name, monkeypatch):
    wrong = HOMES[name]
    shutil.rmtree(finished)  # a moved folder would be another: the lock holds where its study file lies
    shutil.copytree(finished.with_name("kept"), finished)
    monkeypatch.chdir(finished)
    wrong.spoil(Path("runs/small"))
    before = everything()
    for verb in wrong.verbs.split():
        assert_refused(
            call(verb, "study.yaml" if verb in ("check", "run") else "runs/small"), wrong.said, wrong.code
        )
        after = everything()
        if verb == "run" and (changed := {path for path in before if after.get(path) != before[path]}):
            # What could be done before the fault was met: no result is lost or changed.
            assert not any(path.endswith(("result.json", "spec.json", "study.lock.json")) for path in changed)
        elif verb != "run":
            assert after == before


@pytest.mark.parametrize("verb", ["check", "run"])
def test_all_files_that_are_not_there_are_told_and_none_that_is_named_is_guessed(tiny_bert, verb):
    Path("test.csv").write_text("text,label\na,1\n")
    Path("trian.csv").write_text("text,label\na,1\n")
    data = "{train: train.csv, validation: dev.csv, test: test.csv}"
    Path("study.yaml").write_text(text_of(model=str(tiny_bert), tasks=f"{{classification: {{data: {data}}}}}"))
    result = call(verb, "study.yaml")
    assert_refused(
        result, ("train.csv is not there; did you mean trian.csv?", "dev.csv is not there; paths are")
    )
    assert "did you mean test.csv" not in result.output
