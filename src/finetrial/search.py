"""History -> the settings of the next trial; the only file that imports Optuna.

Pure functions: nothing is stored here and nothing is trained here. `propose` rebuilds an in-memory Optuna
study from an arm's trials and asks it once, so the trial folders stay the only state and a search that was
cut off anywhere goes on exactly as it would have.

What TPE is told (measured by `bench/search_surface.py`; options read in Optuna 5.0's source):

| a trial that                                     | is shown as                                             |
|--------------------------------------------------|---------------------------------------------------------|
| is `done`, with a score                          | finished, with its score (with halving, its loss)       |
| `diverged` or ran `out_of_memory`                | finished, with the metric's worst value                 |
| is running, or waits to be resumed               | running: the constant liar keeps others away from it    |
| failed for good in any other way                 | failed: says nothing about its settings                 |
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from finetrial.frozen import Setting, stream_seed
from finetrial.plugins import Metric, load
from finetrial.records import MethodSpec, Outcome
from finetrial.space import Choice, Dimension, Fixed, Range, Space

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial

Sampler = Literal["tpe", "random"]

# Settings are rounded where they are proposed, so that the optimiser, spec.json, the exported YAML and the
# report all hold the same short number. Six digits move a learning rate by less than a part in 10^5.
SIGNIFICANT_DIGITS = 6

# Every option of TPESampler that is not deprecated, given here so that a release that changes its defaults
# (as 4.9 and 5.0 did) cannot change a study. `n_startup_trials` is 0: the start-up draws are made here.
TPE_OPTIONS: dict[str, Any] = {
    "n_startup_trials": 0,
    "n_ei_candidates": 24,
    # Each dimension by itself. Ten guided trials are too few to model them together: measured, it won less
    # often (bench/search_surface.py --options), though Optuna's own default is True.
    "multivariate": False,
    "group": False,
    "constant_liar": True,
    "constraints_func": None,
}

BAD: frozenset[Outcome] = frozenset({"diverged", "out_of_memory"})


class Past(NamedTuple):
    """An earlier trial of the same arm, as its folder tells it."""

    number: int
    settings: Mapping[str, Setting]
    outcome: Outcome | None  # None while it runs, or waits to be resumed
    score: float | None  # what `metric` says, on validation


def propose(
    history: Sequence[Past],
    space: Space,
    *,
    number: int,
    seed: int,
    startup: int,
    sampler: Sampler,
    metric: Metric,
) -> dict[str, Setting]:
    """The settings of trial `number`: a pure function of the arguments, on every machine.

    The first `startup` trials, and all of a random search, are drawn at random, each dimension from its
    own stream keyed by (seed, number, dimension). So they do not depend on the history, and dimensions that
    two methods share (epochs, batch size ...) start with the same draws in both; a range of another
    place but the same scale starts at the same positions. Later trials ask TPE, seeded by (seed, number).

    Args:
        history: the arm's other trials, in any order. One whose settings are not in `space` (it was
            searched under another space) tells TPE nothing.
        space: dimension name -> dimension.
        number: which trial, from 0.
        seed: the study's seed.
        startup: how many trials are drawn before TPE guides.
        sampler: "tpe", or "random" to draw every trial.
        metric: of the scores; says which direction is better, and the value told for a trial that went wrong.

    Returns:
        Dimension name -> plain bool, int, float or str, sorted by name; floats have six significant digits
        and lie within their range.

    Raises:
        ValueError: the history holds a trial twice, or trial `number` itself; or an integer range holds no
            whole number.
    """
    numbers = [past.number for past in history]
    if len(set(numbers)) != len(numbers) or number in numbers:
        raise ValueError(f"trial {number} was asked for with trials {sorted(numbers)}; each may occur once")
    searched = {name: space[name] for name in sorted(space) if not isinstance(space[name], Fixed)}
    if not searched or sampler == "random" or number < startup:
        return random_draw(space, number=number, seed=seed)
    return _settings(space, _ask_tpe(history, searched, number, seed, metric))


def random_draw(space: Space, *, number: int, seed: int) -> dict[str, Setting]:
    """The settings that a random search gives trial `number`, independent of all others; as from `propose`."""
    searched = {name: dimension for name, dimension in space.items() if not isinstance(dimension, Fixed)}
    return _settings(space, {name: _draw(searched[name], _unit(seed, number, name)) for name in searched})


def told_factor(method: MethodSpec, source: str | None) -> float | None:
    """By what a method's learning rate differs from the best of method `source`, which is to tell it of that;
    None: it is not told.

    Raises:
        PluginError: the plug-in does not load.
    """
    if source is None or source == method.name:
        return None
    return getattr(load("methods", method.use), "learning_rate_factor", None)


def warm(
    settings: Mapping[str, Setting], best: Mapping[str, Setting], space: Space, factor: float
) -> dict[str, Setting]:
    """A proposal moved to where another method's best trial says that the optimum lies.

    The learning rate is `factor` times that one's, within the range, or the nearest choice by ratio; what else
    both methods search is as there, if this space has it. Everything of this method alone stays as it was
    proposed.
    """
    moved = dict(settings)
    for name, dimension in space.items():
        value = best.get(name)
        if value is None or isinstance(dimension, Fixed):
            continue
        if name == "learning_rate":
            value = factor * float(value)
        if isinstance(dimension, Range):
            moved[name] = _setting(dimension, min(max(float(value), dimension.low), dimension.high))
        elif (near := _nearest(dimension, value, by_ratio=name == "learning_rate")) is not None:
            moved[name] = near
    return moved


def _nearest(dimension: Choice, value: Setting, *, by_ratio: bool) -> Setting | None:
    """The choice that equals a value, as it is written there; or of learning rates the nearest to it."""
    rates = [choice for choice in dimension.choices if isinstance(choice, int | float) and choice > 0]
    if by_ratio and rates:
        return min(rates, key=lambda rate: abs(math.log(rate / float(value))))
    flag = isinstance(value, bool)  # to Python 1 and True are equal
    return next((c for c in dimension.choices if c == value and isinstance(c, bool) == flag), None)


def _score(past: Past) -> float | None:
    """The score of a trial that is done; a score that is not finite is none."""
    if past.outcome != "done" or past.score is None or not math.isfinite(past.score):
        return None
    return past.score


# -- random draws ----------------------------------------------------------------------------------------------


def _unit(seed: int, number: int, name: str) -> float:
    """A number in [0, 1) from the stream of one dimension of one trial."""
    return float(np.random.default_rng(stream_seed("search", seed, number, name)).random())


def _draw(dimension: Dimension, unit: float) -> Any:
    """The dimension's internal value at position `unit`: a number, or the index of a choice."""
    match dimension:
        case Choice():
            values, _ = _values(dimension)
            return min(int(unit * len(values)), len(values) - 1)
        case Range(integer=True):
            # Every whole number owns the half unit on both sides of it, on a log scale too.
            low, high = _whole_ends(dimension)
            return min(max(round(_between(low - 0.5, high + 0.5, unit, dimension.log)), low), high)
        case Range():
            return _between(dimension.low, dimension.high, unit, dimension.log)
    raise TypeError(f"{dimension!r} is not searched")


def _between(low: float, high: float, unit: float, log: bool) -> float:
    if log:
        return math.exp(math.log(low) + unit * (math.log(high) - math.log(low)))
    return low + unit * (high - low)


def _values(dimension: Choice) -> tuple[tuple[Setting, ...], bool]:
    """A choice's values, and whether they are ordered: numbers are, by size, so that a good rank of 8 speaks
    for 16 before it speaks for 64. (Told so, TPE won more often than with unrelated choices: the bench.)
    """
    values = dimension.choices
    if any(isinstance(value, bool | str) for value in values):
        return values, False
    return tuple(sorted(values, key=float)), True


def _whole_ends(dimension: Range) -> tuple[int, int]:
    low, high = math.ceil(dimension.low), math.floor(dimension.high)
    if low > high:
        raise ValueError(f"there is no whole number between {dimension.low:g} and {dimension.high:g}")
    return low, high


# -- TPE -------------------------------------------------------------------------------------------------------


def _ask_tpe(
    history: Sequence[Past], searched: Space, number: int, seed: int, metric: Metric
) -> dict[str, Any]:
    """Internal values from Optuna's TPE, given the history."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)  # or it reports every study it creates
    study = optuna.create_study(
        storage=optuna.storages.InMemoryStorage(),
        sampler=optuna.samplers.TPESampler(
            seed=stream_seed("search", seed, number) % 2**32,  # NumPy's old generator takes 32 bits
            **TPE_OPTIONS,
        ),
        direction="maximize" if metric.higher_is_better else "minimize",
    )
    distributions = {name: _distribution(dimension) for name, dimension in searched.items()}
    told = _tell(history, searched, distributions, metric)
    if not told:  # nothing to go by
        return {name: _draw(dimension, _unit(seed, number, name)) for name, dimension in searched.items()}
    study.add_trials(told)
    return study.ask(fixed_distributions=distributions).params


def _tell(
    history: Sequence[Past], searched: Space, distributions: dict[str, BaseDistribution], metric: Metric
) -> list[FrozenTrial]:
    """The history as Optuna trials, by number, so that its order does not matter. See the file's table."""
    from optuna.trial import TrialState, create_trial

    told = []
    for past in sorted(history, key=lambda past: past.number):
        internal = {name: _internal(searched[name], past.settings.get(name)) for name in searched}
        if None in internal.values():
            continue
        state, value = TrialState.COMPLETE, _score(past)
        if past.outcome is None:
            state, value = TrialState.RUNNING, None
        elif past.outcome in BAD:
            value = metric.worst
        elif value is None:
            continue  # samplers do not see failed trials; leaving it out is the same
        told.append(create_trial(state=state, value=value, params=internal, distributions=distributions))
    return told


def _distribution(dimension: Dimension) -> BaseDistribution:
    """Optuna's form. A choice is told as its index: to Optuna 1, 1.0 and True are the same choice."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    match dimension:
        case Choice():
            values, ordered = _values(dimension)
            if ordered:
                return IntDistribution(0, len(values) - 1)
            return CategoricalDistribution(list(range(len(values))))
        case Range(integer=True):
            low, high = _whole_ends(dimension)
            return IntDistribution(low, high, log=dimension.log)
        case Range():
            return FloatDistribution(dimension.low, dimension.high, log=dimension.log)
    raise TypeError(f"{dimension!r} is not searched")


def _internal(dimension: Dimension, setting: Setting | None) -> float | int | None:
    """The internal value of a recorded setting, or None if the dimension does not hold it."""
    match dimension:
        case Choice():
            values, _ = _values(dimension)
            return next((i for i, value in enumerate(values) if repr(value) == repr(setting)), None)
        case Range():
            if isinstance(setting, bool | str) or setting is None:
                return None
            if not dimension.low <= setting <= dimension.high:
                return None
            if dimension.integer:
                return int(setting) if setting == int(setting) else None
            return float(setting)
    raise TypeError(f"{dimension!r} is not searched")


def _settings(space: Space, chosen: dict[str, Any]) -> dict[str, Setting]:
    return {name: _setting(space[name], chosen.get(name)) for name in sorted(space)}


def _setting(dimension: Dimension, internal: Any) -> Setting:
    """The plain, rounded setting of an internal value."""
    match dimension:
        case Fixed(value=value):
            return value
        case Choice():
            values, _ = _values(dimension)
            return values[int(internal)]
        case Range(integer=True):
            return int(internal)
        case Range(low=low, high=high):
            # Rounding may step over an end that has more digits than six.
            return min(max(float(f"{float(internal):.{SIGNIFICANT_DIGITS}g}"), low), high)
    raise TypeError(f"{dimension!r} is not a dimension")
