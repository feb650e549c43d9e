"""What `bench/calibration.py` simulates: kinds of claims whose truth is known, and one figure of its tables."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from finetrial import claims, stats
from finetrial.study import Claim
from finetrial.summary import ClaimResult
from finetrial.summary_measures import Interval

Array = NDArray[np.float64]
SEED = 20261120
CORRELATION = 0.5  # between the two methods' values of one pair
REPLICATES = (5, 10)  # the default, and what a headline claim should have


@dataclass(frozen=True)
class Row:
    """One figure with the bar that it has to lie within, if there is one."""

    part: str
    what: str
    n: int
    studies: int
    figure: float
    low: float | None = None
    high: float | None = None
    foretold: float | None = None

    @property
    def holds(self) -> bool:
        return self.low is None or self.high is None or self.low <= self.figure <= self.high

    @property
    def bar(self) -> str:
        if self.low is None or self.high is None:
            return "—"
        if self.foretold is not None:
            return "foretold ± 0.03"
        return f"{self.low:.2f} to {self.high:.2f}" if self.low else f"at most {self.high:.3f}"

    @property
    def cell(self) -> str:
        foretold = "" if self.foretold is None else f" (foretold {self.foretold:.3f})"
        return f"{self.figure:.3f}{foretold} at {self.n}{'' if self.holds else ' NOT HELD'}"


@dataclass(frozen=True)
class Kind:
    """A kind of claim with a world in which it can be judged; D = method - factor * reference."""

    name: str
    claim: Claim
    factor: float
    supports: stats.Direction
    reference: float  # true mean
    sd: float  # of either method's replicates
    higher_is_better: bool = True
    trivial: tuple[str, float] | None = None
    noise: float | None = None

    @property
    def sd_of_contrast(self) -> float:
        return self.sd * math.sqrt(1 + self.factor**2 - 2 * self.factor * CORRELATION)

    def case(self, method: Array, reference: Array, task: str = "task") -> claims.Case:
        return claims.Case(
            self.claim, task, side("a", method), side("b", reference),
            higher_is_better=self.higher_is_better, trivial=self.trivial, noise=self.noise,
        )  # fmt: skip

    def drawn(self, rng: np.random.Generator, n: int, effect: float = 0.0) -> tuple[Array, Array]:
        """Method and reference, n pairs; the true D is `effect` of its sds on the supporting side of 0."""
        method, reference = correlated(rng, n)
        sign = 1 if self.supports == "greater" else -1
        mean = self.factor * self.reference + sign * effect * self.sd_of_contrast
        return mean + self.sd * method, self.reference + self.sd * reference


WITHIN = Kind(
    "within 3%, higher is better",
    Claim(text="a within 3% of b", kind="within", method="a", reference="b", margin=0.03),
    0.97, "greater", reference=0.80, sd=0.01, trivial=("majority", 0.5),
)  # fmt: skip
WITHIN_LOWER = Kind(
    "within 3%, lower is better",
    WITHIN.claim, 1.03, "less", reference=1.0, sd=0.02, higher_is_better=False, trivial=("majority", 2.0),
)  # fmt: skip
DRIFTS_LESS = Kind(
    "drifts 20% less",
    Claim(text="a drifts 20% less than b", kind="drifts_less", method="a", reference="b", margin=0.2),
    0.80, "less", reference=0.20, sd=0.015, noise=1e-4,
)  # fmt: skip
FORGETS_LESS = Kind(
    "forgets less",
    Claim(text="a forgets less than b", kind="forgets_less", method="a", reference="b", margin=0.0),
    1.0, "less", reference=1.5, sd=0.4, noise=0.0,
)  # fmt: skip
KINDS = (WITHIN, WITHIN_LOWER, DRIFTS_LESS, FORGETS_LESS)


def side(name: str, values: Iterable[float]) -> claims.Side:
    kept = {number: float(value) for number, value in enumerate(values)}
    return claims.Side(name, kept, dict.fromkeys(kept, ()), {})


def correlated(rng: np.random.Generator, n: int) -> tuple[Array, Array]:
    """Two standard normal samples, correlated pair by pair."""
    shared, own, other = rng.standard_normal((3, n))
    weights = math.sqrt(CORRELATION), math.sqrt(1 - CORRELATION)
    return weights[0] * shared + weights[1] * own, weights[0] * shared + weights[1] * other


def judged(kind: Kind, method: Array, reference: Array) -> ClaimResult:
    (result,) = claims.judge([kind.case(method, reference)])
    return result


def share(flags: Sequence[bool]) -> float:
    return float(np.mean(flags))


def contains(interval: Interval | stats.MeanInterval | None, truth: float) -> bool:
    return (
        interval is not None
        and interval.low is not None
        and interval.high is not None
        and interval.low <= truth <= interval.high
    )
