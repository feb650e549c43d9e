"""Rows and encoded inputs that are prepared once are what they would have been, or are made anew."""

from __future__ import annotations

import json
import sys
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetrial import prepared
from finetrial.assemble import open_workbench
from finetrial.plugins import Feature, Splits
from finetrial.store import Home
from tiny_runs import make_spec

ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
ROWS = st.lists(
    st.fixed_dictionaries({"id": st.text(), "anything": ANY, "classes": st.tuples(st.text(), st.integers())}),
    min_size=1,
    max_size=4,
)


class Counted:
    """How often something was made."""

    def __init__(self, made):
        self.made, self.times = made, 0

    def __call__(self):
        self.times += 1
        return self.made


def exact(value):
    """A value with its types, so that 1, 1.0, True and (1,) differ from each other."""
    if isinstance(value, list | tuple):
        return type(value), [exact(each) for each in value]
    if isinstance(value, dict):
        return [(key, exact(each)) for key, each in value.items()]
    return type(value), repr(value)


@settings(max_examples=25)  # each collects this process's garbage
@given(train=ROWS, validation=ROWS, test=ROWS)
def test_rows_come_back_as_they_were(tmp_path_factory, train, validation, test):
    place = tmp_path_factory.mktemp("cache")
    make = Counted(Splits(train, validation, test))
    for _ in range(2):
        found = prepared.splits(place, ["a"], make)
        assert found is not make.made  # read again, so that whoever makes it holds no more than others do
        assert exact([found.train, found.validation, found.test]) == exact([train, validation, test])
    assert make.times == 1
    prepared.splits(place, ["b"], make)
    assert make.times == 2  # of something else


def test_trainings_of_a_process_share_what_they_read_for_as_long_as_they_last(tmp_path):
    def read():
        rows = prepared.splits(tmp_path, ["a"], lambda: Splits(*([{"id": role}] for role in prepared.ROLES)))
        inputs = prepared.inputs(tmp_path, ["a"], rows.train, lambda: [Feature([1], 0, {"labels": 1})])
        return rows, inputs

    with prepared.shared():
        (rows, inputs), again = read(), read()
        of_no_file = [prepared.splits(None, ["b"], lambda: Splits([], [], [])) for _ in range(2)]
    assert rows is again[0]
    assert inputs is again[1]
    assert of_no_file[0] is of_no_file[1]
    alone = read()
    assert alone == (rows, inputs)
    assert alone[0] is not rows
    assert alone[1] is not inputs


class Pair(NamedTuple):
    start: int
    end: int


class Word(str):
    pass


@pytest.mark.parametrize(
    "odd",
    [{1: 2}, {"a": (1,)}, {1, 2}, float("nan"), object(), np.int64(3), np.float64(3), Pair(1, 2), Word("a"),
     ([1], (2,)), "\ud800"],
)  # fmt: skip
def test_rows_that_would_not_come_back_are_not_kept(tmp_path, odd):
    make = Counted(Splits([{"id": "x", "odd": odd}], [{"id": "y"}], [{"id": "z"}]))
    for times in (1, 2):
        assert prepared.splits(tmp_path, ["a"], make).train[0]["odd"] is odd
        assert make.times == times
    assert not list(tmp_path.iterdir())


def test_rows_that_were_a_function_of_more_than_they_are_named_by_are_not_kept(tmp_path):
    make = Counted(Splits([{"id": "x"}], [{"id": "y"}], [{"id": "z"}]))
    for times in (1, 2):
        assert prepared.splits(tmp_path, ["a"], make, lambda: False) is make.made
        assert prepared.inputs(tmp_path, ["a"], [{"id": "x"}], features, lambda: False)
        assert make.times == times
    assert not list(tmp_path.iterdir())


OWN_TASK = """\
from finetrial.heads.classification import METRICS, Classification, ClassificationParams
from finetrial.plugins import Splits

class Own:
    Params, metric, head = ClassificationParams, METRICS["accuracy"], Classification()

    def files(self, params, base):
        return [base / "data.csv"]

    def splits(self, params, base):
        def rows(role):
            one = {{"text": {text}, "label": 0, "classes": ("a", "b")}}
            return [one | {{"id": f"{{role}}{{i}}", "label": i % 2}} for i in range(4)]
        return Splits(rows("t"), rows("v"), rows("e"))

TASK = Own()
"""


@pytest.mark.parametrize("place", ["installed", "imported late"])
def test_rows_are_made_anew_when_the_code_that_makes_them_has_changed(tmp_path, tiny_bert, monkeypatch, place):
    """A task installed elsewhere, and what one beside the study file imports only when it is asked for rows."""
    base, far = tmp_path / "study", tmp_path / "far"
    base.mkdir()
    far.mkdir()
    (base / "data.csv").write_text("id\n")
    name = "ft_" + place.replace(" ", "_")
    spec = make_spec(tiny_bert, use=f"{name}:TASK", params={}, how={"base": str(base)})
    for folder in (base, far):
        monkeypatch.syspath_prepend(folder)
    for text in ("as it was", "as it has become"):
        if place == "installed":
            (far / f"{name}.py").write_text(OWN_TASK.format(text=repr(text)))
        else:
            (base / f"{name}.py").write_text(OWN_TASK.format(text="__import__('ft_late').TEXT"))
            (base / "ft_late.py").write_text(f"TEXT = {text!r}")
        for module in (name, "ft_late"):
            monkeypatch.delitem(sys.modules, module, raising=False)
        for _ in range(2):
            bench = open_workbench(spec, Home(tmp_path / "home"))
            assert {row["text"] for row in bench.splits.train} == {text}


def test_inputs_are_named_alike_whatever_the_tokenizer_was_last_asked_for(tmp_path, tiny_bert):
    spec, home = make_spec(tiny_bert), Home(tmp_path / "home")
    kept = []
    for _ in range(2):  # the second finds the training inputs, and encodes nothing
        bench = open_workbench(spec, home)
        built = bench.build_base(shapes_only=True)
        for rows in (bench.splits.train, bench.splits.validation):
            bench.encode(rows, built)
        kept.append({path.name for path in home.cache.glob("inputs-*")})
    assert len(kept[0]) == 2
    assert kept[0] == kept[1]


def features(typed=True, extra=True):
    return [
        Feature(
            input_ids=list(range(row, row + length)), row=row, labels={"labels": row % 2, "start": -row},
            token_type_ids=[0] * length if typed else None, content=(1, length),
            extra={"offsets": np.arange(2 * row, dtype=np.int32).reshape(row, 2)} if extra else {},
        )
        for row, length in enumerate((3, 1, 7, 2))
    ]  # fmt: skip


def plain(found):
    return [
        exact([f.input_ids, f.row, sorted(f.labels.items()), f.token_type_ids, f.content])
        + tuple((name, a.dtype, a.shape, a.tolist()) for name, a in f.extra.items())
        for f in found
    ]


@pytest.mark.parametrize("typed", [True, False])
@pytest.mark.parametrize("extra", [True, False])
def test_inputs_come_back_as_they_were(tmp_path, typed, extra):
    rows, make = [{"id": "a"}], Counted(features(typed, extra))
    for _ in range(2):
        assert plain(prepared.inputs(tmp_path, ["m"], rows, make)) == plain(features(typed, extra))
    assert make.times == 1
    for of, other in ((["n"], rows), (["m"], [{"id": "b"}])):
        prepared.inputs(tmp_path, of, other, make)
    assert make.times == 3


def test_inputs_of_unlike_forms_are_not_kept(tmp_path):
    mixed = [*features(), *features(typed=False)]
    odd = features()
    odd[1].extra["offsets"] = [[1, 2]]
    floats = features()
    floats[2].labels["labels"] = 0.5
    for made in (mixed, odd, floats, []):
        assert prepared.inputs(tmp_path, ["m"], [{"id": "a"}], Counted(made)) is made
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("harm", ["cut", "flip", "manifest", "gone", "form"])
def test_what_is_damaged_is_made_anew(tmp_path, harm):
    rows, make = [{"id": "a"}], Counted(features())
    prepared.inputs(tmp_path, ["m"], rows, make)
    (folder,) = tmp_path.iterdir()
    file = folder / "inputs.safetensors"
    data = file.read_bytes()
    if harm == "cut":
        file.write_bytes(data[:-1])
    elif harm == "flip":
        file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif harm == "manifest":
        (folder / "manifest.json").write_text("{")
    elif harm == "gone":
        file.unlink()
    else:  # another version's, sealed as it should be
        from finetrial import files

        other = tmp_path / "other"
        other.mkdir()
        (other / "inputs.safetensors").write_bytes(b"no such form")
        files.commit_folder(other, folder)
    assert plain(prepared.inputs(tmp_path, ["m"], rows, make)) == plain(features())
    assert make.times == 2
    assert plain(prepared.inputs(tmp_path, ["m"], rows, make)) == plain(features())
    assert make.times == 2


def test_a_folder_that_cannot_be_written_to_stops_no_run(tmp_path, capsys):
    (tmp_path / "cache").write_text("a file in its place")
    make = Counted(features())
    assert prepared.inputs(tmp_path / "cache", ["m"], [{"id": "a"}], make) is make.made
    assert "not kept" in capsys.readouterr().err


def test_nothing_that_is_kept_can_run_code(tmp_path):
    prepared.splits(tmp_path, ["a"], lambda: Splits([{"id": "x"}], [{"id": "y"}], [{"id": "z"}]))
    prepared.inputs(tmp_path, ["m"], [{"id": "a"}], features)
    kept = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.suffix for path in kept} == {".json", ".safetensors"}
    for path in kept:
        if path.suffix == ".json":
            json.loads(path.read_text())
