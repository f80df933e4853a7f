"""An ETag is trusted as the MD5 of the content only where it is one."""

import pytest

from job.edge.store.s3.etags import Etags, content_md5


def test_an_etag_that_only_looks_like_an_md5_is_no_obstacle():
    etags = Etags()
    assert [etags.is_wrong(expected="a", found="b") for _ in range(3)] == [True, True, False]
    assert not etags.is_wrong(expected="c", found="d")
    trusted = Etags()
    assert not trusted.is_wrong(expected="a", found="a")
    assert [trusted.is_wrong(expected="a", found="b") for _ in range(9)] == [True] * 9


@pytest.mark.parametrize(
    ("answer", "md5"),
    [
        ({"ETag": f'"{"a1" * 16}"'}, "a1" * 16),
        ({"ETag": f'"{"a1" * 16}"', "ServerSideEncryption": "AES256"}, "a1" * 16),
        ({"ETag": f'"{"a1" * 16}-3"'}, None),
        ({"ETag": f'"{"a1" * 16}"', "ServerSideEncryption": "aws:kms:dsse"}, None),
        ({"ETag": f'"{"a1" * 16}"', "SSECustomerAlgorithm": "AES256"}, None),
    ],
)
def test_an_etag_is_the_md5_unless_parts_or_a_key_made_it(answer, md5):
    assert content_md5(answer) == md5
