"""Conversations -> parts, by the chat template of the recipe or of the base's tokenizer."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Self

from job.core.data.chats import THINK, Chat, prompt_chat, texts_in
from job.core.data.records import BadRecord, Example, Parsed, Part
from job.core.errors import DataError, UsageError
from job.core.recipe.data_section import NAMED_TEMPLATES, DataSection
from job.tune.data.chats.named_templates import named_template
from job.tune.data.chats.rendering import Renderer
from job.tune.data.control import ControlToken, control_tokens

_SECONDS = 10
"""Computing time for one conversation."""
_BYTES = 2**29
"""Memory of the process that renders, beside what the longest record takes."""
_BYTES_PER_BYTE = 24
_CHARACTERS = 2**20
"""Characters that a template may write around a conversation, ..."""
_CHARACTERS_PER_BYTE = 4
"""... and for each byte of the longest record: as JSON inside JSON a text grows."""
_BATCH = 200
"""Conversations that are handed over at once, ..."""
_BATCH_MESSAGES = 2000
"""... and messages, unless one has more by itself."""
_THINK = re.compile(rf"\s*({THINK[0]})(.*?)({THINK[1]})", re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatRules:
    """What decides how conversations become parts; it can be sent to another process."""

    template: str
    """Its text."""
    of_base: bool
    """Whether it came with the base's tokenizer."""
    variables: tuple[tuple[str, Any], ...]
    """What a template may name beside the conversation: `bos_token`, say."""
    control: tuple[ControlToken, ...]
    learn: Literal["all-assistant", "last-assistant"]
    reasoning: Literal["keep", "mask", "drop"]
    max_record: int
    """Bytes: what a template may use is measured by the longest record."""


def chat_rules(tokenizer: Any, data: DataSection) -> ChatRules:
    """Those of a data section with `chat`.

    Raises:
        UsageError: neither recipe nor tokenizer has a chat template.
    """
    control = control_tokens(tokenizer)
    return ChatRules(
        template=_template(tokenizer, data, control=frozenset(token.text for token in control)),
        of_base=data.chat_template is None,
        variables=tuple(tokenizer.special_tokens_map.items()),
        control=control,
        learn=data.learn,
        reasoning=data.reasoning,
        max_record=data.max_record,
    )


def asked_rules(tokenizer: Any, data: DataSection) -> ChatRules | None:
    """What makes a question of a prompt; None: a prompt is taken as it is.

    Where several sources have templates of their own, those of the first hold.
    """
    if not data.makes_text:
        data = data.sources[0].data
    return None if data.chat is None else chat_rules(tokenizer, data)


class ChatTemplate:
    """A chat template at work; it holds a process, so it is closed."""

    def __init__(self, rules: ChatRules, *, should_stop: Callable[[], bool]) -> None:
        """The process begins with the first conversation."""
        self._rules = rules
        self._tokens = {token.text: token for token in rules.control}
        longest_first = sorted(rules.control, key=lambda token: -len(token.text))
        control = "|".join(token.pattern for token in longest_first) or "(?!)"
        self._control = re.compile(control)
        self._renderer = Renderer(
            {
                "template": rules.template,
                "variables": dict(rules.variables),
                "control": control,
                "seconds": _SECONDS,
                "most_bytes": _BYTES + _BYTES_PER_BYTE * rules.max_record,
                "most_characters": _CHARACTERS + _CHARACTERS_PER_BYTE * rules.max_record,
            },
            should_stop=should_stop,
        )

    def close(self) -> None:
        """End its process."""
        self._renderer.close()

    def examples(self, parsed: Iterable[Parsed]) -> Iterator[Example | BadRecord]:
        """Each conversation rendered, all else as it is, in their order.

        Raises:
            DataError: the template cannot be used.
            StopRequestedError: asked to stop.
        """
        for batch in _batches(parsed):
            chats = [each for each in batch if isinstance(each, Chat)]
            rendered = iter(self._rendered(chats))
            for each in batch:
                yield next(rendered) if isinstance(each, Chat) else each

    def question(self, chat: Chat) -> Example:
        """What stands before the last answer, or behind the last message where there is none, up to the answer.

        Raises:
            DataError: the template cannot render it.
        """
        [found] = self._answers([prompt_chat(chat)], turns=[None])
        if isinstance(found, BadRecord):
            raise DataError(str(found))
        return found

    def prompt(self, text: str) -> Example:
        """What somebody writes to the assistant, as the first turn of a conversation.

        Raises:
            DataError: the template cannot render it.
        """
        return self.question(Chat(messages=[{"role": "user", "content": text}], tools=None, where=f"{text[:40]!r}"))

    @cached_property
    def end_of_turn(self) -> int | None:
        """The control token that ends an answer; None: there is none, and EOS ends it."""
        pair = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        [found] = self._rendered([Chat(messages=pair, tools=None, where="a conversation of two turns")])
        if isinstance(found, BadRecord):
            return None
        learned = "".join(part.text for part in found.parts if part.learned)
        ends = [token.id for token in self._tokens.values() if learned.endswith(token.text)]
        return ends[0] if ends else None

    def _rendered(self, chats: Sequence[Chat]) -> list[Example | BadRecord]:
        last = self._rules.learn == "last-assistant"
        return self._answers(chats, turns=[chat.turns[-1:] if last else chat.turns for chat in chats])

    def _answers(self, chats: Sequence[Chat], *, turns: Sequence[Sequence[int] | None]) -> list[Example | BadRecord]:
        if not chats:
            return []
        hidings = [_Hiding(self._control, chat) for chat in chats]
        asked = [
            {
                "messages": [_as_templates_read(message) for message in hiding.messages],
                "tools": hiding.tools,
                "turns": places,
                "reasoning": self._rules.reasoning,
            }
            for hiding, places in zip(hidings, turns, strict=True)
        ]
        answers = self._renderer.render(asked)
        return [
            self._example(chat, hiding, answer, ends=places is not None)
            for chat, hiding, answer, places in zip(chats, hidings, answers, turns, strict=False)
        ]

    def _example(self, chat: Chat, hiding: "_Hiding", answer: Mapping[str, Any], *, ends: bool) -> Example | BadRecord:
        if "fatal" in answer:
            raise DataError(f"{chat.where}: {self._named()} {answer['fatal']}; {self._advice()}")
        if "refused" in answer:
            reason = f"{self._named()} does not fit the conversation ({answer['refused']})"
            return BadRecord(where=chat.where, reason=reason)
        text, spans = answer["text"], answer["spans"]
        parts = [
            part
            for start, end, learned in _stretches(spans, len(text))
            for part in hiding.parts(text[start:end], learned=learned)
        ]
        if hiding.is_mangled(text):
            reason = f"{self._named()} changes letters of the text, in which control tokens stand that a record wrote"
            return BadRecord(where=chat.where, reason=f"{reason} (it could not be seen which are the template's own)")
        if ends and parts[-1].learned and parts[-1].control and self._ends_in_control(parts[-1].text):
            # The turn's own end is the end: no end of sequence comes behind it.
            parts.append(Part(text="", learned=False))
        return Example(parts=tuple(parts), where=chat.where, is_chat=True)

    def _ends_in_control(self, text: str) -> bool:
        return any(match.end() == len(text) for match in self._control.finditer(text))

    def _named(self) -> str:
        return "the base model's chat template" if self._rules.of_base else "data.chat_template"

    def _advice(self) -> str:
        if self._rules.of_base:
            return f"give another one with data.chat_template: a file, or one of {', '.join(NAMED_TEMPLATES)}"
        return "correct it"


class ChatTemplates:
    """Chat templates at work, each begun when it is first needed."""

    def __init__(self, *, should_stop: Callable[[], bool]) -> None:
        self._should_stop = should_stop
        self._begun: dict[ChatRules, ChatTemplate] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End their processes."""
        for template in self._begun.values():
            template.close()

    def of(self, rules: ChatRules) -> ChatTemplate:
        """The one that keeps these rules."""
        if rules not in self._begun:
            self._begun[rules] = ChatTemplate(rules, should_stop=self._should_stop)
        return self._begun[rules]


def _template(tokenizer: Any, data: DataSection, *, control: frozenset[str]) -> str:
    if data.chat_template in NAMED_TEMPLATES:
        framed = tokenizer("a").input_ids
        puts_bos = tokenizer.bos_token_id is not None and framed[:1] == [tokenizer.bos_token_id]
        return named_template(data.chat_template, control=control, puts_bos=puts_bos)
    if data.chat_template is not None:
        return data.chat_template
    own = tokenizer.chat_template
    if isinstance(own, dict):
        own = own.get("default")
    if not isinstance(own, str):
        raise UsageError(
            "data.chat: the base model's tokenizer has no chat template; give one with data.chat_template: a file, or "
            f"one of {', '.join(NAMED_TEMPLATES)} (alpaca needs no control tokens)"
        )
    return own


def _as_templates_read(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """A message with its reasoning by both names that templates know; gpt-oss's reads `thinking`."""
    reasoning = message.get("reasoning_content")
    return message if reasoning is None else {**message, "thinking": reasoning}


def _stretches(spans: Sequence[Sequence[int]], end: int) -> Iterator[tuple[int, int, bool]]:
    """All of a text, given and learned by turns."""
    place = 0
    for start, stop in spans:
        yield place, start, False
        yield start, stop, True
        place = stop
    yield place, end, False


def _batches(parsed: Iterable[Parsed]) -> Iterator[list[Parsed]]:
    batch: list[Parsed] = []
    messages = 0
    for each in parsed:
        batch.append(each)
        messages += len(each.messages) if isinstance(each, Chat) else 0
        if len(batch) == _BATCH or messages >= _BATCH_MESSAGES:
            yield batch
            batch, messages = [], 0
    if batch:
        yield batch


class _Hiding:
    """A conversation in which each control token that a record wrote is hidden behind a word, and found again."""

    def __init__(self, control: re.Pattern[str], chat: Chat) -> None:
        self._control = control
        self._hidden: list[str] = []
        found = any(control.search(text) for text in texts_in([chat.messages, chat.tools]))
        self._word = _unused_word([chat.messages, chat.tools]) if found else ""
        self.messages = [self._message(each) for each in chat.messages] if found else chat.messages
        self.tools = self._hide(chat.tools) if found else chat.tools

    def parts(self, text: str, *, learned: bool) -> Iterator[Part]:
        """A rendered text: the template's, and in it what was hidden, which is only text."""
        pieces = re.split(rf"{self._word}(\d+)z", text) if self._hidden else [text]
        for n, piece in enumerate(pieces):
            if n % 2:
                yield Part(text=self._hidden[int(piece)], learned=learned)
            elif piece:
                yield Part(text=piece, learned=learned, control=True)

    def is_mangled(self, text: str) -> bool:
        """Whether a hiding word came back otherwise than it went."""
        return bool(self._hidden) and text.lower().count(self._word) != len(re.findall(rf"{self._word}\d+z", text))

    def _message(self, message: Mapping[str, Any]) -> dict[str, Any]:
        content = message.get("content")
        own = _THINK.match(content) if message["role"] == "assistant" and isinstance(content, str) else None
        if own is None:
            return {key: self._hide(value) for key, value in message.items()}
        # The marks of the assistant's own reasoning are meant: templates look for them.
        before = own[1] + self._hide(own[2]) + own[3]
        hidden = {key: self._hide(value) for key, value in message.items() if key != "content"}
        return {**hidden, "content": before + self._hide(message["content"][own.end() :])}

    def _hide(self, value: Any) -> Any:
        if isinstance(value, str):
            return self._control.sub(self._replacement, value)
        if isinstance(value, Mapping):
            return {self._hide(key): self._hide(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [self._hide(inner) for inner in value]
        return value

    def _replacement(self, match: re.Match[str]) -> str:
        self._hidden.append(match[0])
        return f"{self._word}{len(self._hidden) - 1}z"


def _unused_word(values: Any) -> str:
    """Letters and digits alone, which no filter of a template changes, that stand in none of the texts."""
    texts, number = list(texts_in(values)), 0
    while any(f"hid{number}x" in text for text in texts):
        number += 1
    return f"hid{number}x"
