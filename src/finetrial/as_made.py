"""Whether a module does what its library made it do: then the same may be done in another way. Child side."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

# Whose modules are known; a name in full, or all that begins with it.
KNOWN = ("torch.nn", "transformers.", "peft.tuners.lora", "peft.utils.", "finetrial.")
# Whose functions their forwards may be: a decorator's, too.
MADE_BY = ("torch.", "transformers.", "peft.", "finetrial.")


def has_hooks(module: Any) -> bool:
    """Whether anybody listens to a module, or changes what it is given or gives; global ones are profilers."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def is_as_made(module: Any) -> bool:
    """Whether a module is of a known library, has its kind's forward, which nobody replaced, and no hooks."""
    kind = type(module)
    return "forward" not in vars(module) and is_known(kind, kind.forward) and not has_hooks(module)


@cache
def is_known(kind: type, forward: Callable[..., Any]) -> bool:
    """Whether a kind of modules is of a known library, and so is its forward.

    That is told by where the function runs: what wraps another often bears its name.
    """
    by = getattr(forward, "__globals__", {}).get("__name__", "")
    return kind.__module__.startswith(KNOWN) and by.startswith(MADE_BY)
