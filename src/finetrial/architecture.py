"""What a model's architecture says: which way it reads its inputs, how long they may be, and whether it can be
trained here at all.

Child side: imports torch and transformers. Not for loading a model (`models.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from finetrial.errors import ModelError

# Encoders that neither say so in their attention nor predict masked words in transformers.
ENCODERS = frozenset({"xlnet", "markuplm"})
# What the modules are called that hold one row for every position of a text.
POSITIONS = frozenset({"position_embeddings", "embed_positions", "wpe", "positions_embed", "pos_encoding"})


def is_causal(model: Any) -> bool:
    """Whether each position sees only what is before it: a decoder.

    Attention modules mostly say so with `is_causal`. Where they do not, an encoder is what transformers has a
    class for that predicts masked words.
    """
    config = model.config
    if getattr(config, "is_decoder", False) or getattr(config, "causal", False):
        return True
    flags = [module.is_causal for module in model.modules() if hasattr(module, "is_causal")]
    if flags:
        return any(flags)
    predicts_masked = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES or (
        "AutoModelForMaskedLM" in (getattr(config, "auto_map", None) or {})  # code of the model's own
    )
    return not predicts_masked and config.model_type not in ENCODERS


def refuse_unfit(config: Any, kind: str, name: str) -> None:
    """Raise ModelError for a kind of model that would load, but not be what the study means."""
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"the model {name} has an encoder and a decoder ({config.model_type}), and heads here read one of "
            f"them; name an encoder (BERT, DeBERTa, ...) or a decoder (Llama, Qwen, ...)"
        )
    rope = getattr(config, "rope_parameters", None) or {}  # of all layers, or by their type
    if any(each.get("rope_type") == "dynamic" for each in (rope, *rope.values()) if isinstance(each, dict)):
        raise ModelError(
            f"the model {name} sets its positions by the longest input that it has read (rope_type: dynamic), "
            f"so that scores would depend on what was scored before; set another rope_type in its config.json"
        )
    quantised = getattr(config, "quantization_config", None)
    if quantised:
        how = quantised.get("quant_method") if isinstance(quantised, dict) else None
        raise ModelError(
            f"the model {name} is quantised ({how or 'its config.json has a quantization_config'}), and every "
            f"method here trains beside weights in fp32; name the checkpoint that it was made from"
        )
    if kind == "sequence_classification" and config.model_type == "xlnet" and config.summary_type == "last":
        raise ModelError(
            f"the model {name} classifies by what stands at an input's last place, which here is padding; name "
            f"another model"
        )


def most_positions(model: Any) -> int | None:
    """Tokens that an input may have at most; None where no table of positions says so (rotary, relative)."""
    limits = []
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in POSITIONS and isinstance(getattr(module, "weight", None), torch.Tensor):
            # Some count from behind the padding's own row, OPT from a fixed one.
            padding = getattr(module, "padding_idx", None)
            before = getattr(module, "offset", 0) if padding is None else padding + 1
            limits.append(module.weight.shape[0] - before)
        tables = [getattr(module, key, None) for key in POSITIONS]
        limits += [table.shape[0] for table in tables if isinstance(table, torch.Tensor) and table.ndim == 2]
    most = getattr(model.config, "max_position_embeddings", None)
    return min(*limits, most if isinstance(most, int) else limits[0]) if limits else None


def check_inputs(model: Any, inputs: Iterable[Sequence[int]], key: str) -> None:
    """Raise ModelError where an input is longer than the model's positions, or a token is none of its own.

    `key`: what of the study file says how long inputs may be.
    """
    inputs = list(inputs)
    longest, most = max(map(len, inputs), default=0), most_positions(model)
    if most is not None and longest > most:
        raise ModelError(
            f"an input has {longest} tokens, and the model's table of positions ends at {most}; set {key} to "
            f"{most} or lower"
        )
    rows = getattr(model.get_input_embeddings(), "num_embeddings", None)
    highest = max((max(ids) for ids in inputs if ids), default=0)
    if rows is not None and highest >= rows:
        raise ModelError(
            f"the tokenizer gives token {highest}, and the model's embeddings have {rows} rows, from 0; put "
            f"the tokenizer that the model was trained with beside it"
        )
