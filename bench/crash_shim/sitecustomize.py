"""Loaded by every Python that has this folder on PYTHONPATH: makes a study fail where a campaign wants it to.

For `bench/crash.py` alone; nothing in finetrial knows of it. When one of finetrial's modules has been imported,
the functions named in `POINTS` are wrapped, so that "before" and "after" each call is a *point*: a name and
the run that it is about. `FINETRIAL_CRASH` names a folder. With a file `record` in it, every point passed is
written down. Each file `armed-*.json` in it (`{"point", "occurrence", "kind"}`) is a fault that happens at
that point, once: the file is renamed to `fired-*.json` first.
"""

from __future__ import annotations

import errno
import functools
import importlib.abc
import importlib.machinery
import json
import os
import re
import signal
import sys
from pathlib import Path

PLAN = os.environ.get("FINETRIAL_CRASH")
RUN = re.compile(r"(?:baseline|trial|replicate|probe)\.[\w.]+\.\d{3}(?=-)|(?:baseline|probe)\.\w+\.\d{3}(?=-)")

# Module -> function (or Class.method) -> phase.
POINTS = {
    "finetrial.worker": {"main": "import", "work": "import", "_do": "import"},
    "finetrial.engines.local": {"Local.start": "import", "Nursery.start": "import"},
    "finetrial.assemble": {"open_workbench": "import", "Workbench.build_base": "import"},
    "finetrial.search": {"propose": "ask"},
    "finetrial.plan": {"trial": "ask", "replicate": "ask"},
    "finetrial.lease": {"claim": "ask", "release": "result"},
    "finetrial.store": {
        "RunFolder.create": "ask", "RunFolder.write_attempt": "ask", "RunFolder.write_result": "result",
        "RunFolder.keep_metrics_up_to": "train", "RunFolder.drop_checkpoint": "clean-up",
        "Home.write_summary": "report", "Home.set_aside_damaged": "clean-up",
    },
    "finetrial.optimisation": {"prepare_optimisation": "train", "settings_used": "train"},
    "finetrial.train": {
        "train": "train", "_Loop.step": "train", "_Loop.judge": "evaluate", "evaluate": "evaluate",
    },
    "finetrial.checkpoint": {
        "save": "save", "save_best": "save", "load_best": "save", "newest": "save", "restore": "save",
        "_drop_all_but": "clean-up",
    },
    "finetrial.stages": {
        "_training": "result", "_save_model": "result", "prove": "result", "weights_hash": "result",
        "_probe": "evaluate", "_baseline": "evaluate",
    },
    "finetrial.export": {"optimum": "export", "write": "export", "read": "export"},
    "finetrial.analyse": {"summarise": "report"},
    "finetrial.report": {"write": "report"},
    "finetrial.tracking": {"Mirror.__call__": "clean-up"},
    "finetrial.opening": {"open_home": "ask", "resolve_inputs": "ask"},
    "finetrial.files": {
        "write_bytes": None, "append_json_line": None, "commit_folder": None, "sync_folder": None,
    },
}  # fmt: skip
# What a file or folder is about tells the phase of writing it.
WRITTEN = {
    "spec.json": "ask", "lease.json": "ask", "study.yaml": "ask", "study.lock.json": "ask",
    "result.json": "result", "failure.json": "result", "examples.json": "result", "metrics.jsonl": "train",
    "state.json": "save", "manifest.json": "save", "summary.json": "report", "step": "save", "best": "save",
    "seed": "result", "attempt": "result", "optimum": "export", "report": "report", "mirror": "clean-up",
}  # fmt: skip


class State:
    """This process's: the run that it is about, how often it has passed each point, what it wrote last."""

    run = ""
    passed: dict[str, int] = {}
    written = "other"


def about(arguments: tuple) -> str:
    """The run that a call is about: named in a path or a spec among its arguments, else this process's own."""
    for argument in arguments:
        spec = getattr(argument, "spec", None)  # a record's; a folder's is a method
        for text in (
            getattr(argument, "path", argument),
            *(getattr(a, "run_id", None) for a in (argument, spec)),
        ):
            found = RUN.search(str(text)) if isinstance(text, Path | str) else None
            if found:
                return found[0]
    return State.run


def kind_of_file(path: Path) -> str:
    if path.name in WRITTEN:
        return path.name
    parts = (
        ("attempts", "attempt"), ("report", "report"), ("tracking", "mirror"), ("models", "seed"),
    )  # fmt: skip
    for folder, kind in parts:
        if folder in path.parts:
            return kind
    if path.name.startswith(("step-", "best-")):
        return path.name.partition("-")[0]
    return "optimum" if "best" in path.parts else "other"


def point(name: str, path: Path | None, run: str) -> None:
    """Pass a point: note it, or let the fault that is armed for it happen."""
    plan = Path(PLAN or "")
    label = f"{name} [{run}]" if run else name
    State.passed[label] = State.passed.get(label, 0) + 1
    if (plan / "record").exists():
        role = "parent" if os.getpid() == coordinator() else "child"
        with (plan / "record").open("a") as stream:
            stream.write(json.dumps([label, State.passed[label], role]) + "\n")
        return
    for file, fault in armed().items():
        if fault["point"] == label and fault["occurrence"] == State.passed[label]:
            try:
                file.rename(file.with_name(file.name.replace("armed", "fired")))
            except OSError:  # it has happened, in another process
                continue
            happen(fault["kind"], path)


@functools.cache
def armed() -> dict[Path, dict]:
    """The faults of this study, as they were at the first point that this process passed."""
    return {file: json.loads(file.read_text()) for file in sorted(Path(PLAN or "").glob("armed-*.json"))}


def coordinator() -> int:
    return int(Path(PLAN or "", "coordinator.pid").read_text() or 0)


def happen(kind: str, path: Path | None) -> None:
    parent = coordinator()
    if kind == "disk full":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path) if path else None)
    if kind == "read-only":
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path) if path else None)
    if kind in ("bit flipped", "cut short") and path is not None:
        damage(path, kind)
    if kind in ("parent killed", "both killed"):
        os.kill(parent, signal.SIGKILL)
    if kind in ("parent SIGTERM", "parent SIGINT"):
        os.kill(parent, signal.SIGTERM if kind == "parent SIGTERM" else signal.SIGINT)
        return
    if kind == "child SIGTERM":
        os.kill(os.getpid(), signal.SIGTERM)
        return
    if kind == "orphan left" and os.fork() == 0:
        os.execv("/bin/sleep", ["sleep", "30"])
    if kind != "parent killed" or os.getpid() == parent:
        os.kill(os.getpid(), signal.SIGKILL)


def damage(path: Path, kind: str) -> None:
    """Change a file, or the largest one in a folder, behind everybody's back."""
    if path.is_dir():
        path = max((p for p in path.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data = bytearray(path.read_bytes())
    if kind == "cut short":
        data = data[: len(data) // 2]
    else:
        data[len(data) // 2] ^= 16
    path.write_bytes(data)


def wrapped(function, name: str, phase: str | None):
    @functools.wraps(function)
    def call(*arguments, **options):
        if name == "worker.main":
            found = RUN.search(str(arguments[0]))
            State.run, State.passed = (found[0] if found else ""), {}
        path = None
        label = name
        if phase is None:
            path = (
                next(a for a in reversed(arguments) if isinstance(a, Path)) if name.endswith("folder") else None
            )
            path = path or next(a for a in arguments if isinstance(a, Path))
            # A folder is synced for the sake of what was written into it.
            State.written = State.written if name == "files.sync_folder" else kind_of_file(path)
            label = f"{name} {State.written}"
        run = about(arguments)
        point(f"before {label}", path, run)
        result = function(*arguments, **options)
        point(f"after {label}", path, run)
        return result

    return call


def patch(module) -> None:
    for qualified, phase in POINTS[module.__name__].items():
        holder, _, attribute = qualified.rpartition(".")
        owner = getattr(module, holder) if holder else module
        name = f"{module.__name__.removeprefix('finetrial.')}.{qualified}"
        setattr(owner, attribute, wrapped(getattr(owner, attribute), name, phase))


class Finder(importlib.abc.MetaPathFinder):
    """Lets Python find a module as always, and patches it once it has been executed."""

    def find_spec(self, name, path, target=None):
        if name not in POINTS:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            patch(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if PLAN:
    sys.meta_path.insert(0, Finder())
