"""The other processes of a run, as one of them deals with them: before they are a group, and beside their steps."""

import contextvars
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from types import TracebackType
from typing import Any, Literal, Self

import structlog
import torch

from job.core.attempt.seat import Seat
from job.core.attempt.stall import allowed_seconds
from job.core.errors import JobError, PeerLostError, StopRequestedError, error_of
from job.edge.base.fetching import BaseModelIdentity
from job.edge.run.artifacts import Artifacts
from job.edge.store.objects import StoredObject
from job.edge.store.opening import open_store
from job.stages.attempt import Attempt
from job.stages.attempts.identity import Run
from job.stages.base.loading import Inputs
from job.stages.data.data_objects import Objects, Sides
from job.tune.ranks import CAUSE, Meeting
from job.tune.world import ALONE, Order, World

log = structlog.get_logger(__name__)
_LOOK_SECONDS = 0.5
_CAUSE_SECONDS = 2.0
"""How long the word of a process that has ended may take to come: it leaves it before it goes, unless it was killed."""
_SHARE = 0.9
"""Of the time that the watchdog allows: who waits for another process gives up before it, and can save what it has."""
_PAUSE_SECONDS = 0.1
_FOR_EVER_SECONDS = 2_592_000.0
"""Rank 0 watches over all others."""
_YES = True
Part = Literal["look", "other seed", "run"]
"""What is done with a run: it is looked at before either of two trainings, or it is one of them."""
_NO_OTHER = Seat(rank=0, size=1, local_rank=0, node=0, nodes=1, host="", port=0, folder="", supervisor=0)


class OverError(Exception):
    """Rank 0 has ended well before there was anything for the others to do."""


class Company:
    """This process among the others; `world` is `ALONE` until it has joined them, and stays so where there are none.

    It is entered for each run that they carry, one after another: the same group makes all of them.
    """

    def __init__(self, attempt: Attempt, seat: Seat | None) -> None:
        """Connect to the launcher's store; without a seat there is none.

        Raises:
            PeerLostError: it is gone.
            StopRequestedError: it is that of an attempt that is over.
        """
        self._attempt = attempt
        self._seat = seat or _NO_OTHER
        self._meeting = None if seat is None else _met(Meeting(seat))
        self.world: World = ALONE
        self._left = threading.Event()
        self._run_number = 0
        self._has_met = False
        """Whether all are ready for this run."""

    @property
    def rank(self) -> int:
        """Our number, from 0."""
        return self._seat.rank

    @property
    def size(self) -> int:
        """How many processes there are."""
        return self._seat.size

    @property
    def nodes_that_sum(self) -> int:
        """See `Seat`."""
        return self._seat.nodes_that_sum

    @property
    def nodes(self) -> int:
        """On how many nodes they are."""
        return self._seat.nodes

    def __enter__(self) -> Self:
        self._run_number += 1
        self._has_met, self._left = False, threading.Event()
        if self._meeting is not None:
            # By a connection of its own: the other one may be in the midst of a wait.
            look = partial(self._look, Meeting(self._seat), self._left)
            run = contextvars.copy_context().run
            threading.Thread(target=run, args=(look,), name="company", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """The others may go when we have ended well; where one of them is gone, its end is the reason of ours."""
        self._left.set()
        if error is None and self._seat.leads:
            with suppress(PeerLostError):  # the report is committed, whoever is gone by now
                self.world.order(Order.DONE)
        missed = isinstance(error, PeerLostError)
        # Whatever else it says, it was computed from nothing.
        misled = self.world.broken_off and isinstance(error, Exception) and not isinstance(error, StopRequestedError)
        if (missed or misled) and (cause := self._cause_of_a_loss()) is not None:
            raise _error(cause) from error
        if misled and not missed:
            raise PeerLostError("another process of the run is gone, and what waited for it was broken off") from error

    # --- before they are a group --------------------------------------------------------------------------------------

    def begin(self, run: Run, attempt: Attempt, *, looks: bool = False) -> None:
        """Rank 0 says which run it is, and whether it only looks at it; another one's attempt is at the other seed."""
        part: Part = "look" if looks else "run" if attempt is self._attempt else "other seed"
        if self._meeting is not None:
            self._meeting.say(self._key("run"), {**_said_of(run), "part": part})

    def begun(self) -> tuple[Run, Part]:
        """The run that rank 0 has found, and what is done with it; after the run itself nothing follows.

        Raises:
            OverError: there is nothing to do.
        """
        said = self._wait_for(self._key("run"))
        return _run_of(said, self._attempt), said["part"]

    def in_turn(self, gather: Callable[[], Inputs]) -> Inputs:
        """One process of a node downloads, encodes and makes the copy in 4 bits; the others find it on the disk."""
        node = self._seat.node
        if self._seat.local_rank == 0:
            inputs = gather()
            if self._meeting is not None:
                # The copy that shards are read from stands already, and loading it needs all of us.
                self._meeting.say(self._key(f"gathered.{node}"), inputs.base.quantised or inputs.placement == "sharded")
            return inputs
        if not self._wait_for(self._key(f"gathered.{node}")):
            self._wait_for(self._key(f"loaded.{node}"))
        return gather()

    def as_rank_0_decides(self, what: str, decide: Callable[[], Any]) -> Any:
        """What rank 0 decides, who says it to the others; anything that JSON holds."""
        if self._meeting is None:
            return decide()
        if self._seat.leads:
            self._meeting.say(self._key(what), decided := decide())
            return decided
        return self._wait_for(self._key(what))

    def loaded(self) -> None:
        """The base stands on our device, and its copy on the disk."""
        if self._meeting is not None and self._seat.local_rank == 0:
            self._meeting.say(self._key(f"loaded.{self._seat.node}"), _YES)

    def join(self, device: torch.device) -> World:
        """Wait until all are ready for this run, and become a group, unless we are one from the run before; once a run.

        Raises:
            JobError: what another one has ended with.
        """
        if self._meeting is not None and not self._has_met:
            self._meeting.say(self._key(f"ready.{self.rank}"), _YES)
            for rank in range(self.size):
                self._wait_for(self._key(f"ready.{rank}"))
            self._has_met = True
            if self.world is ALONE:
                self.world = self._meeting.join(device, patience=self._patience)
            log.info("joined", ranks=self.size, nodes=self._seat.nodes)
        return self.world

    def _key(self, word: str) -> str:
        """A word of this run: what was said of the one before stays."""
        return f"{word}.{self._run_number}"

    def _wait_for(self, key: str) -> Any:
        assert self._meeting is not None, "nobody waits alone"
        while (found := self._meeting.heard(key)) is None:
            cause = self._meeting.heard(CAUSE)
            if cause is not None and not cause["code"]:
                raise OverError
            if cause is not None and cause["rank"] != self.rank:
                raise _error(cause) from PeerLostError("another process of the run has ended")
            if self._attempt.moves_on():
                raise StopRequestedError("asked to stop before all processes of the run had come together")
            time.sleep(_PAUSE_SECONDS)
        return found

    def _patience(self) -> float:
        attempt = self._attempt
        if not self._seat.leads:
            return _FOR_EVER_SECONDS
        longest = max(attempt.limits.cost.steps, default=None)
        phase = attempt.phases.current or "train"
        return _SHARE * allowed_seconds(phase, longest_step_seconds=longest, override=attempt.stall_seconds)

    # --- while and after they are one ---------------------------------------------------------------------------------

    def _cause_of_a_loss(self) -> dict[str, Any] | None:
        """What a process that is gone has left word of; None: nothing has come."""
        until = time.monotonic() + _CAUSE_SECONDS
        while self._meeting is not None and time.monotonic() < until:
            try:
                cause: dict[str, Any] | None = self._meeting.heard(CAUSE)
            except PeerLostError:
                return None
            if cause is not None and cause["code"]:
                return cause
            time.sleep(_PAUSE_SECONDS)
        return None

    def _look(self, meeting: Meeting, left: threading.Event) -> None:
        """One that is asked to stop asks all; one that is gone is known to all."""
        said = False
        while not left.wait(_LOOK_SECONDS):
            try:
                if not self._attempt.is_kill_near() and meeting.heard("stop") is not None:
                    self._attempt.hear_stop()
                elif self._attempt.is_kill_near() and not said:
                    said = True
                    meeting.say("stop", self.rank)
                cause = meeting.heard(CAUSE)
                if cause is not None and cause["code"]:
                    self.world.lose()
            except PeerLostError:
                return  # the launcher is gone, and its supervisor will end us


def _met(meeting: Meeting) -> Meeting:
    """Take our seat, unless it is taken: a node that starts anew may find the first one at its old attempt's end."""
    key, mine = f"seat.{meeting.seat.rank}", uuid.uuid4().hex
    meeting.say(key, mine)
    if meeting.heard(key) != mine:
        raise StopRequestedError(
            "this node was started again while the first one still ends the attempt before; they meet in the next"
        )
    return meeting


def _error(cause: dict[str, Any]) -> JobError:
    where = "" if cause["rank"] == 0 else f"rank {cause['rank']}: "
    return error_of(cause["code"], f"{where}{cause['reason']}", action=cause["action"])


def _said_of(run: Run) -> dict[str, Any]:
    """What other processes need to know of a run, as JSON.

    Not what it starts from, nor which files are late: the channel is rank 0's, which gives the others its state.
    """
    return {
        "run_id": run.artifacts.run_id,
        "base": asdict(run.base),
        "sides": asdict(run.sides),
        "record": run.record,
    }


def _run_of(said: dict[str, Any], attempt: Attempt) -> Run:
    def objects(sources: list[list[dict[str, Any]]]) -> tuple[Objects, ...]:
        return tuple(tuple(StoredObject(**each) for each in source) for source in sources)

    worker, sides = attempt.worker, said["sides"]
    return Run(
        artifacts=Artifacts(open_store(worker.recipe.output, worker.settings), said["run_id"]),
        base=BaseModelIdentity(**said["base"]),
        sides=Sides(train=objects(sides["train"]), validation=objects(sides["validation"])),
        record=said["record"],
        begun=True,
        done=False,
    )
