"""The verbs on a study that has run: status, show, report, exit codes 3 and 4, running again with changes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

import pytest
from click.testing import Result

from conftest import call
from finetrial import lease
from finetrial.records import Failure
from finetrial.store import Home
from wrong_study_files import text_of

pytestmark = pytest.mark.usefixtures("in_a_folder_of_its_own")

FINISHED = {
    "study": "small",
    "tasks": "{synthetic_qa: {rows: 16, validation_rows: 9, test_rows: 9, max_length: 64}}",
    "methods": "{full: {search: {learning_rate: 1e-3}}}",
    "search": "{trials: 1, space: {epochs: 1, batch_size: 8}}",
    "train": "{seeds: 1}",
    "claims": "[]",
    "measure": "[]",
    "run": "{engine: inline, threads: 1}",
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path) -> Path:
    """A folder with study.yaml and its finished runs/small: one method, one trial, one replicate."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "study.yaml").write_text(text_of(**FINISHED, model=str(tiny_bert)))
    home = folder / "runs" / "small"
    done = subprocess.run(
        [sys.executable, "-m", "finetrial", "run", "study.yaml"], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert str(Path("runs/small/report/index.html")) in done.stdout
    assert (home / "report" / "index.html").exists()
    phases = [line.split()[0] for line in done.stdout.splitlines() if line.endswith((" run", " runs"))]
    assert phases == ["baseline", "search", "train"]  # nothing is measured
    return folder


@pytest.fixture
def there(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that folder to stand in and to change."""
    shutil.copytree(finished, tmp_path / "there")
    monkeypatch.chdir(tmp_path / "there")
    return tmp_path / "there"


def edit(before: str, after: str) -> None:
    text = Path("study.yaml").read_text()
    assert before in text
    Path("study.yaml").write_text(text.replace(before, after))


def assert_refused(result: Result, code: int = 1) -> None:
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output


def stage_of(stage: str) -> dict:
    """The row of `status --json` for the one arm."""
    rows = json.loads(call("status", "study.yaml", "--json").stdout)["stages"]
    return next(row for row in rows if row["stage"] == stage)


@pytest.mark.parametrize("named", [["study.yaml"], ["runs/small"], []])
def test_status_counts_runs_by_the_file_or_the_folder_or_of_the_only_study(there, named):
    stages = json.loads(call("status", *named, "--json").stdout)["stages"]
    assert [(row["stage"], row["planned"], row["runs"]) for row in stages] == [
        ("baseline", 1, {"done": 1}), ("baseline", 1, {"done": 1}), ("trial", 1, {"done": 1}),
        ("replicate", 1, {"done": 1}), ("probe", 0, {}),
    ]  # fmt: skip
    shown = call("status", *named)
    assert shown.exit_code == 0
    assert ["trial", "synthetic_qa/full", "1", "1"] in [line.split() for line in shown.stdout.splitlines()]


def test_status_tells_a_run_without_a_result_from_one_under_way(there):
    trial = Home(Path("runs/small")).find("trial.")[0]
    trial.result_file.unlink()
    assert stage_of("trial")["runs"] == {"unfinished": 1}
    lease.claim(trial.lease_file)
    assert stage_of("trial")["runs"] == {"running": 1}
    # Its process is gone: nobody is working on it, whatever the file says.
    held = lease.read(trial.lease_file).model_copy(update={"process_started_at": 1.0})
    trial.lease_file.write_text(held.model_dump_json())
    assert stage_of("trial")["runs"] == {"unfinished": 1}


def test_status_of_no_study_or_of_one_of_several_asks_for_a_name():
    result = call("status")
    assert_refused(result, code=2)
    assert "name a study's folder or study file; there is none in runs/" in result.stderr
    for name in ("a", "b"):
        Path("runs", name).mkdir(parents=True)
        Path("runs", name, "study.lock.json").write_text("{}")
    result = call("status")
    assert_refused(result, code=2)
    assert "there are 2 in runs/: runs/a, runs/b" in result.stderr


def test_status_of_a_study_that_has_not_begun():
    Path("study.yaml").write_text(text_of())
    result = call("status", "study.yaml")
    assert_refused(result)
    assert "runs/good is not there yet; `finetrial run` makes it" in result.stderr


def test_show_has_the_numbers_that_a_probe_measured(there):
    edit("measure: []", "measure: [drift]")
    edit("study: small", "study: measured")
    ran = call("run", "study.yaml")
    assert ran.exit_code == 0, ran.output
    record = json.loads(call("show", "probe.synthetic_qa.full", "--home", "runs/measured", "--json").stdout)
    mean = record["result"]["measures"]["drift"]["cosine_drift_mean"]
    shown = call("show", "probe.synthetic_qa.full", "--home", "runs/measured").stdout
    assert f"cosine_drift_mean {mean:.4g}" in " ".join(shown.split())


def test_show_takes_the_beginning_of_an_id_its_whole_or_its_folder(there):
    run = Home(Path("runs/small")).find("replicate.")[0].path
    shown = {name: call("show", name) for name in ("repl", run.name, run)}
    assert {result.exit_code for result in shown.values()} == {0}
    assert len({result.stdout for result in shown.values()}) == 1
    text = shown["repl"].stdout
    for word in (
        run.name,
        "outcome",
        "done",
        "learning_rate",
        "test",
        "moved: body",
        "attempt 1",
        "gradient norm",
    ):
        assert word in text
    record = json.loads(call("show", "repl", "--json").stdout)
    assert record["outcome"] == "done"
    assert record["spec"]["stage"] == "replicate"
    assert record["attempts"][0]["number"] == 1


def test_show_finds_a_study_elsewhere_by_its_home(there):
    Path("runs/small").rename("elsewhere")
    assert call("show", "repl").exit_code == 2
    result = call("show", "repl", "--home", "elsewhere")
    assert result.exit_code == 0
    assert "replicate.synthetic_qa.full.000" in result.stdout


def test_show_asks_for_more_of_an_ambiguous_beginning_and_names_the_candidates(there):
    names = sorted(path.name for path in Path("runs/small/runs").iterdir())
    for result in (call("show", ""), call("show", "", "--home", "runs/small")):
        assert_refused(result, 2)
        assert "4 runs match ''" in result.stderr
        assert all(name in result.stderr for name in names)


@pytest.mark.parametrize("name", ["nope", "../../x", "*", "[a-z]"])
def test_show_of_no_run_says_where_it_looked(there, name):
    result = call("show", name)
    assert_refused(result, 2)
    assert f"no run matches {name!r} in runs/small" in " ".join(result.stderr.split())


def test_report_is_written_again_from_the_runs(there):
    page, summary = Path("runs/small/report/index.html"), Path("runs/small/analysis/summary.json")
    arms = json.loads(summary.read_text())["arms"]
    shutil.rmtree("runs/small/report")
    summary.unlink()
    result = call("report", "study.yaml")
    assert result.exit_code == 0, result.output
    assert page.exists()
    assert json.loads(summary.read_text())["arms"] == arms


def test_an_unfinished_study_s_report_is_exit_code_4(there):
    shutil.rmtree(Home(Path("runs/small")).find("replicate.")[0].path)
    result = call("report", "study.yaml")
    assert result.exit_code == 4
    assert Path("runs/small/report/index.html").exists()


def test_a_study_with_a_run_that_failed_for_good_is_exit_code_3(there):
    run = Home(Path("runs/small")).find("replicate.")[0]
    run.result_file.unlink()
    run.write_failure(Failure(run_id=run.path.name, kind="crashed", reason="killed [by] us", attempt=3))
    result = call("report", "study.yaml")
    assert result.exit_code == 3
    assert "killed [by] us" in result.stdout


@pytest.mark.parametrize("verb", ["check", "run"])
def test_the_folder_of_another_study_is_refused_and_told_what_differs(there, verb):
    edit("epochs: 1", "epochs: 2")
    result = call(verb, "study.yaml")
    assert_refused(result)
    assert "runs/small belongs to another study" in result.stderr
    assert (
        'methods.full.search.epochs: {"kind": "fixed", "value": 2}, was {"kind": "fixed", "value": 1}'
        in result.stderr
    )


def test_a_run_whose_result_was_damaged_is_done_anew_alone_and_gives_the_same(there):
    home = Home(Path("runs/small"))
    run, other = home.find("replicate.")[0], home.find("trial.")[0]
    before, untouched = run.result(), other.result_file.stat().st_mtime_ns
    text = run.result_file.read_text()
    run.result_file.write_text(text.replace('"score": ', '"score": 1', 1))
    shown = call("status", "runs/small")
    assert shown.exit_code == 1
    assert "result.json is damaged" in shown.stderr
    done = call("run", "study.yaml")
    assert done.exit_code == 0, done.output
    assert "its run is set aside in" in done.output
    assert (run.result().weights_sha256, run.result().scores) == (before.weights_sha256, before.scores)
    assert other.result_file.stat().st_mtime_ns == untouched


def test_more_seeds_are_run_on_top_and_seen_by_status(there):
    before = Home(Path("runs/small")).find("replicate.")[0].result_file.stat().st_mtime_ns
    edit("seeds: 1", "seeds: 2")
    result = call("run", "study.yaml")
    assert result.exit_code == 0, result.output
    stages = json.loads(call("status", "runs/small", "--json").stdout)["stages"]
    assert [(row["planned"], row["runs"]) for row in stages if row["stage"] == "replicate"] == [
        (2, {"done": 2})
    ]
    assert Home(Path("runs/small")).find("replicate.")[0].result_file.stat().st_mtime_ns == before


def test_a_model_that_cannot_be_had_is_one_line_and_exit_code_1():
    Path("study.yaml").write_text(text_of(**FINISHED, model="{name: no-such/model, revision: main}"))
    result = call("check", "study.yaml")
    assert_refused(result)
    assert result.stderr.startswith("synthetic_qa: ")
    assert "no-such/model" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_home_that_is_in_use_is_named_with_its_process(there):
    with Home(Path("runs/small")).coordinate():
        result = call("run", "study.yaml")
        held = Path("runs/small/coordinator.lock").read_text()
        Path("runs/small/coordinator.lock").write_text(str(os.getpid()))  # as an older version wrote it
        older = call("run", "study.yaml")
        Path("runs/small/coordinator.lock").write_text(f"7 a-node {held.split()[2]}")
        far = call("run", "study.yaml")
    assert_refused(result, code=4)
    pid, host, since = held.split()
    assert abs(datetime.fromisoformat(since).timestamp() - time.time()) < 600
    lock = Path("runs/small/coordinator.lock")
    told = "runs/small is being worked on by process"
    wait = "; wait for it, or stop it and run again"
    assert result.stderr == f"{told} {pid} on {host} since {since}{wait}\n"
    assert older.stderr == f"{told} {pid}{wait}\n"
    gone = f"; if that machine is gone, and a few minutes have passed, delete {lock} first"
    assert far.stderr == f"{told} 7 on a-node since {since}{wait}{gone}\n"


# ---- output that cannot be written -----------------------------------------------------------------------


@pytest.mark.parametrize("nobody", ["a pipe that nobody reads", "a terminal that was closed"])
def test_output_that_nobody_takes_any_more_changes_neither_the_study_nor_its_exit_code(there, nobody):
    reader, writer = os.pipe() if nobody.startswith("a pipe") else os.openpty()
    os.close(reader)
    logged = len(Path("runs/small/log.txt").read_text().splitlines())
    command = [sys.executable, "-m", "finetrial", "run", "study.yaml"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")
    lines = Path("runs/small/log.txt").read_text().splitlines()[logged:]
    assert len(lines) > 3
    assert lines[-1].endswith("finetrial run ends")


def test_letters_that_the_output_does_not_know_are_shown_as_others(there):
    Path("runs/small").rename("runs/größe")
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "finetrial", "run", "study.yaml", "--home", "runs/größe"]
    done = subprocess.run(command, env=environment, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"runs/gr??e/report/index.html" in done.stdout
