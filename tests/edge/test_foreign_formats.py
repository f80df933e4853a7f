"""Files of other formats: recognised by their first bytes, and answered with a line that makes JSON lines of them."""

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from job.core.errors import DataError
from job.core.lines import hung
from job.edge.dataset_files import DataFile, read_lines
from job.edge.store.objects import StoredObject

ROWS = [{"q": "What is 'it', [1]?", "a": 'it is "this"\nand ä'}, {"q": "two; 2,\t| ", "a": "b"}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


def table(delimiter):
    written = io.StringIO()
    writer = csv.DictWriter(written, ["q", "a"], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(ROWS)
    return written.getvalue()


def parquet():
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(ROWS), out)
    return out.getvalue()


def arrow(new):
    out, rows = io.BytesIO(), pa.Table.from_pylist(ROWS)
    with new(out, rows.schema) as writer:
        writer.write_table(rows)
    return out.getvalue()


def frames(content):
    half = len(content) // 2
    return zstandard.compress(content[:half]) + zstandard.compress(content[half:])


KINDS = {
    "UTF-16 with its mark": ("train.jsonl", LINES.encode("utf-16"), "UTF-16"),
    "UTF-16 without a mark": ("train.jsonl", LINES.encode("utf-16-le"), "UTF-16"),
    "UTF-16, the other end first": ("train.jsonl", LINES.encode("utf-16-be"), "UTF-16"),
    "UTF-32": ("train.jsonl", LINES.encode("utf-32"), "UTF-32"),
    "UTF-16 in gzip": ("train.jsonl.gz", gzip.compress(LINES.encode("utf-16")), "UTF-16"),
    "an array": ("train.json", json.dumps(ROWS).encode(), "a JSON array"),
    "an indented array": ("my train's [1].json", json.dumps(ROWS, indent=2).encode(), "a JSON array"),
    "an array after a mark": ("train.jsonl", b"\xef\xbb\xbf" + json.dumps(ROWS, indent=1).encode(), "a JSON array"),
    "an array in zstd": ("train.json.zst", frames(json.dumps(ROWS).encode()), "a JSON array"),
    "an object that holds the array": (
        "train.json",
        json.dumps({"version": "1", "data": ROWS}, indent=2).encode(),
        "a JSON object over several lines",
    ),
    "CSV": ("train.csv", table(",").encode(), "CSV"),
    "CSV by its head alone": ("train.jsonl", table(",").encode(), "CSV"),
    "CSV after a mark": ("$train.csv", table(",").encode("utf-8-sig"), "CSV"),
    "CSV with semicolons": ("train.csv", table(";").encode(), "CSV with ';'"),
    "CSV in gzip": ("train.csv.gz", gzip.compress(table(",").encode()), "CSV"),
    "CSV in zstd": ("train.csv.zst", frames(table(",").encode()), "CSV"),
    "TSV": ("train.tsv", table("\t").encode(), "TSV"),
    "Parquet": ("train.parquet", parquet(), "Parquet"),
    "an Arrow file": ("train.arrow", arrow(pa.ipc.new_file), "an Arrow file"),
    "an Arrow stream": ("train.arrow", arrow(pa.ipc.new_stream), "an Arrow stream"),
    "bzip2": ("train.jsonl.bz2", bz2.compress(LINES.encode()), "packed with bzip2"),
    "xz": ("train.jsonl.xz", lzma.compress(LINES.encode()), "packed with xz"),
}


def read(path):
    source = StoredObject(uri=f"file://{path}", key="k", size=0, etag="", version=None)
    file = DataFile(name=path.name, path=path, source=source, sha256="")
    return [line for _, _, line in read_lines([file], max_record=2**20)]


@pytest.mark.parametrize("kind", KINDS)
def test_the_line_that_is_proposed_makes_json_lines_when_it_is_pasted_into_a_shell(tmp_path, kind):
    name, content, told = KINDS[kind]
    (tmp_path / name).write_bytes(content)

    with pytest.raises(DataError) as refused:
        read(tmp_path / name)
    first, command = str(refused.value).splitlines()
    assert first.startswith(f"{name}: is {told}, and a record is")
    assert hung(command, 80) == [command]  # broken at the terminal's width it could not be pasted

    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    before = set(tmp_path.iterdir())
    subprocess.run(["bash", "-c", command.strip()], check=True, env={**os.environ, "PATH": path}, cwd="/")
    (made,) = set(tmp_path.iterdir()) - before
    assert made.suffix == ".jsonl"
    assert [json.loads(line) for line in read(made)] == ROWS


@pytest.mark.parametrize(
    "content",
    [
        LINES,
        "\n\n" + LINES,
        "hello\nworld\n",
        "Hello, world. This is text\nand more, of it\n",
        '[{"role": "user"}]\n[{"role": "user"}]\n',
        "[1, 2]\n",
        '{"a": 1,\n',
        '"a,b"\n',
        "",
    ],
)
def test_what_may_be_json_lines_is_judged_line_by_line(tmp_path, content):
    (tmp_path / "train.jsonl").write_text(content, encoding="utf-8")
    assert b"\n".join(read(tmp_path / "train.jsonl")) == content.removesuffix("\n").encode()
