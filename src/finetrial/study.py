"""A study: the frozen models of what is wanted, complete with defaults and checked.

Not for reading the file (`study_file.py` turns YAML into this and reports all mistakes at once) and not
for deciding what runs (`plan.py`).
"""

from __future__ import annotations

import itertools
import math
import re
from typing import Annotated, Any, Literal

from pydantic import Field

from finetrial.frozen import Frozen, short_hash
from finetrial.records import ClaimKind, LoopRules, MethodSpec, ModelSource, TaskSpec
from finetrial.space import Dimension

# What a study's name may look like: it becomes a folder's name.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
# What a task's, method's or measure's name may look like. No dots: they separate the parts of a run's id, and
# `lora` must not be taken for the beginning of `lora.2`.
ENTRY_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


MOST_PARALLEL = 256
MIN_PAIRS = 4  # of replicates: with three or fewer the report describes and gives no verdict


class SearchRules(Frozen):
    """Phase 1: the same number of trials, rows and start-up draws for every method."""

    trials: int = Field(default=15, ge=1, le=1000)
    rows: int | None = Field(default=None, ge=1)
    seed: int = Field(default=0, ge=0)
    sampler: Literal["tpe", "random"] = "tpe"
    startup: int | None = Field(default=None, ge=1)
    # The method whose best trial says where the others' guided trials begin, by their `learning_rate_factor`.
    warm_start: str | None = None
    early_stop: bool = False  # once more trials are expected to gain less than the noise
    # Only the best 1/halving of the trials go on at 1/halving^2 of their steps, and of these at 1/halving.
    halving: int | None = Field(default=None, ge=2, le=10)

    @property
    def startup_trials(self) -> int:
        """Trials drawn at random before TPE is guided: a third of the budget unless stated."""
        return self.startup if self.startup is not None else max(1, -(-self.trials // 3))

    @property
    def ends(self) -> tuple[int, ...]:
        """By what a trial's steps are divided where it may be stopped, the whole last; empty: nowhere."""
        return (self.halving**2, self.halving, 1) if self.halving is not None else ()

    @property
    def counts(self) -> tuple[int, ...]:
        """How many trials of an arm at most are trained to each end: 15 to ninths, thirds, wholes 15, 5, 2."""
        counts = [self.trials]
        for before, end in itertools.pairwise(self.ends):
            counts.append(max(1, math.ceil(counts[-1] * end / before)))
        return tuple(counts)


class TrainRules(LoopRules):
    """Phase 2: how many replicates, on how many rows. The loop's rules hold for trials too."""

    seeds: int = Field(default=5, ge=1, le=1000)
    rows: int | None = Field(default=None, ge=1)


class Claim(Frozen):
    """One declared claim: `method` compared with `reference`, with a relative margin (0: without one)."""

    text: str
    kind: ClaimKind
    method: str
    reference: str
    margin: float = Field(ge=0, lt=1)


class RunRules(Frozen):
    """Where and how; not part of the study's identity."""

    engine: str = "local"
    parallel: Annotated[int, Field(ge=1, le=MOST_PARALLEL)] | Literal["auto"] = 1
    stack: int = Field(default=1, ge=1, le=64)
    threads: int | None = Field(default=None, ge=1, le=1024)
    memory_bytes: int | None = Field(default=None, gt=0)
    disk_bytes: int | None = Field(default=None, gt=0)
    limit_seconds: float | None = Field(default=None, gt=0)
    attempts: int = Field(default=3, ge=1, le=100)
    checkpoint_seconds: float | None = Field(default=120.0, gt=0)
    checkpoint_steps: int | None = Field(default=None, ge=1)
    micro_batch: int | None = Field(default=None, ge=1)
    gradient_checkpointing: bool | None = None
    log_steps: int = Field(default=10, ge=1)
    keep_models: Literal["all", "best", "none"] = "all"


class Study(Frozen):
    """What the study file says, resolved: every default filled in, every plug-in's parameters checked."""

    study: str
    model: ModelSource
    tasks: tuple[TaskSpec, ...]
    methods: tuple[MethodSpec, ...]
    spaces: dict[str, dict[str, Dimension]]  # method name -> its whole search space
    search: SearchRules
    train: TrainRules
    measure: dict[str, dict[str, Any]]
    claims: tuple[Claim, ...]
    run: RunRules
    track: tuple[str, ...]
    file: str
    base: str  # the file's folder

    @property
    def arms(self) -> list[tuple[TaskSpec, MethodSpec]]:
        return [(task, method) for task in self.tasks for method in self.methods]

    def identity(self) -> str:
        """A hash of what is asked, not of where it runs; trials and seeds may be raised later."""
        data = self.model_dump(mode="json", exclude={"run", "track", "file", "base"})
        del data["search"]["trials"], data["train"]["seeds"]
        if self.search.halving is None:  # a key that came later; without it a study is what it was
            del data["search"]["halving"]
        if not self.search.early_stop:
            del data["search"]["early_stop"]
        if self.search.warm_start is None:
            del data["search"]["warm_start"]
        return short_hash(data, 16)
