"""How many runs go side by side: a fixed number, or as many as cores and memory allow. Parent side.

Where a machine has several GPUs every process sees one of them, that with the fewest processes.

With `parallel: auto` a run starts as soon as a core is free and what it takes fits beside what the others take.
A run says what it takes before its model is loaded (`fit.json`); until the first of an arm has said so, nothing
else is started. One that turns out to take too much is put off, and if memory runs out all the same,
fewer go side by side from then on. Which runs are side by side changes no result.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetrial.plugins import load
from finetrial.records import RunSpec
from finetrial.store import RunFolder

# A run's peak, once measured, foretells the next one's of its kind, give or take.
SPREAD = 1.1
# Of a process on a GPU, what its context and libraries take besides what it allocates.
CONTEXT_BYTES = 600_000_000


@dataclass
class Packing:
    """`most`: processes at a time. `by_memory`: fewer where memory does not suffice for as many.

    `stack`: runs of one process, where a method's trainings can be stacked. `gpus`: their names, if there are
    several; `each`: processes at a time on one of them.
    """

    most: int
    by_memory: bool = False
    stack: int = 1
    known: dict[str, int] = field(default_factory=dict)  # kind of run -> bytes that the largest so far takes
    said: dict[Path, tuple[Any, int]] = field(default_factory=dict)  # folder -> by which files, bytes it takes
    room: dict[str | None, int] = field(default_factory=dict)  # GPU -> bytes for all on it, once a run said so
    gpus: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.each = self.most if self.by_memory or not self.gpus else -(-self.most // len(self.gpus))

    def place(self, specs: Sequence[RunSpec], running: Sequence[RunFolder]) -> dict[str, Any] | None:
        """How a process of these runs may begin beside those, each told by its first run's folder.

        What changes of `How`, such as the GPU; None: it may not, now.
        """
        if running and len(running) >= self.most:
            return None
        by_gpu = self._by_gpu(running)
        # The first among equals.
        for gpu in sorted(self.gpus or (None,), key=lambda gpu: len(by_gpu.get(gpu, ()))):
            if self._may_start(specs, by_gpu.get(gpu, []), gpu):
                alone = {} if self.by_memory or gpu is None else {"parallel": self.each}
                return {"gpu": gpu, **alone}
        return None

    def _may_start(self, specs: Sequence[RunSpec], beside: Sequence[RunFolder], gpu: str | None) -> bool:
        if not beside:
            return True
        if gpu is not None and len(beside) >= self.each:
            return False
        if not self.by_memory:
            return True
        taken = [self.taken(folder) for folder in beside]
        need = self.known.get(kind_of(specs[0]))
        # Of a GPU that is not known yet as of the others.
        room = self.room.get(gpu, min(self.room.values(), default=None))
        if need is None or room is None:  # one that trains will say it soon; but only one at a time
            trains = specs[0].method is not None and specs[0].stage in ("trial", "replicate")
            return (
                trains
                and None not in taken
                and (room is not None or all(folder.path in self.said for folder in beside))
            )
        return None not in taken and sum(filter(None, taken)) + need <= room

    def too_many(self, running: Sequence[RunFolder]) -> RunFolder | None:
        """The newest of these processes where, by what they say, those of a GPU take more than there is."""
        if not self.by_memory:
            return None
        for gpu, here in self._by_gpu(running).items():
            taken = [size for folder in here if (size := self.taken(folder)) is not None]
            if len(here) > 1 and gpu in self.room and sum(taken) > self.room[gpu]:
                return here[-1]
        return None

    def _by_gpu(self, running: Sequence[RunFolder]) -> dict[str | None, list[RunFolder]]:
        found: dict[str | None, list[RunFolder]] = {}
        for folder in running:
            found.setdefault(self._gpu(folder), []).append(folder)
        return found

    def _gpu(self, folder: RunFolder) -> str | None:
        """What a run is on; its spec may be of a time when there were more GPUs."""
        return folder.spec().how.gpu if self.gpus else None

    def taken(self, folder: RunFolder) -> int | None:
        """Bytes that a process takes: foretold by itself, or as others of its kind; None: not known yet."""
        files = [one.fit_file for one in self._stack(folder)]
        written = [(each.stat().st_ino, each.stat().st_mtime_ns) for each in files if each.exists()]
        known = self.said.get(folder.path)
        if known is not None and known[0] == written:
            return known[1]
        # Until an attempt that goes on has said it, what the one before it said, maybe on another machine.
        kind, said = kind_of(folder.spec()), self._foretold(folder)
        if said is None:
            return self.known.get(kind)
        self.said[folder.path] = written, said
        self.known[kind] = max(self.known.get(kind, 0), said)
        return said

    def ended(self, folder: RunFolder) -> None:
        """Learn from a run that has ended here what its kind takes, and how much there is."""
        self.said.pop(folder.path, None)
        if self.by_memory and folder.result() is not None:
            self._foretold(folder)
        self.learn(folder)

    def learn(self, folder: RunFolder) -> None:
        """Learn from a run that has ended, here or on another machine, what its kind takes."""
        result = folder.result() if self.by_memory else None
        if result is not None:
            fit, hosts = folder.fit(), [attempt.host for attempt in folder.attempt_records()]
            if fit is not None and fit.shared is not None and hosts[-1:] == [socket.gethostname()]:
                self.room.setdefault(self._gpu(folder), fit.shared)  # until another says it anew
            context = 0 if result.cost.device.startswith("cpu") else CONTEXT_BYTES
            kind, peak = kind_of(folder.spec()), int(SPREAD * result.cost.peak_memory_bytes) + context
            self.known[kind] = max(self.known.get(kind, 0), peak)

    def _foretold(self, folder: RunFolder) -> int | None:
        fits, stacked = [], folder.spec().how.stacked
        for one in self._stack(folder):
            if stacked > 1 and one.failure_file.exists():  # it has left the others, maybe before it was fitted
                continue
            fit = one.fit()
            if fit is None or fit.takes is None or fit.stacked != stacked:
                return None
            fits.append(fit)
        if not fits:
            return None
        if fits[0].shared is not None:
            self.room[self._gpu(folder)] = fits[0].shared
        # Each says what the process would take were all as it is: the whole is the mean of that.
        takes = sum(fit.takes or 0 for fit in fits) // len(fits)
        return takes + (CONTEXT_BYTES if fits[0].device == "cuda" else 0)

    @staticmethod
    def _stack(folder: RunFolder) -> list[RunFolder]:
        return [folder, *(folder.stacked_with() if folder.spec().how.stacked > 1 else ())]

    def back_off(self, beside: int) -> bool:
        """Memory ran out for a process that had so many others beside it (on its GPU): whether fewer may help.

        They may until there is one at a time. Others that ran out at the same time lower the limit no further.
        """
        limit = self.each if self.gpus else self.most
        if not self.by_memory or beside == 0:
            return False
        limit = min(limit, beside)
        if self.gpus:
            self.each = limit
        else:
            self.most = limit
        return True


def stacks(spec: RunSpec) -> bool:
    """Whether a run can be trained together with others of its arm."""
    if spec.method is None or spec.stage not in ("trial", "replicate"):
        return False
    return bool(getattr(load("methods", spec.method.use), "stacks", False))


def kind_of(spec: RunSpec) -> str:
    """Processes of one kind take about as much memory: stage, arm, and how many runs there are in one."""
    return f"{spec.stage} {spec.arm} x{spec.how.stacked}"
