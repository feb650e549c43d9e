"""Runs that do not count any more, moved to `damaged/`, so that they are done anew. Parent side.

What a run was to do stays in its place: what a trial's settings are was decided by the history of that time.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from finetrial import files
from finetrial.records import RunSpec
from finetrial.sealed import Damaged
from finetrial.store import Home, RunFolder


def damaged(home: Home) -> list[str]:
    """Set aside every run whose records do not hold; a sentence each.

    Trained models are looked through only when a probe was refused, for they may be many gigabytes.
    """
    said = []
    for folder in home.find(""):
        try:
            _check(folder)
        except Damaged as found:
            spec = folder.spec() if found.path != folder.spec_file else None
            place = _move(home, folder, spec)
            said.append(f"{found.path} is damaged: {found.why}; its run is set aside in {place}")
    refused = [f.spec() for f in home.find("probe.") if (why := f.failure()) and why.kind == "refused"]
    needed = {run_id for spec in refused for run_id in (spec.subject, spec.reference)}
    for folder in home.find("replicate."):
        if folder.path.name not in needed:
            continue
        spec, result = folder.spec(), folder.result()
        model = home.model_folder(spec)
        broken = files.damage(model) if result is not None and result.outcome == "done" else None
        if broken is not None:
            place = _move(home, folder, spec)
            if model.exists():
                model.rename(place / "model")
            said.append(f"{model} is damaged: {broken}; it and its run are set aside in {place}")
    return said


def _check(folder: RunFolder) -> None:
    """Raise Damaged where a record does not hold, or numbers by example by which halving compares trials."""
    record = folder.record()
    stated = record.result.examples_sha256 if record.result and record.spec.rung else None
    if stated is None:
        return
    if not folder.examples_file.is_file():
        raise Damaged(folder.examples_file, "it is not there")
    if files.sha256_file(folder.examples_file) != stated:
        raise Damaged(folder.examples_file, "it is not what its run wrote")


def without_model(home: Home, measured: Iterable[RunSpec], kept: Iterable[RunSpec]) -> list[str]:
    """Set aside those of these replicates that are done and have no model; a sentence each.

    `measured`: their models are still to be measured. `kept`: they are kept where there are any, so that one
    of another optimum's run in their place is not theirs.
    """
    said = []
    wanted = {spec.run_id: (spec, True) for spec in kept} | {spec.run_id: (spec, False) for spec in measured}
    for run_id, (spec, if_replaced) in wanted.items():
        folder, model = home.run(run_id), home.model_folder(spec)
        result = folder.result()
        there, mine = model.exists(), home.model_is_of(run_id, model)
        if result is None or result.outcome != "done" or mine or (if_replaced and not there):
            continue
        why = "holds another run's model" if there else "was not kept and is to be measured"
        said.append(f"{model} {why}: its run, set aside in {_move(home, folder, spec)}, is done anew")
    return said


def _move(home: Home, folder: RunFolder, spec: RunSpec | None) -> Path:
    """Move a run to `damaged/`, and leave its spec, if that holds; where it lies now.

    What says that it is done goes first, and its spec stays where it is: killed on the way, it is a run
    that is not done, with the settings that it had.
    """
    place = _free_place(home.damaged, folder.path.name)
    place.parent.mkdir(exist_ok=True)
    if spec is None:
        folder.path.rename(place)
        return place
    place.mkdir()
    others = {path for path in folder.path.iterdir() if path != folder.spec_file}
    first = [path for path in (folder.result_file, folder.failure_file) if path in others]
    for path in (*first, *sorted(others - set(first))):
        path.rename(place / path.name)
    shutil.copy(folder.spec_file, place)
    folder.create(spec)
    return place


def _free_place(folder: Path, name: str) -> Path:
    number = 1
    while (place := folder / f"{name}.{number}").exists():
        number += 1
    return place
