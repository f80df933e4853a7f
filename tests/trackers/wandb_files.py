"""Reads what W&B keeps of a run on the disk: records of its own protocol in blocks, as LevelDB's log has them."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path

_BLOCK, _HEAD = 32768, 7
_FIRST, _FULL, _LAST = 2, 1, 4


def records(path: Path) -> Iterator:
    """The records of a `.wandb` file."""
    from wandb.proto.wandb_internal_pb2 import Record

    data = path.read_bytes()
    assert data[:4] == b":W&B"
    place, whole = _HEAD, b""
    while place + _HEAD <= len(data):
        left = _BLOCK - place % _BLOCK
        if left < _HEAD:
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + _HEAD])
        part = data[place + _HEAD : place + _HEAD + length]
        place += _HEAD + length
        whole = part if kind in {_FULL, _FIRST} else whole + part
        if kind in {_FULL, _LAST}:
            yield Record.FromString(whole)


def history(path: Path) -> list[dict]:
    """Each step's numbers."""
    return [
        {(item.key or item.nested_key[0]): json.loads(item.value_json) for item in record.history.item}
        for record in records(path)
        if record.WhichOneof("record_type") == "history"
    ]


def summary(path: Path) -> dict:
    """What the run came to."""
    return {
        (item.key or item.nested_key[0]): json.loads(item.value_json)
        for record in records(path)
        if record.WhichOneof("record_type") == "summary"
        for item in record.summary.update
    }


def config(path: Path) -> dict:
    """What it was begun with."""
    return {
        (item.key or item.nested_key[0]): json.loads(item.value_json)
        for record in records(path)
        if record.WhichOneof("record_type") == "run"
        for item in record.run.config.update
    }
