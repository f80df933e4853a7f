"""One command that several processes carry: its options, and which of the processes this one is."""

import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, get_args

import click

from job.core.plan.memory import Placement
from job.ending import Session

if TYPE_CHECKING:
    from job.stages.attempt import Attempt


def team_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """How many processes carry `run`; with one, none is started."""
    for option in (
        click.option(
            "--gpus",
            envvar="JOB_GPUS",
            type=click.IntRange(min=1),
            help="GPUs of this node that work on the run, a process each; without it all that are visible. With "
            "`--device cpu` so many processes on the CPU, without it one.",
        ),
        click.option(
            "--nodes",
            envvar="JOB_NODES",
            type=click.IntRange(min=1),
            default=1,
            show_default=True,
            help="Nodes that work on the run together, with as many GPUs each; the same command is started on each.",
        ),
        click.option(
            "--node-rank",
            envvar="JOB_NODE_RANK",
            type=click.IntRange(min=0),
            default=0,
            show_default=True,
            help="Which of them this node is, from 0.",
        ),
        click.option(
            "--rendezvous",
            envvar="JOB_RENDEZVOUS",
            metavar="HOST:PORT",
            help="Where the nodes meet: a free port of node 0, as the others reach it.",
        ),
        click.option(
            "--base-placement",
            envvar="JOB_BASE_PLACEMENT",
            type=click.Choice(get_args(Placement)),
            help="`replicated`: each GPU holds the whole base; `sharded`: its layers are spread over all GPUs, which "
            "is slower. Without it the base is sharded where it fits no single one.",
        ),
    )[::-1]:
        command = option(command)
    return command


def run_with_others(
    session: Session, attempt: "Attempt", options: Mapping[str, Any], environment: Mapping[str, str]
) -> bool:
    """Work on the run together with other processes, where there are any, and this one does not own it.

    Returns:
        Whether that was done: the report is the business of the process that owns the run.
    """
    from job.core.attempt.seat import team_of
    from job.core.plan.placement import refuse_shards_of_one

    if session.seat is not None:
        if session.seat.leads:
            return False
        from job.commands.follow import follow
        from job.edge.host.logs import bind, only_warnings

        only_warnings()  # the log is the run's, and rank 0 writes it
        bind(rank=session.seat.rank)
        follow(attempt, session.seat)
        return True
    gpus, on_cpu = options["gpus"], options["device"] == "cpu"
    if gpus is None:
        from job.edge.host.gpu import visible_gpus

        gpus = 1 if on_cpu else max(1, visible_gpus(environment.get("CUDA_VISIBLE_DEVICES")))
    team = team_of(gpus=gpus, nodes=options["nodes"], node_rank=options["node_rank"], rendezvous=options["rendezvous"])
    if team.size == 1:
        refuse_shards_of_one(options["base_placement"])
        return False
    if team.node_rank > 0:
        session.word_is_left_elsewhere()
    from job.launch.supervisor import supervise

    supervise(attempt, team, arguments=sys.argv[1:], environment=environment, reason=lambda: session.interrupt.reason)
    return True


def arm_crash_point(session: Session, spec: str | None) -> None:
    """For tests: `spec` is a crash order, with `@RANK` behind it where several processes work on the run."""
    if spec:
        from job.edge.host.crashing import arm

        order, _, rank = spec.partition("@")
        if session.seat is None or int(rank or 0) == session.seat.rank:
            arm(order)
