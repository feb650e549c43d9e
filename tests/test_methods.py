"""Methods: what each trains, an equal head at the start, and models that plain transformers and PEFT load."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora import Linear as LoraLinear
from transformers import AutoModelForQuestionAnswering, AutoModelForSequenceClassification

from finetrial import model_card, plugins
from finetrial.batching import collate, model_inputs
from finetrial.models import Built, build, in_head
from finetrial.plugins import AttachInput, Feature
from finetrial.proof import _plain_name
from finetrial.records import ModelSource
from finetrial.sources import Location
from summary_example import example_summary
from tiny_models import write_roberta, write_without_pooler

QA, CLASSES = "question_answering", "sequence_classification"
AUTO = {QA: AutoModelForQuestionAnswering, CLASSES: AutoModelForSequenceClassification}
SETTINGS: dict[str, Any] = {"learning_rate": 1e-3, "rank": 4, "dropout": 0.1}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path, tiny_llama: Path) -> dict[str, Path]:
    return {
        "bert": tiny_bert,
        "bert without pooler": write_without_pooler(tmp_path_factory.mktemp("bert"), tiny_bert),
        "roberta": write_roberta(tmp_path_factory.mktemp("roberta"), tiny_bert),
        "llama": tiny_llama,
    }


Make = Callable[..., tuple[Any, Built]]


@pytest.fixture
def make(folders: dict[str, Path]) -> Make:
    """The model of that name with a method attached, as `Workbench.build_tuned` does it."""

    def attached(name: str, kind: str, method: str | None, **params: Any) -> tuple[Any, Built]:
        folder = folders[name]
        options = {"num_labels": 3} if kind == CLASSES else {}
        location = Location(str(folder), None, True)
        found = build(ModelSource(name=str(folder)), location, kind, options, head_seed=7)
        if method is None:
            return found.model, found
        plugin = plugins.load("methods", method)
        found.model.requires_grad_(False)
        torch.manual_seed(8)
        given = AttachInput(found.model, kind, found.head_names)
        return plugin.attach(given, SETTINGS, plugin.Params(**params)), found

    return attached


def logits(model: Any) -> torch.Tensor:
    features = [Feature([101, *range(2000, 2000 + n), 102], 0, {}) for n in (5, 9, 14)]
    with torch.no_grad():
        outputs = model.eval()(**model_inputs(collate(features, 0)))
    if "logits" in outputs:
        return outputs.logits
    return torch.stack([outputs.start_logits, outputs.end_logits])


def trained(model: Any) -> dict[str, torch.Tensor]:
    return {_plain_name(name): p.detach() for name, p in model.named_parameters() if p.requires_grad}


def disturb(model: Any) -> None:
    """What training does: every trained tensor changes."""
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=random) * 0.05)


every_model = pytest.mark.parametrize("name", ["bert", "bert without pooler", "roberta", "llama"])
both_heads = pytest.mark.parametrize("kind", [QA, CLASSES])


@every_model
@both_heads
def test_both_methods_train_the_whole_head_from_the_same_start(make, name, kind):
    found = {}
    for method in ("full", "lora"):
        model, built = make(name, kind, method)
        plugin = plugins.load("methods", method)
        tensors = trained(model)
        groups = {each: plugin.group(each, built.head_names) for each in tensors}
        found[method] = {each: tensor for each, tensor in tensors.items() if groups[each] == "head"}
        assert set(groups.values()) == set(plugin.must_move())
    base, built = make(name, kind, None)
    expected = {each: p for each, p in base.named_parameters() if in_head(each, built.head_names)}
    assert found["full"].keys() == found["lora"].keys() == expected.keys()
    for each, tensor in expected.items():
        assert torch.equal(found["full"][each], tensor)
        assert torch.equal(found["lora"][each], tensor)


@every_model
@both_heads
def test_the_head_that_is_trained_is_the_head_that_is_used(make, name, kind):
    """Wrapped twice, a head's trained copy could lie beside the one that computes."""
    for method in ("full", "lora"):
        model, built = make(name, kind, method)
        model.train()
        logits_before = logits(model)
        plugin = plugins.load("methods", method)
        model.zero_grad()
        features = [Feature([101, 2000, 2001, 102], 0, {})]
        outputs = model(**model_inputs(collate(features, 0)))
        total = outputs.logits if "logits" in outputs else outputs.start_logits + 2 * outputs.end_logits
        total.square().sum().backward()
        for each, parameter in model.named_parameters():
            if parameter.requires_grad and plugin.group(_plain_name(each), built.head_names) == "head":
                assert parameter.grad is not None, each
                with torch.no_grad():
                    parameter.add_(0.1)
        assert not torch.allclose(logits(model), logits_before, atol=1e-3)


@every_model
@both_heads
@pytest.mark.parametrize(("target", "per_block"), [("all-linear", {6, 7}), ("attention", {4})])
def test_lora_adapts_the_blocks_layers_and_neither_head_nor_pooler(make, name, kind, target, per_block):
    model, built = make(name, kind, "lora", target=target)
    adapted = {each.split(".lora_")[0] for each in trained(model) if ".lora_" in each}
    assert len(adapted) / 2 in per_block
    assert not any("pooler" in each or in_head(each, built.head_names) for each in adapted)
    assert all("attention" in each or "attn" in each for each in adapted) == (target == "attention")
    frozen = [p for n, p in model.named_parameters() if not p.requires_grad]
    assert sum(p.numel() for p in frozen) > 900_000  # the embeddings alone


@every_model
@both_heads
def test_before_training_lora_computes_what_the_base_does(make, name, kind):
    base, _ = make(name, kind, None)
    tuned, _ = make(name, kind, "lora")
    assert torch.equal(logits(tuned), logits(base))
    down = [t for n, t in trained(tuned).items() if "lora_A" in n]
    up = [t for n, t in trained(tuned).items() if "lora_B" in n]
    assert down
    assert all(tensor.any() for tensor in down)
    assert not any(tensor.any() for tensor in up)


@every_model
@both_heads
def test_full_fine_tuning_trains_every_parameter_and_saves_what_transformers_loads(make, name, kind, tmp_path):
    model, _ = make(name, kind, "full")
    assert all(p.requires_grad for p in model.parameters())
    disturb(model)
    plugin = plugins.load("methods", "full")
    plugin.save(model, tmp_path)
    expected = logits(model)
    assert torch.equal(logits(AUTO[kind].from_pretrained(tmp_path)), expected)
    fresh, _ = make(name, kind, None)
    assert not torch.equal(logits(fresh), expected)
    assert torch.equal(logits(plugin.load(fresh, tmp_path)), expected)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_a_lora_layer_computes_what_pefts_own_does(make, name, autocast):
    """Outputs and all gradients, with dropout drawn alike; and what is merged, or switched off, too."""
    found = []
    for own in (False, True):
        model, _ = make(name, QA, "lora")
        layers = [module for module in model.modules() if isinstance(module, LoraLinear)]
        assert layers
        for layer in layers:
            torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.05, generator=torch.manual_seed(1))
            if own:
                layer.__class__ = LoraLinear
        model = copy.deepcopy(model).train()
        torch.manual_seed(2)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = model(input_ids=torch.arange(4, 24).view(2, 10)).start_logits
        logits.float().pow(2).sum().backward()
        values = {n: p.grad for n, p in model.named_parameters() if p.grad is not None} | {"": logits.detach()}
        with model.disable_adapter(), torch.no_grad():
            values["off"] = model.eval()(input_ids=torch.arange(4, 24).view(2, 10)).start_logits
        found.append(values)
    assert found[0].keys() == found[1].keys()
    for each, wanted in found[1].items():
        apart = float((found[0][each] - wanted).float().norm() / wanted.float().norm().clamp(min=1e-6))
        assert apart < (0.15 if autocast else 1e-4), each


def test_a_lora_layer_leaves_what_was_done_to_its_base_layer_as_it_is(make):
    """Its biases may train, somebody may listen to it, and it may be of a kind of its own."""

    class Twice(torch.nn.Linear):
        def forward(self, input):
            return 2 * super().forward(input)

    model, _ = make("bert", QA, "lora")
    layers = [module for module in model.modules() if isinstance(module, LoraLinear)]
    heard = []
    layers[0].base_layer.bias.requires_grad_(True)
    layers[1].base_layer.register_forward_hook(lambda *_: heard.append(1))
    layers[2].base_layer.__class__ = Twice
    ids = torch.arange(4, 24).view(2, 10)
    found = model.eval()(input_ids=ids).start_logits
    found.square().sum().backward()
    assert layers[0].base_layer.bias.grad is not None
    assert heard == [1]
    for layer in layers:
        layer.__class__ = LoraLinear
    assert torch.equal(found, model(input_ids=ids).start_logits)


def test_a_lora_layer_without_the_adapter_that_is_in_use_does_without(make):
    model, _ = make("bert", QA, "lora")
    first, *others = [module for module in model.modules() if isinstance(module, LoraLinear)]
    ids = torch.arange(4, 24).view(2, 10)
    model.add_adapter("other", peft.LoraConfig(task_type="QUESTION_ANS", target_modules=["query"]))
    model.set_adapter("other")
    found = model.eval()(input_ids=ids).start_logits
    for layer in (first, *others):
        layer.__class__ = LoraLinear
    assert torch.equal(found, model(input_ids=ids).start_logits)


@every_model
@both_heads
def test_lora_saves_what_its_card_says_how_to_load(make, folders, name, kind, tmp_path):
    model, _ = make(name, kind, "lora")
    disturb(model)
    plugin = plugins.load("methods", "lora")
    plugin.save(model, tmp_path)
    assert sum(p.stat().st_size for p in tmp_path.rglob("*")) < 500_000  # the adapter and head alone
    expected = logits(model)
    fresh, _ = make(name, kind, None)
    assert not torch.equal(logits(fresh), expected)
    assert torch.equal(logits(plugin.load(fresh, tmp_path)), expected)
    torch.manual_seed(99)  # the head comes with the adapter, whatever the base's is
    summary = example_summary().model_copy(update={"model": str(folders[name]), "model_revision": None})
    arm = next(arm for arm in summary.arms if arm.method == "lora")
    text = model_card.card(summary, summary.tasks[0], arm, arm.replicates[0], model_card.base_of(tmp_path))
    code = text.split("```python")[1].split("```")[0]
    said = f"{arm.task}.lora.seed{arm.replicates[0].number}"
    assert f'folder = "{said}"' in code
    loaded: dict[str, Any] = {}
    exec(code.replace(f'"{said}"', repr(str(tmp_path))).replace("tokenizer =", "# "), loaded)
    assert torch.equal(logits(loaded["model"]), expected)
    if kind == QA and name != "llama":  # as transformers finds the base by itself, which it draws no head for
        assert torch.equal(logits(AUTO[QA].from_pretrained(tmp_path)), expected)


def test_loras_settings_are_read_from_its_modules(make):
    model, _ = make("bert", QA, "lora")
    assert plugins.load("methods", "lora").read_back(model) == {"rank": 4, "alpha": 8, "dropout": 0.1}


def test_lora_draws_its_adapters_from_the_generator_it_is_given(make):
    one, again = (trained(make("bert", QA, "lora")[0]) for _ in range(2))
    assert all(torch.equal(one[each], again[each]) for each in one)
