"""Whether what arrived is what the store holds: most ETags are the MD5 of the content, with or without checksums."""

import hashlib
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

_MD5 = re.compile(r"[0-9a-f]{32}")
_COPIES = 3
"""So often the same bytes arrive before it is the ETag that is believed to be something else."""


def content_md5(answer: Mapping[str, Any]) -> str | None:
    """The MD5 that an answer's ETag gives of the whole object; None where it is none: sent in parts, or encrypted."""
    etag = str(answer["ETag"]).strip('"')
    encrypted = str(answer.get("ServerSideEncryption", "")).startswith("aws:kms") or "SSECustomerAlgorithm" in answer
    return etag if _MD5.fullmatch(etag) and not encrypted else None


def new_md5() -> Any:
    """A hash for content from a store; it guards against accidents, not against people."""
    return hashlib.md5(usedforsecurity=False)


class Etags:
    """What is known of one bucket's ETags: some stores make up what only looks like an MD5."""

    def __init__(self) -> None:
        self._are_md5: bool | None = None
        self._copies: Counter[tuple[str, str]] = Counter()

    def is_wrong(self, *, expected: str, found: str) -> bool:
        """Whether content with the MD5 `found` arrived damaged."""
        if found == expected:
            self._are_md5 = True
        elif self._are_md5 is None:
            self._copies[expected, found] += 1
            if self._copies[expected, found] == _COPIES:
                self._are_md5 = False
        return found != expected and self._are_md5 is not False
