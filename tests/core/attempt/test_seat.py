"""Which process of a run this is, and whose end is the run's."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from job.core.attempt.seat import Team, WorkerEnd, first_cause, take_seat, team_of
from job.core.errors import ENDINGS, UsageError

LAUNCHED = {
    "RANK": "3",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "4",
    "GROUP_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "node-0",
    "MASTER_PORT": "29500",
    "JOB_WORKER_FOLDER": "/x",
    "JOB_SUPERVISOR_PID": "7",
}
CODES = [row.code for row in ENDINGS]
ENDS = st.lists(
    st.builds(
        WorkerEnd,
        rank=st.integers(0, 7),
        code=st.sampled_from([None, *CODES]),
        at=st.floats(0, 9),
        is_effect=st.booleans(),
        was_killed=st.booleans(),
    ),
    unique_by=lambda end: end.rank,
    min_size=1,
)


def test_without_a_supervisor_a_process_works_alone_whatever_else_is_set():
    environment = {"RANK": "3", "WORLD_SIZE": "4"}
    assert take_seat(environment) is None
    assert environment == {"RANK": "3", "WORLD_SIZE": "4"}


@pytest.mark.parametrize(
    ("visible", "own"), [(None, "1"), ("4,6", "6"), ("GPU-aa,GPU-bb", "GPU-bb"), ("", "1")], ids=str
)
def test_a_worker_takes_its_seat_and_sees_its_own_gpu_alone(visible, own):
    environment = {**LAUNCHED, "PATH": "/bin"} | ({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible})
    seat = take_seat(environment)

    assert (seat.rank, seat.size, seat.local_rank, seat.node, seat.nodes) == (3, 4, 1, 1, 2)
    assert (seat.host, seat.port, seat.folder, seat.supervisor) == ("node-0", 29500, "/x", 7)
    assert (seat.leads, seat.outcome) == (False, "outcome-r03.json")
    # No library may find what would make it join a group of its own.
    assert environment == {"PATH": "/bin", "CUDA_VISIBLE_DEVICES": own}


def test_a_team_is_as_large_as_its_nodes_together():
    assert team_of(gpus=8, nodes=1, node_rank=0, rendezvous="a:1") == Team(gpus=8)
    team = team_of(gpus=4, nodes=3, node_rank=2, rendezvous="node-0:29500")
    assert (team.size, team.rendezvous) == (12, "node-0:29500")


@pytest.mark.parametrize(("given", "said"), [((2, 0, None), "--rendezvous"), ((2, 2, "a:1"), "0 to 1")])
def test_a_team_that_cannot_meet_is_refused(given, said):
    nodes, node_rank, rendezvous = given
    with pytest.raises(UsageError, match=said):
        team_of(gpus=1, nodes=nodes, node_rank=node_rank, rendezvous=rendezvous)


def end(rank, code, at=0.0, **other):
    return WorkerEnd(rank=rank, code=code, at=at, **other)


@pytest.mark.parametrize(
    ("ends", "rank"),
    [
        ([end(0, 0), end(1, 0)], None),
        ([end(0, 0), end(1, None, was_killed=True), end(2, 70)], None),  # the report is committed
        ([end(0, 75, 1.0), end(1, 75, 0.0)], 0),  # who stops last knows what is committed
        ([end(0, 80, 2.0), end(1, 80, 1.0)], 1),
        ([end(0, 81, 2.0, is_effect=True), end(1, 81, 1.0)], 1),
        ([end(0, 70, 1.0, is_effect=True), end(1, None, 2.0)], 1),
        ([end(0, 75, 1.0), end(1, None, 2.0)], 1),  # the launcher asks the others to stop when one was killed
        ([end(0, 75, 2.0), end(1, None, 1.0, was_killed=True)], 0),  # it was slower than the grace
        ([end(0, 69, 2.0), end(1, None, 1.0)], 0),
        ([end(0, None, was_killed=True), end(1, None, was_killed=True)], 0),
        ([end(2, 0), end(3, 0)], None),  # on a node without rank 0
    ],
)
def test_the_first_cause_is_the_run_s_end(ends, rank):
    found = first_cause(ends)

    assert (found and found.rank) == rank


@given(ENDS)
def test_an_end_is_good_only_when_rank_0_s_or_all_are(ends):
    found = first_cause(ends)

    if found is None:
        assert all(each.code == 0 or (each.code is None and each.was_killed) for each in ends) or any(
            each.rank == 0 and each.code == 0 for each in ends
        )
    else:
        assert found in ends
        assert found.code != 0


@given(ENDS, st.randoms())
def test_the_order_in_which_they_are_looked_at_is_nothing(ends, draw):
    mixed = [*ends]
    draw.shuffle(mixed)

    assert first_cause(mixed) == first_cause(ends)


@given(ENDS)
def test_an_effect_is_taken_only_where_there_is_nothing_else(ends):
    found = first_cause(ends)
    if found is not None and found.is_effect and found.code is not None:
        assert all(each.code == 0 or each.is_effect or each.was_killed for each in ends)
