"""THE STORY: study -> search -> train -> measure -> analyse -> report, safe to call again after any crash."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from finetrial import analyse, export, files, lease, loaded, model_card, plan, plugins, report, setting_aside
from finetrial.arm_search import ArmSearch
from finetrial.evidence import best_trial
from finetrial.housekeeping import check_room, refuse_links, sweep
from finetrial.opening import Opened, open_home, packing_of, read_lock, resolve_inputs
from finetrial.plugins import metric_of
from finetrial.progress import Progress
from finetrial.records import MethodSpec, Outcome, RunRecord, RunSpec, SearchStop, Stage, TaskSpec
from finetrial.schedule import GIVEN_UP, TRIED_AGAIN, Lane, Scheduler
from finetrial.store import Home
from finetrial.study import Study
from finetrial.study_log import study_log
from finetrial.summary import Summary
from finetrial.tracking import Mirror


def run_study(study: Study, home_path: Path, progress: Progress, *, retry_failed: bool = False) -> Summary:
    """Run every phase that is not yet done, in order, and write the report.

    `retry_failed`: also try again the runs that were given up.

    Raises:
        FinetrialError: the study cannot go on; everything finished is kept and the message says what next.
    """
    inputs, home = resolve_inputs(study), Home(home_path)
    tried_again = TRIED_AGAIN | GIVEN_UP if retry_failed else TRIED_AGAIN
    with home.coordinate():
        refuse_links(home)
        sweep(home)
        opened = open_home(study, home, inputs)
        with study_log(home.log_file, progress, "finetrial run") as logged:
            arms = [(task.name, method.name) for task, method in study.arms]
            for note in export.drop_damaged(home, arms):
                logged.note(note)
            story = Story.begin(opened, logged, tried_again=tried_again)
            story.phase("baseline", "baseline", story.baselines())
            story.phase("control", "probe", story.controls(), totals=dict.fromkeys(story.task_names, 1))
            story.phase("search", "trial", story.trials())
            story.export_optima()
            story.phase("train", "replicate", story.replicates())
            story.phase("measure", "probe", story.probes())
            story.reclaim_models()
            loaded.check()  # what analyses may not be loaded yet
            return _conclude(story)


def report_again(home_path: Path) -> Summary:
    """Analyse what a study's folder holds and write its report, complete or not; nothing is started.

    Raises:
        HomeError: the folder is no study's, or a part of it is a link.
        PluginError: a plug-in beside the study file is no longer there.
    """
    story = _story_so_far(home_path)
    refuse_links(story.opened.home)
    return _conclude(story)


def analyse_again(home_path: Path) -> Summary:
    """What `report_again` would write as the summary; nothing is written. The same errors."""
    return _summarise(_story_so_far(home_path))


def runs_so_far(home_path: Path) -> tuple[Study, list[RunRecord]]:
    """The study of a folder, and the records of those of its runs that have begun; errors as `report_again`."""
    story = _story_so_far(home_path)
    return story.study, story.planned()


def _story_so_far(home_path: Path) -> Story:
    home = Home(home_path)
    lock = read_lock(home)
    plugins.make_importable(Path(lock.study.base))
    opened = Opened(home, lock.study, lock.inputs, lock.threads, None, changed=lock.changed)
    return Story(lock.study, opened, Progress())


def _conclude(story: Story) -> Summary:
    summary = _summarise(story)
    write(summary, story.opened.home)
    return summary


def _summarise(story: Story) -> Summary:
    opened, planned = story.opened, story.planned()
    notes = [changed.told for changed in opened.changed] + story.at_other_optima()
    return analyse.summarise(
        story.study,
        planned,
        opened.meta(),
        model_sha256=opened.model_sha256,
        tests=story.tests_of(planned),
        stops=story.stops(),
        notes=notes,
    )


def write(summary: Summary, home: Home) -> None:
    """Everything that follows from a summary: `analysis/`, the cards of trained models, `report/`."""
    home.write_summary(summary)
    model_card.write(summary, home.path)
    report.write(summary, home.path)


@dataclass
class Story:
    """One study under way: which runs each phase wants, given what the folders already hold."""

    study: Study
    opened: Opened
    progress: Progress
    tried_again: frozenset[Outcome] = TRIED_AGAIN
    failed_before: dict[str, int] = field(default_factory=dict)  # run -> attempt, of what is tried again

    def __post_init__(self) -> None:
        # One for all phases: a tracker that fails is warned of once.
        self.packing = packing_of(self.study, self.opened.threads)  # it learns what runs take
        self.mirror = Mirror(self.opened.home, self.study.track, self.progress.note)
        for note in self.opened.notes:
            self.progress.note(note)

    @classmethod
    def begin(cls, opened: Opened, progress: Progress, **options: Any) -> Story:
        """A study that this process coordinates, in its opened folder: damaged runs are set aside."""
        lease.watch((folder.lease_file for folder in opened.home.find("")), progress.note)
        for note in setting_aside.damaged(opened.home):
            progress.note(note)
        story = cls(opened.study, opened, progress, **options)
        for record in story.planned():
            failure = record.failure
            if failure is not None and failure.kind in story.tried_again:
                story.failed_before[failure.run_id] = failure.attempt
            story.packing.learn(opened.home.run(record.spec.run_id))
        return story

    def phase(
        self, name: str, stage: Stage, lanes: list[Lane], *, totals: dict[str, int] | None = None
    ) -> None:
        """Finish all runs of some lanes. `totals`: arm -> runs, where it is not all runs of the stage."""
        study, home = self.study, self.opened.home
        totals = self._totals(stage) if totals is None else totals
        if not totals:
            return
        metrics = {task.name: metric_of(task) for task in study.tasks}
        mine = [record for record in self.planned() if record.spec.stage == stage and record.outcome]
        ended = [r for r in mine if r.result or r.outcome not in self.tried_again]
        done = [r for r in ended if r.spec.arm in totals]
        by_arm = {arm: metrics[arm.partition("/")[0]] for arm in totals}
        self.progress.phase(name, totals, metrics=by_arm, done=done)
        engine = plugins.load("engines", study.run.engine)
        Scheduler(
            home, engine, self.packing, study.run.attempts, self.progress, self._finished, self.tried_again,
            partial(check_room, home, study.run.disk_bytes),
        ).run(lanes)  # fmt: skip

    def _finished(self, record: RunRecord) -> None:
        """A run has ended for good, in this command or before."""
        self.mirror(record)
        first = record.spec.rung is not None and record.spec.rung.number == 1
        # One that has none left was looked at when it ended.
        holds = first and self.opened.home.run(record.spec.run_id).checkpoint.exists()
        if holds and record.spec.method is not None:
            self.search_of(record.spec.task, record.spec.method).let_go_of_hopeless()

    @property
    def task_names(self) -> list[str]:
        """The tasks that have a control: all of them, unless nothing is measured."""
        return [task.name for task in self.study.tasks] if self.study.measure else []

    def _totals(self, stage: Stage) -> dict[str, int]:
        """How many runs of a stage the study has, by arm; of baselines by task."""
        study = self.study
        if stage == "baseline":
            return dict.fromkeys(plan.baseline_arms(study), 1)
        if stage == "probe" and not study.measure:
            return {}
        each = study.train.seeds
        if stage == "trial":
            each = sum(study.search.counts)
        return {f"{task.name}/{method.name}": each for task, method in study.arms}

    def baselines(self) -> list[Lane]:
        """Once per task: the trivial answers and the untrained model; the head alone on a frozen body."""
        tasks = self.study.tasks
        return [iter([spec(task)]) for spec in (self.baseline, self.frozen_body) for task in tasks]

    def trials(self) -> list[Lane]:
        """One lane per arm: each proposal depends on its trials before; a told search also on another arm's."""
        return [self.search_of(task, method).lane() for task, method in self.study.arms]

    def search_of(self, task: TaskSpec, method: MethodSpec) -> ArmSearch:
        return ArmSearch(self.study, self.opened, task, method, self.progress.note, self.failed_before)

    def export_optima(self) -> None:
        """Write each arm's best trial to `best/`, where the training phase reads it."""
        for task, method in self.study.arms:
            self.search_of(task, method).export_optimum()

    def replicates(self) -> list[Lane]:
        """Every arm's optimum, once per replicate; again where a model that is to be measured was not kept."""
        specs = self._replicate_specs()
        kept = specs if self.study.run.keep_models == "all" else []
        for note in setting_aside.without_model(self.opened.home, self._to_be_measured(specs), kept):
            self.progress.note(note)
        arms = dict.fromkeys(spec.arm for spec in specs)
        return [iter([[spec for spec in specs if spec.arm == arm]]) for arm in arms]

    def _to_be_measured(self, replicates: list[RunSpec]) -> list[RunSpec]:
        """The replicates whose models probes still need: those not measured yet, and the ones before them."""
        home, needed, previous = self.opened.home, [], None
        for spec in replicates if self.study.measure else ():
            probes = home.find(
                f"probe.{spec.task.name}.{spec.method.name if spec.method else ''}.{spec.number:03d}-"
            )
            if not any(probe.record().outcome for probe in probes):
                needed += [previous, spec] if previous is not None and previous.arm == spec.arm else [spec]
            previous = spec
        return needed

    def controls(self) -> list[Lane]:
        """The base against itself, once per task; nothing where nothing is measured."""
        return [iter([spec]) for spec in self._control_specs()]

    def probes(self) -> list[Lane]:
        """Every replicate that trained, measured against the base and its neighbour."""
        return [iter([spec]) for spec in self._probe_specs() if spec.subject is not None]

    def reclaim_models(self) -> None:
        """Delete the models that `run.keep_models` does not keep, of arms where nothing is left to measure."""
        home, policy = self.opened.home, self.study.run.keep_models
        planned = self.planned() if policy != "all" else []
        for task, method in self.study.arms:
            mine = [record for record in planned if record.spec.arm == f"{task.name}/{method.name}"]
            replicates = [record for record in mine if record.spec.stage == "replicate"]
            if any(record.result is None for record in mine if record.spec.stage in ("replicate", "probe")):
                continue
            best = best_trial(replicates, metric_of(task)) if policy == "best" else None
            for record in replicates:
                left = home.drop_model(record.spec) if record is not best else None
                if left is not None:
                    self.progress.note(left)

    def planned(self) -> list[RunRecord]:
        """The records of exactly the runs that this study consists of, as far as they have begun."""
        specs = [spec(task) for task in self.study.tasks for spec in (self.baseline, self.frozen_body)]
        specs += [run.spec for task, method in self.study.arms for run in self.search_of(task, method).runs()]
        specs += [*self._replicate_specs(), *self._probe_specs()]
        folders = [self.opened.home.run(spec.run_id) for spec in specs]
        return [folder.record() for folder in folders if folder.spec_file.exists()]

    def stops(self) -> dict[str, SearchStop]:
        """Task/method -> why no more trials were made; of arms whose search ended early."""
        found = {
            f"{task.name}/{method.name}": self.search_of(task, method).stop()
            for task, method in self.study.arms
        }
        return {arm: stop for arm, stop in found.items() if stop is not None}

    def at_other_optima(self) -> list[str]:
        """A sentence for every arm of which replicates were scored on test with other settings than now."""
        home, found = self.opened.home, []
        for arm, settings in {spec.arm: spec.settings for spec in self._replicate_specs()}.items():
            folders = home.find(f"replicate.{arm.replace('/', '.')}.")
            count = sum(each.result() is not None and each.spec().settings != settings for each in folders)
            if count:
                were, do = ("were", "do") if count > 1 else ("was", "does")
                found.append(
                    f"{arm}: {count} of its replicates {were} scored on test with other settings and {do} not "
                    f"count: its optimum was chosen anew when their scores could be known"
                )
        return found

    def tests_of(self, planned: list[RunRecord]) -> dict[str, dict[str, float]]:
        """Run id -> test scores by example, of the replicates that are done and have them."""
        found = {}
        for run in planned:
            sha256 = run.result.examples_sha256 if run.result and run.spec.stage == "replicate" else None
            if sha256 is not None:
                path = self.opened.home.run(run.spec.run_id).examples_file
                found[run.spec.run_id] = files.json_numbers(path, "test", sha256=sha256)
        return {run: scores for run, scores in found.items() if scores}

    def baseline(self, task: TaskSpec) -> RunSpec:
        return plan.baseline(self.study, task, self.opened.inputs, self.opened.threads)

    def frozen_body(self, task: TaskSpec) -> RunSpec:
        return plan.frozen_body(self.study, task, self.opened.inputs, self.opened.threads)

    def _replicate_specs(self) -> list[RunSpec]:
        specs = []
        for task, method in self.study.arms:
            if not self.opened.home.best_file(task.name, method.name).exists():
                continue
            settings = export.read(self.opened.home, task.name, method.name).settings
            specs += [
                plan.replicate(
                    self.study, task, method, number, settings, self.opened.inputs, self.opened.threads
                )
                for number in range(self.study.train.seeds)
            ]
        return specs

    def _control_specs(self) -> list[RunSpec]:
        tasks = self.study.tasks if self.study.measure else ()
        return [plan.control(self.baseline(task), self.study) for task in tasks]

    def _probe_specs(self) -> list[RunSpec]:
        if not self.study.measure:
            return []
        specs = self._control_specs()
        previous: RunSpec | None = None
        for subject in self._replicate_specs():
            result = self.opened.home.run(subject.run_id).result()
            if result is None or result.outcome != "done":
                previous = None
                continue
            neighbour = previous if previous is not None and previous.arm == subject.arm else None
            specs.append(plan.probe(self.study, subject, neighbour))
            previous = subject
        return specs
