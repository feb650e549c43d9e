"""How long `finetrial check` says that a study takes, and how long it then takes, by phase.

    python bench/forecast.py studies/squad_v2-minilm.yaml --folder DIR [--output bench/results/forecast.json]

Both commands run here, one after the other, each in a fresh folder in DIR, so that the study is whole and
nothing of it was done by the check. A folder that holds a finished one is taken as it is. Nothing else should
run on the machine meanwhile: the forecast is for one that is as busy as it was during the check.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

BEGINS, ENDS = "finetrial run begins", "finetrial run ends"
PHASES = ("baseline", "control", "search", "train", "measure")


def measured(log: str) -> dict[str, float]:
    """Seconds of each phase, and of the whole, from the log of a study that one command has finished."""
    lines = [line.split("  ", 1) for line in log.splitlines()]
    at = [(datetime.fromisoformat(when).timestamp(), what) for when, what in lines]
    if [what for _, what in at if what in (BEGINS, ENDS)] != [BEGINS, ENDS]:
        raise SystemExit("the study was not finished by one command; give another folder")
    # A phase says how many arms and runs it has when it begins; later lines name an arm.
    starts = {
        what.split()[0]: when for when, what in at if what.split()[0] in PHASES and "arm" in what.split()[2]
    }
    found, ends = {}, [*list(starts.values())[1:], None]
    for (name, start), end in zip(starts.items(), ends, strict=True):
        last = max(when for when, what in at if what.startswith(f"{name} "))
        found[name] = (end if end is not None else last) - start
    found["whole"] = at[-1][0] - at[0][0]
    found["report"] = found["whole"] - sum(found[name] for name in starts)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", type=Path)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    checked, ran = given.folder / "check", given.folder / "run"
    for verb, home, there in (("check", checked, "check.json"), ("run", ran, "report/index.html")):
        if not (home / there).exists():
            command = [sys.executable, "-m", "finetrial", verb, str(given.study), "--home", str(home)]
            subprocess.run(command, check=True)
    forecast: dict[str, Any] = json.loads((checked / "check.json").read_text())["forecast"]
    predicted = {**forecast["phases"], "whole": forecast["seconds"]}
    took = measured((ran / "log.txt").read_text())
    rows = {
        name: {"predicted_s": round(predicted[name], 1), "measured_s": took[name]}
        for name in (*PHASES, "report", "whole")
        if name in took
    }
    for name, row in rows.items():
        row["ratio"] = round(row["predicted_s"] / row["measured_s"], 3) if row["measured_s"] else None
        sys.stdout.write(f"{name:<10}{row['predicted_s']:>10.0f}{row['measured_s']:>10.0f}   {row['ratio']}\n")
    if given.output:
        machine = {"platform": platform.platform(), "cpus": os.cpu_count()}
        content = {"study": given.study.name, "machine": machine, "correction": forecast["correction"]}
        given.output.write_text(json.dumps({**content, "phases": rows}, indent=1) + "\n")
    ratio = rows["whole"]["ratio"]
    return 0 if ratio is not None and 0.75 <= ratio <= 1.25 else 1


if __name__ == "__main__":
    sys.exit(main())
