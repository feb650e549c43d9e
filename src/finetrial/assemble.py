"""From a run's spec to the things it runs on: rows, encoded inputs, the model with its method. Child side.

Everything here is a pure function of the spec and its inputs, so that two processes given one spec hold the
same tensors.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from finetrial import architecture, files, last_layer, loaded, models, plugins, prepared, unchanged
from finetrial.data import cap_rows
from finetrial.frozen import canonical_json, short_hash
from finetrial.plugins import AttachInput, Feature, Splits
from finetrial.records import RunSpec
from finetrial.sources import Location, data_inputs
from finetrial.store import Home


@dataclass(frozen=True)
class Workbench:
    """A run's rows and plug-ins, and how to build its model (as often as needed, always the same)."""

    spec: RunSpec
    task: Any
    task_params: Any
    splits: Splits
    location: Location
    home: Home
    of: tuple[Any, ...]  # what makes rows of files and inputs of rows: the task, its parameters, all code

    @property
    def base(self) -> Path:
        return Path(self.spec.how.base)

    def build_base(self, *, shapes_only: bool = False) -> models.Built:
        """The base model with a fresh head (drawn from the spec's head seed), in fp32 on the CPU.

        `shapes_only`: on the meta device, its weights not read.
        """
        options = self.task.head.model_options(self.splits, self.task_params)
        built = models.build(
            self.spec.model, self.location, self.task.head.kind, options, head_seed=self.spec.seeds.head,
            shapes_only=shapes_only,
        )  # fmt: skip
        unchanged.model(self.spec, self.home)  # nor has it changed while it was read
        return built

    def method(self) -> tuple[Any, Any]:
        """The method's plug-in and its parameters."""
        assert self.spec.method is not None, "the untrained model and the control have no method"
        plugin = plugins.load("methods", self.spec.method.use)
        return plugin, plugin.Params.model_validate(self.spec.method.params)

    def build_tuned(self, *, shapes_only: bool = False) -> tuple[Any, models.Built]:
        """The model with the method attached (adapters drawn from their own seed), before training."""
        built = self.build_base(shapes_only=shapes_only)
        plugin, params = self.method()
        if self.task.head.kind == "sequence_classification":
            last_layer.narrow(built.model)
        built.model.requires_grad_(False)
        torch.manual_seed(self.spec.seeds.adapter)
        given = AttachInput(built.model, self.task.head.kind, built.head_names)
        return plugin.attach(given, self.spec.settings, params), built

    def encode(self, examples: Sequence[plugins.Example], built: models.Built) -> list[Feature]:
        """Model inputs of some rows; kept for every other run that needs them.

        Raises:
            ModelError: the model cannot take one of them.
        """
        features = self._encode(examples, built)
        key = f"tasks.{self.spec.task.name}.max_length"
        architecture.check_inputs(built.model, [feature.input_ids for feature in features], key)
        return features

    def _encode(self, examples: Sequence[plugins.Example], built: models.Built) -> list[Feature]:
        def encode() -> list[Feature]:
            return self.task.head.encode(examples, built.tokenizer, self.task_params, causal=built.causal)

        fast = getattr(built.tokenizer, "backend_tokenizer", None)
        if fast is None:  # one in Python, which cannot tell all that it is made of
            return encode()
        around = [built.tokenizer.special_tokens_map, built.tokenizer.model_max_length, built.causal]
        tokenizer = [short_hash(fast.to_str(), 64), repr(around), self.spec.model.model_dump(mode="json")]
        return prepared.inputs(self.home.cache, [*self.of, *tokenizer], examples, encode)


def open_workbench(spec: RunSpec, home: Home) -> Workbench:
    """Read the rows (training rows capped as the spec says) and find the model.

    Raises:
        DataError, ModelError: what the study names is not there, not as it says, or not what it was.
        Incomplete: finetrial is not what it was.
    """
    loaded.check()
    base = Path(spec.how.base)
    task = plugins.load("tasks", spec.task.use)
    params = task.Params.model_validate(spec.task.params)
    inputs = unchanged.inputs(spec, home)
    data = {name: sha256 for name, sha256 in inputs.items() if name.startswith("data/")}

    def read() -> Splits:
        found = task.splits(params, base)
        unchanged.compare(spec, home, data, data_inputs(spec.task, base))  # while it was read
        return replace(found, train=cap_rows(found.train, spec.rows))

    of = (spec.task.use, spec.task.params, *_code(base))
    place = home.cache if data else None  # of others nobody knows whether they are the same tomorrow
    splits = prepared.splits(place, [*of, list(data.values()), spec.rows], read)
    location = models.prepare(spec.model, base, home.cache)
    return Workbench(spec, task, params, splits, location, home, of)


def _code(base: Path) -> list[str]:
    """Versions and sources of what has a part in rows and inputs: libraries, finetrial, the user's own."""
    base, installed = base.resolve(), Path(sys.prefix).resolve()  # an environment may lie beside a study file
    found = [Path(module.__file__) for module in sys.modules.values() if getattr(module, "__file__", None)]
    own = sorted(p for p in found if p.is_relative_to(base) and not p.is_relative_to(installed) and p.is_file())
    return [version("transformers"), version("tokenizers"), loaded.SOURCES, *map(files.sha256_file, own)]


def input_hash(features: Sequence[Feature]) -> str:
    """SHA-256 of the encoded inputs: equal hashes mean that two runs saw the same token ids and labels."""
    digest = hashlib.sha256()
    for feature in features:
        digest.update(canonical_json([feature.input_ids, feature.token_type_ids, feature.labels]).encode())
    return digest.hexdigest()


def pick_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
