"""Variants of the tiny random models of conftest.py, written to a folder."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")


def copy_tokenizer(source: Path, folder: Path) -> None:
    for name in TOKENIZER_FILES:
        shutil.copy(source / name, folder / name)


def write_roberta(folder: Path, tokenizer_from: Path) -> Path:
    """A random two-layer RoBERTa without a pooler, with another model's tokenizer standing in for its own."""
    from transformers import RobertaConfig, RobertaModel

    copy_tokenizer(tokenizer_from, folder)
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=30522, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=130, type_vocab_size=2, pad_token_id=0, bos_token_id=101, eos_token_id=102,
    )  # fmt: skip
    RobertaModel(config, add_pooling_layer=False).save_pretrained(folder)
    return folder


def write_without_pooler(folder: Path, source: Path) -> Path:
    """A copy of a BERT whose checkpoint lacks the pooler's weights."""
    shutil.copytree(source, folder, dirs_exist_ok=True)
    tensors = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if "pooler" not in name}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    return folder
