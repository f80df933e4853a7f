"""The table of exit codes: complete, consistent, and honest about every error."""

import errno
import inspect

import pytest

from job.core import errors
from job.core.errors import ENDINGS, Again, JobError, ending, exit_code, table_markdown

KINDS = [kind for kind in JobError.__subclasses__() if kind is not errors.PeerLostError]
"""One for each row; a peer that is lost is an effect, and has the code of a bug where nobody knows its cause."""


def test_every_error_has_a_code_of_its_own_and_a_row_that_says_what_to_do():
    codes = [kind.code for kind in KINDS]

    assert len(set(codes)) == len(codes) == 13
    for code in codes:
        assert ending(code).action


def test_every_row_has_its_error_but_done_and_a_bug():
    assert {row.code for row in ENDINGS} == {kind.code for kind in KINDS} | {0, JobError.code}


def test_the_codes_ascend_and_stay_clear_of_what_shells_and_signals_use():
    codes = [row.code for row in ENDINGS]

    assert codes == sorted(set(codes))
    assert all(code == 0 or 64 <= code <= 113 for code in codes)


def test_the_drawing_on_top_of_the_module_shows_every_error():
    for kind in KINDS:
        assert any(
            line.split()[1:3] == [kind.__name__, str(kind.code)] for line in (errors.__doc__ or "").splitlines()
        ), kind


def test_an_error_has_its_own_code_and_its_subclasses_inherit_it():
    class Inner(errors.DataError):
        pass

    for kind in KINDS:
        assert exit_code(kind("x")) == kind.code
    assert exit_code(Inner("x")) == 65


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG])
def test_a_full_or_read_only_disk_is_74_whoever_noticed_it(number):
    assert exit_code(OSError(number, "disk")) == 74


@pytest.mark.parametrize("error", [OSError(errno.EACCES, "x"), ValueError("x"), MemoryError(), KeyboardInterrupt()])
def test_what_nobody_understood_is_a_bug(error):
    assert exit_code(error) == 70


def test_only_a_request_to_stop_is_repeated_without_being_counted():
    assert [row.code for row in ENDINGS if row.again is Again.ALWAYS] == [75]


def test_wrong_input_is_never_tried_again():
    for code in (64, 65, 66, 77, 78, 80, 81, 84):
        assert ending(code).again is Again.NEVER


def test_trouble_around_us_is_tried_again_and_counted():
    for code in (69, 70, 74, 83):
        assert ending(code).again is Again.COUNTED
    assert ending(82).again is Again.ELSEWHERE


def test_a_code_that_the_job_never_ends_with_has_no_row():
    for code in (1, 2, 71, 130, 137, 143):
        with pytest.raises(KeyError):
            ending(code)


def test_the_table_for_people_has_a_row_for_each_code():
    head, rule, *rows = table_markdown().splitlines()

    assert [int(row.split("|")[1]) for row in rows] == [row.code for row in ENDINGS]
    assert {line.count("|") for line in (head, rule, *rows)} == {5}


def test_every_error_says_in_a_sentence_what_it_means():
    assert all(inspect.getdoc(kind) for kind in KINDS)


def test_what_another_process_ended_with_is_raised_as_that():
    for kind in KINDS:
        error = errors.error_of(kind.code, "rank 1: x", action="do y")
        assert type(error) is kind
        assert (str(error), errors.action_for(error)) == ("rank 1: x", "do y")
    assert type(errors.error_of(70, "x")) is type(errors.error_of(-9, "x")) is JobError


def test_an_effect_is_known_by_what_it_was_raised_from():
    cause = errors.CannotFitError("rank 1: too large")
    assert not errors.is_effect(cause)
    cause.__cause__ = errors.PeerLostError("gone")
    again = errors.CannotFitError("as the records explain it")
    again.__cause__ = cause
    assert errors.is_effect(again)
    assert not errors.is_effect(None)
