"""Attack a real study at named points, until it finishes; then compare it with one that nobody disturbed.

    python bench/crash.py [--faults 1000] [--kinds KIND ...] [--seed 0] [--jobs 2] [--nth] [--output FILE]

The study (`crash_field.py`) is small (a random two-layer model, two arms, trials by halving, replicates,
probes, a tracker) and otherwise real: processes, Optuna, checkpoints, report.
`crash_shim/sitecustomize.py` makes each fault (`crash_faults.py`) happen at a point before or after a call, in
the coordinator or in a worker. A *chain* is one study that meets several faults, one after the other; whenever
it has ended, the same command is run again. In the end: no run lost, none done twice, nothing left running,
attempts numbered in sequence, and every number and weight hash equal to the undisturbed study's. `--nth` adds
`crash_nth.py`: the n-th write, fsync, replace and spawn fails, for every n.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

from crash_faults import (
    DAMAGE,
    HANGS,
    KINDS,
    OF_TRACKER,
    Chain,
    Fault,
    chains,
    in_order_of_choice,
    next_faults,
    possible,
)
from crash_field import HUNG, Field, outcome_of, still_running, untidy

MOST_RESTARTS = 8  # beyond one for each fault
WENT_ON, AGAIN, NAMED = "went on in the same command", "the command again", "named, and that alone done anew"
REPLAY = "running again replays"
TRACKER_KINDS = {kind for kinds in OF_TRACKER.values() for kind in kinds}
PACKAGES = ("finetrial", "torch", "transformers", "peft", "accelerate", "optuna", "numpy", "psutil")


def fight(field_: Field, chain: Chain, number: int) -> Chain:
    """Let one study meet its faults, run it until it is finished, and compare."""
    home, plan = field_.folder / f"attacked-{number}", field_.folder / f"attacked-{number}.plan"
    plan.mkdir()
    for index, fault in enumerate(chain.faults):
        armed = {"point": fault.point, "occurrence": fault.occurrence, "kind": fault.kind}
        (plan / f"armed-{index:02d}.json").write_text(json.dumps(armed))
    study = "limited.yaml" if any(fault.kind in HANGS for fault in chain.faults) else "study.yaml"
    code, output, outputs = -1, "", []
    while code != 0 or REPLAY in output:  # a tracker that could not write was left out
        if chain.starts > len(chain.faults) + MOST_RESTARTS:
            chain.wrong.append(f"it does not finish: {output[-2000:]}")
            break
        code, output = field_.run(home, plan, study=study)
        chain.starts += 1
        outputs.append(output)
        note(chain, plan, code, output)
        if "Traceback" in output:
            chain.wrong.append(f"a traceback: {output[-1500:]}")
        if code == HUNG:
            chain.wrong.append("it hung")
        chain.wrong += [f"left running: {line}" for line in still_running(plan)]
    chain.missed = [fault for fault in chain.faults if fault not in chain.outcomes]
    for fault in chain.fired:
        if fault.kind in DAMAGE and named(fault, outputs):
            chain.outcomes[fault] = NAMED
    chain.wrong += [path.read_text() for path in plan.glob("wrong-*.txt")]
    if code == 0:
        outcome = outcome_of(home)
        chain.wrong += [f"{key} differs" for key in outcome if outcome[key] != field_.outcome[key]]
        chain.wrong += untidy(home)
    if not chain.wrong:
        shutil.rmtree(home)
    else:
        met = "; ".join(f"{fault.kind} {fault.point} ({fault.occurrence})" for fault in chain.fired)
        chain.wrong.append(f"all of this in study {number}, which met: {met}")
    return chain


def note(chain: Chain, plan: Path, code: int, output: str) -> None:
    """Write down the faults that one command met; the last before it ended is taken for what ended it."""
    files = {path: path.stat().st_ctime_ns for path in plan.glob("fired-*.json")}
    order = [int(path.stem.partition("-")[2]) for path in sorted(files, key=lambda path: files[path])]
    new = [chain.faults[index] for index in order if chain.faults[index] not in chain.outcomes]
    for fault in new:
        again = (fault is new[-1] and code != 0) or (REPLAY in output and fault.kind in TRACKER_KINDS)
        chain.outcomes[fault] = AGAIN if again else WENT_ON
    chain.fired += new


def named(fault: Fault, outputs: Sequence[str]) -> bool:
    """Whether a command said that it found what this fault damaged."""
    lines = [line for output in outputs for line in output.splitlines() if "damaged" in line]
    return any((fault.run in line) if fault.run else ("exported anew" in line) for line in lines)


def campaign(
    field_: Field, count: int, *, seed: int, jobs: int, kinds: Sequence[str] = KINDS, least: int | None = None
) -> list[Chain]:
    """At least so many faults that happened, `least` in each phase; for those that missed, others are tried."""
    faults = [fault for fault in possible(field_.passed) if fault.kind in kinds]
    waiting = in_order_of_choice(faults, seed)
    fought: list[Chain] = []
    with ThreadPoolExecutor(jobs) as pool:
        while True:
            fired = [fault for chain in fought for fault in chain.fired]
            chosen = next_faults(waiting, fired, count, count // 20 if least is None else least)
            if not chosen:
                return fought
            numbered = enumerate(chains(chosen), start=len(fought))
            fought += pool.map(lambda item: fight(field_, item[1], item[0]), numbered)


def table(rows: Sequence[tuple[str, str]], head: str) -> str:
    """How often each pair came, as Markdown: the first down, the second across, with sums."""
    downs, acrosses = sorted({down for down, _ in rows}), sorted({across for _, across in rows})
    counts = Counter(rows)
    lines = [f"| {head} | " + " | ".join(acrosses) + " | all |", "|---|" + "---|" * (len(acrosses) + 1)]
    for down in downs:
        row = [counts[down, across] for across in acrosses]
        lines.append(f"| {down} | " + " | ".join(map(str, row)) + f" | {sum(row)} |")
    sums = [sum(counts[down, across] for down in downs) for across in acrosses]
    lines.append("| all | " + " | ".join(map(str, sums)) + f" | {len(rows)} |")
    return "\n".join(lines)


def nth_calls(folder: Path, jobs: int) -> dict[str, Any]:
    """What `crash_nth.py` found; in a process of its own, because it forks from one with a single thread."""
    output = folder / "nth.json"
    script = Path(__file__).with_name("crash_nth.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, str(script), "--jobs", str(jobs), "--output", str(output)]
    subprocess.run(command, env=environment, check=False)
    return json.loads(output.read_text()) if output.exists() else {"wrong": ["crash_nth.py ended early"]}


def as_json(field_: Field, fought: Sequence[Chain], nth: dict[str, Any], seed: int, seconds: float) -> Any:
    """Everything that was counted, for bench/results/crash.json."""
    fired = [fault for chain in fought for fault in chain.fired]
    outcomes = {fault: outcome for chain in fought for fault, outcome in chain.outcomes.items()}
    return {
        "seed": seed, "faults": len(fired), "points": len({fault.point for fault in fired}),
        "points_by_name": len({fault.point.partition(" [")[0] for fault in fired}),
        "points_passed_undisturbed": len({label for label, _, _ in field_.passed}),
        "missed": sum(len(chain.missed) for chain in fought),
        "studies": len(fought), "commands": sum(chain.starts for chain in fought),
        "wrong": [line for chain in fought for line in chain.wrong] + nth.get("wrong", []),
        "kinds": dict(sorted(Counter(fault.kind for fault in fired).items())),
        "phases": dict(sorted(Counter(fault.phase for fault in fired).items())),
        "counts": [
            {"kind": kind, "phase": phase, "outcome": outcome, "faults": count}
            for (kind, phase, outcome), count in sorted(
                Counter((f.kind, f.phase, outcomes[f]) for f in fired).items()
            )
        ],
        "nth": nth, "seconds": round(seconds),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "machine": {"cores": os.cpu_count(), "platform": platform.platform()},
    }  # fmt: skip


def write(result: Any, output: Path | None) -> None:
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(result, indent=1) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--faults", type=int, default=1000)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, metavar="KIND")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--nth", action="store_true", help="also fail the n-th call, for every n")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    # A shell's `&` has it ignored, and so would all that is started here; what is handled is not handed on.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        field_ = Field(Path(folder))
        fought = campaign(field_, given.faults, seed=given.seed, jobs=given.jobs, kinds=given.kinds)
        result = as_json(field_, fought, {}, given.seed, time.monotonic() - began)
        if given.nth:
            write(result, given.output)  # the pass takes half an hour more
            nth = nth_calls(Path(folder), given.jobs)
            result = as_json(field_, fought, nth, given.seed, time.monotonic() - began)
    fired = [fault for chain in fought for fault in chain.fired]
    outcomes = [(fault.kind, chain.outcomes[fault]) for chain in fought for fault in chain.fired]
    sys.stdout.write(
        f"{table([(fault.kind, fault.phase) for fault in fired], 'fault')}\n\n{table(outcomes, 'fault')}\n\n"
        f"{len(fired)} faults at {result['points']} points of {result['points_passed_undisturbed']}, in "
        f"{len(fought)} studies, {len(result['wrong'])} wrong, {result['seconds']} s\n"
    )
    for line in result["wrong"]:
        sys.stdout.write(f"WRONG: {line}\n")
    write(result, given.output)
    return 1 if result["wrong"] else 0


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
