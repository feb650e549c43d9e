"""An embedding table of which a run reads few rows: those are trained, the rest only decays. Child side.

Half of a small encoder's weights are such a table, and nearly all of its rows are of words that no text of the
run has. AdamW leaves their moments at zero, so that weight decay alone changes them: here that is
put off until somebody reads them. What comes out is what AdamW makes of the whole table, up to rounding (by
which AdamW loses a decay of less than 3e-8 a step, and this does not).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from finetrial.memory import STAND_IN
from finetrial.optimisation import how_to_step
from finetrial.plugins import Feature, Stepping
from finetrial.records import RunSpec
from finetrial.stepping import weakly

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
        table.weight.register_post_accumulate_grad_hook(weakly(self.take_gradient))

    def take_gradient(self, weight: torch.Tensor) -> None:
        """Add the table's gradient to the rows' own.

        Raises:
            RuntimeError: a token was looked up that no training input has.
        """
        gradient = weight.grad
        assert gradient is not None
        weight.grad = None
        # Dense, if something besides looking up uses the table.
        gradient = gradient.coalesce() if gradient.is_sparse else gradient.to_sparse(1)
        at = self.place[gradient.indices()[0]]
        if bool((at < 0).any()):
            raise RuntimeError("the model looks up tokens that none of its training inputs has")
        if self.parameter.grad is None:
            self.parameter.grad = torch.zeros_like(self.parameter)
        self.parameter.grad.index_add_(0, at, gradient.values())

    @torch.no_grad()
    def put_back(self, optimizer: Any) -> None:
        """Write the rows into the table after a step."""
        self.table.weight.index_copy_(0, self.rows, self.parameter)
        group = next(g for g in optimizer.param_groups if any(p is self.parameter for p in g["params"]))
        self.owed *= 1.0 - float(group["lr"]) * group["weight_decay"]

    @torch.no_grad()
    def settle(self) -> None:
        """Bring the other rows up to date, before anything but training reads the table."""
        if self.owed != 1.0:
            self.table.weight.mul_(self.owed)
            self.table.weight.index_copy_(0, self.rows, self.parameter)
        self.owed = 1.0

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
    found = _few(model, features, pad_token_id, spec)
    return UsedRows(*found) if found and found[0].weight.device.type == "cpu" else None


def shrink(shapes: Any, features: Sequence[Feature], pad_token_id: int, spec: RunSpec, device: str) -> None:
    """Have a model of shapes, whose memory is to be counted, train what `used_rows` would have it train."""
    found = _few(shapes, features, pad_token_id, spec)
    if found and device == "cpu":
        table, rows = found
        table.weight.requires_grad_(False)
        stand_in = torch.empty(len(rows), table.embedding_dim, dtype=table.weight.dtype, device="meta")
        table.register_parameter(STAND_IN, torch.nn.Parameter(stand_in))


def trained_parameters(model: Any, used: UsedRows | None = None) -> list[torch.nn.Parameter]:
    """What is stepped: the model's trained parameters, the rows that are used in their table's place."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [used.parameter if used and each is used.table.weight else each for each in trained]


def _few(
    model: Any, features: Sequence[Feature], pad_token_id: int, spec: RunSpec
) -> tuple[torch.nn.Embedding, torch.Tensor] | None:
    """The model's table and the rows of it that are read, if those are few and can be told apart."""
    try:
        table = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):  # it does not tell its table, which is trained whole then
        return None
    if type(table) is not torch.nn.Embedding or not table.weight.requires_grad:
        return None
    if table.max_norm is not None or table.scale_grad_by_freq or how_to_step(spec) != Stepping():
        return None
    weights = [weight for module in model.modules() for weight in module._parameters.values()]
    if sum(weight is table.weight for weight in weights) > 1:
        return None
    read = {pad_token_id}.union(*(feature.input_ids for feature in features))
    return (table, torch.tensor(sorted(read))) if len(read) <= FEW * table.num_embeddings else None
