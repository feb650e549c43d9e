"""What `bench/gpu.py` measures of memory: lean full fine-tuning beside mixed-precision AdamW's and LoRA's.

TinyLlama's shape with a question-answering head (1.03 B weights, random), windows of 384 tokens, two at a time;
a few steps of finetrial's own optimiser, stepper and autocast. Lean runs and LoRA recompute activations, which
mixed-precision AdamW does not, as is usual; its variant that does is measured beside it.
"""

from __future__ import annotations

import gc
import time
from functools import partial
from typing import Any

import torch
from accelerate.state import AcceleratorState
from transformers import LlamaConfig, LlamaForQuestionAnswering

from finetrial import memory, plugins
from finetrial.assemble import pick_device
from finetrial.fit import checkpoint_gradients, optimizer_without_values
from finetrial.optimisation import how_to_step, prepare_optimisation
from finetrial.plugins import AttachInput
from finetrial.process_memory import peak_bytes
from finetrial.records import LoopRules, MethodSpec, ModelSource, RunSpec, Seeds, TaskSpec
from finetrial.stepping import Stepper
from finetrial.train import make_accelerator

LEAN = {"weights": "bf16_stochastic", "optimizer_state": "8bit", "step_in_backward": True}
# Label -> method, its parameters, how gradients are clipped, whether activations are recomputed.
ARMS: dict[str, tuple[str, dict[str, Any], Any, bool]] = {
    "AdamW, mixed precision": ("full", {}, "global", False),
    "AdamW, mixed, recomputed": ("full", {}, "global", True),
    "lean full": ("full", LEAN, "per_tensor", True),
    "LoRA": ("lora", {}, "global", True),
}
# GB (10^9 bytes): what the lean run may take, and below which the run that it is compared with is no such run.
LEAN_MOST, MIXED_LEAST = 5.0, 16.0
ROWS, LENGTH, STEPS = 2, 384, 4
NEAR = 0.05  # how far what is foretold may be from what is measured


def spec_of(label: str) -> RunSpec:
    name, params, clip, _ = ARMS[label]
    return RunSpec(
        study="memory", stage="trial", number=0, model=ModelSource(name="./none"),
        task=TaskSpec(name="none", use="none", params={}),
        method=MethodSpec(name=name, use=name, params=params),
        settings={
            "learning_rate": 1e-5, "epochs": 1, "batch_size": ROWS, "warmup_ratio": 0.0, "weight_decay": 0.01,
            "rank": 8, "dropout": 0.0,
        },
        rules=LoopRules(precision="bf16", clip=clip), seeds=Seeds(data_order=1, head=2, adapter=3, dropout=4),
    )  # fmt: skip


def model_of(shape: dict[str, int], label: str) -> Any:
    """A random model with the arm's method attached, on torch's present device."""
    name, params, _, recompute = ARMS[label]
    config = LlamaConfig(**shape, pad_token_id=0, bos_token_id=1, eos_token_id=2, use_cache=False)
    model = LlamaForQuestionAnswering(config).requires_grad_(False)
    plugin = plugins.load("methods", name)
    given = AttachInput(model, "question_answering", ("qa_outputs",))
    model = plugin.attach(given, spec_of(label).settings, plugin.Params.model_validate(params))
    checkpoint_gradients(model, on=recompute)
    return model


def inputs_of(vocabulary: int, length: int) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(1)
    ends = torch.randint(0, length, (2, ROWS), generator=random)
    return {
        "input_ids": torch.randint(3, vocabulary, (ROWS, length), generator=random),
        "attention_mask": torch.ones(ROWS, length, dtype=torch.int64),
        "start_positions": ends[0],
        "end_positions": ends[1],
    }


def foretold(shape: dict[str, int], label: str, length: int = LENGTH) -> memory.Step:
    """What `finetrial` foretells of the arm's step, by parts."""
    device, spec = pick_device().type, spec_of(label)
    with torch.device("meta"):
        model = model_of(shape, label)

    def loss_of(outputs: Any, batch: Any) -> torch.Tensor:
        return sum(each.float().sum() for each in (outputs["start_logits"], outputs["end_logits"]))  # type: ignore[return-value]

    return memory.training_step(
        model, inputs_of(shape["vocab_size"], length), loss_of, partial(optimizer_without_values, spec),
        in_backward=how_to_step(spec).in_backward, autocast=lambda: torch.autocast(device, torch.bfloat16),
        device=device,
    )  # fmt: skip


def measure(shape: dict[str, int], label: str, length: int = LENGTH) -> dict[str, Any]:
    """Peak memory over a few steps, foretold and measured, the losses, and seconds per step after the first."""
    name, params, clip, recompute = ARMS[label]
    AcceleratorState._reset_state(reset_partial_state=True)
    told = foretold(shape, label, length)
    device, spec = pick_device(), spec_of(label)
    torch.manual_seed(0)
    model = model_of(shape, label)
    weights = sum(p.numel() for p in model.parameters())
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    accelerator = make_accelerator(spec.rules)
    model = accelerator.prepare(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, scheduler = prepare_optimisation(accelerator, trained, spec, STEPS + 1)
    stepper = Stepper(trained, optimizer, spec.rules, how_to_step(spec))
    model.train()
    batch = {
        key: tensor.to(accelerator.device) for key, tensor in inputs_of(shape["vocab_size"], length).items()
    }
    losses, started = [], time.perf_counter()
    for step in range(1, STEPS + 1):
        if step == 2:
            started = time.perf_counter()
        stepper.look(step, STEPS)
        optimizer.zero_grad(set_to_none=True)
        outputs = model(**batch)
        accelerator.backward(outputs.loss)
        losses.append(float(outputs.loss.detach()))
        del outputs
        stepper.finish()
        stepper.watch.count()
        scheduler.step()
    row = {
        "method": name, "params": params, "clip": clip, "recomputed": recompute, "weights": weights,
        "rows": ROWS, "length": length, "peak_memory_gb": peak_bytes() / 1e9,
        "foretold_gb": (told.weights + told.gradients + told.optimizer + told.activations) / 1e9,
        "foretold_parts_gb": {part: size / 1e9 for part, size in told._asdict().items()}, "losses": losses,
        "seconds_per_step": (time.perf_counter() - started) / (STEPS - 1),
    }  # fmt: skip
    del model, optimizer, scheduler, stepper, accelerator
    gc.collect()
    return row


def memory_runs(shape: dict[str, int], *, dry_run: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """(Rows, checks). Without a GPU the peak is the process's, which never falls: only losses are checked."""
    rows = {label: measure(shape, label, 32 if dry_run else LENGTH) for label in ARMS}
    learned = all(row["losses"][-1] < row["losses"][0] for row in rows.values())
    checks: dict[str, Any] = {"memory runs: the loss falls on one batch": {"passed": learned}}
    if torch.cuda.is_available() and not dry_run:
        lean, mixed = (rows[label]["peak_memory_gb"] for label in ("lean full", "AdamW, mixed precision"))
        checks[f"lean full takes at most {LEAN_MOST} GB, mixed precision {MIXED_LEAST} GB or more"] = {
            "passed": lean <= LEAN_MOST and mixed >= MIXED_LEAST, "peaks_gb": [lean, mixed],
        }  # fmt: skip
        ratios = {label: row["foretold_gb"] / row["peak_memory_gb"] for label, row in rows.items()}
        checks[f"memory foretold over measured within {1 - NEAR:.2f} and {1 + NEAR:.2f}"] = {
            "passed": all(abs(ratio - 1) <= NEAR for ratio in ratios.values()), "ratios": ratios,
        }  # fmt: skip
    return rows, checks
