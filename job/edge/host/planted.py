"""Looks whether what stands in the work folder is this user's own, and only his to change; nothing is followed there.

The work folder may be in a place that others write to, and what is found in it is taken for what an earlier start left:
a base's weights, its copies in 4 bits, encoded data, compiled code.
"""

import contextlib
import os
import stat
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path

from job.core.errors import DeniedError

_OURS = ("models", "runs", "adapters", "trackers", "cache")
"""What the job makes in a work folder. Anything else there, in /tmp say, is other people's business."""


def refuse_planted(workdir: Path) -> None:
    """Look at all that the job would find in a work folder; one that does not exist yet holds nothing.

    Raises:
        DeniedError: another user made something there, or others can change it.
    """
    for name in _OURS:
        place = workdir / name
        if os.path.lexists(place):
            users, keeps_modes = _seen_as(workdir)
            for path, found in _walk(place):
                _refuse(path, found, users, keeps_modes=keeps_modes)


def _refuse(path: Path, found: os.stat_result, users: Collection[int], *, keeps_modes: bool) -> None:
    advice = "see who put it there, then take it away; or name another work folder with --workdir"
    if found.st_uid not in users:
        raise DeniedError(
            f"{path}: is user {found.st_uid}'s, and the job runs as user {os.geteuid()}: what stands in the work "
            "folder is used as our own",
            action=advice,
        )
    if keeps_modes and found.st_mode & stat.S_IWOTH and not stat.S_ISLNK(found.st_mode):
        raise DeniedError(
            f"{path}: every user may change it, and what stands in the work folder is used as our own",
            action=f"if nobody has, `chmod -R o-w` it; otherwise {advice}",
        )


def _seen_as(workdir: Path) -> tuple[set[int], bool]:
    """Whose files count as ours (root may do anything anyway), and whether the file system keeps modes at all.

    Some file systems show every file as one user's, whoever wrote it: a file of our own shows which.
    """
    users, keeps_modes = {os.geteuid(), 0}, True
    with contextlib.suppress(OSError), tempfile.NamedTemporaryFile(dir=workdir) as ours:
        found = os.fstat(ours.fileno())
        users.add(found.st_uid)
        keeps_modes = not found.st_mode & stat.S_IWOTH  # it is made for us alone
    return users, keeps_modes


def _walk(place: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """The place and all below it; a link is itself, not what it points to: whoever made it chose that."""
    with contextlib.suppress(FileNotFoundError):  # another attempt of ours works beside us
        found = place.lstat()
        yield place, found
        if stat.S_ISDIR(found.st_mode):
            with os.scandir(place) as entries:
                inside = [Path(entry.path) for entry in entries]
            for path in inside:
                yield from _walk(path)
