"""The whole story on a tiny random model: two equal runs, kills in every phase, what lies on disk."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from statistics import fmean

import pytest

from finetrial import export
from finetrial.pipeline import _story_so_far, analyse_again
from finetrial.records import Failure
from finetrial.store import Home, RunFolder

FINETRIAL = [sys.executable, "-m", "finetrial"]
TINY_STUDY = """\
study: tiny
model: {model}
tasks:
  synthetic_qa: {{rows: 48, validation_rows: 24, test_rows: 24, max_length: 64}}
methods:
  full: {{search: {{learning_rate: {{low: 1e-4, high: 1e-2}}}}}}
  lora: {{search: {{learning_rate: {{low: 1e-3, high: 1e-1}}, rank: [2, 4]}}}}
search: {{trials: 3, space: {{epochs: 1, batch_size: 8}}}}
train: {{seeds: 2}}
measure: {{drift: {{rows: 24}}, spectrum: {{}}}}
run: {{threads: 1, log_steps: 1, parallel: 2}}
"""


def run_study(study: Path, home: Path, *, check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [*FINETRIAL, "run", str(study), "--home", str(home)], capture_output=True, text=True, timeout=600
    )
    if check:
        assert done.returncode == 0, done.stdout + done.stderr
    return done


def without_measured(summary: dict[str, object]) -> dict[str, object]:
    """A summary without what is measured on the clock (`meta` and every `cost`), and its checksum."""
    kept = {key: value for key, value in summary.items() if key not in ("meta", "sha256")}
    kept["arms"] = [{k: v for k, v in arm.items() if k != "cost"} for arm in summary["arms"]]
    return kept


def hashes(home: Path) -> dict[str, str]:
    records = [folder.record() for folder in Home(home).find("")]
    return {r.spec.run_id: r.result.weights_sha256 for r in records if r.result and r.result.weights_sha256}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path) -> tuple[Path, Path]:
    """A finished tiny study: its file and its folder."""
    folder = tmp_path_factory.mktemp("reference")
    study = folder / "study.yaml"
    study.write_text(TINY_STUDY.format(model=tiny_bert))
    run_study(study, folder / "home")
    return study, folder / "home"


def test_the_same_study_twice_gives_the_same_numbers_and_weights(reference, tmp_path):
    study, home = reference
    run_study(study, tmp_path / "again")
    first = json.loads((home / "analysis" / "summary.json").read_text())
    second = json.loads((tmp_path / "again" / "analysis" / "summary.json").read_text())
    assert without_measured(first) == without_measured(second)
    assert hashes(home) == hashes(tmp_path / "again")
    assert len(hashes(home)) == 2 * (3 + 2) + 1  # trials and replicates of two arms, the frozen body


def test_running_a_finished_study_again_starts_nothing(reference):
    study, home = reference
    before = {path: path.stat().st_mtime_ns for path in (home / "runs").rglob("*.json")}
    run_study(study, home)
    assert {path: path.stat().st_mtime_ns for path in (home / "runs").rglob("*.json")} == before


def test_every_run_leaves_what_the_docs_say(reference):
    _, home = reference
    for folder in Home(home).find(""):
        record = folder.record()
        assert record.outcome == "done", record.failure
        assert folder.path.name == record.spec.run_id
        assert [attempt.outcome for attempt in record.attempts] == ["done"]
        assert not folder.checkpoint.exists()
        assert not folder.lease_file.exists()
        if record.spec.stage == "probe":  # no claim is made of the spectrum yet; it is in the probe's result
            changed = record.result.measures["spectrum"]["overall"]["changed"]
            assert changed == (12 if record.spec.subject else 0)
    assert (home / "best" / "synthetic_qa.lora.yaml").exists()
    assert (home / "models" / "synthetic_qa.lora.seed1" / "adapter_model.safetensors").exists()
    assert (home / "models" / "synthetic_qa.full.seed1" / "model.safetensors").exists()
    for name in ("index.html", "report.md"):
        assert (home / "report" / name).exists()


def start(study: Path, home: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*FINETRIAL, "run", str(study), "--home", str(home)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip


def wait_for_running(home: Path, prefix: str, process: subprocess.Popen[str]) -> int:
    """The process id of a child of that stage, once it trains."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        for folder in Home(home).find(prefix):
            pids = [a.pid for a in folder.attempt_records() if a.outcome is None and a.pid]
            ready = folder.metrics_file.exists() or prefix.startswith(("probe", "baseline"))
            if pids and ready and not folder.result_file.exists():
                return pids[0]
        if process.poll() is not None:
            pytest.fail(f"the study ended before a {prefix} run was seen: {process.stdout.read()}")
        time.sleep(0.01)
    pytest.fail(f"no {prefix} run was seen")


@pytest.mark.parametrize(  # tests/test_crash.py kills either in any phase
    ("stage", "victim"),
    [("baseline.", "child"), ("trial.", "parent"), ("replicate.", "child"), ("probe.", "parent")],
)
def test_killed_once_in_a_phase_the_study_completes_with_the_same_weights(reference, tmp_path, stage, victim):
    study, finished = reference
    home = tmp_path / "killed"
    shutil.copytree(finished, home)
    undone = Home(home).find(stage)[-1]  # the study as it was before its last run of that phase
    shutil.rmtree(undone.path)
    if stage == "replicate.":
        shutil.rmtree(home / "models" / "synthetic_qa.lora.seed1")

    process = start(study, home)
    child = wait_for_running(home, stage, process)
    os.kill(child if victim == "child" else process.pid, signal.SIGKILL)
    if victim == "parent":
        process.communicate(timeout=30)
        process = start(study, home)
    output, _ = process.communicate(timeout=600)

    assert process.returncode == 0, output
    assert hashes(home) == hashes(finished)
    before, after = (json.loads((h / "analysis" / "summary.json").read_text()) for h in (finished, home))
    for summary in (before, after):
        for row in summary["ledger"]:
            del row["attempts"]
    assert without_measured(before) == without_measured(after)
    ended = [attempt.outcome for attempt in undone.attempt_records()]
    assert ended == ["crashed" if victim == "child" else "lost", "done"]


@pytest.mark.parametrize(("policy", "kept_of_each_arm"), [("best", 1), ("none", 0)])
def test_models_are_kept_by_policy_once_they_are_measured(reference, tmp_path, policy, kept_of_each_arm):
    study, home = tmp_path / "study.yaml", tmp_path / "home"
    study.write_text(reference[0].read_text() + f"run: {{threads: 1, parallel: 2, keep_models: {policy}}}\n")
    study.write_text("\n".join(line for line in study.read_text().splitlines() if "log_steps" not in line))
    shutil.copytree(reference[1], home)
    before = Home(home).summary()
    unmeasured = next(iter(Home(home).find("probe.synthetic_qa.lora.001")))
    kept_probe = unmeasured.result_file.read_bytes()
    unmeasured.result_file.unlink()
    give_up(unmeasured)
    run_study(study, home, check=False)
    assert len(models(home, "lora")) == 2  # one is still to be measured, if somebody tries again
    unmeasured.failure_file.unlink()
    unmeasured.result_file.write_bytes(kept_probe)
    run_study(study, home)
    after = Home(home).summary()
    assert after.arms == before.arms
    assert after.claims == before.claims
    for method in ("full", "lora"):
        kept = models(home, method)
        assert len(kept) == kept_of_each_arm
        replicates = [f.record() for f in Home(home).find(f"replicate.synthetic_qa.{method}.")]
        best = max(replicates, key=lambda r: (r.result.score, -r.spec.number))
        assert set(kept) <= {Home(home).model_folder(best.spec)}


def test_replicates_at_another_optimum_are_said_to_have_been_seen(reference, tmp_path):
    home = tmp_path / "home"
    shutil.copytree(reference[1], home)
    assert not any("optimum was chosen anew" in note for note in analyse_again(home).fairness_notes)
    now = export.read(Home(home), "synthetic_qa", "lora")
    export.write(Home(home), now.model_copy(update={"settings": {**now.settings, "learning_rate": 1e-4}}))
    found = [note for note in analyse_again(home).fairness_notes if "optimum was chosen anew" in note]
    assert found == [
        "synthetic_qa/lora: 2 of its replicates were scored on test with other settings and do not count: its "
        "optimum was chosen anew when their scores could be known"
    ]


def test_a_later_replicate_is_measured_though_the_one_before_it_was_not_kept(reference, tmp_path):
    study, home = tmp_path / "study.yaml", tmp_path / "home"
    text = "\n".join(line for line in reference[0].read_text().splitlines() if "log_steps" not in line)
    study.write_text(f"{text}\nrun: {{threads: 1, parallel: 2, keep_models: none}}\n")
    shutil.copytree(reference[1], home)
    run_study(study, home)
    before = Home(home).summary()
    assert models(home, "lora") == []
    study.write_text(study.read_text().replace("seeds: 2", "seeds: 3"))
    run_study(study, home)
    after = Home(home).summary()
    assert models(home, "lora") == []  # nor now
    for old, new in zip(before.arms, after.arms, strict=True):
        assert len(new.drift.replicates) == 3
        assert len(new.drift.layers[0].seed_to_seed) == 2  # the third against the second
        hashes_of = {run.number: run.weights_sha256 for run in new.replicates}
        assert hashes_of[1] == old.replicates[1].weights_sha256  # trained anew, to the same bits
        assert new.drift.per_replicate["1"] == old.drift.per_replicate["1"]
    assert len(list((home / "damaged").iterdir())) == 2  # the second of each arm, and no other


def test_the_base_is_measured_against_itself_in_one_phase_only(reference):
    """In two, `--retry-failed` would try again in the second what was given up in the first."""
    story = _story_so_far(reference[1])
    controls, probes = (
        [spec for lane in lanes for spec in lane] for lanes in (story.controls(), story.probes())
    )
    assert [spec.subject for spec in controls] == [None]
    assert len(probes) == 4
    assert all(spec.subject for spec in probes)
    assert {spec.run_id for spec in controls} < {run.spec.run_id for run in story.planned()}


def give_up(folder: RunFolder) -> None:
    """As for a run that had its chances."""
    folder.write_failure(
        Failure(run_id=folder.path.name, kind="crashed", reason="made up", attempt=1, final=True)
    )


def models(home: Path, method: str) -> list[Path]:
    return sorted((home / "models").glob(f"synthetic_qa.{method}.*"))


def test_learning_rates_up_to_ten_diverge_early_and_the_search_moves_away(tiny_bert, tmp_path):
    study, home = tmp_path / "study.yaml", tmp_path / "home"
    study.write_text(
        f"""\
study: absurd
model: {tiny_bert}
tasks: {{synthetic_qa: {{rows: 160, validation_rows: 16, test_rows: 8, max_length: 64}}}}
methods: [full, lora, frozen]
search:
  trials: 20
  space:
    learning_rate: {{low: 0.0001, high: 10, log: false}}
    epochs: 2
    batch_size: 8
    warmup_ratio: 0
    weight_decay: 0
train: {{seeds: 1}}
measure: []
run: {{engine: inline, threads: 1}}
"""
    )
    code = run_study(study, home, check=False).returncode
    # So near to where training is unstable, a replicate of what was chosen may diverge; the code tells it.
    ends = {folder.record().outcome for folder in Home(home).find("replicate.")}
    assert ends <= {"done", "diverged"}
    assert code == (3 if "diverged" in ends else 0)
    drawn, guided = defaultdict(list), defaultdict(list)
    for record in (folder.record() for folder in Home(home).find("trial.")):
        rate, method = float(record.spec.settings["learning_rate"]), record.spec.method.name
        (drawn if record.spec.number < 7 else guided)[method].append(rate)  # from then on TPE proposes
        if rate > 5:
            assert record.outcome == "diverged", (method, rate)
            assert record.result.training.steps <= 20 < record.result.training.planned_steps
    for method in ("full", "lora", "frozen"):
        assert (len(drawn[method]), len(guided[method])) == (7, 13)
        assert fmean(guided[method]) < 0.8 * fmean(drawn[method])
    absurd = [[rate > 5 for rates in part.values() for rate in rates] for part in (drawn, guided)]
    assert fmean(absurd[1]) < 0.5 * fmean(absurd[0])
