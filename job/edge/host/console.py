"""Log events as lines for people: time, event, values, none of them wider than the terminal."""

from collections.abc import Callable, Mapping, MutableMapping
from typing import Any, ClassVar

from job.core.lines import broken, worth_naming, written_out
from job.core.visible import visible

_VALUES = "\x1b[36m"
_CLOCK = "\x1b[2m"
_EVENT = "\x1b[1m"
_PASSING = frozenset({"step", "progress"})
"""Events that the next one replaces on a terminal."""


class Console:
    """structlog's last processor; it returns what `Lines` writes."""

    _LEVELS: ClassVar[Mapping[str, str]] = {"warning": "\x1b[33m", "error": "\x1b[31m", "critical": "\x1b[31;1m"}
    # The same on each line of one terminal.
    _CONSTANT = ("run_id", "attempt")

    def __init__(self, *, colours: bool, in_place: bool, width: Callable[[], int | None]) -> None:
        """Ready to render.

        Args:
            colours: whether to paint.
            in_place: whether one line stays in place for what passes: steps and progress.
            width: the terminal's columns now; None: lines may have any length.
        """
        self._colours, self._in_place, self._width = colours, in_place, width

    def __call__(
        self, _logger: object, _method: str, event: MutableMapping[str, Any]
    ) -> tuple[tuple[str], dict[str, bool]]:
        """One event as text, and whether the next one replaces it."""
        clock, level = str(event.pop("timestamp", ""))[11:19], str(event.pop("level", "info"))
        name, trace = str(event.pop("event", "")), event.pop("exception", None)
        for key in self._CONSTANT:
            event.pop(key, None)
        long = [key for key, value in event.items() if isinstance(value, str) and "\n" in value]
        blocks = [self._block(key, event.pop(key)) for key in long]
        if isinstance(event.get("spent"), Mapping):
            event["spent"] = worth_naming(event["spent"])
        head = [(clock, _CLOCK)]
        if level in self._LEVELS:
            head.append((level.upper(), self._LEVELS[level]))
        head += [(part, "") for part in _step_parts(event)] if name == "step" else [(name, _EVENT)]
        passing = self._in_place and level == "info" and name in _PASSING and not blocks
        lines = self._lines(head, written_out(event), passing=passing)
        return ("\n".join([*lines, *blocks, *([] if trace is None else [visible(trace)])]),), {"passing": passing}

    def _lines(self, head: list[tuple[str, str]], values: list[str], *, passing: bool) -> list[str]:
        """The head with as many values beside it as fit, the others below; what passes has one line."""
        width = self._width()
        if passing and width is not None:
            head, values = _as_much_as_fits(head, values, width - 1)  # with the last column the cursor would move on
        first = "  ".join(text for text, _ in head)
        painted = "  ".join(self._paint(text, colour) for text, colour in head)
        if not values:
            return [painted]
        beside, *below = broken(" ".join(values), width, indent=len(head[0][0]) + 2, taken=len(first) + 2)
        return [
            f"{painted}  {self._paint(beside, _VALUES)}".rstrip(),
            *(self._paint(each, _VALUES) for each in below),
        ]

    def _block(self, key: str, text: str) -> str:
        """A text of several lines, such as all mistakes of a recipe, below its event."""
        lines = [each if each.isprintable() else repr(each)[1:-1] for each in text.splitlines()]
        pieces = [piece for each in lines for piece in broken(f"    {each}", self._width(), indent=6)]
        return "\n".join([f"  {key}:", *pieces])

    def _paint(self, text: str, colour: str) -> str:
        return f"{colour}{text}\x1b[0m" if self._colours and colour and text else text


def _step_parts(event: MutableMapping[str, Any]) -> list[str]:
    """Takes what it shows out of the event; columns keep their width, so that numbers stand under numbers."""
    if "step" not in event:
        return ["step"]
    step, of = str(event.pop("step")), event.pop("of", None)
    parts = [f"step {step}" if of is None else f"step {step:>{len(str(of))}}/{of}"]
    if (loss := event.pop("loss", None)) is not None:
        parts.append(f"loss {loss:.3f}" if isinstance(loss, int | float) else f"loss {loss}")
    if isinstance(rate := event.get("tokens_per_second"), int | float):
        del event["tokens_per_second"]
        parts.append(f"{rate:,.0f} tok/s")
    if isinstance(eta := event.get("eta_seconds"), int | float):
        del event["eta_seconds"]
        parts.append(f"eta {int(eta) // 3600:02d}:{int(eta) // 60 % 60:02d}:{int(eta) % 60:02d}")
    return parts


def _as_much_as_fits(
    head: list[tuple[str, str]], values: list[str], room: int
) -> tuple[list[tuple[str, str]], list[str]]:
    while values and len("  ".join([*(text for text, _ in head), " ".join(values)])) > room:
        values = values[:-1]
    while len(head) > 1 and len("  ".join(text for text, _ in head)) > room:
        head = head[:-1]
    return head, values
