"""What a run will take: the peak of its memory by parts, counted before anything is computed. Child side.

One training step is walked over tensors without content, and the storages that are alive at once are added
up: exact for any architecture and method, in about a second. What the process holds besides (interpreter,
libraries, rows) is measured. Which micro-batch a run gets from this is `fit.py`'s.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from finetrial import trimmed
from finetrial.batching import model_inputs

# Of a table of which few rows are trained: the parameter of a model of shapes that stands for those.
STAND_IN = "used_rows"

Inputs = Mapping[str, torch.Tensor]
Autocast = Callable[[], contextlib.AbstractContextManager[Any]]


class Step(NamedTuple):
    """Bytes of tensors that are alive at the peak of a training step, by what they are for."""

    weights: int
    resident: int  # of the weights: without frozen tables of which few rows are ever read (files are mapped)
    gradients: int
    optimizer: int  # its state, from the first step on
    activations: int  # with whatever else is alive at the peak; gradients may not all be there by then


class Stated(NamedTuple):
    """An optimiser that is not walked but says what it takes, in bytes."""

    state: int
    temporary: int  # beside the state, while it steps


class LiveBytes(TorchDispatchMode):
    """Adds up the storages of all tensors that operations make, for as long as something holds them."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._held: dict[int, int] = {}

    def add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._held:
            return
        self._held[key] = storage.nbytes()
        self.now += self._held[key]
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.now -= self._held.pop(key, 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for each in tree_iter(made):
            if isinstance(each, torch.Tensor):
                self.add(each)
        return made


def training_step(
    model: torch.nn.Module,
    inputs: Inputs,
    losses_of: Callable[[Any, Inputs], torch.Tensor],
    optimizer_of: Callable[[list[torch.nn.Parameter]], Any],
    *,
    split: bool = False,
    in_backward: bool = False,
    autocast: Autocast = contextlib.nullcontext,
    device: str = "cpu",
    mapped: bool = True,
) -> Step:
    """Bytes of a training step from the second one on, when the optimiser's state is there.

    `model` is made for this: its tensors, which may be on the meta device, are replaced by ones without content
    on `device`; it may be given again. `optimizer_of` gives a torch optimiser, or what that takes: bytes of
    state and of temporaries. `split`: the effective batch is more than one micro-batch, so that gradients lie
    beside the activations. `in_backward`: a gradient is freed as soon as it is whole. Gradient checkpointing
    counts if the model has it switched on. `mapped`: tables that are not trained lie in a file. A loss that
    depends on values is replaced by the sum of the model's outputs.
    """
    with trimmed.told(inputs.get("attention_mask")), FakeTensorMode() as fakes, LiveBytes() as live:
        for tensor in _without_content(model, fakes, device):
            live.add(tensor)
        weights = live.now
        resident = weights - (left_on_disk(model) if mapped else 0)
        batch = {name: _fake(tensor, fakes, device) for name, tensor in inputs.items()}
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = optimizer_of(trained)
        model.train()
        if split:
            _forward_and_backward(model, batch, losses_of, autocast)
        if in_backward:
            for parameter in trained:
                parameter.register_post_accumulate_grad_hook(_free)
        _forward_and_backward(model, batch, losses_of, autocast)
        backward_peak, live.peak = live.peak, live.now
        gradients = sum(p.grad.untyped_storage().nbytes() for p in trained if p.grad is not None)
        if isinstance(optimizer, Stated):
            state = optimizer.state
            peak = max(backward_peak, live.now + optimizer.temporary) + state
        else:
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            before = live.now
            optimizer.step()
            state = live.now - before
            peak = max(backward_peak + state, live.peak)
    return Step(
        weights,
        resident if device == "cpu" else weights,
        gradients,
        state,
        max(0, peak - weights - gradients - state),
    )


def _free(parameter: torch.Tensor) -> None:
    parameter.grad = None


def evaluation_batch(
    model: torch.nn.Module, inputs: Inputs, *, autocast: Autocast = contextlib.nullcontext, device: str = "cpu"
) -> int:
    """Bytes of activations of one forward pass without gradients; the arguments are as for a training step."""
    with FakeTensorMode() as fakes, LiveBytes() as live, torch.no_grad():
        for tensor in _without_content(model, fakes, device):
            live.add(tensor)
        weights = live.now
        batch = {name: _fake(tensor, fakes, device) for name, tensor in inputs.items()}
        model.eval()
        with autocast():
            model(**model_inputs(batch))
    return live.peak - weights


def _forward_and_backward(model: Any, batch: Inputs, losses_of: Any, autocast: Autocast) -> None:
    with autocast():
        outputs = model(**model_inputs(batch))
    try:
        loss = losses_of(outputs, batch).sum()
    except DataDependentOutputException:
        floats = [each for each in outputs.values() if torch.is_tensor(each) and each.is_floating_point()]
        loss = torch.stack([each.float().sum() for each in floats]).sum()
    del outputs
    loss.backward()
    for _, stand_in in _stand_ins(model):  # no pass reaches it
        if stand_in.grad is None:
            stand_in.grad = torch.empty_like(stand_in)


def left_on_disk(model: torch.nn.Module) -> int:
    """Bytes of weights that a CPU reads row by row from a mapped file: tables that are not trained."""
    return sum(table.numel() * table.element_size() for table in _frozen_tables(model))


def _frozen_tables(model: torch.nn.Module) -> list[torch.Tensor]:
    """The weights of embeddings that are not trained and serve nothing else, each once."""
    tables = [module.weight for module in model.modules() if isinstance(module, torch.nn.Embedding)]
    others = {
        id(p) for m in model.modules() if not isinstance(m, torch.nn.Embedding) for p in m._parameters.values()
    }
    others |= {id(module.weight) for module, _ in _stand_ins(model)}  # written to, whatever its flag says
    found = {id(table): table for table in tables if not table.requires_grad and id(table) not in others}
    return list(found.values())


def _stand_ins(model: torch.nn.Module) -> list[tuple[torch.nn.Embedding, torch.nn.Parameter]]:
    """The tables of which few rows are trained, and the parameters that stand for those (`tables.py`)."""
    found = [(m, m._parameters.get(STAND_IN)) for m in model.modules() if isinstance(m, torch.nn.Embedding)]
    return [(module, stand_in) for module, stand_in in found if stand_in is not None]


def _without_content(model: torch.nn.Module, fakes: Any, device: str) -> list[torch.Tensor]:
    """Replace every tensor of a model; tied ones stay tied."""
    made: dict[int, torch.Tensor] = {}
    for module in model.modules():
        holders: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for holder in holders:
            for name, tensor in holder.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    fake = _fake(tensor, fakes, device)
                    if isinstance(tensor, torch.nn.Parameter):
                        fake = torch.nn.Parameter(fake, requires_grad=tensor.requires_grad)
                    made[id(tensor)] = fake
                holder[name] = made[id(tensor)]
    return list(made.values())


def _fake(tensor: torch.Tensor, fakes: Any, device: str) -> torch.Tensor:
    with fakes:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
