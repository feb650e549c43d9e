"""Stacked LoRA: several trainings of one arm, their adapters side by side on one frozen base. Child side.

Every training is what it is alone: its own data order, dropout stream, rank, rate, schedule, clipping, head,
evaluations and checkpoints (`train.py`). Only the passes through the base are made together, over all their
rows. A row meets no other row's adapter, so a training that diverges leaves without touching the others; losses
equal those of the training alone up to rounding.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn import functional
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from finetrial.batching import collate, model_inputs
from finetrial.fit import split
from finetrial.plugins import Feature
from finetrial.train import Loop, Turn, follow

ATTENTION = "finetrial_stacked"
T = TypeVar("T")


@dataclass
class Group:
    """One training's rows in a stacked batch: where they are, how long, and its state of random numbers."""

    rows: slice
    length: int
    state: torch.Tensor
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)

    def of(self, values: torch.Tensor) -> torch.Tensor:
        """Its part of values of all rows, [rows, length, ...] or [rows, features], as it has them alone."""
        own = values[self.rows]
        return own[:, : self.length] if values.ndim > 2 else own


class Groups(list[Group]):
    """The groups of the batch that is under way."""

    @contextlib.contextmanager
    def drawing(self, group: Group) -> Iterator[None]:
        """Draw what is drawn here from a group's own stream."""
        random_state(group.state)
        yield
        group.state = random_state()

    def each(self, values: torch.Tensor, what: Callable[[int, torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """Do something to each group's own values, from its own stream; 0 beyond their length."""
        found = []
        for index, group in enumerate(self):
            if not group.length:  # it has no rows in this part
                continue
            with self.drawing(group):
                own = what(index, group.of(values))
            missing = values.shape[1] - own.shape[1] if own.ndim > 2 else 0
            found.append(functional.pad(own, [0, 0] * (own.ndim - 2) + [0, missing]) if missing else own)
        return torch.cat(found)

    def side_by_side(self, values: torch.Tensor) -> torch.Tensor:
        """[rows, length, features] as [groups, rows x length, features]; rows of 0 where a group has fewer."""
        counts = [group.rows.stop - group.rows.start for group in self]
        most = max(counts)
        if min(counts) < most:
            values = torch.cat(
                [
                    functional.pad(values[group.rows], (0, 0, 0, 0, 0, most - count))
                    for group, count in zip(self, counts, strict=True)
                ]
            )
        return values.reshape(len(self), most * values.shape[1], values.shape[2])

    def in_rows(self, values: torch.Tensor, length: int) -> torch.Tensor:
        """The opposite."""
        apart = values.view(len(self), -1, length, values.shape[-1])
        return torch.cat([apart[i, : group.rows.stop - group.rows.start] for i, group in enumerate(self)])


GROUPS = Groups()  # attention is called by the library, which hands nothing of ours through


class StackedLora(nn.Module):
    """A frozen linear layer once, and beside it every training's adapter on its own rows."""

    def __init__(self, layers: Sequence[Any]):
        super().__init__()
        self.base_layer = layers[0].base_layer
        self.own = list(layers)  # a list: they are the trainings' modules, not this one's
        self.name = layers[0].active_adapters[0]
        self.drops = any(self._dropout(layer) for layer in layers)

    def _dropout(self, layer: Any) -> float:
        return float(getattr(layer.lora_dropout[self.name], "p", 0.0))

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        output = self.base_layer(values)
        if self.drops:
            values = GROUPS.each(
                values, lambda i, own: functional.dropout(own, self._dropout(self.own[i]), self.training)
            )
        downs = [layer.lora_A[self.name].weight for layer in self.own]
        ups = [layer.lora_B[self.name].weight * layer.scaling[self.name] for layer in self.own]
        most = max(down.shape[0] for down in downs)
        down = torch.stack([functional.pad(down, (0, 0, 0, most - down.shape[0])) for down in downs])
        up = torch.stack([functional.pad(up, (0, most - up.shape[1])) for up in ups])
        inner = torch.bmm(GROUPS.side_by_side(values), down.to(values.dtype).transpose(1, 2))
        added = torch.bmm(inner, up.to(inner.dtype).transpose(1, 2))
        return output + GROUPS.in_rows(added, values.shape[1]).to(output.dtype)


class StackedRows(nn.Module):
    """Every training's own module on its own rows: a head."""

    def __init__(self, modules: Sequence[Any]):
        super().__init__()
        self.own = list(modules)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return GROUPS.each(values, lambda i, own: self.own[i](own))


class StackedDropout(nn.Module):
    """Dropout of the base, each training's drawn from its own stream."""

    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        if not self.training or self.p == 0.0:
            return values
        return GROUPS.each(values, lambda _, own: functional.dropout(own, self.p, training=True))


def _attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any,
    dropout: float = 0.0, **options: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """The library's attention; where it drops, each training's rows by themselves."""
    alone = AttentionInterface()["sdpa"]
    if not dropout:
        return alone(module, query, key, value, attention_mask, dropout=0.0, **options)
    whole, found = query.shape[2], []
    for group in (group for group in GROUPS if group.length):
        cut = (group.rows, slice(None), slice(group.length))
        mask = attention_mask
        if mask is not None:
            rows = group.rows if mask.shape[0] > 1 else slice(None)
            mask = mask[rows, :, : group.length, : group.length]
        with GROUPS.drawing(group):
            own, _ = alone(module, query[cut], key[cut], value[cut], mask, dropout=dropout, **options)
        found.append(functional.pad(own, (0, 0, 0, 0, 0, whole - group.length)))
    return torch.cat(found), None


class Stack:
    """The models of several trainings as one, which has no weight of its own."""

    def __init__(self, loops: Sequence[Loop]):
        self.loops = list(loops)
        models = [model_of(loop) for loop in loops]
        self.model, _ = loops[0].bench.build_tuned()
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
        AttentionInterface.register(ATTENTION, _attention)
        AttentionMaskInterface.register(ATTENTION, sdpa_mask)
        self.model.get_base_model().config._attn_implementation = ATTENTION
        self.model.train()

    def _put(self, path: str, module: nn.Module) -> None:
        above, _, name = path.rpartition(".")
        setattr(self.model.get_submodule(above), name, module)
        if isinstance(module, StackedLora | StackedRows):
            self.stacked.append(module.own)

    def leave(self, index: int) -> None:
        """Go on without one of the trainings."""
        del self.loops[index]
        for own in self.stacked:
            del own[index]

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
        inputs = self._lay_out(parts, number)
        accelerator = self.loops[0].accelerator
        with accelerator.autocast():
            outputs = self.model(**inputs)
        losses = {}
        for index, (loop, group) in enumerate(zip(self.loops, GROUPS, strict=True)):
            if parts[index]:
                head = loop.bench.task.head
                own = _outputs_of(group, outputs, cut=head.kind == "question_answering")
                losses[index] = head.loss_sum(own, group.tensors) / sizes[index]
                loop.progress.padded_tokens += group.tensors["input_ids"].numel()
        accelerator.backward(sum(losses.values()))
        GROUPS.clear()
        return {index: float(loss.detach()) for index, loss in losses.items()}

    def _lay_out(self, parts: Sequence[Sequence[Feature]], number: int) -> dict[str, torch.Tensor]:
        """The model's inputs of all rows, each group's as it has them alone and padded to the longest."""
        GROUPS.clear()
        start, inputs = 0, []
        for loop, part in zip(self.loops, parts, strict=True):
            torch.manual_seed(loop.dropout_seed(number))
            pad = loop.tokenizer.pad_token_id
            tensors = collate(part, pad, loop.accelerator.device) if part else {}
            length = tensors["input_ids"].shape[1] if part else 0
            GROUPS.append(Group(slice(start, start + len(part)), length, random_state(), tensors))
            start += len(part)
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
    """Whether a training can be stacked: adapters by PEFT and whole heads are all that it trains, attention is
    PyTorch's, and nothing is computed twice."""
    model = model_of(loop)
    linear, saved = _peft()
    ours = [module for module in model.modules() if isinstance(module, linear | saved)]
    known = {id(parameter) for module in ours for parameter in module.parameters()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    base = model.get_base_model() if hasattr(model, "get_base_model") else None
    return (
        base is not None
        and bool(ours)
        and all(id(parameter) in known for parameter in trained)
        and getattr(base.config, "_attn_implementation", None) == "sdpa"
        and not loop.fit.checkpointing
        and not loop.stepper.in_backward
    )


def share_base(of: Any, model: Any) -> None:
    """Let a model use another's frozen weights in place of its own, which are equal."""
    known = dict(of.named_parameters(remove_duplicate=False))
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        if not parameter.requires_grad:
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
            on_end(index, ends[index])

    first: Loop | None = None
    for index, training in enumerate(trainings):
        go_on(index, partial(next, training))
        if index in turns and stackable(turns[index].loop):
            if first is not None:  # at once, so that no more than two bases are there at a time
                share_base(model_of(first), model_of(turns[index].loop))
            first = first or turns[index].loop
    stack: Stack | None = None
    while turns:
        going, losses = dict(turns), {}
        turns.clear()
        stacked = [index for index, turn in going.items() if stackable(turn.loop)]
        if len(stacked) > 1:
            stack = _stack_of(stack, [going[index].loop for index in stacked])
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
    return [ends[index] for index in range(len(trainings))]


def _stack_of(stack: Stack | None, loops: Sequence[Loop]) -> Stack:
    if stack is None:
        return Stack(loops)
    for index in reversed(range(len(stack.loops))):
        if not any(stack.loops[index] is loop for loop in loops):
            stack.leave(index)
    return stack


def random_state(new: torch.Tensor | None = None) -> torch.Tensor:
    """The state of the generator that dropout draws from; `new` takes its place."""
    if torch.cuda.is_available():
        if new is not None:
            torch.cuda.set_rng_state(new)
        return torch.cuda.get_rng_state()
    if new is not None:
        torch.set_rng_state(new)
    return torch.get_rng_state()


def _above(path: str) -> list[str]:
    """The paths of the modules that a module lies in: of a.b.c a and a.b."""
    names = path.split(".")
    return [".".join(names[:count]) for count in range(1, len(names))]


def _peft() -> tuple[type, type]:
    from peft.tuners.lora import Linear
    from peft.utils.other import ModulesToSaveWrapper

    return Linear, ModulesToSaveWrapper
