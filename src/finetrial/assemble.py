"""From a run's spec to the things it runs on: rows, encoded inputs, the model with its method. Child side.

Everything here is a pure function of the spec and its inputs, so that two processes given one spec hold the
same tensors.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from finetrial import architecture, files, loaded, models, plugins, prepared, trimmed, unchanged
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
    code: tuple[str, ...]  # what makes rows of files and inputs of rows, beside the task's parameters

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
        trimmed.trim(built.model)
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
        # Else what it was last asked for would be a part of what it is; every call says both anew.
        fast.no_truncation()
        fast.no_padding()
        around = [built.tokenizer.special_tokens_map, built.tokenizer.model_max_length, built.causal]
        tokenizer = [short_hash(fast.to_str(), 64), repr(around), self.spec.model.model_dump(mode="json")]
        of = [self.spec.task.use, self.spec.task.params, *self.code, *tokenizer]
        still = partial(_is_still, self.spec, self.code)
        return prepared.inputs(self.home.cache, of, examples, encode, still)


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

    code = _code(spec)
    of = [spec.task.use, spec.task.params, *code, list(data.values()), spec.rows]
    place = home.cache if data else None  # of others nobody knows whether they are the same tomorrow
    splits = prepared.splits(place, of, read, partial(_is_still, spec, code))
    location = models.prepare(spec.model, base, home.cache)
    return Workbench(spec, task, params, splits, location, home, _code(spec))


def _is_still(spec: RunSpec, code: tuple[str, ...]) -> bool:
    """Whether nothing of the user's own was imported meanwhile, of which no name of what is kept would tell."""
    return _code(spec) == code


def _code(spec: RunSpec) -> tuple[str, ...]:
    """Versions and sources of what has a part in rows and inputs: libraries, finetrial, the user's own.

    The user's own is what is imported from beside the study file, and of the task's package wherever it lies.
    """
    # As text, for there are thousands of modules. An environment may lie beside a study file.
    base, installed = (f"{Path(place).resolve()}".rstrip("/") + "/" for place in (spec.how.base, sys.prefix))
    package = spec.task.use.partition(":")[0].partition(".")[0] if ":" in spec.task.use else None
    own = set()
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None) or ""
        beside = file.startswith(base) and not file.startswith(installed)
        if (beside or name.partition(".")[0] == package) and Path(file).is_file():
            own.add(Path(file))
    hashes = map(files.sha256_file, sorted(own))
    return (version("transformers"), version("tokenizers"), loaded.SOURCES, *hashes)


def input_hash(features: Sequence[Feature]) -> str:
    """SHA-256 of the encoded inputs: equal hashes mean that two runs saw the same token ids and labels."""
    digest = hashlib.sha256()
    for feature in features:
        digest.update(canonical_json([feature.input_ids, feature.token_type_ids, feature.labels]).encode())
    return digest.hexdigest()


def pick_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
