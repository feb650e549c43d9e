"""All that a study measures of one model, against the base and a neighbour: the probes one after the other.

Child side. The models are moved to the device and set to evaluation.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from finetrial import models, plugins
from finetrial.assemble import Workbench, input_hash, pick_device
from finetrial.batching import collate, evaluation_batches
from finetrial.data import cap_rows
from finetrial.plugins import ProbeInput


def measure(
    bench: Workbench,
    built: models.Built,
    tuned: Any,
    neighbour: Any | None,
    asked: Mapping[str, Any],
    *,
    tokens: int,
) -> dict[str, Any]:
    """Measure's name -> what its probe found in `tuned`, beside the base in `built`; plain JSON.

    `tokens`: of a batch at most, padding included. Errors are the probes' own.
    """
    device = pick_device()
    base, tuned = built.model.to(device).eval(), tuned.to(device).eval()
    neighbour = neighbour.to(device).eval() if neighbour is not None else None
    found = {}
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
            tokenizer=built.tokenizer, causal=built.causal, folder=bench.base,
            language_model=partial(models.language_model, bench.spec.model, bench.location)
            if built.causal
            else None,
        )  # fmt: skip
        found[name] = plugin.measure(given, params)
    return found
