"""What a model's architecture says of its inputs: which way it reads them.

Child side: imports transformers. Not for loading a model (`models.py`).
"""

from __future__ import annotations

from typing import Any

from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

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
