"""The loop: when it evaluates, commits, stops and ends; and what it keeps of what went wrong."""

import pytest
import structlog
import torch
from structlog.testing import capture_logs
from tiny import Ceiling, cut_of, poison

from job.core.errors import CannotFitError, DivergedError, StopRequestedError
from job.core.recipe.schema import LoraSection


def test_a_run_learns_and_records_each_step(start):
    made = start(steps=20, dtype=torch.bfloat16, optimizer="adamw_8bit").run(evaluate_every=10)
    assert [record.step for record in made.records] == list(range(1, 21))
    assert sorted(made.progress.evaluations) == [0, 10, 20]
    assert made.progress.evaluations[20].loss < made.progress.evaluations[0].loss - 0.2
    assert (
        made.progress.tokens == sum(record.tokens for record in made.records) == 10 * int(made.documents.lengths.sum())
    )
    assert made.committed == [0, 3, 6, 9, 10, 12, 15, 18, 20]


def test_a_run_out_of_patience_ends_with_its_last_evaluation(start):
    made = start(steps=20, learning_rate=1e-12)
    made.run(checkpoint_every=50, evaluate_every=2, patience=2)
    assert made.progress.step < 20
    assert made.committed[-1] == made.progress.step == max(made.progress.evaluations)


def test_a_stop_commits_what_is_done(start):
    made = start(steps=8)
    made.stop_after = 5
    with pytest.raises(StopRequestedError, match="step 5 of 8 is committed"):
        made.run(evaluate_every=100)
    assert made.committed[-1] == 5
    assert len(made.progress.losses) == 5


@pytest.mark.parametrize("step", [3, 4, 8])
def test_nothing_is_committed_at_or_after_a_step_that_is_not_finite(step, start):
    """At a checkpoint, at an evaluation, at the end."""
    made = start(steps=8)
    poison(made, step, "nan")
    with pytest.raises(DivergedError, match=f"step {step}:"):
        made.run(evaluate_every=4, checkpoint_every=3)
    assert made.committed[-1] < step
    assert max(made.progress.evaluations) < step


def scarce_evaluation(made, most):
    """As on a device where a forward pass holds this many tokens."""
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
    made.progress.cut = cut_of(64, evaluation_tokens=512)
    tried = scarce_evaluation(made, 150)
    made.run(evaluate_every=100)

    assert max(tried) > 150
    assert made.progress.cut == cut_of(64, evaluation_tokens=128)
    assert made.facts.out_of_memory == 2
    assert made.progress.losses == expected.progress.losses
    for step, evaluation in expected.progress.evaluations.items():
        assert made.progress.evaluations[step].nll == pytest.approx(evaluation.nll, rel=1e-5)


def test_a_held_out_example_that_never_fits_ends_the_run(start):
    made = start(batch_size=8, steps=1)
    scarce_evaluation(made, 4)
    with pytest.raises(CannotFitError, match=r"one example of \d+ tokens.*data.max_length"):
        made.run()


def test_the_way_to_the_first_step_is_recorded_once_an_attempt(start):
    structlog.reset_defaults()  # a command that was called before may have left warnings only
    made = start(steps=4)
    made.stop_after = 2
    with capture_logs() as first, pytest.raises(StopRequestedError):
        made.run(evaluate_every=1)
    made.stop_after = None
    with capture_logs() as second:
        made.run(evaluate_every=1)  # another attempt, which resumes

    for logs in (first, second):
        assert [log["event"] for log in logs].count("start") == 1
    (start_event,) = [log for log in second if log["event"] == "start"]
    assert start_event["spent"] == made.facts.start_seconds
    assert made.facts.start_seconds["first_step"] > 0


def test_a_stop_during_an_evaluation_commits_the_steps_before_it(start):
    made = start(steps=8)
    score = made.model.score

    def stopped(batch):
        if made.progress.step == 4:
            raise StopRequestedError("asked to stop while evaluating")
        return score(batch)

    made.model.score = stopped
    with pytest.raises(StopRequestedError, match="step 4 of 8"):
        made.run(evaluate_every=4)
    assert made.committed[-1] == 4
    assert 4 not in made.progress.evaluations


def test_a_stop_before_anything_was_done_commits_nothing(start):
    made = start(steps=8)

    def stopped(_batch):
        raise StopRequestedError("asked to stop while evaluating")

    made.model.score = stopped
    with pytest.raises(StopRequestedError, match="before there was anything to commit"):
        made.run()
    assert made.committed == []


@pytest.mark.parametrize(("dropout", "changes"), [(0.0, 0), (0.1, 1)])
def test_smaller_micro_batches_change_a_run_with_dropout_alone_and_that_is_kept_with_it(start, dropout, changes):
    made = start(lora=lora_of(dropout), batch_size=8, steps=3, micro_batch_tokens=300)
    Ceiling(made, 80)
    made.run(evaluate_every=100)

    assert made.facts.out_of_memory == 2
    assert made.progress.cut == cut_of(75)
    assert len(made.progress.changes) == changes
    assert all("after step 0: smaller micro-batches draw other dropout masks" in each for each in made.progress.changes)


def test_what_ran_out_of_memory_in_a_step_that_was_cut_short_is_kept_too(start):
    made = start(lora=lora_of(0.1), batch_size=8, steps=3, micro_batch_tokens=300)
    Ceiling(made, 80)
    made.cut_after = 0
    with pytest.raises(StopRequestedError, match="step 0 of 3 is committed"):
        made.run(evaluate_every=100)

    assert made.progress.step == 0
    assert made.progress.losses == []
    assert made.facts.out_of_memory == 2
    assert len(made.progress.changes) == 1


def lora_of(dropout):
    return LoraSection(r=8, alpha=16, targets=("v_proj", "lm_head"), dropout=dropout)
