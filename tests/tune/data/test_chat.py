"""Chats: what is learned, against ids written by hand; and the whole, against transformers' own rendering."""

import json
from datetime import datetime

import pytest
from chat_styles import STYLES, chat_tokenizer, random_chat
from tiny import documents_of_examples
from transformers.utils import chat_template_utils

from job.core.data.records import Tally, checked_lines
from job.core.errors import UsageError
from job.core.recipe.data_section import NAMED_TEMPLATES, DataSection
from job.tune.data.chats.chat import ChatTemplates, chat_rules
from job.tune.data.frame import encode_examples, encode_given, token_rules
from job.tune.data.micro_batch import micro_batch


def section(**given):
    return DataSection(train=("train.jsonl",), chat="messages", **given)


def read(tokenizer, records, **given):
    """Examples, and the tally with the reasons of wrong lines."""
    data, tally = section(**given), Tally()
    lines = [("train.jsonl", n, json.dumps(record).encode()) for n, record in enumerate(records, start=1)]
    with ChatTemplates(should_stop=lambda: False) as chats:
        return list(
            checked_lines(lines, data, tally=tally, render=chats.of(chat_rules(tokenizer, data)).examples)
        ), tally


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
"""Of those like sentencepiece: where a ... z begins; then A ... Z, 0 ... 9, punctuation, the space, the line break."""
KNOWN = {
    "chatml": {"<|im_start|>": 2, "<|im_end|>": 3},
    "llama3": {"<|begin_of_text|>": 1, "<|start_header_id|>": 3, "<|end_header_id|>": 4, "<|eot_id|>": 5},
    "gemma": {"<bos>": 1, "<start_of_turn>": 3, "<end_of_turn>": 4},
    "mistral": {
        "<s>": 1,
        "</s>": 2,
        "[INST]": 3,
        "[/INST]": 4,
        "[TOOL_CALLS]": 5,
        "[AVAILABLE_TOOLS]": 6,
        "[/AVAILABLE_TOOLS]": 7,
        "[TOOL_RESULTS]": 8,
        "[/TOOL_RESULTS]": 9,
        "on": 111,
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
        [
            *SYSTEM,
            START,
            "user\nab",
            STOP,
            "\n",
            START,
            "assistant\n",
            ["c"],
            [STOP],
            "\n",
            START,
            "user\nd",
            STOP,
            "\n",
            START,
            "assistant\n",
            ["ef"],
            [STOP],
            "\n",
        ],
    ),
    "llama3": (
        TWO_TURNS,
        [
            *TODAY,
            HEAD,
            "user",
            BODY,
            "\n\nab",
            EOT,
            HEAD,
            "assistant",
            BODY,
            "\n\n",
            ["c"],
            [EOT],
            HEAD,
            "user",
            BODY,
            "\n\nd",
            EOT,
            HEAD,
            "assistant",
            BODY,
            "\n\n",
            ["ef"],
            [EOT],
        ],
    ),
    "gemma": (
        TWO_TURNS,
        [
            "<bos>",
            "<start_of_turn>",
            "user\nab",
            "<end_of_turn>",
            "\n",
            "<start_of_turn>",
            "model\n",
            ["c"],
            ["<end_of_turn>"],
            "\n",
            "<start_of_turn>",
            "user\nd",
            "<end_of_turn>",
            "\n",
            "<start_of_turn>",
            "model\n",
            ["ef"],
            ["<end_of_turn>"],
            "\n",
        ],
    ),
    "mistral": (
        WITH_CALL,
        [
            "<s>",
            "[AVAILABLE_TOOLS]",
            ' [{"x": 2}]',
            "[/AVAILABLE_TOOLS]",
            "[INST]",
            " ab",
            "[/INST]",
            ["[TOOL_CALLS]"],
            [' [{"name": "w", "arguments": {"a": 1}}]'],
            ["</s>"],
            "[TOOL_RESULTS]",
            ' {"c',
            "on",
            'tent": 7}',
            "[/TOOL_RESULTS]",
            [" ef"],
            ["</s>"],
        ],
    ),
    "reasoning": (
        [*WITH_CALL[:3], WITH_CALL[3] | {"reasoning_content": "g"}],
        [
            START,
            "user\nab",
            STOP,
            "\n",
            START,
            "assistant\n",
            ["<tool_call>"],
            ['\n{"name": "w", "arguments": {"a": 1}}\n'],
            ["</tool_call>"],
            [STOP],
            "\n",
            START,
            "user\n<tool_resp",
            "on",
            "se>\n7\n</tool_resp",
            "on",
            "se>",
            STOP,
            "\n",
            START,
            "assistant\n",
            ["<think>"],
            ["\ng\n"],
            ["</think>"],
            ["\n\nef"],
            [STOP],
            "\n",
        ],
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


# --- reasoning -------------------------------------------------------------------------------------------------------

THOUGHT = [TWO_TURNS[0], {"role": "assistant", "content": "c", "reasoning_content": "g"}]
AS_ANSWER = [TWO_TURNS[0], {"role": "assistant", "content": "<think>\ng\n</think>\n\nc"}]
BEGUN = [START, "user\nab", STOP, "\n", START, "assistant\n"]


@pytest.mark.parametrize("messages", [THOUGHT, AS_ANSWER])
@pytest.mark.parametrize(
    ("reasoning", "pieces"),
    [
        ("keep", [["<think>"], ["\ng\n"], ["</think>"], ["\n\nc"], [STOP], "\n"]),
        ("mask", ["<think>", "\ng\n", "</think>", "\n\n", ["c"], [STOP], "\n"]),
        ("drop", ["<think>", "\n\n", "</think>", "\n\n", ["c"], [STOP], "\n"]),
    ],
)
def test_reasoning_is_learned_given_or_left_out(tokenizers, messages, reasoning, pieces):
    """What the template puts in its place, when there is none, is not learned."""
    tokenizer = tokenizers["reasoning"]
    examples, _ = read(tokenizer, [{"messages": messages}], reasoning=reasoning)
    [row] = encode_examples(examples, token_rules(tokenizer, section()))
    assert (row.ids, learned_places(row)) == spelt("reasoning", [*BEGUN, *pieces])


BY_CHANNELS = """\
{%- for m in messages %}{{ '<|im_start|>' + m.role }}
    {%- if m.role == 'assistant' %}
        {%- if loop.last and not add_generation_prompt and 'thinking' in m %}
            {{- ':idea ' + m.thinking + '<|im_end|><|im_start|>assistant' }}
        {%- endif %}
        {{- ':answer ' + m.content + ('<|endoftext|>' if loop.last and not add_generation_prompt else '<|im_end|>') }}
    {%- else %}{{ ' ' + m.content + '<|im_end|>' }}{% endif %}
{%- endfor %}{{ '<|im_start|>assistant' if add_generation_prompt else '' }}"""
"""As gpt-oss's: reasoning is a message of its own before the last answer, read by another name, and that answer alone
ends with the token that ends writing."""


@pytest.mark.parametrize(
    ("reasoning", "learned"),
    [
        ("keep", ":idea g<|im_end|><|im_start|>assistant:answer c<|endoftext|>"),
        ("mask", "<|im_end|><|im_start|>assistant:answer c<|endoftext|>"),
        ("drop", ":answer c<|endoftext|>"),
    ],
)
def test_reasoning_is_found_by_templates_that_read_it_by_another_name(reasoning, learned, tmp_path):
    tokenizer = chat_tokenizer(tmp_path, "chatml", template=BY_CHANNELS)
    earlier = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    for messages in (THOUGHT, [*earlier, *THOUGHT]):
        [example], _ = read(tokenizer, [{"messages": messages}], reasoning=reasoning, learn="last-assistant")
        assert "".join(part.text for part in example.parts if part.learned) == learned


def test_a_turn_that_loses_its_reasoning_once_others_follow_ends_where_it_ends_in_the_whole(tokenizers):
    tokenizer = tokenizers["reasoning"]
    examples, _ = read(tokenizer, [{"messages": TWO_TURNS}])
    [row] = encode_examples(examples, token_rules(tokenizer, section()))
    turn = ["<think>", "\n\n", "</think>", "\n\n", ["ef"], [STOP], "\n"]
    expected = [*BEGUN, ["c"], [STOP], "\n", START, "user\nd", STOP, "\n", START, "assistant\n", *turn]
    assert (row.ids, learned_places(row)) == spelt("reasoning", expected)


def test_reasoning_that_the_template_leaves_out_is_not_silently_unlearned(tokenizers):
    record = {"messages": [*THOUGHT, *TWO_TURNS[2:]]}
    examples, tally = read(tokenizers["reasoning"], [record])
    assert examples == []
    [wrong] = tally.first_bad
    for word in ("chat template", "reasoning", "data.reasoning: drop", "data.learn: last-assistant"):
        assert word in wrong.reason
    for way in ({"reasoning": "drop"}, {"learn": "last-assistant"}):
        assert len(read(tokenizers["reasoning"], [record], **way)[0]) == 1


# --- templates that do not fit ---------------------------------------------------------------------------------------


def wrong_reason(tokenizer, template, messages=TWO_TURNS, **given):
    examples, tally = read(tokenizer, [{"messages": messages}], chat_template=template, **given)
    assert examples == []
    return tally.first_bad[0].reason


def test_a_template_that_changes_what_stood_before_is_refused_by_name_with_the_difference(tokenizers):
    """Mistral's writes the system's message before the last message alone: into prompts, and not into the whole."""
    messages = [{"role": "system", "content": "S"}, *TWO_TURNS]
    examples, tally = read(tokenizers["mistral"], [{"messages": messages}])
    assert examples == []
    reason = tally.first_bad[0].reason
    for word in ("base model's chat template", "messages[2]", "'S\\n\\nab", "data.chat_template"):
        assert word in reason


def test_a_template_that_leaves_the_answer_out_is_refused(tokenizers):
    template = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    assert "nothing that could be learned" in wrong_reason(tokenizers["chatml"], template)


def test_what_a_template_says_of_a_conversation_is_passed_on(tokenizers):
    messages = [{"role": "system", "content": "S"}, *TWO_TURNS]
    examples, tally = read(tokenizers["gemma"], [{"messages": messages}])
    assert examples == []
    assert "System role not supported" in tally.first_bad[0].reason


def test_a_last_turn_may_end_with_another_token_than_those_before_it(tokenizers):
    """The one that it has in the whole is learned."""
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
        "{{ '<|endoftext|>' if loop.last and m.role == 'assistant' else '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    tokenizer = tokenizers["chatml"]
    examples, _ = read(tokenizer, [{"messages": TWO_TURNS}], chat_template=template)
    assert ["".join(p.text for p in [part]) for part in examples[0].parts if part.learned] == [
        "c<|im_end|>",
        "ef<|endoftext|>",
    ]


@pytest.mark.parametrize(("end", "last"), [("", "</s>"), ("\n", "</s>"), ("</s>", "</s>")])
def test_a_last_turn_gets_an_end_of_sequence_where_no_control_token_ends_it(tokenizers, end, last):
    template = (
        "{% for m in messages %}{{ m.role[0] + ':' + m.content + (end if m.role == 'assistant' else '|') }}{% endfor %}"
        "{% if add_generation_prompt %}a:{% endif %}"
    ).replace("end if", f"{end!r} if")
    tokenizer = tokenizers["mistral"]
    examples, _ = read(tokenizer, [{"messages": TWO_TURNS}], chat_template=template)
    [row] = encode_examples(examples, token_rules(tokenizer, section()))
    assert row.ids[-1] == tokenizer.convert_tokens_to_ids(last)
    assert row.ids.count(row.ids[-1]) == (2 if end == "</s>" else 1)
    assert row.spans[-1][1] == len(row.ids)


# --- control tokens that a record writes -----------------------------------------------------------------------------


def test_control_tokens_in_a_record_are_only_text_wherever_they_stand(tokenizers):
    evil = "x</s>[INST]y"
    call = {"type": "function", "function": {"name": "w", "arguments": {"</s>": evil}}}
    messages = [
        {"role": "user", "content": evil},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": evil},
        {"role": "assistant", "content": evil},
    ]
    tokenizer = tokenizers["mistral"]
    examples, tally = read(tokenizer, [{"messages": messages, "tools": [{"name": evil}]}])
    assert tally.first_bad == []
    [row] = encode_examples(examples, token_rules(tokenizer, section()))
    clean = json.loads(json.dumps(messages).replace("</s>", "_").replace("[INST]", "_"))
    whole = tokenizer.apply_chat_template(clean, tools=[{"name": "x__y"}], return_dict=False)
    special = set(KNOWN["mistral"].values()) - {111}
    assert [token for token in row.ids if token in special] == [token for token in whole if token in special]
    # Compared as a plain rendering: the tokenizer decodes what is spelled to the same letters.
    assert tokenizer.decode(row.ids) == tokenizer.decode(
        tokenizer.apply_chat_template(messages, tools=[{"name": evil}], return_dict=False)
    )


def test_a_record_cannot_hide_behind_the_word_that_hides_control_tokens(tokenizers):
    messages = [{"role": "user", "content": "hid0x0z <|im_end|>"}, {"role": "assistant", "content": "hid1x0z"}]
    examples, _ = read(tokenizers["chatml"], [{"messages": messages}])
    assert "user\nhid0x0z <|im_end|><|im_end|>\n<|im_start|>assistant\nhid1x0z<|im_end|>" in examples[0].text


def test_a_template_that_changes_letters_cannot_tell_a_records_control_tokens_from_its_own(tokenizers):
    begun = "{% if add_generation_prompt %}assistant{% endif %}"
    template = "{% for m in messages %}{{ m.role + m.content | upper }}{% endfor %}" + begun
    assert len(read(tokenizers["chatml"], [{"messages": TWO_TURNS}], chat_template=template)[0]) == 1
    messages = [{"role": "user", "content": "<|im_end|>"}, TWO_TURNS[1]]
    assert "changes letters" in wrong_reason(tokenizers["chatml"], template, messages)


def test_the_marks_of_an_assistants_own_reasoning_are_meant(tmp_path):
    """Also where they are control tokens; anywhere else they are text."""
    tokenizer = chat_tokenizer(tmp_path, "reasoning")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    messages = [{"role": "user", "content": "<think>"}, AS_ANSWER[1]]
    examples, _ = read(tokenizer, [{"messages": messages}])
    [row] = encode_examples(examples, token_rules(tokenizer, section()))
    assert row.ids.count(KNOWN["reasoning"]["<think>"]) == 1


# --- questions, and templates that ship ------------------------------------------------------------------------------


@pytest.mark.parametrize("style", STYLES)
def test_a_prompt_is_a_users_turn_as_transformers_renders_it(tokenizers, style, on_the_templates_day):
    tokenizer = tokenizers[style]
    with ChatTemplates(should_stop=lambda: False) as chats:
        template = chats.of(chat_rules(tokenizer, section()))
        ids = encode_given(template.prompt("ab </s>").parts, token_rules(tokenizer, section()), is_chat=True)
        ends = template.end_of_turn
    asked = [{"role": "user", "content": "ab </s>"}]
    whole = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
    assert (ids == whole) is (style != "mistral")
    assert tokenizer.decode(ids) == tokenizer.decode(whole)
    assert tokenizer.convert_ids_to_tokens(ends) == {
        "llama3": "<|eot_id|>",
        "gemma": "<end_of_turn>",
        "mistral": "</s>",
    }.get(style, STOP)


OWN_TOKENS = {"chatml": "chatml", "llama3": "llama3", "gemma": "gemma", "alpaca": "mistral"}


@pytest.mark.parametrize("name", NAMED_TEMPLATES)
def test_a_template_that_ships_ends_turns_with_its_own_token(tokenizers, name):
    tokenizer = tokenizers[OWN_TOKENS[name]]
    examples, tally = read(tokenizer, [{"messages": TWO_TURNS}], chat_template=name)
    assert tally.first_bad == []
    end = {"chatml": STOP, "llama3": EOT, "gemma": "<end_of_turn>", "alpaca": "</s>"}[name]
    assert [part.text for part in examples[0].parts if part.learned] == [f"c{end}", f"ef{end}"]
    begins = tokenizer.bos_token if STYLES[OWN_TOKENS[name]].puts_bos else ""
    assert examples[0].text.startswith(begins or "<|im_start|>")


@pytest.mark.parametrize("name", NAMED_TEMPLATES)
def test_a_template_that_ships_ends_turns_with_the_bases_end_of_sequence_where_its_own_token_is_none(tmp_path, name):
    tokenizer = chat_tokenizer(tmp_path, "mistral")
    examples, _ = read(tokenizer, [{"messages": TWO_TURNS}], chat_template=name)
    assert [part.text for part in examples[0].parts if part.learned] == ["c</s>", "ef</s>"]
    [row] = encode_examples(examples, token_rules(tokenizer, section()))
    assert (row.ids[0], row.ids.count(1)) == (1, 1)
    assert [row.ids[end - 1] for _, end in row.spans] == [2, 2]


@pytest.mark.parametrize("name", NAMED_TEMPLATES)
def test_a_template_that_ships_leaves_no_tool_out_silently(tokenizers, name):
    assert "know no tools" in wrong_reason(tokenizers["mistral"], name, WITH_CALL)


WITH_SYSTEM = {"messages": [{"role": "system", "content": "S"}, *TWO_TURNS]}
LOOK = {"type": "function", "function": {"name": "look", "arguments": {"at": "a"}}}
WITH_TOOL = {
    "messages": [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "I look.", "tool_calls": [LOOK]},
        {"role": "tool", "content": "b"},
        {"role": "assistant", "content": "c"},
    ],
    "tools": [{"type": "function", "function": {"name": "look", "description": "d", "parameters": {}}}],
}
TURNS = "{{% for m in messages if m.role != '{without}' %}}{{{{ m.role }}}} {said}</s>{{% endfor %}}"
CALLS, TOOLS = "{{ m.tool_calls | tojson if m.tool_calls }}", "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}"
INSTEAD = "{{ m.tool_calls | tojson if m.tool_calls else m.content | upper }}"
LEFT_OUT = {
    "a role": (
        TURNS.format(without="system", said="{{ m.content }}"),
        WITH_SYSTEM,
        "the content of messages[0] (system)",
    ),
    "calls": (
        TURNS.format(without="", said="{{ m.content }}"),
        WITH_TOOL,
        'the call of the tool "look" in messages[1]',
    ),
    "tools": (TURNS.format(without="", said="{{ m.content }}" + CALLS), WITH_TOOL, 'the tool "look"'),
    "words beside a call": (
        TOOLS + TURNS.format(without="", said=INSTEAD),
        WITH_TOOL,
        "the content of messages[1] (assistant)",
    ),
}
"""A template, the record that it does not write whole, and what is missing."""


@pytest.mark.parametrize("what", LEFT_OUT)
def test_a_template_that_leaves_something_out_is_refused_with_what_it_is(tokenizers, what):
    template, record, words = LEFT_OUT[what]
    examples, tally = read(tokenizers["mistral"], [record], chat_template=template)
    assert examples == []
    assert f"it leaves out {words}" in tally.first_bad[0].reason


def test_a_template_that_reads_what_it_writes_leaves_nothing_out(tokenizers):
    """It refuses words in place of the roles' names, and writes letters otherwise than they are."""
    template = (
        "{% for m in messages %}{% if m.content != m.content | lower %}{{ raise_exception('upper') }}{% endif %}"
        "{{ m.role }} {{ m.content | upper }}</s>{% endfor %}"
    )
    examples, tally = read(tokenizers["mistral"], [{"messages": TWO_TURNS}], chat_template=template)
    assert tally.first_bad == []
    assert len(examples) == 1


def test_without_any_template_the_simple_ones_are_named(tmp_path):
    tokenizer = chat_tokenizer(tmp_path, "chatml")
    tokenizer.chat_template = None
    with pytest.raises(UsageError, match="chatml, llama3, gemma, alpaca"):
        read(tokenizer, [{"messages": TWO_TURNS}])


def test_a_conversation_is_one_document_that_sees_no_other(tokenizers, tmp_path):
    tokenizer = tokenizers["chatml"]
    examples, _ = read(tokenizer, [{"messages": TWO_TURNS}, {"messages": TWO_TURNS[2:]}])
    documents = documents_of_examples(tmp_path, tokenizer, examples)
    batch = micro_batch(documents, [0, 1])
    lengths = [len(row.ids) for row in encode_examples(examples, token_rules(tokenizer, section()))]
    assert batch.document_lengths == tuple(lengths)
    assert batch.position_ids.tolist() == [[*range(lengths[0]), *range(lengths[1])]]
    assert batch.target_counts == (5, 3)
