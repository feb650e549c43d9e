"""Ways in which a model's folder can be wrong, and what has to be said of each."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file

from tiny_models import TOKENIZER_FILES

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
QUERY = "encoder.layer.0.attention.self.query.weight"


class Wrong(NamedTuple):
    """What is done to a good folder, what the message has to say, and how the study file names the model."""

    spoil: Callable[[Path], object]
    said: tuple[str, ...]
    named: str = "./model"


class Planted:
    """Would leave a file named `ran` behind if its pickle were read."""

    def __reduce__(self) -> Any:
        return os.system, ("touch ran",)


def config(**changes: Any) -> Callable[[Path], object]:
    def spoil(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return spoil


def written(name: str, content: str | bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(
        content if isinstance(content, bytes) else content.encode()
    )


def without(names: Iterable[str]) -> Callable[[Path], object]:
    return lambda folder: [(folder / name).unlink() for name in names]


def cut(name: str, count: int) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:count])


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], object]:
    def spoil(folder: Path) -> None:
        found = load_file(folder / WEIGHTS)
        change(found)
        save_file(found, folder / WEIGHTS, {"format": "pt"})

    return spoil


def shortened(table: str, key: str, rows: int) -> Callable[[Path], object]:
    """A table of embeddings cut, and the config with it."""
    name = f"embeddings.{table}_embeddings.weight"

    def spoil(folder: Path) -> None:
        tensors(lambda found: found.update({name: found[name][:rows].clone()}))(folder)
        config(**{key: rows})(folder)

    return spoil


def header_flipped(folder: Path) -> None:
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[8 + struct.unpack("<Q", data[:8])[0] // 2] ^= 0x40
    (folder / WEIGHTS).write_bytes(data)


def pickled(name: str) -> Callable[[Path], object]:
    def spoil(folder: Path) -> None:
        found = load_file(folder / WEIGHTS)
        (folder / WEIGHTS).unlink()
        torch.save({**found, "planted": Planted()}, folder / name)

    return spoil


def indexed(shard: str, *, there: bool) -> Callable[[Path], object]:
    """Weights in shards by an index, which names this one; `there`: it exists."""

    def spoil(folder: Path) -> None:
        (folder / WEIGHTS).rename(folder / "model-00001-of-00002.safetensors")
        if there:
            shutil.copy(folder / "model-00001-of-00002.safetensors", folder / shard)
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": {QUERY: shard}}))

    return spoil


def another_tokenizer(class_name: str) -> Callable[[Path], object]:
    def spoil(folder: Path) -> None:
        without(TOKENIZER_FILES)(folder)
        (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": class_name}))

    return spoil


def instead(make: Callable[[Path], object]) -> Callable[[Path], object]:
    """Something else where the folder was."""

    def spoil(folder: Path) -> None:
        shutil.rmtree(folder)
        make(folder)

    return spoil


def linked_to_itself(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to(WEIGHTS)


def nothing(folder: Path) -> None:
    """The folder is right; the study file is not."""


DOES_NOT_LOAD, OR_ANOTHER = (
    "the model ./model does not load for sequence_classification",
    "or name another model",
)
NO_WEIGHTS = "the model ./model has no weights (*.safetensors) in"
OWN_CODE = {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config", "AutoModel": "mine.Model"}}

MODELS: dict[str, Wrong] = {
    # config.json
    "no config": Wrong(without(["config.json"]), ("has no config.json in", "name the folder that has it")),
    "config cut short": Wrong(cut("config.json", 40), (DOES_NOT_LOAD, "not a valid JSON", OR_ANOTHER)),
    "config empty": Wrong(written("config.json", ""), (DOES_NOT_LOAD, "not a valid JSON", OR_ANOTHER)),
    "config a list": Wrong(written("config.json", "[]"), (DOES_NOT_LOAD, "not list", OR_ANOTHER)),
    "config not UTF-8": Wrong(written("config.json", b'{"a": "\xe9"}'), (DOES_NOT_LOAD, OR_ANOTHER)),
    "unknown type": Wrong(config(model_type="nosuch"), (DOES_NOT_LOAD, "`nosuch`", OR_ANOTHER)),
    "no type": Wrong(written("config.json", "{}"), (DOES_NOT_LOAD, "model_type", OR_ANOTHER)),
    "of pictures": Wrong(
        written("config.json", '{"model_type": "vit"}'), (DOES_NOT_LOAD, "ViTConfig", OR_ANOTHER)
    ),
    "code of its own": Wrong(config(**OWN_CODE), (DOES_NOT_LOAD, "set model.trust_remote_code: true")),
    "sizes that do not fit": Wrong(config(hidden_size=31), (DOES_NOT_LOAD, "31", OR_ANOTHER)),
    "a size in words": Wrong(config(hidden_size="many"), (DOES_NOT_LOAD, "expected int", OR_ANOTHER)),
    "a size below 0": Wrong(config(hidden_size=-32), (DOES_NOT_LOAD, "-32", OR_ANOTHER)),
    "unknown activation": Wrong(config(hidden_act="nosuch"), (DOES_NOT_LOAD, "nosuch", OR_ANOTHER)),
    "unknown dtype": Wrong(config(dtype="nosuch"), (DOES_NOT_LOAD, "nosuch", OR_ANOTHER)),
    # weights
    "no weights": Wrong(without([WEIGHTS]), (NO_WEIGHTS, "name a whole checkpoint")),
    "weights a folder": Wrong(
        lambda folder: ((folder / WEIGHTS).unlink(), (folder / WEIGHTS).mkdir()), (NO_WEIGHTS,)
    ),
    "weights a link to itself": Wrong(linked_to_itself, (NO_WEIGHTS,)),
    "weights empty": Wrong(cut(WEIGHTS, 0), (DOES_NOT_LOAD, "header too small", OR_ANOTHER)),
    "weights cut in the header": Wrong(cut(WEIGHTS, 900), (DOES_NOT_LOAD, "header", OR_ANOTHER)),
    "weights cut in a tensor": Wrong(cut(WEIGHTS, 100_000), (DOES_NOT_LOAD, "not fully covered", OR_ANOTHER)),
    "weights are text": Wrong(written(WEIGHTS, "not weights"), (DOES_NOT_LOAD, "header too large", OR_ANOTHER)),
    "header flipped": Wrong(header_flipped, (DOES_NOT_LOAD, "invalid JSON in header", OR_ANOTHER)),
    "pickle only": Wrong(pickled("pytorch_model.bin"), ("as pickle only (pytorch_model.bin)", "convert it")),
    "pickle called safetensors": Wrong(pickled(WEIGHTS), (DOES_NOT_LOAD, "header too large", OR_ANOTHER)),
    "another shape": Wrong(
        tensors(lambda found: found.update({QUERY: torch.zeros(16, 16)})),
        (f"bert.{QUERY} is (16, 16) and should be (32, 32)", "name a checkpoint that fits"),
    ),
    "fewer words than weights": Wrong(
        config(vocab_size=100), ("word_embeddings.weight is (30522, 32)", "(100, 32)")
    ),
    "a layer too few": Wrong(
        tensors(lambda found: [found.pop(name) for name in list(found) if "layer.1." in name]),
        ("lacks weights of the model itself: bert.encoder.layer.1", "Check that it is a whole checkpoint"),
    ),
    "a layer too many in the config": Wrong(
        config(num_hidden_layers=3), ("lacks weights of the model itself: bert.encoder.layer.2",)
    ),
    "not a number": Wrong(
        tensors(lambda found: found[QUERY].fill_(float("nan"))),
        ("weights that are not finite", QUERY, "get it anew"),
    ),
    "a shard missing": Wrong(
        indexed("model-00002-of-00002.safetensors", there=False),
        ("lacks model-00002-of-00002.safetensors, which", "get what is missing"),
    ),
    "a shard elsewhere": Wrong(
        indexed("../outside.safetensors", there=True),
        ("outside of its folder: ../outside.safetensors", "move them"),
    ),
    "an index cut short": Wrong(
        written(INDEX, '{"weight_map": {'), (INDEX, "cannot be read", "get the checkpoint")
    ),
    "fewer positions than tokens": Wrong(
        shortened("position", "max_position_embeddings", 3),
        ("an input has 4 tokens", "positions ends at 3", "set tasks.classification.max_length to 3 or lower"),
    ),
    "fewer words than the tokenizer's": Wrong(
        shortened("word", "vocab_size", 1500),
        ("the tokenizer gives token", "embeddings have 1500 rows", "that the model was trained with"),
    ),
    # tokenizer
    "no tokenizer": Wrong(without(TOKENIZER_FILES), ("./model has no tokenizer", "tokenizer.json beside it")),
    "tokenizer cut short": Wrong(cut("tokenizer.json", 1000), (DOES_NOT_LOAD, "Unterminated", OR_ANOTHER)),
    "tokenizer of another form": Wrong(written("tokenizer.json", "{}"), (DOES_NOT_LOAD, OR_ANOTHER)),
    "tokenizer config cut short": Wrong(cut("tokenizer_config.json", 30), (DOES_NOT_LOAD, OR_ANOTHER)),
    "unknown tokenizer": Wrong(another_tokenizer("NoSuchTokenizer"), (DOES_NOT_LOAD, "tokenizer", OR_ANOTHER)),
    "slow tokenizer only": Wrong(another_tokenizer("CanineTokenizer"), ("has no fast tokenizer", "has one")),
    # the folder itself
    "a file": Wrong(
        instead(lambda path: path.write_text("x")), ("the model ./model is not there", "is no folder")
    ),
    "empty": Wrong(instead(Path.mkdir), ("has no config.json in",)),
    "a link to itself": Wrong(instead(lambda path: path.symlink_to(path.name)), ("./model", "mend it")),
    "a link to nowhere": Wrong(instead(lambda path: path.symlink_to("gone")), ("gone is no folder",)),
    "a user who is not there": Wrong(nothing, ("~nosuchuser/model", "mend it"), "~nosuchuser/model"),
    "a name too long": Wrong(nothing, ("File name too long", "mend it"), "./" + 300 * "x"),
    "a package with a dot": Wrong(nothing, ("'os.path' is no package's name",), "package:os.path/model"),
    "a variable not set": Wrong(
        nothing, ("FINETRIAL_NOT_SET is not set; set it",), "${FINETRIAL_NOT_SET}/model"
    ),
    "a change in words": Wrong(
        nothing, (DOES_NOT_LOAD, "hidden_size", "expected int"), "{name: ./model, config: {hidden_size: many}}"
    ),
    "a change of nothing": Wrong(
        nothing,
        ("model.config.hiden_size", "did you mean 'hidden_size'?"),
        "{name: ./model, config: {hiden_size: 8}}",
    ),
    "a change of the padding": Wrong(
        nothing,
        ("model.config.pad_token_id", "padding is the tokenizer's token 0", "leave it out"),
        "{name: ./model, config: {pad_token_id: 5}}",
    ),
    # architectures
    "encoder and decoder": Wrong(
        written("config.json", '{"model_type": "t5"}'), ("an encoder and a decoder (t5)", "name an encoder")
    ),
    "XLNet": Wrong(
        written("config.json", '{"model_type": "xlnet"}'), ("last place, which here is padding", "another")
    ),
    "quantised": Wrong(
        config(quantization_config={"quant_method": "gptq", "bits": 4}),
        ("is quantised (gptq)", "name the checkpoint that it was made from"),
    ),
    "no heads of attention": Wrong(config(num_attention_heads=0), (DOES_NOT_LOAD, "by zero", OR_ANOTHER)),
    "fewer words than the padding's": Wrong(config(vocab_size=0), (DOES_NOT_LOAD, OR_ANOTHER)),
    # GGUF
    "GGUF cut short": Wrong(
        written("m.gguf", b"GGUF" + bytes(20)),
        ("m.gguf of", "cannot be dequantised", "get the file anew"),
        "{name: ./model, gguf_file: m.gguf}",
    ),
    "no GGUF": Wrong(nothing, ("has no m.gguf in", "see what is there"), "{name: ./model, gguf_file: m.gguf}"),
}
