"""Whether a module does what its library made it do: then the same may be done in another way. Child side."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

# Whose modules are known; a name in full, or all that begins with it.
KNOWN = ("torch.nn", "transformers.", "peft.tuners.lora", "peft.utils.", "finetrial.")
VARIANT = "finetrial_variant"
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

    That is told by where the function runs, and each that it wraps: what wraps another often bears its name.
    """
    by = getattr(forward, "__globals__", {}).get("__name__", "")
    wrapped = getattr(forward, "__wrapped__", None)
    known = kind.__module__.startswith(KNOWN) and by.startswith(MADE_BY)
    return known and (wrapped is None or is_known(kind, wrapped))


def variant_of(kind: Any, forward: Callable[..., Any]) -> type:
    """A kind of modules that differs in its forward alone; what is copied or pickled is of the old one."""

    def as_before(self: Any, protocol: Any) -> Any:
        _, (_, *given), *rest = kind.__reduce_ex__(self, max(2, protocol))
        return _make, (kind, *given), *rest

    own = {"forward": forward, "__module__": kind.__module__, "__reduce_ex__": as_before, VARIANT: True}
    return type(kind.__name__, (kind,), own)


def _make(kind: Any, *given: Any) -> Any:
    return kind.__new__(kind, *given)


def is_variant(module: Any) -> bool:
    """Whether a module is of a kind that `variant_of` made."""
    return hasattr(type(module), VARIANT)
