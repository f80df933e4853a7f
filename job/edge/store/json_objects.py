"""Small JSON objects (records, locks, manifests): always written the same way, and read as objects or refused."""

import json
from collections.abc import Mapping
from typing import Any


def json_bytes(content: Mapping[str, Any]) -> bytes:
    """The bytes of an object: the same content gives the same bytes, and a person can read them."""
    return json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False).encode() + b"\n"


def json_object(data: bytes) -> dict[str, Any]:
    """The object that bytes hold.

    Raises:
        ValueError: they hold none; what stands in a bucket may be anything.
    """
    try:
        content = json.loads(data)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if type(content) is not dict:
        raise ValueError(f"a {type(content).__name__} instead of an object")
    return content
