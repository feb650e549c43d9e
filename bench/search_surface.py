"""Does TPE beat random search within a study's small budget? Counts it on analytic surfaces.

    python bench/search_surface.py [--seeds 50] [--options]

Each search is a study's: 15 trials, 5 of them start-up draws, the default space of LoRA. A random search of
the same seed has the same start-up draws, so a win is owed to the ten guided trials alone; the column
"other seeds" compares with random searches that share nothing. Ties count as half a win. With `--options`
the same is counted for other options of TPE, which is how those in `search.py` were chosen (no surface was
tuned: they differ in where the best learning rate lies, how sharp it is, and what else matters).

Not for measuring anything about real training: the surfaces are made up, in the shape that fine-tuning has.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest

from finetrial import search
from finetrial.frozen import Setting
from finetrial.plugins import Metric
from finetrial.space import COMMON_SPACE, Choice, Range, Space

METRIC = Metric(name="f1", higher_is_better=True, worst=0.0, best=100.0)
TRIALS, STARTUP = 15, 5
SPACE: Space = {
    **COMMON_SPACE,
    "learning_rate": Range(low=5e-5, high=5e-3, log=True),
    "rank": Choice(choices=(4, 8, 16, 64)),
    "dropout": Range(low=0.0, high=0.1),
}


@dataclass(frozen=True)
class Surface:
    """A score in points of F1 as a smooth function of the settings, with a cliff where training diverges."""

    best_rate: float = 5e-4  # of batch 16 and two epochs
    cliff_rate: float = 2.5e-3  # training diverges above it (batch 16, warm-up 0.05, rank 16)
    points_per_square_decade: float = 30.0
    others: float = 1.0  # weight of everything but the learning rate
    noise: float = 0.0  # standard deviation of an evaluation, in points

    def quality(self, settings: Mapping[str, Setting]) -> float | None:
        """The score without noise, or None if training diverges."""
        number = {name: float(value) for name, value in settings.items()}
        rate = math.log10(number["learning_rate"])
        # The usable rate grows with the root of the batch, and falls a little with rank and epochs.
        scale = 0.5 * math.log10(number["batch_size"] / 16)
        rank = math.log2(number["rank"] / 16)
        cliff = math.log10(self.cliff_rate) + scale + 2 * (number["warmup_ratio"] - 0.05) - 0.05 * rank
        if rate > cliff:
            return None
        away = rate - (math.log10(self.best_rate) + scale - 0.1 * (number["epochs"] - 2))
        # Quadratic near the optimum, level far from it: the score of an untrained model.
        by_rate = 45 * (1 - math.exp(-self.points_per_square_decade / 45 * away**2))
        by_others = (
            3.0 * 2.0 ** -number["epochs"]
            + 0.5 * ((number["warmup_ratio"] - 0.06) / 0.05) ** 2
            + 0.3 * ((number["weight_decay"] - 0.02) / 0.05) ** 2
            + 0.3 * ((number["dropout"] - 0.05) / 0.05) ** 2
            + 0.4 * max(0.0, -rank)
        )
        return 72 - by_rate - self.others * by_others

    def score(self, settings: Mapping[str, Setting], seed: int, number: int) -> float | None:
        """What a trial reports."""
        quality = self.quality(settings)
        if quality is None or not self.noise:
            return quality
        return quality + self.noise * float(np.random.default_rng([seed, number]).standard_normal())


SURFACES = {
    "middle": Surface(),
    "low rate": Surface(best_rate=1e-4),
    "by the cliff": Surface(best_rate=1.5e-3, cliff_rate=2e-3),
    "sharp": Surface(points_per_square_decade=120.0),
    "others matter": Surface(others=3.0),
    "noisy": Surface(noise=0.5),
}


def searched(surface: Surface, seed: int, sampler: search.Sampler) -> float:
    """The quality, without noise, of the trial that a whole search chooses."""
    history: list[search.Past] = []
    for number in range(TRIALS):
        settings = search.propose(
            history, SPACE, number=number, seed=seed, startup=STARTUP, sampler=sampler, metric=METRIC
        )
        score = surface.score(settings, seed, number)
        history.append(search.Past(number, settings, "diverged" if score is None else "done", score))
    scored = [past for past in history if past.score is not None]
    chosen = max(scored, key=lambda past: (past.score or 0.0, -past.number), default=None)
    quality = surface.quality(chosen.settings) if chosen else None
    return METRIC.worst if quality is None else quality


def wins(left: np.ndarray, right: np.ndarray) -> float:
    """How often left beats right, ties as half a win."""
    return float(np.sum(left > right) + 0.5 * np.sum(left == right))


def compare(seeds: int, options: Mapping[str, object], *, ordered: bool = True) -> None:
    """Print one line a surface, and their sum; `ordered=False` shows TPE numbers as unrelated choices."""
    kept = search.TPE_OPTIONS, search._values
    search.TPE_OPTIONS = {**search.TPE_OPTIONS, **options}
    if not ordered:
        search._values = lambda dimension: (dimension.choices, False)
    total = gain = 0.0
    try:
        for name, surface in SURFACES.items():
            guided = np.array([searched(surface, seed, "tpe") for seed in range(seeds)])
            drawn = np.array([searched(surface, seed, "random") for seed in range(seeds)])
            others = np.array([searched(surface, seeds + seed, "random") for seed in range(seeds)])
            better, worse = int(np.sum(guided > drawn)), int(np.sum(guided < drawn))
            chance = binomtest(better, better + worse, alternative="greater").pvalue if better + worse else 1.0
            total += wins(guided, drawn)
            gain += float(np.mean(guided - drawn)) / len(SURFACES)
            print(
                f"{name:14s} {wins(guided, drawn):6.1f} of {seeds} ({seeds - better - worse} ties, "
                f"sign test p = {chance:.1e})   other seeds {wins(guided, others):6.1f}   "
                f"gain {np.mean(guided - drawn):+.2f} points   median {np.median(guided):.2f} "
                f"against {np.median(drawn):.2f}",
                flush=True,
            )
        share = total / seeds / len(SURFACES)
        print(
            f"{'all':14s} {total:6.1f} of {seeds * len(SURFACES)} = {share:.1%}   gain {gain:+.2f} points",
            flush=True,
        )
    finally:
        search.TPE_OPTIONS, search._values = kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=50)
    parser.add_argument("--options", action="store_true", help="compare other options of TPE too")
    arguments = parser.parse_args()
    print(f"TPE against random search: {TRIALS} trials, {STARTUP} of them start-up, {arguments.seeds} seeds")
    compare(arguments.seeds, {})
    if arguments.options:
        for multivariate in (False, True):
            for candidates in (12, 24, 64):
                for ordered in (True, False):
                    print(f"multivariate={multivariate} n_ei_candidates={candidates} ordered={ordered}")
                    options = {"multivariate": multivariate, "n_ei_candidates": candidates}
                    compare(arguments.seeds, options, ordered=ordered)


if __name__ == "__main__":
    main()
