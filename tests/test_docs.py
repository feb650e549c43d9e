"""The pages say what the code does: keys and defaults, files, constants, libraries, examples, links, commands.

Whatever a page lists is compared with the code in both directions, so that neither can change alone.
"""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
import time
import tomllib
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, get_args

import pytest
from click.testing import CliRunner

from finetrial import cli, plugins, space, study_file
from finetrial.plugins import AttachInput, Exit, ProbeInput
from finetrial.records import EarlyStopping, ModelSource, Outcome, RunSpec, Seeds, TaskSpec
from finetrial.store import Home, RunFolder
from finetrial.strict_yaml import parse, parse_duration
from finetrial.study import RunRules, SearchRules, TrainRules
from finetrial.summary import Verdict

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src" / "finetrial"
DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md")])
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)


def text_of(page: str) -> str:
    return (DOCS / page).read_text(encoding="utf-8")


def section(text: str, title: str) -> str:
    """The text below one heading, up to the next heading of any level."""
    parts = re.split(rf"^#+ {re.escape(title)}\n", text, flags=re.MULTILINE)
    assert len(parts) == 2, f"{title!r} is a heading {len(parts) - 1} times"
    return re.split(r"^#+ ", parts[1], flags=re.MULTILINE)[0]


def tables(text: str) -> list[list[list[str]]]:
    """Every Markdown table: its rows without the head, each a list of cells."""
    found = []
    for block in re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE):
        rows = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in block.splitlines()]
        found.append(rows[2:])
    return found


def plain(cell: str) -> str:
    return cell.strip("`")


def value_of(cell: str) -> Any:
    """What a cell in code style says, read as a study file is."""
    value, _, problems = parse(plain(cell))
    assert not problems, (cell, problems)
    return value


def blocks(page: Path, language: str) -> list[str]:
    return [text for kind, text in FENCE.findall(page.read_text(encoding="utf-8")) if kind == language]


# ---- the study file --------------------------------------------------------------------------------------

BASE = {
    "study": "x",
    "model": "./folder",
    "tasks": "[squad_v2]",
    "methods": "[full, lora]",
    "claims": "[]",
}


def study_with(place: str, key: str, example: str) -> str:
    """A study file in which that key of that place has that value."""
    entry = f"{{{key}: {example}}}"
    source = "{train: ./a.jsonl, " if key not in ("hub", "config", "revision", "train") else "{"
    source += "hub: a/b, " if key in ("config", "revision") else ""
    changed = {
        "model": {"model": entry if key == "name" else f"{{name: org/name, revision: a, {key}: {example}}}"},
        "data": {"tasks": f"{{squad_v2: {{data: {source}{key}: {example}}}}}}}"},
        "early stopping": {"train": f"{{early_stopping: {{patience: 1, {key}: {example}}}}}"},
        "range": {"methods": f"{{lora: {{search: {{rank: {{low: 2, high: 8, {key}: {example}}}}}}}}}"},
    }
    if key == "revision":
        changed["model"] = {"model": f"{{name: org/name, {key}: {example}}}"}
    if key == "patience":
        changed["early stopping"] = {"train": f"{{early_stopping: {entry}}}"}
    if key in ("low", "high"):
        other = "high: 1.0" if key == "low" else "low: 1e-9"
        changed["range"] = {
            "methods": f"{{lora: {{search: {{learning_rate: {{{key}: {example}, {other}}}}}}}}}"
        }
    if place.startswith("task "):
        name = place.removeprefix("task ")
        needed = "data: {train: ./a.csv}, " if name == "classification" and key != "data" else ""
        changed[place] = {"tasks": f"{{{name}: {{{needed}{key}: {example}}}}}"}
    if place.startswith(("method ", "measure ")):
        kind, name = place.split()
        changed[place] = {{"method": "methods", "measure": "measure"}[kind]: f"{{{name}: {entry}}}"}
    changes = changed.get(place, {place: entry})
    return "\n".join(f"{name}: {value}" for name, value in (BASE | changes).items())


def fields(model: type[Any], **names: str) -> dict[str, Any]:
    """The keys of a record with their defaults; `...` where there is none."""
    return {
        names.get(name, name): ... if field.is_required() else field.default
        for name, field in model.model_fields.items()
    }


def params(kind: plugins.Kind, name: str) -> dict[str, Any]:
    return fields(plugins.load(kind, name).Params)


def run_keys() -> dict[str, Any]:
    keys = fields(RunRules, **study_file.RUN_FIELDS)
    keys["checkpoint"] = RunRules.model_fields["checkpoint_seconds"].default
    return keys


SECTIONS = {
    "model": ("model", fields(ModelSource)),
    "data": ("data", fields(plugins.load("tasks", "squad_v2").Params.model_fields["data"].annotation)),
    "Task `squad_v2`": ("task squad_v2", params("tasks", "squad_v2")),
    "Task `classification`": ("task classification", params("tasks", "classification")),
    "Task `synthetic_qa`": ("task synthetic_qa", params("tasks", "synthetic_qa")),
    "Method `full`": ("method full", params("methods", "full")),
    "Method `lora`": ("method lora", params("methods", "lora")),
    "Measure `drift`": ("measure drift", params("probes", "drift")),
    "Measure `interpolation`": ("measure interpolation", params("probes", "interpolation")),
    "Measure `spectrum`": ("measure spectrum", params("probes", "spectrum")),
    "Search space": ("range", {k: v for k, v in fields(space.Range).items() if k != "kind"}),
    "search": ("search", fields(SearchRules) | {"space": {}}),
    "train": ("train", fields(TrainRules)),
    "Early stopping": ("early stopping", fields(EarlyStopping)),
    "run": ("run", run_keys()),
}


@pytest.mark.parametrize("title", SECTIONS)
def test_every_key_is_documented_with_its_default_and_an_example(title, tmp_path):
    place, expected = SECTIONS[title]
    rows = tables(section(text_of("study-file.md"), title))[0]
    assert sorted(plain(row[0]) for row in rows) == sorted(expected)
    for key, default, meaning, example in rows:
        name, value = plain(key), expected[plain(key)]
        assert meaning
        if default == "required":
            assert value is ..., name
        elif default == "none" or (plain(default) == "all" and value is None):
            assert value is None, name
        elif place == "run" and name == "checkpoint":
            assert parse_duration(plain(default)) == value
        elif name == "data":
            assert value.model_dump(exclude_defaults=True) == {"hub": plain(default)}
        else:
            assert value_of(default) == value, name
        study_file.parse_study(study_with(place, name, plain(example)), file="doc.yaml", base=tmp_path)


def test_the_top_level_keys_are_documented():
    rows = tables(section(text_of("study-file.md"), "Top level"))[0]
    assert tuple(plain(row[0]) for row in rows) == study_file.SECTIONS
    required = tuple(plain(row[0]) for row in rows if row[1] == "required")
    assert required == study_file.REQUIRED
    assert value_of(next(row[1] for row in rows if plain(row[0]) == "measure")) == study_file.DEFAULT_MEASURES


def test_every_plug_in_has_its_place_in_the_reference():
    text = text_of("study-file.md")
    titles = " ".join(re.findall(r"^### ((?:Tasks?|Method|Measure) .*)$", text, flags=re.MULTILINE))
    for kind in ("tasks", "methods", "probes"):
        for name in plugins.names(kind):
            assert f"`{name}`" in titles, name
            if not plugins.load(kind, name).Params.model_fields:
                assert "No keys of its own" in section(text, f"Method `{name}`")
    run_and_track = section(text, "run") + section(text, "track")
    for kind in ("engines", "trackers"):
        for name in plugins.names(kind):
            assert name in run_and_track


def test_presets_are_classification_with_these_defaults():
    for name, source, metric, columns in tables(
        section(text_of("study-file.md"), "Tasks `sst2`, `mrpc`, `rte`")
    )[0]:
        plugin = plugins.load("tasks", plain(name))
        defaults = params("tasks", plain(name))
        assert defaults.pop("data").model_dump(exclude_defaults=True) == value_of(source)
        assert defaults.pop("metric") == value_of(metric)
        assert plugin.columns == value_of(columns)
        others = params("tasks", "classification")
        assert defaults == {key: others[key] for key in others if key not in ("data", "metric")}


def test_the_search_spaces_are_documented_with_their_defaults():
    _, common, own = tables(section(text_of("study-file.md"), "Search space"))
    assert {plain(row[0]): space.parse_dimension(value_of(row[1])) for row in common} == space.COMMON_SPACE
    found: dict[str, dict[str, Any]] = {}
    for setting, method, default, _ in own:
        found.setdefault(plain(method), {})[plain(setting)] = space.parse_dimension(value_of(default))
    assert found == {name: plugins.load("methods", name).space for name in plugins.names("methods")}


# ---- files, outcomes, constants ------------------------------------------------------------------------------


def tree(text: str) -> set[str]:
    """The paths in an indented listing of files, without the first line's own folder."""
    found, above = set(), []
    for line in text.splitlines()[1:]:
        indent = (len(line) - len(line.lstrip())) // 2
        above = [*above[: indent - 1], line.split()[0].rstrip("/")]
        found.add("/".join(above))
    return found


REPORT_FILES = {"report/index.html", "report/report.md", "report/tables", "report/figures"}


def test_the_files_of_a_home_and_of_a_run_are_documented():
    home, run = FENCE.findall(text_of("files-on-disk.md"))
    root = Path("home")

    def names(thing: Any) -> set[str]:
        paths = [value for value in vars(thing).values() if isinstance(value, Path) and value != root]
        return {path.relative_to(root).as_posix() for path in paths}

    assert tree(home[1]) == names(Home(root)) | REPORT_FILES
    assert tree(run[1]) == names(RunFolder(root))


def test_the_records_and_their_versions_are_documented():
    rows = tables(section(text_of("files-on-disk.md"), "Records"))[0]
    documented = {plain(record): int(version) for _, record, version in rows}
    versioned = {}
    for name in ("records", "lease", "opening", "export", "summary"):
        for record, value in vars(importlib.import_module(f"finetrial.{name}")).items():
            version = getattr(value, "model_fields", {}).get("schema_version")
            if version is not None and value.__module__ == f"finetrial.{name}":
                versioned[f"{name}.{record}"] = version.default
    assert documented == versioned


def test_outcomes_and_verdicts_are_documented():
    text = text_of("concepts.md")
    assert [plain(row[0]) for row in tables(section(text, "Outcomes"))[0]] == list(get_args(Outcome))
    for verdict in get_args(Verdict):
        assert f"`{verdict}`" in section(text, "Words")
        assert f"`{verdict}`" in section(text_of("statistics.md"), "Verdicts")


def test_the_constants_of_the_statistics_are_those_of_the_code():
    rows = tables(section(text_of("statistics.md"), "Power"))[0]
    for name, value, _ in rows:
        module, constant = plain(name).split(".")
        assert getattr(importlib.import_module(f"finetrial.{module}"), constant) == float(value), name


def test_the_tests_that_the_statistics_page_names_hold_those_values():
    for _, value, where in tables(section(text_of("statistics.md"), "Reference values in the tests"))[0]:
        test = (ROOT / plain(where)).read_text(encoding="utf-8")
        for number in re.findall(r"\d+\.\d+", value):
            assert number in test, (number, where)


# ---- libraries -----------------------------------------------------------------------------------------------


def imports() -> dict[str, set[str]]:
    """Library -> the files that import it, at the top or inside functions."""
    found: dict[str, set[str]] = {}
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            for name in names:
                root = name.partition(".")[0]
                if root != "finetrial" and root not in sys.stdlib_module_names:
                    found.setdefault(root, set()).add(path.relative_to(SOURCE).as_posix())
    return found


def test_every_library_is_declared_and_imported_in_its_home_alone():
    required, extras = tables(text_of("dependencies.md"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

    def bare(requirements: list[str]) -> set[str]:
        return {re.split(r"[<>=!~]", text)[0].strip() for text in requirements}

    assert {row[0] for row in required} == bare(project["dependencies"])
    optional = [text for extra in project["optional-dependencies"].values() for text in extra]
    assert {row[0] for row in extras} == bare(optional)

    imported = imports()
    for _, names, home, why, _ in [*required, *extras]:
        assert why
        homes = re.findall(r"`([^`]+)`", home)
        files = set().union(*(imported.pop(name) for name in re.findall(r"`([^`]+)`", names)))
        strays = [file for file in files if not any(in_home(file, home) for home in homes)]
        assert not strays, f"{names} is imported outside its home"
        unused = [home for home in homes if not any(in_home(file, home) for file in files)]
        assert not unused, f"{names} is not imported in a home of its"
    assert not imported, "imported and not declared"


def in_home(file: str, home: str) -> bool:
    return file.count("/") == home.count("/") and fnmatch(file, home)


def test_the_child_s_modules_are_those_that_import_torch():
    named = set(re.findall(r"`(\w+\.py)`", section(text_of("dependencies.md"), "The child side")))
    libraries = ("torch", "transformers", "peft", "accelerate", "safetensors")
    importing = {file for name in libraries for file in imports()[name] if "/" not in file}
    assert named == importing - {"plugins.py"}  # there for type checkers only


# ---- links, commands, examples -------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """GitHub's ids of a page's headings."""
    titles = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text(encoding="utf-8")), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=[page.relative_to(ROOT).as_posix() for page in PAGES])
def test_every_link_within_the_repository_leads_somewhere(page):
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text)
    for link in links:
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        assert target.is_relative_to(ROOT), link
        if anchor:
            assert anchor in anchors(target), link


def test_every_page_is_linked_from_the_readme():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for page in DOCS.glob("*.md"):
        assert f"(docs/{page.name})" in text, page.name


def commands(text: str) -> list[str]:
    return re.findall(r"^(?:\$ )?finetrial +(\w+)", text, flags=re.MULTILINE)


def test_every_command_in_the_pages_exists_and_has_help():
    said = {verb for page in PAGES for kind, text in FENCE.findall(page.read_text()) for verb in commands(text)}
    said |= {verb for page in PAGES for verb in re.findall(r"`finetrial (\w+)", page.read_text())}
    assert {"init", "check", "run", "status", "show", "report"} <= said
    for verb in said:
        done = CliRunner().invoke(cli.main, [verb, "--help"])
        assert done.exit_code == 0, f"finetrial {verb}: {done.output}"


def test_every_make_target_in_the_pages_exists():
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for page in PAGES:
        for target in re.findall(r"(?:^|`)make ([a-z]+)", page.read_text(), flags=re.MULTILINE):
            assert target in targets, (page.name, target)


def test_every_make_target_is_made_again_though_a_folder_has_its_name():
    makefile = (ROOT / "Makefile").read_text()
    phony = re.search(r"^\.PHONY: (.*)$", makefile, flags=re.MULTILINE)
    assert phony is not None
    assert set(re.findall(r"^(\w+):", makefile, flags=re.MULTILINE)) == set(phony[1].split())


STUDIES = [(page, text) for page in PAGES for text in blocks(page, "yaml") if re.search(r"^study:", text, re.M)]


@pytest.mark.parametrize(("page", "text"), STUDIES, ids=[f"{p.stem}-{n}" for n, (p, _) in enumerate(STUDIES)])
def test_every_study_in_the_pages_is_one(page, text, own_files):
    study = study_file.parse_study(text, file=page.name, base=own_files)
    assert study.arms


def test_the_readme_s_python_names_only_what_is_public():
    import finetrial

    text = "\n".join(blocks(ROOT / "README.md", "python"))
    used = set(re.findall(r"\bfinetrial\.(\w+)", text))
    assert used
    assert used <= set(finetrial.__all__)
    compile(text, "README.md", "exec")


# ---- the example plug-ins ------------------------------------------------------------------------------------


@pytest.fixture
def own_files(tmp_path, monkeypatch):
    """A study's folder with the files of `extending.md`; what was imported from it is forgotten afterwards."""
    for text in blocks(DOCS / "extending.md", "python"):
        (tmp_path / text.partition("\n")[0].removeprefix("# ")).write_text(text)
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = set(sys.modules)
    plugins.make_importable(tmp_path)
    yield tmp_path
    for name in set(sys.modules) - before:
        if hasattr(sys.modules[name], "PLUGIN"):
            del sys.modules[name]


def spec_of(**changes: Any) -> RunSpec:
    seeds = Seeds(data_order=1, head=2, adapter=3, dropout=4)
    task = TaskSpec(name="t", use="synthetic_qa", params={})
    return RunSpec(
        study="s", stage="trial", task=task, number=0, model=ModelSource(name="./m"), seeds=seeds, **changes
    )


def test_the_example_task_gives_rows_for_its_head(own_files):
    task = plugins.load("tasks", "even_or_odd:PLUGIN", own_files)
    splits = task.splits(task.Params(rows=30), own_files)
    assert [len(rows) for rows in (splits.train, splits.validation, splits.test)] == [30, 100, 200]
    rows = [*splits.train, *splits.validation, *splits.test]
    assert len({row["id"] for row in rows}) == len(rows)
    assert all(row["label"] == row["text"].split().count("a") % 2 for row in rows)
    assert task.head.model_options(splits, task.Params())["num_labels"] == 2


class Body:
    """A model of two layers, made where torch is there."""

    def __new__(cls):
        import torch

        model = torch.nn.Module()
        model.body, model.head = torch.nn.Linear(3, 3), torch.nn.Linear(3, 2)
        return model.requires_grad_(False)


def test_the_example_method_trains_biases_and_the_head(own_files):
    method = plugins.load("methods", "bias_only:PLUGIN", own_files)
    model = method.attach(AttachInput(Body(), "sequence_classification", ("head",)), {}, method.Params())
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained == ["body.bias", "head.weight", "head.bias"]
    assert {method.group(name, ("head",)) for name in trained} == set(method.must_move())


def test_the_example_probe_measures_a_change(own_files):
    import torch

    probe = plugins.load("probes", "weight_change:PLUGIN", own_files)
    base = Body()
    tuned = Body()
    tuned.load_state_dict({name: 1.1 * value for name, value in base.state_dict().items()})
    given = ProbeInput(base, tuned, None, [], "")
    assert probe.measure(given, probe.Params()) == {
        "relative_change": pytest.approx(0.1, rel=1e-5),
        "tensors": 4,
    }
    assert torch.equal(base.body.weight * 1.1, tuned.body.weight)


def test_the_example_engine_starts_a_worker_and_sees_it_end(own_files, tmp_path):
    engine = plugins.load("engines", "niced:PLUGIN", own_files)
    handle = engine.start(tmp_path, spec_of())  # there is no spec.json, which the worker says and ends
    ended, deadline = None, time.monotonic() + 120
    while ended is None and time.monotonic() < deadline:
        ended = engine.poll(handle)
        time.sleep(0.05)
    assert ended == Exit(1, reason="exit code 1")
    assert "spec.json" in (tmp_path / "log.txt").read_text()
    engine.stop(handle, 1.0)  # of a process that has ended: nothing


def test_the_example_tracker_writes_the_same_line_twice(own_files, tmp_path):
    tracker = plugins.load("trackers", "one_csv:PLUGIN", own_files)
    records = [{"kind": "train", "loss": 2.0}, {"kind": "eval"}, {"kind": "train", "loss": 1.5}]
    for _ in range(2):
        tracker.replay(tmp_path, spec_of(), iter(records), None)
    (written,) = tmp_path.glob("trial.t.000-*.csv")
    assert written.read_text().strip() == f"{spec_of().run_id},t,,1.5"


def test_the_tables_of_benchmarks_are_what_their_files_say():
    command = [sys.executable, "bench/tables.py", "--check"]
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == 0
