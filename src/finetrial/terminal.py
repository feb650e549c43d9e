"""What a person sees in the terminal: tables in, text out. Decides and computes nothing."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from finetrial import files, lease
from finetrial.errors import EXIT_DONE, EXIT_INCOMPLETE, EXIT_RUNS_FAILED
from finetrial.plan import baseline_arms, overview, warnings
from finetrial.records import NEXT_STEP, RunRecord
from finetrial.store import Home, RunFolder
from finetrial.study import Study

if TYPE_CHECKING:
    from finetrial.check_report import Checked
    from finetrial.compare import Compared
    from finetrial.progress import Progress
    from finetrial.summary import Summary
    from finetrial.verify import Verified


class _Console(Console):
    """Leaves it to others what an output that nobody reads means; Rich ends the process."""

    def on_broken_pipe(self) -> None:
        raise


# A pipe or a log file has no width of its own; eighty columns would break words in every table.
# No markup and no emoji codes: paths, reasons and settings may hold brackets and colons.
console = _Console(highlight=False, markup=False, emoji=False)
if not console.is_terminal:
    console = _Console(highlight=False, markup=False, emoji=False, width=160)


MOST_DIFFERENCES = 20  # listed by `report --verify`; the rest is counted
LAST_RECORDS = 8  # of a run's training, in `show`


def progress(*, quiet: bool = False) -> Progress:
    """A live table in a terminal, plain lines elsewhere, nothing where only JSON is to be printed."""
    from finetrial.progress import Progress, make_progress

    return Progress() if quiet else make_progress(console, console.is_terminal)


def show_title(study: Study, home: Path) -> None:
    arms = len(study.arms)
    planned = {"arm": arms, "trial": arms * study.search.trials, "replicate": arms * study.train.seeds}
    runs = "   ".join(f"{number} {noun}{'s' * (number != 1)}" for noun, number in planned.items())
    console.print(
        Text(study.study, style="bold"),
        f"  {study.model.name}   {runs}   {home}",
        soft_wrap=True,
    )


def show_plan(study: Study, *, as_json: bool = False) -> None:
    """The runs of every arm, and the search space they share or do not."""
    arms = overview(study)
    if as_json:
        spaces = {
            method: {name: space[name].model_dump(mode="json") for name in space}
            for method, space in study.spaces.items()
        }
        rows = {"rows_per_trial": study.search.rows, "rows_per_replicate": study.train.rows}
        rows |= {"notes": warnings(study)}
        print_json({"study": study.study, "arms": [arm._asdict() for arm in arms], **rows, "spaces": spaces})
        return
    table = _table(
        "arm", "trial runs", "replicates", "probes", "rows per trial", "rows per replicate", "searched"
    )
    for arm in arms:
        space = study.spaces[arm.method]
        searched = ", ".join(name for name in space if space[name].kind != "fixed")
        table.add_row(
            f"{arm.task}/{arm.method}", " + ".join(map(str, study.search.counts)), str(arm.replicates),
            str(arm.probes),
            str(study.search.rows or "all"), str(study.train.rows or "all"), searched,
        )  # fmt: skip
    console.print(table)
    runs = sum(arm.trials + arm.replicates + arm.probes for arm in arms)
    extra = len(study.tasks) * (3 if study.measure else 2)
    controls = "baselines and controls" if study.measure else "baselines"
    console.print(f"{runs} runs of arms, {extra} {controls}")
    for warning in warnings(study):
        console.print(f"note: {warning}", soft_wrap=True)


def show_check(checked: Checked, *, as_json: bool = False) -> None:
    """Whether the study fits and learns, and how long it takes."""
    from finetrial import check_report

    if as_json:
        print_json(checked.model_dump(mode="json"))
        return
    for rows in (check_report.arm_rows(checked), check_report.study_rows(checked)):
        _show_rows(rows)
    for note in checked.notes:
        console.print(f"note: {note}", soft_wrap=True)
    for fault in checked.faults:
        console.print(f"cannot run as it is: {fault}", soft_wrap=True)
    console.print(f"check  {Path(checked.home) / 'check.md'}", soft_wrap=True)


def show_verdicts(summary: Summary, home: Path) -> None:
    """The verdict table, the cost table, and where the report is."""
    from finetrial import report

    if summary.claims:
        table = _table("task", "verdict on", "difference (95 % interval)", "seeds", "verdict")
        for row in report.verdict_rows(summary):
            table.add_row(*row)
        console.print(table)
    costs = report.cost_rows(summary)
    if costs:
        _show_rows(costs)
    for note in summary.fairness_notes:
        console.print(f"note: {note}", soft_wrap=True)
    for failure in summary.failures:
        console.print(f"{failure.kind}: {failure.run_id}: {failure.reason}", soft_wrap=True)
    for kind in sorted({failure.kind for failure in summary.failures} & NEXT_STEP.keys()):
        console.print(f"{kind.replace('_', ' ')}: {NEXT_STEP[kind]}", soft_wrap=True)
    console.print(f"report  {home / 'report' / 'index.html'}", soft_wrap=True)


def show_verified(verified: Verified, home: Path) -> None:
    """One line if the report follows from its runs; else every place that does not, and what next."""
    looked_at = f"{verified.runs:,} runs, {verified.numbers:,} numbers, {verified.files:,} files"
    if not verified.differences:
        unfinished = "" if verified.complete else "; the study is incomplete, and its report says so"
        console.print(
            f"{home}: the report follows from its runs: {looked_at} verified{unfinished}", soft_wrap=True
        )
        return
    count = len(verified.differences)
    counted = f"{count:,} difference{'s' if count > 1 else ''}"
    console.print(f"{home}: {counted} between the report and its runs ({looked_at} compared)", soft_wrap=True)
    for found in verified.differences[:MOST_DIFFERENCES]:
        place = f"{found.file}: {found.where}" if found.where else found.file
        console.print(f"  {place}: stored {found.stored}, derived {found.derived}", soft_wrap=True)
    if count > MOST_DIFFERENCES:
        console.print(f"  and {count - MOST_DIFFERENCES:,} more")
    for hint in verified.hints:
        console.print(f"note: {hint}", soft_wrap=True)


def show_compared(compared: Compared, *, as_json: bool = False) -> None:
    """What sets studies apart, then their arms and verdicts, then how to read it."""
    from finetrial import compare

    if as_json:
        print_json(compared.model_dump(mode="json"))
        return
    for rows in (compare.difference_rows(compared), compare.arm_rows(compared), compare.claim_rows(compared)):
        _show_rows(rows)
    for note in compared.notes:
        console.print(f"note: {note}", soft_wrap=True)


def exit_code(summary: Summary) -> int:
    """0 done, 3 some runs failed or an arm has no valid replicate for good, 4 incomplete."""
    failed = [row for row in summary.failures if row.kind not in ("diverged", "cancelled")]
    unscored = [arm for arm in summary.arms if arm.search.best is None or arm.failed >= arm.planned]
    if not summary.complete:
        return EXIT_RUNS_FAILED if failed else EXIT_INCOMPLETE
    return EXIT_RUNS_FAILED if failed or unscored else EXIT_DONE


def show_status(home_path: Path, study: Study, records: Sequence[RunRecord], *, as_json: bool) -> None:
    """How many of the study's runs have ended how, by stage and arm."""
    home = Home(home_path)
    tasks = [task.name for task in study.tasks]
    planned = {("baseline", arm): 1 for arm in baseline_arms(study)}
    for stage in ("trials", "replicates", "probes"):
        arms = {(stage.removesuffix("s"), f"{arm.task}/{arm.method}"): arm for arm in overview(study)}
        planned |= {key: getattr(arms[key], stage) for key in arms}
    if study.measure:
        planned |= {("probe", task): 1 for task in tasks}  # the control: the base against itself
    counts: dict[tuple[str, str], dict[str, int]] = {key: {} for key in planned}
    for record in records:
        held = lease.read(home.run(record.spec.run_id).lease_file)
        outcome = record.outcome or ("unfinished" if held is None or lease.seems_stale(held) else "running")
        key = (record.spec.stage, record.spec.arm)
        counts[key][outcome] = counts[key].get(outcome, 0) + 1
    rows = [
        {"stage": stage, "arm": arm, "planned": planned[stage, arm], "runs": ended}
        for (stage, arm), ended in counts.items()
    ]
    if as_json:
        print_json({"study": study.study, "home": str(home_path), "stages": rows})
        return
    table = _table("stage", "arm", "done", "planned", "other")
    for row in rows:
        other = ", ".join(f"{count} {name}" for name, count in sorted(row["runs"].items()) if name != "done")
        most = "up to " * (row["stage"] == "trial" and len(study.search.counts) > 1)  # halving ends some
        done, planned = row["runs"].get("done", 0), f"{most}{row['planned']}"
        table.add_row(row["stage"], row["arm"], str(done), planned, other)
    console.print(table)
    page = home_path / "report" / "index.html"
    if page.exists():
        console.print(f"report  {page}", soft_wrap=True)


def show_run(path: Path, *, as_json: bool) -> None:
    """One run in full."""
    folder = RunFolder(path)
    record = folder.record()
    if as_json:
        print_json(_run_json(record))
        return
    table = _table("", record.spec.run_id)
    table.add_row("outcome", record.outcome or "unfinished")
    reason = record.failure.reason if record.failure else record.result.reason if record.result else None
    if reason:
        table.add_row("reason", reason)
    if record.outcome in NEXT_STEP:
        table.add_row("next", NEXT_STEP[record.outcome])
    for name, value in record.spec.settings.items():
        used = record.result.settings_used.get(name) if record.result else None
        table.add_row(name, f"{value}" if used in (None, value) else f"{value} (used {used:.6g})")
    if record.result:
        for name in sorted(record.result.settings_used.keys() - record.spec.settings.keys()):
            table.add_row(name, f"{record.result.settings_used[name]} (follows)")
        for split, scores in record.result.scores.items():
            table.add_row(split, ", ".join(f"{name} {value:.2f}" for name, value in scores.items()))
        for name, found in record.result.measures.items():
            numbers = [(key, value) for key, value in found.items() if type(value) in (int, float)]
            shown = (f"{key} {value if isinstance(value, int) else f'{value:.4g}'}" for key, value in numbers)
            if numbers:
                table.add_row(name, ", ".join(shown))
        if record.result.proof:
            for group, proof in record.result.proof.groups.items():
                relative = f", {proof.relative_change:.2%}" if proof.relative_change is not None else ""
                table.add_row(f"moved: {group}", f"{proof.moved} of {proof.tensors} tensors{relative}")
        training = record.result.training
        if training and training.lost_to_rounding is not None:
            table.add_row("lost to rounding", f"{training.lost_to_rounding:.2%} of the updates watched")
        cost = record.result.cost
        table.add_row("cost", f"{cost.wall_seconds:.1f} s, peak {cost.peak_memory_bytes / 1e9:.2f} GB")
    for attempt in record.attempts:
        ended = f"{attempt.outcome or 'not ended'}{': ' + attempt.reason if attempt.reason else ''}"
        table.add_row(f"attempt {attempt.number}", f"{attempt.host}, process {attempt.pid}: {ended}")
    table.add_row("folder", str(path))
    console.print(table)
    _show_losses(folder)
    if record.failure and record.failure.log_tail:
        console.print(record.failure.log_tail, markup=False, soft_wrap=True)


def _show_losses(folder: RunFolder) -> None:
    """The last training records: what the loss and the gradient did before the end."""

    def damaged(path: Path, line: int) -> None:
        console.print(f"{path} line {line} is damaged and left out", soft_wrap=True)

    found = files.json_lines(folder.metrics_file, damaged)
    records = [r for r in found if r.get("kind") in ("train", "diverged")]
    if not records:
        return
    table = _table("step", "loss", "gradient norm", "weights' growth", "learning rate")
    for record in records[-LAST_RECORDS:]:
        rate = f"{record['learning_rate']:.3g}"
        if record["kind"] == "diverged":
            table.add_row(str(record["step"]), record["reason"], "", "", rate)
        else:
            numbers = (record.get(name, math.nan) for name in ("loss", "gradient_norm", "weight_growth"))
            table.add_row(str(record["step"]), *(f"{number:.4g}" for number in numbers), rate)
    console.print(table)
    if len(records) > LAST_RECORDS:
        console.print(
            f"the last {LAST_RECORDS} of {len(records)} records; all: {folder.metrics_file}", soft_wrap=True
        )


def _run_json(record: RunRecord) -> dict[str, Any]:
    return {
        "spec": record.spec.model_dump(mode="json"),
        "outcome": record.outcome,
        "result": record.result.model_dump(mode="json") if record.result else None,
        "failure": record.failure.model_dump(mode="json") if record.failure else None,
        "attempts": [attempt.model_dump(mode="json") for attempt in record.attempts],
    }


def print_json(value: Any) -> None:
    """JSON for programs: no colours, no wrapping."""
    click.echo(json.dumps(value, indent=1, ensure_ascii=False))


def _show_rows(rows: Sequence[Sequence[str]]) -> None:
    """A table whose titles come first; nothing where there is no row below them."""
    table = _table(*rows[0])
    for row in rows[1:]:
        table.add_row(*row)
    if table.row_count:
        console.print(table)


def _table(*titles: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 3, 0, 0))
    for title in titles:
        table.add_column(title, overflow="fold")
    return table
