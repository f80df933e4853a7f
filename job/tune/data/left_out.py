"""What of a conversation a chat template does not write: an unknown role, a system prompt, tools and calls of them."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

from jinja2 import TemplateError

Conversation = tuple[Sequence[Mapping[str, Any]], Sequence[Mapping[str, Any]] | None]
"""Messages, and the tools that the assistant has."""
Write = Callable[[Sequence[Mapping[str, Any]], Sequence[Mapping[str, Any]] | None], str]
"""Messages and tools -> text."""
_PLACES = ("messages", "tools")


def left_out(write: Write, conversation: Conversation) -> str | None:
    """The first part that is not in the text, in words; None: all of it is.

    A part stands there when the text is another one with a word put into it; all words at once, as long as the
    template takes them.
    """
    parts = [*_parts(conversation)]
    words = [f"part{number}x" for number in range(len(parts))]
    marked = conversation
    for (path, _), word in zip(parts, words, strict=True):
        marked = _with(marked, path, word)
    try:
        text = write(*marked)
    except (TemplateError, ValueError, TypeError, LookupError):
        text = ""  # it reads what stands there: JSON, or a name that it knows
    whole = None
    for (path, what), word in zip(parts, words, strict=True):
        if word in text:
            continue
        whole = write(*conversation) if whole is None else whole
        with suppress(TemplateError, ValueError, TypeError, LookupError):
            if write(*_with(conversation, path, _lengthened(conversation, path))) == whole:
                return what
    return None


def _parts(conversation: Conversation) -> Iterator[tuple[tuple[Any, ...], str]]:
    """Where each part's text stands, and what it is."""
    messages, tools = conversation
    for n, message in enumerate(messages):
        if str(message.get("content") or "").strip():
            yield ("messages", n, "content"), f"the content of messages[{n}] ({message['role']})"
        for i, call in enumerate(message.get("tool_calls") or ()):
            yield (
                ("messages", n, "tool_calls", i, "function", "name"),
                f"the call of the tool {json.dumps(call['function']['name'][:40])} in messages[{n}]",
            )
    for n, tool in enumerate(tools or ()):
        inside = ("function",) if isinstance(tool.get("function"), Mapping) else ()
        name = (tool["function"] if inside else tool).get("name")
        if isinstance(name, str) and name.strip():
            yield ("tools", n, *inside, "name"), f"the tool {json.dumps(name[:40])}"


def _with(conversation: Conversation, path: Sequence[Any], text: str) -> Conversation:
    """A copy with another text at one place."""
    both = dict(zip(_PLACES, conversation, strict=True))
    changed = _replaced(both, path, text)
    return changed["messages"], changed["tools"]


def _replaced(value: Any, path: Sequence[Any], text: str) -> Any:
    if not path:
        return text
    key, *rest = path
    if isinstance(value, Mapping):
        return {**value, key: _replaced(value[key], rest, text)}
    return [_replaced(each, rest, text) if n == key else each for n, each in enumerate(value)]


def _lengthened(conversation: Conversation, path: Sequence[Any]) -> str:
    """The text at one place with a word behind it."""
    value: Any = dict(zip(_PLACES, conversation, strict=True))
    for key in path:
        value = value[key]
    return f"{value} part"
