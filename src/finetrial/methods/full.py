"""Full fine-tuning: every weight of the model is trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from finetrial.frozen import Frozen, Setting
from finetrial.plugins import AttachInput, Group, Stepping
from finetrial.space import Range, Space

# How weights are kept -> how an update is rounded to them.
ROUNDING: dict[str, Literal["nearest", "stochastic", "compensated"]] = {
    "fp32": "nearest",
    "bf16_stochastic": "stochastic",
    "bf16_compensated": "compensated",
}


class Params(Frozen):
    """How the weights and AdamW's moments are kept, and when each tensor is stepped."""

    weights: Literal["fp32", "bf16_stochastic", "bf16_compensated"] = "fp32"
    optimizer_state: Literal["fp32", "8bit"] = "fp32"
    step_in_backward: bool = False


class Full:
    """Marks every parameter as trained; saves and loads a whole transformers model."""

    Params = Params
    space: Space = {"learning_rate": Range(low=5e-7, high=5e-5, log=True)}

    def attach(self, given: AttachInput, settings: Mapping[str, Setting], params: Any) -> Any:
        import torch

        for parameter in given.model.parameters():
            parameter.requires_grad_(True)
            if params.weights != "fp32":
                parameter.data = parameter.data.to(torch.bfloat16)
        return given.model

    def stepping(self, params: Params) -> Stepping:
        return Stepping(ROUNDING[params.weights], params.optimizer_state, params.step_in_backward)

    def group(self, parameter_name: str, head_names: Sequence[str]) -> Group:
        from finetrial.models import in_head

        return "head" if in_head(parameter_name, head_names) else "body"

    def must_move(self) -> Sequence[Group]:
        return ("head", "body")

    def read_back(self, model: Any) -> dict[str, Setting]:
        return {}

    def save(self, model: Any, folder: Path) -> None:
        model.save_pretrained(folder)

    def load(self, base: Any, folder: Path) -> Any:
        return type(base).from_pretrained(folder, dtype=base.dtype, use_safetensors=True)


PLUGIN = Full()
