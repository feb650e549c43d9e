"""Whether what a run reads is still what its spec holds the SHA-256 of. Child side.

A study's files are hashed when a command begins, and runs start for days after that: each sees for itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from finetrial.errors import DataError
from finetrial.records import RunSpec
from finetrial.sources import data_inputs, measure_inputs, model_sha256
from finetrial.store import Home


def inputs(spec: RunSpec, home: Home) -> dict[str, str]:
    """Input -> SHA-256 of what is there now, named as in the spec; of the model only if the spec has it.

    Raises:
        DataError: a file is not there, or not what the spec says.
    """
    base = Path(spec.how.base)
    found = data_inputs(spec.task, base)
    for name, measure in spec.measures.items():
        if any(each.startswith(f"measure.{name}/") for each in spec.inputs):
            found |= measure_inputs(name, measure, base)
    compare(spec, home, spec.inputs, found)
    model(spec, home)
    return found


def model(spec: RunSpec, home: Home) -> None:
    """See that the model is the spec's; its files are read only if something about them has changed.

    Raises:
        DataError: it is not.
    """
    if "model" not in spec.inputs:
        return
    base, cache = Path(spec.how.base), home.cache
    found = model_sha256(spec.model, base, cache)
    if found != spec.inputs["model"]:  # what was remembered may be damaged
        found = model_sha256(spec.model, base)
    compare(spec, home, spec.inputs, {"model": found})


def compare(spec: RunSpec, home: Home, before: Mapping[str, str], found: Mapping[str, str]) -> None:
    """Raise a DataError for the first input that is in both and differs."""
    changed = next((name for name, sha256 in found.items() if before.get(name, sha256) != sha256), None)
    if changed is None:
        return
    what = f"the model {spec.model.name}" if changed == "model" else f"{changed} of {spec.task.name}"
    raise DataError(
        f"{what} is not what it was when {home.path} was begun (its SHA-256 changed while the study ran); put "
        f"the old content back and run the same command again, or name another folder with --home"
    )
