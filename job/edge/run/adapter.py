"""The published adapter of a run: the files that report.json names, and is written after."""

from collections.abc import Callable, Mapping
from pathlib import Path

import structlog

from job.core.crash_points import crash_point
from job.core.errors import NotFoundError
from job.edge.run.run_store import ROUNDS, RunStore, never
from job.edge.store.folder import FileEntry
from job.edge.store.objects import PreconditionError

log = structlog.get_logger(__name__)

_NAME = "adapter"


class PublishedAdapter:
    """The folder adapter/ of one run. It has no manifest of its own: the report is what commits it."""

    def __init__(self, run: RunStore) -> None:
        """Nothing is asked of the store yet."""
        self._run = run
        self._folder = run.folder(_NAME)

    def publish(self, folder: Path) -> dict[str, FileEntry]:
        """Put the chosen adapter where it is read from.

        Each file is created, never overwritten unseen: what an attempt left that was killed here, and that no report
        names, is replaced on condition that it is still the same.
        """
        files = {}
        for path in sorted(folder.iterdir()):
            crash_point("adapter.before_file")
            files[path.name] = self.add(path)
            crash_point("adapter.after_file")
        for name in self._folder.sizes():
            if name not in files:  # another version of the job wrote one more
                self._run.confirm()
                self._folder.remove([name])
        return files

    def fetch(self, folder: Path, files: Mapping[str, FileEntry], *, should_stop: Callable[[], bool]) -> None:
        """Bring the adapter's files into the folder, each verified.

        Raises:
            DataError: a file is not what its entry says.
            NotFoundError: a file is gone.
        """
        self._folder.download(files, folder, should_stop=should_stop)

    def holds(self, files: Mapping[str, FileEntry]) -> bool:
        """Whether each of these files stands there, with the size of its entry."""
        return self._folder.holds(files)

    def add(self, path: Path) -> FileEntry:
        """Put one more file there, in the same way."""
        key = f"{self._run.root}{_NAME}/{path.name}"
        for _ in range(ROUNDS if self._run.conditional else 0):
            etag = self._run.etag(key)
            self._run.confirm()  # after it: whatever changes from here on fails the condition
            try:
                return self._folder.upload(path, path.name, create_only=etag is None, if_match=etag, should_stop=never)
            except (PreconditionError, NotFoundError):
                log.info("adapter_file_met", key=key, message="it appeared in this moment; looking again")
        self._run.confirm()
        return self._folder.upload(path, path.name, should_stop=never)
