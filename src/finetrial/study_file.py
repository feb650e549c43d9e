"""Reading a study file: YAML in, a complete `Study` out, or every mistake in one message.

Each section has one function here. Nothing is loaded beyond the plug-ins' parameter models: whether the
model and the data are there is `opening.py`'s question, asked here only of a file that has mistakes already.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from finetrial import plugins, study_entries
from finetrial.errors import PluginError, Problem, StudyError
from finetrial.paths import not_utf8
from finetrial.problems import Collector, guess, nearest, show
from finetrial.records import ClaimKind, EarlyStopping, LoopRules, MethodSpec, ModelSource
from finetrial.secrets_guard import held_by
from finetrial.sources import not_there
from finetrial.strict_yaml import MAX_BYTES, parse, parse_duration, parse_size
from finetrial.study import MOST_PARALLEL, Claim, RunRules, SearchRules, Study, TrainRules

SECTIONS = ("study", "model", "tasks", "methods", "search", "train", "measure", "claims", "run", "track")
REQUIRED = ("study", "model", "tasks", "methods")
DEFAULT_MEASURES = ["drift"]

NUMBER = r"(?P<percent>[0-9]+(?:\.[0-9]+)?)"
CLAIM_FORMS: dict[ClaimKind, re.Pattern[str]] = {
    "within": re.compile(rf"(?P<method>\S+) within {NUMBER} ?% of (?P<reference>\S+)", re.ASCII),
    "drifts_less": re.compile(
        rf"(?P<method>\S+) drifts (?:at least )?{NUMBER} ?% less than (?P<reference>\S+)", re.ASCII
    ),
    "forgets_less": re.compile(r"(?P<method>\S+) forgets less than (?P<reference>\S+)", re.ASCII),
}
CLAIM_HELP = "write 'lora within 3% of full', 'lora drifts 20% less than full' or 'lora forgets less than full'"
MEASURED_BY: dict[ClaimKind, str] = {"drifts_less": "drift", "forgets_less": "forgetting"}


def load_study(file: str | Path) -> Study:
    """The study that a file describes, with all defaults filled in.

    Plug-ins may be modules beside the file: its folder is put at the end of Python's search path.

    Raises:
        StudyError: the file cannot be read or has mistakes; it carries all of them.
    """
    path = Path(file)

    def wrong(message: str) -> StudyError:
        shown = os.fsencode(path).decode("utf-8", "backslashreplace")
        return StudyError(shown, [Problem("file", message)])

    try:
        with path.open("rb") as stream:
            # One byte more than allowed is enough to be refused; the rest need not be read.
            text = stream.read(MAX_BYTES + 1).decode("utf-8")
    except FileNotFoundError:
        raise wrong(f"not found; {_file_hint(path)}") from None
    except IsADirectoryError:
        raise wrong(f"is a folder; {_file_hint(path / 'study.yaml')}") from None
    except UnicodeDecodeError as error:
        where = f"byte {error.object[error.start]:#04x} at position {error.start}"
        raise wrong(f"is not UTF-8 text ({where}); save it as UTF-8") from None
    except OSError as error:
        raise wrong(f"cannot be read: {error.strerror}; check its path and permissions") from None
    for place in (path, path.resolve()):
        if (why := not_utf8(place)) is not None:
            raise wrong(why)
    return parse_study(text, file=str(file), base=path.resolve().parent, list_missing=True)


def _file_hint(path: Path) -> str:
    """Which study file may have been meant."""
    there = sorted(p.name for p in path.parent.glob("*.y*ml")) if path.parent.is_dir() else []
    near = guess(path.name, there) or (there[0] if len(there) == 1 else None)
    if near:
        return f"did you mean {path.parent / near}?"
    return "give the path of a study file; `finetrial init` writes one"


def parse_study(text: str, *, file: str, base: Path, list_missing: bool = False) -> Study:
    """As `load_study`, from text; relative paths in it are taken from `base`.

    `list_missing`: a text with mistakes is also told which model and data files are not there.
    """
    value, lines, problems = parse(text)
    if value is None:
        raise StudyError(file, problems)
    plugins.make_importable(base)
    collector = Collector(lines, problems, base)
    given = collector.mapping((), value, SECTIONS)
    fields: dict[str, Any] = {}
    if given is not None:
        for key in REQUIRED:
            if given.get(key) is None and (key,) not in collector.meant:
                collector.add((key,), "required and not given; add it (see docs/study-file.md)")
        search = given.get("search")
        shared = search.get("space") if isinstance(search, dict) else None
        methods = study_entries.methods(collector, given.get("methods"), shared)
        tasks = study_entries.tasks(collector, given.get("tasks"))
        measure = DEFAULT_MEASURES if given.get("measure") is None else given["measure"]
        fields = {
            "study": study_entries.study_name(collector, given.get("study")),
            "model": _model(collector, given.get("model")),
            "tasks": tasks,
            "methods": methods.specs,
            "spaces": methods.spaces,
            "search": _search(collector, search),
            "train": _train(collector, given.get("train")),
            "measure": study_entries.measures(collector, measure, tasks),
            "run": _run(collector, given.get("run")),
            "track": _track(collector, given.get("track")),
        }
        fields["claims"] = _claims(collector, given.get("claims"), methods.names, fields["measure"])
    _check_steps(collector, fields.get("methods", ()), fields.get("train"))
    _check_warm_start(collector, [m.name for m in fields.get("methods", ())], fields.get("search"))
    held = held_by(text)
    if held is not None:
        collector.add(
            (),
            f"it holds the value of {held}, and a study file is copied into the study's folder; leave it out",
        )
    problems = collector.problems
    if problems and list_missing:  # a run would be refused for it next
        problems += _not_there(collector, fields, base)
    if problems:
        raise StudyError(file, problems)
    return Study(**fields, file=file, base=str(base))


def _not_there(collector: Collector, fields: dict[str, Any], base: Path) -> list[Problem]:
    """What cannot be found of the model and data that are named without a mistake."""
    model = fields.get("model") if collector.is_sound("model") else None
    tasks = [task for task in fields.get("tasks", ()) if collector.is_sound("tasks", task.name)]
    whole = len(tasks) == len(fields.get("tasks", ()))  # else a measure may have taken over a task's mistake
    measure = fields.get("measure") or {} if whole else {}
    measures = {name: given for name, given in measure.items() if collector.is_sound("measure", name)}
    return not_there(model, tasks, measures, base)


def _model(collector: Collector, value: Any) -> ModelSource | None:
    if value is None:
        return None
    source = collector.build(("model",), ModelSource, {"name": value} if isinstance(value, str) else value)
    if source is None:
        return None
    name = source.name
    local = name.startswith((".", "/", "~", "$", "package:"))
    if local and source.revision is not None:
        collector.add(("model", "revision"), f"belongs to a Hub model, and {name} is local; leave it out")
    if name.startswith("package:"):
        package = name.removeprefix("package:").partition("/")[0]
        if not package.isidentifier():
            collector.add(("model",), f"{show(package)} is no package's name; write package:NAME/folder")
    elif local:
        pass
    elif collector.base is not None and name and (collector.base / name).is_dir():
        collector.add(("model",), f"{show(name)} is a folder here; write ./{name} (else it is a Hub name)")
    elif not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", name, re.ASCII):
        collector.add(("model",), f"{show(name)} is no Hub name; a folder starts with ./ or /")
    elif not source.revision:
        rule = "is a Hub name without a revision, so the model may change between runs"
        collector.add(("model",), f"{show(name)} {rule}; add `revision: <commit>`, or write ./ before a folder")
    return source


def _rows(value: Any) -> int | None:
    if value is None or value == "all":
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{show(value)} is not a number of rows; write a whole number above 0, or all")
    return value


def _section(
    collector: Collector, name: str, value: Any, keys: tuple[str, ...], convert: dict[str, Callable[[Any], Any]]
) -> dict[str, Any] | None:
    """A section's values under known keys, each through its converter if it has one."""
    if value is None:
        return {}
    given = collector.mapping((name,), value, keys)
    if given is None:
        return None
    for key in [key for key in given if key in convert]:
        before = len(collector.found)
        given[key] = collector.convert((name, key), convert[key], given[key])
        if len(collector.found) > before:
            del given[key]  # told already
    return given


def _search(collector: Collector, value: Any) -> SearchRules | None:
    keys = ("trials", "rows", "seed", "sampler", "startup", "halving", "warm_start", "early_stop", "space")
    given = _section(collector, "search", value, keys, {"rows": _rows})
    if given is None:
        return None
    given.pop("space", None)
    rules = collector.build(("search",), SearchRules, given)
    if rules and rules.startup_trials > rules.trials:
        collector.add(("search", "startup"), f"{rules.startup} is above the {rules.trials} trials; lower it")
    return rules


def _train(collector: Collector, value: Any) -> TrainRules | None:
    keys = (*LoopRules.model_fields, "seeds", "rows")
    given = _section(collector, "train", value, keys, {"rows": _rows})
    if given is None:
        return None
    if given.get("early_stopping") is not None:
        path = ("train", "early_stopping")
        given["early_stopping"] = collector.build(path, EarlyStopping, given["early_stopping"])
    return collector.build(("train",), TrainRules, given)


def _check_warm_start(collector: Collector, methods: Sequence[str], rules: SearchRules | None) -> None:
    if rules is None or rules.warm_start is None:
        return
    path = ("search", "warm_start")
    if methods and rules.warm_start not in methods:
        said = f"{show(rules.warm_start)} is no method of this study"
        collector.add(path, f"{said}; {nearest(rules.warm_start, methods)}")
    elif rules.sampler == "random" or rules.startup_trials == rules.trials:
        collector.add(path, "every trial is drawn at random, and none is told where to begin; leave it out")


def _check_steps(collector: Collector, methods: tuple[MethodSpec, ...], train: TrainRules | None) -> None:
    """A step in the backward pass cannot know the whole gradient's norm."""
    if train is None or train.clip != "global":
        return
    for method in methods:
        if not collector.is_sound("methods", method.name):
            continue  # its parameters are not there to be asked about
        try:
            stepping = plugins.stepping_of(method)
        except PluginError as error:
            collector.add(("methods", method.name), str(error))
            continue
        if stepping.in_backward:
            collector.add(
                ("methods", method.name),
                "a step in the backward pass cannot clip by the norm of the whole gradient, which is not known "
                "yet; add `clip: per_tensor` under `train:` (it holds for every method), or leave "
                "step_in_backward out",
            )


def _claims(collector: Collector, value: Any, methods: list[str], measure: dict[str, Any]) -> tuple[Claim, ...]:
    if value is None:
        reference = "full" if "full" in methods else None
        others = [name for name in methods if name != reference] if reference else []
        texts = [f"{name} within 3% of {reference}" for name in others]
        if "drift" in measure:
            texts += [f"{name} drifts 20% less than {reference}" for name in others]
        if "forgetting" in measure:
            texts += [f"{name} forgets less than {reference}" for name in others]
        value = texts
    if not isinstance(value, list):
        collector.add(("claims",), f"{show(value)} is not a list of claims; {CLAIM_HELP}")
        return ()
    claims: list[Claim] = []
    for index, text in enumerate(value):
        path = ("claims", index)
        shortened = " ".join(text.split()) if isinstance(text, str) else ""
        matches = {kind: form.fullmatch(shortened) for kind, form in CLAIM_FORMS.items()}
        kind, found = next(((kind, match) for kind, match in matches.items() if match), (None, None))
        if kind is None or found is None:
            collector.add(path, f"{show(text)} is not a claim that can be judged; {CLAIM_HELP}")
            continue
        method, reference, percent = (
            found["method"],
            found["reference"],
            float(found.groupdict().get("percent") or 0),
        )
        before = len(collector.found)
        for name in dict.fromkeys((method, reference)):
            if name not in methods:
                collector.add(path, f"{show(name)} is not a method of this study; {nearest(name, methods)}")
        if method == reference:
            collector.add(path, f"{show(method)} is compared with itself; name two methods")
        needed = MEASURED_BY.get(kind)
        if needed and needed not in measure:
            collector.add(path, f"{needed} is not measured; add `{needed}` under `measure:`")
        if "percent" in found.groupdict() and not 0 < percent < 100:
            collector.add(path, f"{percent:g} % is not between 0 and 100; change it")
        same = (kind, method, reference, percent / 100)
        if same in [(c.kind, c.method, c.reference, c.margin) for c in claims]:
            collector.add(path, f"{show(shortened)} is listed twice; keep one")
        if len(collector.found) == before:
            names = {"method": method, "reference": reference}
            claims.append(Claim(text=shortened, kind=kind, margin=percent / 100, **names))
    return tuple(claims)


# The file's keys -> the record's fields, which name their units.
RUN_NAMES = {"memory": "memory_bytes", "disk": "disk_bytes", "trial_limit": "limit_seconds"}
RUN_FIELDS = {
    **{field: key for key, field in RUN_NAMES.items()},
    "checkpoint_seconds": "checkpoint", "checkpoint_steps": "checkpoint",
}  # fmt: skip


def _checkpoint(value: Any) -> tuple[float | None, int | None]:
    found = re.fullmatch(r"([0-9]{1,9}) ?steps?", value) if isinstance(value, str) else None
    if found:
        return None, int(found[1])
    try:
        return parse_duration(value), None
    except ValueError as error:
        raise ValueError(f"{error}, or 100 steps") from None


def _parallel(value: Any) -> int | str:
    if value == "auto" or (
        isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MOST_PARALLEL
    ):
        return value
    raise ValueError(f"{show(value)} is not a number of runs; write 1 to {MOST_PARALLEL}, or auto")


def _run(collector: Collector, value: Any) -> RunRules | None:
    keys = ("engine", "parallel", "stack", "threads", "memory", "disk", "trial_limit", "attempts", "checkpoint",
            "micro_batch", "gradient_checkpointing", "log_steps", "keep_models")  # fmt: skip
    converters: dict[str, Callable[[Any], Any]] = {
        "memory": parse_size, "disk": parse_size, "trial_limit": parse_duration, "checkpoint": _checkpoint,
        "parallel": _parallel,
    }  # fmt: skip
    given = _section(collector, "run", value, keys, converters)
    if given is None:
        return None
    engine = given.get("engine", RunRules.model_fields["engine"].default)
    if study_entries.plugin_of(collector, "engines", engine, ("run", "engine")) is None:
        given.pop("engine", None)
    every = given.pop("checkpoint", None)
    if every is not None:
        given["checkpoint_seconds"], given["checkpoint_steps"] = every
    fields = {RUN_NAMES.get(key, key): given[key] for key in given}
    return collector.build(("run",), RunRules, fields, names=RUN_FIELDS)


def _track(collector: Collector, value: Any) -> tuple[str, ...]:
    value = [value] if isinstance(value, str) else value if value is not None else []
    if not isinstance(value, list):
        collector.add(("track",), f"{show(value)} is not a list of trackers; write [wandb]")
        return ()
    for index, name in enumerate(value):
        if name in value[:index]:
            collector.add(("track", index), f"{show(name)} is listed twice; keep one")
        else:
            study_entries.plugin_of(collector, "trackers", name, ("track", index))
    return tuple(value)
