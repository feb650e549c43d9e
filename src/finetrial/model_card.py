"""A model card for every trained model that a study keeps: `models/<task>.<method>.seed<n>/README.md`.

From the summary alone, in the form that model hubs read (YAML on top, Markdown below). The card is no part of
what the model's manifest seals: it is written again with every report, for the scores of other replicates and
the verdicts belong to it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetrial import files
from finetrial import report_text as text
from finetrial.report import citation, escape_markdown
from finetrial.store import Home
from finetrial.summary import FROZEN_BASELINE, ArmSummary, ReplicatePoint, Summary, TaskSummary

CARD = "README.md"
SUBFOLDER = 'subfolder="base"'
KINDS = ("ForSequenceClassification", "ForQuestionAnswering")
LIMITS = (
    "This model is one run of a comparison of training methods. It was judged on its task's test split and "
    "nothing else: not on other domains or languages, not for bias, safety or robustness. The licences of the "
    "base model and of the data apply to it."
)


def write(summary: Summary, home: Path) -> None:
    """A card in the folder of every trained model that is there and has none under its manifest's seal."""
    tasks = {task.name: task for task in summary.tasks}
    for arm in summary.arms:
        for replicate in arm.replicates:
            folder = home / "models" / f"{arm.task}.{arm.method}.seed{replicate.number}"
            if (
                replicate.outcome == "done"
                and not folder.is_symlink()
                and Home(home).model_is_of(replicate.run_id, folder)
                and CARD not in files.sealed(folder, {CARD})
            ):
                files.write_text(folder / CARD, card(summary, tasks[arm.task], arm, replicate, base_of(folder)))


def base_of(folder: Path) -> dict[str, Any] | None:
    """Of an adapter what its base has to be built as, empty if it does not say; None of a whole model."""
    if not (folder / "adapter_config.json").exists():
        return None
    try:
        found = json.loads((folder / "base" / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def card(
    summary: Summary, task: TaskSummary, arm: ArmSummary, replicate: ReplicatePoint,
    base: Mapping[str, Any] | None,
) -> str:  # fmt: skip
    """The text of one card; `base` as `base_of` gives it."""
    places = {metric: text.metric_decimals(summary, task, metric) for metric in arm.test}
    parts = [
        _front_matter(summary, task, base is not None),
        f"# {arm.task}, {arm.method}, seed {replicate.number}: {escape_markdown(summary.study)}",
        f"{escape_markdown(summary.model)} trained on {escape_markdown(task.name)} by the method {arm.method}: "
        f"one of {arm.planned} replicates in a comparison made with finetrial, at the setting that did best on "
        f"validation of {text.counted(len(arm.search.trials), 'trial')}.",
        "## How good it is",
        _scores(task, arm, replicate, places),
        "## What the comparison found",
        _findings(summary, task),
        "## How it was trained",
        _facts(summary, task, arm, replicate),
        "## How to load it",
        _loading(summary, arm, replicate, base),
        "## Limits",
        LIMITS,
        "## Citation",
        escape_markdown(citation(summary)),
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(summary: Summary, task: TaskSummary, adapter: bool) -> str:
    lines = [f"library_name: {'peft' if adapter else 'transformers'}", "tags: [finetrial]"]
    lines.append(f"metrics: {json.dumps([task.metric])}")
    if (summary.model_sha256 or "").startswith(f"{summary.model}@"):  # a hub's name, with its revision
        lines.insert(0, f"base_model: {json.dumps(summary.model)}")
    return "\n".join(["---", *lines, "---"])


def _scores(task: TaskSummary, arm: ArmSummary, replicate: ReplicatePoint, places: dict[str, int]) -> str:
    rows = [
        "| on test | this model | mean of valid seeds (95 % interval) | best without training |",
        "|---|---|---|---|",
    ]
    for metric, value in arm.test.items():
        if metric.endswith("rows"):  # the size of a group, not a score
            continue
        own = (
            text.fixed(replicate.test[metric], places[metric])
            if metric in replicate.test
            else text.missing("none")
        )
        best = task.best_baseline(FROZEN_BASELINE, metric=metric)
        shown = f"{text.fixed(best[1], places[metric])} ({best[0]})" if best else text.missing("not defined")
        cells = (metric, own, text.interval(value, places[metric]), shown)
        rows.append(f"| {' | '.join(map(escape_markdown, cells))} |")
    if replicate.void:
        rows.append(f"\n**This run does not count: {escape_markdown(replicate.void)}.**")
    failed = (
        f" {text.counted(arm.failed, 'replicate')} of {arm.planned} gave no valid score." if arm.failed else ""
    )
    return "\n".join(rows) + f"\n\nThe task is judged by {escape_markdown(task.metric)}.{failed}"


def _findings(summary: Summary, task: TaskSummary) -> str:
    said = [
        text.sentence(claim, text.claim_decimals(summary, claim))
        for claim in summary.claims
        if claim.task == task.name
    ]
    return "\n".join(f"- {escape_markdown(line)}" for line in said) or "The study claims nothing of this task."


def _facts(summary: Summary, task: TaskSummary, arm: ArmSummary, replicate: ReplicatePoint) -> str:
    settings = replicate.settings_used or replicate.settings
    counts = task.split_rows | ({"train": used} if (used := _rows_trained_on(summary, arm)) else {})
    rows = ", ".join(f"{split} {count:,}" for split, count in counts.items())
    facts = [
        (
            "Base model",
            f"{summary.model}"
            + (f", {summary.model_gguf_file}" if summary.model_gguf_file else "")
            + (f" at {summary.model_revision}" if summary.model_revision else "")
            + (f", with {text.changes(summary)}" if summary.model_changes else ""),
        ),
        ("SHA-256 of the base model's files", summary.model_sha256 or "not hashed"),
        ("Rows", rows or "not recorded"),
        (
            "Setting",
            ", ".join(f"{name} {text.setting(value)}" for name, value in settings.items()) or "not recorded",
        ),
        ("Trained parameters", f"{text.count(arm.trainable_parameters)} of {text.count(arm.total_parameters)}"),
        ("SHA-256 of the trained weights", replicate.weights_sha256 or "not recorded"),
        ("Run", replicate.run_id),
        ("Study", f"{summary.study}, hash {summary.study_hash}"),
        (
            "Made with",
            ", ".join(f"{name} {value}" for name, value in summary.environment.items()) or "not recorded",
        ),
    ]
    return "\n".join(f"- {name}: {escape_markdown(value)}" for name, value in facts)


def _rows_trained_on(summary: Summary, arm: ArmSummary) -> int | None:
    mine = (row.train_rows for row in summary.ledger if (row.task, row.method) == (arm.task, arm.method))
    return next(mine, None)


def _loading(
    summary: Summary, arm: ArmSummary, replicate: ReplicatePoint, base: Mapping[str, Any] | None
) -> str:  # fmt: skip
    folder = f"{arm.task}.{arm.method}.seed{replicate.number}"
    if base is None:
        return (
            f"It is a whole model in safetensors: `from_pretrained({json.dumps(folder)})` of the class that "
            f"`config.json` names under `architectures`; the tokenizer lies beside it."
        )
    known = [kind for kind in KINDS if str((base.get("architectures") or [""])[0]).endswith(kind)]
    if known:
        return (
            "It is an adapter in PEFT's form, the task's head with it. Beside it lie the tokenizer, and in "
            "`base` how its base is built and what the classes are called.\n\n"
            f"```python\n{_code(summary, folder, known[0], base)}\n```"
        )
    then = f"`peft.PeftModel.from_pretrained(base, {json.dumps(folder)})`"
    return (
        f"It is an adapter in PEFT's form: load {escape_markdown(summary.model)}{_where(summary)} with the "
        f"class of its task{_with(summary)}, then {then}; the task's head comes with it, and the tokenizer "
        f"lies beside it."
    )


def _code(summary: Summary, folder: str, kind: str, base: Mapping[str, Any]) -> str:
    trust = ["trust_remote_code=True"] if "auto_map" in base else []
    given = ["base", "config=config", *trust]
    given += [f"revision={json.dumps(summary.model_revision)}"] if summary.model_revision else []
    given += [f"gguf_file={json.dumps(summary.model_gguf_file)}"] if summary.model_gguf_file else []
    mapping = base.get("base_key_mapping")
    given += [f"key_mapping={json.dumps(mapping)}"] if mapping else []
    return "\n".join(
        [
            "import peft, transformers",
            "",
            f"base = {json.dumps(summary.model)}" + (f"  #{_where(summary)}" if _where(summary) else ""),
            f"folder = {json.dumps(folder)}",
            f"config = transformers.AutoConfig.from_pretrained({', '.join(['folder', SUBFOLDER, *trust])})",
            f"model = transformers.AutoModel{kind}.from_pretrained({', '.join(given)})",
            "model = peft.PeftModel.from_pretrained(model, folder)",
            f"tokenizer = transformers.AutoTokenizer.from_pretrained({', '.join(['folder', *trust])})",
        ]
    )


def _where(summary: Summary) -> str:
    return " (that folder of the installed package)" if summary.model.startswith("package:") else ""


def _with(summary: Summary) -> str:
    """What has to be given to `from_pretrained`, without which another model would be built."""
    return f" and `{text.changes(summary)}`" if summary.model_changes else ""
