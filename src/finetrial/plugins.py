"""The five protocols on one page, and `load(kind, name)`.

A plug-in is one file in `finetrial/<kind>/` whose name is its name in the study file and which defines
`PLUGIN`; one from outside is `module:object`, of a module that is installed or lies beside the study file
(`make_importable`). Plug-ins import torch and their own libraries inside their functions: the parent reads
their parameters and must stay light. `Params` are what YAML can say: text, numbers, true and false, lists,
mappings, and records of these; not tuples or sets, which JSON does not bring back.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, runtime_checkable

from finetrial.errors import PluginError
from finetrial.frozen import Frozen, Setting, canonical_json
from finetrial.records import MethodSpec, Outcome, Result, RunSpec, TaskSpec
from finetrial.space import Space, space_fault

if TYPE_CHECKING:
    import torch

Kind = Literal["tasks", "methods", "probes", "engines", "trackers"]
Group = Literal["head", "body", "adapter"]
Example = dict[str, Any]  # a row as read, with at least "id" (str, unique in its split)


class Metric(NamedTuple):
    """What trials are judged by. `worst` is what the search is told of a diverged one."""

    name: str
    higher_is_better: bool
    worst: float
    best: float


@dataclass(frozen=True)
class Splits:
    """A task's rows. Validation selects, test reports; the three share no row (and, for QA, no article)."""

    train: list[Example]
    validation: list[Example]
    test: list[Example]


@dataclass
class Feature:
    """One model input. QA makes several of one row (windows); classification one."""

    input_ids: list[int]
    row: int  # index of its example in the split
    labels: dict[str, int]  # tensor name -> class or position
    token_type_ids: list[int] | None = None
    content: tuple[int, int] = (0, 0)  # token positions [start, end) of the text itself, for pooling
    extra: dict[str, Any] = field(default_factory=dict)  # the head's own (offsets, ...)


@dataclass(frozen=True)
class Scored:
    """Scores of one split: all metrics, what was calibrated, and numbers per example."""

    metrics: dict[str, float]
    calibration: dict[str, float]
    per_example: dict[str, float]  # example id -> the task's metric on it alone
    losses: dict[str, float] = field(default_factory=dict)  # example id -> its loss; filled in by `evaluate`


class Head(Protocol):
    """How a kind of task meets a model: encoding, loss, predictions, scores. See `finetrial/heads/`."""

    kind: Literal["question_answering", "sequence_classification"]

    def model_options(self, splits: Splits, params: Any) -> dict[str, Any]:
        """Options of the model's config, e.g. `num_labels`."""
        ...

    def encode(
        self, examples: Sequence[Example], tokenizer: Any, params: Any, *, causal: bool
    ) -> list[Feature]:
        """Model inputs of the examples, all labelled."""
        ...

    def losses(self, outputs: Any, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The loss of each of the batch's inputs, in fp32: [B]. `outputs` as in `predictions`."""
        ...

    def predictions(self, outputs: Any, batch: Mapping[str, torch.Tensor]) -> list[Any]:
        """One small NumPy record per input of the batch, on the CPU.

        `outputs` are the tensors that the model gave, by name and as attributes; nothing else of what it gave
        (`hidden_states`, `past_key_values`), for they may be read back after a kill.
        """
        ...

    def score(
        self,
        predictions: Sequence[Any],
        features: Sequence[Feature],
        examples: Sequence[Example],
        params: Any,
        calibration: Mapping[str, float] | None = None,
    ) -> Scored:
        """Scores of one split. Without `calibration` (validation) it is chosen; with it (test) it is used."""
        ...

    def baselines(self, splits: Splits, params: Any) -> dict[str, dict[str, float]]:
        """Test scores that need no model: name (majority, no_answer, ...) -> metric -> value."""
        ...


@runtime_checkable
class Task(Protocol):
    """tasks/<name>.py: where the rows come from, and which head and metric judge them."""

    Params: type[Frozen]
    metric: Metric
    head: Head

    def files(self, params: Any, base: Path) -> list[Path]:
        """The local data files that the rows come from (hashed into every run's identity)."""
        ...

    def splits(self, params: Any, base: Path) -> Splits:
        """The rows; a pure function of params and files. Raises DataError."""
        ...


@dataclass(frozen=True)
class AttachInput:
    """What a method is attached to: the base model, the kind of its head, the names of its fresh modules."""

    model: Any
    kind: str
    head_names: tuple[str, ...]


@dataclass(frozen=True)
class Stepping:
    """How a method's trained parameters are kept and stepped; by default by AdamW with everything in fp32.

    `rounding`: how an update becomes a weight of fewer bits; `state`: how the moments are kept; `in_backward`:
    whether each tensor is stepped as soon as its gradient is whole.
    """

    rounding: Literal["nearest", "stochastic", "compensated"] = "nearest"
    state: Literal["fp32", "8bit"] = "fp32"
    in_backward: bool = False


@runtime_checkable
class Method(Protocol):
    """methods/<name>.py: what is trained, and nothing else.

    It may also have `stepping(params)`, which gives a `Stepping` other than the default; `stacks = True`, if
    `stacking.py` can train several at once; and `learning_rate_factor`, for `search.warm_start`.
    """

    Params: type[Frozen]
    space: Space  # its own dimensions, learning_rate first

    def attach(self, given: AttachInput, settings: Mapping[str, Setting], params: Any) -> Any:
        """The model with the trained parameters marked (requires_grad) or inserted."""
        ...

    def group(self, parameter_name: str, head_names: Sequence[str]) -> Group:
        """Which group a trained parameter belongs to."""
        ...

    def must_move(self) -> Sequence[Group]:
        """The groups that have to move for the run to count."""
        ...

    def read_back(self, model: Any) -> dict[str, Setting]:
        """The method's own settings as the modules now hold them."""
        ...

    def save(self, model: Any, folder: Path) -> None:
        """Write what a user loads with transformers or PEFT."""
        ...

    def load(self, base: Any, folder: Path) -> Any:
        """The tuned model, given the base model (with its freshly made head) and that folder."""
        ...


@dataclass(frozen=True)
class ProbeInput:
    """What a probe measures: models in eval mode on one device, and the same inputs for all of them."""

    base: Any
    tuned: Any  # the base again (a second, separate forward pass) in the control
    neighbour: Any | None  # the same method's neighbouring replicate
    batches: Sequence[Mapping[str, Any]]  # collated tensors, with "pool_mask" (1 on content tokens)
    input_sha256: str
    task: str = ""  # the task's name in the study
    tokenizer: Any = None
    causal: bool = False  # a decoder
    folder: Path = Path()  # the study's, which relative paths of parameters are resolved against
    language_model: Callable[[], Any] | None = None  # the base with its own language head, if it is causal
    head_names: Sequence[str] = ()  # modules that a checkpoint of the base does not have
    score: Callable[[Any], Mapping[str, float]] = lambda model: {}  # a model's metrics on the same rows
    # The study's other measures -> what they find of another model in the place of `tuned`.
    others: Mapping[str, Callable[[Any], dict[str, Any]]] = field(default_factory=dict)
    brief: bool = False  # another measure asks, for the means alone: the rest may be left out


@runtime_checkable
class Probe(Protocol):
    """probes/<name>.py: raw measurements of one trained model, as plain JSON.

    It is given as many validation rows as `Params` says in `rows` (None: all); without a `rows`, none.
    It may also have `files(params, base)`, the local files that it reads, as a task has; and
    `with_tasks(params, tasks)`: its parameters with what it takes from the study's tasks (or a ValueError).
    """

    Params: type[Frozen]

    def measure(self, given: ProbeInput, params: Any) -> dict[str, Any]: ...


class Exit(NamedTuple):
    """How a child ended: its exit code (negative: the signal), or an outcome that the engine knows."""

    code: int | None
    outcome: Outcome | None = None
    reason: str | None = None


@runtime_checkable
class Engine(Protocol):
    """engines/<name>.py: start a run's process, see it end, end it; if it has `ask(handle)`, ask it to end."""

    def start(self, run_folder: Path, spec: RunSpec) -> Any:
        """A handle with `pid`. The child's output goes to the folder's log.txt."""
        ...

    def poll(self, handle: Any) -> Exit | None:
        """How it ended, or None while it runs."""
        ...

    def stop(self, handle: Any, grace_seconds: float) -> None:
        """Ask it to end, then end it and everything it started."""
        ...


@runtime_checkable
class Tracker(Protocol):
    """trackers/<name>.py: a mirror of finished runs. Its failure is a warning, never a run's failure."""

    def replay(
        self, folder: Path, spec: RunSpec, records: Iterable[Mapping[str, Any]], result: Result | None
    ) -> None:
        """Write one run under a stable id; calling it again gives the same run, not a second one."""
        ...


# `module:object`, the module with or without dots.
OUTSIDE = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")

PROTOCOLS: dict[str, type] = {
    "tasks": Task,
    "methods": Method,
    "probes": Probe,
    "engines": Engine,
    "trackers": Tracker,
}


def names(kind: Kind) -> list[str]:
    """The built-in plug-ins of a kind, found by listing its folder."""
    package = importlib.import_module(f"finetrial.{kind}")
    return sorted(m.name for m in pkgutil.iter_modules(package.__path__) if not m.name.startswith("_"))


def make_importable(folder: Path) -> None:
    """Let `module:object` name a file in a study's folder, in this process.

    The folder goes to the end of Python's search path: a file of the user's that is called like an installed
    module (`datasets.py`) then breaks nothing. The coordinator does this when it reads a study, the worker
    when it reads its spec.
    """
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
        importlib.invalidate_caches()


def load(kind: Kind, name: str, base: Path | None = None) -> Any:
    """The plug-in of that name: built in, or `module:object`.

    With `base`, the study's folder, a module that lies there has to be the one that Python found.

    Raises:
        PluginError: there is none of that name, it does not import, or it does not keep the protocol.
    """
    noun = kind[:-1]
    if ":" in name:
        if not OUTSIDE.fullmatch(name):
            raise PluginError(f"{name!r} is no {noun}'s name; write 'module:object'")
        module_name, _, attribute = name.partition(":")
    elif name in names(kind):
        module_name, attribute = f"finetrial.{kind}.{name}", "PLUGIN"
    else:
        raise PluginError(_not_there(kind, name))
    plugin = _import(noun, name, module_name, attribute, base)
    protocol = PROTOCOLS[kind]
    parts = {*getattr(protocol, "__annotations__", {}), *vars(protocol)}
    missing = sorted(part for part in parts if not part.startswith("_") and not hasattr(plugin, part))
    if missing:
        raise PluginError(f"the {noun} {name!r} lacks {', '.join(missing)} (see finetrial/plugins.py)")
    if isinstance(plugin, type):
        raise PluginError(f"the {noun} {name!r} is a class; make an object of it: PLUGIN = {plugin.__name__}()")
    params = getattr(plugin, "Params", Frozen)  # engines and trackers have none
    if not (isinstance(params, type) and issubclass(params, Frozen)):
        raise PluginError(f"the {noun} {name!r}: Params has to be a subclass of finetrial.frozen.Frozen")
    if kind == "methods" and (fault := space_fault(plugin.space)):
        raise PluginError(f"the method {name!r} {fault}")
    return plugin


def metric_of(task: TaskSpec) -> Metric:
    """What a task is judged by; a plug-in whose metric depends on its parameters has `metric_for`.

    Raises:
        PluginError: the plug-in does not load.
    """
    plugin = load("tasks", task.use)
    if hasattr(plugin, "metric_for"):
        return plugin.metric_for(plugin.Params.model_validate_json(canonical_json(task.params)))
    return plugin.metric


def stepping_of(method: MethodSpec) -> Stepping:
    """How a method wants its parameters stepped.

    Raises:
        PluginError: the plug-in does not load, or does not say.
    """
    plugin = load("methods", method.use)
    if not hasattr(plugin, "stepping"):
        return Stepping()
    params = plugin.Params.model_validate_json(canonical_json(method.params))
    try:
        found = plugin.stepping(params)
    except Exception as error:  # foreign code, as in `_import`
        reason = f"raises {type(error).__name__}: {error}"
        raise PluginError(f"the method {method.use!r}: its stepping(params) {reason}; mend it") from error
    if not isinstance(found, Stepping):
        raise PluginError(f"the method {method.use!r}: its stepping(params) gives no Stepping; return one")
    return found


def _not_there(kind: Kind, name: str) -> str:
    noun, known = kind[:-1], names(kind)
    near = difflib.get_close_matches(name.lower(), known, n=1)
    others = [other for other in PROTOCOLS if other != kind and name in names(other)]  # type: ignore[arg-type]
    hint = f" It is one of the {others[0]}." if others else ""
    hint = f" Did you mean {near[0]!r}?" if near else hint
    return (
        f"there is no {noun} called {name!r}.{hint} Known: {', '.join(known)}. For your own, put a file beside "
        f"the study file and write 'module:object'"
    )


def _import(noun: str, name: str, module_name: str, attribute: str, base: Path | None) -> Any:
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name != module_name.partition(".")[0]:
            raise PluginError(f"the {noun} {name!r} needs {error.name!r}, which is not installed") from error
        where = f"beside the study file, in {base}," if base else "beside the study file"
        missing = f"the {noun} {name!r} is not there: put {module_name}.py {where} or install it"
        raise PluginError(missing) from error
    except (Exception, SystemExit) as error:  # foreign code: whatever it raises is the answer
        line = f" in line {error.lineno}" if isinstance(error, SyntaxError) else ""
        reason = f"{type(error).__name__}{line}: {(str(error).strip() or 'no reason given').splitlines()[0]}"
        raise PluginError(f"the {noun} {name!r} does not import: {reason}") from error
    found = getattr(module, "__file__", None)
    beside = [base / f"{module_name}.py", base / module_name / "__init__.py"] if base else []
    if any(path.exists() for path in beside) and not (found and Path(found) in beside):
        raise PluginError(
            f"the {noun} {name!r} would be taken from {found} and not from the study's folder, because a "
            f"module of that name is there already; rename yours"
        )
    if not hasattr(module, attribute):
        there = [key for key in vars(module) if not key.startswith("_")]
        near = difflib.get_close_matches(attribute, there, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"write {attribute} = ... at its end"
        raise PluginError(f"the {noun} {name!r} does not load: {found} defines no {attribute!r}; {hint}")
    return getattr(module, attribute)
