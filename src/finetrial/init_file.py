"""Writing a commented study file for a model, tasks and methods; it is checked before it is kept.

Not for what the keys mean or may be: `study_file.py`.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic_core import to_jsonable_python

from finetrial import files, plugins
from finetrial.errors import DataError, ModelError, PluginError, Problem, StudyError
from finetrial.frozen import Frozen
from finetrial.records import ModelSource
from finetrial.sources import hidden_size, is_sentence_embedding
from finetrial.space import COMMON_SPACE, Choice, Fixed, Range, Space
from finetrial.study_file import parse_study

# A hidden size up to which a model is small, and learning rates for it; else the method's own hold.
SMALL = 512
SMALL_MODEL_RATES = {"full": Range(low=1e-5, high=1e-3, log=True), "lora": Range(low=1e-4, high=1e-2, log=True)}
RATES = "These suit models of a billion weights; a small\n# encoder wants rates ten to twenty times higher."
SMALL_RATES = "These suit a small model such as this one."

TEMPLATE = """\
# A finetrial study: what is compared, on what, and by which rules. `finetrial check {file}` looks it over,
# `finetrial run {file}` does it; run it again to go on after anything. Every key: docs/study-file.md
study: {name}

# A Hub name (with `revision: <commit>`), a folder (./model), or package:NAME/folder.
model: {model}

# What the methods are judged on. `data` is a Hub data set or your own files (JSON, JSONL, CSV, TSV, Parquet):
#   data: {{train: ./train.jsonl, validation: ./dev.jsonl, test: ./test.jsonl, columns: {{text: sentence}}}}
# Take the # off a line to change that value.
tasks:
{tasks}

# What is compared. Change a range or fix a value under `search:`; learning rates are the method's own and
# should be equally wide (two decades here). {rates}
methods:
{methods}

# Phase 1: the same number of trials for every method, on at most so many training rows (or `all`).
# `halving: 3` ends most of them after a ninth or a third of their steps; a ninth should be 30 steps or more.
search:
  trials: 15
  rows: all
  space: # searched for every method
{space}

# Phase 2: every method at its own optimum, once per seed. A verdict needs at least 4 seeds, better 5 or 10.
train: {{seeds: 5, rows: all}}

# Phase 3: what training did to the model.
measure: [drift]

# Declared before there are results; each becomes a verdict.
claims:{claims}

# Where and how; not part of the study's identity. `parallel: auto` fills the cores, as memory allows.
run: {{engine: local, parallel: 1, trial_limit: 2 h}}
"""


def write_study_file(path: Path, *, model: str, tasks: Sequence[str], methods: Sequence[str]) -> None:
    """Write a study file; an existing file is never overwritten.

    Raises:
        StudyError: the file exists, or the model, a task or a method is not one; nothing is written.
    """
    if path.exists():
        raise StudyError(str(path), [Problem("file", "exists already; choose another name with --output")])
    base = path.resolve().parent
    plugins.make_importable(base)
    problems: list[Problem] = []
    for kind, option, asked in (("tasks", "--task", tasks), ("methods", "--method", methods)):
        entries: dict[str, str] = {}
        for name in asked:
            if entries.setdefault(_entry(name), name) != name:
                problems.append(
                    Problem(
                        f"{option} {name}",
                        f"would be called {_entry(name)}, as {entries[_entry(name)]} is; leave it out here, "
                        f"and write it into the file under a name of its own: another: {{use: '{name}'}}",
                    )
                )
                continue
            try:
                unknown = _unknown(plugins.load(kind, name, base))
            except PluginError as error:
                problems.append(Problem(f"{option} {name}", str(error)))
                continue
            if unknown:
                keys = "".join(f", {key}: ..." for key in unknown)
                problems.append(
                    Problem(
                        f"{option} {name}",
                        f"needs {', '.join(unknown)}, which only you know; leave it out here, and write it "
                        f"into the file: {_entry(name)}: {{use: '{name}'{keys}}}",
                    )
                )
    if problems:
        raise StudyError(str(path), problems)
    once = {"tasks": list(dict.fromkeys(tasks)), "methods": list(dict.fromkeys(methods))}
    text = study_text(str(path), model=model, **once)
    parse_study(text, file=str(path), base=base)
    files.write_text(path, text)


def _unknown(plugin: Any) -> list[str]:
    """The parameters that have no default, but `data`, for which there is an example."""
    return [key for key, field in plugin.Params.model_fields.items() if field.is_required() and key != "data"]


def _entry(name: str) -> str:
    """What a plug-in is called in the file: one of the user's own by its module."""
    return name.partition(":")[0].rpartition(".")[2]


def _head(name: str) -> list[str]:
    return [f"  {_entry(name)}:"] + ([f"    use: '{name}'"] if ":" in name else [])


def _seen_from(file: str, model: str) -> str:
    """A model's folder, named relative to here, as the study file has to name it."""
    if not model.startswith("."):
        return model
    path = Path(os.path.relpath(model, Path(file).resolve().parent)).as_posix()
    return path if path.startswith(".") else f"./{path}"


def study_text(file: str, *, model: str, tasks: Sequence[str], methods: Sequence[str]) -> str:
    """The text of a commented study file."""
    others = [_entry(name) for name in methods if name != "full"] if "full" in methods else []
    claims = [f"{name} within 3% of full" for name in others]
    claims += [f"{name} drifts 20% less than full" for name in others]
    small = _is_small(model)
    return TEMPLATE.format(
        file=file,
        rates=SMALL_RATES if small else RATES,
        name=_study_name(model, [_entry(name) for name in tasks]),
        model=_model_text(model, _seen_from(file, model)),
        tasks="\n".join(_task_text(name) for name in tasks),
        methods="\n".join(_method_text(name, small=small) for name in methods),
        space="\n".join(f"    {key}: {_dimension_text(COMMON_SPACE[key])}" for key in COMMON_SPACE),
        claims="".join(f"\n  - {claim}" for claim in claims) or " []",
    )


def _study_name(model: str, tasks: Sequence[str]) -> str:
    """`<tasks>-<model>`, fit for a folder."""
    short = model.removeprefix("package:").split("/")[0] if model.startswith("package:") else Path(model).name
    name = re.sub(r"[^a-z0-9]+", "-", f"{'-'.join(tasks)}-{short}".lower()).strip("-")
    return name[:64].rstrip("-") or "study"


def _model_text(model: str, named: str) -> str:
    if not model.startswith(("package:", ".", "/", "~", "$")):
        return f"{{name: {_plain_or_quoted(model)}, revision: main}}  # put a commit here: main moves"
    with contextlib.suppress(ModelError, DataError):  # it need not be there yet
        if is_sentence_embedding(ModelSource(name=model), Path()):
            seen = "a sentence-embedding model has seen single texts only"
            return f"{{name: {_plain_or_quoted(named)}, token_type_ids: false}}  # {seen}"
    return _plain_or_quoted(named)


def _is_small(model: str) -> bool:
    with contextlib.suppress(ModelError, DataError):  # it need not be there yet
        return (hidden_size(ModelSource(name=model), Path()) or SMALL + 1) <= SMALL
    return False


def _plain_or_quoted(text: str) -> str:
    # JSON's quotes are YAML's, too.
    return text if re.fullmatch(r"[\w./$~][\w./:@+-]*[\w/]", text) else json.dumps(text, ensure_ascii=False)


def _task_text(name: str) -> str:
    """A task with its data spelt out, and its other parameters as comments with their defaults."""
    params: type[Frozen] = plugins.load("tasks", name).Params
    lines = []
    for key, field in params.model_fields.items():
        if key == "data":
            lines.insert(0, f"    data: {_data_text(None if field.is_required() else field.default)}")
        elif not field.is_required():
            default = to_jsonable_python(field.get_default(call_default_factory=True))
            lines.append(f"    # {key}: {json.dumps(default)}")
    return "\n".join([*_head(name), *lines])


def _data_text(source: Any) -> str:
    """Where the rows come from, as YAML; files to be named where there is no default."""
    if source is None:
        return "{train: ./train.jsonl, test: ./test.jsonl, columns: {text: text, label: label}}  # your own"
    given = {key: value for key, value in source.model_dump(mode="json").items() if value}
    return "{" + ", ".join(f"{key}: {_plain_or_quoted(str(given[key]))}" for key in given) + "}"


def _method_text(name: str, *, small: bool) -> str:
    """A method with its own search space spelt out; what all methods search is said once, under `search:`."""
    space: Space = dict(plugins.load("methods", name).space)
    if small and name in SMALL_MODEL_RATES:
        space["learning_rate"] = SMALL_MODEL_RATES[name]
    lines = [f"      {key}: {_dimension_text(space[key])}" for key in space]
    return "\n".join([*_head(name), "    search:", *lines])


def _dimension_text(dimension: Range | Choice | Fixed) -> str:
    match dimension:
        case Range():
            log = ", log: true" if dimension.log else ""
            return f"{{low: {dimension.low:g}, high: {dimension.high:g}{log}}}"
        case Choice():
            return f"[{', '.join(str(choice) for choice in dimension.choices)}]"
        case Fixed():
            return str(dimension.value)
