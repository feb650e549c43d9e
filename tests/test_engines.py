"""Engines: a child in its own session, ended whole; what its end is called. (Whole runs: test_pipeline.py.)"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from finetrial import plugins, processes
from finetrial.engines.local import Forked, Local
from finetrial.engines.spawn import Spawn
from finetrial.lease import FileLock
from finetrial.plugins import Exit
from finetrial.processes import OUT_OF_MEMORY_SCORE, Handle
from finetrial.records import How, TaskSpec
from finetrial.store import RunFolder
from scripted import Scripted, gone, make_spec

LOCAL = Local()  # one nursery for the whole file: its imports take seconds
ENGINES = {"spawn": Spawn(), "local": LOCAL}


@pytest.fixture(scope="module", autouse=True)
def no_nursery_is_left() -> Iterator[None]:
    yield
    if LOCAL.nursery is not None:
        LOCAL.nursery.end()


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "home" / "runs" / make_spec().run_id)
    folder.create(make_spec())
    return folder


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> Any:
    return ENGINES[request.param]


def wait_for(what, seconds: float = 60.0):
    deadline = time.monotonic() + seconds
    while not (found := what()) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert found
    return found


def ended(engine: Any, handle: Any) -> Exit:
    return wait_for(lambda: engine.poll(handle))


def scripted(folder: RunFolder, program: str) -> tuple[Scripted, Handle]:
    engine = Scripted({make_spec().run_id: [program]})
    return engine, engine.start(folder.path, make_spec())


@pytest.fixture
def worker(folder: RunFolder, engine: Any) -> Iterator[Any]:
    """A worker that waits for its run's lock: it has started and does nothing."""
    lock = FileLock(folder.lock_file)
    assert lock.acquire() is None
    handle = engine.start(folder.path, make_spec())
    yield handle
    engine.stop(handle, 0)
    lock.release()


# ---- spawned and forked workers alike --------------------------------------------------------------------


def test_a_child_has_its_own_session_and_goes_first_when_memory_runs_out(worker):
    wait_for(lambda: os.getsid(worker.pid) == worker.pid)
    assert os.getsid(0) != worker.pid
    if Path("/proc/self/oom_score_adj").exists():
        assert Path(f"/proc/{worker.pid}/oom_score_adj").read_text().strip() == OUT_OF_MEMORY_SCORE


def test_a_child_holds_nothing_open_but_its_own(worker, folder):
    def own():
        paths = set()
        for link in Path(f"/proc/{worker.pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # closed since it was listed
                paths.add(str(link.readlink()))
        return paths if str(folder.lock_file) in paths else None

    paths = wait_for(own)
    assert paths == {"/dev/null", str(folder.log_file), str(folder.lock_file)}


def test_a_child_is_asked_to_end_and_its_end_is_named(engine, worker):
    wait_for(lambda: os.getsid(worker.pid) == worker.pid)
    assert engine.poll(worker) is None
    engine.stop(worker, 10.0)
    assert engine.poll(worker) == Exit(-signal.SIGTERM, reason="killed by SIGTERM")
    assert gone(worker.pid)


def test_a_damaged_spec_ends_the_worker_with_a_reason_in_the_log(engine, folder):
    folder.spec_file.write_text("{")
    handle = engine.start(folder.path, make_spec())
    assert ended(engine, handle) == Exit(1, reason="exit code 1")
    assert engine.poll(handle) == Exit(1, reason="exit code 1")
    assert "spec.json is damaged" in folder.log_tail()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux's parent-death signal")
@pytest.mark.parametrize("module", ["worker", "nursery"])
def test_a_child_whose_parent_is_already_gone_does_nothing(folder, module):
    environment = {**os.environ, "FINETRIAL_PARENT": "1"}
    command = [sys.executable, "-m", f"finetrial.{module}", str(folder.path)]
    done = subprocess.run(command, env=environment, timeout=60, capture_output=True, check=False)
    assert done.returncode == 1
    assert not folder.lock_file.exists()
    assert not done.stdout


# ---- the nursery -----------------------------------------------------------------------------------------

forks = pytest.mark.skipif(not LOCAL.forking, reason="workers are not forked on this machine")


TELLER = """\
import os, random, sys

import numpy

raise RuntimeError(f"{os.getcwd()} {os.environ['FINETRIAL_TEST']} {random.random()} {numpy.random.rand()}")
"""


@pytest.mark.parametrize("threads", [1, 2])
def test_a_forked_worker_is_what_a_fresh_python_would_be(tmp_path, monkeypatch, threads):
    """Told by a plug-in that fails with what it sees: folder, environment, global random streams."""
    (tmp_path / "ft_teller.py").write_text(TELLER)
    monkeypatch.setenv("FINETRIAL_TEST", "said later")
    monkeypatch.chdir(tmp_path)
    task = TaskSpec(name="t", use="ft_teller:TASK", params={})
    told = {}
    for name, engine in ENGINES.items():
        spec = make_spec(task=task, how=How(base=str(tmp_path), threads=threads))
        folder = RunFolder(tmp_path / name / "runs" / spec.run_id)
        folder.create(spec)
        handle = engine.start(folder.path, spec)
        assert isinstance(handle, Forked) == (name == "local" and LOCAL.forking)
        assert ended(engine, handle).code == 1
        told[name] = folder.failure().reason
    assert f"{tmp_path} said later" in told["spawn"]
    assert told["local"] == told["spawn"]


def test_a_relative_folder_is_of_where_the_run_is_begun(engine, tmp_path, monkeypatch):
    """A nursery keeps the working folder that it began in."""
    folder = RunFolder(Path("home") / "runs" / make_spec().run_id)
    for place in (tmp_path / "one", tmp_path / "other"):
        place.mkdir()
        monkeypatch.chdir(place)
        folder.create(make_spec())
        assert ended(engine, engine.start(folder.path, make_spec())).code == 1  # there is no such model
        assert folder.failure().kind == "refused"
        assert folder.log_file.exists()


@forks
def test_one_nursery_with_one_thread_serves_all_runs(tmp_path):
    folders = [RunFolder(tmp_path / "runs" / name) for name in ("a", "b")]
    for each in folders:
        each.create(make_spec())
    handles = [LOCAL.start(each.path, make_spec()) for each in folders]
    assert handles[0].nursery is handles[1].nursery
    assert psutil.Process(handles[0].nursery.process.pid).num_threads() == 1
    assert [ended(LOCAL, handle).code for handle in handles] == [1, 1]  # folders not named after their spec
    assert all("is the spec of" in each.log_tail() for each in folders)


@forks
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_what_ends_a_whole_service_or_job_leaves_the_nursery_to_its_workers(folder, number):
    """Else they would be killed with it, before their checkpoints."""
    lock = FileLock(folder.lock_file)
    assert lock.acquire() is None
    handle = LOCAL.start(folder.path, make_spec())
    wait_for(lambda: os.getsid(handle.pid) == handle.pid)
    nursery = handle.nursery.process.pid
    os.kill(nursery, number)
    wait_for(lambda: not int(status_of(nursery)["SigPnd"], 16) and not int(status_of(nursery)["ShdPnd"], 16))
    assert LOCAL.poll(handle) is None
    os.kill(handle.pid, number)  # which it takes as any process does
    assert ended(LOCAL, handle).code == -number
    lock.release()


def status_of(pid: int) -> dict[str, str]:
    """What Linux says of a process: the signals on their way to it, for one."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


@forks
def test_a_forked_worker_that_cannot_write_its_log_says_so_in_its_failure(folder):
    folder.log_file.mkdir()
    assert ended(LOCAL, LOCAL.start(folder.path, make_spec())).code == 1
    assert folder.failure().reason.startswith(f"{folder.log_file}: Is a directory")


CLOSES = """\
import os
from finetrial import nursery


def one_by_one(first, last):
    raise AssertionError


os.closerange = one_by_one
reader, writer = os.pipe()
os.dup2(reader, 700)
nursery.close_from(writer)
os.fstat(reader)
for number in (writer, 700):
    try:
        os.fstat(number)
        print("still open")
    except OSError:
        print("closed")
"""


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs Linux's list of what is open")
def test_what_is_open_is_closed_without_trying_every_number_that_there_may_be():
    """A limit of a thousand million would take minutes, where the system cannot close a range at once."""
    done = subprocess.run([sys.executable, "-c", CLOSES], capture_output=True, text=True, check=False)
    assert done.stdout.split("\n") == ["closed", "closed", ""], done.stderr


@forks
def test_an_ended_worker_s_id_is_free_only_after_its_end_was_heard(folder):
    folder.spec_file.write_text("{")
    handle = LOCAL.start(folder.path, make_spec())
    wait_for(lambda: gone(handle.pid))
    assert psutil.pid_exists(handle.pid)  # a zombie: nobody else can have this id
    assert ended(LOCAL, handle).code == 1
    wait_for(lambda: not psutil.pid_exists(handle.pid))


@forks
def test_workers_end_with_a_killed_nursery_and_the_next_run_has_a_new_one(folder):
    lock = FileLock(folder.lock_file)
    assert lock.acquire() is None
    handle = LOCAL.start(folder.path, make_spec())
    wait_for(lambda: os.getsid(handle.pid) == handle.pid)
    handle.nursery.process.kill()
    wait_for(lambda: gone(handle.pid))
    assert ended(LOCAL, handle) == Exit(
        None, reason="the process that it was forked from was killed, and it with that"
    )
    LOCAL.stop(handle, 1.0)  # nothing left to end
    lock.release()
    folder.spec_file.write_text("{")
    again = LOCAL.start(folder.path, make_spec())
    assert isinstance(again, Forked)
    assert again.nursery is not handle.nursery
    assert ended(LOCAL, again).code == 1


@forks
def test_a_worker_that_not_even_a_kill_ends_takes_no_other_with_it(tmp_path, monkeypatch):
    """Nor does one whose end the nursery does not tell: that is the nursery's fault, and it is ended."""
    monkeypatch.setattr(processes, "KILL_SECONDS", 0.2)
    handles, locks = [], []
    for name in ("stuck", "other"):
        folder = RunFolder(tmp_path / "runs" / name)
        folder.create(make_spec())
        locks.append(FileLock(folder.lock_file))
        assert locks[-1].acquire() is None
        handles.append(LOCAL.start(folder.path, make_spec()))
    stuck, other = handles
    wait_for(lambda: os.getsid(stuck.pid) == stuck.pid)
    with monkeypatch.context() as patched:  # as in a driver: no signal reaches it
        patched.setattr(LOCAL, "_signal", lambda handle, number: None)
        LOCAL.stop(stuck, 0.0)
    assert LOCAL.poll(stuck) is None
    assert LOCAL.poll(other) is None
    os.kill(stuck.nursery.process.pid, signal.SIGSTOP)
    LOCAL.stop(stuck, 0.0)
    assert LOCAL.poll(stuck).reason == LOCAL.poll(other).reason
    assert stuck.nursery.gone
    for lock in locks:
        lock.release()


@forks
@pytest.mark.parametrize("long", ["", "x" * 100_000])  # more than a pipe takes
def test_a_nursery_that_does_not_answer_is_not_waited_for(folder, monkeypatch, long):
    folder.spec_file.write_text("{")
    before = LOCAL.start(folder.path, make_spec())
    assert ended(LOCAL, before).code == 1
    os.kill(before.nursery.process.pid, signal.SIGSTOP)
    with monkeypatch.context() as patched:
        patched.setattr("finetrial.engines.local.READY_SECONDS", 0.5)
        patched.setenv("LONG", long)
        assert before.nursery.start(folder.path, 1) is None
    assert before.nursery.gone
    assert ended(LOCAL, LOCAL.start(folder.path, make_spec())).code == 1


def test_where_forking_is_not_safe_a_fresh_python_does_it(folder):
    engine = Local()
    engine.forking = False
    folder.spec_file.write_text("{")
    handle = engine.start(folder.path, make_spec())
    assert isinstance(handle, Handle)
    assert ended(engine, handle).code == 1
    engine.stop(handle, 0)


def test_a_nursery_that_cannot_import_is_done_without(folder, monkeypatch):
    engine = Local()
    monkeypatch.setenv("PYTHONPATH", str(folder.path))
    (folder.path / "torch.py").write_text("raise ImportError('broken')\n")
    folder.spec_file.write_text("{")
    handle = engine.start(folder.path, make_spec())
    assert isinstance(handle, Handle)
    assert ended(engine, handle).code == 1


# ---- how an end is told ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("program", "exit_"),
    [
        ("pass", Exit(0)),
        ("raise SystemExit(4)", Exit(4, reason="exit code 4")),
        ("import os; os.kill(os.getpid(), 9)", Exit(-9, reason="killed by SIGKILL")),
        ("import os; os.kill(os.getpid(), 40)", Exit(-40, reason="killed by signal 40")),  # has no name
    ],
)
def test_an_end_is_told_by_code_or_signal(folder, program, exit_):
    engine, handle = scripted(folder, program)
    assert ended(engine, handle) == exit_
    assert engine.poll(handle) == exit_


def test_a_child_that_will_not_end_is_killed_after_the_grace(folder):
    ignore = "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    stubborn = ignore + "print('up', flush=True)\ntime.sleep(600)"
    engine, handle = scripted(folder, stubborn)
    while "up" not in folder.log_tail():
        time.sleep(0.01)
    engine.stop(handle, 0.2)
    assert engine.poll(handle) == Exit(-9, reason="killed by SIGKILL")
    engine.stop(handle, 0.2)  # again changes nothing


@pytest.mark.parametrize("name", plugins.names("engines"))
def test_every_engine_keeps_the_protocol(name):
    assert isinstance(plugins.load("engines", name), plugins.Engine)


# ---- GPUs --------------------------------------------------------------------------------------------------


def test_gpus_are_those_that_this_process_may_use(tmp_path, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert processes.gpus(tmp_path) == ()
    for name in ("nvidia2", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    assert processes.gpus(tmp_path) == ()  # one is nothing to choose from
    (tmp_path / "nvidia3").touch()
    assert processes.gpus(tmp_path) == ("0", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5, GPU-8932f937")
    assert processes.gpus(tmp_path) == ("5", "GPU-8932f937")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert processes.gpus(tmp_path) == ()


def test_a_process_sees_the_gpu_that_its_run_was_given(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert processes.child_environment(1)["CUDA_VISIBLE_DEVICES"] == "0,1"
    assert processes.child_environment(1, "1")["CUDA_VISIBLE_DEVICES"] == "1"
