"""Mirroring finished runs into trackers. `metrics.jsonl` is the record; a tracker can lose and fail nothing.

The parent replays a run after it has ended, once per tracker and ending (a marker file says so). A tracker
that raises, or that has not come back after its share of REPLAY_SECONDS, becomes one warning and is left out
until the study is run again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from finetrial import files, plugins
from finetrial.lease import STALE_SECONDS
from finetrial.records import RunRecord
from finetrial.store import Home

# Of all trackers: meanwhile no lease is renewed, and each must still be live afterwards.
REPLAY_SECONDS = 0.75 * STALE_SECONDS


class Mirror:
    """Replays runs into the study's trackers; a tracker that fails is left alone for the rest of this call."""

    def __init__(self, home: Home, trackers: Sequence[str], warn: Callable[[str], None]):
        self.home = home
        self.trackers = list(trackers)
        self.seconds = REPLAY_SECONDS / max(1, len(trackers))  # of each, though others have been left out
        self.warn = warn

    def __call__(self, record: RunRecord) -> None:
        for name in list(self.trackers):
            folder = self.home.tracking / name.replace(":", ".")
            marker = folder / "replayed" / record.spec.run_id
            # A run that failed and was tried again ends a second time, and that end is the one to show.
            state = f"{record.outcome} after {len(record.attempts)} attempts\n"
            if marker.exists() and marker.read_bytes() == state.encode():
                continue
            error = self._replay(name, record, folder, marker, state)
            if isinstance(error, Exception | SystemExit):  # foreign code must never fail a run
                self.trackers.remove(name)
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                self.warn(
                    f"the tracker {name} failed and is left out from here on: {reason}. No run is affected; "
                    f"the records are in each run's metrics.jsonl, and running again replays them"
                )
            elif error is not None:
                raise error

    def _replay(
        self, name: str, record: RunRecord, folder: Path, marker: Path, state: str
    ) -> BaseException | None:
        """Replay one run into one tracker and mark it; what was raised, a TimeoutError too, or None.

        It happens in a thread, which is left to itself when it takes too long, and ends with this process.
        """
        raised: list[BaseException] = []

        def replay() -> None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                records = files.json_lines(self.home.run(record.spec.run_id).metrics_file, self._damaged)
                plugins.load("trackers", name).replay(folder, record.spec, records, record.result)
                files.write_text(marker, state)
            except BaseException as error:  # noqa: BLE001 - nothing is swallowed: the caller gets it
                raised.append(error)

        thread = threading.Thread(target=replay, name=f"tracker {name}", daemon=True)
        thread.start()
        thread.join(self.seconds)
        if thread.is_alive():
            return TimeoutError(f"it has not come back after {self.seconds:g} s")
        return raised[0] if raised else None

    def _damaged(self, path: Path, line: int) -> None:
        self.warn(f"{path} line {line} is damaged and left out of what is tracked")
