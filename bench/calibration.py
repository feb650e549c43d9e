"""Are verdicts wrong as often as they say? Simulates studies and gives them to the real `claims.judge`.

    python bench/calibration.py [--studies 4000] [--output bench/results/calibration.json]

The truth of each simulated study is known, so that false verdicts, missed effects and intervals that miss
can be counted. Replicates of two methods are paired, with a correlation of 0.5. A figure with a bar has to
lie within it, or the exit code is 1; one without a bar is there for comparison. Same seed, same table. One
core, some minutes.

Not for measuring anything about real training: spreads are made up; normal unless the row says otherwise.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from scipy.special import ndtr, ndtri

from calibration_worlds import (
    CORRELATION,
    DRIFTS_LESS,
    KINDS,
    REPLICATES,
    SEED,
    WITHIN,
    Row,
    contains,
    correlated,
    judged,
    share,
)  # fmt: skip
from finetrial import claims, effects, power, resampling, stats

LAYERS, LAYER_CORRELATION = 22, 0.9
EXAMPLES, BOOTSTRAP_DRAWS = 400, 1000


# ---- (a) one claim, exactly at the margin ------------------------------------------------------------------


def false_verdicts(studies: int) -> list[Row]:
    rows = []
    for number, kind in enumerate(KINDS):
        for n in REPLICATES:
            rng = np.random.default_rng([SEED, 1, number, n])
            verdicts = [judged(kind, *kind.drawn(rng, n)).verdict for _ in range(studies)]
            for verdict in ("supported", "refuted"):
                rate = share([found == verdict for found in verdicts])
                rows.append(Row("a", f"{kind.name}: `{verdict}`", n, studies, rate, 0.03, 0.07))
    for n in REPLICATES:
        rng = np.random.default_rng([SEED, 1, 9, n])
        unpaired = []
        for _ in range(studies):
            method, reference = rng.normal(0, 3, n), rng.normal(0, 1, n)
            unpaired.append(stats.unpaired_contrast(list(method), list(reference), "less").upper < 0)
        name = "unpaired contrast, one arm of three times the spread"
        rows.append(Row("a", f"{name}: upper bound below 0", n, studies, share(unpaired), 0.03, 0.07))
    return rows


# ---- (b) families of claims --------------------------------------------------------------------------------


def families(studies: int) -> list[Row]:
    rows = []
    noise = 3 * math.sqrt(0.05 * 0.95 / studies)
    for size in (4, 8):
        for n in REPLICATES:
            rng = np.random.default_rng([SEED, 2, size, n])
            supported, refuted = [], []
            for _ in range(studies):
                cases = [
                    (kind := KINDS[i % len(KINDS)]).case(*kind.drawn(rng, n), f"task {i}") for i in range(size)
                ]
                verdicts = [result.verdict for result in claims.judge(cases)]
                supported.append("supported" in verdicts)
                refuted.append("refuted" in verdicts)
            name = f"{size} claims at their margins, independent"
            rows.append(Row("b", f"{name}: any `supported`", n, studies, share(supported), 0.0, 0.05 + noise))
            rows.append(Row("b", f"{name}: any `refuted`", n, studies, share(refuted), 0.0, 0.05 + noise))
        n = REPLICATES[0]
        rng = np.random.default_rng([SEED, 2, size, 1])
        shared, half = [], []
        for _ in range(studies):
            cases, (_, reference) = [], WITHIN.drawn(rng, n)
            for i in range(size):  # every method against the same reference
                method = WITHIN.factor * reference + WITHIN.sd * rng.standard_normal(n)
                cases.append(WITHIN.case(method, reference, f"method {i}"))
            shared.append("supported" in [result.verdict for result in claims.judge(cases)])
            cases = [
                WITHIN.case(*WITHIN.drawn(rng, n, effect=6.0 if i % 2 else 0.0), f"task {i}")
                for i in range(size)
            ]
            half.append("supported" in [result.verdict for result in claims.judge(cases)[::2]])
        for name, found in (("against one reference", shared), ("of which half hold", half)):
            what = f"{size} claims {name}: any `supported` at its margin"
            rows.append(Row("b", what, n, studies, share(found), 0.0, 0.05 + noise))
    return rows


# ---- (c) intervals -----------------------------------------------------------------------------------------


def coverage(studies: int) -> list[Row]:
    rows = []

    def add(what: str, n: int, found: Sequence[bool]) -> None:
        rows.append(Row("c", what, n, studies, share(found), 0.93, 0.97))

    for n in REPLICATES:
        rng = np.random.default_rng([SEED, 3, n])
        difference, contrast, fieller, g = [], [], [], []
        for _ in range(studies):
            method, reference = WITHIN.drawn(rng, n, effect=1.0)
            result = judged(WITHIN, method, reference)
            sd = WITHIN.sd_of_contrast
            truth = (WITHIN.factor - 1) * WITHIN.reference + sd
            difference.append(contains(result.difference, truth))
            contrast.append(contains(result.contrast, sd))
            effect = effects.hedges_g(list(method), list(reference))
            truth /= WITHIN.sd * math.sqrt(2 - 2 * CORRELATION)
            g.append((effect.low or 0) <= truth <= (effect.high or 0))
            method, reference = DRIFTS_LESS.drawn(rng, n)
            ratio = effects.fieller_ratio(list(method), list(reference))
            fieller.append(not ratio.bounded or (ratio.low or 0) <= DRIFTS_LESS.factor <= (ratio.high or 0))
        add("difference of scores", n, difference)
        add("contrast", n, contrast)
        add("Hedges' g by pairs", n, g)
        add("Fieller's ratio of drifts", n, fieller)
        weak, unbounded, logs, shares = [], [], [], []
        spread = 0.10  # of the logarithm
        for _ in range(studies):
            method, reference = correlated(rng, n)
            ratio = effects.fieller_ratio(list(1 + method), list(2 + reference))
            weak.append(not ratio.bounded or (ratio.low or 0) <= 0.5 <= (ratio.high or 0))
            unbounded.append(not ratio.bounded)
            method, reference = correlated(rng, n)
            method, reference = 0.16 * np.exp(spread * method), 0.20 * np.exp(spread * reference)
            ratio = effects.log_ratio(list(method), list(reference))
            logs.append((ratio.low or 0) <= 0.8 <= (ratio.high or 0))
            shares.append(contains(judged(DRIFTS_LESS, method, reference).difference, 0.8 - 1))  # of the means
        name = "Fieller, reference of two sds from 0"
        add(f"{name} (no bound counts as covering)", n, weak)
        rows.append(Row("c", f"{name}: share without a bound", n, studies, share(unbounded)))
        add("log-ratio of lognormal drifts", n, logs)
        add("how much less of lognormal drifts", n, shares)
    return rows


# ---- (d) power ---------------------------------------------------------------------------------------------


def found_as_foretold(studies: int) -> list[Row]:
    rows = []
    wanted = [(kind, n, e) for kind in (WITHIN, DRIFTS_LESS) for n in REPLICATES for e in (0.5, 1.0, 1.5)]
    wanted += [(WITHIN, n, power.smallest_detectable(1.0, n)) for n in REPLICATES]
    wanted += [(WITHIN, power.seeds_needed(0.75, 1.0) or 0, 0.75)]
    for number, (kind, n, effect) in enumerate(wanted):
        rng = np.random.default_rng([SEED, 4, number])
        found = [judged(kind, *kind.drawn(rng, n, effect)).verdict == "supported" for _ in range(studies)]
        foretold = power.power_of_t(effect, 1.0, n)
        what = f"{kind.name}: `supported` where D is truly {effect:.2f} sd"
        bar = foretold - 0.03, foretold + 0.03
        rows.append(Row("d", what, n, studies, share(found), *bar, foretold))
    return rows


# ---- (e) layers --------------------------------------------------------------------------------------------


def layers(studies: int) -> list[Row]:
    """Drift over layers that move together: a mean over layers is judged; layers as samples beside it."""
    rows = []
    profile_L = np.linspace(0.05, 0.35, LAYERS)
    for n in REPLICATES:
        rng = np.random.default_rng([SEED, 5, n])
        by_mean, by_layer = [], []
        for _ in range(studies):
            common_2R, own_2RL = rng.standard_normal((2, n)), rng.standard_normal((2, n, LAYERS))
            noise_2RL = math.sqrt(LAYER_CORRELATION) * common_2R[:, :, None]
            noise_2RL = DRIFTS_LESS.sd * (noise_2RL + math.sqrt(1 - LAYER_CORRELATION) * own_2RL)
            method_RL = DRIFTS_LESS.factor * profile_L + noise_2RL[0]
            reference_RL = profile_L + noise_2RL[1]
            by_mean.append(judged(DRIFTS_LESS, method_RL.mean(axis=1), reference_RL.mean(axis=1)).verdict)
            by_layer.append(judged(DRIFTS_LESS, method_RL.ravel(), reference_RL.ravel()).verdict)
        for verdict in ("supported", "refuted"):
            rate = share([found == verdict for found in by_mean])
            rows.append(Row("e", f"mean over {LAYERS} layers: `{verdict}`", n, studies, rate, 0.03, 0.07))
            rate = share([found == verdict for found in by_layer])
            rows.append(Row("e", f"wrong: {LAYERS} layers as samples: `{verdict}`", n, studies, rate))
    return rows


# ---- (f) a finite test set ---------------------------------------------------------------------------------


def finite_test_sets(studies: int) -> list[Row]:
    """Difference in accuracy of two methods on the same examples: for these examples, and for new ones.

    An answer is right where seed + example + method x example + chance, all normal, is above 0.
    """
    rows = []
    example_sd, interaction_sd = math.sqrt(0.6), math.sqrt(0.1)
    accuracies = (0.85, 0.83)
    slope = 0.25  # of accuracy by standard deviations, near 85 %
    for seed_spread in (0.01, 0.03, 0.10):
        for n in REPLICATES[: 1 if seed_spread != 0.03 else 2]:
            rng = np.random.default_rng([SEED, 6, round(1000 * seed_spread), n])
            seed_sd = seed_spread / slope
            chance_sd = math.sqrt(1 - example_sd**2 - interaction_sd**2)
            total = math.sqrt(1 + seed_sd**2)
            levels_M = total * ndtri(np.array(accuracies))
            found: dict[str, list[bool]] = {name: [] for name in ("t here", "t new", "crossed", "examples")}
            for _ in range(studies):
                example_MN = example_sd * rng.standard_normal(EXAMPLES)
                example_MN = example_MN + interaction_sd * rng.standard_normal((2, EXAMPLES))
                latent_MSN = (
                    (levels_M[:, None] + seed_sd * rng.standard_normal((2, n)))[:, :, None]
                    + example_MN[:, None, :]
                    + chance_sd * rng.standard_normal((2, n, EXAMPLES))
                )
                right_MSN = latent_MSN > 0
                difference_SN = right_MSN[0].astype(float) - right_MSN[1]
                here_MN = ndtr((levels_M[:, None] + example_MN) / math.hypot(seed_sd, chance_sd))
                here = float((here_MN[0] - here_MN[1]).mean())
                new = accuracies[0] - accuracies[1]
                interval = stats.mean_interval(list(difference_SN.mean(axis=1)))
                found["t here"].append(contains(interval, here))
                found["t new"].append(contains(interval, new))
                crossed = resampling.crossed_bootstrap(difference_SN, rng, draws=BOOTSTRAP_DRAWS)
                found["crossed"].append(crossed.low <= new <= crossed.high)
                mean_N = difference_SN.mean(axis=0)
                drawn_D = rng.multinomial(EXAMPLES, np.full(EXAMPLES, 1 / EXAMPLES), BOOTSTRAP_DRAWS) @ mean_N
                low, high = np.quantile(drawn_D / EXAMPLES, [0.025, 0.975])
                found["examples"].append(bool(low <= new <= high))
            name = f"seeds' sd {100 * seed_spread:.0f} points, {EXAMPLES} examples"
            rows.append(
                Row(
                    "f", f"{name}: t over seeds, these examples", n, studies, share(found["t here"]), 0.93, 0.97
                )
            )
            for key, what in (
                ("t new", "t over seeds, new examples"),
                ("crossed", "crossed bootstrap, new seeds and examples"),
                ("examples", "wrong: bootstrap of examples alone"),
            ):
                rows.append(Row("f", f"{name}: {what}", n, studies, share(found[key])))
    return rows


# ---- (g) noise that is not normal --------------------------------------------------------------------------


def other_noise(studies: int) -> list[Row]:
    """What the t-test's level becomes; without a bar, since the test promises it for normal values only."""
    rows = []
    shapes = {
        "heavy tails (t of 3 degrees)": lambda rng, n: rng.standard_t(3, n),
        "skewed, one side (exponential - 1)": lambda rng, n: rng.exponential(1.0, n) - 1,
        "skewed, other side (1 - exponential)": lambda rng, n: 1 - rng.exponential(1.0, n),
        "one run in ten falls by 8 sds": lambda rng, n: (
            rng.standard_normal(n) - 8.0 * (rng.random(n) < 0.1) + 0.8
        ),
    }
    for number, (name, shape) in enumerate(shapes.items()):
        for n in REPLICATES:
            rng = np.random.default_rng([SEED, 7, number, n])
            verdicts = []
            for _ in range(studies):
                reference = WITHIN.reference + WITHIN.sd * rng.standard_normal(n)
                method = WITHIN.factor * reference + WITHIN.sd * shape(rng, n)
                verdicts.append(judged(WITHIN, method, reference).verdict)
            for verdict in ("supported", "refuted"):
                rate = share([found == verdict for found in verdicts])
                rows.append(Row("g", f"within 3%, {name}: `{verdict}`", n, studies, rate))
    return rows


# ---- out ---------------------------------------------------------------------------------------------------

PARTS = {
    "a": "One claim, the truth exactly at its margin: how often a verdict is given all the same",
    "b": "Families of claims at their margins: how often any is supported",
    "c": "How often 95 % intervals hold the truth",
    "d": "How often a true effect is found",
    "e": "Drift over layers that go together (correlation 0.9), at the margin",
    "f": "How often 95 % intervals of a difference in accuracy hold the truth, on a finite test set",
    "g": "One claim at its margin, with noise that is not normal",
}


def table(rows: Sequence[Row]) -> str:
    """Markdown; figures to three places, which is what so many studies tell."""
    lines = []
    for part, title in PARTS.items():
        chosen = [row for row in rows if row.part == part]
        lines += [f"**{title}** ({chosen[0].studies:,} studies a row)", ""]
        lines += ["| what | measured, at n replicates | bar |", "|---|---|---|"]
        for what in dict.fromkeys(row.what for row in chosen):
            alike = [row for row in chosen if row.what == what]
            lines.append(f"| {what} | {', '.join(row.cell for row in alike)} | {alike[0].bar} |")
        lines.append("")
    return "\n".join(lines)


def calibrate(studies: int) -> list[Row]:
    """All rows; the parts that cost most get fewer studies."""
    rows = []
    for measure, part_of in (
        (false_verdicts, 1), (families, 1), (coverage, 1), (found_as_foretold, 1),
        (layers, 1), (finite_test_sets, 4), (other_noise, 1),
    ):  # fmt: skip
        rows += measure(max(1, studies // part_of))
        print(f"{measure.__name__}: done", file=sys.stderr, flush=True)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--studies", type=int, default=4000)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    rows = calibrate(given.studies)
    print(table(rows))
    if given.output:
        content = {"seed": SEED, "correlation": CORRELATION, "rows": [asdict(row) for row in rows]}
        given.output.write_text(json.dumps(content, indent=1) + "\n")
    failed = [row for row in rows if not row.holds]
    print(f"{len(failed)} of {sum(row.low is not None for row in rows)} figures outside their bar")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
