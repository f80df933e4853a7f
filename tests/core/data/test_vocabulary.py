"""A token that the base has no row of embeddings for is refused, with all three numbers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from job.core.data.vocabulary import refuse_beyond
from job.core.errors import DataError


def test_the_message_has_the_token_its_id_and_the_rows():
    with pytest.raises(
        DataError, match=r"train\.jsonl:7: token '\[PAD\]' has the id 32,000, .* 32,000 rows \(0 to 31,999\)"
    ):
        refuse_beyond(32_000, "[PAD]", rows=32_000, where="train.jsonl:7")


@given(token_id=st.integers(0, 10**6), rows=st.integers(1, 10**6))
def test_exactly_what_has_no_row_is_refused(token_id, rows):
    try:
        refuse_beyond(token_id, None, rows=rows, where="x")
    except DataError:
        assert token_id >= rows
    else:
        assert token_id < rows
