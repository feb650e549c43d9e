"""Rows from files or the Hub, and their splits: read as the study says, or refused with the reason.

Not for what a row means (tasks and heads) and not for tokens. Torch-free; datasets is imported where it
is used. Nothing is dropped in silence: a row that cannot be used is an error that names it.

Splitting and capping are pure functions of the rows and a seed. `SPLIT_SEED` is the seed unless a study says
otherwise, so that everybody who names the same files gets the same splits.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field, model_validator

from finetrial.errors import DataError
from finetrial.frozen import Frozen
from finetrial.paths import expand_path
from finetrial.plugins import Example, Splits
from finetrial.problems import as_written
from finetrial.readers import SUFFIXES, Row, read

SPLIT_SEED = 20181
ROLES = ("train", "validation", "test")


class DataSource(Frozen):
    """Where a task's rows come from: a Hub data set, or local files.

    In a study file either a Hub name, `data: rajpurkar/squad_v2`, or a mapping:

        data: {hub: nyu-mll/glue, config: sst2, revision: <commit>}
        data: {train: train.jsonl, test: [dev1.csv, dev2.csv], columns: {text: sentence}}

    Local paths are relative to the study file's folder and may use `~`, `${NAME}` and `${NAME:-default}`;
    the suffix tells the format. With `hub`, `train`, `validation` and `test` name its splits. `columns` maps
    the task's column names to those of the data.
    """

    hub: str | None = None
    config: str | None = None
    revision: str | None = None
    train: list[str] | None = Field(default=None, min_length=1)
    validation: list[str] | None = Field(default=None, min_length=1)
    test: list[str] | None = Field(default=None, min_length=1)
    columns: dict[str, str] = {}

    @model_validator(mode="before")
    @classmethod
    def _short_forms(cls, value: Any) -> Any:
        if isinstance(value, str):
            if value.endswith(SUFFIXES) or value.startswith((".", "/", "~", "$")):
                raise ValueError(f"{value!r} is a path; name its role, e.g. {{train: {value}, test: ...}}")
            return {"hub": value}
        if isinstance(value, dict):
            return {k: [v] if k in ROLES and isinstance(v, str) else v for k, v in value.items()}
        return value

    @model_validator(mode="after")
    def _one_place(self) -> DataSource:
        if self.hub is None and self.train is None:
            raise ValueError("neither hub nor train is given; name a Hub data set or a file of training rows")
        if self.hub is None and (self.config is not None or self.revision is not None):
            raise ValueError("config and revision belong to a Hub data set; leave them out for local files")
        return self

    def named(self, role: str) -> list[str]:
        """The files or Hub splits given for a role; empty if none are."""
        return getattr(self, role) or []


def files(source: DataSource, base: Path) -> list[Path]:
    """The local files of a source, in order of role; none for the Hub.

    Raises:
        DataError: a path uses an unset variable, names no file, or serves two roles.
    """
    if source.hub is not None:
        return []
    found: dict[Path, str] = {}
    wrong: list[str] = []
    named = [name for role in ROLES for name in source.named(role)]
    for role in ROLES:
        for name in source.named(role):
            try:
                path = locate(name, base, named)
            except DataError as error:
                wrong.append(str(error))
                continue
            if path in found:
                twice = f"{path} is given as {found[path]} and as {role}"
                wrong.append(f"{twice}; a row serves one split only: name another file")
            found[path] = role
    if wrong:
        raise DataError("\n    ".join(wrong))
    return list(found)


def locate(name: str, base: Path, named: Sequence[str] = ()) -> Path:
    """The existing file that a study file's path stands for; it names all of `named`. Raises DataError."""
    path = expand_path(name, base)
    if path.suffix not in SUFFIXES:
        raise DataError(f"{path} has no known format; use one of {', '.join(SUFFIXES)}")
    if path.is_dir():
        raise DataError(f"{path} is a folder; name a file in it")
    if not path.is_file():
        taken = {Path(other).name for other in named}  # named already, so not what was meant
        beside = [p.name for p in path.parent.iterdir() if p.is_file()] if path.parent.is_dir() else []
        beside = [name for name in beside if name not in taken]
        near = difflib.get_close_matches(path.name, beside, n=1)
        hint = f"did you mean {near[0]}?" if near else f"paths are relative to the study file's folder, {base}"
        raise DataError(f"{path} is not there; {hint}")
    return path


def load(
    source: DataSource, base: Path, *, hidden: Callable[[dict[str, Any]], bool] = lambda values: False
) -> dict[str, list[Row]]:
    """The rows of each role that the source has: `train`, and `validation` and `test` where given.

    Roles that are named are taken as named. A Hub data set whose roles are not named gives `train`, and as
    test its `test` split, or, where that is missing or all its labels are `hidden` (as GLUE's are), its
    `validation` split.

    Raises:
        DataError: a file or data set cannot be read as the study says.
    """
    if source.hub is None:
        files(source, base)
        return {
            role: [row for name in source.named(role) for row in read(locate(name, base), name)]
            for role in ROLES
            if source.named(role)
        }
    there = _hub_splits(source)
    given = {role: source.named(role) for role in ROLES if source.named(role)}
    unknown = [name for names in given.values() for name in names if name not in there]
    if unknown or ("train" not in there and "train" not in given):
        raise DataError(f"{source.hub} has no split {(unknown or ['train'])[0]!r}; it has {', '.join(there)}")
    taken = {name for names in given.values() for name in names}
    free = [name for name in there if name not in taken]
    rows: dict[str, list[Row]] = {}
    if "test" not in given and "test" in free:
        candidate = _hub_rows(source, "test")
        if not all(hidden(row.values) for row in candidate):
            rows["test"] = candidate
    if "test" not in given and "test" not in rows and "validation" in free:
        given["test"] = ["validation"]
        free.remove("validation")
    given.setdefault("train", ["train"])
    if "validation" not in given and "validation" in free:
        given["validation"] = ["validation"]
    for role, names in given.items():
        rows[role] = [row for name in names for row in _hub_rows(source, name)]
    return rows


def take(row: Row, ours: str, columns: dict[str, str]) -> Any:
    """A row's value of the task's column `ours`. Raises DataError, which names the nearest column there is."""
    theirs = columns.get(ours, ours)
    if theirs in row.values:
        return row.values[theirs]
    near = difflib.get_close_matches(theirs, row.values, n=1)
    there = f"the nearest is {near[0]!r}" if near else f"it has {', '.join(map(repr, row.values)) or 'none'}"
    guess = as_written(near[0]) if near else "<column of your data>"
    raise DataError(f"{row.where} has no column {theirs!r}; {there}. Write columns: {{{ours}: {guess}}}")


def require(row: Row, ours: Sequence[str], columns: dict[str, str]) -> None:
    """Refuse a row that lacks columns of the task. Raises DataError, which names all of them."""
    missing = [name for name in ours if columns.get(name, name) not in row.values]
    if len(row.values) == 1 and missing:
        (only,) = row.values
        for separator, noun in ((";", "semicolons"), ("\t", "tabs"), ("|", "bars"), (",", "commas")):
            if separator in only:
                wanted = " and ".join(map(repr, ours))
                raise DataError(
                    f"{row.where} has one column, {only!r}, and the task needs {wanted}; it seems to be "
                    f"separated by {noun}: write commas in a .csv file, tabs in a .tsv file"
                )
    if len(missing) < 2:
        for name in missing:
            take(row, name, columns)
        return
    theirs = [columns.get(name, name) for name in missing]
    written = ", ".join(f"{name}: <column of your data>" for name in missing)
    raise DataError(
        f"{row.where} has no columns {', '.join(map(repr, theirs))}; it has "
        f"{', '.join(map(repr, row.values)) or 'none'}. Write columns: {{{written}}}"
    )


def take_text(row: Row, ours: str, columns: dict[str, str]) -> str:
    """As `take`, for a column that has to be text (it may be empty)."""
    value = take(row, ours, columns)
    if not isinstance(value, str):
        raise DataError(f"{row.where}: {columns.get(ours, ours)} is {value!r}, not text; mend the row")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{row.where}: {columns.get(ours, ours)} holds half a character; mend it") from error
    return value


def check_columns(source: DataSource, known: Sequence[str]) -> None:
    """Refuse a column map that names a column which the task does not have. Raises DataError."""
    for ours in source.columns:
        if ours not in known:
            near = difflib.get_close_matches(ours, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"this task has {', '.join(known)}"
            raise DataError(f"columns.{ours}: the task has no such column; {hint}")


def cap_rows(
    rows: Sequence[Example], count: int | None, label_key: str | None = None, *, seed: int = SPLIT_SEED
) -> list[Example]:
    """A random subset of `count` rows (None: all) in their own order; a larger count only adds rows.

    With `label_key` every prefix holds the labels in about the proportions of the whole.
    """
    if count is None or count >= len(rows):
        return list(rows)
    return [rows[place] for place in sorted(_mixed(rows, label_key, seed)[:count])]


def stratified_split(
    rows: Sequence[Example], label_key: str, share: float, *, seed: int = SPLIT_SEED
) -> tuple[list[Example], list[Example]]:
    """(rest, held out): a random `share` of the rows, with the labels in the proportions of the whole.

    Raises:
        DataError: one side would be empty.
    """
    count = round(share * len(rows))
    if not 0 < count < len(rows):
        raise DataError(f"{share:g} of {len(rows)} rows is {count}; give more rows, or a file for the split")
    held = set(_mixed(rows, label_key, seed)[:count])
    return (
        [row for place, row in enumerate(rows) if place not in held],
        [row for place, row in enumerate(rows) if place in held],
    )


def group_split(
    rows: Sequence[Example], group_key: str, share: float, *, seed: int = SPLIT_SEED
) -> tuple[list[Example], list[Example]]:
    """(rest, held out): whole groups of rows, in random order, as near to `share` of the rows as they allow.

    Raises:
        DataError: there are fewer than two groups.
    """
    sizes: dict[Any, int] = {}
    for row in rows:
        sizes[row[group_key]] = sizes.get(row[group_key], 0) + 1
    if len(sizes) < 2:
        raise DataError(
            f"all {len(rows)} rows have the same {group_key}, and splits share none; name a file for each split"
        )
    names = list(sizes)
    order = [names[place] for place in _generator(seed).permutation(len(names))]
    wanted, count = share * len(rows), 0
    held: set[Any] = set()
    for name in order[:-1]:
        if not held or abs(count + sizes[name] - wanted) < abs(count - wanted):
            held.add(name)
            count += sizes[name]
    return [r for r in rows if r[group_key] not in held], [r for r in rows if r[group_key] in held]


def fill_splits(
    found: dict[str, list[Example]],
    cut: Callable[[list[Example], float], tuple[list[Example], list[Example]]],
    validation_share: float,
    test_share: float | None,
) -> Splits:
    """The three splits, with those that were not given cut off train: test first, then validation.

    Raises:
        DataError: there is no test split and no share to cut, or both.
    """
    train = found["train"]
    if "test" in found and test_share is not None:
        raise DataError("test_share is set and there is a test split; leave test_share out")
    if "test" in found:
        test = found["test"]
    elif test_share is not None:
        train, test = cut(train, test_share)
    else:
        raise DataError(
            "the data has no test split. Name a file as test (a benchmark's official dev set, if its test "
            "labels are hidden: leave validation out, and it is cut off train), or set test_share: 0.1 to cut "
            "the test split off train as well"
        )
    if "validation" in found:
        return Splits(train, found["validation"], test)
    train, validation = cut(train, validation_share)
    return Splits(train, validation, test)


# Of a split's rows in another: far above what published data sets repeat, far below a file named twice.
MOST_SHARED = 0.5


def check_disjoint(
    splits: Splits, group_key: str | None = None, *, called: Callable[[Any], str] | None = None,
    cut: Sequence[str] = (),
) -> Splits:  # fmt: skip
    """The splits, if they are apart; real data may repeat a few rows, so only a share of them is refused.

    `called`: what the user knows a group as, given it; `cut`: the splits that were cut off train and not given.

    Raises:
        DataError: a split is empty, an id occurs twice, a group (of `group_key`) is in two splits, or more than
            half of one split's rows are rows of an earlier one.
    """
    ids: dict[Any, str] = {}
    groups: dict[Any, str] = {}
    for role in ROLES:
        rows = getattr(splits, role)
        if not rows:
            raise DataError(f"the {role} split is empty; give it rows")
        for row in rows:
            if row["id"] in ids:
                raise DataError(f"the id {row['id']!r} is in {ids[row['id']]} and in {role}; make it unique")
            ids[row["id"]] = role
            group = row[group_key] if group_key else None
            if group_key and groups.setdefault(group, role) != role:
                name = called(group) if called else group_key
                raise DataError(
                    f"the {name} {str(group)[:60]!r} is in {groups[group]} and in {role}; a {name} serves one "
                    f"split only. Move its rows to one split"
                )
    seen: dict[str, set[str]] = {}
    for role in ROLES:
        rows = {repr(sorted((k, v) for k, v in row.items() if k != "id")) for row in getattr(splits, role)}
        for earlier, theirs in seen.items():
            both = len(rows & theirs)
            if both > MOST_SHARED * len(rows):
                share = " and write test_share: 0.2" if role == "test" else ""
                fix = f"name a file with rows of its own, or leave {role} out{share}: it is cut off train then"
                if {role, earlier} <= {*cut, "train"}:
                    fix = "train repeats its rows under other ids: leave the repeated ones out of its file"
                raise DataError(
                    f"{both} of the {len(rows)} different rows of {role} are also in {earlier}, and a score on "
                    f"rows that were seen says nothing; {fix}"
                )
        seen[role] = rows
    return splits


def _generator(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(seed))


def _mixed(rows: Sequence[Example], label_key: str | None, seed: int) -> list[int]:
    """All row numbers in a random order whose every prefix has about the same share of each label."""
    order = [int(place) for place in _generator(seed).permutation(len(rows))]
    if label_key is None:
        return order
    of_label: dict[Any, list[int]] = {}
    for place in order:
        of_label.setdefault(rows[place][label_key], []).append(place)
    rank = {place: n for n, place in enumerate(order)}
    position = {p: (n + 0.5) / len(group) for group in of_label.values() for n, p in enumerate(group)}
    return sorted(order, key=lambda place: (position[place], rank[place]))


def _hub_splits(source: DataSource) -> list[str]:
    import datasets

    return _from_hub(
        source,
        lambda: datasets.get_dataset_split_names(source.hub, source.config, revision=source.revision),
    )


def _hub_rows(source: DataSource, split: str) -> list[Row]:
    import datasets

    found = _from_hub(
        source,
        lambda: datasets.load_dataset(source.hub, source.config, revision=source.revision, split=split),
    )
    return [Row(f"{source.hub} {split} row {n}", dict(values)) for n, values in enumerate(found, start=1)]


def _from_hub(source: DataSource, ask: Callable[[], Any]) -> Any:
    # ValueError and RuntimeError: an unknown config or split, or a data set that needs a script to load.
    try:
        return ask()
    except (OSError, ValueError, RuntimeError) as error:
        what = f"{source.hub} (config {source.config})" if source.config else source.hub
        raise DataError(
            f"the data set {what} cannot be read: {error}. Check name, config and revision; without a network, "
            f"give local files (data: {{train: ..., test: ...}})"
        ) from error
