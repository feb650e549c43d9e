"""What all runs of a study read, prepared once: rows cut into splits, and their encoded inputs. Child side.

Addressed by content: by the SHA-256 of the data files for rows, of the rows themselves for inputs, with all
else that they are a function of. So nothing here can be stale; what is damaged, or cannot be written, is made
anew. Rows are JSON and inputs are safetensors, memory-mapped: nothing that is read back can run code.
"""

from __future__ import annotations

import hashlib
import json
import sys
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from finetrial import files
from finetrial.plugins import Example, Feature, Splits
from finetrial.records import canonical_json, short_hash

ROLES = ("train", "validation", "test")
FORM = 1  # of what is written here


def splits(place: Path, of: Sequence[Any], make: Callable[[], Splits]) -> Splits:
    """A task's rows from `place`, or as `make` gives them, kept there for the next.

    `of`: all that they are a function of, as plain JSON. Rows that do not come back as they were (a plug-in may
    put anything in them) are not kept.
    """
    folder = place / f"rows-{short_hash([FORM, *of], 32)}"
    if folder.exists() and files.damage(folder) is None:
        try:
            return Splits(*(_rows(folder / f"{role}.json") for role in ROLES))
        except (OSError, ValueError, KeyError):  # gone, or of another form, this very moment
            pass
    made = make()
    texts = {f"{role}.json": _written(getattr(made, role)) for role in ROLES}
    if all(text is not None for text in texts.values()):
        _keep(folder, lambda there: [(there / name).write_text(text or "") for name, text in texts.items()])
    return made


def inputs(
    place: Path, of: Sequence[Any], examples: Sequence[Example], make: Callable[[], list[Feature]]
) -> list[Feature]:
    """Encoded inputs of some rows, likewise; `of` is all but the rows that they are a function of."""
    try:
        content = hashlib.sha256(canonical_json(list(examples)).encode()).hexdigest()
    except (TypeError, ValueError):  # rows that are no JSON
        return make()
    folder = place / f"inputs-{short_hash([FORM, *of, content], 32)}"
    if folder.exists() and files.damage(folder) is None:
        try:
            return _read(folder / "inputs.safetensors")
        except (OSError, ValueError, KeyError, SafetensorError):
            pass
    made = make()
    tensors = _flat(made)
    if tensors is not None:
        _keep(folder, lambda there: save_file(tensors, there / "inputs.safetensors"))
    return made


def _keep(folder: Path, write: Callable[[Path], Any]) -> None:
    """Commit a folder; whether that succeeds is no run's business."""
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        temporary.mkdir(parents=True)
        write(temporary)
        files.commit_folder(temporary, folder)
    except OSError as error:  # a full disk; or another process was first
        sys.stderr.write(f"{folder} is not kept: {error}\n")
    finally:
        files.discard(temporary)


# -- rows ------------------------------------------------------------------------------------------------------


def _written(rows: Sequence[Example]) -> str | None:
    """Rows as JSON, with the keys whose values are tuples; None if they would not come back as they are."""
    tuples = sorted(key for key, value in rows[0].items() if isinstance(value, tuple)) if rows else []
    try:
        text = json.dumps({"tuples": tuples, "rows": list(rows)}, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError):
        return None
    return text if _restored(text) == list(rows) else None


def _rows(path: Path) -> list[Example]:
    return _restored(path.read_text(encoding="utf-8"))


def _restored(text: str) -> list[Example]:
    content = json.loads(text)
    rows, tuples = content["rows"], content["tuples"]
    shared: dict[tuple[Any, ...], tuple[Any, ...]] = {}  # most rows have the same
    for row in rows:
        for key in tuples:
            value = tuple(row[key])
            row[key] = shared.setdefault(value, value)
    return rows


# -- inputs ----------------------------------------------------------------------------------------------------


def _flat(features: Sequence[Feature]) -> dict[str, torch.Tensor] | None:
    """Inputs as a few flat tensors; None if they hold what has no place there, or are none."""
    if not features:
        return None
    labels, extra = set(features[0].labels), set(features[0].extra)
    typed = features[0].token_type_ids is not None
    if any(
        set(each.labels) != labels or set(each.extra) != extra or (each.token_type_ids is not None) != typed
        for each in features
    ):
        return None
    lengths = [len(feature.input_ids) for feature in features]
    tensors = {
        "lengths": torch.tensor(lengths),
        "input_ids": torch.tensor([token for feature in features for token in feature.input_ids]),
        "row": torch.tensor([feature.row for feature in features]),
        "content": torch.tensor([feature.content for feature in features]),
    }
    tensors |= {f"label.{name}": torch.tensor([each.labels[name] for each in features]) for name in labels}
    if typed:
        types = [token for feature in features for token in feature.token_type_ids or ()]
        if len(types) != sum(lengths):
            return None
        tensors["token_type_ids"] = torch.tensor(types)
    for name in extra:
        arrays = [feature.extra[name] for feature in features]
        if not all(isinstance(array, np.ndarray) and array.dtype == np.int32 for array in arrays):
            return None
        if len({array.shape[1:] for array in arrays}) > 1:
            return None
        tensors[f"extra.{name}"] = torch.from_numpy(np.concatenate(arrays))
        tensors[f"extra_lengths.{name}"] = torch.tensor([len(array) for array in arrays])
    return tensors


def _read(path: Path) -> list[Feature]:
    with safe_open(path, framework="np") as stored:
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 - it is no mapping
    ids = _cut(tensors["input_ids"], tensors["lengths"])
    types = _cut(tensors["token_type_ids"], tensors["lengths"]) if "token_type_ids" in tensors else None
    labels = _named(tensors, "label.")
    columns = {name: column.tolist() for name, column in labels.items()}
    extra = {
        name: _cut(array, tensors[f"extra_lengths.{name}"]) for name, array in _named(tensors, "extra.").items()
    }
    rows, content = tensors["row"].tolist(), tensors["content"].tolist()
    return [
        Feature(
            input_ids=ids[place].tolist(), row=rows[place],
            labels={name: column[place] for name, column in columns.items()},
            token_type_ids=types[place].tolist() if types is not None else None,
            content=(content[place][0], content[place][1]),
            extra={name: parts[place] for name, parts in extra.items()},
        )
        for place in range(len(rows))
    ]  # fmt: skip


def _named(tensors: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def _cut(flat: np.ndarray, lengths: np.ndarray) -> list[np.ndarray]:
    return np.split(flat, np.cumsum(lengths)[:-1])
