"""Which masks dropout draws is a matter of the step, the micro-batch and the rank alone."""

from job.core.plan.course import dropout_seed


def test_no_two_places_have_one_seed():
    places = [(step, part, rank) for step in range(1, 6) for part in range(8) for rank in range(8)]
    seeds = {dropout_seed(5, step, part, rank=rank) for step, part, rank in places}

    assert len(seeds) == len(places)
    assert all(0 <= seed < 2**31 for seed in seeds)


def test_rank_0_draws_what_one_process_alone_draws():
    assert dropout_seed(5, 3, 2, rank=0) == dropout_seed(5, 3, 2)
