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
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(lines)


class _Both(Progress):
    """Passes everything on to what is shown and to the log."""

    def __init__(self, shown: Progress, log: Progress):
        super().__init__()
        self.each = (log, shown)

    def phase(
        self,
        name: str,
        totals: Mapping[str, int],
        *,
        metrics: Mapping[str, Metric] | None = None,
        done: Sequence[RunRecord] = (),
    ) -> None:
        for one in self.each:
            one.phase(name, totals, metrics=metrics, done=done)

    def started(self, spec: RunSpec) -> None:
        for one in self.each:
            one.started(spec)

    def tick(self, spec: RunSpec, last_record: Mapping[str, Any] | None) -> None:
        for one in self.each:
            one.tick(spec, last_record)

    def finished(self, record: RunRecord) -> None:
        for one in self.each:
            one.finished(record)

    def note(self, text: str) -> None:
        for one in self.each:
            one.note(hide(text))


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
