"""Windows: how a question and a long context become model inputs, and which characters a token stands for.

Serves `extractive_qa.py`; knows tokenizers and characters, no labels' meaning, no logits, no scores.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from finetrial.errors import DataError, ModelError
from finetrial.heads.causal import bounds

QUESTION_SHARE = 3  # a question gets at most a third of the input; the rest of it is cut off

# Code points that str.isspace() holds for; tokens of some tokenizers carry the space before a word.
_SPACES = np.array([code for code in range(0x3001) if chr(code).isspace()], dtype=np.uint32)


class Window(NamedTuple):
    """One model input before labelling. `context` is [start, end) in it."""

    example: int  # index within the chunk
    input_ids: list[int]
    token_type_ids: list[int] | None
    context: tuple[int, int]
    offsets: np.ndarray  # int [C, 2], as the tokenizer gives them
    null: int
    content: tuple[int, int]


def pair_windows(
    questions: list[str], contexts: list[str], tokenizer: Any, max_length: int, stride: int
) -> Iterator[Window]:
    """Encoder inputs, in the tokenizer's own form for pairs: [CLS] question [SEP] context [SEP]."""
    limit = max_length // QUESTION_SHARE
    room = max_length - limit - tokenizer.num_special_tokens_to_add(pair=True)
    encoded = tokenizer(
        _shortened(questions, tokenizer, limit),
        contexts,
        truncation="only_second",
        max_length=max_length,
        stride=_overlap(stride, room),
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
        padding=False,
    )
    types = encoded.get("token_type_ids")
    for number, example in enumerate(encoded["overflow_to_sample_mapping"]):
        ids = encoded["input_ids"][number]
        places = [place for place, part in enumerate(encoded.sequence_ids(number)) if part == 1]
        first, last = (places[0], places[-1] + 1) if places else (len(ids), len(ids))
        offsets = np.array(encoded["offset_mapping"][number][first:last], dtype=np.int32).reshape(-1, 2)
        has_cls = tokenizer.cls_token_id is not None and tokenizer.cls_token_id in ids
        null = ids.index(tokenizer.cls_token_id) if has_cls else 0
        special = encoded["special_tokens_mask"][number]
        text = [place for place, mark in enumerate(special) if not mark] or [0]
        yield Window(
            example=int(example),
            input_ids=ids,
            token_type_ids=types[number] if types is not None else None,
            context=(first, last),
            offsets=offsets,
            null=null,
            content=(text[0], text[-1] + 1),
        )


def causal_windows(
    questions: list[str], contexts: list[str], tokenizer: Any, max_length: int, stride: int
) -> Iterator[Window]:
    """Decoder inputs: beginning of text, question, a window of the context, end of text."""
    start, end = bounds(tokenizer)
    if end is None:
        raise ModelError(
            f"{type(tokenizer).__name__} has no end-of-text token, which stands for 'no answer' in a decoder; "
            f"set eos_token in the model's tokenizer_config.json"
        )
    begin = [] if start is None else [start]
    before = _ids(tokenizer, "Question:\n")
    between = _ids(tokenizer, "\nContext:\n")
    asked = _tokenise(tokenizer, _shortened(questions, tokenizer, max_length // QUESTION_SHARE))["input_ids"]
    told = _tokenise(tokenizer, contexts, return_offsets_mapping=True)
    for example, (question, ids) in enumerate(zip(asked, told["input_ids"], strict=True)):
        prefix = [*begin, *before, *question, *between]
        room = max_length - len(prefix) - 1
        if room < 1:
            raise DataError(f"max_length {max_length} leaves no room for the context; give more tokens")
        offsets = np.array(told["offset_mapping"][example], dtype=np.int32).reshape(-1, 2)
        for first, last in _spans(len(ids), room, _overlap(stride, room)):
            text = [*prefix, *ids[first:last]]
            yield Window(
                example=example,
                input_ids=[*text, end],
                token_type_ids=None,
                context=(len(prefix), len(text)),
                offsets=offsets[first:last],
                null=len(text),
                content=(len(begin), len(text)),
            )


class Trimmer:
    """Moves token offsets past the white space at their ends; outer spaces are no part of an answer."""

    def __init__(self, context: str):
        codes = np.frombuffer(context.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
        solid = ~np.isin(codes, _SPACES)
        place = np.arange(len(codes))
        # next_[i]: first solid character at or after i; previous[i]: end of the last solid one before i.
        later = np.where(solid, place, len(codes))[::-1]
        self.next_ = np.append(np.minimum.accumulate(later)[::-1], len(codes))
        self.previous = np.append(0, np.maximum.accumulate(np.where(solid, place + 1, 0)))

    def __call__(self, offsets: np.ndarray) -> np.ndarray:
        end = self.previous[offsets[:, 1]]
        start = self.next_[offsets[:, 0]]
        empty = start >= end  # white space only: nothing at its own end
        start, end = np.where(empty, offsets[:, 1], start), np.where(empty, offsets[:, 1], end)
        return np.stack([start, end], axis=1).astype(np.int32)


def token_span(offsets: np.ndarray, answer: tuple[int, int] | None) -> tuple[int, int] | None:
    """First and last context token of the answer, or None if the window does not hold the whole of it."""
    if answer is None or not len(offsets) or offsets[0, 0] > answer[0] or offsets[-1, 1] < answer[1]:
        return None
    first = int(np.searchsorted(offsets[:, 1], answer[0], side="right"))
    last = int(np.searchsorted(offsets[:, 0], answer[1], side="left")) - 1
    return (first, last) if first <= last else None


def _overlap(stride: int, room: int) -> int:
    """The overlap asked for, cut to three quarters of a window's room, so that windows move on."""
    return min(stride, room * 3 // 4)


def _spans(length: int, room: int, overlap: int) -> Iterator[tuple[int, int]]:
    """Windows [start, end) of at most `room` that cover 0 .. length and share `overlap` tokens."""
    start = 0
    while True:
        end = min(start + room, length)
        yield start, end
        if end == length:
            return
        start = end - overlap


def _shortened(questions: list[str], tokenizer: Any, limit: int) -> list[str]:
    """The questions, cut after `limit` tokens where they are longer."""
    encoded = _tokenise(tokenizer, questions, return_offsets_mapping=True)
    return [
        question[: offsets[limit - 1][1]] if len(offsets) > limit else question
        for question, offsets in zip(questions, encoded["offset_mapping"], strict=True)
    ]


def _tokenise(tokenizer: Any, texts: list[str], **options: Any) -> Any:
    # verbose=False: the whole context may be longer than the model's input, which is what windows are for.
    return tokenizer(
        texts,
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
        **options,
    )


def _ids(tokenizer: Any, text: str) -> list[int]:
    return _tokenise(tokenizer, [text])["input_ids"][0]
