"""The sources' files on the local disk, and their lines as examples; each source is counted by itself."""

from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path

from job.core.data.chunks import Side
from job.core.data.records import Tally, checked_lines, judge_lines
from job.core.recipe.data_section import DataSection, DataSource
from job.edge.dataset_files import DataFile, fetch_files, read_lines
from job.edge.store.objects import StoredObject
from job.stages.attempt import Worker


def fetch_sources(
    worker: Worker,
    sources: Sequence[Sequence[StoredObject]],
    folder: Path,
    *,
    beside: Sequence[StoredObject] = (),
    on_progress: Callable[[int, int], None],
) -> list[list[DataFile]]:
    """The files of each source.

    Args:
        worker: with the stores' settings.
        sources: the objects of each.
        folder: where they go; it belongs to them.
        beside: the dataset's other objects, which messages must distinguish from these.
        on_progress: called with the bytes that have arrived, and with all there are.

    Raises:
        DataError: an object changed since it was listed.
    """
    sizes = [sum(o.size for o in objects) for objects in sources]  # once: each piece that arrives is reported
    files = []
    for place, objects in enumerate(sources):
        others = [*(o for each in sources if each is not objects for o in each), *beside]
        before, every = sum(sizes[:place]), sum(sizes)
        files.append(
            fetch_files(
                objects,
                folder / f"{place:03d}",
                worker.settings,
                beside=[o.uri for o in others],
                should_stop=worker.should_stop,
                on_progress=lambda done, before=before, every=every: on_progress(before + done, every),  # type: ignore[misc]
            )
        )
    return files


def new_tallies(data: DataSection) -> dict[Side, list[Tally]]:
    """One for each source that has files of its own, with what messages call it."""
    return {
        "train": _tallies("data.train", data.sources),
        "validation": _tallies("data.validation", data.held_out_sources),
    }


def _tallies(side: str, sources: Sequence[DataSource]) -> list[Tally]:
    return [Tally(side=f"{side}: {source.name}" if len(sources) > 1 else side) for source in sources]


def count_lines(data: DataSection, files: Sequence[Sequence[DataFile]]) -> Tally:
    """Check every line of all sources without a tokenizer: of chats what a template has no part in.

    Raises:
        DataError: more are wrong than the recipe accepts.
    """
    sources, tallies = (*data.sources, *data.held_out_sources), [*chain(*new_tallies(data).values())]
    for source, own, tally in zip(sources, files, tallies, strict=True):
        for _example in checked_lines(read_lines(own, max_record=source.data.max_record), source.data, tally=tally):
            pass
    judge_sources(sources, tallies)
    every = Tally()
    for each in tallies:
        every.merge(each)
    return every


def judge_sources(sources: Sequence[DataSource], tallies: Sequence[Tally]) -> None:
    """Report all wrong lines at once; what helps is said for the templates of the first source that has some.

    Raises:
        DataError: more are wrong than the recipe accepts, in any of the sources.
    """
    wrong = [source.data for source, tally in zip(sources, tallies, strict=True) if tally.bad]
    judge_lines(tallies, (*wrong, sources[0].data)[0])
