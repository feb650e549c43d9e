"""The tasks, methods and measures of a study file: named entries, each a plug-in with its own parameters.

Also how a method's search space is changed there. Not for the other sections: `study_file.py`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from finetrial import plugins
from finetrial.errors import PluginError
from finetrial.problems import Collector, KeyPath, show
from finetrial.records import MethodSpec, TaskSpec
from finetrial.space import COMMON_SPACE, Dimension, override
from finetrial.study import ENTRY_NAME, NAME

STUDY_NAME_RULE = "a name is 1-64 letters, digits, '.', '_' or '-', starts with a letter or digit, has no '..'"
ENTRY_NAME_RULE = "a name is 1-64 letters, digits, '_' or '-' and starts with a letter or digit"
SPACE_HELP = "write setting: range, list or value, e.g. rank: [4, 8, 16]"
EXAMPLES = {"tasks": "squad_v2", "methods": "full, lora"}


class Entry(NamedTuple):
    """One named entry: which plug-in it uses, the keys given for it, and where it stands."""

    use: Any
    given: dict[str, Any]
    path: KeyPath


class Methods(NamedTuple):
    """What `methods:` says; `names` are all that it names, also those with mistakes."""

    names: list[str]
    specs: tuple[MethodSpec, ...]
    spaces: dict[str, dict[str, Dimension]]


def study_name(collector: Collector, value: Any) -> str | None:
    """The study's name, which becomes its folder's."""
    if value is None:
        return None
    if not isinstance(value, str) or not NAME.fullmatch(value) or ".." in value:
        collector.add(("study",), f"{show(value)} cannot name a folder: {STUDY_NAME_RULE}; change it")
        return None
    return value


def tasks(collector: Collector, value: Any) -> tuple[TaskSpec, ...]:
    specs = []
    for name, entry in _entries(collector, ("tasks",), value, required=True).items():
        plugin = plugin_of(collector, "tasks", entry.use, entry.path)
        if plugin is not None:
            params = _params(collector, plugin, entry, ("use",))
            specs.append(TaskSpec(name=name, use=entry.use, params=params))
    return tuple(specs)


def measures(collector: Collector, value: Any, tasks: tuple[TaskSpec, ...]) -> dict[str, dict[str, Any]]:
    """The measures with their parameters; what a probe takes from the study's tasks is filled in."""
    found = {}
    for name, entry in _entries(collector, ("measure",), value, required=False).items():
        plugin = plugin_of(collector, "probes", entry.use, entry.path)
        built = None
        if plugin is not None:
            built = collector.build(entry.path, plugin.Params, entry.given, besides=("use",))
        if built is not None and hasattr(plugin, "with_tasks"):
            built = collector.convert(entry.path, lambda given, at=plugin: at.with_tasks(given, tasks), built)
        params = built.model_dump(mode="json") if built is not None else {}
        found[name] = {"use": entry.use, "params": params}
    return found


def methods(collector: Collector, value: Any, shared: Any) -> Methods:
    """The methods and their whole search spaces; `shared` is `search.space`, which holds for all of them."""
    specs: list[MethodSpec] = []
    spaces: dict[str, dict[str, Dimension]] = {}
    if shared is not None and not isinstance(shared, dict):
        collector.add(("search", "space"), f"{show(shared)} is not a mapping; {SPACE_HELP}")
    shared = shared if isinstance(shared, dict) else {}
    entries = _entries(collector, ("methods",), value, required=True)
    for name, entry in entries.items():
        plugin = plugin_of(collector, "methods", entry.use, entry.path)
        if plugin is None:
            continue
        own = entry.given.pop("search", None)
        params = _params(collector, plugin, entry, ("use", "search"))
        specs.append(MethodSpec(name=name, use=entry.use, params=params))
        space = {**COMMON_SPACE, **plugin.space}
        for key in shared:
            if key in space:
                _override(collector, space, key, shared[key], ("search", "space", key))
        path = (*entry.path, "search")
        if own is not None and not isinstance(own, dict):
            collector.add(path, f"{show(own)} is not a mapping; {SPACE_HELP}")
        elif own:
            for key in own:
                if key in space:
                    _override(collector, space, key, own[key], (*path, key))
                else:
                    collector.unknown((*path, key), sorted(space), "unknown setting")
        spaces[name] = {key: space[key] for key in sorted(space)}
    known = sorted({key for space in spaces.values() for key in space})
    for key in shared if known else ():
        if key not in known:
            collector.unknown(("search", "space", key), known, "no method has this setting")
    return Methods(list(entries), tuple(specs), spaces)


def plugin_of(collector: Collector, kind: plugins.Kind, use: Any, path: KeyPath) -> Any:
    """The plug-in of that name, or None with what is wrong reported."""
    try:
        if not isinstance(use, str):
            raise PluginError(f"{show(use)} is not a plug-in's name; write a name or 'module:object'")
        return plugins.load(kind, use, collector.base)
    except PluginError as error:
        collector.add(path, str(error))
        return None


def _entries(collector: Collector, path: KeyPath, value: Any, *, required: bool) -> dict[str, Entry]:
    """`[a, b]`, `[a, {b: {...}}]` or `{a: ..., b: ...}` as name -> entry."""
    if value is None:
        return {}
    entries: dict[str, Entry] = {}
    items = value if isinstance(value, list) else [value]
    for index, item in enumerate(items):
        where = (*path, index) if isinstance(value, list) else path
        pairs = {item: None} if isinstance(item, str) else item
        if not isinstance(pairs, dict) or (not pairs and isinstance(value, list)):
            collector.add(where, f"{show(item)} is not a name or a mapping; write [a, b] or a: {{...}}")
            continue
        for name, given in pairs.items():
            here = (*where, name) if isinstance(item, dict) else where
            if name in entries:
                other = f"another name, e.g. {name}_2: {{use: {name}}}"
                collector.add(here, f"{name!r} is listed twice; keep one, or give it {other}")
            elif (alike := {known.casefold(): known for known in entries}.get(name.casefold())) is not None:
                why = "files are named by it, and on some disks those would be the same"
                collector.add(here, f"{name!r} differs from {alike!r} by case only: {why}; change one")
            elif not ENTRY_NAME.fullmatch(name):
                own = f"for a plug-in of your own write my_name: {{use: {name!r}}}"
                fix = own if ":" in name else "change it"
                collector.add(here, f"{show(name)} cannot be part of a folder's name: {ENTRY_NAME_RULE}; {fix}")
            else:
                if given is not None and not isinstance(given, dict):
                    collector.add(here, f"{show(given)} is not a mapping; write key: value pairs")
                    given = None
                given = dict(given or {})
                entries[name] = Entry(given.pop("use", name), given, here)
    if required and not value:
        collector.add(path, f"{show(value)} names nothing; name at least one, e.g. [{EXAMPLES[str(path[0])]}]")
    return entries


def _params(collector: Collector, plugin: Any, entry: Entry, besides: tuple[str, ...]) -> dict[str, Any]:
    built = collector.build(entry.path, plugin.Params, entry.given, besides=besides)
    return built.model_dump(mode="json") if built is not None else {}


def _override(collector: Collector, space: dict[str, Dimension], key: str, value: Any, path: KeyPath) -> None:
    changed = collector.convert(path, lambda given: override(key, space[key], given), value)
    if changed is not None:
        space[key] = changed
