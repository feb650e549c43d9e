"""`finetrial compare`: what sets studies apart comes first, numbers stand beside their study."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from finetrial.cli import main
from finetrial.compare import ALIKE, DIFFER, HASH_ALONE, NO_INFERENCE, Compared, compare
from finetrial.store import Home
from finetrial.summary import Summary
from summary_example import example_summary

LONGER = {"trials_planned": 30, "replicates_planned": 10}


HALVED = {"search_ends": (9, 3, 1)}


def changed(**changes: object) -> Summary:
    return example_summary().model_copy(update=changes)


def other() -> Summary:
    """A study of another model with more trials and seeds, one task, and no claims; not finished."""
    first = example_summary()
    return changed(
        study="another",
        study_hash="0000000000000000",
        model="org/larger",
        model_sha256="cd" * 32,
        complete=False,
        tasks=first.tasks[:1],
        arms=tuple(arm.model_copy(update={"planned": 10}) for arm in first.arms if arm.task == "squad_v2"),
        claims=(),
        ledger=tuple(row.model_copy(update=LONGER) for row in first.ledger if row.task == "squad_v2"),
    )


def home_of(summary: Summary, folder: Path) -> Path:
    Home(folder).write_summary(summary)
    return folder


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["compare", *(str(argument) for argument in arguments)])


@pytest.fixture
def homes(tmp_path: Path) -> list[Path]:
    return [home_of(example_summary(), tmp_path / "one"), home_of(other(), tmp_path / "other")]


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.split("   ") if cell.strip()]


def test_what_differs_comes_first_then_scores_then_verdicts_then_how_to_read_it(homes):
    result = call(*homes)
    assert result.exit_code == 0, result.output
    assert result.output.isascii()
    lines = [cells(line) for line in result.output.splitlines()]
    assert lines[0] == ["what differs", "squad-and-sst2-minilm", "another"]
    told = {
        line[0]: line[1:]
        for line in lines[1 : lines.index(next(x for x in lines if x[:2] == ["task", "method"]))]
    }
    assert told["study hash"] == ["3f9c21aa7be04d11", "0000000000000000"]
    assert told["model"] == ["sentence-transformers/all-MiniLM-L6-v2", "org/larger"]
    assert told["model SHA-256"] == ["abababababab", "cdcdcdcdcdcd"]
    assert told["tasks"] == ["squad_v2, sst2", "squad_v2"]
    assert told["trials per arm"] == ["9", "30"]
    assert told["replicates per arm"] == ["5", "10"]
    assert told["finished"] == ["yes", "no"]
    assert told["sst2: metric"] == ["accuracy", "-"]
    assert told["claims"][1] == "none"
    assert not {"methods", "full: learning_rate", "rows per trial", "runs: device"} & told.keys()
    titles = [n for n, line in enumerate(lines) if line[0] == "task"]
    assert len(titles) == 2
    assert lines[titles[1]][1] == "verdict on"
    notes = [line[0].removeprefix("note: ") for line in lines[-3:]]
    assert notes == [DIFFER, "another is not finished: its numbers may still change", NO_INFERENCE]


def test_every_number_stands_beside_its_task_method_and_study(homes):
    lines = [cells(line) for line in call(*homes).output.splitlines()]
    arm = next(arm for arm in example_summary().arms if (arm.task, arm.method) == ("sst2", "lora"))
    score, drift = arm.test["accuracy"], arm.drift.cka
    (row,) = [line for line in lines if line[:2] == ["sst2", "lora"]]  # the other study has no such task
    assert row == [
        "sst2", "lora", "squad-and-sst2-minilm",
        f"accuracy {score.estimate:.1f} ({score.low:.1f} .. {score.high:.1f})",
        "4 of 5",
        f"{drift.estimate:.3f} ({drift.low:.3f} .. {drift.high:.3f})",
        f"{arm.cost.train_seconds_each.estimate:.3g} s",
        "710 MB",
    ]  # fmt: skip
    both = [line for line in lines if line[:2] == ["squad_v2", "full"]]
    assert [(line[2], line[4]) for line in both] == [
        ("squad-and-sst2-minilm", "4 of 5"),
        ("another", "4 of 10"),
    ]


def test_the_verdicts_are_those_of_each_study(homes, tmp_path):
    again = home_of(changed(study="again", study_hash="1"), tmp_path / "again")
    found = json.loads(call(*homes, again, "--json").stdout)
    assert [each["label"] for each in found["claims"]] == ["squad-and-sst2-minilm", "again"] * len(
        example_summary().claims
    )
    kept = [each["claim"] for each in found["claims"] if each["label"] == "again"]
    assert kept == [claim.model_dump(mode="json") for claim in sorted_like(kept)]


def sorted_like(kept: list[dict]) -> list:
    by_name = {(claim.task, claim.claim): claim for claim in example_summary().claims}
    return [by_name[claim["task"], claim["claim"]] for claim in kept]


def test_json_holds_every_value_unrounded(homes):
    result = call(*homes, "--json")
    assert result.exit_code == 0
    found = Compared.model_validate_json(result.stdout)
    assert [study.home for study in found.studies] == [str(home) for home in homes]
    for arm in example_summary().arms:
        mine = next(
            each
            for each in found.arms
            if (each.task, each.method, each.label) == (arm.task, arm.method, "squad-and-sst2-minilm")
        )
        assert mine.score == arm.test[mine.metric]
        assert (mine.drift, mine.cost) == (arm.drift.cka, arm.cost)
        assert mine.valid == sum(point.score is not None and point.void is None for point in arm.replicates)


def test_equal_studies_are_said_to_be_alike_and_told_apart_by_their_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = call(*(home_of(example_summary(), Path("runs") / name) for name in ("a", "b")))
    assert result.exit_code == 0
    assert "what differs" not in result.output
    assert f"note: {ALIKE}\n" in result.output
    lines = [cells(line) for line in result.output.splitlines()]
    assert [line[2] for line in lines if line[:2] == ["sst2", "lora"]] == ["runs/a", "runs/b"]


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"model_revision": "f" * 40}, "model revision"),
        ({"model_changes": {"num_hidden_layers": 2}}, "changes to the model's config"),
        (
            {
                "ledger": tuple(
                    r.model_copy(update={"search_ends": (9, 3, 1)}) for r in example_summary().ledger
                )
            },
            "halving",
        ),
        ({"environment": {"torch": "2.14.0", "device": "cpu"}}, "runs: torch"),
        ({"meta": example_summary().meta.model_copy(update={"finetrial_version": "9.9"})}, "finetrial"),
        (
            {
                "tasks": tuple(
                    task.model_copy(update={"input_sha256": {"test": "a" * 64}})
                    for task in example_summary().tasks
                )
            },
            "squad_v2: test inputs, SHA-256",
        ),
    ],
)
def test_one_thing_that_differs_is_told(change, what):
    found = compare([example_summary(), changed(**change)], [Path("a"), Path("b")])
    assert what in [row.what for row in found.differs]
    assert found.notes[0] == DIFFER


def test_where_the_study_hash_alone_differs_it_is_said_where_to_look():
    found = compare([example_summary(), changed(study_hash="1")], [Path("a"), Path("b")])
    assert [row.what for row in found.differs] == ["study hash"]
    assert HASH_ALONE in found.notes


def test_what_analysed_the_runs_is_not_repeated_where_it_is_what_ran_them():
    meta = example_summary().meta
    newer = changed(
        environment=example_summary().environment | {"torch": "2.14.0"},
        meta=meta.model_copy(update={"environment": meta.environment | {"torch": "2.14.0"}}),
    )
    same = changed(environment=example_summary().environment | {"torch": "2.13.0"})
    found = compare([same, newer], [Path("a"), Path("b")])
    assert [(row.what, row.values) for row in found.differs] == [("runs: torch", ("2.13.0", "2.14.0"))]


def test_folders_that_cannot_be_compared_are_all_named_in_one_message(homes, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "study.lock.json").write_text("{}")
    damaged = homes[1] / "analysis" / "summary.json"
    damaged.write_text(damaged.read_text().replace('"planned": 10', '"planned": 11', 1))
    result = call(*homes, tmp_path / "empty", tmp_path / "begun")
    assert result.exit_code == 1
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert lines[0].startswith(f"{damaged} is damaged: its SHA-256")
    assert lines[1] == f"{tmp_path / 'empty'} is no study's folder: it has no analysis/summary.json"
    assert (
        lines[2]
        == f"{tmp_path / 'begun'} has no analysis yet; `finetrial report {tmp_path / 'begun'}` makes one"
    )
    assert len(lines) == 3


def test_one_study_is_not_compared(homes):
    result = call(homes[0])
    assert result.exit_code == 2
    assert "name two studies or more" in result.stderr
    assert call(homes[0], "nowhere").exit_code == 2
