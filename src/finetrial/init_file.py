"""Writing a commented study file for a model, tasks and methods. What it writes is checked before it is kept."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from finetrial import files, plugins
from finetrial.errors import Problem, StudyError
from finetrial.space import Choice, Fixed, Range, Space
from finetrial.study_file import parse_study

TEMPLATE = """\
# A finetrial study: what is compared, on what, and by which rules. `finetrial check {file}` looks it over,
# `finetrial run {file}` does it; run it again to go on after anything. Every key: docs/study-file.md
study: {name}

# A Hub name (with `revision: <commit>`), a folder (./model), or package:NAME/folder.
model: {model}

# What the methods are judged on. Each task's own data goes under `data:`, for example
#   data: {{train: ./train.jsonl, validation: ./dev.jsonl, test: ./test.jsonl, columns: {{text: sentence}}}}
tasks:
{tasks}

# What is compared. Change a range or fix a value under `search:`; learning rates are the method's own and
# should be equally wide (two decades here).
methods:
{methods}

# Phase 1: the same number of trials for every method, on at most so many training rows (or `all`).
search: {{trials: 15, rows: all}}

# Phase 2: every method at its own optimum, once per seed. A verdict needs at least 4 seeds, better 5 or 10.
train: {{seeds: 5, rows: all}}

# Phase 3: what training did to the model.
measure: [drift]

# Declared before there are results; each becomes a verdict.
claims:
{claims}

# Where and how; not part of the study's identity.
run: {{engine: local, parallel: 1, trial_limit: 2 h}}
"""


def write_study_file(path: Path, *, model: str, tasks: Sequence[str], methods: Sequence[str]) -> None:
    """Write a study file; an existing file is never overwritten.

    Raises:
        StudyError: the file exists, or the model, a task or a method is not one; nothing is written.
    """
    if path.exists():
        raise StudyError(str(path), [Problem("file", "exists already; choose another name with --output")])
    text = study_text(str(path), model=model, tasks=tasks, methods=methods)
    parse_study(text, file=str(path), base=path.resolve().parent)
    files.write_text(path, text)


def study_text(file: str, *, model: str, tasks: Sequence[str], methods: Sequence[str]) -> str:
    """The text of a commented study file."""
    shown = model
    if "/" in model and not model.startswith(("package:", ".", "/", "~", "$")):
        shown = f"{{name: {model}, revision: main}}  # put a commit here: main moves"
    short = Path(model.removeprefix("package:")).parts[0 if model.startswith("package:") else -1]
    claims = [f"  - {m} within 3% of full" for m in methods if m != "full" and "full" in methods]
    claims += [f"  - {m} drifts 20% less than full" for m in methods if m != "full" and "full" in methods]
    return TEMPLATE.format(
        file=file,
        name=f"{'-'.join(tasks)}-{short}".lower().replace("_", "-")[:64],
        model=shown,
        tasks="\n".join(f"  {task}: {{}}" for task in tasks),
        methods="\n".join(_method_text(name) for name in methods),
        claims="\n".join(claims) or "  []",
    )


def _method_text(name: str) -> str:
    """A method with its own search space spelt out."""
    space: Space = plugins.load("methods", name).space
    lines = [f"      {key}: {_dimension_text(space[key])}" for key in space]
    return "\n".join([f"  {name}:", "    search:", *lines])


def _dimension_text(dimension: Range | Choice | Fixed) -> str:
    match dimension:
        case Range():
            log = ", log: true" if dimension.log else ""
            return f"{{low: {dimension.low:g}, high: {dimension.high:g}{log}}}"
        case Choice():
            return f"[{', '.join(str(choice) for choice in dimension.choices)}]"
        case Fixed():
            return str(dimension.value)
