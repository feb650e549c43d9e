"""`bench/memory.py` sets what was foretold beside what was measured."""

from __future__ import annotations

import pytest


def test_what_is_foretold_of_a_real_model_is_near_what_it_takes(bench_module, tmp_path):
    memory = bench_module("memory")
    (tmp_path / "cache").mkdir()
    row = memory.compared(memory.Configuration("minilm", "lora", 64, 8, False), tmp_path / "0")
    assert row["ratio"] == pytest.approx(1, abs=0.1)
    assert row["measured_mb"] <= row["measured_roomy_mb"]
