"""What crosses a process or a disk: the frozen, versioned records of one run.

`RunSpec` says what to run, `Result` what came out, `Failure` why nothing did, `Attempt` who tried.
No behaviour lives here beyond the run's identity.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from pydantic import Field

from finetrial.frozen import SCHEMA_VERSION, Frozen, SchemaVersion, Setting, short_hash

Stage = Literal["baseline", "check", "trial", "replicate", "probe"]
Outcome = Literal[
    "done",
    "diverged",
    "out_of_memory",
    "crashed",
    "timed_out",
    "lost",
    "cancelled",
    "refused",  # the study asks for what cannot be had (docs/decisions/0002)
    "bug",
]
ClaimKind = Literal["within", "drifts_less", "forgets_less"]


class Seeds(Frozen):
    """The separate random streams of one run; equal for all methods of a task and number."""

    data_order: int
    head: int
    adapter: int
    dropout: int


class ModelSource(Frozen):
    """Where the base model comes from.

    `name` is a Hub name (`org/name`, with `revision`), a folder (`./x`, `/x`, `~/x`), or
    `package:NAME/folder`, a folder inside an installed Python package. `gguf_file` names a GGUF file in it,
    which is dequantised once. `config` changes entries of the model's own config, e.g.
    `{attention_probs_dropout_prob: 0.0}`, for every method alike; a name that it does not have is refused.
    `token_type_ids`: whether the second text of a pair is marked as such where the tokenizer does so; not
    good for sentence-embedding models, which have seen single texts only.
    """

    name: str
    revision: str | None = None
    gguf_file: str | None = None
    trust_remote_code: bool = False
    config: dict[str, Setting] = {}
    token_type_ids: bool = True


class TaskSpec(Frozen):
    """A task of the study: which plug-in, and that plug-in's own parameters (validated by it)."""

    name: str
    use: str
    params: dict[str, Any]


class MethodSpec(Frozen):
    """A method of the study: which plug-in, and that plug-in's own parameters (not its search space)."""

    name: str
    use: str
    params: dict[str, Any]


class EarlyStopping(Frozen):
    """Stop when `patience` evaluations in a row did not beat the best by more than `min_delta`."""

    patience: int = Field(ge=1)
    min_delta: float = Field(default=0.0, ge=0)


class LoopRules(Frozen):
    """The training loop's rules, the same for every method and for both phases."""

    precision: Literal["auto", "fp32", "bf16"] = "auto"
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    max_grad_norm: float = Field(default=1.0, gt=0)
    # per_tensor: each trained tensor to max_grad_norm / sqrt(their number), the share it has if all are equal.
    clip: Literal["global", "per_tensor"] = "global"
    evaluations_per_epoch: int = Field(default=1, ge=1)
    keep: Literal["best", "last"] = "best"
    early_stopping: EarlyStopping | None = None
    # Diverged: the loss lies above so many times its start (see `training_state.guard`) for so many steps,
    # or half of the trained tensors so many times theirs.
    divergence_factor: float = Field(default=2.0, gt=1)
    divergence_steps: int = Field(default=10, ge=1)
    divergence_growth: float = Field(default=50.0, gt=1)


class How(Frozen):
    """Where and how a run is executed; never part of its identity."""

    base: str = "."  # the study file's folder: relative paths are resolved against it
    threads: int = 1
    limit_seconds: float | None = None
    checkpoint_seconds: float | None = 120.0
    checkpoint_steps: int | None = None
    micro_batch: int | None = None  # rows, at most; memory may ask for fewer
    memory_bytes: int | None = None  # the budget of this run's process (its GPU's memory where it has one)
    gradient_checkpointing: bool | None = None  # None: only where it does not fit otherwise
    parallel: int = 1  # processes that share the machine's memory, in equal parts
    stacked: int = 1  # trainings that its process does together
    packed: bool = False  # or as each takes; it says beforehand how much that is
    gpu: str | None = None  # the one of several that its process sees, as CUDA_VISIBLE_DEVICES names it
    log_steps: int = 10


class Fit(Frozen):
    """How a run is fitted to its memory, chosen by its first attempt: a later one goes on with the same."""

    schema_version: SchemaVersion = SCHEMA_VERSION
    device: str  # cpu or cuda
    budget: int  # bytes: of the process, or on its GPU
    predicted: int | None  # bytes: the peak of training, likewise; None: so far below that it was not counted
    shared: int | None = None  # bytes that all processes at a time share, if they are packed
    stacked: int = 1  # trainings of the process
    tokens: int | None = None  # most of a micro-batch, padding included; None: as many as there are
    rows: int | None = None  # most rows of a micro-batch, as the study asks
    checkpointing: bool = False  # activations are computed twice instead of kept
    evaluation_tokens: int  # most of a batch that is only evaluated
    tight: bool = False  # large blocks are given back to the system at once; on a CPU only
    checkpointing_asked: bool | None = None  # run.gradient_checkpointing
    halvings: int = 0  # how often memory had run out when it was chosen
    proved: bool = False  # a step that was thrown away has kept to the budget
    surplus: float = 1.0  # times what was foretold that the process may take, as it keeps what it frees

    @property
    def takes(self) -> int | None:
        """Bytes that its process may come to take."""
        return None if self.predicted is None else int(self.surplus * self.predicted)


class Rung(Frozen):
    """How far a run takes a trial before it is compared with the arm's others: to a share of its steps.

    `ends`: all such ends so far, each as what the steps are divided by; (9, 3) is a run to a third of them,
    with an evaluation at a ninth. `after`: the same trial's run to the end before, which this one goes on from.
    """

    ends: tuple[int, ...]
    after: str | None = None

    @property
    def number(self) -> int:
        """1 for the first."""
        return len(self.ends)

    @property
    def is_last(self) -> bool:
        return self.ends[-1] == 1

    def steps(self, planned_steps: int) -> tuple[int, ...]:
        """After which steps these ends are, of so many in all; two at least, for warm-up begins at rate 0."""
        return tuple(min(planned_steps, max(2, -(-planned_steps // end))) for end in self.ends)


class WarmStart(Frozen):
    """That a trial's settings come from another method's best trial, and from which."""

    method: str
    trial: int
    run_id: str
    factor: float  # its learning rate is so many times that one's


class RunSpec(Frozen):
    """What one run does: pure data, written first. Its id is a readable name and a hash of the rest."""

    schema_version: SchemaVersion = SCHEMA_VERSION
    study: str
    stage: Stage
    task: TaskSpec
    method: MethodSpec | None = None
    number: int  # trial number, replicate number, or the replicate number that a probe measures
    model: ModelSource
    settings: dict[str, Setting] = {}
    rows: int | None = None  # training rows; None means all
    rung: Rung | None = None  # trials of a search with halving only
    warm_start: WarmStart | None = None  # trials of a search with one only
    rules: LoopRules = LoopRules()
    seeds: Seeds
    inputs: dict[str, str] = {}  # SHA-256 of the model and data files, so that changed input is a new run
    measures: dict[str, dict[str, Any]] = {}  # probes, rehearsals, the frozen body: name -> its own parameters
    subject: str | None = None  # probes only: run id of the replicate measured; None is the base model
    reference: str | None = None  # probes only: run id of the neighbour replicate, for seed-to-seed drift
    how: How = How()

    @property
    def arm(self) -> str:
        return f"{self.task.name}/{self.method.name}" if self.method else self.task.name

    @property
    def name(self) -> str:
        """The readable part of the id, e.g. `trial.squad_v2.lora.007`."""
        parts = [self.stage, self.task.name]
        if self.method:
            parts.append(self.method.name)
        rung = [f"rung{self.rung.number}"] if self.rung else []
        return ".".join([*parts, f"{self.number:03d}", *rung])

    @property
    def run_id(self) -> str:
        # A key that came later names no run anew that is without it.
        later = {key for key in ("rung", "warm_start") if getattr(self, key) is None}
        return f"{self.name}-{short_hash(self.model_dump(mode='json', exclude={'how', *later}))}"

    @property
    def may_go_on(self) -> bool:
        """Whether another run may go on from its last checkpoint."""
        return self.rung is not None and not self.rung.is_last


class GroupProof(Frozen):
    """How far one group of trained tensors (head, body, adapter) moved from its start."""

    tensors: int
    moved: int
    relative_change: float | None  # ||W - W0|| / ||W0|| over the group; None when W0 is all zero
    change_norm: float


class Proof(Frozen):
    """Proof of training: which groups moved, by how much, and why the run is void if one did not."""

    groups: dict[str, GroupProof]
    largest: dict[str, float]  # the five tensors that moved most: name -> ||W - W0||
    void: str | None = None


class Training(Frozen):
    """What the loop did, counted where it happened."""

    steps: int
    planned_steps: int
    epochs: float
    rows: int
    examples: int  # model inputs seen (windows for QA), over all epochs
    tokens: int  # non-padding tokens seen in training
    padded_tokens: int
    best_step: int
    stopped_early: bool
    first_loss: float | None
    last_loss: float | None
    lost_to_rounding: float | None = None  # share of updates that left the stored weight as it was
    resumed_from: tuple[int, ...] = ()  # steps at which later attempts took over
    micro_batch_tokens: int | None = None  # most tokens at once, padding included; None: whole batches
    micro_batches: int = 1  # most that an effective batch was split into
    gradient_checkpointing: bool = False
    stacked: int = 1  # trainings that its process was begun with; each is charged its share of the time


class Cost(Frozen):
    """What the run cost. Times and memory are measured and vary; the rest is exact."""

    wall_seconds: float
    train_seconds: float = 0.0
    evaluate_seconds: float = 0.0
    cpu_seconds: float
    peak_memory_bytes: int
    predicted_memory_bytes: int | None = None  # of training, before it started
    gives_back: bool = False  # large blocks to the system at once, on a CPU whose memory is short
    device: str
    flops: float = 0.0
    trainable_parameters: int = 0
    total_parameters: int = 0
    saved_bytes: int = 0


class SearchStop(Frozen):
    """That an arm's search ended early, and why; the decision is kept, so that it is made once."""

    schema_version: SchemaVersion = SCHEMA_VERSION
    after: int  # trials
    planned: int
    gain: float  # that the rest of them was expected to bring; of the score, with halving of the loss
    noise: float  # the standard error of the best two's difference, in the same unit


class Result(Frozen):
    """What came out of a run; written last, and its existence alone means that the run is done."""

    schema_version: SchemaVersion = SCHEMA_VERSION
    run_id: str
    outcome: Literal["done", "diverged"]
    reason: str | None = None  # why it diverged
    score: float | None = None  # the task's metric on validation
    validation_loss: float | None = None  # what halving compares it by; of trials that may go on alone
    scores: dict[str, dict[str, float]] = {}  # split -> metric -> value
    calibration: dict[str, float] = {}  # chosen on validation, used on test (e.g. no_answer_threshold)
    settings_used: dict[str, Setting] = {}  # read back from the optimiser, schedule and modules
    training: Training | None = None
    proof: Proof | None = None
    cost: Cost
    weights_sha256: str | None = None
    examples_sha256: str | None = None  # of the file examples.json, beside the record
    input_sha256: dict[str, str] = {}  # split -> hash of the encoded inputs
    split_rows: dict[str, int] = {}
    measures: dict[str, Any] = {}
    environment: dict[str, str] = {}


class Failure(Frozen):
    """Why a run has no result: kind, one-line reason, the log's last lines."""

    schema_version: SchemaVersion = SCHEMA_VERSION
    run_id: str
    kind: Outcome
    reason: str
    log_tail: str = ""
    attempt: int
    final: bool = False  # it would end the same way again, whatever is tried
    own_budget: bool = False  # out of the memory that was its own: who was beside it does not matter
    less_helps: bool = True  # half as much at once; not where memory ran out while a model was loaded

    @property
    def goes_on(self) -> bool:
        """Out of memory and not for good: the run goes on with less at once."""
        return self.kind == "out_of_memory" and not self.final


# What a person can do about a run that was given up: outcome -> next step.
RETRY = "run again with --retry-failed"
NEXT_STEP: dict[Outcome, str] = {
    "crashed": f"see its log (`finetrial show RUN`), mend the cause, {RETRY}",
    "lost": f"see to the machines that its attempts were lost on, {RETRY}",
    "timed_out": f"raise run.trial_limit, {RETRY}",
    "out_of_memory": f"raise run.memory, run fewer at once (run.parallel), or use a smaller model, {RETRY}",
    "bug": "see its log (`finetrial show RUN`); `finetrial run` tries it again",
    "refused": "do what its reason says; `finetrial run` tries it again",
    "cancelled": "`finetrial run` goes on with it",
}


class Attempt(Frozen):
    """One try at a run; one file each, never overwritten once ended."""

    schema_version: SchemaVersion = SCHEMA_VERSION
    number: int
    host: str
    pid: int
    started_at: float  # seconds since the epoch
    ended_at: float | None = None
    outcome: Outcome | None = None
    exit_code: int | None = None
    reason: str | None = None
    from_step: int = 0  # of the checkpoint that it went on from
    stacked: int = 1  # runs that its process did at once
    counts: bool = True  # towards the cap on attempts
    gave_up: bool = False  # the last that the cap on attempts allowed; a later retry counts from here


class RunRecord(NamedTuple):
    """A run as its folder tells it: the spec, and what came of it so far."""

    spec: RunSpec
    result: Result | None
    failure: Failure | None
    attempts: tuple[Attempt, ...]

    @property
    def outcome(self) -> Outcome | None:
        """How it ended for good, or None while it is unfinished."""
        if self.result:
            return self.result.outcome
        return self.failure.kind if self.failure and not self.failure.goes_on else None
