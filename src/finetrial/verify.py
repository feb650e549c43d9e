"""`finetrial report --verify`: does everything that a report says still follow from the run folders?

Every record has to be as it was sealed; then the summary is derived anew from them, the report is rendered
anew into a temporary folder, and both are compared with what lies in the study's folder: JSON value by value,
other files byte by byte. Generic on purpose: it knows no field of the summary and no table. It only reads. It
finds accidents and careless edits, not a forger, who would seal the records anew.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from finetrial import files, pipeline
from finetrial.sealed import Damaged, digest
from finetrial.store import Home, RunFolder
from finetrial.summary import Meta, Summary

ABSENT = "absent"
EXCERPT = 60  # characters of a line that are shown around the first that differs


class Difference(NamedTuple):
    """One place that is not as the runs have it."""

    file: str  # within the study's folder
    where: str  # a key path (`arms.0.test.f1.estimate`), a line or a byte; empty: the file as a whole
    stored: str
    derived: str


class Verified(NamedTuple):
    """What was looked at and what was found."""

    runs: int  # run folders whose records were checked
    numbers: int  # of the analysis, derived anew from the runs
    files: int  # compared: records, analysis and report
    complete: bool | None  # whether the study is; None: it could not be analysed
    differences: tuple[Difference, ...]
    hints: tuple[str, ...]  # what may be behind them and what next, each a sentence


def verify(home_path: Path) -> Verified:
    """Derive and render everything anew from the run folders, and compare.

    `meta` of the summary (when, where and with what the analysis was made) is no run's to say and differs from
    call to call: it alone is taken from the stored summary, whose seal covers it.

    Raises:
        HomeError: the folder is no study's, has no analysis yet, or another version of finetrial wrote it.
        PluginError: a plug-in beside the study file is no longer there.
    """
    home = Home(home_path)
    with contextlib.suppress(Damaged):  # what is wrong with it is found below, value by value
        home.summary()
    runs = home.find("")
    records = [path for run in runs for path in _records(run)]
    differences = [found for path in records for found in _unsealed(path, home)]
    differences += [found for run in runs for found in _other_examples(run, home)]
    summary = None
    try:
        summary = pipeline.analyse_again(home.path)
    except Damaged as damaged:
        name = _name(damaged.path, home)
        if name not in {found.file for found in differences}:
            differences.append(Difference(name, "", f"damaged: {damaged.why}", "a record that holds"))
    meta = _meta(home.summary_file)
    if meta is None:
        name = _name(home.summary_file, home)
        differences.append(Difference(name, "meta", "cannot be read", "when and where it was analysed"))
    numbers, rendered = 0, 0
    if summary is not None and meta is not None:
        numbers = _count_numbers(summary)
        with tempfile.TemporaryDirectory() as folder:
            anew = Home(Path(folder))
            pipeline.write(summary.model_copy(update={"meta": meta}), anew)
            names = sorted(_names(home) | _names(anew))
            rendered = len(names)
            differences += [found for name in names for found in _compare(name, home.path, anew.path)]
    return Verified(
        runs=len(runs),
        numbers=numbers,
        files=len(records) + rendered,
        complete=summary.complete if summary else None,
        differences=tuple(differences),
        hints=tuple(_hints(home, differences, summary, meta)) if differences else (),
    )


def _hints(
    home: Home, differences: list[Difference], summary: Summary | None, meta: Meta | None
) -> Iterator[str]:
    if summary is None:
        yield (
            "nothing was derived anew, for that needs every record to hold; `finetrial run` does the runs of "
            "damaged records anew"
        )
        return
    yield (
        f"`finetrial report {home.path}` writes analysis and report anew from the runs; a run's damaged record "
        f"is done anew by `finetrial run`"
    )
    if meta is None:
        yield "analysis and report were not compared, for that needs the `meta` of analysis/summary.json"
        return
    own = [found.where for found in differences if found.file == _name(home.summary_file, home)]
    if own == ["sha256"]:
        yield (
            "all of analysis/summary.json but `meta` agrees with the runs: what changed lies in `meta`, which "
            "no run knows, or is the SHA-256 itself"
        )
    then, now = meta.environment, summary.meta.environment
    changed = [
        f"{name} is {now.get(name, ABSENT)} and was {then.get(name, ABSENT)}"
        for name in sorted(then.keys() | now.keys())
        if then.get(name) != now.get(name)
    ]
    if changed:
        yield f"numbers and figures may differ by what computes them: {', '.join(changed)}"


def _meta(summary_file: Path) -> Meta | None:
    """The `meta` that a summary states, whether its seal holds or not; None if there is none to be read."""
    try:
        return Meta.model_validate_json(json.dumps(json.loads(summary_file.read_bytes())["meta"]))
    except (ValidationError, ValueError, TypeError, KeyError, RecursionError):
        return None


# ---- sealed records ------------------------------------------------------------------------------------------


def _records(run: RunFolder) -> list[Path]:
    """The files of a run that carry a seal."""
    single = [run.spec_file, run.fit_file, run.result_file, run.failure_file]
    return [*(path for path in single if path.exists()), *sorted(run.attempts.glob("*.json"))]


def _other_examples(run: RunFolder, home: Home) -> Iterator[Difference]:
    """Whether a run's scores by example are those that its result was sealed with."""
    try:
        result = run.result()
    except Damaged:  # named as a record already
        return
    stated, path = result.examples_sha256 if result else None, run.examples_file
    found = files.sha256_file(path) if path.is_file() else ABSENT
    if stated is not None and found != stated:
        yield Difference(_name(path, home), "sha256", found, f"{stated} (in result.json)")


def _unsealed(path: Path, home: Home) -> Iterator[Difference]:
    """What of a record is not as it was sealed.

    The seal covers values; the text is compared besides, for a digit may change without changing the number
    that it is read as (0.30000000000000004 and 0.30000000000000005).
    """
    name, data = _name(path, home), path.read_bytes()
    try:
        content = json.loads(data)
        stated = content.pop("sha256", ABSENT) if isinstance(content, dict) else ABSENT
        sealed = digest(content)
        text = files.json_text({**content, "sha256": stated}) if stated == sealed else ""
    except (ValueError, RecursionError) as error:
        yield Difference(name, "", f"no record: {error}", "a record")
        return
    if stated != sealed:
        yield Difference(name, "sha256", str(stated), f"{sealed} (of the rest of the record)")
    else:
        yield from _bytes(name, data, text.encode())


# ---- comparing files -----------------------------------------------------------------------------------------


def _name(path: Path, home: Home) -> str:
    return path.relative_to(home.path).as_posix()


def _names(home: Home) -> set[str]:
    """Every file of analysis and report; hidden ones are nobody's (a killed process may leave such)."""
    found = (path for folder in (home.analysis, home.report) for path in folder.rglob("*") if path.is_file())
    return {_name(path, home) for path in found if not path.name.startswith(".")}


def _compare(name: str, stored: Path, derived: Path) -> Iterator[Difference]:
    """What differs between a file of the study's folder and the one made anew."""
    if not (stored / name).is_file():
        yield Difference(name, "", ABSENT, "a file")
    elif not (derived / name).is_file():
        yield Difference(name, "", "a file", "absent: no report of these runs has it")
    else:
        before, after = (stored / name).read_bytes(), (derived / name).read_bytes()
        by_value = list(_values(name, before, after)) if name.endswith(".json") else []
        yield from by_value or _bytes(name, before, after)


def _values(name: str, stored: bytes, derived: bytes) -> Iterator[Difference]:
    """Every leaf that differs between two JSON texts, numbers as they are written; none if one is no JSON."""
    try:
        before, after = dict(_leaves(_parse(stored))), dict(_leaves(_parse(derived)))
    except (ValueError, RecursionError):
        return
    for path in dict.fromkeys([*after, *before]):
        if before.get(path) != after.get(path):
            yield Difference(name, path, before.get(path, ABSENT), after.get(path, ABSENT))


class Number(str):
    """A JSON number as it is written: two texts may be read as one float."""


def _parse(data: bytes) -> Any:
    return json.loads(data, parse_int=Number, parse_float=Number, parse_constant=Number)


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Key path and JSON text of every value that holds no other."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    if not inner and isinstance(value, Number):
        yield path, value
    elif not value or not isinstance(value, dict | list):
        yield path, json.dumps(value, ensure_ascii=False)
    for key, each in inner:
        yield from _leaves(each, f"{path}.{key}" if path else str(key))


def _count_numbers(summary: Summary) -> int:
    derived = _parse(summary.model_dump_json(exclude={"meta"}).encode())
    return sum(isinstance(value, Number) for _, value in _leaves(derived))


def _bytes(name: str, stored: bytes, derived: bytes) -> Iterator[Difference]:
    """The first line that differs between two texts, or the first byte of what is no text."""
    if stored == derived:
        return
    try:
        lines = zip_longest(stored.decode().split("\n"), derived.decode().split("\n"))
        number, pair = next((n, pair) for n, pair in enumerate(lines, start=1) if pair[0] != pair[1])
        yield Difference(name, f"line {number}", *_excerpts(*pair))
    except UnicodeDecodeError:
        pairs = enumerate(zip_longest(stored, derived))
        at, (before, after) = next((n, pair) for n, pair in pairs if pair[0] != pair[1])
        ends = f"the end, of {len(stored):,} bytes", f"the end, of {len(derived):,} bytes"
        shown = [
            end if byte is None else f"0x{byte:02x}" for byte, end in zip((before, after), ends, strict=True)
        ]
        yield Difference(name, f"byte {at:,}", *shown)


def _excerpts(stored: str | None, derived: str | None) -> tuple[str, str]:
    """Both lines, from a little before they part."""
    pairs = zip_longest(stored or "", derived or "")
    at = next((n for n, (before, after) in enumerate(pairs) if before != after), 0)
    start = max(0, at - EXCERPT // 3)

    def cut(line: str | None) -> str:
        if line is None:
            return ABSENT
        part = line[start : start + EXCERPT]
        return f"{'…' * (start > 0)}{part}{'…' * (start + EXCERPT < len(line))}"

    return cut(stored), cut(derived)
