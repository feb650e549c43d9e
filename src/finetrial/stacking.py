"""Stacked LoRA: several trainings of one arm, their adapters side by side on one frozen base. Child side.

Every training is what it is alone: its own data order, dropout stream, rank, rate, schedule, clipping, head,
evaluations and checkpoints (`train.py`). Only the passes through the base are made together, over all their
rows. A row meets no other row's adapter, so a training that diverges leaves without touching the others; losses
equal those of the training alone up to rounding.
"""

from __future__ import annotations

import contextlib
import sys
import traceback
from collections.abc import Callable, Generator, Iterator, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn import functional
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from finetrial.batching import collate, model_inputs
from finetrial.fair_time import FAIR
from finetrial.fit import split
from finetrial.loop import Loop, Turn
from finetrial.optimisation import precision_of
from finetrial.plugins import Feature
from finetrial.stacked_layers import (
    GROUPS,
    Group,
    StackedDropout,
    StackedLora,
    StackedRows,
    attention,
    attention_of_tokens,
    random_state,
)
from finetrial.train import follow
from finetrial.trimmed import OF_TOKENS

ATTENTION = "finetrial_stacked"
# How far a stacked loss may lie from the training's own, relatively: rounding, and no more.
AGREED, AGREED_BF16 = 1e-4, 2e-2
MOVED = 0.05  # by so much (standard deviation) each element of an adapter's B, to compare
T = TypeVar("T")


class Stack:
    """The models of several trainings as one, which has no weight of its own."""

    def __init__(self, loops: Sequence[Loop]):
        self.loops = list(loops)
        models = [model_of(loop) for loop in loops]
        self.model, _ = loops[0].bench.build_tuned()
        self.model.to(loops[0].accelerator.device)
        share_base(models[0], self.model)
        self.stacked: list[list[Any]] = []  # of each stacked module the trainings' own
        linear, saved = _peft()
        for path, module in list(models[0].named_modules()):
            if any(isinstance(models[0].get_submodule(above), linear | saved) for above in _above(path)):
                continue
            own = [model.get_submodule(path) for model in models]
            if isinstance(module, linear):
                self._put(path, StackedLora(own))
            elif isinstance(module, saved):
                self._put(path, StackedRows([each.modules_to_save[each.active_adapters[0]] for each in own]))
            elif isinstance(module, nn.Dropout):
                self._put(path, StackedDropout(module.p))
        AttentionInterface.register(ATTENTION, attention)
        AttentionMaskInterface.register(ATTENTION, sdpa_mask)
        OF_TOKENS[ATTENTION] = attention_of_tokens
        self.model.get_base_model().config._attn_implementation = ATTENTION

    def _put(self, path: str, module: nn.Module) -> None:
        above, _, name = path.rpartition(".")
        setattr(self.model.get_submodule(above), name, module)
        if isinstance(module, StackedLora | StackedRows):
            self.stacked.append(module.own)

    def holds(self, loop: Loop) -> bool:
        return any(loop is own for own in self.loops)

    def keep(self, loops: Sequence[Loop]) -> None:
        """Go on with these of its trainings alone."""
        for index in reversed(range(len(self.loops))):
            if not any(self.loops[index] is loop for loop in loops):
                del self.loops[index]
                for own in self.stacked:
                    del own[index]

    def agrees(self, batches: Sequence[Sequence[Feature]]) -> bool:
        """Whether stacked losses are those that the trainings have alone: nothing of the model was overlooked.

        Draws and passes that leave no trace; the first parts of these batches. Adapters begin at zero, where no
        mistake in them would be seen, and are moved for it.
        """
        for loop in self.loops:  # the heads that they have of their own: their dropout
            loop.model.train()
        parts = [split(loop.fit, batch)[0] for loop, batch in zip(self.loops, batches, strict=True)]
        with torch.no_grad(), self._moved():
            stacked = [float(loss) for loss in self._losses(parts, 0).values()]
            alone = [loop.loss_of(part, 0) for loop, part in zip(self.loops, parts, strict=True)]
        apart = max(abs(one - other) / max(abs(one), 1e-6) for one, other in zip(alone, stacked, strict=True))
        exact = all(precision_of(loop.bench.spec.rules) == "fp32" for loop in self.loops)
        return apart < (AGREED if exact else AGREED_BF16)

    @contextlib.contextmanager
    def _moved(self) -> Iterator[None]:
        """Every training's adapters away from where they are, each in a way of its own; then as they were."""
        linear, _ = _peft()
        ups = [
            (index, layer.lora_B[name].weight)
            for own in self.stacked for index, layer in enumerate(own) if isinstance(layer, linear)
            for name in layer.active_adapters
        ]  # fmt: skip
        before = [up.clone() for _, up in ups]
        try:
            for index, up in ups:
                random = torch.Generator().manual_seed(index)
                up.add_(MOVED * torch.randn(up.shape, generator=random).to(up))
            yield
        finally:
            for (_, up), was in zip(ups, before, strict=True):
                up.copy_(was)

    def backward(self, batches: Sequence[Sequence[Feature]]) -> list[float]:
        """Gradients of every training's mean loss over its own effective batch, and these losses."""
        losses = [0.0] * len(self.loops)
        parts = [split(loop.fit, batch) for loop, batch in zip(self.loops, batches, strict=True)]
        for loop, own in zip(self.loops, parts, strict=True):
            loop.model.train()
            loop.progress.micro_batches = max(loop.progress.micro_batches, len(own))
        for number in range(max(map(len, parts))):
            here = [own[number] if number < len(own) else [] for own in parts]
            for index, loss in self._pass(here, number, [len(batch) for batch in batches]).items():
                losses[index] += loss
        return losses

    def _pass(self, parts: Sequence[Sequence[Feature]], number: int, sizes: Sequence[int]) -> dict[int, float]:
        """One pass forward and back; the loss of each training that has rows in it."""
        losses = {index: loss / sizes[index] for index, loss in self._losses(parts, number).items()}
        for index, group in enumerate(GROUPS):
            if index in losses:
                self.loops[index].progress.padded_tokens += group.tensors["input_ids"].numel()
        self.loops[0].accelerator.backward(sum(losses.values()))
        GROUPS.clear()
        return {index: float(loss.detach()) for index, loss in losses.items()}

    def _losses(self, parts: Sequence[Sequence[Feature]], number: int) -> dict[int, torch.Tensor]:
        """The summed loss of each training's rows, forward only."""
        inputs = self._lay_out(parts, number)
        self.model.train()
        with self.loops[0].accelerator.autocast():
            outputs = self.model(**inputs)
        losses = {}
        for index, (loop, group) in enumerate(zip(self.loops, GROUPS, strict=True)):
            if parts[index]:
                head = loop.bench.task.head
                own = _outputs_of(group, outputs, cut=head.kind == "question_answering")
                losses[index] = head.losses(own, group.tensors).sum()
        return losses

    def _lay_out(self, parts: Sequence[Sequence[Feature]], number: int) -> dict[str, torch.Tensor]:
        """The model's inputs of all rows, each group's as it has them alone and padded to the longest."""
        GROUPS.clear()
        start, first, inputs = 0, 0, []
        for loop, part in zip(self.loops, parts, strict=True):
            torch.manual_seed(loop.dropout_seed(number))
            pad = loop.tokenizer.pad_token_id
            tensors = collate(part, pad, loop.accelerator.device) if part else {}
            length = tensors["input_ids"].shape[1] if part else 0
            rows, held = start + len(part), first + sum(len(feature.input_ids) for feature in part)
            GROUPS.append(Group(slice(start, rows), slice(first, held), length, random_state(), tensors))
            start, first = rows, held
            if part:
                inputs.append((pad, model_inputs(tensors)))
        longest = max(group.length for group in GROUPS)
        return {
            name: torch.cat(
                [
                    functional.pad(
                        of[name], (0, longest - of[name].shape[1]), value=pad * (name == "input_ids")
                    )
                    for pad, of in inputs
                ]
            )
            for name in inputs[0][1]
        }


def _outputs_of(group: Group, outputs: Any, *, cut: bool) -> Any:
    """A group's part of what a model gives; `cut`: its logits go along the length."""
    found = {name: value[group.rows] for name, value in outputs.items() if isinstance(value, torch.Tensor)}
    return SimpleNamespace(**{n: value[:, : group.length] if cut else value for n, value in found.items()})


def model_of(loop: Loop) -> Any:
    return loop.accelerator.unwrap_model(loop.model)


def stackable(loop: Loop) -> bool:
    """Whether a training can be stacked.

    Plain adapters by PEFT and whole heads are all that it trains, attention is PyTorch's, and nothing is
    computed twice.
    """
    model = model_of(loop)
    linear, saved = _peft()
    ours = [module for module in model.modules() if isinstance(module, linear | saved)]
    known = {id(parameter) for module in ours for parameter in module.parameters()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    base = model.get_base_model() if hasattr(model, "get_base_model") else None
    return (
        base is not None
        and bool(ours)
        and not any(getattr(module, "lora_variant", None) or _has_bias(module) for module in ours)
        and all(id(parameter) in known for parameter in trained)
        and getattr(base.config, "_attn_implementation", None) == "sdpa"
        and not loop.fit.checkpointing
        and not loop.stepper.in_backward
    )


def _has_bias(module: Any) -> bool:
    """Whether an adapter adds more than the product of its two matrices."""
    ups = getattr(module, "lora_B", {})
    return any(getattr(ups[name], "bias", None) is not None for name in ups)


def share_base(of: Any, model: Any) -> None:
    """Let a model use another's frozen weights in place of its own, where they are equal."""
    known = dict(of.named_parameters(remove_duplicate=False))
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        if not parameter.requires_grad and torch.equal(parameter, known[name]):
            above, _, leaf = name.rpartition(".")
            model.get_submodule(above)._parameters[leaf] = known[name]


def together(
    trainings: Sequence[Generator[Turn, float, T]],
    on_end: Callable[[int, T | BaseException], None] = lambda index, end: None,
) -> list[T | BaseException]:
    """Do several trainings at once; what each of them gives, or what ended it, which is also told at once."""
    ends: dict[int, T | BaseException] = {}
    turns: dict[int, Turn] = {}

    def go_on(index: int, step: Callable[[], Turn]) -> None:
        try:
            turns[index] = step()
        except StopIteration as ended:
            ends[index] = ended.value
        except BaseException as error:  # noqa: BLE001 - of this training alone; whoever asked deals with it
            ends[index] = error
        if index in ends:
            end = ends[index]
            on_end(index, end)
            if isinstance(end, BaseException):
                end.with_traceback(None)  # what its frames hold is not held until the last has ended

    def share(index: int) -> None:
        """At once, so that no more than two bases are there at a time."""
        mine = [turn.loop for turn in turns.values() if stackable(turn.loop)]
        if index in turns and turns[index].loop in mine[1:]:
            share_base(model_of(mine[0]), model_of(turns[index].loop))

    for index, training in enumerate(trainings):
        FAIR.share(len(turns) + 1)
        go_on(index, partial(next, training))
        share(index)
    FAIR.share(len(turns))
    stack = _agreed({index: turn for index, turn in turns.items() if stackable(turn.loop)})
    while turns:
        FAIR.share(len(turns))
        going, losses = dict(turns), {}
        turns.clear()
        stacked = [index for index in going if stack is not None and stack.holds(going[index].loop)]
        if stack is not None and stacked:
            stack.keep([going[index].loop for index in stacked])
            try:
                found = stack.backward([going[index].batch for index in stacked])
            except BaseException as error:  # noqa: BLE001 - likewise
                for index in stacked:
                    go_on(index, partial(trainings[index].throw, error))
                going = {index: turn for index, turn in going.items() if index not in stacked}
            else:
                losses = dict(zip(stacked, found, strict=True))
        for index, turn in going.items():
            if index not in losses:
                go_on(index, partial(follow, trainings[index], turn))
            else:
                go_on(index, partial(trainings[index].send, losses[index]))
    FAIR.share(1)
    return [ends[index] for index in range(len(trainings))]


def _agreed(turns: dict[int, Turn]) -> Stack | None:
    """A stack of these trainings, if there are several and it gives the losses that they have alone."""
    if len(turns) < 2:
        return None
    try:
        stack = Stack([turn.loop for turn in turns.values()])
        if stack.agrees([turn.batch for turn in turns.values()]):
            return stack
        why = "stacked losses are not those of the trainings alone"
    except Exception as error:  # noqa: BLE001 - whatever a stack makes of this kind of model, it can be trained alone
        traceback.print_exc()
        why = f"a stacked pass failed ({type(error).__name__})"
    finally:
        GROUPS.clear()
    sys.stderr.write(f"{why}: they are trained beside each other\n")
    return None


def _above(path: str) -> list[str]:
    """The paths of the modules that a module lies in: of a.b.c a and a.b."""
    names = path.split(".")
    return [".".join(names[:count]) for count in range(1, len(names))]


def _peft() -> tuple[type, type]:
    from peft.tuners.lora import Linear
    from peft.utils.other import ModulesToSaveWrapper

    return Linear, ModulesToSaveWrapper
