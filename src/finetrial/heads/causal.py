"""What decoder inputs begin and end with, for all heads. Not for what stands between."""

from __future__ import annotations

from typing import Any


def bounds(tokenizer: Any) -> tuple[int | None, int | None]:
    """(begin, end): the token ids that mark the two ends of a text; None where the tokenizer has none.

    A tokenizer without text bounds lends its [CLS] and [SEP].
    """
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    return (
        tokenizer.cls_token_id if begin is None else begin,
        tokenizer.sep_token_id if end is None else end,
    )
