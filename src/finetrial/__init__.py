"""finetrial: a fair, crash-proof trial for fine-tuning methods.

The whole of it from Python, safe to call again after any crash:

    study = finetrial.load_study("study.yaml")
    summary = finetrial.run_study(study, "runs/my-study")
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from finetrial.errors import FinetrialError, StudyError

if TYPE_CHECKING:
    from finetrial.study import Study
    from finetrial.summary import Summary

__all__ = ["FinetrialError", "StudyError", "load_study", "read_summary", "run_study"]


def load_study(file: str | Path) -> Study:
    """The study that a file describes. Raises StudyError with every mistake in it."""
    from finetrial.study_file import load_study as load

    return load(file)


def run_study(study: Study, home: str | Path) -> Summary:
    """Run everything that is not yet done and write the report; safe to call again after any crash."""
    from finetrial.pipeline import run_study as run
    from finetrial.terminal import progress

    with progress() as shown:
        return run(study, Path(home), shown)


def read_summary(home: str | Path) -> Summary:
    """Every number of a study's report, typed. Raises HomeError if it has none yet."""
    from finetrial.store import Home

    return Home(Path(home)).summary()
