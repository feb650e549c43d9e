"""finetrial replaced on the disk while a command runs: no run has a part of each."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import finetrial
from finetrial import loaded, processes, worker
from finetrial.store import Home
from tiny_runs import folder_of, make_spec

# As a nursery: the imports first, then an upgrade, then a fork that does a run.
UPGRADED = """
import os, sys
from pathlib import Path
from finetrial import assemble, loaded
loaded.check()
path = Path(loaded.__file__).with_name("reading.py")
path.write_text(path.read_text() + "# of another version\\n")
pid = os.fork()
if pid == 0:
    try:
        loaded.check()
    except loaded.Incomplete as error:
        print(error, flush=True)
    os._exit(0)
os.waitpid(pid, 0)
"""


def test_a_worker_forked_before_an_upgrade_does_nothing_after_it(tmp_path):
    shutil.copytree(Path(finetrial.__file__).parent, tmp_path / "finetrial")
    done = subprocess.run(
        [sys.executable, "-c", UPGRADED], capture_output=True, text=True, timeout=120, check=False,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == "finetrial changed while it ran, say by an upgrade; run the same command again\n"


def test_a_worker_that_loaded_another_version_than_its_coordinator_refuses_and_is_tried_again(
    tiny_bert, tmp_path, monkeypatch
):
    spec = make_spec(tiny_bert, "lora", stage="trial", settings={"epochs": 1})
    folder = folder_of(spec, tmp_path)
    with monkeypatch.context() as patched:
        patched.setenv(loaded.VARIABLE, "of before")
        assert worker.work(folder) == 1
    failure = folder.failure()
    assert (failure.kind, failure.reason) == (
        "refused", "finetrial changed while it ran, say by an upgrade; run the same command again"
    )  # fmt: skip
    folder.failure_file.unlink()
    assert worker.work(folder) == 0


IMPORTED = """
import sys
from finetrial import worker
worker.import_all()
print(*sys.modules, sep="\\n")
"""


def test_what_a_run_may_import_later_is_imported_at_its_start():
    """A probe imports what it needs when it measures, which may be days after a run began."""
    done = subprocess.run([sys.executable, "-c", IMPORTED], capture_output=True, text=True, check=True)
    here = Path(finetrial.__file__).parent
    for path in [
        path for kind in ("probes", "methods", "tasks", "heads") for path in (here / kind).glob("*.py")
    ]:
        named = {
            node.module for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)
        }
        own = {module for module in named if module.startswith("finetrial.")}
        assert own <= set(done.stdout.split()), path


def test_workers_are_told_what_their_coordinator_has_loaded(tmp_path):
    with Home(tmp_path).coordinate():
        assert processes.child_environment(1)[loaded.VARIABLE] == loaded.SOURCES
        loaded.check()
    assert loaded.VARIABLE not in os.environ
