"""What a body makes of the texts of a classification task: features for a linear classifier. Child side.

One text gives its pooled last layer; a pair gives |u - v| and u * v of its two texts, each read alone, as
sentence features are judged on pairs (SentEval, Conneau and Kiela 2018, arXiv 1803.05449). Not for training,
where a pair is one input.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from finetrial.batching import collate, evaluation_batches
from finetrial.frozen import short_hash
from finetrial.plugins import Example, Feature
from finetrial.represent import pooled_rows


class Texts(NamedTuple):
    """A task's rows as model inputs: one list per text of a row, each in the rows' order."""

    sides: list[list[Feature]]
    pad_token_id: int

    @property
    def sha256(self) -> str:
        """Of the token ids: equal where two models read the same."""
        return short_hash([[feature.input_ids for feature in side] for side in self.sides], 64)


def texts_of(examples: Sequence[Example], task: Any, params: Any, tokenizer: Any, *, causal: bool) -> Texts:
    """The inputs of a classification task's examples, the two texts of a pair apart."""
    sides = [_alone(examples, "text")]
    if "text_pair" in examples[0]:
        sides.append(_alone(examples, "text_pair"))
    encoded = [task.head.encode(side, tokenizer, params, causal=causal) for side in sides]
    return Texts(encoded, tokenizer.pad_token_id)


def features(model: Any, texts: Texts) -> NDArray[np.float64]:
    """One row per example: N x D of single texts, N x 2D of pairs.

    Raises:
        ValueError: as `represent.pooled_rows`.
    """
    pooled = [_pooled(model, side, texts.pad_token_id) for side in texts.sides]
    if len(pooled) == 1:
        return pooled[0]
    u_ND, v_ND = pooled
    return np.concatenate([np.abs(u_ND - v_ND), u_ND * v_ND], axis=1)


def _alone(examples: Sequence[Mapping[str, Any]], key: str) -> list[Example]:
    return [{k: v for k, v in e.items() if k != "text_pair"} | {"text": e[key]} for e in examples]


def _pooled(model: Any, side: Sequence[Feature], pad_token_id: int) -> NDArray[np.float64]:
    device = next(model.parameters()).device
    order = evaluation_batches([len(feature.input_ids) for feature in side])
    batches = [collate([side[i] for i in indices], pad_token_id, device) for indices in order]
    pooled_ND = pooled_rows(model, batches).astype(np.float64)
    in_order_ND = np.empty_like(pooled_ND)
    in_order_ND[[i for indices in order for i in indices]] = pooled_ND
    return in_order_ND
