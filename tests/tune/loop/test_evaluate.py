"""Held-out losses and the model's own answers: they depend on the model alone, and leave training as it was."""

import json

import numpy as np
import pytest
import torch
from tiny import PAIR, adapted, documents_of, documents_of_examples, example_of, one_by_one, own_losses

from job.core.errors import StopRequestedError
from job.core.recipe.schema import LoraSection
from job.tune.data.frame import token_rules
from job.tune.loop import evaluate as evaluate_module
from job.tune.loop.evaluate import Question, answer, evaluate, questions_of_documents, questions_of_prompts


def judged(model, documents, tokens, *, should_stop=lambda: False, on_progress=lambda _done: None):
    return evaluate(model, documents, step=3, tokens_at_once=tokens, should_stop=should_stop, on_progress=on_progress)


def replies(model, questions, tokenizer, *, most=12, should_stop=lambda: False):
    return answer(model, questions, tokenizer, max_new_tokens=most, seed=0, should_stop=should_stop)


@pytest.fixture(scope="module")
def questions():
    """Prompts of 2 to 20 tokens."""
    return [
        Question(ids=(1, *(5 + (7 * n + 3 * i) % 20 for i in range(n))), prompt="", expected=None)
        for n in (11, 1, 19, 5, 2, 8)
    ]


def test_an_evaluation_does_not_depend_on_the_micro_batches(any_model, documents):
    narrow, wide = judged(any_model, documents, 1), judged(any_model, documents, 4096)
    np.testing.assert_allclose(narrow.nll, wide.nll, rtol=1e-6)
    assert narrow.loss == pytest.approx(wide.loss, rel=1e-6)
    assert narrow.correct == wide.correct
    assert np.array_equal(narrow.tokens, documents.targets)


def test_an_evaluation_sums_the_models_own_losses_over_the_targets(llama, documents):
    result = judged(llama, documents, 64)
    for document, batch in enumerate(one_by_one(documents)):
        with torch.no_grad():
            own = own_losses(llama, batch.input_ids[0])[batch.target_places]
        assert result.nll[document] == pytest.approx(float(own.sum()), rel=1e-5)
    assert (result.step, result.loss) == (3, pytest.approx(result.nll.sum() / documents.targets.sum()))


def test_the_hits_are_the_targets_that_the_model_would_have_written(llama, documents):
    hits = 0
    for batch in one_by_one(documents):
        with torch.no_grad():
            lengths = torch.tensor(batch.document_lengths)
            places = {"document_cu_seqlens": batch.cu_seqlens, "document_lengths": lengths}
            written = llama.model(input_ids=batch.input_ids, use_cache=False, **places).logits[0].argmax(-1)
        hits += int((written[batch.target_places] == batch.target_ids).sum())
    assert judged(llama, documents, 64).correct == hits


def test_evaluating_and_answering_leave_random_numbers_mode_and_attention_as_they_were(
    bases, documents, questions, tokenizer
):
    model = adapted(bases["llama"], LoraSection(r=4, dropout=0.5, targets=("q_proj",)), moved=True)
    config = model.model.get_base_model().config
    for training in (True, False):
        model.train(training)
        torch.manual_seed(11)
        before = torch.get_rng_state()
        first, second = judged(model, documents, 64), judged(model, documents, 64)
        replies(model, questions[:2], tokenizer)
        assert torch.equal(torch.get_rng_state(), before)
        assert np.array_equal(first.nll, second.nll)  # no dropout
        assert model.training is training
        assert config._attn_implementation == "per_document"
        assert config.use_cache is False


def test_an_evaluation_can_be_stopped_and_reports_its_progress(llama, documents):
    done, was_training = [], llama.training
    judged(llama, documents, 1, on_progress=done.append)
    assert done[-1] == len(documents)
    with pytest.raises(StopRequestedError, match="evaluating at step 3"):
        judged(llama, documents, 1, should_stop=lambda: len(done) > 0)
    assert llama.training is was_training


def test_prompts_answered_together_are_answered_as_one_by_one(any_model, questions, tokenizer):
    together = replies(any_model, questions, tokenizer)
    alone = [replies(any_model, [question], tokenizer)[0] for question in questions]
    assert together == alone
    assert len(set(together)) > 1
    assert all(together)


def test_prompts_too_many_for_the_memory_are_answered_in_turns(llama, questions, tokenizer, monkeypatch):
    """By `generate`, as of a family that is not packed."""
    monkeypatch.setattr(llama, "rows", "padded")
    together = replies(llama, questions, tokenizer)
    widths = []
    generate = llama.model.generate

    def watched(**arguments):
        widths.append(tuple(arguments["input_ids"].shape))
        return generate(**arguments)

    monkeypatch.setattr(evaluate_module, "_TOKENS_AT_ONCE", 3 * (12 + 12))
    monkeypatch.setattr(llama.model, "generate", watched)
    assert replies(llama, questions, tokenizer) == together
    assert sum(rows for rows, _ in widths) == len(questions)
    assert len(widths) > 1
    assert all(rows == 1 or rows * (width + 12) <= 72 for rows, width in widths)


def test_an_answer_is_the_most_likely_token_each_time_whatever_the_base_suggests(bases, questions, tokenizer, tmp_path):
    """Bases come with rules for chatting: sampling, a repetition penalty, other ends."""
    for file in bases["llama"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    rules = {"do_sample": True, "temperature": 5.0, "repetition_penalty": 9.0, "max_length": 4, "num_beams": 3}
    (tmp_path / "generation_config.json").write_text(json.dumps(rules))
    model = adapted(tmp_path, LoraSection(r=4, targets=("q_proj",)))
    [found] = replies(model, questions[:1], tokenizer)

    ids = list(questions[0].ids)
    for _ in range(12):
        with torch.no_grad(), model.generating() as own:
            ids.append(int(own(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        if ids[-1] == tokenizer.eos_token_id:
            break
    assert found == tokenizer.decode(ids[len(questions[0].ids) :], skip_special_tokens=True).strip()


def test_a_stop_is_noticed_between_two_tokens(llama, questions, tokenizer):
    asked = []

    def stop_at_the_third():
        asked.append(1)
        return len(asked) == 3

    with pytest.raises(StopRequestedError, match="answering"):
        replies(llama, questions[:2], tokenizer, most=50, should_stop=stop_at_the_third)
    assert len(asked) == 3
    assert llama.model.get_base_model().config._attn_implementation == "per_document"


def test_questions_come_from_prompts_and_from_held_out_documents(tokenizer, tmp_path):
    pairs = [("cd", " ef"), ("ab", "gh"), ("c", "d")]
    documents = documents_of(tmp_path, tokenizer, pairs)
    found = questions_of_documents(documents, tokenizer, most=2)
    assert [q.ids for q in found] == [(1, 5, 6), (1, 35)]
    assert [(q.prompt, q.expected) for q in found] == [("cd", "ef"), ("ab", "gh")]
    cut = documents_of(tmp_path, tokenizer, [("ab", "cdefghijkl"), *pairs], max_length=8)
    assert cut.truncated == 1
    asked = questions_of_documents(cut, tokenizer, most=2)
    assert [(q.ids, q.expected) for q in asked] == [(q.ids, q.expected) for q in found]
    assert [[q.document for q in each] for each in (found, asked)] == [[0, 1], [1, 2]]
    [asked] = questions_of_prompts(["cd"], token_rules(tokenizer, PAIR))
    assert (asked.ids, asked.prompt, asked.expected) == ((1, 5, 6), "cd", None)


def test_a_question_ends_with_the_prompt_also_where_the_loss_is_over_the_prompt_too(tokenizer, tmp_path):
    over_all = PAIR.model_copy(update={"loss_on": "all"})
    documents = documents_of(tmp_path, tokenizer, [("cd", " ef")], data=over_all)
    assert documents.spans(0).tolist() == [[1, 7]]
    [asked] = questions_of_documents(documents, tokenizer, most=1)
    assert (asked.ids, asked.prompt, asked.expected) == ((1, 5, 6), "cd", "ef")


def test_of_several_learned_parts_the_last_is_the_answer_and_all_before_it_the_prompt(tokenizer, tmp_path):
    turns = [("cd", False), ("ef", True), (" g", False), ("hi", True), ("j", False)]
    documents = documents_of_examples(tmp_path, tokenizer, [example_of(*turns), example_of(*turns[:2])])
    found = questions_of_documents(documents, tokenizer, most=2)
    assert [(q.prompt, q.expected) for q in found] == [("cdef g", "hi"), ("cd", "ef")]
    assert found[0].ids == (1, 5, 6, 7, 8, 29, 9)
