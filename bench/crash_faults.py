"""What can happen where, for `bench/crash.py`: kinds of faults, their choice, how studies are dealt them."""

from __future__ import annotations

import importlib.util
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from crash_field import SHIM

KILLS = ("child killed", "parent killed", "both killed", "group killed", "orphan left")
SIGNALS = ("child SIGTERM", "parent SIGTERM", "parent SIGINT")
HANGS = ("child hangs", "child stopped")
CLOCKS = ("clock a day ahead", "clock a day back")
# "memory limited", a limit on the child's memory (RLIMIT_AS), is not among them: such a run goes on with half
# as much at once, so that its sums round otherwise, and equal weights are what this campaign asks for. It is
# tested by itself (tests/test_fit.py).
MEMORY = ("out of memory",)
OF_CHILD = (*KILLS, *SIGNALS, *HANGS, *CLOCKS, *MEMORY)
OF_PARENT = ("parent killed", "group killed", "parent SIGTERM", "parent SIGINT", *CLOCKS, "second coordinator")
REFUSED_WRITES = ("disk full", "read-only")
OF_TRACKER = {
    "before counting_tracker.Counting.replay": ("tracker down",),
    "before counting_tracker.Counting.middle": ("tracker raises", "tracker hangs"),
}
DAMAGE = ("bit flipped", "cut short")
# What can be told from its own content; and a damaged file of another kind would be the disk's business.
CHECKED = (
    "spec.json",
    "lease.json",
    "result.json",
    "failure.json",
    "attempt",
    "optimum",
    "commit_folder step",
    "commit_folder best",
    "commit_folder seed",
)
# Before a coordinator holds the folder a second one rightly does the whole study.
NOT_YET_HELD = "opening.resolve_inputs"
KINDS = sorted(
    {*OF_CHILD, *OF_PARENT, *REFUSED_WRITES, *DAMAGE, *(k for ks in OF_TRACKER.values() for k in ks)}
)
CHAIN = 16


@dataclass(frozen=True)
class Fault:
    """What happens where; `order` is when the undisturbed study passed that point."""

    point: str
    occurrence: int
    kind: str
    phase: str
    order: int

    @property
    def run(self) -> str:
        """The run that the point is about; empty for none."""
        return self.point.partition(" [")[2].rstrip("]")


@dataclass
class Chain:
    """One attacked study: its faults in order, and what became of them."""

    faults: Sequence[Fault]
    fired: list[Fault] = field(default_factory=list)
    outcomes: dict[Fault, str] = field(default_factory=dict)
    missed: list[Fault] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    starts: int = 0


def load_shim() -> Any:
    """The shim as a module; under its own name, because Python may have found another sitecustomize."""
    spec = importlib.util.spec_from_file_location("crash_shim", SHIM / "sitecustomize.py")
    assert spec is not None
    assert spec.loader is not None
    shim = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(shim)
    return shim


def phases(shim: Any) -> dict[str, str]:
    """Function, as a point names it -> its phase, by the shim's own table."""
    return {
        f"{module.removeprefix('finetrial.')}.{function}": phase
        for module, functions in shim.POINTS.items()
        for function, phase in functions.items()
    }


def possible(passed: Sequence[tuple[str, int, str]]) -> list[Fault]:
    """Every fault that makes sense at every point that the undisturbed study passed.

    A point that is about no run is counted by each coordinator anew, so only its first passing (and all of
    the report's, which each coordinator that gets there writes whole) can be aimed at.
    """
    shim = load_shim()
    phase_of, faults = phases(shim), []
    for order, (label, occurrence, role) in enumerate(passed):
        place = label.partition(" [")[0]
        when, name, *kind = place.split(" ")
        phase = shim.WRITTEN.get(kind[0], "other") if kind else phase_of[name]
        if "[" not in label and occurrence > 1 and phase != "report":
            continue
        kinds = [*(OF_PARENT if role == "parent" else OF_CHILD), *OF_TRACKER.get(place, ())]
        if name == NOT_YET_HELD:
            kinds.remove("second coordinator")
        writes = name.startswith("files.")
        if writes and when == "before":
            kinds += REFUSED_WRITES
        committed = writes and when == "after" and name != "files.sync_folder"
        if committed and (kind[0] in CHECKED or " ".join([name[6:], *kind]) in CHECKED):
            kinds += DAMAGE
        faults += [Fault(label, occurrence, kind, phase, order) for kind in kinds]
    return faults


def in_order_of_choice(faults: Sequence[Fault], seed: int) -> list[Fault]:
    """All of them: the phases by turns, each time the kind chosen least so far, at random over points."""
    rng = random.Random(seed)
    waiting: dict[str, dict[str, list[Fault]]] = {}
    for fault in rng.sample(faults, len(faults)):
        waiting.setdefault(fault.phase, {}).setdefault(fault.kind, []).append(fault)
    chosen: list[Fault] = []
    counts: Counter[str] = Counter()
    while waiting:
        for phase in sorted(waiting):
            kinds = waiting[phase]
            kind = min(kinds, key=lambda kind: (counts[kind], rng.random()))
            counts[kind] += 1
            chosen.append(kinds[kind].pop())
            if not kinds[kind]:
                del kinds[kind]
            if not kinds:
                del waiting[phase]
    return chosen


def next_faults(waiting: list[Fault], fired: Sequence[Fault], count: int, least: int) -> list[Fault]:
    """Take from those waiting what lacks: so many in all, and at least so many in each phase."""
    have = Counter(fault.phase for fault in fired)
    short = {fault.phase: least - have[fault.phase] for fault in waiting}
    taken = []
    for fault in waiting:
        if short[fault.phase] > 0:
            short[fault.phase] -= 1
            taken.append(fault)
    known = set(taken)
    rest = [fault for fault in waiting if fault not in known]
    taken += rest[: max(0, count - len(fired) - len(taken))]
    known = set(taken)
    waiting[:] = [fault for fault in waiting if fault not in known]
    return taken


def chains(faults: Sequence[Fault]) -> list[Chain]:
    """Faults dealt out to studies, each in the order in which their points are passed.

    A study meets one fault about each run at most: the first changes how often the run passes its points.
    """
    dealt: list[list[Fault]] = [[] for _ in range(max(1, -(-len(faults) // CHAIN)))]
    for fault in faults:
        open_ = [chain for chain in dealt if fault.run not in {f.run for f in chain if f.run}]
        if not open_:
            dealt.append([])
            open_ = dealt[-1:]
        min(open_, key=len).append(fault)
    return [Chain(sorted(chain, key=lambda fault: fault.order)) for chain in dealt if chain]
