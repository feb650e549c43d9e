"""Plug-ins: what every built-in one keeps to, what a wrong one is told, and that each kind is one file."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from pydantic import ValidationError

from finetrial import plugins
from finetrial.errors import PluginError, StudyError
from finetrial.fairness import decades
from finetrial.frozen import Frozen
from finetrial.plugins import PROTOCOLS, Metric
from finetrial.space import BOUNDS, COMMON_SPACE, Choice, Fixed, Range
from finetrial.store import Home
from finetrial.study_file import parse_study
from own_plugins import FILES
from wrong_study_files import text_of

BUILT_IN = [(kind, name) for kind in PROTOCOLS for name in plugins.names(kind)]
WITH_PARAMETERS = [(kind, name) for kind, name in BUILT_IN if kind in ("tasks", "methods", "probes")]
# What a task cannot do without, for tests that make its parameters.
NEEDED = {"classification": {"data": {"train": ["train.jsonl"]}}}
HEAVY = ("torch", "transformers", "peft", "accelerate", "datasets", "wandb", "optuna", "matplotlib")


def params_of(kind: str, name: str) -> Frozen:
    return plugins.load(kind, name).Params.model_validate(NEEDED.get(name, {}))


def test_the_folders_hold_what_the_docs_say():
    assert {kind: plugins.names(kind) for kind in PROTOCOLS} == {
        "tasks": ["classification", "mrpc", "rte", "squad_v2", "sst2", "synthetic_qa"],
        "methods": ["frozen", "full", "lora"],
        "probes": ["drift", "forgetting", "interpolation", "spectrum"],
        "engines": ["inline", "local", "spawn"],
        "trackers": ["wandb"],
    }


@pytest.mark.parametrize(("kind", "name"), BUILT_IN)
def test_a_built_in_keeps_its_protocol(kind, name):
    plugin = plugins.load(kind, name)
    assert isinstance(plugin, PROTOCOLS[kind])
    assert type(plugin).__doc__


@pytest.mark.parametrize(("kind", "name"), WITH_PARAMETERS)
def test_parameters_are_frozen_strict_and_come_back_from_json(kind, name):
    params = params_of(kind, name)
    kept = params.model_dump(mode="json")  # what a spec holds
    assert type(params).model_validate(kept) == params
    assert type(params).model_validate_json(json.dumps(kept)) == params
    with pytest.raises(ValidationError, match="extra_forbidden"):
        type(params).model_validate(kept | {"no_such_parameter": 1})
    for field in kept:
        with pytest.raises(ValidationError, match="frozen_instance"):
            setattr(params, field, kept[field])


@pytest.mark.parametrize("name", plugins.names("tasks"))
def test_a_task_s_metric_has_its_worst_and_best_on_the_right_ends(name):
    metric = plugins.load("tasks", name).metric
    assert isinstance(metric, Metric)
    assert (metric.best > metric.worst) == metric.higher_is_better


@pytest.mark.parametrize("name", plugins.names("methods"))
def test_a_method_s_space_has_a_rate_of_two_decades_and_sensible_values(name):
    space = plugins.load("methods", name).space
    rate = space["learning_rate"]
    assert next(iter(space)) == "learning_rate"
    assert isinstance(rate, Range)
    assert decades(rate) == pytest.approx(2.0)
    assert not set(space) & set(COMMON_SPACE)
    for key, dimension in space.items():
        match dimension:
            case Range():
                values = (dimension.low, dimension.high)
            case Choice():
                values = dimension.choices
            case Fixed(value=value):
                values = (value,)
            case _:
                pytest.fail(f"{dimension!r} is no dimension")
        low, high, _ = BOUNDS[key]
        assert all(low <= value <= high for value in values)


def test_no_plug_in_and_no_verb_imports_a_heavy_library():
    """The parent process reads every plug-in's parameters; only a child may pay for torch."""
    modules = [f"finetrial.{kind}.{name}" for kind, name in BUILT_IN]
    modules += [
        "finetrial.cli",
        "finetrial.study_file",
        "finetrial.init_file",
        "finetrial.opening",
        "finetrial.worker",
    ]
    code = f"""
        import importlib, sys
        for name in {modules}:
            importlib.import_module(name)
            heavy = [library for library in {HEAVY} if library in sys.modules]
            assert not heavy, (name, heavy)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# -- what a wrong plug-in is told ------------------------------------------------------------------------------


@pytest.fixture
def beside(tmp_path, monkeypatch):
    """Write a module beside a study file; what was imported from there is forgotten afterwards."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = set(sys.modules)
    plugins.make_importable(tmp_path)

    def write(name: str, text: str) -> Path:
        path = tmp_path / f"{name}.py"
        path.write_text(textwrap.dedent(text))
        return path

    write.base = tmp_path
    yield write
    for name in set(sys.modules) - before:
        del sys.modules[name]


METHOD = """
    from finetrial.frozen import Frozen
    from finetrial.space import Range

    class Params(Frozen):
        strength: int = 1

    class Mine:
        Params = Params
        space = {"learning_rate": Range(low=1e-4, high=1e-2, log=True)}
        def attach(self, given, settings, params): ...
        def group(self, parameter_name, head_names): ...
        def must_move(self): ...
        def read_back(self, model): ...
        def save(self, model, folder): ...
        def load(self, base, folder): ...

    PLUGIN = Mine()
"""


def test_a_module_beside_the_study_file_is_found(beside):
    beside("ft_found", METHOD)
    assert plugins.load("methods", "ft_found:PLUGIN", beside.base).Params().strength == 1


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("ft_lacks", ("def must_move(self): ...", ""), "the method 'ft_lacks:PLUGIN' lacks must_move (see"),
        ("ft_class", ("Mine()", "Mine"), "is a class; make an object of it: PLUGIN = Mine()"),
        ("ft_params", ("class Params(Frozen)", "class Params"), "Params has to be a subclass of finetrial"),
        ("ft_rate", ('"learning_rate"', '"speed"'), "has no learning_rate in its space; give it a Range"),
        ("ft_space", ("Range(low=1e-4, high=1e-2, log=True)", "[1e-4, 1e-2]"),
         "has 'learning_rate': [0.0001, 0.01] in its space, which is none of Range, Choice and Fixed"),
        ("ft_attribute", ("PLUGIN", "PLUGINS"), "ft_attribute.py defines no 'PLUGIN'; did you mean 'PLUGINS'?"),
        ("ft_nothing", ("PLUGIN = Mine()", ""), "defines no 'PLUGIN'; write PLUGIN = ... at its end"),
        ("ft_syntax", ("class Mine:", "class Mine"), "does not import: SyntaxError in line 8: expected ':'"),
        ("ft_error", ("PLUGIN = Mine()", "PLUGIN = Mine(1)"), "does not import: TypeError: Mine() takes no"),
        ("ft_needs", ("class Params(Frozen)", "import ft_no_such_library\n    class Params(Frozen)"),
         "the method 'ft_needs:PLUGIN' needs 'ft_no_such_library', which is not installed"),
    ],
)  # fmt: skip
def test_a_wrong_plug_in_is_told_what_is_wrong(beside, name, change, message):
    beside(name, METHOD.replace(*change))
    with pytest.raises(PluginError) as raised:
        plugins.load("methods", f"{name}:PLUGIN", beside.base)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("ft_required", ("strength: int = 1", "strength: int"),
         "methods.mine.strength (line 4): required and not given; add it"),
        ("ft_raises", ("space =", "def stepping(self, params): return 1 / 0\n        space ="),
         "its stepping(params) raises ZeroDivisionError: division by zero; mend it"),
        ("ft_other", ("space =", "def stepping(self, params): return 'fp32'\n        space ="),
         "its stepping(params) gives no Stepping; return one"),
    ],
)  # fmt: skip
def test_a_study_file_is_told_what_is_wrong_with_its_method(beside, name, change, message):
    beside(name, METHOD.replace(*change))
    text = text_of(methods=f"{{mine: {{use: '{name}:PLUGIN'}}}}", claims="[]")
    with pytest.raises(StudyError) as raised:
        parse_study(text, file="study.yaml", base=beside.base)
    (problem,) = raised.value.problems
    assert message in f"{problem.where}: {problem.message}"


def test_a_module_of_the_same_name_elsewhere_is_not_taken_in_its_place(beside):
    beside("colorsys", METHOD)  # Python has one, too
    with pytest.raises(
        PluginError, match=r"taken from .*colorsys.py and not from the study's folder.*rename yours"
    ):
        plugins.load("methods", "colorsys:PLUGIN", beside.base)


@pytest.mark.parametrize("engine", ["local", "spawn"])
def test_a_file_called_like_an_installed_module_breaks_nothing(tmp_path, engine):
    """Neither beside the study file nor in the folder that a command is given in."""
    (tmp_path / "psutil.py").write_text("raise SystemExit('shadowed')")
    code = f"""
        import time
        from pathlib import Path
        from finetrial import plugins
        plugins.make_importable(Path({str(tmp_path)!r}))
        spec = type("Spec", (), {{"how": type("How", (), {{"threads": 1, "gpu": None}})}})
        engine = plugins.load("engines", {engine!r})
        handle = engine.start(Path({str(tmp_path)!r}), spec)
        while engine.poll(handle) is None:
            time.sleep(0.01)
    """
    (tmp_path / "start.py").write_text(textwrap.dedent(code))
    done = subprocess.run([sys.executable, "-P", "start.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    log = (tmp_path / "log.txt").read_text()
    assert "shadowed" not in log
    assert "spec.json" in log  # it came as far as looking for the run


@pytest.mark.parametrize(
    ("kind", "name", "message"),
    [
        ("methods", "lroa", "there is no method called 'lroa'. Did you mean 'lora'? Known: frozen, full"),
        ("methods", "squad_v2", "there is no method called 'squad_v2'. It is one of the tasks. Known"),
        ("tasks", "x", "there is no task called 'x'. Known: classification, mrpc, rte, squad_v2, sst2, sy"),
        ("tasks", "", "there is no task called ''."),
        ("tasks", "../tasks/sst2", "there is no task called '../tasks/sst2'."),
        ("engines", ":", "':' is no engine's name; write 'module:object'"),
        ("tasks", "..:x", "'..:x' is no task's name; write 'module:object'"),
        ("tasks", "a b:x", "'a b:x' is no task's name; write 'module:object'"),
        ("tasks", "ft_not_there:PLUGIN", "'ft_not_there:PLUGIN' is not there: put ft_not_there.py beside"),
        ("tasks", "json:dumps", "the task 'json:dumps' lacks Params, files, head, metric, splits"),
    ],
)  # fmt: skip
def test_a_name_that_is_none(kind, name, message):
    with pytest.raises(PluginError) as raised:
        plugins.load(kind, name)
    assert message in str(raised.value)


# -- each kind is one file -------------------------------------------------------------------------------------


def run_cli(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-m", "finetrial", *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        timeout=600,
    )


def test_a_task_a_method_a_probe_an_engine_and_a_tracker_are_one_file_each(tmp_path, tiny_bert):
    """All five beside the study file, used by one real study; then a run of it in a process of its own."""
    folder = tmp_path / "mine"
    folder.mkdir()
    for name, text in FILES.items():
        (folder / f"{name}.py").write_text(textwrap.dedent(text))
    study = text_of(
        study="own",
        model=str(tiny_bert),
        tasks="{colours: {use: 'my_task:PLUGIN', rows: 32}}",
        methods="{full: {search: {learning_rate: 1e-3}}, biases: {use: 'my_method:PLUGIN'}}",
        search="{trials: 1, space: {epochs: 1, batch_size: 8}}",
        train="{seeds: 1}",
        measure="{distance: {use: 'my_probe:PLUGIN', power: 1.0}}",
        claims="[biases within 5% of full]",
        run="{engine: 'my_engine:PLUGIN', threads: 1}",
        track="['my_tracker:PLUGIN']",
    )
    (folder / "study.yaml").write_text(study)

    done = run_cli("run", "mine/study.yaml", "--home", "home", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    home = Home(tmp_path / "home")
    records = [run.record() for run in home.find("")]
    assert len(records) == 2 + 2 + 2 + 3  # baselines, trials, replicates, probes with the control
    # The task: its rows, and no others.
    assert {r.result.split_rows["train"] for r in records if r.spec.stage == "replicate"} == {32}
    # The engine started every run.
    assert sorted((tmp_path / "home" / "started.txt").read_text().split()) == sorted(
        r.spec.run_id for r in records
    )
    # The method trained what it marked, and nothing else.
    mine = next(r for r in records if r.spec.name == "replicate.colours.biases.000")
    assert mine.result.settings_used["trained_biases"] > 0
    assert mine.result.proof.groups["body"].moved > 0
    assert mine.result.proof.void is None
    source = hashlib.sha256((folder / "my_method.py").read_bytes()).hexdigest()
    assert mine.result.environment["source of my_method:PLUGIN"] == source[:12]
    assert mine.result.cost.trainable_parameters < 0.02 * mine.result.cost.total_parameters
    # The probe measured each replicate, and the base against itself.
    moved = {r.spec.name: r.result.measures["distance"]["moved"] for r in records if r.spec.stage == "probe"}
    assert moved.pop("probe.colours.000") == 0.0
    assert len(moved) == 2
    assert min(moved.values()) > 0
    # The tracker was given every run once, with its records.
    lines = [
        json.loads(x) for x in (home.tracking / "my_tracker.PLUGIN" / "lines.jsonl").read_text().splitlines()
    ]
    assert sorted(line["run"] for line in lines) == sorted(r.spec.run_id for r in records)
    assert {line["outcome"] for line in lines} == {"done"}
    assert next(line["records"] for line in lines if line["run"] == mine.spec.run_id) > 0
    assert "biases" in (tmp_path / "home" / "report" / "report.md").read_text()

    # A child process finds them, too; the engine is not part of what is asked, and may change.
    probe = home.find("probe.colours.biases.")[0]
    measured = probe.result().measures
    probe.result_file.unlink()
    (folder / "study.yaml").write_text(study.replace("'my_engine:PLUGIN'", "local"))
    done = run_cli("run", "mine/study.yaml", "--home", "home", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert probe.result().measures == measured
    assert (tmp_path / "home" / "started.txt").read_text().count("\n") == len(records)

    # `report` has only the folder to go by; without the plug-in it says what is missing.
    (folder / "my_task.py").rename(folder / "my_old_task.py")
    done = run_cli("report", "home", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith(
        "the task 'my_task:PLUGIN' is not there: put my_task.py beside the study file"
    )
    (folder / "my_old_task.py").rename(folder / "my_task.py")
    assert run_cli("report", "home", cwd=tmp_path).returncode == 0
