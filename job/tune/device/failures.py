"""What an error of CUDA, its driver or a library names as broken, in one line."""

import re
from collections.abc import Iterator

_LONGEST_REASON = 200


def reason_of(error: Exception) -> str:
    """What CUDA or torch refused, in one line: torch's own texts continue with advice for people at a desk."""
    named = hardware_failure(error)
    if named is not None:
        return named
    first = str(error).strip().splitlines()[:1]
    return first[0][:_LONGEST_REASON].rstrip(".") if first else type(error).__name__


def error_line(error: Exception) -> str:
    """What any library refused: the error's kind and text, no longer than a line of a log should be."""
    return f"{type(error).__name__}: {error}"[:_LONGEST_REASON]


_HARDWARE: dict[int, tuple[str, str]] = {
    34: ("driver is a stub library", "the driver's library is a stub: the node's own is not mounted"),
    35: ("driver version is insufficient", "the driver is older than this CUDA needs"),
    46: ("device(s) is/are busy or unavailable", "the GPU is busy or unavailable: another process holds it for itself"),
    100: ("no cuda-capable device is detected", "no GPU is there any more"),
    102: ("valid grid license", "the virtual GPU has no licence"),
    103: ("integrity checks failed", "the GPU or its driver failed CUDA's own self-test"),
    214: ("uncorrectable ecc error", "uncorrectable memory error (ECC)"),
    220: ("uncorrectable nvlink error", "uncorrectable NVLink error"),
    226: ("or a hardware error", "the GPU contained a hardware error"),
    802: ("system not yet initialized", "the node's GPU services are not up (fabric manager)"),
    803: ("unsupported display driver / cuda driver", "the driver was changed without a restart of the node"),
    804: (
        "forward compatibility was attempted",
        "the driver is older than this CUDA needs, and the GPU forbids a bridge",
    ),
    **dict.fromkeys(range(805, 811), ("mps client", "the node's MPS server refused or ended this process")),
}
"""CUDA's error code -> words of its text, in small letters, and what it means to whoever runs the node.

Not here, since a wrong kernel causes them far more often than a broken GPU: 700 illegal address, 702 launch time-out (a
screen's watchdog), 714 hardware stack error (by name only: it is a kernel's call stack), 715 to 718 illegal
instruction and its kin, 719 unspecified launch failure, 201 invalid context, 999 unknown. After one of these the GPU's
own counters show whether it is broken: job.edge.host.gpu.
"""
_LOST = (
    ("gpu is lost", "the GPU is lost"),
    ("fallen off the bus", "the GPU has fallen off the bus"),
    ("fell off the bus", "the GPU has fallen off the bus"),
    ("gpu requires reset", "the GPU needs a reset"),
    ("gpu requires restart", "the GPU needs a reset"),
    ("device lost", "the GPU is lost"),
)
"""Words of an error without a CUDA code, and what they mean: the driver's management library's, which others quote."""
_XID = re.compile(r"\bxid(?: \(pci:[0-9a-f:.]+\))?:? *(\d+)", re.IGNORECASE)
_HARDWARE_XIDS = {48, 62, 63, 64, 74, 79, 92, 94, 95, 119, 120, 140}
"""The driver's own numbers: memory errors (48, 63, 64, 92, 94, 95, 140), links and bus (74, 79), the GPU's own
processors (62, 119, 120). Others (13, 31, 43, 45, 69) are mostly a program's doing."""


def hardware_failure(error: BaseException) -> str | None:
    """What is broken, when an error names the GPU, its driver or its node rather than the program; else None.

    A CUDA error's code decides where there is one, its text otherwise. What caused an error, or was being handled when
    it came, counts as well.
    """
    for each in _chain(error):
        if isinstance(each, RuntimeError):  # torch's, and Triton's: an example that quotes such words is none
            named = _by_code(each) if isinstance(getattr(each, "error_code", None), int) else _by_text(each)
            if named is not None:
                return named
    return None


def _by_code(error: BaseException) -> str | None:
    code: int = error.error_code  # type: ignore[attr-defined] # torch sets it on what CUDA refused
    return f"{_HARDWARE[code][1]} (CUDA error {code})" if code in _HARDWARE else None


def _by_text(error: BaseException) -> str | None:
    text = str(error).lower()
    if (xid := _XID.search(text)) and int(xid[1]) in _HARDWARE_XIDS:
        return f"the driver reports a hardware error (Xid {xid[1]})"
    return next((meaning for words, meaning in (*_HARDWARE.values(), *_LOST) if words in text), None)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
