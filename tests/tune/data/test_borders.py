"""Borders and control tokens with every kind of tokenizer: what is learned reads as what the record says."""

import json
import pickle
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_kinds import CONTROL, KINDS, LOSSLESS, REFUSES, tokenizer_of
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from job.core.data.records import Example, Part
from job.core.errors import UsageError
from job.core.recipe.data_section import DataSection
from job.tune.data.frame import encode_examples, encode_given, encode_prompt, token_rules
from job.tune.model.config import load_tokenizer

PAIR = DataSection(train=("train.jsonl",), prompt="{q}", completion="{a}")
often = settings(deadline=None, derandomize=True, database=None, max_examples=150)
words = st.lists(st.sampled_from(["the", "hat", "is", "here", "they", "said", "rest", "x"]), min_size=1, max_size=4)
texts = st.lists(st.sampled_from([*"thesaidrx.:'", " ", "  ", "\n", "\n\n", "é", "the", "rest"]), max_size=8).map(
    "".join
)
with_control = st.lists(texts | st.sampled_from(CONTROL), max_size=6).map("".join)


@pytest.fixture(scope="module")
def bases():
    """Kind -> tokenizer and the rules for it."""
    made = {kind: tokenizer_of(kind) for kind in KINDS}
    return {kind: (tokenizer, token_rules(tokenizer, PAIR)) for kind, tokenizer in made.items()}


def field_of(text, *, learned):
    return Part(text=text, learned=learned)


def literal_of(text, *, learned):
    return Part(text=text, learned=learned, control=True)


def framed(rules, *parts):
    [row] = encode_examples([Example(parts=parts, where="train.jsonl:1")], rules)
    return row


def own_ids(tokenizer, text, *, control):
    """What the tokenizer itself makes of a text."""
    return tokenizer(text, add_special_tokens=False, split_special_tokens=not control).input_ids


def framed_ids(tokenizer, ids):
    ids = ids if ids[:1] == [tokenizer.bos_token_id] else [tokenizer.bos_token_id, *ids]
    return ids if ids[-1:] == [tokenizer.eos_token_id] else [*ids, tokenizer.eos_token_id]


def read(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


kinds = pytest.mark.parametrize("kind", KINDS)


@kinds
@often
@given(prompt=texts, completion=texts)
def test_the_ids_before_a_border_and_those_behind_it_read_as_the_text(bases, kind, prompt, completion):
    tokenizer, rules = bases[kind]
    parts = field_of(prompt, learned=False), field_of(completion, learned=True)
    ids = [own_ids(tokenizer, text, control=False) for text in (prompt, completion, prompt + completion)]
    given_text, learned_text, whole = (read(tokenizer, each) for each in ids)
    try:
        row = framed(rules, *parts)
    except UsageError:
        assert kind in REFUSES
        assert not (prompt[-1:].isalpha() and completion.startswith(" "))  # as the message says
        return
    found = read(tokenizer, row.ids)
    assert found in {whole, prompt + completion} or (kind == "composing" and found == given_text + learned_text)
    if kind in LOSSLESS:
        assert found == prompt + completion
    assert row.ids[: row.answer_from] == encode_given([parts[0]], rules)


@kinds
@often
@given(before=words, behind=words)
def test_between_words_the_ids_are_those_of_the_text_as_one(bases, kind, before, behind):
    tokenizer, rules = bases[kind]
    prompt, completion = " ".join(before), " " + " ".join(behind)
    row = framed(rules, field_of(prompt, learned=False), field_of(completion, learned=True))
    assert row.ids == framed_ids(tokenizer, own_ids(tokenizer, prompt + completion, control=False))
    assert row.spans == ((1 + len(own_ids(tokenizer, prompt, control=False)), len(row.ids)),)


@kinds
@often
@given(text=with_control)
def test_a_templates_own_text_has_the_ids_that_the_tokenizer_gives_it(bases, kind, text):
    tokenizer, rules = bases[kind]
    ids = own_ids(tokenizer, text, control=True)
    assert framed(rules, literal_of(text, learned=True)).ids == framed_ids(tokenizer, ids)
    assert [*encode_prompt(text, rules), tokenizer.eos_token_id] == framed_ids(
        tokenizer, [*ids, tokenizer.eos_token_id]
    )


@kinds
@often
@given(question=with_control, answer=with_control)
def test_no_control_token_comes_from_a_field(bases, kind, question, answer):
    tokenizer, rules = bases[kind]
    row = framed(
        rules,
        literal_of("<s><|user|>", learned=False),
        field_of(question, learned=False),
        literal_of(" <|end|>\n", learned=False),
        field_of(answer, learned=True),
        literal_of(" <|end|>", learned=True),
    )
    control = set(tokenizer.convert_tokens_to_ids(CONTROL)) - {tokenizer.unk_token_id}
    found = tokenizer.convert_ids_to_tokens([each for each in row.ids if each in control])
    assert found == ["<s>", "<|user|>", "<|end|>", "<|end|>", "</s>"]
    assert row.ids[0] == tokenizer.bos_token_id
    assert row.ids[-1] == tokenizer.eos_token_id
    assert row.spans == ((row.answer_from, len(row.ids)),)


@pytest.mark.parametrize("kind", LOSSLESS)
@often
@given(text=with_control)
def test_a_control_token_in_a_field_is_spelled(bases, kind, text):
    tokenizer, rules = bases[kind]
    row = framed(rules, field_of(text, learned=True))
    assert read(tokenizer, row.ids) == text


def test_a_token_that_only_the_tokenizers_config_marks_is_a_control_token_too(bases, tmp_path):
    """Llama-3-like bases have many that no part names."""
    tokenizer = tokenizer_of("byte-level")
    tokenizer.add_tokens(["<|turn|>"])
    tokenizer.save_pretrained(tmp_path)
    number = tokenizer.convert_tokens_to_ids("<|turn|>")
    path = tmp_path / "tokenizer_config.json"
    marks = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}
    config = json.loads(path.read_text()) | {"added_tokens_decoder": {str(number): {"content": "<|turn|>"} | marks}}

    def ids(*parts):
        return framed(token_rules(load_tokenizer(tmp_path), PAIR), *parts).ids

    parts = field_of("<|turn|>", learned=False), literal_of("<|turn|>", learned=True)
    assert ids(*parts).count(number) == 2  # a token like any other
    path.write_text(json.dumps(config))
    assert ids(*parts)[-2:] == [number, tokenizer.eos_token_id]
    assert ids(*parts).count(number) == 1


def test_where_the_border_would_change_the_text_the_message_says_what_to_write(bases):
    _, rules = bases["word-piece"]
    with pytest.raises(UsageError, match=re.escape("cut between ...'they s' and 'aid the rest'..., the text")):
        framed(rules, field_of("they s", learned=False), field_of("aid the rest", learned=True))
    framed(rules, field_of("they", learned=False), field_of(" said", learned=True))


def test_rules_can_be_handed_to_another_process(bases):
    for _, rules in bases.values():
        parts = literal_of("<|user|>the", learned=False), field_of(" hat</s>", learned=True)
        assert framed(pickle.loads(pickle.dumps(rules)), *parts) == framed(rules, *parts)


def test_a_text_that_the_tokenizer_drops_whole_is_refused():
    """A model of pieces that has no token for what it does not know leaves it out, and says nothing."""
    model = Tokenizer(models.BPE({letter: number for number, letter in enumerate(["<s>", "</s>", *"abc"])}, []))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, bos_token="<s>", eos_token="</s>")
    rules = token_rules(tokenizer, PAIR)
    assert framed(rules, field_of("ab", learned=False), field_of("?!c", learned=True)).ids == [2, 3, 4, 1]
    with pytest.raises(UsageError, match=r"train\.jsonl:1: the base model's tokenizer makes no token of 'xyz'"):
        framed(rules, field_of("ab", learned=False), field_of("xyz", learned=True))
    assert framed(rules, field_of("ab", learned=False), field_of("?!", learned=True)).ids == [2, 3, 1]
