"""What this process may use of its machine."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import pytest

from finetrial import processes


def make(root: Path, files: Mapping[str, str]) -> Path:
    """A root folder with files of control groups below sys/fs/cgroup; `own`: what this process is in."""
    for name, text in files.items():
        path = root / ("proc/self/cgroup" if name == "own" else f"sys/fs/cgroup/{name}")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("files", "share"),
    [
        ({}, None),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu.max": "100000 100000\n"}, 1),
        ({"cpu.max": "50000 100000\n"}, 1),
        ({"cpu.max": "damaged"}, None),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "100000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 1),
    ],
)
def test_cores_are_those_that_a_container_is_granted(tmp_path, files, share):
    free = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert processes.cores(make(tmp_path, files)) == (share or free)


SLURM = "0::/system.slice/slurmstepd.scope/job_7/step_0\n"
DOCKER = "12:cpuset:/docker/abc\n5:memory:/docker/abc\n4:cpu,cpuacct:/docker/abc\n0::/docker/abc\n"


@pytest.mark.parametrize(
    ("files", "count"),
    [
        ({"cpu.max": "250000 100000\n"}, 3),  # part of a core counts as one
        ({"own": SLURM, "system.slice/slurmstepd.scope/job_7/cpu.max": "400000 100000\n"}, 4),
        (
            {
                "own": SLURM,
                "system.slice/cpu.max": "300000 100000\n",
                "system.slice/slurmstepd.scope/cpu.max": "max 100000\n",
                "system.slice/slurmstepd.scope/job_7/step_0/cpu.max": "1600000 100000\n",
            },
            3,  # the smallest of all around it
        ),
        ({"own": "0::/a\n", "b/cpu.max": "100000 100000\n"}, 64),  # another's
        ({"own": "0::/../a\n", "a/cpu.max": "500000 100000\n"}, 5),
        (
            {"own": DOCKER, "cpu/docker/cpu.cfs_quota_us": "200000", "cpu/docker/cpu.cfs_period_us": "100000"},
            2,
        ),
        # From within, the container's group is the root of what is there.
        ({"own": DOCKER, "cpu/cpu.cfs_quota_us": "200000", "cpu/cpu.cfs_period_us": "100000"}, 2),
        ({"own": "damaged"}, 64),
    ],
)
def test_cores_are_those_of_the_smallest_quota_around_the_process(tmp_path, monkeypatch, files, count):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(64), raising=False)
    assert processes.cores(make(tmp_path, files)) == count


@pytest.mark.parametrize(
    ("files", "limits"),
    [
        ({}, []),
        ({"memory.max": "7000\n"}, [7000]),
        (
            {
                "own": SLURM,
                "system.slice/slurmstepd.scope/job_7/memory.max": "4000\n",
                "system.slice/slurmstepd.scope/job_7/step_0/memory.max": "max\n",
                "system.slice/memory.max": "9000\n",
                "another/memory.max": "1\n",
            },
            [4000, 9000],
        ),
        ({"own": DOCKER, "memory/docker/abc/memory.limit_in_bytes": "5000\n"}, [5000]),
        ({"own": DOCKER, "memory/memory.limit_in_bytes": "6000\n"}, [6000]),
    ],
)
def test_memory_is_limited_by_every_group_around_the_process(tmp_path, files, limits):
    assert list(processes.memory_limits(make(tmp_path, files))) == limits


EVENTS = "low 0\noom 3\noom_kill {}\noom_group_kill 0\n"


@pytest.mark.parametrize(
    ("files", "kills"),
    [
        ({}, 9),  # of the whole machine
        ({"own": "0::/a/b\n", "a/b/memory.events": EVENTS.format(1), "a/memory.events": EVENTS.format(4)}, 1),
        ({"own": "0::/a/b\n", "a/memory.events": EVENTS.format(4)}, 4),
        ({"own": DOCKER, "memory/docker/abc/memory.oom_control": "under_oom 0\noom_kill 2\n"}, 2),
        ({"own": "0::/a\n", "b/memory.events": EVENTS.format(5)}, 9),
    ],
)
def test_kills_for_want_of_memory_are_counted_in_the_processs_own_group(tmp_path, files, kills):
    root = make(tmp_path, files)
    assert processes.memory_kills(root) == 0 or files
    (root / "proc").mkdir(exist_ok=True)
    (root / "proc/vmstat").write_text("pgfault 5\noom_kill 9\n")
    assert processes.memory_kills(root) == kills
