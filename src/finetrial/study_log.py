"""The study's own log, `HOME/log.txt`: the lines that a waiting person is shown, with their times.

Every command that works there appends to it. Nothing reads it back: the records are the runs' own files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from finetrial.errors import FinetrialError
from finetrial.plugins import Metric
from finetrial.progress import PlainProgress, Progress
from finetrial.records import RunRecord, RunSpec
from finetrial.secrets_guard import hide


class _Lines(PlainProgress):
    """Plain lines, each with the time, at the end of a file."""

    def __init__(self, path: Path):
        Progress.__init__(self)  # there is no console
        self.path = path

    def note(self, text: str) -> None:
        now = datetime.now(UTC).isoformat(timespec="seconds")
        lines = "".join(f"{now}  {line}\n" for line in hide(text).splitlines())
        with self.path.open("a", encoding="utf-8", errors="backslashreplace") as stream:
            stream.write(lines)


class _Both(Progress):
    """Passes everything on to the log and to what is shown; where that fails, nothing more is shown."""

    def __init__(self, shown: Progress, log: Progress):
        super().__init__()
        self.shown, self.log = shown, log

    def _pass_on(self, what: str, *arguments: Any, **named: Any) -> None:
        getattr(self.log, what)(*arguments, **named)
        try:
            getattr(self.shown, what)(*arguments, **named)
        except (OSError, UnicodeError):  # nobody reads it any more, or it cannot be written there
            self.shown = Progress()

    def phase(
        self,
        name: str,
        totals: Mapping[str, int],
        *,
        metrics: Mapping[str, Metric] | None = None,
        done: Sequence[RunRecord] = (),
    ) -> None:
        self._pass_on("phase", name, totals, metrics=metrics, done=done)

    def started(self, spec: RunSpec) -> None:
        self._pass_on("started", spec)

    def tick(self, spec: RunSpec, last_record: Mapping[str, Any] | None) -> None:
        self._pass_on("tick", spec, last_record)

    def finished(self, record: RunRecord) -> None:
        self._pass_on("finished", record)

    def note(self, text: str) -> None:
        self._pass_on("note", hide(text))


@contextmanager
def study_log(path: Path, shown: Progress, what: str) -> Iterator[Progress]:
    """A progress that is shown as before and logged, with a line for the beginning and one for the end.

    The folder has to be there. `what` is the command, for the first line.
    """
    log = _Lines(path)
    log.note(f"{what} begins")
    try:
        yield _Both(shown, log)
    except FinetrialError as error:
        log.note(f"{what} stopped: {error}")
        raise
    except KeyboardInterrupt:
        log.note(f"{what} was interrupted")
        raise
    log.note(f"{what} ends")
