"""Classification of one text or a pair: encoding, loss, predictions, and accuracy, F1 and Matthews.

For models with a sequence-classification head, encoders and causal decoders alike. Not for reading data
(`classification_task.py`). All scores are in points: accuracy and F1 from 0 to 100, Matthews' correlation
from -100 to 100.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field

from finetrial.errors import Diverged
from finetrial.frozen import Frozen
from finetrial.heads.causal import bounds
from finetrial.plugins import Example, Feature, Metric, Scored, Splits

if TYPE_CHECKING:
    import torch

METRICS = {
    "accuracy": Metric(name="accuracy", higher_is_better=True, worst=0.0, best=100.0),
    "f1": Metric(name="f1", higher_is_better=True, worst=0.0, best=100.0),
    "matthews": Metric(name="matthews", higher_is_better=True, worst=-100.0, best=100.0),
}
RANDOM_DRAWS = 200  # guesses per row behind the uniform baseline's F1, which has no closed form
RANDOM_SEED = 0
TOKENISE_AT_ONCE = 1000  # examples per tokenizer call: fast, and bounded in memory


class ClassificationParams(Frozen):
    """What the head needs to know."""

    max_length: int = Field(default=128, ge=8, le=1_000_000)  # tokens; longer texts are cut


class Classification:
    """The sequence-classification head; see `plugins.Head` for each method's contract.

    Examples carry `id`, `text`, `text_pair` for pairs, `label` (0 .. classes - 1), and `classes`, the names
    of all labels in order.
    """

    kind: Literal["sequence_classification"] = "sequence_classification"

    def model_options(self, splits: Splits, params: ClassificationParams) -> dict[str, Any]:
        names = splits.train[0]["classes"]
        return {
            "num_labels": len(names),
            "id2label": dict(enumerate(names)),
            "label2id": {name: number for number, name in enumerate(names)},
        }

    def encode(
        self, examples: Sequence[Example], tokenizer: Any, params: ClassificationParams, *, causal: bool
    ) -> list[Feature]:
        """One input per example; its label is `labels`. Of a pair the longer text is cut first."""
        to_inputs = _causal_inputs if causal else _encoder_inputs
        features: list[Feature] = []
        for begin in range(0, len(examples), TOKENISE_AT_ONCE):
            chunk = examples[begin : begin + TOKENISE_AT_ONCE]
            for place, (ids, types, content) in enumerate(to_inputs(chunk, tokenizer, params.max_length)):
                label = {"labels": int(chunk[place]["label"])}
                features.append(Feature(ids, begin + place, label, types, content))
        return features

    def losses(self, outputs: Any, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The cross-entropy of each of the batch's inputs, in fp32."""
        from torch.nn.functional import cross_entropy

        return cross_entropy(outputs.logits.float(), batch["labels"], reduction="none")

    def predictions(self, outputs: Any, batch: Mapping[str, torch.Tensor]) -> list[np.ndarray]:
        """Each input's logits: float32 [classes]."""
        return list(outputs.logits.detach().float().cpu().numpy())

    def score(
        self,
        predictions: Sequence[np.ndarray],
        features: Sequence[Feature],
        examples: Sequence[Example],
        params: ClassificationParams,
        calibration: Mapping[str, float] | None = None,
    ) -> Scored:
        """`accuracy`, `f1` and `matthews` of the likeliest classes; 100 or 0 per example. Nothing is
        calibrated. Of equal logits the lowest class is taken.

        Raises:
            Diverged: a logit is not a finite number.
        """
        logits = np.stack(predictions)
        if not np.isfinite(logits).all():
            bad = int(np.argmin(np.isfinite(logits).all(axis=1)))
            raise Diverged(0, f"non-finite logits for {examples[features[bad].row]['id']}")
        predicted = np.empty(len(examples), dtype=np.int64)
        predicted[[feature.row for feature in features]] = logits.argmax(axis=1)
        true = _labels(examples)
        right = {e["id"]: 100.0 * float(t == p) for e, t, p in zip(examples, true, predicted, strict=True)}
        return Scored(metrics(true, predicted, len(examples[0]["classes"])), {}, right)

    def baselines(self, splits: Splits, params: ClassificationParams) -> dict[str, dict[str, float]]:
        """Test scores of always saying train's commonest class (`majority`; the lowest of equals), and the
        expected ones of guessing every class alike (`uniform`; F1 is a mean over random guesses). Of two
        classes also of always saying the last, which F1 is of (`always_last`), unless that is the commonest."""
        classes = len(splits.test[0]["classes"])
        true = _labels(splits.test)
        commonest = int(np.bincount(_labels(splits.train), minlength=classes).argmax())
        random = np.random.default_rng(RANDOM_SEED)
        draws = [
            metrics(true, random.integers(classes, size=len(true)), classes)["f1"] for _ in range(RANDOM_DRAWS)
        ]
        last = (
            {"always_last": metrics(true, np.full_like(true, 1), 2)} if classes == 2 and commonest == 0 else {}
        )
        return {
            "majority": metrics(true, np.full_like(true, commonest), classes),
            **last,
            # A guess is right with probability 1 / classes, and no guess correlates with the labels.
            "uniform": {"accuracy": 100.0 / classes, "f1": float(np.mean(draws)), "matthews": 0.0},
        }


def metrics(true: np.ndarray, predicted: np.ndarray, classes: int) -> dict[str, float]:
    """Accuracy, F1 and Matthews' correlation, in points.

    With two classes F1 is that of the last class (label 1); with more it is the plain mean over the classes
    that occur among the labels or the predictions. An F1 without any true or predicted member is 0. Matthews
    is Gorodkin's R_K (2004, doi:10.1016/j.compbiolchem.2004.09.006, equation 8), which for two classes is the
    phi coefficient; it is 0 when either side is constant.

    Args:
        true: int [rows], labels 0 .. classes - 1.
        predicted: int [rows], likewise.
        classes: how many labels there are.

    Raises:
        ValueError: there are no rows, or not one prediction per label.
    """
    if len(true) == 0 or true.shape != predicted.shape:
        raise ValueError(f"{len(true)} labels and {len(predicted)} predictions cannot be compared")
    counts = np.zeros((classes, classes))  # [true, predicted]
    np.add.at(counts, (true, predicted), 1.0)
    right, rows = counts.trace(), counts.sum()
    of_true, of_predicted = counts.sum(axis=1), counts.sum(axis=0)
    members = of_true + of_predicted
    f1 = 2 * counts.diagonal() / np.where(members > 0, members, 1.0)
    covariance = right * rows - of_true @ of_predicted
    spread = (rows**2 - of_true @ of_true) * (rows**2 - of_predicted @ of_predicted)
    return {
        "accuracy": 100.0 * float(right / rows),
        "f1": 100.0 * float(f1[-1] if classes == 2 else f1[members > 0].mean()),
        "matthews": 100.0 * float(covariance / np.sqrt(spread)) if spread > 0 else 0.0,
    }


def _labels(examples: Sequence[Example]) -> np.ndarray:
    return np.array([example["label"] for example in examples], dtype=np.int64)


_Inputs = list[tuple[list[int], list[int] | None, tuple[int, int]]]  # ids, token types, content


def _encoder_inputs(examples: Sequence[Example], tokenizer: Any, max_length: int) -> _Inputs:
    """In the tokenizer's own form: [CLS] text [SEP], or [CLS] text [SEP] pair [SEP]."""
    texts = [example["text"] for example in examples]
    pairs = [example["text_pair"] for example in examples] if "text_pair" in examples[0] else None
    encoded = tokenizer(
        texts, pairs, truncation=True, max_length=max_length, padding=False, return_special_tokens_mask=True
    )
    inputs: _Inputs = []
    for place, (ids, special) in enumerate(
        zip(encoded["input_ids"], encoded["special_tokens_mask"], strict=True)
    ):
        text = [position for position, mark in enumerate(special) if not mark]
        # An empty text leaves only special tokens; the first stands for it.
        content = (text[0], text[-1] + 1) if text else (0, 1)
        types = encoded["token_type_ids"][place] if "token_type_ids" in encoded else None
        inputs.append((ids, types, content))
    return inputs


def _causal_inputs(examples: Sequence[Example], tokenizer: Any, max_length: int) -> _Inputs:
    """Beginning of text, the text (for pairs a line break and the second text), end of text.

    The model reads its last token that is not padding. Where one token serves for both padding and end of
    text, an end would be taken for padding and never be read; it is left out there.
    """
    start, stop = bounds(tokenizer)
    begin = [] if start is None else [start]
    readable = tokenizer.pad_token_id is not None and stop != tokenizer.pad_token_id
    end = [stop] if stop is not None and readable else []

    def ids_of(texts: list[str]) -> list[list[int]]:
        options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
        return tokenizer(texts, **options)["input_ids"]

    firsts = ids_of([example["text"] for example in examples])
    if "text_pair" in examples[0]:
        between = ids_of(["\n"])[0]
        seconds = ids_of([example["text_pair"] for example in examples])
    else:
        between, seconds = [], [[] for _ in examples]
    inputs: _Inputs = []
    room = max_length - len(begin) - len(between) - len(end)
    for first, second in zip(firsts, seconds, strict=True):
        keep_first, keep_second = _longest_first(len(first), len(second), room)
        text = [*first[:keep_first], *between, *second[:keep_second]]
        ids = [*begin, *text, *end] or [0]  # an empty text, and a tokenizer without special tokens
        content = (len(begin), len(begin) + len(text)) if text else (0, 1)
        inputs.append((ids, None, content))
    return inputs


def _longest_first(first: int, second: int, room: int) -> tuple[int, int]:
    """Lengths that fit into `room` when tokens are dropped from the longer side, then from both in turn."""
    if first + second <= room:
        return first, second
    shorter = min(first, second, room // 2)
    if first <= second:
        return shorter, room - shorter
    return room - shorter, shorter
