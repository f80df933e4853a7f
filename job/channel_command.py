"""The command `channel` at the front door: what is in use, and going back."""

from datetime import UTC, datetime
from pathlib import Path

import click

from job.ending import Session
from job.saying import say


@click.command()
@click.argument("channel_uri")
@click.option(
    "--rollback",
    envvar="JOB_ROLLBACK",
    is_flag=False,
    flag_value="previous",
    metavar="[RUN]",
    help="Put a run in use again that was before: without RUN the previous one; `base` for the base alone. It is "
    "recorded as a change.",
)
@click.pass_obj
def channel(session: Session, channel_uri: str, rollback: str | None) -> None:
    """Show what is in use on {output}/channels/NAME, why, the last nights and the error budget; or go back."""
    from job.commands.channel import roll_back
    from job.edge.host.logs import only_warnings

    only_warnings()
    if rollback is not None:
        say(session, roll_back(channel_uri, rollback, should_stop=session.interrupt).why, "")
    show_channel(session, channel_uri)


def show_channel(session: Session, channel_uri: str, html: Path | None = None) -> None:
    """What is known of a channel, on the terminal, and as a page where a file is named."""
    from job.commands.channel import SHOWN, look_at_channel, page_of_channel
    from job.core.nightly.channel import KEPT_NIGHTS
    from job.render.channel_text import channel_lines

    wanted = SHOWN if html is None else KEPT_NIGHTS
    found = look_at_channel(channel_uri, should_stop=session.interrupt, changes=wanted)
    today = datetime.now(UTC).date().toordinal()
    lines = channel_lines(found.uri, found.changes, found.state, today=today, is_current=found.is_current)
    say(session, *lines, *page_of_channel(found, html, today=today))
