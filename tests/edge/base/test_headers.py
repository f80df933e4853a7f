"""What is read of a base before it is fetched, where bytes are damaged on their way."""

import json

import pytest
import torch
from safetensors.torch import save

from job.core.errors import DataError, UnavailableError
from job.edge.base.headers import read_headers

CONTENT = save({"norm.weight": torch.ones(4), "head.weight": torch.zeros(2, 4)})


def read(*readings: bytes):
    """The headers of one file whose bytes come as these say, one after another; the last of them again and again."""
    left = list(readings)

    def read_part(_name: str, start: int, length: int) -> bytes:
        content = left.pop(0) if len(left) > 1 else left[0]
        return content[start : start + length]

    return read_headers({"model.safetensors": len(CONTENT)}, read_part, source="the/base")


def damaged(at: int) -> bytes:
    return CONTENT[:at] + bytes([CONTENT[at] ^ 1]) + CONTENT[at + 1 :]


@pytest.mark.parametrize("at", [0, 8, CONTENT.index(b"norm")], ids=["length", "brace", "name"])
@pytest.mark.parametrize("before", [0, 1], ids=["first", "second"])
def test_a_byte_that_changed_on_its_way_refuses_no_base(at, before):
    header = read(*[CONTENT] * before, damaged(at), CONTENT)

    assert header.keys() == {"norm.weight", "head.weight"}
    assert header["head.weight"].shape == (2, 4)


def test_a_header_that_is_nonsense_each_time_is_nonsense():
    with pytest.raises(DataError, match=r"the/base: model\.safetensors: nonsense in the safetensors header"):
        read(damaged(8))


def test_bytes_that_never_come_twice_alike_are_the_network_s_fault():
    with pytest.raises(UnavailableError, match=r"came differently each of 6 times"):
        read(*[damaged(at) for at in range(8, 14)])


def test_a_header_longer_than_what_is_read_at_first():
    names = {f"layers.{n}.weight": {"dtype": "BF16", "shape": [1], "data_offsets": [0, 2]} for n in range(3000)}
    text = json.dumps(names).encode()
    content = len(text).to_bytes(8, "little") + text + bytes(2)

    header = read_headers({"a": len(content)}, lambda _, start, length: content[start : start + length], source="b")

    assert header.keys() == names.keys()
