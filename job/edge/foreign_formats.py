"""A file's first bytes -> which other format it is in, and the command line that makes JSON lines of it."""

import csv
import json
import re
import shlex
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Literal

Packing = Literal["plain", "gzip", "zstd"]

_WRITE = 'open(sys.argv[2],"w",encoding="utf-8",newline="\\n")'
_LINES = f'{_WRITE}.writelines(json.dumps(row,default=str)+"\\n" for row in ROWS)'
_BATCHES = "(row for batch in BATCHES for row in batch.to_pylist())"
_MARKS = {  # the longer ones first
    b"\xff\xfe\0\0": "utf-32",
    b"\0\0\xfe\xff": "utf-32",
    b"\xff\xfe": "utf-16",
    b"\xfe\xff": "utf-16",
    b"{\0\0\0": "utf-32-le",
    b"\0\0\0{": "utf-32-be",
    b"{\0": "utf-16-le",
    b"\0{": "utf-16-be",
}
_BINARY = {
    b"PAR1": ("Parquet", "pyarrow.parquet as p", "p.ParquetFile(sys.argv[1]).iter_batches()"),
    b"ARROW1": ("an Arrow file", "pyarrow as p", "p.ipc.open_file(p.memory_map(sys.argv[1])).read_all().to_batches()"),
    b"\xff\xff\xff\xff": ("an Arrow stream", "pyarrow as p", "p.ipc.open_stream(p.memory_map(sys.argv[1]))"),
}
_PACKED = {b"BZh": ("bzip2", "bz2"), b"\xfd7zXZ\0": ("xz", "lzma")}
_COLUMN = re.compile(r"[^\W\d][\w .#/-]{0,39}")
_DELIMITERS = ",\t;|"
_TEXT = {
    "plain": 'open(sys.argv[1],encoding="CODEC",newline="")',
    "gzip": 'gzip.open(sys.argv[1],"rt",encoding="CODEC",newline="")',
    "zstd": 'io.TextIOWrapper(zstandard.ZstdDecompressor().stream_reader(open(sys.argv[1],"rb"),'
    'read_across_frames=True),encoding="CODEC",newline="")',
}
_TEXT_NEEDS = {"plain": "", "gzip": ",gzip", "zstd": ",io,zstandard"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Foreign:
    """Another format."""

    kind: str
    """What messages call it."""
    code: str
    """Python that reads the file of the first argument and writes that of the second."""

    def message(self, path: str) -> str:
        """What it is, and what to do; the last line can be pasted into a shell.

        Args:
            path: where the file stands on this machine, or its name.
        """
        command = shlex.join(["python", "-c", self.code, path, _beside(path)])
        return f"is {self.kind}, and a record is a JSON object on a line of its own; make the file anew:\n  {command}"


def foreign(head: bytes, name: str, packing: Packing) -> Foreign | None:
    """Which other format a file is in; None: it may be JSON lines.

    Args:
        head: its first bytes, unpacked.
        name: its name, which says more than the bytes of a table.
        packing: what it was unpacked from.
    """
    for mark, (kind, module, batches) in _BINARY.items():
        if head.startswith(mark):
            rows = _LINES.replace("ROWS", _BATCHES.replace("BATCHES", batches))
            return Foreign(kind=kind, code=f"import json,sys,{module}; {rows}")
    for mark, (kind, module) in _PACKED.items():
        if head.startswith(mark):
            copy = f'shutil.copyfileobj({module}.open(sys.argv[1]),open(sys.argv[2],"wb"))'
            return Foreign(kind=f"packed with {kind}", code=f"import {module},shutil,sys; {copy}")
    for mark, codec in _MARKS.items():
        if head.startswith(mark):
            copy = f"shutil.copyfileobj({_opened(packing, codec)},{_WRITE})"
            return Foreign(kind=codec[:6].upper(), code=f"import shutil,sys{_TEXT_NEEDS[packing]}; {copy}")
    return _text(head.removeprefix(b"\xef\xbb\xbf"), name, packing)


def _text(head: bytes, name: str, packing: Packing) -> Foreign | None:
    if _is_array(head):
        rows = f"json.load({_opened(packing)})"
        return _rows("a JSON array", rows, packing)
    if re.match(rb"\s*\{[ \t]*\r?\n", head):
        # {"data": [...]}, as some sets come, or one record.
        whole = f"[json.load({_opened(packing)})]"
        found = f"(row for each in {whole} for row in next((v for v in each.values() if isinstance(v,list)),[each]))"
        return _rows("a JSON object over several lines", found, packing)
    delimiter = _delimiter(head, name)
    if delimiter is None:
        return None
    shown = {",": "CSV", "\t": "TSV"}.get(delimiter, f"CSV with {delimiter!r}")
    # Cells may be as long as texts are.
    rows = f"(csv.field_size_limit(2**31-1),csv.DictReader({_opened(packing)},delimiter={json.dumps(delimiter)}))[1]"
    return _rows(shown, rows, packing, needs=",csv")


def _rows(kind: str, rows: str, packing: Packing, *, needs: str = "") -> Foreign:
    return Foreign(kind=kind, code=f"import json,sys{needs}{_TEXT_NEEDS[packing]}; {_LINES.replace('ROWS', rows)}")


def _opened(packing: Packing, codec: str = "utf-8-sig") -> str:
    return _TEXT[packing].replace("CODEC", codec)


def _is_array(head: bytes) -> bool:
    if re.match(rb"\s*\[\s*(?:\{|\]\s*$|$)", head) is None:
        return False
    first, _, rest = head.lstrip().partition(b"\n")
    if not rest.lstrip().startswith(b"["):
        return True
    try:
        json.loads(first)
    except (ValueError, RecursionError):
        return True
    return False  # a list on every line


def _delimiter(head: bytes, name: str) -> str | None:
    """What stands between the columns of a table; None: it is none."""
    lines = [line for line in head[: 2**16].decode("utf-8", "replace").splitlines() if line.strip()]
    if not lines or lines[0].lstrip().startswith(("{", "[")):
        return None
    suffixes = {suffix.lower() for suffix in PurePosixPath(name).suffixes}
    likely = max(_DELIMITERS, key=lines[0].count)
    if ".tsv" in suffixes:
        return "\t"
    if ".csv" in suffixes:
        return likely if likely in lines[0] else ","
    names = next(csv.reader(lines[:1], delimiter=likely), [])
    is_header = len(names) > 1 and len(set(names)) == len(names) and all(map(_COLUMN.fullmatch, names))
    return likely if is_header and len(lines) > 1 and likely in lines[1] else None


def _beside(path: str) -> str:
    """Where the new file goes: `train.jsonl` for `train.csv.gz`, `train.new.jsonl` for `train.jsonl`."""
    whole = PurePosixPath(path)
    stem = whole
    while stem.suffix.lower() in {
        ".gz",
        ".zst",
        ".bz2",
        ".xz",
        ".csv",
        ".tsv",
        ".json",
        ".jsonl",
        ".parquet",
        ".arrow",
        ".txt",
    }:
        stem = stem.with_suffix("")
    wanted = stem.with_name(f"{stem.name}.jsonl")
    return str(wanted if wanted != whole else stem.with_name(f"{stem.name}.new.jsonl"))
