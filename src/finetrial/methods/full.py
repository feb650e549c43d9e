"""Full fine-tuning: every weight of the model is trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from finetrial.plugins import AttachInput, Group
from finetrial.records import Frozen, Setting
from finetrial.space import Range, Space


class Params(Frozen):
    """Full fine-tuning has no choices of its own."""


class Full:
    """Marks every parameter as trained; saves and loads a whole transformers model."""

    Params = Params
    space: Space = {"learning_rate": Range(low=5e-7, high=5e-5, log=True)}

    def attach(self, given: AttachInput, settings: Mapping[str, Setting], params: Any) -> Any:
        for parameter in given.model.parameters():
            parameter.requires_grad_(True)
        return given.model

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
