"""Which questions are answered together: within both limits, each once, and few sizes to prepare for."""

from hypothesis import given, settings
from hypothesis import strategies as st

from job.core.judging.answer_groups import AnswerGroup, answer_groups, moves_to_front, rows_for

quick = settings(deadline=None, derandomize=True, database=None, max_examples=200)


def groups(lengths, kinds=None, *, answer=16, rows=4, tokens=10_000, unit=8):
    kinds = kinds if kinds is not None else [0] * len(lengths)
    return list(answer_groups(lengths, kinds, longest_answer=answer, most_rows=rows, most_tokens=tokens, unit=unit))


def test_like_lengths_are_together_and_one_width_serves_all_where_it_costs_no_rows():
    found = groups([50, 3, 40, 5, 45, 4], rows=3)

    assert [each.members for each in found] == [(1, 5, 3), (2, 4, 0)]
    assert {each.width for each in found} == {72}  # 50 and 16, in eights


def test_where_one_width_would_cost_rows_each_group_has_its_own():
    found = groups([500, 3, 4, 5], rows=4, tokens=600)

    assert [(each.members, each.width) for each in found] == [((1, 2, 3), 24), ((0,), 520)]


def test_what_may_not_be_mixed_is_not():
    found = groups([9, 9, 9, 9], kinds=["a", "b", "a", "b"])

    assert [each.members for each in found] == [(0, 2), (1, 3)]


@quick
@given(
    st.lists(st.tuples(st.integers(1, 300), st.integers(0, 2)), max_size=60),
    st.integers(1, 40),
    st.integers(1, 9),
    st.integers(1, 3000),
    st.integers(1, 64),
)
def test_each_question_is_in_one_group_that_has_room_for_it(asked, answer, rows, tokens, unit):
    lengths, kinds = [length for length, _ in asked], [kind for _, kind in asked]
    found = groups(lengths, kinds, answer=answer, rows=rows, tokens=tokens, unit=unit)

    assert sorted(member for each in found for member in each.members) == list(range(len(asked)))
    for each in found:
        assert each.width % unit == 0
        assert each.width >= max(lengths[i] for i in each.members) + answer
        assert len(each.members) == 1 or rows_for(len(each.members)) * each.width <= tokens
        assert len(each.members) <= rows
        assert len({kinds[i] for i in each.members}) == 1


@quick
@given(st.integers(1, 100))
def test_halves_are_all_of_a_group_until_it_is_one_question(size):
    group = AnswerGroup(members=tuple(range(size)), width=8)
    halves = group.halves()

    assert sum((each.members for each in halves), ()) == (group.members if size > 1 else ())
    assert all(len(each.members) < size for each in halves)


@quick
@given(st.integers(1, 3000))
def test_a_group_has_one_of_few_sizes_and_never_twice_the_rows(count):
    assert count <= rows_for(count) < 2 * count
    assert len({rows_for(n) for n in range(1, 1025)}) < 20


@quick
@given(st.lists(st.booleans(), min_size=1, max_size=80), st.integers(0, 10))
def test_those_alive_come_to_the_front_by_as_few_moves_as_can_be(alive, spare):
    rows = min(len(alive), sum(alive) + spare)
    moves, after = moves_to_front(alive, rows), list(alive)
    for source, target in moves:
        assert after[source]
        assert not after[target]
        after[source], after[target] = False, True

    assert not any(after[rows:])
    assert sum(after) == sum(alive)
    assert len(moves) == sum(alive[rows:])
