"""Durable writes: the old file or the new one, whole; damage is found anywhere; torn lines are left out."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finetrial import files


def committed(folder: Path, contents: dict[str, bytes]) -> Path:
    """A committed folder `folder/final` with these files."""
    temporary = folder / ".final.tmp"
    for name, data in contents.items():
        (temporary / name).parent.mkdir(parents=True, exist_ok=True)
        (temporary / name).write_bytes(data)
    files.commit_folder(temporary, folder / "final")
    return folder / "final"


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, call):
    path = tmp_path / "result.json"
    files.write_text(path, "old")

    def full_disk(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, full_disk)  # pathlib's replace goes through os.replace
    with pytest.raises(OSError, match="No space left"):
        files.write_text(path, "new")
    monkeypatch.undo()
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]


def test_a_disk_that_fills_up_in_mid_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "result.json"
    files.write_text(path, "old")
    program = (
        "import resource, signal, sys; from pathlib import Path; from finetrial import files\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "files.write_bytes(Path(sys.argv[1]), b'x' * 100_000)"
    )
    done = subprocess.run([sys.executable, "-c", program, path], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "File too large" in done.stderr
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]


@pytest.mark.parametrize(
    ("number", "goes_on"),
    [(errno.EINVAL, True), (errno.ENOTSUP, True), (errno.ENOSYS, True), (errno.EIO, False)],
)
def test_a_file_system_that_cannot_sync_folders_is_written_to_all_the_same(
    tmp_path, monkeypatch, number, goes_on
):
    sync = os.fsync

    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with contextlib.nullcontext() if goes_on else pytest.raises(OSError, match=os.strerror(number)):
        files.write_text(tmp_path / "a", "text")
    assert (tmp_path / "a").read_text() == "text"


@pytest.mark.parametrize(("times", "number"), [(1, errno.ESTALE), (2, errno.ESTALE), (1, errno.EIO)])
def test_a_stale_handle_is_looked_up_again_once(tmp_path, monkeypatch, times, number):
    (tmp_path / "a").write_text("text")
    read, calls = Path.read_bytes, []

    def stale(path: Path) -> bytes:
        calls.append(path)
        if len(calls) <= times:
            raise OSError(number, os.strerror(number))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", stale)
    if (times, number) == (1, errno.ESTALE):
        assert files.read_bytes(tmp_path / "a") == b"text"
    else:
        with pytest.raises(OSError, match=os.strerror(number)):
            files.read_bytes(tmp_path / "a")


def test_a_number_that_json_does_not_have_is_refused_and_nothing_is_written(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.write_json(tmp_path / "x.json", {"score": float("nan")})
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.append_json_line(tmp_path / "x.jsonl", {"score": float("inf")})
    assert [p.name for p in tmp_path.iterdir() if p.stat().st_size] == []


@given(
    st.lists(st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=9), max_size=3), min_size=1)
)
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_cut_anywhere_json_lines_give_the_whole_records_before_the_cut(tmp_path, records):
    path = tmp_path / "metrics.jsonl"
    path.unlink(missing_ok=True)
    ends = []
    for record in records:
        files.append_json_line(path, record)
        ends.append(path.stat().st_size)
    whole = path.read_bytes()
    assert list(files.json_lines(path)) == records
    for cut in {0, ends[0] - 1, len(whole) - 1, len(whole) // 2}:
        path.write_bytes(whole[:cut])
        assert list(files.json_lines(path)) == records[: sum(end <= cut for end in ends)]


def test_no_file_has_no_lines(tmp_path):
    assert list(files.json_lines(tmp_path / "none.jsonl")) == []


def test_a_committed_folder_holds_and_keeps_its_subfolders(tmp_path):
    final = committed(tmp_path, {"weights": b"abc", "tokenizer/vocab": b""})
    assert files.damage(final) is None
    assert (final / "tokenizer" / "vocab").read_bytes() == b""
    assert [p.name for p in tmp_path.iterdir()] == ["final"]


def test_a_folder_that_is_committed_again_is_replaced_whole(tmp_path):
    committed(tmp_path, {"weights": b"old", "extra": b"old"})
    final = committed(tmp_path, {"weights": b"new"})
    assert files.damage(final) is None
    assert sorted(p.name for p in final.iterdir()) == ["manifest.json", "weights"]
    assert [p.name for p in tmp_path.iterdir()] == ["final"]


def test_a_commit_that_fails_before_its_rename_leaves_the_old_folder(tmp_path, monkeypatch):
    final = committed(tmp_path, {"weights": b"old"})

    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="Input/output"):
        committed(tmp_path, {"weights": b"new"})
    assert files.damage(final) is None
    assert (final / "weights").read_bytes() == b"old"


@given(st.data())
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_flipped_bit_any_cut_and_any_missing_file_is_damage(tmp_path, data):
    final = tmp_path / "final"
    if not final.exists():
        committed(tmp_path, {"weights": bytes(range(256)), "state.json": b'{"step": 3}', "sub/x": b"yz"})
    path = data.draw(st.sampled_from(sorted(p for p in final.rglob("*") if p.is_file())))
    whole = path.read_bytes()
    match data.draw(st.sampled_from(["flip", "cut", "lost"])):
        case "flip":
            place, bit = data.draw(st.integers(0, len(whole) - 1)), data.draw(st.integers(0, 7))
            path.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << bit)]) + whole[place + 1 :])
        case "cut":
            # The manifest's last byte is its line end, which says nothing.
            path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 2))])
        case "lost":
            path.unlink()
    try:
        assert files.damage(final) is not None
    finally:
        path.write_bytes(whole)
    assert files.damage(final) is None


@pytest.mark.parametrize("manifest", ["[]", "1", "null", "{}", '{"weights": 3}', '{"weights": {"bytes": 3}}'])
def test_a_manifest_of_another_form_is_damage_and_no_error(tmp_path, manifest):
    final = committed(tmp_path, {"weights": b"abc"})
    (final / files.MANIFEST).write_text(manifest)
    assert "manifest" in (files.damage(final) or "")


def test_a_folder_without_a_manifest_or_not_there_is_damage(tmp_path):
    (tmp_path / "empty").mkdir()
    assert files.damage(tmp_path / "empty") == "its manifest is missing"
    assert files.damage(tmp_path / "none") == "its manifest is missing"


def test_the_hash_is_the_published_one_of_abc(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")  # FIPS 180-2, appendix B.1
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert files.sha256_file(tmp_path / "abc") == expected


def test_a_torn_line_that_was_written_on_is_left_out_and_the_others_are_read(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo{"step": 3}\n{"step": 4}\n')
    assert list(files.json_lines(path)) == [{"step": 1}, {"step": 4}]


def test_a_folder_that_cannot_be_deleted_is_a_warning(tmp_path, caplog):
    elsewhere, link = tmp_path / "elsewhere", tmp_path / "link"
    elsewhere.mkdir()
    link.symlink_to(elsewhere)
    files.discard(link)  # nothing is deleted through a link
    assert elsewhere.is_dir()
    assert f"{link} could not be deleted" in caplog.text
    caplog.clear()
    files.discard(tmp_path / "never there")
    files.discard(elsewhere)
    assert not elsewhere.exists()
    assert caplog.text == ""


def test_a_line_that_a_killed_process_has_left_torn_stays_by_itself(tmp_path):
    path = tmp_path / "lines.jsonl"
    files.append_json_line(path, {"step": 1})
    with path.open("a") as stream:
        stream.write('{"step": 2, "lo')
    files.append_json_line(path, {"step": 3})
    files.append_json_line(path, {"step": 4})
    damaged = []
    records = list(files.json_lines(path, lambda _, line: damaged.append(line)))
    assert [record["step"] for record in records] == [1, 3, 4]
    assert damaged == [2]


@pytest.mark.parametrize(
    ("content", "read"),
    [
        ('{"validation": {"a": 0.0}, "test": {"a": 100.0, "b": 0}}', {"a": 100.0, "b": 0.0}),
        ('{"validation": {"a": 0.0}}', {}),
        (None, {}),
        ("", {}),
        ("[1]", {}),
        ('{"test": [1]}', {}),
        ('{"test": {"a": null}}', {}),
        ('{"test": {"a": NaN}}', {}),
        ('{"test": {"a": 1.0', {}),
    ],
)
def test_numbers_that_are_not_there_or_damaged_are_none(tmp_path, content, read):
    path = tmp_path / "examples.json"
    if content is not None:
        path.write_text(content)
    sha256 = files.sha256_file(path) if content is not None else "0" * 64
    assert files.json_numbers(path, "test", sha256=sha256) == read
    assert files.json_numbers(path, "test", sha256="1" * 64) == {}
