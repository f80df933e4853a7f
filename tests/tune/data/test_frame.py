"""Token ids and targets, against ids written by hand; the alphabet stands in tiny.py."""

import copy
from itertools import groupby

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import documents_of, documents_of_examples, example_of

from job.core.errors import UsageError
from job.core.recipe.data_section import DataSection
from job.tune.data.frame import encode_examples, encode_prompt, token_rules
from job.tune.data.micro_batch import micro_batch

BOS, EOS, SPACE, AB = 1, 2, 29, 35
A, B, C, D, E, F, S = 3, 4, 5, 6, 7, 8, 21


def data(**templates):
    return DataSection(train=("train.jsonl",), **templates)


def framed(tokenizer, section, *parts, control=False):
    [row] = encode_examples([example_of(*parts, control=control)], token_rules(tokenizer, section))
    return row


def encoded(tokenizer, section, prompt, completion, *, control=False):
    """Ids, and the first target: of a pair the targets are all that follows."""
    parts = [(prompt, False)] if prompt else []
    row = framed(tokenizer, section, *parts, (completion, True), control=control)
    [(first, end)] = row.spans
    assert end == len(row.ids)
    return row.ids, first


TEXT = data(text="{text}")
PAIR = data(prompt="{q}", completion="{a}")


def test_a_text_is_a_target_from_its_first_token_to_its_end_of_sequence(tokenizer):
    assert encoded(tokenizer, TEXT, "", "cd ab") == ([BOS, C, D, SPACE, AB, EOS], 1)


def test_a_completion_is_a_target_and_its_prompt_is_not(tokenizer):
    assert encoded(tokenizer, PAIR, "cd", " ef") == ([BOS, C, D, SPACE, E, F, EOS], 3)


def test_with_loss_on_all_the_prompt_is_a_target_too(tokenizer):
    section = data(prompt="{q}", completion="{a}", loss_on="all")
    assert encoded(tokenizer, section, "cd", " ef") == ([BOS, C, D, SPACE, E, F, EOS], 1)


def test_a_tokenizer_that_puts_no_bos_gets_none(plain_tokenizer):
    assert encoded(plain_tokenizer, PAIR, "cd", "ef") == ([C, D, E, F, EOS], 2)
    assert encoded(plain_tokenizer, TEXT, "", "cd") == ([C, D, EOS], 1)
    assert encode_prompt("cd", token_rules(plain_tokenizer, PAIR)) == [C, D]


def test_bos_and_eos_that_the_template_writes_stand_once(tokenizer):
    section = data(prompt="<s>{q}", completion="{a}</s>")
    assert encoded(tokenizer, section, "<s>cd", "ef</s>", control=True) == ([BOS, C, D, E, F, EOS], 3)
    assert encode_prompt("<s>cd", token_rules(tokenizer, section)) == [BOS, C, D]


def test_a_special_token_in_a_record_is_only_text(tokenizer):
    assert encoded(tokenizer, TEXT, "", "c</s>d") == ([BOS, C, 30, 32, S, 31, D, EOS], 1)
    assert encoded(tokenizer, PAIR, "<s>", "c") == ([BOS, 30, S, 31, C, EOS], 4)


def test_a_prompt_keeps_its_ids_where_the_tokenizer_would_merge_across_the_border(tokenizer):
    assert encoded(tokenizer, TEXT, "", "cab")[0] == [BOS, C, AB, EOS]
    assert encoded(tokenizer, PAIR, "ca", "bd") == ([BOS, C, A, B, D, EOS], 3)
    assert encode_prompt("ca", token_rules(tokenizer, PAIR)) == [BOS, C, A]


def test_without_an_end_of_sequence_token_the_base_is_refused(tokenizer):
    endless = copy.deepcopy(tokenizer)
    endless.eos_token = None
    with pytest.raises(UsageError, match="end-of-sequence"):
        token_rules(endless, TEXT)


def test_parts_are_learned_where_they_say_so_and_only_a_learned_end_gets_an_eos(tokenizer):
    turns = [("cd", False), ("ef", True), (" c", False), ("d", True)]
    row = framed(tokenizer, PAIR, *turns)
    assert (row.ids, row.spans, row.answer_from) == ([BOS, C, D, E, F, SPACE, C, D, EOS], ((3, 5), (7, 9)), 7)
    row = framed(tokenizer, PAIR, *turns, (" ", False))
    assert (row.ids, row.spans, row.answer_from) == ([BOS, C, D, E, F, SPACE, C, D, SPACE], ((3, 5), (7, 8)), 7)
    row = framed(tokenizer, PAIR, ("cd", True), ("ef", False))
    assert (row.ids, row.spans, row.answer_from) == ([BOS, C, D, E, F], ((1, 3),), 1)
    row = framed(tokenizer, PAIR, ("cd", False))
    assert (row.ids, row.spans, row.answer_from) == ([BOS, C, D], (), 3)


def test_with_loss_on_all_every_token_after_the_first_is_a_target_and_the_last_answer_stays_known(tokenizer):
    section = data(prompt="{q}", completion="{a}", loss_on="all")
    turns = [("cd", False), ("ef", True), (" c", False), ("d", True)]
    row = framed(tokenizer, section, *turns)
    assert (row.spans, row.answer_from) == (((1, len(row.ids)),), 7)
    row = framed(tokenizer, section, *turns[:3])
    assert (row.ids, row.spans, row.answer_from) == ([BOS, C, D, E, F, SPACE, C], ((1, 7),), 3)


def test_the_first_token_follows_nothing_and_is_no_target(plain_tokenizer):
    assert framed(plain_tokenizer, PAIR, ("c", True), ("d", False), ("e", True)).spans == ((2, 4),)
    assert framed(plain_tokenizer, PAIR, ("cd", True), ("e", False)).spans == ((1, 2),)


def test_learned_parts_without_a_token_between_them_are_one_span_and_empty_ones_none(tokenizer):
    assert framed(tokenizer, PAIR, ("c", True), ("", False), ("d", True)).spans == ((1, 4),)
    assert framed(tokenizer, PAIR, ("c", False), ("", True), ("d", False), ("e", True)).spans == ((3, 5),)
    row = framed(tokenizer, PAIR, ("c", False), ("", True))
    assert (row.ids, row.spans) == ([BOS, C, EOS], ((2, 3),))


def test_only_where_learning_begins_or_ends_is_a_border(tokenizer):
    """Parts that are both given, or both learned, are one text."""
    assert framed(tokenizer, PAIR, ("ca", False), ("b", False), ("a", True), ("b", True)).ids == [BOS, C, AB, AB, EOS]


def test_after_a_border_that_the_tokenizer_would_merge_across_the_rest_is_a_text_of_its_own(tokenizer):
    row = framed(tokenizer, PAIR, ("ca", False), ("b", True), ("ca", False), ("bd", True))
    assert (row.ids, row.spans) == ([BOS, C, A, B, C, A, B, D, EOS], ((3, 4), (6, 9)))


def test_an_eos_that_a_template_writes_ends_each_learned_part_and_stands_once(tokenizer):
    section = data(prompt="{q}", completion="{a}</s>")
    row = framed(tokenizer, section, ("c", False), ("d</s>", True), ("e", False), ("f</s>", True), control=True)
    assert (row.ids, row.spans) == ([BOS, C, D, EOS, E, F, EOS], ((2, 4), (5, 7)))
    assert framed(tokenizer, section, ("c</s>", False), ("", True), control=True).ids == [BOS, C, EOS, EOS]


def stretches(example):
    """(text, learned) without neighbours of one kind, the first given, and whether the end is learned."""
    texts = [
        ("".join(part.text for part in group), learned)
        for learned, group in groupby(example.parts, key=lambda part: part.learned)
    ]
    return texts if texts and not texts[0][1] else [("", False), *texts]


def reference(example, tokenizer, rules):
    """Ids of one example and, for each, whether it is a target, found token by token."""
    ids, learned, run, run_ids = [], [], "", []
    for text, is_learned in stretches(example):
        whole, alone = (
            tokenizer(each, add_special_tokens=False, split_special_tokens=True).input_ids
            for each in (run + text, text)
        )
        if whole[: len(run_ids)] == run_ids:
            new, run, run_ids = whole[len(run_ids) :], run + text, whole
        else:
            new, run, run_ids = alone, text, alone
        ids += new
        learned += [is_learned] * len(new)
    if rules.bos is not None:
        ids, learned = [rules.bos, *ids], [False, *learned]
    if stretches(example)[-1][1]:
        ids, learned = [*ids, rules.eos], [*learned, True]
    return ids, [place > 0 and (rules.loss_on_prompt or is_target) for place, is_target in enumerate(learned)]


def marked(row):
    """For each token, whether it is in a span."""
    return [any(start <= place < end for start, end in row.spans) for place in range(len(row.ids))]


# "ab" is one token, so that many borders could be merged across; "</s>" is no token here, but text.
some_parts = st.lists(st.tuples(st.text("aabbc", max_size=4) | st.just("</s>"), st.booleans()), min_size=1, max_size=7)
some_examples = st.lists(some_parts.map(lambda parts: example_of(*parts)), min_size=1, max_size=5)
often = settings(deadline=None, derandomize=True, database=None, max_examples=200)


@often
@given(examples=some_examples, puts_bos=st.booleans(), loss_on=st.sampled_from(["completion", "all"]))
def test_examples_of_any_parts_are_framed_as_by_the_reference(tokenizer, plain_tokenizer, examples, puts_bos, loss_on):
    """Encoded together as each is alone; spans are ascending, apart from each other, and none is empty."""
    used = tokenizer if puts_bos else plain_tokenizer
    rules = token_rules(used, data(prompt="{q}", completion="{a}", loss_on=loss_on))
    rows = encode_examples(examples, rules)
    assert [(row.ids, marked(row)) for row in rows] == [reference(example, used, rules) for example in examples]
    for row in rows:
        edges = [edge for span in row.spans for edge in span]
        assert edges == sorted(set(edges))
        assert all(1 <= edge <= len(row.ids) for edge in edges)


@often
@given(examples=some_examples)
def test_what_is_learned_reads_as_the_learned_parts_and_the_rest_as_the_others(tokenizer, examples):
    for example, row in zip(examples, encode_examples(examples, token_rules(tokenizer, PAIR)), strict=True):
        targets = np.array(marked(row))
        for learned in (True, False):
            read = tokenizer.decode(np.array(row.ids)[targets == learned], skip_special_tokens=True)
            assert read == "".join(part.text for part in example.parts if part.learned == learned)
        assert row.ids.count(EOS) == (row.ids[-1] == EOS) == example.parts[-1].learned


@often
@given(examples=some_examples)
def test_a_question_is_cut_where_the_last_learned_part_begins(tokenizer, examples):
    for example, row in zip(examples, encode_examples(examples, token_rules(tokenizer, PAIR)), strict=True):
        found = stretches(example)
        before = max((place for place, (_, learned) in enumerate(found) if learned), default=len(found))
        read = tokenizer.decode(row.ids[: row.answer_from], skip_special_tokens=True)
        assert read == "".join(text for text, _ in found[:before])


@settings(deadline=None, derandomize=True, database=None, max_examples=30)
@given(examples=some_examples, max_length=st.integers(1, 16))
def test_spans_and_counts_on_disk_are_those_of_the_first_max_length_tokens(
    tokenizer, tmp_path_factory, examples, max_length
):
    documents = documents_of_examples(tmp_path_factory.mktemp("cut"), tokenizer, examples, max_length=max_length)
    rows = encode_examples(examples, token_rules(tokenizer, PAIR))
    cut = [np.flatnonzero(marked(row)[:max_length]).tolist() for row in rows]
    assert documents.encoded.target_counts(max_length).tolist() == [len(places) for places in cut]
    assert documents.rows.tolist() == [n for n, places in enumerate(cut) if places]
    assert documents.without_target == sum(not places for places in cut)
    assert documents.targets.tolist() == [len(places) for places in cut if places]
    for document, row in enumerate(documents.rows):
        spans = documents.spans(document).tolist()
        assert [place for start, end in spans for place in range(start, end)] == cut[row]
        assert all(start < end for start, end in spans)
        assert documents.answer_from(document) == rows[row].answer_from


def test_a_truncated_example_gets_no_eos_and_one_cut_inside_its_prompt_is_left_out(tokenizer, tmp_path):
    documents = documents_of(tmp_path, tokenizer, [("cd", "efefefef"), ("cdcdcdcdcd", "e"), ("c", "d")], max_length=8)
    assert [documents.token_ids(i).tolist() for i in range(2)] == [[BOS, C, D, E, F, E, F, E], [BOS, C, D, EOS]]
    assert (documents.truncated, documents.without_target, documents.dropped) == (1, 1, 0)
    assert documents.targets.tolist() == [5, 2]
    assert [documents.spans(i).tolist() for i in range(2)] == [[[3, 8]], [[2, 4]]]
    assert [documents.is_whole(i) for i in range(2)] == [False, True]
    assert documents.where(1) == "train.jsonl:3"


def test_a_micro_batch_reads_each_target_from_the_place_before_it(tokenizer, tmp_path):
    documents = documents_of(tmp_path, tokenizer, [("cd", "ef"), ("c", "d")])
    batch = micro_batch(documents, [0, 1])
    assert batch.input_ids.tolist() == [[BOS, C, D, E, F, EOS, BOS, C, D, EOS]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 5, 0, 1, 2, 3]]
    assert batch.document_lengths == (6, 4)
    assert batch.target_ids.tolist() == [E, F, EOS, D, EOS]
    assert batch.target_counts == (3, 2)
    assert (batch.tokens, batch.targets) == (10, 5)
    torch.testing.assert_close(batch.input_ids[0, batch.target_places + 1], batch.target_ids)
    assert batch.target_places.tolist() == [2, 3, 4, 7, 8]


def test_a_document_with_two_spans_trains_on_exactly_both(tokenizer, tmp_path):
    chat = example_of(("cd", False), ("ef", True), (" c", False), ("d", True))
    documents = documents_of_examples(tmp_path, tokenizer, [chat, example_of(("c", False), ("d", True)), chat])
    batch = micro_batch(documents, [1, 0])
    assert batch.input_ids.tolist() == [[BOS, C, D, EOS, BOS, C, D, E, F, SPACE, C, D, EOS]]
    assert batch.target_ids.tolist() == [D, EOS, E, F, D, EOS]
    assert batch.target_places.tolist() == [1, 2, 6, 7, 10, 11]
    assert batch.target_counts == (2, 4)
    assert documents.targets.tolist() == [4, 2, 4]


def test_a_cut_may_leave_whole_spans_out_and_end_one_early(tokenizer, tmp_path):
    chat = example_of(("cd", False), ("ef", True), (" c", False), ("d", True))
    for max_length, spans in ((8, [[3, 5], [7, 8]]), (7, [[3, 5]]), (5, [[3, 5]]), (4, [[3, 4]])):
        documents = documents_of_examples(tmp_path, tokenizer, [chat], max_length=max_length)
        assert documents.spans(0).tolist() == spans
        assert micro_batch(documents, [0]).target_counts == (sum(end - start for start, end in spans),)
    documents = documents_of_examples(tmp_path, tokenizer, [chat], max_length=3)
    assert (len(documents), documents.without_target) == (0, 1)
