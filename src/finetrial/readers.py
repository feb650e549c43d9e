"""The five file formats that rows are read from: JSON, JSONL, CSV, TSV and Parquet.

Not for finding files or for what the columns mean (`data.py`). Nothing is guessed and nothing is dropped: a
row that does not read is an error that names it.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from finetrial.errors import DataError

SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".parquet")
SQUAD_FORM = (
    "write {data: [{title, paragraphs: [{context, qas: [{id, question, answers: [{text, answer_start}]}]}]}]}"
)
BLOCK_BYTES = 64 * 2**20  # pyarrow reads a CSV file in blocks and refuses a row longer than one


class Row(NamedTuple):
    """One row as read. `where` says where it stands, for messages and for its id."""

    where: str
    values: dict[str, Any]


def read(path: Path, name: str) -> list[Row]:
    """The rows of one file, by its suffix: .json (a list of objects, or SQuAD's form), .jsonl, .csv (quoted
    as RFC 4180 says), .tsv (no quoting, as GLUE's), .parquet. CSV and TSV values stay text.

    Raises:
        DataError: the file does not hold that format, or no row.
    """
    reader = {".json": _json, ".jsonl": _jsonl, ".csv": _delimited, ".tsv": _delimited, ".parquet": _parquet}
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty; check that it is the file you mean")
    if path.suffix != ".parquet":
        _check_text(path)
    rows = [Row(f"{name} {at}", values) for at, values in reader[path.suffix](path)]
    if not rows:
        raise DataError(f"{path} has no rows; check that it is the file you mean")
    return rows


def _check_text(path: Path) -> None:
    """Refuse what is no text, by its first wrong line: another encoding, or bytes that no text holds."""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                wrong = f"byte {line[error.start]:#04x} at column {error.start + 1}"
                raise DataError(f"{path} line {number} is not UTF-8 ({wrong}); save it as UTF-8") from error
            if b"\0" in line:
                raise DataError(f"{path} line {number} holds a NUL byte, which no text does; save it as UTF-8")


def _parsed(path: Path, text: str, line: int | None = None) -> Any:
    """The value of a JSON text; `line` is where it stands, if it is a line of its own."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        at = line or error.lineno
        raise DataError(f"{path} line {at} is not JSON: {error.msg}; mend that line") from error
    except RecursionError:
        at = f" line {line}" if line else ""
        raise DataError(
            f"{path}{at} is nested too deeply for rows; check that it is the file you mean"
        ) from None
    except ValueError as error:  # Python's limit on the digits of a whole number
        at = f" line {line}" if line else ""
        raise DataError(f"{path}{at} holds a number that is too long; mend it") from error


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _json(path: Path) -> Iterable[tuple[str, dict[str, Any]]]:
    text = path.read_text(encoding="utf-8-sig")
    first, *others = [line for line in text.splitlines() if line.strip()] or [""]
    if others and first.startswith("{") and first.rstrip().endswith("}") and _is_json(first):
        raise DataError(f"{path} has one JSON value on every line; call it {path.stem}.jsonl")
    whole = _parsed(path, text)
    if isinstance(whole, dict) and isinstance(whole.get("data"), list):
        yield from _squad(path, whole["data"])
    elif isinstance(whole, list):
        yield from ((f"row {n}", _object(path, f"row {n}", value)) for n, value in enumerate(whole, start=1))
    else:
        raise DataError(
            f"{path} is neither a list of objects nor SQuAD's form ({{data: [articles]}}); write it as one "
            f"of them"
        )


def _jsonl(path: Path) -> Iterable[tuple[str, dict[str, Any]]]:
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue  # a blank line holds no row
            yield f"line {number}", _object(path, f"line {number}", _parsed(path, line, number))


def _object(path: Path, at: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f'{path} {at} is not an object like {{"text": ..., "label": ...}}; mend it')
    return value


def _squad(path: Path, articles: list[Any]) -> Iterable[tuple[str, dict[str, Any]]]:
    """One row per question of SQuAD's nested form, with the columns of the Hub's flat form."""
    for number, article in enumerate(articles, start=1):
        at = f"article {number}"
        try:
            title = article.get("title")
            for paragraph in article["paragraphs"]:
                for question in paragraph["qas"]:
                    at = f"question {question['id']}"
                    golds = question.get("answers", [])
                    # Without a title the first paragraph stands for the article: in another file, too.
                    title = title or paragraph["context"]
                    yield (
                        at,
                        {
                            "id": question["id"],
                            "title": title,
                            "context": paragraph["context"],
                            "question": question["question"],
                            "answers": {key: [gold[key] for gold in golds] for key in ("text", "answer_start")},
                        },
                    )
        except KeyError as error:
            raise DataError(f"{path} {at} has no {error.args[0]!r}; {SQUAD_FORM}") from error
        except (TypeError, AttributeError) as error:
            raise DataError(f"{path} {at} is not in SQuAD's form; {SQUAD_FORM}") from error


def _delimited(path: Path) -> Iterable[tuple[str, dict[str, Any]]]:
    import pyarrow
    from pyarrow import csv as arrow_csv

    tabs = path.suffix == ".tsv"
    with path.open(encoding="utf-8-sig", newline="") as lines:
        style: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if tabs else {}
        try:
            header = next(csv.reader(lines, **style), [])
        except csv.Error as error:
            raise DataError(f"{path} has no header that can be read: {error}; mend its first line") from error
    if not header:
        raise DataError(f"{path} does not begin with a header; write the columns' names in its first line")
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise DataError(f"{path} has the column {twice[0]!r} twice; rename one")
    try:
        table = arrow_csv.read_csv(
            path,
            # One thread, so that a faulty row's number is known.
            read_options=arrow_csv.ReadOptions(block_size=BLOCK_BYTES, use_threads=False),
            parse_options=arrow_csv.ParseOptions(
                delimiter="\t" if tabs else ",", quote_char=False if tabs else '"', newlines_in_values=not tabs
            ),
            # Text stays text: no number, date or missing value is guessed from how a cell looks.
            convert_options=arrow_csv.ConvertOptions(
                column_types=dict.fromkeys(header, pyarrow.string()), strings_can_be_null=False
            ),
        )
    except pyarrow.ArrowInvalid as error:
        # Arrow counts the header as a row; here rows are counted as everywhere, from the first below it.
        reason = re.sub(r"^CSV parse error: Row #(\d+)", lambda found: f"row {int(found[1]) - 1}", str(error))
        raise DataError(f"{path} is not {'TSV' if tabs else 'CSV'}: {reason}; mend that row") from error
    yield from ((f"row {n}", values) for n, values in enumerate(table.to_pylist(), start=1))


def _parquet(path: Path) -> Iterable[tuple[str, dict[str, Any]]]:
    import pyarrow
    from pyarrow import parquet

    try:
        values_of = parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:  # the last two: its values
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise DataError(f"{path} is not Parquet: {reason}; write it anew, or name another file") from error
    yield from ((f"row {n}", values) for n, values in enumerate(values_of, start=1))
