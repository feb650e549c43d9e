"""Whether finetrial has become slower: its hot paths beside plain code for the same, against what was recorded.

    python bench/regression.py --record                 # write bench/results/regression.json
    python bench/regression.py                          # compare with it; exit code 1 if something is slower
    python bench/regression.py --slow-down data=0.2     # made slower on purpose: it has to be found

Seconds differ between machines and hours, ratios to a yardstick that runs in turn with them far less. The
yardsticks are written as one writes them without finetrial, and belong to no other file, so that nobody makes
them slower along with it:

data          rows read, cut, encoded and collated for an epoch of SST-2 | json, the tokenizer, its `pad`
encoding      windows of SQuAD v2                                        | the tokenizer with a stride
step, full    optimiser steps of MiniLM                                  | forward, backward, clip, fused AdamW
step, lora    the same, of adapters                                      | the same, through PEFT
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

import throughput
from finetrial import files, plugins, stages  # noqa: F401 - what a worker has imported
from finetrial.assemble import Workbench, open_workbench
from finetrial.batching import collate, epoch_batches, model_inputs
from finetrial.fit import Fit
from finetrial.optimisation import planned_batches
from finetrial.plugins import Feature
from finetrial.train import alone, open_loop
from finetrial.training_state import Progress

RECORDED = Path(__file__).parent / "results" / "regression.json"
ROWS = {"sst2": 2000, "squad_v2": 160}
STEPS = 6
# Slower by this much, and surely so, is a regression.
TOLERATED = 0.10
RESAMPLES = 2000

Work = Callable[[], object]


class Slower(NamedTuple):
    """An item that takes more of its yardstick's time than it did: by how much, with a 95 % interval."""

    item: str
    by: float
    low: float
    high: float


def compare(recorded: dict[str, list[float]], now: dict[str, list[float]], seed: int = 0) -> list[Slower]:
    """Items whose median ratio has grown by more than is tolerated, and surely, by a bootstrap interval.

    Items that only one side has are left out.
    """
    rng, found = np.random.default_rng(seed), []
    for item in sorted(recorded.keys() & now.keys()):
        before, after = np.asarray(recorded[item]), np.asarray(now[item])
        draws = [
            np.median(rng.choice(after, len(after))) / np.median(rng.choice(before, len(before)))
            for _ in range(RESAMPLES)
        ]
        low, high = np.quantile(draws, [0.025, 0.975]) - 1
        by = float(np.median(after) / np.median(before)) - 1
        if by > TOLERATED and low > 0:
            found.append(Slower(item, by, float(low), float(high)))
    return found


def measure(items: dict[str, tuple[Work, Work]], repeats: int) -> dict[str, list[float]]:
    """Each item's seconds over its yardstick's, by turns, the first of both not counted."""
    ratios: dict[str, list[float]] = {}
    for name, (ours, yardstick) in items.items():
        ratios[name] = []
        for turn in range(repeats + 1):
            pair = {}
            for which in (ours, yardstick) if turn % 2 else (yardstick, ours):
                started = time.perf_counter()
                which()
                pair[which] = time.perf_counter() - started
            if turn:
                ratios[name].append(round(pair[ours] / pair[yardstick], 4))
        sys.stdout.write(f"{name}: {statistics.median(ratios[name]):.3f} {sorted(ratios[name])}\n")
        sys.stdout.flush()
    return ratios


# -- what is measured ------------------------------------------------------------------------------------------


def items(folder: Path) -> Iterator[tuple[str, tuple[Work, Work]]]:
    throughput.ROWS.update(ROWS)
    bench, home = _bench("sst2", "full", folder)
    tokenizer = bench.build_base(shapes_only=True).tokenizer
    yield "data", (lambda: _epoch(bench.spec, home), lambda: _plain_epoch(bench, tokenizer))
    asked, _ = _bench("squad_v2", "full", folder)
    built = asked.build_base(shapes_only=True)
    examples = asked.splits.train

    def encode() -> object:
        return asked.task.head.encode(examples, built.tokenizer, asked.task_params, causal=built.causal)

    def tokenize() -> object:
        pairs = [example["question"] for example in examples], [example["context"] for example in examples]
        return built.tokenizer(
            *pairs, truncation="only_second", max_length=384, stride=128, return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )  # fmt: skip

    yield "encoding", (encode, tokenize)
    for method in ("full", "lora"):
        yield f"step, {method}", _steps(*_bench("sst2", method, folder))


def _bench(task: str, method: str, folder: Path) -> tuple[Workbench, Any]:
    place = Path(tempfile.mkdtemp(dir=folder))
    spec, home = throughput.prepared(task, method, place / "home")
    return open_workbench(spec, home), home


def _epoch(spec: Any, home: Any) -> None:
    for path in home.cache.iterdir():
        if path.is_dir():  # hashes stay: they are in every run
            files.discard(path)
    bench = open_workbench(spec, home)
    built = bench.build_base(shapes_only=True)
    features = bench.encode(bench.splits.train, built)
    lengths = [len(feature.input_ids) for feature in features]
    for batch in epoch_batches(lengths, throughput.BATCH, seed=0, epoch=0):
        collate([features[i] for i in batch], built.tokenizer.pad_token_id)


def _plain_epoch(bench: Workbench, tokenizer: Any) -> None:
    file = Path(os.environ["FINETRIAL_DATA"]) / "sst2" / "train.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    bench.build_base(shapes_only=True)
    rows = rows[: ROWS["sst2"]]
    encoded = tokenizer([row["sentence"] for row in rows], truncation=True, max_length=128)["input_ids"]
    order = sorted(range(len(rows)), key=lambda i: len(encoded[i]))
    for start in range(0, len(order), throughput.BATCH):
        batch = order[start : start + throughput.BATCH]
        tokenizer.pad({"input_ids": [encoded[i] for i in batch]}, return_tensors="pt")
        torch.tensor([rows[i]["label"] for i in batch])


def _steps(bench: Workbench, home: Any) -> tuple[Work, Work]:
    """Some of our steps, and as many of plain torch, on the same batches."""
    model, built = bench.build_tuned()
    features = bench.encode(bench.splits.train, built)
    lengths = [len(feature.input_ids) for feature in features]
    batches = [
        [features[i] for i in batch]
        for batch, _ in zip(planned_batches(lengths, bench.spec), range(STEPS), strict=False)
    ]
    run = home.run(bench.spec.run_id)
    run.create(bench.spec)
    fit = Fit(device="cpu", budget=1 << 40, predicted=None, evaluation_tokens=8192)
    loop = open_loop(bench, run, model, built.tokenizer, features, Progress(), fit, planned_steps=10_000)
    return lambda: [alone(loop.step(batch)) for batch in batches], _plain(bench, batches)


def _plain(bench: Workbench, batches: list[list[Feature]]) -> Work:
    model, built = bench.build_tuned()
    for module in model.modules():
        vars(module).pop("forward", None)  # PEFT's own
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)

    def work() -> None:
        model.train()
        for batch in batches:
            tensors = collate(batch, built.tokenizer.pad_token_id)
            optimizer.zero_grad(set_to_none=True)
            logits = model(**model_inputs(tensors)).logits
            torch.nn.functional.cross_entropy(logits, tensors["labels"]).backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()

    return work


def slower(work: Work, share: float) -> Work:
    """The same work, made so much longer by waiting."""

    def both() -> None:
        started = time.perf_counter()
        work()
        time.sleep(share * (time.perf_counter() - started))

    return both


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", action="store_true", help="write what is measured instead of comparing it")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--slow-down", default="", metavar="ITEM=SHARE", help="for trying this out")
    given = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ["FINETRIAL_DATA"] = str(Path(os.environ.get("FINETRIAL_DATA", "../shared/data")).resolve())
    if not given.record and not RECORDED.exists():
        parser.error("nothing is recorded yet to compare with; run it once with --record, on an idle machine")
    item, _, share = given.slow_down.partition("=")
    with tempfile.TemporaryDirectory() as folder:
        found = dict(items(Path(folder)))
        if item:
            found = {item: (slower(found[item][0], float(share)), found[item][1])}
        ratios = measure(found, given.repeats)
    if given.record:
        machine = {"platform": platform.platform(), "cpus": os.cpu_count(), "torch": torch.__version__}
        RECORDED.write_text(json.dumps({"machine": machine, "ratios": ratios}, indent=1) + "\n")
        return 0
    worse = compare(json.loads(RECORDED.read_text())["ratios"], ratios)
    for each in worse:
        interval = f"{100 * each.low:.0f} to {100 * each.high:.0f} %"
        sys.stdout.write(
            f"SLOWER  {each.item}: by {100 * each.by:.0f} % ({interval}) of its yardstick's time\n"
        )
    sys.stdout.write("" if worse else "nothing is slower than recorded\n")
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
