"""What the report says of the dataset: its objects, and what was used of each side and source."""

import itertools
from typing import Self

from pydantic import model_validator

from job.core.data.lengths import Candidate
from job.core.data.preview import ExamplePreview
from job.core.section import Section


class DataObject(Section):
    """One object of the dataset."""

    uri: str
    etag: str
    version: str | None
    """Version id, where the bucket keeps versions."""
    size: int
    """Bytes."""
    sha256: str


class Histogram(Section):
    """Lengths in tokens: bin i holds edges[i] <= length < edges[i + 1]; the last includes its end."""

    edges: tuple[int, ...]
    counts: tuple[int, ...]

    @model_validator(mode="after")
    def _has_a_count_a_bin(self) -> Self:
        if len(self.edges) != len(self.counts) + 1 or any(a > b for a, b in itertools.pairwise(self.edges)):
            raise ValueError("edges and counts do not belong together")
        return self


class SourceReport(Section):
    """One of several sources, on one side; the keys mean what they mean for the side."""

    name: str
    rows: int
    used: int
    truncated: int
    dropped: int
    without_target: int
    empty: int = 0
    bad_lines: int
    """Wrong lines of its own files that were left out."""
    tokens: int
    targets: int
    percentiles: dict[str, int]
    """Empty for a source without examples on this side."""


class SideReport(Section):
    """One side of the dataset."""

    objects: tuple[DataObject, ...]
    """Empty when validation is a fraction of the training files."""
    rows: int
    """Examples that were read and are right."""
    used: int
    """Examples that are trained or judged on."""
    duplicates: int
    """Examples whose text stood there before."""
    truncated: int
    """Cut at max_length, and so without EOS."""
    dropped: int
    """Left out because longer than max_length."""
    without_target: int
    """Left out because nothing is left to learn from."""
    empty: int = 0
    """Lines left out because their answer is empty; none of `rows`."""
    tokens: int
    """Real tokens of the used examples, after the cut."""
    targets: int
    """Tokens the loss is over."""
    percentiles: dict[str, int]
    """Lengths in tokens before the cut."""
    histogram: Histogram
    sources: tuple[SourceReport, ...] = ()
    """In the recipe's order; empty where there is but one."""

    @property
    def used_by_source(self) -> tuple[int, ...]:
        """Examples of each source, also where there is but one."""
        return tuple(source.used for source in self.sources) or (self.used,)


class BadLine(Section):
    """A line that was left out: it is wrong, or its example is too long or has nothing to learn."""

    where: str
    reason: str


class DataReport(Section):
    """The dataset as it was used."""

    train: SideReport
    validation: SideReport
    bad_lines: int
    first_bad_lines: tuple[BadLine, ...]
    first_left_out: tuple[BadLine, ...] = ()
    """The first examples that were dropped as too long, and the first without a target; ten at most of each on each
    side."""
    overlap: int
    """Held-out examples that are also trained on: above 0 the validation loss flatters."""
    max_length: int
    """Tokens."""
    max_length_reason: str
    preview: tuple[ExamplePreview, ...] = ()
    """The first, the longest and the shortest training example of each source, as they are learned."""
    candidates: tuple[Candidate, ...] = ()
    """What other max_lengths would cut of the training examples, the shortest first; the chosen one is among them."""
