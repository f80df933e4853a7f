"""Small micro-batches as CUDA graphs: launching a step's three thousand kernels takes longer than running them.

A step is recorded once for each size and replayed with other values in the same memory. Sizes are rounded up, so that
there are few; the padding is a document without targets. Whether a micro-batch is padded depends on its size alone, and
the first of a size is replayed too. One that there is no memory to record is launched in the same size, which gives the
same bits: a resumed run equals an uninterrupted one, whatever else is on the device.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from job.core.data.packing import REPLAYED_TOKENS, padded_tokens
from job.kernels.attention import Segments
from job.kernels.decoder import PackedRow
from job.kernels.llama_step import Step

_FEWEST_SEGMENTS, _FEWEST_BESIDE_OTHERS = 4, 16
"""Documents that there is room for; beside other ranks, whose shares have now a few more and now a few less, they
should not make another size of what is equal otherwise: each is recorded while all others wait."""
_MOST_MEMORY = 0.2
"""Share of the GPU's memory that recordings may hold for themselves."""
_OF_FREE = 0.85
"""Share of what is free that activations may take: logits, the update and the optimizer need some."""
_NO_TARGET = -1

OnFinished = Callable[[int, Any], None]
"""See `Step.on_finished`; and the CUDA event after which it is true, or None: as soon as what was launched has run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """What a recording is made for: each size has its own."""

    tokens: int
    segments: int
    masked: bool
    """Whether there is dropout."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Recording:
    row: PackedRow
    """The memory that the step reads: a micro-batch is copied there."""
    replay: Callable[[], Tensor]
    """Runs the step once and returns its losses."""
    finished: dict[int, Any]
    """The events that a replay records, in their order, where somebody watches."""


class Replay:
    """Does what a `Step` does, and replays small micro-batches."""

    def __init__(
        self,
        step: Step,
        parameters: Sequence[nn.Parameter],
        *,
        most_tokens: int,
        most_recorded: int,
        on_failure: Callable[[str], None],
        records: bool = True,
    ) -> None:
        """Parameters and their gradients must stay where they are in memory, for as long as this is used.

        Args:
            step: what is recorded.
            parameters: the adapter's, each with its gradient.
            most_tokens: of a micro-batch that is padded to be replayed; 0: none is.
            most_recorded: tokens of one that there is memory for. Larger ones are padded alike, so that their results
                do not depend on it.
            on_failure: called once with the reason why nothing is recorded any more; small micro-batches are padded
                all the same, so that their results do not change.
            records: false where a step waits for others, which no recording can: small micro-batches are padded alike.
        """
        self._step = step
        self._parameters = parameters
        self._most_tokens, self._most_recorded = most_tokens, most_recorded
        self._on_failure = on_failure
        self._failed = not records
        self._recordings: dict[Size, _Recording] = {}
        self._refresh: Callable[[], None] | None = None
        self._pool: Any = None
        self._on_finished: OnFinished | None = None

    def watch(self, on_finished: OnFinished) -> None:
        """From here on say whose gradients are complete, while a step runs: others wait for it.

        Padding is then the time of all of them, so that there are more sizes, and less of it.
        """
        self._on_finished = on_finished
        self._recordings.clear()  # these record no events

    def accumulate(self, row: PackedRow) -> Tensor:
        """See `Step.accumulate`."""
        size = rounded(row, finely=self._on_finished is not None)
        if size.tokens > self._most_tokens:
            return self._watched(row)
        if size not in self._recordings:
            self._recordings[size] = self._record(size, row)
        recording = self._recordings[size]
        fill(recording.row, row)
        losses = recording.replay()
        for index, event in recording.finished.items():
            if self._on_finished is not None:
                self._on_finished(index, event)
        return losses[: len(row.places)].clone()

    def refresh(self) -> None:
        """See `Step.refresh`."""
        if self._refresh is None:
            self._step.refresh()  # allocates and compiles, outside of a recording
            graph = self._recorded(self._step.refresh)
            self._refresh = self._step.refresh if graph is None else graph.replay
        self._refresh()

    def _record(self, size: Size, like: PackedRow) -> _Recording:
        row, results = empty_row(size, like), []
        fill(row, like)

        def work() -> None:
            results.append(self._step.accumulate(row))

        finished: dict[int, Any] = {}
        graph = self._recorded_beside_gradients(work, finished) if size.tokens <= self._most_recorded else None
        if graph is None:
            return _Recording(row=row, replay=lambda: self._watched(row), finished={})

        def replay() -> Tensor:
            graph.replay()
            return results[-1]  # the recording's output, always the same memory

        return _Recording(row=row, replay=replay, finished=finished)

    def _watched(self, row: PackedRow) -> Tensor:
        """Not recorded."""
        on_finished = self._on_finished
        with self._noting(None if on_finished is None else lambda index: on_finished(index, None)):
            return self._step.accumulate(row)

    @contextmanager
    def _noting(self, note: Callable[[int], None] | None) -> Iterator[None]:
        if note is None:
            yield
            return
        before, self._step.on_finished = self._step.on_finished, note
        try:
            yield
        finally:
            self._step.on_finished = before

    def _recorded_beside_gradients(self, work: Callable[[], None], finished: dict[int, Any]) -> Any:
        """Record after a first run, which compiles kernels and sets libraries up; gradients are left as they were.

        Args:
            work: a step.
            finished: gets an event for each layer, where somebody watches.
        """
        if self._failed:
            return None
        before = [_gradient(parameter).clone() for parameter in self._parameters]
        work()
        for parameter, old in zip(self._parameters, before, strict=True):
            _gradient(parameter).copy_(old)

        def note(index: int) -> None:
            finished[index] = self._event()

        with self._noting(None if self._on_finished is None else note):
            return self._recorded(work)

    def _event(self) -> Any:
        """Recorded, as one that streams outside of the recording may wait for."""
        event = torch.cuda.Event(external=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def _recorded(self, work: Callable[[], None]) -> Any:
        """A CUDA graph of the work; None where the driver, a library or the memory does not allow it."""
        if self._failed or not self._most_tokens:
            return None
        try:
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            graph = torch.cuda.CUDAGraph()
            # Other threads copy to the host meanwhile: only the forbidden calls of this one may end the recording.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                work()
        except RuntimeError as error:  # running out of memory is one, and a step that is not recorded needs less
            self._failed = True
            self._on_failure(f"{type(error).__name__}: {error}"[:300])
            return None
        return graph


def rounded(row: PackedRow, *, finely: bool) -> Size:
    """The size that a micro-batch is padded to: at least one token, and one document, more than it has.

    Args:
        row: the micro-batch.
        finely: whether other ranks wait for it.
    """
    tokens, segments = len(row.ids) + 1, len(row.segments.lengths) + 1
    return Size(
        tokens=padded_tokens(tokens, finely=finely),
        segments=max(_FEWEST_BESIDE_OTHERS if finely else _FEWEST_SEGMENTS, 1 << (segments - 1).bit_length()),
        masked=row.seed is not None,
    )


def most_tokens(step: Step) -> int:
    """Tokens of a micro-batch that is replayed, at most: a recording keeps the memory of its activations."""
    memory = torch.cuda.get_device_properties(step.device).total_memory
    return min(REPLAYED_TOKENS, int(_MOST_MEMORY * memory / step.token_bytes))


def most_recorded(step: Step, *, micro_batch_tokens: int, free_bytes: int) -> int:
    """Tokens of a micro-batch that there is memory to record, beside the largest one that is not recorded.

    Args:
        step: is there, with what it keeps.
        micro_batch_tokens: of the largest.
        free_bytes: on the device.
    """
    return max(0, int(_OF_FREE * free_bytes / step.kept_token_bytes) - micro_batch_tokens)


def empty_row(size: Size, like: PackedRow) -> PackedRow:
    """Memory for micro-batches of up to this size."""
    tokens = size.tokens
    return PackedRow(
        ids=like.ids.new_empty(tokens),
        positions=like.positions.new_empty(tokens),
        segments=Segments(cu_seqlens=like.segments.cu_seqlens.new_empty(size.segments + 1), lengths=(tokens,)),
        places=like.places.new_empty(tokens),
        targets=like.targets.new_empty(tokens),
        weight_per_target=torch.empty_like(like.weight_per_target),
        seed=None if like.seed is None else torch.empty_like(like.seed),
    )


def fill(room: PackedRow, row: PackedRow) -> None:
    """Copy a micro-batch into the memory of a recording; the rest becomes a document without targets."""
    tokens, targets = len(row.ids), len(row.places)
    room.ids[:tokens].copy_(row.ids)
    room.ids[tokens:].zero_()
    room.positions[:tokens].copy_(row.positions)
    torch.arange(len(room.ids) - tokens, out=room.positions[tokens:])
    cu_seqlens = row.segments.cu_seqlens
    room.segments.cu_seqlens[: len(cu_seqlens)].copy_(cu_seqlens)
    room.segments.cu_seqlens[len(cu_seqlens) :].fill_(len(room.ids))
    room.places[:targets].copy_(row.places)
    room.places[targets:].fill_(len(room.ids) - 1)
    room.targets[:targets].copy_(row.targets)
    room.targets[targets:].fill_(_NO_TARGET)
    room.weight_per_target.copy_(row.weight_per_target)
    if room.seed is not None and row.seed is not None:
        room.seed.copy_(row.seed)


def _gradient(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None, "a recording adds to a gradient that exists already"
    return parameter.grad
