"""The training loop: the batch is the science, the micro-batch is the hardware's; and what ends a run."""

import weakref
from unittest.mock import Mock

import pytest
import torch
from tiny import backward, documents_of, one_by_one, plan_of, random_text

from job.core.course import plan_course
from job.core.errors import CannotFitError, DivergedError, StopRequestedError
from job.core.packing import pack_evenly
from job.core.recipe import CheckpointSection, EvaluateSection, LoraSection
from job.tune.engines.autograd import AutogradEngine
from job.tune.engines.engine import settle


def micro_batches(made, told):
    """Tell of each micro-batch that is trained on."""
    losses = made.model.summed_loss

    def telling(batch, **options):
        told(batch)
        return losses(batch, **options)

    made.model.summed_loss = telling


def test_how_a_batch_is_cut_changes_neither_losses_nor_weights(start, tmp_path, tokenizer):
    """Eight examples of 16 tokens each: all at once, two at a time, one at a time."""
    pairs = [(random_text(14 - n, seed=n), random_text(n, seed=50 + n)) for n in (1, 13, 2, 9, 1, 5, 12, 3)]
    documents = documents_of(tmp_path / "even", tokenizer, pairs)
    runs = {}
    for together in (8, 2, 1):
        made = start(documents=documents, batch_size=8, steps=4, micro_batch_tokens=16 * together)
        cuts = []
        micro_batches(made, lambda batch, cuts=cuts: cuts.append(len(batch.documents)))
        runs[together] = made.run(evaluate_every=100)
        assert set(cuts) == {together}
        assert len(cuts) == 4 * 8 / together
    for other in (runs[2], runs[1]):
        assert other.progress.losses == pytest.approx(runs[8].progress.losses, rel=1e-5)
        assert other.progress.grad_norms == pytest.approx(runs[8].progress.grad_norms, rel=1e-5)
        for mine, theirs in zip(other.adapter(), runs[8].adapter(), strict=True):
            assert theirs.any()
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5 * float(theirs.abs().max()))


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


def test_a_run_learns_and_tells_each_step(start):
    made = start(steps=20, dtype=torch.bfloat16, optimizer="adamw_8bit").run(evaluate_every=10)
    assert [record.step for record in made.told] == list(range(1, 21))
    assert sorted(made.progress.evaluations) == [0, 10, 20]
    assert made.progress.evaluations[20].loss < made.progress.evaluations[0].loss - 0.2
    assert made.progress.tokens == sum(record.tokens for record in made.told) == 10 * int(made.documents.lengths.sum())
    assert made.committed == [0, 3, 6, 9, 10, 12, 15, 18, 20]


def test_the_first_step_of_an_attempt_is_told_once_and_before_all_else_of_it(start):
    made = start(steps=4)
    told = []
    made.when_first = lambda: told.append((made.progress.step, len(made.told), made.committed[-1]))
    made.stop_after = 2
    with pytest.raises(StopRequestedError):
        made.run(evaluate_every=1)
    made.stop_after = None
    made.run(evaluate_every=1)  # another attempt, which goes on
    assert told == [(1, 0, 0), (3, 2, 2)]


def test_a_run_out_of_patience_ends_with_its_last_evaluation(start):
    made = start(steps=20, learning_rate=1e-12)
    made.trainer().run(CheckpointSection(every_steps=50), EvaluateSection(every_steps=2, patience=2))
    assert made.progress.step < 20
    assert made.committed[-1] == made.progress.step == max(made.progress.evaluations)


def test_a_stop_commits_what_is_done(start):
    made = start(steps=8)
    made.stop_after = 5
    with pytest.raises(StopRequestedError, match="step 5 of 8 is committed"):
        made.run(evaluate_every=100)
    assert made.committed[-1] == 5
    assert len(made.progress.losses) == 5


def test_a_stop_during_an_evaluation_commits_the_steps_before_it(start):
    made = start(steps=8)

    def stopped(step, _tokens):
        if step == 4:
            msg = "asked to stop while evaluating"
            raise StopRequestedError(msg)
        return type(made)._evaluate(made, step, _tokens)

    made._evaluate = stopped
    with pytest.raises(StopRequestedError, match="step 4 of 8"):
        made.run(evaluate_every=4)
    assert made.committed[-1] == 4
    assert 4 not in made.progress.evaluations


# --- not finite ---


def poison(made, step, how):
    """Spoils one step and no other: the loss itself, or only its gradient."""
    losses = made.model.summed_loss

    def spoilt(batch, **options):
        total, each = losses(batch, **options)
        if made.progress.step + 1 == step:
            if how == "gradient":
                total.register_hook(lambda gradient: gradient * float("nan"))
            else:
                total, each = total * float(how), each * float(how)
        return total, each

    made.model.summed_loss = spoilt


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
    assert [record.step for record in made.told] == [1, 2, 3]
    for mine, theirs in zip(made.adapter(), clean.adapter(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("step", [3, 4, 8])
def test_nothing_is_committed_at_or_after_a_step_that_is_not_finite(step, start):
    """At a checkpoint, at an evaluation, at the end."""
    made = start(steps=8)
    poison(made, step, "nan")
    with pytest.raises(DivergedError, match=f"step {step}:"):
        made.run(evaluate_every=4, checkpoint_every=3)
    assert made.committed[-1] < step
    assert max(made.progress.evaluations) < step


# --- out of memory ---


class Ceiling:
    """A device that holds so many tokens, and more of them once activations are computed again."""

    def __init__(self, made, most, *, lean=0):
        self.failed = []
        """A weak reference to the activations of each micro-batch that did not fit."""
        micro_batches(made, self._begin)
        made.model.model.get_base_model().model.layers[1].register_forward_pre_hook(self._half_way)
        self._most, self._lean, self._layers = most, lean, made.model.layers

    def _begin(self, batch):
        self._tokens = batch.tokens

    def _half_way(self, layer, inputs):
        if not layer.training:
            return
        most = max(self._most, self._lean) if self._layers.recomputing else self._most
        if self._tokens > most:
            self.failed.append(weakref.ref(inputs[0]))
            torch.rand(3)  # random numbers were drawn before memory ran out
            msg = "CUDA out of memory. Tried to allocate more than there is"
            raise torch.OutOfMemoryError(msg)


def test_out_of_memory_makes_smaller_micro_batches_of_the_same_step(start):
    lora = LoraSection(r=8, alpha=16, targets=("v_proj", "lm_head"), dropout=0.1)
    made = start(lora=lora, batch_size=8, steps=3, micro_batch_tokens=300)
    ceiling = Ceiling(made, 80)
    made.path, adopted = AutogradEngine(made.model, made.accelerator.backward), []
    made.path.adopt = lambda plan: adopted.append(plan["micro_batch_tokens"])
    made.run(evaluate_every=100)
    assert adopted == [150, 75]
    planned = start(lora=lora, batch_size=8, steps=3, micro_batch_tokens=75).run(evaluate_every=100)

    assert made.shrunk == [
        plan_of(150),
        plan_of(75),
    ]
    assert made.progress.plan["micro_batch_tokens"] == 75
    assert len(ceiling.failed) == 2  # the smaller plan is kept for the steps after
    # Dropout began again where it stood, so this is to the bit the run that had been planned so.
    assert made.progress.losses == planned.progress.losses
    assert made.progress.grad_norms == planned.progress.grad_norms
    for mine, theirs in zip(made.adapter(), planned.adapter(), strict=True):
        assert torch.equal(mine, theirs)


class Scarce:
    """A path on which nothing fits; what it is asked to do about it."""

    def __init__(self):
        self.kept, self.computes_again, self.asked = True, False, []

    def accumulate(self, batch, *, targets):
        raise torch.OutOfMemoryError

    def give_up_weights(self):
        kept, self.kept = self.kept, False
        return {"kept_layers": 0} if kept else None

    def compute_again(self):
        before, self.computes_again = self.computes_again, True
        return None if before else {"checkpointing": True}

    def adopt(self, plan):
        self.asked.append((plan["micro_batch_tokens"], plan["kept_layers"], plan["checkpointing"]))


def test_what_costs_least_is_done_first_when_memory_runs_out(start, documents):
    longest = int(documents.lengths.max())
    made = start(batch_size=8, steps=1, micro_batch_tokens=15000)
    made.progress.plan["kept_layers"] = 2
    made.path = Scarce()
    with pytest.raises(CannotFitError, match="one example of"):
        made.run()

    weights = [(7500, 2, False), (4096, 2, False), (4096, 0, False)]
    halved = [(size, 0, False) for size in (2048, 1024, 512, 256, 128, 64, longest)]
    assert made.path.asked == [*weights, *halved, (longest, 0, True)]


class Robbed(Scarce):
    """One that has no room for decoded weights, which another process has taken."""

    def accumulate(self, batch, *, targets):
        if self.asked:
            raise StopRequestedError("far enough")
        raise torch.OutOfMemoryError

    def adopt(self, plan):
        super().adopt(plan)
        if plan["kept_layers"]:
            raise torch.OutOfMemoryError


def test_decoded_weights_that_no_longer_fit_are_not_kept_when_a_smaller_plan_is_adopted(start):
    made = start(batch_size=8, steps=1, micro_batch_tokens=15000)
    made.progress.plan["kept_layers"] = 2
    made.path = Robbed()
    with pytest.raises(StopRequestedError, match="far enough"):
        made.run()
    assert made.path.asked == [(7500, 2, False), (7500, 0, False)]
    assert made.shrunk == [plan_of(7500)]


def test_a_plan_that_fits_no_more_is_settled_without_decoded_weights_or_not_at_all():
    plan, path = plan_of(7500, kept_layers=2), Robbed()
    assert not settle(path, plan)
    assert plan == plan_of(7500)
    assert settle(path, plan)
    assert path.asked == [(7500, 2, False), (7500, 0, False), (7500, 0, False)]

    path.adopt = scarce = Mock(side_effect=torch.OutOfMemoryError)
    with pytest.raises(torch.OutOfMemoryError):
        settle(path, plan)
    scarce.assert_called_once()


def test_micro_batches_are_full_to_a_multiple_of_what_compiled_code_is_filled_up_to(start, documents):
    """64 tokens, with plans as small as these; packed without it they would be others."""
    lengths = documents.lengths.tolist()
    most = next(n for n in range(64, 128) if pack_evenly(lengths, most=n, grain=64) != pack_evenly(lengths, most=n))
    made, seen = start(batch_size=8, steps=1, micro_batch_tokens=most), []
    micro_batches(made, lambda batch: seen.append(sorted(batch.document_lengths)))
    made.run(evaluate_every=100)

    packs = pack_evenly(lengths, most=most, grain=64)
    assert sorted(seen) == sorted(sorted(lengths[i] for i in members) for members in packs)


def scarce_evaluation(made, most):
    """As on a device where a pass without a way back holds so many tokens."""
    score, tried = made.model.score, []

    def scored(batch):
        tried.append(batch.tokens)
        if batch.tokens > most:
            raise torch.OutOfMemoryError
        return score(batch)

    made.model.score = scored
    return tried


def test_an_evaluation_that_does_not_fit_is_done_again_in_smaller_passes(start):
    expected = start(batch_size=8, steps=2).run(evaluate_every=100)
    made = start(batch_size=8, steps=2)
    made.progress.plan["evaluation_tokens"] = 512
    tried = scarce_evaluation(made, 150)
    made.run(evaluate_every=100)

    assert max(tried) > 150
    assert made.progress.plan == plan_of(64, evaluation_tokens=128)
    assert [each["evaluation_tokens"] for each in made.shrunk] == [256, 128]
    assert made.progress.losses == expected.progress.losses
    for step, evaluation in expected.progress.evaluations.items():
        assert made.progress.evaluations[step].nll == pytest.approx(evaluation.nll, rel=1e-5)


def test_a_held_out_example_that_never_fits_ends_the_run(start):
    made = start(batch_size=8, steps=1)
    scarce_evaluation(made, 4)
    with pytest.raises(CannotFitError, match=r"one example of \d+ tokens.*data.max_length"):
        made.run()


def test_memory_of_a_failed_micro_batch_is_free_when_it_is_tried_again(start):
    made = start(batch_size=8, steps=1, micro_batch_tokens=300)
    ceiling = Ceiling(made, 80)
    held = []
    made.when_shrunk = lambda: held.append(ceiling.failed[-1]() is not None)
    made.run(evaluate_every=100)
    assert held == [False, False]


def test_one_example_that_does_not_fit_is_tried_with_its_activations_computed_again(start, documents):
    made = start(batch_size=8, steps=2, micro_batch_tokens=64)
    longest = int(documents.lengths.max())
    Ceiling(made, longest - 1, lean=longest)
    made.run(evaluate_every=100)
    assert made.shrunk[-1] == plan_of(longest, checkpointing=True)
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
