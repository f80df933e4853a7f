"""Conversations as data sets write them: the usual names mapped, and what is wrong named with its place."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from job.core.data.chats import Chat, as_read, chat_of, prompt_chat

PAIR = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
CALLED = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}


def read(record, *, field="messages", drop=False, asked=False):
    return chat_of(record, field=field, tools="tools", drop_reasoning=drop, where="t:1", asked=asked)


@pytest.mark.parametrize(
    "messages",
    [
        PAIR,
        [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}],
        [{"role": "Human", "content": "a"}, {"role": "model", "content": "b"}],
        [{"from": "prompter", "value": "a", "role": None}, {"from": "chatgpt", "value": "b"}],
        [{"role": "user", "content": [{"type": "text", "text": "a"}]}, {"role": "bot", "content": [{"text": "b"}]}],
    ],
)
@pytest.mark.parametrize("field", ["messages", "conversations", "data.turns", "dotted.name"])
def test_roles_and_fields_have_one_name_each(messages, field):
    record = {"data": {"turns": messages}} if field == "data.turns" else {field: messages}
    assert read(record, field=field).messages == PAIR


def test_of_the_usual_fields_the_one_that_is_there_is_read():
    assert read({"conversations": PAIR}, field="messages").messages == PAIR
    assert read({"messages": PAIR}, field="conversations").messages == PAIR
    assert "is missing" in read({"messages": PAIR}, field="turns")


def test_tool_calls_have_one_form_and_their_arguments_are_objects():
    written = [
        {"role": "assistant", "content": None, "tool_calls": [CALLED]},
        {"role": "assistant", "tool_calls": [{"name": "f", "arguments": '{"x": 1}'}]},
        {"role": "assistant", "content": "", "function_call": {"name": "f", "arguments": '{"x": 1}'}},
        {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
    ]
    for message in written:
        chat = read({"messages": [PAIR[0], message, {"from": "observation", "value": "7"}, PAIR[1]]})
        assert chat.messages[1] == {"role": "assistant", "content": "", "tool_calls": [CALLED]}
        assert chat.messages[2] == {"role": "tool", "content": "7"}
        assert chat.turns == (1, 3)


@pytest.mark.parametrize("tools", [[{"name": "f"}], '[{"name": "f"}]'])
def test_tools_are_a_list_or_one_as_text(tools):
    assert read({"messages": PAIR, "tools": tools}).tools == [{"name": "f"}]
    assert read({"messages": PAIR, "tools": None}).tools is None
    assert read({"messages": PAIR, "tools": []}).tools is None


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning"])
def test_reasoning_has_one_name_and_may_be_left_out(key):
    messages = [PAIR[0], PAIR[1] | {key: "c"}]
    assert read({"messages": messages}).messages[1] == PAIR[1] | {"reasoning_content": "c"}
    assert read({"messages": messages}, drop=True).messages == PAIR
    inside = [PAIR[0], {"role": "assistant", "content": "<think>\nc\n</think>\n\nb"}]
    assert read({"messages": inside}).messages == inside
    assert read({"messages": inside}, drop=True).messages == PAIR


WRONG = {
    "no field": ({"text": "a"}, '"messages" is missing (the record has "text")'),
    "another field": ({"mesages": PAIR}, 'did you mean "mesages"?'),
    "null": ({"messages": None}, '"messages" is null'),
    "no list": ({"messages": "a"}, '"messages" is a string, not a list of messages'),
    "empty": ({"messages": []}, '"messages" is an empty list'),
    "no object": ({"messages": ["a"]}, "messages[0] is a string, not an object with role and content"),
    "no role": ({"messages": [{"content": "a"}]}, "messages[0] has no role"),
    "unknown role": ({"messages": [{"role": "usr", "content": "a"}]}, 'messages[0].role is "usr", none of'),
    "role of another kind": ({"messages": [{"role": 1, "content": "a"}]}, "messages[0].role is a number"),
    "no content": ({"messages": [{"role": "user"}, PAIR[1]]}, "messages[0] has no content"),
    "a number": ({"messages": [{"role": "user", "content": 1}]}, "messages[0].content is a number, not text"),
    "an image": (
        {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
        'messages[0].content[0] is of type "image"; only text can be learned',
    ),
    "an empty question": (
        {"messages": [{"role": "user", "content": " "}, PAIR[1]]},
        "messages[0]: the content is empty",
    ),
    "an empty answer": (
        {"messages": [PAIR[0], {"role": "assistant", "content": "\n"}]},
        "messages[1]: the assistant's",
    ),
    "reasoning alone": (
        {"messages": [PAIR[0], {"role": "assistant", "content": "<think>c</think>"}]},
        "messages[1]: the assistant's content is empty",
    ),
    "no answer": ({"messages": PAIR[:1]}, "has no turn of the assistant"),
    "begins with the answer": ({"messages": [PAIR[1], *PAIR]}, "begins with the assistant"),
    "NUL": ({"messages": [{"role": "user", "content": "a\0"}, PAIR[1]]}, "messages[0] holds a NUL character"),
    "half a pair": ({"messages": [PAIR[0], PAIR[1] | {"name": "\ud800"}]}, "messages[1] holds half a surrogate pair"),
    "a call without a name": (
        {"messages": [PAIR[0], {"role": "assistant", "tool_calls": [{}]}]},
        "messages[1].tool_calls[0] names no function",
    ),
    "arguments that are no JSON": (
        {"messages": [PAIR[0], {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{x"}]}]},
        "messages[1].tool_calls[0]: arguments is text that is not JSON",
    ),
    "tools that are no list": ({"messages": PAIR, "tools": {"a": 1}}, '"tools" is an object, not a list of tools'),
    "a tool that is none": ({"messages": PAIR, "tools": ["f"]}, '"tools"[0] is a string'),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_wrong_with_a_conversation_is_named_with_its_place(kind):
    record, reason = WRONG[kind]
    found = read(record)
    assert isinstance(found, str)
    assert reason in found


def test_a_conversation_that_is_asked_needs_no_answer_and_is_asked_up_to_its_last():
    assert isinstance(read({"messages": PAIR[:1]}, asked=True), Chat)
    chat = read({"messages": [*PAIR, *PAIR]})
    assert prompt_chat(chat).messages == [*PAIR, PAIR[0]]
    assert as_read(prompt_chat(chat)) == "user: a\nassistant: b\nuser: a"
    assert as_read(prompt_chat(read({"messages": PAIR}))) == "a"


values = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.sampled_from(["user", "assistant", "tool", "a", "", "{}"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["role", "from", "content", "value", "tool_calls", "name", "arguments", "function", "text"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@settings(deadline=None, derandomize=True, database=None, max_examples=500)
@given(messages=values, tools=values)
def test_any_value_is_a_conversation_or_one_line_that_says_why_not(messages, tools):
    found = read({"messages": messages, "tools": tools})
    if isinstance(found, str):
        assert found
        assert "\n" not in found
        return
    assert found.turns
    json.dumps([found.messages, found.tools])
    for message in found.messages:
        assert message["role"] in {"system", "developer", "user", "assistant", "tool"}
        assert isinstance(message["content"], str)
