"""Objects to lines: every kind of line end and compression, and damage told with its line."""

import gzip
import os
import struct

import pytest
import zstandard

from job.core.errors import DataError
from job.edge.dataset_files import DataFile, fetch_files, read_lines
from job.edge.store.listing import expand
from job.edge.store.objects import StoredObject, StoreSettings

MAX_RECORD = 4 * 2**20


def never():
    return False


def lines(path, content):
    path.write_bytes(content)
    source = StoredObject(uri=f"file://{path}", key="k", size=0, etag="", version=None)
    file = DataFile(name="t.jsonl", path=path, source=source, sha256="")
    return [(number, line) for name, number, line in read_lines([file], max_record=MAX_RECORD) if name == "t.jsonl"]


PLAIN = {
    "LF": (b"a\nb\n", [b"a", b"b"]),
    "CRLF": (b"a\r\nb\r\n", [b"a", b"b"]),
    "no end after the last": (b"a\nb", [b"a", b"b"]),
    "CRLF and no end after the last": (b"a\r\nb\r", [b"a", b"b"]),
    "blank lines count": (b"a\n\n\nb\n", [b"a", b"", b"", b"b"]),
    "a lone CR is no line end": (b"a\rb\n", [b"a\rb"]),
    "nor are U+2028 and U+0085": ("a\u2028b\u0085c\n".encode(), ["a\u2028b\u0085c".encode()]),
    "empty": (b"", []),
    "one byte": (b"a", [b"a"]),
    "only a line end": (b"\n", [b""]),
}


@pytest.mark.parametrize("kind", PLAIN)
@pytest.mark.parametrize("pack", [bytes, gzip.compress, zstandard.compress], ids=["plain", "gzip", "zstd"])
def test_lines_are_the_same_whatever_they_are_packed_in(tmp_path, kind, pack):
    content, expected = PLAIN[kind]
    assert lines(tmp_path / "x", pack(content)) == list(enumerate(expected, start=1))


def test_lines_that_cross_the_chunks_they_are_read_in_stay_whole(tmp_path):
    # 1 MiB is read at once; the line end of the second line is cut in two by it.
    content = b"x" * (2**20 - 10) + b"\n" + b"y" * 8 + b"\r\n" + b"z" * 3_000_000 + b"\r\n"
    found = [line for _, line in lines(tmp_path / "x", content)]
    assert found == [b"x" * (2**20 - 10), b"y" * 8, b"z" * 3_000_000]


@pytest.mark.parametrize("pack", [gzip.compress, zstandard.compress], ids=["gzip", "zstd"])
def test_files_that_were_put_together_from_compressed_parts_are_read_to_the_end(tmp_path, pack):
    parts = [b"a\nb", b"b\n", b"", b"c\n" * 500_000]
    found = lines(tmp_path / "x", b"".join(pack(part) for part in parts))
    assert [line for _, line in found[:3]] == [b"a", b"bb", b"c"]
    assert len(found) == 500_002


@pytest.mark.parametrize("pack", [gzip.compress, zstandard.compress], ids=["gzip", "zstd"])
def test_a_compressed_file_that_ends_early_is_told_with_its_line(tmp_path, pack):
    content = b"\n".join(os.urandom(50).hex().encode() for _ in range(40_000))
    packed = pack(content)
    with pytest.raises(DataError, match=r"t\.jsonl:\d+: the compressed file is damaged .*write it again") as caught:
        lines(tmp_path / "x", packed[: len(packed) * 3 // 4])
    assert 1000 < int(str(caught.value).split(":")[1]) <= 40_000


@pytest.mark.parametrize("pack", [gzip.compress, zstandard.compress], ids=["gzip", "zstd"])
def test_bytes_that_are_no_compressed_part_are_damage(tmp_path, pack):
    with pytest.raises(DataError, match=r"t\.jsonl:2: the compressed file is damaged"):
        lines(tmp_path / "x", pack(b"a\n") + b"something else")


def skippable(content, magic=0x184D2A50):
    """A zstd frame that holds no content."""
    return struct.pack("<II", magic, len(content)) + content


@pytest.mark.parametrize("size", [0, 4, 1015, 1016, 1020, 1023, 5000])
def test_zstd_frames_without_content_are_passed_over_wherever_they_stand(tmp_path, size):
    one, two = zstandard.compress(b"a\nb"), zstandard.compress(b"b\n")
    empty = skippable(b"x" * size)
    for packed in (empty + one + two, one + empty + two, one + two + empty, empty + one + empty + empty + two):
        assert [line for _, line in lines(tmp_path / "x", packed)] == [b"a", b"bb"]


def test_what_pzstd_writes_is_read(tmp_path):
    content = [b"%d\n" % number * 1000 for number in range(50)]
    packed = [zstandard.compress(part) for part in content]
    file = b"".join(skippable(struct.pack("<I", len(frame))) + frame for frame in packed)
    assert b"".join(line + b"\n" for _, line in lines(tmp_path / "x", file)) == b"".join(content)


@pytest.mark.parametrize("zeros", [1, 512, 5000])
def test_zeros_behind_gzip_are_none_of_its_content(tmp_path, zeros):
    packed = gzip.compress(b"a\n")
    assert lines(tmp_path / "x", packed + b"\0" * zeros) == [(1, b"a")]
    assert lines(tmp_path / "x", packed + b"\0" * zeros + packed) == [(1, b"a"), (2, b"a")]


def test_other_bytes_behind_gzip_are_damage(tmp_path):
    with pytest.raises(DataError, match="damaged from here on"):
        lines(tmp_path / "x", gzip.compress(b"a\n") + b"\0\0x")


def test_a_flipped_bit_in_gzip_is_damage(tmp_path):
    packed = bytearray(gzip.compress(b"a\n" * 1000))
    packed[-5] ^= 1  # its checksum
    with pytest.raises(DataError, match="damaged"):
        lines(tmp_path / "x", bytes(packed))


def test_the_kind_is_told_by_the_content_not_by_the_name(tmp_path):
    assert lines(tmp_path / "x.jsonl.gz", b"a\n") == [(1, b"a")]
    assert lines(tmp_path / "x.jsonl", gzip.compress(b"a\n")) == [(1, b"a")]


def test_a_line_without_end_does_not_fill_the_memory(tmp_path):
    """It is cut just beyond the limit, so that its length still shows, and the next line is found again."""
    found = lines(tmp_path / "x", b"a\n" + b"x" * (MAX_RECORD + 5 * 2**20) + b"\nb\n")
    assert [len(line) for _, line in found] == [1, MAX_RECORD + 4, 1]  # the first line may begin with a mark of 3
    assert [number for number, _ in found] == [1, 2, 3]


def fetched(tmp_path, *names, beside=()):
    uris = []
    for name in names:
        path = tmp_path / "store" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
        uris.append(f"file://{path}")
    found = expand(uris, StoreSettings(), should_stop=never)
    told = []
    files = fetch_files(
        found, tmp_path / "data", StoreSettings(), beside=beside, should_stop=never, on_progress=told.append
    )
    return files, told


def test_files_are_called_by_their_short_names_while_these_differ(tmp_path):
    files, told = fetched(tmp_path, "one/a.jsonl", "two/b.jsonl")
    assert [file.name for file in files] == ["a.jsonl", "b.jsonl"]
    assert [file.path.read_text() for file in files] == ["one/a.jsonl", "two/b.jsonl"]
    assert told[-1] == sum(file.source.size for file in files)


def test_files_of_one_name_are_called_by_their_uris(tmp_path):
    files, _ = fetched(tmp_path, "one/a.jsonl", "two/a.jsonl")
    assert [file.name for file in files] == [f"file://{tmp_path}/store/{side}/a.jsonl" for side in ("one", "two")]
    assert len({file.path for file in files}) == 2


def test_a_file_of_the_other_side_makes_a_name_ambiguous_too(tmp_path):
    files, _ = fetched(tmp_path, "one/a.jsonl", beside=["s3://b/validation/a.jsonl"])
    assert [file.name for file in files] == [f"file://{tmp_path}/store/one/a.jsonl"]


def test_an_object_that_changed_since_it_was_listed_is_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("one")
    found = expand([f"file://{path}"], StoreSettings(), should_stop=never)
    path.write_text("two")
    with pytest.raises(DataError, match="the file was changed"):
        fetch_files(found, tmp_path / "data", StoreSettings(), should_stop=never, on_progress=lambda _done: None)


def test_many_small_files_and_a_large_one_come_in_the_order_of_their_names(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for number in range(40):
        (source / f"{number:02d}.jsonl").write_text(f"{number}\n" * (number + 1))
    (source / "20.jsonl").write_bytes(b"large\n" * (3 * 2**20))
    found = expand([f"file://{source}/*.jsonl"], StoreSettings(), should_stop=never)
    seen = []
    files = fetch_files(found, tmp_path / "here", StoreSettings(), should_stop=never, on_progress=seen.append)
    assert [file.name for file in files] == [f"{number:02d}.jsonl" for number in range(40)]
    assert all(file.path.stat().st_size == file.source.size for file in files)
    assert seen == sorted(seen)
    assert seen[-1] == sum(o.size for o in found)
