"""What a study leaves behind: its log, no secrets, nothing outside its folder, no more disk than it may use."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from conftest import call
from finetrial import housekeeping, secrets_guard
from finetrial.errors import DataError, Incomplete, StudyError
from finetrial.paths import expand_path
from finetrial.records import Attempt, Failure
from finetrial.store import Home
from finetrial.study_file import parse_study
from scripted import make_spec
from wrong_study_files import text_of

pytestmark = pytest.mark.usefixtures("in_a_folder_of_its_own")

SECRET = "sk-0123456789abcdef"
SMALL = {
    "study": "small",
    "tasks": "{synthetic_qa: {rows: 16, validation_rows: 9, test_rows: 9, max_length: 64}}",
    "methods": "{full: {search: {learning_rate: 1e-3}}}",
    "search": "{trials: 1, space: {epochs: 1, batch_size: 8}}",
    "train": "{seeds: 1}",
    "claims": "[]",
    "measure": "[]",
    "run": "{engine: inline, threads: 1}",
}


def write_study(model: Path, **changes: str) -> None:
    Path("study.yaml").write_text(text_of(**{**SMALL, "model": str(model), **changes}))


# -- the study's log -------------------------------------------------------------------------------------------


def test_the_study_s_log_has_every_line_of_progress_with_its_time(tiny_bert):
    write_study(tiny_bert)
    checked = call("check", "study.yaml")
    done = call("run", "study.yaml")
    assert (checked.exit_code, done.exit_code) == (0, 0)
    lines = Path("runs/small/log.txt").read_text().splitlines()
    time = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00  ")
    assert all(time.match(line) for line in lines)
    logged = [line[len("2026-01-01T00:00:00+00:00  ") :] for line in lines]
    shown = [line for line in (checked.stdout + done.stdout).splitlines() if line in logged]
    assert [line for line in logged if not line.startswith("finetrial ")] == shown
    assert [line for line in logged if line.startswith("finetrial ")] == [
        "finetrial check begins", "finetrial check ends", "finetrial run begins", "finetrial run ends",
    ]  # fmt: skip
    assert any(line.startswith("train  synthetic_qa/full  1/1  validation f1") for line in logged)


def test_why_a_study_stopped_is_in_its_log(tiny_bert):
    Path("train.csv").write_text("text,label\na,1\n")
    Path("test.csv").write_text("text,label\nb,1\n")
    data = "{train: train.csv, test: test.csv}"
    write_study(tiny_bert, tasks=f"{{classification: {{data: {data}}}}}")
    stopped = call("run", "study.yaml")
    assert stopped.exit_code == 1
    last = Path("runs/small/log.txt").read_text().splitlines()[-1]
    assert last.endswith(f"finetrial run stopped: {stopped.stderr.strip()}")


# -- secrets ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "DB_PASSWORD", "my_secret"]
)
def test_a_path_with_a_secret_in_it_is_refused_without_it(monkeypatch, tmp_path, name):
    monkeypatch.setenv(name, SECRET)
    for text in (f"./${{{name}}}/x", f"./${{{name}:-there}}/x"):
        with pytest.raises(DataError, match=f"{name} looks like a secret by its name") as raised:
            expand_path(text, tmp_path)
        assert SECRET not in str(raised.value)


def test_a_study_file_that_holds_a_secret_is_refused_without_it(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", SECRET)
    with pytest.raises(StudyError, match=r"it holds the value of HF_TOKEN.*leave it out") as raised:
        parse_study(text_of(model=f"./{SECRET}"), file="study.yaml", base=tmp_path)
    assert SECRET not in str(raised.value)


def test_short_values_and_other_variables_are_text_like_any(monkeypatch):
    monkeypatch.setenv("SOME_TOKEN", "true")
    monkeypatch.setenv("SOME_TOKENS", SECRET)
    assert secrets_guard.hide(f"true {SECRET}") == f"true {SECRET}"
    monkeypatch.setenv("LONG_TOKEN", f"{SECRET}-and-more")
    monkeypatch.setenv("SHORT_TOKEN", SECRET)
    assert secrets_guard.hide(f"<{SECRET}-and-more> <{SECRET}>") == "<[LONG_TOKEN]> <[SHORT_TOKEN]>"


def test_what_is_said_of_a_run_says_no_secret(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", SECRET)
    spec = make_spec()
    folder = Home(tmp_path / "home").run(spec.run_id)
    folder.create(spec)
    folder.log_file.write_text(f"a library wrote {SECRET}\n")
    reason = f"401 for token {SECRET}"
    folder.write_attempt(Attempt(number=1, host="h", pid=1, started_at=0.0, outcome="bug", reason=reason))
    folder.write_failure(
        Failure(run_id=spec.run_id, kind="bug", reason=reason, log_tail=folder.log_tail(), attempt=1)
    )
    record = folder.record()
    assert record.attempts[0].reason == record.failure.reason == "401 for token [HF_TOKEN]"
    assert record.failure.log_tail == "a library wrote [HF_TOKEN]"


PLUGIN = f"""
import sys
from finetrial.heads.extractive_qa import ExtractiveQa
from finetrial.tasks.synthetic_qa import PLUGIN as SYNTHETIC, SyntheticQa
class Leaking(SyntheticQa):
    def splits(self, params, base):
        print("printed {SECRET}")
        sys.stderr.write("written {SECRET}\\n")
        raise ValueError("raised {SECRET}")
LEAKING = Leaking()
"""


@pytest.mark.parametrize("engine", ["inline", "spawn"])
def test_a_secret_that_a_plug_in_prints_or_raises_is_nowhere_on_the_disk(tiny_bert, monkeypatch, engine):
    """In a run's own process, too, where the log is what the process writes."""
    monkeypatch.setenv("FINETRIAL_TEST_API_KEY", SECRET)
    Path(f"leaking_{engine}.py").write_text(PLUGIN)
    params = "{rows: 16, validation_rows: 9, test_rows: 9, max_length: 64}"
    task = f"{{leaking: {{use: 'leaking_{engine}:LEAKING', {params[1:]}}}"
    write_study(tiny_bert, tasks=task, run=f"{{engine: {engine}, threads: 1}}")
    stopped = call("run", "study.yaml")
    sys.modules.pop(f"leaking_{engine}", None)
    assert stopped.exit_code == 3, stopped.output
    assert SECRET not in stopped.output
    assert "raised [FINETRIAL_TEST_API_KEY]" in stopped.output
    (log,) = Path("runs/small/runs").glob("*/log.txt")
    assert "printed [FINETRIAL_TEST_API_KEY]" in log.read_text()
    assert "written [FINETRIAL_TEST_API_KEY]" in log.read_text()
    assert not [path for path in Path("runs").rglob("*") if path.is_file() and SECRET in path.read_text()]


# -- nothing outside of the study's folder ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["runs", "models", "cache", "damaged", "study.yaml", "best", "runs/{run}/checkpoint"]
)
@pytest.mark.parametrize("verb", ["check", "run"])
def test_a_link_that_leads_out_of_the_folder_is_refused_and_what_it_points_at_is_left(name, verb):
    spec = make_spec()
    Path("model").mkdir()
    for file in ("config.json", "model.safetensors"):
        (Path("model") / file).write_text("{}")
    Path("study.yaml").write_text(text_of(**SMALL, model="./model"))
    precious = Path("precious")
    (precious / "step-00000001").mkdir(parents=True)
    (precious / "file").write_text("mine")
    link = Path("runs/small") / name.format(run=spec.run_id)
    link.parent.mkdir(parents=True)
    link.symlink_to(precious.resolve())
    refused = call(verb, "study.yaml")
    assert refused.exit_code == 1
    assert f"{link}: a link that leads out of the study's folder" in refused.stderr
    assert "put what it points at in its place" in refused.stderr
    assert sorted(path.name for path in precious.iterdir()) == ["file", "step-00000001"]


def test_the_folder_itself_may_be_a_link(tiny_bert):
    write_study(tiny_bert)
    Path("elsewhere").mkdir()
    Path("runs").mkdir()
    Path("runs/small").symlink_to(Path("elsewhere").resolve())
    assert call("check", "study.yaml").exit_code == 0
    assert Path("elsewhere/study.lock.json").exists()


def test_checkpoints_are_not_dropped_through_a_link_and_that_is_a_warning(tmp_path):
    folder = Home(tmp_path / "home").run("r")
    folder.path.mkdir(parents=True)
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("mine")
    folder.checkpoint.symlink_to(tmp_path / "precious")
    left = folder.drop_checkpoint()
    assert f"{folder.checkpoint} could not be deleted" in left
    assert "no run is affected" in left
    assert (tmp_path / "precious" / "file").read_text() == "mine"


# -- the disk --------------------------------------------------------------------------------------------------


def test_a_folder_above_its_budget_stops_the_study_and_says_what_takes_how_much(tiny_bert):
    write_study(tiny_bert, run="{engine: inline, threads: 1, disk: 20 MB}")
    models = Path("runs/small/models/old")
    models.mkdir(parents=True)
    (models / "model.safetensors").write_bytes(bytes(30_000_000))
    stopped = call("run", "study.yaml")
    assert stopped.exit_code == 4
    assert "more than run.disk (20 MB): models 30 MB" in stopped.stderr
    assert "raise run.disk, and run the same command again" in stopped.stderr
    assert not list(Path("runs/small/runs").glob("trial.*"))


def test_a_disk_that_is_nearly_full_stops_the_study_before_a_run(tmp_path, monkeypatch):
    home = Home(tmp_path)
    housekeeping.check_room(home, None)
    monkeypatch.setattr(housekeeping, "LEAST_FREE_BYTES", 10**18)
    with pytest.raises(Incomplete, match=r"free, less than.*Make room, and run the same command again"):
        housekeeping.check_room(home, None)


def test_what_killed_workers_left_half_made_in_the_cache_goes_and_the_rest_stays(tmp_path):
    home = Home(tmp_path)
    for name in (".rows-1.ab12.tmp", ".inputs-2.cd34.old", "rows-1"):
        (home.cache / name).mkdir(parents=True)
        (home.cache / name / "file").write_text("x")
    (home.cache / "dequantised-1.lock").write_text("")
    housekeeping.sweep(home)
    assert sorted(path.name for path in home.cache.iterdir()) == ["dequantised-1.lock", "rows-1"]
