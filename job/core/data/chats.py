"""One record's conversation as chat templates read it: roles and fields by one name each, wrong ones named."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from job.core.close_names import did_you_mean
from job.core.data.fields import json_kind, listed

_ROLES = {
    **dict.fromkeys(("system", "sys"), "system"),
    "developer": "developer",
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model", "ai"), "assistant"),
    **dict.fromkeys(("tool", "function", "function_response", "observation", "ipython", "environment"), "tool"),
    "function_call": "function_call",
}
"""What data sets call a role: what chat templates call it. An assistant's turn `function_call` is its tool call as
JSON."""
_FIELDS = (("role", "from"), ("content", "value"))
_OF_A_MESSAGE = frozenset({"role", "from", "content", "value"})
REASONING = ("reasoning_content", "thinking", "reasoning")
"""What data sets and templates call an assistant's reasoning; the first holds."""
THINK = ("<think>", "</think>")
"""What stands around reasoning that is written into the answer itself."""
_USUAL = ("messages", "conversations", "conversation")
"""Fields that hold conversations: where the named one of them is not there, another one is meant."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chat:
    """A conversation that can be rendered."""

    messages: Sequence[Mapping[str, Any]]
    """Each with `role` and what else it has: content, reasoning_content, tool_calls, name."""
    tools: Sequence[Mapping[str, Any]] | None
    where: str
    """`file:line`, for messages."""

    @property
    def turns(self) -> tuple[int, ...]:
        """Places of the assistant's turns."""
        return tuple(n for n, message in enumerate(self.messages) if message["role"] == "assistant")


class _WrongChatError(ValueError):
    """Why a record holds no conversation; the message is for people."""


def chat_of(
    record: Mapping[str, Any], *, field: str, tools: str, drop_reasoning: bool, where: str, asked: bool = False
) -> Chat | str:
    """The conversation of a record, or the reason why it holds none that an assistant could learn from.

    Args:
        record: the JSON object.
        field: where the messages stand, `data.chat`.
        tools: where the tools' schemas stand, `data.tools`; a record may have none.
        drop_reasoning: whether reasoning is left out.
        where: `file:line`.
        asked: it is to be answered, so that nothing in it must be learned.
    """
    try:
        name, found = _messages(record, field)
        messages = [_message(each, f"{name}[{n}]", drop=drop_reasoning) for n, each in enumerate(found)]
        chat = Chat(messages=messages, tools=_tools(record, tools), where=where)
        if not asked:
            _refuse_unlearnable(chat, name)
    except _WrongChatError as error:
        return str(error)
    except RecursionError:
        return f'"{field}" is nested too deeply'
    return chat


def prompt_chat(chat: Chat) -> Chat:
    """What stands before the last answer: what the model is asked."""
    last = chat.turns[-1] if chat.turns else len(chat.messages)
    return Chat(messages=chat.messages[:last], tools=chat.tools, where=chat.where)


def as_read(chat: Chat) -> str:
    """A conversation for people: one message as it is, of several each with its role."""
    texts = [(str(message["role"]), str(message.get("content") or "")) for message in chat.messages]
    return texts[0][1] if len(texts) == 1 else "\n".join(f"{role}: {text}" for role, text in texts)


def _refuse_unlearnable(chat: Chat, name: str) -> None:
    if not chat.turns:
        raise _WrongChatError(f'"{name}" has no turn of the assistant, so nothing would be learned from it')
    if chat.turns[0] == 0:
        raise _WrongChatError(
            f'"{name}" begins with the assistant: nothing stands before that turn; put a message of the user before it'
        )


def _messages(record: Mapping[str, Any], field: str) -> tuple[str, list[Any]]:
    """The field's name, and the messages in it."""
    name, value = field, _at(record, field)
    if value is None and field in _USUAL:
        name = next((other for other in _USUAL if _at(record, other) is not None), field)
        value = _at(record, name)
    if value is None:
        absent = "is null" if field in record else "is missing"
        said = f"the record has {listed(record, field)}" if record else "the record is empty"
        raise _WrongChatError(f'"{field}" {absent} ({said})')
    if not isinstance(value, list):
        raise _WrongChatError(f'"{name}" is {json_kind(value)}, not a list of messages')
    if not value:
        raise _WrongChatError(f'"{name}" is an empty list')
    return name, value


def _at(record: Any, path: str) -> Any:
    """What stands at a dotted path; a key with that very name wins."""
    if isinstance(record, dict) and path in record:
        return record[path]
    head, dot, rest = path.partition(".")
    return _at(record[head], rest) if dot and isinstance(record, dict) and head in record else None


def _message(message: Any, place: str, *, drop: bool) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise _WrongChatError(f"{place} is {json_kind(message)}, not an object with role and content")
    for text in texts_in(message):
        _refuse_no_text(text, place)
    role_key, content_key = (next((n for n in names if message.get(n) is not None), None) for names in _FIELDS)
    if role_key is None:
        raise _WrongChatError(f"{place} has no role; write role and content, or from and value")
    role = _role(message[role_key], f"{place}.{role_key}")
    content = None if content_key is None else _content(message[content_key], f"{place}.{content_key}")
    if role == "function_call":
        return {"role": "assistant", "content": "", "tool_calls": [_call(content, place)]}
    rest = {key: value for key, value in message.items() if key not in _OF_A_MESSAGE and value is not None}
    if role == "assistant":
        return _assistant(content, rest, place, drop=drop)
    _refuse_blank(role, content, place)
    return {"role": role, "content": content, **rest}


def _role(value: Any, place: str) -> str:
    known = _ROLES.get(value.strip().lower()) if isinstance(value, str) else None
    if known is None:
        shown = f'"{value[:40]}"' if isinstance(value, str) else json_kind(value)
        meant = did_you_mean(value.strip().lower(), list(_ROLES)) if isinstance(value, str) else ""
        raise _WrongChatError(f"{place} is {shown}, none of system, user, assistant, tool{meant}")
    return known


def _content(value: Any, place: str) -> str:
    """Text, or the texts of a list of `{type: text}`."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise _WrongChatError(f"{place} is {json_kind(value)}, not text")
    texts = []
    for n, item in enumerate(value):
        text = item.get("text") if isinstance(item, dict) and item.get("type", "text") == "text" else item
        if not isinstance(text, str):
            held = f'of type "{item.get("type", "?")}"' if isinstance(item, dict) else json_kind(item)
            raise _WrongChatError(f"{place}[{n}] is {held}; only text can be learned")
        texts.append(text)
    return "".join(texts)


def _refuse_blank(role: str, content: str | None, place: str) -> None:
    if content is None:
        raise _WrongChatError(f"{place} has no content; write role and content, or from and value")
    # A tool may answer nothing, and a system may have nothing to say.
    if role == "user" and not content.strip():
        raise _WrongChatError(f"{place}: the content is empty")


def _assistant(content: str | None, rest: dict[str, Any], place: str, *, drop: bool) -> dict[str, Any]:
    reasoning = next((rest[key] for key in REASONING if rest.get(key) is not None), None)
    rest = {key: value for key, value in rest.items() if key not in REASONING}
    if reasoning is not None and not isinstance(reasoning, str):
        raise _WrongChatError(f"{place}: the reasoning is {json_kind(reasoning)}, not text")
    content = content or ""
    if drop:
        reasoning, content = None, without_think(content)
    calls = _calls(rest.pop("tool_calls", None), place)
    if "function_call" in rest:  # as OpenAI's interface wrote one call before it had tool_calls
        calls = [*calls, _call(rest.pop("function_call"), place)]
    if not calls and not without_think(content).strip():
        raise _WrongChatError(f"{place}: the assistant's content is empty; an answer must say something")
    if reasoning is not None and reasoning.strip():
        rest |= {"reasoning_content": reasoning}
    return {"role": "assistant", "content": content, **({"tool_calls": calls} if calls else {}), **rest}


def without_think(content: str) -> str:
    """An answer without the reasoning that it begins with."""
    begin, end = THINK
    if content.lstrip().startswith(begin) and end in content:
        return content.partition(end)[2].lstrip()
    return content


def _calls(value: Any, place: str) -> list[dict[str, Any]]:
    if value is None:
        return []
    if not isinstance(value, list):
        raise _WrongChatError(f"{place}.tool_calls is {json_kind(value)}, not a list")
    return [_call(each, f"{place}.tool_calls[{n}]") for n, each in enumerate(value)]


def _call(value: Any, place: str) -> dict[str, Any]:
    """A tool call in one form: `{type, function: {name, arguments}}`, the arguments as an object.

    Arguments are often kept as JSON in a string; a template that writes JSON would write it twice.
    """
    call = _json(value, place) if isinstance(value, str) else value
    if not isinstance(call, dict):
        raise _WrongChatError(f"{place} is {json_kind(call)}, not a tool call with name and arguments")
    function = call["function"] if isinstance(call.get("function"), dict) else call
    name, arguments = function.get("name"), function.get("arguments", {})
    if not isinstance(name, str) or not name.strip():
        raise _WrongChatError(f"{place} names no function")
    if isinstance(arguments, str):
        arguments = _json(arguments, f"{place}: arguments") if arguments.strip() else {}
    if not isinstance(arguments, dict):
        raise _WrongChatError(f"{place}: arguments is {json_kind(arguments)}, not an object")
    around = {key: value for key, value in call.items() if key == "id" and value is not None}
    return {**around, "type": "function", "function": {"name": name, "arguments": arguments}}


def _tools(record: Mapping[str, Any], field: str) -> list[dict[str, Any]] | None:
    value = _at(record, field)
    if isinstance(value, str):
        value = _json(value, f'"{field}"') if value.strip() else None
    if value is None or value == []:
        return None
    if not isinstance(value, list):
        raise _WrongChatError(f'"{field}" is {json_kind(value)}, not a list of tools')
    for n, tool in enumerate(value):
        if not isinstance(tool, dict):
            raise _WrongChatError(f'"{field}"[{n}] is {json_kind(tool)}, not an object that describes a tool')
    for text in texts_in(value):
        _refuse_no_text(text, f'"{field}"')
    return value


def _json(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise _WrongChatError(f"{place} is text that is not JSON") from error


def texts_in(value: Any) -> Iterator[str]:
    """All text in a value of JSON, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield key
            yield from texts_in(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from texts_in(inner)


def _refuse_no_text(text: str, place: str) -> None:
    if "\0" in text:
        raise _WrongChatError(f"{place} holds a NUL character")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise _WrongChatError(f"{place} holds half a surrogate pair, which is no character") from error
