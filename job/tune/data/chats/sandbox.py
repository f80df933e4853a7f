"""Renders chats in a process of its own, in which a template may neither reach anything nor last nor grow.

A template is a program that came with a base. The sandbox of jinja2 keeps it from Python's inside, and the limits of
this process from what that cannot stop: a loop without end, a number or a text without bounds, a recursion.
"""

import json
import re
import resource
import sys
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from job.tune.data.chats.turns import Render, TurnError, Wish, learned_spans
from job.tune.data.left_out import left_out

_TURNS_A_SECOND = 20
"""Turns of a long conversation for which a template gets another second: each is rendered with all before it."""
_JSON_OPTIONS = {"ensure_ascii", "indent", "separators", "sort_keys"}
_SHOWN = 300
"""Characters of a template's own message."""
_TODAY = datetime(2024, 7, 26)  # noqa: DTZ001 - a date without a place
"""What a template that asks for the date gets: a conversation is the same tomorrow."""


class _TooLongError(ValueError):
    """The template writes more than it may."""


class _Generation(Extension):
    """`{% generation %}`, the mark that some templates put around answers: what stands in it is rendered."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's signature

    def parse(self, parser: Parser) -> nodes.Node:
        """The block's content, in a scope of its own."""
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


class _Namespace(Namespace):
    """jinja2's own, without names that reach Python's inside."""

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise SecurityError(f"a namespace has no {name!r}")
        super().__setitem__(name, value)


def _environment() -> ImmutableSandboxedEnvironment:
    """As transformers renders chat templates."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": _TODAY.strftime,
        "namespace": _Namespace,
    }
    return environment


def _to_json(value: Any, **how: Any) -> str:
    """As transformers has it: not escaped for HTML, as jinja2's own is."""
    return json.dumps(value, **{"ensure_ascii": False} | {name: how[name] for name in how.keys() & _JSON_OPTIONS})


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


class _Sandbox:
    """One template, and what it may use."""

    def __init__(self, setup: Mapping[str, Any]) -> None:
        self._template = _environment().from_string(setup["template"])
        self._variables = setup["variables"]
        self._most = setup["most_characters"]
        self._control = re.compile(setup["control"])

    def answer(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """What was asked, rendered; or why not."""
        spans: list[list[int]] = []
        try:
            messages, render = asked["messages"], self._render(asked["tools"])
            if asked["turns"] is None:
                text = render(messages, True)  # noqa: FBT003
            else:
                wish = Wish(turns=asked["turns"], reasoning=asked["reasoning"], control=self._control)
                text, spans = learned_spans(render, messages, wish)
            missing = left_out(self._write, (messages, asked["tools"]))
        except TurnError as error:
            return {"refused": str(error)}
        except SecurityError as error:
            return {"fatal": f"reaches for what a template may not have ({error})"}
        except (MemoryError, RecursionError, _TooLongError) as error:
            return {"fatal": str(error) or "needs more memory than a conversation can take"}
        except Exception as error:  # noqa: BLE001 - a template can fail in any way that Python has
            return {"refused": f"it fails: {str(error)[:_SHOWN] or type(error).__name__}"}
        if missing is not None:
            return {"refused": f"it leaves out {missing}"}
        return {"text": text, "spans": spans}

    def _write(self, messages: Sequence[Mapping[str, Any]], tools: Any) -> str:
        return self._render(tools)(messages, False)  # noqa: FBT003

    def _render(self, tools: Any) -> Render:
        def render(messages: Sequence[Mapping[str, Any]], generation: bool) -> str:  # noqa: FBT001 - the template's own word
            written = self._template.generate(
                **self._variables, messages=messages, tools=tools, documents=None, add_generation_prompt=generation
            )
            return "".join(self._bounded(written))

        return render

    def _bounded(self, written: Iterator[str]) -> Iterator[str]:
        room = self._most
        for piece in written:
            room -= len(piece)
            if room < 0:
                raise _TooLongError(f"writes more than {self._most:,} characters for one conversation")
            yield piece


def main() -> None:
    """Answer line by line: first what is set up, then each conversation in its order."""
    setup = json.loads(sys.stdin.buffer.readline())
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _limit(resource.RLIMIT_AS, setup["most_bytes"])
    _allow(setup["seconds"])
    try:
        sandbox = _Sandbox(setup)
    except TemplateSyntaxError as error:
        _say({"fatal": f"line {error.lineno}: {error.message}"})
        return
    except Exception as error:  # noqa: BLE001 - compiling evaluates what is constant
        _say({"fatal": f"cannot be read: {str(error) or type(error).__name__}"})
        return
    _say({})
    while line := sys.stdin.buffer.readline():
        for asked in json.loads(line):
            _allow(setup["seconds"] + len(asked["messages"]) / _TURNS_A_SECOND)
            answer = sandbox.answer(asked)
            _say(answer)
            if "fatal" in answer:
                return


def _allow(seconds: float) -> None:
    """Computing time from now on, beyond which the system ends this process."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    _limit(resource.RLIMIT_CPU, int(used.ru_utime + used.ru_stime + seconds) + 1)


def _limit(what: int, most: int) -> None:
    """The soft limit; one that stands above this process already holds as well."""
    hard = resource.getrlimit(what)[1]
    resource.setrlimit(what, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


def _say(answer: Mapping[str, Any]) -> None:
    try:
        line = json.dumps(answer, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        line = b'{"refused": "it writes half a surrogate pair, which is no character"}'
    sys.stdout.buffer.write(line + b"\n")
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
