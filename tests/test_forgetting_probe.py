"""The forgetting probe: what it measures, what it leaves out, and what it refuses."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForQuestionAnswering

from finetrial.errors import DataError, ModelError
from finetrial.models import build, language_model
from finetrial.opening import resolve_inputs
from finetrial.plugins import ProbeInput, load
from finetrial.records import ModelSource, TaskSpec
from finetrial.sources import Location
from finetrial.store import Home
from finetrial.study_file import StudyError, parse_study
from tiny_models import write_model
from tiny_runs import make_spec, run

GOOD = ["a fine warm film", "warm and fine", "what a fine story", "fine fun for all", "so warm so fine"]
BAD = ["a dull cold film", "cold and dull", "what a dull story", "dull for all", "so cold so dull"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Three tasks: single texts and pairs that words tell apart, and labels at random; general text."""
    folder = tmp_path_factory.mktemp("data")
    rows = [
        {"text": f"{text} {n}", "label": label}
        for n in range(6)
        for label in (0, 1)
        for text in (BAD, GOOD)[label]
    ]
    pairs = [{**row, "text_pair": row["text"] if row["label"] else GOOD[n % 5]} for n, row in enumerate(rows)]
    noise = [{"text": f"{GOOD[n % 5]} {n}", "label": n % 2} for n in range(60)]  # the text does not tell
    for name, content in (("single", rows), ("pairs", pairs), ("noise", noise)):
        for split in ("train", "test"):
            lines = [json.dumps({**row, "text": f"{row['text']} {split}"}) for row in content]
            (folder / f"{name}-{split}.jsonl").write_text("\n".join(lines))
    (folder / "text.jsonl").write_text("\n".join(json.dumps({"page": text}) for text in GOOD + BAD))
    return folder


def entry(data, name):
    source = {split: str(data / f"{name}-{split}.jsonl") for split in ("train", "test")}
    return {"use": "classification", "data": source, "max_length": 16}


def measured(model_folder, tuned=None, *, task="", **params):
    probe = load("probes", "forgetting")
    source, location = ModelSource(name=str(model_folder)), Location(str(model_folder), None, True)
    built = build(source, location, "sequence_classification", {}, head_seed=0)
    base = built.model.eval()
    given = ProbeInput(
        base, tuned or base, None, [], "none", task=task, tokenizer=built.tokenizer, causal=built.causal,
        language_model=lambda: language_model(source, location),
    )  # fmt: skip
    found = probe.measure(given, probe.Params.model_validate({"task_rows": 60, **params}))
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    return found


def broken(model_folder):
    """A model whose body says the same of every token."""
    model = build(
        ModelSource(name=str(model_folder)), Location(str(model_folder), None, True), "sequence_classification",
        {}, head_seed=0,
    ).model.eval()  # fmt: skip
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name.lower() and name.endswith("weight"):
                parameter.zero_()
    return model


@pytest.mark.parametrize("folder", ["tiny_bert", "tiny_llama"])
@pytest.mark.parametrize("name", ["single", "pairs"])
def test_the_control_forgets_exactly_nothing_and_a_body_without_content_everything(request, data, folder, name):
    folder = request.getfixturevalue(folder)
    control = measured(folder, tasks={name: entry(data, name)})["tasks"][name]
    assert control["forgotten"] == 0.0
    assert control["base"] > 85  # the words tell the classes apart
    assert control["readable"]
    assert (control["chance"], control["rows"]) == (50.0, 54)  # a tenth is cut off for validation
    gone = measured(folder, broken(folder), tasks={name: entry(data, name)})
    assert gone["tasks"][name]["tuned"] <= 50
    assert gone["tasks_forgotten"] == gone["tasks"][name]["forgotten"] > 25
    assert gone["tasks"][name]["input_sha256"] == control["input_sha256"]


def test_the_task_that_a_model_was_trained_for_is_left_out(tiny_bert, data):
    tasks = {name: entry(data, name) for name in ("single", "pairs")}
    assert set(measured(tiny_bert, task="single", tasks=tasks)["tasks"]) == {"pairs"}


def test_what_the_base_cannot_read_cannot_be_forgotten(tiny_bert, data):
    found = measured(tiny_bert, tasks={"noise": entry(data, "noise")})
    assert not found["tasks"]["noise"]["readable"]
    assert found["tasks_forgotten"] is None


def test_a_task_with_a_class_of_too_few_rows_is_left_out_with_its_reason(tiny_bert, data, tmp_path):
    rows = [{"text": f"{GOOD[n % 5]} {n}", "label": 0 if n < 4 else 1} for n in range(60)]
    for split in ("train", "test"):
        lines = [json.dumps({**row, "text": f"{row['text']} {split}"}) for row in rows]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines))
    rare = {
        "use": "classification",
        "data": {split: str(tmp_path / f"{split}.jsonl") for split in ("train", "test")},
    }
    found = measured(tiny_bert, tasks={"rare": rare, "single": entry(data, "single")})
    assert set(found["tasks"]) == {"single"}
    assert "class 0 has 4 rows; 5 folds need at least 5" in found["left_out"]["rare"]
    with pytest.raises(DataError, match="rare: class 0 has 4 rows"):
        measured(tiny_bert, tasks={"rare": rare})


def test_text_is_measured_for_a_causal_model_and_only_for_one(tiny_bert, tiny_llama, data):
    text = {"file": str(data / "text.jsonl"), "column": "page"}
    asked = {"text": text, "text_length": 16, "text_tokens": 40}
    with pytest.raises(DataError, match=r"could forget \(text is measured of causal models only\)"):
        measured(tiny_bert, **asked)
    beside = measured(tiny_bert, tasks={"single": entry(data, "single")}, **asked)
    assert beside["text"] is None
    control = measured(tiny_llama, **asked)["text"]
    assert control["forgotten"] == 0.0
    assert control["tokens"] == 2 * 15
    worse = measured(tiny_llama, broken(tiny_llama), **asked)["text"]
    assert worse["base"] == control["base"]
    assert worse["forgotten"] == worse["tuned"] - worse["base"] != 0
    with pytest.raises(DataError, match=r"no text in column 'text'; it has page: set text\.column"):
        measured(tiny_llama, text={"file": str(data / "text.jsonl")})
    with pytest.raises(DataError, match="do not fill a window of 256; name a longer text"):
        measured(tiny_llama, text=text)


def test_texts_longer_than_the_models_positions_are_refused(data, tiny_bert, tmp_path):
    folder = write_model(tmp_path, "bert", tiny_bert, max_position_embeddings=5)
    with pytest.raises(ModelError, match="ends at 5; set the max_length of single, which measure"):
        measured(folder, tasks={"single": entry(data, "single")})
    folder = write_model(tmp_path, "gpt2", tiny_bert, n_positions=15)
    text = {"file": str(data / "text.jsonl"), "column": "page"}
    with pytest.raises(
        ModelError, match=r"has 16 tokens.*; set measure\.forgetting\.text_length to 15 or lower"
    ):
        measured(folder, text=text, text_length=16, text_tokens=40)


# ---- in a study ------------------------------------------------------------------------------------------

STUDY = """
study: forgets
model: {model}
tasks:
  single: {{use: classification, data: {{train: single-train.jsonl, test: single-test.jsonl}}}}
  {second}
methods: [full]
measure: {measure}
"""


def study_of(data, model, measure, second="qa: {use: synthetic_qa}"):
    return parse_study(
        STUDY.format(model=model, measure=measure, second=second), file=str(data / "study.yaml"), base=data
    )


def test_the_studys_own_classification_tasks_come_with_it_and_all_files_are_hashed(tiny_bert, data):
    pairs = "{use: classification, data: {train: pairs-train.jsonl, test: pairs-test.jsonl}}"
    extra = f"{{forgetting: {{tasks: {{pairs: {pairs}}}}}}}"
    study = study_of(data, tiny_bert, extra)
    tasks = study.measure["forgetting"]["params"]["tasks"]
    assert set(tasks) == {"single", "pairs"}
    assert tasks["single"]["params"] == study.tasks[0].params
    hashed = resolve_inputs(study)["qa"]
    assert {name for name in hashed if name != "model"} == {
        f"measure.forgetting/{name}-{split}.jsonl"
        for name in ("single", "pairs")
        for split in ("train", "test")
    }


@pytest.mark.parametrize(
    ("measure", "says"),
    [
        ("[forgetting]", "nothing is named that a model trained on single could forget; name other tasks"),
        ("{forgetting: {tasks: {mrcp: {}}}}", "mrcp: there is no task called 'mrcp'. Did you mean 'mrpc'?"),
        (
            "{forgetting: {tasks: {squad_v2: {}}}}",
            "squad_v2: a linear classifier reads classification tasks only",
        ),
        ("{forgetting: {tasks: {mrpc: {max_lenght: 3}}}}", "mrpc.max_lenght: Extra inputs are not permitted"),
        ("{forgetting: {text: {file: a.jsonl, colum: x}}}", "colum"),
    ],
)
def test_what_cannot_be_measured_is_said_when_the_study_is_read(tiny_bert, data, measure, says):
    with pytest.raises(StudyError, match=says.replace("(", r"\(").replace("?", r"\?")):
        study_of(data, tiny_bert, measure, second="")


def test_a_probe_run_measures_a_trained_model(tiny_bert, tmp_path, data):
    probe = load("probes", "forgetting")
    asked = {"tasks": {"noise": entry(data, "noise")}, "task_rows": 60}
    params = probe.Params.model_validate(asked).model_dump(mode="json")
    spec = make_spec(tiny_bert, "full", settings={"learning_rate": 0.02})  # far
    run(spec, tmp_path)
    measures = {"forgetting": {"use": "forgetting", "params": params}}
    probe_run = spec.model_copy(update={"stage": "probe", "measures": measures, "subject": spec.run_id})
    found = run(probe_run, tmp_path).measures["forgetting"]
    trained = AutoModelForQuestionAnswering.from_pretrained(Home(tmp_path).model_folder(spec)).eval()
    assert found == measured(tiny_bert, trained, **asked)


def test_tasks_with_a_spec_are_taken_as_they_are():
    probe = load("probes", "forgetting")
    task = TaskSpec(name="mine", use="rte", params=load("tasks", "rte").Params().model_dump(mode="json"))
    other = TaskSpec(name="other", use="mrpc", params=load("tasks", "mrpc").Params().model_dump(mode="json"))
    params = probe.with_tasks(probe.Params(), [task, other])
    assert params.tasks == {t.name: {"use": t.use, "params": t.params} for t in (task, other)}
    assert probe.Params.model_validate(params.model_dump(mode="json")) == params
