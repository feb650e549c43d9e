"""All that a study measures of one model, against the base and a neighbour: the probes one after the other.

Child side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from time import perf_counter
from typing import Any, NamedTuple

from finetrial import files, models, plugins, unchanged
from finetrial.assemble import Workbench, input_hash, pick_device
from finetrial.batching import EVALUATION_TOKENS, collate, evaluation_batches
from finetrial.data import cap_rows
from finetrial.evaluation import evaluate
from finetrial.plugins import Example, Feature, ProbeInput
from finetrial.process_memory import let_go
from finetrial.store import RunFolder
from finetrial.train import make_accelerator


def measure(
    bench: Workbench, built: models.Built, tuned: Any, neighbour: Any | None, asked: Mapping[str, Any], *,
    tokens: int,
) -> dict[str, Any]:  # fmt: skip
    """Measure's name -> what its probe found in `tuned`, beside the base in `built`; plain JSON.

    The models are moved to the device and set to evaluation. `tokens`: of a batch at most, padding included.
    Errors are the probes' own.
    """
    device = pick_device()
    base, tuned = built.model.to(device).eval(), tuned.to(device).eval()
    neighbour = neighbour.to(device).eval() if neighbour is not None else None
    causal = partial(models.language_model, bench.spec.model, bench.location) if built.causal else None
    prepared = {}
    for name, each in asked.items():
        plugin = plugins.load("probes", each["use"])
        params = plugin.Params.model_validate(each["params"])
        rows = cap_rows(bench.splits.validation, getattr(params, "rows", 0))
        features = bench.encode(rows, built) if rows else []
        batches = [
            collate([features[i] for i in indices], built.tokenizer.pad_token_id, device)
            for indices in evaluation_batches([len(feature.input_ids) for feature in features], tokens)
        ]
        given = ProbeInput(
            base, tuned, neighbour, batches, input_hash(features), task=bench.spec.task.name,
            tokenizer=built.tokenizer, causal=built.causal, folder=bench.base, language_model=causal,
            head_names=built.head_names, score=partial(_score, bench, built, features, rows, tokens),
        )  # fmt: skip
        prepared[name] = (plugin, given, params)
    others = {name: partial(_of_another, *each) for name, each in prepared.items()}
    found = {
        name: plugin.measure(replace(given, others={n: o for n, o in others.items() if n != name}), params)
        for name, (plugin, given, params) in prepared.items()
    }
    unchanged.inputs(bench.spec, bench.home)  # probes read files, too
    return found


def _of_another(plugin: Any, given: ProbeInput, params: Any, model: Any) -> dict[str, Any]:
    return plugin.measure(replace(given, tuned=model, neighbour=None, brief=True), params)


def _score(
    bench: Workbench, built: models.Built, features: Sequence[Feature], rows: Sequence[Example], tokens: int,
    model: Any,
) -> dict[str, float]:  # fmt: skip
    """A model's metrics on some rows of validation, which choose its calibration."""
    accelerator = make_accelerator(bench.spec.rules)
    return evaluate(accelerator, model, bench, built.tokenizer, features, rows, tokens=tokens).metrics


class Kept(NamedTuple):
    """What became of a model that was saved, read back and measured."""

    save_seconds: float
    model_bytes: int
    measure_seconds: float  # building the models included
    measures: dict[str, Any]


def keep_and_measure(
    bench: Workbench, folder: RunFolder, model: Any, tokenizer: Any, asked: Mapping[str, Any], *,
    neighbour: bool = False, tokens: int = EVALUATION_TOKENS,
) -> Kept:  # fmt: skip
    """Measure a trained model as a replicate and its probe do: saved, read back; nothing of it stays on disk.

    `neighbour`: also against itself, as if it had one. The model is moved to the CPU, without its gradients,
    and the process is no longer held to a budget that was made for training it.
    """
    place, (plugin, _), begun = folder.path / "model", bench.method(), perf_counter()
    files.discard(place)  # a killed attempt's
    try:
        plugin.save(model, place)
        tokenizer.save_pretrained(place)
        saved, found = perf_counter(), {}
        size = files.size_of(place)
        if asked:
            model.zero_grad(set_to_none=True)
            model.to("cpu")
            let_go()
            built = bench.build_base()
            tuned = plugin.load(bench.build_base().model, place)
            other = plugin.load(bench.build_base().model, place) if neighbour else None
            found = measure(bench, built, tuned, other, asked, tokens=tokens)
        return Kept(saved - begun, size, perf_counter() - saved, found)
    finally:
        files.discard(place)
