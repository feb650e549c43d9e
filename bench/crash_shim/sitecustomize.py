"""Loaded by every Python that has this folder on PYTHONPATH: makes a study fail where a campaign wants it to.

For `bench/crash.py` alone; nothing in finetrial knows of it. When one of finetrial's modules has been imported,
the functions named in `POINTS` are wrapped, so that "before" and "after" each call is a *point*: a name and
the run that it is about. `FINETRIAL_CRASH` names a folder. With a file `record` in it, every point passed is
written down. Each file `armed-*.json` in it (`{"point", "occurrence", "kind"}`) is a fault that happens at
that point, once: the file is renamed to `fired-*.json` first. What a fault itself finds wrong goes to
`wrong-*.txt`. `FINETRIAL_CRASH_FORK` (n and a file to be made then) lets the n-th fork of a process fail, for
`bench/crash_nth.py`.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import importlib.abc
import importlib.machinery
import inspect
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

PLAN = os.environ.get("FINETRIAL_CRASH")
RUN = re.compile(
    r"(?:baseline|trial|replicate|probe)\.[\w.]+\.\d{3}(?:\.rung\d)?(?=-)|(?:baseline|probe)\.\w+\.\d{3}(?=-)"
)

# Module -> function (or Class.method) -> phase.
POINTS = {
    "finetrial.worker": {"main": "import", "work": "import", "_do": "import"},
    "finetrial.engines.local": {"Local.start": "import", "Nursery.start": "import"},
    "finetrial.assemble": {"open_workbench": "import", "Workbench.build_base": "import"},
    "finetrial.search": {"propose": "ask"},
    "finetrial.plan": {"trial": "ask", "further": "ask", "replicate": "ask"},
    "finetrial.lease": {"claim": "ask", "release": "result"},
    "finetrial.store": {
        "RunFolder.create": "ask", "RunFolder.write_attempt": "ask", "RunFolder.write_result": "result",
        "RunFolder.keep_metrics_up_to": "train", "RunFolder.drop_checkpoint": "clean-up",
        "Home.write_summary": "report",
    },
    "finetrial.setting_aside": {"damaged": "clean-up"},
    "finetrial.optimisation": {"prepare_optimisation": "train", "settings_used": "train"},
    "finetrial.train": {"train": "train"},
    "finetrial.loop": {"Loop.step": "train", "Loop.judge": "evaluate"},
    "finetrial.evaluation": {
        "evaluate": "evaluate", "Kept.begin": "evaluate", "Kept.write": "evaluate",
    },
    "finetrial.checkpoint": {
        "save": "save", "save_best": "save", "load_best": "save", "newest": "save", "restore": "save",
        "_drop_all_but": "clean-up",
    },
    "finetrial.stages": {
        "training": "result", "_save_model": "result", "prove": "result",
        "_probe": "evaluate", "_baseline": "evaluate",
    },
    "finetrial.export": {"optimum": "export", "write": "export", "read": "export"},
    "finetrial.analyse": {"summarise": "report"},
    "finetrial.report": {"write": "report"},
    "finetrial.tracking": {"Mirror.__call__": "clean-up"},
    "counting_tracker": {"Counting.replay": "clean-up", "Counting.middle": "clean-up"},
    "finetrial.opening": {"open_home": "ask", "resolve_inputs": "ask"},
    "finetrial.files": {
        "write_bytes": None, "append_json_line": None, "commit_folder": None, "sync_folder": None,
    },
}  # fmt: skip
# What a file or folder is about tells the phase of writing it.
WRITTEN = {
    "spec.json": "ask", "lease.json": "ask", "study.yaml": "ask", "study.lock.json": "ask",
    "result.json": "result", "failure.json": "result", "examples.json": "result", "metrics.jsonl": "train",
    "fit.json": "train", "events.jsonl": "train", "to": "evaluate", "key.json": "evaluate",
    "state.json": "save", "manifest.json": "save", "summary.json": "report", "step": "save", "best": "save",
    "seed": "result", "attempt": "result", "optimum": "export", "report": "report", "mirror": "clean-up",
    "cache": "import",
}  # fmt: skip
DAY = 86400.0
TRACKER_SECONDS = 3.0  # what a tracker may take here: a campaign has no time for what users are granted
OOM_BYTES = 64 << 20  # taken before the kernel's killer is played
SPARE_BYTES = 1 << 20  # what a process may still take when its memory is limited


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
    if path.name in WRITTEN and "cache" not in path.parts:
        return path.name
    parts = (
        ("attempts", "attempt"), ("report", "report"), ("tracking", "mirror"), ("models", "seed"),
        ("cache", "cache"),
    )  # fmt: skip
    for folder, kind in parts:
        if folder in path.parts:
            return kind
    if path.name.startswith(("step-", "best-", "to-")):
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
    if kind in OTHER:
        OTHER[kind]()
        return
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


def hang() -> None:
    while True:
        time.sleep(60.0)


def stop_everything() -> None:
    """SIGKILL to the groups of the coordinator, the nursery and every worker, this process's last."""
    import psutil

    parent = coordinator()
    groups = [os.getpgid(child.pid) for child in psutil.Process(parent).children(recursive=True)]
    for group in [parent, *(group for group in groups if group not in (parent, os.getpgrp())), os.getpgrp()]:
        try:
            os.killpg(group, signal.SIGKILL)
        except ProcessLookupError:  # it went with its parent
            continue


def jump(seconds: float) -> None:
    """Set this process's clock: what it takes for the time, and for when a process was started."""
    import psutil

    now, started = time.time, psutil.Process.create_time
    time.time = lambda: now() + seconds
    psutil.Process.create_time = lambda process: started(process) + seconds


def out_of_memory() -> None:
    """What the kernel does to a process that takes too much."""
    taken = bytearray(OOM_BYTES)
    taken[::4096] = b"1" * len(taken[::4096])
    os.kill(os.getpid(), signal.SIGKILL)


def limit_memory() -> None:
    """Let every larger allocation from here on fail."""
    import resource

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + SPARE_BYTES, used + SPARE_BYTES))


def second_coordinator() -> None:
    """Start the same command on the same folder: it has to refuse, and to change nothing of a coordinator's."""
    home = Path(sys.argv[sys.argv.index("--home") + 1])
    before = coordinated(home)
    environment = {name: value for name, value in os.environ.items() if name != "FINETRIAL_CRASH"}
    command = [sys.executable, "-m", "finetrial", *sys.argv[1:]]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    output = done.stdout + done.stderr
    wrong = []
    if done.returncode != 4 or f"is being worked on by process {os.getpid()}" not in output:
        wrong.append(f"a second coordinator ended with {done.returncode}: {output[-1000:]}")
    if coordinated(home) != before:
        wrong.append("a second coordinator changed the folder")
    for line in wrong:
        Path(PLAN or "", f"wrong-{time.monotonic_ns()}.txt").write_text(line)


def coordinated(home: Path) -> dict[str, str]:
    """File -> SHA-256 of what only a coordinator writes."""
    patterns = (
        "study.*", "coordinator.lock", "best/*", "analysis/*", "runs/*/spec.json", "runs/*/lease.json",
        "runs/*/attempts/*",
    )  # fmt: skip
    found = (path for pattern in patterns for path in home.glob(pattern))
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


def refuse_connection() -> None:
    raise ConnectionRefusedError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))


def fail() -> None:
    raise RuntimeError("the server closed the connection")


OTHER = {
    "group killed": stop_everything,
    "child hangs": hang,
    "child stopped": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "clock a day ahead": lambda: jump(DAY),
    "clock a day back": lambda: jump(-DAY),
    "out of memory": out_of_memory,
    "memory limited": limit_memory,
    "second coordinator": second_coordinator,
    "tracker down": refuse_connection,
    "tracker raises": fail,
    "tracker hangs": hang,
}


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

    @functools.wraps(function)
    def steps(*arguments, **options):
        run = about(arguments)
        point(f"before {name}", None, run)
        result = yield from function(*arguments, **options)
        point(f"after {name}", None, run)
        return result

    return steps if inspect.isgeneratorfunction(function) else call


def patch(module) -> None:
    for qualified, phase in POINTS[module.__name__].items():
        holder, _, attribute = qualified.rpartition(".")
        owner = getattr(module, holder) if holder else module
        name = f"{module.__name__.removeprefix('finetrial.')}.{qualified}"
        setattr(owner, attribute, wrapped(getattr(owner, attribute), name, phase))
    if module.__name__ == "finetrial.tracking":
        module.REPLAY_SECONDS = TRACKER_SECONDS


def let_a_fork_fail(number: int, marker: Path) -> None:
    """Let this process's n-th fork fail, and every other one be."""
    fork, done = os.fork, []

    def counted() -> int:
        done.append(1)
        if len(done) == number:
            marker.touch()
            raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        return fork()

    os.fork = counted


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
if os.environ.get("FINETRIAL_CRASH_FORK"):
    nth, file = os.environ["FINETRIAL_CRASH_FORK"].split(" ", 1)
    let_a_fork_fail(int(nth), Path(file))
