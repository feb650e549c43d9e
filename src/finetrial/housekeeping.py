"""A study's folder as a guest on the disk: it stays within itself, and within what it may use.

Parent side. What is deleted is decided elsewhere; here it is only seen to that nothing leads out of the folder,
and that there is room for another run.
"""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path

from finetrial import files
from finetrial.errors import HomeError, Incomplete
from finetrial.report_text import size
from finetrial.store import Home

# Less than this free and no run is started: records, logs and the report need some room of their own.
LEAST_FREE_BYTES = 512 * 10**6


def refuse_links(home: Home) -> None:
    """Refuse a study's folder in which something that is written or cleaned up leads elsewhere.

    The folder itself may be a link: then what it points at is the study's.

    Raises:
        HomeError: there are such links; it names them.
    """
    tops = [value for value in vars(home).values() if isinstance(value, Path) and value != home.path]
    runs = _inside(home.runs)
    inner = [path for run in runs for path in (run / "checkpoint", run / "attempts")]
    deep = [path for folder in inner for path in _inside(folder)]
    places = [*tops, *runs, *inner, *deep, *_inside(home.models), *_inside(home.cache)]
    links = sorted({str(path) for path in places if path.is_symlink()})
    if links:
        raise HomeError(
            f"{', '.join(links)}: a link that leads out of the study's folder, and clean-up would "
            f"go through it; put what it points at in its place, or name another folder with --home"
        )


def sweep(home: Home) -> None:
    """Delete what killed workers have left half made in the cache; to be called before any is at work."""
    for path in _inside(home.cache):
        if path.name.startswith(".") and path.is_dir():
            files.discard(path)


def _inside(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() and not folder.is_symlink() else []


def check_room(home: Home, budget_bytes: int | None) -> None:
    """Whether another run may be started.

    Raises:
        Incomplete: the disk is nearly full, or the folder holds more than `run.disk`.
    """
    free = shutil.disk_usage(home.path).free
    if free < LEAST_FREE_BYTES:
        raise Incomplete(
            f"{home.path} lies on a disk with {size(free)} free, less than {size(LEAST_FREE_BYTES)}; it "
            f"holds {_told(used(home))}. Make room, and run the same command again"
        )
    if budget_bytes is None:
        return
    parts = used(home)
    total = sum(parts.values())
    if total > budget_bytes:
        raise Incomplete(
            f"{home.path} holds {size(total)}, more than run.disk ({size(budget_bytes)}): {_told(parts)}. "
            "Delete what you no longer need or raise run.disk, and run the same command again"
        )


def used(home: Home) -> dict[str, int]:
    """Bytes by what they are: models, checkpoints, cache ..., the largest first; links are not followed."""
    parts: dict[str, int] = {}
    for place, _, names in os.walk(home.path):  # passes over folders that workers delete meanwhile
        for path in (Path(place) / name for name in names):
            try:
                found = path.lstat()
            except FileNotFoundError:  # likewise
                continue
            if not stat.S_ISREG(found.st_mode):
                continue
            first, *rest = path.relative_to(home.path).parts
            part = "checkpoints" if first == "runs" and "checkpoint" in rest else first
            parts[part] = parts.get(part, 0) + found.st_size
    return dict(sorted(parts.items(), key=lambda part: -part[1]))


def _told(parts: dict[str, int]) -> str:
    return ", ".join(f"{name} {size(count)}" for name, count in list(parts.items())[:5]) or "nothing"
