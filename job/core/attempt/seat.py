"""The processes of a run: how many, which one this is, and whose end is the run's."""

from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass

from job.core.errors import StopRequestedError, UsageError

FOLDER, SUPERVISOR = "JOB_WORKER_FOLDER", "JOB_SUPERVISOR_PID"
"""What our supervisor hands to its workers; everything else comes from the launcher."""
SUPERVISOR_SECONDS = 3.0
"""Of the grace, kept for what the supervisor does once its workers have ended; a quarter of it where it is short."""
_LAUNCHERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "GROUP_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True, slots=True, kw_only=True)
class Seat:
    """One process among those that work on a run together."""

    rank: int
    size: int
    """How many processes there are, over all nodes."""
    local_rank: int
    """Its number on its node; the GPU of that number is its own."""
    node: int
    nodes: int
    host: str
    port: int
    """Where the launcher's key-value store answers."""
    folder: str
    """Where the supervisor of this node looks for our outcome."""
    supervisor: int
    """Its process."""

    @property
    def gpus(self) -> int:
        """Processes of each node."""
        return self.size // self.nodes

    @property
    def nodes_that_sum(self) -> int:
        """How many nodes sum by themselves before they sum with the others; 1: all processes sum at once."""
        return self.nodes if self.gpus > 1 else 1

    @property
    def outcome(self) -> str:
        """Name of our outcome's file in the folder."""
        return f"outcome-r{self.rank:02d}.json"

    @property
    def leads(self) -> bool:
        """Whether it is the one that owns the run: its lock, its store, its report."""
        return self.rank == 0


def take_seat(environment: MutableMapping[str, str]) -> Seat | None:
    """The seat that the environment gives us, and only our own GPU in it; None: this process works alone.

    The launcher's variables are taken out: libraries that find them would join groups of their own.
    """
    if FOLDER not in environment:
        return None
    given = {name: environment.pop(name) for name in _LAUNCHERS}
    seat = Seat(
        rank=int(given["RANK"]),
        size=int(given["WORLD_SIZE"]),
        local_rank=int(given["LOCAL_RANK"]),
        node=int(given["GROUP_RANK"]),
        nodes=int(given["WORLD_SIZE"]) // int(given["LOCAL_WORLD_SIZE"]),
        host=given["MASTER_ADDR"],
        port=int(given["MASTER_PORT"]),
        folder=environment.pop(FOLDER),
        supervisor=int(environment.pop(SUPERVISOR)),
    )
    visible = [name for name in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    environment["CUDA_VISIBLE_DEVICES"] = visible[seat.local_rank] if visible else str(seat.local_rank)
    return seat


@dataclass(frozen=True, slots=True, kw_only=True)
class Team:
    """How many processes work on a run, and where."""

    gpus: int
    """Processes on this node, one a GPU."""
    nodes: int = 1
    node_rank: int = 0
    """Which of the nodes this is, from 0."""
    rendezvous: str | None = None
    """HOST:PORT of the first node, where they meet; None: there is one node."""

    @property
    def size(self) -> int:
        """Over all nodes, which are alike."""
        return self.gpus * self.nodes


def team_of(*, gpus: int, nodes: int, node_rank: int, rendezvous: str | None) -> Team:
    """The team that options ask for.

    Raises:
        UsageError: they contradict each other.
    """
    if nodes > 1 and not rendezvous:
        raise UsageError(f"--nodes {nodes}: say with --rendezvous HOST:PORT where they meet, the same on each node")
    if node_rank >= nodes:
        raise UsageError(f"--node-rank {node_rank}: with --nodes {nodes} it is 0 to {nodes - 1}")
    return Team(gpus=gpus, nodes=nodes, node_rank=node_rank, rendezvous=rendezvous if nodes > 1 else None)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerEnd:
    """How one process of a run has ended, as its supervisor sees it."""

    rank: int
    code: int | None
    """None: it left no word."""
    at: float
    """When; only to be compared."""
    reason: str = ""
    is_effect: bool = False
    """It ended because another one had."""
    was_killed: bool = False
    """By the supervisor itself, after its time was over."""


def first_cause(ends: Sequence[WorkerEnd]) -> WorkerEnd | None:
    """The end that all others follow from; None: the run has ended well.

    What failed by itself comes before what was lost, that before a stop, and what is only an effect comes last. Of one
    kind it is the first in time; of stops rank 0's, which knows what is committed.
    """
    if any(end.rank == 0 and end.code == 0 for end in ends):
        return None  # the report is committed
    bad = [end for end in ends if end.code != 0 and not (end.was_killed and end.code is None)]
    left = [end for end in ends if end.code is None] if not bad else []
    return min(bad or left, key=_order, default=None)


def _order(end: WorkerEnd) -> tuple[int, float, int]:
    if end.code is None:
        return 1, end.at, end.rank
    if end.is_effect:
        return 3, end.at, end.rank
    return (2, 0.0, end.rank) if end.code == StopRequestedError.code else (0, end.at, end.rank)
