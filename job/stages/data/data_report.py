"""The dataset as it is used, counted for report and log: by side, and by source where there are several."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from job.core.data.chunks import Side
from job.core.data.lengths import length_statistics
from job.core.data.records import Tally
from job.core.data.report_data import BadLine, DataObject, DataReport, Histogram, SideReport, SourceReport
from job.core.data.same_content import count_repeated, count_shared
from job.core.data.unused import LeftOut
from job.core.plan.course import Course
from job.core.recipe.data_section import DataSection
from job.tune.data.documents import Documents

_MOST_NAMED = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Audit:
    """What was seen while the files were read."""

    objects: Mapping[Side, Sequence[DataObject]]
    tallies: Mapping[Side, Sequence[Tally]]
    """Of each source that has files of its own: of `validation` there may be none."""

    @property
    def every(self) -> Tally:
        """All lines of all files."""
        return _sum(chain(*self.tallies.values()))

    def named_lines(self) -> list[str]:
        """Where the lines stand that were left out, and why."""
        every = self.every
        named, count = every.first_bad, every.bad + every.empty
        if not named:
            return []
        more = f"; and {count - len(named)} more" if count > len(named) else ""
        return [f"lines left out: {'; '.join(map(str, named))}{more}"]

    def left_out(self, data: DataSection, side: Side, documents: Documents) -> list[LeftOut]:
        """What of one side is not learned, by source."""
        own = data.sources if side == "train" else data.held_out_sources or data.sources
        tallies = self.tallies[side] or [Tally()] * len(own)
        return [
            _left_out(
                documents,
                place,
                side=f"data.{side}: {source.name}" if len(own) > 1 else f"data.{side}",
                data=source.data,
                tally=tally,
            )
            for place, (source, tally) in enumerate(zip(own, tallies, strict=True))
        ]


def _left_out(documents: Documents, place: int, *, side: str, data: DataSection, tally: Tally) -> LeftOut:
    counted = _counts(documents, place)
    empty = tally.empty + sum(tally.blank.values())
    return LeftOut(
        side=side,
        data=data,
        examples=counted["rows"] + empty,
        too_long=counted["dropped"],
        without_target=counted["without_target"],
        empty=empty,
        empty_fields=tuple(tally.blank),
        truncated=counted["truncated"],
    )


def _counts(documents: Documents, place: int) -> dict[str, int]:
    """Examples of one source: those that were read, those that are left out, and those that are cut."""
    encoded = documents.encoded
    mine = documents.rows[documents.sources == place]
    return {
        "rows": int((encoded.sources == place).sum()),
        "used": len(mine),
        "truncated": int((encoded.lengths[mine] > documents.max_length).sum()),
        "dropped": int((encoded.sources[documents.dropped_rows] == place).sum()),
        "without_target": int((encoded.sources[documents.rows_without_target] == place).sum()),
    }


def _sum(tallies: Iterable[Tally]) -> Tally:
    found = Tally()
    for each in tallies:
        found.merge(each)
    return found


def data_report(
    data: DataSection, audit: Audit, train: Documents, validation: Documents, limit: tuple[int, str]
) -> DataReport:
    """Both sides and, where there are several, each of their sources.

    Args:
        data: with the sources' names.
        audit: what was read.
        train: what is trained on.
        validation: what is judged on.
        limit: max_length in tokens, and why.
    """
    names: dict[Side, list[str]] = {"train": [source.name for source in data.sources]}
    names["validation"] = [source.name for source in data.held_out_sources] or names["train"]
    every = audit.every
    return DataReport(
        train=_side(train, audit, "train", names["train"]),
        validation=_side(validation, audit, "validation", names["validation"]),
        bad_lines=every.bad,
        first_bad_lines=tuple(BadLine(where=line.where, reason=line.reason) for line in every.first_bad),
        first_left_out=(*_first_left_out(train), *_first_left_out(validation)),
        overlap=count_shared(
            validation.encoded.part,
            train.encoded.part,
            used=validation.rows,
            others_used=train.rows,
            examples=len(train.encoded) + len(validation.encoded),
        ),
        max_length=limit[0],
        max_length_reason=limit[1],
    )


def _first_left_out(documents: Documents) -> Iterator[BadLine]:
    """Examples of one side that are right and yet not learned, with what is wrong with each."""
    encoded, limit = documents.encoded, documents.max_length
    for row in documents.dropped_rows[:_MOST_NAMED].tolist():
        reason = f"too long: {int(encoded.lengths[row]):,} tokens, more than max_length {limit:,}"
        yield BadLine(where=encoded.where(row), reason=reason)
    for row in documents.rows_without_target[:_MOST_NAMED].tolist():
        length = int(encoded.lengths[row])
        among = f"its first {limit:,} of {length:,} tokens" if length > limit else f"its {length:,} tokens"
        yield BadLine(where=encoded.where(row), reason=f"nothing to learn among {among}")


def _side(documents: Documents, audit: Audit, side: Side, names: Sequence[str]) -> SideReport:
    statistics = length_statistics(documents.encoded.lengths)
    # None of its own: those of train's files are counted there.
    tallies = audit.tallies[side] or [Tally()] * len(names)
    return SideReport(
        objects=tuple(audit.objects[side]),
        rows=len(documents.encoded),
        used=len(documents),
        duplicates=count_repeated(documents.encoded.part, examples=len(documents.encoded)),
        truncated=documents.truncated,
        dropped=documents.dropped,
        without_target=documents.without_target,
        empty=sum(each.empty for each in tallies),
        tokens=int(documents.lengths.sum()),
        targets=int(documents.targets.sum()),
        percentiles=statistics.percentiles,
        histogram=Histogram(edges=statistics.edges, counts=statistics.counts),
        sources=tuple(_source(documents, place, name, tallies[place]) for place, name in enumerate(names))
        if len(names) > 1
        else (),
    )


def _source(documents: Documents, place: int, name: str, tally: Tally) -> SourceReport:
    encoded, mine = documents.encoded, documents.sources == place
    read = encoded.lengths[encoded.sources == place]
    return SourceReport(
        name=name,
        **_counts(documents, place),
        empty=tally.empty,
        bad_lines=tally.bad,
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
