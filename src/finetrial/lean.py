"""AdamW for bf16 weights and 8-bit moments, one tensor at a time. Child side.

The update of a tensor is computed in fp32, piece by piece, so that nothing of the model's size is ever held
beside it. With fp32 weights and fp32 moments it is torch.optim.AdamW. Not for when a tensor is stepped and
how gradients are clipped: `stepping.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any, Literal

import torch

from finetrial.frozen import stream_seed

# Values that share one scale, and the smallest tensor that is quantised at all: as in Dettmers et al. 2022,
# "8-bit optimizers via block-wise quantization" (arXiv:2110.02861), section 2.1, and their bitsandbytes.
BLOCK = 256
SMALLEST = 4096
# Elements of a tensor that are updated at once: some 16 MB for each of the handful of fp32 intermediates.
PIECE = 1 << 22
# fp32 (or int32) tensors of a piece's size that are alive at once.
INTERMEDIATES = 7

Rounding = Literal["nearest", "stochastic", "compensated"]


class LeanAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101) with chosen rounding and precision of its moments.

    `rounding` is how fp32 results become a parameter of fewer bits. "stochastic": to one of the two
    neighbours, the nearer the likelier, so that the mean is exact; drawn from a generator seeded by
    (`seed`, step, tensor), so that a resumed run draws the same. "compensated": to the nearest, with what
    that leaves out kept in a second tensor of the same type and added before the next update (Kahan).
    """

    def __init__(
        self, groups: Iterable[Any], *, lr: float, rounding: Rounding, quantised: bool, seed: int
    ) -> None:
        defaults = {"lr": lr, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2}
        super().__init__(groups, defaults)
        self.rounding, self.quantised, self.seed = rounding, quantised, seed
        parameters = [(group, p) for group in self.param_groups for p in group["params"]]
        self._places = {parameter: (index, group) for index, (group, parameter) in enumerate(parameters)}

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # the base class's form; a closure is not called
        """Update every tensor that has a gradient."""
        for parameter in self._places:
            if parameter.grad is not None:
                self.step_tensor(parameter)

    @torch.no_grad()
    def step_tensor(self, parameter: torch.Tensor) -> None:
        """Update one tensor by its gradient."""
        index, group = self._places[parameter]
        state = self.state[parameter]
        if not state:
            self._start(parameter, state)
        state["step"] += 1
        step, (beta1, beta2) = int(state["step"]), group["betas"]
        step_size = group["lr"] / (1 - beta1**step)
        root_of_correction = (1 - beta2**step) ** 0.5
        generator = None
        if self.rounding == "stochastic":
            generator = torch.Generator(parameter.device).manual_seed(stream_seed(self.seed, step, index))
        weight, gradient = parameter.view(-1), parameter.grad.reshape(-1)  # type: ignore[union-attr]
        for start in range(0, weight.numel(), PIECE):
            part = slice(start, min(start + PIECE, weight.numel()))
            new = weight[part].float()  # the stored weight itself where that is fp32
            if "compensation" in state:
                new += state["compensation"][part].float()
            slope = gradient[part].float()
            first, second = _read(state, "exp_avg", part), _read(state, "exp_avg_sq", part)
            first.lerp_(slope, 1 - beta1)
            second.mul_(beta2).addcmul_(slope, slope, value=1 - beta2)
            new.mul_(1 - group["lr"] * group["weight_decay"])
            new.addcdiv_(first, (second.sqrt() / root_of_correction).add_(group["eps"]), value=-step_size)
            _write(state, "exp_avg", part, first)
            _write(state, "exp_avg_sq", part, second)
            if generator is not None:
                weight[part] = round_stochastically(new, generator)
            else:
                weight[part] = new.to(weight.dtype)
            if "compensation" in state:
                state["compensation"][part] = (new - weight[part].float()).to(weight.dtype)

    def first_moment(self, parameter: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """The mean gradient as stored, at those positions of the flattened tensor."""
        state = self.state[parameter]
        if "exp_avg_scale" not in state:
            return state["exp_avg"][positions]
        codes = state["exp_avg"].index_select(0, positions).int()
        values = _map(signed=True, device=codes.device)[0].index_select(0, codes)
        return values * state["exp_avg_scale"][positions // BLOCK]

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over a state as it was saved; torch's own would make every tensor of the parameter's type."""
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group.update({key: value for key, value in saved.items() if key != "params"})
        self.state.clear()
        for parameter, (index, _) in self._places.items():
            if index in state_dict["state"]:
                self.state[parameter] = {
                    key: value.clone() if key == "step" else value.to(parameter.device, copy=True)
                    for key, value in state_dict["state"][index].items()
                }

    def _start(self, parameter: torch.Tensor, state: dict[str, torch.Tensor]) -> None:
        """Moments of zero, flat, whole or as codes with a scale for each block."""
        state["step"] = torch.tensor(0.0)
        flat, count = parameter.view(-1), parameter.numel()
        for name, signed in (("exp_avg", True), ("exp_avg_sq", False)):
            if self.quantised and count >= SMALLEST:
                zero = int(_map(signed=signed, device=flat.device)[1][0])
                state[name] = torch.full((count,), zero, dtype=torch.uint8, device=flat.device)
                state[f"{name}_scale"] = torch.zeros(-(-count // BLOCK), device=flat.device)
            else:
                state[name] = torch.zeros(count, device=flat.device)
        if self.rounding == "compensated":
            state["compensation"] = torch.zeros_like(flat)


def bytes_of(trained: Iterable[torch.Tensor], *, rounding: Rounding, quantised: bool) -> tuple[int, int]:
    """What `LeanAdamW` takes for those parameters: bytes of its state, and of what a step holds beside it."""
    state, largest = 0, 0
    for parameter in trained:
        count = parameter.numel()
        codes = count + 4 * -(-count // BLOCK)
        state += 4 + 2 * (codes if quantised and count >= SMALLEST else 4 * count)
        state += 2 * count if rounding == "compensated" else 0
        largest = max(largest, min(count, PIECE))
    return state, 4 * INTERMEDIATES * largest


def round_stochastically(values: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """fp32 values as bf16: each becomes one of its two neighbours, the nearer the likelier; exact in the mean.

    bf16 is the upper half of fp32: adding a random number below one unit of it and cutting off the lower half
    rounds away from zero with the probability that the lower half says.
    """
    noise = torch.randint(
        0, 1 << 16, values.shape, dtype=torch.int32, device=values.device, generator=generator
    )
    bits = values.contiguous().view(torch.int32)
    rounded = (bits + noise).bitwise_and_(-(1 << 16)).view(torch.float32)
    # Infinities and not-a-numbers stay what they are: the addition would change their bits.
    return torch.where(torch.isfinite(values), rounded, values).to(torch.bfloat16)


def quantise(values: torch.Tensor, *, signed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """A flat fp32 tensor as 8-bit codes and the largest absolute value of each block.

    A value above zero never becomes zero when `signed` is false: of a second moment that would make the
    update by a division by nearly nothing.
    """
    padding = -values.numel() % BLOCK
    blocks = torch.nn.functional.pad(values, (0, padding)).view(-1, BLOCK)
    scale = blocks.abs().amax(1)
    shares = (blocks / scale.clamp(min=torch.finfo(torch.float32).tiny)[:, None]).view(-1)
    # A table over all bf16 numbers finds the code eight times faster than a binary search over the map.
    index = shares.to(torch.bfloat16).view(torch.int16).int().bitwise_and_(0xFFFF)
    codes = _map(signed=signed, device=values.device)[1].index_select(0, index)
    return codes[: values.numel()], scale


def dequantise(codes: torch.Tensor, scale: torch.Tensor, *, signed: bool) -> torch.Tensor:
    """The fp32 values that codes and scales stand for."""
    values = _map(signed=signed, device=codes.device)[0].index_select(0, codes.int())
    padded = torch.nn.functional.pad(values, (0, -codes.numel() % BLOCK)).view(-1, BLOCK)
    return (padded * scale[:, None]).view(-1)[: codes.numel()]


def dynamic_map(*, signed: bool) -> torch.Tensor:
    """The 256 values that a code can stand for, ascending, from 0 (or -1) to 1: dynamic tree quantisation.

    Seven powers of ten; the larger the value, the more of the eight bits are its digits (arXiv:2110.02861,
    section 1.3, after Dettmers 2016, arXiv:1511.04561).
    """
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1.0, 2**exponent + 1 if signed else 2 ** (exponent + 1) + 1)
        middles = ((edges[1:] + edges[:-1]) / 2 * 10.0 ** (exponent - 6)).tolist()
        values += [*middles, *(-value for value in middles)] if signed else middles
    return torch.tensor(sorted(values))


@lru_cache(maxsize=8)
def _map(*, signed: bool, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """What codes stand for, and the code of every bf16 number by its bits."""
    values = dynamic_map(signed=signed)
    numbers = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    codes = torch.bucketize(numbers.nan_to_num(0.0), (values[1:] + values[:-1]) / 2)
    if not signed:
        codes = torch.where((numbers > 0) & (codes == 0), 1, codes)
    return values.to(device), codes.to(torch.uint8).to(device)


def _read(state: Mapping[str, torch.Tensor], name: str, part: slice) -> torch.Tensor:
    """A piece of a moment in fp32; the stored one itself where it is not quantised."""
    if f"{name}_scale" not in state:
        return state[name][part]
    scale = state[f"{name}_scale"][part.start // BLOCK : -(-part.stop // BLOCK)]
    return dequantise(state[name][part], scale, signed=name == "exp_avg")


def _write(state: Mapping[str, torch.Tensor], name: str, part: slice, values: torch.Tensor) -> None:
    if f"{name}_scale" not in state:
        return  # it was changed in place
    codes, scale = quantise(values, signed=name == "exp_avg")
    state[name][part] = codes
    state[f"{name}_scale"][part.start // BLOCK : -(-part.stop // BLOCK)] = scale
