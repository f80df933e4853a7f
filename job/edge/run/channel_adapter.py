"""The adapter in use under one name, for servers that read a fixed place: channels/{name}/adapter/, whole or not there.

A store cannot change several objects at once. So the manifest goes first and comes last; between them, where the
adapter's configuration is another one, that goes before the new weights and comes after them: in between there is
nothing that PEFT or a server would load. Where the configuration stays the same, as it does from night to night, the
weights are one object, which is replaced at one stroke, and the place is never without an adapter. Who needs it exact
follows `promoted.json`, which names a run's own adapter, never changed.
"""

import contextlib
import shutil
from collections.abc import Callable
from pathlib import Path

import structlog

from job.core.crash_points import crash_point
from job.core.errors import DataError, NotFoundError, UnavailableError
from job.core.nightly.channel import AdapterInUse, Judged, Promoted
from job.edge.run.channels import Channel
from job.edge.store.folder import MANIFEST, FileEntry, Manifest, StoredFolder
from job.edge.store.json_objects import json_bytes
from job.edge.store.objects import ObjectStore, PreconditionError

log = structlog.get_logger(__name__)
CONFIG = "adapter_config.json"
"""Without it nothing loads the folder."""
_ROUNDS = 5


class ChannelAdapter:
    """The folder adapter/ of a channel."""

    def __init__(self, channel: Channel, *, scratch: Path, should_stop: Callable[[], bool]) -> None:
        """Nothing is asked of the store yet; `scratch` is a folder for the files on their way."""
        self._channel = channel
        self._store: ObjectStore = channel.store
        self._folder = StoredFolder(channel.store, f"{channel.root}adapter")
        self._prefix = f"{channel.root}adapter/"
        self._scratch = scratch
        self._should_stop = should_stop

    def follow(self) -> None:
        """Make the folder what `promoted.json` says, also where a change comes in between; a second call does nothing.

        Raises:
            NotFoundError: the files of the run that is in use are gone.
            DataError: they are not those that were promoted.
            UnavailableError: what is in use changes all the time.
        """
        for _ in range(_ROUNDS):
            wanted, _etag = self._channel.promoted()
            if self._is(wanted):
                return
            with contextlib.suppress(PreconditionError):
                self._make(wanted)
        raise UnavailableError(f"{self._folder.uri}: what is in use changes all the time; start the same job again")

    def can_follow(self, one: Promoted | Judged) -> bool:
        """Whether the adapter of a run that is to be put in use still stands in the store; the base needs none."""
        if one.run_id is None or one.adapter is None:
            return True
        return StoredFolder(self._store, f"runs/{one.run_id}/adapter").holds(_entries(one.adapter))

    def is_current(self) -> bool:
        """Whether the folder is what `promoted.json` says."""
        return self._is(self._channel.promoted()[0])

    def _is(self, wanted: Promoted | None) -> bool:
        stands = self._manifest()
        if wanted is None or wanted.adapter is None:
            return stands is None and not self._folder.sizes()
        files = _files(wanted)
        return (
            stands is not None
            and stands.facts == _facts(wanted)
            and stands.files == files
            and self._folder.holds(files)
            and self._folder.sizes().keys() == {*files, MANIFEST}
        )

    def _make(self, wanted: Promoted | None) -> None:
        before = self._manifest()
        # From here on it is not whole: what is killed below is made anew from its first file.
        self._folder.withdraw()
        etags = {name: self._etag(name) for name in self._folder.sizes()}
        if wanted is None or wanted.adapter is None or wanted.run_id is None:
            self._folder.delete()
            return
        files = _files(wanted)
        log.info("channel_adapter", uri=self._folder.uri, run_id=wanted.run_id, sequence=wanted.sequence)
        shutil.rmtree(self._scratch, ignore_errors=True)
        run = StoredFolder(self._store, f"runs/{wanted.run_id}/adapter")
        run.download(files, self._scratch, should_stop=self._should_stop)
        config_stays = before is not None and before.files.get(CONFIG) == files.get(CONFIG)
        if not config_stays:
            self._folder.remove([CONFIG])
            etags.pop(CONFIG, None)
        for name in sorted(files, key=lambda each: (each == CONFIG, each)):
            if before is not None and before.files.get(name) == files[name] and name in etags:
                continue
            crash_point("channel_adapter.before_file")
            self._put(self._scratch / name, name, etags.get(name))
            crash_point("channel_adapter.after_file")
        self._folder.remove([name for name in etags if name not in files])
        self._store.write(
            self._prefix + MANIFEST,
            json_bytes(Manifest(facts=_facts(wanted), files=files).content()),
            create_only=self._channel.conditional,
        )
        crash_point("channel_adapter.after_manifest")
        shutil.rmtree(self._scratch, ignore_errors=True)

    def _put(self, path: Path, name: str, etag: str | None) -> None:
        condition = {"create_only": etag is None, "if_match": etag} if self._channel.conditional else {}
        try:
            self._folder.upload(path, name, should_stop=self._should_stop, **condition)  # type: ignore[arg-type] # one value for each key
        except NotFoundError as error:
            raise PreconditionError(f"{self._prefix}{name} is gone") from error

    def _etag(self, name: str) -> str | None:
        with contextlib.suppress(NotFoundError):
            return self._store.stat(self._prefix + name).etag
        return None

    def _manifest(self) -> Manifest | None:
        """None: there is none that could be ours."""
        with contextlib.suppress(NotFoundError, DataError):
            return self._folder.manifest(lambda facts: {"run_id", "sequence"} == facts.keys())
        return None


def _facts(wanted: Promoted) -> dict[str, object]:
    return {"run_id": wanted.run_id, "sequence": wanted.sequence}


def _files(wanted: Promoted) -> dict[str, FileEntry]:
    assert wanted.adapter is not None, "the base has no files"
    return _entries(wanted.adapter)


def _entries(adapter: AdapterInUse) -> dict[str, FileEntry]:
    return {name: FileEntry(size=f.size, sha256=f.sha256) for name, f in adapter.files.items()}
