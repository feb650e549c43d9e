"""What `bench/gpu.py` measures of memory: lean full fine-tuning beside mixed-precision AdamW's and LoRA's.

TinyLlama's shape with a question-answering head (1.03 B weights, random), windows of 384 tokens, two at a time;
a few steps of finetrial's own optimiser, stepper and autocast. Lean runs and LoRA recompute activations, which
mixed-precision AdamW does not, as is usual; its variant that does is measured beside it.
"""

from __future__ import annotations

import gc
import time
from typing import Any

import torch
from accelerate.state import AcceleratorState
from transformers import LlamaConfig, LlamaForQuestionAnswering

from finetrial import plugins
from finetrial.assemble import pick_device
from finetrial.fit import peak_bytes
from finetrial.optimisation import how_to_step, prepare_optimisation
from finetrial.plugins import AttachInput
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


def measure(shape: dict[str, int], label: str, length: int = LENGTH) -> dict[str, Any]:
    """Peak memory over a few steps, the losses of the steps, and seconds per step after the first."""
    name, params, clip, recompute = ARMS[label]
    AcceleratorState._reset_state(reset_partial_state=True)
    device = pick_device()
    spec = RunSpec(
        study="memory", stage="trial", number=0, model=ModelSource(name="./none"),
        task=TaskSpec(name="none", use="none", params={}),
        method=MethodSpec(name=name, use=name, params=params),
        settings={
            "learning_rate": 1e-5, "epochs": 1, "batch_size": ROWS, "warmup_ratio": 0.0, "weight_decay": 0.01,
            "rank": 8, "dropout": 0.0,
        },
        rules=LoopRules(precision="bf16", clip=clip), seeds=Seeds(data_order=1, head=2, adapter=3, dropout=4),
    )  # fmt: skip
    torch.manual_seed(0)
    config = LlamaConfig(**shape, pad_token_id=0, bos_token_id=1, eos_token_id=2, use_cache=False)
    model = LlamaForQuestionAnswering(config)
    weights = sum(p.numel() for p in model.parameters())
    plugin = plugins.load("methods", name)
    model.requires_grad_(False)
    given = AttachInput(model, "question_answering", ("qa_outputs",))
    model = plugin.attach(given, spec.settings, plugin.Params.model_validate(params))
    if recompute:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    accelerator = make_accelerator(spec.rules)
    model, optimizer, scheduler = prepare_optimisation(accelerator, model, spec, STEPS + 1)
    stepper = Stepper(accelerator, model, optimizer, spec.rules, how_to_step(spec))
    model.train()
    random = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, shape["vocab_size"], (ROWS, length), generator=random).to(accelerator.device)
    ends = torch.randint(0, length, (2, ROWS), generator=random).to(accelerator.device)
    losses, started = [], time.perf_counter()
    for step in range(1, STEPS + 1):
        if step == 2:
            started = time.perf_counter()
        stepper.look(step, STEPS)
        optimizer.zero_grad(set_to_none=True)
        outputs = model(
            input_ids=tokens, attention_mask=torch.ones_like(tokens), start_positions=ends[0],
            end_positions=ends[1],
        )  # fmt: skip
        accelerator.backward(outputs.loss)
        losses.append(float(outputs.loss.detach()))
        del outputs
        stepper.finish()
        stepper.watch.count()
        scheduler.step()
    row = {
        "method": name, "params": params, "clip": clip, "recomputed": recompute, "weights": weights,
        "rows": ROWS, "length": length, "peak_memory_gb": peak_bytes() / 1e9, "losses": losses,
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
    return rows, checks
