"""Proof of training: which tensors moved from their start. Child side."""

from __future__ import annotations

from typing import Any

import torch

from finetrial import checkpoint
from finetrial.assemble import Workbench
from finetrial.records import GroupProof, Proof

PIECE = 1 << 20  # numbers at a time


def prove(bench: Workbench, model: Any) -> Proof:
    """Which trained tensors moved from their start, and by how much.

    The start is built again from the spec, which is exact and needs no copy during training. A group that
    had to move and did not makes the run void. Of an adapter the tensors that start at zero (LoRA's B) have
    to move: weight decay alone moves the others, and changes nothing that the model computes.
    """
    plugin, _ = bench.method()
    start, built = bench.build_tuned()
    before = checkpoint.trained_tensors(start)
    groups: dict[str, list[tuple[str, float, float]]] = {}
    for name, tensor in checkpoint.trained_tensors(model).items():
        group = plugin.group(_plain_name(name), built.head_names)
        groups.setdefault(group, []).append(
            (name, *_change_and_size(tensor.detach().cpu(), before[name].detach()))
        )
    proofs = {}
    for group, rows in groups.items():
        change = sum(row[1] ** 2 for row in rows) ** 0.5
        size = sum(row[2] ** 2 for row in rows) ** 0.5
        proofs[group] = GroupProof(
            tensors=len(rows), moved=sum(row[1] > 0 for row in rows), change_norm=change,
            relative_change=change / size if size > 0 else None,
        )  # fmt: skip
    still = [group for group in plugin.must_move() if not _counts_as_moved(group, groups.get(group, []))]
    largest = sorted((row for rows in groups.values() for row in rows), key=lambda row: -row[1])[:5]
    return Proof(
        groups=proofs,
        largest={name: change for name, change, _ in largest},
        void=f"nothing moved in: {', '.join(still)}" if still else None,
    )


def _change_and_size(now: torch.Tensor, start: torch.Tensor) -> tuple[float, float]:
    """Norms of a tensor's change and of its start, in double precision; by pieces, as a table may be large."""
    change = size = 0.0
    for one, other in zip(now.reshape(-1).split(PIECE), start.reshape(-1).split(PIECE), strict=True):
        old = other.double()
        change += float((one.double() - old).square().sum())
        size += float(old.square().sum())
    return change**0.5, size**0.5


def _counts_as_moved(group: str, rows: list[tuple[str, float, float]]) -> bool:
    """Whether a group moved, given each tensor's name, change and size at the start."""
    from_zero = [change for _, change, size in rows if size == 0]
    changes = from_zero if group == "adapter" and from_zero else [change for _, change, _ in rows]
    return any(change > 0 for change in changes)


def _plain_name(name: str) -> str:
    """A parameter's name without what PEFT wraps around it."""
    return name.removeprefix("base_model.model.").replace(".modules_to_save.default", "")
