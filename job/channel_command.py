"""The command `channel` at the front door: what is in use, and going back."""

from datetime import UTC, datetime

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
    from job.commands.channel import look_at_channel, roll_back
    from job.edge.host.logs import only_warnings
    from job.render.channel_text import channel_lines

    only_warnings()
    if rollback is not None:
        say(session, roll_back(channel_uri, rollback, should_stop=session.interrupt).why, "")
    found = look_at_channel(channel_uri, should_stop=session.interrupt)
    today = datetime.now(UTC).date().toordinal()
    say(session, *channel_lines(found.uri, found.changes, found.state, today=today, is_current=found.is_current))
