"""Which files are not whole yet, by their ends alone; what was trained on before is not looked at again."""

import gzip

import pytest
import zstandard

from job.core.errors import DataError
from job.edge.store.listing import expand
from job.edge.store.objects import StoreSettings
from job.stages.nightly.late_files import refuse_late, without_late

MAX_RECORD = 2**17
GOOD = b'{"q": "a"}\n'
ENDS = {
    "whole": (GOOD * 3, None),
    "CRLF": (b'{"q": "a"}\r\n', None),
    "blank lines at its end": (GOOD + b"\n \n", None),
    "with a mark before its only record": (b"\xef\xbb\xbf" + GOOD, None),
    "only blank lines": (b"\n\n", None),
    "a long last record": (GOOD + b'{"q": "' + b"x" * 100_000 + b'"}\n', None),
    "a last record beyond what a record may have": (GOOD + b'{"q": "' + b"x" * 200_000 + b'"}\n', None),
    "compressed": (gzip.compress(GOOD * 3), None),
    "compressed, several frames and padding": (gzip.compress(GOOD) + gzip.compress(GOOD) + bytes(512), None),
    "compressed by zstd": (zstandard.compress(GOOD * 3), None),
    "a compressed one that is cut": (gzip.compress(GOOD * 3)[:-5], "the compressed file breaks off"),
    "one by zstd that is cut": (zstandard.compress(GOOD * 3)[:-5], "the compressed file breaks off"),
    "compressed, with a frame that is cut": (gzip.compress(GOOD) + b"\x1f\x8b\x08", "the compressed file breaks off"),
    "a cut one that was compressed": (
        gzip.compress(GOOD[:-1]),
        "what it unpacks to does not end with a line end",
    ),
    "damaged in the middle, for the reader to refuse": (gzip.compress(GOOD) + b"\x1f\x8b" + b"?" * 50, None),
    "another format": (b"q,a\n1,2\n", None),
    "empty": (b"", "it is empty"),
    "no line end": (GOOD + GOOD[:-1], "it does not end with a line end"),
    "cut in a record": (GOOD + b'{"q": "a', "it does not end with a line end"),
    "cut in a record that got its line end": (GOOD + b'{"q": "a\n', "its last line: not JSON"),
    "zeros that were reserved and not written": (GOOD + b"\0" * 20 + b"\n", "its last line: holds a NUL byte"),
    "a long record that is cut": (GOOD + b'{"q": "' + b"x" * 100_000 + b"\n", "its last line: not JSON"),
    "a list": (GOOD + b"[1]\n", "its last line: "),
}


@pytest.fixture(params=["directory", "moto"])
def place(request, tmp_path):
    """Writes files, and the URI that names all of them."""
    if request.param == "directory":
        return (lambda name, content: (tmp_path / name).write_bytes(content)), f"file://{tmp_path}/*.jsonl"
    found = request.getfixturevalue("moto_place")

    def put(name, content):
        found.server.client().put_object(Bucket=found.bucket, Key=f"data/{name}", Body=content)

    return put, f"s3://{found.bucket}/data/*.jsonl"


def looked_at(uri, *, known=()):
    listed = expand([uri], StoreSettings(), should_stop=lambda: False)
    whole, late = without_late([listed], StoreSettings(), max_record=MAX_RECORD, known=known, should_stop=lambda: False)
    return (
        listed,
        [o.uri.rpartition("/")[2] for o in whole[0]],
        {each.uri.rpartition("/")[2]: each.reason for each in late},
    )


def test_each_end_is_taken_for_what_it_is(place):
    put, uri = place
    for number, (content, _) in enumerate(ENDS.values()):
        put(f"{number:02d}.jsonl", content)
    _, whole, late = looked_at(uri)

    names = {f"{number:02d}.jsonl": reason for number, (_, reason) in enumerate(ENDS.values())}
    assert whole == [name for name, reason in names.items() if reason is None]
    assert {*late} == {name for name, reason in names.items() if reason is not None}
    assert all(late[name].startswith(reason) for name, reason in names.items() if reason is not None), late


def test_what_a_run_was_trained_on_was_whole(place):
    put, uri = place
    put("a.jsonl", GOOD[:-1])
    put("b.jsonl", GOOD)
    listed, _, late = looked_at(uri)
    assert {*late} == {"a.jsonl"}

    _, whole, late = looked_at(uri, known={(o.uri, o.etag) for o in listed})
    assert (whole, late) == (["a.jsonl", "b.jsonl"], {})


def test_a_source_of_which_no_file_is_whole_is_refused_with_their_names(place):
    put, uri = place
    for number in range(12):
        put(f"{number:02d}.jsonl", GOOD[:-1])
    with pytest.raises(DataError, match=r"00\.jsonl: it does not end with a line end; .*; and 2 more\)"):
        looked_at(uri)


def test_what_models_are_judged_on_is_never_a_part_of_it(place):
    put, uri = place
    put("a.jsonl", GOOD)
    put("b.jsonl", GOOD[:-1])
    listed = expand([uri], StoreSettings(), should_stop=lambda: False)

    def look(known=()):
        refuse_late(
            "data.validation",
            [listed],
            StoreSettings(),
            max_record=MAX_RECORD,
            known=known,
            should_stop=lambda: False,
        )

    with pytest.raises(
        DataError, match=r"data\.validation: not whole yet, .*b\.jsonl: it does not end with a line end"
    ):
        look()
    look(known={(o.uri, o.etag) for o in listed})


def test_a_file_that_changes_in_this_moment_is_late(place):
    put, uri = place
    put("a.jsonl", GOOD)
    put("b.jsonl", GOOD)
    listed = expand([uri], StoreSettings(), should_stop=lambda: False)
    put("a.jsonl", b"{}\n")  # shorter than it was listed
    _, late = without_late([listed], StoreSettings(), max_record=MAX_RECORD, known=(), should_stop=lambda: False)
    assert [str(each).rpartition("/")[2] for each in late] == ["a.jsonl: it was changed while it was looked at"]
