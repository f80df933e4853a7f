"""Which tokens of a tokenizer are control tokens, and where a template writes them."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlToken:
    """A token that means something to the model beyond its letters, such as the end of a turn."""

    text: str
    id: int
    takes_before: bool
    """Whether blanks before it are part of it."""
    takes_behind: bool
    """Whether blanks behind it are part of it."""
    alone: bool
    """Whether it is one only where no word touches it."""

    @property
    def pattern(self) -> str:
        """Where it stands in a text, as a regular expression."""
        escaped = re.escape(self.text)
        return rf"(?<!\w){escaped}(?!\w)" if self.alone else escaped


def control_tokens(tokenizer: Any) -> tuple[ControlToken, ...]:
    """Those that the base's files mark as special, and those that have a part such as the end of a sequence."""
    named = set(tokenizer.all_special_tokens)
    return tuple(
        ControlToken(
            text=token.content,
            id=number,
            takes_before=token.lstrip,
            takes_behind=token.rstrip,
            alone=token.single_word,
        )
        for number, token in sorted(tokenizer.added_tokens_decoder.items())
        if token.special or token.content in named
    )


class ControlFinder:
    """Splits text at the control tokens that are written in it; of two that begin at one place the longer is meant."""

    def __init__(self, tokens: Sequence[ControlToken]) -> None:
        """Ready to split."""
        self._tokens = {token.text: token for token in tokens}
        longest_first = sorted(tokens, key=lambda token: -len(token.text))
        self._pattern = re.compile("|".join(token.pattern for token in longest_first)) if tokens else None

    def split(self, text: str) -> Iterator[str | ControlToken]:
        """What stands between control tokens, and those, in their order; nothing is empty."""
        end = 0
        for match in self._pattern.finditer(text) if self._pattern is not None else ():
            if match.start() > end:
                yield text[end : match.start()]
            yield self._tokens[match[0]]
            end = match.end()
        if end < len(text):
            yield text[end:]
