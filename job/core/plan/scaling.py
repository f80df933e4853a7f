"""How fast several GPUs make a run's steps together, beside one of them: by what each has to compute and to send."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from job.core.data.lengths import Lengths
from job.core.plan.course import Course
from job.core.plan.dealing import deal
from job.core.plan.links import Link, network

SUM_PIECE = 2**23
"""Elements of a vector that several GPUs sum at once: two pieces of 32 MiB are all the memory that a sum needs."""
_FP32 = 4
PAIR = 2
"""Ranks that send each other all of a piece; more of them send each one its part, and the sum of their own to all."""
_PASSES = 6
"""How often a summed vector passes a GPU's memory: out to the others and in, added up, and back; of two ranks, out,
two of them in, both read and their sum written."""
_CALL_SECONDS = 40e-6
"""What one exchange takes however little it is (NCCL: 20 to 50 microseconds, by nccl-tests' smallest sizes)."""
_STEPS_LOOKED_AT = 64
"""The first ones: in a long run the rest differ little."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """GPUs that make each step together; all hosts are alike."""

    gpus: int = 1
    """Of each host."""
    nodes: int = 1
    network: Link | None = None
    """Between the hosts; None: there is one."""

    @property
    def ranks(self) -> int:
        """Processes, one a GPU."""
        return self.gpus * self.nodes


ALONE = Cluster()


def cluster_of(*, gpus: int, nodes: int, gigabits: float) -> Cluster:
    """So many GPUs on each node, and what a node's network carries, in Gbit/s each way."""
    return Cluster(gpus=gpus, nodes=nodes, network=network(gigabits) if nodes > 1 else None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """What a rank does of a step."""

    tokens: int
    examples: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Dealt:
    """A step, dealt to ranks."""

    whole: Share
    shares: tuple[Share, ...]


def dealt_steps(course: Course, lengths: Lengths, *, ranks: int) -> list[Dealt]:
    """Steps of the run as the ranks deal them: whole documents, by their tokens."""
    found = []
    for step in range(1, min(course.steps, _STEPS_LOOKED_AT) + 1):
        own = lengths[course.batch(step)].tolist()
        dealt = deal(own, shares=ranks)
        shares = tuple(Share(tokens=sum(own[i] for i in places), examples=len(places)) for places in dealt)
        found.append(Dealt(whole=Share(tokens=sum(own), examples=len(own)), shares=shares))
    return found


def busiest(steps: Sequence[Dealt]) -> float:
    """Tokens of the rank that has the most, beside an even share, on the average: 1 is even."""
    most = sum(max(share.tokens for share in step.shares) for step in steps)
    return most * len(steps[0].shares) / sum(step.whole.tokens for step in steps)


def times_one(
    steps: Sequence[Dealt],
    *,
    seconds: Callable[[Share], float],
    exchange: Callable[[Dealt], float],
    alone: Callable[[Share], float],
) -> float:
    """How many times as fast as one GPU: all wait for the slowest share, and for what of the exchange is not hidden.

    Args:
        steps: of the run.
        seconds: that a GPU computes on a share.
        exchange: seconds of a step's exchange between the GPUs beyond what is computed meanwhile.
        alone: seconds that one GPU computes on a whole step.
    """
    by_one = sum(alone(step.whole) for step in steps)
    slowest = sum(max(seconds(share) for share in step.shares if share.examples) for step in steps)
    return by_one / (slowest + sum(map(exchange, steps)))


def sent_bytes(parameters: int, cluster: Cluster) -> int:
    """That each rank sends to sum a vector: its parts to those that add them up, and the sum of its own part to all."""
    sent, levels = 0, _levels(cluster)
    for start in range(0, parameters, SUM_PIECE):
        part = min(SUM_PIECE, parameters - start)
        for place, members in enumerate(levels):
            if levels[place:] == [PAIR]:
                sent += part * _FP32
                continue
            part = math.ceil(part / members)
            sent += 2 * (members - 1) * part * _FP32
    return sent


def sum_seconds(parameters: int, cluster: Cluster, link: Link, *, memory_bytes_per_second: float) -> float:
    """One sum of the adapter's gradients over all ranks: within each host, and then of what hosts have summed.

    Its first half goes from each GPU to each other one by itself, its second half (NCCL's all-gather) in a ring; two
    ranks exchange all of it at once. Between hosts the GPUs of a host share its network, each with its own part.
    """
    vector, seconds, share = _FP32 * parameters, 0.0, 1.0
    pieces, levels = math.ceil(parameters / SUM_PIECE) + 1, _levels(cluster)  # one more for the losses
    for place, members in enumerate(levels):
        calls = pieces if levels[place:] == [PAIR] else 2 * pieces
        seconds += calls * _CALL_SECONDS + _PASSES * share * vector / memory_bytes_per_second
        share /= members
    if cluster.gpus > 1:
        seconds += 2 * vector * (cluster.gpus - 1) / cluster.gpus / link.bytes_per_second
    if cluster.nodes > 1 and cluster.network is not None:
        seconds += 2 * vector * (cluster.nodes - 1) / cluster.nodes / cluster.network.bytes_per_second
    return seconds


def _levels(cluster: Cluster) -> list[int]:
    """How many sum together: those of a host, then one of each host."""
    return [members for members in (cluster.gpus, cluster.nodes) if members > 1]


def left_of_sum(summing: float, *, parameters: int, backward: float) -> float:
    """Seconds of a sum that are left when the slowest share is computed.

    Pieces are summed as the backward of its last micro-batch completes them, one part of the layers after another; the
    last piece is complete at its end.

    Args:
        summing: seconds, from `sum_seconds`.
        parameters: of the adapter.
        backward: seconds of that micro-batch's.
    """
    pieces = math.ceil(parameters / SUM_PIECE)
    return max(summing / pieces, summing - backward * (pieces - 1) / pieces)


def gather_seconds(row_bytes: int, cluster: Cluster, link: Link) -> float:
    """One layer of a sharded base, gathered by all ranks in a ring."""
    within = row_bytes * (cluster.ranks - 1) / cluster.ranks
    return _CALL_SECONDS + _slower(within, row_bytes * _elsewhere(cluster), cluster, link)


def waiting_for_gathers(gather: float, *, layers: int, passes: int, computing: float) -> float:
    """Seconds of a step that gathers of a sharded base's layers take beyond what is computed meanwhile.

    A layer is gathered while the one before it is computed: all of them forward, and all but the last two backward,
    which takes twice as long.

    Args:
        gather: seconds of one.
        layers: of the base.
        passes: micro-batches of the rank that has the most.
        computing: seconds that it computes in the step.
    """
    a_layer = computing / passes / layers / 3
    return passes * (layers - 1) * (max(0.0, gather - a_layer) + max(0.0, gather - 2 * a_layer))


def _elsewhere(cluster: Cluster) -> float:
    """Share of the ranks that are in other hosts."""
    return (cluster.ranks - cluster.gpus) / cluster.ranks


def _slower(within: float, between: float, cluster: Cluster, link: Link) -> float:
    """Seconds for bytes of one GPU within its host, and of one host to others."""
    seconds = within / link.bytes_per_second
    if cluster.nodes == 1 or cluster.network is None:
        return seconds
    return max(seconds if cluster.gpus > 1 else 0.0, between / cluster.network.bytes_per_second)
