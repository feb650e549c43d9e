"""How well a causal model still predicts general text: its body under the base's own, frozen language head.

Child side: imports torch. Not for tasks and their scores, and not for models that read both ways: an encoder
predicts no next token.

Axes: B windows, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch.nn.functional import cross_entropy

from finetrial.heads.causal import bounds

# Logits at once, of windows x tokens x vocabulary: in fp32 400 MB, of which some three are held.
LOGITS_AT_ONCE = 100_000_000


class TokenLoss(NamedTuple):
    """Mean cross-entropy per predicted token, in nats, and how many were predicted."""

    mean: float
    tokens: int


def windows(texts: Iterable[str], tokenizer: Any, *, length: int, tokens: int) -> list[list[int]]:
    """The first `tokens` tokens of the texts, one after the other, in windows of `length` behind the token
    that begins a text (where the tokenizer has one). A text's end is a line break; a last short window is
    left out.

    Raises:
        ValueError: the texts do not fill one window.
    """
    first, _ = bounds(tokenizer)
    begin = [] if first is None else [first]
    room, ids = length - len(begin), []
    for text in texts:
        ids += tokenizer(text + "\n", add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) >= tokens:
            break
    ids = ids[:tokens]
    cut = [begin + ids[at : at + room] for at in range(0, len(ids) - room + 1, room)]
    if not cut:
        raise ValueError(f"{len(ids)} tokens of text do not fill a window of {length}")
    return cut


def token_loss(language_model: Any, model: Any, inputs: Sequence[Sequence[int]]) -> TokenLoss:
    """The loss of the language model with `model`'s body in the place of its own; neither is changed.

    `model` may have another head and may be a PEFT model: its body counts, adapters included.

    Raises:
        ValueError: the loss is not a finite number.
    """
    own = getattr(language_model, language_model.base_model_prefix)
    device = next(model.parameters()).device
    at_once = max(1, LOGITS_AT_ONCE // (max(map(len, inputs)) * language_model.config.vocab_size))
    total, count = 0.0, 0
    try:
        setattr(language_model, language_model.base_model_prefix, body_of(model))
        language_model.to(device).eval()  # its own body stays where it is
        for at in range(0, len(inputs), at_once):
            ids_BT = torch.tensor(inputs[at : at + at_once], device=device)
            with torch.no_grad(), torch.autocast(device.type, enabled=False):
                logits_BTV = language_model(input_ids=ids_BT, use_cache=False).logits[:, :-1]
            wanted_BT = ids_BT[:, 1:]
            total += float(
                cross_entropy(logits_BTV.float().flatten(0, 1), wanted_BT.flatten(), reduction="sum")
            )
            count += wanted_BT.numel()
    finally:
        setattr(language_model, language_model.base_model_prefix, own)
    if not torch.isfinite(torch.tensor(total)):
        raise ValueError("the loss on general text is not a finite number")
    return TokenLoss(total / count, count)


def body_of(model: Any) -> Any:
    """A model without its head; of a PEFT model with the adapters in it."""
    whole = model.get_base_model() if hasattr(model, "get_base_model") else model
    return getattr(whole, whole.base_model_prefix)
