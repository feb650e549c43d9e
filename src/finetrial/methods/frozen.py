"""Frozen body: only the task's head is trained, on the features that the base model already has.

Known as linear probing (Alain & Bengio 2016, arXiv:1610.01644; beside full fine-tuning in Kumar et al. 2022,
arXiv:2202.10054). What a method gains over it, it gains by changing the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from finetrial.frozen import Frozen, Setting
from finetrial.plugins import AttachInput, Group
from finetrial.space import Range, Space


class Params(Frozen):
    """None."""


class FrozenBody:
    """Marks the head as trained; saves and loads a whole transformers model."""

    Params = Params
    space: Space = {"learning_rate": Range(low=1e-4, high=1e-2, log=True)}

    def attach(self, given: AttachInput, settings: Mapping[str, Setting], params: Any) -> Any:
        from finetrial.models import in_head

        for name, parameter in given.model.named_parameters():
            parameter.requires_grad_(in_head(name, given.head_names))
        return given.model

    def group(self, parameter_name: str, head_names: Sequence[str]) -> Group:
        return "head"

    def must_move(self) -> Sequence[Group]:
        return ("head",)

    def read_back(self, model: Any) -> dict[str, Setting]:
        return {}

    def save(self, model: Any, folder: Path) -> None:
        model.save_pretrained(folder)

    def load(self, base: Any, folder: Path) -> Any:
        return type(base).from_pretrained(folder, dtype=base.dtype, use_safetensors=True)


PLUGIN = FrozenBody()
