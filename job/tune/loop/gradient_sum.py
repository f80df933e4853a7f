"""The sum of all ranks' gradients, begun while the share's last micro-batch still goes through the layers."""

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

from job.core.plan.scaling import SUM_PIECE
from job.tune.loop.flat import FlatAdapter
from job.tune.world import World


class GradientSum:
    """One of a step. Pieces are summed in one order everywhere, so that ranks need not say which one is whole."""

    def __init__(self, world: World, adapter: FlatAdapter) -> None:
        """Nothing is summed yet; the adapter's gradients become the sums over all ranks."""
        self._world = world
        self._pieces = adapter.pieces(SUM_PIECE)
        self._missing: list[set[int]] = []
        """Of each piece: parameters whose gradients are not complete."""
        self._waits: list[Callable[[], None]] = []
        """For the sums that were begun."""
        self._aside: list[Tensor] = []
        """Sums that are safe from what is computed again."""
        self._is_last = False

    def begin(self) -> None:
        """The next micro-batch is the last one of our share: what it completes may be summed."""
        self._missing = [{id(parameter) for parameter in parameters} for _, parameters in self._pieces]
        self._waits.clear()
        self._aside.clear()
        self._is_last = self._world.sums_early

    def on_finished(self, parameters: Iterable[Tensor], after: Any) -> None:
        """See `Engine.watch`."""
        if not self._is_last:
            return
        complete = {id(parameter) for parameter in parameters}
        for missing in self._missing[len(self._waits) :]:
            missing.difference_update(complete)
        while len(self._waits) < len(self._pieces) and not self._missing[len(self._waits)]:
            self._begin_next(after)

    def put_aside(self) -> None:
        """The share is computed again, in smaller micro-batches: what is summed by now is kept from it."""
        self._is_last = False
        for (gradient, _), wait in zip(self._pieces[len(self._aside) :], self._waits[len(self._aside) :], strict=False):
            wait()
            self._aside.append(gradient.to("cpu", copy=True))

    def begin_rest(self) -> None:
        """Our share is computed: begin what was not begun yet, before any other sum."""
        self._is_last = False
        while len(self._waits) < len(self._pieces):
            self._begin_next(None)

    def finish(self) -> None:
        """Wait for all of them; the gradients are the sums."""
        for wait in self._waits[len(self._aside) :]:
            wait()
        for (gradient, _), total in zip(self._pieces, self._aside, strict=False):
            gradient.copy_(total)

    def _begin_next(self, after: Any) -> None:
        gradient, _ = self._pieces[len(self._waits)]
        self._waits.append(self._world.begin_sum(gradient, after))
