"""Lines for people on standard output: within the terminal's width, without secrets, and nothing that it would obey."""

import sys

import click

from job.core.lines import hung
from job.core.visible import one_line
from job.edge.host.output import terminal_width
from job.ending import Session


def say(session: Session, *lines: str) -> None:
    """Lines to standard output, within the terminal's width.

    Records, answers and names in them are by strangers, who shall not begin new ones.
    """
    width = terminal_width(sys.stdout)
    shown = (piece for line in lines for piece in hung(one_line(session.hide(line)), width))
    click.echo("\n".join(shown))
