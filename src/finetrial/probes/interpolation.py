"""Interpolation: the task's score, drift and forgetting on the straight line from the base to the tuned body.

What methods are compared by at one task score, and not only where each of them ended. Known from robust
fine-tuning (Wortsman et al. 2022, arXiv:2109.01903). Which point of the line is taken is `matching.py`'s,
and over which pairs `descriptions.py`'s.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field, field_validator

from finetrial.frozen import Frozen
from finetrial.plugins import ProbeInput

ALSO = ("drift", "forgetting")  # measured at every share, if the study measures them


class Params(Frozen):
    """`shares`: of the update, between 0 and 1, where the line is measured; both ends always are.

    `rows`: of the validation split, for the task's score; null: all.
    """

    shares: list[float] = [0.25, 0.5, 0.75]
    rows: int | None = Field(default=None, ge=8)

    @field_validator("shares")
    @classmethod
    def _between(cls, shares: list[float]) -> list[float]:
        if not all(0 < share < 1 for share in shares):
            raise ValueError("shares lie between 0 and 1, which are measured anyway")
        return sorted(set(shares))


class Interpolation:
    """See `plugins.Probe`; the models of the line come from `updates.interpolated`."""

    Params = Params

    def measure(self, given: ProbeInput, params: Any) -> dict[str, Any]:
        """`points`, by share: the task's `scores`; `drift` and `forgetting`, the means that claims are about.

        The head is the tuned model's at every share; at 0 its body is the base's. `drift` and `forgetting` are
        None at both ends (0 at the base, by definition; at share 1 those measures themselves have them), and
        where the study does not measure them. No points for a model whose body has not moved.

        Raises:
            ModelError: the tuned model has other parameters than the base, even with its adapters merged.
        """
        from finetrial.updates import interpolated

        line = interpolated(given.base, given.tuned, given.head_names, [0.0, *params.shares])
        points = [_point(share, given, model) for share, model in line]
        if points:
            points.insert(0, _point(1.0, given, given.tuned))
        return {"points": points[::-1], "input_sha256": given.input_sha256}


def _point(share: float, given: ProbeInput, model: Any) -> dict[str, Any]:
    found: dict[str, Any] = {"share": share, "scores": dict(given.score(model))}
    for name in ALSO:
        between = name in given.others and 0 < share < 1
        found[name] = given.others[name](model) if between else None
    found["drift"] = found["drift"] and found["drift"]["cka_drift_mean"]
    lost = found["forgetting"]
    found["forgetting"] = lost and {
        "tasks": lost["tasks_forgotten"], "text": lost["text"] and lost["text"]["forgotten"],
    }  # fmt: skip
    return found


PLUGIN = Interpolation()
