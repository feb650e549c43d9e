"""Checkpoints: what is saved comes back bit for bit; what is damaged is passed over; what is old goes."""

from __future__ import annotations

import errno
import json
import random
import shutil
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from finetrial import checkpoint, files
from finetrial.checkpoint import Writer, load_best, newest, restore, save_best, take


def parts(seed: int = 0) -> tuple[torch.nn.Module, torch.optim.Optimizer, Any]:
    """A small model with a frozen layer and a 0-dimensional parameter, AdamW in two groups, a schedule."""
    torch.manual_seed(seed)
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(3, 2), "frozen": torch.nn.Linear(2, 2)})
    model.register_parameter("gate", torch.nn.Parameter(torch.tensor(0.5)))
    model["frozen"].requires_grad_(False)
    groups = [{"params": [model["a"].weight], "weight_decay": 0.1}, {"params": [model["a"].bias, model.gate]}]
    optimizer = torch.optim.AdamW(groups, lr=0.1, betas=(0.8, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    return model, optimizer, schedule


def train(model: Any, optimizer: Any, schedule: Any, steps: int) -> None:
    for step in range(steps):
        optimizer.zero_grad()
        (model.gate * model["a"](torch.full((1, 3), 1.0 + step)).square().sum()).backward()
        optimizer.step()
        schedule.step()


def save(folder: Path, *given: Any) -> None:
    checkpoint.save(folder, take(*given))


def bits(model: Any) -> list[bytes]:
    return [p.detach().numpy().tobytes() for p in model.parameters()]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_everything_comes_back_and_training_goes_on_the_same(tmp_path):
    model, optimizer, schedule = parts()
    train(model, optimizer, schedule, 3)
    state = {"best_step": None, "score": 1 / 3, "text": "ä", "list": [1, None, True]}
    random.seed(5)
    np.random.seed(6)  # noqa: NPY002 - the global generators are what is saved
    torch.manual_seed(7)
    save(tmp_path, 3, model, optimizer, schedule, state)
    drawn = (random.random(), np.random.random(), torch.rand(2).tolist())  # noqa: NPY002
    train(model, optimizer, schedule, 4)

    fresh = parts(seed=1)
    assert bits(fresh[0]) != bits(model)
    shutil.copytree(tmp_path, tmp_path / "copy")
    assert restore(newest(tmp_path, with_best=False), *fresh) == (3, state)
    assert (random.random(), np.random.random(), torch.rand(2).tolist()) == drawn  # noqa: NPY002
    train(*fresh, 4)
    assert bits(fresh[0])[:2] == bits(model)[:2]
    assert torch.equal(fresh[0].gate, model.gate)


def test_training_goes_on_while_it_is_written_beside_it(tmp_path):
    """The same is read back as if training had waited."""
    run, twin = parts(), parts()
    train(*run, 3)
    train(*twin, 3)
    begin = threading.Event()
    with Writer(beside=True) as writer:
        taken = take(3, *run, {"best_step": None}, copy=writer.beside)
        writer.do(lambda: (begin.wait(60), checkpoint.save(tmp_path, taken))[1])
        train(*run, 2)
        assert newest(tmp_path, with_best=False) is None
        begin.set()
    fresh = parts(seed=1)
    restore(newest(tmp_path, with_best=False), *fresh)
    assert bits(fresh[0])[:2] == bits(twin[0])[:2] != bits(run[0])[:2]
    train(*fresh, 2)
    assert bits(fresh[0])[:2] == bits(run[0])[:2]


@pytest.mark.parametrize("beside", [False, True])
def test_a_writer_writes_one_thing_at_a_time_in_order_and_says_what_went_wrong(beside):
    done: list[int] = []

    def write(number: int) -> None:
        time.sleep(0.02 / number)
        done.append(number)

    def fail() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with Writer(beside=beside) as writer:
        for number in (1, 2, 3):
            writer.do(partial(write, number))
    assert done == [1, 2, 3]
    with pytest.raises(OSError, match="No space"), Writer(beside=beside) as writer:
        writer.do(fail)


def test_what_ends_a_training_is_not_hidden_by_what_ends_its_checkpoint():
    def train_on_a_full_disk() -> None:
        with Writer(beside=True) as writer:
            writer.do(Path("/nowhere").rmdir)
            raise ValueError("the first")

    with pytest.raises(ValueError, match="the first"):
        train_on_a_full_disk()


def test_the_optimisers_settings_keep_their_types(tmp_path):
    model, optimizer, schedule = parts()
    train(model, optimizer, schedule, 1)
    save(tmp_path, 1, model, optimizer, schedule, {})
    before = optimizer.state_dict()["param_groups"]
    fresh = parts(seed=1)
    restore(newest(tmp_path, with_best=False), *fresh)
    after = fresh[1].state_dict()["param_groups"]
    assert after == before  # a tuple is not equal to a list
    assert type(after[0]["betas"]) is tuple
    assert after[0]["foreach"] is None
    saved = fresh[1].state_dict()["state"]
    for index, values in optimizer.state_dict()["state"].items():
        for name, tensor in values.items():
            assert torch.equal(saved[index][name], tensor)
            assert saved[index][name].shape == tensor.shape
            assert saved[index][name].dtype == tensor.dtype


def test_only_the_trained_tensors_are_written(tmp_path):
    save(tmp_path, 1, *parts(), {})
    header = (tmp_path / "step-00000001" / "weights.safetensors").read_bytes()
    assert b"frozen" not in header
    assert b"gate" in header


def test_the_older_one_goes_when_the_newer_is_whole_and_so_does_what_a_kill_left(tmp_path):
    run = parts()
    save_best(tmp_path, 1, run[0])
    save(tmp_path, 2, *run, {"best_step": 1})
    save_best(tmp_path, 3, run[0])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best-00000001", "best-00000003", "step-00000002"]
    (tmp_path / ".step-00000009.tmp").mkdir()
    save(tmp_path, 4, *run, {"best_step": 3})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best-00000003", "step-00000004"]


def test_best_weights_do_not_pile_up_without_checkpoints(tmp_path):
    run = parts()
    for step in (1, 2, 3):
        save_best(tmp_path, step, run[0])
    assert [p.name for p in tmp_path.iterdir()] == ["best-00000003"]


@pytest.mark.parametrize("name", ["weights.safetensors", "state.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "lost"])
def test_a_damaged_newest_is_passed_over_for_the_older(tmp_path, name, damage, capsys):
    run = parts()
    save(tmp_path, 1, *run, {"best_step": None})
    kept = tmp_path.with_name(tmp_path.name + "-kept")
    shutil.copytree(tmp_path / "step-00000001", kept)  # as if killed before the older was dropped
    save(tmp_path, 2, *run, {"best_step": None})
    shutil.copytree(kept, tmp_path / "step-00000001")
    assert newest(tmp_path, with_best=True).name == "step-00000002"
    path = tmp_path / "step-00000002" / name
    match damage:
        case "flip":
            data = bytearray(path.read_bytes())
            data[len(data) // 2] ^= 1
            path.write_bytes(data)
        case "cut":
            path.write_bytes(path.read_bytes()[:-2])
        case "lost":
            path.unlink()
    assert newest(tmp_path, with_best=True).name == "step-00000001"
    assert "step-00000002 is passed over" in capsys.readouterr().err
    flip(tmp_path / "step-00000001" / "weights.safetensors")
    assert newest(tmp_path, with_best=True) is None


def test_a_checkpoint_without_the_best_weights_it_needs_is_passed_over(tmp_path):
    run = parts()
    save_best(tmp_path, 1, run[0])
    save(tmp_path, 2, *run, {"best_step": 1})
    flip(tmp_path / "best-00000001" / "weights.safetensors")
    assert newest(tmp_path, with_best=True) is None
    # Where no best weights are kept, there are none to miss.
    assert newest(tmp_path, with_best=False).name == "step-00000002"


def test_damaged_best_weights_are_not_loaded(tmp_path):
    model, *_ = parts()
    save_best(tmp_path, 1, model)
    flip(tmp_path / "best-00000001" / "weights.safetensors")
    before = bits(model)
    with pytest.raises(OSError, match=r"damaged.*run again"):
        load_best(tmp_path, 1, model)
    assert bits(model) == before


def test_the_best_weights_come_back(tmp_path):
    run = parts()
    before = bits(run[0])
    save_best(tmp_path, 1, run[0])
    train(*run, 2)
    assert bits(run[0]) != before
    load_best(tmp_path, 1, run[0])
    assert bits(run[0]) == before


def test_tensors_of_another_model_are_refused(tmp_path):
    save_best(tmp_path, 1, parts()[0])
    with pytest.raises(ValueError, match="other tensors"):
        load_best(tmp_path, 1, torch.nn.Linear(3, 2))


@pytest.mark.parametrize("call", ["save_file", "commit"])
def test_a_full_disk_leaves_the_older_checkpoint_and_no_half_one(tmp_path, monkeypatch, call):
    run = parts()
    save(tmp_path, 1, *run, {"best_step": None})
    (tmp_path / ".step-00000002.0123abcd.tmp").mkdir()  # a killed attempt's

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if call == "save_file":  # the library's writer, where a full disk shows first
        monkeypatch.setattr(checkpoint, "save_file", full)
    else:
        monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        save(tmp_path, 2, *run, {"best_step": None})
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
    assert newest(tmp_path, with_best=True).name == "step-00000001"


def test_no_folder_has_no_checkpoint(tmp_path):
    assert newest(tmp_path / "none", with_best=True) is None


def test_nothing_in_it_can_run_code(tmp_path):
    save(tmp_path, 1, *parts(), {"x": 1})
    found = {p.name for p in (tmp_path / "step-00000001").iterdir()}
    assert found == {"manifest.json", "state.json", "state.safetensors", "weights.safetensors"}
    assert json.loads((tmp_path / "step-00000001" / "state.json").read_text())["step"] == 1
    assert files.damage(tmp_path / "step-00000001") is None


@pytest.mark.parametrize("width", [4, 5])
def test_moments_of_other_tensors_are_told_from_an_optimiser_s_own(tmp_path, width):
    """torch takes moments of any shape; another device steps a whole table where this one steps its rows."""
    made = []
    for size in (4, width):
        net = torch.nn.Linear(size, 2)
        optimizer = torch.optim.AdamW(net.parameters())
        net(torch.ones(1, size)).sum().backward()
        optimizer.step()
        made.append((net, optimizer))
    (net, optimizer), (_, other) = made
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
    save(tmp_path, 1, net, optimizer, schedule, {})
    found = checkpoint.newest(tmp_path, with_best=False)
    assert found is not None
    assert checkpoint.is_of(found, other) == (width == 4)
