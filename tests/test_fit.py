"""What a run takes is foretold, fits its budget, and goes on with less when memory runs out all the same."""

from __future__ import annotations

import shutil
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed._tools.mem_tracker import MemTracker
from transformers import AutoModelForCausalLM

from finetrial import memory
from finetrial.assemble import open_workbench
from finetrial.batching import collate, heaviest, micro_batches, model_inputs
from finetrial.engines.inline import Inline
from finetrial.errors import DoesNotFit, OutOfMemory
from finetrial.fit import MARGIN, ROOMY, Ladder
from finetrial.packing import Packing
from finetrial.process_memory import budget_of
from finetrial.progress import Progress
from finetrial.records import Fit
from finetrial.schedule import Scheduler
from finetrial.tables import used_rows
from finetrial.train import alone, train
from finetrial.training_state import Progress as Steps
from fragile import TROUBLE
from tiny_runs import folder_of, make_spec, records, run, unmeasured

NO_DROPOUT = {"dropout": 0.0}
pytestmark = pytest.mark.usefixtures("as_in_a_run")


@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=30),
    st.none() | st.integers(1, 9),
    st.none() | st.integers(1, 200),
)
def test_micro_batches_are_the_batch_in_order_and_keep_to_their_bounds(lengths, rows, tokens):
    parts = [lengths[part] for part in micro_batches(lengths, rows=rows, tokens=tokens)]
    assert [length for part in parts for length in part] == lengths
    for part in parts:
        assert len(part) >= 1
        assert rows is None or len(part) <= rows
        assert tokens is None or len(part) == 1 or len(part) * max(part) <= tokens


def test_one_linear_layer_takes_what_can_be_worked_out_by_hand():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(100, 50, bias=False)

        def forward(self, input_ids):
            return {"out": self.layer(input_ids)}

    step = memory.training_step(
        Model(),
        {"input_ids": torch.zeros(8, 100)},
        lambda outputs, batch: outputs["out"].sum(),
        torch.optim.AdamW,
    )
    weight = 100 * 50 * 4
    assert (step.weights, step.gradients) == (weight, weight)
    assert step.optimizer == 2 * weight + 4  # two moments, and the count of steps
    assert step.activations >= 2 * weight  # AdamW's temporaries: the root of a moment, and that divided


def test_a_table_of_which_few_rows_are_read_takes_their_gradient_and_moments_alone(tiny_bert, tmp_path):
    climbed = ladder(spec := make_spec(tiny_bert, "full"), tmp_path)
    tuned, built = climbed.bench.build_tuned()
    features = climbed.bench.encode(climbed.bench.splits.train, built)
    used = used_rows(tuned, features, built.tokenizer.pad_token_id, spec)
    assert used is not None
    rows = sorted({token for feature in features for token in feature.input_ids} | {0})
    assert used.rows.tolist() == rows
    table = used.table.weight
    trained = sum(p.numel() * 4 for p in tuned.parameters()) - 4 * (table.shape[0] - len(rows)) * table.shape[1]
    step = climbed.step(climbed.worst[0], checkpointing=False, split=False)
    assert step.gradients == trained
    assert step.optimizer == pytest.approx(2 * trained, rel=0.01)  # two moments, and the counts of steps
    held = sum(t.numel() * t.element_size() for t in (*tuned.parameters(), *tuned.buffers()))
    assert step.resident == step.weights == held + 4 * len(rows) * table.shape[1]


def test_each_training_of_a_stack_takes_its_own_weights_gradients_moments_and_activations(tiny_bert, tmp_path):
    """And nothing less for the embeddings, which lie on the disk whether it is one or eight."""
    totals = []
    for stacked in (2, 3, 8):
        climbed = ladder(make_spec(tiny_bert, "lora", how={"stacked": stacked}), tmp_path / str(stacked))
        step = climbed.step(climbed.worst[0], checkpointing=False, split=False)
        totals.append(climbed.total(step) - climbed.held)
    tuned, _ = climbed.bench.build_tuned()
    trained = sum(p.numel() * p.element_size() for p in tuned.parameters() if p.requires_grad)
    buffers = step.weights - sum(p.numel() * p.element_size() for p in tuned.parameters())
    own = trained + buffers + step.gradients + step.optimizer + step.activations
    assert totals[1] - totals[0] == own
    assert totals[2] - totals[1] == 5 * own


def ladder(spec, home):
    bench = open_workbench(spec, folder_of(spec, home).home)
    shapes, built = bench.build_tuned(shapes_only=True)
    features = bench.encode(bench.splits.train, built)
    validation = bench.encode(bench.splits.validation, built)
    return Ladder(bench, shapes, features, [validation], built)


def asked(climbed):
    """As the study asks, before anything is chosen."""
    return Fit(device="cpu", budget=climbed.budget, predicted=None, evaluation_tokens=8192)


def over(size):
    """A budget within which so much may be foretold."""
    return int(size / (1 - MARGIN)) + 1


@pytest.mark.parametrize("model", ["tiny_bert", "tiny_llama"])
def test_a_step_foretold_is_what_the_tracker_of_torch_sees(model, request, tmp_path):
    spec = make_spec(request.getfixturevalue(model), "full")
    climbed = ladder(spec, tmp_path)
    shapes, built = climbed.bench.build_tuned(shapes_only=True)  # not the ladder's, which trains few rows
    batch = collate(climbed.worst[0], built.tokenizer.pad_token_id)
    adamw = partial(torch.optim.AdamW, fused=True)
    foretold = memory.training_step(shapes, batch, climbed.bench.task.head.losses, adamw)
    tuned, _ = climbed.bench.build_tuned()
    optimizer = adamw(tuned.parameters())
    tuned.train()
    tracker = MemTracker()
    tracker.track_external(tuned, optimizer, *batch.values())
    peaks = []
    for _ in range(2):
        with tracker:
            climbed.bench.task.head.losses(tuned(**model_inputs(batch)), batch).sum().backward()
            torch.nn.utils.clip_grad_norm_(tuned.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        peaks.append(tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"])
        tracker.reset_mod_stats()
    total = foretold.weights + foretold.gradients + foretold.optimizer + foretold.activations
    assert total == pytest.approx(peaks[1], rel=0.02)


def test_only_what_is_trained_has_gradients_and_an_optimiser(tiny_bert, tmp_path):
    climbed = ladder(make_spec(tiny_bert, "lora"), tmp_path)
    tuned, _ = climbed.bench.build_tuned()
    trained = sum(p.numel() * 4 for p in tuned.parameters() if p.requires_grad)
    step = climbed.step(climbed.worst[0], checkpointing=False, split=False)
    assert step.gradients == trained
    assert 2 * trained <= step.optimizer < 2.1 * trained
    assert step.weights == sum(t.numel() * t.element_size() for t in [*tuned.parameters(), *tuned.buffers()])
    table = tuned.get_input_embeddings().weight
    assert step.weights - step.resident >= table.numel() * 4


def test_no_batch_takes_more_than_is_foretold_be_it_full_short_or_of_the_test(tiny_bert, tmp_path):
    spec = make_spec(tiny_bert, "full", settings={"batch_size": 4})
    climbed = ladder(spec, tmp_path)
    bench, (feature, *_) = climbed.bench, climbed.worst[0]
    _, built = bench.build_tuned(shapes_only=True)

    def of(length):
        return replace(feature, input_ids=[5] * length, token_type_ids=[0] * length)

    def foretold(batches, *evaluated):
        shapes, _ = bench.build_tuned(shapes_only=True)
        those = Ladder(bench, shapes, [of(20)] * 4, evaluated, built)
        those.worst = heaviest(batches)
        return those.largest(asked(those)).predicted - those.held

    # More tokens than the short one, and less attention: either may take more.
    full, short = [of(20)] * 4, [of(79)]
    assert foretold([full, short], [of(1)]) == foretold([short], [of(1)]) > foretold([full], [of(1)])
    short = [of(45)]
    assert foretold([full, short], [of(1)]) == foretold([full], [of(1)]) > foretold([short], [of(1)])
    assert foretold([full], [of(20)], [of(60)] * 40) > foretold([full], [of(20)] * 40)


def test_tables_of_a_model_that_was_published_in_bf16_are_in_memory(tiny_llama, tmp_path):
    """Loading makes fp32 of them, which no file holds."""
    half = tmp_path / "half"
    shutil.copytree(tiny_llama, half)
    AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.bfloat16).save_pretrained(half)
    steps = []
    for model in (tiny_llama, half):
        climbed = ladder(make_spec(model, "lora"), tmp_path / model.name)
        steps.append(climbed.step(climbed.worst[0], checkpointing=False, split=False))
    table = AutoModelForCausalLM.from_pretrained(half, dtype=torch.float32).get_input_embeddings().weight
    assert steps[0].weights == steps[1].weights
    assert steps[1].resident - steps[0].resident == 4 * table.numel()


def test_the_largest_micro_batch_that_fits_is_taken(tiny_bert, tmp_path):
    settings = {"batch_size": 8}
    free = ladder(make_spec(tiny_bert, "full", settings=settings), tmp_path)
    length = len(free.longest.input_ids)
    one, two, three = (
        free.total(free.step([free.longest] * rows, checkpointing=False, split=True)) for rows in (1, 2, 3)
    )
    assert one < two < three < free.budget
    assert free.surely_fits()
    assert free.choose(0).predicted is None
    assert free.largest(asked(free)).tokens is None
    free.budget = over((two + three) // 2)
    assert not free.surely_fits()
    fit = free.choose(0)
    assert (fit.tokens, fit.checkpointing, fit.tight) == (2 * length, False, True)
    assert two == pytest.approx(fit.predicted, rel=1e-3)
    assert [free.choose(halvings).tokens for halvings in (0, 1)] == [2 * length, length]
    assert free.choose(2).checkpointing


def test_checkpointing_is_the_last_resort_and_what_does_not_fit_says_what_takes_how_much(tiny_bert, tmp_path):
    free = ladder(make_spec(tiny_bert, "lora", settings={"batch_size": 8, **NO_DROPOUT}), tmp_path)
    kept = free.total(free.step([free.longest], checkpointing=False, split=True))
    again = free.total(free.step([free.longest], checkpointing=True, split=True))
    assert again < kept
    free.budget = over((again + kept) // 2)
    fit = free.choose(0)
    assert fit.checkpointing
    assert fit.predicted <= (1 - MARGIN) * free.budget
    free.budget = over(again) - 10
    with pytest.raises(DoesNotFit, match=r"one row of \d+ tokens .*weights .*activations .*budget"):
        free.choose(0)


def test_what_a_process_holds_may_vary_by_some_megabytes_and_the_split_does_not(tiny_bert, tmp_path):
    climbed = ladder(make_spec(tiny_bert, "full", settings={"batch_size": 16}), tmp_path)
    one, two = (
        climbed.total(climbed.step([climbed.longest] * rows, checkpointing=False, split=True))
        for rows in (1, 2)
    )
    climbed.budget = over(one + 5 * (two - one))  # six rows
    chosen = []
    for more in (0, two - one, -(two - one)):  # seven rows, and five
        climbed.held -= more
        chosen.append(climbed.choose(0).tokens)
        climbed.held += more
    assert chosen == [4 * len(climbed.longest.input_ids)] * 3


def test_an_attempt_goes_on_with_the_fit_of_the_one_before_it(tiny_bert, tmp_path):
    how = {"memory_bytes": 10**12}
    spec = make_spec(tiny_bert, "full", how=how)
    folder, climbed = folder_of(spec, tmp_path), ladder(spec, tmp_path)
    first = climbed.choose(0)
    folder.write_fit(first)
    climbed.held += 10**9
    assert folder.fit() == first
    assert climbed.choose(0, earlier=folder.fit()) == first
    assert climbed.choose(1, earlier=folder.fit()).halvings == 1
    climbed.budget //= 2
    assert climbed.choose(0, earlier=folder.fit()).budget == climbed.budget
    folder.fit_file.write_text(folder.fit_file.read_text().replace(str(first.predicted), "1"))
    assert folder.fit() is None


def test_the_budget_is_what_the_study_says_or_a_share_of_the_machine():
    assert budget_of(123, 4) == 123
    assert budget_of(None, 1) == pytest.approx(2 * budget_of(None, 2), abs=1)


def test_split_batches_change_no_result_beyond_rounding_and_are_recorded(tiny_llama, tmp_path):
    """The model has no dropout."""
    given = {"settings": {"batch_size": 8, **NO_DROPOUT}}
    whole = make_spec(tiny_llama, "lora", **given, how={"log_steps": 1})
    split = make_spec(tiny_llama, "lora", **given, how={"log_steps": 1, "micro_batch": 3})
    assert whole.run_id == split.run_id
    one, other = run(whole, tmp_path / "whole").training, run(split, tmp_path / "split").training
    assert (one.micro_batches, other.micro_batches) == (1, 3)
    before, after = records(whole, tmp_path / "whole"), records(split, tmp_path / "split")
    losses = [[record["loss"] for record in found if record["kind"] == "train"] for found in (before, after)]
    assert losses[0] == pytest.approx(losses[1], rel=2e-4)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_step_that_proves_the_memory_leaves_no_trace(tiny_bert, tmp_path, method):
    spec = make_spec(tiny_bert, method)
    plain = run(spec, tmp_path / "plain")
    climbed = ladder(spec, tmp_path / "ladder")
    predicted = climbed.largest(asked(climbed)).predicted
    TROUBLE.reset()
    near = make_spec(tiny_bert, method, how={"memory_bytes": int(predicted * 1.3)})  # above the proved share
    proved = run(near, tmp_path / "proved")
    assert TROUBLE.losses == plain.training.steps + 1
    assert unmeasured(proved) == unmeasured(plain)
    folder = folder_of(near, tmp_path / "proved")
    assert folder.fit().proved
    folder.drop_checkpoint()
    TROUBLE.reset()
    again = run(near, tmp_path / "proved")  # a later attempt need not prove it again
    assert TROUBLE.losses == plain.training.steps
    assert unmeasured(again) == unmeasured(plain)


def test_a_run_that_runs_out_of_memory_goes_on_from_its_checkpoint_with_half_as_much(tiny_bert, tmp_path):
    TROUBLE.reset(error_at=(5, MemoryError("no more")))
    spec = make_spec(tiny_bert, "full", how={"checkpoint_steps": 1})
    folder = folder_of(spec, tmp_path)
    finished = []
    Scheduler(folder.home, Inline(), Packing(1), 1, Progress(), finished.append).run([iter([spec])])
    record = finished[0]
    assert [attempt.outcome for attempt in record.attempts] == ["out_of_memory", "done"]
    assert record.attempts[1].from_step == 4
    training = record.result.training
    assert training.resumed_from == (4,)
    assert training.micro_batches == 2
    assert training.micro_batch_tokens is not None


def test_a_run_over_its_budget_ends_and_leaves_a_checkpoint(tiny_bert, tmp_path):
    """What was foretold was too little: every step takes more than the budget."""
    spec = make_spec(tiny_bert, "full")
    folder = folder_of(spec, tmp_path)
    free = ladder(spec, tmp_path)
    bench, built = free.bench, free.bench.build_base()
    features = bench.encode(bench.splits.train, built)
    model, _ = bench.build_tuned()
    fit = asked(free).model_copy(update={"budget": 1_000_000, "predicted": 1})
    with pytest.raises(OutOfMemory, match=r"it took \d+ MB of the 1 MB"):
        alone(train(bench, folder, model, built.tokenizer, features, features, Steps(), fit))
    assert folder.checkpoint_step() == 1


def test_whether_freed_blocks_are_kept_goes_by_the_room_there_is_now(tiny_bert, tmp_path):
    climbed = ladder(make_spec(tiny_bert, "full", how={"packed": True}), tmp_path)
    roomy = climbed.choose(0)
    assert (roomy.tight, roomy.takes) == (False, int(ROOMY * roomy.predicted))
    elsewhere = roomy.model_copy(update={"tight": True, "surplus": 1.0})
    assert climbed.choose(0, earlier=elsewhere) == roomy
    again = climbed.choose(1)  # memory has run out
    assert (again.tight, again.takes) == (True, again.predicted)
    climbed.budget = over(roomy.predicted)
    short = climbed.choose(0)
    assert (short.tight, short.takes) == (True, short.predicted)
