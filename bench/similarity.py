"""All pairs of layers by one table and in the usual ways, and the memory of streamed CKA.

    OMP_NUM_THREADS=1 python bench/similarity.py [--repeats 5] [--output bench/results/similarity.json]

Seconds for debiased CKA of every layer of one model with every layer of another (12 and 12 layers, 750 rows of
2,048 features, random numbers that share a part), in turn by

- `table`: `cka.cka_table`;
- `pairs`: `cka.linear_cka` for each pair;
- `direct`: as textbooks have it, for each pair: two Gram matrices, four products with the centring matrix,
  and three traces of products (this is biased CKA; the debiased one takes no less);
- `ckatorch`: its `cka_base` for each pair, where it is installed.

Ratios are of one repeat to the table's of the same repeat. Values are compared too: each with
`cka.linear_cka` of its kind. Then the peak memory of `CkaAccumulator` (tracemalloc and resident, each in a
process of its own) at 2,000, 20,000 and 200,000 rows, which come in batches of 512 and are not kept. Not a
benchmark of other measures, nor on a GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import os
import platform
import statistics
import sys
import time
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from finetrial.cka import CkaAccumulator, cka_table, linear_cka

BATCH = 512
Table = list[list[float | None]]
Layers = list[np.ndarray]


def model_layers(layers: int, rows: int, features: int, seed: int) -> Layers:
    """Rows of every layer; a part of them is the same for every seed, so that models are somewhat alike."""
    common = np.random.default_rng(0).standard_normal((rows, features))
    rng = np.random.default_rng(seed)
    return [common + rng.standard_normal((rows, features)) for _ in range(layers)]


def each_pair(measure: Callable[[np.ndarray, np.ndarray], float | None]) -> Callable[[Layers, Layers], Table]:
    return lambda before, after: [[measure(x, y) for y in after] for x in before]


def direct(x: np.ndarray, y: np.ndarray) -> float:
    """Biased linear CKA, as it is usually written down."""
    n = len(x)
    centring = np.eye(n) - 1 / n
    k, m = centring @ (x @ x.T) @ centring, centring @ (y @ y.T) @ centring
    return float(np.trace(k @ m) / np.sqrt(np.trace(k @ k) * np.trace(m @ m)))


def ways() -> dict[str, Callable[[Layers, Layers], Table]]:
    found = {"table": cka_table, "pairs": each_pair(linear_cka), "direct": each_pair(direct)}
    if importlib.util.find_spec("ckatorch"):
        import torch
        from ckatorch import cka_base

        torch.set_num_threads(threads())
        found["ckatorch"] = each_pair(
            lambda x, y: cka_base(torch.from_numpy(x), torch.from_numpy(y), unbiased=True).item()
        )
    return found


def threads() -> int:
    return int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)


def compare(before: Layers, after: Layers, repeats: int) -> dict[str, Any]:
    """Seconds and ratios of each way, and the largest difference of its values to `linear_cka`."""
    arms = ways()
    for way in arms.values():
        way(before[:1], after[:1])  # the first product of a process also starts BLAS
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    tables: dict[str, Table] = {}
    for _ in range(repeats):
        for name, way in arms.items():
            started = time.perf_counter()
            tables[name] = way(before, after)
            seconds[name].append(time.perf_counter() - started)
    biased = each_pair(lambda x, y: linear_cka(x, y, debiased=False))(before, after)
    expected = {name: biased if name == "direct" else tables["pairs"] for name in tables}
    itself = cka_table(before, [layer.copy() for layer in before])
    ones = sum(itself[i][i] == 1.0 for i in range(len(before)))
    return {
        "seconds": seconds,
        "ratio_to_table": {
            name: [other / own for other, own in zip(values, seconds["table"], strict=True)]
            for name, values in seconds.items()
            if name != "table"
        },
        "largest_difference": {
            name: float(np.abs(np.array(table) - np.array(expected[name])).max())
            for name, table in tables.items()
        },
        "ones_of_a_model_with_itself": f"{ones} of {len(before)}",
    }


def streamed_memory(rows: int, features: int) -> dict[str, int | float]:
    """Peak bytes while that many rows go through an accumulator; what the process held before is taken off."""
    rng = np.random.default_rng(0)
    process = psutil.Process()
    held = resident = process.memory_info().rss
    tracemalloc.start()
    accumulator = CkaAccumulator((features, features))
    for start in range(0, rows, BATCH):
        x = rng.standard_normal((min(BATCH, rows - start), features))
        accumulator.add(x, x + rng.standard_normal(x.shape))
        resident = max(resident, process.memory_info().rss)
    value = accumulator.value()
    assert value is not None
    assert accumulator.rows == rows
    return {
        "rows": rows, "tracemalloc_bytes": tracemalloc.get_traced_memory()[1],
        "resident_bytes": resident - held, "value": value,
    }  # fmt: skip


def in_a_process_of_its_own(rows: int, features: int) -> dict[str, int | float]:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(streamed_memory, rows, features).result()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=750)
    parser.add_argument("--features", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--streamed-rows", type=int, nargs="+", default=[2_000, 20_000, 200_000])
    parser.add_argument("--streamed-features", type=int, default=768)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    before, after = (model_layers(given.layers, given.rows, given.features, seed) for seed in (1, 2))
    found = compare(before, after, given.repeats)
    for key, unit in (("seconds", "s"), ("ratio_to_table", "times the table's")):
        for name, values in found[key].items():
            spread = f"{min(values):9.3f} .. {max(values):9.3f} {unit}"
            sys.stdout.write(f"{name:<10} median {statistics.median(values):9.3f}   {spread}\n")
    for name, difference in found["largest_difference"].items():
        sys.stdout.write(f"{name:<10} differs from linear_cka by at most {difference:.1e}\n")
    sys.stdout.write(f"exactly 1 of a model with itself: {found['ones_of_a_model_with_itself']} layers\n")
    memory = [in_a_process_of_its_own(rows, given.streamed_features) for rows in given.streamed_rows]
    for row in memory:
        sys.stdout.write(
            f"{row['rows']:>8,} rows streamed: peak {row['tracemalloc_bytes'] / 2**20:.2f} MiB traced, "
            f"{row['resident_bytes'] / 2**20:.1f} MiB resident\n"
        )
    if given.output:
        settings = {name: value for name, value in vars(given).items() if name != "output"}
        machine = {"platform": platform.platform(), "cpus": os.cpu_count(), "threads": threads()}
        machine["numpy"] = np.__version__
        given.output.parent.mkdir(parents=True, exist_ok=True)
        given.output.write_text(
            json.dumps({"machine": machine, "settings": settings, **found, "streamed": memory}, indent=1) + "\n"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
