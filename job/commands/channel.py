"""A channel: what is in use and why, and going back to what was in use before."""

import platform
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import structlog

from job.commands.report import open_run, recipe_of
from job.core.errors import DataError, NotFoundError, RunConflictError, UsageError
from job.core.nightly.channel import ChannelState, Promoted, name_in_use, rollback_to
from job.edge.relative_paths import located
from job.edge.run.channel_adapter import ChannelAdapter
from job.edge.run.channels import Channel
from job.edge.store.objects import StoreSettings
from job.edge.store.opening import open_store
from job.edge.store.probing import probe
from job.edge.store.whole_files import whole_file
from job.render.page.nights.channel import ChannelSeen, channel_html
from job.stages.nightly.channel_changes import now_text

log = structlog.get_logger(__name__)
PREVIOUS = "previous"
"""What was in use before the last change."""
THE_BASE = "base"
"""The base itself, without an adapter."""
SHOWN = 50
"""Changes that are read for the terminal."""
_CHANNEL = re.compile(r"/channels/[^/]+(/promoted\.json)?/*$")


@dataclass(frozen=True, slots=True, kw_only=True)
class ChannelLook:
    """What is known of a channel."""

    uri: str
    changes: tuple[Promoted, ...]
    """Newest first; the last ones."""
    state: ChannelState | None
    is_current: bool


def is_channel(uri: str) -> bool:
    """Whether a URI is that of a channel by its form."""
    return _CHANNEL.search(uri) is not None


def page_of_channel(found: ChannelLook, file: Path | None, *, today: int) -> list[str]:
    """Write a channel's page to a local file, if one is named, and say so."""
    if file is None:
        return []
    seen = ChannelSeen(
        uri=found.uri, changes=found.changes, state=found.state, today=today, is_current=found.is_current
    )
    with whole_file(file) as out:
        out.write(channel_html(seen))
    return ["", f"page: {file}"]


def look_at_channel(uri: str, *, should_stop: Callable[[], bool], changes: int = SHOWN) -> ChannelLook:
    """Read a channel; nothing is written.

    Args:
        uri: of the channel.
        should_stop: polled.
        changes: of what is in use, that are read, the newest first.

    Raises:
        NotFoundError: there is no channel.
    """
    channel = _open(uri)
    newest = tuple(islice(channel.changes(), changes))
    state, _ = channel.state()
    if not newest and state is None:
        raise NotFoundError(
            f"{located(uri)}: no channel is there; it is {{output}}/channels/NAME, and begins with the first run whose "
            "recipe names it (promote.channel)",
            action="correct the URI",
        )
    with _copy_of(channel, should_stop) as copy:
        return ChannelLook(uri=channel.uri, changes=newest, state=state, is_current=copy.is_current())


def roll_back(uri: str, target: str, *, should_stop: Callable[[], bool]) -> Promoted:
    """Put what was in use before in use again; that is recorded as a change of its own.

    Args:
        uri: of the channel.
        target: a run that was in use once; `previous`, or `base`.
        should_stop: polled while the adapter is copied.

    Returns:
        What is in use now.

    Raises:
        NotFoundError: nothing was promoted yet, that run never was, or its adapter is gone.
        RunConflictError: a night has promoted something in this moment.
    """
    output, name = _parts(uri)
    store = open_store(output, _settings(uri))
    found = probe(store)
    if not found.conditional:
        log.warning("swap_without_conditions", reason=found.reason)
    channel = Channel(store, name, conditional=found.conditional)
    now, etag = channel.promoted()
    if now is None:
        raise NotFoundError(f"{located(uri)}: nothing was promoted yet, so that there is nothing to go back from")
    wanted = _wanted(channel, now, target)
    with _copy_of(channel, should_stop) as copy:
        if wanted is not None and not copy.can_follow(wanted):
            raise NotFoundError(
                f"--rollback {wanted.run_id}: its adapter is no longer in the store as it was promoted "
                f"({located(wanted.run_uri or '')}/adapter); nothing was changed",
                action="name another run that was in use, or `base`",
            )
    new = rollback_to(wanted, now, time=now_text(), by=platform.node())
    if not channel.swap(new, etag=etag):
        raise RunConflictError(
            f"{located(uri)}: {name_in_use(channel.promoted()[0])} was put in use in this moment; look at the channel, "
            "and roll back again if that is still wanted"
        )
    with _copy_of(channel, should_stop) as copy:
        copy.follow()
    log.info("rolled_back", channel=channel.uri, to=name_in_use(new), sequence=new.sequence)
    return new


def _wanted(channel: Channel, now: Promoted, target: str) -> Promoted | None:
    """The entry to go back to; None: the base."""
    if target == PREVIOUS:
        target = now.replaced or THE_BASE
    if target == THE_BASE:
        if now.run_id is None:
            raise UsageError("--rollback: the base itself is in use already")
        return None
    if target == now.run_id:
        raise UsageError(f"--rollback {target}: that run is in use already")
    found = next((change for change in channel.changes() if change.run_id == target), None)
    if found is None:
        known = dict.fromkeys(change.run_id for change in channel.changes() if change.run_id is not None)
        raise NotFoundError(
            f"--rollback {target}: that run was never in use on {located(channel.uri)}; there were "
            f"{', '.join(known) or 'none'}",
            action="name one of them, or `base`",
        )
    return found


@contextmanager
def _copy_of(channel: Channel, should_stop: Callable[[], bool]) -> Iterator[ChannelAdapter]:
    """The channel's copy of the adapter in use; files on their way lie in a folder that goes with the block."""
    with tempfile.TemporaryDirectory(prefix="channel-") as folder:
        yield ChannelAdapter(channel, scratch=Path(folder) / "adapter", should_stop=should_stop)


def _open(uri: str) -> Channel:
    output, name = _parts(uri)
    return Channel(open_store(output, StoreSettings()), name, conditional=False)


def _settings(uri: str) -> StoreSettings:
    """How the run in use wrote to the store; where that cannot be told, as a store is by itself."""
    now, _ = _open(uri).promoted()
    if now is None or now.run_uri is None:
        return StoreSettings()
    try:
        store = recipe_of(open_run(now.run_uri)[1]).store
    except (DataError, NotFoundError):
        return StoreSettings()
    return StoreSettings(sse_kms_key=store.sse_kms_key, checksums=store.checksums)


def _parts(uri: str) -> tuple[str, str]:
    """The output and the channel's name."""
    output, marker, name = uri.rstrip("/").removesuffix("/promoted.json").rpartition("/channels/")
    if not marker or not name or "/" in name:
        raise UsageError(f"{located(uri)}: no channel's URI, which looks like s3://bucket/prefix/channels/NAME")
    return output, name
