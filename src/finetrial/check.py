"""`finetrial check`: will the study fit, will it learn, how long will it take; in minutes, before the night.

Everything runs in the study's own folder, as isolated runs: the baselines, a rehearsal of every arm, the
control, and two real trials of the most demanding arm. All but the rehearsals are the study's own, and `run`
does not do them again.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from finetrial import check_report, files, halving, plan
from finetrial.check_report import ArmCheck, Checked, TaskCheck
from finetrial.errors import RunsFailed
from finetrial.forecast import Evidence, Forecast, first_end_steps, forecast, rehearsal_of
from finetrial.housekeeping import LEAST_FREE_BYTES, refuse_links
from finetrial.opening import open_home, read_lock, resolve_inputs
from finetrial.pipeline import Story
from finetrial.plugins import metric_of
from finetrial.progress import Progress
from finetrial.records import NEXT_STEP, MethodSpec, RunRecord, TaskSpec
from finetrial.schedule import Lane
from finetrial.store import Home
from finetrial.study import Study
from finetrial.study_log import study_log
from finetrial.summary import FROZEN_BASELINE, UNTRAINED

PILOTS = 2
# A study longer than this is told what halving would save, where it is a tenth or more of it.
LONG_SECONDS, WORTH_SAYING = 1800.0, 0.9


def check_study(study: Study, home_path: Path, progress: Progress) -> Checked:
    """Rehearse a study, write `check.json` and `check.md` into its folder, and give what they say.

    Raises:
        FinetrialError: something that the study names is not there or cannot be used; the message has it.
    """
    inputs, home = resolve_inputs(study), Home(home_path)
    with home.coordinate():
        refuse_links(home)
        opened = open_home(study, home, inputs, begins=False)
        with study_log(home.log_file, progress, "finetrial check") as logged:
            for folder in home.find("check."):  # what a machine does today is asked today
                shutil.rmtree(folder.path)
            story = Story.begin(opened, logged)
            story.phase("baseline", "baseline", story.baselines())
            _refuse_failed(story)
            arms = [f"{task.name}/{method.name}" for task, method in study.arms]
            story.phase("rehearse", "check", _rehearsals(story), totals=dict.fromkeys(arms, 1))
            found = _evidence(story)
            if not _faults(found):
                story.phase("control", "probe", story.controls(), totals=dict.fromkeys(story.task_names, 1))
                task, method = _most_demanding(story, found)
                rules = study.search  # a trial that another search tells where to begin has to wait for that
                number = min(PILOTS, rules.startup_trials if rules.warm_start else rules.trials)
                lane = (story.search_of(task, method).trial(index) for index in range(number))
                story.phase("pilot", "trial", [lane], totals={f"{task.name}/{method.name}": number})
                found = _evidence(story, pilots=(task, method))
        checked = _told(story, found)
        files.write_text(home.check_json, checked.model_dump_json(indent=1) + "\n")
        files.write_text(home.check_text, check_report.markdown(checked))
        return checked


def _refuse_failed(story: Story) -> None:
    """Raises RunsFailed if a baseline was given up: there is nothing to compare with."""
    for task in story.study.tasks:
        failure = story.opened.home.run(story.baseline(task).run_id).failure()
        if failure is not None:
            raise RunsFailed(f"{failure.run_id}: {failure.kind}: {failure.reason}; {NEXT_STEP[failure.kind]}")


def _rehearsals(story: Story) -> list[Lane]:
    study, opened = story.study, story.opened
    specs = [plan.rehearsal(study, task, method, opened.inputs, opened.threads) for task, method in study.arms]
    return [iter([spec]) for spec in specs]


def _evidence(story: Story, pilots: tuple[TaskSpec, MethodSpec] | None = None) -> Evidence:
    """The records of what was run so far."""
    home = story.opened.home
    records = [folder.record() for folder in home.find("")]
    tasks = story.study.tasks
    return Evidence(
        baselines={task.name: home.run(story.baseline(task).run_id).record() for task in tasks},
        rehearsals={record.spec.arm: record for record in records if record.spec.stage == "check"},
        frozen={task.name: home.run(story.frozen_body(task).run_id).record() for task in tasks},
        pilots=story.search_of(*pilots).first_runs()[:PILOTS] if pilots else (),
        controls={
            record.spec.task.name: record
            for record in records
            if record.spec.stage == "probe" and record.spec.subject is None and record.result
        },
    )


def _most_demanding(story: Story, found: Evidence) -> tuple[TaskSpec, MethodSpec]:
    """The arm that takes the most memory; one that an earlier check took stays, for arms may be close."""

    def demand(arm: tuple[TaskSpec, MethodSpec]) -> tuple[bool, int]:
        rehearsal = rehearsal_of(found.rehearsals[f"{arm[0].name}/{arm[1].name}"])
        return bool(story.search_of(*arm).runs()), rehearsal.predicted_memory_bytes

    return max(story.study.arms, key=demand)


def _faults(found: Evidence) -> list[str]:
    """What keeps an arm from fitting or learning, and what to do about it."""
    said = []
    for arm, record in found.rehearsals.items():
        if record.failure is not None:
            kind = record.failure.kind
            said.append(f"{arm}: {kind.replace('_', ' ')}: {record.failure.reason}; {NEXT_STEP[kind]}")
        elif rehearsal_of(record).overfit.fault is not None:
            said.append(f"{arm} does not learn ten samples by heart: {rehearsal_of(record).overfit.fault}")
    return said


def _told(story: Story, found: Evidence) -> Checked:
    study, home = story.study, story.opened.home
    faults = _faults(found)
    foretold = None if faults else forecast(study, found, story.packing.most)
    if foretold is not None:
        faults += _no_room(home, study, foretold) + _no_time(study, foretold) + _no_pilot(found)
    begun = read_lock(home).begun  # from then on the search is the one it is
    about_halving = halving_notes(study, found, foretold, story.packing.most) if foretold and not begun else []
    tasks = {task.name: _task(task, found) for task in study.tasks}
    ran = [*found.baselines.values(), *found.rehearsals.values(), *found.frozen.values(), *found.pilots]
    ran += list(found.controls.values())
    return Checked(
        study=study.study,
        home=str(home.path),
        tasks=tasks,
        arms={arm: _arm(study, arm, record, found) for arm, record in found.rehearsals.items()},
        forecast=foretold,
        runs=len(ran),
        ended_well=sum(record.outcome in ("done", "diverged") for record in ran),
        killed=sum(a.outcome in ("crashed", "lost", "timed_out") for r in ran for a in r.attempts),
        out_of_memory=sum(a.outcome == "out_of_memory" for r in ran for a in r.attempts),
        retries=sum(len(record.attempts) - 1 for record in ran),
        faults=tuple(faults),
        notes=(*plan.warnings(study), *_notes(found, tasks), *about_halving),
    )


def _task(task: TaskSpec, found: Evidence) -> TaskCheck:
    metric = metric_of(task)
    result = found.baselines[task.name].result
    assert result is not None  # the scheduler has refused to go on otherwise, or it was given up
    trivial, validation = (
        {name: scores[metric.name] for name, scores in result.measures[which].items()}
        for which in ("baselines", "validation_baselines")
    )
    validation[UNTRAINED] = result.scores["validation"][metric.name]
    frozen = found.frozen[task.name].result
    if frozen is not None and frozen.score is not None:
        validation[FROZEN_BASELINE] = frozen.score
    return TaskCheck(
        metric=metric.name, higher_is_better=metric.higher_is_better, rows=result.split_rows, test=trivial,
        validation=validation,
    )  # fmt: skip


def _arm(study: Study, arm: str, record: RunRecord, found: Evidence) -> ArmCheck:
    method = record.spec.method
    rate = study.spaces[method.name]["learning_rate"] if method else None
    pilots = [pilot for pilot in found.pilots if pilot.spec.arm == arm]
    return ArmCheck(
        rehearsal=rehearsal_of(record) if record.result else None,
        failure=record.failure.reason if record.failure else None,
        learning_rate=rate.model_dump(mode="json") if rate else {},
        pilots=tuple(
            check_report.Pilot(
                learning_rate=float(pilot.spec.settings["learning_rate"]),
                outcome=pilot.outcome or "unfinished",
                score=pilot.result.score if pilot.result else None,
                measured_memory_bytes=pilot.result.cost.peak_memory_bytes if pilot.result else None,
            )
            for pilot in pilots
        ),
    )


def _no_room(home: Home, study: Study, foretold: Forecast) -> list[str]:
    free = shutil.disk_usage(home.path).free - LEAST_FREE_BYTES
    needs = f"the study needs about {foretold.disk_bytes / 1e6:.0f} MB of disk"
    if foretold.disk_bytes > free:
        return [f"{needs}, and {home.path} has {free / 1e6:.0f} MB to spare; make room or use another --home"]
    if study.run.disk_bytes is not None and foretold.disk_bytes > study.run.disk_bytes:
        return [f"{needs}, more than run.disk ({study.run.disk_bytes / 1e6:.0f} MB); raise it"]
    return []


def _no_time(study: Study, foretold: Forecast) -> list[str]:
    limit = study.run.limit_seconds
    if limit is None:
        return []
    longest = {name: max(arm.trial_seconds, arm.replicate_seconds) for name, arm in foretold.arms.items()}
    return [
        f"a run of {name} takes about {check_report.duration(seconds)}, more than run.trial_limit "
        f"({check_report.duration(limit)}); raise it, or lower search.rows or train.rows"
        for name, seconds in longest.items()
        if seconds > limit
    ]


def halving_notes(study: Study, found: Evidence, foretold: Forecast, most: int) -> list[str]:
    """Of halved trials: whether they are too short for it. Of whole ones that take long: what it saves."""
    factor = study.search.halving or 3
    steps = {
        arm: first_end_steps(study.spaces[record.spec.method.name], rehearsal_of(record), factor)
        for arm, record in found.rehearsals.items()
        if record.spec.method is not None
    }
    short = [f"{arm}: {said}" for arm, count in steps.items() if (said := halving.said_of(count))]
    if study.search.halving is not None:
        return short
    if short or foretold.seconds < LONG_SECONDS:
        return []
    halved = study.model_copy(update={"search": study.search.model_copy(update={"halving": 3})})
    seconds = forecast(halved, found, most).seconds
    if seconds > WORTH_SAYING * foretold.seconds:
        return []
    return [
        f"with `search.halving: 3` the whole study would take about {check_report.duration(seconds)}: most "
        "trials then end after a ninth or a third of their steps; docs/benchmarks.md says how well that chooses"
    ]


def _no_pilot(found: Evidence) -> list[str]:
    """Pilots of which not one ended with a number."""
    if not found.pilots or any(pilot.outcome in ("done", "diverged") for pilot in found.pilots):
        return []
    return [
        f"{pilot.spec.run_id}: {pilot.failure.kind}: {pilot.failure.reason}; {NEXT_STEP[pilot.failure.kind]}"
        for pilot in found.pilots
        if pilot.failure
    ]


def _notes(found: Evidence, tasks: dict[str, TaskCheck]) -> list[str]:
    """What a person should know before they begin, though the study can run."""
    said = []
    for task, record in found.frozen.items():
        failed = record.failure
        if record.result is None and failed is not None:
            why = f"{failed.kind.replace('_', ' ')}: {failed.reason}; {NEXT_STEP[failed.kind]}"
            said.append(f"{task}: the head on a frozen body, a baseline and a control, has no result: {why}")
    for arm, record in found.rehearsals.items():
        if record.result is None:
            continue
        rehearsal = rehearsal_of(record)
        if rehearsal.contradictions:
            count, task_name = rehearsal.contradictions, arm.partition("/")[0]
            said.append(f"{task_name}: {count} training inputs occur again with another label")
        if rehearsal.could_be_bf16:
            said.append(
                "this processor has instructions for bf16, and `train.precision: auto` trains in fp32 on it; "
                "with `bf16` steps of MiniLM were 1.3 to 1.7 times as fast (docs/log.md)"
            )
        if rehearsal.slow_in_bf16:
            said.append(
                f"{arm} computes in bf16, for which this processor has no instructions: on such a one fp32 was "
                "ten times as fast (docs/log.md); use `train.precision: auto` and weights of fp32"
            )
    for arm in {pilot.spec.arm for pilot in found.pilots}:
        task = tasks[arm.partition("/")[0]]
        pilots = [pilot for pilot in found.pilots if pilot.spec.arm == arm]
        scores = [pilot.result.score for pilot in pilots if pilot.result and pilot.result.score is not None]
        diverged = sum(pilot.outcome == "diverged" for pilot in pilots)
        if diverged == len(pilots):
            said.append(f"{arm}: every pilot diverged; lower the upper end of its learning_rate")
        elif scores and not task.beaten_by(scores):
            said.append(
                f"{arm}: no pilot is better than what needs no training ({task.metric} {task.best:.1f}); two "
                f"trials with settings drawn at random need not be, but rows or epochs may be too few"
            )
    return list(dict.fromkeys(said))
