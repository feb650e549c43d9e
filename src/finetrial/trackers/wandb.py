"""Weights & Biases: mirrors finished runs, offline unless WANDB_MODE says otherwise.

Not the record of anything: `metrics.jsonl` and `result.json` are, and what is here can be made again from
them. (An offline W&B run that is killed keeps whole 32 KiB blocks only, so none of a short run; hence the
replay.) The account, the key and the address come from the environment alone (WANDB_API_KEY,
WANDB_ENTITY, WANDB_BASE_URL ...); `wandb sync` sends offline runs later.

What W&B would collect about the machine, the command line, the code and the installed packages is turned
off: a command line may hold what nobody meant to publish.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from finetrial import files
from finetrial.errors import PluginError
from finetrial.frozen import short_hash
from finetrial.records import Result, RunSpec

# Left out where the installed version has no such setting.
PRIVATE: dict[str, Any] = {
    "console": "off",  # our own output is not the run's
    "silent": True,
    "save_code": False,
    "disable_code": True,
    "disable_git": True,
    "disable_job_creation": True,
    "host": "",
    "program": "",
    "x_disable_meta": True,  # command line, user, host, git
    "x_disable_machine_info": True,
    "x_disable_stats": True,  # this process is not the one that trained
    "x_disable_viewer": True,
    "x_save_requirements": False,
}


class WandbTracker:
    """One W&B run per run: `trial_0`, `trial_1` ... of an arm, grouped by arm."""

    def replay(
        self, folder: Path, spec: RunSpec, records: Iterable[Mapping[str, Any]], result: Result | None
    ) -> None:
        """Write one run below `folder`; a second time replaces the first copy, under the same id.

        Args:
            folder: where W&B's own files go (`folder/wandb/offline-run-.../run-<id>.wandb`).
            spec: the run; its study is the project unless WANDB_PROJECT is set.
            records: the lines of metrics.jsonl; of several with one step and kind the last counts.
            result: what came out, or None if the run failed for good.

        Raises:
            PluginError: wandb is not installed, gives up, or is to go online without a key.
        """
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # nor do its crashes go to its makers
        try:
            import wandb
        except ImportError as error:
            raise PluginError("wandb is not installed; `pip install finetrial[wandb]`") from error
        mode = os.environ.get("WANDB_MODE") or "offline"
        if mode not in ("offline", "dryrun", "disabled") and not os.environ.get("WANDB_API_KEY"):
            # wandb would ask at the terminal and wait.
            raise PluginError(f"WANDB_MODE is {mode!r} and WANDB_API_KEY is not set; set it, or go offline")
        folder.mkdir(parents=True, exist_ok=True)
        identifier = run_identifier(spec)
        earlier = list((folder / "wandb").glob(f"offline-run-*-{identifier}*"))
        known = wandb.Settings.model_fields
        try:
            run = wandb.init(
                dir=str(folder),
                project=os.environ.get("WANDB_PROJECT") or spec.study,
                id=identifier,
                name=spec.stage if spec.stage == "baseline" else f"{spec.stage}_{spec.number}",
                group=spec.arm,
                job_type=spec.stage,
                config=_config(spec),
                mode=mode,
                resume="allow" if mode in ("online", "shared") else None,
                reinit="create_new",  # whatever run the caller's own program has open stays as it is
                settings=wandb.Settings(**{k: v for k, v in PRIVATE.items() if k in known}),
            )
            for step, values in _history(records):
                run.log(values, step=step)
            run.summary.update(_summary(result))
            run.finish(exit_code=0 if result else 1)
            written = Path(run.settings.sync_dir)
        except wandb.Error as error:
            raise PluginError(f"wandb: {error}") from error
        finally:
            _end_service(wandb)
        for copy in earlier:
            if copy.resolve() != written.resolve():
                files.discard(copy)


def run_identifier(spec: RunSpec) -> str:
    """The W&B id: equal for every replay and retry of a run, different for any other run."""
    return short_hash([spec.study, spec.run_id], length=16)


def _end_service(wandb: Any) -> None:
    """End wandb's helper process now, so that none outlives this one or holds up its exit."""
    try:
        wandb.teardown()
    except SystemExit as error:  # teardown ends the whole program if the helper ended badly
        raise PluginError(f"wandb: its service ended with code {error.code}") from error


def _config(spec: RunSpec) -> dict[str, Any]:
    identity = {
        "study": spec.study,
        "run_id": spec.run_id,
        "stage": spec.stage,
        "task": spec.task.name,
        "method": spec.method.name if spec.method else None,
        "number": spec.number,
        "model": spec.model.name,
        "revision": spec.model.revision,
        "rows": spec.rows,
        "seeds": spec.seeds.model_dump(),
    }
    return {**spec.settings, **{k: v for k, v in identity.items() if v is not None}}


def _history(records: Iterable[Mapping[str, Any]]) -> list[tuple[int, dict[str, float]]]:
    """(step, values) in order of steps, which W&B needs; a resumed run has repeated some."""
    latest: dict[tuple[int, str], dict[str, float]] = {}
    for record in records:
        if isinstance(record.get("step"), int):
            kind = str(record.get("kind", "train"))
            latest[record["step"], kind] = _numbers(
                kind, {k: v for k, v in record.items() if k not in ("step", "kind")}
            )
    steps: dict[int, dict[str, float]] = {}
    for (step, _), values in sorted(latest.items()):
        steps.setdefault(step, {}).update(values)
    return list(steps.items())


def _summary(result: Result | None) -> dict[str, Any]:
    if result is None:
        return {"outcome": "failed"}
    kept = {"outcome": result.outcome, "score": result.score, "reason": result.reason}
    return {
        **{k: v for k, v in kept.items() if v is not None},
        **_numbers("scores", result.scores),
        **_numbers("measures", result.measures),
        **_numbers("cost", result.cost.model_dump()),
    }


def _numbers(prefix: str, value: Any) -> dict[str, float]:
    """All numbers of nested mappings, under names joined by a slash; W&B shows no infinities."""
    if isinstance(value, Mapping):
        found: dict[str, float] = {}
        for key, inner in value.items():
            found.update(_numbers(f"{prefix}/{key}", inner))
        return found
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isinf(value):
        return {}
    return {prefix: value}


PLUGIN = WandbTracker()
