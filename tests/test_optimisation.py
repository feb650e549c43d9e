"""Where bf16 would gain time on a processor, and where it loses it."""

from __future__ import annotations

import pytest
import torch

from finetrial.optimisation import could_be_bf16, is_slow_in_bf16
from tiny_runs import make_spec


@pytest.mark.parametrize(
    ("precision", "weights", "processor", "could_be", "slow"),
    [
        ("auto", "fp32", {"avx512_bf16": True}, True, False),
        ("auto", "fp32", {"bf16": True}, True, False),  # Arm's
        ("auto", "fp32", {"avx512_bf16": False}, False, False),
        ("bf16", "fp32", {"amx_bf16": True}, False, False),
        ("bf16", "fp32", {}, False, True),
        ("fp32", "fp32", {}, False, False),
        ("auto", "bf16_stochastic", {}, False, True),  # which computes in bf16 whatever the precision
        ("auto", "bf16_stochastic", {"avx512_bf16": True}, False, False),
    ],
)
def test_bf16_is_advised_by_what_the_processor_has(
    tmp_path, monkeypatch, precision, weights, processor, could_be, slow
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: processor)
    spec = make_spec(tmp_path, "full", method_params={"weights": weights}, rules={"precision": precision})
    assert (could_be_bf16(spec), is_slow_in_bf16(spec)) == (could_be, slow)
