"""Phase 1 of one arm: which trial comes next, which go on, which was the best. Its state are the folders."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

from finetrial import export, files, halving, plan, search, settling
from finetrial.evidence import best_trial, furthest, standing_value
from finetrial.opening import Opened
from finetrial.plugins import Metric, metric_of
from finetrial.records import MethodSpec, RunRecord, RunSpec, SearchStop, TaskSpec, WarmStart
from finetrial.schedule import Lane
from finetrial.study import Study


@dataclass(frozen=True)
class ArmSearch:
    """The search of one arm in an opened study's folder. `note` is told what a person should know."""

    study: Study
    opened: Opened
    task: TaskSpec
    method: MethodSpec
    note: Callable[[str], None]
    # Failures that are not the end of a run, as this command tries it again: run -> the attempt that failed.
    tried_again: Mapping[str, int] = field(default_factory=dict)

    @property
    def arm(self) -> str:
        return f"{self.task.name}/{self.method.name}"

    @property
    def metric(self) -> Metric:
        return metric_of(self.task)

    @property
    def yardstick(self) -> Metric:
        """What trials are proposed by, and compared by until the last end."""
        return halving.LOSS if self.study.search.ends else self.metric

    def lane(self) -> Lane:
        """Every trial; with halving to its first end, and from each end on those that are chosen.

        Those that are drawn at random depend on no other, nor do those that go on from one end.
        """
        rules = self.study.search
        at_random = rules.trials if rules.sampler == "random" else rules.startup_trials
        yield [self.trial(number) for number in range(at_random)]
        for number in range(at_random, rules.trials):
            told = number == at_random and self._source is not None  # which is made whatever may be gained
            while told and not self._told():
                yield []
            if not told and self._settled(number):
                break
            yield self.trial(number)
        for end, most in enumerate(rules.counts[1:], start=1):
            runs = {run.spec.number: run for run in self.runs(rung=end)}
            final = end == len(rules.ends) - 1
            standings = [self.standing(run, examples=final) for run in runs.values()]
            chosen = halving.chosen(standings, most, self.yardstick, final=final)
            # What has begun is gone on with, though others have come to be better.
            chosen += [number for number in self._gone_on(end) if number in runs and number not in chosen]
            self._let_go(run for number, run in runs.items() if number not in chosen)
            yield [plan.further(self.study, runs[number].spec, self.opened.threads) for number in chosen]
            self._let_go(runs[number] for number in chosen)

    def stop(self) -> SearchStop | None:
        """Why no more trials are made, where that was decided of as many planned ones as there are now."""
        rules = self.study.search
        found = self.opened.home.search_stop(self.task.name, self.method.name) if rules.early_stop else None
        return found if found is not None and found.planned == rules.trials else None

    def _settled(self, number: int) -> bool:
        """Whether the search ends before trial `number`; one that has begun is gone on with."""
        rules, runs = self.study.search, self.first_runs()
        if not rules.early_stop or any(run.spec.number >= number for run in runs):
            return False
        if (decided := self.stop()) is not None:
            return number >= decided.after  # one before that may have to be done anew
        standings = [self.standing(run, examples=True) for run in runs]
        stop = settling.settled(standings, rules.trials, self.yardstick)
        if stop is None:
            return False
        self.opened.home.stop_search(self.task.name, self.method.name, stop)
        self.note(
            f"{self.arm}: more trials would gain less than noise; {stop.after} of {stop.planned} are enough"
        )
        return True

    @property
    def _source(self) -> ArmSearch | None:
        """The search of the method that tells this one where its guided trials begin."""
        if self._factor is None:
            return None
        name = self.study.search.warm_start
        return replace(self, method=next(method for method in self.study.methods if method.name == name))

    @property
    def _factor(self) -> float | None:
        return search.told_factor(self.method, self.study.search.warm_start)

    def _told(self) -> bool:
        """Whether its first guided trial can be proposed: all that it is to be told is known."""
        source = self._source
        if source is None or self._begun(self.study.search.startup_trials):
            return True
        stop = source.stop()
        ended = [run for run in source.first_runs() if self._has_ended(run)]
        return len(ended) >= (stop.after if stop else self.study.search.trials)

    def _has_ended(self, run: RunRecord) -> bool:
        """Whether a run has ended for good, as far as this command goes."""
        failure = run.failure
        if run.result is not None or failure is None:
            return run.result is not None
        return not failure.goes_on and failure.attempt > self.tried_again.get(failure.run_id, 0)

    def _warm_start(self, number: int) -> tuple[WarmStart, RunSpec] | None:
        """From which trial the settings of this one are taken."""
        source, factor = self._source, self._factor
        if number != self.study.search.startup_trials or source is None or factor is None:
            return None
        if any(run.spec.warm_start for run in self.first_runs()):  # when fewer trials were planned
            return None
        best = best_trial(source.first_runs(), self.metric)
        if best is None:
            return None
        found = WarmStart(
            method=source.method.name, trial=best.spec.number, run_id=best.spec.run_id, factor=factor
        )
        return found, best.spec

    def _begun(self, number: int) -> RunSpec | None:
        """A trial's spec, if it has one: its only run's, or with halving its first one's."""
        first = ".rung1" if self.study.search.ends else ""
        found = self.opened.home.find(f"{self._name}{number:03d}{first}-")
        return found[0].spec() if found else None

    def trial(self, number: int) -> RunSpec:
        """A trial's only run, or with halving its run to the first end."""
        rules = self.study.search
        begun = self._begun(number)
        if begun:  # its settings were proposed from a history that may have been longer or shorter
            return begun.model_copy(update={"how": plan.how(self.study, self.opened.threads)})
        # None of those after it, if it is one that is done anew: its settings are what they were.
        runs = [run for run in self.first_runs() if run.spec.number < number]
        space = self.study.spaces[self.method.name]
        settings = search.propose(
            [search.Past(run.spec.number, run.spec.settings, run.outcome, standing_value(run)) for run in runs],
            space,
            number=number,
            seed=rules.seed,
            startup=rules.startup_trials,
            sampler=rules.sampler,
            metric=self.yardstick,
        )
        warm = self._warm_start(number)
        if warm is not None:
            settings = search.warm(settings, warm[1].settings, space, warm[0].factor)
        return plan.trial(
            self.study, self.task, self.method, number, settings, self.opened.inputs, self.opened.threads,
            warm_start=warm[0] if warm else None,
        )  # fmt: skip

    def runs(self, *, rung: int | None = None) -> list[RunRecord]:
        """Those of its runs that have begun, in order of name. `rung`: only those to that end, 1 the first."""
        records = [folder.record() for folder in self.opened.home.find(self._name)]
        return [
            run
            for run in records
            if run.spec.number < self.study.search.trials
            and (rung is None or (run.spec.rung is not None and run.spec.rung.number == rung))
        ]

    def first_runs(self) -> list[RunRecord]:
        """Its trials' only runs, or with halving those to the first end: one a trial."""
        return self.runs(rung=1 if self.study.search.ends else None)

    def export_optimum(self) -> None:
        """Write the best trial to `best/`; nothing is left there, and it is said, if none has a score.

        It is said, too, if none of those that were to be trained whole has one.
        """
        trials = furthest(self.runs())
        best = best_trial(trials, self.metric)
        if best is None:
            self.opened.home.best_file(self.task.name, self.method.name).unlink(missing_ok=True)
            self.note(f"{self.arm}: no trial has a score; nothing can be trained")
            return
        if best.spec.may_go_on and self.runs(rung=len(self.study.search.ends)):
            self.note(
                f"{self.arm}: no trial that was trained whole has a score; the best is one that was stopped"
            )
        space = self.study.spaces[self.method.name]
        export.write(self.opened.home, export.optimum(best, space, metric=self.metric.name, trials=len(trials)))

    @property
    def _name(self) -> str:
        return f"trial.{self.task.name}.{self.method.name}."

    def standing(self, run: RunRecord, *, examples: bool = False) -> halving.Standing:
        """What a trial is compared by. `examples`: with each validation example's own."""
        scores = {}
        if examples and run.result and run.result.examples_sha256:
            path = self.opened.home.run(run.spec.run_id).examples_file
            of = "validation_loss" if run.spec.may_go_on else "validation"
            scores = files.json_numbers(path, of, sha256=run.result.examples_sha256)
        return halving.Standing(run.spec.number, standing_value(run), scores)

    def let_go_of_hopeless(self) -> None:
        """Of trials that will not go on, whatever the rest scores, the checkpoints take no more room."""
        runs = self.first_runs()
        most = self.study.search.counts[1]
        chosen = halving.chosen([self.standing(run) for run in runs], most, self.yardstick, final=False)
        kept = {*chosen, *self._gone_on(1)}
        self._let_go(run for run in runs if run.spec.number not in kept)

    def _gone_on(self, end: int) -> list[int]:
        """Numbers of the trials that have begun to go on from one of their ends."""
        return [run.spec.number for run in self.runs(rung=end + 1) if run.outcome is None]

    def _let_go(self, runs: Iterable[RunRecord]) -> None:
        """Delete the checkpoints of runs that are done and that no other goes on from."""
        for run in runs:
            left = self.opened.home.run(run.spec.run_id).drop_checkpoint() if run.result else None
            if left is not None:
                self.note(left)
