"""What a model's architecture says: which way it reads its inputs, and whether it can be trained here at all.

Child side: imports transformers. Not for loading a model (`models.py`).
"""

from __future__ import annotations

from typing import Any

from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from finetrial.errors import ModelError

# Encoders that neither say so in their attention nor predict masked words in transformers.
ENCODERS = frozenset({"xlnet", "markuplm"})


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
