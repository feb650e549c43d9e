"""search.py: what the next trial depends on, what it avoids, and whether it beats chance."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finetrial.halving import LOSS
from finetrial.plugins import Metric
from finetrial.records import Outcome
from finetrial.search import Past, propose, warm
from finetrial.space import COMMON_SPACE, Choice, Fixed, Range, Space

pytestmark = [
    pytest.mark.filterwarnings("error"),  # Optuna warns of options that will go
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),  # what other tests have left
]

F1 = Metric(name="f1", higher_is_better=True, worst=0.0, best=100.0)
RATE = Range(low=5e-5, high=5e-3, log=True)
SPACE: Space = {**COMMON_SPACE, "learning_rate": RATE, "rank": Choice(choices=(4, 8, 16, 64))}


def ask(history, number, *, space=SPACE, seed=11, startup=5, sampler="tpe", metric=F1):
    return propose(history, space, number=number, seed=seed, startup=startup, sampler=sampler, metric=metric)


def quality(drawn, best_rate=5e-4) -> float:
    return 70 - 20 * math.log10(drawn["learning_rate"] / best_rate) ** 2


def searched(trials: int, *, space=SPACE, seed=11, score=quality, bad: Outcome = "diverged") -> list[Past]:
    """A whole search; a score of None is a trial that went wrong in the way `bad` says."""
    history: list[Past] = []
    for number in range(trials):
        drawn = ask(history, number, space=space, seed=seed)
        value = score(drawn)
        history.append(Past(number, drawn, bad if value is None else "done", value))
    return history


# -- what a proposal depends on --------------------------------------------------------------------------------


def test_a_guided_trial_changes_when_an_earlier_score_changes():
    history = searched(6)
    worst = min(history, key=lambda past: past.score)
    changed = [past._replace(score=99.0) if past is worst else past for past in history]
    assert ask(history, 6) != ask(changed, 6)


def test_a_startup_trial_does_not_depend_on_the_history():
    history = searched(4)
    assert ask(history, 4) == ask([], 4)


def test_seed_and_number_matter():
    history = searched(6)
    assert len({json.dumps(ask(history, number)) for number in range(6, 12)}) == 6
    assert len({json.dumps(ask(history, 6, seed=seed)) for seed in range(6)}) == 6


def test_the_order_of_the_history_does_not_matter():
    history = searched(8)
    expected = ask(history, 8)
    for seed in range(5):
        shuffled = [history[i] for i in np.random.default_rng(seed).permutation(len(history))]
        assert ask(shuffled, 8) == expected
    backwards = dict(reversed(SPACE.items()))
    assert ask(history, 8, space=backwards) == expected


def test_two_processes_given_the_same_history_propose_the_same_trial():
    program = (
        "import json, sys\n"
        "sys.path.insert(0, sys.argv[1])\n"
        "from test_search import ask, searched\n"
        "history = searched(9)\n"
        "print(json.dumps([[past.settings for past in history], ask(history, 9)]))\n"
    )
    command = [sys.executable, "-c", program, str(Path(__file__).parent)]
    answers = {
        subprocess.run(
            command, capture_output=True, text=True, check=True, env={**os.environ, "PYTHONHASHSEED": hash_seed}
        ).stdout
        for hash_seed in ("1", "2")
    }
    assert len(answers) == 1
    drawn, proposal = json.loads(answers.pop())
    history = searched(9)
    assert drawn == [past.settings for past in history]
    assert proposal == ask(history, 9)


def test_methods_share_the_startup_draws_of_the_dimensions_they_share():
    full = {**COMMON_SPACE, "learning_rate": Range(low=5e-7, high=5e-5, log=True)}
    for number in range(5):
        lora_draw, full_draw = ask([], number), ask([], number, space=full)
        assert {name: lora_draw[name] for name in COMMON_SPACE} == {
            name: full_draw[name] for name in COMMON_SPACE
        }
        # Ranges equally wide in log space: the same position in each.
        assert lora_draw["learning_rate"] / full_draw["learning_rate"] == pytest.approx(100, rel=1e-4)


def test_random_search_is_the_startup_draw_throughout():
    history = searched(9)
    assert ask(history, 9, sampler="random") == ask([], 9, startup=99)


# -- what it learns from ---------------------------------------------------------------------------------------


def test_running_trials_are_seen_and_kept_away_from():
    history = searched(8)
    plain = ask(history, 9)
    assert ask([*history, Past(8, plain, None, None)], 9) != plain


def test_trials_that_failed_for_good_say_nothing():
    history = searched(8)
    elsewhere = ask([], 3, seed=5)
    for outcome in ("crashed", "timed_out", "lost", "bug", "cancelled", "refused"):
        assert ask([*history, Past(8, elsewhere, outcome, None)], 9) == ask(history, 9)


def test_a_trial_of_another_space_says_nothing():
    history = searched(8)
    for other in ({"learning_rate": 0.3}, {"rank": 5}, {"warmup_ratio": "many"}):
        foreign = Past(8, {**history[0].settings, **other}, "done", 99.0)
        assert ask([*history, foreign], 9) == ask(history, 9)


@pytest.mark.parametrize("bad", ["diverged", "out_of_memory"])
def test_a_region_that_diverges_is_avoided(bad):
    """Rates above 5e-4 go wrong: half of the range, and so half of a random search's trials."""

    def score(drawn):
        return quality(drawn, best_rate=2e-4) if drawn["learning_rate"] <= 5e-4 else None

    guided = drawn = 0
    for seed in range(20):
        guided += sum(past.outcome == bad for past in searched(15, seed=seed, score=score, bad=bad)[5:])
        drawn += sum(ask([], k, seed=seed, sampler="random")["learning_rate"] > 5e-4 for k in range(5, 15))
    assert 80 <= drawn <= 120
    assert guided < 0.7 * drawn


def test_while_everything_diverged_the_next_trial_goes_elsewhere():
    """All of five equally bad trials lie above 1e-3, the first at the very top."""
    space = {"learning_rate": RATE}
    tried = [4.5e-3, 1.5e-3, 2e-3, 2.5e-3, 3e-3]
    history = [Past(k, {"learning_rate": rate}, "diverged", None) for k, rate in enumerate(tried)]
    rates = [ask(history, 5, space=space, seed=seed)["learning_rate"] for seed in range(20)]
    assert all(rate < 1e-3 for rate in rates)


def test_choices_that_python_calls_equal_are_kept_apart():
    space = {"flag": Choice(choices=(True, 1, 1.0))}

    def proposals(good):
        others = [value for value in (True, 1, 1.0) if repr(value) != repr(good)]
        tried = [good, *others, *others]
        history = [Past(k, {"flag": v}, "done", 9.0 if v is good else 1.0) for k, v in enumerate(tried)]
        return [repr(ask(history, 5, space=space, seed=seed)["flag"]) for seed in range(10)]

    for good in (True, 1, 1.0):
        assert proposals(good).count(repr(good)) > 5


def test_with_nothing_finished_a_late_trial_is_drawn():
    failed = [Past(k, ask([], k), "crashed", None) for k in range(5)]
    assert ask(failed, 5) == ask([], 5, startup=99)


def test_lower_is_better_turns_the_search_round():
    space = {"learning_rate": RATE}
    rates = np.geomspace(6e-5, 4e-3, 8).tolist()
    history = [Past(k, {"learning_rate": rate}, "done", float(k)) for k, rate in enumerate(rates)]
    up = [ask(history, 8, space=space, seed=s, metric=F1)["learning_rate"] for s in range(20)]
    down = [ask(history, 8, space=space, seed=s, metric=LOSS)["learning_rate"] for s in range(20)]
    assert np.median(up) > 1e-3
    assert np.median(down) < 2.5e-4


def test_a_trial_may_occur_once():
    history = searched(3)
    with pytest.raises(ValueError, match="each may occur once"):
        ask([*history, history[0]], 3)
    with pytest.raises(ValueError, match="each may occur once"):
        ask(history, 2)


# -- the proposals themselves ----------------------------------------------------------------------------------


def test_fixed_dimensions_pass_through_and_types_are_plain():
    space: Space = {
        "epochs": Fixed(value=2),
        "flag": Choice(choices=(True, False)),
        "mixed": Choice(choices=(1, 1.0, True, "1")),  # all equal or alike, and all different
        "rank": Range(low=2, high=64, log=True, integer=True),
        "learning_rate": RATE,
    }
    seen = set()
    for past in searched(15, space=space):
        assert list(past.settings) == sorted(space)
        assert past.settings["epochs"] == 2
        types = {name: type(value) for name, value in past.settings.items()}
        assert types.pop("mixed") in (int, float, bool, str)
        assert types == {"epochs": int, "flag": bool, "rank": int, "learning_rate": float}
        seen.add(repr(past.settings["mixed"]))
        rate = past.settings["learning_rate"]
        assert float(f"{rate:.6g}") == rate  # the report's six digits are the optimiser's rate
    assert len(seen) >= 3


def test_only_fixed_dimensions_need_no_search():
    assert ask([], 9, space={"epochs": Fixed(value=3)}) == {"epochs": 3}


def test_numbers_are_ordered_by_size_however_they_are_listed():
    history = searched(9)
    listed = {**SPACE, "rank": Choice(choices=(64, 4, 16, 8))}
    assert ask([], 2, space=listed) == ask([], 2)
    assert ask(history, 9, space=listed) == ask(history, 9)


def test_an_integer_range_without_a_whole_number_is_refused():
    with pytest.raises(ValueError, match=r"no whole number between 1\.2 and 1\.8"):
        ask([], 0, space={"rank": Range(low=1.2, high=1.8, integer=True)})


def test_integers_are_drawn_evenly_to_both_ends():
    space = {"rank": Range(low=1, high=4, integer=True)}
    drawn = [ask([], k, space=space, sampler="random")["rank"] for k in range(400)]
    counts = np.bincount(drawn, minlength=5)[1:]
    assert counts.sum() == 400
    assert counts.min() > 70  # 100 expected of each; 70 is 3.5 standard deviations below


finite = st.floats(1e-9, 1e6)
ranges = st.builds(
    lambda low, factor, log: Range(low=low, high=low * factor, log=log),
    finite,
    st.floats(1 + 1e-9, 1e4),
    st.booleans(),
)
integers = st.builds(
    lambda low, width, log: Range(low=low, high=low + width, log=log, integer=True),
    st.integers(1, 1000),
    st.integers(1, 1000),
    st.booleans(),
)
choices = (
    st.lists(st.integers(-5, 5) | st.text(max_size=3) | st.booleans(), min_size=2, max_size=5)
    .filter(lambda values: len({repr(v) for v in values}) == len(values))
    .map(lambda values: Choice(choices=tuple(values)))
)
spaces = st.dictionaries(
    st.sampled_from(["a", "b", "learning_rate", "rank"]),
    ranges | integers | choices | st.builds(Fixed, value=st.integers(0, 3)),
    min_size=1,
)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    space=spaces,
    seed=st.integers(0, 2**40),
    scores=st.lists(st.floats(-1e6, 1e6) | st.none(), min_size=8, max_size=8),
)
def test_every_proposal_lies_in_the_space(space, seed, scores):
    history: list[Past] = []
    for number, score in enumerate(scores):
        drawn = ask(history, number, space=space, seed=seed, startup=2)
        assert set(drawn) == set(space)
        for name, value in drawn.items():
            match space[name]:
                case Fixed(value=fixed):
                    assert value == fixed
                case Choice(choices=values):
                    assert repr(value) in [repr(v) for v in values]
                case Range(low=low, high=high, integer=integer):
                    assert low <= value <= high
                    assert type(value) is (int if integer else float)
        assert json.loads(json.dumps(drawn)) == drawn
        history.append(Past(number, drawn, "diverged" if score is None else "done", score))


# -- against chance --------------------------------------------------------------------------------------------


def load_bench():
    path = Path(__file__).parent.parent / "bench" / "search_surface.py"
    spec = importlib.util.spec_from_file_location("search_surface", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["search_surface"] = module
    spec.loader.exec_module(module)
    return module


def test_tpe_beats_random_search_over_fifteen_trials_and_fifty_seeds():
    """32 or more of 50 happen to a coin once in 30 times (binomial tail 0.032)."""
    bench = load_bench()
    surface = bench.SURFACES["middle"]
    guided = np.array([bench.searched(surface, seed, "tpe") for seed in range(50)])
    drawn = np.array([bench.searched(surface, seed, "random") for seed in range(50)])
    assert bench.wins(guided, drawn) >= 32
    assert guided.mean() > drawn.mean()


# -- a warm start ----------------------------------------------------------------------------------------------


def test_a_warm_start_takes_ten_times_the_rate_and_what_both_methods_search():
    space: Space = {
        **COMMON_SPACE,
        "learning_rate": RATE,
        "rank": Choice(choices=(4, 8)),
        "batch_size": Choice(choices=(8, 16)),
        "schedule": Fixed(value="linear"),
    }
    proposed = ask([], 0, space=space)
    best = {
        "learning_rate": 2e-4,
        "warmup_ratio": 0.03,
        "weight_decay": 7.0,
        "batch_size": 16,
        "schedule": "cosine",
    }
    found = warm(proposed, best, space, 10.0)
    assert found["learning_rate"] == pytest.approx(2e-3)
    assert (found["warmup_ratio"], found["batch_size"]) == (0.03, 16)
    assert found["weight_decay"] == space["weight_decay"].high
    assert (found["rank"], found["schedule"]) == (proposed["rank"], "linear")
    assert warm(proposed, {"learning_rate": 1.0, "batch_size": 64}, space, 10.0) == {
        **proposed,
        "learning_rate": 5e-3,
    }
    assert warm(proposed, {}, space, 10.0) == proposed
