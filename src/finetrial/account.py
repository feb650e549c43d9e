"""What a run cost and where it ran: times, memory, operations, versions. Child side."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from finetrial import files
from finetrial.assemble import Workbench, pick_device
from finetrial.fair_time import FAIR
from finetrial.process_memory import peak_bytes
from finetrial.records import Cost, Fit, RunSpec
from finetrial.training_state import Progress

ENVIRONMENT_PACKAGES = ("torch", "transformers", "peft", "accelerate", "numpy", "tokenizers", "safetensors")


class Clock:
    """Time since an attempt at a run began."""

    def __init__(self) -> None:
        self.wall, self.cpu = FAIR.now()

    def passed(self) -> tuple[float, float]:
        """(Wall, CPU) seconds so far."""
        wall, cpu = FAIR.now()
        return wall - self.wall, cpu - self.cpu


def cost_of(
    clock: Clock, model: Any, progress: Progress | None = None, saved_bytes: int = 0, peak: int | None = None,
    fit: Fit | None = None,
) -> Cost:  # fmt: skip
    """What a run cost, over all its attempts as far as they counted."""
    wall, cpu = clock.passed()
    progress = progress or Progress()
    device = pick_device()
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"cpu ({torch.get_num_threads()} threads)"
    return Cost(
        wall_seconds=round(wall + progress.earlier_wall_seconds, 3),
        train_seconds=round(progress.train_seconds, 3),
        evaluate_seconds=round(progress.evaluate_seconds, 3),
        cpu_seconds=round(cpu + progress.earlier_cpu_seconds, 3),
        peak_memory_bytes=peak_bytes() if peak is None else peak,
        predicted_memory_bytes=fit.predicted if fit else None,
        gives_back=fit is not None and fit.tight,
        device=name,
        flops=_flops(model, progress.tokens),
        trainable_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        total_parameters=sum(p.numel() for p in model.parameters()),
        saved_bytes=saved_bytes,
    )


def _flops(model: Any, tokens: int) -> float:
    """Floating-point operations of training by the usual count (Kaplan et al. 2020, arXiv:2001.08361).

    2 per weight and token forward, 2 backward to the inputs, and 2 more for every weight that is trained;
    embedding tables are looked up, not multiplied.
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    multiplied = sum(p.numel() for p in model.parameters() if id(p) not in embeddings)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad and id(p) not in embeddings)
    return float((4 * multiplied + 2 * trained) * tokens)


def split_rows(bench: Workbench) -> dict[str, int]:
    splits = bench.splits
    return {
        "train": len(splits.train), "validation": len(splits.validation), "test": len(splits.test),
    }  # fmt: skip


def environment(spec: RunSpec) -> dict[str, str]:
    """Versions and machine of this process, and the source of the user's own plug-ins that a run uses."""
    facts = {name: version(name) for name in ENVIRONMENT_PACKAGES}
    return facts | {
        "finetrial": version("finetrial"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "threads": str(torch.get_num_threads()),
        **{f"source of {name}": digest for name, digest in _own_sources(_plugins_of(spec)).items()},
    }


def _plugins_of(spec: RunSpec) -> list[str]:
    own = [spec.task.use, *(measure["use"] for measure in spec.measures.values())]
    return [*own, spec.method.use] if spec.method else own


def _own_sources(uses: Iterable[str]) -> dict[str, str]:
    """`module:object` -> the first 12 digits of its file's SHA-256, of those that are not built in."""
    found = {}
    for use in uses:
        module = sys.modules.get(use.partition(":")[0]) if ":" in use else None
        path = Path(getattr(module, "__file__", None) or "")
        if path.is_file():
            found[use] = files.sha256_file(path)[:12]
    return found
