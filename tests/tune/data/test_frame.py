"""Token ids and targets, against ids written by hand; the alphabet stands in tiny.py."""

import copy

import pytest
import torch
from tiny import documents_of

from job.core.errors import UsageError
from job.core.recipe import DataSection
from job.core.records import Example
from job.tune.data.frame import encode_examples, encode_prompt, token_rules
from job.tune.data.micro_batch import micro_batch

BOS, EOS, SPACE, AB = 1, 2, 29, 35
A, B, C, D, E, F, S = 3, 4, 5, 6, 7, 8, 21


def data(**templates):
    return DataSection(train=("train.jsonl",), **templates)


def encoded(tokenizer, section, prompt, completion):
    [row] = encode_examples(
        [Example(prompt=prompt, completion=completion, where="train.jsonl:1")],
        tokenizer,
        token_rules(tokenizer, section),
    )
    return row.ids, row.target_from


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
    assert encode_prompt("cd", plain_tokenizer, token_rules(plain_tokenizer, PAIR)) == [C, D]


def test_bos_and_eos_that_the_template_writes_stand_once(tokenizer):
    section = data(prompt="<s>{q}", completion="{a}</s>")
    assert encoded(tokenizer, section, "<s>cd", "ef</s>") == ([BOS, C, D, E, F, EOS], 3)
    assert encode_prompt("<s>cd", tokenizer, token_rules(tokenizer, section)) == [BOS, C, D]


def test_a_special_token_in_a_record_is_only_text(tokenizer):
    assert encoded(tokenizer, TEXT, "", "c</s>d") == ([BOS, C, 30, 32, S, 31, D, EOS], 1)
    assert encoded(tokenizer, PAIR, "<s>", "c") == ([BOS, 30, S, 31, C, EOS], 4)


def test_a_prompt_keeps_its_ids_where_the_tokenizer_would_merge_across_the_border(tokenizer):
    assert encoded(tokenizer, TEXT, "", "cab")[0] == [BOS, C, AB, EOS]
    assert encoded(tokenizer, PAIR, "ca", "bd") == ([BOS, C, A, B, D, EOS], 3)
    assert encode_prompt("ca", tokenizer, token_rules(tokenizer, PAIR)) == [BOS, C, A]


def test_without_an_end_of_sequence_token_the_base_is_refused(tokenizer):
    endless = copy.deepcopy(tokenizer)
    endless.eos_token = None
    with pytest.raises(UsageError, match="end-of-sequence"):
        token_rules(endless, TEXT)


def test_a_truncated_example_gets_no_eos_and_one_cut_inside_its_prompt_is_left_out(tokenizer, tmp_path):
    documents = documents_of(tmp_path, tokenizer, [("cd", "efefefef"), ("cdcdcdcdcd", "e"), ("c", "d")], max_length=8)
    assert [documents.token_ids(i).tolist() for i in range(2)] == [[BOS, C, D, E, F, E, F, E], [BOS, C, D, EOS]]
    assert (documents.truncated, documents.without_target, documents.dropped) == (1, 1, 0)
    assert documents.targets.tolist() == [5, 2]
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
