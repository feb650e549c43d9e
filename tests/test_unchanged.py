"""Files that change while a study runs: seen by every run before it reads them, and nothing else is refused."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from conftest import minilm_folder
from finetrial import hashed, worker
from finetrial.assemble import open_workbench
from finetrial.errors import DataError
from finetrial.heads.classification_task import ClassificationTask, ClassificationTaskParams
from finetrial.opening import open_home, resolve_inputs
from finetrial.records import ModelSource, RunSpec
from finetrial.sources import data_inputs, measure_inputs, model_inputs, model_sha256
from finetrial.store import Home
from finetrial.study_file import load_study
from tiny_runs import folder_of, make_spec


class Rewriting(ClassificationTask):
    """A task whose data somebody writes again while it is read."""

    def splits(self, params: Any, base: Path) -> Any:
        found = super().splits(params, base)
        with (base / "train.jsonl").open("a") as stream:
            stream.write(json.dumps({"text": "one more", "label": "b"}) + "\n")
        return found


REWRITING = Rewriting(ClassificationTaskParams)


@pytest.fixture
def base(tmp_path: Path, tiny_bert: Path) -> Path:
    """A folder with a model and data of two classes."""
    shutil.copytree(tiny_bert, tmp_path / "model")
    for name, count in (("train", 12), ("test", 6)):
        rows = [{"text": f"{name} text {n}", "label": "ab"[n % 2]} for n in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "text.jsonl").write_text('{"text": "some text"}\n' * 9)
    return tmp_path


def spec_in(base: Path, use: str = "classification", **changes: Any) -> RunSpec:
    """A trial there, its inputs known by content."""
    spec = make_spec(
        base / "model", "lora", use=use, params={"data": {"train": "train.jsonl", "test": "test.jsonl"}},
        stage="trial", settings={"epochs": 1}, how={"base": str(base)}, **changes,
    )  # fmt: skip
    inputs = model_inputs(spec.model, base) | data_inputs(spec.task, base)
    return spec.model_copy(update={"inputs": inputs | spec.inputs})


def work(spec: RunSpec, home: Path) -> str | None:
    """Do a run as its worker does; why it was refused."""
    folder = folder_of(spec, home)
    folder.failure_file.unlink(missing_ok=True)
    worker.work(folder)
    failure = folder.failure()
    assert failure is None or failure.kind == "refused"
    return failure.reason if failure else None


def rewrite(path: Path, content: bytes) -> None:
    """Write a file in place, as long as before and with the old time of writing."""
    before = path.stat()
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("train.jsonl", "data/train.jsonl of qa"),
        ("test.jsonl", "data/test.jsonl of qa"),
        ("model/model.safetensors", "the model "),
        ("model/tokenizer_config.json", "the model "),
    ],
)
def test_a_file_that_changed_since_the_study_began_is_refused_until_its_old_content_is_back(base, name, told):
    spec, path = spec_in(base), base / name
    old = path.read_bytes()
    changed = old.replace(b'"text": "t', b'"text": "s') if b'"text": "t' in old else old[:-1] + b" "
    assert len(changed) == len(old)
    assert changed != old
    rewrite(path, changed)
    refused = work(spec, base / "home")
    assert refused.startswith(told)
    assert refused.endswith(
        f" is not what it was when {base / 'home'} was begun (its SHA-256 changed while the study ran); put "
        f"the old content back and run the same command again, or name another folder with --home"
    )
    rewrite(path, old)
    assert work(spec, base / "home") is None
    assert folder_of(spec, base / "home").record().outcome == "done"


def test_data_that_change_while_they_are_read_are_refused(base):
    spec = spec_in(base, use="test_unchanged:REWRITING")
    assert work(spec, base / "home").startswith("data/train.jsonl of qa is not what it was")
    assert not list((base / "home" / "cache").glob("rows-*"))


def test_a_model_that_changes_before_it_is_built_is_refused(base):
    bench = open_workbench(spec_in(base), Home(base / "home"))
    weights = base / "model" / "model.safetensors"
    rewrite(weights, weights.read_bytes()[:-4] + b"\0\0\0\1")
    with pytest.raises(DataError, match=r"the model .* is not what it was"):
        bench.build_base()


@pytest.mark.parametrize("names", list(itertools.permutations("abc")))
def test_files_of_one_name_are_told_apart_when_a_spec_is_read_again(base, names):
    """Its record has the tasks in another order than the study file."""
    for name in names:
        (base / name).mkdir()
        rows = [{"text": f"{name} {number}", "label": "xy"[number % 2]} for number in range(9)]
        (base / name / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = {name: {"data": {"train": f"{name}/train.jsonl"}, "test_share": 0.5} for name in names}
    tasks = {name: {"use": "classification", "params": params} for name, params in data.items()}
    measure = {"use": "forgetting", "params": {"tasks": tasks}}
    inputs = measure_inputs("forgetting", measure, base)
    assert len(set(inputs.values())) == len(inputs) == 3
    spec = spec_in(base, measures={"forgetting": measure}, inputs=inputs)
    assert open_workbench(folder_of(spec, base / "home").spec(), Home(base / "home"))


def test_a_file_that_a_probe_reads_is_looked_at_too(base):
    measure = {"use": "forgetting", "params": {"text": {"file": "text.jsonl"}}}
    spec = spec_in(base, measures={"forgetting": measure}, inputs=measure_inputs("forgetting", measure, base))
    assert open_workbench(spec, Home(base / "home"))
    rewrite(base / "text.jsonl", b'{"text": "more text"}\n' * 9)
    with pytest.raises(DataError, match=r"measure.forgetting/text.jsonl of qa is not what it was"):
        open_workbench(spec, Home(base / "home"))
    (base / "text.jsonl").unlink()
    with pytest.raises(DataError, match="is not there"):
        open_workbench(spec, Home(base / "home"))


# ---- hashes that are not computed again ------------------------------------------------------------------


class Counted:
    def __init__(self, path: Path):
        self.path, self.times = path, 0

    def __call__(self) -> str:
        self.times += 1
        return self.path.read_text()


def forget() -> None:
    """As another process of the study."""
    hashed._known.clear()


def test_a_hash_is_computed_once_for_all_processes_of_a_study_until_the_file_changes(tmp_path, monkeypatch):
    cache, path = tmp_path / "cache", tmp_path / "weights"
    path.write_text("first")
    os.utime(path, (2e9, 2e9))  # written in the future, by the clock of wherever it comes from
    monkeypatch.setattr(hashed, "SETTLED_SECONDS", 0.1)
    time.sleep(0.2)
    compute = Counted(path)
    for _ in range(3):
        forget()
        assert hashed.known([path], compute, cache) == "first"
    assert compute.times == 1
    (kept,) = cache.iterdir()
    kept.write_text(kept.read_text().replace("first", "f\x00rst")[:-9])  # damaged
    forget()
    assert hashed.known([path], compute, cache) == "first"
    assert compute.times == 2
    rewrite(path, b"other")  # as long, and with the old time
    for _ in range(2):  # what has changed just now may change again unseen
        assert hashed.known([path], compute, cache) == "other"
    assert compute.times == 4


def test_a_wrong_hash_that_was_kept_refuses_nothing(tmp_path):
    source, home = ModelSource(name=str(minilm_folder())), Home(tmp_path)
    forget()
    right = model_sha256(source, tmp_path, home.cache)
    (kept,) = home.cache.iterdir()
    kept.write_text(kept.read_text().replace(right, "0" * 64))
    forget()
    assert model_sha256(source, tmp_path, home.cache) == "0" * 64
    spec = make_spec(minilm_folder(), inputs={"model": right})
    assert open_workbench(spec, home)


def test_a_cache_that_cannot_be_written_is_none(tmp_path):
    (tmp_path / "cache").write_text("a file in its place")
    source = ModelSource(name=str(minilm_folder()))
    assert model_sha256(source, tmp_path, tmp_path / "cache") == model_sha256(source, tmp_path)


def test_runs_know_the_hash_that_the_command_computed(base, monkeypatch):
    monkeypatch.setattr(hashed, "SETTLED_SECONDS", 0.0)
    (base / "study.yaml").write_text(
        "study: s\nmodel: ./model\nmethods: [full]\n"
        "tasks: {classification: {data: {train: train.jsonl, test: test.jsonl}}}\n"
    )
    study, home = load_study(base / "study.yaml"), Home(base / "home")
    for _ in range(2):
        inputs = resolve_inputs(study)
        open_home(study, home, inputs)
        (kept,) = home.cache.iterdir()
        assert json.loads(kept.read_text())["sha256"] == inputs["classification"]["model"]
        kept.unlink()
