"""What a waiting person sees: a live table in a terminal, plain lines anywhere else.

Parent side and torch-free; Rich is imported only where a table is drawn. Reads records, decides nothing and
writes no file: the report has the numbers that count. Plain lines carry no times, so equal studies print
equal lines.

    with make_progress(console, interactive=console.is_terminal) as progress:
        progress.phase("search", totals, metrics=metrics, done=already_finished)
        progress.started(spec); progress.tick(spec, last_record); progress.finished(record)
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

from finetrial.evidence import best_trial
from finetrial.frozen import Setting
from finetrial.plugins import Metric
from finetrial.records import RunRecord, RunSpec

if TYPE_CHECKING:
    from rich.console import Console
    from rich.live import Live
    from rich.table import Table
    from rich.text import Text

REFRESH_SECONDS = 0.2  # ticks come oftener than a terminal needs to be drawn
REASON_CHARACTERS = 100
SCORE = Metric(name="score", higher_is_better=True, worst=-math.inf, best=math.inf)
STOPPING = ("bug", "refused")  # outcomes that end the study at once


@dataclass
class Running:
    """A run under way: where it is, and how fast it goes."""

    label: str
    step: int | None = None
    planned_steps: int | None = None
    steps_per_second: float | None = None
    last: tuple[int, float] | None = None  # (step, seconds) of the last record that had both


@dataclass
class Arm:
    """What one arm did in this phase."""

    total: int
    metric: Metric | None = None
    ended: int = 0
    diverged: int = 0
    failed: int = 0
    scores: list[float] = field(default_factory=list)  # of replicates
    best: RunRecord | None = None  # of a search
    seconds: list[float] = field(default_factory=list)  # of ended runs, over all their attempts
    running: dict[str, Running] = field(default_factory=dict)  # run id -> state

    def add(self, record: RunRecord) -> None:
        """Count one ended run."""
        self.ended += 1
        self.seconds.append(run_seconds(record))
        score = record.result.score if record.result else None
        if record.outcome == "diverged":
            self.diverged += 1
        elif record.outcome != "done":
            self.failed += 1
        elif score is not None and math.isfinite(score):
            if record.spec.stage != "trial":
                self.scores.append(score)
            else:
                self.best = best_trial([record, *([self.best] if self.best else [])], self.metric or SCORE)


class Progress:
    """Keeps count; the two ways to show it are below. Calls come from one thread."""

    def __init__(self) -> None:
        self.name = ""
        self.arms: dict[str, Arm] = {}

    def phase(
        self,
        name: str,
        totals: Mapping[str, int],
        *,
        metrics: Mapping[str, Metric] | None = None,
        done: Sequence[RunRecord] = (),
    ) -> None:
        """A phase begins.

        Args:
            name: what to call it: search, train, measure.
            totals: arm -> number of planned runs, in the order to show them.
            metrics: arm -> what its score is called, which way is better and how large it gets; an arm
                without one shows `score`, higher is better.
            done: runs that ended earlier (a resumed study): counted, not announced.
        """
        self._leave()
        self.name = name
        self.arms = {arm: Arm(total, (metrics or {}).get(arm)) for arm, total in totals.items()}
        for record in done:
            self._arm(record.spec).add(record)
        self._show_phase(len(done))

    def started(self, spec: RunSpec) -> None:
        """A run's process was started, for the first time or again."""
        self._arm(spec).running[spec.run_id] = Running(run_label(spec))
        self._show_change()

    def tick(self, spec: RunSpec, last_record: Mapping[str, Any] | None) -> None:
        """A run is still running; `last_record` is the last line of its metrics.jsonl, if it has one."""
        running = self._arm(spec).running.setdefault(spec.run_id, Running(run_label(spec)))
        if last_record:
            _advance(running, last_record)
        self._show_tick()

    def finished(self, record: RunRecord) -> None:
        """A run ended, for good or (outcome None or cancelled) for now."""
        arm = self._arm(record.spec)
        arm.running.pop(record.spec.run_id, None)
        if record.outcome in (None, "cancelled"):
            self._show_change()
            return
        arm.add(record)
        self._show_finished(record, arm)

    def note(self, text: str) -> None:
        """One line from the scheduler: a retry, a warning. Shown by the two below; here nothing is."""

    def close(self) -> None:
        """Leave the terminal as it was; harmless when called again."""
        self._leave()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _arm(self, spec: RunSpec) -> Arm:
        return self.arms.setdefault(spec.arm, Arm(total=0))

    def _show_phase(self, already: int) -> None: ...
    def _show_change(self) -> None: ...
    def _show_tick(self) -> None: ...
    def _show_finished(self, record: RunRecord, arm: Arm) -> None: ...
    def _leave(self) -> None: ...


class _OnConsole(Progress):
    """Prints its notes."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self.console = console

    def note(self, text: str) -> None:
        # No markup (a path may hold brackets), no highlighting, no wrapping: what is logged is what is said.
        self.console.print(text, markup=False, highlight=False, emoji=False, soft_wrap=True)


class PlainProgress(_OnConsole):
    """One line for each phase, each ended run and each note; for logs and pipes."""

    def _show_phase(self, already: int) -> None:
        runs = sum(arm.total for arm in self.arms.values())
        before = f", {already} ended before" if already else ""
        self.note(f"{self.name}  {_count(len(self.arms), 'arm')}, {_count(runs, 'run')}{before}")

    def _show_finished(self, record: RunRecord, arm: Arm) -> None:
        self.note(f"{self.name}  {record.spec.arm}  {arm.ended}/{arm.total}  {ended_text(record, arm)}")


class LiveProgress(_OnConsole):
    """A table that is redrawn in place: one line an arm, and what is left of the phase."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self._live: Live | None = None
        self._drawn_at = -math.inf

    def _show_phase(self, already: int) -> None:
        from rich.live import Live

        # Drawn by us and not by Rich's thread, which would read the counts while they change.
        self._live = Live(console=self.console, auto_refresh=False, get_renderable=self.table)
        self._live.start(refresh=True)

    def _show_change(self) -> None:
        if self._live:
            self._live.refresh()
            self._drawn_at = time.monotonic()

    def _show_tick(self) -> None:
        if time.monotonic() - self._drawn_at >= REFRESH_SECONDS:
            self._show_change()

    def _show_finished(self, record: RunRecord, arm: Arm) -> None:
        if record.outcome not in ("done", "diverged"):  # a failure stays to be read; the table moves on
            label, text = record.spec.arm, ended_text(record, arm)
            self.note(f"{self.name}  {label}  {text}")
        self._show_change()

    def _leave(self) -> None:
        live, self._live = self._live, None
        if live:
            with contextlib.suppress(OSError, UnicodeError):  # there may be no terminal any more
                live.refresh()
            with contextlib.suppress(OSError, UnicodeError):
                live.stop()  # the last state of the table stays in the scroll-back

    def table(self) -> Table:
        """The phase as it is now."""
        from rich.table import Table
        from rich.text import Text

        left = seconds_left(self.arms.values())
        ended = all(arm.ended >= arm.total for arm in self.arms.values())
        title = self.name + (f"   {duration_text(left)} left" if left is not None and not ended else "")
        table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
        # A narrow terminal cuts the long columns: Rich takes width from those that may wrap. Their cells
        # do not wrap all the same, so an arm stays one line.
        for column in ("arm", "runs", "score so far", "ended badly", "now"):
            header = Text(column, style="dim", no_wrap=True, overflow="ellipsis")
            table.add_column(header, no_wrap=column not in ("score so far", "now"))
        for name, arm in self.arms.items():
            score, now = (
                Text(cell, no_wrap=True, overflow="ellipsis") for cell in (score_text(arm), self._now(arm))
            )
            table.add_row(Text(name), f"{arm.ended}/{arm.total}", score, _bad(arm), now)
        return table

    def _now(self, arm: Arm) -> str:
        if not arm.running:
            return "finished" if arm.ended >= arm.total else "waiting"
        run = next(iter(arm.running.values()))
        parts = [run.label]
        if run.step is not None:
            parts.append(f"step {run.step}" + (f"/{run.planned_steps}" if run.planned_steps else ""))
        if run.steps_per_second:
            parts.append(f"{run.steps_per_second:.2g} steps/s")
        if len(arm.running) > 1:
            parts.append(f"and {len(arm.running) - 1} more")
        return ", ".join(parts)


def make_progress(console: Console, interactive: bool) -> Progress:
    """The table in a terminal, the lines elsewhere."""
    return LiveProgress(console) if interactive else PlainProgress(console)


# -- words and numbers -----------------------------------------------------------------------------------------


def run_label(spec: RunSpec) -> str:
    """`trial_8`, `replicate_0`, `probe_0`, `baseline` (the frozen body's, too), `rehearsal`."""
    if spec.stage == "check":
        return "rehearsal"
    if spec.stage == "baseline":
        return spec.stage
    part = f" to 1/{spec.rung.ends[-1]}" if spec.may_go_on and spec.rung else ""
    return f"{spec.stage}_{spec.number}{part}"


def ended_text(record: RunRecord, arm: Arm) -> str:
    """How a run ended, and the arm's best or mean so far."""
    label, result = run_label(record.spec), record.result
    summary = score_text(arm)
    so_far = f" ({summary})" if summary else ""
    if record.outcome == "done" and result:
        if result.score is None:
            return f"{label} done"
        return f"validation {_metric_name(arm)} {_number(result.score, arm.metric)}{so_far}"
    reason = (result.reason if result else record.failure.reason if record.failure else "") or ""
    first = reason.strip().splitlines()[0] if reason.strip() else ""
    if record.outcome in STOPPING:
        first = ""  # the study stops at it, and says in full why
    if len(first) > REASON_CHARACTERS:
        first = first[: REASON_CHARACTERS - 3] + "..."
    return f"{label} {str(record.outcome).replace('_', ' ')}{': ' if first else ''}{first}{so_far}"


def score_text(arm: Arm) -> str:
    """A search's best with its trial and learning rate; otherwise the mean, since no seed is chosen."""
    result = arm.best.result if arm.best is not None else None
    if arm.best is None or result is None or result.score is None:
        return f"mean {_number(math.fsum(arm.scores) / len(arm.scores), arm.metric)}" if arm.scores else ""
    spec = arm.best.spec
    rate = spec.settings.get("learning_rate")
    detail = "" if rate is None else f": learning rate {_rate(rate)}"
    best = f"best {_number(result.score, arm.metric)}"
    if spec.may_go_on and result.validation_loss is not None:  # halving goes by that until the last end
        best = f"lowest loss {result.validation_loss:.3g}"
    return f"{best}, {run_label(spec)}{detail}"


def run_seconds(record: RunRecord) -> float:
    """Wall-clock seconds over all attempts at a run."""
    known = [a.ended_at - a.started_at for a in record.attempts if a.ended_at is not None]
    if known:
        return math.fsum(known)
    return record.result.cost.wall_seconds if record.result else 0.0


def seconds_left(arms: Iterable[Arm]) -> float | None:
    """The phase's rest, in seconds, or None before a run ended.

    An arm's runs are taken to last as long as its ended ones (before there are any: as all ended ones), and
    as many to run side by side as do now.
    """
    arms = list(arms)
    everything = [seconds for arm in arms for seconds in arm.seconds]
    if not everything:
        return None
    work = 0.0
    for arm in arms:
        each = math.fsum(arm.seconds or everything) / len(arm.seconds or everything)
        under_way = math.fsum(
            run.step / run.planned_steps for run in arm.running.values() if run.step and run.planned_steps
        )
        work += each * max(0.0, arm.total - arm.ended - under_way)
    return work / max(1, sum(len(arm.running) for arm in arms))


def duration_text(seconds: float) -> str:
    """`40 s`, `12 min`, `1 h 05 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _advance(running: Running, record: Mapping[str, Any]) -> None:
    step, seconds = record.get("step"), record.get("seconds")
    if not isinstance(step, int):
        return
    running.step = step
    planned = record.get("planned_steps")
    running.planned_steps = planned if isinstance(planned, int) else running.planned_steps
    if not isinstance(seconds, int | float):
        return
    # Between two records where there are two: after a resume `seconds` need not have begun at step 0.
    before = running.last
    if before is None or step < before[0] or seconds < before[1]:
        running.steps_per_second = step / seconds if seconds > 0 else None
        running.last = (step, seconds)
    elif step > before[0] and seconds > before[1]:
        running.steps_per_second = (step - before[0]) / (seconds - before[1])
        running.last = (step, seconds)


def _metric_name(arm: Arm) -> str:
    return arm.metric.name.replace("_", " ") if arm.metric else "score"


def _number(score: float, metric: Metric | None) -> str:
    """One decimal on a scale of 0 to 100, three on one of 0 to 1."""
    if metric is None or not math.isfinite(metric.best - metric.worst):
        return f"{score:.4g}"
    return f"{score:.1f}" if abs(metric.best - metric.worst) > 10 else f"{score:.3f}"


def _rate(value: Setting) -> str:
    return f"{value:.1e}" if isinstance(value, float) else str(value)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _bad(arm: Arm) -> Text:
    from rich.text import Text

    text = Text()
    if arm.diverged:
        text.append(f"{arm.diverged} diverged", style="yellow")
    if arm.failed:
        text.append((", " if arm.diverged else "") + f"{arm.failed} failed", style="red")
    return text
