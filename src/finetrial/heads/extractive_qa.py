"""Extractive question answering with unanswerable questions: windows, loss, spans and the no-answer rule.

For models with a span head (a start and an end logit per token), encoders and causal decoders alike. Not
for reading data (tasks) nor for comparing answer texts (`squad_metrics.py`).

A question whose context is longer than the model's input becomes several overlapping windows. Every window
has a *null position*, whose start plus end logit is the score of "no answer here": the [CLS] token of an
encoder (Devlin et al. 2019, arXiv:1810.04805, section 4.3), and the last token of a decoder, since under a
causal mask no earlier token has seen the whole input.

Letters of shapes: B windows in a batch, T tokens, C context tokens of a window, K candidates kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from pydantic import Field

from finetrial.errors import Diverged, ModelError
from finetrial.frozen import Frozen
from finetrial.heads import squad_metrics
from finetrial.heads.qa_windows import Trimmer, Window, causal_windows, pair_windows, token_span
from finetrial.plugins import Example, Feature, Scored, Splits

if TYPE_CHECKING:
    import torch

TOKENISE_AT_ONCE = 1000  # examples per tokenizer call: fast, and bounded in memory
THRESHOLD = "no_answer_threshold"
RANDOM_SEED, RANDOM_DRAWS = 0, 10


class QaParams(Frozen):
    """What the head needs to know. All lengths are in tokens."""

    max_length: int = Field(default=384, ge=32, le=1_000_000)
    stride: int = Field(default=128, ge=0)  # overlap of windows; cut to 3/4 of a window's room
    n_best: int = Field(default=20, ge=1)  # starts and ends of each window that are paired
    max_answer_length: int = Field(default=30, ge=1)


class WindowPrediction(NamedTuple):
    """What is kept of one window's logits. Positions count from the window's first context token."""

    starts: np.ndarray  # int32 [K], best first; ties by position
    start_logits: np.ndarray  # float32 [K]
    ends: np.ndarray  # int32 [K]
    end_logits: np.ndarray  # float32 [K]
    null_score: float  # start plus end logit at the null position


class ExtractiveQa:
    """The question-answering head of the SQuAD family; see `plugins.Head` for each method's contract.

    Examples carry `id`, `question`, `context`, and `answers` as {"text": [...], "answer_start": [...]},
    empty lists where the context has no answer. `answer_start` counts characters.
    """

    kind: Literal["question_answering"] = "question_answering"

    def model_options(self, splits: Splits, params: QaParams) -> dict[str, Any]:
        return {}

    def encode(
        self, examples: Sequence[Example], tokenizer: Any, params: QaParams, *, causal: bool
    ) -> list[Feature]:
        """The windows of all examples, in order; each is labelled with its answer or its null position.

        A window's label is the first answer's span if the window holds the whole of it. Labels are
        `start_positions`, `end_positions` (tokens of the input), and, for `predictions`, `null_position`,
        `context_start`, `context_end` (exclusive) and `n_best`. `extra["offsets"]` is an int32 [C, 2]
        array: the characters of the context that each context token stands for, without outer spaces.

        Raises:
            ModelError: the tokenizer cannot tell which characters a token stands for.
        """
        if not getattr(tokenizer, "is_fast", False):
            raise ModelError(
                f"{type(tokenizer).__name__} gives no character offsets, which question answering needs; "
                f"use a model that has a fast tokenizer (tokenizer.json)"
            )
        windows = causal_windows if causal else pair_windows
        features: list[Feature] = []
        for begin in range(0, len(examples), TOKENISE_AT_ONCE):
            chunk = examples[begin : begin + TOKENISE_AT_ONCE]
            questions = [example["question"].strip() for example in chunk]
            contexts = [example["context"] for example in chunk]
            found = windows(questions, contexts, tokenizer, params.max_length, params.stride)
            for index, group in groupby(found, key=lambda window: window.example):
                trimmed = Trimmer(contexts[index])
                answer = _first_answer(chunk[index])
                features.extend(_feature(window, begin + index, trimmed, answer, params) for window in group)
        return features

    def losses(self, outputs: Any, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Of each window the mean of start and end cross-entropy, in fp32; padding takes no share."""
        import torch
        from torch.nn.functional import cross_entropy

        padding_BT = batch["attention_mask"] == 0
        total_B = torch.zeros(len(padding_BT), dtype=torch.float32, device=padding_BT.device)
        for logits_BT, target in (
            (outputs.start_logits, batch["start_positions"]),
            (outputs.end_logits, batch["end_positions"]),
        ):
            masked_BT = logits_BT.float().masked_fill(padding_BT, float("-inf"))
            total_B = total_B + cross_entropy(masked_BT, target, reduction="none")
        return total_B / 2

    def predictions(self, outputs: Any, batch: Mapping[str, torch.Tensor]) -> list[WindowPrediction]:
        """The best starts and ends of each window's context, and its null score."""
        starts_BT = outputs.start_logits.detach().float().cpu().numpy()
        ends_BT = outputs.end_logits.detach().float().cpu().numpy()
        first_B, last_B, null_B, keep_B = (
            batch[name].cpu().tolist() for name in ("context_start", "context_end", "null_position", "n_best")
        )
        found = []
        for row, (first, last, null, keep) in enumerate(zip(first_B, last_B, null_B, keep_B, strict=True)):
            starts, start_logits = _top(starts_BT[row, first:last], keep)
            ends, end_logits = _top(ends_BT[row, first:last], keep)
            null_score = float(starts_BT[row, null]) + float(ends_BT[row, null])
            found.append(WindowPrediction(starts, start_logits, ends, end_logits, null_score))
        return found

    def score(
        self,
        predictions: Sequence[WindowPrediction],
        features: Sequence[Feature],
        examples: Sequence[Example],
        params: QaParams,
        calibration: Mapping[str, float] | None = None,
    ) -> Scored:
        """Official SQuAD v2 scores (see `squad_metrics.aggregate`), in percent; F1 per question id.

        `span_exact` and `span_f1` are those of the best span on the questions that have an answer, with
        "no answer" not allowed: what the model finds, whatever the threshold makes of it.

        A question is left unanswered when its lowest null score over windows exceeds its best span's score
        by more than the threshold, which is chosen to maximise F1 unless `calibration` gives it.

        Raises:
            Diverged: a logit is not a finite number.
        """
        texts, differences = _answers(predictions, features, examples, params)
        has_answer = {example["id"]: bool(example["answers"]["text"]) for example in examples}
        answered = {
            example["id"]: squad_metrics.best_over_golds(example["answers"]["text"], text)
            for example, text in zip(examples, texts, strict=True)
        }
        withheld = _no_answer_scores(examples)
        if calibration is None:
            gains = [answered[e["id"]][1] - withheld[e["id"]][1] for e in examples]
            threshold = best_threshold(differences, gains)
        else:
            threshold = calibration[THRESHOLD]
        chosen = {
            example["id"]: (withheld if difference > threshold else answered)[example["id"]]
            for example, difference in zip(examples, differences, strict=True)
        }
        spans = [answered[key] for key, known in has_answer.items() if known]
        forced = {
            f"span_{name}": 100.0 * sum(span[i] for span in spans) / max(1, len(spans))
            for i, name in enumerate(("exact", "f1"))
        }
        return Scored(
            metrics=squad_metrics.aggregate(chosen, has_answer) | forced,
            calibration={THRESHOLD: threshold},
            per_example={key: 100.0 * value for key, (_, value) in chosen.items()},
        )

    def baselines(self, splits: Splits, params: QaParams) -> dict[str, dict[str, float]]:
        """Test scores of never answering (`no_answer`), and of guessing (`random_span`, a mean over guesses):
        as often as train's questions have no answer none, else words of the context, as many as an answer of
        train has."""
        has_answer = {example["id"]: bool(example["answers"]["text"]) for example in splits.test}
        withheld = _no_answer_scores(splits.test)
        lengths = [len(e["answers"]["text"][0].split()) if e["answers"]["text"] else 0 for e in splits.train]
        draws = np.random.default_rng(RANDOM_SEED)
        guesses = []
        for _ in range(RANDOM_DRAWS):
            taken = draws.choice(lengths, size=len(splits.test))
            scores = {
                example["id"]: squad_metrics.best_over_golds(
                    example["answers"]["text"], _random_words(example["context"], int(length), draws)
                )
                if length
                else withheld[example["id"]]
                for example, length in zip(splits.test, taken, strict=True)
            }
            guesses.append(squad_metrics.aggregate(scores, has_answer))
        mean = {name: float(np.mean([guess[name] for guess in guesses])) for name in guesses[0]}
        return {"no_answer": squad_metrics.aggregate(withheld, has_answer), "random_span": mean}


def _random_words(context: str, count: int, draws: np.random.Generator) -> str:
    words = context.split()
    start = int(draws.integers(max(1, len(words) - count + 1)))
    return " ".join(words[start : start + count])


def best_threshold(differences: Sequence[float], gains: Sequence[float]) -> float:
    """The threshold on (null score - span score) that gains most over answering nothing.

    The official rule: go up through the sorted differences, answering one question more each time, and
    keep the difference at which the summed score was highest. Questions with equal differences are taken
    together, since no threshold separates them. Of equally good thresholds the lowest (fewest answers) is
    kept; when no answer gains anything the threshold lies below every difference.

    Args:
        differences: one per question; infinite where there is no span to answer with.
        gains: score when answered minus score when not, one per question.
    """
    order = sorted(zip(differences, gains, strict=True))
    finite = [value for value in differences if np.isfinite(value)]
    best_gain, best = 0.0, (min(finite) - 1.0) if finite else 0.0
    total = 0.0
    for value, group in groupby(order, key=lambda pair: pair[0]):
        total += sum(gain for _, gain in group)
        if total > best_gain and np.isfinite(value):
            best_gain, best = total, value
    return float(best)


def _feature(
    window: Window, row: int, trimmed: Trimmer, answer: tuple[int, int] | None, params: QaParams
) -> Feature:
    first, last = window.context
    offsets = trimmed(window.offsets)
    found = token_span(offsets, answer)
    start, end = (first + found[0], first + found[1]) if found else (window.null, window.null)
    return Feature(
        input_ids=window.input_ids,
        row=row,
        labels={
            "start_positions": start,
            "end_positions": end,
            "null_position": window.null,
            "context_start": first,
            "context_end": last,
            "n_best": params.n_best,
        },
        token_type_ids=window.token_type_ids,
        content=window.content,
        extra={"offsets": offsets},
    )


def _answers(
    predictions: Sequence[WindowPrediction],
    features: Sequence[Feature],
    examples: Sequence[Example],
    params: QaParams,
) -> tuple[list[str], list[float]]:
    """Per example: the text of its best span over windows, and its null score minus that span's score."""
    best = [-np.inf] * len(examples)
    null = [np.inf] * len(examples)
    texts = [""] * len(examples)
    for window, feature in zip(predictions, features, strict=True):
        finite = np.isfinite(window.start_logits).all() and np.isfinite(window.end_logits).all()
        if not finite or not np.isfinite(window.null_score):
            raise Diverged(0, f"non-finite logits for question {examples[feature.row]['id']}")
        null[feature.row] = min(null[feature.row], window.null_score)
        length_KK = window.ends[None, :] - window.starts[:, None] + 1
        allowed_KK = (length_KK >= 1) & (length_KK <= params.max_answer_length)
        if not allowed_KK.any():
            continue
        pair_KK = window.start_logits[:, None].astype(np.float64) + window.end_logits[None, :]
        pair_KK = np.where(allowed_KK, pair_KK, -np.inf)
        start, end = np.unravel_index(int(pair_KK.argmax()), pair_KK.shape)
        if pair_KK[start, end] > best[feature.row]:
            best[feature.row] = float(pair_KK[start, end])
            offsets = feature.extra["offsets"]
            begin, stop = int(offsets[window.starts[start], 0]), int(offsets[window.ends[end], 1])
            texts[feature.row] = examples[feature.row]["context"][begin:stop]
    if np.inf in null:
        raise ValueError(f"no prediction for question {examples[null.index(np.inf)]['id']}")
    return texts, [a - b for a, b in zip(null, best, strict=True)]


def _no_answer_scores(examples: Sequence[Example]) -> dict[str, tuple[float, float]]:
    return {e["id"]: squad_metrics.best_over_golds(e["answers"]["text"], "") for e in examples}


def _first_answer(example: Example) -> tuple[int, int] | None:
    """Characters [start, end) of the first answer without outer spaces, or None."""
    answers = example["answers"]
    if not answers["text"]:
        return None
    text, start = answers["text"][0], answers["answer_start"][0]
    start += len(text) - len(text.lstrip())
    return start, start + len(text.strip())


def _top(logits: np.ndarray, keep: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions and values of the largest logits, best first, ties by position."""
    order = np.argsort(-logits, kind="stable")[:keep]
    return order.astype(np.int32), logits[order].copy()
