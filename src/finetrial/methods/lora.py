"""LoRA: low-rank adapters beside frozen linear layers, through PEFT; the task's head is trained whole.

Source: Hu et al. 2021 (arXiv:2106.09685). alpha is 2 x rank by policy: both free would search the same
direction twice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

from finetrial.frozen import Frozen, Setting
from finetrial.plugins import AttachInput, Group
from finetrial.space import Choice, Range, Space

TASK_TYPES = {"question_answering": "QUESTION_ANS", "sequence_classification": "SEQ_CLS"}


class Params(Frozen):
    """Which linear layers of the blocks get an adapter."""

    target: Literal["all-linear", "attention"] = "all-linear"


class Lora:
    """Inserts adapters with PEFT; what it saves loads with `PeftModel.from_pretrained`."""

    Params = Params
    stacks = True  # see stacking.py
    # Its best learning rate by full fine-tuning's: 9.8 over 14 models (Schulman 2025, "LoRA Without Regret").
    learning_rate_factor = 10.0
    space: Space = {
        "learning_rate": Range(low=5e-5, high=5e-3, log=True),
        "rank": Choice(choices=(4, 8, 16, 32)),
        "dropout": Choice(choices=(0.0, 0.05, 0.1)),
    }

    def attach(self, given: AttachInput, settings: Mapping[str, Setting], params: Any) -> Any:
        import peft

        from finetrial.models import linear_names

        rank = int(settings["rank"])
        config = peft.LoraConfig(
            task_type=TASK_TYPES[given.kind],
            r=rank,
            lora_alpha=2 * rank,
            lora_dropout=float(settings["dropout"]),
            target_modules=linear_names(
                given.model, given.head_names, attention_only=params.target == "attention"
            ),
            modules_to_save=list(given.head_names),
        )
        model = peft.get_peft_model(given.model, config)
        for module in model.modules():
            if type(module) is peft.tuners.lora.Linear and not module.lora_variant:
                module.__class__ = _quick()
        return model

    def group(self, parameter_name: str, head_names: Sequence[str]) -> Group:
        return "adapter" if ".lora_" in parameter_name else "head"

    def must_move(self) -> Sequence[Group]:
        return ("head", "adapter")

    def read_back(self, model: Any) -> dict[str, Setting]:
        from peft.tuners.lora import LoraLayer

        layer = next(module for module in model.modules() if isinstance(module, LoraLayer))
        name = layer.active_adapters[0]
        rank = layer.lora_A[name].weight.shape[0]
        return {
            "rank": rank,
            "alpha": round(layer.scaling[name] * rank),
            "dropout": float(getattr(layer.lora_dropout[name], "p", 0.0)),
        }

    def save(self, model: Any, folder: Path) -> None:
        from finetrial.models import key_mapping

        # The vocabulary does not change; "auto" would ask the Hub for the base model's config.
        model.save_pretrained(folder, save_embedding_layers=False)
        # What the base has to be built as, its classes' names among it: PEFT keeps nothing of that. Beside the
        # adapter transformers would take it for a whole model's.
        base = model.get_base_model()
        base.config.architectures = [type(base).__name__]
        if mapping := key_mapping(base):
            base.config.base_key_mapping = mapping
        base.config.save_pretrained(folder / "base")

    def load(self, base: Any, folder: Path) -> Any:
        import peft

        return peft.PeftModel.from_pretrained(base, folder)


@cache
def _quick() -> type:
    """PEFT's kind of layer, its forward with one adapter on a frozen layer by `low_rank.adapted`."""
    from peft.tuners.lora import Linear

    from finetrial.as_made import variant_of
    from finetrial.low_rank import adapted, is_plain

    def forward(self: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        active = self.active_adapters
        special = args or kwargs or self.merged or self.disable_adapters
        if special or len(active) != 1 or active[0] not in self.lora_A:
            return Linear.forward(self, x, *args, **kwargs)
        base, down, up = self.base_layer, self.lora_A[active[0]], self.lora_B[active[0]]
        if not is_plain(base, down, up):
            return Linear.forward(self, x)
        rows = x.reshape(-1, x.shape[-1])
        dropped = self.lora_dropout[active[0]](rows)
        output = adapted(
            rows, None if dropped is rows else dropped, base.weight, base.bias, down.weight, up.weight,
            self.scaling[active[0]],
        )  # fmt: skip
        return output.view(*x.shape[:-1], -1)

    return variant_of(Linear, forward)


PLUGIN = Lora()
