"""A step: the batch is the science, the micro-batch is the hardware's; and what a step that fails leaves."""

from dataclasses import replace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from tiny import (
    LAYERS,
    Ceiling,
    backward,
    cut_of,
    documents_of,
    documents_of_sources,
    one_by_one,
    poison,
    random_text,
    watch_micro_batches,
)

from job.core.data.mixture import Portion
from job.core.data.packing import pack_evenly
from job.core.errors import CannotFitError, DivergedError, PeerLostError, StopRequestedError
from job.core.plan.course import course_of, plan_course
from job.core.recipe.schema import LoraSection
from job.tune.data.micro_batch import micro_batch
from job.tune.engines.autograd import AutogradEngine
from job.tune.engines.engine import adopt_or_shrink
from job.tune.loop import step as step_module


def test_how_a_batch_is_cut_changes_neither_losses_nor_weights(start, tmp_path, tokenizer):
    """Eight examples of 16 tokens each: all at once, two at a time, one at a time."""
    pairs = [(random_text(14 - n, seed=n), random_text(n, seed=50 + n)) for n in (1, 13, 2, 9, 1, 5, 12, 3)]
    documents = documents_of(tmp_path / "even", tokenizer, pairs)
    runs = {}
    for together in (8, 2, 1):
        made = start(documents=documents, batch_size=8, steps=4, micro_batch_tokens=16 * together)
        cuts = []
        watch_micro_batches(made, lambda batch, cuts=cuts: cuts.append(len(batch.documents)))
        runs[together] = made.run(evaluate_every=100)
        assert set(cuts) == {together}
        assert len(cuts) == 4 * 8 / together
    for other in (runs[2], runs[1]):
        assert other.progress.losses == pytest.approx(runs[8].progress.losses, rel=1e-5)
        assert other.progress.grad_norms == pytest.approx(runs[8].progress.grad_norms, rel=1e-5)
        for mine, theirs in zip(other.adapter(), runs[8].adapter(), strict=True):
            assert theirs.any()
            # Adam divides by the gradient's own size: where that is near zero, rounding shows more than elsewhere.
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=5e-5 * float(theirs.abs().max()))


def test_every_target_token_of_a_step_counts_the_same(start, documents):
    made = start(batch_size=8, steps=1, micro_batch_tokens=64, optimizer="sgd", learning_rate=1.0, schedule="constant")
    made.model.eval()
    total, gradients = backward(made.model, one_by_one(documents))
    targets = int(documents.targets.sum())
    assert max(documents.targets) > 10 * min(documents.targets)

    made.run(evaluate_every=100)
    assert made.progress.losses == [pytest.approx(total / targets, rel=1e-5)]
    norm = torch.stack([(g / targets).norm() for g in gradients.values()]).norm().item()
    assert made.progress.grad_norms == [pytest.approx(norm, rel=1e-5)]


def test_of_several_sources_each_ones_loss_is_that_of_its_own_targets(start, tmp_path, tokenizer):
    pairs = [(random_text(14 - n, seed=n), random_text(n, seed=50 + n)) for n in (1, 13, 2, 9, 1, 5, 12, 3)]
    documents = documents_of_sources(tmp_path / "two", tokenizer, [pairs[:3], pairs[3:]])
    own = [np.flatnonzero(documents.sources == source) for source in (0, 1)]
    made = start(documents=documents, batch_size=8, steps=1, micro_batch_tokens=32, optimizer="sgd")
    made.course = course_of(made.recipe.train, examples=[Portion(examples=len(rows)) for rows in own])
    made.model.eval()
    totals = [backward(made.model, [micro_batch(documents, [row]) for row in rows])[0] for rows in own]

    made.run(evaluate_every=100)
    [losses] = made.progress.source_losses
    assert losses == [
        pytest.approx(total / documents.targets[rows].sum(), rel=1e-5) for total, rows in zip(totals, own, strict=True)
    ]
    assert sum(totals) / documents.targets.sum() == pytest.approx(made.progress.losses[0], rel=1e-5)


def test_a_step_that_has_nothing_of_a_source_has_no_loss_of_it(start, tmp_path, tokenizer):
    pairs = [(random_text(6, seed=n), random_text(4, seed=50 + n)) for n in range(8)]
    documents = documents_of_sources(tmp_path / "two", tokenizer, [pairs[:7], pairs[7:]])
    made = start(documents=documents, batch_size=2, steps=4, micro_batch_tokens=32)
    made.course = course_of(made.recipe.train, examples=[Portion(examples=7), Portion(examples=1)])
    made.run(evaluate_every=100)
    assert [loss is None for _, loss in made.progress.source_losses].count(False) == 1
    assert all(loss is not None for loss, _ in made.progress.source_losses)


# --- not finite ---


@pytest.mark.parametrize("how", ["inf", "nan", "gradient"])
@pytest.mark.parametrize("optimizer", ["adamw_torch", "adamw_8bit"])
def test_a_step_that_is_not_finite_ends_the_run_with_the_weights_before_it(how, optimizer, start):
    made = start(steps=8, optimizer=optimizer, schedule="constant")
    clean = start(steps=3, optimizer=optimizer, schedule="constant").run(evaluate_every=100, checkpoint_every=100)
    poison(made, 4, how)
    with pytest.raises(DivergedError, match=r"step 4: .*not applied.*train\.jsonl:\d"):
        made.run(evaluate_every=100, checkpoint_every=100)
    assert made.progress.step == 3
    assert made.committed == [0]
    assert [record.step for record in made.records] == [1, 2, 3]
    for mine, theirs in zip(made.adapter(), clean.adapter(), strict=True):
        assert torch.equal(mine, theirs)


# --- out of memory ---


def test_out_of_memory_makes_smaller_micro_batches_of_the_same_step(start):
    lora = LoraSection(r=8, alpha=16, targets=("v_proj", "lm_head"), dropout=0.1)
    made = start(lora=lora, batch_size=8, steps=3, micro_batch_tokens=300)
    ceiling = Ceiling(made, 80)
    made.engine, adopted = AutogradEngine(made.model, made.accelerator.backward), []
    made.engine.adopt = lambda cut: adopted.append(cut.micro_batch_tokens)
    made.run(evaluate_every=100)
    assert adopted == [150, 75]
    planned = start(lora=lora, batch_size=8, steps=3, micro_batch_tokens=75).run(evaluate_every=100)

    assert made.records[0].setbacks.cuts == (cut_of(150), cut_of(75))
    assert made.cuts == [cut_of(150), cut_of(75)]
    assert made.progress.cut == cut_of(75)
    assert len(ceiling.failed) == 2  # the smaller cut is kept for the steps after
    # Dropout is a matter of the step and the micro-batch, so this is to the bit the run that had been planned so.
    assert made.progress.losses == planned.progress.losses
    assert made.progress.grad_norms == planned.progress.grad_norms
    for mine, theirs in zip(made.adapter(), planned.adapter(), strict=True):
        assert torch.equal(mine, theirs)


def test_masks_of_dropout_are_other_ones_in_each_step_and_micro_batch(start):
    lora = LoraSection(r=8, alpha=16, targets=("v_proj", "lm_head"), dropout=0.1)
    made, seeds = start(lora=lora, batch_size=8, steps=3, micro_batch_tokens=64), []
    made.model.seed_dropout = seeds.append
    made.run(evaluate_every=100)
    again, others = start(lora=lora, batch_size=8, steps=3, micro_batch_tokens=64), []
    again.model.seed_dropout = others.append
    again.run(evaluate_every=100)

    assert len(set(seeds)) == len(seeds) > 3
    assert others == seeds


class Scarce:
    """An engine on which nothing fits; which cuts it is asked to adopt."""

    compiler_failure = None
    recompilations = ()

    def __init__(self):
        self.asked = []

    def accumulate(self, batch, *, targets, seed):
        raise torch.OutOfMemoryError

    def adopt(self, cut):
        self.asked.append((cut.micro_batch_tokens, cut.kept_layers, cut.checkpointing))


def test_what_costs_least_is_done_first_when_memory_runs_out(start, documents):
    longest = int(documents.lengths.max())
    made = start(batch_size=8, steps=1, micro_batch_tokens=15000)
    made.progress.cut = replace(made.progress.cut, kept_layers=2)
    made.engine = Scarce()
    with pytest.raises(CannotFitError, match="one example of"):
        made.run()

    weights = [(7500, 2, False), (4096, 2, False), (4096, 0, False)]
    halved = [(size, 0, False) for size in (2048, 1024, 512, 256, 128, 64, longest)]
    assert made.engine.asked == [*weights, *halved, (longest, 0, True)]


class Robbed(Scarce):
    """One that has no room for dequantised weights, which another process has taken."""

    def accumulate(self, batch, *, targets, seed):
        if self.asked:
            raise StopRequestedError("far enough")
        raise torch.OutOfMemoryError

    def adopt(self, cut):
        super().adopt(cut)
        if cut.kept_layers:
            raise torch.OutOfMemoryError


def test_dequantised_weights_that_no_longer_fit_are_not_kept_when_a_smaller_cut_is_adopted(start):
    made = start(batch_size=8, steps=1, micro_batch_tokens=15000)
    made.progress.cut = replace(made.progress.cut, kept_layers=2)
    made.engine = Robbed()
    with pytest.raises(StopRequestedError, match="far enough"):
        made.run()
    assert made.engine.asked == [(7500, 2, False), (7500, 0, False)]
    assert made.progress.cut == cut_of(7500)


def test_a_cut_that_fits_no_more_is_adopted_without_dequantised_weights_or_not_at_all():
    cut, engine = cut_of(7500, kept_layers=2), Robbed()
    smaller = adopt_or_shrink(engine, cut)
    assert smaller == cut_of(7500)
    assert adopt_or_shrink(engine, smaller) == smaller
    assert engine.asked == [(7500, 2, False), (7500, 0, False), (7500, 0, False)]

    engine.adopt = scarce = Mock(side_effect=torch.OutOfMemoryError)
    with pytest.raises(torch.OutOfMemoryError):
        adopt_or_shrink(engine, smaller)
    scarce.assert_called_once()


def test_micro_batches_are_packed_with_the_grain_of_the_cut(start, documents):
    """64 tokens, with cuts as small as these; packed without it they would differ."""
    lengths = documents.lengths.tolist()
    most = next(n for n in range(64, 128) if pack_evenly(lengths, most=n, grain=64) != pack_evenly(lengths, most=n))
    made, seen = start(batch_size=8, steps=1, micro_batch_tokens=most), []
    watch_micro_batches(made, lambda batch: seen.append(sorted(batch.document_lengths)))
    made.run(evaluate_every=100)

    packs = pack_evenly(lengths, most=most, grain=64)
    assert sorted(seen) == sorted(sorted(lengths[i] for i in members) for members in packs)


def test_memory_of_a_failed_micro_batch_is_free_when_it_is_tried_again(start):
    made = start(batch_size=8, steps=1, micro_batch_tokens=300)
    ceiling = Ceiling(made, 80)
    made.engine, held = AutogradEngine(made.model, made.accelerator.backward), []
    made.engine.adopt = lambda _cut: held.append(ceiling.failed[-1]() is not None)
    made.run(evaluate_every=100)
    assert held == [False, False]


def test_one_example_that_does_not_fit_is_tried_with_its_activations_recomputed(start, documents):
    made = start(batch_size=8, steps=2, micro_batch_tokens=64)
    longest = int(documents.lengths.max())
    Ceiling(made, longest - 1, lean=longest)
    made.run(evaluate_every=100)
    assert made.cuts[-1] == cut_of(longest, recomputed_layers=LAYERS)
    plain = start(batch_size=8, steps=2, micro_batch_tokens=64).run(evaluate_every=100)
    assert made.progress.losses == pytest.approx(plain.progress.losses, rel=1e-5)


def test_one_example_that_never_fits_ends_the_run(start, documents):
    made = start(batch_size=8, steps=2)
    longest = int(documents.lengths.max())
    Ceiling(made, longest - 1)
    with pytest.raises(CannotFitError, match=f"one example of {longest} tokens.*data.max_length"):
        made.run(evaluate_every=100)
    assert made.committed == [0]


def test_the_last_batch_of_a_run_by_epochs_is_weighted_by_its_own_tokens(start, tmp_path, tokenizer):
    pairs = [("cd", random_text(5 + 3 * n, seed=n)) for n in range(5)]
    documents = documents_of(tmp_path / "five", tokenizer, pairs)
    made = start(documents=documents, batch_size=4, steps=2, learning_rate=1e-12)
    made.course = plan_course(examples=5, batch_size=4, steps=None, epochs=1, seed=0)
    made.model.eval()
    made.run(evaluate_every=100)
    [left] = made.course.batch(2)
    alone = backward(made.model, [one_by_one(documents)[left]])[0] / int(documents.targets[left])
    assert made.progress.losses[1] == pytest.approx(alone, rel=1e-5)


class Compiling(AutogradEngine):
    """One that compiles ahead, once there is room; then waits for the compiler in one step."""

    def __init__(self, *parts):
        super().__init__(*parts)
        self.ahead, self.steps = [], []

    def compile_ahead(self, batch):
        self.ahead.append(batch.documents)
        self.accumulate(batch, targets=batch.targets, seed=0)
        if len(self.ahead) == 1:
            raise torch.OutOfMemoryError

    def accumulate(self, batch, *, targets, seed):
        if len(self.steps) == 3:
            self.recompilations = ("0/1: other sizes",)
        self.steps.append(batch.documents)
        return super().accumulate(batch, targets=targets, seed=seed)


def test_code_is_compiled_by_the_longest_example_of_the_next_step_and_changes_nothing(start, documents):
    plain = start(batch_size=3, steps=4, micro_batch_tokens=15000).run(evaluate_every=100)
    made = start(batch_size=3, steps=4, micro_batch_tokens=15000)
    made.engine = engine = Compiling(made.model, made.accelerator.backward)
    stepper = made.stepper()
    stepper.compile_ahead(2)
    longest = max(made.course.batch(2), key=lambda document: documents.lengths[document])
    assert engine.ahead == [(longest,), (longest,)]
    assert all(not vector.grad.any() for vector in made.flat.vectors)

    records = [*(stepper.step(number) for number in range(1, 5)), stepper.finish()][1:]
    assert made.progress.losses == plain.progress.losses
    assert records[0].setbacks.cuts == (cut_of(7500),)  # what ran out before the first step is counted with it
    assert [record.setbacks.recompilations for record in records] == [(), ("0/1: other sizes",), (), ()]


def test_a_step_whose_end_is_waited_for_in_vain_is_never_taken_for_the_last_whole_one(start, monkeypatch):
    """Another rank is gone in the midst of its sum: with its number, the weights before it would be committed."""
    made = start(batch_size=3, steps=4)
    stepper = made.stepper()
    stepper.step(1)

    def lost(*_marks):
        raise PeerLostError("another process of the run is gone")

    monkeypatch.setattr(step_module, "wait_for", lost)
    with pytest.raises(PeerLostError):
        stepper.step(2)
    for _ in range(2):  # whoever looks whether the last step may be saved
        with pytest.raises(PeerLostError):
            stepper.finish()
    assert not made.progress.losses
