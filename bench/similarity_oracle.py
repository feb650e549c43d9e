"""What rsatoolbox says of the similarity of random rows: the table `RSATOOLBOX` in tests/test_similarity.py.

    python -m venv oracle && oracle/bin/pip install numpy==2.4.6 rsatoolbox==0.3.2
    oracle/bin/python bench/similarity_oracle.py

In an environment of its own, because rsatoolbox brings scikit-learn, which transformers imports wherever it is
there. Prints, per seed and shape: biased linear CKA (`cosine_cov` of Euclidean distances), nuclear-norm
similarity (`bures`), and Spearman's correlation of Euclidean and of correlation distances.
"""

from __future__ import annotations

import numpy as np
from rsatoolbox.data import Dataset
from rsatoolbox.rdm import calc_rdm, compare

SHAPES = ((20, 5, 3), (12, 30, 7), (40, 8, 8), (9, 4, 50), (100, 64, 64), (30, 300, 200))  # rows, D, E


def data(seed: int, rows: int, d: int, e: int) -> tuple[np.ndarray, np.ndarray]:
    """The rows that the test draws too."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, d)) * rng.lognormal(size=d)
    return x, rng.standard_normal((rows, e)) + x[:, :1]


def main() -> None:
    for seed, shape in enumerate(SHAPES):
        x, y = (Dataset(values) for values in data(seed, *shape))
        pairs = {
            name: [calc_rdm(side, method=name) for side in (x, y)] for name in ("euclidean", "correlation")
        }
        values = [
            compare(*pairs[distance], method=method).item()
            for distance, method in (
                ("euclidean", "cosine_cov"),
                ("euclidean", "bures"),
                ("euclidean", "spearman"),
                ("correlation", "spearman"),
            )
        ]
        print(f"    ({seed}, {shape}, {', '.join(f'{value:.9f}' for value in values)}),")


if __name__ == "__main__":
    main()
