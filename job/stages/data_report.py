"""The dataset as it is used, counted for report and log: by side, and by source where there are several."""

from collections.abc import Sequence
from typing import Any

from job.core.course import Course
from job.core.data_section import DataSection
from job.core.lengths import length_statistics
from job.core.report import BadLine, DataObject, DataReport, Histogram, SideReport, SourceReport
from job.tune.data.documents import Documents
from job.tune.data.encoded import Side


def data_report(
    data: DataSection, audit: dict[str, Any], train: Documents, validation: Documents, limit: tuple[int, str]
) -> DataReport:
    """Both sides and, where there are several, each of their sources.

    Args:
        data: with the sources' names.
        audit: what was read; see `dataset`.
        train: what is trained on.
        validation: what is judged on.
        limit: max_length in tokens, and why.
    """
    seen = {"train": train.encoded.digests(), "validation": validation.encoded.digests()}
    trained_on = {seen["train"][row] for row in train.rows}
    names: dict[Side, list[str]] = {"train": [source.name for source in data.sources]}
    names["validation"] = [source.name for source in data.held_out_sources] or names["train"]
    return DataReport(
        train=_side(train, audit, "train", seen["train"], names["train"]),
        validation=_side(validation, audit, "validation", seen["validation"], names["validation"]),
        bad_lines=audit["bad"],
        first_bad_lines=tuple(BadLine(**record) for record in audit["first_bad"]),
        overlap=sum(seen["validation"][row] in trained_on for row in validation.rows),
        max_length=limit[0],
        max_length_reason=limit[1],
    )


def _side(
    documents: Documents, audit: dict[str, Any], side: Side, digests: list[bytes], names: Sequence[str]
) -> SideReport:
    statistics = length_statistics(documents.encoded.lengths)
    bad = audit["bad_by_source"][side] or [0] * len(names)  # none of its own: those of train's files are counted there
    return SideReport(
        objects=tuple(DataObject(**o) for o in audit[side]),
        rows=len(documents.encoded),
        used=len(documents),
        duplicates=len(digests) - len(set(digests)),
        truncated=documents.truncated,
        dropped=documents.dropped,
        without_target=documents.without_target,
        tokens=int(documents.lengths.sum()),
        targets=int(documents.targets.sum()),
        percentiles=statistics.percentiles,
        histogram=Histogram(edges=statistics.edges, counts=statistics.counts),
        sources=tuple(_source(documents, place, name, bad[place]) for place, name in enumerate(names))
        if len(names) > 1
        else (),
    )


def _source(documents: Documents, place: int, name: str, bad: int) -> SourceReport:
    encoded, mine = documents.encoded, documents.sources == place
    read = encoded.lengths[encoded.sources == place]
    return SourceReport(
        name=name,
        rows=len(read),
        used=int(mine.sum()),
        truncated=int((encoded.lengths[documents.rows[mine]] > documents.max_length).sum()),
        dropped=int((encoded.sources[documents.dropped_rows] == place).sum()),
        without_target=int((encoded.sources[documents.rows_without_target] == place).sum()),
        bad_lines=bad,
        tokens=int(documents.lengths[mine].sum()),
        targets=int(documents.targets[mine].sum()),
        percentiles=length_statistics(read).percentiles if len(read) else {},
    )


def counted(report: DataReport, course: Course) -> list[dict[str, Any]]:
    """The sources, for the log."""
    return [
        {
            "name": source.name,
            "used": source.used,
            "share": round(course.mixture.share(place), 4),
            "epochs": round(course.passes(place), 3),
            "tokens": source.tokens,
        }
        for place, source in enumerate(report.train.sources)
    ]
