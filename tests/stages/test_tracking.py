"""How long trackers may take to hear the end of an attempt."""

from contextlib import suppress
from types import SimpleNamespace

import pytest

from job.core.errors import PeerLostError, StopRequestedError
from job.stages.tracking import Tracked
from job.tune.world import PeerSilentError


@pytest.mark.parametrize(
    ("error", "kill_is_near", "heard"),
    [
        (RuntimeError("a bug"), False, ("failed", 60.0)),
        (StopRequestedError("asked to stop"), True, ("stopped", 2.0)),
        (PeerLostError("rank 1 is gone"), False, ("failed", 2.0)),
        (PeerSilentError("rank 1 does not answer"), False, ("failed", 2.0)),
    ],
)
def test_they_are_hurried_where_the_process_is_about_to_be_ended(error, kill_is_near, heard, tmp_path):
    """Of one whose others are gone that is so too: the launcher ends all of them."""
    attempt = SimpleNamespace(
        worker=SimpleNamespace(recipe=SimpleNamespace(track=SimpleNamespace(trackers=())), workdir=tmp_path),
        phases=SimpleNamespace(on_beat=lambda: None),
        is_kill_near=lambda: kill_is_near,
    )
    tracked, ends = Tracked(attempt, SimpleNamespace(artifacts=SimpleNamespace(run_id="r1"))), []
    tracked.tracking = SimpleNamespace(end=lambda ended, *, seconds: ends.append((ended, seconds)))
    tracked._begun, tracked._publish = True, lambda: None
    with suppress(type(error)), tracked:
        raise error

    assert ends == [heard]
