"""How many go side by side: as many as memory allows, several in a process, one GPU or more."""

from __future__ import annotations

import socket

import pytest

from finetrial.packing import Packing
from finetrial.records import Attempt, Failure, Fit, How, MethodSpec, Result, RunSpec
from finetrial.schedule import PUT_OFF
from scripted import COST, SLEEP, Bench, done, failed, make_spec


def takes(spec: RunSpec, size: int, seconds: float = 0.3) -> str:
    """A program that says what it takes, of a room of 100, notes who is there meanwhile, and is done."""
    fit = Fit(device="cpu", budget=100, predicted=size, shared=100, evaluation_tokens=1)
    return (
        f"import os, time\nopen('fit.json', 'w').write({fit.model_dump_json()!r})\n"
        f"open('../here-{spec.number}', 'w').write('{size}')\ntime.sleep({seconds})\n"
        "there = [n for n in os.listdir('..') if n.startswith('here-')]\n"
        "taken = sum(int(open('../' + n).read() or 0) for n in there)\n"
        "open('../taken', 'a').write(f'{taken}\\n')\n"
        f"{done(spec)}\nos.remove('../here-{spec.number}')"
    )


def packed(bench: Bench, sizes: list[int], most: int = 8, packing: Packing | None = None) -> list[int]:
    """What ran side by side took, at the end of each run."""
    specs = [
        make_spec(n, stage="trial", method=MethodSpec(name="m", use="full", params={}))
        for n in range(len(sizes))
    ]
    for spec, size in zip(specs, sizes, strict=True):
        bench.programs[spec.run_id] = [takes(spec, size)]
    bench.run(iter([specs]), packing=packing or Packing(most, by_memory=True))
    assert [bench.outcomes(spec)[-1] for spec in specs] == ["done"] * len(specs)
    return [int(line) for line in (bench.home.runs / "taken").read_text().split()]


def test_as_many_run_at_once_as_their_memory_allows(bench):
    taken = packed(bench, [40, 40, 40, 40, 40])
    assert max(taken) == 80


def test_no_more_run_at_once_than_there_are_places(bench):
    assert max(packed(bench, [10, 10, 10, 10], most=2)) == 20


def test_a_run_that_says_it_takes_too_much_is_put_off_and_costs_no_attempt(bench):
    packed(bench, [30, 90])
    records = [folder.record() for folder in bench.home.find("trial.")]
    off = [attempt for record in records for attempt in record.attempts if attempt.outcome == "cancelled"]
    assert len(off) == 1
    assert not off[0].counts
    assert off[0].reason == PUT_OFF


def test_out_of_memory_beside_others_is_tried_again_with_fewer_and_not_with_less(bench):
    method = MethodSpec(name="m", use="full", params={})
    one, two = (make_spec(n, stage="trial", method=method) for n in range(2))
    bench.programs[one.run_id] = [takes(one, 10, seconds=1.0)]
    bench.programs[two.run_id] = [failed(two, "out_of_memory", "no more"), takes(two, 10)]
    packing = Packing(4, by_memory=True)
    bench.run(iter([[one, two]]), packing=packing)
    assert bench.outcomes(two) == ["cancelled", "done"]
    assert bench.home.run(two.run_id).out_of_memory() == 0
    assert packing.most == 1


@pytest.mark.parametrize("by_memory", [True, False])
def test_what_cannot_do_with_less_is_tried_again_alone_and_then_given_up(bench, by_memory):
    """A model that does not load for want of memory."""
    method = MethodSpec(name="m", use="full", params={})
    one, two = (make_spec(n, stage="trial", method=method) for n in range(2))
    bench.programs[one.run_id] = [takes(one, 10, seconds=0.3)]
    bench.programs[two.run_id] = [
        failed(two, "out_of_memory", "no more", attempt, less_helps=False) for attempt in range(1, 99)
    ]
    bench.run(iter([[one, two]]), packing=Packing(2, by_memory=by_memory))
    assert bench.outcomes(one) == ["done"]
    beside, *others = bench.outcomes(two)
    assert beside == ("cancelled" if by_memory else "out_of_memory")
    assert len(others) == 1 if by_memory else len(others) > 0
    assert bench.home.run(two.run_id).failure().final


def test_runs_that_run_out_of_memory_at_the_same_time_are_none_of_them_charged_for_it(bench):
    """Whoever is looked at last has nobody beside it any more; and three places become two, not none."""
    method = MethodSpec(name="m", use="full", params={})
    runs = [make_spec(n, stage="trial", method=method) for n in range(3)]
    for number, spec in enumerate(runs):
        fit = Fit(device="cpu", budget=100, predicted=10, shared=100, evaluation_tokens=1)
        waits = (
            f"import os, time\nopen('fit.json', 'w').write({fit.model_dump_json()!r})\n"
            f"open('../begun-{number}', 'w')\n"
            "while not all(os.path.exists(f'../begun-{n}') for n in range(3)): time.sleep(0.01)\n"
            f"time.sleep({0.4 * number})\n"
        )
        bench.programs[spec.run_id] = [waits + failed(spec, "out_of_memory", "no more"), takes(spec, 10)]
    packing = Packing(3, by_memory=True)
    bench.run(iter([runs]), packing=packing)
    assert [bench.outcomes(spec) for spec in runs] == [["cancelled", "done"]] * 3
    assert [bench.home.run(spec.run_id).out_of_memory() for spec in runs] == [0, 0, 0]
    assert packing.most == 2


def test_a_run_that_passes_its_own_budget_leaves_the_places_to_the_others(bench):
    method = MethodSpec(name="m", use="full", params={})
    one, two = (make_spec(n, stage="trial", method=method) for n in range(2))
    bench.programs[one.run_id] = [takes(one, 10, seconds=1.0)]
    over = failed(two, "out_of_memory", "it took more than it may", own_budget=True)
    bench.programs[two.run_id] = [over, takes(two, 10)]
    packing = Packing(4, by_memory=True)
    bench.run(iter([[one, two]]), packing=packing)
    assert bench.outcomes(two) == ["out_of_memory", "done"]
    assert packing.most == 4


@pytest.mark.parametrize("how_it_ends", ["out_of_memory", "timed_out"])
def test_runs_that_were_stacked_in_vain_go_on_each_alone(bench, how_it_ends):
    method = MethodSpec(name="m", use="lora", params={})
    how = How(limit_seconds=0.4)
    specs = [make_spec(n, stage="trial", method=method, how=how) for n in range(3)]
    ends = {
        "out_of_memory": failed(specs[0], "out_of_memory", "too much for so many"),
        "timed_out": SLEEP,
    }
    bench.programs |= {spec.run_id: [done(spec)] for spec in specs}
    bench.programs[specs[0].run_id] = [ends[how_it_ends], done(specs[0])]
    bench.run(iter([specs]), packing=Packing(1, stack=3), attempts=1)
    assert bench.engine.started[0] == specs[0].run_id
    assert sorted(bench.engine.started[1:]) == sorted(spec.run_id for spec in specs)
    for spec in specs:
        folder = bench.home.run(spec.run_id)
        assert folder.spec().how.stacked == 1
        assert bench.outcomes(spec)[-1] == "done"
        assert not folder.attempt_records()[0].counts


@pytest.mark.parametrize("parallel", [1, 2])
def test_a_stack_without_enough_memory_goes_on_in_halves(bench, parallel):
    method = MethodSpec(name="m", use="lora", params={})
    specs = [make_spec(n, stage="trial", method=method) for n in range(5)]
    result = Result(run_id="", outcome="done", cost=COST).model_dump_json()
    fit = Fit(device="cpu", budget=9, predicted=9, evaluation_tokens=1).model_dump_json()
    program = f"""
import json, pathlib, time
RESULT, FIT = {result!r}, {fit!r}
others = pathlib.Path('stack.json')
names = [pathlib.Path.cwd().name, *(json.loads(others.read_text()) if others.exists() else ())]
with open('../../sizes', 'a') as sizes:
    print(len(names), file=sizes)
for name in names:
    attempt = len(list(pathlib.Path('..', name, 'attempts').glob('*.json')))
    fit = dict(json.loads(FIT), stacked=len(names))
    pathlib.Path('..', name, 'fit.json').write_text(json.dumps(fit))
    if len(names) > 2:
        failure = dict(run_id=name, kind='out_of_memory', reason='too many', attempt=attempt)
        pathlib.Path('..', name, 'failure.json').write_text(json.dumps(failure))
        time.sleep(0.1)
    else:
        pathlib.Path('..', name, 'result.json').write_text(json.dumps(json.loads(RESULT) | dict(run_id=name)))
"""
    bench.programs |= {spec.run_id: [program] for spec in specs}
    bench.run(iter([specs]), packing=Packing(parallel, stack=5))
    assert sorted((bench.home.path / "sizes").read_text().split()) == ["1", "2", "2", "5"]
    assert [bench.outcomes(spec) for spec in specs] == [["cancelled", "done"]] * 5
    assert not any(bench.home.run(spec.run_id).out_of_memory() for spec in specs)


def two_stacked(bench):
    """The folders of two runs of one process, the first one's."""
    method = MethodSpec(name="m", use="lora", params={})
    specs = [make_spec(n, stage="trial", method=method, how=How(stacked=2)) for n in range(2)]
    lead, other = (bench.home.run(spec.run_id) for spec in specs)
    for spec, folder in zip(specs, (lead, other), strict=True):
        folder.create(spec)
    lead.stack_with([other])
    return lead, other


def test_what_a_stack_takes_is_the_mean_of_what_its_runs_say_of_as_many_like_themselves(bench):
    lead, other = two_stacked(bench)
    packing = Packing(4, by_memory=True, stack=2)
    fit = Fit(device="cpu", budget=100, predicted=20, shared=100, evaluation_tokens=1, stacked=2)
    lead.write_fit(fit)
    assert packing.taken(lead) is None
    other.write_fit(fit.model_copy(update={"predicted": 80}))
    assert packing.taken(lead) == 50


def test_what_a_run_says_here_counts_and_not_what_it_said_on_another_machine(bench):
    method = MethodSpec(name="m", use="full", params={})
    folders = []
    for number in range(4):
        spec = make_spec(number, stage="trial", method=method)
        folders.append(bench.home.run(spec.run_id))
        folders[-1].create(spec)
        there = Fit(device="cpu", budget=100, predicted=6, shared=54, evaluation_tokens=1)
        folders[-1].write_fit(there)
    packing = Packing(8, by_memory=True)
    assert packing.too_many(folders) is None
    for folder in folders:
        folder.write_fit(there.model_copy(update={"shared": 13}))
    assert packing.too_many(folders) == folders[-1]
    assert packing.too_many(folders[:2]) is None
    folders[0].write_result(Result(run_id=folders[0].path.name, outcome="done", cost=COST))
    folders[0].write_fit(there)
    packing.learn(folders[0])
    assert packing.room == {None: 13}


def test_where_nobody_has_said_how_much_there_is_a_first_run_says_it_before_others_start(bench):
    """What a kind takes is known from runs of before; how much there is, only if they were made here."""
    method = MethodSpec(name="m", use="full", params={})
    specs = [make_spec(n, stage="trial", method=method) for n in range(4)]
    folders = [bench.home.run(spec.run_id) for spec in specs]
    for folder, spec in zip(folders, specs, strict=True):
        folder.create(spec)
    fit = Fit(device="cpu", budget=100, predicted=10, shared=25, evaluation_tokens=1)
    ended, first = folders[:2]
    ended.write_fit(fit)
    attempt = Attempt(number=1, host="another", pid=1, started_at=0.0, outcome="done")
    ended.write_attempt(attempt)
    ended.write_result(Result(run_id=ended.path.name, outcome="done", cost=COST))
    packing = Packing(16, by_memory=True)
    packing.learn(ended)
    assert packing.place(specs[2:3], [first]) is None
    first.write_fit(fit)
    assert packing.place(specs[2:3], [first]) is not None
    here = attempt.model_copy(update={"number": 2, "host": socket.gethostname(), "outcome": None})
    ended.write_attempt(here)
    first.fit_file.unlink()
    again = Packing(16, by_memory=True)
    again.learn(ended)
    assert again.room == {None: 25}
    assert again.place(specs[2:3], [first]) is not None


def test_a_run_that_leaves_its_stack_unfitted_keeps_nobody_waiting(bench):
    lead, other = two_stacked(bench)
    other.write_failure(Failure(run_id=other.path.name, kind="out_of_memory", reason="no", attempt=1))
    lead.write_fit(Fit(device="cpu", budget=9, predicted=20, shared=100, evaluation_tokens=1, stacked=2))
    assert Packing(4, by_memory=True, stack=2).taken(lead) == 20
    lead.stack_file.write_text('["trial.')
    assert lead.stacked_with() == []


def test_on_several_gpus_each_process_is_on_the_emptiest_and_each_gpu_has_its_own_room(bench):
    """Two of 60 fit together only because they are on two GPUs; the third waits for one of them."""
    taken = packed(bench, [60, 60, 60], packing=Packing(8, by_memory=True, gpus=("0", "3")))
    assert max(taken) == 120
    placed = [folder.spec().how.gpu for folder in bench.home.find("trial.")]
    assert set(placed) == {"0", "3"}


def test_a_fixed_number_of_processes_is_spread_over_the_gpus_and_shares_them(bench):
    packed(bench, [10, 10, 10], packing=Packing(3, gpus=("0", "1")))
    how = [folder.spec().how for folder in bench.home.find("trial.")]
    assert sorted((each.gpu, each.parallel) for each in how) == [("0", 2), ("0", 2), ("1", 2)]


def test_out_of_memory_on_one_gpu_lets_fewer_be_on_each(bench):
    method = MethodSpec(name="m", use="full", params={})
    runs = [make_spec(n, stage="trial", method=method) for n in range(3)]
    bench.programs[runs[0].run_id] = [takes(runs[0], 10, seconds=2.0)]
    bench.programs[runs[1].run_id] = [takes(runs[1], 10, seconds=2.0)]
    bench.programs[runs[2].run_id] = [failed(runs[2], "out_of_memory", "no more"), takes(runs[2], 10)]
    packing = Packing(4, by_memory=True, gpus=("0", "1"))
    bench.run(iter([runs]), packing=packing)
    assert bench.outcomes(runs[2]) == ["cancelled", "done"]
    assert (packing.most, packing.each) == (4, 1)
