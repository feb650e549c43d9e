"""What the rehearsal of an arm found: the record that crosses from the child to `forecast.py`."""

from __future__ import annotations

from finetrial.frozen import Frozen


class Pace(Frozen):
    """Going once over the training rows of a phase, at one batch size."""

    batch_size: int
    steps: int
    padded_tokens: int
    seconds: float  # foretold from the batches that were timed


class Phase(Frozen):
    """What a run of a phase takes before, between and after its steps."""

    setup_seconds: float  # reading, encoding, counting memory, building the model
    paces: tuple[Pace, ...]  # in order of the batch size


class Try(Frozen):
    """Training on ten samples, at one learning rate."""

    learning_rate: float
    steps: int
    first_loss: float | None  # None: the first step diverged
    loss: float | None  # of the last step
    diverged: str | None  # why
    learnt: bool  # the loss came below the bound


class Overfit(Frozen):
    """Ten samples again and again: can the arm learn at all?"""

    tries: tuple[Try, ...]  # the last is the first that learnt them, if one did
    fault: str | None  # why none did


class Rehearsal(Frozen):
    """An arm at its most demanding: does it fit, does it learn, how fast is it."""

    batch_size: int
    micro_batches: int
    micro_batch_tokens: int | None
    gradient_checkpointing: bool
    budget_bytes: int
    predicted_memory_bytes: int
    measured_memory_bytes: int
    overfit: Overfit
    tokens_per_second: float  # padding included, at the largest batch size
    search: Phase
    train: Phase
    validation_seconds: float
    test_seconds: float
    checkpoint_seconds: float  # to write one
    checkpoint_bytes: int
    save_seconds: float  # a trained model
    model_bytes: int
    probe_seconds: (
        float  # to measure one that has a neighbour, without the start of the process; 0: nothing asked
    )
    contradictions: int  # training inputs that occur again with another label
    could_be_bf16: bool = False  # `precision: auto` is fp32 on a processor that has instructions for bf16
    slow_in_bf16: bool = False  # it computes in bf16 on a processor that has none
