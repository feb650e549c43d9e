"""Base models with a task's head, built the same way for every method. Child side: imports torch.

The head's initial weights come from their own seed, also where the checkpoint has a trained one; a weight that
should have been in the checkpoint and was not is an error, not a random tensor.
"""

from __future__ import annotations

import difflib
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)
from transformers.utils import logging as transformers_logging

from finetrial import files, hashed
from finetrial.architecture import check_inputs, is_causal, refuse_unfit
from finetrial.errors import ModelError
from finetrial.lease import FileLock
from finetrial.records import ModelSource
from finetrial.sources import Location, locate_model, model_sha256

# What transformers raises on files that are not what they should be.
LOAD_FAULTS = (
    OSError, ValueError, RuntimeError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError,
    ImportError, SafetensorError, StrictDataclassError,
)  # fmt: skip
MOST_CHARACTERS = 400  # of a foreign message

AUTO_CLASSES = {
    "question_answering": AutoModelForQuestionAnswering,
    "sequence_classification": AutoModelForSequenceClassification,
}


class Built(NamedTuple):
    """A base model with its head, its tokenizer, and the names of the head's modules.

    The head is what lies beside the model's body, and a pooler that the checkpoint did not have: every
    method trains it whole.
    """

    model: Any
    tokenizer: Any
    head_names: tuple[str, ...]
    causal: bool  # a decoder: each position sees only what is before it
    mapped: bool  # its weights are read from the file as they are needed: it holds them in fp32, as used here


def prepare(source: ModelSource, base: Path, cache: Path) -> Location:
    """Where the model can be loaded from; a GGUF file is dequantised once into `cache`."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    location = locate_model(source, base)
    if source.gguf_file is None:
        return location
    gguf = Path(location.name) / source.gguf_file if location.is_local else None
    key = (
        model_sha256(source, base, cache)[:16]
        if gguf
        else f"{source.name.replace('/', '--')}-{source.revision}"
    )
    folder = cache / f"dequantised-{key}"
    cache.mkdir(parents=True, exist_ok=True)
    lock = FileLock(cache / f"{folder.name}.lock")
    holder = lock.acquire(wait_seconds=1800)
    if holder is not None:
        raise ModelError(f"process {holder} has been dequantising {source.name} for 30 minutes; end it")
    try:
        if not _is_whole(folder, cache):
            with files.committed(folder) as temporary:
                _dequantise(location, source.gguf_file, temporary)
                if gguf and files.sha256_file(gguf)[:16] != key:
                    raise ModelError(f"{gguf} changed while it was dequantised; run the same command again")
                if folder.exists():
                    shutil.rmtree(folder)
    finally:
        lock.release()
    return Location(str(folder), None, True)


def _is_whole(folder: Path, cache: Path) -> bool:
    """Whether what was dequantised is there as it was written; not read again while its files are untouched."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return bool(paths) and hashed.known(paths, lambda: files.damage(folder) or "whole", cache) == "whole"


def _dequantise(location: Location, gguf_file: str, folder: Path) -> None:
    try:
        import gguf  # noqa: F401 - transformers reads GGUF files through it
    except ImportError:
        raise ModelError("reading a GGUF file needs the gguf package: `pip install finetrial[gguf]`") from None
    options = {"revision": location.revision, "gguf_file": gguf_file}
    try:
        AutoTokenizer.from_pretrained(location.name, **options).save_pretrained(folder)
        packed = AutoModelForCausalLM.from_pretrained(location.name, dtype=torch.float32, **options)
    except LOAD_FAULTS as error:
        raise ModelError(
            f"{gguf_file} of {location.name} cannot be dequantised: {_reason(error)}; get the file anew, or "
            f"name another"
        ) from error
    # transformers marks a model read from GGUF as quantised and refuses to save it, dequantised or not:
    # its tensors go into a plain model of the same config, strictly.
    config = type(packed.config).from_dict(
        {k: v for k, v in packed.config.to_dict().items() if k != "quantization_config"}
    )
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(packed.state_dict(), strict=True, assign=True)
    plain.save_pretrained(folder)


def load_tokenizer(location: Location, source: ModelSource) -> Any:
    """The model's tokenizer, padding on the right, with a pad token.

    A decoder without a pad token gets its unknown or end token for it: the attention mask, not the token,
    says what is padding, and the head reads the last position that is not padding. What it makes is what the
    model is given, here and by whoever loads it from beside a trained model: no token types if the study
    says so.
    """
    makes = {} if source.token_type_ids else {"model_input_names": ["input_ids", "attention_mask"]}
    tokenizer = AutoTokenizer.from_pretrained(
        location.name, revision=location.revision, trust_remote_code=source.trust_remote_code, **makes
    )
    if not set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens):
        raise ModelError(
            f"{source.name} has no tokenizer: every word would be unknown; put the model's tokenizer.json "
            f"beside it"
        )
    if not tokenizer.is_fast:
        raise ModelError(
            f"{source.name} has no fast tokenizer (tokenizer.json), which offsets need; name a model that "
            f"has one"
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise ModelError(f"{source.name} has no pad, unknown or end token; set one in tokenizer_config.json")
    tokenizer.padding_side = "right"
    return tokenizer


def build(
    source: ModelSource, location: Location, kind: str, options: dict[str, Any], *, head_seed: int,
    shapes_only: bool = False,
) -> Built:  # fmt: skip
    """The base model with the head of that kind, in fp32 on the CPU, the head drawn from `head_seed`.

    `shapes_only`: its weights are on the meta device, and nothing of them is read.

    Raises:
        ModelError: it does not load, or weights other than the head's are missing from it.
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    common: dict[str, Any] = {"revision": location.revision, "trust_remote_code": source.trust_remote_code}
    try:
        tokenizer = load_tokenizer(location, source)
        config = AutoConfig.from_pretrained(location.name, **common, **options)
        mapped = config.dtype in (None, torch.float32)
        config.pad_token_id = tokenizer.pad_token_id
        _change(config, source)
        if config.pad_token_id != tokenizer.pad_token_id:
            raise ModelError(
                f"model.config.pad_token_id: padding is the tokenizer's token {tokenizer.pad_token_id}, and a "
                f"head told of another would read padding; leave it out"
            )
        refuse_unfit(config, kind, source.name)
        if hasattr(config, "use_cache"):
            config.use_cache = False  # of keys and values, for who generates: heads here read all at once
        load = _load_body_apart if _prefixes_differ(config, AUTO_CLASSES[kind]) else _load_with_head
        place = {"device_map": "meta"} if shapes_only else {}
        model, missing = load(AUTO_CLASSES[kind], location, config, common | place, head_seed)
    except LOAD_FAULTS as error:
        hint = f"see to its files in {location.name}, or name another model"
        if "trust_remote_code" in str(error):
            hint = "read that code, and if you trust it, set model.trust_remote_code: true"
        what = f"the model {source.name} does not load for {kind}"
        raise ModelError(f"{what}: {_reason(error)}; {hint}") from error
    check_inputs(model, [[tokenizer.pad_token_id]], "max_length")
    heads, stray = _heads(model, missing)
    if stray and not shapes_only:  # without reading the files, what lacks is not known
        raise ModelError(
            f"the checkpoint {source.name} lacks weights of the model itself: {', '.join(stray[:3])}; "
            f"they would be random. Check that it is a whole checkpoint of a {config.model_type} model"
        )
    return Built(model, tokenizer, heads, is_causal(model), mapped)


def language_model(source: ModelSource, location: Location) -> Any:
    """The base as the causal language model that it was published as, in fp32 on the CPU.

    Raises:
        ModelError: it does not load, or its checkpoint lacks weights, the language head's say.
    """
    common: dict[str, Any] = {"revision": location.revision, "trust_remote_code": source.trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(location.name, **common)
        _change(config, source)
        model, missing = _load_whole(AutoModelForCausalLM, location, config, common)
    except LOAD_FAULTS as error:
        raise ModelError(f"{source.name} does not load as a language model: {_reason(error)}") from error
    if missing:
        raise ModelError(
            f"the checkpoint {source.name} lacks a language model's weights, {', '.join(sorted(missing)[:3])}; "
            f"leave measure.forgetting.text out, or name a checkpoint that has them"
        )
    return model


def check_finite(model: Any, source: ModelSource) -> None:
    """Refuse a model with a weight that is not a finite number: whatever is made of it would mean nothing."""
    wrong = [name for name, p in model.named_parameters() if not bool(torch.isfinite(p).all())]
    if wrong:
        raise ModelError(
            f"the checkpoint {source.name} has weights that are not finite numbers, in {', '.join(wrong[:3])}; "
            f"get it anew, or name another model"
        )


def _reason(error: Exception) -> str:
    """What foreign code says went wrong, on one line and not too long; a KeyError says no more than its key."""
    text = " ".join(str(error).split())
    if not text or isinstance(error, KeyError | AttributeError | TypeError):
        text = f"{type(error).__name__}: {text}"
    text = text.rstrip(".")
    return text if len(text) <= MOST_CHARACTERS else f"{text[: MOST_CHARACTERS - 3]}..."


def _change(config: Any, source: ModelSource) -> None:
    """Apply the study's changes to the model's config; transformers itself would accept any name."""
    known = sorted(config.to_dict())
    for name, value in source.config.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it has: {', '.join(known)}"
            raise ModelError(f"model.config.{name}: a {config.model_type} config has no such entry; {hint}")
        setattr(config, name, value)


def _load_whole(
    auto_class: Any, location: Location, config: Any, common: dict[str, Any], *, but_head: bool = False
) -> tuple[Any, set[str]]:
    """The model with its head, and the names of the weights that the checkpoint does not have.

    `but_head`: what is beside the body may have other shapes there; it counts as missing.
    """
    model, info = auto_class.from_pretrained(
        location.name, config=config, dtype=torch.float32, output_loading_info=True,
        use_safetensors=True, ignore_mismatched_sizes=True, **common,
    )  # fmt: skip
    missing, heads = set(info["missing_keys"]), beside_body(model) if but_head else ()
    others = [found for found in info["mismatched_keys"] if not in_head(found[0], heads)]
    if others:  # refused by name, where transformers would point at a report in the log
        name, there, wanted = min(others, key=lambda found: found[0])
        shapes = f"{name} is {tuple(there)} and should be {tuple(wanted)}"
        raise ModelError(
            f"the weights in {location.name} have other shapes than its config.json and the task say: "
            f"{shapes}; name a checkpoint that fits"
        )
    return model, missing | {found[0] for found in info["mismatched_keys"]}


def _load_with_head(
    auto_class: Any, location: Location, config: Any, common: dict[str, Any], head_seed: int
) -> tuple[Any, set[str]]:
    """As `_load_whole`; a head that the checkpoint has, trained on some task, gives way to a drawn one."""
    torch.manual_seed(head_seed)
    model, missing = _load_whole(auto_class, location, config, common, but_head=True)
    heads = beside_body(model)
    drawn = {name for name, _ in model.named_parameters() if in_head(name, heads)}
    if drawn - missing and not common.get("device_map"):
        # All is drawn that would have been, had the checkpoint no head, and in the same order.
        torch.manual_seed(head_seed)
        for name in drawn | missing:
            owner, parameter = model.get_submodule(name.rpartition(".")[0]), model.get_parameter_or_buffer(name)
            owner._is_hf_initialized = parameter._is_hf_initialized = False
        model.initialize_weights()
        missing |= drawn
    return model, missing


def _load_body_apart(
    auto_class: Any, location: Location, config: Any, common: dict[str, Any], head_seed: int
) -> tuple[Any, set[str]]:
    """As `_load_with_head`, the body loaded as a model of its own and put under the head.

    `from_pretrained` with a `key_mapping` would load the same, but would save under the mapped-back names,
    which the class with the head then does not find: a reloaded model would be random.
    """
    torch.manual_seed(head_seed)
    with torch.device("meta"):  # only the head is drawn: drawing a body to overwrite it takes seconds
        model = auto_class.from_config(config, dtype=torch.float32)
    body, missing = _load_whole(AutoModel, location, config, common)
    prefix = model.base_model_prefix
    setattr(model, prefix, body)
    heads = {name.rpartition(".")[0] for name, p in model.named_parameters() if p.is_meta}
    for name in sorted(heads):
        model._init_weights(model.get_submodule(name).to_empty(device="cpu"))
    return model, {f"{name}.weight" for name in heads} | {f"{prefix}.{name}" for name in missing}


def _prefixes_differ(config: Any, auto_class: Any) -> bool:
    """Whether the class with the head calls its body otherwise than the checkpoint does.

    A Llama checkpoint says `model.layers...` and LlamaForQuestionAnswering expects `transformer.layers...`:
    loaded as it is, every weight of the body would silently be random.
    """
    with_head = auto_class._model_mapping.get(type(config), None)
    as_saved = AutoModelForCausalLM._model_mapping.get(type(config), None)
    return bool(with_head and as_saved) and with_head.base_model_prefix != as_saved.base_model_prefix


def key_mapping(model: Any) -> dict[str, str]:
    """What `from_pretrained` needs to load the published base into a model's class; mostly nothing."""
    as_saved = AutoModelForCausalLM._model_mapping.get(type(model.config), None)
    if as_saved is None or as_saved.base_model_prefix == model.base_model_prefix:
        return {}
    return {rf"^{as_saved.base_model_prefix}\.": f"{model.base_model_prefix}."}


def _heads(model: Any, missing: set[str]) -> tuple[tuple[str, ...], list[str]]:
    """The head's modules, and the weights of the body that the checkpoint should have had and has not.

    Many encoders are published without the pooler that a classification head reads; it belongs to the head.
    """
    absent = {name for name in missing if name.startswith(f"{model.base_model_prefix}.")}
    poolers = {name.rpartition(".")[0] for name in absent if "pooler" in name.split(".")}
    stray = sorted(name for name in absent if name.rpartition(".")[0] not in poolers)
    return tuple(sorted({*beside_body(model), *poolers})), stray


def beside_body(model: Any) -> tuple[str, ...]:
    """The modules of a model with a head that lie beside its body."""
    body = f"{model.base_model_prefix}."
    return tuple(sorted({n.split(".")[0] for n, _ in model.named_parameters() if not n.startswith(body)}))


def in_head(name: str, head_names: Sequence[str]) -> bool:
    """Whether a module or parameter of that full name is one of the head's."""
    return any(name == head or name.startswith(f"{head}.") for head in head_names)


def block_linears(model: Any, head_names: Sequence[str]) -> list[str]:
    """The full names of the linear layers of the model's blocks, in its order; there may be none."""
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and any(part.isdigit() for part in name.split("."))
    ]
    return [name for name in names if not in_head(name, head_names)]


def linear_names(model: Any, head_names: Sequence[str], *, attention_only: bool) -> list[str]:
    """The full names of the linear layers of the model's blocks: those that an adapter may adapt."""
    names = block_linears(model, head_names)
    if attention_only:
        names = [name for name in names if "attention" in name or "attn" in name]
    if not names:
        raise ModelError(
            f"no linear layers were found in the blocks of {type(model).__name__} to adapt (GPT-2's are of a "
            f"kind of their own); leave the method out, or name another model"
        )
    return names
