"""A page as HTML: everything that is put in is text, and the whole is never larger than a megabyte."""

import base64
import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from unicodedata import category

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from job import __version__
from job.core.visible import visible
from job.render.page.blocks import Page, Room

REPORT_HTML = "report.html"
MOST_BYTES = 1_000_000
_HERE = Path(__file__).parent
_JOINERS = {"\u200c", "\u200d"}
"""Join or part letters of Persian, Hindi and others, and make emoji of several signs; nothing else."""
_STATES = {"right": "right", "wrong": "wrong", "asked": "asked"}


def written(compose: Callable[[Room], Page]) -> bytes:
    """The page with as much of everything as has room, in UTF-8.

    Args:
        compose: makes the page for so much room.
    """
    room = Room()
    while True:
        page = _html(compose(room))
        if len(page) < MOST_BYTES or room.characters <= 1:
            return page
        room = room.halved()


def _html(page: Page) -> bytes:
    # The script filters answers, and nothing else.
    script = _file("page.js") if page.has_answers else ""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        _environment()
        .get_template("page.html")
        .render(
            page=page,
            style=Markup(_file("page.css")),  # noqa: S704 - ours, as the next one
            script=Markup(script),  # noqa: S704
            script_hash=f"sha256-{digest}",
            version=__version__,
        )
        .encode()
    )


@functools.cache
def _file(name: str) -> str:
    return (_HERE / name).read_text(encoding="utf-8")


@functools.cache
def _environment() -> Environment:
    environment = Environment(
        autoescape=True,
        finalize=seen,
        undefined=StrictUndefined,
        loader=FileSystemLoader(_HERE),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"counted": "{:,}".format, "state_word": _STATES.__getitem__}
    return environment


def seen(value: object) -> object:
    """What is put into the page, with what would not be seen in it, or would turn it round, as its escape.

    Spaces of every width and joiners stay: scripts need them.
    """
    if not isinstance(value, str) or isinstance(value, Markup) or value.isprintable():
        return value
    return "".join(
        each if each in _JOINERS or category(each) == "Zs" else visible(each) for each in value.replace("\r\n", "\n")
    )
