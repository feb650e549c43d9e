"""progress.py: the plain lines exactly, and the table as a terminal would show it."""

from __future__ import annotations

import io
import subprocess
import sys

import pytest
from rich.console import Console

from finetrial import terminal
from finetrial.plugins import Metric
from finetrial.progress import LiveProgress, PlainProgress, duration_text, make_progress
from finetrial.records import (
    Attempt,
    Cost,
    Failure,
    MethodSpec,
    ModelSource,
    Result,
    Rung,
    RunRecord,
    RunSpec,
    Seeds,
    TaskSpec,
)
from finetrial.study_log import study_log

F1 = Metric(name="f1", higher_is_better=True, worst=0.0, best=100.0)
ARMS = ["squad_v2/full", "squad_v2/lora"]


def make_spec(number, method="lora", stage="trial", rate=1.9e-5) -> RunSpec:
    return RunSpec(
        study="s",
        stage=stage,
        task=TaskSpec(name="squad_v2", use="squad_v2", params={}),
        method=MethodSpec(name=method, use=method, params={}) if method else None,
        number=number,
        model=ModelSource(name="m"),
        settings={"learning_rate": rate, "epochs": 2} if stage == "trial" else {},
        seeds=Seeds(data_order=1, head=2, adapter=3, dropout=4),
    )


def ended(spec, score=None, *, outcome="done", reason=None, seconds=60.0) -> RunRecord:
    """A run that ended; its one attempt took `seconds`."""
    attempt = Attempt(number=1, host="h", pid=1, started_at=1000.0, ended_at=1000.0 + seconds, outcome=outcome)
    if outcome not in ("done", "diverged"):
        failure = Failure(run_id=spec.run_id, kind=outcome, reason=reason or "", attempt=1)
        return RunRecord(spec, None, failure, (attempt,))
    cost = Cost(wall_seconds=seconds, cpu_seconds=1.0, peak_memory_bytes=1, device="cpu")
    result = Result(run_id=spec.run_id, outcome=outcome, reason=reason, score=score, cost=cost)
    return RunRecord(spec, result, None, (attempt,))


class Screen:
    """A console that is read back."""

    def __init__(self, *, terminal: bool, width: int = 150):
        self.file = io.StringIO()
        self.console = Console(file=self.file, force_terminal=terminal, width=width, color_system=None)

    @property
    def text(self) -> str:
        return self.file.getvalue()


# -- plain lines -----------------------------------------------------------------------------------------------


def test_plain_lines_of_a_search():
    screen = Screen(terminal=False)
    with make_progress(screen.console, interactive=False) as progress:
        progress.phase("search", dict.fromkeys(ARMS, 3), metrics=dict.fromkeys(ARMS, F1))
        first = make_spec(0, rate=3.3e-4)
        progress.started(first)
        progress.tick(first, None)
        progress.tick(first, {"kind": "train", "step": 10, "planned_steps": 40, "loss": 2.0, "seconds": 5.0})
        progress.finished(ended(first, 71.94))
        progress.finished(ended(make_spec(1), 71.4))
        progress.finished(ended(make_spec(0, "full"), outcome="diverged", reason="the loss is not finite"))
        progress.note("trial_2 of squad_v2/lora starts again [attempt 2 of 3]")
        progress.finished(ended(make_spec(2), outcome="timed_out", reason="30 min are over\nlog: ..."))
    assert screen.text.splitlines() == [
        "search  2 arms, 6 runs",
        "search  squad_v2/lora  1/3  validation f1 71.9 (best 71.9, trial_0: learning rate 3.3e-04)",
        "search  squad_v2/lora  2/3  validation f1 71.4 (best 71.9, trial_0: learning rate 3.3e-04)",
        "search  squad_v2/full  1/3  trial_0 diverged: the loss is not finite",
        "trial_2 of squad_v2/lora starts again [attempt 2 of 3]",
        "search  squad_v2/lora  3/3  trial_2 timed out: 30 min are over"
        " (best 71.9, trial_0: learning rate 3.3e-04)",
    ]


def test_plain_line_of_the_brief_example_after_a_resume():
    screen = Screen(terminal=False)
    before = [ended(make_spec(number), 60.0 + number) for number in range(10)]
    before[8] = ended(make_spec(8, rate=1.9e-5), 72.0)
    with make_progress(screen.console, interactive=False) as progress:
        progress.phase("search", {"squad_v2/lora": 15}, metrics={"squad_v2/lora": F1}, done=before)
        progress.finished(ended(make_spec(10, rate=5e-4), 71.4))
    assert screen.text.splitlines() == [
        "search  1 arm, 15 runs, 10 ended before",
        "search  squad_v2/lora  11/15  validation f1 71.4 (best 72.0, trial_8: learning rate 1.9e-05)",
    ]


def test_replicates_show_a_mean_and_probes_their_name():
    screen = Screen(terminal=False)
    accuracy = Metric(name="accuracy", higher_is_better=True, worst=0.0, best=1.0)
    with make_progress(screen.console, interactive=False) as progress:
        progress.phase("train", {"squad_v2/lora": 2}, metrics={"squad_v2/lora": accuracy})
        progress.finished(ended(make_spec(0, stage="replicate"), 0.5))
        progress.finished(ended(make_spec(1, stage="replicate"), 0.75))
        progress.phase("measure", {"squad_v2": 1, "squad_v2/lora": 1})
        progress.finished(ended(make_spec(0, method=None, stage="baseline")))
        progress.finished(ended(make_spec(1, stage="probe")))
    assert screen.text.splitlines() == [
        "train  1 arm, 2 runs",
        "train  squad_v2/lora  1/2  validation accuracy 0.500 (mean 0.500)",
        "train  squad_v2/lora  2/2  validation accuracy 0.750 (mean 0.625)",
        "measure  2 arms, 2 runs",
        "measure  squad_v2  1/1  baseline done",
        "measure  squad_v2/lora  1/1  probe_1 done",
    ]


def test_a_halved_search_shows_the_trial_that_it_would_go_on_with():
    accuracy = Metric(name="accuracy", higher_is_better=True, worst=0.0, best=1.0)
    screen = Screen(terminal=False)

    def halved(number, ends, score, loss):
        spec = make_spec(number).model_copy(update={"rung": Rung(ends=ends)})
        record = ended(spec, score)
        return record._replace(result=record.result.model_copy(update={"validation_loss": loss}))

    with make_progress(screen.console, interactive=False) as progress:
        progress.phase("search", {"squad_v2/lora": 3}, metrics={"squad_v2/lora": accuracy})
        progress.finished(halved(0, (3,), 0.8, 0.6))
        progress.finished(halved(1, (3,), 0.7, 0.5))
        progress.finished(halved(1, (3, 1), 0.6, None))
    best = [line.split("(")[1] for line in screen.text.splitlines()[1:]]
    assert best == [
        "lowest loss 0.6, trial_0 to 1/3: learning rate 1.9e-05)",
        "lowest loss 0.5, trial_1 to 1/3: learning rate 1.9e-05)",
        "best 0.600, trial_1: learning rate 1.9e-05)",
    ]


def test_lower_is_better_and_ties_keep_the_first_trial():
    loss = Metric(name="loss", higher_is_better=False, worst=100.0, best=0.0)
    screen = Screen(terminal=False)
    with make_progress(screen.console, interactive=False) as progress:
        progress.phase("search", {"squad_v2/lora": 4}, metrics={"squad_v2/lora": loss})
        for number, score in ((3, 1.5), (1, 1.5), (2, 9.0)):
            progress.finished(ended(make_spec(number), score))
    assert "best 1.5, trial_3" in screen.text.splitlines()[1]
    assert "best 1.5, trial_1" in screen.text.splitlines()[2]
    assert "best 1.5, trial_1" in screen.text.splitlines()[3]


def test_cancelled_and_unfinished_runs_are_not_counted():
    screen = Screen(terminal=False)
    with make_progress(screen.console, interactive=False) as progress:
        progress.phase("search", {"squad_v2/lora": 2}, metrics={"squad_v2/lora": F1})
        progress.finished(ended(make_spec(0), outcome="cancelled", reason="interrupted"))
        progress.finished(RunRecord(make_spec(0), None, None, ()))
        progress.finished(ended(make_spec(0), 50.0))
    assert len(screen.text.splitlines()) == 2
    assert "  1/2  validation f1 50.0" in screen.text


def test_long_lines_are_not_wrapped_and_long_reasons_are_cut():
    screen = Screen(terminal=False, width=40)
    with make_progress(screen.console, interactive=False) as progress:
        progress.phase("search", {"squad_v2/lora": 2})
        progress.finished(ended(make_spec(0), outcome="crashed", reason="x" * 500))
    assert screen.text.splitlines()[1] == f"search  squad_v2/lora  1/2  trial_0 crashed: {'x' * 97}..."


@pytest.mark.parametrize("outcome", ["bug", "refused"])
def test_why_a_study_stops_is_left_to_the_message_that_it_stops_with(outcome):
    screen = Screen(terminal=False)
    with make_progress(screen.console, interactive=False) as progress:
        progress.phase("search", {"squad_v2/lora": 2})
        progress.finished(ended(make_spec(0), outcome=outcome, reason="the reason"))
    assert screen.text.splitlines()[1] == f"search  squad_v2/lora  1/2  trial_0 {outcome}"


# -- the table -------------------------------------------------------------------------------------------------


@pytest.fixture
def half_way():
    """Two arms in the middle of a search, and the screen they are drawn on."""
    screen = Screen(terminal=True)
    progress = make_progress(screen.console, interactive=True)
    progress.phase("search", {"squad_v2/full": 4, "squad_v2/lora": 4}, metrics=dict.fromkeys(ARMS, F1))
    for number, score in enumerate((70.0, 72.04)):
        progress.finished(ended(make_spec(number, rate=3.3e-4), score, seconds=120.0))
    progress.finished(ended(make_spec(0, "full"), outcome="diverged", reason="r", seconds=30.0))
    progress.finished(ended(make_spec(1, "full"), outcome="crashed", reason="signal 9", seconds=30.0))
    running = make_spec(2)
    progress.started(running)
    progress.tick(running, {"step": 100, "planned_steps": 400, "seconds": 10.0})
    progress.tick(running, {"step": 200, "planned_steps": 400, "seconds": 60.0})
    yield progress, screen
    progress.close()


def shown(progress: LiveProgress) -> list[list[str]]:
    """The table's cells, one list a line, title first."""
    screen = Screen(terminal=False)
    screen.console.print(progress.table())
    return [[cell for cell in line.strip().split("  ") if cell] for line in screen.text.splitlines()]


def test_the_table_half_way(half_way):
    progress, _ = half_way
    # lora: 2 runs of 120 s less the half that is done = 180 s; full: 2 of 30 s; one runs at a time
    assert [[cell.strip() for cell in line] for line in shown(progress)] == [
        ["search", "4 min left"],
        ["arm", "runs", "score so far", "ended badly", "now"],
        ["squad_v2/full", "2/4", "1 diverged, 1 failed", "waiting"],
        [
            "squad_v2/lora",
            "2/4",
            "best 72.0, trial_1: learning rate 3.3e-04",
            "trial_2, step 200/400, 2 steps/s",
        ],
    ]


def test_the_table_with_runs_side_by_side_and_at_its_end(half_way):
    progress, _ = half_way
    progress.started(make_spec(3))
    assert shown(progress)[0][-1].strip() == "2 min left"  # 180 + 60 s of work, two at a time
    assert shown(progress)[3][-1].strip() == "trial_2, step 200/400, 2 steps/s, and 1 more"
    for number in (2, 3):
        progress.finished(ended(make_spec(number), 60.0))
        progress.finished(ended(make_spec(number, "full"), 60.0))
    assert shown(progress)[0] == ["search"]
    assert [line[-1].strip() for line in shown(progress)[2:]] == ["finished", "finished"]


def test_the_terminal_shows_the_table_notes_and_failures_and_is_left_clean(half_way):
    progress, screen = half_way
    progress.note("a note with [brackets]")
    progress.close()
    progress.close()
    text = screen.text
    assert "score so far" in text
    assert "a note with [brackets]" in text
    assert "search  squad_v2/full  trial_1 crashed: signal 9" in text
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1  # cursor hidden once, shown again
    last_table = text[text.rindex("search   ") :]
    assert "trial_2, step 200/400" in last_table


def test_the_terminal_is_left_clean_after_an_error():
    screen = Screen(terminal=True)

    def interrupted():
        with make_progress(screen.console, interactive=True) as progress:
            progress.phase("search", dict.fromkeys(ARMS, 1))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert screen.text.count("\x1b[?25h") == 1


def test_a_second_phase_starts_a_second_table():
    screen = Screen(terminal=True)
    with make_progress(screen.console, interactive=True) as progress:
        progress.phase("search", {"squad_v2/lora": 1})
        progress.finished(ended(make_spec(0), 50.0))
        progress.phase("train", {"squad_v2/lora": 2})
        assert shown(progress)[2][1].strip() == "0/2"
    assert "score so far" in screen.text[: screen.text.index("train")]


def test_a_narrow_terminal_keeps_one_line_an_arm(half_way):
    progress, _ = half_way
    narrow = Screen(terminal=False, width=60)
    narrow.console.print(progress.table())
    lines = narrow.text.splitlines()
    assert len(lines) == 4
    assert max(map(len, lines)) <= 60
    assert [line[:20].rstrip() for line in lines[2:]] == ["squad_v2/full  2/4", "squad_v2/lora  2/4"]


def test_the_step_rate_survives_a_resume():
    """A second attempt begins at step 200 with its clock at zero."""
    progress = LiveProgress(Screen(terminal=True).console)
    progress.phase("search", {"squad_v2/lora": 1})
    run = make_spec(0)
    for step, seconds in ((240, 100.0), (200, 5.0), (220, 10.0)):
        progress.tick(run, {"step": step, "planned_steps": 400, "seconds": seconds})
    assert shown(progress)[2][-1].strip() == "trial_0, step 220/400, 4 steps/s"
    progress.tick(run, {"kind": "eval", "step": 220, "f1": 3.0})  # no clock: the rate stays
    assert shown(progress)[2][-1].strip() == "trial_0, step 220/400, 4 steps/s"
    progress.close()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (89.0, "89 s"), (90.0, "2 min"), (3570.0, "1 h 00 min"), (4320.0, "1 h 12 min")],
)
def test_durations(seconds, text):
    assert duration_text(seconds) == text


def test_rich_is_imported_only_for_a_table():
    program = (
        "import sys, finetrial.progress as p\n"
        "assert 'rich' not in sys.modules and 'torch' not in sys.modules\n"
        "p.make_progress(None, interactive=False); p.make_progress(None, interactive=True)\n"
        "assert 'rich' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_make_progress_chooses():
    console = Screen(terminal=False).console
    assert isinstance(make_progress(console, interactive=True), LiveProgress)
    assert isinstance(make_progress(console, interactive=False), PlainProgress)


class Gone(io.StringIO):
    """An output that takes nothing any more, for one of several reasons."""

    def __init__(self, error: Exception):
        super().__init__()
        self.error = error

    def write(self, text: str) -> int:
        raise self.error


@pytest.mark.parametrize("interactive", [True, False])
@pytest.mark.parametrize(
    "error",
    [BrokenPipeError(), OSError(5, "Input/output error"), UnicodeEncodeError("ascii", "ö", 0, 1, "no")],
    ids=lambda error: type(error).__name__,
)
def test_what_cannot_be_shown_is_logged_and_stops_nothing(tmp_path, error, interactive):
    console = type(terminal.console)(file=Gone(error), force_terminal=interactive, width=100)
    with make_progress(console, interactive) as shown, study_log(tmp_path / "log.txt", shown, "it") as progress:
        progress.phase("search", dict.fromkeys(ARMS, 1))
        progress.started(make_spec(0))
        progress.note("a folder named \udce9")  # whose name is no UTF-8
        progress.finished(ended(make_spec(0), 70.0))
    lines = (tmp_path / "log.txt").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 5
    assert lines[2].endswith("a folder named \\udce9")
