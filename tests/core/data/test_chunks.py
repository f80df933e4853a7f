"""Lines in chunks: all of them, in order, with their numbers, no chunk larger than it may be."""

from hypothesis import given
from hypothesis import strategies as st

from job.core.data import chunks
from job.core.data.chunks import in_chunks


@st.composite
def files(draw):
    """File names and the sizes of their lines; two in a row may have one name."""
    return draw(
        st.lists(
            st.tuples(
                st.sampled_from(["a", "b"]), st.lists(st.sampled_from([0, 1, 7, 2**18, 2**19, 2**20]), max_size=8)
            ),
            max_size=6,
        )
    )


@given(files())
def test_every_line_is_in_one_chunk_with_its_file_and_number(found):
    lines = [(name, number, b"x" * size) for name, sizes in found for number, size in enumerate(sizes, start=1)]
    made = list(in_chunks(lines, side="validation", source=3))
    assert [each for chunk in made for each in chunk.numbered()] == lines
    assert {(chunk.side, chunk.source) for chunk in made} <= {("validation", 3)}
    for chunk in made:
        many = [size for piece in chunk.pieces for size in map(len, piece.lines)]
        assert sum(many) == chunk.size
        assert len(many) == 1 or chunk.size <= chunks.CHUNK_BYTES


def test_small_files_share_a_chunk():
    made = list(in_chunks(((f"{n}.jsonl", 1, b"{}") for n in range(2500)), side="train"))
    assert [len(chunk.pieces) for chunk in made] == [1000, 1000, 500]
