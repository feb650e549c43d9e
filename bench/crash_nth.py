"""Let the n-th write, fsync, replace or spawn of a study fail, for every n; compare as `bench/crash.py` does.

    python bench/crash_nth.py [--jobs 2] [--calls write fsync replace spawn fork] [--numbers N ...] [--output F]

Each n is a study of its own, begun anew in a process forked from this one (which has imported everything): its
n-th call raises, and the same command is run again until it exits 0. n goes up from 1 until a study passes
without reaching it. The calls, counted only for files in the study's folder, in all of the study together:

- write: a write(2) of Python's own file objects (`open`, `Path.open`, and all that is built on them), at the
  moment when the buffer is flushed, half of it written before it fails; a file that safetensors writes; one
  made by `shutil.copyfile`. What other compiled code writes by itself (the tokenizer's JSON) is not seen.
- fsync: `os.fsync`. replace: `os.replace` and `os.rename`, thus those of `Path`, too.
- spawn: a `subprocess.Popen` of the coordinator with the engine `local`; the nursery is one, and a worker
  when there is no nursery. fork: a fork of the nursery, which is how it makes a worker.

An odd n fails with "no space left on device", an even one with "input/output error"; a start with "resource
temporarily unavailable". For write, fsync and replace the engine is `inline`, so that one process does it all.
Matplotlib's drawing, two thirds of such a study's time, is left out: every figure is the same empty SVG.
"""

from __future__ import annotations

import argparse
import builtins
import errno
import importlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from crash_field import SHIM, TRACKER, outcome_of, untidy, write_model

STUDY = """\
study: nth
model: {model}
tasks:
  synthetic_qa: {{rows: 24, validation_rows: 8, test_rows: 8, max_length: 64}}
methods:
  lora: {{search: {{learning_rate: {{low: 1e-3, high: 1e-1}}, rank: 2}}}}
search: {{trials: 1, space: {{epochs: 1, batch_size: 8}}}}
train: {{seeds: 1, evaluations_per_epoch: 1}}
measure: {{drift: {{rows: 8}}}}
track: ['counting_tracker:PLUGIN']
run: {{threads: 1, log_steps: 1, checkpoint: 2 steps, attempts: 50, engine: {engine}}}
"""
CALLS = ("write", "fsync", "replace", "spawn", "fork")
EMPTY = b'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1 1"></svg>'
MOST_COMMANDS = 6
MOST_CALLS = 100_000
REPLAY = "running again replays"


class Counter:
    """Counts one kind of call in one process, and lets the n-th raise."""

    def __init__(self, number: int, home: Path, marker: Path):
        self.number, self.home, self.marker, self.count = number, str(home) + os.sep, marker, 0

    def fails(self, path: Any) -> bool:
        """Whether this call is to fail; a call about a file elsewhere is not counted."""
        return self.about(path) and self.reached()

    def about(self, path: Any) -> bool:
        """Whether a path, or the file of a descriptor, lies in the study's folder."""
        if isinstance(path, int):
            path = Path(f"/proc/self/fd/{path}").readlink()
        return isinstance(path, str | os.PathLike) and str(Path.cwd() / path).startswith(self.home)

    def reached(self) -> bool:
        self.count += 1
        if self.count == self.number:
            self.marker.touch()
        return self.count == self.number

    def error(self, path: Any = None) -> OSError:
        code = errno.ENOSPC if self.number % 2 else errno.EIO
        return OSError(code, os.strerror(code), path and str(path))


def count_writes(counter: Counter) -> None:
    class Raw(io.FileIO):
        """As the system does it: one call writes less than it should, and from there on this file fails."""

        broken = False

        def write(self, data: Any) -> int:
            if self.broken:
                raise counter.error(self.name)
            self.broken = counter.fails(self.name)
            if self.broken and len(data) < 2:
                raise counter.error(self.name)
            return super().write(bytes(data)[: len(data) // 2] if self.broken else data)

    plain = io.open

    def opened(
        file: Any, mode: str = "r", buffering: int = -1, encoding: str | None = None, errors: str | None = None,
        newline: str | None = None, closefd: bool = True, opener: Any = None,
    ) -> Any:  # fmt: skip
        writes = set(mode) & set("wax") and "+" not in mode and buffering != 0
        if not writes or not counter.about(file):
            return plain(file, mode, buffering, encoding, errors, newline, closefd, opener)
        buffered = io.BufferedWriter(Raw(os.fspath(file), mode.replace("b", "").replace("t", "")))
        if "b" in mode:
            return buffered
        return io.TextIOWrapper(buffered, encoding or "utf-8", errors, newline, line_buffering=buffering == 1)

    builtins.open = io.open = opened
    safetensors = importlib.import_module("safetensors.torch")
    safetensors.serialize_file = failing(safetensors.serialize_file, counter, 1, in_rust)
    shutil.copyfile = failing(shutil.copyfile, counter, 1)


def in_rust(error: OSError) -> Exception:
    """The system's error as safetensors raises it."""
    from safetensors import SafetensorError

    text = f"Error while serializing: I/O error: {error.strerror} (os error {error.errno})"
    return SafetensorError(text)


def failing(
    function: Callable[..., Any], counter: Counter, place: int,
    as_raised: Callable[[OSError], Exception] = lambda error: error,
) -> Callable[..., Any]:  # fmt: skip
    """A function that raises at the n-th call; `place` is where the path is among its arguments."""

    def call(*arguments: Any, **options: Any) -> Any:
        path = arguments[place]
        if counter.fails(path):
            raise as_raised(counter.error(path))
        return function(*arguments, **options)

    return call


def count_fsyncs(counter: Counter) -> None:
    os.fsync = failing(os.fsync, counter, 0)


def count_replaces(counter: Counter) -> None:
    os.replace, os.rename = failing(os.replace, counter, 1), failing(os.rename, counter, 1)


def count_spawns(counter: Counter) -> None:
    class Popen(subprocess.Popen):
        def __init__(self, *arguments: Any, **options: Any):
            if counter.reached():
                raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
            super().__init__(*arguments, **options)

    subprocess.Popen = Popen  # type: ignore[misc]


def count_forks(counter: Counter) -> None:
    """The nursery is another process: the shim counts there."""
    os.environ["FINETRIAL_CRASH_FORK"] = f"{counter.number} {counter.marker}"
    os.environ["PYTHONPATH"] = os.pathsep.join([str(SHIM), os.environ.get("PYTHONPATH", "")])


INSTALL = {
    "write": count_writes, "fsync": count_fsyncs, "replace": count_replaces, "spawn": count_spawns,
    "fork": count_forks,
}  # fmt: skip


def command(study: Path, home: Path, install: Callable[[], None]) -> tuple[int, str]:
    """`finetrial run` in a fork of this process; exit code and output."""
    output = home.with_suffix(".output")
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            os.chdir(study.parent)
            install()
            from finetrial.cli import main

            main(["run", str(study), "--home", str(home)])
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        finally:
            sys.excepthook(*sys.exc_info()) if code == 70 else None  # type: ignore[arg-type]
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status), output.read_text(errors="replace")


def attack(folder: Path, call: str, number: int, undisturbed: Any) -> tuple[bool, int, list[str]]:
    """One study whose n-th call fails: whether it was reached, how many commands it took, what is wrong."""
    home, marker = folder / f"{call}-{number}", folder / f"{call}-{number}.reached"
    study = folder / ("local.yaml" if call in ("spawn", "fork") else "inline.yaml")
    commands, wrong = 0, []
    install: Callable[[], None] = lambda: INSTALL[call](Counter(number, home, marker))  # noqa: E731
    while True:
        code, output = command(study, home, install)
        commands, install = commands + 1, lambda: None
        if any(line.startswith("Traceback") for line in output.splitlines()):  # a log's are indented
            wrong.append(f"{call} {number}: a traceback: {output[-1500:]}")
        if code == 0 and REPLAY not in output:
            break
        if commands == MOST_COMMANDS:
            return marker.exists(), commands, [f"{call} {number}: it does not finish: {output[-1500:]}"]
    outcome = outcome_of(home)
    wrong += [f"{call} {number}: {key} differs" for key in outcome if outcome[key] != undisturbed[key]]
    wrong += [f"{call} {number}: {line}" for line in untidy(home)]
    if not wrong:
        shutil.rmtree(home)
    return marker.exists(), commands, wrong


def shard(folder: Path, calls: list[str], numbers: Iterable[int], undisturbed: Any) -> dict[str, Any]:
    """Each n, upwards, until one is not reached, for each kind of call: how many commands each took."""
    found: dict[str, Any] = {"wrong": []}
    for call in calls:
        found[call] = []
        for number in numbers:
            reached, commands, wrong = attack(folder, call, number, undisturbed)
            found["wrong"] += wrong
            if not reached:
                break
            found[call].append(commands)
    return found


def import_everything() -> None:
    """What a coordinator and a worker import; forking needs this process to have one thread afterwards."""
    from finetrial import nursery, pipeline, terminal, worker  # noqa: F401

    worker.import_all()
    for name in ("finetrial.study_file", "finetrial.report_figures", "optuna", "safetensors.torch"):
        importlib.import_module(name)
    figure = importlib.import_module("matplotlib.figure").Figure
    figure.draw_without_rendering = lambda self: None
    figure.savefig = lambda self, target, **options: target.write(EMPTY)
    if nursery._threads() != 1:
        raise SystemExit("this process has several threads; set OPENBLAS_NUM_THREADS=1")


def in_fork(work: Callable[[], Any]) -> int:
    """Do something in a fork of this process; its process id."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            if code:
                sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
            sys.stderr.flush()
            os._exit(code)
    return pid


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--calls", nargs="+", choices=CALLS, default=list(CALLS))
    parser.add_argument("--numbers", nargs="+", type=int, help="these n alone, upwards; every one unless given")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    began = time.monotonic()
    import_everything()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.waitpid(in_fork(lambda: write_model(folder / "model")), 0)  # building it may start threads
        (folder / "counting_tracker.py").write_text(TRACKER)
        for engine in ("inline", "local"):
            text = STUDY.format(model=folder / "model", engine=engine)
            (folder / f"{engine}.yaml").write_text(text)
        code, output = command(folder / "inline.yaml", folder / "undisturbed", lambda: None)
        if code != 0:
            raise SystemExit(f"the undisturbed study failed:\n{output}")
        undisturbed = outcome_of(folder / "undisturbed")

        everyone = given.numbers or range(1, MOST_CALLS)

        def work(part: int) -> None:
            found = shard(folder, given.calls, everyone[part :: given.jobs], undisturbed)
            (folder / f"shard-{part}.json").write_text(json.dumps(found))

        pids = [in_fork(lambda part=part: work(part)) for part in range(given.jobs)]
        ended = [os.waitpid(pid, 0)[1] for pid in pids]
        if any(ended):
            raise SystemExit(f"a part ended early: {ended}")
        parts = [json.loads(path.read_text()) for path in sorted(folder.glob("shard-*.json"))]
    result: dict[str, Any] = {"wrong": [line for part in parts for line in part["wrong"]]}
    for call in given.calls:
        commands = [count for part in parts for count in part[call]]
        again = sum(count > 1 for count in commands)
        result[call] = {"failed": len(commands), "same command": len(commands) - again, "again": again}
    result["seconds"] = round(time.monotonic() - began)
    sys.stdout.write(json.dumps(result, indent=1) + "\n")
    if given.output:
        given.output.write_text(json.dumps(result) + "\n")
    return 1 if result["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
