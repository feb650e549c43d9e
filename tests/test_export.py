"""The exported optimum: what is read is what was written, or named as damaged and exported anew."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetrial import export
from finetrial.export import Optimum
from finetrial.sealed import Damaged
from finetrial.store import Home

FOUND = Optimum(
    study="1e5", task="sst2", method="lora", metric="accuracy", score=83.0, trial=4,
    settings={"learning_rate": 1.2345e-5, "rank": 8, "dropout": 0.0, "flavour": "1e-4", "epochs": 3.0},
    run_id="trial.sst2.lora.004-0123abcd", trials=15, rows=None,
    searched={"learning_rate": {"kind": "range", "low": 1e-6, "high": 1e-4, "log": True}},
    edges={"learning_rate": "high"},
)  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    return Home(tmp_path_factory.mktemp("home"))


def test_what_is_written_is_read_back(home):
    export.write(home, FOUND)
    assert export.read(home, "sst2", "lora") == FOUND


@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_changes_nothing_that_is_read(home, place, bit):
    export.write(home, FOUND)
    path = home.best_file("sst2", "lora")
    data = bytearray(path.read_bytes())
    data[int(place * len(data))] ^= 1 << bit
    path.write_bytes(data)
    try:
        assert export.read(home, "sst2", "lora") == FOUND  # it was in a comment, or in white space
    except Damaged as damaged:
        assert "sst2.lora.yaml is damaged" in str(damaged)  # noqa: PT017 - either is right
    path.unlink()


@given(place=st.floats(0, 0.999))
def test_a_file_cut_short_is_damaged_and_dropped(home, place):
    export.write(home, FOUND)
    path = home.best_file("sst2", "lora")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(place * (len(whole) - 1))])
    with pytest.raises(Damaged):
        export.read(home, "sst2", "lora")
    said = export.drop_damaged(home, [("sst2", "lora"), ("mrpc", "lora")])
    assert [str(path) in line and "exported anew" in line for line in said] == [True]
    assert not path.exists()
    export.write(home, FOUND)
    assert export.drop_damaged(home, [("sst2", "lora")]) == []


def test_an_optimum_of_another_arm_is_not_read_for_this_one(home):
    export.write(home, FOUND.model_copy(update={"method": "LORA"}))
    home.best_file("sst2", "LORA").rename(home.best_file("sst2", "lora"))
    with pytest.raises(Damaged, match="it is of another arm, sst2/LORA"):
        export.read(home, "sst2", "lora")
    (said,) = export.drop_damaged(home, [("sst2", "lora")])
    assert said.endswith("it is exported anew")
