"""What of `analysis/summary.json` was measured of an arm's models: drift, spectrum, forgetting; intervals."""

from __future__ import annotations

from typing import Literal

from finetrial.frozen import Frozen


class Interval(Frozen):
    """An estimate with a two-sided 95 % interval over replicates: by t, or for a ratio of drifts by Fieller.

    None where n is too small, or the data do not bound it.
    """

    estimate: float
    low: float | None
    high: float | None
    sd: float | None  # ddof = 1
    n: int


class LayerDrift(Frozen):
    """Drift of one layer over replicates; layer 0 is the embeddings, 1..L the blocks."""

    layer: int
    cka: tuple[float | None, ...]  # 1 - debiased linear CKA against the base, one per replicate
    cosine: tuple[float | None, ...]  # 1 - mean-subtracted cosine, one per replicate
    cka_mean: float
    cosine_mean: float
    seed_to_seed: tuple[float, ...] = ()  # 1 - CKA of neighbouring replicates: the noise band
    perturbed: float | None = None  # 1 - CKA of the base with noise of the updates' norm, mean over replicates
    measures: dict[str, float] = {}  # every other measure of the layer, mean over replicates


class DriftSummary(Frozen):
    probe_runs: tuple[str, ...]
    replicates: tuple[int, ...]
    layers: tuple[LayerDrift, ...]
    cka: Interval  # mean over blocks 1..L, one value per replicate
    cosine: Interval
    seed_to_seed: Interval | None
    perturbed: Interval | None  # 1 - CKA of the base with noise of the updates' norm, mean over blocks
    means: dict[str, Interval]  # other measures, mean over blocks: cka_standardised, rsa, angle, read_cka, ...
    rows_error: float | None = None  # standard error over probe rows of one replicate's `cka`, mean of them
    per_replicate: dict[str, float]  # replicate number -> mean CKA drift over blocks


class SpectrumSummary(Frozen):
    """What training did to the weight matrices of the blocks; one value per replicate under each interval."""

    probe_runs: tuple[str, ...]
    replicates: tuple[int, ...]
    matrices: int  # of a replicate, at most, that changed
    overall: dict[str, Interval]  # relative_change, effective_rank_mean, intruders, ...
    directions: int  # singular vectors that could have been intruders, of one replicate
    thresholds: tuple[float, ...]
    intruder_curve: tuple[tuple[float, ...], ...]  # threshold, k = 1.. -> intruders, mean over replicates
    per_matrix: dict[str, dict[str, float]]  # matrix -> quantity -> mean over the `replicates` that changed it


class ForgottenPart(Frozen):
    """One task or text that a model was not trained on: points of accuracy, or nats per token."""

    name: str
    kind: Literal["task", "text"]
    base: float
    chance: float | None  # of a task: the commonest class
    readable: bool  # the base can do it at all
    tuned: Interval
    forgotten: Interval  # more is worse


class ForgettingSummary(Frozen):
    """What the arm's models lost; judged by text where it is measured, else by the mean over readable tasks."""

    probe_runs: tuple[str, ...]
    replicates: tuple[int, ...]
    parts: tuple[ForgottenPart, ...]
    judged_by: Literal["text", "tasks"] | None  # None: nothing that could be forgotten
    forgotten: Interval | None
    per_replicate: dict[str, float]  # replicate number -> what is judged
