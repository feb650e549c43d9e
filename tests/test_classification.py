"""Classification: metrics against values worked elsewhere, labels and splits, and inputs of both kinds."""

from __future__ import annotations

import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats as scipy_stats
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from finetrial.batching import collate
from finetrial.errors import DataError, Diverged
from finetrial.heads.classification import Classification, ClassificationParams, metrics
from finetrial.plugins import Splits, load

HEAD = Classification()


@pytest.fixture(scope="session")
def tokenizer(tiny_bert):
    return AutoTokenizer.from_pretrained(tiny_bert)


def example(text="a text", label=0, classes=("0", "1"), key="x", **more):
    return {"id": key, "text": text, "label": label, "classes": classes, **more}


def test_two_classes_by_hand():
    # True positives 3, false positives 1, false negatives 2, true negatives 4.
    true = np.array([1, 1, 1, 1, 1, 0, 0, 0, 0, 0])
    predicted = np.array([1, 1, 1, 0, 0, 1, 0, 0, 0, 0])
    found = metrics(true, predicted, 2)
    assert found["accuracy"] == pytest.approx(70.0)
    assert found["f1"] == pytest.approx(100 * 2 * 3 / (2 * 3 + 1 + 2))
    assert found["matthews"] == pytest.approx(100 * (3 * 4 - 1 * 2) / np.sqrt(4 * 5 * 5 * 6))


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=2, max_size=40))
def test_matthews_of_two_classes_is_pearsons_correlation(pairs):
    true, predicted = np.array(pairs).T
    found = metrics(true, predicted, 2)["matthews"]
    if len(set(true)) == 2 and len(set(predicted)) == 2:
        assert found == pytest.approx(100 * scipy_stats.pearsonr(true, predicted).statistic, abs=1e-6)
        agreement = np.array([[sum((true == t) & (predicted == p)) for p in (0, 1)] for t in (0, 1)])
        phi = np.sqrt(scipy_stats.chi2_contingency(agreement, correction=False).statistic / len(true))
        assert abs(found) == pytest.approx(100 * phi, abs=1e-6)
    else:
        assert found == 0.0


def test_three_classes_against_the_worked_example_of_r_k():
    # Confusion (rows true) [[2, 1, 0], [1, 3, 0], [0, 1, 2]]: c = 7, s = 10, t = (3, 4, 3), p = (3, 5, 2),
    # R_K = (c s - t.p) / sqrt((s^2 - p.p) (s^2 - t.t)) = (70 - 35) / sqrt(62 * 66).
    true = np.repeat([0, 0, 1, 1, 2, 2], [2, 1, 1, 3, 1, 2])
    predicted = np.repeat([0, 1, 0, 1, 1, 2], [2, 1, 1, 3, 1, 2])
    found = metrics(true, predicted, 3)
    assert found["accuracy"] == pytest.approx(70.0)
    assert found["matthews"] == pytest.approx(100 * 35 / np.sqrt(62 * 66))
    # F1 per class 2*2/(3+3), 2*3/(4+5), 2*2/(3+2); macro is their plain mean.
    assert found["f1"] == pytest.approx(100 * (4 / 6 + 6 / 9 + 4 / 5) / 3)
    # A class that neither side has takes no part in the mean.
    assert metrics(true, predicted, 4)["f1"] == pytest.approx(found["f1"])


def test_saying_always_the_same():
    true = np.array([1, 1, 0])
    assert metrics(true, np.ones(3, int), 2) == pytest.approx(
        {"accuracy": 200 / 3, "f1": 80.0, "matthews": 0.0}
    )
    assert metrics(true, np.zeros(3, int), 2) == pytest.approx(
        {"accuracy": 100 / 3, "f1": 0.0, "matthews": 0.0}
    )
    with pytest.raises(ValueError, match="cannot be compared"):
        metrics(true, np.ones(2, int), 2)


def test_the_losses_are_cross_entropies_in_single_precision():
    logits = torch.tensor([[1.0, 2.0, 0.5], [0.0, -1.0, 3.0]])
    batch = {"labels": torch.tensor([1, 0])}
    values = logits.double().numpy()
    expected = np.log(np.exp(values).sum(axis=1)) - values[[0, 1], [1, 0]]
    losses = HEAD.losses(SimpleNamespace(logits=logits.bfloat16()), batch)
    assert losses.dtype == torch.float32
    assert losses.tolist() == pytest.approx(expected, rel=1e-6)


def test_scores_follow_rows_and_not_the_order_of_inputs():
    rows = [example(label=label, key=key) for key, label in (("a", 0), ("b", 1), ("c", 1))]
    features = [SimpleNamespace(row=row) for row in (2, 0, 1)]
    logits = [np.array(x, np.float32) for x in ([0.0, 1.0], [2.0, 1.0], [3.0, 1.0])]  # c: 1, a: 0, b: 0
    scored = HEAD.score(logits, features, rows, ClassificationParams())
    assert scored.per_example == {"a": 100.0, "b": 0.0, "c": 100.0}
    assert scored.metrics["accuracy"] == pytest.approx(200 / 3)
    assert scored.calibration == {}
    with pytest.raises(Diverged, match="non-finite logits for a"):
        HEAD.score([logits[0], np.array([np.nan, 0.0]), logits[2]], features, rows, ClassificationParams())


def test_baselines_take_the_majority_from_train_and_score_on_test():
    train = [example(label=label) for label in (1, 1, 0)]
    test = [example(label=label) for label in (0, 0, 0, 1)]
    found = HEAD.baselines(Splits(train, test, test), ClassificationParams())
    assert found["majority"] == pytest.approx({"accuracy": 25.0, "f1": 40.0, "matthews": 0.0})
    # Guessing 0 or 1 alike for one positive and three negatives: F1 is 2/(2 + false positives) if the
    # positive is guessed, else 0; E = 1/2 * sum of Binomial(3, 1/2) weights * 2/(2 + k) = 0.5875 * ...
    expected = 50.0 * sum(scipy_stats.binom.pmf(k, 3, 0.5) * 2 / (2 + k) for k in range(4))
    assert found["uniform"]["accuracy"] == 50.0
    assert found["uniform"]["f1"] == pytest.approx(expected, abs=5.0)  # 200 draws: standard error 2.2
    assert found == HEAD.baselines(Splits(train, test, test), ClassificationParams())


def test_always_saying_the_class_that_f1_is_of_is_a_baseline():
    """With 40 % of the last class, rarer in train: precision 0.4, recall 1, so F1 = 0.8 / 1.4."""
    train = [example(label=label) for label in (0, 0, 1)]
    test = [example(label=label) for label in (0, 0, 0, 1, 1)]
    found = HEAD.baselines(Splits(train, test, test), ClassificationParams())
    assert found["majority"]["f1"] == 0.0
    assert found["always_last"] == pytest.approx({"accuracy": 40.0, "f1": 80 / 1.4, "matthews": 0.0})
    often = [example(label=label) for label in (0, 1, 1)]
    assert "always_last" not in HEAD.baselines(Splits(often, test, test), ClassificationParams())


def test_an_encoder_gets_the_tokenizers_own_pairs(tokenizer):
    rows = [example("one text here", text_pair="another"), example("two", text_pair="")]
    first, second = HEAD.encode(rows, tokenizer, ClassificationParams(), causal=False)
    pair = tokenizer("one text here", "another")
    assert (first.input_ids, first.token_type_ids) == (pair["input_ids"], pair["token_type_ids"])
    assert tokenizer.decode(first.input_ids[slice(*first.content)]) == "one text here [SEP] another"
    assert second.content == (1, 2)
    (single,) = HEAD.encode([example("one text")], tokenizer, ClassificationParams(), causal=False)
    assert single.input_ids == tokenizer("one text")["input_ids"]
    (empty,) = HEAD.encode([example("")], tokenizer, ClassificationParams(), causal=False)
    assert empty.content[1] > empty.content[0]


@pytest.mark.parametrize("causal", [False, True])
def test_of_a_long_pair_the_longer_text_is_cut(tokenizer, causal):
    rows = [example("one " * 50, text_pair="two two two")]
    (feature,) = HEAD.encode(rows, tokenizer, ClassificationParams(max_length=16), causal=causal)
    words = tokenizer.decode(feature.input_ids).split()
    assert len(feature.input_ids) == 16
    assert words.count("two") == 3
    (even,) = HEAD.encode([example("one " * 50, text_pair="two " * 50)], tokenizer,
                          ClassificationParams(max_length=16), causal=causal)  # fmt: skip
    words = tokenizer.decode(even.input_ids).split()
    assert abs(words.count("one") - words.count("two")) <= 1


@pytest.mark.parametrize("pad", ["[PAD]", "[SEP]"], ids=["own pad token", "pad is the end token"])
def test_a_decoder_reads_the_same_token_with_and_without_padding(tiny_llama, pad):
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama, pad_token=pad)
    rows = [example("a short text", key="a"), example("a text that is a good deal longer than it", key="b")]
    features = HEAD.encode(rows, tokenizer, ClassificationParams(), causal=True)
    ends_in_mark = features[0].input_ids[-1] == tokenizer.sep_token_id
    assert ends_in_mark == (pad == "[PAD]")
    assert tokenizer.decode(features[0].input_ids[slice(*features[0].content)]) == "a short text"
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(
        tiny_llama, num_labels=2, pad_token_id=tokenizer.pad_token_id
    ).eval()

    def logits(chosen):
        batch = collate(chosen, tokenizer.pad_token_id)
        with torch.no_grad():
            outputs = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        return np.stack(HEAD.predictions(outputs, batch))

    alone, together = logits(features[:1]), logits(features)
    np.testing.assert_allclose(together[0], alone[0], atol=1e-6)
    # ... and it is the last token, the only one that has seen all of them.
    changed = HEAD.encode([example("a short book")], tokenizer, ClassificationParams(), causal=True)
    assert np.abs(logits(changed)[0] - alone[0]).max() > 1e-6


def make(base, task="classification", **params):
    plugin = load("tasks", task)
    checked = plugin.Params.model_validate(params)
    assert plugin.Params.model_validate(checked.model_dump(mode="json")) == checked
    return plugin.splits(checked, base)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


COUNT = itertools.count()


def rows_of(labels, name="text"):
    """Rows that no other call gives: splits must not share them."""
    return [{name: f"text {next(COUNT)}", "label": label} for label in labels]


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        ([0, 1] * 10, ("0", "1")),
        (["10", "9", "1"] * 10, ("1", "9", "10")),  # numbers as text sort as numbers
        (["no", "yes", "maybe"] * 10, ("maybe", "no", "yes")),
        ([True, False] * 10, ("false", "true")),
        ([-1, 1] * 10, ("-1", "1")),  # -1 hides a label only where train does not use it
        ([1.0, 3.0] * 10, ("1", "3")),
    ],
)
def test_labels_get_numbers_in_sorted_order(tmp_path, labels, classes):
    write(tmp_path / "train.jsonl", rows_of(labels))
    write(tmp_path / "test.jsonl", rows_of(labels[:3]))
    splits = make(tmp_path, data={"train": "train.jsonl", "test": "test.jsonl"})
    assert splits.train[0]["classes"] == classes
    options = HEAD.model_options(splits, ClassificationParams())
    assert options["num_labels"] == len(classes)
    assert options["id2label"] == dict(enumerate(classes))
    assert [classes[row["label"]] for row in splits.test] == [
        str(label).lower().removesuffix(".0") for label in labels[:3]
    ]


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        ([0, 1] * 10, [0, 1, -1], r"test.jsonl line 3: the label is -1, .*official dev set as test"),
        ([0, 1] * 10, [0, 2], r"test.jsonl line 2 \(test\): the label 2 is not in train, which has 0, 1"),
        ([0, 1, "x"] * 10, [0], r"train.jsonl line 3: the labels are texts \('x'\) and numbers \(0\)"),
        ([0, 1, None] * 10, [0], r"train.jsonl line 3: the label is None"),
        ([0.5, 1.2] * 10, [0], r"train.jsonl line 1: the label is 0.5"),
        ([1] * 10, [1], r"train has only the label 1; classification needs 2"),
        (list(range(1001)), [1], r"train has 1001 labels"),
    ],
)
def test_labels_that_cannot_be_used_are_named(tmp_path, train, test, message):
    write(tmp_path / "train.jsonl", rows_of(train))
    write(tmp_path / "test.jsonl", rows_of(test))
    with pytest.raises(DataError, match=message):
        make(tmp_path, data={"train": "train.jsonl", "test": "test.jsonl"})


def test_texts_that_cannot_be_used_are_named(tmp_path):
    write(tmp_path / "train.jsonl", [*rows_of([0, 1] * 10), {"text": 5, "label": 0}])
    with pytest.raises(DataError, match=r"train.jsonl line 21: text is 5, not text"):
        make(tmp_path, data={"train": "train.jsonl"}, test_share=0.2)
    write(tmp_path / "train.jsonl", rows_of([0, 1] * 10, name="sentense"))
    with pytest.raises(
        DataError, match=r"no column 'sentence'; the nearest is 'sentense'.*columns: {text: sent"
    ):
        make(tmp_path, "sst2", data={"train": "train.jsonl"}, test_share=0.2)
    splits = make(
        tmp_path, "sst2", data={"train": "train.jsonl", "columns": {"text": "sentense"}}, test_share=0.2
    )
    assert splits.train[0]["text"].startswith("text ")
    with pytest.raises(DataError, match=r"columns.txt: .*did you mean 'text'\?"):
        make(tmp_path, data={"train": "train.jsonl", "columns": {"txt": "sentense"}}, test_share=0.2)


def test_missing_splits_are_cut_off_train_with_the_labels_shares(tmp_path):
    write(tmp_path / "train.jsonl", rows_of([0, 0, 0, 1] * 50))
    splits = make(tmp_path, data={"train": "train.jsonl"}, test_share=0.2, validation_rows=8)
    assert [len(rows) for rows in (splits.train, splits.validation, splits.test)] == [144, 8, 40]
    assert sum(row["label"] for row in splits.test) == 10
    assert sum(row["label"] for row in splits.validation) == 2
    ids = {row["id"] for rows in (splits.train, splits.validation, splits.test) for row in rows}
    assert len(ids) == 192
    again = make(tmp_path, data={"train": "train.jsonl"}, test_share=0.2, validation_rows=4)
    assert {row["id"] for row in again.validation} < {row["id"] for row in splits.validation}


def test_each_preset_is_judged_as_published():
    names = {name: load("tasks", name).metric.name for name in ("sst2", "mrpc", "rte", "classification")}
    assert names == {"sst2": "accuracy", "mrpc": "f1", "rte": "accuracy", "classification": "accuracy"}
    task = load("tasks", "classification")
    params = task.Params.model_validate({"data": "a/b", "metric": "matthews"})
    assert task.metric_for(params).worst == -100.0


@pytest.mark.parametrize(
    ("task", "files", "majority", "test_rows"),
    [
        ("sst2", {"train": "train.jsonl", "test": "validation.jsonl"}, ("accuracy", 50.917), 872),
        # MRPC's test set: 1,147 of 1,725 pairs are paraphrases; saying always yes gives the published
        # baseline of 66.5 accuracy and 79.9 F1 (Dolan and Brockett 2005; GLUE's table).
        ("mrpc", {r: f"{r}.jsonl" for r in ("train", "validation", "test")}, ("f1", 79.875), 1725),
        ("rte", {"train": "train.jsonl", "test": "validation.jsonl"}, ("accuracy", 52.708), 277),
    ],
)
def test_the_real_data_gives_the_known_majority_baselines(real_data, task, files, majority, test_rows):
    splits = make(real_data / task, task, data=files)
    assert len(splits.test) == test_rows
    scores = HEAD.baselines(splits, ClassificationParams())["majority"]
    assert scores[majority[0]] == pytest.approx(majority[1], abs=5e-4)
