"""An embedding table of which a run reads few rows: those are trained, the rest only decays. Child side.

A step over a whole table costs more than the rest of a small model's, nearly all of it spent on rows that no
text of the run has. AdamW leaves their moments at zero, so that weight decay alone changes them: here that is
put off until somebody reads them. What comes out is what AdamW makes of the whole table, up to rounding.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from finetrial.memory import STAND_IN
from finetrial.optimisation import how_to_step
from finetrial.plugins import Feature, Stepping
from finetrial.records import RunSpec

# Beyond this share of a table's rows nothing is gained.
FEW = 0.5


class UsedRows:
    """The trained rows of one table as a small `parameter`, and the decay that its other rows are `owed`."""

    def __init__(self, table: torch.nn.Embedding, rows: torch.Tensor) -> None:
        self.table, self.rows = table, rows
        self.parameter = torch.nn.Parameter(table.weight.detach()[rows])
        self.place = torch.full((table.num_embeddings,), -1)
        self.place[rows] = torch.arange(len(rows))
        self.owed = 1.0  # what the other rows are still to be multiplied by
        table.sparse = True
        table.weight.register_post_accumulate_grad_hook(self._take_gradient)

    def _take_gradient(self, weight: torch.Tensor) -> None:
        gradient = weight.grad.coalesce()  # type: ignore[union-attr]
        weight.grad = None
        at = self.place[gradient.indices()[0]]
        if bool((at < 0).any()):
            raise RuntimeError("the model looks up tokens that none of its training inputs has")
        if self.parameter.grad is None:
            self.parameter.grad = torch.zeros_like(self.parameter)
        self.parameter.grad.index_add_(0, at, gradient.values())

    @torch.no_grad()
    def put_back(self, optimizer: Any) -> float:
        """Write the rows into the table after a step; what the other rows are owed by then."""
        self.table.weight.index_copy_(0, self.rows, self.parameter)
        group = next(g for g in optimizer.param_groups if any(p is self.parameter for p in g["params"]))
        self.owed *= 1.0 - float(group["lr"]) * group["weight_decay"]
        return self.owed

    @torch.no_grad()
    def settle(self) -> float:
        """Bring the other rows up to date, before anything but training reads the table; what they are owed."""
        if self.owed != 1.0:
            self.table.weight.mul_(self.owed)
            self.table.weight.index_copy_(0, self.rows, self.parameter)
        self.owed = 1.0
        return self.owed

    @torch.no_grad()
    def read_again(self, owed: float) -> None:
        """Take the rows from the table, which has been replaced, and what its other rows are owed."""
        self.parameter.copy_(self.table.weight[self.rows])
        self.owed = owed


def used_rows(model: Any, features: Sequence[Feature], pad_token_id: int, spec: RunSpec) -> UsedRows | None:
    """The rows of the model's input embeddings that its training inputs read, or None where that gains nothing.

    Nothing on a GPU, where a whole table costs little, and for a method that steps its tensors in its own way;
    nor for a table that is not trained, or is the weight of another module, too.
    """
    table = _trained_table(model)
    if table is None or table.weight.is_cuda or how_to_step(spec) != Stepping():
        return None
    rows = _rows(features, pad_token_id)
    return UsedRows(table, rows) if len(rows) <= FEW * table.num_embeddings else None


def shrink(shapes: Any, features: Sequence[Feature], pad_token_id: int, spec: RunSpec, device: str) -> None:
    """Have a model of shapes, whose memory is to be counted, train what `used_rows` would have it train."""
    table = _trained_table(shapes)
    if table is None or device == "cuda" or how_to_step(spec) != Stepping():
        return
    rows = _rows(features, pad_token_id)
    if len(rows) <= FEW * table.num_embeddings:
        table.weight.requires_grad_(False)
        stand_in = torch.empty(len(rows), table.embedding_dim, dtype=table.weight.dtype, device="meta")
        table.register_parameter(STAND_IN, torch.nn.Parameter(stand_in))


def trained_parameters(model: Any, used: UsedRows | None = None) -> list[torch.nn.Parameter]:
    """What is stepped: the model's trained parameters, the rows that are used in their table's place."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [used.parameter if used and each is used.table.weight else each for each in trained]


def _rows(features: Sequence[Feature], pad_token_id: int) -> torch.Tensor:
    found: set[int] = {pad_token_id}
    for feature in features:
        found.update(feature.input_ids)
    return torch.tensor(sorted(found))


def _trained_table(model: Any) -> torch.nn.Embedding | None:
    table = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    if type(table) is not torch.nn.Embedding or not table.weight.requires_grad:
        return None
    if table.max_norm is not None or table.scale_grad_by_freq:
        return None
    shared = sum(table.weight is weight for weight in _weights(model.modules()))
    return table if shared == 1 else None


def _weights(modules: Iterable[torch.nn.Module]) -> Iterable[torch.Tensor | None]:
    for module in modules:
        yield from module._parameters.values()
