"""Where the assistant's turns stand in a rendered conversation, found by rendering it turn by turn.

No template needs marks for that. What stands before a turn is the rendering of the messages before it with the
generation prompt, as the model will be asked; the turn ends with the control token that ends it.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

Render = Callable[[Sequence[Mapping[str, Any]], bool], str]
"""Messages, and whether the assistant's next turn is begun -> text."""
_EMPTY_THINK = re.compile(r"\s*<think>\s*</think>\s*")
_THINK = re.compile(r"\s*<think>.*?</think>\s*", re.DOTALL)
_THINK_END = re.compile(r"\s*</think>\s*")
_SHOWN = 40
_WAYS_OUT = "give another one with data.chat_template, or learn what fits with data.learn: last-assistant"


class TurnError(ValueError):
    """Why a turn cannot be found in what the template renders; the message is for people."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What is to be found."""

    turns: Sequence[int]
    """Places of the messages to learn."""
    reasoning: str
    """`keep`: it is learned; `mask`: it is given; `drop`: the messages hold none."""
    control: re.Pattern[str]
    """Control tokens, as a template writes them."""


def learned_spans(render: Render, messages: Sequence[Mapping[str, Any]], wish: Wish) -> tuple[str, list[list[int]]]:
    """The rendered conversation, and the characters of it that are learned: [start, end] of each turn.

    Raises:
        TurnError: the template renders a beginning of the conversation otherwise than the whole.
    """
    whole = render(messages, False)  # noqa: FBT003 - the signature is the template's
    spans = []
    for turn in wish.turns:
        begun = render(messages[:turn], True)  # noqa: FBT003
        if not whole.startswith(begun):
            raise TurnError(
                f"what it renders before messages[{turn}] is not what stands there in the whole"
                f"{_differ(begun, whole)}; {_WAYS_OUT}"
            )
        end = _end(whole, len(begun), render(messages[: turn + 1], False), wish.control)  # noqa: FBT003
        if end is None:
            raise TurnError(
                f"messages[{turn}] is rendered otherwise once more messages follow, and no control token ends it; "
                f"{_WAYS_OUT}"
            )
        start = _start(whole, len(begun), end, messages[turn], wish.reasoning)
        if start >= end:
            raise TurnError(f"messages[{turn}] leaves nothing that could be learned")
        spans.append([start, end])
    return whole, spans


def _differ(begun: str, whole: str) -> str:
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(begun, whole, strict=False)))
    return f": {begun[same : same + _SHOWN]!r} in place of {whole[same : same + _SHOWN]!r} at character {same + 1}"


def _end(whole: str, start: int, alone: str, control: re.Pattern[str]) -> int | None:
    """Where a turn that begins at `start` ends in the whole, by the rendering `alone` in which it is the last."""
    if whole.startswith(alone):
        return _last_control_end(whole, start, max(start, len(alone)), control)
    if alone[:start] != whole[:start]:
        return None
    # A last turn may have its reasoning, or an empty one, which the same turn has no more once others follow.
    plain = _THINK.sub("", alone[start:], count=1) if _THINK.match(alone, start) else None
    if plain and whole.startswith(plain, start):
        return _last_control_end(whole, start, start + len(plain), control)
    for turn in filter(None, (alone[start:], plain)):
        # Or it is ended by another token: up to there both are the same.
        for match in control.finditer(turn):
            if whole[start : start + match.start()] == turn[: match.start()]:
                ended = control.match(whole, start + match.start())
                if ended is not None and ended[0] != match[0]:
                    return ended.end()
    return None


def _last_control_end(whole: str, start: int, end: int, control: re.Pattern[str]) -> int:
    """What a template writes behind the token that ends a turn belongs to what follows."""
    last = end
    for match in control.finditer(whole, start, end):
        last = match.end()
    return last


def _start(whole: str, start: int, end: int, message: Mapping[str, Any], reasoning: str) -> int:
    """Where learning begins in a turn."""
    own = _reasoning_of(message)
    if not own:
        empty = _EMPTY_THINK.match(whole, start, end)
        return empty.end() if empty else start
    place = whole.find(own, start, end)
    if place < 0 and reasoning == "keep":
        raise TurnError(
            "it leaves out the reasoning of an assistant's turn that is to be learned; with data.reasoning: drop it is "
            "left out of all, with data.learn: last-assistant only the last turn is learned, which keeps it"
        )
    if reasoning != "mask" or place < 0:
        empty = _EMPTY_THINK.match(whole, start, end)
        return empty.end() if empty else start
    place += len(own)
    closed = _THINK_END.match(whole, place, end)
    return closed.end() if closed else place


def _reasoning_of(message: Mapping[str, Any]) -> str:
    """Given apart, or written into the answer's beginning."""
    content = message.get("content") or ""
    inside = re.match(r"\s*<think>(.*?)</think>", content, re.DOTALL)
    return str(message.get("reasoning_content") or (inside[1] if inside else "")).strip()
