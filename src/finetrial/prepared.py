"""What all runs of a study read, prepared once: rows cut into splits, and their encoded inputs. Child side.

Named by the content of all that they are a function of: data files, rows, tokenizer, parameters, code. Rows are
JSON and inputs are safetensors: nothing that is read back can run code. What is damaged, cannot be written, or
would not come back as it was, is made anew by every run; no run fails for it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from finetrial import allocator, files
from finetrial.frozen import short_hash
from finetrial.plugins import Example, Feature, Splits

ROLES = tuple(field.name for field in fields(Splits))
FORM = 1  # of what is written here
# What a plug-in's rows, a full disk, or a folder that another process replaces, may raise.
FAULTS = (OSError, ValueError, TypeError, LookupError, RuntimeError, SafetensorError)

T = TypeVar("T")
_shared: dict[Path, Any] | None = None


@contextlib.contextmanager
def shared() -> Iterator[None]:
    """What is read here meanwhile is read once: several trainings of this process are given the same."""
    global _shared
    _shared = {}
    try:
        yield
    finally:
        _shared = None


def splits(
    place: Path | None, of: Sequence[Any], make: Callable[[], Splits], still: Callable[[], bool] = lambda: True
) -> Splits:
    """A task's rows from `place`, or as `make` gives them, kept there for the next.

    `of`: all that they are a function of, as plain JSON. Without a place they are made by every process, and
    so they are where, once they are made, `still` says that they were a function of more.
    """
    folder = (place or Path()) / f"rows-{short_hash([FORM, *of], 32)}"
    if place is None:
        return _once(folder, make)

    def write(there: Path, made: Splits) -> None:
        for role in ROLES:
            _write_rows(there / f"{role}.json", getattr(made, role))

    def read() -> Splits:
        return Splits(*(_rows(folder / f"{role}.json") for role in ROLES))

    return _once(folder, lambda: _kept(folder, read, make, write, still))


def inputs(
    place: Path, of: Sequence[Any], examples: Sequence[Example], make: Callable[[], list[Feature]],
    still: Callable[[], bool] = lambda: True,
) -> list[Feature]:  # fmt: skip
    """Encoded inputs of some rows, likewise; `of` is all but the rows that they are a function of."""
    try:
        folder = place / f"inputs-{short_hash([FORM, *of, _hash(examples)], 32)}"
    except FAULTS:  # rows that are no JSON
        return make()
    file = "inputs.safetensors"

    def write(there: Path, made: list[Feature]) -> None:
        _write_inputs(there / file, made)

    return _once(folder, lambda: _kept(folder, lambda: _read(folder / file), make, write, still))


def _once(key: Path, get: Callable[[], T]) -> T:
    """What is got under a key; where trainings share it, by the first of them."""
    if _shared is None:
        return get()
    if key not in _shared:
        _shared[key] = get()
    return _shared[key]


def _kept(
    folder: Path, read: Callable[[], T], make: Callable[[], T], write: Callable[[Path, T], None],
    still: Callable[[], bool],
) -> T:  # fmt: skip
    """What a folder holds, or, if that is nothing, what is made and kept there.

    What was made is read again: making takes more memory, which would count as this run's and no other's.
    """
    found = _look(folder, read)
    if found is not None:
        return found
    made = make()
    if not still() or not _keep(folder, write, made):
        return made
    del made
    allocator.return_freed()
    found = _look(folder, read)
    return make() if found is None else found


def _hash(rows: Iterable[Example]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, allow_nan=False).encode() + b"\n")
    return digest.hexdigest()


def _look(folder: Path, read: Callable[[], T]) -> T | None:
    """What a folder holds; None if it is not there, damaged, or gone this very moment."""
    try:
        return read() if files.damage(folder) is None else None
    except FAULTS:
        return None


def _keep(folder: Path, write: Callable[[Path, T], None], made: T) -> bool:
    """Commit a folder; whether that succeeds is no run's business."""
    try:
        with files.committed(folder) as temporary:
            temporary.mkdir(parents=True)
            write(temporary, made)
    except FAULTS as error:
        sys.stderr.write(f"{folder} is not kept: {error}\n")
        return False
    return True


def _same(one: Any, other: Any) -> bool:
    """Whether two values are alike, and all that is in them of the same types."""
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other)
    return bool(one == other)


# -- rows ------------------------------------------------------------------------------------------------------


def _write_rows(path: Path, rows: Sequence[Example]) -> None:
    """Rows as JSON, with the keys whose values are tuples; ValueError if they would come back as others."""
    tuples = sorted(key for key, value in rows[0].items() if isinstance(value, tuple)) if rows else []
    text = json.dumps({"tuples": tuples, "rows": list(rows)}, ensure_ascii=False, allow_nan=False)
    path.write_text(text, encoding="utf-8")
    if not _same(_rows(path), list(rows)):
        raise ValueError("its rows hold more than plain JSON")


def _rows(path: Path) -> list[Example]:
    content = json.loads(path.read_text(encoding="utf-8"))
    rows, tuples = content["rows"], content["tuples"]
    shared: dict[str, tuple[Any, ...]] = {}  # most rows have the same
    for row in rows:
        for key in tuples:
            row[key] = shared.setdefault(repr(row[key]), tuple(row[key]))
    return rows


# -- inputs ----------------------------------------------------------------------------------------------------


def _write_inputs(path: Path, features: Sequence[Feature]) -> None:
    """Inputs as a few flat tensors. ValueError if they would not come back as they are."""
    first = features[0]
    tensors = {
        "lengths": _whole(len(feature.input_ids) for feature in features),
        "input_ids": _whole(chain.from_iterable(feature.input_ids for feature in features)),
        "row": _whole(feature.row for feature in features),
        "content": _whole(chain.from_iterable(feature.content for feature in features)),
    }
    tensors |= {f"label.{name}": _whole(each.labels[name] for each in features) for name in first.labels}
    if first.token_type_ids is not None:
        tensors["token_type_ids"] = _whole(chain.from_iterable(each.token_type_ids or () for each in features))
    for name in first.extra:
        arrays = [feature.extra[name] for feature in features]
        tensors[f"extra.{name}"] = torch.from_numpy(np.concatenate(arrays))
        tensors[f"extra_lengths.{name}"] = _whole(map(len, arrays))
    save_file(tensors, path)
    if not _same([vars(each) for each in _read(path)], [vars(each) for each in features]):
        raise ValueError("its inputs hold more than whole numbers and arrays of one kind")


def _whole(numbers: Iterable[int]) -> torch.Tensor:
    """Whole numbers in the fewest bytes that hold them all."""
    values = np.fromiter(numbers, dtype=np.int64)
    for kind in (np.int8, np.int16, np.int32):
        if np.iinfo(kind).min <= values.min() and values.max() <= np.iinfo(kind).max:
            return torch.from_numpy(values.astype(kind))
    return torch.from_numpy(values)


def _read(path: Path) -> list[Feature]:
    with safe_open(path, framework="np") as stored:
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 - it is no mapping
    ids = _cut(tensors["input_ids"], tensors["lengths"])
    types = _cut(tensors["token_type_ids"], tensors["lengths"]) if "token_type_ids" in tensors else None
    labels = {name: column.tolist() for name, column in _named(tensors, "label.").items()}
    extra = {
        name: _cut(array, tensors[f"extra_lengths.{name}"]) for name, array in _named(tensors, "extra.").items()
    }
    rows, content = tensors["row"].tolist(), tensors["content"].reshape(-1, 2).tolist()
    return [
        Feature(
            input_ids=ids[place].tolist(), row=rows[place],
            labels={name: column[place] for name, column in labels.items()},
            token_type_ids=types[place].tolist() if types is not None else None,
            content=(content[place][0], content[place][1]),
            extra={name: parts[place] for name, parts in extra.items()},
        )
        for place in range(len(rows))
    ]  # fmt: skip


def _named(tensors: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def _cut(flat: np.ndarray, lengths: np.ndarray) -> list[np.ndarray]:
    return np.split(flat, np.cumsum(lengths, dtype=np.int64)[:-1])
