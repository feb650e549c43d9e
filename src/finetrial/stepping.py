"""When a tensor is stepped, how its gradient is clipped first, what rounding loses. Child side.

One rule for all methods of a study. Not for the update itself: torch's AdamW, or `lean.py`.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch

from finetrial.plugins import Stepping
from finetrial.records import LoopRules
from finetrial.training_state import Progress

# Of lost updates: how many elements are looked at, and how often in a run (at most twice as often).
WATCHED_ELEMENTS = 100_000
WATCHED_STEPS = 16


class Stepper:
    """Clips and steps the trained tensors of one model: all after the backward pass, or each within it.

    In the backward pass a tensor is stepped, and its gradient freed, as soon as that is whole. Of several
    micro-batches that is in the last one's pass (`last_part`); until then their gradients are held.
    """

    def __init__(
        self, trained: Sequence[torch.nn.Parameter], optimizer: Any,
        rules: LoopRules, stepping: Stepping,
    ) -> None:  # fmt: skip
        if stepping.in_backward and rules.clip == "global":
            raise ValueError("a step in the backward pass needs clip: per_tensor")
        self.optimizer, self.rules = optimizer, rules
        self.trained = list(trained)
        self.in_backward, self.last_part = stepping.in_backward, True
        self.limit = rules.max_grad_norm / math.sqrt(len(self.trained))
        self.watch = _Watch(self.trained, optimizer.optimizer)
        self.watching = False
        self.fused = bool(optimizer.optimizer.defaults.get("fused"))  # torch's alone has it
        self._norms: list[torch.Tensor] = []
        if stepping.in_backward:
            hook = weakly(self._in_backward)
            for parameter in self.trained:
                parameter.register_post_accumulate_grad_hook(hook)

    def finish(self) -> float:
        """Step what the backward pass has not; the norm of the whole gradient before clipping."""
        if self.rules.clip == "global":
            norm = self._clip_all()
        else:
            for parameter in self.trained:
                if parameter.grad is not None:
                    self._clip(parameter.grad)
            each = torch.stack(self._norms).tolist() if self._norms else []
            # An exactly rounded sum: the order in which the gradients came makes no difference.
            squares = [value * value for value in each]
            norm = math.sqrt(math.fsum(squares)) if all(map(math.isfinite, squares)) else math.nan
            self._norms.clear()
        if self.watching:
            for parameter in self.trained:
                if parameter.grad is not None:
                    self.watch.before(parameter)
        self.optimizer.step()
        if self.fused:
            self.optimizer.optimizer.grad_scale = None
        if self.watching:
            self.watch.after()
        return norm

    def _clip_all(self) -> float:
        """As torch's clip_grad_norm_, which multiplies by 1 where there is nothing to clip.

        The fused AdamW divides within its own pass, as it does after a scaled loss (timed in docs/log.md).
        """
        gradients = [parameter.grad for parameter in self.trained if parameter.grad is not None]
        found = torch.nn.utils.get_total_norm(gradients)
        times = (found + 1e-6) / self.rules.max_grad_norm
        if not float(times) <= 1.0:  # nor a number
            if self.fused:
                self.optimizer.optimizer.grad_scale = times
            else:
                torch.nn.utils.clip_grads_with_norm_(self.trained, self.rules.max_grad_norm, found)
        return float(found)

    def weight_sizes(self) -> list[float]:
        """The root mean square of every trained tensor."""
        norms = [torch.linalg.vector_norm(tensor.detach(), dtype=torch.float32) for tensor in self.trained]
        sizes = zip(torch.stack(norms).tolist(), self.trained, strict=True)
        return [norm / math.sqrt(tensor.numel()) for norm, tensor in sizes]

    def _in_backward(self, parameter: torch.Tensor) -> None:
        if not self.last_part or parameter.grad is None:
            return
        self._clip(parameter.grad)
        if self.watching:
            self.watch.before(parameter)
        self.optimizer.optimizer.step_tensor(parameter)
        parameter.grad = None

    def _clip(self, gradient: torch.Tensor) -> None:
        """Shorten one tensor's gradient to its share of the limit, and note its norm.

        One that is not finite is not looked at here, which would make a GPU wait for every tensor: the run has
        then diverged at this step, and its weights are of no use to anybody.
        """
        norm = torch.linalg.vector_norm(gradient, dtype=torch.float32)
        self._norms.append(norm)
        gradient.mul_((self.limit / (norm + 1e-6)).clamp(max=1.0))  # as torch's clip_grad_norm_ does it

    def look(self, step: int, planned_steps: int) -> None:
        """Watch the coming step if it is one of those that are spread over the run."""
        self.watching = step % max(1, planned_steps // WATCHED_STEPS) == 0

    def lost(self, progress: Progress) -> None:
        """Add what the watched step has lost to the run's count."""
        if self.watching:
            changed, lost = self.watch.count()
            progress.updates_watched += changed
            progress.updates_lost += lost


def weakly(method: Callable[[torch.Tensor], None]) -> Callable[[torch.Tensor], None]:
    """A method as a tensor's hook, which keeps nothing alive: the garbage collector does not see those."""
    reference = weakref.WeakMethod(method)

    def hook(tensor: torch.Tensor) -> None:
        alive = reference()
        if alive is not None:
            alive(tensor)

    return hook


class _Watch:
    """A fixed sample of the trained elements, evenly spread: which updates left the stored weight as it was.

    An update is one that the mean gradient or the weight decay makes other than zero. What is stored is
    the weight and, where it has one, its compensation.
    """

    def __init__(self, trained: Sequence[torch.Tensor], optimizer: Any) -> None:
        self.optimizer = optimizer
        stride = -(-sum(p.numel() for p in trained) // WATCHED_ELEMENTS)
        self.positions: dict[torch.Tensor, torch.Tensor] = {}
        offset = 0
        for parameter in trained:
            first = min(-offset % stride, parameter.numel())
            self.positions[parameter] = torch.arange(first, parameter.numel(), stride)
            offset += parameter.numel()
        self.seen: dict[torch.Tensor, list[torch.Tensor]] = {}
        self.counts: list[torch.Tensor] = []

    def before(self, parameter: torch.Tensor) -> None:
        self.positions[parameter] = self.positions[parameter].to(parameter.device)
        self.seen[parameter] = self._stored(parameter)

    def after(self) -> None:
        for group in self.optimizer.param_groups:
            watched = [parameter for parameter in group["params"] if parameter in self.seen]
            if not watched or group["lr"] == 0:
                continue
            before = [self.seen[parameter] for parameter in watched]
            now = [self._stored(parameter) for parameter in watched]
            change = torch.cat([self._first_moment(parameter) for parameter in watched]) != 0
            if group["weight_decay"]:
                change |= torch.cat([values[0] for values in before]) != 0
            same = torch.ones_like(change)
            for place in range(len(now[0])):
                new = [values[place] for values in now]
                # A compensation that this step has begun was zero.
                old = [
                    values[place] if place < len(values) else torch.zeros_like(values[0]) for values in before
                ]
                same &= torch.cat(old) == torch.cat(new)
            self.counts.append(torch.stack([change.sum(), (change & same).sum()]))
        self.seen.clear()

    def count(self) -> tuple[int, int]:
        """(Updates, those of them that were lost) since the last count."""
        total = torch.stack(self.counts).sum(0).tolist() if self.counts else [0, 0]
        self.counts.clear()
        return int(total[0]), int(total[1])

    def _stored(self, parameter: torch.Tensor) -> list[torch.Tensor]:
        at = self.positions[parameter]
        compensation = self.optimizer.state[parameter].get("compensation")
        kept = [parameter.detach().view(-1).index_select(0, at)]
        return kept if compensation is None else [*kept, compensation.index_select(0, at)]

    def _first_moment(self, parameter: torch.Tensor) -> torch.Tensor:
        if hasattr(self.optimizer, "first_moment"):
            return self.optimizer.first_moment(parameter, self.positions[parameter])
        return self.optimizer.state[parameter]["exp_avg"].view(-1).index_select(0, self.positions[parameter])
