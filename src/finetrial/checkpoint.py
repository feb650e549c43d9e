"""Checkpoints of a training run: weights, optimiser, schedule, random states, position; whole or not at all.

Tensors are written as safetensors and the rest as JSON: nothing that is read back can run code. A checkpoint
is a folder committed by its manifest; a damaged one is passed over for the newest that holds.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from finetrial import files


def trained_tensors(model: Any) -> dict[str, torch.Tensor]:
    """The parameters that are trained, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def save(
    folder: Path, step: int, model: Any, optimizer: Any, scheduler: Any, state: Mapping[str, Any]
) -> None:
    """Commit a checkpoint of this step, then drop the older ones. `state` is plain JSON."""
    temporary = _empty(folder / f".step-{step:08d}.tmp")
    save_file(_on_cpu(trained_tensors(model)), temporary / "weights.safetensors")
    tensors, scalars = _flatten(optimizer.state_dict())
    random_tensors, random_scalars = _random_states()
    save_file(_on_cpu({**tensors, **random_tensors}), temporary / "state.safetensors")
    content = {
        "step": step,
        "optimizer": scalars,
        "scheduler": {k: v for k, v in scheduler.state_dict().items() if _is_plain(v)},
        "random": random_scalars,
        "state": dict(state),
    }
    files.write_json(temporary / "state.json", content)
    files.commit_folder(temporary, folder / f"step-{step:08d}")
    best = state.get("best_step")
    keep = {f"step-{step:08d}", f"best-{best:08d}" if best is not None else ""}
    for path in folder.iterdir():
        if path.name not in keep:
            shutil.rmtree(path, ignore_errors=True)


def save_best(folder: Path, step: int, model: Any) -> None:
    """Commit the weights of the best evaluation so far."""
    temporary = _empty(folder / f".best-{step:08d}.tmp")
    save_file(_on_cpu(trained_tensors(model)), temporary / "weights.safetensors")
    files.commit_folder(temporary, folder / f"best-{step:08d}")


def load_best(folder: Path, step: int, model: Any) -> None:
    _load_weights(folder / f"best-{step:08d}" / "weights.safetensors", model)


def newest(folder: Path) -> Path | None:
    """The newest checkpoint whose manifest holds, and the manifest of the best weights it needs."""
    for path in sorted(folder.glob("step-*"), reverse=True):
        if files.damage(path) is not None:
            continue
        best = json.loads((path / "state.json").read_text())["state"].get("best_step")
        if best is None or files.damage(folder / f"best-{best:08d}") is None:
            return path
    return None


def restore(path: Path, model: Any, optimizer: Any, scheduler: Any) -> tuple[int, dict[str, Any]]:
    """Put everything back as it was; the step it was at and the caller's own state."""
    content = json.loads((path / "state.json").read_text())
    _load_weights(path / "weights.safetensors", model)
    tensors = load_file(path / "state.safetensors")
    optimizer.load_state_dict(_unflatten(tensors, content["optimizer"]))
    scheduler.load_state_dict(content["scheduler"])
    _restore_random(tensors, content["random"])
    return content["step"], content["state"]


def _empty(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def _on_cpu(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}


def _load_weights(path: Path, model: Any) -> None:
    saved = load_file(path)
    trained = trained_tensors(model)
    if saved.keys() != trained.keys():
        raise ValueError(f"{path} holds other tensors than the model trains")
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(saved[name])


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


def _unflatten(tensors: Mapping[str, torch.Tensor], scalars: Mapping[str, Any]) -> dict[str, Any]:
    state: dict[int, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".", 2)
            state.setdefault(int(index), {})[key] = tensor
    return {"state": state, "param_groups": scalars["param_groups"]}


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
    cuda = [tensors[name] for name in sorted(tensors) if name.startswith("random.cuda.")]
    if cuda and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(cuda)
    version, internal, gauss = scalars["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = scalars["numpy"]
    state = (name, np.array(keys, dtype=np.uint32), position, has_gauss, cached)
    np.random.set_state(state)  # noqa: NPY002 - restored, not drawn from
