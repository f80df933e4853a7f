"""Chats: what is learned, against ids written by hand; and the whole, against transformers' own rendering."""

import json
from datetime import datetime

import pytest
from chat_styles import STYLES, chat_tokenizer, random_chat
from transformers.utils import chat_template_utils

from job.core.data_section import DataSection
from job.core.records import Tally, checked_lines
from job.tune.data.chat import ChatTemplates
from job.tune.data.frame import encode_examples, token_rules


def section(**given):
    return DataSection(train=("train.jsonl",), chat="messages", **given)


def read(tokenizer, records, **given):
    """Examples, and the tally with the reasons of wrong lines."""
    data, tally = section(**given), Tally()
    lines = [("train.jsonl", n, json.dumps(record).encode()) for n, record in enumerate(records, start=1)]
    with ChatTemplates(tokenizer, should_stop=lambda: False) as chats:
        return list(checked_lines(lines, data, tally=tally, render=chats.rendering(data))), tally


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chats")
    return {style: chat_tokenizer(folder / style, style) for style in STYLES}


@pytest.fixture
def on_the_templates_day(monkeypatch):
    """A template that asks for the date gets this one of us, on any day."""

    class Then(datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2024, 7, 26, tzinfo=tz)

    monkeypatch.setattr(chat_template_utils, "datetime", Then)


@pytest.mark.usefixtures("on_the_templates_day")
@pytest.mark.parametrize("learn", ["all-assistant", "last-assistant"])
@pytest.mark.parametrize("style", STYLES)
def test_a_rendered_conversation_is_transformers_own_token_for_token(tokenizers, style, learn):
    tokenizer = tokenizers[style]
    records = [random_chat(style, seed, reasoning=style == "reasoning" and seed % 2 == 0) for seed in range(200)]
    examples, tally = read(tokenizer, records, learn=learn)
    assert (len(examples), tally.first_bad) == (200, [])
    rows = encode_examples(examples, token_rules(tokenizer, section()))
    for record, row in zip(records, rows, strict=True):
        whole = tokenizer.apply_chat_template(record["messages"], tools=record.get("tools"), return_dict=False)
        assert row.ids == whole, record


# --- labels against ids written by hand ------------------------------------------------------------------------------

# Ids of the tokenizers in chat_styles.py: <unk> 0, the control tokens from 1 on, other added tokens, then the letters.
BYTES_FROM = {"chatml": 4, "llama3": 6, "reasoning": 8}
"""Of byte-level tokenizers: where the alphabet begins, which has ! " # ... ~ in ASCII's order."""
LETTERS_FROM = {"gemma": 5, "mistral": 10}
"""Of those like sentencepiece: where a ... z begins; behind them A ... Z, 0 ... 9, punctuation, the space, the line break."""
KNOWN = {
    "chatml": {"<|im_start|>": 2, "<|im_end|>": 3},
    "llama3": {"<|begin_of_text|>": 1, "<|start_header_id|>": 3, "<|end_header_id|>": 4, "<|eot_id|>": 5},
    "gemma": {"<bos>": 1, "<start_of_turn>": 3, "<end_of_turn>": 4},
    "mistral": {
        **{"<s>": 1, "</s>": 2, "[INST]": 3, "[/INST]": 4, "[TOOL_CALLS]": 5, "[AVAILABLE_TOOLS]": 6},
        **{"[/AVAILABLE_TOOLS]": 7, "[TOOL_RESULTS]": 8, "[/TOOL_RESULTS]": 9, "on": 111},
    },
    "reasoning": {
        "<|im_start|>": 2,
        "<|im_end|>": 3,
        "<think>": 4,
        "</think>": 5,
        "<tool_call>": 6,
        "</tool_call>": 7,
        "on": 267,
    },
}
"""And of what is merged: the fourth behind the alphabet of 98 letters or 256 bytes."""
PUNCTUATION = r"""!"#$%&'()*+,-./:;<=>?@[\]^_`{|}~"""


def letter(style, character):
    """The id of a letter."""
    if style in BYTES_FROM:
        # Behind ASCII's 94 and the 94 of Latin-1 that can be seen stand those made for bytes that cannot: 0 is the
        # first of them, so the line break is the 11th and the space the 33rd.
        places = {"\n": 94 + 94 + 10, " ": 94 + 94 + 32}
        return BYTES_FROM[style] + places.get(character, ord(character) - ord("!"))
    first = LETTERS_FROM[style]
    if character.islower():
        return first + ord(character) - ord("a")
    if character.isupper():
        return first + 26 + ord(character) - ord("A")
    if character.isdigit():
        return first + 52 + int(character)
    return first + 62 + (PUNCTUATION + " \n").index(character)


def spelt(style, pieces):
    """Ids, and the places of those that are learned: a piece in brackets of a list is learned."""
    ids, learned = [], []
    for piece in pieces:
        [text], is_learned = ([piece], False) if isinstance(piece, str) else (piece, True)
        found = [KNOWN[style][text]] if text in KNOWN[style] else [letter(style, each) for each in text]
        learned += range(len(ids), len(ids) + len(found)) if is_learned else []
        ids += found
    return ids, learned


def learned_places(row):
    return [place for start, end in row.spans for place in range(start, end)]


TWO_TURNS = [
    {"role": "user", "content": "ab"},
    {"role": "assistant", "content": "c"},
    {"role": "user", "content": "d"},
    {"role": "assistant", "content": "ef"},
]
CALL = {"type": "function", "function": {"name": "w", "arguments": {"a": 1}}}
WITH_CALL = [
    {"role": "user", "content": "ab"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "7"},
    {"role": "assistant", "content": "ef"},
]
START, STOP, HEAD, BODY, EOT = "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"
SYSTEM = (START, "system\nYou are a helpful assistant.", STOP, "\n")
TODAY = ("<|begin_of_text|>", HEAD, "system", BODY, "\n\nToday Date: 26 Jul 2024\n\n", EOT)
WRITTEN = {
    "chatml": (
        TWO_TURNS,
        [*SYSTEM, START, "user\nab", STOP, "\n", START, "assistant\n", ["c"], [STOP], "\n"]
        + [START, "user\nd", STOP, "\n", START, "assistant\n", ["ef"], [STOP], "\n"],
    ),
    "llama3": (
        TWO_TURNS,
        [*TODAY, HEAD, "user", BODY, "\n\nab", EOT, HEAD, "assistant", BODY, "\n\n", ["c"], [EOT]]
        + [HEAD, "user", BODY, "\n\nd", EOT, HEAD, "assistant", BODY, "\n\n", ["ef"], [EOT]],
    ),
    "gemma": (
        TWO_TURNS,
        ["<bos>", "<start_of_turn>", "user\nab", "<end_of_turn>", "\n", "<start_of_turn>", "model\n", ["c"]]
        + [["<end_of_turn>"], "\n", "<start_of_turn>", "user\nd", "<end_of_turn>", "\n"]
        + ["<start_of_turn>", "model\n", ["ef"], ["<end_of_turn>"], "\n"],
    ),
    "mistral": (
        WITH_CALL,
        ["<s>", "[AVAILABLE_TOOLS]", ' [{"x": 2}]', "[/AVAILABLE_TOOLS]", "[INST]", " ab", "[/INST]"]
        + [["[TOOL_CALLS]"], [' [{"name": "w", "arguments": {"a": 1}}]'], ["</s>"]]
        + ["[TOOL_RESULTS]", ' {"c', "on", 'tent": 7}', "[/TOOL_RESULTS]", [" ef"], ["</s>"]],
    ),
    "reasoning": (
        [*WITH_CALL[:3], WITH_CALL[3] | {"reasoning_content": "g"}],
        [START, "user\nab", STOP, "\n", START, "assistant\n"]
        + [["<tool_call>"], ['\n{"name": "w", "arguments": {"a": 1}}\n'], ["</tool_call>"], [STOP], "\n"]
        + [START, "user\n<tool_resp", "on", "se>\n7\n</tool_response>", STOP, "\n", START, "assistant\n"]
        + [["<think>"], ["\ng\n"], ["</think>"], ["\n\nef"], [STOP], "\n"],
    ),
}


@pytest.mark.parametrize("learn", ["all-assistant", "last-assistant"])
@pytest.mark.parametrize("style", STYLES)
def test_the_assistants_turns_are_learned_and_their_ends_with_them(tokenizers, style, learn):
    """Tool calls too, and not their results; of one turn or all, by the recipe."""
    messages, pieces = WRITTEN[style]
    tools = {"tools": [{"x": 2}]} if style == "mistral" else {}
    examples, tally = read(tokenizers[style], [{"messages": messages, **tools}], learn=learn)
    assert tally.first_bad == []
    [row] = encode_examples(examples, token_rules(tokenizers[style], section()))
    ids, learned = spelt(style, pieces)
    if learn == "last-assistant":
        learned = [place for place in learned if place >= row.answer_from]
    assert row.ids == ids
    assert learned_places(row) == learned
    last = max(place for place in learned if place - 1 not in learned)
    assert row.answer_from == last
