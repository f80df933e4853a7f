"""Small JSON objects (records, locks, manifests): always written the same way, and read as objects or refused."""

import json
import math
from collections.abc import Mapping
from typing import Any

_LARGEST = 2**63
"""Integers stay below it: nothing that a run counts is larger, and what computes with them need not ask."""


def json_bytes(content: Mapping[str, Any]) -> bytes:
    """The bytes of an object: the same content gives the same bytes, and a person can read them."""
    return json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False).encode() + b"\n"


def json_object(data: bytes) -> dict[str, Any]:
    """The object that bytes hold: finite numbers, and text that can be written again.

    Raises:
        ValueError: they hold none; what stands in a bucket may be anything.
    """
    try:
        content = json.loads(data, parse_int=_integer, parse_float=_number, parse_constant=_number)
        if b"\\u" in data:
            # Half of a pair of surrogates is JSON, but no text: the first place that writes it would fail.
            json.dumps(content, ensure_ascii=False).encode()
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if type(content) is not dict:
        raise ValueError(f"a {type(content).__name__} instead of an object")
    return content


def _integer(written: str) -> int:
    value = int(written)
    if abs(value) >= _LARGEST:
        raise ValueError(f"{written:.30} is too large a number")
    return value


def _number(written: str) -> float:
    value = float(written)
    if not math.isfinite(value):
        raise ValueError(f"{written:.30} is no finite number")
    return value
