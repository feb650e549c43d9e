"""Checkpoints of a training run: weights, optimiser, schedule, random states, position; whole or not at all.

Tensors are written as safetensors and the rest as JSON: nothing that is read back can run code. A checkpoint
is a folder committed by its manifest; a damaged one is passed over for the newest that holds.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from finetrial import files
from finetrial.errors import HomeError
from finetrial.records import How

# In a run's checkpoint folder: the outputs of an evaluation that is not complete.
EVALUATION = "evaluation"


def trained_tensors(model: Any) -> dict[str, torch.Tensor]:
    """The parameters that are trained, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def weights_hash(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over names, shapes and bytes of tensors in order of name."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)  # not a copy
    return digest.hexdigest()


def rule(how: How, start: int = 0) -> Callable[[int], bool]:
    """When to write: every so many steps from `start`, or every so many seconds. It changes no result."""
    last = {"step": start, "time": time.monotonic()}

    def due(step: int) -> bool:
        by_steps = how.checkpoint_steps is not None and step - last["step"] >= how.checkpoint_steps
        by_time = (
            how.checkpoint_seconds is not None and time.monotonic() - last["time"] >= how.checkpoint_seconds
        )
        if by_steps or by_time:
            last.update(step=step, time=time.monotonic())
        return by_steps or by_time

    return due


class Taken(NamedTuple):
    """All that a checkpoint holds, on the CPU."""

    step: int
    weights: dict[str, torch.Tensor]
    tensors: dict[str, torch.Tensor]
    content: str  # JSON
    best_step: int | None


def take(
    step: int, model: Any, optimizer: Any, scheduler: Any, state: Mapping[str, Any], *, copy: bool = False
) -> Taken:
    """What a checkpoint of this step holds. `state` is plain JSON. `copy`: training on does not change it."""
    tensors, scalars = _flatten(optimizer.state_dict())
    random_tensors, random_scalars = _random_states()
    content = {
        "step": step,
        "optimizer": scalars,
        "scheduler": {k: v for k, v in scheduler.state_dict().items() if _is_plain(v)},
        "random": random_scalars,
        "state": dict(state),
    }
    weights, others = trained_tensors(model), {**tensors, **random_tensors}
    on_cpu = partial(_on_cpu, copy=copy)
    return Taken(step, on_cpu(weights), on_cpu(others), files.json_text(content), state.get("best_step"))


def save(folder: Path, taken: Taken) -> None:
    """Commit a checkpoint, then drop the older ones."""
    name = f"step-{taken.step:08d}"
    with committed(folder / name) as temporary:
        save_file(taken.weights, temporary / "weights.safetensors")
        save_file(taken.tensors, temporary / "state.safetensors")
        files.write_text(temporary / "state.json", taken.content)
    _drop_all_but(folder, {name, _best_name(taken.best_step) if taken.best_step is not None else ""})


class Writer:
    """Does what is to be written: at once, or (`beside`) in a thread, while training goes on.

    Beside the training is worth while where that is on a GPU. On a CPU it would take the cores that train, and
    a copy of all that is written. One thing is written at a time; what went wrong is raised by whoever waits.
    """

    def __init__(self, *, beside: bool):
        self.beside = beside
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint") if beside else None
        self._waiting: Future[None] | None = None

    def do(self, write: Callable[[], None]) -> None:
        """Write, once what came before is written."""
        self.wait()
        if self._thread is None:
            write()
        else:
            self._waiting = self._thread.submit(write)

    def wait(self) -> None:
        """Until all is written."""
        waiting, self._waiting = self._waiting, None
        if waiting is not None:
            waiting.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None:
                self.wait()
        finally:
            if self._thread is not None:
                self._thread.shutdown()
            if self._waiting is not None and (lost := self._waiting.exception()) is not None:
                sys.stderr.write(f"the last checkpoint could not be written: {lost}\n")


def save_best(folder: Path, step: int, model: Any) -> None:
    """Commit the weights of the best evaluation so far; of earlier ones keep what a checkpoint needs."""
    with committed(folder / _best_name(step)) as temporary:
        save_file(_on_cpu(trained_tensors(model)), temporary / "weights.safetensors")
    steps = list(folder.glob("step-*"))
    needed = {_best_name(best) for best in map(_best_step, steps) if best is not None}
    _drop_all_but(folder, {_best_name(step), *needed, *(path.name for path in steps)})


def load_best(folder: Path, step: int, model: Any) -> None:
    """Put the best weights in place.

    Raises:
        OSError: they are not what was written; nothing is loaded.
    """
    path = folder / _best_name(step)
    broken = files.damage(path)
    if broken is not None:
        raise OSError(f"the best weights in {path} are damaged: {broken}; run again to train them anew")
    _load_weights(path / "weights.safetensors", model)


def newest(folder: Path, *, with_best: bool) -> Path | None:
    """The newest checkpoint whose manifest holds, and (`with_best`) that of the best weights it needs.

    One that is passed over is named in the log.
    """
    for path in sorted(folder.glob("step-*"), reverse=True):
        broken = files.damage(path)
        best = _best_step(path) if broken is None and with_best else None
        if best is not None:
            broken = files.damage(folder / _best_name(best))
        if broken is None:
            return path
        sys.stderr.write(f"the checkpoint {path.name} is passed over: {broken}\n")
    return None


def is_of(path: Path, optimizer: Any) -> bool:
    """Whether a checkpoint's moments are of the tensors that an optimiser steps: torch takes any for them."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    with safe_open(path / "state.safetensors", framework="pt") as stored:
        for name in stored.keys():  # noqa: SIM118 - it is no mapping
            kind, _, rest = name.partition(".")
            index, _, key = rest.partition(".")
            if kind == "optimizer" and key == "exp_avg":
                count = math.prod(stored.get_slice(name).get_shape())
                if int(index) >= len(parameters) or count != parameters[int(index)].numel():
                    return False
    return True


def restore(path: Path, model: Any, optimizer: Any, scheduler: Any) -> tuple[int, dict[str, Any]]:
    """Put everything back as it was; the step it was at and the caller's own state."""
    content = json.loads((path / "state.json").read_text())
    _load_weights(path / "weights.safetensors", model)
    tensors = load_file(path / "state.safetensors")
    groups = _as_typed(content["optimizer"]["param_groups"], optimizer.state_dict()["param_groups"])
    optimizer.load_state_dict({"state": _unflatten(tensors), "param_groups": groups})
    scheduler.load_state_dict(content["scheduler"])
    _restore_random(tensors, content["random"])
    return content["step"], content["state"]


def _best_name(step: int) -> str:
    return f"best-{step:08d}"


def _best_step(checkpoint: Path) -> int | None:
    """The step of the best weights that it needs; None where it needs none, or does not say."""
    try:
        return json.loads((checkpoint / "state.json").read_text())["state"].get("best_step")
    except (OSError, ValueError, LookupError, AttributeError):  # it is damaged, and serves nobody
        return None


@contextmanager
def committed(final: Path) -> Iterator[Path]:
    """`files.committed` within a run's folder, the folder made and what a killed attempt left of it deleted."""
    if final.parent.is_symlink():  # older ones are deleted there
        raise HomeError(
            f"{final.parent} is a link that leads out of the run's folder; put a folder in its place"
        )
    for left_over in final.parent.glob(f".{final.name}.*tmp"):
        files.discard(left_over)
    with files.committed(final) as temporary:
        temporary.mkdir(parents=True)
        yield temporary


def _drop_all_but(folder: Path, keep: set[str]) -> None:
    """Nothing else belongs here: the worker holds the run's lock, so a left-over is a killed attempt's.

    But for an evaluation that was cut off: it is of a step that is still to come.
    """
    for path in folder.iterdir():
        if path.name not in keep and path.name != EVALUATION:
            files.discard(path)


def _on_cpu(tensors: Mapping[str, torch.Tensor], *, copy: bool = False) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().to("cpu", copy=copy).contiguous() for name, tensor in tensors.items()}


def _load_weights(path: Path, model: Any) -> None:
    """Tensor by tensor: a second copy of all of them would be the peak of a run's memory."""
    trained = trained_tensors(model)
    with safe_open(path, framework="pt") as stored, torch.no_grad():
        if set(stored.keys()) != trained.keys():
            raise ValueError(f"{path} holds other tensors than the model trains")
        for name, parameter in trained.items():
            parameter.copy_(stored.get_tensor(name))


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_plain(item) for item in value)
    if isinstance(value, dict):
        return all(_is_plain(item) for item in value.values())
    return value is None or isinstance(value, bool | int | float | str)


def _flatten(state: Mapping[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """An optimiser's state dict as tensors by name, and the plain rest."""
    tensors = {
        f"optimizer.{index}.{key}": value
        for index, values in state["state"].items()
        for key, value in values.items()
    }
    return tensors, {"param_groups": state["param_groups"]}


def _unflatten(tensors: Mapping[str, torch.Tensor]) -> dict[int, dict[str, Any]]:
    state: dict[int, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".", 2)
            state.setdefault(int(index), {})[key] = tensor
    return state


def _as_typed(read: Any, now: Any) -> Any:
    """JSON's lists as the tuples that they were, going by the value that is in place now."""
    if isinstance(now, dict):
        return {key: _as_typed(value, now.get(key)) for key, value in read.items()}
    if isinstance(now, list | tuple) and isinstance(read, list):
        values = [_as_typed(a, b) for a, b in zip(read, now, strict=True)]
        return tuple(values) if isinstance(now, tuple) else values
    return read


def _random_states() -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The states of all four generators: torch, CUDA, Python, and NumPy's global one (used by libraries)."""
    tensors = {"random.torch": torch.get_rng_state()}
    for index, state in enumerate(torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []):
        tensors[f"random.cuda.{index}"] = state
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()  # noqa: NPY002 - saved, not drawn from
    numpy_state = [name, np.asarray(keys).tolist(), int(position), int(has_gauss), float(cached)]
    return tensors, {"python": [version, list(internal), gauss], "numpy": numpy_state}


def _restore_random(tensors: Mapping[str, torch.Tensor], scalars: Mapping[str, Any]) -> None:
    torch.set_rng_state(tensors["random.torch"])
    for index in range(torch.cuda.device_count()):  # which may differ from where it was saved
        if f"random.cuda.{index}" in tensors:
            torch.cuda.set_rng_state(tensors[f"random.cuda.{index}"], index)
    version, internal, gauss = scalars["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = scalars["numpy"]
    state = (name, np.array(keys, dtype=np.uint32), position, has_gauss, cached)
    np.random.set_state(state)  # noqa: NPY002 - restored, not drawn from
