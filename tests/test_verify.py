"""`report --verify` on a small study that has run: what is untouched passes, one altered digit is named."""

from __future__ import annotations

import json
import random
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

from finetrial import verify
from finetrial.cli import main
from finetrial.store import Home
from wrong_study_files import text_of

SMALL = {
    "study": "small",
    "tasks": "{synthetic_qa: {rows: 16, validation_rows: 9, test_rows: 9, max_length: 64}}",
    "methods": "{full: {search: {learning_rate: 1e-3}}, lora: {search: {learning_rate: 1e-2, rank: 2}}}",
    "search": "{trials: 1, space: {epochs: 1, batch_size: 8}}",
    "train": "{seeds: 2}",
    "claims": "[lora within 3% of full]",
    "measure": "{drift: {rows: 9}}",
    "run": "{engine: inline, threads: 1, log_steps: 1}",
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path) -> Path:
    """A finished study's folder: two methods, a trial and two replicates each, probes, a claim."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "study.yaml").write_text(text_of(**SMALL, model=str(tiny_bert)))
    command = [sys.executable, "-m", "finetrial", "run", "study.yaml"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "runs" / "small"


@pytest.fixture
def home(finished: Path, tmp_path: Path) -> Path:
    """A copy of it to change."""
    return Path(shutil.copytree(finished, tmp_path / "home"))


def call(home: Path) -> Result:
    return CliRunner().invoke(main, ["report", "--verify", str(home)])


def everything(home: Path) -> dict[str, tuple[int, bytes]]:
    """Every file and folder with content and time of change: what is made and deleted leaves a trace, too."""
    return {
        str(path): (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b"")
        for path in [home, *home.rglob("*")]
    }


def alter(path: Path, within: str = r"[0-9]") -> None:
    """Make one digit another: a random one of those that a pattern ends with."""
    chance = random.Random(path.name)
    text = path.read_text(encoding="latin-1")  # any byte is a letter, so that it is written back as it was
    at = chance.choice([match.end() - 1 for match in re.finditer(within, text)])
    other = chance.choice([digit for digit in "0123456789" if digit != text[at]])
    path.write_text(text[:at] + other + text[at + 1 :], encoding="latin-1", newline="")


def test_an_untouched_report_passes_and_one_line_says_what_was_looked_at(finished):
    result = call(finished)
    assert result.exit_code == 0, result.output
    (line,) = result.output.splitlines()
    said = re.search(r"([\d,]+) runs, ([\d,]+) numbers, ([\d,]+) files verified$", line)
    assert said, line
    runs, numbers, files = (int(count.replace(",", "")) for count in said.groups())
    assert runs == 2 + 2 + 4 + 5  # baselines; trials; replicates; probes with the control
    records = list((finished / "runs").glob("*/*.json")) + list((finished / "runs").glob("*/attempts/*.json"))
    sealed = [path for path in records if "sha256" in json.loads(path.read_text())]
    written = [path for name in ("analysis", "report") for path in (finished / name).rglob("*.*")]
    assert files == len(sealed) + len(written)
    summary = json.loads((finished / "analysis" / "summary.json").read_text())
    assert numbers == len([v for key in summary if key != "meta" for v in flat(summary[key])])


def flat(value: object) -> Iterator[int | float]:
    """The numbers of a JSON value."""
    if isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from flat(inner)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield value


def test_nothing_in_the_folder_changes_and_it_may_be_read_only(home):
    before = everything(home)
    for path in [home, *home.rglob("*")]:
        path.chmod(path.stat().st_mode & ~(stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH))
    try:
        result = call(home)
    finally:
        for path in [home, *home.rglob("*")]:
            path.chmod(path.stat().st_mode | stat.S_IWUSR)
    assert result.exit_code == 0, result.output
    assert everything(home) == before


def test_it_may_be_moved_and_verified_from_elsewhere(home, tmp_path, monkeypatch):
    home.rename(tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path)
    assert call(Path("elsewhere")).exit_code == 0


def differences(home: Path) -> set[str]:
    """The files that are named."""
    return {found.file for found in verify.verify(home).differences}


def test_one_altered_digit_in_any_file_of_the_report_is_named(home):
    """All files at once: each is compared for itself."""
    files = [path for path in (home / "report").rglob("*.*") if re.search(rb"[0-9]", path.read_bytes())]
    assert {path.suffix for path in files} == {".html", ".md", ".tex", ".csv", ".svg", ".pdf", ".png"}
    for path in files:
        alter(path)
    assert differences(home) == {path.relative_to(home).as_posix() for path in files}


def test_altered_digits_all_over_the_summary_are_each_named_with_both_values(home):
    path = home / "analysis" / "summary.json"
    before = path.read_text()
    values = before[: before.index(' "meta": ')]  # what no run says is known by the seal, below
    places = [match.end() - 1 for match in re.finditer(r": -?\d+\.\d", values)]
    chosen = random.Random(0).sample(places, 15)
    after = list(before)
    for at in chosen:
        after[at] = str(9 - int(before[at]))
    path.write_text("".join(after))
    found = verify.verify(home).differences
    assert {each.file for each in found} == {"analysis/summary.json"}
    assert len({each.where for each in found}) == 15
    number = re.compile(r"[0-9.e-]+")
    starts = [values.rindex(" ", 0, at) + 1 for at in chosen]
    said = [tuple(number.match(text, start)[0] for text in ("".join(after), before)) for start in starts]
    assert sorted((each.stored, each.derived) for each in found) == sorted(said)


@pytest.mark.parametrize(
    "within", [r'"created_at": "[0-9]', r'"wall_seconds": [0-9]', r'"sha256": "[^"]*?[0-9]']
)
def test_what_no_run_says_is_known_by_the_seal(home, within):
    alter(home / "analysis" / "summary.json", within)
    result = call(home)
    assert result.exit_code == 1
    assert "  analysis/summary.json: sha256: stored " in result.output
    assert "but `meta` agrees with the runs" in result.output


@pytest.mark.parametrize("stage", ["baseline.", "trial.", "replicate.", "probe."])
def test_one_altered_digit_in_a_result_is_named_whether_it_reaches_the_report_or_not(home, stage):
    path = Home(home).find(stage)[0].result_file
    before = path.read_bytes()
    for within in (r'"wall_seconds": [0-9]', r'"cpu_seconds": [0-9]', r"[0-9]", r'"sha256": "[^"]*?[0-9]'):
        path.write_bytes(before)
        alter(path, within)
        assert differences(home) == {path.relative_to(home).as_posix()}, within


def test_a_digit_that_changes_no_number_is_named(home):
    path = Home(home).find("replicate.")[0].result_file
    text = path.read_text()
    path.write_text(re.sub(r'("wall_seconds": [0-9.]+)', r"\g<1>00000000000000000001", text, count=1))
    (found,) = [each for each in verify.verify(home).differences if each.file.endswith("result.json")]
    assert found.where.startswith("line ")
    assert "00000000000000000001" in found.stored
    assert "00000000000000000001" not in found.derived


def test_a_score_by_example_that_was_altered_is_named_and_left_out_of_the_analysis(home):
    """Its hash is in the run's sealed result."""
    path = Home(home).find("replicate.")[0].examples_file
    scores = json.loads(path.read_text())
    name = next(iter(scores["test"]))
    scores["test"][name] = 100.0 - scores["test"][name]
    path.write_text(json.dumps(scores))
    verified = verify.verify(home).differences
    assert path.relative_to(home).as_posix() in {each.file for each in verified}
    assert any(
        each.where == "claims.0.on_examples.left_out" and "no scores by example" in each.derived
        for each in verified
    )


@pytest.mark.parametrize("name", ["spec.json", "attempts/1.json"])
def test_the_other_records_of_a_run_are_looked_at_too(home, name):
    path = Home(home).find("trial.")[0].path / name
    alter(path)
    assert path.relative_to(home).as_posix() in differences(home)


def test_an_altered_optimum_is_named(home):
    path = next((home / "best").iterdir())
    alter(path, r"score: [0-9]")
    result = call(home)
    assert result.exit_code == 1
    assert f"best/{path.name}: stored damaged: its SHA-256 is not the one that it states" in result.output


def test_a_file_that_is_missing_or_of_no_report_is_named(home):
    (home / "report" / "report.md").unlink()
    (home / "report" / "figures" / "score-old.csv").write_text("1\n")
    (home / "report" / "figures" / ".score.csv.0a1b2c3d.tmp").write_text("1\n")  # left by a killed process
    result = call(home)
    assert result.exit_code == 1
    assert "  report/report.md: stored absent, derived a file" in result.output
    assert "  report/figures/score-old.csv: stored a file, derived absent" in result.output
    assert "2 differences" in result.output


def test_at_most_twenty_are_listed_and_the_rest_is_counted(home):
    path = home / "analysis" / "summary.json"
    path.write_text(path.read_text().replace("synthetic_qa", "synthetic_q9"))
    result = call(home)
    count = int(re.search(r"(\d+) differences", result.output)[1])
    assert count > 20
    assert len([line for line in result.output.splitlines() if ": stored " in line]) == 20
    assert f"  and {count - 20} more" in result.output


def test_an_unfinished_study_verifies_once_its_report_is_of_what_there_is(home):
    shutil.rmtree(Home(home).find("replicate.synthetic_qa.lora.")[0].path)
    result = call(home)  # the report is of a study that had it
    assert result.exit_code == 1
    assert f"`finetrial report {home}` writes analysis and report anew" in result.output
    assert CliRunner().invoke(main, ["report", str(home)]).exit_code == 4
    result = call(home)
    assert result.exit_code == 0, result.output
    assert "the study is incomplete" in result.output


def test_other_versions_are_a_hint_where_something_differs(home):
    path = home / "analysis" / "summary.json"
    before, _, meta = path.read_text().partition(' "meta": ')
    path.write_text(f'{before} "meta": ' + re.sub(r'"numpy": "[0-9.]+"', '"numpy": "1.0"', meta))
    result = call(home)
    assert result.exit_code == 1
    assert re.search(r"may differ by what computes them: numpy is [0-9.]+ and was 1\.0\n", result.output)


@pytest.mark.parametrize("text", ["", "[1]", '{"meta": 1}', "{"])
def test_what_is_no_summary_is_named(home, text):
    (home / "analysis" / "summary.json").write_text(text)
    result = call(home)
    assert result.exit_code == 1
    assert "analysis/summary.json: meta: stored cannot be read" in result.output


def test_a_study_without_a_report_is_told_how_to_get_one(home):
    (home / "analysis" / "summary.json").unlink()
    result = call(home)
    assert result.exit_code == 1
    assert result.output == f"{home} has no analysis yet; `finetrial report {home}` makes one\n"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=4),
)


@given(JSON, st.data())
def test_of_two_json_texts_that_differ_in_a_digit_a_difference_is_told(tmp_path_factory, value, data):
    text = json.dumps(value)
    folder = tmp_path_factory.mktemp("json")
    for name in ("stored", "derived"):
        (folder / name).mkdir()
        (folder / name / "x.json").write_text(text)
    assert not list(verify._compare("x.json", folder / "stored", folder / "derived"))
    places = [n for n, letter in enumerate(text) if letter.isdigit()]
    if places:
        at = data.draw(st.sampled_from(places))
        other = data.draw(st.sampled_from([digit for digit in "0123456789" if digit != text[at]]))
        (folder / "stored" / "x.json").write_text(text[:at] + other + text[at + 1 :])
        assert list(verify._compare("x.json", folder / "stored", folder / "derived"))


def test_a_number_is_compared_as_it_is_written(tmp_path):
    for name, digits in (("stored", "0.30000000000000005"), ("derived", "0.30000000000000004")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.json").write_text(f'{{"a": [1, {digits}]}}')
    (found,) = verify._compare("x.json", tmp_path / "stored", tmp_path / "derived")
    assert found == ("x.json", "a.1", "0.30000000000000005", "0.30000000000000004")
