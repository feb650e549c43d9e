"""Reading a study file: YAML in, a complete `Study` out, or every mistake in one message.

Each section has one function here. Nothing is loaded beyond the plug-ins' parameter models: whether the
model and the data exist is `finetrial check`'s question.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from finetrial import plugins
from finetrial.errors import PluginError, Problem, StudyError
from finetrial.problems import Collector, nearest, show
from finetrial.records import EarlyStopping, LoopRules, MethodSpec, ModelSource, TaskSpec
from finetrial.space import COMMON_SPACE, Dimension, Range, out_of_bounds, parse_dimension
from finetrial.strict_yaml import parse, parse_duration, parse_size
from finetrial.study import NAME, Claim, RunRules, SearchRules, Study, TrainRules

SECTIONS = ("study", "model", "tasks", "methods", "search", "train", "measure", "claims", "run", "track")
REQUIRED = ("study", "model", "tasks", "methods")
DEFAULT_MEASURES = ("drift",)

CLAIM_FORMS = {
    "within": re.compile(r"(?P<method>\S+) within (?P<percent>[0-9.]+) ?% of (?P<reference>\S+)"),
    "drifts_less": re.compile(
        r"(?P<method>\S+) drifts (?:at least )?(?P<percent>[0-9.]+) ?% less than (?P<reference>\S+)"
    ),
}
CLAIM_HELP = "write 'lora within 3% of full' or 'lora drifts 20% less than full'"


def load_study(file: str | Path) -> Study:
    """The study that a file describes, with all defaults filled in.

    Raises:
        StudyError: the file cannot be read or has mistakes; it carries all of them.
    """
    path = Path(file)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        hint = "give the path of a study file; `finetrial init` writes one"
        raise StudyError(str(file), [Problem("file", f"not found; {hint}")]) from None
    except (OSError, UnicodeDecodeError) as error:
        raise StudyError(str(file), [Problem("file", f"cannot be read as text: {error}")]) from None
    return parse_study(text, file=str(file), base=path.resolve().parent)


def parse_study(text: str, *, file: str, base: Path) -> Study:
    """As `load_study`, from text; relative paths in it are taken from `base`."""
    value, lines, problems = parse(text)
    if value is None:
        raise StudyError(file, problems)
    collector = Collector(lines, problems)
    given = collector.mapping((), value, SECTIONS)
    fields: dict[str, Any] = {}
    if given is not None:
        for key in REQUIRED:
            if given.get(key) is None:
                collector.add((key,), "required and not given; add it (see docs/study-file.md)")
        fields = {
            "study": _name(collector, ("study",), given.get("study")),
            "model": _model(collector, given.get("model")),
            "tasks": _tasks(collector, given.get("tasks")),
            **_methods(collector, given.get("methods"), given.get("search")),
            "search": _search(collector, given.get("search")),
            "train": _train(collector, given.get("train")),
            "measure": _measure(collector, given.get("measure")),
            "run": _run(collector, given.get("run")),
            "track": _track(collector, given.get("track")),
        }
        methods = [method.name for method in fields["methods"] or ()]
        measure = fields["measure"] or {}
        fields["claims"] = _claims(collector, given.get("claims"), methods, measure)
    if collector.problems:
        raise StudyError(file, collector.problems)
    return Study(**fields, file=file, base=str(base))


def _name(collector: Collector, path: tuple[str | int, ...], value: Any) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str) or not NAME.fullmatch(value) or ".." in value:
        rule = "a name is 1-64 letters, digits, '.', '_' or '-', starts with a letter or digit, has no '..'"
        collector.add(path, f"{show(value)}: {rule}; it becomes a folder's name")
        return None
    return value


def _model(collector: Collector, value: Any) -> ModelSource | None:
    path = ("model",)
    if value is None:
        return None
    source = collector.build(path, ModelSource, {"name": value} if isinstance(value, str) else value)
    if source is None:
        return None
    name = source.name
    if name.startswith("package:"):
        if "/" not in name:
            collector.add(path, f"{name!r} names no folder; write package:NAME/folder")
    elif not name.startswith((".", "/", "~", "$")):
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", name):
            collector.add(path, f"{name!r} is no Hub name; a folder starts with ./ or /")
        elif source.revision is None:
            rule = "a Hub model needs a revision (a commit), or it may change between runs"
            collector.add(path, f"{rule}; add `revision:`, or start a folder's path with ./")
    return source


def _entries(collector: Collector, path: tuple[str, ...], value: Any) -> dict[str, Any]:
    """`[a, b]`, `[a, {b: {...}}]` or `{a: ..., b: ...}` as name -> parameters."""
    entries: dict[str, Any] = {}
    items = value if isinstance(value, list) else [value]
    for index, item in enumerate(items):
        where = (*path, index) if isinstance(value, list) else path
        pairs = {item: None} if isinstance(item, str) else item
        if not isinstance(pairs, dict) or not pairs:
            collector.add(where, f"{show(item)} is not a name or a mapping; write [a, b] or a: {{...}}")
            continue
        for name, params in pairs.items():
            if name in entries:
                collector.add(where, f"{name!r} is listed twice; name one of them otherwise, with `use:`")
            elif _name(collector, (*where, name) if isinstance(item, dict) else where, name):
                if params is not None and not isinstance(params, dict):
                    collector.add((*where, name), f"{show(params)} is not a mapping; write key: value pairs")
                    params = None
                entries[name] = (params or {}, (*where, name) if isinstance(item, dict) else where)
    return entries


def _plugin(collector: Collector, kind: Any, use: Any, path: tuple[str | int, ...]) -> Any:
    try:
        if not isinstance(use, str):
            raise PluginError(f"{show(use)} is not a plug-in's name; write a name or 'module:object'")
        return plugins.load(kind, use)
    except PluginError as error:
        collector.add(path, str(error))
        return None


def _params(collector: Collector, model: type[BaseModel], path: Any, given: dict[str, Any]) -> dict[str, Any]:
    built = collector.build(path, model, given)
    return built.model_dump(mode="json") if built is not None else {}


def _tasks(collector: Collector, value: Any) -> tuple[TaskSpec, ...]:
    specs = []
    for name, (given, path) in _entries(collector, ("tasks",), value).items() if value else ():
        use = given.get("use", name)
        plugin = _plugin(collector, "tasks", use, path)
        if plugin is not None:
            rest = {key: given[key] for key in given if key != "use"}
            specs.append(TaskSpec(name=name, use=use, params=_params(collector, plugin.Params, path, rest)))
    return tuple(specs)


def _methods(collector: Collector, value: Any, search: Any) -> dict[str, Any]:
    shared = search.get("space") or {} if isinstance(search, dict) else {}
    specs, spaces = [], {}
    for name, (given, path) in _entries(collector, ("methods",), value).items() if value else ():
        use = given.get("use", name)
        plugin = _plugin(collector, "methods", use, path)
        if plugin is None:
            continue
        rest = {key: given[key] for key in given if key not in ("use", "search")}
        specs.append(MethodSpec(name=name, use=use, params=_params(collector, plugin.Params, path, rest)))
        space = {**COMMON_SPACE, **plugin.space}
        _override(collector, space, shared, ("search", "space"), ignore_unknown=True)
        _override(collector, space, given.get("search") or {}, (*path, "search"))
        spaces[name] = {key: space[key] for key in sorted(space)}
    if isinstance(shared, dict) and spaces:
        known = sorted({key for space in spaces.values() for key in space})
        for key in shared:
            if key not in known:
                collector.add(("search", "space", key), f"no method has this setting; {nearest(key, known)}")
    return {"methods": tuple(specs), "spaces": spaces}


def _override(
    collector: Collector,
    space: dict[str, Dimension],
    changes: Any,
    path: tuple[str | int, ...],
    *,
    ignore_unknown: bool = False,
) -> None:
    if not isinstance(changes, dict):
        collector.add(path, f"{show(changes)} is not a mapping; write setting: range, choices or value")
        return
    for key, value in changes.items():
        if key not in space:
            if not ignore_unknown:
                collector.add((*path, key), f"unknown setting; {nearest(key, sorted(space))}")
            continue
        dimension = collector.convert((*path, key), parse_dimension, value)
        if dimension is None:
            continue
        before = space[key]
        if isinstance(dimension, Range) and isinstance(before, Range) and "log" not in value:
            # A rate's range stays spaced by ratio unless the file says otherwise.
            dimension = collector.convert((*path, key), parse_dimension, {**value, "log": before.log})
            if dimension is None:
                continue
        wrong = out_of_bounds(key, dimension)
        if wrong:
            collector.add((*path, key), wrong)
        else:
            space[key] = dimension


def _rows(value: Any) -> int | None:
    if value is None or value == "all":
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{value!r} is not a number of rows; write a whole number above 0, or all")
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
    for key in given:
        if key in convert:
            given[key] = collector.convert((name, key), convert[key], given[key])
    return given


def _search(collector: Collector, value: Any) -> SearchRules | None:
    keys = ("trials", "rows", "seed", "sampler", "startup", "space")
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


def _measure(collector: Collector, value: Any) -> dict[str, dict[str, Any]]:
    value = list(DEFAULT_MEASURES) if value is None else value
    measures = {}
    for name, (given, path) in _entries(collector, ("measure",), value).items() if value else ():
        plugin = _plugin(collector, "probes", given.get("use", name), path)
        if plugin is not None:
            rest = {key: given[key] for key in given if key != "use"}
            params = _params(collector, plugin.Params, path, rest)
            measures[name] = {"use": given.get("use", name), "params": params}
    return measures


def _claims(collector: Collector, value: Any, methods: list[str], measure: dict[str, Any]) -> tuple[Claim, ...]:
    if value is None:
        reference = "full" if "full" in methods else None
        others = [name for name in methods if name != reference] if reference else []
        texts = [f"{name} within 3% of {reference}" for name in others]
        if "drift" in measure:
            texts += [f"{name} drifts 20% less than {reference}" for name in others]
        value = texts
    if not isinstance(value, list):
        collector.add(("claims",), f"{show(value)} is not a list of claims; {CLAIM_HELP}")
        return ()
    claims = []
    for index, text in enumerate(value):
        path = ("claims", index)
        for kind, form in CLAIM_FORMS.items():
            found = form.fullmatch(" ".join(text.split())) if isinstance(text, str) else None
            if not found:
                continue
            wrong = [found[part] for part in ("method", "reference") if found[part] not in methods]
            for name in wrong:
                collector.add(path, f"{name!r} is not a method of this study; {nearest(name, methods)}")
            if found["method"] == found["reference"]:
                collector.add(path, f"{found['method']!r} is compared with itself; name two methods")
                wrong.append(found["method"])
            if kind == "drifts_less" and "drift" not in measure:
                collector.add(path, "needs `drift` under `measure:`; add it")
            margin = collector.convert(path, float, found["percent"])
            if margin is not None and not 0 < margin < 100:
                collector.add(path, f"{margin:g} % is not between 0 and 100; change it")
            elif not wrong and margin is not None:
                names = {"method": found["method"], "reference": found["reference"]}
                claims.append(Claim(text=" ".join(text.split()), kind=kind, margin=margin / 100, **names))
            break
        else:
            collector.add(path, f"{show(text)} is not a claim this version can judge; {CLAIM_HELP}")
    return tuple(claims)


def _checkpoint(value: Any) -> tuple[float | None, int | None]:
    found = re.fullmatch(r"(\d+) steps?", value) if isinstance(value, str) else None
    return (None, int(found[1])) if found else (parse_duration(value), None)


def _run(collector: Collector, value: Any) -> RunRules | None:
    keys = ("engine", "parallel", "threads", "memory", "trial_limit", "attempts", "checkpoint",
            "micro_batch", "log_steps")  # fmt: skip
    converters = {"memory": parse_size, "trial_limit": parse_duration, "checkpoint": _checkpoint}
    given = _section(collector, "run", value, keys, converters)
    if given is None:
        return None
    if "engine" in given:
        _plugin(collector, "engines", given["engine"], ("run", "engine"))
    every = given.pop("checkpoint", None)
    if every is not None:
        given["checkpoint_seconds"], given["checkpoint_steps"] = every
    renamed = {"memory": "memory_bytes", "trial_limit": "limit_seconds"}
    return collector.build(("run",), RunRules, {renamed.get(key, key): given[key] for key in given})


def _track(collector: Collector, value: Any) -> tuple[str, ...]:
    value = [value] if isinstance(value, str) else value
    if value is not None and not isinstance(value, list):
        collector.add(("track",), f"{show(value)} is not a list of trackers; write [wandb]")
        return ()
    for index, name in enumerate(value or ()):
        _plugin(collector, "trackers", name, ("track", index))
    return tuple(value or ())
