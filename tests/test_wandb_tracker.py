"""trackers/wandb.py: what an offline run's file says when it is read back, and what it does not say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import psutil
import pytest

from finetrial import plugins
from finetrial.errors import PluginError
from finetrial.records import Cost, MethodSpec, ModelSource, Result, RunSpec, Seeds, TaskSpec

pytest.importorskip("wandb", reason="the wandb extra is not installed")

CANARY = "canary7f3a"
RECORDS: list[dict[str, Any]] = [
    {"kind": "train", "step": 10, "planned_steps": 40, "loss": 2.5, "learning_rate": 1e-4, "note": "text"},
    {"kind": "eval", "step": 10, "f1": 40.0},
    {"kind": "train", "step": 20, "loss": 9.9},  # of an attempt that was killed after its checkpoint at 10
    {"kind": "train", "step": 15, "loss": 2.0},
    {"kind": "train", "step": 20, "loss": 1.5},
    {"kind": "eval", "step": 20, "f1": 55.5, "scores": {"HasAns_f1": 47.9}},
]


def make_spec(stage="trial", number=3, method="lora", rate=3.3e-4) -> RunSpec:
    return RunSpec(
        study="squad-on-one-l4",
        stage=stage,
        task=TaskSpec(name="squad_v2", use="squad_v2", params={}),
        method=MethodSpec(name=method, use=method, params={}) if method else None,
        number=number,
        model=ModelSource(name="org/model", revision="abc"),
        settings={"learning_rate": rate, "rank": 8} if stage == "trial" else {},
        seeds=Seeds(data_order=1, head=2, adapter=3, dropout=4),
    )


def make_result(spec: RunSpec) -> Result:
    return Result(
        run_id=spec.run_id,
        outcome="done",
        score=55.5,
        scores={"validation": {"f1": 55.5, "exact": 50.25}},
        cost=Cost(wall_seconds=12.0, cpu_seconds=11.0, peak_memory_bytes=123, device="cpu"),
    )


@pytest.fixture
def tracker(monkeypatch):
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    return plugins.load("trackers", "wandb")


def run_files(folder: Path) -> list[Path]:
    return sorted((folder / "wandb").glob("offline-run-*/run-*.wandb"))


def read_back(folder: Path) -> dict[str, Any]:
    """The one run below the folder: its header, config, summary and history, as W&B would show them."""
    from wandb_reader import read_records

    (path,) = run_files(folder)
    found: dict[str, Any] = {"config": {}, "summary": {}, "history": defaultdict(dict)}
    for record in read_records(path):
        match record.WhichOneof("record_type"):
            case "run":
                run = record.run
                found["run"] = run
                found["config"] = {item.key: json.loads(item.value_json) for item in run.config.update}
            case "summary":
                for item in record.summary.update:
                    key = item.key or ".".join(item.nested_key)
                    found["summary"][key] = json.loads(item.value_json)
            case "history":
                values = {
                    ".".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item
                }
                step = values.get("_step", record.history.step.num)
                found["history"][step] |= {k: v for k, v in values.items() if not k.startswith("_")}
            case "exit":
                found["exit_code"] = record.exit.exit_code
    return found


def test_a_trial_read_back(tracker, tmp_path, capfd):
    spec = make_spec()
    tracker.replay(tmp_path, spec, RECORDS, make_result(spec))
    assert capfd.readouterr() == ("", "")
    found = read_back(tmp_path)
    run = found["run"]
    assert run.display_name == "trial_3"
    assert run.project == "squad-on-one-l4"
    assert run.run_group == "squad_v2/lora"
    assert run.job_type == "trial"
    assert run_files(tmp_path)[0].name == f"run-{run.run_id}.wandb"
    expected = {
        "learning_rate": 3.3e-4,
        "rank": 8,
        "study": "squad-on-one-l4",
        "run_id": spec.run_id,
        "task": "squad_v2",
        "method": "lora",
        "number": 3,
        "model": "org/model",
        "revision": "abc",
    }
    assert expected.items() <= found["config"].items()
    assert found["config"]["seeds"]["dropout"] == 4
    expected = {
        "outcome": "done",
        "score": 55.5,
        "scores/validation/f1": 55.5,
        "scores/validation/exact": 50.25,
    }
    assert expected.items() <= found["summary"].items()
    assert dict(found["history"]) == {
        10: {"train/planned_steps": 40, "train/loss": 2.5, "train/learning_rate": 1e-4, "eval/f1": 40.0},
        15: {"train/loss": 2.0},
        20: {"train/loss": 1.5, "eval/f1": 55.5, "eval/scores/HasAns_f1": 47.9},
    }
    assert found["exit_code"] == 0


def test_a_second_replay_is_the_same_run(tracker, tmp_path):
    spec = make_spec()
    tracker.replay(tmp_path, spec, RECORDS[:1], None)
    first = read_back(tmp_path)
    tracker.replay(tmp_path, spec, RECORDS, make_result(spec))
    second = read_back(tmp_path)  # which finds one file
    assert first["run"].run_id == second["run"].run_id
    assert (first["summary"]["outcome"], second["summary"]["outcome"]) == ("failed", "done")
    assert (first["exit_code"], second["exit_code"]) == (1, 0)


def test_every_run_has_its_own_id_and_every_stage_its_name(tracker, tmp_path):
    specs = {
        "trial_3": make_spec(),
        "trial_4": make_spec(number=4),
        "trial_3 of full": make_spec(method="full"),
        "trial_3 with other settings": make_spec(rate=1e-5),
        "replicate_3": make_spec(stage="replicate"),
        "probe_3": make_spec(stage="probe"),
        "baseline": make_spec(stage="baseline", number=0, method=None),
    }
    found = {}
    for name, spec in specs.items():
        tracker.replay(tmp_path / name, spec, [], None)
        found[name] = read_back(tmp_path / name)["run"]
        assert found[name].display_name == name.split()[0]
    assert len({run.run_id for run in found.values()}) == len(specs)
    assert found["trial_3 of full"].run_group == "squad_v2/full"
    assert found["baseline"].run_group == "squad_v2"


def test_long_histories_cross_blocks_and_keep_every_record(tracker, tmp_path):
    records = [{"kind": "train", "step": step, "loss": 1 / (step + 1)} for step in range(500)]
    tracker.replay(tmp_path, make_spec(), records, None)
    assert run_files(tmp_path)[0].stat().st_size > 3 * 32 * 1024
    history = read_back(tmp_path)["history"]
    assert [history[step]["train/loss"] for step in range(500)] == [r["loss"] for r in records]


PROGRAM = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
import psutil
from test_wandb_tracker import RECORDS, make_result, make_spec
from finetrial.trackers.wandb import PLUGIN
spec = make_spec()
PLUGIN.replay(Path(sys.argv[2]), spec, RECORDS, make_result(spec))
assert not psutil.Process().children(recursive=True), psutil.Process().children(recursive=True)
"""


def test_nothing_private_is_written_nothing_printed_and_nothing_left_behind(tmp_path):
    """Secrets in the environment and on the command line stay out of every file that wandb writes."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(Path(__file__).parent), str(tmp_path), f"--token={CANARY}"],
        env=clean | {"WANDB_API_KEY": CANARY.ljust(40, "0"), "HF_TOKEN": CANARY},
        capture_output=True,
        text=True,
        timeout=120,  # its exit does not wait for a service
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files)
    assert [path for path in files if CANARY.encode() in path.read_bytes()] == []
    (run_folder,) = (tmp_path / "wandb").glob("offline-run-*")
    assert list((run_folder / "files").iterdir()) == []  # no metadata, requirements, code or console


def test_no_service_outlives_a_replay(tracker, tmp_path):
    tracker.replay(tmp_path, make_spec(), [], None)
    assert [child for child in psutil.Process().children(recursive=True) if "wandb" in child.name()] == []


def test_going_online_needs_a_key_from_the_environment(tracker, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "online")
    with pytest.raises(PluginError, match="WANDB_API_KEY is not set"):
        tracker.replay(tmp_path, make_spec(), [], None)
    assert not run_files(tmp_path)


def test_a_missing_wandb_says_what_to_install(tracker, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(PluginError, match=r"pip install finetrial\[wandb\]"):
        tracker.replay(tmp_path, make_spec(), [], None)
