"""Models: heads and bodies of encoders and Llama-type decoders, what is refused, what padding does."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetrial import files, models
from finetrial.batching import collate, model_inputs
from finetrial.errors import ModelError
from finetrial.models import Built, build, in_head, linear_names
from finetrial.plugins import Feature
from finetrial.records import ModelSource
from finetrial.sources import Location
from tiny_models import write_roberta, write_without_pooler

QA, CLASSES = "question_answering", "sequence_classification"


def built(folder: Path, kind: str = QA, seed: int = 0, **options: Any) -> Built:
    if kind == CLASSES:
        options.setdefault("num_labels", 3)
    return build(
        ModelSource(name=str(folder)), Location(str(folder), None, True), kind, options, head_seed=seed
    )


@pytest.fixture
def edited(tmp_path: Path) -> Callable[..., Path]:
    """A copy of a model folder with its tensors, its config or its tokenizer's config changed."""

    def edit(
        source: Path,
        tensors: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]] = lambda found: found,
        drop_special: tuple[str, ...] = (),
        **config: Any,
    ) -> Path:
        folder = tmp_path / "edited"
        shutil.copytree(source, folder)
        save_file(
            tensors(load_file(folder / "model.safetensors")), folder / "model.safetensors", {"format": "pt"}
        )
        settings = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(settings | config))
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            if drop_special and (folder / name).exists():
                kept = json.loads((folder / name).read_text())
                kept |= dict.fromkeys(drop_special) if name == "tokenizer_config.json" else {}
                kept = {k: v for k, v in kept.items() if not (name.startswith("special") and k in drop_special)}
                (folder / name).write_text(json.dumps(kept))
        return folder

    return edit


@pytest.fixture(scope="session")
def tiny_roberta(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path) -> Path:
    return write_roberta(tmp_path_factory.mktemp("tiny_roberta"), tiny_bert)


@pytest.fixture
def model_folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


every_model = pytest.mark.parametrize(
    "model_folder", ["tiny_bert", "tiny_roberta", "tiny_llama"], indirect=True
)
both_heads = pytest.mark.parametrize("kind", [QA, CLASSES])


def logits(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """All that the head says: [inputs, length, 2] or [inputs, classes]."""
    with torch.no_grad():
        outputs = model.eval()(**model_inputs(batch))
    if "logits" in outputs:
        return outputs.logits
    return torch.stack([outputs.start_logits, outputs.end_logits], dim=-1)


# ---- bodies and heads ------------------------------------------------------------------------------------


@every_model
@both_heads
def test_the_body_is_the_checkpoints_to_the_bit(model_folder, kind):
    """Some classes with a head find none of a checkpoint's weights and only warn (docs/decisions/0005)."""
    saved = load_file(model_folder / "model.safetensors")
    model = built(model_folder, kind).model
    body = getattr(model, model.base_model_prefix).state_dict()
    found = {name.removeprefix("model."): tensor for name, tensor in saved.items() if "lm_head" not in name}
    if kind == QA:  # a question-answering model has no pooler
        found = {name: tensor for name, tensor in found.items() if "pooler" not in name}
    assert len(found) > 15
    for name, tensor in found.items():
        assert torch.equal(body[name], tensor), name


@pytest.mark.parametrize(
    ("model_folder", "kind", "heads"),
    [
        ("tiny_bert", QA, ("qa_outputs",)),
        ("tiny_bert", CLASSES, ("classifier",)),
        ("tiny_roberta", QA, ("qa_outputs",)),
        ("tiny_roberta", CLASSES, ("classifier",)),
        ("tiny_llama", QA, ("qa_outputs",)),
        ("tiny_llama", CLASSES, ("score",)),
    ],
    indirect=["model_folder"],
)
def test_the_head_is_drawn_from_its_seed_alone(model_folder, kind, heads):
    one, again, other = (built(model_folder, kind, seed) for seed in (5, 5, 6))
    assert one.head_names == heads
    assert one.causal == ("llama" in str(model_folder))
    drawn = 0
    for name, tensor in one.model.named_parameters():
        same = again.model.get_parameter(name)
        assert torch.equal(tensor, same), name
        if not in_head(name, heads):
            assert torch.equal(tensor, other.model.get_parameter(name)), name
        elif tensor.ndim == 2:
            drawn += 1
            assert not torch.equal(tensor, other.model.get_parameter(name)), name
            assert float(tensor.detach().std()) == pytest.approx(0.02, rel=0.5)  # initializer_range
    assert drawn >= 1


@pytest.mark.parametrize("model", ["tiny_bert", "tiny_llama"])
def test_the_global_generators_state_does_not_reach_the_head(model, request):
    folder = request.getfixturevalue(model)
    torch.manual_seed(1)
    one = built(folder, CLASSES, 5).model.state_dict()
    torch.manual_seed(2)
    other = built(folder, CLASSES, 5).model.state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_pooler_that_the_checkpoint_lacks_belongs_to_the_head(tiny_bert, tmp_path):
    folder = write_without_pooler(tmp_path, tiny_bert)
    assert built(folder, CLASSES).head_names == ("bert.pooler.dense", "classifier")
    assert built(folder, QA).head_names == ("qa_outputs",)


def with_head(source: Path, edited: Callable[..., Path], kind: str, **shapes: int) -> Path:
    """A copy of a model that was trained for a task: its head's weights are in the checkpoint."""
    trained = built(source, kind, **shapes).model
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            if not name.startswith(f"{trained.base_model_prefix}."):
                parameter.fill_(0.25)
    return edited(source, lambda found: {n: t.contiguous() for n, t in trained.state_dict().items()})


@pytest.mark.parametrize(
    ("model_folder", "kind", "labels"),
    [
        ("tiny_bert", QA, {}),
        ("tiny_bert", CLASSES, {"num_labels": 3}),
        ("tiny_bert", CLASSES, {"num_labels": 5}),
        ("tiny_roberta", CLASSES, {"num_labels": 3}),
        ("tiny_roberta", CLASSES, {"num_labels": 5}),
        ("tiny_llama", CLASSES, {"num_labels": 3}),
        ("tiny_llama", CLASSES, {"num_labels": 5}),
    ],
    indirect=["model_folder"],
)
def test_a_head_that_the_checkpoint_has_gives_way_to_the_one_drawn(model_folder, kind, labels, edited):
    """An "untrained" baseline would be a trained one, and every replicate would begin with the same head."""
    drawn = built(model_folder, kind, seed=5)
    found = built(with_head(model_folder, edited, kind, **labels), kind, seed=5)
    assert found.head_names == drawn.head_names
    theirs = drawn.model.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in found.model.state_dict().items())


def test_the_head_is_drawn_as_ever_where_a_pooler_is_missing_too(tiny_bert, edited, tmp_path):
    lacking = write_without_pooler(tmp_path / "lacking", tiny_bert)
    drawn, whole = built(lacking, CLASSES, seed=5), with_head(tiny_bert, edited, CLASSES)
    kept = {n: t for n, t in load_file(whole / "model.safetensors").items() if "pooler" not in n}
    save_file(kept, whole / "model.safetensors", {"format": "pt"})
    found = built(whole, CLASSES, seed=5)
    assert found.head_names == drawn.head_names == ("bert.pooler.dense", "classifier")
    theirs = drawn.model.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in found.model.state_dict().items())


# ---- what is refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "lost"),
    [
        ("tiny_bert", "encoder.layer.1.output.dense.weight"),
        ("tiny_bert", "embeddings.LayerNorm.bias"),
        ("tiny_llama", "model.layers.0.self_attn.q_proj.weight"),
        ("tiny_llama", "model.norm.weight"),
        ("tiny_llama", "model.embed_tokens.weight"),
    ],
)
@both_heads
def test_a_checkpoint_without_a_weight_of_the_body_is_refused(model, lost, kind, request, edited):
    source = request.getfixturevalue(model)
    assert lost in load_file(source / "model.safetensors")
    folder = edited(source, lambda found: {n: t for n, t in found.items() if n != lost})
    with pytest.raises(ModelError, match="lacks weights of the model itself"):
        built(folder, kind)


def test_a_checkpoint_of_other_names_is_refused_and_not_random(tiny_bert, edited):
    folder = edited(tiny_bert, lambda found: {f"other.{n}": t for n, t in found.items()})
    with pytest.raises(ModelError, match="they would be random"):
        built(folder)


def test_a_damaged_weight_file_is_refused_in_words(tiny_bert, edited):
    folder = edited(tiny_bert)
    (folder / "model.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(ModelError, match="does not load for question_answering"):
        built(folder)


def test_a_tokenizer_without_any_token_to_pad_with_is_refused(tiny_llama, edited):
    drop = ("pad_token", "unk_token", "eos_token")
    folder = edited(tiny_llama, drop_special=drop)
    with pytest.raises(ModelError, match="no pad, unknown or end token"):
        built(folder)


@pytest.mark.parametrize("kind", ["dynamic", "linear"])
def test_positions_that_depend_on_what_was_read_before_are_refused(tiny_llama, edited, kind):
    rope = {"rope_type": kind, "factor": 4.0, "rope_theta": 10000.0}
    refused = pytest.raises(ModelError, match="rope_type: dynamic")
    with refused if kind == "dynamic" else contextlib.nullcontext():
        built(edited(tiny_llama, rope_parameters=rope))


def test_a_decoder_keeps_no_keys_and_values_of_what_it_has_read(tiny_llama):
    found = built(tiny_llama, CLASSES)
    assert "past_key_values" not in found.model(input_ids=torch.tensor([[1, 2, 3]]))


def test_what_was_dequantised_is_there_whole_or_it_is_made_anew(tmp_path):
    folder, cache = tmp_path / "dequantised-1", tmp_path / "cache"
    cache.mkdir()
    assert not models._is_whole(folder, cache)
    with files.committed(folder) as temporary:
        temporary.mkdir()
        (temporary / "model.safetensors").write_bytes(b"weights")
    assert models._is_whole(folder, cache)
    (folder / "model.safetensors").write_bytes(b"Weights")
    assert not models._is_whole(folder, cache)
    (folder / "model.safetensors").unlink()
    assert not models._is_whole(folder, cache)


# ---- padding ---------------------------------------------------------------------------------------------


def test_a_missing_pad_token_is_lent_by_another_and_told_to_the_model(tiny_llama, edited):
    found = built(edited(tiny_llama, drop_special=("pad_token",)), CLASSES)
    assert found.tokenizer.pad_token == found.tokenizer.unk_token == "[UNK]"
    assert found.model.config.pad_token_id == found.tokenizer.pad_token_id == 100
    assert found.tokenizer.padding_side == "right"


@every_model
@both_heads
def test_padding_changes_no_logits(model_folder, kind):
    found = built(model_folder, kind)
    random = torch.Generator().manual_seed(0)
    ids = [torch.randint(1000, 2000, (length,), generator=random).tolist() for length in (6, 11, 40)]
    features = [Feature([101, *row, 102], 0, {}, [0] * (len(row) + 2)) for row in ids]
    if found.causal:
        features = [Feature(feature.input_ids, 0, {}) for feature in features]
    together = logits(found.model, collate(features, found.tokenizer.pad_token_id))
    for row, feature in enumerate(features):
        alone = logits(found.model, collate([feature], found.tokenizer.pad_token_id))[0]
        assert torch.allclose(together[row][: len(alone)], alone, atol=1e-6)
    assert not torch.allclose(together[0][:3], together[1][:3], atol=1e-4)


# ---- what a method may adapt -------------------------------------------------------------------------------

LINEAR = {
    # Per block: query, key, value, attention output, and the feed-forward layers.
    "tiny_bert": (6, 4),
    "tiny_roberta": (6, 4),
    "tiny_llama": (7, 4),
}


@every_model
@both_heads
def test_the_linear_layers_of_the_blocks_are_found_and_nothing_of_the_head(model_folder, kind):
    found = built(model_folder, kind)
    everything, attention = next(v for k, v in LINEAR.items() if k in str(model_folder))
    all_linear = linear_names(found.model, found.head_names, attention_only=False)
    only_attention = linear_names(found.model, found.head_names, attention_only=True)
    assert (len(all_linear), len(only_attention)) == (2 * everything, 2 * attention)
    assert set(only_attention) < set(all_linear)
    assert all(isinstance(found.model.get_submodule(name), torch.nn.Linear) for name in all_linear)
    assert not any("pooler" in name or in_head(name, found.head_names) for name in all_linear)


def test_a_model_without_linear_layers_is_refused():
    with pytest.raises(ModelError, match=r"no linear layers.*; leave the method out, or name another model"):
        linear_names(torch.nn.Sequential(torch.nn.LayerNorm(3)), (), attention_only=False)


def test_a_name_is_the_heads_only_as_a_whole():
    assert in_head("classifier.weight", ("classifier",))
    assert in_head("classifier", ("classifier",))
    assert not in_head("classifier2.weight", ("classifier",))
    assert not in_head("bert.classifier.weight", ("classifier",))
