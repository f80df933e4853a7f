"""Small JSON objects: the same bytes for the same content, and whatever else a bucket holds is refused."""

import pytest

from job.edge.store.json_objects import json_bytes, json_object


def test_the_same_content_gives_the_same_bytes_and_comes_back():
    content = {"b": [1, 2.5, None], "a": {"ü": True}}

    assert json_bytes(content) == json_bytes(dict(reversed(content.items())))
    assert json_bytes({"b": 1, "a": "ü"}) == '{\n  "a": "ü",\n  "b": 1\n}\n'.encode()
    assert json_object(json_bytes(content)) == content


@pytest.mark.parametrize("data", [b"", b"{", b"\xff", b"[]", b"null", b"1", b'{"a":' + b"[" * 100_000])
def test_what_is_no_object_is_refused(data):
    with pytest.raises(ValueError):  # noqa: PT011 - each has a message of its own
        json_object(data)
