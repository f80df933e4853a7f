"""Starts the processes of a run by torch's launcher, hands requests to stop on, and ends as the first that failed did.

The launcher turns every worker's exit code into 1 and kills 30 seconds after a signal: so it gets none from us, each
worker leaves its own outcome in a folder, and the code is found there.
"""

import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import structlog

import job
from job.core.attempt.ended import EndedPromotion
from job.core.attempt.seat import FOLDER, SUPERVISOR, SUPERVISOR_SECONDS, Team, WorkerEnd, first_cause
from job.core.errors import JobError, PeerLostError, StopRequestedError, UnavailableError, error_of
from job.launch.launched import LOG, Launched
from job.stages.attempt import Attempt

log = structlog.get_logger(__name__)
_LOOK_SECONDS = 0.1
_OTHERS_SECONDS = 30.0
"""How long the others may take once one has ended, and at least the grace: the launcher gives them as long."""
_FOLLOWERS_SECONDS = 15.0
"""The same once rank 0 has said its end: they have nothing to do any more but to say theirs."""
_LOOK_AT_MEMORY = "start the same job again; where it happens again, look at the memory that the job is given"
_SAID_BYTES = 4000
"""Of what workers have said beside the log, shown where one of them went without a word."""


def supervise(
    attempt: Attempt,
    team: Team,
    *,
    arguments: Sequence[str],
    environment: Mapping[str, str],
    reason: Callable[[], str | None],
) -> None:
    """Carry a run to its committed report by several processes.

    Args:
        attempt: this process's: its outcome file, its grace, whether it is asked to stop.
        team: how many, and where.
        arguments: of the command line, for each of them.
        environment: ours.
        reason: the name of the signal that asks to stop.

    Raises:
        JobError: the exit code of the table.
    """
    folder = _own_folder(attempt)
    try:
        with (folder / LOG).open("wb"):
            pass
        log.info("supervisor", processes=team.gpus, nodes=team.nodes, node=team.node_rank)
        launched = Launched(
            launcher_command(team, arguments),
            environment=_worker_environment(team, environment, folder),
            folder=folder,
        )
        watch = _Watch(attempt, team, launched, folder, reason)
        try:
            watch.wait()
        finally:
            watch.killed |= launched.kill()
        watch.conclude()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def launcher_command(team: Team, arguments: Sequence[str]) -> list[str]:
    """The command that starts this node's workers."""
    place = ["--standalone"]
    if team.rendezvous is not None:
        # Static: each node is there once, with its own number; a node that comes back is a new attempt.
        host, _, port = team.rendezvous.rpartition(":")
        place = ["--nnodes", str(team.nodes), "--node-rank", str(team.node_rank)]
        place += ["--master-addr", host, "--master-port", port]
    entrypoint = Path(job.__file__).resolve().parents[1] / "entrypoint.py"
    launcher = [sys.executable, "-P", "-m", "torch.distributed.run", "--max-restarts", "0", *place]
    return [*launcher, "--nproc-per-node", str(team.gpus), str(entrypoint), *arguments]


def _own_folder(attempt: Attempt) -> Path:
    """For the workers' outcomes: not on the work folder's disk, which may be full just when they count."""
    try:
        return Path(tempfile.mkdtemp(prefix="qlora-job-"))
    except OSError:
        attempt.worker.workdir.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix="launch-", dir=attempt.worker.workdir))


def _worker_environment(team: Team, ours: Mapping[str, str], folder: Path) -> dict[str, str]:
    threads = max(1, len(os.sched_getaffinity(0)) // team.gpus)
    return {"OMP_NUM_THREADS": str(threads), **ours, FOLDER: str(folder), SUPERVISOR: str(os.getpid())}


class _Watch:
    """Over the workers of this node."""

    def __init__(
        self, attempt: Attempt, team: Team, launched: Launched, folder: Path, reason: Callable[[], str | None]
    ) -> None:
        self._attempt, self._launched, self._folder, self._reason = attempt, launched, folder, reason
        first = team.gpus * team.node_rank
        self._ranks = range(first, first + team.gpus)
        self._team = team
        self._said: dict[int, dict[str, Any]] = {}
        self._ended_at: dict[int, float] = {}
        self._orphaned_at = 0.0
        """When the launcher was gone and left workers behind; 0: it has not."""
        self.killed: set[int] = set()
        """Ranks that we have ended."""

    def wait(self) -> None:
        """Until all have ended, or their time is over."""
        grace = self._attempt.grace_seconds
        asked_at: float | None = None
        while self._launched.runs or self._launched.works:
            time.sleep(_LOOK_SECONDS)
            self._look()
            now = time.monotonic()
            if not self._launched.runs and self._launched.works and not self._orphaned_at:
                self._orphaned_at = now
                self._launched.stop(None)  # nobody waits for them any more, and they can still save
            if self._orphaned_at and now - self._orphaned_at > max(_OTHERS_SECONDS, grace or 0.0):
                return
            if self._attempt.worker.should_stop():
                asked_at = asked_at or now
                self._attempt.standing.asked_at = asked_at
                self._launched.stop(self._reason())
                if self._team.nodes > 1 and not self._launched.has_begun:
                    return  # the nodes have not met yet: there is nothing to save
                # Until then they have ended by themselves: their grace is a little shorter than ours.
                if grace is not None and now - asked_at > grace - min(SUPERVISOR_SECONDS, grace / 4) / 2:
                    return
            # Where rank 0 was killed the others still commit what they hold.
            if self._has_ended(0) and now - self._ended_at[0] > _FOLLOWERS_SECONDS:
                return
            if self._ended_at and now - min(self._ended_at.values()) > max(_OTHERS_SECONDS, grace or 0.0):
                return
        self._look()

    def _look(self) -> None:
        self._launched.look()
        for rank in self._ranks:
            with suppress(OSError, ValueError):
                self._said[rank] = json.loads((self._folder / f"outcome-r{rank:02d}.json").read_text())
            if rank not in self._ended_at and (self._has_ended(rank) or self._launched.has_ended(rank)):
                self._ended_at[rank] = time.monotonic()
        leader = self._said.get(0)
        if leader is not None:
            self._repeat(leader)

    def _has_ended(self, rank: int) -> bool:
        return self._said.get(rank, {}).get("state") == "ended"

    def _repeat(self, said: Mapping[str, Any]) -> None:
        """What rank 0 says of the run is what we say."""
        attempt, standing = self._attempt, self._attempt.standing
        standing.run_uri, standing.last_committed_step = said.get("run_uri"), said.get("last_committed_step")
        standing.step = said.get("step") or standing.step
        standing.number = said.get("attempt") or standing.number
        standing.late = tuple(said.get("late") or standing.late)
        if said.get("promotion") is not None:
            standing.promotion = EndedPromotion.model_validate(said["promotion"])
        attempt.phases.current = said.get("phase")
        attempt.outcome.relay(said)

    def conclude(self) -> None:
        """Raise what the run has ended with."""
        self._look()
        ends = [self._end(rank) for rank in self._ranks]
        cause = first_cause(ends)
        log.info("workers", ended={str(end.rank): "no word" if end.code is None else end.code for end in ends})
        if cause is None:
            return
        if self._orphaned_at and (cause.code is None or cause.is_effect or cause.code == StopRequestedError.code):
            raise PeerLostError(
                f"the launcher of the workers was killed (exit code {self._launched.code}); the run goes on from the "
                "last committed step",
                action=_LOOK_AT_MEMORY,
            )
        if cause.code is None:
            self._show_what_was_said()
            raise self._lost(cause)
        said = self._said[cause.rank]
        self._attempt.standing.final = said.get("again") == "no"
        where = "" if cause.rank == 0 or cause.is_effect else f"rank {cause.rank}: "
        raise error_of(cause.code, f"{where}{cause.reason}", action=said.get("action"))

    def _end(self, rank: int) -> WorkerEnd:
        said = self._said.get(rank, {})
        at, was_killed = self._ended_at.get(rank, time.monotonic()), rank in self.killed
        if not self._has_ended(rank):
            return WorkerEnd(rank=rank, code=None, at=at, was_killed=was_killed)
        effect, reason = bool(said.get("effect")), said["reason"]
        return WorkerEnd(rank=rank, code=said["code"], at=at, reason=reason, is_effect=effect, was_killed=was_killed)

    def _lost(self, cause: WorkerEnd) -> JobError:
        if not self._said and self._team.nodes > 1:
            if self._attempt.worker.should_stop():
                met_at = self._team.rendezvous
                return StopRequestedError(f"asked to stop before the nodes had come together at {met_at}")
            return UnavailableError(
                f"the nodes did not come together at {self._team.rendezvous} (the launcher ended with "
                f"{self._launched.code}); look whether all {self._team.nodes} were started and reach it"
            )
        how = "was ended, for it did not end in time" if cause.was_killed else "ended without a word: it was killed"
        phase = self._said.get(cause.rank, {}).get("phase")
        return PeerLostError(
            f"rank {cause.rank} {how}{f' in phase {phase}' if phase else ''}; the run goes on from the last committed "
            "step",
            action=_LOOK_AT_MEMORY,
        )

    def _show_what_was_said(self) -> None:
        with suppress(OSError):
            said = (self._folder / LOG).read_bytes()[-_SAID_BYTES:].decode(errors="replace").strip()
            if said:
                log.warning("workers_said", text=said)
