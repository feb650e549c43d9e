"""Variants of the tiny random models of conftest.py, written to a folder."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

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


SIZES = {
    "vocab_size": 30522, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 64, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
LAYERED = {"vocab_size": 30522, "n_embd": 32, "n_layer": 2, "n_head": 2, "pad_token_id": 0}
# Model types of other names for what they have, or of parts of their own; the rest have `SIZES`.
OTHER_SIZES: dict[str, dict[str, Any]] = {
    "flaubert": {
        "vocab_size": 30522, "emb_dim": 32, "n_layers": 2, "n_heads": 2, "max_position_embeddings": 64,
    },
    "funnel": {
        "vocab_size": 30522, "block_sizes": [1, 1], "d_model": 32, "n_head": 2, "d_head": 16, "d_inner": 64,
        "architectures": ["FunnelModel"],
    },
    "xlnet": {"vocab_size": 30522, "d_model": 32, "n_layer": 2, "n_head": 2, "d_inner": 64},
    "squeezebert": SIZES | {
        "embedding_size": 32, "q_groups": 2, "k_groups": 2, "v_groups": 2, "intermediate_groups": 2,
        "output_groups": 2,
    },
    "rembert": SIZES | {"input_embedding_size": 32, "output_embedding_size": 32},
    "convbert": SIZES | {"embedding_size": 32},
    "roformer": SIZES | {"embedding_size": 32},
    "gpt2": LAYERED | {"n_positions": 64},
    "openai-gpt": LAYERED | {"n_positions": 64},
    "bloom": {"vocab_size": 30522, "hidden_size": 32, "n_layer": 2, "n_head": 2},
    "opt": SIZES | {"ffn_dim": 64, "word_embed_proj_dim": 32},
}  # fmt: skip


def write_model(folder: Path, model_type: str, tokenizer_from: Path, **sizes: Any) -> Path:
    """A random model of any type that transformers has, its body alone, with another model's tokenizer."""
    from transformers import AutoConfig, AutoModel

    for name in TOKENIZER_FILES:
        shutil.copy(tokenizer_from / name, folder / name)
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **OTHER_SIZES.get(model_type, SIZES) | sizes)
    AutoModel.from_config(config).save_pretrained(folder)
    return folder
