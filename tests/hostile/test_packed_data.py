"""A small file that unpacks to gigabytes: refused after little of it, with what it is called."""

import gzip
import json

import pytest
import zstandard

GOOD = b'{"question": "12 red hats", "answer": "red 12"}\n'
READ = """
import sys
from pathlib import Path
from job.core.errors import JobError
from job.edge.dataset_files import DataFile, read_lines
from job.edge.store.objects import StoredObject
path = Path(sys.argv[1])
source = StoredObject(uri=path.as_uri(), key="k", size=0, etag="", version=None)
limit()
lines = 0
try:
    for lines, _ in enumerate(read_lines([DataFile(name="t.jsonl", path=path, source=source, sha256="")],
                                         max_record=2**20), start=1):
        pass
except JobError as error:
    print(error.code, error)
else:
    print(lines, "lines")
"""
CONTENT = {"one line": b"x" * 2**20, "blank lines": b"\n" * 2**20, "short lines": b"xyz\n" * 2**18}


def in_one_frame(pack, content, times):
    packer = gzip.zlib.compressobj(wbits=31) if pack is gzip else zstandard.ZstdCompressor().compressobj()
    return b"".join([*(packer.compress(content) for _ in range(times)), packer.flush()])


ATTACKS = [(content, pack) for content in CONTENT for pack in (gzip, zstandard)]
SLOW = ("blank lines", gzip)


@pytest.mark.parametrize(
    ("content", "pack"),
    [pytest.param(*each, marks=[pytest.mark.hostile] if each == SLOW else []) for each in ATTACKS],
    ids=[f"{content} in {pack.__name__}" for content, pack in ATTACKS],
)
def test_a_file_that_unpacks_to_gigabytes_is_refused(tmp_path, limited, content, pack):
    (tmp_path / "t").write_bytes(in_one_frame(pack, CONTENT[content], 64) * (4 if pack is gzip else 64))
    told = limited(READ, tmp_path / "t", mib=200)
    assert told.startswith("65 t.jsonl: unpacks to more than"), told
    assert "write it again without compression" in told


def test_a_zstd_file_of_one_frame_is_refused_as_well(tmp_path, limited):
    packed = in_one_frame(zstandard, b"\0" * 2**20, 4096)
    assert len(packed) < 400_000
    (tmp_path / "t").write_bytes(packed)
    assert limited(READ, tmp_path / "t", mib=200).startswith("65 t.jsonl: unpacks to more than")


def test_a_zstd_frame_that_asks_for_gigabytes_to_look_back_is_refused(tmp_path, limited):
    """Its header alone would have the decoder take them."""
    parameters = zstandard.ZstdCompressionParameters(window_log=30, enable_ldm=True, compression_level=1)
    packer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    (tmp_path / "t").write_bytes(packer.compress(GOOD) + packer.flush())
    told = limited(READ, tmp_path / "t", mib=200)
    assert told.startswith("65 t.jsonl:1: the compressed file is damaged"), told


def test_data_that_shrinks_as_text_does_is_read_whole(tmp_path, limited):
    rows = (json.dumps({"question": f"{n} red hats", "answer": f"red {n}"}) for n in range(600_000))
    content = "\n".join(rows).encode()
    for pack in (gzip.compress, zstandard.compress):
        (tmp_path / "t").write_bytes(pack(content))
        assert limited(READ, tmp_path / "t", mib=200) == "600000 lines"


def test_a_packed_bomb_ends_the_run_with_65(job):
    (job.data / "train.jsonl").write_bytes(in_one_frame(zstandard, b"x" * 2**20, 4096))
    ended = job.attacked(mib=1024)
    assert ended.code == ended.outcome["code"] == 65, ended.stdout
    assert "train.jsonl: unpacks to more than" in ended.outcome["reason"]
