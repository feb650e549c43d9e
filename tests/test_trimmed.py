"""Layers without padding, a last one for the first token alone: losses and gradients are of whole rows."""

from __future__ import annotations

import copy
import functools
import gc
import inspect
import json
import pickle
import weakref

import peft
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from finetrial.memory import LiveBytes, training_step
from finetrial.methods.lora import Lora, Params
from finetrial.plugins import AttachInput
from finetrial.trimmed import Packed, trim

pytestmark = pytest.mark.usefixtures("as_in_a_run")

SIZES = {
    "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4,
    "intermediate_size": 32, "num_labels": 3, "attn_implementation": "sdpa",
}  # fmt: skip
RANK_2 = {"rank": 2, "dropout": 0.1}
KINDS = ["bert", "roberta", "xlm-roberta", "electra"]


NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "classifier_dropout": 0.0}


def model_of(kind: str, make=transformers.AutoModelForSequenceClassification, **changes):
    torch.manual_seed(0)
    return make.from_config(transformers.AutoConfig.for_model(kind, **(SIZES | changes)))


def answering(kind: str, **changes):
    return model_of(
        kind, transformers.AutoModelForQuestionAnswering, **(NO_DROPOUT | {"num_labels": 2} | changes)
    )


def batch(padded: bool):
    ids = torch.randint(5, 40, (4, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if padded:
        mask[1, 6:] = 0
        mask[3, 2:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([0, 2, 1, 1])}


def gradients(model, inputs):
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return float(loss.detach()), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_alike(found, wanted):
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-7, msg=name)


def of_answers(model, inputs):
    """Logits at what is no padding, and the gradients of a sum of them in which each has its own part."""
    model.zero_grad()
    outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
    real = inputs["attention_mask"] == 1
    logits = torch.stack([outputs.start_logits[real], outputs.end_logits[real]])
    (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()
    return {"": logits.detach()} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


NEVER = 1e-12  # a dropout that goes the way of one that drops, and never does
AS_ATTENTION_GOES = pytest.mark.parametrize("p", [0.0, NEVER])


def products(call):
    """Floating-point operations of the products by weights, forwards."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_flop_counts()["Global"][torch.ops.aten.addmm]


def of_layers(model, tokens):
    layers = getattr(model, model.base_model_prefix).encoder
    return 2 * tokens * sum(p.numel() for p in layers.parameters() if p.ndim == 2)


def around(model, places):
    """What of an answering model's products is not of its layers: the head, and ELECTRA's embeddings."""
    return 2 * places * 16 * (2 + 128 * (model.base_model_prefix == "electra"))


@AS_ATTENTION_GOES
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_without_padding_logits_and_gradients_are_those_of_whole_rows(kind, checkpointing, p):
    whole, part = (answering(kind, attention_probs_dropout_prob=p).train() for _ in range(2))
    assert trim(part)
    if checkpointing:
        part.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert_alike(of_answers(part, batch(padded=True)), of_answers(whole, batch(padded=True)))


@AS_ATTENTION_GOES
@pytest.mark.parametrize("make", [answering, model_of])
def test_layers_are_computed_twice_with_gradient_checkpointing(make, p):
    own = {name: each for name, each in batch(padded=True).items() if name != "labels"}
    found = []
    for checkpointing in (False, True):
        model = make("bert", attention_probs_dropout_prob=p).train()
        assert trim(model)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        forward = products(lambda model=model: model(**own))
        found.append(products(lambda model=model: model(**own)[0].sum().backward()) - forward)
    assert found[0] == 0
    assert found[1] > 0.9 * (forward - around(model, own["input_ids"].numel()))


@AS_ATTENTION_GOES
@pytest.mark.parametrize("kind", KINDS)
def test_products_are_of_as_many_tokens_as_there_are(kind, p):
    model, inputs = answering(kind, attention_probs_dropout_prob=p).train(), batch(padded=True)
    assert trim(model)
    own = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    tokens, places = int(own["attention_mask"].sum()), own["input_ids"].numel()
    assert products(lambda: model(**own)) == of_layers(model, tokens) + around(model, places)
    assert products(lambda: model.eval()(**own)) == of_layers(model, places) + around(model, places)


def put_a_hook(model):
    model.bert.encoder.layer[1].intermediate.dense.register_forward_hook(lambda *_: None)


def put_a_module(model):
    class Own(torch.nn.Linear):
        def forward(self, input):
            assert input.ndim == 3
            return super().forward(input)

    model.bert.encoder.layer[1].intermediate.dense.__class__ = Own


def put_a_forward(model):
    inner = model.bert.encoder.layer[1].attention.self
    gate, before = torch.nn.Parameter(torch.ones(1)), inner.forward
    inner.gate = gate

    def gated(*inputs, **options):
        found, weights = before(*inputs, **options)
        return found * gate * 3, weights

    inner.forward = gated


def put_a_wrapper(model):
    """Which bears the name of what it wraps."""
    for layer in model.bert.encoder.layer:
        before = layer.forward

        @functools.wraps(before)
        def centred(hidden, *others, before=before, **options):
            found = before(hidden, *others, **options)
            return found - found.mean(-2, keepdim=True)

        layer.forward = centred


def put_a_wrapper_of_its_own(model):
    put_a_forward(model)
    for layer in model.bert.encoder.layer:
        layer.forward = lambda *given, before=layer.forward, **named: before(*given, **named)


def put_a_loop(model):
    whole = transformers.modeling_outputs.BaseModelOutputWithPastAndCrossAttentions

    def forward(hidden_states, attention_mask=None, **_):
        for layer in model.bert.encoder.layer:
            hidden_states = layer(hidden_states=hidden_states, attention_mask=attention_mask)
        return whole(last_hidden_state=hidden_states)

    model.bert.encoder.forward = forward


def put_a_reader_of_all(model):
    """Of modules that everybody knows, which here are at another place."""
    torch.manual_seed(1)
    layer = torch.nn.TransformerEncoderLayer(16, 2, 16, batch_first=True, dropout=0.0)
    model.bert.encoder.layer[1].output.dense = torch.nn.Sequential(
        model.bert.encoder.layer[1].output.dense, layer
    )


def put_a_decorated_forward(model):
    """On the class, for the time of a test."""
    inner = model.bert.encoder.layer[0].attention.output
    own, before = type(inner), type(inner).forward

    @torch.enable_grad()
    def centred(self, hidden_states, input_tensor):
        found = before(self, hidden_states, input_tensor)
        return found - found.mean(-2, keepdim=True)

    for layer in model.bert.encoder.layer:
        layer.attention.output.__class__ = type(
            own.__name__, (own,), {"forward": centred, "__module__": own.__module__}
        )


def put_a_hook_at_the_end(model):
    def centre(module, given, output):
        output.last_hidden_state = output.last_hidden_state - output.last_hidden_state.mean(1, keepdim=True)

    model.bert.encoder.register_forward_hook(centre)


@pytest.mark.parametrize(
    "put",
    [
        put_a_hook,
        put_a_module,
        put_a_forward,
        put_a_wrapper,
        put_a_wrapper_of_its_own,
        put_a_loop,
        put_a_reader_of_all,
        put_a_decorated_forward,
    ],
)
@pytest.mark.parametrize("make", [answering, model_of])
def test_rows_stay_whole_where_a_method_has_put_something_of_its_own(make, put):
    """The same as if nothing had been trimmed, in training too."""
    plain, trimmed = (make("bert", **NO_DROPOUT).train() for _ in range(2))
    assert trim(trimmed)
    own = {name: each for name, each in batch(padded=True).items() if name != "labels"}
    found = []
    for model in (plain, trimmed):
        put(model)
        logits = model(**own)[0]
        logits.square().sum().backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        found.append(gradients | {"logits": logits.detach()})
    assert products(lambda: trimmed(**own)) == products(lambda: plain(**own))
    assert_alike(found[1], found[0])


def mean_pooled(model):
    pooler = getattr(model.base_model, "pooler", None)
    if pooler is not None:
        pooler.forward = lambda hidden: pooler.activation(pooler.dense(hidden.mean(1)))
        return
    own = model.classifier

    class Mean(torch.nn.Module):
        def forward(self, hidden):
            return own(hidden.mean(1, keepdim=True))

    model.classifier = Mean()


def pooled_by_known_modules(model):
    torch.manual_seed(1)
    pool = torch.nn.AdaptiveAvgPool2d((1, None))
    model.classifier = torch.nn.Sequential(pool, torch.nn.Flatten(1), torch.nn.Linear(16, 3))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    ("kind", "put"),
    [
        ("bert", mean_pooled),
        ("roberta", mean_pooled),
        ("electra", mean_pooled),
        ("bert", put_a_hook_at_the_end),
        ("roberta", pooled_by_known_modules),
        ("bert", lambda model: model.bert.encoder.layer.append(model.bert.encoder.layer[-1])),
        ("bert", lambda model: model.bert.encoder.layer.append(copy.deepcopy(model.bert.encoder.layer[-1]))),
        ("bert", lambda model: setattr(model.bert.encoder, "layer", model.bert.encoder.layer[::-1])),
    ],
)
def test_another_reader_or_order_of_layers_has_what_it_reads(kind, put, padded, checkpointing):
    found = []
    for trimmed in (False, True):
        model = model_of(kind, **NO_DROPOUT).train()
        assert not trimmed or trim(model)
        put(model)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        loss, those = gradients(model, batch(padded))
        found.append(those | {"loss": torch.tensor(loss)})
    assert_alike(found[1], found[0])


@pytest.mark.parametrize("given", [{}, {"attention_mask": torch.ones(4, 9, dtype=torch.int64)}, None])
@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_a_prefix_of_keys_and_values_is_attended_to(kind, given):
    """PEFT's prefix tuning, which hands the encoder keys and values that no layer made."""
    given = {"attention_mask": batch(padded=True)["attention_mask"]} if given is None else given
    config = peft.PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3)
    found = []
    for trimmed in (False, True):
        model = model_of(kind, **NO_DROPOUT)
        assert not trimmed or trim(model)
        torch.manual_seed(5)
        tuned = peft.get_peft_model(model, config).train()
        tuned(input_ids=batch(padded=True)["input_ids"], **given).logits.square().sum().backward()
        found.append({n: p.grad for n, p in tuned.named_parameters() if p.grad is not None})
    assert_alike(found[1], found[0])


def test_a_trimmed_model_is_gone_when_nobody_holds_it():
    gc.collect()
    gc.disable()
    try:
        models = [trimmed_with_adapters() for _ in range(2)]
        there = weakref.WeakSet(module for model in models for module in model.modules())
        del models
        assert not [type(module).__name__ for module in there if isinstance(module, torch.nn.Linear)]
    finally:
        gc.enable()


def trimmed_with_adapters():
    model = model_of("bert").train()
    assert trim(model)
    adapted = Lora().attach(AttachInput(model, "sequence_classification", ("classifier",)), RANK_2, Params())
    adapted(**batch(padded=True)).loss.backward()
    return adapted.get_base_model().base_model.encoder.layer


def test_a_kind_keeps_its_name_and_what_it_can_be_asked(tmp_path):
    model, plain = model_of("bert"), model_of("bert")
    assert trim(model)
    assert inspect.signature(model.forward) == inspect.signature(plain.forward)
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert again.config.architectures == ["BertForSequenceClassification"]
    assert all(
        torch.equal(one, other) for one, other in zip(again.parameters(), plain.parameters(), strict=True)
    )


def test_a_model_can_be_pickled_and_is_then_as_the_library_made_it():
    model = answering("bert")
    assert trim(model)
    adapted = Lora().attach(AttachInput(model, "question_answering", ("qa_outputs",)), RANK_2, Params()).eval()
    own = {name: each for name, each in batch(padded=True).items() if name != "labels"}
    for again in (pickle.loads(pickle.dumps(adapted)), copy.deepcopy(adapted)):
        assert torch.equal(again(**own).start_logits, adapted(**own).start_logits)
        assert type(again.get_base_model()) is transformers.BertForQuestionAnswering
    assert not trim(model)  # it is already


def test_peft_names_the_librarys_class_as_the_base(tmp_path):
    model = answering("bert")
    assert trim(model)
    peft.get_peft_model(model, peft.LoraConfig(target_modules=["query"])).save_pretrained(tmp_path)
    found = json.loads((tmp_path / "adapter_config.json").read_text())["auto_mapping"]
    assert found["parent_library"] == "transformers.models.bert.modeling_bert"
    assert found["base_model_class"] == "BertForQuestionAnswering"


def longer(model):
    """Positions of its own before those of a batch: a soft prompt."""
    before = model.bert.encoder.forward

    def forward(hidden_states, attention_mask=None, **others):
        grown = torch.cat([hidden_states[:, :1].expand(-1, 30, -1), hidden_states], dim=1)
        mask = attention_mask if attention_mask is None else attention_mask[..., :1, :1].expand(-1, -1, 1, 39)
        found = before(grown, attention_mask=mask, **others)
        found.last_hidden_state = found.last_hidden_state[:, 30:]
        return found

    model.bert.encoder.forward = forward


def doubled(model):
    """Rows twice: two passes with other dropout, to be compared."""
    before = model.forward

    def forward(input_ids, attention_mask, **others):
        return before(torch.cat([input_ids] * 2), attention_mask=torch.cat([attention_mask] * 2), **others)

    model.forward = forward


@pytest.mark.parametrize("change", [longer, doubled])
def test_a_batch_that_a_method_makes_another_of_counts_whole(change):
    found = []
    for trimmed in (False, True):
        model = answering("bert").train()
        assert not trimmed or trim(model)
        change(model)
        own = {name: each for name, each in batch(padded=True).items() if name != "labels"}
        found.append(training_step(model, own, lambda out, _: out[0].sum(1), torch.optim.AdamW).activations)
    assert found[1] == pytest.approx(found[0], rel=0.1)


def test_what_bears_a_librarys_name_is_not_its():
    """A model's own code (`trust_remote_code`) may call its layers as another model does."""

    class BertLayer(torch.nn.Module):
        pass

    model = answering("bert")
    model.bert.encoder.layer[1] = BertLayer()
    assert not trim(model)


def test_rows_stay_whole_where_padding_is_on_the_left():
    model, inputs = answering("bert").train(), batch(padded=True)
    assert trim(model)
    own = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"].flip(1)}
    places = own["input_ids"].numel()
    assert products(lambda: model(**own)) == of_layers(model, places) + around(model, places)


def test_a_row_is_dropped_from_alike_whatever_the_padding_of_others():
    """As in a stack, where a training without padding may have neighbours with some."""
    inputs = batch(padded=False)
    model = answering("bert", attention_probs_dropout_prob=0.5).train()
    assert trim(model)
    torch.manual_seed(3)
    alone = model(input_ids=inputs["input_ids"]).start_logits
    torch.manual_seed(3)
    ids = torch.nn.functional.pad(inputs["input_ids"], (0, 4))
    padded = model(input_ids=ids, attention_mask=(torch.arange(13) < 9).long().expand(4, -1))
    torch.testing.assert_close(padded.start_logits[:, :9], alone, rtol=1e-4, atol=1e-6)


def test_attention_that_is_not_to_drop_does_not():
    model, inputs = answering("bert", attention_probs_dropout_prob=0.5).train(), batch(padded=True)
    assert trim(model)
    for layer in model.bert.encoder.layer:
        layer.attention.eval()
    first, second = (model(input_ids=inputs["input_ids"]).start_logits for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("make", [answering, model_of])
@pytest.mark.parametrize("lengths", [[64] * 15 + [63], [64] + [32] * 15, [64] * 16])
def test_memory_is_counted_for_as_many_tokens_as_there_are(make, p, checkpointing, lengths):
    size = {"hidden_size": 64, "intermediate_size": 256, "attention_probs_dropout_prob": p}
    counted, real = (make("bert", **size).train() for _ in range(2))
    mask = (torch.arange(64) < torch.tensor(lengths)[:, None]).long()
    own = {"input_ids": torch.ones(16, 64, dtype=torch.int64), "attention_mask": mask}
    for model in (counted, real):
        assert trim(model)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    step = training_step(counted, own, lambda out, _: out[0].flatten(1).sum(1), torch.optim.AdamW)
    with LiveBytes() as live:
        real(**own)[0].sum().backward()
    assert 0.95 < live.peak / (step.weights + step.activations + step.gradients) < 1.0


@given(st.lists(st.integers(1, 7), min_size=1, max_size=6), st.integers(0, 99))
def test_tokens_laid_out_in_rows_again_are_where_they_were(lengths, seed):
    torch.manual_seed(seed)
    real = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    rows = torch.randn(*real.shape, 3, requires_grad=True)
    packed = Packed(lengths, max(lengths), None)
    tokens = packed.pack(rows)
    assert torch.equal(tokens, rows[real])
    again = packed.unpack(tokens)
    assert torch.equal(again[real], rows[real])
    assert torch.equal(tokens[packed.firsts], rows[:, 0])
    weights = torch.randn_like(rows)
    (again * weights).sum().backward()
    assert torch.equal(rows.grad, torch.where(real[..., None], weights, 0))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_are_those_of_the_whole_layer(kind, padded):
    whole, part = (model_of(kind, **NO_DROPOUT).train() for _ in range(2))
    assert trim(part)
    (loss, wanted), (again, found) = (gradients(model, batch(padded)) for model in (whole, part))
    assert again == pytest.approx(loss, rel=1e-6)
    assert_alike(found, wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_it_does_less_in_training_and_all_in_evaluation(kind):
    model = model_of(kind)
    assert trim(model)
    own = {"input_ids": batch(padded=False)["input_ids"]}
    less = products(lambda: model.eval()(**own)) - products(lambda: model.train()(**own))
    # Of the last layer 8 of 9 positions' query, output and feed-forward part.
    assert less == 2 * 4 * 8 * (2 * 16 * 16 + 2 * 16 * 32)


def test_dropout_keeps_the_mean_of_the_loss():
    """Each draw differs; over many, both means lie within four standard errors of each other."""
    losses = []
    for narrowed in (False, True):
        model = model_of("bert", hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2).train()
        assert not narrowed or trim(model)
        with torch.no_grad():
            losses.append(torch.stack([model(**batch(padded=True)).loss for _ in range(400)]))
    error = sum(float(loss.var()) / len(loss) for loss in losses) ** 0.5
    assert abs(float(losses[0].mean() - losses[1].mean())) < 4 * error


def test_other_models_are_left_alone():
    assert not trim(model_of("bert", is_decoder=True))
    assert not trim(model_of("bert", chunk_size_feed_forward=4))
    small = {"vocab_size": 40, "dim": 16, "n_layers": 2, "n_heads": 4, "hidden_dim": 32}
    config = transformers.AutoConfig.for_model("distilbert", **small)
    assert not trim(transformers.AutoModelForSequenceClassification.from_config(config))
